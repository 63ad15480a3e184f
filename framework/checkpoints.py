"""Checkpoints as files: their names, what makes one complete, which stay. No torch in here.

    run_dir/checkpoints/
        step_000003/            complete: the name appears by one rename, after all else is written
            complete.json       the manifest: step, layout, versions, every file with its size
            config.yaml         the run's configuration when it was saved
            rollout.msgpack     cursor and buffer of the rollout process, in live runs
            .metadata, *.distcp megatron-core's torch_dist format (framework.megatron.checkpoint)
        .step_000006.writing/   being written, or left by a killed run: never loaded, removed

One rank writes, renames and removes; every rank may read.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from rollout.run_dir import write_atomic

MANIFEST = "complete.json"
CONFIG = "config.yaml"
ROLLOUT = "rollout.msgpack"
TORCH_DIST = ".metadata"
"""megatron-core's own; a directory with it holds weights that model.init_from= can name."""
_FORMAT = 1
_PAYLOAD_SUFFIX = ".distcp"


@dataclass(kw_only=True, slots=True)
class Manifest:
    """What a complete checkpoint says of itself."""

    format: int
    step: int
    """Steps trained; also the policy's version."""
    num_updates: int
    """Optimizer updates done: AdamW's own counter."""
    stage: str
    mode: str
    layout: dict[str, int]
    """Sizes of the parallel groups that saved it."""
    versions: dict[str, str]
    """Of torch and megatron-core."""
    files: dict[str, int]
    """Every other file with its size in bytes."""
    adapted: dict[str, float] = field(default_factory=dict)
    """Numbers that training adapts beside the weights, by name: framework.megatron.credit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Steps trained."""
        return self.manifest.step

    def rollout_state(self) -> bytes:
        """State of the rollout process; b"" where the run had none."""
        path = self.path / ROLLOUT
        return path.read_bytes() if path.exists() else b""


def step_dir(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies when it is complete."""
    return root / f"step_{step:06d}"


def begin(root: Path, step: int) -> Path:
    """A fresh directory to write a checkpoint into, under a name that is never loaded."""
    path = root / f".{step_dir(root, step).name}.writing"
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def commit(writing: Path, manifest: Manifest) -> Path:
    """Give a fully written directory its manifest and then its name; `manifest.files` is filled in.

    From here on it survives a loss of power: what is small is synced here, the payload by its
    writers.
    """
    files = sorted(path for path in writing.iterdir() if path.name != MANIFEST)
    manifest.format = _FORMAT
    manifest.files = {path.name: path.stat().st_size for path in files}
    for path in files:
        if path.suffix != _PAYLOAD_SUFFIX:
            _sync(path)
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    write_atomic(writing / MANIFEST, data)
    target = step_dir(writing.parent, manifest.step)
    if target.exists():
        _discard(target)
    writing.rename(target)
    _sync(writing.parent)
    return target


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`; ValueError names the file that is missing or damaged."""
    file = path / MANIFEST
    try:
        manifest = msgspec.json.decode(file.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise ValueError(f"{path}: no {MANIFEST}; this is not a complete checkpoint") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"{file}: {error}") from None
    if manifest.format != _FORMAT:
        raise ValueError(f"{file}: format {manifest.format}; this version reads {_FORMAT}")
    for name, size in manifest.files.items():
        try:
            found = (path / name).stat().st_size
        except FileNotFoundError:
            found = None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise ValueError(
                f"{path / name} {state}: the checkpoint is damaged; remove {path} to resume from "
                "the one before"
            )
    return Checkpoint(path=path, manifest=manifest)


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in root.glob(f"step_*/{MANIFEST}"))


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run; ValueError where it is damaged."""
    paths = list_checkpoints(root)
    return read_checkpoint(paths[-1]) if paths else None


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint that checkpoint.resume=<path> means: itself, or the newest of a run.

    Raises:
        ValueError: there is none.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        raise ValueError(
            f"checkpoint.resume={path}: no such directory; wanted: never, auto, or a checkpoint's "
            "or a run's directory"
        )
    if (place / MANIFEST).exists():
        return read_checkpoint(place)
    for root in (place, place / "checkpoints"):
        if (found := newest_checkpoint(root)) is not None:
            return found
    raise ValueError(f"checkpoint.resume={path}: holds no complete checkpoint")


def prune(root: Path, keep: int, keep_every_steps: int) -> None:
    """Remove all but the newest `keep` (0: none is removed) and every keep_every_steps-th."""
    old = list_checkpoints(root)[:-keep] if keep else []
    for path in old:
        step = int(path.name.removeprefix("step_"))
        if not keep_every_steps or step % keep_every_steps:
            _discard(path)


def remove_unfinished(root: Path) -> None:
    """Remove what killed runs were writing or removing. Nobody may be saving meanwhile."""
    for path in root.glob(".step_*"):
        shutil.rmtree(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint; being killed in between leaves none that is half there."""
    doomed = path.with_name(f".{path.name}.removing")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
