"""DAPO's soft punishment of long answers, around any reward (arXiv 2503.14476, equation 13)."""

from rollout.rewards.base import Reward, RewardFunction, Task
from rollout.rewards.group import GroupReward
from rollout.types import Sample


def punish_overlong(
    reward: RewardFunction | GroupReward, *, max_tokens: int, share: float, penalty: float
) -> RewardFunction | GroupReward:
    """The reward less `penalty` times how far the response reaches into the last `share` of its
    budget of max_tokens: 0 up to there, then linear, 1 at the end. Component `overlong`.

    Deviation: a response is never longer than its budget, so the paper's third case is the end of
    the second. Turns of the environment count, as they do in the budget.
    """
    cache = share * max_tokens

    def less(found: Reward, sample: Sample) -> Reward:
        excess = sample.response_length - (max_tokens - cache)
        overlong = -penalty * min(max(excess / cache, 0.0), 1.0)
        return Reward(
            value=found.value + overlong, components={**found.components, "overlong": overlong}
        )

    if isinstance(reward, GroupReward):
        of_group = reward

        async def punished_group(samples: list[Sample], tasks: list[Task]) -> list[Reward]:
            return [*map(less, await of_group(samples, tasks), samples)]

        return GroupReward(punished_group)
    of_one = reward

    async def punished(sample: Sample, task: Task) -> Reward:
        return less(await of_one(sample, task), sample)

    return punished
