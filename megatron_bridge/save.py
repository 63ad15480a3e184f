"""Write the model that trainer ranks hold as a Hugging Face directory, streamed bucket by bucket."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_bridge.export import ExportBuffers, export_buckets
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
    """A collective: rank `dst` writes `out_dir` with the small files of `like`; all ranks return.

    `out_dir` appears complete or not at all, and must not exist before. When the writer fails, it
    raises its own error and every other rank a RuntimeError: none is left waiting.
    """
    failure: BaseException | None = None
    with closing(export_buckets(plan, chunks, rank, dst, group, buffers)) as stream:
        if rank == dst:
            try:
                _write(plan, stream, out_dir, like, max_file_bytes)
            except Exception as error:  # told to the other ranks below, then raised
                failure = error
        else:
            for _ in stream:
                raise AssertionError("only the destination is given buckets")
    _agree(failure, chunks, plan, dst, group, out_dir)
