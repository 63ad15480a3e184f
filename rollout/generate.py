"""Episodes: environments talk with the engines, turn by turn, and become samples.

All episodes of one call share their first engine request (a group, or a chunk of evaluation
prompts); later turns go on by themselves, so a slow environment delays only its own sample.
This is the boundary at which a failing environment or reward becomes a counted status.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rollout.agents.engine import (
    AgentTask,
    GenerateFunction,
    PolicyEngine,
    check_samples,
    check_version,
    replies_of,
)
from rollout.boundary import (
    EpisodeError,
    boundary,
    check_messages,
    close_environment,
    failed_sample,
    guarded,
)
from rollout.client import EngineClient, EngineRefusal, Generation
from rollout.config import SamplingConfig
from rollout.environments import Environment
from rollout.prompt_bound import PromptBound
from rollout.rewards import GroupReward, RewardFunction, Task
from rollout.scoring import Played, score, score_group
from rollout.seeds import derive_seed
from rollout.teacher import Teacher
from rollout.together import ask_all, run_together
from rollout.tokens import Chat, Transcript
from rollout.types import Sample, Status

T = TypeVar("T")
logger = logging.getLogger(__name__)


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
    reward: RewardFunction | GroupReward
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
    prompts: PromptBound | None = None
    """The longest that can be trained on; None: nothing is trained."""
    environment_weight: float = 1.0
    """Of what the environment pays for a turn, in the reward."""

    async def run(self, episodes: list[Episode], version: int) -> list[Sample]:
        """Samples of the episodes, in order; with `play` of an episode one or several, all of its
        index.

        `version`: the least one their tokens may have.
        Raises EngineFailure; failures of environments and rewards are statuses of the samples.
        """
        try:
            samples = await self._samples(episodes, version)
        finally:
            for episode in episodes:  # also of those that never began
                close_environment(episode.environment)
        return samples if self.teacher is None else await self.teacher.score(samples)

    async def _samples(self, episodes: list[Episode], version: int) -> list[Sample]:
        if self.play is not None:
            found = await run_together(self._play(episode, version) for episode in episodes)
            played = [each for of_episode in found for each in of_episode]
        else:
            played = await self._converse_all(episodes, version)
        if isinstance(self.reward, GroupReward):
            await self._score_groups(self.reward, played)
        samples = [each.sample for each in played]
        for sample in samples:
            sample.turn_rewards = [self.environment_weight * each for each in sample.turn_rewards]
        return samples

    async def _converse_all(self, episodes: list[Episode], version: int) -> list[Played]:
        prompts = await asyncio.gather(*(self._prompt(episode) for episode in episodes))
        asked = [k for k, prompt in enumerate(prompts) if isinstance(prompt, list)]

        async def ask(which: Sequence[int]) -> list[Generation]:
            return await self.client.generate(
                [prompt for k in which if isinstance(prompt := prompts[k], list)],
                self.sampling,
                [episodes[k].seed for k in which],
                routes_from=0 if self.routes else None,
            )

        # A prompt that the engine does not take costs its own episode, no other.
        said = await ask_all(ask, asked, EngineRefusal) if asked else []
        first = dict(zip(asked, said, strict=True))
        return await run_together(
            self._episode(episode, prompts[k], first.get(k), version)
            for k, episode in enumerate(episodes)
        )

    async def _prompt(self, episode: Episode) -> list[int] | EpisodeError:
        try:
            messages = await self._guard(episode.environment.initial_messages(), "prompt")
            with boundary("prompt"):
                check_messages(messages)
                tokens = self.chat.prompt(messages)
                if self.prompts is not None:
                    self.prompts.check(len(tokens))
            if tokens:
                return tokens
            raise EpisodeError(f"prompt: {messages} has no tokens")
        except EpisodeError as error:
            return error

    async def _episode(
        self,
        episode: Episode,
        prompt: list[int] | EpisodeError,
        first: Generation | EngineRefusal | None,
        version: int,
    ) -> Played:
        if isinstance(prompt, EpisodeError) or not isinstance(first, Generation):
            reason = prompt if isinstance(prompt, EpisodeError) else f"prompt: {first}"
            return self._lost(episode, self._nothing(), str(reason))
        transcript = Transcript(prompt)
        try:
            task, status = await self._converse(episode, transcript, first, version)
            sample = transcript.sample(
                group_id=episode.group_id,
                index=episode.index,
                status=status,
                metadata=task.description,
            )
            played = await self._score(sample, task)
            with boundary("sample"):
                sample.check()
        except EpisodeError as error:
            return self._lost(episode, transcript, str(error))
        finally:
            close_environment(episode.environment)
        return played

    async def _score(self, sample: Sample, task: Task) -> Played:
        """A reward of whole groups is asked once all are there."""
        if not isinstance(self.reward, GroupReward):
            await score(self.reward, sample, task, self._guard)
        return Played(sample=sample, task=task)

    async def _score_groups(self, reward: GroupReward, played: list[Played]) -> None:
        """Of each group by itself: an evaluation's request has many."""
        groups: dict[int, list[Played]] = {}
        for each in played:
            groups.setdefault(each.sample.group_id, []).append(each)
        calls = (score_group(reward, each, self._guard) for each in groups.values())
        for members, failed in zip(groups.values(), await run_together(calls), strict=True):
            for k, error in failed.items():
                members[k].sample = self._failed(members[k].sample, str(error))

    async def _play(self, episode: Episode, version: int) -> list[Played]:
        """The samples of an episode that a program plays; its failure is one failed sample."""
        assert self.play is not None
        engine = PolicyEngine(
            self.client,
            self.chat,
            episode_seed=episode.seed,
            version=version,
            routes=self.routes,
            prompts=self.prompts,
        )
        task = AgentTask(
            environment=episode.environment,
            group_id=episode.group_id,
            index=episode.index,
            seed=episode.seed,
        )
        try:
            with boundary("describe"):
                description = {str(k): str(v) for k, v in task.environment.describe().items()}
            playing = self.play(engine, task, self.sampling)
            found = await self._guard(playing, "generate", self.episode_timeout_s)
            with boundary("generate"):
                samples = check_samples(
                    found,
                    task,
                    self.sampling.max_new_tokens,
                    routes=self.routes,
                    prompts=self.prompts,
                )
            played = []
            for sample in samples:
                sample.metadata = description | sample.metadata
                scored = Task(
                    description=description,
                    replies=replies_of(self.chat, sample),
                    environment_reward=float(sample.reward),
                )
                played.append(await self._score(sample, scored))
        except EpisodeError as error:
            played = [self._lost(episode, self._nothing(), str(error))]
        finally:
            close_environment(episode.environment)
        if engine.failure is not None:
            raise engine.failure
        return played

    async def _converse(
        self, episode: Episode, transcript: Transcript, generation: Generation, version: int
    ) -> tuple[Task, Status]:
        """Turns until the environment is done or the token budget is spent."""
        environment = episode.environment
        with boundary("describe"):
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
            with boundary("step"):
                paid = float(step.reward)
                if not math.isfinite(paid):
                    raise ValueError(f"the reward is {paid}; a finite number is wanted")
                task.environment_reward += paid
                transcript.pay(paid)
                if step.done:
                    return task, Status.STOPPED
                state = str(environment.state())
                check_messages(step.messages)
                observation = self.chat.continuation(step.messages, ended=generation.end_token)
            budget = self.sampling.max_new_tokens - transcript.response_length - len(observation)
            if budget < 1:  # no answer would fit: what nobody answers to is not kept either
                return task, Status.TRUNCATED
            transcript.add_observation(observation)
            try:
                (generation,) = await self.client.generate(
                    [transcript.tokens],
                    replace(self.sampling, max_new_tokens=budget),
                    [derive_seed(episode.seed, "turn", len(task.replies))],
                    routes_from=transcript.num_routes if self.routes else None,
                )
            except EngineRefusal as error:  # longer than its context
                raise EpisodeError(f"turn {len(task.replies)}: {error}") from error

    async def _guard(self, call: Awaitable[T], what: str, timeout_s: float | None = None) -> T:
        """Await foreign code within its bound; whatever it raises becomes an EpisodeError."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        return await guarded(call, what, limit_s, self.places)

    def _nothing(self) -> Transcript:
        """Where nothing was sampled: a placeholder of one token each, which trains nothing."""
        transcript = Transcript([self.chat.end_id])
        transcript.add_observation([self.chat.end_id])
        return transcript

    def _lost(self, episode: Episode, transcript: Transcript, reason: str) -> Played:
        sample = transcript.sample(group_id=episode.group_id, index=episode.index)
        return Played(sample=self._failed(sample, reason), task=None)

    def _failed(self, sample: Sample, reason: str) -> Sample:
        logger.warning("sample %d/%d failed: %s", sample.group_id, sample.index, reason)
        return failed_sample(sample, reason)
