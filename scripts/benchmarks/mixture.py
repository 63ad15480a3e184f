"""What a slow task costs a quick one in the same run: samples of the quick one per second.

    python scripts/benchmarks/mixture.py [--delay 30] [--staleness 96] [--steps 150] [--rounds 1]
        [--together]

Whole runs with real servers (one SGLang engine, one trainer). Alone: 31 groups of `sort` a step.
Mixed: the same 31, and one group of a task whose environment takes `--delay` seconds, so that a
step has a 32nd of its work more. Ratios are exact, so a step waits for its slow group: with
staleness n that group was started n steps earlier, and nothing waits while n steps of the quick
task alone take as long as the environment. Steps before n + 2 are left out of both: the first slow
group is waited for in full.

Printed: seconds a step, samples of the quick task per second, and what waiting for batches took.
Exit status 1 when the mixed run's figure is more than 10 % below the other one's, or n steps take
less than the delay, so that nothing else could come of it. --together lets both run at the same
time, and compares what they do while both are past their first n + 2 steps and neither has ended:
where a machine has other things to do as well, they have the same share of it, and what one leaves
idle the other gets.

Seen on two busy cores, --together --staleness 64 (steps of 1.5 s): .89 to .96 by the window chosen.
With --staleness 16 steps of .44 s became ones of 3 s, as they must: 16 of them are no 30 s.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from one_run import run_to_end

from rollout.journal import list_steps, read_step

QUICK_GROUPS, SAMPLES = 31, 4
COMMON = [
    "experiment=smoke",
    "warm_start.num_steps=0",
    "eval.at_start=false",
    "eval.at_end=false",
    f"rollout.samples_per_prompt={SAMPLES}",
    "rollout.sampling.max_new_tokens=48",
    "algorithm.correction=token",
    "optimizer.lr=1e-6",
    "tracker=quiet",
]
ALONE = [f"rollout.prompts_per_step={QUICK_GROUPS}", "data.args.num_digits=8"]


def mixed(delay_s: float) -> list[str]:
    """The overrides of the mixed run."""
    quick = f"quick: {{weight: {QUICK_GROUPS}, task: sort, args: {{num_digits: 8}}}}"
    slow = f"task: slow_sort.SlowSort, args: {{delay_s: {delay_s}}}, timeout_s: {3 * delay_s}"
    return [
        f"rollout.prompts_per_step={QUICK_GROUPS + 1}",
        f"data.mixture={{{quick}, slow: {{{slow}}}}}",
    ]


def main() -> None:
    """Run both, print, compare."""
    parser = argparse.ArgumentParser(description="a slow and a quick task in one run")
    parser.add_argument("--delay", type=float, default=30.0)
    parser.add_argument("--staleness", type=int, default=96)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--together", action="store_true")
    arguments = parser.parse_args()
    first = arguments.staleness + 2
    if arguments.steps < first + 4:
        sys.exit(f"--steps {arguments.steps}: at least {first + 4}")
    common = [
        *(*COMMON, f"num_steps={arguments.steps}"),
        f"rollout.max_staleness_steps={arguments.staleness}",
    ]
    runs = {"alone": ALONE, "mixed": mixed(arguments.delay)}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    with (
        tempfile.TemporaryDirectory() as scratch,
        ThreadPoolExecutor(len(runs) if arguments.together else 1) as pool,
    ):
        for number in range(arguments.rounds):
            run_dirs = {name: Path(scratch, f"{name}_{number}") for name in runs}
            for done in [
                pool.submit(run_to_end, run_dirs[name], *common, *overrides)
                for name, overrides in runs.items()
            ]:
                done.result()
            times = {name: delivered(run_dir, first) for name, run_dir in run_dirs.items()}
            begin, end = -math.inf, math.inf
            if arguments.together:
                begin, end = max(t[0] for t in times.values()), min(t[-1] for t in times.values())
            for name, run_dir in run_dirs.items():
                inside = [k for k, time in enumerate(times[name]) if begin <= time <= end]
                rates[name].append(
                    measure(
                        name,
                        run_dir,
                        first + min(inside, default=0),
                        [times[name][k] for k in inside],
                    )
                )
    alone, both = (statistics.mean(rates[name]) for name in ("alone", "mixed"))
    print(f"quick samples/s: alone {alone:.1f}, mixed {both:.1f}, ratio {both / alone:.3f}")
    covered = arguments.staleness * QUICK_GROUPS * SAMPLES / alone
    print(f"{arguments.staleness} steps of the quick task take {covered:.0f} s")
    if covered < arguments.delay:
        sys.exit(f"less than --delay {arguments.delay:g}: raise --staleness")
    if both < 0.9 * alone:
        sys.exit("the slow task costs the quick one more than a tenth")


def delivered(run_dir: Path, first: int) -> list[float]:
    """When each step from `first` on was journaled; checks that every step has its share."""
    paths = list_steps(run_dir / "rollouts")
    for path in paths:
        quick = [sample for sample in read_step(path)[1] if sample.domain != "slow"]
        if len(quick) != QUICK_GROUPS * SAMPLES:
            sys.exit(f"{path}: {len(quick)} samples of the quick task")
    return [path.stat().st_mtime for path in paths[first:]]


def measure(name: str, run_dir: Path, first: int, times: list[float]) -> float:
    """Quick samples per second of the steps from `first` on that were journaled at `times`."""
    if len(times) < 2:
        sys.exit(f"{name}: {len(times)} steps to be measured; raise --steps")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    rows = rows[first : first + len(times)]
    waited = statistics.mean(row["perf/wait_s"] for row in rows)
    oldest = max(row["rollout/staleness_max"] for row in rows)
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    rate = QUICK_GROUPS * SAMPLES / seconds
    print(
        f"{name}: {len(times)} steps of {seconds:.2f} s, {waited:.2f} s of each waiting, oldest "
        f"sample {oldest:.0f} steps, {rate:.1f} quick samples/s",
        flush=True,
    )
    return rate


if __name__ == "__main__":
    main()
