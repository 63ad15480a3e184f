"""The reward seam: a finished sample and its task in, a number with named components out."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from rollout.types import Sample


@dataclass(kw_only=True, slots=True)
class Reward:
    """What a sample is worth."""

    value: float
    components: dict[str, float] = field(default_factory=dict)
    """By name, for people; `value` is what trains."""


@dataclass(kw_only=True, slots=True)
class Task:
    """What was asked and what came of it, as text."""

    description: dict[str, str]
    """The environment's `describe()`: `prompt`, `answer`, ..."""
    replies: list[str]
    """The policy's turns."""
    environment_reward: float
    """Sum over the environment's steps; a truncated reply gets none."""

    def answer(self) -> str:
        """The answer wanted; ValueError where the task has none."""
        if "answer" not in self.description:
            raise ValueError("data.reward compares with an answer, but the task has none")
        return self.description["answer"]


RewardFunction = Callable[[Sample, Task], Awaitable[Reward]]
