"""Divergence of the policy from the reference, per token, as a term of the loss. Pure.

l = log pi - log pi_ref of the token that was sampled. "In the loss" means that the gradient flows
through the estimate itself; k1 is missing because its gradient is the score, which averages to
zero (arXiv 2510.01555 compares them).
"""

from collections.abc import Callable

import torch

from framework.algorithm.inputs import LossInputs


def k2(inputs: LossInputs) -> torch.Tensor:
    """l^2 / 2 (Schulman 2020, "Approximating KL divergence"); on the policy's own samples its
    gradient is that of the KL divergence.
    """
    return 0.5 * _log_ratio(inputs) ** 2


def k3(inputs: LossInputs) -> torch.Tensor:
    """exp(-l) - 1 + l (the same; GRPO, arXiv 2402.03300): an unbiased value that is never negative,
    with a biased gradient.
    """
    log_ratio = _log_ratio(inputs)
    return torch.expm1(-log_ratio) + log_ratio


def straight_through(inputs: LossInputs) -> torch.Tensor:
    """The value of k3, the gradient of k2."""
    square = k2(inputs)
    return square - square.detach() + k3(inputs).detach()


def unbiased(inputs: LossInputs) -> torch.Tensor:
    """pi / pi_old times k3 (DeepSeek-V3.2, arXiv 2512.02556): value and gradient are right on the
    old policy's samples too.
    """
    return (inputs.policy_logprobs - inputs.old_logprobs).exp() * k3(inputs)


KL_ESTIMATORS: dict[str, Callable[[LossInputs], torch.Tensor]] = {
    "k2": k2,
    "k3": k3,
    "straight_through": straight_through,
    "unbiased": unbiased,
}


def _log_ratio(inputs: LossInputs) -> torch.Tensor:
    assert inputs.ref_logprobs is not None
    return inputs.policy_logprobs - inputs.ref_logprobs
