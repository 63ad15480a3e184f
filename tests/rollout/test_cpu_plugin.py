"""The CPU plugin's arithmetic, without a server: test_engine.py has it inside SGLang."""

import subprocess
import sys

import pytest
import torch

from rollout.server import cpu_attention, cpu_invariant
from rollout.server.cpu_attention import attend, decode_blocks, extend_blocks
from rollout.server.cpu_sampling import murmur_hash32


@pytest.fixture(autouse=True)
def invariant(monkeypatch):
    """As in the server, but without replacing this process's own matrix products."""
    monkeypatch.setattr(cpu_invariant, "enabled", lambda: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("depth", "columns"), [(64, 128), (192, 64), (64, 69), (100, 30), (64, 7), (64, 1)]
)
def test_a_row_of_a_product_does_not_depend_on_the_others(depth, columns, transposed, dtype):
    torch.manual_seed(0)
    weight = torch.randn(columns, depth).to(dtype).t()
    weight = weight if transposed else weight.contiguous()
    rows = torch.randn(300, depth).to(dtype)
    whole = cpu_invariant.invariant_mm(rows, weight)
    exact = rows.double() @ weight.double()
    assert (whole - exact).abs().max() < (1e-4 if dtype is torch.float32 else 0.3)
    for first, count in ((0, 1), (5, 2), (7, 3), (0, 17), (100, 64), (1, 255), (3, 257)):
        part = cpu_invariant.invariant_mm(rows[first : first + count], weight)
        assert torch.equal(part, whole[first : first + count])
    assert cpu_invariant.invariant_mm(rows[:0], weight).shape == (0, columns)


def test_addmm_follows_torch():
    torch.manual_seed(0)
    bias, rows, weight = torch.randn(7), torch.randn(5, 64), torch.randn(64, 7)
    expected = torch.addmm(bias, rows, weight, beta=0.5, alpha=2.0)
    ours = cpu_invariant._invariant_addmm(bias, rows, weight, beta=0.5, alpha=2.0)
    assert torch.allclose(ours, expected, atol=1e-5)


HEADS, KV_HEADS, SIZE, CONTEXT = 4, 2, 16, 300


def random_cache(num_sequences: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    slots = num_sequences * CONTEXT + 1
    k_cache, v_cache = torch.randn(slots, KV_HEADS, SIZE), torch.randn(slots, KV_HEADS, SIZE)
    k_cache[0] = v_cache[0] = float("nan")  # a slot that nobody owns
    order = torch.randperm(slots - 1) + 1
    return k_cache, v_cache, order.view(num_sequences, CONTEXT).to(torch.int32)


def decode(query, cache, sequences, lengths) -> torch.Tensor:
    output = torch.full_like(query, float("nan"))
    attend(query, output, *cache, decode_blocks(sequences, lengths), None)
    return output


def test_batched_attention_is_attention():
    num_sequences = 12
    k_cache, v_cache, table = cache = random_cache(num_sequences)
    lengths = torch.tensor([1, 2, 31, 32, 33, 63, 64, 65, 100, 250, 299, 300])
    query = torch.randn(num_sequences, HEADS, SIZE)
    output = decode(query, cache, torch.arange(num_sequences), lengths)
    for i, length in enumerate(lengths.tolist()):
        slots = table[i, :length].long()
        keys, values = (c[slots].permute(1, 0, 2)[None].double() for c in (k_cache, v_cache))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[i][None, :, None].double(), keys, values, enable_gqa=True
        )[0, :, 0]
        assert (output[i] - expected).abs().max() < 2e-6


def test_attention_has_the_same_bits_alone_in_a_batch_and_at_prefill(monkeypatch):
    num_sequences = 12
    cache = random_cache(num_sequences)
    lengths = torch.randint(2, CONTEXT, (num_sequences,))
    query = torch.randn(num_sequences, HEADS, SIZE)
    together = decode(query, cache, torch.arange(num_sequences), lengths)
    monkeypatch.setattr(cpu_attention, "_MAX_KEY_ELEMENTS", 1)  # one sequence at a time
    assert torch.equal(decode(query, cache, torch.arange(num_sequences), lengths), together)
    monkeypatch.undo()
    monkeypatch.setattr(cpu_invariant, "enabled", lambda: True)
    for i, length in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        assert torch.equal(
            decode(query[one], cache, torch.tensor([i]), lengths[one]), together[one]
        )
        # The same position as the last of a prompt, whole and in two chunks.
        prompt = torch.randn(length, HEADS, SIZE)
        prompt[-1] = query[i]
        whole = torch.empty_like(prompt)
        attend(prompt, whole, *cache, extend(i, 0, length), None)
        cut = length // 2
        chunks = torch.empty_like(prompt)
        attend(prompt[:cut], chunks[:cut], *cache, extend(i, 0, cut), None)
        attend(prompt[cut:], chunks[cut:], *cache, extend(i, cut, length - cut), None)
        assert torch.equal(whole[-1], together[i])
        assert torch.equal(chunks, whole)


