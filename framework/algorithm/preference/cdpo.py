"""Conservative DPO: labels that may be wrong."""

from dataclasses import dataclass

import torch

from framework.algorithm.preference.inputs import PairInputs, PreferenceOutput, pair_output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of cdpo."""

    beta: float = 0.1
    label_smoothing: float = 0.1
    """Probability that a label is flipped, below 1/2."""


def loss(inputs: PairInputs, config: Config) -> PreferenceOutput:
    """cDPO (Mitchell 2023, "A note on DPO with noisy preferences"; the loss of DPO, arXiv
    2305.18290, under smoothed labels): with e = label_smoothing and D as in dpo
    L = -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D), least where sigmoid(beta D) = 1 - e.
    """
    chosen = config.beta * inputs.chosen.log_ratios
    rejected = config.beta * inputs.rejected.log_ratios
    right = torch.nn.functional.logsigmoid(chosen - rejected)
    wrong = torch.nn.functional.logsigmoid(rejected - chosen)
    value = -(1 - config.label_smoothing) * right - config.label_smoothing * wrong
    return pair_output(value, chosen, rejected)
