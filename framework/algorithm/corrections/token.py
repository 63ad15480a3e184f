"""Token-level importance weights: truncated (TIS) or masked (IcePop)."""

from dataclasses import dataclass

from framework.algorithm.corrections.bounds import bounded
from framework.algorithm.inputs import CorrectionOutput, LossInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of token."""

    low: float = 0.0
    """mask: weights below it are dropped."""
    high: float = 2.0
    """Weights above it are capped, or dropped with mask; 0: no bound."""
    mask: bool = False


def weights(inputs: LossInputs, config: Config) -> CorrectionOutput:
    """w_t = pi_old(t) / pi_rollout(t). Truncated (TIS, Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"): min(w_t, high). mask: w_t where
    low <= w_t <= high, else 0 (IcePop, arXiv 2510.18855: low 0.5, high 5).
    """
    ratio = (inputs.old_logprobs - inputs.rollout_logprobs).detach().exp()
    return bounded(ratio, ratio, low=config.low, high=config.high, mask=config.mask)
