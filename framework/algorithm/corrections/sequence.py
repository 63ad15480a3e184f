"""Importance weights of whole sequences: truncated or masked."""

from dataclasses import dataclass

from framework.algorithm.corrections.bounds import bounded
from framework.algorithm.inputs import CorrectionOutput, LossInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of sequence."""

    low: float = 0.0
    """mask: sequences below it are dropped."""
    high: float = 2.0
    """Weights above it are capped, or dropped with mask; 0: no bound."""
    mask: bool = False


def weights(inputs: LossInputs, config: Config) -> CorrectionOutput:
    """w = prod_t pi_old(t) / pi_rollout(t) over the policy's tokens of the sequence, the same at
    each of them: min(w, high); mask (MIS): w where low <= w <= high, else 0.
    """
    log_ratio = (inputs.old_logprobs - inputs.rollout_logprobs).detach()
    ratio = inputs.sequences.sum(log_ratio).exp()
    return bounded(ratio, ratio, low=config.low, high=config.high, mask=config.mask)
