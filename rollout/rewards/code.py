"""Programs against unit tests: the reply's last block of code, then the task's tests, walled in."""

import asyncio
import json
import os
import re
import secrets

from rollout.bounds import turn
from rollout.rewards.base import Reward, Task
from rollout.rewards.sandbox import SandboxLimits, run_sandboxed
from rollout.types import Sample, Status

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_RUN = """
import json, sys
given = json.load(sys.stdin)
names = {"__name__": "solution"}
exec(compile(given["code"], "solution.py", "exec"), names)
exec(compile(given["tests"], "tests.py", "exec"), names)
sys.stdout.write("\\n" + given["passed"])
"""
_slots = asyncio.Semaphore(max(1, len(os.sched_getaffinity(0))))


def code_of(reply: str) -> str:
    """The last fenced block, or the whole reply where there is none."""
    blocks = _BLOCK.findall(reply)
    return blocks[-1] if blocks else reply


async def code(sample: Sample, task: Task) -> Reward:
    """1 when the reply's program passes the tests that the task has for its answer.

    Tests are Python that raises where something is wrong (`assert add(1, 2) == 3`), run after
    the program, in its names. Component `code`. A program that ends early passes nothing; one that
    means to deceive could, for tests and program share a process. SandboxError where there is none.
    """
    value = 0.0
    if sample.status is Status.STOPPED and task.replies:
        passed = secrets.token_hex(16)
        given = {"code": code_of(task.replies[-1]), "tests": task.answer(), "passed": passed}
        async with turn(_slots):
            result = await run_sandboxed(_RUN, json.dumps(given).encode(), SandboxLimits())
        value = float(result.exit_code == 0 and result.output.endswith(passed.encode()))
    return Reward(value=value, components={"code": value})
