"""Single-player games of textarena by their id, as a conversation.

    data.task=textarena data.args.id=GuessTheNumber-v0

Needs the package `textarena`.
"""

import contextlib
import importlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

from rollout.environments.base import Environment, EnvironmentStep, Message
from rollout.threads import leave_to_thread


class TextArenaEnvironment(Environment):
    """What the game says to its player is the prompt and what follows; its reward is the reward.

    Prompts for evaluation are other seeds than those trained on; their first states may be alike.
    """

    def __init__(
        self,
        *,
        seed: int,
        id: str,
        max_turns: int = 32,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """id: as for textarena.make, without wrappers; kwargs: for it as well. A game that is not
        over after max_turns replies gives nothing."""
        if max_turns < 1:
            raise ValueError(f"data.args.max_turns={max_turns}: must be at least 1")
        self._seed, self._id = seed, id
        self._turns_left = max_turns
        self._is_closed = False
        self._random = random.Random(seed).getstate()
        with self._own_random():
            self._game = _start(id, seed, dict(kwargs or {}))
            self._first = self._said()

    async def initial_messages(self) -> list[Message]:
        """The game's rules and state."""
        return [{"role": "user", "content": self._first}]

    async def step(self, reply: str) -> EnvironmentStep:
        """One move."""
        self._turns_left -= 1
        with self._own_random():
            done, _ = self._game.step(action=reply)
            if done:
                self._is_closed = True
                rewards, _ = self._game.close()
                return EnvironmentStep(reward=float((rewards or {}).get(0, 0.0)))
            message: Message = {"role": "user", "content": self._said()}
        if not self._turns_left:
            return EnvironmentStep()
        return EnvironmentStep(messages=[message], done=False)

    def close(self) -> None:
        """The game's own, in a thread, where it is not over."""
        if not self._is_closed:
            self._is_closed = True
            leave_to_thread(self._game.close, f"{self._id}.close")

    def identity(self) -> str:
        """Game and seed."""
        return f"{self._id}:{self._seed}"

    def describe(self) -> dict[str, str]:
        """The game's first words."""
        return {"prompt": self._first}

    def _said(self) -> str:
        """What the game has told its player since it was last asked, the player's own moves not."""
        player, messages = self._game.get_observation()
        return "\n".join(text.strip() for sender, text, _ in messages if sender != player)

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """Games draw from the process's generator: each gets a state of its own, and no other."""
        others = random.getstate()
        random.setstate(self._random)
        try:
            yield
        finally:
            self._random = random.getstate()
            random.setstate(others)


def _start(id: str, seed: int, kwargs: dict[str, Any]) -> Any:
    try:
        textarena = importlib.import_module("textarena")
    except ImportError as error:
        raise ValueError(f"data.task=textarena needs `pip install textarena`: {error}") from error
    try:
        game = textarena.make(f"{id}-raw", **kwargs)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"data.args.id={id}: {' '.join(str(error).split())}") from error
    except LookupError as error:  # word lists of nltk, which are a download of their own
        raise ValueError(f"data.args.id={id}: lacks data: {str(error).split()[:12]}") from error
    try:
        game.reset(num_players=1, seed=seed)
    except AssertionError as error:
        raise ValueError(f"data.args.id={id}: is no game of one player: {error}") from error
    return game
