"""Every layout trains as one rank does: loss and weights after three steps, through the command.

The rows that CI runs take half a minute of two cores; the others together take several minutes,
which is why they wait for the night.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from layouts import CASES, LOSS_TOLERANCE, PLANTED, WEIGHT_TOLERANCE

COMMAND = Path(__file__).parents[2] / "scripts" / "benchmarks" / "parity.py"


def run(directory: Path, timeout_s: float, *arguments: str) -> dict[str, dict[str, Any]]:
    """The rows that the command writes, by name."""
    out = directory / "rows.json"
    done = subprocess.run(
        [sys.executable, str(COMMAND), *arguments, "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert out.exists(), f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    assert done.returncode == (0 if all(row["right"] for row in rows.values()) else 1)
    return rows


@pytest.fixture(scope="module")
def ci_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The rows for every change."""
    return run(tmp_path_factory.mktemp("parity"), 280, "--ci")


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The whole table."""
    return run(tmp_path_factory.mktemp("parity"), 1700)


def check(row: dict[str, Any]) -> None:
    """Within the bounds, in a run that moved the weights by far more than them."""
    assert row["moved_abs"] > 100 * WEIGHT_TOLERANCE
    assert row["loss_rel"] <= LOSS_TOLERANCE
    assert row["weight_abs"] <= WEIGHT_TOLERANCE, row["weight_worst"]


@pytest.mark.parametrize("name", [case.name for case in CASES if case.ci])
def test_layout_trains_as_one_rank(ci_rows, name):
    check(ci_rows[name])


def check_mtp(row: dict[str, Any], *, rounds: bool) -> None:
    """Heads for later tokens learn the same in every layout, and the policy nothing of them: bit
    for bit, but where gradients are added up in other buckets (`rounds`)."""
    check(row)
    assert row["plain_abs"] <= (1e-6 if rounds else 0)
    assert row["moved_mtp"] > 100 * WEIGHT_TOLERANCE
    assert row["mtp_loss_abs"] <= 1e-5
    assert row["mtp_accuracy_abs"] == 0


@pytest.mark.nightly  # with the other layouts of the night
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.model.endswith("_mtp")], ids=lambda case: case.name
)
def test_multi_token_prediction_learns_beside_the_policy(all_rows, case):
    check_mtp(all_rows[case.name], rounds="distributed_optimizer" in case.parallel)


def test_a_planted_mistake_is_beyond_the_bounds(ci_rows):
    """Norms whose gradients stay partial: what this table is there to see."""
    assert ci_rows[PLANTED.name]["weight_abs"] > 10 * WEIGHT_TOLERANCE


@pytest.mark.nightly  # over a hundred rows, each in processes of its own
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [case.name for case in CASES if not case.ci])
def test_layout_trains_as_one_rank_at_night(all_rows, name):
    check(all_rows[name])


def test_the_table_is_as_wide_as_promised():
    """Each dimension alone and combined, for dense, mixture-of-experts and tied models."""
    assert len({case.name for case in CASES}) == len(CASES) >= 24
    used = [set(case.parallel) for case in CASES]
    for key in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "sequence_parallel", "overlap"):
        assert sum(key in each for each in used) >= 2
    assert max(case.world_size for case in CASES) == 8
    assert {case.model for case in CASES} >= {"qwen3", "qwen3_tied", "llama", "moe", "moe_mixed"}
