"""Whole directories from one form to the other: each appears complete, under its name, or not."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_bridge.adapters import Lora, check_targets
from megatron_bridge.fp8 import Fp8Tensors, fp8_config
from megatron_bridge.hf_checkpoint import DTYPES, HfCheckpoint, read_config
from megatron_bridge.hf_writer import HfWriter, check_free, give_name, partial_dir
from megatron_bridge.layout import Layout
from megatron_bridge.load import check_checkpoint, check_copies, unused_tensors
from megatron_bridge.mapping import model_shapes, rank_views
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import Spec
from megatron_bridge.models.mtp import FIELD, without_mtp
from megatron_bridge.mtp_export import MtpTensors, WithMtp
from megatron_bridge.peft_checkpoint import PeftCheckpoint
from megatron_bridge.peft_config import read_peft_config
from megatron_bridge.torch_dist import HfTensors, TorchDistCheckpoint
from megatron_bridge.torch_dist_writer import TorchDistWriter
from megatron_bridge.views import ref

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What a conversion did."""

    num_tensors: int
    size_bytes: int
    kept_files: int = 0
    """Files that an earlier conversion, which was killed, had completed."""


def to_megatron(
    hf_dir: Path, out_dir: Path, max_file_bytes: int, progress: Progress = lambda done, total: None
) -> Converted:
    """The weights of `hf_dir` as a torch_dist checkpoint, with its config.json; nothing else.

    Raises:
        ValueError: `hf_dir` is no model that is known here, or `out_dir` holds something.
    """
    out, whole = out_dir.absolute(), Layout()
    check_free(out)
    with HfCheckpoint(hf_dir) as checkpoint:
        model = check_checkpoint(checkpoint, whole, 1)
        views = rank_views(checkpoint.config, whole, whole.coords(0), Spec.TE, 1)
        check_copies(checkpoint, model, views)
        if unused := unused_tensors(checkpoint, model):
            print(f"drivetrain-convert: left out: {', '.join(unused)}", file=sys.stderr)
        names = model_shapes(model)
        total = sum(map(checkpoint.size_bytes, names))
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        writer = TorchDistWriter(checkpoint, advance)
        with _alone(partial_dir(out)) as partial:
            for file in partial.iterdir():
                file.unlink()
            try:
                writer.write(partial, max_file_bytes)
                shutil.copyfile(checkpoint.path / "config.json", partial / "config.json")
                give_name(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # none is left of a good one
    return Converted(num_tensors=len(names), size_bytes=total)


def to_hf(
    ckpt_dir: Path,
    out_dir: Path,
    like: Path,
    max_file_bytes: int,
    progress: Progress = lambda done, total: None,
    *,
    fp8: bool = False,
) -> Converted:
    """A Hugging Face directory from a checkpoint saved in any layout; one tensor in memory.

    Multi-token prediction layers are the checkpoint's, if it has none those of `like`.

    fp8: the linear weights of the layers as block fp8 (see `megatron_bridge.fp8`).

    A conversion that was killed goes on after the last file that it completed.

    Raises:
        ValueError: the checkpoint is damaged or not one of the model of `like`, or `out_dir` holds
            something.
    """
    config = read_config(like)
    checkpoint = TorchDistCheckpoint(ckpt_dir)
    held = config if checkpoint.has_mtp else without_mtp(config)
    mtp = MtpTensors(describe(held), like)
    tensors = WithMtp(HfTensors(checkpoint, held), mtp)
    _tell_of_mtp(checkpoint, mtp, config)
    if fp8:
        model = describe(config if mtp.carried else held)
        tensors, config = Fp8Tensors(tensors, model), fp8_config(config, model)
    entries = list(tensors.entries())
    sizes = {name: dtype.itemsize * prod(shape) for name, dtype, shape in entries}
    total = sum(sizes.values())
    check_free(out_dir.absolute())
    carried = str(like.resolve()) if mtp.carried else ""
    source = f"{checkpoint.fingerprint} {json.dumps(config)} {carried}"
    source = hashlib.sha256(source.encode()).hexdigest()
    with _alone(partial_dir(out_dir.absolute())):
        writer = HfWriter(
            out_dir, entries, like, max_file_bytes, resume=source, config=config if fp8 else None
        )
        done = total - sum(sizes[name] for name in writer.names)
        try:
            for name in writer.names:
                writer.add(name, tensors.read(name))  # not bound to a name: one tensor at a time
                done += sizes[name]
                progress(done, total)
        except ValueError:  # of the checkpoint: it will be no better the next time
            writer.abort()
            raise
        writer.finish()
    mtp.close()
    return Converted(num_tensors=len(entries), size_bytes=total, kept_files=writer.kept_files)


def _tell_of_mtp(checkpoint: TorchDistCheckpoint, mtp: MtpTensors, config: dict[str, Any]) -> None:
    """What becomes of multi-token prediction layers, where that is not plain."""
    what = ""
    if mtp.carried:
        what = f"those of {mtp.source}, for the checkpoint has none"
    elif checkpoint.has_mtp and not config.get(FIELD):
        what = f"left out, for {FIELD} of {mtp.source}/config.json is 0"
    elif config.get(FIELD) and not checkpoint.has_mtp:
        what = f"left out, for neither {checkpoint.path} nor {mtp.source} holds any"
    if what:
        print(f"drivetrain-convert: multi-token prediction layers: {what}", file=sys.stderr)


def merge(
    hf_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    max_file_bytes: int,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """A Hugging Face directory with a PEFT adapter in its weights: W + alpha / r B A, computed in
    fp32 and cast to the weight's type; one tensor in memory.

    Raises:
        ValueError: the adapter does not fit the model, or `out_dir` holds something.
    """
    settings = read_peft_config(adapter_dir)
    if settings.has_score:
        raise ValueError(f"{adapter_dir}: adapters of a reward model; its run's hf/ is merged")
    lora = Lora(rank=settings.rank, alpha=settings.alpha, targets=settings.targets)
    check_free(out_dir.absolute())
    done = 0
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(HfCheckpoint(hf_dir))
        model = check_checkpoint(checkpoint, Layout(), 1)
        check_targets(model, lora)
        found = stack.enter_context(PeftCheckpoint(adapter_dir, model, lora))
        stack.enter_context(_alone(partial_dir(out_dir.absolute())))
        entries = [(n, DTYPES[t.dtype], t.shape) for n, t in checkpoint.tensors.items()]
        total = sum(map(checkpoint.size_bytes, checkpoint.tensors))
        writer = HfWriter(out_dir, entries, hf_dir, max_file_bytes)
        try:
            for name, _, shape in entries:
                (box,) = ref(name, shape).boxes
                writer.add(name, found.merged(name, checkpoint.read(box)))
                done += checkpoint.size_bytes(name)
                progress(done, total)
            writer.finish()
        except (ValueError, OSError):
            writer.abort()
            raise
    return Converted(num_tensors=len(entries), size_bytes=total)


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[Path]:
    """Make the unfinished directory if it is not there; hold it against other converters."""
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{partial} is being written by another process") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"{partial}: no locks here ({error}); start nothing twice", file=sys.stderr)
        yield partial
    finally:
        os.close(handle)
