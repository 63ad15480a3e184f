"""Megatron -> a Hugging Face directory, streamed bucket by bucket."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_bridge.export import ExportBuffers, ExportStream, export_buckets
from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.hf_checkpoint import read_config
from megatron_bridge.hf_writer import HfWriter
from megatron_bridge.load import parameters
from megatron_bridge.models.mtp import FIELD
from megatron_bridge.mtp_export import MtpTensors


def save_hf(
    plan: ExportPlan,
    chunks: Sequence[nn.Module],
    rank: int,
    out_dir: str | Path,
    like: str | Path,
    *,
    dst: int = 0,
    group: dist.ProcessGroup | None = None,
    buffers: ExportBuffers | None = None,
    max_file_bytes: int = 4 << 30,
    mtp_from: str | Path | None = None,
) -> None:
    """A collective: rank `dst` writes `out_dir` with the plan's config.json and the other small
    files of `like`.

    Multi-token prediction layers that the model was built without are carried on from `mtp_from`
    (None: `like`), bit for bit, where that has any, and this is said; config.json counts those, or
    as many as that of `like` where none are.

    `out_dir` appears complete or not at all, and must not exist before. All ranks return when it is
    there. When the writer fails it raises its own error and every other rank a RuntimeError; none
    is left waiting.
    """
    device = next(iter(parameters(chunks).values())).device
    if not plan.mtp:
        raise ValueError("a plan for engines leaves multi-token prediction layers out")
    writer: HfWriter | None = None
    mtp: MtpTensors | None = None
    try:
        if rank == dst:
            mtp = MtpTensors(plan.model, like if mtp_from is None else mtp_from)
            if mtp.carried:
                print(
                    f"{out_dir}: multi-token prediction layers: those of {mtp.source}, as they are",
                    file=sys.stderr,
                )
            counted_by = mtp.source if mtp.carried else like
            entries, config = list(mtp.entries(plan.entries)), _config(plan, counted_by)
            writer = HfWriter(out_dir, entries, like, max_file_bytes, config=config)
    finally:
        _agree(writer is not None, plan, rank, dst, group, device, f"cannot write {out_dir}")
    written = False
    try:
        with export_buckets(plan, chunks, rank, dst, group, buffers) as stream:
            if writer is not None and mtp is not None:
                _write(writer, stream, mtp)
            else:
                next(stream, None)  # sends everything
        written = True
    finally:
        _agree(written, plan, rank, dst, group, device, f"could not write {out_dir}")


def _config(plan: ExportPlan, counted_by: str | Path) -> dict[str, Any]:
    """The plan's config.json; a model built without its multi-token prediction layers is told of
    as another directory tells of it."""
    counted = read_config(counted_by).get(FIELD)
    return {**plan.hf_config, FIELD: counted} if counted else dict(plan.hf_config)


def _write(writer: HfWriter, stream: ExportStream, mtp: MtpTensors) -> None:
    """Every tensor of the stream into `writer`; what was written is removed on failure."""
    finished = False
    try:
        for bucket in stream:
            for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                for each in (name, *mtp.copies.get(name, ())):
                    writer.add(each, tensor)
        for name in mtp.carried:
            writer.add(name, mtp.read(name))
        writer.finish()
        finished = True
    finally:
        mtp.close()
        if not finished:
            writer.abort()


def _agree(
    good: bool,
    plan: ExportPlan,
    rank: int,
    dst: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
    what: str,
) -> None:
    """Tell all ranks whether `dst` succeeded; the others raise when it did not."""
    if plan.layout.world_size == 1:
        return
    state = torch.tensor([int(good)], device=device)
    dist.broadcast(state, group=group, group_src=dst)
    if rank != dst and not state.item():
        raise RuntimeError(f"rank {dst} {what}; its own error says why")
