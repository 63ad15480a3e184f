"""A scripted engine client and environment, for tests that need certain answers."""

import asyncio
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from rollout.client import Generation
from rollout.config import SamplingConfig
from rollout.environments.base import Environment, EnvironmentStep, Message
from rollout.tokens import Chat
from rollout.types import Group


class ScriptedClient:
    """Answers every prompt by `answer(text)`; counts calls. Implements EngineClient.generate."""

    def __init__(self, chat: Chat, answer: Callable[[str], str], version: int = 0) -> None:
        self.chat = chat
        self.answer = answer
        self.version = version
        self.calls: list[list[int]] = []
        self.gate: asyncio.Event | None = None
        """Set: calls wait for it."""

    async def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        *,
        routes_from: int | None = None,
    ) -> list[Generation]:
        self.calls.append(seeds)
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        return [self._generation(prompt, sampling.max_new_tokens) for prompt in prompts]

    def _generation(self, prompt: list[int], budget: int) -> Generation:
        tokens = [*self.chat.tokens(self.answer(self.chat.text(prompt))), self.chat.end_id]
        stopped = len(tokens) <= budget
        tokens = tokens[:budget]
        return Generation(
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=np.full(len(tokens), -0.5, dtype=np.float32),
            versions=np.full(len(tokens), self.version, dtype=np.int32),
            finish="stop" if stopped else "length",
            end_token=stopped,
        )


class EchoEnvironment(Environment):
    """Asks `num_turns` times; every reply that repeats the question pays 1."""

    hold_out = False

    def __init__(self, *, seed: int, num_turns: int = 2, trouble: str = "") -> None:
        self.num_turns = num_turns
        self.turn = 0
        self.trouble = trouble

    async def initial_messages(self) -> list[Message]:
        if self.trouble == "prompt":
            raise RuntimeError("no prompt today")
        if self.trouble == "odd prompt":
            return 7  # pyright: ignore[reportReturnType]
        return [{"role": "user", "content": "q0"}]

    async def step(self, reply: str) -> EnvironmentStep:
        if self.trouble == "raises":
            raise KeyError("boom")
        if self.trouble == "hangs":
            await asyncio.sleep(3600)
        if self.trouble == "no step":
            return None  # pyright: ignore[reportReturnType]
        if self.trouble == "no message":
            return EnvironmentStep(messages=None, done=False)  # pyright: ignore[reportArgumentType]
        reward = float(reply == f"q{self.turn}")
        self.turn += 1
        if self.turn == self.num_turns:
            return EnvironmentStep(reward=reward)
        message: Message = {"role": "user", "content": f"q{self.turn}"}
        return EnvironmentStep(messages=[message], reward=reward, done=False)

    def identity(self) -> str:
        return "echo"

    def describe(self) -> dict[str, str]:
        if self.trouble == "describe":
            raise LookupError("who am I")
        return {"prompt": "q0", "answer": "q0"}


class ShownEnvironment(EchoEnvironment):
    """Can be shown; counts the episodes that are over."""

    ended = 0

    def demonstration(self) -> list[str]:
        return ["q0", "q1"]

    def close(self) -> None:
        ShownEnvironment.ended += 1


class SlowEnvironment(Environment):
    """Its step waits for the gate; every second prompt pays."""

    hold_out = False
    gate: ClassVar[asyncio.Event]

    def __init__(self, *, seed: int) -> None:
        self.right = float(seed % 2)

    async def initial_messages(self) -> list[Message]:
        return [{"role": "user", "content": "12"}]

    async def step(self, reply: str) -> EnvironmentStep:
        await self.gate.wait()
        return EnvironmentStep(reward=self.right)

    def identity(self) -> str:
        return "slow"


def odd_ids(group: Group) -> str:
    """A group filter of a user's own."""
    return "odd" if group.group_id % 2 else ""


def raising_filter(group: Group) -> str:
    raise LookupError("no such group")


def wordy_filter(group: Group) -> str:
    return "it was too easy"


def wrong_filter(group: Group) -> str:
    return True  # pyright: ignore[reportReturnType]
