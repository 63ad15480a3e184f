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
