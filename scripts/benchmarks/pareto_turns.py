"""A task whose answers have a long tail: as many turns as a Pareto distribution says.

data.task=pareto_turns.ParetoTurns, with scripts/benchmarks on PYTHONPATH
"""

import random

from rollout.environments.base import Environment, EnvironmentStep, Message


class ParetoTurns(Environment):
    """All samples of a group have floor(Pareto(alpha)) turns, at most `longest`; the reward is the
    share of distinct letters in the last reply."""

    def __init__(self, *, seed: int, alpha: float = 1.1, longest: int = 24) -> None:
        self._name = f"{seed:x}"
        draw = random.Random(seed).paretovariate(alpha)
        self.num_turns = min(longest, int(draw))
        self._turn = 0

    async def initial_messages(self) -> list[Message]:
        """The prompt tells nothing of the length."""
        return [{"role": "user", "content": f"{self._name}="}]

    async def step(self, reply: str) -> EnvironmentStep:
        """Asks again until the turns are used up."""
        self._turn += 1
        reward = len(set(reply)) / max(1, len(reply))
        if self._turn >= self.num_turns:
            return EnvironmentStep(reward=reward)
        return EnvironmentStep(messages=[{"role": "user", "content": "="}], done=False)

    def identity(self) -> str:
        """The seed."""
        return self._name
