"""A mixture of experts, trained by expert-parallel ranks against the real server."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import drivetrain, metrics, weights

from framework.megatron.parallel import stop_mesh
from rollout.journal import list_steps, read_step
from rollout.types import Sample
from tests.forked_ranks import run_ranks
from tests.framework.one_rank import OneRank

pytestmark = [
    pytest.mark.nightly,  # a whole training, about two minutes
    pytest.mark.timeout(900),
]
NUM_EXPERTS = 16
"""Of experiment=routing_replay."""


def test_a_moe_learns_by_grpo_under_expert_parallelism(tmp_path: Path) -> None:
    """Trainer and engine agree at every step, and what is served gets better."""
    run_dir = tmp_path / "moe"
    drivetrain("experiment=moe_sort", f"run_dir={run_dir}", timeout_s=800)
    rows = metrics(run_dir)
    gaps = [row["train/rollout_logprob_abs_diff_max"] for row in rows if "train/loss" in row]
    assert len(gaps) == 40
    assert max(gaps) < 1e-4
    measured = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    assert measured[-1] - measured[0] >= 0.05
    final, start = weights(run_dir), weights(run_dir / "warm_start")
    experts = [name for name in final if ".mlp.experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert all((final[name] != start[name]).any() for name in experts)


def watch_routers(policy: Any) -> tuple[dict[int, torch.Tensor], Any]:
    """What megatron-core's routers send tokens to, by layer, filled at each forward pass."""
    from megatron.core.transformer.moe.router import TopKRouter  # once our imports made it fit

    seen: dict[int, torch.Tensor] = {}

    def keep(router: Any, _: Any, output: Any) -> None:
        seen[router.layer_number] = output[1].clone()

    routers = [each for each in policy.chunks[0].modules() if isinstance(each, TopKRouter)]
    return seen, [each.register_forward_hook(keep) for each in routers]


def score(start: Path, samples: list[Sample], replay: str, found: Path) -> None:
    """Per sample: token-layers not computed by the engine's experts, and the log-prob gaps."""
    rank = OneRank(start, replay, dtype="bfloat16")
    seen, hooks = watch_routers(rank.policy)
    rows = []
    for sample in samples:
        batch = rank.pack(sample)
        rank.runner.logprobs([batch])
        assert sample.routes is not None
        assert batch.old_logprobs is not None
        routes = torch.from_numpy(sample.routes.astype("int64")).unflatten(1, (len(seen), -1))
        other = torch.stack(
            [
                (seen[layer][: len(routes)] != one_hot(routes[:, layer - 1])).any(-1)
                for layer in sorted(seen)
            ]
        )
        at = batch.loss_mask.nonzero()[:, 0]
        gaps = (batch.old_logprobs - batch.rollout_logprobs)[at].abs()
        rows.append((int(other.sum()), other.numel(), gaps, other.any(0)[at]))
    for hook in hooks:
        hook.remove()
    torch.save(rows, found)
    stop_mesh()


def one_hot(ids: torch.Tensor) -> torch.Tensor:
    """[N, k] ids of experts -> [N, E] bool."""
    return torch.zeros(len(ids), NUM_EXPERTS, dtype=torch.bool).scatter_(1, ids, True)


def test_the_trainer_repeats_the_experts_of_a_bf16_engine(tmp_path: Path) -> None:
    """On every token and layer, and left alone it would not; where they differ log-probs are far
    nearer to the engine's, elsewhere nothing changes. Four batches of the same weights."""
    live = tmp_path / "live"
    line = ["experiment=routing_replay", "num_steps=4", "optimizer.lr=1e-12"]
    line += ["rollout.prompts_per_step=64", "rollout.samples_per_prompt=2"]  # few tokens are alike
    drivetrain(*line, "eval.at_start=false", "eval.at_end=false", f"run_dir={live}", timeout_s=500)
    samples = [each for path in list_steps(live / "rollouts") for each in read_step(path)[1]]
    assert len(samples) == 4 * 128
    outcome = {}
    for replay in ("none", "rollout"):
        found = tmp_path / replay
        work = functools.partial(score, live / "warm_start" / "hf", samples, replay, found)
        run_ranks("score", 1, lambda rank, work=work: work(), tmp_path, 200.0)
        rows = torch.load(found)
        gaps, other = (torch.cat([row[place] for row in rows]) for place in (2, 3))
        outcome[replay] = (sum(row[0] for row in rows), sum(row[1] for row in rows), gaps, other)
    wrong, token_layers, free, other = outcome["none"]
    none_wrong, _, replayed, _ = outcome["rollout"]
    print(f"{wrong} of {token_layers} token-layers, then {none_wrong}")
    print(f"gap {free.mean():.5f} -> {replayed.mean():.5f}")
    print(f"at {other.sum()} tokens {free[other].mean():.5f} -> {replayed[other].mean():.5f}")
    print(f"elsewhere {free[~other].mean():.5f} -> {replayed[~other].mean():.5f}")
    assert none_wrong == 0
    assert 0.001 < wrong / token_layers < 0.2
    assert replayed[other].mean() < free[other].mean() / 2
    assert abs(replayed[~other].mean() - free[~other].mean()) < 0.1 * free[~other].mean()
    assert replayed.mean() < free.mean()
    # The run saw the same, but for how its rows are packed, which bf16 rounds otherwise.
    told = [row["train/rollout_logprob_abs_diff_mean"] for row in metrics(live)[:4]]
    assert sum(told) / 4 == pytest.approx(replayed.mean().item(), rel=0.2)
    assert all(0 < row["train/other_experts_fraction"] < 0.2 for row in metrics(live)[:4])
    again = tmp_path / "again"
    replay = ["mode=train_only", f"replay_dir={live / 'rollouts'}", "warm_start.num_steps=0"]
    replay += [f"model.hf_path={live / 'warm_start' / 'hf'}", f"run_dir={again}"]
    drivetrain(*line, *replay, "eval.at_start=false", "eval.at_end=false", timeout_s=300)
    assert told == [row["train/rollout_logprob_abs_diff_mean"] for row in metrics(again)[:4]]
