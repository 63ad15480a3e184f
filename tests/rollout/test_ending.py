"""A rollout process ends, whatever an environment leaves behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from rollout.run_dir import RunDir

STUBBORN = """
async def foreign():
    while True:
        try:
            await asyncio.sleep(0.01)
        except BaseException:
            pass
"""
BLOCKED = """
async def foreign():
    await asyncio.to_thread(threading.Event().wait)
"""
POLITE = """
async def foreign():
    await asyncio.sleep(3600)
"""
PROCESS = """
import asyncio, sys, threading
import rollout.main
from rollout import boundary, ending

boundary._CLEAR_UP_S = 0.1
ending.BoundedRunner.__init__.__defaults__ = (0.3,)

async def run(run_dir):
    try:
        await boundary.guarded(foreign(), "step", 0.1)
    except boundary.EpisodeError as error:
        print(error)
    {last}

rollout.main.run = run
rollout.main.main()
print("closed")
"""


def end(run_dir: Path, foreign: str, last: str = "pass") -> subprocess.CompletedProcess:
    """`drivetrain-rollout` whose environment gives no answer, and whose run ends so."""
    RunDir(run_dir).config.write_text("")
    program = foreign + PROCESS.format(last=last)
    return subprocess.run(
        [sys.executable, "-c", program, "--run-dir", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("foreign", "last", "code", "said"),
    [
        (STUBBORN, 'raise rollout.main.EngineFailure("no engine")', 1, "-rollout: no engine\n"),
        (BLOCKED, 'raise ValueError("no such task")', 2, "-rollout: no such task\n"),
    ],
)
def test_a_process_ends_with_its_status_although_foreign_code_does_not(
    foreign, last, code, said, tmp_path
):
    ended = end(tmp_path, foreign, last)
    assert ended.returncode == code
    assert ended.stdout == "step: no answer within 0.1 s\n"
    assert "takes no notice" in ended.stderr
    assert said in ended.stderr


def test_one_whose_foreign_code_ends_is_closed(tmp_path):
    ended = end(tmp_path, POLITE)
    assert (ended.returncode, ended.stdout.splitlines()[1:], ended.stderr) == (0, ["closed"], "")
