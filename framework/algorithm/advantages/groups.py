"""Statistics of groups and of tokens, in double precision: they must not depend on order."""

from dataclasses import dataclass

import torch

from framework.algorithm.inputs import AdvantageInputs


@dataclass(frozen=True, kw_only=True)
class GroupStatistics:
    """[N] float64 each: of the group that a sample belongs to, found by id, never by position."""

    rewards: torch.Tensor
    """The sample's own."""
    count: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    """Unbiased; 0 in a group of one."""


def group_statistics(inputs: AdvantageInputs) -> GroupStatistics:
    """Mean and spread of every group's rewards, at each of its samples."""
    _, group = inputs.group_ids.unique(return_inverse=True)
    rewards = inputs.rewards.double()
    zeros = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    count = zeros.index_add(0, group, torch.ones_like(rewards))
    mean = zeros.index_add(0, group, rewards) / count
    squares = zeros.index_add(0, group, (rewards - mean[group]) ** 2)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return GroupStatistics(rewards=rewards, count=count[group], mean=mean[group], std=std[group])


def spread_over_tokens(values: torch.Tensor, inputs: AdvantageInputs) -> list[torch.Tensor]:
    """One value per sample -> N tensors, [R_i] float32 each (expanded, not copied)."""
    return [
        value.expand(length)
        for value, length in zip(values.float(), inputs.response_lengths, strict=True)
    ]


def normalize_over_tokens(
    values: torch.Tensor, inputs: AdvantageInputs, std_eps: float
) -> torch.Tensor:
    """(value - mean) / (std + eps) over the policy's tokens of the whole step.

    Args:
        values: [N], the same at every token of a sample, so a sample counts num_loss_tokens times.

    The biased standard deviation, as in OpenRLHF.
    """
    weights = torch.tensor(inputs.num_loss_tokens, dtype=torch.float64)
    weights = weights / weights.sum()
    centered = values - (weights * values).sum()
    return centered / ((weights * centered**2).sum().sqrt() + std_eps)
