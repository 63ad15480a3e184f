"""Generalised advantage estimation over the policy's tokens."""

from dataclasses import dataclass

import torch

from framework.algorithm.critic.inputs import ValuedTokens, backward_sums, following


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of gae."""

    gamma: float = 1.0
    lam: float = 1.0
    """1: returns less values; 0: one-step differences."""


def advantages(inputs: ValuedTokens, config: Config) -> torch.Tensor:
    """GAE (arXiv 1506.02438, eq. 16): d_t = r_t + gamma V_{t+1} - V_t and
    A_t = d_t + gamma lam A_{t+1}.

    t counts the policy's tokens alone, across turns; behind the last one V and A are 0.
    """
    values = inputs.values * inputs.mask
    deltas = inputs.rewards + config.gamma * following(values) - values
    return backward_sums(deltas * inputs.mask, config.gamma * config.lam * inputs.mask)
