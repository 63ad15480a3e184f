"""Routing replay on a tiny Qwen3-MoE: what is replayed, what it changes, what is refused."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framework.config import TinyModelConfig as Tiny
from framework.megatron.figures import OTHER_EXPERTS
from framework.megatron.packing import zigzag_positions
from framework.megatron.parallel import Mesh, stop_mesh
from framework.megatron.routes import OWN, RouteLayout
from framework.metrics import step_means
from framework.tiny_model import create_tiny_model
from megatron_bridge.layout import Layout
from rollout.types import Sample
from tests.forked_ranks import run_ranks
from tests.framework.one_rank import OneRank
from tests.rollout.test_wire import make_sample

EXPERTS, TOP_K, LAYERS = 8, 3, 2
LAYOUT = RouteLayout(
    layers=(1, 2), num_layers=LAYERS, top_k=TOP_K, num_experts=EXPERTS, required=True
)


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "model"
    tiny = Tiny(num_experts=EXPERTS, experts_per_token=TOP_K, ffn_size=32, tied=False)
    create_tiny_model(tiny, path)
    return path


def routed_sample(seed: int, response: int = 9) -> Sample:
    """Random tokens, and experts that no router would agree on."""
    random = np.random.default_rng(seed)
    sample = make_sample(response, index=seed)
    sample.tokens = random.integers(3, 60, 4 + response).astype(np.int32)
    choices = [random.permutation(EXPERTS)[:TOP_K] for _ in range((3 + response) * LAYERS)]
    sample.routes = np.stack(choices).reshape(3 + response, LAYERS * TOP_K).astype(np.uint8)
    return sample


def in_a_rank(work: Any, moe_dir: Path, tmp_path: Path) -> None:
    run_ranks("routing replay", 1, lambda rank: work(moe_dir), tmp_path, 60.0)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_own_routes_replayed_give_the_same_bits_and_others_do_not(moe_dir, tmp_path):
    def work(moe_dir: Path) -> None:
        rank = OneRank(moe_dir, "old_policy")
        samples = [routed_sample(0), routed_sample(1, 5)]
        free = [rank.pack(each) for each in samples]
        rank.routing.replay = "none"
        figures, plain = rank.gradients(*free)
        assert figures["train/other_experts_fraction"] > 0.9  # of the planted ones
        rank.routing.replay = "old_policy"
        batches = [rank.pack(each) for each in samples]
        rank.runner.logprobs(batches)
        same, replayed = rank.gradients(*batches)
        assert same["train/other_experts_fraction"] == 0
        assert same["train/loss"] == figures["train/loss"]
        assert equal(plain, replayed)
        rank.routing.replay = "rollout"
        planted = [rank.pack(each) for each in samples]
        rank.runner.logprobs(planted)
        other, changed = rank.gradients(*planted)
        assert abs(other["train/loss"] - figures["train/loss"]) > 1e-4
        assert other["train/other_experts_fraction"] == figures["train/other_experts_fraction"]
        gate = "decoder.layers.0.mlp.router.weight"
        assert (changed[gate] != 0).any()  # gates are the trainer's own
        assert not torch.equal(changed[gate], plain[gate])
        stop_mesh()

    in_a_rank(work, moe_dir, tmp_path)


def test_a_step_tells_the_gap_at_tokens_of_other_experts(moe_dir, tmp_path):
    """Of the tokens that the policy wrote, those before which some router was overruled."""

    def work(moe_dir: Path) -> None:
        rank = OneRank(moe_dir, "old_policy")
        sample = routed_sample(0)
        sample.routes = None
        batch = rank.pack(sample)
        rank.runner.logprobs([batch])  # leaves the routers' own choice in it
        assert batch.routes is not None
        figures, _ = rank.gradients(batch)
        assert OTHER_EXPERTS not in figures  # none is another
        at = batch.loss_mask.nonzero()[[1, 4], 0]
        for layer, place in zip((1, 2), at, strict=True):
            batch.routes[layer][place] = (batch.routes[layer][place] + 1) % EXPERTS
        figures, _ = rank.gradients(batch)
        rank.routing.replay = "rollout"
        rank.runner.logprobs([batch])
        assert batch.old_logprobs is not None
        gaps = (batch.old_logprobs - batch.rollout_logprobs)[at].abs()
        assert figures[OTHER_EXPERTS] == pytest.approx(gaps.mean().item(), rel=1e-5)
        stop_mesh()

    in_a_rank(work, moe_dir, tmp_path)


def test_a_step_counts_the_tokens_of_its_updates_that_had_routes(moe_dir, tmp_path):
    def work(moe_dir: Path) -> None:
        rank = OneRank(moe_dir, "old_policy")
        own = [rank.pack(routed_sample(0))]
        rank.runner.logprobs(own)  # leaves the router's own choice in them
        rank.routing.replay = "rollout"
        planted = [rank.pack(routed_sample(1))]
        failed = make_sample(2, loss_mask=np.zeros(2, dtype=np.uint8))
        for batches in (own, planted):
            rank.runner.logprobs(batches)
        updates = [rank.gradients(*each)[0] for each in (own, [rank.pack(failed)], planted)]
        own_figure, none, other = (each.get("train/other_experts_fraction") for each in updates)
        assert (own_figure, none) == (0.0, None)  # the passes before it do not count
        assert other is not None
        assert other > 0.9
        for order in (updates, updates[1:] + updates[:1]):  # the first of a step may know none
            figures = step_means(order)
            assert figures["train/other_experts_fraction"] == other / 2
            assert figures["train/tokens"] == 18
        stop_mesh()

    in_a_rank(work, moe_dir, tmp_path)


def test_layers_that_are_computed_again_meet_their_own_micro_batch(moe_dir, tmp_path):
    def work(recompute: str, moe_dir: Path) -> None:
        samples = [routed_sample(seed, 3 + seed) for seed in range(3)]
        rank = OneRank(moe_dir, "rollout", recompute)
        _, found = rank.gradients(*(rank.pack(each) for each in samples))
        torch.save(found, tmp_path / recompute)
        stop_mesh()

    for recompute in ("none", "full"):
        in_a_rank(functools.partial(work, recompute), moe_dir, tmp_path)
    assert equal(*(torch.load(tmp_path / recompute) for recompute in ("none", "full")))


def test_the_reference_chooses_its_own_experts(moe_dir, tmp_path):
    def work(moe_dir: Path) -> None:
        rank = OneRank(moe_dir, "rollout")
        batches = [rank.pack(routed_sample(0))]
        rank.runner.logprobs(batches)
        rank.runner.logprobs(batches, of_reference=True)
        (batch,) = batches
        assert batch.old_logprobs is not None
        assert batch.ref_logprobs is not None
        assert (batch.old_logprobs - batch.ref_logprobs).abs().max() > 1e-4
        stop_mesh()

    in_a_rank(work, moe_dir, tmp_path)


@pytest.mark.parametrize(
    ("routes", "says"),
    [
        (None, "sample 7/2 has no routes"),
        (np.zeros((6, 4), np.uint8), "routes of 4 ids a token; 2 layers of 3 experts"),
        (np.zeros((6, 6), np.uint8), r"an expert twice: \[0, 0, 0\] of 8 for token 0 in layer 0"),
        (np.tile([0, 1, 2, 3, 4, 9], (6, 1)), r"is not there: \[3, 4, 9\] of 8 .* layer 1"),
    ],
)
def test_routes_that_are_missing_or_of_another_model_are_refused(routes, says):
    with pytest.raises(ValueError, match=says):
        LAYOUT.of_sample(make_sample(routes=routes))


def test_a_failed_sample_needs_no_routes():
    failed = make_sample(loss_mask=np.zeros(3, dtype=np.uint8))
    assert LAYOUT.of_sample(failed) is None


def test_routes_lie_where_their_tokens_do():
    """Under context and sequence parallelism; the last token and padding have none."""
    samples = [routed_sample(0, 5), routed_sample(1, 2)]  # of 9 and 6 tokens
    cu_seqlens = [0, 12, 20, 24]  # padded to chunks of zig-zag; the rest is filler
    layout = Layout(tp=2, cp=2)
    for rank in range(4):
        coords = layout.coords(rank)
        mesh = Mesh(layout=layout, coords=coords, rank=rank, device=torch.device("cpu"))
        positions = zigzag_positions(cu_seqlens, 2, coords.cp)
        mine = torch.tensor(positions)
        packed = LAYOUT.pack(samples, cu_seqlens, mine, mesh, sequence_parallel=True)
        assert packed is not None
        own = [OWN] * TOP_K
        seen = positions[coords.tp * 6 : (coords.tp + 1) * 6]
        for at, position in enumerate(seen):
            which = sum(position >= start for start in cu_seqlens[1:])
            place = position - cu_seqlens[which]
            routes = samples[which].routes if which < 2 else None
            known = routes is not None and place < len(routes)
            for layer in (1, 2):
                row = packed[layer][at].tolist()
                columns = slice((layer - 1) * TOP_K, layer * TOP_K)
                wanted = routes[place, columns].tolist() if routes is not None and known else own
                assert row == wanted
