"""Clip-Cov: a few tokens that drive the entropy down get no gradient."""

from dataclasses import dataclass

import torch

from framework.algorithm.inputs import LossInputs, LossOutput, SelectionInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of clip_cov."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    share: float = 2e-4
    """Of the update's policy tokens that are cut off; at least one."""
    covariance_low: float = 1.0
    """Only tokens whose covariance lies between these may be chosen."""
    covariance_high: float = 5.0


def scores(inputs: SelectionInputs, config: Config) -> torch.Tensor:
    """Random among the tokens whose covariance of log-prob and advantage is within the bounds."""
    covariance = inputs.covariance()
    candidate = (covariance > config.covariance_low) & (covariance < config.covariance_high)
    return torch.where(candidate, inputs.uniform, -torch.inf)


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Clip-Cov (arXiv 2505.22617): PPO's clipped surrogate, and 0 at the selected tokens.

    Deviation: the covariance is taken over the whole update, before it, with the old policy's
    log-probs (the authors' code: over each micro-batch, with the policy's own, without tokens that
    the ratio's clip has cut off), so that it does not depend on how the batch is split.
    Normaliser: token_mean.
    """
    assert inputs.selected is not None
    log_ratio = inputs.policy_logprobs - inputs.old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    value = -torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    with torch.no_grad():
        outside = (clipped * inputs.advantages < ratio * inputs.advantages).float()
        metrics = {
            "clip_fraction": outside,
            "approx_kl": ratio - 1 - log_ratio,
            "selected_fraction": inputs.selected,
        }
    return LossOutput(loss=value * (1 - inputs.selected), metrics=metrics)
