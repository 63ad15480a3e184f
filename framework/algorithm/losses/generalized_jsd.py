"""Generalised Jensen-Shannon divergence between a teacher and the policy."""

from dataclasses import dataclass

import torch

from framework.algorithm.inputs import LossInputs, LossOutput

REST_MIN = 1e-6
"""Least probability of the teacher's other tokens: what rounding leaves of 1 less the sum of fp32
probabilities. Where the teacher has no more than that, it is the policy's least too: both nothing.
"""
POLICY_REST_MIN = 1e-30
"""Least probability of the policy's other tokens elsewhere: summed from them, it is exact."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of generalized_jsd."""

    teacher_share: float = 0.5
    """The paper's beta, the teacher's share in the mixture; 0: the forward KL divergence,
    KL(teacher || policy); 1: the reverse one, KL(policy || teacher)."""


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """GKD (arXiv 2306.13649, eq. 1): with teacher P, policy Q and M = beta P + (1 - beta) Q

        L_t = beta KL(P || M) + (1 - beta) KL(Q || M)

    at every position that the policy wrote, both at temperature 1; nothing flows through the
    sampling, and advantages are not used. As beta goes to 0 (to 1), L / beta (L / (1 - beta)) goes
    to the forward (reverse) divergence: those stand for 0 and 1, as in TRL.

    Deviation: P and Q are those of the teacher's k likeliest tokens and of all others as one. That
    is never more than the divergence of the whole distributions, and equals it where k is the
    vocabulary. Normaliser: token_mean.
    """
    top, beta = inputs.teacher, config.teacher_share
    assert top is not None
    rest = 1 - top.teacher_logprobs.double().exp().sum(0)
    least = torch.where(rest > REST_MIN, POLICY_REST_MIN, REST_MIN).to(top.policy_rest.dtype)
    teacher = _with_rest(top.teacher_logprobs, rest.float().clamp(min=REST_MIN))
    policy = _with_rest(top.policy_logprobs, torch.maximum(top.policy_rest, least))
    if beta == 0:
        value = _kl(teacher, policy)
    elif beta == 1:
        value = _kl(policy, teacher)
    else:
        shares = teacher.new_tensor([beta, 1 - beta]).log()
        mixture = torch.logaddexp(teacher + shares[0], policy + shares[1])
        value = beta * _kl(teacher, mixture) + (1 - beta) * _kl(policy, mixture)
    with torch.no_grad():
        metrics = {
            "teacher_divergence": value.detach(),
            "teacher_rest": teacher[-1].exp(),
            "policy_rest": policy[-1].exp(),
        }
    return LossOutput(loss=value, metrics=metrics)


def _with_rest(logprobs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """[k + 1, T]: a distribution, all other tokens last."""
    return torch.cat([logprobs, rest.log()[None]])


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[T]: KL(p || q) in nats, of log-probs [k + 1, T]."""
    return (p.exp() * (p - q)).sum(0)
