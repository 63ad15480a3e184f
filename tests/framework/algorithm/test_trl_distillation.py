"""generalized_jsd against TRL's, value and gradient in the logits: to 1e-6.

See test_trl_agreement.py. Over the whole vocabulary against `GKDTrainer.generalized_jsd_loss`; over
a teacher's few likeliest tokens and all others as one against the functions of TRL's
`ServerDistillationTrainer`.
"""

import pytest
import torch

from framework.algorithm.inputs import LossInputs, Sequences, TeacherTop
from framework.algorithm.losses import LOSSES
from framework.megatron.logprobs import vocab_parallel_logprobs
from tests.framework.test_megatron_modules import SingleGroup

gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL is not installed")
server = pytest.importorskip(
    "trl.experimental.server_distillation.server_distillation_trainer",
    reason="TRL is not installed",
)
pytestmark = pytest.mark.nightly  # TRL imports for half a minute

BATCH, LENGTH, VOCABULARY = 3, 7, 23
SHARES = [0.0, 0.2, 0.5, 0.9, 1.0]


def logits_of(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher's and policy's [B, T, V], and which positions count, [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, LENGTH, VOCABULARY)
    teacher, policy = (2 * torch.randn(shape, generator=generator) for _ in "tp")
    return teacher, policy, torch.rand(shape[:2], generator=generator) < 0.7


def ours(teacher: torch.Tensor, policy: torch.Tensor, mask: torch.Tensor, k: int, share: float):
    """As the trainer adds it up: each counted token with the same weight."""
    top, ids = teacher.flatten(0, 1).log_softmax(-1).T.topk(k, dim=0)
    found = vocab_parallel_logprobs(policy.flatten(0, 1), ids[0], VOCABULARY, SingleGroup(), ids)
    zeros, flat = torch.zeros(BATCH * LENGTH), mask.flatten().float()
    inputs = LossInputs(
        policy_logprobs=found[0],
        old_logprobs=zeros,
        rollout_logprobs=zeros,
        advantages=zeros,
        loss_mask=flat,
        entropy=zeros,
        sequences=Sequences(ids=zeros.long(), count=1, mask=flat),
        teacher=TeacherTop(
            teacher_logprobs=top, policy_logprobs=found[2:-1], policy_rest=found[-1]
        ),
    )
    row = LOSSES["generalized_jsd"]
    value = row.function(inputs, row.config(teacher_share=share)).loss
    return (value * flat).sum() / flat.sum()


def theirs_of_few(teacher, policy, mask, k, share):
    """TRL's of the teacher's k likeliest tokens and the rest as one."""
    top, ids = teacher.double().log_softmax(-1).topk(k, dim=-1)
    mine = policy.double().log_softmax(-1).gather(-1, ids)
    there = torch.ones_like(top, dtype=torch.bool)
    (top, support), (mine, _) = (server._add_tail_bucket(x, there) for x in (top, mine))
    value = server._jsd_divergence(mine, top, share, support).sum(-1)
    return value[mask].mean()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
def test_value_and_gradient_are_trls(k: int, share: float, seed: int) -> None:
    teacher, policy, mask = logits_of(seed)
    found, wanted = (policy.clone().requires_grad_() for _ in "xx")
    value = ours(teacher, found, mask, k, share)
    if k == VOCABULARY:
        labels = torch.zeros_like(mask, dtype=torch.int64).masked_fill(~mask, -100)
        expected = gkd.GKDTrainer.generalized_jsd_loss(
            wanted.double(), teacher.double(), labels, beta=share
        )
    else:
        expected = theirs_of_few(teacher, wanted, mask, k, share)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert found.grad is not None
    assert wanted.grad is not None
    assert wanted.grad.abs().max() > 1e-4
    assert (found.grad - wanted.grad).abs().max() <= 1e-6
