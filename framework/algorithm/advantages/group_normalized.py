"""GRPO's advantage."""

from dataclasses import dataclass

import torch

from framework.algorithm.advantages.groups import group_statistics, spread_over_tokens
from framework.algorithm.inputs import AdvantageInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of group_normalized."""

    std_eps: float = 1e-6
    """Added to a group's standard deviation before the division."""


def advantages(inputs: AdvantageInputs, config: Config) -> list[torch.Tensor]:
    """GRPO (arXiv 2402.03300, sec. 4.1.2): A_i = (R_i - mean(group)) / (std(group) + eps).

    Grouped by id, so groups may differ in size. The standard deviation is the unbiased one, as in
    TRL and verl; eps is added outside the root. A group of one has no baseline and gets zero.
    """
    group = group_statistics(inputs)
    values = (group.rewards - group.mean) / (group.std + config.std_eps)
    return spread_over_tokens(values, inputs)
