"""The rewards by name: each `async (sample, task) -> Reward`."""

import inspect
from collections.abc import Callable
from typing import Any

from rollout.config import DataConfig
from rollout.own_code import look_up
from rollout.rewards.base import Reward, RewardFunction, Task
from rollout.rewards.code import code
from rollout.rewards.endpoint import FindSideModel, Service
from rollout.rewards.group import GroupReward, is_of_groups
from rollout.rewards.overlong import punish_overlong
from rollout.rewards.rules import environment, exact_match, match_and_length, math_answer
from rollout.rewards.services import http, judge, reward_model
from rollout.rewards.weighted import RewardTerm, read_terms, weighted

__all__ = [
    "NEED_ANSWER",
    "REWARDS",
    "SERVICES",
    "GroupReward",
    "Reward",
    "RewardFunction",
    "Task",
    "environment_weight",
    "find_reward",
    "kinds_of",
    "make_eval_reward",
    "make_reward",
    "punish_overlong",
]

REWARDS: dict[str, RewardFunction] = {
    "code": code,
    "environment": environment,
    "exact_match": exact_match,
    "match_and_length": match_and_length,
    "math": math_answer,
}
SERVICES: dict[str, Callable[..., RewardFunction]] = {
    "http": http,
    "judge": judge,
    "reward_model": reward_model,
}
"""Makers of rewards that somebody else computes: of a Service, and of the rest of
`data.rewards.<name>.args`."""
WHERE = ("url", "api_key", "side_model")
"""Arguments that say whom to ask."""
NEED_ANSWER = ("code", "exact_match", "match_and_length", "math")
"""Those that compare with the answer of the environment's `describe()`."""


def find_reward(name: str) -> RewardFunction | GroupReward:
    """A row by its name, or a function of the user's own: package.module.function.

    Raises:
        ValueError: there is none such; one line, without the key.
    """
    found: Any = look_up(REWARDS, name, "function")
    if not inspect.iscoroutinefunction(found) or len(inspect.signature(found).parameters) != 2:
        raise ValueError(
            "is not an `async def` of (sample, task), or for whole groups of (samples, tasks)"
        )
    return GroupReward(found) if is_of_groups(found) else found


def make_reward(
    data: DataConfig, find: FindSideModel | None = None
) -> RewardFunction | GroupReward:
    """The run's reward: `data.rewards`, or `data.reward` where there are none.

    find: where side models are; None: the rewards are only to be checked.

    Raises:
        ValueError: what is wrong, with its key.
    """
    if not data.rewards:
        return _named("data.reward", data.reward)
    terms = {}
    for name, term in read_terms(data.rewards).items():
        if term.bound_s > data.timeout_s:
            raise ValueError(
                f"data.rewards.{name}.timeout_s={term.timeout_s:g}: with {term.max_retries} "
                f"retries up to {term.bound_s:g} s, beyond data.timeout_s={data.timeout_s:g}"
            )
        try:
            if term.kind in SERVICES:
                reward = _of_service(term, find)
            elif term.args:
                raise ValueError("only services take args")
            else:
                reward = find_reward(term.kind)
            if isinstance(reward, GroupReward):
                raise ValueError(
                    "a reward of whole groups, (samples, tasks), is data.reward by itself; one of "
                    "several takes (sample, task)"
                )
        except (TypeError, ValueError) as error:
            raise ValueError(f"data.rewards.{name}, kind={term.kind}: {error}") from error
        terms[name] = (term, reward)
    return weighted(terms)


def environment_weight(data: DataConfig) -> float:
    """How much of what the environment pays for a turn is part of the run's reward: where another
    reward takes its place, nothing."""
    if not data.rewards:
        return float(data.reward == "environment")
    terms = read_terms(data.rewards).values()
    return sum(term.weight for term in terms if term.kind == "environment")


def make_eval_reward(data: DataConfig) -> RewardFunction | GroupReward | None:
    """What evaluations count, where that is something else than the run's reward.

    Raises:
        ValueError: what is wrong, with its key.
    """
    return _named("data.eval_reward", data.eval_reward) if data.eval_reward else None


def _named(key: str, name: str) -> RewardFunction | GroupReward:
    try:
        return find_reward(name)
    except ValueError as error:
        raise ValueError(f"{key}={name}: {error}") from error


def _of_service(term: RewardTerm, find: FindSideModel | None) -> RewardFunction:
    where = {name: term.args[name] for name in WHERE if name in term.args}
    for name, value in where.items():
        if not isinstance(value, str):
            raise ValueError(f"args.{name}={value!r}: must be a text")
    rest = {name: value for name, value in term.args.items() if name not in WHERE}
    return SERVICES[term.kind](Service(**where, find=find), **rest)


def kinds_of(data: DataConfig) -> list[str]:
    """The kinds of reward that a run uses."""
    kinds = [term.kind for term in read_terms(data.rewards).values()] or [data.reward]
    return [*kinds, *([data.eval_reward] if data.eval_reward else [])]
