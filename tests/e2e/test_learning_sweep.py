"""Every algorithm with an experiment `learn_*` reaches the threshold of its file on three seeds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from framework.checks import check_config
from framework.compose import compose_config, group_options

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "learning.py"
EXPERIMENTS = [name for name in group_options()["experiment"] if name.startswith("learn_")]
SEEDS = ["0", "1", "2"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_states_its_threshold(name: str) -> None:
    config = compose_config([f"experiment={name}"])
    assert check_config(config) == []
    assert config.name == name
    assert config.algorithm.name == name.removeprefix("learn_")
    assert config.eval.target_gain >= 0.1
    assert config.warm_start.num_steps


@pytest.mark.nightly  # over thirty trainings: half an hour
@pytest.mark.timeout(7200)
def test_every_algorithm_learns_on_three_seeds(tmp_path: Path) -> None:
    table = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--seeds", *SEEDS, "--json", str(table)],
        capture_output=True,
        text=True,
        timeout=7000,
    )
    print(done.stdout)
    rows = json.loads(table.read_text())
    assert len(rows) == len(EXPERIMENTS) * len(SEEDS)
    assert [row for row in rows if row["verdict"] != "learnt"] == []
    assert done.returncode == 0
