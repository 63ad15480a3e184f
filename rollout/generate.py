"""Episodes: environments talk with the engines, turn by turn, and become samples.

All episodes of one call share their first engine request (a group, or a chunk of evaluation
prompts); later turns go on by themselves, so a slow environment delays only its own sample.
This is the boundary at which a failing environment or reward becomes a counted status.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from rollout.agents.engine import (
    AgentTask,
    GenerateFunction,
    PolicyEngine,
    check_samples,
    check_version,
    replies_of,
)
from rollout.bounds import Bound
from rollout.client import EngineClient, Generation
from rollout.config import SamplingConfig
from rollout.environments import Environment
from rollout.environments.base import ROLES, Message, is_message
from rollout.rewards import RewardFunction, Task
from rollout.seeds import derive_seed
from rollout.teacher import Teacher
from rollout.tokens import Chat, Transcript
from rollout.types import Sample, Status

T = TypeVar("T")
logger = logging.getLogger(__name__)


async def run_together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failures:
        first: Exception = failures
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [task.result() for task in tasks]


class _EpisodeError(Exception):
    """Environment or reward failed; the message says how."""


@contextlib.contextmanager
def _boundary(what: str) -> Iterator[None]:
    """Around foreign code and the use of what it gave: all that goes wrong is an _EpisodeError.

    sys.exit() of an environment is its own end, not ours. A CancelledError that nobody sent us is
    its own as well: it would end our task without a word, and its group would never come.
    """
    try:
        yield
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
            raise
        raise _EpisodeError(f"{what}: {type(error).__name__}: {error}") from error


def _check_messages(messages: Iterable[Message]) -> None:
    """ValueError where a template would render something else than was meant."""
    for message in messages:
        if not is_message(message):
            raise ValueError(
                f"message {message!r}: role ({', '.join(ROLES)}) and content, a text, are wanted"
            )


@dataclass(kw_only=True, slots=True)
class Episode:
    """One conversation in the making."""

    environment: Environment
    group_id: int
    index: int
    seed: int
    """Of its first turn; later turns derive theirs from it."""


@dataclass(kw_only=True, slots=True)
class Generator:
    """What every episode needs."""

    client: EngineClient
    chat: Chat
    sampling: SamplingConfig
    reward: RewardFunction
    timeout_s: float
    """Bound of each call of an environment or reward."""
    play: GenerateFunction | None = None
    """A program of the user's own plays the episodes; None: their environments' turns."""
    episode_timeout_s: float = 300.0
    """Bound of an episode that `play` plays."""
    places: asyncio.Semaphore | None = None
    """How many calls of foreign code run at a time."""
    teacher: Teacher | None = None
    """Whose log-probs the samples are to carry."""
    routes: bool = False
    """Samples carry the experts that the engine chose."""

    async def run(self, episodes: list[Episode], version: int) -> list[Sample]:
        """Samples of the episodes, in order; with `play` of an episode one or several.

        `version`: the least one their tokens may have.
        Raises EngineFailure; failures of environments and rewards are statuses of the samples.
        """
        samples = await self._samples(episodes, version)
        return samples if self.teacher is None else await self.teacher.score(samples)

    async def _samples(self, episodes: list[Episode], version: int) -> list[Sample]:
        if self.play is not None:
            played = await run_together(self._play(episode, version) for episode in episodes)
            return _numbered([sample for samples in played for sample in samples])
        prompts = await asyncio.gather(*(self._prompt(episode) for episode in episodes))
        started = [k for k, prompt in enumerate(prompts) if not isinstance(prompt, _EpisodeError)]
        generations = (
            await self.client.generate(
                [prompts[k] for k in started],  # pyright: ignore[reportArgumentType]
                self.sampling,
                [episodes[k].seed for k in started],
                routes_from=0 if self.routes else None,
            )
            if started
            else []
        )
        first = dict(zip(started, generations, strict=True))
        return await run_together(
            self._episode(episode, prompts[k], first.get(k), version)
            for k, episode in enumerate(episodes)
        )

    async def _prompt(self, episode: Episode) -> "list[int] | _EpisodeError":
        try:
            messages = await self._guard(episode.environment.initial_messages(), "prompt")
            with _boundary("prompt"):
                _check_messages(messages)
                if tokens := self.chat.prompt(messages):
                    return tokens
            raise _EpisodeError(f"prompt: {messages} has no tokens")
        except _EpisodeError as error:
            return error

    async def _episode(
        self,
        episode: Episode,
        prompt: "list[int] | _EpisodeError",
        first: Generation | None,
        version: int,
    ) -> Sample:
        if isinstance(prompt, _EpisodeError) or first is None:
            return self._failed(episode, self._nothing(), str(prompt))
        transcript = Transcript(prompt)
        try:
            task, status = await self._converse(episode, transcript, first, version)
            sample = transcript.sample(
                group_id=episode.group_id,
                index=episode.index,
                status=status,
                metadata=task.description,
            )
            await self._score(sample, task)
        except _EpisodeError as error:
            return self._failed(episode, transcript, str(error))
        sample.check()
        return sample

    async def _score(self, sample: Sample, task: Task) -> None:
        """The reward and its components, into the sample."""
        reward = await self._guard(self.reward(sample, task), "reward")
        with _boundary("reward"):
            sample.reward = float(reward.value)
            sample.rewards = {str(k): float(v) for k, v in reward.components.items()}
        for name, value in {"reward": sample.reward, **sample.rewards}.items():
            if not np.isfinite(value):
                raise _EpisodeError(f"{name} is {value}")

    async def _play(self, episode: Episode, version: int) -> list[Sample]:
        """The samples of an episode that a program plays; its failure is one failed sample."""
        assert self.play is not None
        engine = PolicyEngine(
            self.client,
            self.chat,
            episode_seed=episode.seed,
            version=version,
            routes=self.routes,
        )
        task = AgentTask(
            environment=episode.environment,
            group_id=episode.group_id,
            index=episode.index,
            seed=episode.seed,
        )
        try:
            with _boundary("describe"):
                description = {str(k): str(v) for k, v in task.environment.describe().items()}
            played = self.play(engine, task, self.sampling)
            found = await self._guard(played, "generate", self.episode_timeout_s)
            with _boundary("generate"):
                samples = check_samples(
                    found, task, self.sampling.max_new_tokens, routes=self.routes
                )
            for sample in samples:
                sample.metadata = description | sample.metadata
                await self._score(
                    sample,
                    Task(
                        description=description,
                        replies=replies_of(self.chat, sample),
                        environment_reward=float(sample.reward),
                    ),
                )
        except _EpisodeError as error:
            samples = [self._failed(episode, self._nothing(), str(error))]
        if engine.failure is not None:
            raise engine.failure
        return samples

    async def _converse(
        self, episode: Episode, transcript: Transcript, generation: Generation, version: int
    ) -> tuple[Task, Status]:
        """Turns until the environment is done or the token budget is spent."""
        environment = episode.environment
        with _boundary("describe"):
            description = {str(k): str(v) for k, v in environment.describe().items()}
            state = str(environment.state())
        task = Task(description=description, replies=[], environment_reward=0.0)
        while True:
            check_version(generation, version)
            transcript.add_reply(
                generation.token_ids.tolist(),
                generation.logprobs.tolist(),
                generation.versions.tolist(),
                state,
                generation.routes,
            )
            end = len(generation.token_ids) - int(generation.end_token)
            task.replies.append(self.chat.text(generation.token_ids[:end]))
            if generation.finish == "length":
                return task, Status.TRUNCATED
            step = await self._guard(environment.step(task.replies[-1]), "step")
            with _boundary("step"):
                task.environment_reward += float(step.reward)
                transcript.pay(float(step.reward))
                if step.done:
                    return task, Status.STOPPED
                state = str(environment.state())
                _check_messages(step.messages)
                observation = self.chat.continuation(step.messages, ended=generation.end_token)
            budget = self.sampling.max_new_tokens - transcript.response_length - len(observation)
            if budget < 1:  # no answer would fit: what nobody answers to is not kept either
                return task, Status.TRUNCATED
            transcript.add_observation(observation)
            (generation,) = await self.client.generate(
                [transcript.tokens],
                replace(self.sampling, max_new_tokens=budget),
                [derive_seed(episode.seed, "turn", len(task.replies))],
                routes_from=transcript.num_routes if self.routes else None,
            )

    async def _guard(self, call: Awaitable[T], what: str, timeout_s: float | None = None) -> T:
        """Await foreign code within its bound; whatever it raises becomes an _EpisodeError."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        async with self.places or contextlib.nullcontext():  # waiting for a place is not its time
            bound = Bound(limit)
            try:
                with _boundary(what):
                    async with bound:
                        return await call
            except _EpisodeError:
                if bound.expired():
                    raise _EpisodeError(f"{what}: no answer within {limit:g} s") from None
                raise

    def _nothing(self) -> Transcript:
        """Where nothing was sampled: a placeholder of one token each, which trains nothing."""
        transcript = Transcript([self.chat.end_id])
        transcript.add_observation([self.chat.end_id])
        return transcript

    def _failed(self, episode: Episode, transcript: Transcript, reason: str) -> Sample:
        logger.warning("sample %d/%d failed: %s", episode.group_id, episode.index, reason)
        sample = transcript.sample(group_id=episode.group_id, index=episode.index)
        return failed_sample(sample, reason)


def failed_sample(sample: Sample, reason: str) -> Sample:
    """The sample as one that trains nothing and says why."""
    return replace(
        sample,
        status=Status.FAILED,
        metadata={"error": reason},
        reward=0.0,
        rewards={},
        loss_mask=np.zeros_like(sample.loss_mask),
        rollout_logprobs=np.zeros_like(sample.rollout_logprobs),
        versions=np.full_like(sample.versions, -1),
        teacher_logprobs=_zeros(sample.teacher_logprobs),
        teacher_top_ids=_zeros(sample.teacher_top_ids),
        teacher_top_logprobs=_zeros(sample.teacher_top_logprobs),
        routes=None,
    )


def _zeros(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else np.zeros_like(values)


def _numbered(samples: list[Sample]) -> list[Sample]:
    """Places in their groups, in order: an episode may have given several samples."""
    places: Counter[int] = Counter()
    for sample in samples:
        sample.index = places[sample.group_id]
        places[sample.group_id] += 1
    return samples
