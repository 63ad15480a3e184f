"""The transfers of one kind of layer: intersections of what trainer ranks and engine ranks hold.

Senders are numbered within their pipeline stage and names are relative to the layer, so one
template serves every layer of its kind in every stage (`direct_plan.py`).
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import product, zip_longest
from math import prod
from typing import NamedTuple

from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.layout import Layout
from megatron_bridge.mapping import (
    engine_section_views,
    holders,
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
    """Trainer rank; in a template, its number in the stage before replicas are shuffled."""
    chunk: int
    """Of the sender's model; in a template 0."""
    source: Part
    """In a template relative to the layer."""
    receiver: int
    """Engine number * engine_tp + rank in the engine."""
    target: Part
    """In a template with {layer} in its name."""
    numel: int


class _Cut(NamedTuple):
    """A part of an engine rank's parameter, and everybody in a stage who holds it."""

    engine_rank: int
    target: Part
    numel: int
    holders: tuple[tuple[int, Part], ...]
    """Rank of the stage, counted from its first, and where in it; lowest first."""


@dataclass(frozen=True, kw_only=True)
class DirectTemplates:
    """Computes templates; see `direct_plan.DirectPlan` for its fields."""

    export: ExportPlan
    engine_tp: int
    num_engines: int
    engine_device: str

    def transfers(self, sections: Set[Section]) -> list[Transfer]:
        """The transfers of some sections to all engines, each from the least loaded holder.

        Receivers take turns, and so do those that hold the same experts: all of them have work in
        every round.
        """
        load = [0] * self.export.layout.stage_size
        found = []
        cuts: dict[int, dict[tuple[int, ...], list[_Cut]]] = {}
        for cut in self._cuts(sections):
            alike = cuts.setdefault(cut.engine_rank, {})
            alike.setdefault(tuple(rank for rank, _ in cut.holders), []).append(cut)
        for turn in zip_longest(*(_in_turns(alike.values()) for alike in cuts.values())):
            for engine, cut in product(range(self.num_engines), turn):
                if cut is None:
                    continue
                who, source = cut.holders[0]
                for rank, part in cut.holders[1:]:
                    if load[rank] < load[who]:
                        who, source = rank, part
                load[who] += cut.numel
                receiver = engine * self.engine_tp + cut.engine_rank
                found.append(Transfer(who, 0, source, receiver, cut.target, cut.numel))
        return found

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


def _in_turns(groups: Iterable[list[_Cut]]) -> list[_Cut]:
    """One of each group, again and again."""
    return [cut for turn in zip_longest(*groups) for cut in turn if cut is not None]


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
    holding = [
        (rank_of_stage, part)
        for ranks, name, source in held
        for part in (_part(name, source, common),)
        for rank_of_stage in ranks
    ]
    holding.sort(key=lambda each: each[0])
    return _Cut(rank, _part(parameter, box, common), prod(common[1]), tuple(holding))


def _part(parameter: str, box: Box, common: tuple[Index, Index]) -> Part:
    """Where a common box lies in a parameter that holds `box`."""
    start = tuple(a - b + c for a, b, c in zip(common[0], box.start, box.local_start, strict=True))
    return Part(parameter, box.lead, start, common[1])
