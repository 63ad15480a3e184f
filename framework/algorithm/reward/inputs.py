"""What losses of reward models are given. Plain tensors."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """N pairs, [N] float64 each."""

    chosen: torch.Tensor
    """Score at the chosen answer's last token; carries the gradient."""
    rejected: torch.Tensor
    margins: torch.Tensor
    """By how much the chosen answer is better; 0 where the data do not say."""
