"""The generation seam: `async (engine, task, sampling) -> list[Sample]`, any agent program.

A program asks `engine` for continuations of token ids as often as it likes, one after another or
many at a time, writes them into `Transcript`s and returns their samples: one for a conversation,
several for sub-agents, restarts or a fan-out. What the engine sampled is what is trained.
"""

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rollout.client import EngineFailure, EngineRefusal, Generation
from rollout.config import SamplingConfig
from rollout.environments import Environment
from rollout.environments.base import Message
from rollout.prompt_bound import PromptBound
from rollout.seeds import derive_seed
from rollout.tokens import Chat, Transcript
from rollout.types import Sample


class GeneratesTokens(Protocol):
    """What is asked of rollout.client.EngineClient."""

    async def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        *,
        routes_from: int | None = None,
    ) -> list[Generation]:
        """One continuation of each prompt, in order."""
        ...


class PolicyEngine:
    """The policy, for one episode."""

    def __init__(
        self,
        client: GeneratesTokens,
        chat: Chat,
        *,
        episode_seed: int,
        version: int,
        routes: bool = False,
        prompts: PromptBound | None = None,
    ) -> None:
        """version: the least one that sampled tokens may have. routes: generations carry them.

        prompts: the longest that can be trained on.
        """
        self.chat = chat
        """Text <-> tokens: `chat.prompt(messages)`, `chat.continuation(...)`, `chat.text(ids)`."""
        self.prompts = prompts
        self.failure: EngineFailure | None = None
        """What ended the engines' service, however the program took it."""
        self._client = client
        self._seed = episode_seed
        self._version = version
        self._routes = routes
        self._asked: Counter[bytes] = Counter()

    async def generate(
        self, tokens: list[int], sampling: SamplingConfig, *, routes_from: int = 0
    ) -> Generation:
        """One continuation of `tokens`.

        routes_from: tokens whose routes need not be told again (`Transcript.num_routes`).

        Its seed is a function of the episode and of the tokens (and of how often these were asked
        for), so calls that run side by side give the same in whatever order they arrive.

        Raises:
            EngineRefusal: the engine does not take such a request (too long, most likely).
            EngineFailure: no engine answers; the run ends.
        """
        digest = hashlib.blake2b(np.asarray(tokens, dtype="<i4").tobytes(), digest_size=16).digest()
        seed = derive_seed(self._seed, "call", digest.hex(), self._asked[digest])
        self._asked[digest] += 1
        try:
            (generation,) = await self._client.generate(
                [tokens], sampling, [seed], routes_from=routes_from if self._routes else None
            )
            check_version(generation, self._version)
        except EngineRefusal:
            raise
        except EngineFailure as error:
            self.failure = error
            raise
        return generation

    def text(self, generation: Generation) -> str:
        """What the policy said, without its end token."""
        end = len(generation.token_ids) - int(generation.end_token)
        return self.chat.text(generation.token_ids[:end])


@dataclass(kw_only=True, slots=True)
class AgentTask:
    """What one episode is about."""

    environment: Environment
    """Of this episode alone: initial_messages(), step(reply), describe()."""
    group_id: int
    index: int
    """Place in its group; samples get their final places afterwards."""
    seed: int
    """For whatever the program draws itself."""

    messages: list[Message] | None = None
    """The environment's first messages, once they were asked for."""

    async def initial_messages(self) -> list[Message]:
        """The environment's, which is asked once."""
        if self.messages is None:
            self.messages = await self.environment.initial_messages()
        return self.messages

    def sample(self, transcript: Transcript, reward: float = 0.0, **named) -> Sample:
        """A transcript as a sample of this episode; reward: what data.reward=environment takes."""
        return transcript.sample(group_id=self.group_id, index=self.index, reward=reward, **named)


GenerateFunction = Callable[[PolicyEngine, AgentTask, SamplingConfig], Awaitable[list[Sample]]]


def check_version(generation: Generation, version: int) -> None:
    """EngineFailure where a token was sampled with older weights than the run has."""
    if generation.versions.min() < version:
        raise EngineFailure(
            f"an engine sampled with version {generation.versions.min()} where the run "
            f"is at {version}: its weights were not updated"
        )


def replies_of(chat: Chat, sample: Sample) -> list[str]:
    """The policy's turns of a sample as text, without their end tokens."""
    response = sample.tokens[sample.prompt_length :]
    replies = []
    for start in map(int, sample.turn_starts):
        others = np.flatnonzero(sample.loss_mask[start:] == 0)
        end = start + (int(others[0]) if len(others) else len(response) - start)
        later = [int(s) for s in sample.turn_starts if s > start]
        turn = response[start : min([end, *later])]
        ended = len(turn) > 0 and int(turn[-1]) == chat.end_id
        replies.append(chat.text(turn[: len(turn) - int(ended)]))
    return replies


def check_samples(
    samples: object,
    task: AgentTask,
    max_new_tokens: int,
    *,
    routes: bool = False,
    prompts: PromptBound | None = None,
) -> list[Sample]:
    """What a program returned, if it can be trained on; ValueError says why it cannot.

    routes: what is trained must carry them. prompts: the longest that can be trained on.
    """
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"returned {type(samples).__name__}; a list of at least one Sample")
    for sample in samples:
        if not isinstance(sample, Sample):
            raise ValueError(f"returned a {type(sample).__name__} where a Sample is wanted")
        sample.group_id, sample.index = task.group_id, task.index
        sample.check()
        if prompts is not None:
            prompts.check(sample.prompt_length)
        if not 1 <= sample.response_length <= max_new_tokens:
            raise ValueError(
                f"a response has {sample.response_length} tokens; "
                f"rollout.sampling.max_new_tokens={max_new_tokens} allows 1 to so many"
            )
        if routes and sample.routes is None and sample.loss_mask.any():
            raise ValueError(
                "a sample has no routes, which rollout.engine.return_routes=true wants: give "
                "add_reply(..., routes=generation.routes) of every turn"
            )
    return samples
