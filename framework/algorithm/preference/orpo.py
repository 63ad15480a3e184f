"""Odds ratio preference optimization: supervised training and preference in one, no reference."""

from dataclasses import dataclass

import torch

from framework.algorithm.preference.inputs import PairInputs, PreferenceOutput, pair_output

_LARGEST_LOGPROB = -1e-12
"""Odds of a probability of 1 are infinite; nearer to it than this nothing is told apart."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of orpo."""

    beta: float = 0.1
    """The paper's lambda: weight of the odds-ratio term."""


def loss(inputs: PairInputs, config: Config) -> PreferenceOutput:
    """ORPO (arXiv 2403.07691): with m = log pi(y) / |y| and odds = exp(m) / (1 - exp(m))
    L = -m_chosen - beta log sigmoid(log odds_chosen - log odds_rejected).
    Implicit reward: beta m.

    Deviation: the likelihood term is each chosen answer's mean over its own tokens (the authors'
    code averages over all tokens of the batch, the prompt's among them).
    """
    chosen, rejected = inputs.chosen.mean_logprobs, inputs.rejected.mean_logprobs
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    value = -chosen - config.beta * torch.nn.functional.logsigmoid(log_odds_ratio)
    return pair_output(value, config.beta * chosen, config.beta * rejected)


def _log_odds(logprobs: torch.Tensor) -> torch.Tensor:
    logprobs = logprobs.clamp(max=_LARGEST_LOGPROB)
    return logprobs - (-torch.expm1(logprobs)).log()
