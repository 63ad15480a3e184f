"""REINFORCE++'s advantage: no group, the whole step is the baseline."""

from dataclasses import dataclass

import torch

from framework.algorithm.advantages.groups import normalize_over_tokens, spread_over_tokens
from framework.algorithm.inputs import AdvantageInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of batch_normalized."""

    std_eps: float = 1e-8


def advantages(inputs: AdvantageInputs, config: Config) -> list[torch.Tensor]:
    """REINFORCE++ (arXiv 2501.03262): A = (R - mean) / (std + eps) over the policy's tokens of the
    whole step; works with one sample a prompt. Deviation: no KL term in the reward.
    """
    values = normalize_over_tokens(inputs.rewards.double(), inputs, config.std_eps)
    return spread_over_tokens(values, inputs)
