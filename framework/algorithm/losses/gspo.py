"""Group sequence policy optimization: the ratio of a whole sequence."""

from dataclasses import dataclass

import torch

from framework.algorithm.inputs import LossInputs, LossOutput


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of gspo; its ratios stay far nearer to 1 than a token's."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """GSPO in its token form (arXiv 2507.18071, GSPO-token):
    L_t = -min(s_t A_t, clip(s_t, 1 - clip_low, 1 + clip_high) A_t), where
    s_t = sg[s] pi_t / sg[pi_t] has the value of s = exp(mean over the sequence of log r) and the
    gradient of token t. With one advantage for the sequence its gradient is GSPO's.
    Normaliser of the paper: sequence_mean.
    """
    log_ratio = inputs.policy_logprobs - inputs.old_logprobs
    log_sequence = inputs.sequences.mean(log_ratio)
    gradient = inputs.policy_logprobs - inputs.policy_logprobs.detach()  # 0, but for its gradient
    ratio = (log_sequence + gradient).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    value = -torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    with torch.no_grad():
        outside = (clipped * inputs.advantages < ratio * inputs.advantages).float()
        metrics = {
            "clip_fraction": outside,
            "approx_kl": log_ratio.exp() - 1 - log_ratio,
            "sequence_ratio": ratio.detach(),
        }
    return LossOutput(loss=value, metrics=metrics)
