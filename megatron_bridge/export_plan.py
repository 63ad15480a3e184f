"""Which rank sends which boxes of which tensor, in which order: computed alike on every rank.

Tensors go whole, in the order embedding, layers, final norm, output; a bucket is a run of them.
Every box is sent once, by the first rank that holds it, replicas aside.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from megatron_bridge.hf_checkpoint import DTYPE_NAMES
from megatron_bridge.layout import Layout
from megatron_bridge.mapping import (
    check,
    float32_names,
    holders,
    layer_name,
    model_shapes,
    section_views,
    sections,
    trainer_place,
)
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import (
    DENSE_LAYER,
    MOE_LAYER,
    ModelDescription,
    Section,
    Spec,
)
from megatron_bridge.views import Box, Index

LAYER_SECTIONS = DENSE_LAYER | MOE_LAYER


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor and the parameter that it is read from."""

    rank: int
    chunk: int
    parameter: str
    box: Box


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One Hugging Face tensor and its place in its bucket."""

    name: str
    shape: Index
    offset: int
    """Bytes from the start of the bucket."""
    size_bytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class BucketPlan:
    """Tensors that travel together."""

    tensors: tuple[TensorPlan, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Length of the bucket."""
        return sum(tensor.size_bytes for tensor in self.tensors)

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
        shapes, kept = model_shapes(self.model), float32_names(self.model)
        if self.dtype is torch.float32 or not kept:
            return tuple(self._fill(shapes, self.dtype))
        cast = {name: shape for name, shape in shapes.items() if name not in kept}
        rest = {name: shape for name, shape in shapes.items() if name in kept}
        return (*self._fill(cast, self.dtype), *self._fill(rest, torch.float32))

    def _fill(self, shapes: Mapping[str, Index], dtype: torch.dtype) -> Iterator[BucketPlan]:
        """Tensors of one type, in order, into buckets."""
        tensors: list[TensorPlan] = []
        filled = 0
        for name, shape in shapes.items():
            size = prod(shape) * dtype.itemsize
            if tensors and filled + size > self.bucket_bytes:
                yield BucketPlan(tuple(tensors), dtype)
                tensors, filled = [], 0
            tensors.append(TensorPlan(name, shape, filled, size, tuple(self._pieces[name])))
            filled += size
        yield BucketPlan(tuple(tensors), dtype)

    @cached_property
    def _pieces(self) -> dict[str, list[Piece]]:
        """Hugging Face name -> its pieces."""
        model, layout = self.model, self.layout
        pieces: dict[str, list[Piece]] = {}
        boxes = {section: list(self._section_boxes(section)) for section in sorted(LAYER_SECTIONS)}
        for pp in range(layout.pp):
            for chunk in range(layout.vpp):
                for section in sections(model, layout, pp, chunk):
                    if section is Section.TIED_OUTPUT:
                        continue  # the first stage sends the embedding
                    for rank, name, box in self._section_boxes(section):
                        piece = Piece(layout.rank(pp=pp) + rank, chunk, name, box)
                        pieces.setdefault(box.name, []).append(piece)
                layers = layout.chunk_layers(model.shape.num_layers, pp, chunk)
                for local, layer in enumerate(layers):
                    parts = sorted(model.shape.layer_sections(layer))
                    for rank, name, box in (each for part in parts for each in boxes[part]):
                        hf_name = layer_name(box.name, layer)
                        piece = Piece(
                            layout.rank(pp=pp) + rank,
                            chunk,
                            f"decoder.layers.{local}.{name}",
                            Box(hf_name, *box[1:]),
                        )
                        pieces.setdefault(hf_name, []).append(piece)
        return pieces

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
