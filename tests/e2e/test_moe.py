"""A mixture of experts, trained by expert-parallel ranks against the real server."""

from pathlib import Path

import pytest
from runs import drivetrain, metrics, weights

pytestmark = [
    pytest.mark.nightly,  # a whole training, about two minutes
    pytest.mark.timeout(900),
]


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


def test_the_trainer_repeats_the_experts_of_a_bf16_engine(tmp_path: Path) -> None:
    """The samples carry them, into the journal too; without them log-probs are further apart."""
    live, replayed, free = (tmp_path / name for name in ("live", "replayed", "free"))
    line = ["experiment=routing_replay", "num_steps=2", "eval.at_start=false", "eval.at_end=false"]
    drivetrain(*line, f"run_dir={live}", timeout_s=400)
    start = live / "warm_start" / "hf"
    for run_dir, replay in ((replayed, "rollout"), (free, "none")):
        drivetrain(
            *line,
            *("mode=train_only", f"replay_dir={live / 'rollouts'}", "warm_start.num_steps=0"),
            *(f"model.hf_path={start}", f"algorithm.routing_replay={replay}"),
            f"run_dir={run_dir}",
            timeout_s=200,
        )
    first = [metrics(run_dir)[0] for run_dir in (live, replayed, free)]
    gaps = [row["train/rollout_logprob_abs_diff_mean"] for row in first]
    assert gaps[0] == gaps[1]
    # On one batch by little: one token-layer in a hundred. Over runs: benchmarks/effects.py.
    assert gaps[2] > gaps[1]
    assert all(0 < row["train/other_experts_fraction"] < 0.2 for row in first)
