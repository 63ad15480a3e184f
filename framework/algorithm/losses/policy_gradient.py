"""The plain policy gradient."""

from dataclasses import dataclass

from framework.algorithm.inputs import LossInputs, LossOutput


@dataclass(frozen=True, kw_only=True)
class Config:
    """policy_gradient has no knobs."""


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """REINFORCE (Williams 1992): L_t = -A_t log pi(token). No ratio: for one update a batch, or
    with a correction where the batch is stale.
    """
    return LossOutput(loss=-inputs.advantages * inputs.policy_logprobs, metrics={})
