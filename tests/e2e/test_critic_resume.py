"""A run with a critic that stops and goes on: same layout to the bit,
another layout within rounding."""

from pathlib import Path

import pytest

from tests.e2e.journals import write_journal
from tests.e2e.runs import drivetrain, largest_difference, metrics, weights
from tests.e2e.test_relayout import REPLAY, TOLERANCE

PPO = [
    *REPLAY,
    "algorithm=ppo",
    "critic.policy_starts_at_step=3",
    "critic.scale_rewards=true",
    "critic.normalize_values=true",
    *("algorithm.kl_reward_coef=0.1", "algorithm.kl_reward_target=0.001"),
    "algorithm.kl_reward_horizon=50",
    "checkpoint.every_steps=2",
    "num_steps=6",
]


@pytest.mark.nightly  # four runs of trainers
@pytest.mark.timeout(900)
@pytest.mark.parametrize("after", [[], ["parallel.tp=2", "parallel.distributed_optimizer=true"]])
def test_a_critic_is_in_the_checkpoint(tmp_path: Path, after: list[str]) -> None:
    journal = tmp_path / "rollouts"
    write_journal(journal, num_steps=6)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    drivetrain(*PPO, f"run_dir={whole}", f"replay_dir={journal}")
    common = [*PPO, f"run_dir={parts}", f"replay_dir={journal}"]
    drivetrain(*common, "num_steps=4")
    drivetrain(*common, *after, "checkpoint.resume=auto")
    rows = zip(metrics(parts), metrics(whole), strict=True)
    tolerance = TOLERANCE if after else 0.0
    for found, wanted in rows:
        for name in ("value_loss", "kl_reward_coef", "reward_scale", "return_scale"):
            key = f"train/{name}"
            assert found[key] == pytest.approx(wanted[key], abs=tolerance)
    assert largest_difference(weights(parts), weights(whole)) <= tolerance
    first, last = metrics(whole)[0], metrics(whole)[-1]
    for name in ("train/kl_reward_coef", "train/reward_scale", "train/return_scale"):
        assert first[name] != last[name]
    assert first["train/lr"] == 0 < last["train/lr"]
