import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rollout.main import run
from rollout.process import LAUNCHER_PID, end_process_group
from rollout.producer import ProducerFailure
from rollout.run_dir import RunDir

ROLE = """
import os, pathlib, subprocess, sys, time
from rollout.process import follow_launcher
follow_launcher()
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""
LAUNCHER = """
import os, subprocess, sys, time
environment = os.environ | {"DRIVETRAIN_LAUNCHER_PID": str(os.getpid())}
command = [sys.executable, "-c", sys.argv[2], sys.argv[1]]
subprocess.Popen(command, env=environment, start_new_session=True)
time.sleep(600)
"""
STUBBORN = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
command = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(command, start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""


def wait_for(condition, timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def read_pid(path: Path) -> int:
    assert wait_for(lambda: path.exists() and path.read_text())
    return int(path.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_rank_dies_with_torchrun_that_a_person_started(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != LAUNCHER_PID}
    rank = ROLE.replace("follow_launcher()", "follow_launcher(direct=False)")
    code = LAUNCHER.replace(
        '"DRIVETRAIN_LAUNCHER_PID": str(os.getpid())', '"TORCHELASTIC_RUN_ID": "x"'
    )
    torchrun = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "pid"), rank], env=environment
    )
    worker = read_pid(tmp_path / "pid")
    torchrun.kill()
    torchrun.wait()
    assert wait_for(lambda: gone(worker), 5)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_role_dies_with_its_killed_launcher(tmp_path):
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path / "pid"), ROLE])
    role = read_pid(tmp_path / "pid")
    assert not gone(role)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert wait_for(lambda: gone(role), 5)


def test_a_role_whose_launcher_is_gone_already_ends_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    result = subprocess.run(
        [sys.executable, "-c", ROLE, str(tmp_path / "pid")],
        env=os.environ | {LAUNCHER_PID: str(ended.pid)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 1
    assert "has ended: so does this process" in result.stderr


def test_ending_a_group_ends_what_ignores_sigterm_and_what_left_the_group(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, str(tmp_path / "pid")], start_new_session=True
    )
    child = read_pid(tmp_path / "pid")
    start = time.monotonic()
    end_process_group(process, timeout_s=0.5)
    assert time.monotonic() - start < 5
    assert process.returncode is not None
    assert gone(child)
    end_process_group(process, timeout_s=0.5)  # again: harmless


def test_a_rollout_process_that_waits_for_its_engines_ends_when_told_to(
    tiny_model_dir, tmp_path, monkeypatch
):
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    config = {"mode": "train", "seed": 0, "num_steps": 1, "data": {}}
    config["model"] = {"hf_path": str(tiny_model_dir), "init_from": ""}
    config |= {
        "batch": {"max_tokens_per_microbatch": 8192, "overlong": "refuse"},
        "parallel": {"cp": 1},
    }
    config["rollout"] = {"engine": {"start_timeout_s": 20.0}}
    run_dir.config.write_text(json.dumps(config))
    looks = iter([signal.SIGTERM])

    def look(self: RunDir, role: str) -> None:
        if signum := next(looks, None):
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(RunDir, "read_address", look)
    start = time.monotonic()
    with pytest.raises(ProducerFailure, match="told to end"):
        asyncio.run(run(run_dir))
    assert time.monotonic() - start < 5
    assert next(looks, None) is None, "it never waited"
