"""RLOO's advantage."""

from dataclasses import dataclass

import torch

from framework.algorithm.advantages.groups import group_statistics, spread_over_tokens
from framework.algorithm.inputs import AdvantageInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """leave_one_out has no knobs."""


def advantages(inputs: AdvantageInputs, config: Config) -> list[torch.Tensor]:
    """RLOO (arXiv 2402.14740): A_i = R_i - the mean reward of the others of its group,
    that is (R_i - mean(group)) n / (n - 1). A group of one has no baseline and gets zero.
    """
    group = group_statistics(inputs)
    values = (group.rewards - group.mean) * group.count / (group.count - 1).clamp(min=1)
    return spread_over_tokens(values, inputs)
