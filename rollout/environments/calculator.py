"""Arithmetic with a tool, two turns: `12*34+56?` is beyond a small model, `[12*34+56]` is not.

prompt  12*34+56?     policy  [12*34+56]     tool  =464|     policy  :464
"""

import random

from rollout.environments.arithmetic import evaluate
from rollout.environments.base import Environment, EnvironmentStep, Message


class CalculatorEnvironment(Environment):
    """`[expression]` calls the calculator, `:number` answers and ends; reward 1 for the right one.

    A call that is no expression gets `=error|`; anything else ends the episode with nothing.
    """

    def __init__(
        self, *, seed: int, num_digits: int = 2, max_calls: int = 3, tool_share: float = 1.0
    ) -> None:
        """num_digits: of each of the three numbers. tool_share: of the demonstrations, those that
        call the tool; the others guess a number nearby, and RL has something left to teach."""
        if not 1 <= num_digits <= 6:
            raise ValueError(f"data.args.num_digits={num_digits}: must be 1 to 6")
        if max_calls < 1:
            raise ValueError(f"data.args.max_calls={max_calls}: must be at least 1")
        if not 0 <= tool_share <= 1:
            raise ValueError(f"data.args.tool_share={tool_share}: must be in [0, 1]")
        self._random = random.Random(seed)
        a, b, c = (
            self._random.randrange(10 ** (num_digits - 1) + 1, 10**num_digits) for _ in "abc"
        )
        self.expression = f"{a}*{b}+{c}"
        self.answer = str(a * b + c)
        self._calls_left = max_calls
        self._tool_share = tool_share

    async def initial_messages(self) -> list[Message]:
        """The expression and a question mark."""
        return [{"role": "user", "content": self.expression + "?"}]

    async def step(self, reply: str) -> EnvironmentStep:
        """A call of the tool, or the answer."""
        if reply.startswith("[") and reply.endswith("]") and self._calls_left:
            self._calls_left -= 1
            message: Message = {"role": "tool", "content": f"={await self.call(reply[1:-1])}|"}
            return EnvironmentStep(messages=[message], done=False)
        return EnvironmentStep(reward=float(reply == f":{self.answer}"))

    async def call(self, expression: str) -> str:
        """What the calculator says: a number, or `error`."""
        try:
            return str(evaluate(expression))
        except ValueError:
            return "error"

    def identity(self) -> str:
        """The expression."""
        return self.expression

    def describe(self) -> dict[str, str]:
        """Prompt and answer."""
        return {"prompt": self.expression + "?", "answer": self.answer}

    def demonstration(self) -> list[str]:
        """The call and the answer; or, by tool_share, a wrong guess of the right size."""
        if self._random.random() < self._tool_share:
            return [f"[{self.expression}]", f":{self.answer}"]
        return [f":{max(0, int(self.answer) + self._random.randint(-200, 200))}"]
