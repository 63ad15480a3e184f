"""Supervised fine-tuning."""

from dataclasses import dataclass

from framework.algorithm.inputs import LossInputs, LossOutput


@dataclass(frozen=True, kw_only=True)
class Config:
    """negative_log_likelihood has no knobs."""


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """L_t = -log pi(token), whatever the advantage."""
    return LossOutput(loss=-inputs.policy_logprobs, metrics={})
