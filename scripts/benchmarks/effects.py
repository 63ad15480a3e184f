"""Effects that papers report, here as two arms each that differ in one choice: with it and without.

    python scripts/benchmarks/effects.py [--effects tis] [--seeds 0 1 2] [--json FILE]

The arms of a seed begin with the same weights (sweep.py). An effect shows on a seed where the arm
with it ends at least `margin` above the arm without, or where its figure is by so much lower. What
is printed is what was seen: an effect that does not show is a result. Needs no GPU. Exit status 1
when a run failed.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

# pyright: reportMissingImports=false
from sweep import Outcome, Run, options, sweep_as_told  # noqa: E402

BASE = "experiment=learn_grpo"
EVAL_TIMEOUT_S = 600.0
FAILED = "failed: "
SHORT = ("num_steps=60", "optimizer.lr=4e-4")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Overrides of both arms, of the arm without it, of the arm with it."""

    says: str
    both: tuple[str, ...]
    without: tuple[str, ...]
    having: tuple[str, ...]
    margin: float = 0.1
    """Below 0: the arm with it may end lower, by as much."""
    figure: str = ""
    """Instead of accuracy: the mean of this figure over all steps, which must fall, by at least
    `margin` of what it is without."""
    final: bool = False
    """Accuracy is that of the trainer's own weights (hf/, by mode=eval), not of what engines serve
    of them; there is none from before the training."""
    also: tuple[str, ...] = ()
    """Further figures to print of both arms, means over all steps."""


EFFECTS = {
    "tis": Effect(
        says="truncated importance sampling (Yao et al. 2025) under rollouts of 2-bit weights",
        both=("experiment=quantized_rollouts",),
        without=("algorithm=grpo",),
        having=(),
        final=True,
        also=("train/rollout_logprob_abs_diff_mean",),
    ),
    "clip": Effect(
        says="PPO's clip (arXiv 1707.06347) on off-policy minibatches, eight updates on each batch",
        both=(BASE, "algorithm.updates_per_step=8", "optimizer.lr=4e-4", "num_steps=40"),
        without=("algorithm.loss_args.clip_low=1", "algorithm.loss_args.clip_high=1e6"),
        having=(),
    ),
    "stale": Effect(
        says="ratio and clip, against the engine's log-probs, on samples 8 steps old",
        both=(BASE, "rollout.max_staleness_steps=8", *SHORT),
        without=("algorithm.loss=policy_gradient",),
        having=("algorithm.old_logprobs=engine",),
    ),
    "lora": Effect(
        says="adapters (arXiv 2106.09685) are within .05 of training the whole model",
        both=("experiment=calculator_lora", "parallel=single"),
        without=("model.lora.rank=0", "optimizer.lr=4e-4"),
        having=(),
        margin=-0.05,
    ),
    "routes": Effect(
        says="replay of the engine's routes (arXiv 2510.11370), engine and trainer bf16",
        both=("experiment=routing_replay",),
        # The gate refuses this arm: single tokens are too far off.
        without=("algorithm.routing_replay=none", "gate.logprob_abs_diff_max_bf16=20"),
        having=(),
        figure="train/rollout_logprob_abs_diff_mean",
        also=(
            "train/other_experts_fraction",
            "train/rollout_logprob_abs_diff_other_experts_mean",
            "train/rollout_logprob_abs_diff_max",
            "train/rollout_kl",
        ),
    ),
}


