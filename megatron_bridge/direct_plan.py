"""Which trainer rank sends which part of which parameter straight into an engine rank's parameter.

Both sides' parameters are views of the same Hugging Face tensors, so what rank s holds for engine
rank r is the intersection of their boxes. Intersections are computed once per layer template and
renamed for each layer. Every element that an engine rank holds travels to it exactly once: bytes
are the least possible. Where several trainer ranks hold it (data- and context-parallel replicas,
tensors whole on every tensor-parallel rank), the least loaded sends it.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch

from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.layout import Layout
from megatron_bridge.mapping import (
    engine_section_views,
    float32_names,
    holders,
    layer_name,
    section_views,
    trainer_place,
)
from megatron_bridge.models.architecture import Section
from megatron_bridge.views import Box, Index


class Part(NamedTuple):
    """A rectangular part of a parameter."""

    parameter: str
    lead: Index
    start: Index
    size: Index

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Into the parameter."""
        inner = tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))
        return self.lead + inner


class Transfer(NamedTuple):
    """One part on its way; its content has `source.size` = `target.size`."""

    sender: int
    """Trainer rank."""
    chunk: int
    """Of the sender's model."""
    source: Part
    receiver: int
    """Engine number * engine_tp + rank in the engine."""
    target: Part
    numel: int


@dataclass(frozen=True)
class Round:
    """What travels together: between two ranks one flat message, its transfers in order."""

    transfers: tuple[Transfer, ...]
    dtype: torch.dtype

    @cached_property
    def messages(self) -> dict[tuple[int, int], tuple[Transfer, ...]]:
        """(sender, receiver) -> its transfers."""
        found: dict[tuple[int, int], list[Transfer]] = {}
        for each in self.transfers:
            found.setdefault((each.sender, each.receiver), []).append(each)
        return {key: tuple(found[key]) for key in sorted(found)}


class _Holder(NamedTuple):
    """Ranks (of a stage, from its first) that hold a source box, and where."""

    ranks: tuple[int, ...]
    part: Part


class _Cut(NamedTuple):
    """A part of an engine rank's parameter, and everybody in a stage who holds it."""

    engine_rank: int
    target: Part
    holders: tuple[_Holder, ...]


