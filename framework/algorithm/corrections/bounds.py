"""What all corrections do with a weight: cap it, or drop the token."""

import torch

from framework.algorithm.inputs import CorrectionOutput


def bounded(
    weights: torch.Tensor, gate: torch.Tensor, *, low: float, high: float, mask: bool
) -> CorrectionOutput:
    """Weights within bounds.

    Args:
        weights: [T] detached.
        gate: [T] detached: what the bounds are on (often the weights themselves).
        high: 0: none.
        mask: a token whose gate is outside gets 0; else its weight is capped at high.
    """
    above = gate > high if high else torch.zeros_like(gate, dtype=torch.bool)
    outside = above | (gate < low)
    # A weight that is not finite comes from a log-prob that is not: the loss must show it.
    found = weights.masked_fill(outside, 0.0) if mask else weights.clamp(max=high or None)
    name = "correction_masked_fraction" if mask else "correction_truncated_fraction"
    return CorrectionOutput(
        weights=found,
        metrics={
            name: (outside if mask else above).float(),
            "correction_weight": found,
            "correction_weight_squared": found**2,
        },
    )
