"""Token-level weights behind a gate on the sequence's geometric mean."""

from dataclasses import dataclass

from framework.algorithm.corrections.bounds import bounded
from framework.algorithm.inputs import CorrectionOutput, LossInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of geometric; the mean of a long sequence stays near 1."""

    low: float = 0.99
    high: float = 1.01


def weights(inputs: LossInputs, config: Config) -> CorrectionOutput:
    """w_t = pi_old(t) / pi_rollout(t) where low <= exp(mean over the sequence of log w) <= high;
    0 for every token of another sequence.
    """
    log_ratio = (inputs.old_logprobs - inputs.rollout_logprobs).detach()
    gate = inputs.sequences.mean(log_ratio).exp()
    return bounded(log_ratio.exp(), gate, low=config.low, high=config.high, mask=True)
