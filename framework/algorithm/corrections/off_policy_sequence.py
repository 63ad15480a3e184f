"""OPSM: bad answers that the policy would hardly give any more teach nothing."""

from dataclasses import dataclass

from framework.algorithm.inputs import CorrectionOutput, LossInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of off_policy_sequence."""

    max_divergence: float = 0.1
    """Of a sequence, in nats a token; the paper does not print its own."""


def weights(inputs: LossInputs, config: Config) -> CorrectionOutput:
    """Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556): 0 where A < 0 and
    mean over the sequence of log(pi_rollout / pi) > max_divergence, else 1. pi_rollout is the
    engine's at sampling, so staleness, numerics and earlier updates on the batch all count.
    """
    log_ratio = inputs.rollout_logprobs - inputs.policy_logprobs.detach()
    divergence = inputs.sequences.mean(log_ratio)
    masked = ((inputs.advantages < 0) & (divergence > config.max_divergence)).float()
    return CorrectionOutput(weights=1 - masked, metrics={"correction_masked_fraction": masked})
