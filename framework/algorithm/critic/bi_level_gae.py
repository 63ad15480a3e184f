"""GAE over turns, then over the tokens of each turn (StarPO)."""

from dataclasses import dataclass

import torch

from framework.algorithm.critic.inputs import (
    TokenRows,
    ValuedTokens,
    backward_sums,
    following,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of bi_level_gae."""

    gamma: float = 1.0
    """Within a turn."""
    lam: float = 1.0
    """In both levels."""
    turn_gamma: float = 1.0
    """From one turn to the next."""


def advantages(inputs: ValuedTokens, config: Config) -> torch.Tensor:
    """Bi-level GAE (RAGEN, arXiv 2504.20073). With e_k the last token of turn k:

    d_k = r(e_k) + turn_gamma V(e_{k+1}) - V(e_k), A_k = d_k + turn_gamma lam A_{k+1};
    A_k + V(e_k), the turn's return, then is the reward at e_k of a GAE within the turn, at whose
    end V and A are 0.

    Deviation: turns are explicit (the paper's code takes a nonzero reward for the end of a turn and
    so loses turns that earn nothing).
    """
    values, ends = inputs.values * inputs.mask, inputs.turn_ends * inputs.mask
    count, length = values.shape
    row = torch.arange(count, device=values.device).repeat_interleave(length)
    turns = TokenRows(ends.flatten(), row, count)
    turn_values = turns.rows(values.flatten())
    there = turns.rows(torch.ones_like(values).flatten())
    deltas = turns.rows(inputs.rewards.flatten())
    deltas = deltas + config.turn_gamma * following(turn_values) - turn_values
    returns = turn_values + backward_sums(deltas, config.turn_gamma * config.lam * there)
    rewards = torch.where(ends > 0, turns.packed(returns).view_as(values), inputs.rewards)
    inside = inputs.mask * (1 - ends)
    deltas = (rewards + config.gamma * following(values) * inside - values) * inputs.mask
    return backward_sums(deltas, config.gamma * config.lam * inside)
