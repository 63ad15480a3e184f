"""The rewards by name: each `async (sample, task) -> Reward`."""

import inspect

from rollout.own_code import look_up
from rollout.rewards.base import Reward, RewardFunction, Task
from rollout.rewards.code import code
from rollout.rewards.overlong import punish_overlong
from rollout.rewards.rules import environment, exact_match, match_and_length, math_answer

__all__ = [
    "NEED_ANSWER",
    "REWARDS",
    "Reward",
    "RewardFunction",
    "Task",
    "find_reward",
    "punish_overlong",
]

REWARDS: dict[str, RewardFunction] = {
    "code": code,
    "environment": environment,
    "exact_match": exact_match,
    "match_and_length": match_and_length,
    "math": math_answer,
}
NEED_ANSWER = ("code", "exact_match", "match_and_length", "math")
"""Those that compare with the answer of the environment's `describe()`."""


def find_reward(name: str) -> RewardFunction:
    """A row by its name, or a function of the user's own: package.module.function.

    Raises:
        ValueError: there is none such; one line, without the key.
    """
    found = look_up(REWARDS, name, "function")
    if not inspect.iscoroutinefunction(found) or len(inspect.signature(found).parameters) != 2:
        raise ValueError("is not an `async def` of (sample, task)")
    return found
