"""Any gymnasium environment with discrete or textual actions, as a conversation.

    data.task=gymnasium data.args.id=Taxi-v4 'data.args.actions=[down,up,right,left,pick,drop]'

Needs the package `gymnasium`, and whatever registers the id (`data.args.register`).
"""

import importlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from rollout.environments.base import Environment, EnvironmentStep, Message
from rollout.own_code import import_own_module
from rollout.threads import in_thread, leave_to_thread

_CLOSE_WAIT_S = 60.0
"""How long a call that was given up may go on before its environment is left as it is."""


class GymnasiumEnvironment(Environment):
    """The observation is what the policy is told, its reply is the action.

    Calls run in a thread, one at a time: one that is slow or hangs costs its own sample, after
    data.timeout_s.
    Prompts for evaluation are other seeds than those trained on; their first states may be alike.
    """

    def __init__(
        self,
        *,
        seed: int,
        id: str,
        actions: Sequence[str] = (),
        prompt: str = "{observation}",
        told: str = "{observation}",
        invalid_reward: float = 0.0,
        max_turns: int = 32,
        register: str = "",
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """id: as for gymnasium.make, kwargs: for it as well. actions: the words for actions 0, 1,
        ... ; none: numbers, or with a Text space the reply itself. prompt, told: around the first
        and the later observations (`{observation}`, `{reward}`). A reply that is no action ends
        the episode with invalid_reward. register: a module to import, that registers the id."""
        if max_turns < 1:
            raise ValueError(f"data.args.max_turns={max_turns}: must be at least 1")
        for key, text in (("prompt", prompt), ("told", told)):
            try:
                text.format(observation="", reward=0.0)
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(f"data.args.{key}={text!r}: {error} in its braces") from error
        self._seed, self._id = seed, id
        self._prompt, self._told = prompt, told
        self._invalid_reward = invalid_reward
        self._turns_left = max_turns
        self._is_closed = False
        self._call = threading.Lock()
        self._environment = _make(id, register, dict(kwargs or {}))
        self._actions = _actions(self._environment.action_space, list(actions))

    async def initial_messages(self) -> list[Message]:
        """The first observation, in `prompt`."""
        observation, _ = await in_thread(self._reset)
        text = self._prompt.format(observation=observation, reward=0.0)
        return [{"role": "user", "content": text}]

    async def step(self, reply: str) -> EnvironmentStep:
        """One action."""
        action = reply if self._actions is None else self._actions.get(reply.strip())
        if action is None:
            return EnvironmentStep(reward=self._invalid_reward)
        self._turns_left -= 1
        step = await in_thread(self._step, action)
        observation, reward, terminated, truncated, _ = step
        if terminated or truncated or not self._turns_left:
            return EnvironmentStep(reward=float(reward))
        text = self._told.format(observation=observation, reward=float(reward))
        message: Message = {"role": "user", "content": text}
        return EnvironmentStep(messages=[message], reward=float(reward), done=False)

    def close(self) -> None:
        """The environment's own, in a thread, once no call of it runs."""
        if not self._is_closed:
            self._is_closed = True
            leave_to_thread(self._close, f"{self._id}.close")

    def _reset(self) -> Any:
        with self._call:
            return self._environment.reset(seed=self._seed)

    def _step(self, action: Any) -> Any:
        with self._call:
            return self._environment.step(action)

    def _close(self) -> None:
        if not self._call.acquire(timeout=_CLOSE_WAIT_S):
            raise TimeoutError(f"a call of it has not ended for {_CLOSE_WAIT_S:g} s")
        try:
            self._environment.close()
        finally:
            self._call.release()

    def identity(self) -> str:
        """Environment and seed."""
        return f"{self._id}:{self._seed}"

    def describe(self) -> dict[str, str]:
        """The same."""
        return {"prompt": self.identity()}


def _make(id: str, register: str, kwargs: dict[str, Any]) -> Any:
    if register:
        try:
            import_own_module(register)
        except ValueError as error:
            raise ValueError(f"data.args.register={register}: {error}") from error
    try:
        gymnasium = importlib.import_module("gymnasium")
    except ImportError as error:
        raise ValueError(f"data.task=gymnasium needs `pip install gymnasium`: {error}") from error
    try:
        return gymnasium.make(id, **kwargs)
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        raise ValueError(f"data.args.id={id}: {' '.join(str(error).split())}") from error


def _actions(space: Any, words: list[str]) -> dict[str, Any] | None:
    """Action of each word; None: any text is one."""
    kind = type(space).__name__
    if kind == "Text" and not words:
        return None
    if kind != "Discrete":
        raise ValueError(f"data.args.id: its actions are {space}; Discrete or Text is wanted")
    count, start = int(space.n), int(space.start)
    if words and len(words) != count:
        raise ValueError(f"data.args.actions={words}: {count} words are wanted")
    names = words or [str(start + k) for k in range(count)]
    return {name: start + k for k, name in enumerate(names)}
