"""The reward beyond its group's mean, and no more."""

from dataclasses import dataclass

import torch

from framework.algorithm.advantages.groups import (
    group_statistics,
    normalize_over_tokens,
    spread_over_tokens,
)
from framework.algorithm.inputs import AdvantageInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of group_centered."""

    normalize: bool = False
    """Then over all policy tokens of the step, to mean 0 and standard deviation 1."""
    std_eps: float = 1e-8


def advantages(inputs: AdvantageInputs, config: Config) -> list[torch.Tensor]:
    """Dr.GRPO (arXiv 2503.20783): A_i = R_i - mean(group).

    normalize: REINFORCE++-baseline (arXiv 2501.03262): then (A - mean) /
    (std + eps) over the policy's tokens of the whole step. A group of one has no baseline and gets
    zero (before the normalisation).
    """
    group = group_statistics(inputs)
    values = group.rewards - group.mean
    if config.normalize:
        values = normalize_over_tokens(values, inputs, config.std_eps)
    return spread_over_tokens(values, inputs)
