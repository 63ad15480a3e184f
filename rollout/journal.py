"""The journal: one file per delivered batch, written before any trainer sees it.

It is the unit of recovery, the input of mode=train_only and what the report shows. A file is
either absent or complete.
"""

import json
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
    state: bytes = b""
    """A rollout.state.ProducerState, encoded: where generation stood after this delivery."""


def step_path(rollouts: Path, step: int) -> Path:
    """The file of one step."""
    return rollouts / f"step_{step:06d}.msgpack"


def write_step(rollouts: Path, batch: StepBatch, samples: list[Sample], state: bytes = b"") -> Path:
    """Write one step, atomically; its path."""
    path = step_path(rollouts, batch.step)
    entry = JournalEntry(format=_FORMAT, batch=batch, samples=samples, state=state)
    write_atomic(path, encode(entry))
    return path


def read_step(path: Path) -> tuple[StepBatch, list[Sample]]:
    """Read one step; ValueError names the file when it is missing or not what it should be."""
    entry = read_entry(path)
    return entry.batch, entry.samples


def read_entry(path: Path) -> JournalEntry:
    """The same with all that the file holds."""
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
        if path != step_path(path.parent, entry.batch.step):
            raise ValueError(f"holds step {entry.batch.step}: renamed, or of another run")
        for info, sample in zip(entry.batch.samples, entry.samples, strict=True):
            sample.check()
            described = (info.group_id, info.index, info.prompt_length, info.response_length)
            found = (sample.group_id, sample.index, sample.prompt_length, sample.response_length)
            if described != found:
                raise ValueError(f"sample {found} is not {described}, as its batch says")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return entry


def list_steps(rollouts: Path) -> list[Path]:
    """The files of a journal, in order of their steps."""
    return sorted(rollouts.glob("step_*.msgpack"))


def drop_steps(rollouts: Path, first: int) -> None:
    """Remove the files of step `first` and later: a run goes on from there and writes them anew."""
    for path in list_steps(rollouts):
        if path >= step_path(rollouts, first):
            path.unlink()


def trim_lines(path: Path, key: str, last: int) -> None:
    """Keep the complete lines of a JSON-lines file whose `key` is at most `last`.

    For a run that goes on from an earlier step. Atomic; a file that is not there stays so.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    complete = data[: data.rfind(b"\n") + 1]
    kept = b"".join(
        line for line in complete.splitlines(keepends=True) if json.loads(line)[key] <= last
    )
    if kept != data:
        write_atomic(path, kept)
