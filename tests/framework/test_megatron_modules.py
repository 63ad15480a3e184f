"""What we put into megatron-core, each against an independent computation, in one process."""

import itertools
import types

import numpy as np
import pytest
import torch

from framework.config import ModelConfig
from framework.megatron.logprobs import vocab_parallel_logprobs
from framework.megatron.microbatch import pack_microbatch
from framework.megatron.model import token_grain
from framework.megatron.packing import padded_buckets, zigzag_positions
from framework.megatron.parallel import Mesh
from framework.megatron.torch_spec import TorchAttention
from megatron_bridge.layout import Coords, Layout
from rollout.types import Sample


class SingleGroup:
    """A process group of one."""

    def size(self):
        return 1

    def rank(self):
        return 0


def naive_attention(query, key, value, cu_seqlens):
    """[t, h, d] in float64, one sequence at a time, masks written out."""
    repeat = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        scores = q @ k.transpose(1, 2) / query.size(2) ** 0.5
        hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs).flatten(1)


@pytest.mark.parametrize("cu_seqlens", [(0, 1), (0, 5, 5, 6, 19, 40, 41), (0, 64, 130)])
def test_packed_attention_equals_naive_forward_and_backward(cu_seqlens):
    attention = TorchAttention.__new__(TorchAttention)
    torch.nn.Module.__init__(attention)
    attention.cp_group, attention.softmax_scale, attention.dropout = SingleGroup(), None, 0.0
    generator = torch.Generator().manual_seed(0)
    total = cu_seqlens[-1]
    wide = [
        torch.randn(total, heads, 16, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    ]
    expected_inputs = [x.clone().requires_grad_() for x in wide]
    expected = naive_attention(*expected_inputs, cu_seqlens)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(upstream)
    inputs = [x.float().requires_grad_() for x in wide]
    starts = torch.tensor(cu_seqlens, dtype=torch.int32)
    params = types.SimpleNamespace(cu_seqlens_q_padded=None, cu_seqlens_q=starts)
    found = attention(*inputs, None, packed_seq_params=params)
    found.backward(upstream.float())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    for x, y in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=0, atol=5e-6)


def test_packed_rope_equals_upstreams_loop_bit_for_bit():
    import importlib

    from megatron.core.models.common.embeddings import rope_utils

    ours = rope_utils._apply_rotary_pos_emb_thd
    spec = importlib.util.find_spec(rope_utils.__name__)
    upstream = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(upstream)
    assert upstream._apply_rotary_pos_emb_thd is not ours
    starts = torch.tensor([0, 3, 10, 11], dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(11, 4, 16, generator=generator)
    freqs = torch.randn(32, 1, 1, 16, generator=generator)
    group = SingleGroup()
    expected = upstream._apply_rotary_pos_emb_thd(x, starts, freqs, cp_group=group)
    assert torch.equal(ours(x, starts, freqs, cp_group=group), expected)


@pytest.mark.parametrize("vocab_size", [30, 32])
def test_logprobs_and_entropy_ignore_the_padded_vocabulary(vocab_size):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 32, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab_size, (7,), generator=generator)
    logprobs, entropy = vocab_parallel_logprobs(logits, labels, vocab_size, SingleGroup())
    full = logits.detach()[:, :vocab_size].double().requires_grad_()
    expected = full.log_softmax(-1)
    expected_entropy = -(expected.exp() * expected).sum(-1)
    chosen = expected.gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), chosen, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-6)
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    (chosen.sum() + 0.3 * expected_entropy.sum()).backward()
    torch.testing.assert_close(logits.grad[:, :vocab_size].double(), full.grad, rtol=0, atol=1e-6)
    assert not logits.grad[:, vocab_size:].any()


def sample(prompt, response, mask, **fields):
    return Sample(
        group_id=0,
        index=0,
        tokens=np.array([*prompt, *response], dtype=np.int32),
        prompt_length=len(prompt),
        loss_mask=np.array(mask, dtype=np.uint8),
        rollout_logprobs=-np.arange(1, len(response) + 1, dtype=np.float32),
        versions=np.zeros(len(response), dtype=np.int32),
        turn_starts=np.zeros(1, dtype=np.int32),
        reward=1.0,
        **fields,
    )


