"""Megatron -> a Hugging Face directory, streamed bucket by bucket."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_bridge.export import ExportBuffers, ExportStream, export_buckets
from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.hf_writer import HfWriter
from megatron_bridge.load import parameters


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
) -> None:
    """A collective: rank `dst` writes `out_dir` with the plan's config.json and the other small
    files of `like`.

    `out_dir` appears complete or not at all, and must not exist before. All ranks return when it is
    there. When the writer fails it raises its own error and every other rank a RuntimeError; none
    is left waiting.
    """
    device = next(iter(parameters(chunks).values())).device
    writer: HfWriter | None = None
    try:
        if rank == dst:
            writer = HfWriter(out_dir, plan.entries, like, max_file_bytes, config=plan.hf_config)
    finally:
        _agree(writer is not None, plan, rank, dst, group, device, f"cannot write {out_dir}")
    written = False
    try:
        with export_buckets(plan, chunks, rank, dst, group, buffers) as stream:
            if writer is not None:
                _write(writer, stream)
            else:
                next(stream, None)  # sends everything
        written = True
    finally:
        _agree(written, plan, rank, dst, group, device, f"could not write {out_dir}")


def _write(writer: HfWriter, stream: ExportStream) -> None:
    """Every tensor of the stream into `writer`; what was written is removed on failure."""
    finished = False
    try:
        for bucket in stream:
            for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                writer.add(name, tensor)
        writer.finish()
        finished = True
    finally:
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
