"""One process a role: a run directory whose roles are alive is neither run again nor rewound."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.compose import ConfigError
from framework.launch.lock import hold_run_dir
from rollout import lock
from rollout.lock import InUseError
from rollout.run_dir import RunDir

HOLDER = """
import sys, time
from rollout.run_dir import RunDir
with RunDir(sys.argv[1]).hold(sys.argv[2]):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def start_holder(run_dir: RunDir, role: str, seconds: float = 60) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(run_dir.path), role, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr("rollout.run_dir.ENDING_S", 0.2)
    monkeypatch.setattr("framework.launch.lock.ENDING_S", 0.2)
    run = RunDir(tmp_path / "run")
    run.create()
    run.config.write_text("")
    return run


def test_a_role_runs_once_and_its_run_is_not_started_again(run_dir: RunDir) -> None:
    """As after `cluster=slurm`: the launcher has ended, the job goes on."""
    holder = start_holder(run_dir, "trainer")
    wanted = f"trainer of {run_dir.path}: is being run by process {holder.pid} on "
    with pytest.raises(InUseError, match=wanted), run_dir.hold("trainer"):
        pass
    with run_dir.hold("rollout"):
        pass
    wanted = rf"\(trainer\): is being run by process {holder.pid} on .*choose another run_dir="
    with pytest.raises(ConfigError, match=wanted), hold_run_dir(run_dir.path):
        pass
    holder.kill()
    holder.wait()
    with hold_run_dir(run_dir.path), run_dir.hold("trainer"):
        pass


def test_roles_that_are_just_ending_are_waited_for(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.launch.lock.ENDING_S", 20.0)
    holder = start_holder(run_dir, "engine_0", 0.3)
    start = time.monotonic()
    with hold_run_dir(run_dir.path):
        assert time.monotonic() - start < 15
    assert holder.wait(timeout=10) == 0


def test_a_file_system_without_locks_gives_a_warning(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with hold_run_dir(run_dir.path):
        pass
    assert "no locks here" in caplog.text


def test_what_is_no_run_directory_has_no_roles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing; is this a run directory"):
        RunDir(tmp_path).hold("rollout")
