"""Where the figures of a run go: metrics.jsonl always, TensorBoard when it is wanted.

One JSON object a line with `step` and slash-named keys, written by the logging rank alone and
flushed line by line, so that a run that dies has told all it knew.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rollout.journal import trim_lines
from rollout.types import EvalResult


class Tracker(Protocol):
    """One place that figures go to."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the figures of a step."""
        ...

    def close(self) -> None:
        """Nothing more will be logged."""
        ...


class JsonlTracker:
    """metrics.jsonl: appended to, one write a line, flushed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line; figures that are not finite are written as null, which JSON has."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardTracker:
    """Event files under run_dir/tensorboard."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import: only where wanted

        self._writer = SummaryWriter(str(path), flush_secs=5, purge_step=first_step or None)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One scalar for each figure."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class MetricsLogger:
    """Fans the figures of a step out to the run's trackers. Made on the logging rank only."""

    def __init__(self, run_dir: Any, tensorboard: bool = True, done: int = 0) -> None:
        """Lines of steps after `done` are dropped: the run goes on from there and writes them anew.

        run_dir: a rollout.run_dir.RunDir or a path.
        """
        path = Path(getattr(run_dir, "path", run_dir))
        trim_lines(path / "metrics.jsonl", "step", done if done else -1)
        self._trackers: list[Tracker] = [JsonlTracker(path / "metrics.jsonl")]
        if tensorboard:
            self._trackers.append(TensorBoardTracker(path / "tensorboard", done + 1 if done else 0))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record figures by slash-named key (`train/loss`).

        Raises:
            ValueError: a key is `step`, or a value is no number.
        """
        plain: dict[str, float] = {}
        for key, value in metrics.items():
            if key == "step":
                raise ValueError("metrics: `step` is the line's own key")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"metrics: {key}={value!r} is not a number")
            plain[key] = value
        for tracker in self._trackers:
            tracker.log(step, plain)

    def close(self) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            tracker.close()


def step_means(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of a step's updates, in order, as the step's: their means over those that have
    them, train/tokens the sum."""
    found: dict[str, list[float]] = {}
    for figures in updates:
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
    metrics = {name: sum(values) / len(values) for name, values in found.items()}
    metrics["train/tokens"] = sum(found["train/tokens"])  # each token is in one update
    # Later updates see a policy that has moved on: only the first compares like with like.
    first = [key for key in metrics if "rollout_ratio" in key or "rollout_logprob" in key]
    others = {key: value for key, value in metrics.items() if key not in first}
    return others | {key: updates[0][key] for key in first if key in updates[0]}


def set_figures(result: EvalResult) -> dict[str, float]:
    """`eval/<set>/...` of an evaluation's named sets; pass@k and avg@k where they have several
    samples of each prompt."""
    figures: dict[str, float] = {}
    for name, each in result.sets.items():
        figures |= {
            f"eval/{name}/accuracy": each.accuracy,
            f"eval/{name}/reward_mean": each.reward_mean,
            f"eval/{name}/failed_fraction": each.failed_fraction,
            f"eval/{name}/response_length_mean": each.response_length_mean,
        }
        if each.samples_per_prompt > 1:
            figures[f"eval/{name}/avg_at_{each.samples_per_prompt}"] = each.accuracy
        figures |= {f"eval/{name}/pass_at_{k}": value for k, value in each.pass_at.items()}
    return figures


class MetricsReader:
    """Follows a metrics.jsonl that is being written; complete lines only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = -1

    def poll(self) -> list[dict[str, Any]]:
        """The lines written since the last call, as dicts with `step`; [] while there is no file.

        All lines, where trainers that started again have put a shorter file in its place.

        Raises:
            ValueError: a line is not a JSON object with a step.
        """
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        rows = []
        for line in complete.splitlines():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self._path}: a line is not JSON: {line[:120]!r}") from error
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError(f"{self._path}: a line has no step: {line[:120]!r}")
            rows.append(row)
        return rows
