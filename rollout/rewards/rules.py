"""Rewards that compute: the environment's own, equality, equality of mathematical answers."""

from rollout.rewards.base import Reward, Task
from rollout.types import Sample, Status

_MATH_TIMEOUT_S = 3


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
    """1 when the last reply's mathematical answer equals the one wanted (math-verify)."""
    from math_verify import parse, verify

    value = 0.0
    if sample.status is Status.STOPPED and task.replies:
        # Plain computation: the caller's asyncio bound cannot interrupt it, SIGALRM can.
        gold = parse(task.answer(), parsing_timeout=_MATH_TIMEOUT_S)
        reply = parse(task.replies[-1], parsing_timeout=_MATH_TIMEOUT_S)
        value = float(verify(gold, reply, timeout_seconds=_MATH_TIMEOUT_S))
    return Reward(value=value, components={"math": value})
