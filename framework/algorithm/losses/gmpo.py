"""GMPO: the geometric mean of a sequence's ratios in place of the arithmetic one."""

from dataclasses import dataclass

import torch

from framework.algorithm.inputs import LossInputs, LossOutput


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of gmpo."""

    clip_log_low: float = 0.4
    """Ratios are clipped to [exp(-clip_log_low), exp(clip_log_high)]."""
    clip_log_high: float = 0.4


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """GMPO (arXiv 2507.20673, with its token-level clip): for each sequence -A exp(mean c_t),
    c_t = log r_t, or its clipped value where that is less favourable.

    Written per token as -A_t sg[g] (1 + c_t - sg[c_t]) with g = exp(mean c_t), which under the
    paper's normaliser, sequence_mean, has exactly that value and gradient.
    """
    log_ratio = inputs.policy_logprobs - inputs.old_logprobs
    bounded = log_ratio.clamp(-config.clip_log_low, config.clip_log_high)
    chosen = torch.where(
        inputs.advantages > 0, torch.minimum(log_ratio, bounded), torch.maximum(log_ratio, bounded)
    )
    geometric = inputs.sequences.mean(chosen).exp()
    value = -inputs.advantages * geometric * (1 + chosen - chosen.detach())
    with torch.no_grad():
        metrics = {
            "clip_fraction": (chosen != log_ratio).float(),
            "approx_kl": log_ratio.exp() - 1 - log_ratio,
            "sequence_ratio": geometric,
        }
    return LossOutput(loss=value, metrics=metrics)
