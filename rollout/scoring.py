"""Rewards into samples: of each as its episode ends, or of all of a group together."""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rollout.boundary import EpisodeError, boundary
from rollout.rewards import GroupReward, Reward, RewardFunction, Task
from rollout.types import Sample

Guard = Callable[[Awaitable, str], Awaitable]
"""Awaits foreign code within its bound; EpisodeError: what it raised, or that it is late."""


@dataclass(kw_only=True, slots=True)
class Played:
    """How an episode went."""

    sample: Sample
    task: Task | None
    """None: it failed, and is not scored."""


async def score(reward: RewardFunction, sample: Sample, task: Task, guard: Guard) -> None:
    """The reward and its components, into the sample. EpisodeError: there is none."""
    write(sample, await guard(reward(sample, task), "reward"))


async def score_group(
    reward: GroupReward, played: Sequence[Played], guard: Guard
) -> dict[int, EpisodeError]:
    """Rewards into all samples of a group that did not fail; why a place has none, by place."""
    there = {k: (each.sample, each.task) for k, each in enumerate(played) if each.task is not None}
    if not there:
        return {}
    samples, tasks = zip(*there.values(), strict=True)
    try:
        rewards = await guard(reward(samples, tasks), "reward")
    except EpisodeError as error:
        return dict.fromkeys(there, error)
    failed = {}
    for k, sample, found in zip(there, samples, rewards, strict=True):
        try:
            write(sample, found)
        except EpisodeError as error:
            failed[k] = error
    return failed


def write(sample: Sample, reward: Reward) -> None:
    """EpisodeError where what was given is no reward, or no finite one."""
    with boundary("reward"):
        sample.reward = float(reward.value)
        sample.rewards = {str(k): float(v) for k, v in reward.components.items()}
    for name, value in {"reward": sample.reward, **sample.rewards}.items():
        if not np.isfinite(value):
            raise EpisodeError(f"{name} is {value}")


def number_samples(samples: list[Sample]) -> list[Sample]:
    """Places in their groups, in order: an episode may have given several samples."""
    places: Counter[int] = Counter()
    for sample in samples:
        sample.index = places[sample.group_id]
        places[sample.group_id] += 1
    return samples
