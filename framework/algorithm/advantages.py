"""Advantage estimators: rewards of a step in, one advantage per response token out. Pure.

Every rank computes them alike from metadata that all ranks have; adding one is one function and
one row of ADVANTAGES.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class AdvantageInputs:
    """One step's samples, N of them, of any number per group."""

    rewards: torch.Tensor
    """[N] float."""
    group_ids: torch.Tensor
    """[N] int64; samples of one prompt share an id, in any order and number."""
    response_lengths: list[int]
    """[N]; the length of each advantage returned."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Knobs of the estimators."""

    std_eps: float = 1e-6


def group_normalized(inputs: AdvantageInputs, config: AdvantageConfig) -> list[torch.Tensor]:
    """GRPO (arXiv 2402.03300, sec. 4.1.2): A_i = (R_i - mean(group)) / (std(group) + eps).

    Grouped by id, never by position, so groups may differ in size. The standard deviation is the
    unbiased one, as in TRL and verl; eps is added outside the root. A group of one has no baseline
    and gets zero.

    Returns:
        N tensors, [R_i] float32 each, constant over the response (expanded, not copied).
    """
    _, group = inputs.group_ids.unique(return_inverse=True)
    rewards = inputs.rewards.double()  # the sum of a group must not depend on its order
    zeros = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    count = zeros.index_add(0, group, torch.ones_like(rewards))
    mean = zeros.index_add(0, group, rewards) / count
    centered = rewards - mean[group]
    variance = zeros.index_add(0, group, centered**2) / (count - 1).clamp(min=1)
    advantages = (centered / (variance.sqrt()[group] + config.std_eps)).float()
    return [
        advantage.expand(length)
        for advantage, length in zip(advantages, inputs.response_lengths, strict=True)
    ]


Advantage = Callable[[AdvantageInputs, AdvantageConfig], list[torch.Tensor]]

ADVANTAGES: dict[str, Advantage] = {
    "group_normalized": group_normalized,
}
