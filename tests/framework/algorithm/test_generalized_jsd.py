"""Distillation from a teacher's likeliest tokens: by hand, and against the whole vocabulary."""

import math

import pytest
import torch

from framework.algorithm.inputs import LossInputs, Sequences, TeacherTop
from framework.algorithm.losses import LOSSES
from framework.megatron.logprobs import vocab_parallel_logprobs
from tests.framework.test_megatron_modules import SingleGroup

VOCABULARY = 11
SHARES = [0.0, 0.1, 0.5, 1.0]


def loss_of(teacher: torch.Tensor, policy: torch.Tensor, rest: torch.Tensor, share: float):
    """The row's output of log-probs [k, T] and a probability [T]."""
    zeros = torch.zeros(policy.shape[-1])
    inputs = LossInputs(
        policy_logprobs=zeros,
        old_logprobs=zeros,
        rollout_logprobs=zeros,
        advantages=zeros + 3,  # of no effect
        loss_mask=zeros + 1,
        entropy=zeros,
        sequences=Sequences(ids=zeros.long(), count=1, mask=zeros + 1),
        teacher=TeacherTop(teacher_logprobs=teacher, policy_logprobs=policy, policy_rest=rest),
    )
    return LOSSES["generalized_jsd"].bind({"teacher_share": share})(inputs)


def whole(teacher: torch.Tensor, policy: torch.Tensor, share: float) -> torch.Tensor:
    """GKD's eq. 1 by its definition, over all tokens: [T] of log-probs [V, T]."""
    p, q = teacher.exp(), policy.exp()
    if share in (0.0, 1.0):
        first, second = (p, q) if share == 0 else (q, p)
        return (first * (first / second).log()).sum(0)
    mixture = share * p + (1 - share) * q
    return share * (p * (p / mixture).log()).sum(0) + (1 - share) * (q * (q / mixture).log()).sum(0)


def test_by_hand():
    """The teacher: 1/2, 1/4 and 1/4 for all others; the policy: 1/4, 1/4, 1/2."""
    teacher = torch.tensor([[0.5], [0.25]]).log()
    logits = torch.tensor([0.25, 0.25, 0.5]).log().requires_grad_()
    policy = logits.log_softmax(-1)
    output = loss_of(teacher, policy[:2, None], policy[2:].exp(), 0.0)
    forward = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5)
    assert output.loss.tolist() == pytest.approx([forward])
    assert output.metrics["teacher_divergence"].tolist() == pytest.approx([forward])
    assert output.metrics["teacher_rest"].tolist() == pytest.approx([0.25])
    assert output.metrics["policy_rest"].tolist() == pytest.approx([0.5])
    (gradient,) = torch.autograd.grad(output.loss.sum(), logits)
    assert gradient.tolist() == pytest.approx([-0.25, 0.0, 0.25])  # softmax - teacher
    # Mixture 3/8, 1/4, 3/8, and each term once in either direction.
    output = loss_of(teacher, policy[:2, None], policy[2:].exp(), 0.5)
    jsd = 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375)
    assert output.loss.tolist() == pytest.approx([jsd])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("k", [3, VOCABULARY])
def test_all_tokens_are_the_whole_divergence_and_few_are_at_most_it(k: int, share: float):
    """Value and gradient, through the log-probs of vocabulary-parallel logits, in fp32."""
    generator = torch.Generator().manual_seed(k)
    teacher = (2 * torch.randn(VOCABULARY, 6, generator=generator)).log_softmax(0)
    logits = (2 * torch.randn(6, VOCABULARY + 5, generator=generator)).requires_grad_()
    top, ids = teacher.topk(k, dim=0)
    found = vocab_parallel_logprobs(logits, ids[0], VOCABULARY, SingleGroup(), ids)
    value = loss_of(top, found[2:-1], found[-1], share).loss
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    full = logits.detach()[:, :VOCABULARY].double().requires_grad_()
    wanted = whole(teacher.double(), full.log_softmax(-1).T, share)
    (expected,) = torch.autograd.grad(wanted.sum(), full)
    assert not gradient[:, VOCABULARY:].any()
    if k == VOCABULARY:
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient[:, :VOCABULARY].double(), expected, rtol=0, atol=1e-6)
    else:
        assert (value > 0).all()
        assert (value < wanted + 1e-6).all()
        assert (wanted - value).max() > 1e-3


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("gap", [20.0, 35.0, 50.0])
def test_a_policy_that_leaves_others_next_to_nothing_is_told_how_little(gap: float, share: float):
    """The teacher gives others .4 where the policy gives them 1e-8 to 1e-21: forward KL 6.753 at a
    gap of 20 and 18.75 at one of 50. Exact: the same in float64, with the logits of the others.
    """
    logits = torch.zeros(1, 8)
    logits[0, :2] = torch.tensor([gap, gap - 1])
    logits.requires_grad_()
    ids = torch.tensor([[0], [1]])
    found = vocab_parallel_logprobs(logits, ids[0], 8, SingleGroup(), ids)
    teacher = torch.tensor([[0.5], [0.1]]).log()
    value = loss_of(teacher, found[2:-1], found[-1], share).loss
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    full = logits.detach().double().requires_grad_()
    policy = full.log_softmax(-1)[0]
    grouped = torch.cat([policy[:2], policy[2:].logsumexp(0)[None]])[:, None]
    exact = whole(torch.tensor([[0.5], [0.1], [0.4]]).double().log(), grouped, share)
    (expected,) = torch.autograd.grad(exact.sum(), full)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-6)
    if (gap, share) == (20.0, 0.0):
        assert value.item() == pytest.approx(6.753, abs=1e-3)
        hand = [0.231, 0.169] + [-0.4 / 6] * 6  # softmax - teacher
        assert gradient[0].tolist() == pytest.approx(hand, abs=1e-3)


@pytest.mark.parametrize("share", SHARES)
def test_a_teacher_that_is_the_policy_asks_for_nothing(share: float):
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    ids = logits.detach().topk(3).indices.T
    found = vocab_parallel_logprobs(logits, ids[0], VOCABULARY, SingleGroup(), ids)
    output = loss_of(found[2:-1].detach(), found[2:-1], found[-1], share)
    (gradient,) = torch.autograd.grad(output.loss.sum(), logits)
    assert output.loss.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("share", SHARES)
def test_certain_teachers_and_policies_and_padding_stay_finite(share: float):
    """One with no probability left for others, and positions of nobody: all zeros."""
    logits = torch.tensor([[60.0, 0.0, -60.0], [-60.0, 0.0, 60.0], [0.0, 0.0, 0.0]])
    logits.requires_grad_()
    ids = torch.tensor([[0, 0, 0], [1, 1, 0]])
    teacher = torch.tensor([[0.0, 0.0, 0.0], [-50.0, -50.0, 0.0]])
    found = vocab_parallel_logprobs(logits, ids[0], 3, SingleGroup(), ids)
    output = loss_of(teacher, found[2:-1], found[-1], share)
    (gradient,) = torch.autograd.grad(output.loss.sum(), logits)
    assert output.loss.isfinite().all()
    assert gradient.isfinite().all()
    if share in (0.0, 1.0):
        assert output.loss[1] > 10
    else:  # as far apart as can be: the entropy of whose token it is
        bound = -share * math.log(share) - (1 - share) * math.log(1 - share)
        assert output.loss[1].item() == pytest.approx(bound, abs=1e-4)
