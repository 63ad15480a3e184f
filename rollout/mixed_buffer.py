"""The buffers of a run's domains as one: every step has each domain's share of its groups.

Each domain has a DataBuffer of its own, whose steps are as large as its shares (rollout.shares), so
bound, replacement of what is dropped, and the order of batches hold for every domain by itself. A
domain is never behind or ahead in the ratio: a step waits for whatever lacks a group of it, while
others generate on, up to the staleness bound. Group ids of domain k of n are k, k + n, k + 2n, ...
A run without a mixture has one domain, "".
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rollout.buffer import DataBuffer
from rollout.buffer_state import BufferState, Lease
from rollout.config import CurriculumConfig
from rollout.shares import Shares, SharesState
from rollout.types import Group, Sample, Status


@dataclass(kw_only=True, slots=True)
class MixedState:
    """Everything that a mixed buffer holds, as it is saved."""

    domains: dict[str, BufferState]
    shares: SharesState

    @property
    def version(self) -> int:
        """Of every domain; -1: nothing was published."""
        return next((state.version for state in self.domains.values()), -1)

    @property
    def next_step(self) -> int:
        """Of every domain: the first step that is not delivered."""
        return next((state.next_step for state in self.domains.values()), 0)

    def accepted(self) -> list[Group]:
        """Finished groups that wait for their step."""
        return [group for state in self.domains.values() for group in state.accepted]

    def check(self) -> None:
        """Raise ValueError where its parts do not fit each other."""
        names, lengths = list(self.domains), {len(each) for each in self.shares.through.values()}
        tables = (self.shares.before, self.shares.through, self.shares.credits)
        if not names or len(lengths) != 1 or any(list(table) != names for table in tables):
            raise ValueError(f"rollout state: domains {names} without shares of their own")
        for name, state in self.domains.items():
            if (state.version, state.next_step) != (self.version, self.next_step):
                raise ValueError(
                    f"rollout state: domain {name} is at version {state.version} before step "
                    f"{state.next_step}, {names[0]} at version {self.version} before step "
                    f"{self.next_step}"
                )
        if self.version > self.next_step:
            raise ValueError(
                f"rollout state: version {self.version} comes after step {self.next_step}, which "
                "is next"
            )


class MixedBuffer:
    """Groups of all domains between their start and the step that trains them."""

    def __init__(
        self,
        *,
        groups_per_step: int,
        max_staleness_steps: int,
        num_steps: int | None = None,
        weights: Mapping[str, float] | None = None,
        curriculum: CurriculumConfig | None = None,
        oversample: float = 0.0,
    ) -> None:
        """weights: of the domains; None: there is one, "". The rest as for DataBuffer."""
        weights = weights or {"": 1.0}
        self.shares = Shares(weights, groups_per_step, curriculum)
        self._eta = max_staleness_steps
        self._num_steps = num_steps
        self._buffers = {
            name: DataBuffer(
                groups_per_step=self._counter(name),
                max_staleness_steps=max_staleness_steps,
                num_steps=num_steps,
                first_id=place,
                id_stride=len(weights),
                oversample=oversample,
            )
            for place, name in enumerate(weights)
        }
        self._some = next(iter(self._buffers.values()))

    def _counter(self, name: str) -> Callable[[int], int]:
        return lambda step: self.shares.through(name, step)

    @property
    def version(self) -> int:
        """Policy version that new groups start with; -1: none may start."""
        return self._some.version

    @property
    def next_step(self) -> int:
        """The first step that is not delivered."""
        return self._some.next_step

    @property
    def num_running(self) -> int:
        """Groups that are being generated."""
        return sum(buffer.num_running for buffer in self._buffers.values())

    @property
    def num_accepted(self) -> int:
        """Finished groups that wait for their step."""
        return sum(buffer.num_accepted for buffer in self._buffers.values())

    @property
    def dropped(self) -> dict[str, Counter[str]]:
        """Groups dropped since the last step: by domain, by reason."""
        return {name: buffer.dropped for name, buffer in self._buffers.items()}

    @property
    def num_dropped(self) -> int:
        """Of all domains since the last step."""
        return sum(counts.total() for counts in self.dropped.values())

    @property
    def aborted(self) -> list[int]:
        """Groups that the last step was taken without, running or finished (oversample)."""
        return [group_id for each in self._buffers.values() for group_id in each.aborted]

    def prompt_of(self, group_id: int) -> int:
        """The place of a group's prompt in its domain's stream."""
        return group_id // len(self._buffers)

    def publish(self, version: int) -> None:
        """A new policy version serves: more groups may start, and their steps get their shares."""
        self._decide(version)
        for buffer in self._buffers.values():
            buffer.publish(version)

    def lease(self, domain: str = "") -> Lease | None:
        """Start a group of a domain, or None while the staleness bound forbids it."""
        return self._buffers[domain].lease()

    def accept(self, group: Group, domain: str = "") -> None:
        """A running group is finished."""
        self._buffers[domain].accept(group)

    def drop(self, group: Group, why: str, domain: str = "") -> None:
        """A running group is finished and not wanted: another of its domain may start."""
        self._buffers[domain].drop(group.group_id, why)
        self._observe(domain, group)

    def may_take(self) -> bool:
        """Whether take() would give a batch now."""
        return all(buffer.may_take() for buffer in self._buffers.values())

    def take(self) -> dict[str, list[Group]] | None:
        """The groups of step `next_step` by domain, ordered by id; None while it must wait."""
        if not self.may_take():
            return None
        taken = {name: buffer.take() or [] for name, buffer in self._buffers.items()}
        for name, groups in taken.items():
            for group in groups:
                self._observe(name, group)
        self.shares.delivered()
        return taken

    def blockers(self) -> list[int]:
        """Running groups, oldest first: what a waiting step waits for. Domains that lack nothing
        come last."""
        order = sorted(self._buffers.values(), key=lambda buffer: buffer.may_take())
        return list(itertools.chain.from_iterable(buffer.blockers() for buffer in order))

    def state_dict(self) -> MixedState:
        """Everything; groups that are running are generated again after a restart."""
        return self._state({name: each.state_dict() for name, each in self._buffers.items()})

    def outline(self) -> MixedState:
        """The state without what was generated: finished groups are running ones in it."""
        return self._state({name: each.outline() for name, each in self._buffers.items()})

    def give_back_all(self) -> None:
        """No running group was finished."""
        for buffer in self._buffers.values():
            buffer.give_back_all()

    def load_state_dict(self, state: MixedState) -> None:
        """Continue from a saved state; ValueError: it is of other domains."""
        self.shares.load_state_dict(state.shares, state.next_step)
        self._decide(state.version)  # max_staleness_steps may be larger now
        for name, buffer in self._buffers.items():
            buffer.load_state_dict(state.domains[name])

    def _decide(self, version: int) -> None:
        last = version + self._eta if version >= 0 else -1
        self.shares.decide(last if self._num_steps is None else min(last, self._num_steps - 1))

    def _state(self, domains: dict[str, BufferState]) -> MixedState:
        return MixedState(domains=domains, shares=self.shares.state_dict())

    def _observe(self, domain: str, group: Group) -> None:
        counted = [sample for sample in group.samples if sample.status is not Status.FAILED]
        self.shares.observe(domain, sum(map(_right, counted)), len(counted))


def _right(sample: Sample) -> int:
    return int(sample.right)
