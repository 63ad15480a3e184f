"""What a run generates groups of: one task with its own prompts, episodes and filters."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from rollout.agents.players import places, player
from rollout.buffer_state import Lease
from rollout.client import EngineClient
from rollout.config import DataConfig, RolloutRun, SamplingConfig
from rollout.data import PromptStream
from rollout.eval_overlap import check_overlap
from rollout.eval_sets import EvalSettings, read_sets
from rollout.evaluate import EvalSet
from rollout.filters import GroupFilters
from rollout.generate import Episode, Generator
from rollout.greedy import run_with_baseline
from rollout.mixture import DomainSettings, domain_seed, read_domains
from rollout.prompt_bound import bound_prompts
from rollout.rewards import (
    environment_weight,
    make_eval_reward,
    make_reward,
    punish_overlong,
)
from rollout.rewards.endpoint import FindSideModel
from rollout.scoring import number_samples
from rollout.seeds import derive_seed
from rollout.teacher import Teacher
from rollout.tokens import Chat
from rollout.types import Sample


@dataclass(kw_only=True, slots=True)
class Domain:
    """One task of a run; a run without data.mixture has one, of no name."""

    name: str = ""
    prompts: PromptStream
    generator: Generator
    filters: GroupFilters
    samples_per_prompt: int
    seed: int
    max_running_groups: int
    """Its own: the groups of a slow task take no place of another one's."""
    greedy_baseline: bool = False
    num_running: int = 0

    async def generate(self, lease: Lease, prompt: int) -> list[Sample]:
        """The samples of a leased group, of this prompt. Raises EngineFailure."""
        count = self.samples_per_prompt
        environments = self.prompts.environments(prompt, count + self.greedy_baseline)
        episodes = [
            Episode(
                environment=environment,
                group_id=lease.group_id,
                index=index,
                seed=derive_seed(self.seed, lease.group_id, index, lease.start_version),
            )
            for index, environment in enumerate(environments)
        ]
        if self.greedy_baseline:
            samples = await run_with_baseline(self.generator, episodes, lease.start_version)
        else:
            samples = await self.generator.run(episodes, lease.start_version)
        for sample in samples:
            sample.domain = self.name
        return number_samples(samples)


@dataclass(kw_only=True, slots=True)
class TaskPrompts:
    """What a run's tasks ask, before anybody is there to answer."""

    domains: list[tuple[DomainSettings, PromptStream]]
    sets: list[tuple[EvalSettings, PromptStream]]

    @classmethod
    def of(cls, run: RolloutRun) -> "TaskPrompts":
        """The tasks of a run; ValueError: one cannot be made as configured."""
        domains = read_domains(run.data, run.rollout).values()
        sets = read_sets(run.eval.sets, run.data, run.rollout, run.seed)
        found = cls(
            domains=[
                (each, PromptStream(each.data, domain_seed(run.seed, each.name), "train"))
                for each in domains
            ],
            sets=[(each, PromptStream(each.data, each.seed, "eval")) for each in sets],
        )
        for settings, stream in found.domains:
            stream.environments(0, 1)
            make_reward(settings.data)
            make_eval_reward(settings.data)
            GroupFilters(settings.filters)
        for settings, stream in found.sets:
            if not settings.in_total:  # those are the domains' own
                stream.environments(0, 1)
                make_reward(settings.data)
                make_eval_reward(settings.data)
        if run.mode != "eval":  # which trains nothing
            check_overlap(run.data, run.rollout, run.eval.sets, run.seed)
        return found


@contextlib.asynccontextmanager
async def open_tasks(
    prompts: TaskPrompts,
    run: RolloutRun,
    *,
    token: str,
    client: EngineClient,
    chat: Chat,
    find: FindSideModel,
    teacher: Teacher | None,
) -> AsyncIterator[tuple[list[Domain], list[EvalSet]]]:
    """The domains and the evaluation sets of a run, with the endpoints that their agents need.

    find: where side models are. teacher: whose log-probs the samples of the domains carry.
    """
    engine, per_group = run.rollout.engine, run.rollout.samples_per_prompt
    capacity = engine.num_engines * engine.max_running_requests
    async with contextlib.AsyncExitStack() as stack:

        async def generator(data: DataConfig, sampling: SamplingConfig) -> Generator:
            play = await stack.enter_async_context(
                player(data, replace(run.rollout, sampling=sampling), token)
            )
            return Generator(
                client=client,
                chat=chat,
                sampling=sampling,
                reward=make_reward(data, find),
                environment_weight=environment_weight(data),
                timeout_s=data.timeout_s,
                play=play,
                episode_timeout_s=data.episode_timeout_s,
                places=places(data),
            )

        domains, generators = [], {}
        for each, stream in prompts.domains:
            generators[each.name] = found = await generator(each.data, each.sampling)
            domains.append(
                Domain(
                    name=each.name,
                    prompts=stream,
                    generator=replace(
                        _punished(found, each.data),
                        teacher=teacher,
                        routes=engine.return_routes,
                        prompts=bound_prompts(
                            run.batch,
                            cp=run.parallel.cp,
                            max_new_tokens=each.sampling.max_new_tokens,
                        ),
                    ),
                    filters=GroupFilters(each.filters),
                    samples_per_prompt=per_group,
                    seed=run.seed,
                    # Twice what the engines compute at a time: their queues never run dry.
                    max_running_groups=each.max_running_groups or 2 * max(1, capacity // per_group),
                    greedy_baseline=run.rollout.greedy_baseline,
                )
            )
        sets = []
        for each, stream in prompts.sets:
            found = (
                replace(generators[each.name], sampling=each.sampling)
                if each.in_total
                else await generator(each.data, each.sampling)
            )
            if reward := make_eval_reward(each.data):
                found = replace(found, reward=reward)
            sets.append(EvalSet(settings=each, prompts=stream, generator=found))
        yield domains, sets


def _punished(generator: Generator, data: DataConfig) -> Generator:
    """Of training alone: accuracy is of what the task itself says."""
    if not data.overlong_share:
        return generator
    reward = punish_overlong(
        generator.reward,
        max_tokens=generator.sampling.max_new_tokens,
        share=data.overlong_share,
        penalty=data.overlong_penalty,
    )
    return replace(generator, reward=reward)
