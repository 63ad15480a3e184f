"""What a person sees while a run works: a live display on a terminal, plain lines elsewhere.

The launcher calls `tick()`; the figures come from metrics.jsonl, which the trainers write.
"""

import time
from collections import deque
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from framework.metrics import MetricsReader
from rollout.run_dir import RunDir

PLAIN_INTERVAL_S = 2.0
REFRESH_INTERVAL_S = 0.25
LOGPROB_DIFF = "train/rollout_logprob_abs_diff_max"
SHOWN = (  # label, key, format
    ("reward", "rollout/reward_mean", "{:.3f}"),
    ("accuracy", "rollout/accuracy", "{:.3f}"),
    ("held-out", "eval/accuracy", "{:.3f}"),
    ("loss", "train/loss", "{:.4f}"),
    ("logprob diff", LOGPROB_DIFF, "{:.1e}"),
    ("tokens/s", "perf/tokens_per_s", "{:.0f}"),
    ("s/step", "perf/step_time_s", "{:.2f}"),
)


class RunHistory:
    """The figures of one stage as they arrive, and what follows from them."""

    def __init__(self, run_dir: RunDir, num_steps: int) -> None:
        self.num_steps = num_steps
        self.latest: dict[str, float] = {}
        self.steps_done = 0
        self.accuracies: list[float] = []
        """Every eval/accuracy, in order."""
        self.losses: list[float] = []
        """First and last train/loss."""
        self.steps_with_signal = 0
        """Steps in which some group had rewards that differ."""
        self.logprob_diffs: list[tuple[int, float]] = []
        """(step, largest difference of trainer and engine) of every step."""
        self._reader = MetricsReader(run_dir.metrics)
        self._recent: deque[float] = deque(maxlen=20)
        self._last_arrival: float | None = None

    def figures(self) -> list[tuple[str, str]]:
        """What is worth showing now, as (label, text)."""
        generated = "rollout/reward_mean" in self.latest  # else there is no engine to compare with
        return [
            (label, template.format(self.latest[key]))
            for label, key, template in SHOWN
            if key in self.latest and (generated or key != LOGPROB_DIFF)
        ]

    def poll(self) -> list[dict[str, Any]]:
        """Take in the lines written since the last call; the new ones are returned."""
        rows = self._reader.poll()
        for row in rows:
            known: dict[str, float] = {
                key: value for key, value in row.items() if isinstance(value, int | float)
            }
            self.latest.update({key: value for key, value in known.items() if key != "step"})
            if "eval/accuracy" in known:
                self.accuracies.append(known["eval/accuracy"])
            if "train/loss" in known:
                self._note_step(known)
        return rows

    def _note_step(self, row: dict[str, float]) -> None:
        self.steps_done = int(row["step"])
        self.losses = [*self.losses[:1], row["train/loss"]]
        self.steps_with_signal += row.get("rollout/groups_uniform_fraction", 0.0) < 1
        if LOGPROB_DIFF in row:
            self.logprob_diffs.append((int(row["step"]), row[LOGPROB_DIFF]))
        now = time.monotonic()
        if self._last_arrival is not None:
            self._recent.append(now - self._last_arrival)
        self._last_arrival = now

    @property
    def seconds_left(self) -> float | None:
        """Time of the remaining steps at the recent pace; None before two steps are done."""
        if not self._recent:
            return None
        return sum(self._recent) / len(self._recent) * (self.num_steps - self.steps_done)


def format_duration(seconds: float) -> str:
    """1:05 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressView:
    """Shows the stages of a run one after another. Use as a context manager."""

    def __init__(self, name: str, stream: TextIO, *, live: bool) -> None:
        """live: redraw in place (a terminal); else one line every two seconds at most."""
        self._name = name
        self._console = Console(file=stream, highlight=False, soft_wrap=not live)
        self._live = Live(console=self._console, auto_refresh=False) if live else None
        self._phase = "starting"
        self._phase_start = self._start = time.monotonic()
        self._last_shown = 0.0
        self.history: RunHistory | None = None
        """Of the stage that is shown."""

    def __enter__(self) -> "ProgressView":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._redraw()
            self._live.stop()

    def begin(self, phase: str, run_dir: RunDir, num_steps: int) -> None:
        """A stage starts; its figures will be in run_dir/metrics.jsonl."""
        if self.history is not None:
            self.history.poll()
            self._plain(f"{self._phase}: {self._line(self.history)}")
        self._phase, self._phase_start = phase, time.monotonic()
        self.history = RunHistory(run_dir, num_steps)
        steps = "" if phase == "eval" else f", {num_steps} steps"
        self._plain(f"{self._name}: {phase}{steps}")

    def tick(self) -> None:
        """Show what has happened since; cheap, call it as often as you like."""
        if self.history is None:
            return
        rows, now = self.history.poll(), time.monotonic()
        if self._live is not None:
            if rows or now - self._last_shown >= REFRESH_INTERVAL_S:
                self._last_shown = now
                self._redraw()
            return
        measured = any("eval/accuracy" in row for row in rows)
        if rows and (measured or now - self._last_shown >= PLAIN_INTERVAL_S):
            self._last_shown = now
            self._plain(f"{self._phase}: {self._line(self.history)}")

    def _plain(self, text: str) -> None:
        if self._live is None:
            self._console.print(text, markup=False)

    def _line(self, history: RunHistory) -> str:
        parts = [f"step {history.steps_done}/{history.num_steps}"]
        parts += [f"{label} {text}" for label, text in history.figures()]
        if history.seconds_left is not None:
            parts.append(f"{format_duration(history.seconds_left)} left")
        return "  ".join(parts)

    def _redraw(self) -> None:
        assert self._live is not None
        self._live.update(self._render(), refresh=True)

    def _render(self) -> Group:
        history, elapsed = self.history, time.monotonic() - self._start
        head = Text(f"{self._name}  ", style="bold")
        head.append(self._phase, style="cyan")
        if history is None or not history.latest:
            waited = time.monotonic() - self._phase_start
            head.append(f"  starting, {waited:.0f} s", style="dim")
            return Group(head)
        left = history.seconds_left
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=history.num_steps, completed=history.steps_done, width=40),
            f"step {history.steps_done}/{history.num_steps}",
            f"{format_duration(elapsed)} elapsed",
            f"{format_duration(left)} left" if left is not None else "",
        )
        figures = Table.grid(padding=(0, 3))
        shown = history.figures()
        figures.add_row(*(Text(label, style="dim") for label, _ in shown))
        figures.add_row(*(text for _, text in shown))
        return Group(head, bar, figures)
