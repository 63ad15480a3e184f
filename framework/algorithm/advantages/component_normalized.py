"""GDPO's advantage: several rewards, each compared with its own kind."""

from dataclasses import dataclass, field, replace

import torch

from framework.algorithm.advantages.groups import (
    group_statistics,
    normalize_over_tokens,
    spread_over_tokens,
)
from framework.algorithm.inputs import AdvantageInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of component_normalized."""

    weights: dict[str, float] = field(default_factory=dict)
    """Component of data.reward -> its weight; empty: all components, each 1."""
    std_eps: float = 1e-6


def advantages(inputs: AdvantageInputs, config: Config) -> list[torch.Tensor]:
    """GDPO (arXiv 2601.05242): every component k of the reward is normalised in its group,
    (r_k - mean) / (std + eps); their weighted sum is normalised over the policy's tokens of the
    whole step. A component that is the same in a whole group adds nothing there, and does not
    drown another one's differences, as it does in the spread of a sum. The standard deviation of a
    group is the unbiased one. Deviation: the last normalisation counts a sample by its tokens.

    Raises:
        ValueError: a component is missing.
    """
    weights = config.weights or dict.fromkeys(sorted(inputs.components), 1.0)
    if not weights:
        raise ValueError("algorithm.advantage=component_normalized: data.reward has no components")
    total = torch.zeros(len(inputs.rewards), dtype=torch.float64)
    for name, weight in weights.items():
        values = inputs.components.get(name)
        if values is None or values.isnan().any():
            told = ", ".join(sorted(inputs.components)) or "none"
            raise ValueError(
                f"algorithm.advantage=component_normalized: not every sample's reward has the "
                f"component {name}; data.reward gave {told}"
            )
        group = group_statistics(replace(inputs, rewards=values))
        total += weight * (group.rewards - group.mean) / (group.std + config.std_eps)
    return spread_over_tokens(normalize_over_tokens(total, inputs, config.std_eps), inputs)
