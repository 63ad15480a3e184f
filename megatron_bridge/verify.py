"""A Hugging Face directory through every rank of a layout and back, in one process, bit for bit.

A closed round trip is no proof of a layout (see README.md): what is proven here is that these files
are whole, that the table knows every tensor in them, and that this layout holds each exactly once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_bridge.export_plan import BucketPlan, ExportPlan
from megatron_bridge.hf_checkpoint import DTYPES, HfCheckpoint
from megatron_bridge.layout import Layout
from megatron_bridge.load import check_copies, checkpoint_errors
from megatron_bridge.mapping import rank_views
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import Spec
from megatron_bridge.views import Index, View, copy_in, ref

BUCKET_BYTES = 64 << 20
_BITS = {4: torch.int32, 2: torch.int16}

Bits = dict[str, torch.Tensor]
"""Hugging Face name -> its content as integers, so that NaNs compare too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What was compared and what is wrong."""

    num_tensors: int
    size_bytes: int
    errors: list[str]


@dataclass(frozen=True, slots=True)
class _Parameter:
    """What a rank holds; replicas of it are left out."""

    rank: int
    chunk: int
    name: str
    view: View


def verify_hf(
    checkpoint: HfCheckpoint,
    layout: Layout,
    vocab_pad_multiple: int,
    spec: Spec,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Load `checkpoint` in `layout`, export it, compare; `errors` lists everything that is wrong.

    Per bucket of tensors every rank's parameters are loaded as the trainer loads them, one at a
    time, and exported by the plan of the export. In memory: two buckets (a tensor larger than one
    alone) and one parameter.

    progress: is told (bytes done, bytes in all) after every bucket.
    """
    if errors := checkpoint_errors(checkpoint, layout, vocab_pad_multiple):
        return Verified(num_tensors=len(checkpoint.tensors), size_bytes=0, errors=errors)
    errors = _copy_errors(checkpoint)
    plan = ExportPlan(
        hf_config=checkpoint.config,
        layout=layout,
        spec=spec,
        dtype=torch.float32,  # sizes of buckets only: tensors keep the types of their files
        vocab_pad_multiple=vocab_pad_multiple,
        bucket_bytes=BUCKET_BYTES,
    )
    holders: dict[str, list[_Parameter]] = {}
    for parameter in _parameters(plan):
        types = sorted({checkpoint.tensors[box.name].dtype for box in parameter.view.boxes})
        if len(types) > 1:
            errors.append(f"rank {parameter.rank}: {parameter.name} is made of {types}")
        for name in {box.name for box in parameter.view.boxes}:
            holders.setdefault(name, []).append(parameter)
    total, done = sum(checkpoint.size_bytes(name) for name in holders), 0
    for bucket in plan.buckets:
        errors += _bucket_errors(checkpoint, bucket, holders)
        done += sum(checkpoint.size_bytes(tensor.name) for tensor in bucket.tensors)
        progress(done, total)
    return Verified(num_tensors=len(holders), size_bytes=done, errors=errors)


def _copy_errors(checkpoint: HfCheckpoint) -> list[str]:
    """A checkpoint may repeat its embedding or its output layer, not change them."""
    whole = Layout()
    try:
        views = rank_views(checkpoint.config, whole, whole.coords(0), Spec.TORCH, 1)
        check_copies(checkpoint, describe(checkpoint.config), views)
    except ValueError as error:
        return [str(error)]
    return []


def _parameters(plan: ExportPlan) -> Iterator[_Parameter]:
    """Of every rank what no rank before it holds as well."""
    layout, multiple = plan.layout, plan.vocab_pad_multiple
    seen: set[tuple[int, int, str, View]] = set()
    for rank in range(layout.world_size):
        coords = layout.coords(rank)
        views = rank_views(plan.hf_config, layout, coords, plan.spec, multiple)
        for (chunk, name), view in views.items():
            key = (coords.pp, chunk, name, view)
            if view.boxes and key not in seen:
                seen.add(key)
                yield _Parameter(rank, chunk, name, view)


def _bucket_errors(
    checkpoint: HfCheckpoint, bucket: BucketPlan, holders: dict[str, list[_Parameter]]
) -> list[str]:
    """Load all that holds a part of these tensors, export it, compare with the files."""
    shapes = {tensor.name: tensor.shape for tensor in bucket.tensors}
    files = {name: _read(checkpoint, name, shape) for name, shape in shapes.items()}
    exported = {name: content.bitwise_not() for name, content in files.items()}  # all of it wrong
    pieces = {}
    for piece in (piece for tensor in bucket.tensors for piece in tensor.pieces):
        pieces.setdefault((piece.rank, piece.chunk, piece.parameter), []).append(piece)
    held = {id(each): each for name in shapes for each in holders.get(name, ())}
    errors = []
    for parameter in held.values():
        local = _load(checkpoint, parameter.view)
        for piece in pieces.pop((parameter.rank, parameter.chunk, parameter.name), ()):
            exported[piece.box.name][piece.box.source] = local[piece.box.local]
        for box in parameter.view.boxes:
            if box.name in files and not torch.equal(local[box.local], files[box.name][box.source]):
                errors.append(
                    f"rank {parameter.rank}: {parameter.name} of chunk {parameter.chunk} holds "
                    f"another content than {box.name} at {box.start}"
                )
    errors += [f"the export sends {key[2]} of rank {key[0]}, which nobody holds" for key in pieces]
    for name, content in files.items():
        if not torch.equal(exported[name], content):
            different = int((exported[name] != content).count_nonzero())
            errors.append(
                f"tensor {name}: {different} of {content.numel()} elements differ after load and "
                "export"
            )
    return errors


def _read(checkpoint: HfCheckpoint, name: str, shape: Index) -> torch.Tensor:
    content = checkpoint.read(ref(name, shape).boxes[0])
    return content.view(_BITS[content.dtype.itemsize])


def _load(checkpoint: HfCheckpoint, view: View) -> torch.Tensor:
    """One rank's parameter in the type of the files, as bits."""
    dtype = DTYPES[checkpoint.tensors[view.boxes[0].name].dtype]
    local = torch.empty(view.shape, dtype=dtype)
    copy_in(view, checkpoint.read, local)
    return local.view(_BITS[dtype.itemsize])
