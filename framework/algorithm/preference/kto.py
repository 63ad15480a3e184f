"""Kahneman-Tversky optimization: single answers called good or bad, no pairs."""

from dataclasses import dataclass

import torch

from framework.algorithm.preference.inputs import LabelledInputs, PreferenceOutput


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of kto."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    """The paper's lambda_D; raise it where good answers are fewer than bad ones."""
    undesirable_weight: float = 1.0
    """The paper's lambda_U."""


def loss(inputs: LabelledInputs, config: Config) -> PreferenceOutput:
    """KTO (arXiv 2402.01306, eq. 8): with r = log pi/pi_ref of the answer and z = inputs.kl
    L = lambda_D (1 - sigmoid(beta (r - z))) for a good answer and
    L = lambda_U (1 - sigmoid(beta (z - r))) for a bad one. Implicit reward: beta r.

    z = max(0, mean of log pi/pi_ref over unrelated answers of the global batch) carries no
    gradient. An answer counts as judged right where r is on the side of z that its label names.
    """
    ratios = inputs.answers.log_ratios
    distance = config.beta * (ratios - inputs.kl)
    good = config.desirable_weight * (1 - distance.sigmoid())
    bad = config.undesirable_weight * (1 - (-distance).sigmoid())
    rewards = config.beta * ratios.detach()
    return PreferenceOutput(
        loss=torch.where(inputs.desirable, good, bad),
        chosen_rewards=rewards[inputs.desirable],
        rejected_rewards=rewards[~inputs.desirable],
        correct=(distance.detach() > 0) == inputs.desirable,
    )
