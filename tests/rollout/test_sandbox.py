"""Programs nobody trusts: each attempt is contained, ends in time, and leaves nothing behind."""

import asyncio
import dataclasses
import os
import socket
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from rollout.rewards import Task, find_reward
from rollout.rewards.sandbox import SandboxError, SandboxLimits, SandboxResult, run_sandboxed
from rollout.types import Sample, Status

LIMITS = SandboxLimits(timeout_s=8.0, cpu_s=2, memory_bytes=256 << 20, num_processes=8)


def run(program: str, **limits: float) -> SandboxResult:
    """The result; asserts that no process of the program outlives it."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    result = asyncio.run(run_sandboxed(program, limits=dataclasses.replace(LIMITS, **limits)))  # pyright: ignore
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
    return result


@pytest.fixture(scope="module", autouse=True)
def _sandbox_is_there() -> None:
    try:
        asyncio.run(run_sandboxed("", limits=LIMITS))
    except SandboxError as error:
        pytest.skip(str(error))


def test_fork_bomb_is_bounded() -> None:
    program = """
import os, time
made = 0
try:
    for _ in range(40):
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except BlockingIOError:
    print("refused after", made)
"""
    result = run(program)
    assert result.output.startswith(b"refused after"), result
    # The program itself and its two keepers count too.
    assert 1 <= int(result.output.split()[-1]) < LIMITS.num_processes


@pytest.mark.parametrize(
    ("program", "ended_for"),
    [("while True: pass", ""), ("import time; time.sleep(60)", "timeout")],
    ids=["cpu", "sleep"],
)
def test_endless_programs_end(program: str, ended_for: str) -> None:
    start = time.monotonic()
    result = run(program, cpu_s=1, timeout_s=30.0 if not ended_for else 2.0)
    assert result.ended_for == ended_for
    assert result.exit_code != 0
    assert time.monotonic() - start < 25


def test_ten_gigabytes_are_refused() -> None:
    result = run("x = bytearray(10 << 30)")
    assert result.exit_code != 0
    assert b"MemoryError" in result.output


def test_nothing_outside_its_directory_is_written(tmp_path: Path) -> None:
    # Where anybody may write, root becoming nobody included: only the walls are in the way.
    anywhere = Path("/dev/shm", f"sandbox-test-{os.getpid()}")
    for place in (tmp_path / "x", anywhere, Path("/etc/x")):
        result = run(f"open({str(place)!r}, 'w').write('x')")
        assert b"Error" in result.output
        assert not place.exists()
    assert run("open('x', 'w').write('x'); print(open('x').read())").output == b"x\n"
    full = run("open('x', 'wb').write(b'x' * (8 << 20))", disk_bytes=4 << 20)
    assert full.exit_code != 0
    assert b"File too large" in full.output or b"No space left" in full.output


def test_walls_cannot_be_taken_down() -> None:
    place = Path("/dev/shm", f"sandbox-test-{os.getpid()}")
    program = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b"none", b"/", b"", 32 | 4096, b""), libc.mount(b"x", b"/mnt", b"tmpfs", 0, b""))
libc.unshare(0x10000000 | 0x20000)  # capabilities in a name space of its own, at most
libc.mount(b"none", b"/", b"", 32 | 4096, b"")
libc.mount(b"none", b"/dev/shm", b"", 32 | 4096, b"")
try:
    open({str(place)!r}, "w")
except OSError:
    print("closed")
"""
    assert run(program).output.split() == [b"-1", b"-1", b"closed"]
    assert not place.exists()


def test_secrets_of_the_machine_are_not_seen() -> None:
    os.environ["A_SECRET"] = "told to nobody"
    try:
        result = run("import os; print('A_SECRET' in os.environ, os.listdir('/proc'))")
    finally:
        del os.environ["A_SECRET"]
    assert result.output.startswith(b"False")
    assert str(os.getpid()).encode() + b"'" not in result.output


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
    assert result.exit_code != 0
    assert b"unreachable" in result.output


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_endless_output_is_cut(monkeypatch: pytest.MonkeyPatch, delay_s: float) -> None:
    """Also where it is killed so late that the pipe is full, and asyncio has stopped reading."""
    killpg = os.killpg

    def late(group: int, number: int) -> None:
        time.sleep(delay_s)
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", late)
    result = run("while True: print('x' * 100000)", output_bytes=4096)
    assert result.ended_for == "output"
    assert len(result.output) == 4096


def test_a_child_of_its_own_session_dies_too() -> None:
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv("/bin/sleep", ["sleep", "61.5"])
print("parent gone")
"""
    start = time.monotonic()
    assert b"parent gone" in run(program).output
    assert time.monotonic() - start < LIMITS.timeout_s
    time.sleep(0.2)
    sleepers = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]
    assert ["sleep", "61.5"] not in sleepers


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1.0),
        ("def add(a, b):\n    return a + b", 1.0),
        ("```python\ndef add(a, b):\n    return a - b\n```", 0.0),
        ("import sys\nsys.exit(0)", 0.0),
        ("import os\nos._exit(0)", 0.0),
        ("def add(a, b:", 0.0),
    ],
)
def test_code_reward(reply: str, value: float) -> None:
    sample = Sample(
        group_id=0,
        index=0,
        tokens=np.zeros(2, np.int32),
        prompt_length=1,
        loss_mask=np.ones(1, np.uint8),
        rollout_logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
        turn_starts=np.zeros(1, np.int32),
        reward=0.0,
        status=Status.STOPPED,
    )
    task = Task(
        description={"answer": "assert add(1, 2) == 3\nassert add(-1, 1) == 0"},
        replies=[reply],
        environment_reward=0.0,
    )

    async def score() -> float:
        return (await find_reward("code")(sample, task)).value

    assert asyncio.run(score()) == value
