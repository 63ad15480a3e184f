"""The rewards by name: each `async (sample, task) -> Reward`."""

from rollout.rewards.base import Reward, RewardFunction, Task
from rollout.rewards.rules import environment, exact_match, math_answer

__all__ = ["REWARDS", "Reward", "RewardFunction", "Task"]

REWARDS: dict[str, RewardFunction] = {
    "environment": environment,
    "exact_match": exact_match,
    "math": math_answer,
}