@dataclass(frozen=True, kw_only=True)
class DirectPlan:
    """All transfers of a push; a pure function of its fields, computed alike on every rank."""

    export: ExportPlan
    engine_tp: int
    num_engines: int
    engine_device: str
    """cpu | cuda: SGLang pads widths on a CPU."""

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        """In the order of the layers; no rank sends or receives more than about bucket_bytes in one
        round."""
        return tuple(self._fill())

    def _fill(self) -> Iterator[Round]:
        dtype = self.export.dtype
        limit = self.export.bucket_bytes // dtype.itemsize
        held: list[Transfer] = []
        filled: dict[tuple[str, int], int] = {}
        for each in self._transfers():
            ends = (("from", each.sender), ("to", each.receiver))
            most = max(filled.get(end, 0) for end in ends) + each.numel
            if held and most > limit:
                yield Round(tuple(held), dtype)
                held, filled = [], {}
            held.append(each)
            for end in ends:
                filled[end] = filled.get(end, 0) + each.numel
        if held:
            yield Round(tuple(held), dtype)

    def _transfers(self) -> Iterator[Transfer]:
        """Embedding, layers, output. Engines whose tables are known hold one type alone."""
        assert not float32_names(self.export.model)
        model, layout = self.export.model, self.export.layout
        load: dict[int, int] = {}
        last = layout.pp - 1
        ends = {Section.FINAL} if model.shape.tied else {Section.FINAL, Section.OUTPUT}
        kinds = {kind: self._cuts(kind) for kind in model.shape.layer_kinds}
        yield from self._place(self._cuts({Section.EMBEDDING}), 0, 0, load)
        for pp, chunk, local, layer in _layers(layout, model.shape.num_layers):
            cuts = kinds[model.shape.layer_sections(layer)]
            yield from self._place(cuts, pp, chunk, load, (local, layer))
        yield from self._place(self._cuts(ends), last, layout.vpp - 1, load)

    def _place(
        self,
        cuts: list[_Cut],
        pp: int,
        chunk: int,
        load: dict[int, int],
        layer: tuple[int, int] | None = None,
    ) -> Iterator[Transfer]:
        """The cuts of a template as they are in one chunk of one stage, each with its sender."""
        first = self.export.layout.rank(pp=pp)
        prefix = f"decoder.layers.{layer[0]}." if layer is not None else ""
        for engine in range(self.num_engines):
            for cut in cuts:
                target = cut.target
                if layer is not None:
                    target = target._replace(parameter=layer_name(target.parameter, layer[1]))
                holder, rank = min(
                    ((h, r) for h in cut.holders for r in h.ranks),
                    key=lambda each: (load.get(first + each[1], 0), each[1]),
                )
                numel = _numel(target.size)
                load[first + rank] = load.get(first + rank, 0) + numel
                source = holder.part._replace(parameter=prefix + holder.part.parameter)
                receiver = engine * self.engine_tp + cut.engine_rank
                yield Transfer(first + rank, chunk, source, receiver, target, numel)

    def _cuts(self, sections: Set[Section]) -> list[_Cut]:
        """Intersections of both sides' boxes in some sections (a tensor may be in another one of
        them on the other side)."""
        sources: dict[str, list[tuple[Index, Index, list]]] = {}
        for section in sorted(sections):
            sources |= self._sources(section)
        found = []
        for rank, section in product(range(self.engine_tp), sorted(sections)):
            views = engine_section_views(
                self.export.model, section, self.engine_tp, rank, self.engine_device
            )
            for parameter, view in views.items():
                for box in view.boxes:
                    for start, size, held in sources.get(box.name, ()):
                        if common := _intersection(box, start, size):
                            found.append(_cut(rank, parameter, box, common, held))
        return found

    def _sources(self, section: Section) -> Mapping[str, list[tuple[Index, Index, list]]]:
        """Hugging Face name -> boxes (start, size, [(ranks, parameter, box)]) that tile it."""
        plan = self.export
        found: dict[str, dict[tuple[Index, Index], list]] = {}
        for number in holders(plan.layout, section):
            coords = plan.layout.coords(number)
            place = trainer_place(
                plan.model, plan.layout, coords, plan.vocab_pad_multiple, plan.spec
            )
            ranks = _replicas(plan.layout, section, number)
            for row, view in section_views(
                plan.model, section, place, plan.model.architecture.rows
            ):
                for box in view.boxes:
                    held = found.setdefault(box.name, {}).setdefault((box.start, box.size), [])
                    held.append((ranks, row.local_name(plan.spec), box))
        return {
            name: [(start, size, held) for (start, size), held in boxes.items()]
            for name, boxes in found.items()
        }


def _layers(layout: Layout, num_layers: int) -> Iterator[tuple[int, int, int, int]]:
    """(stage, chunk, number in the chunk, number in the model) of every layer, in order."""
    found = [
        (layer, pp, chunk, local)
        for pp in range(layout.pp)
        for chunk in range(layout.vpp)
        for local, layer in enumerate(layout.chunk_layers(num_layers, pp, chunk))
    ]
    for layer, pp, chunk, local in sorted(found):
        yield pp, chunk, local, layer


def _replicas(layout: Layout, section: Section, number: int) -> tuple[int, ...]:
    """Ranks of a stage that hold what its rank `number` holds."""
    step = layout.ep * layout.etp if section is Section.EXPERT else layout.tp
    return tuple(range(number, layout.stage_size, step))


def _intersection(box: Box, start: Index, size: Index) -> tuple[Index, Index] | None:
    """Start and size, in Hugging Face coordinates, of what `box` shares with another."""
    low = tuple(max(a, b) for a, b in zip(box.start, start, strict=True))
    high = tuple(
        min(a + n, b + m) for a, n, b, m in zip(box.start, box.size, start, size, strict=True)
    )
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    return low, tuple(b - a for a, b in zip(low, high, strict=True))


def _cut(rank: int, parameter: str, box: Box, common: tuple[Index, Index], held: list) -> _Cut:
    return _Cut(
        rank,
        _part(parameter, box, common),
        tuple(_Holder(ranks, _part(name, source, common)) for ranks, name, source in held),
    )


def _part(parameter: str, box: Box, common: tuple[Index, Index]) -> Part:
    """Where a common box lies in a parameter that holds `box`."""
    start = tuple(a - b + c for a, b, c in zip(common[0], box.start, box.local_start, strict=True))
    return Part(parameter, box.lead, start, common[1])


def _numel(size: Index) -> int:
    total = 1
    for extent in size:
        total *= extent
    return total
