"""The end of a finished run: its report, and the one line that says how it went."""

import json
from collections.abc import Iterator

from framework.config import RunConfig
from framework.progress import RunHistory
from framework.report import write_report
from rollout.run_dir import RunDir

DRIFT = 1e-2
"""A difference of log-probs, in nats, that is no rounding any more."""


def finish_run(config: RunConfig, seconds: float) -> str:
    """Write the report (tracker.report) and return the last lines of `drivetrain`, notes first.

    A report that cannot be written does not undo a finished run: the line says why.
    """
    run_dir = RunDir(config.run_dir)
    history = RunHistory(run_dir, config.num_steps)
    history.poll()
    where = f"run directory {run_dir.path}"
    if config.tracker.report:
        try:
            write_report(run_dir.path)
            where = f"report {run_dir.report}"
        except (OSError, ValueError) as error:
            where = f"no report ({error}); {where}"
    last = f"drivetrain: {_outcome(config, history)}, {seconds:.0f} s; {where}"
    return "\n".join([*(f"drivetrain: note: {note}" for note in _notes(config, history)), last])


def _notes(config: RunConfig, history: RunHistory) -> Iterator[str]:
    """What makes the outcome mean less than it seems to."""
    compares = config.rollout.samples_per_prompt > 1
    if compares and history.steps_done and not history.steps_with_signal:
        yield (
            "the samples of every group had equal rewards in all steps: there was nothing to learn "
            "from"
        )
    yield from missed_targets(config, history.accuracies)
    far = [each for each in history.logprob_diffs if each[1] > DRIFT]
    if config.mode == "train_only" and far:
        yield (
            f"from step {far[0][0]} on the policy is not the one that wrote the journal (log-probs "
            f"differ by up to {max(diff for _, diff in far):.2g}), and rewards and accuracies are "
            "the journal's, not its own; mode=eval measures it. A replay with the journal's own "
            "configuration and layout is exact; in any other the difference grows with each step"
        )


def missed_targets(config: RunConfig, accuracies: list[float]) -> Iterator[str]:
    """What the experiment promised and this run did not reach."""
    target, gain = config.eval.target_accuracy, config.eval.target_gain
    if config.mode != "train" or config.stage != "rl" or len(accuracies) < 2:
        return
    first, last = accuracies[0], accuracies[-1]
    if last < target:
        yield f"accuracy {last:.3f} is below eval.target_accuracy={target:g}"
    if gain and last - first < gain:
        yield f"accuracy rose by {last - first:.3f}, less than eval.target_gain={gain:g}"


def _outcome(config: RunConfig, history: RunHistory) -> str:
    if config.mode == "rollout_only":
        return f"{config.num_steps} batches journaled"
    parts = []
    if config.mode == "eval":
        return f"accuracy {_measured(RunDir(config.run_dir)):.3f}"
    # A policy that is its own reference ties every pair, which is not right: it begins at 0.
    what = "accuracy" if config.stage in ("rl", "sft") else "accuracy of preferences"
    if len(history.accuracies) > 1:
        parts.append(f"{what} {history.accuracies[0]:.3f} -> {history.accuracies[-1]:.3f}")
    elif history.accuracies:
        parts.append(f"{what} {history.accuracies[0]:.3f}")
    elif history.losses:
        parts.append(f"loss {history.losses[0]:.4f} -> {history.losses[-1]:.4f}")
    parts.append(f"{history.steps_done} steps")
    return ", ".join(parts)


def _measured(run_dir: RunDir) -> float:
    """The accuracy of mode=eval, which has no trainer that writes metrics."""
    lines = run_dir.eval.read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["accuracy"])
