"""Countdown: reach a number with the numbers given, each used once: `3,7,12=33:` -> `12+(3*7)`.

The task of TinyZero and of reasoning-gym, small: any right expression counts.
"""

import random

from rollout.environments.arithmetic import evaluate, numbers_of
from rollout.environments.base import Environment, EnvironmentStep, Message


class CountdownEnvironment(Environment):
    """Reward 1 for an expression of + - * and brackets that uses every number once and is right."""

    def __init__(
        self, *, seed: int, num_numbers: int = 3, largest: int = 20, max_target: int = 99
    ) -> None:
        if not 2 <= num_numbers <= 6:
            raise ValueError(f"data.args.num_numbers={num_numbers}: must be 2 to 6")
        if largest < 2:
            raise ValueError(f"data.args.largest={largest}: must be at least 2")
        if max_target < largest:
            raise ValueError(f"data.args.max_target={max_target}: must be at least {largest}")
        draw = random.Random(seed)
        target = 0
        while not 0 < target <= max_target:
            self.numbers = [draw.randint(1, largest) for _ in range(num_numbers)]
            self.solution = _expression(draw, self.numbers)
            target = int(evaluate(self.solution))
        self.prompt = f"{','.join(map(str, self.numbers))}={target}:"
        self.target = target

    async def initial_messages(self) -> list[Message]:
        """The numbers and the target."""
        return [{"role": "user", "content": self.prompt}]

    async def step(self, reply: str) -> EnvironmentStep:
        """One turn decides."""
        if "/" in reply or sorted(numbers_of(reply)) != sorted(self.numbers):
            return EnvironmentStep()
        try:
            return EnvironmentStep(reward=float(evaluate(reply) == self.target))
        except ValueError:
            return EnvironmentStep()

    def identity(self) -> str:
        """The prompt."""
        return self.prompt

    def describe(self) -> dict[str, str]:
        """Prompt, and one answer of several: not for data.reward=exact_match."""
        return {"prompt": self.prompt, "answer": self.solution}

    def demonstration(self) -> list[str]:
        """The expression that the target was made with."""
        return [self.solution]


def _expression(draw: random.Random, numbers: list[int]) -> str:
    """A random expression of all the numbers, in random order."""
    parts = [str(number) for number in draw.sample(numbers, len(numbers))]
    while len(parts) > 1:
        k = draw.randrange(len(parts) - 1)
        joined = parts[k] + draw.choice("+-*") + parts[k + 1]
        parts[k : k + 2] = [joined if len(parts) == 2 else f"({joined})"]
    return parts[0]
