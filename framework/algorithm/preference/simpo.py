"""Simple preference optimization: no reference, log-probs a token, a target margin."""

from dataclasses import dataclass

import torch

from framework.algorithm.preference.inputs import PairInputs, PreferenceOutput, pair_output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of simpo."""

    beta: float = 2.0
    gamma: float = 1.0
    """The margin by which the chosen answer's reward is to be larger."""


def loss(inputs: PairInputs, config: Config) -> PreferenceOutput:
    """SimPO (arXiv 2405.14734): L = -log sigmoid(beta (log pi(chosen) / |chosen| - log pi(rejected)
    / |rejected|) - gamma). Implicit reward: beta times the log-prob a token.
    """
    chosen = config.beta * inputs.chosen.mean_logprobs
    rejected = config.beta * inputs.rejected.mean_logprobs
    value = -torch.nn.functional.logsigmoid(chosen - rejected - config.gamma)
    return pair_output(value, chosen, rejected)
