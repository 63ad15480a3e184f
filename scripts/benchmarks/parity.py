"""Train every layout of tests/distributed/layouts.py and print how far each ends from one rank.

    python scripts/benchmarks/parity.py [--ci] [--json FILE] [WORD ...]

Words select rows whose name holds all of them (`moe`, `vpp2`). Exit status 1 when a row is beyond
its tolerance. Needs no GPU; up to 8 processes.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed")]

# pyright: reportMissingImports=false
from layouts import CASES, LOSS_TOLERANCE, PLANTED, WEIGHT_TOLERANCE  # noqa: E402

HEADER = (
    "| layout | processes | loss, relative | weights, absolute | gradient norm | entropy | time |"
)


def main() -> int:
    """Run the rows that the command line selects."""
    parser = argparse.ArgumentParser(description="How far each layout ends from one rank")
    parser.add_argument("words", nargs="*", help="only rows whose name holds all of these")
    parser.add_argument("--ci", action="store_true", help="only the rows that run for every change")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    cases = [
        case
        for case in [*CASES, PLANTED]
        if (case.ci or not arguments.ci) and set(arguments.words) <= set(case.name.split())
    ]
    if not cases:
        parser.error(f"no layout is named {' '.join(arguments.words)}")
    from layout_parity import NUM_STEPS, UPDATES_PER_STEP, measure  # imports megatron-core

    print(
        f"{NUM_STEPS} steps of GRPO in fp32, {UPDATES_PER_STEP} AdamW updates each; bounds: loss "
        f"{LOSS_TOLERANCE:g}, weights {WEIGHT_TOLERANCE:g}. Largest difference from one rank:\n"
    )
    print(f"{HEADER}\n|---|---|---|---|---|---|---|", flush=True)
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as directory:
        for row in measure(Path(directory), cases):
            within = row["loss_rel"] <= LOSS_TOLERANCE and row["weight_abs"] <= WEIGHT_TOLERANCE
            row["right"] = within is (row["name"] != PLANTED.name)
            rows.append(row)
            print(
                f"| {row['name']}{'' if within else ' (beyond)'} | {row['processes']} "
                f"| {row['loss_rel']:.1e} | {row['weight_abs']:.1e} | {row['grad_norm_rel']:.1e} "
                f"| {row['entropy_rel']:.1e} | {row['time_s']:.1f} s |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    moved, wrong = (
        min(row["moved_abs"] for row in rows),
        [r["name"] for r in rows if not r["right"]],
    )
    print(
        f"\n{len(rows)} rows in {time.monotonic() - started:.0f} s; weights moved by {moved:.1e}."
    )
    if PLANTED in cases:
        print(f"'{PLANTED.name}' is a planted mistake and must be beyond the bounds.")
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
