"""A teacher's likeliest tokens on their way through megatron-core: packed, and among the logits."""

import numpy as np
import pytest
import torch

from framework.megatron.logprobs import vocab_parallel_logprobs
from framework.megatron.microbatch import pack_microbatch
from framework.megatron.step import check_teacher_ids
from tests.framework.test_megatron_modules import SingleGroup, mesh, sample


def test_the_teachers_tokens_ignore_the_padded_vocabulary_too():
    """Their log-probs, and the probability of all others, with the gradient of both."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 32, generator=generator).requires_grad_()
    ids = torch.stack([torch.randperm(30, generator=generator)[:4] for _ in range(5)], dim=1)
    found = vocab_parallel_logprobs(logits, ids[0], 30, SingleGroup(), ids)
    assert found.shape == (2 + 4 + 1, 5)
    full = logits.detach()[:, :30].double().requires_grad_()
    expected = full.log_softmax(-1).gather(-1, ids.T).T
    others = torch.ones_like(full).scatter(-1, ids.T, 0.0)
    rest = (full.softmax(-1) * others).sum(-1)
    torch.testing.assert_close(found[2:-1].double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=0)
    torch.testing.assert_close(found[-1].double(), rest, rtol=0, atol=1e-6)
    (found[2:-1].sum() + 0.3 * found[-1].sum()).backward()
    (expected.sum() + 0.3 * rest.sum()).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:, :30].double(), full.grad, rtol=0, atol=1e-6)
    assert not logits.grad[:, 30:].any()


def test_a_teachers_tokens_stand_where_the_token_is_scored():
    top = {
        "teacher_top_ids": np.array([[3, 4], [5, 6], [7, 8]], dtype=np.int32),
        "teacher_top_logprobs": -np.arange(1, 7, dtype=np.float32).reshape(3, 2),
    }
    samples = {0: sample([5, 6], [7, 8, 9], [1, 0, 1], **top)}
    given = ({0: torch.zeros(3)}, {0: 0.5}, mesh(tp=2))
    batch = pack_microbatch([0], samples, *given, sequence_parallel=True, teacher_top_k=2)
    assert batch.teacher_ids is not None
    assert batch.teacher_logprobs is not None
    assert batch.teacher_ids.tolist() == [[0, 3, 5, 7, 0, 0], [0, 4, 6, 8, 0, 0]]
    assert batch.teacher_logprobs.tolist() == [[0, -1, -3, -5, 0, 0], [0, -2, -4, -6, 0, 0]]
    check_teacher_ids([batch], 9)
    with pytest.raises(ValueError, match="names token 8; the policy has 8: another vocabulary"):
        check_teacher_ids([batch], 8)
    with pytest.raises(ValueError, match=r"sample 0/0 carries 2 .*rollout.teacher_top_k=3"):
        pack_microbatch([0], samples, *given, sequence_parallel=True, teacher_top_k=3)
