"""Losses: per token, unreduced, pure. Adding one is one function and one row of LOSSES.

The reduction is not theirs: `token_weights` gives every token its share of the global batch, so the
same batch has the same loss and gradient however it is split over ranks and micro-batches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """The tokens of one micro-batch; [T] float32 each, aligned to the token that is scored."""

    policy_logprobs: torch.Tensor
    """Carries the gradient."""
    old_logprobs: torch.Tensor
    """The policy's before this step's first update, computed by the trainer."""
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    """1 where the policy wrote the token; everything else is ignored by the caller."""
    entropy: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Knobs of the losses."""

    clip_low: float = 0.2
    clip_high: float = 0.2


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """What a loss returns."""

    loss: torch.Tensor
    """[T] per token, unreduced."""
    metrics: dict[str, torch.Tensor]
    """[T] each, detached; logged as means over the policy's tokens."""


def ppo_clip(inputs: LossInputs, config: LossConfig) -> LossOutput:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), with two bounds (DAPO's clip-higher,
    arXiv 2503.14476): L_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t),
    r_t = exp(policy_logprobs - old_logprobs). No entropy term, no KL term.
    """
    log_ratio = inputs.policy_logprobs - inputs.old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    with torch.no_grad():
        outside = (clipped * inputs.advantages < ratio * inputs.advantages).float()
        metrics = {"clip_fraction": outside, "approx_kl": ratio - 1 - log_ratio}
    return LossOutput(loss=loss, metrics=metrics)


def negative_log_likelihood(inputs: LossInputs, config: LossConfig) -> LossOutput:
    """Supervised fine-tuning: L_t = -log pi(token)."""
    return LossOutput(loss=-inputs.policy_logprobs, metrics={})


def token_weights(
    aggregation: str, *, num_loss_tokens: int, global_tokens: int, global_sequences: int
) -> float:
    """The weight of each policy token of one sequence, so that a plain sum over all ranks is the
    aggregate.

    Args:
        aggregation: token_mean: 1 / all tokens (DAPO); sequence_mean: the mean over sequences of
            each one's token mean (GRPO as published); sequence_sum: the mean over sequences of
            each one's token sum.
        num_loss_tokens: policy tokens of this sequence.
        global_tokens: policy tokens of the global batch (all data-parallel ranks, all
            micro-batches of the update).
        global_sequences: sequences of the global batch that have policy tokens.

    Raises:
        ValueError: an unknown aggregation.
    """
    if aggregation == "token_mean":
        return 1.0 / max(1, global_tokens)
    if aggregation == "sequence_mean":
        return 1.0 / (max(1, global_sequences) * max(1, num_loss_tokens))
    if aggregation == "sequence_sum":
        return 1.0 / max(1, global_sequences)
    raise ValueError(
        f"algorithm.aggregation={aggregation}: must be one of {', '.join(AGGREGATIONS)}"
    )


AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")

Loss = Callable[[LossInputs, LossConfig], LossOutput]

LOSSES: dict[str, Loss] = {
    "ppo_clip": ppo_clip,
    "negative_log_likelihood": negative_log_likelihood,
}