def main() -> int:
    """Run what the command line selects."""
    parser = options("effects of papers, both arms", timeout_s=900)
    parser.add_argument("--effects", nargs="+", choices=EFFECTS, default=list(EFFECTS))
    arguments = parser.parse_args()
    for name in arguments.effects:
        print(f"{name}: {EFFECTS[name].says}")
    print("\n| effect | seed | before | without | with | difference | verdict |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows, failed = [], False
    for name in arguments.effects:  # each with engines of its own
        arms: dict[int, dict[str, Outcome]] = {}
        place = arguments.keep and arguments.keep / name
        own = argparse.Namespace(**{**vars(arguments), "keep": place})
        for outcome in sweep_as_told(runs_of(name, arguments), own):
            _, _, arm = outcome.run.name.rpartition("_")
            pair = arms.setdefault(outcome.run.seed, {})
            pair[arm] = outcome
            if len(pair) == 2:
                rows.append(row_of(name, **pair))
                failed |= rows[-1]["verdict"].startswith(FAILED)
                print(line_of(rows[-1]), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1))
    for name in arguments.effects:
        shown = [row["verdict"] == "shows" for row in rows if row["effect"] == name]
        effect = EFFECTS[name]
        better = f"less {effect.figure} by a share of" if effect.figure else "more accuracy by"
        if effect.margin < 0:
            better = "less accuracy by at most"
        print(f"{name}: {better} {abs(effect.margin):g} on {sum(shown)} of {len(shown)} seeds")
    return int(failed)


def runs_of(name: str, arguments: argparse.Namespace) -> list[Run]:
    """Both arms of an effect, on every seed."""
    effect = EFFECTS[name]
    return [
        Run(
            name=f"{name}_{arm}",
            seed=seed,
            overrides=(*effect.both, *overrides, *arguments.overrides),
        )
        for seed in arguments.seeds
        for arm, overrides in (("without", effect.without), ("having", effect.having))
    ]


def row_of(name: str, without: Outcome, having: Outcome) -> dict:
    """Both arms of a seed."""
    effect = EFFECTS[name]
    row: dict = {"effect": name, "seed": without.run.seed}
    if problem := without.problem or having.problem:
        return row | {"verdict": FAILED + problem}
    if effect.figure:
        first, second = (mean_of(each, effect.figure) for each in (without, having))
        shows = first - second >= effect.margin * first
    elif effect.final:  # what was served before it is of other weights: no figure to set beside
        try:
            with ThreadPoolExecutor() as pool:
                first, second = pool.map(own_accuracy, (without, having))
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return row | {"verdict": f"{FAILED}evaluation: {error}"}
        shows = second - first >= effect.margin
    else:
        first, second = (each.accuracies[-1] for each in (without, having))
        shows = second - first >= effect.margin
        row["before"] = having.accuracies[0]
    return row | {
        "without": first,
        "with": second,
        "difference": second - first,
        "verdict": "shows" if shows else "does not show",
        "also": {key: [mean_of(each, key) for each in (without, having)] for key in effect.also},
    }


def own_accuracy(outcome: Outcome) -> float:
    """Of the final weights as the trainer has them.

    Raises:
        CalledProcessError: the evaluation failed.
        TimeoutExpired: it took longer than EVAL_TIMEOUT_S.
    """
    directory = outcome.run_dir.with_name(f"{outcome.run_dir.name}_eval")
    command = [
        str(Path(sys.executable).with_name("drivetrain")),
        *outcome.run.overrides,
        f"seed={outcome.run.seed}",
        *("mode=eval", "warm_start.num_steps=0", "weight_sync.quantization=none"),
        *("tracker=quiet", f"model.hf_path={outcome.run_dir / 'hf'}", f"run_dir={directory}"),
    ]
    subprocess.run(command, check=True, timeout=EVAL_TIMEOUT_S, stdout=subprocess.DEVNULL)
    return json.loads((directory / "eval.jsonl").read_text())["accuracy"]


def mean_of(outcome: Outcome, key: str) -> float:
    """A figure's mean over the steps of a run."""
    lines = (outcome.run_dir / "metrics.jsonl").read_text().splitlines()
    found = [row[key] for row in map(json.loads, lines) if key in row]
    return sum(found) / len(found)


def line_of(row: dict) -> str:
    """The same as a line of markdown."""
    names = ("before", "without", "with", "difference")
    figures = [f"{row[name]:.4g}" if name in row else "" for name in names]
    also = [f"; {key} {a:.4g}, {b:.4g}" for key, (a, b) in row.get("also", {}).items()]
    verdict = row["verdict"] + "".join(also)
    return f"| {row['effect']} | {row['seed']} | {' | '.join(figures)} | {verdict} |"


if __name__ == "__main__":
    sys.exit(main())
