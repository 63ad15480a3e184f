"""KL-Cov: the tokens that drive the entropy down most are held near the old policy."""

from dataclasses import dataclass

import torch

from framework.algorithm.inputs import LossInputs, LossOutput, SelectionInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of kl_cov."""

    share: float = 2e-3
    """Of the update's policy tokens that are held back: those of largest covariance; at least one.
    """
    penalty: float = 1.0


def scores(inputs: SelectionInputs, config: Config) -> torch.Tensor:
    """The covariance of log-prob and advantage."""
    return inputs.covariance()


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """KL-Cov (arXiv 2505.22617): L_t = -r_t A_t, and + penalty |log r_t| at the selected
    tokens, the authors' estimate of the divergence from the old policy. No clip. With one update a
    batch r is 1 and the penalty has no gradient.

    Deviation: the covariance is taken over the whole update, before it, with the old policy's
    log-probs (the authors' code: over each micro-batch, with the policy's own).
    Normaliser: token_mean.
    """
    assert inputs.selected is not None
    log_ratio = inputs.policy_logprobs - inputs.old_logprobs
    ratio = log_ratio.exp()
    value = -ratio * inputs.advantages + config.penalty * inputs.selected * log_ratio.abs()
    with torch.no_grad():
        metrics = {"approx_kl": ratio - 1 - log_ratio, "selected_fraction": inputs.selected}
    return LossOutput(loss=value, metrics=metrics)
