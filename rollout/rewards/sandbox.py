"""Runs a Python program nobody trusts: no network, no files, little of all else, and an end.

The walls are in sandbox_child.py, a process tree of its own; here are its limits and its bound.
On a machine without such walls (no Linux, user namespaces forbidden) nothing is run at all.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")


class SandboxError(RuntimeError):
    """The sandbox itself could not be set up here; says why."""


@dataclass(kw_only=True, frozen=True, slots=True)
class SandboxLimits:
    """What a program may use. Memory is of one process: all together num_processes times it."""

    timeout_s: float = 10.0
    """By the clock, start of the interpreter included."""
    cpu_s: int = 5
    """Of each process."""
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    """Of its private directory, which is in memory; also of each file."""
    num_processes: int = 16
    num_files: int = 64
    output_bytes: int = 64 << 10
    """Standard output and error together; a program that writes more is ended."""


@dataclass(kw_only=True, frozen=True, slots=True)
class SandboxResult:
    """How a program ended."""

    exit_code: int
    """128 + n: killed by signal n."""
    output: bytes
    ended_for: str
    """"" (by itself) | timeout | output"""


async def run_sandboxed(
    program: str, stdin: bytes = b"", limits: SandboxLimits | None = None
) -> SandboxResult:
    """Run Python source with the standard library alone; nothing of it is left afterwards.

    Raises:
        SandboxError: the walls cannot be put up on this machine; nothing was run.
    """
    limits = limits or SandboxLimits()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as stage:
        _prepare(stage)
        reading, writing = os.pipe()
        try:
            process = await _start(program, stage, writing, limits)
        finally:
            os.close(writing)
        ended_for, output = "", bytearray()
        try:
            async with asyncio.timeout(limits.timeout_s):
                ended_for = await _talk(process, stdin, output, limits.output_bytes)
        except TimeoutError:
            ended_for = "timeout"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            exit_code = await _end(process)
            status = os.read(reading, 4096).decode(errors="replace")
            os.close(reading)
    if status != "ready" and not ended_for:
        raise SandboxError(f"no sandbox for programs on this machine: {status.strip() or 'died'}")
    return SandboxResult(exit_code=exit_code, output=bytes(output), ended_for=ended_for)


def _prepare(stage: str) -> None:
    """Directories that nobody may enter: for the interpreter, and for the program to write in."""
    for path in (Path(stage), Path(stage, "python"), Path(stage, "work")):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)


def _command(program: str, stage: str, status_fd: int, limits: SandboxLimits) -> list[str]:
    executable = os.path.realpath(sys.executable)
    plan = {
        "stage": stage,
        "status_fd": status_fd,
        "program": program,
        "prefix": os.path.realpath(sys.base_prefix),
        "executable": executable,
        "disk_bytes": limits.disk_bytes,
        "limits": {
            "CPU": limits.cpu_s,
            "AS": limits.memory_bytes,
            "FSIZE": limits.disk_bytes,
            "NPROC": limits.num_processes,
            "NOFILE": limits.num_files,
            "CORE": 0,
        },
    }
    return [executable, "-I", "-S", str(_CHILD), json.dumps(plan)]


async def _start(
    program: str, stage: str, status_fd: int, limits: SandboxLimits
) -> asyncio.subprocess.Process:
    if sys.platform != "linux":
        raise SandboxError(f"no sandbox for programs on this machine: {sys.platform} is not linux")
    return await asyncio.create_subprocess_exec(
        *_command(program, stage, status_fd, limits),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={},
        pass_fds=(status_fd,),
        start_new_session=True,
    )


async def _talk(
    process: asyncio.subprocess.Process, stdin: bytes, output: bytearray, limit: int
) -> str:
    """Give it its input and read what it says, to the end or the limit; why it must be ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(stdin)
        process.stdin.close()
    while chunk := await process.stdout.read(1 << 14):
        output += chunk
        if len(output) > limit:
            del output[limit:]
            return "output"
    await process.wait()
    return ""


async def _end(process: asyncio.subprocess.Process) -> int:
    """The exit status of a process that was killed, and of which nobody has read the rest: asyncio
    does not see an end before its pipe is empty, and does not empty one that is full."""
    assert process.stdout is not None
    while await process.stdout.read(1 << 16):
        pass
    return await process.wait()
