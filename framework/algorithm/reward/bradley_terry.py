"""The loss of a reward model on pairs."""

from dataclasses import dataclass

import torch

from framework.algorithm.preference.inputs import PreferenceOutput, pair_output
from framework.algorithm.reward.inputs import ScoredPairs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of bradley_terry."""

    center_coef: float = 0.0
    """Weight of (s_chosen + s_rejected)^2, which keeps scores around 0."""


def loss(inputs: ScoredPairs, config: Config) -> PreferenceOutput:
    """Bradley-Terry (InstructGPT, arXiv 2203.02155, eq. 1) with margins (Llama 2, arXiv 2307.09288,
    eq. 2): L = -log sigmoid(s_c - s_r - margin) + center_coef (s_c + s_r)^2, c chosen, r rejected.

    The last term is of arXiv 2312.09244 (0: off). Deviation from InstructGPT: one pair a prompt, so
    nothing is divided by the number of pairs of a prompt.
    """
    difference = inputs.chosen - inputs.rejected - inputs.margins
    value = -torch.nn.functional.logsigmoid(difference)
    value = value + config.center_coef * (inputs.chosen + inputs.rejected) ** 2
    return pair_output(value, inputs.chosen, inputs.rejected)
