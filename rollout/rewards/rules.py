"""Rewards that compute: the environment's own, equality, equality of mathematical answers."""

import sys
from pathlib import Path

from rollout.rewards.base import Reward, Task
from rollout.rewards.workers import Workers
from rollout.types import Sample, Status

_MATH_TIMEOUT_S = 12.0
"""Beyond the worker's own bounds, which most of what is slow heeds."""
# -P: this directory has a code.py, which is not the one of the standard library.
_math = Workers(
    [sys.executable, "-P", str(Path(__file__).with_name("math_child.py"))],
    timeout_s=_MATH_TIMEOUT_S,
)


async def environment(sample: Sample, task: Task) -> Reward:
    """What the environment said."""
    value = task.environment_reward
    return Reward(value=value, components={"environment": value})


async def exact_match(sample: Sample, task: Task) -> Reward:
    """1 when the last reply, ended by the policy itself, is the answer (outer spaces aside)."""
    ended = sample.status is Status.STOPPED and bool(task.replies)
    value = float(ended and task.replies[-1].strip() == task.answer().strip())
    return Reward(value=value, components={"exact_match": value})


async def match_and_length(sample: Sample, task: Task) -> Reward:
    """Half for the answer itself, half for as many characters as it has: two components, of which
    one is easily learnt."""
    found = (await exact_match(sample, task)).value
    same = bool(task.replies) and len(task.replies[-1].strip()) == len(task.answer().strip())
    length = float(same and sample.status is Status.STOPPED)
    components = {"exact_match": found, "length": length}
    return Reward(value=(found + length) / 2, components=components)


async def math_answer(sample: Sample, task: Task) -> Reward:
    """1 when the last reply's mathematical answer equals the one wanted (math-verify).

    WorkerError where there is no verdict within bounds: what a policy writes can take for ever.
    """
    value = 0.0
    if sample.status is Status.STOPPED and task.replies:
        given = {"gold": task.answer(), "reply": task.replies[-1]}
        value = float(await _math.ask(given))
    return Reward(value=value, components={"math": value})
