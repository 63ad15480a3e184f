"""DPO with a likelihood term that keeps the chosen answer likely."""

from dataclasses import dataclass

import torch

from framework.algorithm.preference.inputs import PairInputs, PreferenceOutput, pair_output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of rpo."""

    beta: float = 0.1
    alpha: float = 1.0
    """Weight of the likelihood term."""


def loss(inputs: PairInputs, config: Config) -> PreferenceOutput:
    """RPO (Iterative Reasoning Preference Optimization, arXiv 2404.19733, eq. 1):
    L = -log sigmoid(beta D) - alpha log pi(chosen) / |chosen|, D as in dpo. DPO alone may lower the
    chosen answer's likelihood as long as the rejected one's falls faster.

    Normaliser: each pair's own length, then the mean over pairs (TRL: the mean over all chosen
    tokens of the batch).
    """
    chosen = config.beta * inputs.chosen.log_ratios
    rejected = config.beta * inputs.rejected.log_ratios
    value = -torch.nn.functional.logsigmoid(chosen - rejected)
    return pair_output(value - config.alpha * inputs.chosen.mean_logprobs, chosen, rejected)
