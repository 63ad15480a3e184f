"""ReMax's advantage: better or worse than the greedy answer."""

from dataclasses import dataclass

import torch

from framework.algorithm.advantages.groups import normalize_over_tokens, spread_over_tokens
from framework.algorithm.inputs import AdvantageInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of greedy_baseline."""

    normalize: bool = False
    """Then over all policy tokens of the step, to mean 0 and standard deviation 1."""
    std_eps: float = 1e-8


def advantages(inputs: AdvantageInputs, config: Config) -> list[torch.Tensor]:
    """ReMax (arXiv 2310.10505): A_i = R_i - R(the same weights' greedy answer to the same prompt).
    Works with one sample a prompt.

    Raises:
        ValueError: the rollout brought no greedy answers.
    """
    if inputs.baselines is None:
        raise ValueError("algorithm.advantage=greedy_baseline needs rollout.greedy_baseline=true")
    values = inputs.rewards.double() - inputs.baselines.double()
    if config.normalize:
        values = normalize_over_tokens(values, inputs, config.std_eps)
    return spread_over_tokens(values, inputs)
