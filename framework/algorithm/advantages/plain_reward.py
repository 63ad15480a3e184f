"""No baseline: the reward itself."""

from dataclasses import dataclass

import torch

from framework.algorithm.advantages.groups import spread_over_tokens
from framework.algorithm.inputs import AdvantageInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of plain_reward."""

    baseline: float = 0.0
    """A constant that is taken off, for example the reward of a middling answer."""


def advantages(inputs: AdvantageInputs, config: Config) -> list[torch.Tensor]:
    """REINFORCE (Williams 1992): A_i = R_i - baseline, at every token. Works with one sample a
    prompt. Equal rewards still push: towards whatever was sampled, where they are positive.
    """
    return spread_over_tokens(inputs.rewards.double() - config.baseline, inputs)
