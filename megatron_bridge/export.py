"""Megatron -> Hugging Face, streamed: each rank packs its boxes, one rank assembles whole tensors.

A collective: every rank of the plan's world iterates; only `dst` is given buckets. Per bucket each
sender makes one flat message. No rank ever holds more than one bucket and one message.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from megatron_bridge.export_plan import BucketPlan, ExportPlan, Piece
from megatron_bridge.load import check_model, parameters
from megatron_bridge.mapping import rank_views
from megatron_bridge.views import Index

Parameters = dict[tuple[int, str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Whole Hugging Face tensors. The memory is reused: valid until the next bucket is asked for."""

    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[Index]
    flat: torch.Tensor
    """[bytes] uint8: the tensors back to back."""
    tensors: list[torch.Tensor]
    """Views into `flat`, in order."""


@dataclass(slots=True)
class ExportBuffers:
    """Memory that exports reuse, so that only the first one touches fresh pages."""

    _held: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, name: str, size_bytes: int, device: torch.device) -> torch.Tensor:
        """`size_bytes` of uint8 memory on `device`; its content is whatever was there."""
        held = self._held.get(name)
        if held is None or held.numel() < size_bytes or held.device != device:
            self._held.pop(name, None)
            held = self._held[name] = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        return held[:size_bytes]


def export_buckets(
    plan: ExportPlan,
    chunks: Sequence[nn.Module],
    rank: int,
    dst: int = 0,
    group: dist.ProcessGroup | None = None,
    buffers: ExportBuffers | None = None,
) -> Iterator[Bucket]:
    """Stream the model in Hugging Face form to rank `dst` of `group`; other ranks yield nothing.

    rank: this process's rank in `group`, which is its rank in the plan's layout.
    The model is compared with the plan before anything is sent. Waits are bounded by the group's
    time-out. A consumer that stops early must close the iterator (contextlib.closing): the messages
    that are on their way are then received and dropped, so that no sender is left waiting.
    """
    world = plan.layout.world_size
    if not 0 <= dst < world:
        raise ValueError(f"export destination {dst} is outside a world of {world}")
    if world > 1 and (dist.get_world_size(group), dist.get_rank(group)) != (world, rank):
        raise ValueError(
            f"the layout has {world} ranks and this is rank {rank}, but its process group has "
            f"{dist.get_world_size(group)} and this is rank {dist.get_rank(group)}"
        )
    coords = plan.layout.coords(rank)
    views = rank_views(
        plan.hf_config, plan.layout, coords, plan.spec, plan.vocab_pad_multiple
    )
    check_model(chunks, views, plan.model.shape.num_layers, plan.layout, coords)
    buffers = buffers or ExportBuffers()
    local = parameters(chunks)
    if rank == dst:
        yield from _assemble(plan, local, rank, group, buffers)
    else:
        for bucket in plan.buckets:
            _send(plan, bucket, local, rank, dst, group, buffers)


def _device(local: Parameters) -> torch.device:
    return next(iter(local.values())).device if local else torch.device("cpu")


def _message_bytes(plan: ExportPlan, pieces: Sequence[Piece]) -> int:
    return sum(piece.box.numel for piece in pieces) * plan.dtype.itemsize


def _unpack(
    plan: ExportPlan, pieces: Sequence[Piece], message: torch.Tensor
) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Each piece with its part of a flat message, in the shape of its box."""
    values = message.view(plan.dtype)
    offset = 0
    for piece in pieces:
        size = piece.box.numel
        yield piece, values[offset : offset + size].view(piece.box.size)
        offset += size


def _send(
    plan: ExportPlan,
    bucket: BucketPlan,
    local: Parameters,
    rank: int,
    dst: int,
    group: dist.ProcessGroup | None,
    buffers: ExportBuffers,
) -> None:
    """Pack this rank's pieces of a bucket into one message and send it, if there are any."""
    pieces = bucket.pieces.get(rank, ())
    if not pieces:
        return
    message = buffers.take("message", _message_bytes(plan, pieces), _device(local))
    for piece, part in _unpack(plan, pieces, message):
        part.copy_(local[piece.chunk, piece.parameter][piece.box.local])
    dist.send(message, group=group, group_dst=dst)


def _assemble(
    plan: ExportPlan,
    local: Parameters,
    rank: int,
    group: dist.ProcessGroup | None,
    buffers: ExportBuffers,
) -> Iterator[Bucket]:
    """Receive and place all pieces of each bucket in turn."""
    device = _device(local)
    for position, bucket in enumerate(plan.buckets):
        flat = buffers.take("flat", bucket.size_bytes, device)
        tensors = {
            t.name: flat[t.offset : t.offset + t.size_bytes].view(plan.dtype).view(t.shape)
            for t in bucket.tensors
        }
        for sender, pieces in bucket.pieces.items():
            if sender == rank:
                for piece in pieces:
                    source = local[piece.chunk, piece.parameter][piece.box.local]
                    tensors[piece.box.name][piece.box.source].copy_(source)
                continue
            message = _receive(plan, pieces, sender, group, buffers, device)
            for piece, part in _unpack(plan, pieces, message):
                tensors[piece.box.name][piece.box.source].copy_(part)
        try:
            yield Bucket(
                names=[t.name for t in bucket.tensors],
                dtypes=[plan.dtype] * len(bucket.tensors),
                shapes=[t.shape for t in bucket.tensors],
                flat=flat,
                tensors=list(tensors.values()),
            )
        except GeneratorExit:
            for rest in plan.buckets[position + 1 :]:
                for sender, pieces in rest.pieces.items():
                    if sender != rank:
                        _receive(plan, pieces, sender, group, buffers, device)
            raise


def _receive(
    plan: ExportPlan,
    pieces: Sequence[Piece],
    sender: int,
    group: dist.ProcessGroup | None,
    buffers: ExportBuffers,
    device: torch.device,
) -> torch.Tensor:
    message = buffers.take("message", _message_bytes(plan, pieces), device)
    dist.recv(message, group=group, group_src=sender)
    return message
