"""Lite PPO's advantage: the group's mean, the batch's spread."""

from dataclasses import dataclass

import torch

from framework.algorithm.advantages.groups import group_statistics, spread_over_tokens
from framework.algorithm.inputs import AdvantageInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of group_mean_batch_std."""

    std_eps: float = 1e-6


def advantages(inputs: AdvantageInputs, config: Config) -> list[torch.Tensor]:
    """Lite PPO (arXiv 2508.08221): A_i = (R_i - mean(group)) / (std(step's rewards) + eps).

    The unbiased standard deviation of all rewards of the step: a group whose rewards hardly differ
    is not blown up by its own small one.
    """
    group = group_statistics(inputs)
    centered = group.rewards - group.rewards.mean()
    std = ((centered**2).sum() / max(1, len(centered) - 1)).sqrt()
    values = (group.rewards - group.mean) / (std + config.std_eps)
    return spread_over_tokens(values, inputs)
