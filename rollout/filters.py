"""Which groups are worth training on. A filter looks at one finished group and says why it should
be dropped; `keep_widest` looks at a whole step's groups.

A dropped group is replaced by another prompt's, so that steps stay as large as configured.
"""

from collections.abc import Callable, Sequence

import numpy as np

from rollout.own_code import look_up
from rollout.types import Group, Status

GroupFilter = Callable[[Group], str]
"""Why the group should be dropped, as a short name that is counted; "": keep it."""


class FilterFailure(RuntimeError):
    """A filter raised, or gave no reason that can be counted."""


def dynamic_sampling(group: Group) -> str:
    """Drop what has no advantage to give: a group all right or all wrong (DAPO, arXiv 2503.14476).

    Failed samples train nothing, so they say nothing here; nor does the penalty for long answers.
    """
    rewards = {round(s.task_reward, 9) for s in group.samples if s.status is not Status.FAILED}
    if not rewards:
        return "all_failed"
    if len(rewards) > 1:
        return ""
    (reward,) = rewards
    return "all_right" if reward >= 1 else "all_wrong" if reward <= 0 else "all_equal"


def failed(group: Group) -> str:
    """Drop a group of which a sample failed, instead of training on the others alone."""
    return "failed" if any(s.status is Status.FAILED for s in group.samples) else ""


FILTERS: dict[str, GroupFilter] = {"dynamic_sampling": dynamic_sampling, "failed": failed}


def find_filter(name: str) -> GroupFilter:
    """A row by its name, or a function of the user's own: package.module.function.

    Raises:
        ValueError: there is none such; one line, without the key.
    """
    found = look_up(FILTERS, name, "function")
    if not callable(found):
        raise ValueError("is no function of a group")
    return found


class GroupFilters:
    """The filters of a run, in order; the first that finds a reason decides."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises ValueError for a name that `find_filter` refuses, with its key."""
        self._filters: dict[str, GroupFilter] = {}
        for name in names:
            try:
                self._filters[name] = find_filter(name)
            except ValueError as error:
                raise ValueError(f"rollout.filters={name}: {error}") from error

    def reason(self, group: Group) -> str:
        """Why to drop the group, "" to keep it; FilterFailure names a filter that cannot say."""
        for name, find_reason in self._filters.items():
            try:
                why = find_reason(group)
            except Exception as error:  # somebody else's code: anything may come
                raise FilterFailure(
                    f"rollout.filters={name}: {type(error).__name__}: {error}"
                ) from error
            # It becomes the name of a figure: rollout/dropped/<why>.
            if not isinstance(why, str) or (why and not why.isidentifier()):
                raise FilterFailure(
                    f"rollout.filters={name}: gave {why!r}; a short name like too_easy is wanted, "
                    'or "" to keep the group'
                )
            if why:
                return why
        return ""


def keep_widest(groups: Sequence[Group], share: float) -> list[Group]:
    """The share of a step's groups whose rewards spread most, at least one, in their order.

    StarPO-S (RAGEN, arXiv 2504.20073): prompts of whose outcome the policy is unsure teach most.
    Equal spreads: the earlier group stays.
    """
    count = num_kept(len(groups), share)
    order = sorted(range(len(groups)), key=lambda k: -_spread(groups[k]))
    return [groups[k] for k in sorted(order[:count])]


def num_kept(num_groups: int, share: float) -> int:
    """How many of a step's groups `keep_widest` leaves."""
    return max(1, round(num_groups * share))


def _spread(group: Group) -> float:
    rewards = [s.reward for s in group.samples if s.status is not Status.FAILED]
    return float(np.std(rewards)) if rewards else -1.0  # teaches less than equal rewards do
