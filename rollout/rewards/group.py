"""Rewards of whole groups: `async (samples, tasks) -> list[Reward]`, one call for all of a prompt.

For what compares answers with each other, or asks a service for many at a time. A function of the
user's own is one if its parameters are called so.
"""

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rollout.rewards.base import Reward, Task
from rollout.types import Sample

GroupFunction = Callable[[list[Sample], list[Task]], Awaitable[list[Reward]]]


class GroupReward:
    """One of them."""

    def __init__(self, function: GroupFunction) -> None:
        self._function = function

    async def __call__(self, samples: Sequence[Sample], tasks: Sequence[Task]) -> list[Reward]:
        """A reward of each sample, in order; ValueError: not so many were given."""
        rewards = [*await self._function([*samples], [*tasks])]
        if len(rewards) != len(samples):
            raise ValueError(f"{len(rewards)} rewards of {len(samples)} samples")
        return rewards


def is_of_groups(function: Callable[..., Any]) -> bool:
    """Whether its signature is (samples, tasks)."""
    return [*inspect.signature(function).parameters] == ["samples", "tasks"]
