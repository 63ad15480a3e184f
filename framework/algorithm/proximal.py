"""Which policy the ratio of a loss is taken against. Pure.

proximal(inputs: LossInputs) -> [T] detached, in place of inputs.old_logprobs
"""

from collections.abc import Callable

import torch

from framework.algorithm.inputs import LossInputs


def trainer(inputs: LossInputs) -> torch.Tensor:
    """The policy before the step's first update, recomputed by the trainer (one forward pass where
    a batch makes several updates)."""
    return inputs.old_logprobs


def engine(inputs: LossInputs) -> torch.Tensor:
    """The policy that sampled, by the engine's own numbers: no pass, and no correction to make."""
    return inputs.rollout_logprobs


def log_linear(inputs: LossInputs) -> torch.Tensor:
    """Between the policy that sampled and the policy now, in proportion to their versions (AReaL,
    arXiv 2505.24298, without its forward pass): log pi_prox = log pi_rollout + a (log pi - log
    pi_rollout), a = (v_prox - v_rollout) / (v - v_rollout) with v_prox = v - 1. A token that the
    policy's own version or the one before sampled has a = 0: its proximal policy is the engine's.
    """
    assert inputs.staleness is not None
    share = (1 - 1 / inputs.staleness.clamp(min=1)).to(inputs.rollout_logprobs.dtype)
    moved = inputs.policy_logprobs.detach() - inputs.rollout_logprobs
    return inputs.rollout_logprobs + share * moved


PROXIMALS: dict[str, Callable[[LossInputs], torch.Tensor]] = {
    "trainer": trainer,
    "engine": engine,
    "log_linear": log_linear,
}
