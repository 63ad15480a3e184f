"""Which trainer rank sends which part of which parameter straight into an engine rank's parameter.

Both sides' parameters are views of the same Hugging Face tensors, so what rank s holds for engine
rank r is the intersection of their boxes. Every element that an engine rank holds travels to it
exactly once: bytes are the least possible. Where several trainer ranks hold it (data- and
context-parallel replicas, tensors whole on every tensor-parallel rank), the least loaded sends it.

    template    the transfers of one kind of layer, senders numbered within their stage; computed
                once, cut into segments that no rank sends or receives too much in
    piece       a segment in one layer of the model, its senders shuffled among replicas so that
                loads stay even over the layers
    round       pieces that travel together, in one type; what stays in float32 comes last

A rank expands what it sends itself and nothing else: a plan costs O(layers) beside its templates.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import lcm
from typing import Any, NamedTuple

import torch

from megatron_bridge.direct_template import DirectTemplates, Transfer
from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.mapping import layer_name
from megatron_bridge.models.architecture import Section
from megatron_bridge.uncollected import uncollected

_FIRST = frozenset({Section.EMBEDDING})
"""What comes before the layers."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Transfers of a template that travel in one round."""

    number: int
    """Among all segments of the plan."""
    transfers: tuple[Transfer, ...]

    @cached_property
    def by_sender(self) -> dict[int, tuple[Transfer, ...]]:
        """Number in the stage -> its transfers, in order."""
        found: dict[int, list[Transfer]] = {}
        for each in self.transfers:
            found.setdefault(each.sender, []).append(each)
        return {sender: tuple(transfers) for sender, transfers in found.items()}

    @cached_property
    def by_receiver(self) -> dict[int, dict[int, list[Transfer]]]:
        """Engine rank -> number in the stage -> the transfers between them, in order."""
        found: dict[int, dict[int, list[Transfer]]] = {}
        for each in self.transfers:
            found.setdefault(each.receiver, {}).setdefault(each.sender, []).append(each)
        return found

    @cached_property
    def sent(self) -> dict[int, int]:
        """Number in the stage -> elements."""
        return {who: sum(t.numel for t in each) for who, each in self.by_sender.items()}

    @cached_property
    def received(self) -> dict[int, int]:
        """Engine rank -> elements."""
        return {
            who: sum(t.numel for transfers in by_sender.values() for t in transfers)
            for who, by_sender in self.by_receiver.items()
        }


Cut = dict[frozenset[Section], list[Segment]]
"""Part of the model -> its template in segments."""


class Piece(NamedTuple):
    """A segment where it is needed."""

    segment: Segment
    ranks: tuple[int, ...]
    """Number in the stage -> trainer rank."""
    chunk: int
    layer: tuple[int, int] | None
    """Number in the chunk, number in the model; None: not in a layer."""

    def filled(self, transfer: Transfer) -> Transfer:
        """A transfer of the segment with its sender and its names."""
        source, target = transfer.source, transfer.target
        if self.layer is not None:
            local, number = self.layer
            source = source._replace(parameter=f"decoder.layers.{local}.{source.parameter}")
            target = target._replace(parameter=layer_name(target.parameter, number))
        sender = self.ranks[transfer.sender]
        return Transfer(sender, self.chunk, source, transfer.receiver, target, transfer.numel)


