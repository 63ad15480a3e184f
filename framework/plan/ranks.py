"""Which rank is where in the layout and what it holds, as a table."""

from framework.config import RunConfig
from framework.plan.traffic import step_samples

MAX_RANKS_SHOWN = 64


def rank_table(config: RunConfig, num_layers: int) -> list[str]:
    """One line for each rank: coordinates, layers, its share of a step's samples."""
    layout = config.parallel.layout
    total = step_samples(config)
    lines = [f"world size {layout.world_size} = tp * pp * cp * dp"]
    for rank in range(min(layout.world_size, MAX_RANKS_SHOWN)):
        at = layout.coords(rank)
        held = []
        for chunk in range(layout.vpp):
            layers = layout.chunk_layers(num_layers, at.pp, chunk)
            held.append(f"{layers.start}-{layers.stop - 1}" if len(layers) else "none")
        ends = [
            name
            for name, holds in (
                ("embedding", layout.is_first(at.pp, 0)),
                ("output", layout.is_last(at.pp, layout.vpp - 1)),
            )
            if holds
        ]
        share = total // layout.dp + (1 if at.dp < total % layout.dp else 0)
        lines.append(
            f"  rank {rank}: tp={at.tp} cp={at.cp} dp={at.dp} pp={at.pp}  "
            f"layers {', '.join(held)}{' + ' if ends else ''}{' + '.join(ends)}  "
            f"about {share} of {total} samples a step"
        )
    if layout.world_size > MAX_RANKS_SHOWN:
        lines.append(f"  ... and {layout.world_size - MAX_RANKS_SHOWN} more, in the same order")
    return lines
