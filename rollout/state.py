"""What generation needs to go on from a step, in checkpoints and in every entry of the journal."""

from dataclasses import dataclass
from pathlib import Path

from rollout.journal import list_steps, read_entry
from rollout.mixed_buffer import MixedState
from rollout.run_dir import write_atomic
from rollout.wire import decode, encode

STATE_FORMAT = 3
_START = "start.msgpack"
"""In rollouts/: where trainers told a rollout process to begin; the journal goes on from there."""


@dataclass(kw_only=True, slots=True)
class ProducerState:
    """Part of a checkpoint; ValueError of `check` where it cannot be used."""

    format: int
    buffer: MixedState
    """With every domain's prompt cursor."""

    def check(self) -> None:
        """Raise ValueError when this version cannot go on from it."""
        if self.format != STATE_FORMAT:
            raise ValueError(f"rollout state {self.format}; this version reads {STATE_FORMAT}")
        self.buffer.check()
        for group in self.buffer.accepted():
            for sample in group.samples:
                sample.check()


def write_start(rollouts: Path, state: ProducerState) -> None:
    """Remember where trainers told us to begin, for a rollout process that takes our place."""
    write_atomic(rollouts / _START, encode(state))


def drop_start(rollouts: Path) -> None:
    """Forget where trainers told an earlier rollout process to begin."""
    (rollouts / _START).unlink(missing_ok=True)


def state_after(path: Path) -> ProducerState | None:
    """The state after the delivery of a journaled step; None: its entry holds none."""
    data = read_entry(path).state
    return decode(data, ProducerState) if data else None


def newest_state(rollouts: Path) -> ProducerState | None:
    """Where the rollout process that wrote this journal was; None: at its beginning.

    Groups it had finished and not delivered are running in it: they are generated again.

    Raises:
        ValueError: a file is damaged; its name is told.
    """
    start = rollouts / _START
    told = decode(start.read_bytes(), ProducerState) if start.exists() else None
    steps = list_steps(rollouts)
    reached = state_after(steps[-1]) if steps else None
    if told is None or reached is None:
        return told or reached
    return reached if reached.buffer.next_step > told.buffer.next_step else told