def mesh(**sizes):
    return Mesh(layout=Layout(**sizes), coords=Coords(), rank=0, device=torch.device("cpu"))


def test_a_response_token_is_scored_at_the_position_before_it():
    samples = {4: sample([5, 6], [7, 8, 9], [1, 0, 1]), 9: sample([1], [2], [1])}
    batch = pack_microbatch(
        [4, 9],
        samples,
        {4: torch.tensor(0.5).expand(3), 9: torch.tensor(-1.0).expand(1)},
        {4: 0.25, 9: 0.5},
        mesh(),
        sequence_parallel=False,
    )
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 1, 2]
    assert batch.labels.tolist() == [6, 7, 8, 9, 0, 2, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.loss_mask.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert batch.weights.tolist() == [0, 0.25, 0, 0.25, 0, 0.5, 0]
    assert batch.advantages.tolist() == [0, 0.5, 0, 0.5, 0, -1, 0]
    # The environment's token (mask 0) brings no log-prob of an engine.
    assert batch.rollout_logprobs.tolist() == [0, -1, 0, -3, 0, -1, 0]
    assert batch.packed_seq_params.cu_seqlens_q.tolist() == [0, 5, 7]


def test_an_empty_microbatch_is_padding_that_weighs_nothing():
    batch = pack_microbatch([], {}, {}, {}, mesh(tp=2), sequence_parallel=True)
    assert len(batch.tokens) == 2
    assert not batch.loss_mask.any()
    assert not batch.weights.any()


@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"cp": 2}, {"tp": 2, "cp": 2}], ids=str)
def test_fp8_gets_whole_grains_of_tokens_on_every_rank(sizes):
    grain = token_grain(ModelConfig(fp8="hybrid", fp8_recipe="tensorwise"))
    assert grain == 16
    assert token_grain(ModelConfig(fp8="hybrid", fp8_recipe="mxfp8")) == 32
    assert token_grain(ModelConfig()) == 1
    samples = {0: sample([5, 6], [7, 8, 9], [1, 0, 1])}
    layout = Layout(**sizes)
    for indices, tokens_that_count in (([0], 2), ([], 0)):
        counted = 0.0
        for cp in range(layout.cp):
            place = Mesh(layout, Coords(cp=cp), rank=0, device=torch.device("cpu"))
            batch = pack_microbatch(
                indices,
                samples,
                {0: torch.ones(3)},
                {0: 1.0},
                place,
                sequence_parallel=layout.tp > 1,
                token_grain=grain,
            )
            # `tokens` are a context-parallel rank's; sequence parallelism cuts them by tp.
            assert len(batch.tokens) == grain * layout.tp
            counted += batch.loss_mask.sum().item()
        assert counted == tokens_that_count


def test_context_parallel_ranks_hold_every_position_once():
    starts = [0, 8, 24]
    held = [zigzag_positions(starts, 2, rank) for rank in range(2)]
    assert sorted(held[0] + held[1]) == list(range(24))
    assert held[0][:4] == [0, 1, 6, 7]
    with pytest.raises(ValueError, match=r"6 tokens must be padded .* 2 \* parallel.cp = 4"):
        zigzag_positions([0, 6], 2, 0)


def test_buckets_hold_every_sequence_once_and_waste_little():
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 3000, 200)
    starts = [0, *np.cumsum(lengths).tolist()]
    buckets = padded_buckets(starts)
    held = sorted(i for _, members in buckets for i in members)
    assert held == [i for i, length in enumerate(lengths) if length]
    for length, members in buckets:
        for i in members:
            assert lengths[i] <= length <= max(lengths[i] + 8, lengths[i] * 1.15)


def test_the_patched_process_still_builds_transformers_models_right(tiny_model_dir, tmp_path):
    """Where megatron-core is prepared for the CPU, `with torch.device(...)` works as ever."""
    import subprocess
    import sys

    script = (
        "import sys, torch\n"
        "if sys.argv[2] == 'patched':\n    import framework.megatron\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(model(torch.arange(3, 40)[None]).logits.double().sum().item())\n"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", script, str(tiny_model_dir), how],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout.splitlines()[-1]
        for how in ("patched", "plain")
    ]
    assert found[0] == found[1]
