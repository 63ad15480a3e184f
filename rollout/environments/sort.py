"""Sort digits: prompt `31524078=`, answer `01234578` and the end of the sequence."""

import random

from rollout.environments.base import Environment, EnvironmentStep, Message


class SortEnvironment(Environment):
    """Reward 1 for exactly the digits in ascending order, else 0."""

    def __init__(self, *, seed: int, num_digits: int = 8) -> None:
        if num_digits < 1:
            raise ValueError(f"data.args.num_digits={num_digits}: must be at least 1")
        digits = random.Random(seed).choices("0123456789", k=num_digits)
        self.prompt = "".join(digits) + "="
        self.answer = "".join(sorted(digits))

    async def initial_messages(self) -> list[Message]:
        """The digits and an equals sign."""
        return [{"role": "user", "content": self.prompt}]

    async def step(self, reply: str) -> EnvironmentStep:
        """One turn decides."""
        return EnvironmentStep(reward=float(reply == self.answer))

    def identity(self) -> str:
        """The digits."""
        return self.prompt

    def describe(self) -> dict[str, str]:
        """Prompt and answer."""
        return {"prompt": self.prompt, "answer": self.answer}

    def demonstration(self) -> list[str]:
        """The answer."""
        return [self.answer]
