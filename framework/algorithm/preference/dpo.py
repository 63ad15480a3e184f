"""Direct preference optimization."""

from dataclasses import dataclass

import torch

from framework.algorithm.preference.inputs import PairInputs, PreferenceOutput, pair_output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of dpo."""

    beta: float = 0.1
    """How dear it is to leave the reference."""


def loss(inputs: PairInputs, config: Config) -> PreferenceOutput:
    """DPO (arXiv 2305.18290): L = -log sigmoid(beta D), D = log pi/pi_ref (chosen) - log pi/pi_ref
    (rejected), log-probs summed over the answer. Implicit reward: beta log pi/pi_ref.
    """
    chosen = config.beta * inputs.chosen.log_ratios
    rejected = config.beta * inputs.rejected.log_ratios
    value = -torch.nn.functional.logsigmoid(chosen - rejected)
    return pair_output(value, chosen, rejected)