def extend(sequence: int, prefix: int, length: int) -> cpu_attention.QueryBlocks:
    return extend_blocks(torch.tensor([sequence]), torch.tensor([prefix]), torch.tensor([length]))


def reference_murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32, seed 0, of whole words; as published."""
    h = 0
    for start in range(0, len(data), 4):
        k = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 & 0xFFFFFFFF
        k = (k << 15 | k >> 17) & 0xFFFFFFFF
        h ^= k * 0x1B873593 & 0xFFFFFFFF
        h = ((h << 13 | h >> 19) & 0xFFFFFFFF) * 5 + 0xE6546B64 & 0xFFFFFFFF
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def test_the_samplers_hash_is_murmur3():
    seeds = torch.tensor([0, 1, 2**32 + 5, 2**61 + 12345], dtype=torch.int64)
    positions = torch.tensor([0, 7, 1000, 2**31 - 1])
    hashed = murmur_hash32(seeds.to(torch.uint64), positions, torch.arange(5))
    for i, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        for column in range(5):
            words = (seed & 0xFFFFFFFF, seed >> 32, position, column)
            data = b"".join(word.to_bytes(4, "little") for word in words)
            assert hashed[i, column] == reference_murmur3(data)


STUBS = """
import importlib, sys
from rollout.server import stubs

sys.meta_path = [stubs._StubFinder({"triton", "no_such_package"}), *sys.meta_path]
import triton, triton.language as tl
from no_such_package.deep import Anything

class Mine(Anything): pass

@triton.autotune(configs=[], key=[])
@triton.jit
def kernel(x, n: tl.constexpr): raise AssertionError("a stub ran")

assert kernel.__name__ == "kernel" and isinstance(Mine(), Anything)
assert triton.cdiv(5, 2) == 3 and triton.next_power_of_2(5) == 8
for launch in (lambda: kernel[(1,)](0), lambda: kernel(0)):
    try:
        launch()
    except RuntimeError as error:
        assert "triton kernel kernel was launched" in str(error)
    else:
        raise SystemExit("a stub ran")
try:
    import another_package
except ImportError:
    print("fine")
"""


def test_stand_ins_import_but_never_run():
    command = [sys.executable, "-c", STUBS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "fine", result.stderr


DRAWS = """
import torch
from rollout.server import stubs
stubs.install()
from sglang.srt.layers import sampler
from rollout.server.cpu_sampling import draw_by_id, murmur_hash32
sampler.murmur_hash32 = murmur_hash32
torch.manual_seed(2)
probs = torch.randn(400, 50).softmax(-1)
seeds, positions = torch.arange(400) * 7919, torch.arange(400) % 5
free = sampler.sampling_from_probs_torch(probs, seeds, positions)

def drawn(top_ks, top_p):
    cuts = (torch.tensor(top_ks), torch.full((400,), top_p), torch.zeros(400))
    return draw_by_id(None, probs, *cuts, False, seeds, positions)

greedy = torch.arange(400) % 2 == 0
mixed = drawn([1 if each else 1 << 30 for each in greedy.tolist()], 1.0)
assert torch.equal(mixed[~greedy], free[~greedy])
assert torch.equal(mixed[greedy].long(), probs[greedy].argmax(-1))
few = drawn([3] * 400, 1.0)
assert (few[:, None] == probs.topk(3).indices).any(-1).all()
assert len(few.unique()) > 10
likely = drawn([1 << 30] * 400, 0.5)
above = (probs * (probs > probs.gather(1, likely[:, None].long()))).sum(-1)
assert (above <= 0.5).all()
assert not torch.equal(likely, free)
print("fine")
"""


def test_a_seed_draws_the_same_token_beside_a_greedy_request():
    """Its own cuts aside, a row's token is that of a batch in which nobody cuts anything."""
    command = [sys.executable, "-c", DRAWS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip().endswith("fine"), result.stderr
