"""What is refused of the task, its reward and its filters. Imports the user's own code."""

import asyncio
from collections.abc import Iterator
from random import Random

from framework.config import RunConfig
from framework.mixture_checks import as_run, named_domains, named_sets, relabel
from framework.preference_checks import COMPARING, preference_data_errors
from rollout.agents import find_generate
from rollout.agents.black_box import find_agent
from rollout.config import AgentConfig
from rollout.conversations import Conversations
from rollout.data import PromptStream
from rollout.environments import Environment
from rollout.eval_overlap import check_overlap
from rollout.eval_sets import EvalSettings
from rollout.filters import GroupFilters
from rollout.programs import missing_program
from rollout.rewards import NEED_ANSWER, kinds_of, make_eval_reward, make_reward
from rollout.rewards.sandbox import SandboxError, run_sandboxed


def task_errors(config: RunConfig) -> Iterator[str]:
    """One line for each that is wrong, of every domain and every set of evaluation prompts."""
    errors = [*_domain_errors(config)]
    for each in named_sets(config):
        errors += [relabel(each, error) for error in _set_errors(as_run(config, each), each)]
    yield from errors
    if errors or config.mode == "eval" or config.data.path:
        return
    try:
        check_overlap(config.data, config.rollout, config.eval.sets, config.seed)
    except ValueError as error:
        yield str(error)


def _domain_errors(config: RunConfig) -> Iterator[str]:
    domains = named_domains(config)
    for domain in domains:
        yield from (relabel(domain, each) for each in _task_errors(as_run(config, domain)))
    if not domains:
        yield from _task_errors(config)


def _set_errors(config: RunConfig, of: EvalSettings) -> Iterator[str]:
    try:
        stream = PromptStream(config.data, of.seed, "eval")
        if not of.num_prompts and not stream.num_prompts:
            yield f"eval.sets.{of.name}.num_prompts=0: data.task={config.data.task} has no end"
        (environment,) = stream.environments(0, 1)
        yield from _reward_errors(config, environment)
    except (ValueError, ImportError) as error:
        said = str(error)
        yield said if said.startswith("data.") else f"data.task={config.data.task}: {said}"
    yield from _generate_errors(config)


def _task_errors(config: RunConfig) -> Iterator[str]:
    """The first prompt is made: the environment itself knows its arguments best."""
    supervised = config.stage == "sft" or config.warm_start.num_steps > 0
    if config.data.path and config.stage == "sft":
        try:
            Conversations(config.data)
        except ValueError as error:
            yield str(error)
        return
    if config.data.path:
        yield from preference_data_errors(config)
        return
    try:
        stream = PromptStream(config.data, config.seed, "sft" if supervised else "train")
        (environment,) = stream.environments(0, 1)
        if supervised:
            environment.demonstration()
        yield from _reward_errors(config, environment)
        if config.stage in COMPARING:
            environment.mistake(Random(config.seed))
    except (ValueError, ImportError) as error:
        said = str(error)
        yield said if said.startswith("data.") else f"data.task={config.data.task}: {said}"
    yield from _generate_errors(config)
    try:
        GroupFilters(config.rollout.filters)
    except ValueError as error:
        yield str(error)


def _reward_errors(config: RunConfig, environment: Environment) -> Iterator[str]:
    try:
        make_reward(config.data)
        make_eval_reward(config.data)
        kinds = kinds_of(config.data)
        if "code" in kinds:
            asyncio.run(run_sandboxed(""))
    except ValueError as error:
        yield str(error)
        return
    except SandboxError as error:
        yield f"data.reward=code: {error}"
        return
    need = [kind for kind in kinds if kind in NEED_ANSWER]
    if need and "answer" not in environment.describe():
        yield (
            f"data.reward={need[0]}: compares with an answer, but "
            f"data.task={config.data.task} describes none; use data.reward=environment"
        )


def _generate_errors(config: RunConfig) -> Iterator[str]:
    data, batch_timeout_s = config.data, config.rollout.batch_timeout_s
    if data.generate == "environment":
        return
    if data.generate == "agent":
        yield from _agent_errors(data.agent)
    else:
        try:
            find_generate(data.generate)
        except ValueError as error:
            yield f"data.generate={data.generate}: {error}"
    if data.episode_timeout_s >= batch_timeout_s:
        yield (
            f"data.episode_timeout_s={data.episode_timeout_s:g}: trainers would give up before a "
            f"hung episode does; less than rollout.batch_timeout_s={batch_timeout_s:g}"
        )


def _agent_errors(agent: AgentConfig) -> Iterator[str]:
    if bool(agent.command) == bool(agent.function):
        found = "both" if agent.command else "neither"
        yield f"data.generate=agent: one of data.agent.command and data.agent.function, not {found}"
    elif agent.function:
        try:
            find_agent(agent.function)
        except ValueError as error:
            yield f"data.agent.function={agent.function}: {error}"
    elif missing := missing_program(agent.command):
        yield f"data.agent.command={agent.command}: {missing}"
