"""CISPO: the clipped ratio is a weight, so that no token's gradient is cut off."""

from dataclasses import dataclass

from framework.algorithm.inputs import LossInputs, LossOutput


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of cispo, as distances from 1."""

    clip_low: float = 1.0
    """1: no lower bound, as in the paper's runs."""
    clip_high: float = 0.28
    """The paper tunes it and does not print it; DAPO's value."""


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """CISPO (MiniMax-M1, arXiv 2506.13585):
    L_t = -sg[clip(r_t, 1 - clip_low, 1 + clip_high)] A_t log pi_t. Normaliser: token_mean.
    """
    log_ratio = (inputs.policy_logprobs - inputs.old_logprobs).detach()
    ratio = log_ratio.exp()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return LossOutput(
        loss=-weight * inputs.advantages * inputs.policy_logprobs,
        metrics={
            "clip_fraction": (weight != ratio).float(),
            "approx_kl": ratio - 1 - log_ratio,
        },
    )
