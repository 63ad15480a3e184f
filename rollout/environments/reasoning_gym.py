"""Any family of reasoning-gym by its name (chain_sum, basic_arithmetic, ...).

The family makes the question and its own `score_answer` is the reward.
"""

import contextlib
import random
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from rollout.environments.base import Environment, EnvironmentStep, Message


def _question(name: str, seed: int, args: tuple[tuple[str, Any], ...]) -> tuple[Any, dict]:
    """A family's dataset and its question of this seed.

    An entry depends on the sum of the dataset's seed and its index, so one dataset gives all: some
    families take a tenth of a second to make one. The few that draw beforehand for `size` indices
    get one for each seed.
    """
    dataset = _family(name, 0, args)
    with _global_random(seed):
        try:
            return dataset, dataset[seed]
        except IndexError:
            dataset = _family(name, seed, args)
            return dataset, dataset[0]


@contextlib.contextmanager
def _global_random(seed: int) -> Iterator[None]:
    """Some families (list_functions) draw from the process's own generator as well."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@lru_cache(maxsize=64)
def _family(name: str, seed: int, args: tuple[tuple[str, Any], ...]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of cellpylib, which it needs
        import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=1, **dict(args))
    except ValueError as error:
        raise ValueError(f"data.args.family={name!r}: {error}") from error
    except (TypeError, AssertionError) as error:
        raise ValueError(f"data.args of reasoning-gym's {name}: {error}") from error


class ReasoningGymEnvironment(Environment):
    """One question of one family.

    strip_spaces and suffix bring questions into the reach of character models:
    `State the final answer to ...: 3 + 4 =` is long, its `expression` metadata with them is `3+4=`.
    """

    def __init__(
        self,
        *,
        seed: int,
        family: str = "chain_sum",
        question: str = "question",
        strip_spaces: bool = False,
        suffix: str = "",
        **args: Any,
    ) -> None:
        """question: `question`, or the name of a metadata entry that holds it (`expression`)."""
        self.dataset, self.entry = _question(family, seed, tuple(sorted(args.items())))
        if question == "question":
            text = self.entry["question"]
        elif isinstance(self.entry["metadata"].get(question), str):
            text = self.entry["metadata"][question]
        else:
            names = [k for k, v in self.entry["metadata"].items() if isinstance(v, str)]
            raise ValueError(
                f"data.args.question={question!r}: {family} has `question` and metadata {names}"
            )
        self.prompt = (text.replace(" ", "") if strip_spaces else text) + suffix
        self.answer = str(self.entry["answer"])

    async def initial_messages(self) -> list[Message]:
        """The question."""
        return [{"role": "user", "content": self.prompt}]

    async def step(self, reply: str) -> EnvironmentStep:
        """One turn, scored by the family."""
        score = self.dataset.score_answer(answer=reply, entry=self.entry)
        return EnvironmentStep(reward=float(score))

    def identity(self) -> str:
        """The question."""
        return self.prompt

    def describe(self) -> dict[str, str]:
        """Prompt and the family's own answer."""
        return {"prompt": self.prompt, "answer": self.answer}

    def demonstration(self) -> list[str]:
        """The family's own answer."""
        return [self.answer]
