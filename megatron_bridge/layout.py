"""Who holds what: ranks, their coordinates, the layers of a pipeline chunk, the padded vocabulary.

Rank order is Megatron's default `tp-cp-ep-dp-pp`: tensor-parallel ranks are neighbours, pipeline
stages are farthest apart. Dense parameters live on the grid (tp, cp, dp, pp), expert parameters on
(etp, ep, edp, pp); both number the same ranks.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Coords:
    """One rank's place."""

    tp: int = 0
    cp: int = 0
    dp: int = 0
    pp: int = 0
    ep: int = 0
    etp: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the parallel groups. World size = tp * cp * dp * pp."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks per pipeline stage."""
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    first_stage_layers: int = 0
    """Layers of the first pipeline stage, which has the embedding besides; 0: an even share."""
    last_stage_layers: int = 0
    """Layers of the last pipeline stage, which has the output layer besides; 0: an even share."""

    def __post_init__(self) -> None:
        for field in fields(self):
            size, least = getattr(self, field.name), 0 if field.name.endswith("layers") else 1
            if not isinstance(size, int) or size < least:
                raise ValueError(
                    f"parallel.{field.name} is {size!r}; it must be an integer >= {least}"
                )
        if self.stage_size % (self.ep * self.etp):
            raise ValueError(
                f"parallel.ep * parallel.etp = {self.ep * self.etp} does not divide "
                f"tp * cp * dp = {self.stage_size}"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp={self.vpp} needs parallel.pp > 1")
        for name in ("first_stage_layers", "last_stage_layers"):
            if getattr(self, name) and self.pp == 1:
                raise ValueError(f"parallel.{name}={getattr(self, name)} needs parallel.pp > 1")

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.stage_size * self.pp

    def coords(self, rank: int) -> Coords:
        """The place of global rank `rank`."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        pp, inner = divmod(rank, self.stage_size)
        rest, tp = divmod(inner, self.tp)
        dp, cp = divmod(rest, self.cp)
        return Coords(
            tp=tp,
            cp=cp,
            dp=dp,
            pp=pp,
            etp=inner % self.etp,
            ep=inner // self.etp % self.ep,
        )

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The global rank at these coordinates of the dense grid."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def chunk_layers(self, num_layers: int, pp: int, chunk: int) -> range:
        """Global numbers (from 0) of the layers in model chunk `chunk` of stage `pp`.

        Chunks go round the stages: chunk 1 of stage 0 follows chunk 0 of the last stage.
        """
        sizes = self._chunk_sizes(num_layers)
        first = chunk * sum(sizes) + sum(sizes[:pp])
        return range(first, first + sizes[pp])

    def layers(self, num_layers: int) -> list[tuple[int, int, int, int]]:
        """(stage, chunk, number in the chunk, number in the model) of every layer, in order."""
        found = [
            (layer, pp, chunk, local)
            for pp in range(self.pp)
            for chunk in range(self.vpp)
            for local, layer in enumerate(self.chunk_layers(num_layers, pp, chunk))
        ]
        return [(pp, chunk, local, layer) for layer, pp, chunk, local in sorted(found)]

    def _chunk_sizes(self, num_layers: int) -> list[int]:
        """Layers of one chunk of each stage."""
        ends = self.first_stage_layers + self.last_stage_layers
        even = self.pp - bool(self.first_stage_layers) - bool(self.last_stage_layers)
        share, rest = divmod(num_layers - ends, even) if even else (0, num_layers - ends)
        stages = [share] * self.pp
        stages[0] = self.first_stage_layers or stages[0]
        stages[-1] = self.last_stage_layers or stages[-1]
        if rest or any(stage < 0 or stage % self.vpp for stage in stages):
            uneven = "".join(
                f", parallel.{name}={getattr(self, name)}"
                for name in ("first_stage_layers", "last_stage_layers")
                if getattr(self, name)
            )
            raise ValueError(
                f"{num_layers} layers cannot be cut evenly over parallel.pp={self.pp} stages of "
                f"parallel.vpp={self.vpp} chunks{uneven}"
            )
        return [stage // self.vpp for stage in stages]

    def is_first(self, pp: int, chunk: int) -> bool:
        """Whether this chunk holds the embedding."""
        return pp == 0 and chunk == 0

    def is_last(self, pp: int, chunk: int) -> bool:
        """Whether this chunk holds the final norm and the output layer."""
        return pp == self.pp - 1 and chunk == self.vpp - 1


def padded_vocab_size(vocab_size: int, multiple: int, tp: int) -> int:
    """Rows of Megatron's embedding: the vocabulary rounded up to `multiple` * tp."""
    if multiple < 1:
        raise ValueError(f"model.vocab_pad_multiple is {multiple}; it must be >= 1")
    step = multiple * tp
    return -(-vocab_size // step) * step
