"""PPO's clipped surrogate, with two bounds and, where wanted, a second clip."""

from dataclasses import dataclass

import torch

from framework.algorithm.inputs import LossInputs, LossOutput


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of ppo_clip."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    """c > 1: with A < 0 no token loses more than c |A|; 0: off."""


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), with two bounds (DAPO's clip-higher,
    arXiv 2503.14476): L_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t).
    Dual clip (arXiv 1912.09729): where A_t < 0, L_t = min(L_t, -dual_clip A_t).
    No entropy term, no KL term.
    """
    log_ratio = inputs.policy_logprobs - inputs.old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    value = -torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    with torch.no_grad():
        outside = (clipped * inputs.advantages < ratio * inputs.advantages).float()
        metrics = {"clip_fraction": outside, "approx_kl": ratio - 1 - log_ratio}
    if config.dual_clip:
        bound = -config.dual_clip * inputs.advantages
        beyond = (inputs.advantages < 0) & (value > bound)
        value = torch.where(beyond, bound, value)
        metrics["dual_clip_fraction"] = beyond.float()
    return LossOutput(loss=value, metrics=metrics)
