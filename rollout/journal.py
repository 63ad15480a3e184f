"""The journal: one file per delivered batch, written before any trainer sees it.

It is the unit of recovery, the input of mode=train_only and what the report shows. A file is
either absent or complete.
"""

from dataclasses import dataclass
from pathlib import Path

from rollout.run_dir import write_atomic
from rollout.types import Sample, StepBatch
from rollout.wire import decode, encode

_FORMAT = 1


@dataclass(kw_only=True, slots=True)
class JournalEntry:
    """What one file holds."""

    format: int
    batch: StepBatch
    samples: list[Sample]
    """In the order of batch.samples."""


def step_path(rollouts: Path, step: int) -> Path:
    """The file of one step."""
    return rollouts / f"step_{step:06d}.msgpack"


def write_step(rollouts: Path, batch: StepBatch, samples: list[Sample]) -> Path:
    """Write one step, atomically; its path."""
    path = step_path(rollouts, batch.step)
    write_atomic(path, encode(JournalEntry(format=_FORMAT, batch=batch, samples=samples)))
    return path


def read_step(path: Path) -> tuple[StepBatch, list[Sample]]:
    """Read one step; ValueError names the file when it is missing or not what it should be."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: missing from the journal") from None
    try:
        entry = decode(data, JournalEntry)
        if entry.format != _FORMAT:
            raise ValueError(f"journal format {entry.format}, this version reads {_FORMAT}")
        if len(entry.samples) != len(entry.batch.samples):
            raise ValueError(f"{len(entry.samples)} of {len(entry.batch.samples)} samples")
        for sample in entry.samples:
            sample.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return entry.batch, entry.samples


def list_steps(rollouts: Path) -> list[Path]:
    """The files of a journal, in order of their steps."""
    return sorted(rollouts.glob("step_*.msgpack"))
