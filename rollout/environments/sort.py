"""Sort digits: prompt `31524078=`, answer `01234578` and the end of the sequence."""

import random

from rollout.environments.base import Environment, EnvironmentStep, Message


class SortEnvironment(Environment):
    """Reward 1 for exactly the digits in ascending order, else 0."""

    def __init__(self, *, seed: int, num_digits: int = 8, varied_mistakes: bool = False) -> None:
        """varied_mistakes: half of the near misses are in order and as long, but one or two digits
        are others, as a policy that has learnt the order goes wrong; a quarter also lose, repeat
        or exchange digits, in order too; a quarter are the same out of order. A reward model that
        never saw such answers scores them as it likes: a policy finds out."""
        if num_digits < 1:
            raise ValueError(f"data.args.num_digits={num_digits}: must be at least 1")
        digits = random.Random(seed).choices("0123456789", k=num_digits)
        self.prompt = "".join(digits) + "="
        self.answer = "".join(sorted(digits))
        self.varied_mistakes = varied_mistakes

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

    def mistake(self, random: random.Random) -> list[str]:
        """A digit is another one; with varied_mistakes see __init__."""
        if not self.varied_mistakes:
            return super().mistake(random)
        in_order = random.random() < 0.75
        same_length = in_order and random.random() < 2 / 3
        reply = self.answer
        for _ in range(random.randint(1, 2 if same_length else 3)):
            place = random.randrange(len(reply)) if reply else 0
            before, digit, after = reply[:place], reply[place : place + 1], reply[place + 1 :]
            other = before + random.choice("0123456789") + after
            others = [
                other,
                before + after,
                before + digit * 2 + after,
                before + after[:1] + digit + after[1:],
            ]
            reply = other if same_length else random.choice(others)
        return ["".join(sorted(reply)) if in_order else reply]