@dataclass(frozen=True)
class Round:
    """What travels together: between two ranks one flat message, its transfers in order."""

    pieces: tuple[Piece, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements that all ranks send."""
        return sum(n for piece in self.pieces for n in piece.segment.sent.values())

    @property
    def size_bytes(self) -> int:
        """What all ranks send."""
        return self.numel * self.dtype.itemsize

    def sent_by(self, rank: int) -> dict[int, list[Transfer]]:
        """Receiver -> what trainer rank `rank` sends it."""
        found: dict[int, list[Transfer]] = {}
        for piece in self.pieces:
            if rank in piece.ranks:
                for each in piece.segment.by_sender.get(piece.ranks.index(rank), ()):
                    found.setdefault(each.receiver, []).append(piece.filled(each))
        return found


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
        load: dict[int, int] = {}
        with uncollected():
            return tuple(
                each
                for dtype, cut in self._templates().items()
                for each in self._fill(self._pieces(cut, load), dtype)
            )

    def expected(self, receiver: int) -> dict[str, Any]:
        """What an engine rank must know of what comes to it, as JSON.

        segments: [number, [[number in the stage, [[parameter, lead, start, size]...]]...]] each of
        those that bring it something, names with {layer}. rounds: [type, [[segment, number of the
        layer, trainer ranks of the stage]...]] each, those of others too.
        """
        with uncollected():
            segments = [
                [each.number, [[who, [t.target for t in ts]] for who, ts in by_sender.items()]]
                for each in self._distinct
                if (by_sender := each.by_receiver.get(receiver))
            ]
        return {"segments": segments, "rounds": self._told}

    @cached_property
    def _distinct(self) -> list[Segment]:
        """Every segment that is needed somewhere, once."""
        pieces = (piece for each in self.rounds for piece in each.pieces)
        return list({piece.segment.number: piece.segment for piece in pieces}.values())

    @cached_property
    def _told(self) -> list[Any]:
        """The rounds, as all engine ranks are told them."""
        return [
            [
                str(each.dtype).removeprefix("torch."),
                [[p.segment.number, p.layer[1] if p.layer else 0, p.ranks] for p in each.pieces],
            ]
            for each in self.rounds
        ]

    def _limit(self, dtype: torch.dtype) -> int:
        """Elements that a rank sends or receives in a round."""
        return self.export.bucket_bytes // dtype.itemsize

    def _fill(self, pieces: Iterable[Piece], dtype: torch.dtype) -> Iterator[Round]:
        """As many pieces as fit into each round, in order."""
        held: list[Piece] = []
        filled: dict[tuple[str, int], int] = {}
        for piece in pieces:
            ends = {("from", piece.ranks[who]): n for who, n in piece.segment.sent.items()}
            ends |= {("to", who): n for who, n in piece.segment.received.items()}
            together = {end: filled.get(end, 0) + n for end, n in ends.items()}
            if held and max(*together.values(), *filled.values()) > self._limit(dtype):
                yield Round(tuple(held), dtype)
                held, filled, together = [], {}, ends
            held.append(piece)
            filled |= together
        if held:
            yield Round(tuple(held), dtype)

    def _templates(self) -> dict[torch.dtype, Cut]:
        """Type of the rounds -> part of the model -> its template, in segments."""
        model = self.export.model
        kept = {tensor.name for tensor in model.architecture.tensors if tensor.float32}
        in_float32 = {row.name for row in model.architecture.engine_rows if kept & {*row.tensors}}
        templates = DirectTemplates(
            export=self.export,
            engine_tp=self.engine_tp,
            num_engines=self.num_engines,
            engine_device=self.engine_device,
        )
        found: dict[torch.dtype, Cut] = {self.export.dtype: {}, torch.float32: {}}
        numbers = count()
        for part in (_FIRST, *model.shape.layer_kinds, self._last):
            transfers: dict[torch.dtype, list[Transfer]] = {dtype: [] for dtype in found}
            for each in templates.transfers(part):
                narrow = each.target.parameter not in in_float32
                transfers[self.export.dtype if narrow else torch.float32].append(each)
            for dtype, cut in found.items():
                cut[part] = list(self._segments(transfers[dtype], dtype, numbers))
        return found

    @property
    def _last(self) -> frozenset[Section]:
        """What comes after the layers."""
        tied = self.export.model.shape.tied
        return frozenset({Section.FINAL} if tied else {Section.FINAL, Section.OUTPUT})

    def _pieces(self, cut: Cut, load: dict[int, int]) -> Iterator[Piece]:
        """Embedding, layers, output."""
        model, layout = self.export.model, self.export.layout
        yield from self._place(cut[_FIRST], 0, 0, None, load)
        for pp, chunk, local, layer in layout.layers(model.shape.num_layers):
            segments = cut[model.shape.layer_sections(layer)]
            yield from self._place(segments, pp, chunk, (local, layer), load)
        yield from self._place(cut[self._last], layout.pp - 1, layout.vpp - 1, None, load)

    def _place(
        self,
        segments: list[Segment],
        pp: int,
        chunk: int,
        layer: tuple[int, int] | None,
        load: dict[int, int],
    ) -> Iterator[Piece]:
        """A template in one chunk of one stage: the replica with most to send in it is the one that
        had least before, and so on; two replicas stay as close as they are in a template."""
        layout = self.export.layout
        step = lcm(layout.tp, layout.ep * layout.etp)
        """Ranks of a stage that are so far apart hold the same parameters."""
        first = layout.rank(pp=pp)
        sent: dict[int, int] = {}
        for segment in segments:
            for who, numel in segment.sent.items():
                sent[who] = sent.get(who, 0) + numel
        ranks = list(range(first, first + layout.stage_size))
        for start in range(step):
            alike = range(start, layout.stage_size, step)
            most = sorted(alike, key=lambda who: (-sent.get(who, 0), who))
            least = sorted((first + who for who in alike), key=lambda r: (load.get(r, 0), r))
            for who, rank in zip(most, least, strict=True):
                ranks[who] = rank
                load[rank] = load.get(rank, 0) + sent.get(who, 0)
        for segment in segments:
            yield Piece(segment, tuple(ranks), chunk, layer)

    def _segments(
        self, transfers: list[Transfer], dtype: torch.dtype, numbers: Iterator[int]
    ) -> Iterator[Segment]:
        """A template in parts that fit into a round; a transfer that does not travels by itself."""
        limit, held, largest = self._limit(dtype), [], 0
        sent: dict[int, int] = {}
        received: dict[int, int] = {}
        for each in transfers:
            out = sent.get(each.sender, 0) + each.numel
            into = received.get(each.receiver, 0) + each.numel
            if held and max(out, into, largest) > limit:
                yield Segment(next(numbers), tuple(held))
                held, sent, received, largest = [], {}, {}, 0
                out = into = each.numel
            held.append(each)
            sent[each.sender], received[each.receiver] = out, into
            largest = max(out, into, largest)
        if held:
            yield Segment(next(numbers), tuple(held))
