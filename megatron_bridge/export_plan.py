"""Which rank sends which boxes of which tensor, in which order: computed alike on every rank.

Tensors go whole, in the order embedding, layers, final norm, output, multi-token prediction layers;
a bucket is a run of them.
Every box is sent once, by the first rank that holds it, replicas aside.

    segment     tensors of one kind of layer, senders numbered within their stage; computed once
    part        a segment in one layer of the model
    bucket      parts that travel together; spelt out when somebody looks at it

So a plan costs little more than the parts' number, however many experts their layers have.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch

from megatron_bridge.hf_checkpoint import DTYPE_NAMES
from megatron_bridge.layout import Layout
from megatron_bridge.mapping import (
    holders,
    layer_name,
    local_prefix,
    section_views,
    template_shapes,
    trainer_place,
)
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import MTP_LAYER, ModelDescription, Section, Spec
from megatron_bridge.table_check import check
from megatron_bridge.uncollected import uncollected
from megatron_bridge.views import Box, Index

_SEGMENTS_PER_BUCKET = 8
"""A segment has at most this part of a bucket: so little of it stays empty at its end."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor and the parameter that it is read from."""

    rank: int
    chunk: int
    parameter: str
    box: Box
    section: Section


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One Hugging Face tensor and its place in its bucket."""

    name: str
    shape: Index
    offset: int
    """Bytes from the start of the bucket."""
    size_bytes: int
    pieces: tuple[Piece, ...]


class Segment(NamedTuple):
    """Tensors that are never parted, of an embedding, a kind of layer, or what follows the layers.

    Names keep their {layer}, ranks count from the first of the stage, offsets from the segment's.
    """

    tensors: tuple[TensorPlan, ...]
    size_bytes: int


class Part(NamedTuple):
    """A segment where it is needed."""

    segment: Segment
    first_rank: int
    """Of the stage."""
    chunk: int
    layer: tuple[int, int] | None
    """Number in the chunk, number in the model; None: not in a layer."""
    kind: frozenset[Section] = frozenset()
    """Of the layer."""

    def tensors(self, offset: int) -> Iterator[TensorPlan]:
        """The tensors of the segment by their names, `offset` bytes further."""
        for each in self.segment.tensors:
            pieces = tuple(self._filled(piece) for piece in each.pieces)
            name = self._named(each.name)
            yield TensorPlan(name, each.shape, offset + each.offset, each.size_bytes, pieces)

    def _named(self, template: str) -> str:
        return template if self.layer is None else layer_name(template, self.layer[1])

    def _filled(self, piece: Piece) -> Piece:
        prefix = ""
        if self.layer is not None:
            prefix = local_prefix(self.kind, piece.section, self.layer[0])
        box = Box(self._named(piece.box.name), *piece.box[1:])
        rank = self.first_rank + piece.rank
        return Piece(rank, self.chunk, prefix + piece.parameter, box, piece.section)


@dataclass(frozen=True)
class BucketPlan:
    """Tensors that travel together."""

    parts: tuple[Part, ...]
    dtype: torch.dtype

    @cached_property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """In the order of the bucket."""
        found: list[TensorPlan] = []
        offset = 0
        for part in self.parts:
            found += part.tensors(offset)
            offset += part.segment.size_bytes
        return tuple(found)

    @property
    def size_bytes(self) -> int:
        """Length of the bucket."""
        return sum(part.segment.size_bytes for part in self.parts)

    @cached_property
    def pieces(self) -> dict[int, tuple[Piece, ...]]:
        """Sending rank -> its pieces, in the order of its message."""
        pieces: dict[int, list[Piece]] = {}
        for tensor in self.tensors:
            for piece in tensor.pieces:
                pieces.setdefault(piece.rank, []).append(piece)
        return {rank: tuple(pieces[rank]) for rank in sorted(pieces)}


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """The whole stream of a model in one layout; a pure function of its fields."""

    hf_config: Mapping[str, Any]
    layout: Layout
    spec: Spec
    dtype: torch.dtype
    """Type of the exported tensors; parameters of another type are cast as they are packed. What
    the architecture keeps in float32 comes last, in buckets of its own."""
    vocab_pad_multiple: int
    bucket_bytes: int
    """A bucket is closed before it would grow beyond this; a larger tensor travels alone."""
    mtp: bool = True
    """Multi-token prediction layers, where the model has any, are exported too; an engine's model
    has none."""

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1:
            raise ValueError(f"bucket size is {self.bucket_bytes} bytes; it must be >= 1")
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"weights cannot be exported as {self.dtype}")
        errors = check(self.hf_config, self.layout, self.vocab_pad_multiple)
        if errors:
            raise ValueError("the model cannot be exported from this layout: " + "; ".join(errors))

    @cached_property
    def model(self) -> ModelDescription:
        """The config.json, understood."""
        return describe(self.hf_config)

    @cached_property
    def entries(self) -> list[tuple[str, torch.dtype, Index]]:
        """Name, type and shape of every tensor in the order of the stream."""
        return [(t.name, each.dtype, t.shape) for each in self.buckets for t in each.tensors]

    @cached_property
    def buckets(self) -> tuple[BucketPlan, ...]:
        """The stream."""
        with uncollected():
            return tuple(
                bucket
                for dtype in dict.fromkeys((self.dtype, torch.float32))
                for bucket in self._fill(dtype)
            )

    def _fill(self, dtype: torch.dtype) -> Iterator[BucketPlan]:
        """Parts of one type, in order, into buckets."""
        held: list[Part] = []
        filled = 0
        for part in self._parts(dtype):
            size = part.segment.size_bytes
            if held and filled + size > self.bucket_bytes:
                yield BucketPlan(tuple(held), dtype)
                held, filled = [], 0
            held.append(part)
            filled += size
        if held:
            yield BucketPlan(tuple(held), dtype)

    def _parts(self, dtype: torch.dtype) -> Iterator[Part]:
        """Embedding, layers, what follows them, multi-token prediction layers."""
        shape, layout = self.model.shape, self.layout
        kinds = {kind: list(self._segments(kind, dtype)) for kind in shape.layer_kinds}
        first_of_last, last_chunk = layout.rank(pp=layout.pp - 1), layout.vpp - 1
        last = {Section.FINAL} if shape.tied else {Section.FINAL, Section.OUTPUT}
        for segment in self._segments({Section.EMBEDDING}, dtype):
            yield Part(segment, 0, 0, None)
        for pp, chunk, local, number in layout.layers(shape.num_layers):
            first = layout.rank(pp=pp)
            kind = shape.layer_sections(number)
            for segment in kinds[kind]:
                yield Part(segment, first, chunk, (local, number), kind)
        for segment in self._segments(last, dtype):
            yield Part(segment, first_of_last, last_chunk, None)
        if not self.mtp or not shape.mtp_layers:
            return
        segments = list(self._segments(MTP_LAYER, dtype))
        for local, number in enumerate(shape.mtp_numbers):
            for segment in segments:
                yield Part(segment, first_of_last, last_chunk, (local, number), MTP_LAYER)

    def _segments(self, sections: Set[Section], dtype: torch.dtype) -> Iterator[Segment]:
        """What travels as `dtype` of some sections, tensors that belong together unparted."""
        held: list[TensorPlan] = []
        filled = 0
        for tensors in self._together(sections, dtype):
            size = sum(tensor.size_bytes for tensor in tensors)
            if held and (filled + size) * _SEGMENTS_PER_BUCKET > self.bucket_bytes:
                yield Segment(tuple(held), filled)
                held, filled = [], 0
            for tensor in tensors:
                held.append(replace(tensor, offset=filled))
                filled += tensor.size_bytes
        if held:
            yield Segment(tuple(held), filled)

    def _together(self, sections: Set[Section], dtype: torch.dtype) -> Iterator[list[TensorPlan]]:
        """Tensors of some sections that travel as `dtype`; mostly each by itself."""
        architecture = self.model.architecture
        kept = {tensor.name for tensor in architecture.tensors if tensor.float32}
        pieces: dict[str, list[Piece]] = {}
        for section in sorted(sections):
            for rank, name, box in self._section_boxes(section):
                pieces.setdefault(box.name, []).append(Piece(rank, 0, name, box, section))
        neighbours = {each: run for run in architecture.together for each in run}
        run: list[TensorPlan] = []
        for name, shape in template_shapes(self.model, frozenset(sections)).items():
            if (torch.float32 if name in kept else self.dtype) is not dtype:
                continue
            size = prod(shape) * dtype.itemsize
            run.append(TensorPlan(name, shape, 0, size, tuple(pieces[name])))
            if name == neighbours.get(name, (name,))[-1]:
                yield run
                run = []
        assert not run, f"{run[-1].name} is not the last of those that travel with it"

    def _section_boxes(self, section: Section) -> Iterator[tuple[int, str, Box]]:
        """Rank in its stage, local name and box, every box once, at the first rank with it."""
        seen: set[tuple[str, Index, Index]] = set()
        rows = self.model.architecture.rows
        for rank in holders(self.layout, section):
            coords = self.layout.coords(rank)
            place = trainer_place(
                self.model, self.layout, coords, self.vocab_pad_multiple, self.spec
            )
            for row, view in section_views(self.model, section, place, rows):
                for box in view.boxes:
                    key = (box.name, box.start, box.size)
                    if key not in seen:
                        seen.add(key)
                        yield rank, row.local_name(self.spec), box
