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
        assert found["train/value_loss"] == pytest.approx(wanted["train/value_loss"], abs=tolerance)
    assert largest_difference(weights(parts), weights(whole)) <= tolerance
    first, last = metrics(whole)[0], metrics(whole)[-1]
    assert first["train/lr"] == 0 < last["train/lr"]
