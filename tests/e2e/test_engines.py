"""Several engines, with and without sglang-router, and an engine of two ranks: the same run.

nightly: each test starts servers of its own (two to four minutes on two cores).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import COMMON, drivetrain, largest_difference, metrics, weights

pytestmark = [
    pytest.mark.nightly,  # two engines or two engine ranks each: minutes
    pytest.mark.timeout(900),
]
TWO = "rollout.engine.num_engines=2"
ROUTER = "rollout.engine.router=true"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with one engine of one rank."""
    run_dir = tmp_path_factory.mktemp("engines") / "alone"
    drivetrain(*COMMON, "warm_start.num_steps=40", f"run_dir={run_dir}")
    return run_dir


@pytest.mark.parametrize(
    "overrides",
    [[TWO], [TWO, ROUTER], ["rollout.engine.tp=2"]],
    ids=["two", "router", "tp2"],
)
def test_the_run_does_not_depend_on_its_engines(
    alone: Path, tmp_path: Path, overrides: list[str]
) -> None:
    """The gate passes, every push is verified on every engine, all got work, weights are equal.

    An engine of two ranks adds its partial sums in another order: a sample may come out otherwise.
    """
    run_dir, start = tmp_path / "run", alone / "warm_start" / "hf"
    overrides = [*overrides, "warm_start.num_steps=0", f"model.init_from={start}"]
    drivetrain(*COMMON, *overrides, f"run_dir={run_dir}")
    trained = [row for row in metrics(run_dir) if "train/loss" in row]
    assert len(trained) == 6
    assert max(row["train/rollout_logprob_abs_diff_max"] for row in trained) < 1e-4
    logs = sorted((run_dir / "logs").glob("engine_*.log"))
    assert all(log.read_text(errors="replace").count("POST /generate") > 5 for log in logs)
    if "rollout.engine.tp=2" not in overrides:
        assert len(logs) == 2
        assert largest_difference(weights(alone), weights(run_dir)) == 0.0


@pytest.mark.parametrize("victim", ["router", "engine_1"])
def test_a_lost_server_ends_the_run_with_its_name(tmp_path: Path, victim: str) -> None:
    run_dir = tmp_path / "run"
    command = [str(Path(sys.executable).with_name("drivetrain")), *COMMON, TWO, ROUTER]
    command += ["num_steps=1000", "cluster.max_restarts=0", f"run_dir={run_dir}"]
    quiet, pipe = subprocess.DEVNULL, subprocess.PIPE
    process = subprocess.Popen(command, stdout=quiet, stderr=pipe, text=True)
    try:
        deadline = time.monotonic() + 240
        rows: list = []
        while not any("train/loss" in row for row in rows) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.5)
            rows = metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        pid = json.loads((run_dir / "addresses" / f"{victim}.json").read_bytes())["pid"]
        (server,) = psutil.Process(pid).children()
        os.kill(server.pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert stderr.startswith(f"drivetrain: {victim} ended with exit code 1")
