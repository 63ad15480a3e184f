"""What makes the buffer's calls cost the same at any size changes nothing of what they do."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.buffer import DataBuffer
from rollout.buffer_state import BufferState, Lease, StartedState
from rollout.ready import ReadyGroups
from rollout.types import Group
from rollout.wire import decode, encode


def group(group_id: int, version: int = 0) -> Group:
    return Group(group_id=group_id, start_version=version, samples=[])


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 2**40 - 1) | st.integers(0, 4000), unique=True, max_size=60))
def test_the_smallest_id_leaves_first(ids):
    ready, there = ReadyGroups(), set()
    for k, group_id in enumerate(ids):
        ready.push(group(group_id))
        there.add(group_id)
        if k % 3 == 2:
            assert ready.pop().group_id == min(there)
            there.remove(min(there))
        assert [each.group_id for each in ready.groups()] == sorted(there)
    while there:
        assert ready.pop().group_id == min(there)
        there.remove(min(there))
    assert len(ready) == 0
    with pytest.raises(KeyError):
        ready.pop()


def test_ids_that_cannot_be_are_refused():
    ready = ReadyGroups()
    ready.push(group(5))
    for wrong, why in ((5, "there already"), (-1, "ids are from 0"), (2**40, "ids are from 0")):
        with pytest.raises(ValueError, match=why):
            ready.push(group(wrong))
    assert ready.pop().group_id == 5


CALLS = ("lease",) * 6 + ("finish",) * 6 + ("take",) * 3 + ("drop", "back", "restart")


class Naive:
    """The rules of rollout.buffer as they are written, over a list of all groups."""

    def __init__(self, size: int, eta: int, num_steps: int, stride: int, oversample: float) -> None:
        self.size, self.eta, self.num_steps, self.stride = size, eta, num_steps, stride
        self.oversample = oversample
        self.version, self.step = -1, 0
        self.groups: dict[int, int] = {}
        """Version of each that is neither delivered nor dropped."""
        self.finished: set[int] = set()
        self.returned: list[int] = []
        self.started = self.dropped = 0

    def last(self) -> int:
        return min(self.version + self.eta, self.num_steps - 1)

    def lease(self) -> int | None:
        if self.returned:
            return self.returned.pop(0)
        limit = (self.last() + 1) * self.size if self.version >= 0 else 0
        if self.step <= self.last():
            limit += math.ceil(self.size * self.oversample)
        if self.started - self.dropped >= limit:
            return None
        group_id = self.started * self.stride
        self.groups[group_id] = self.version
        self.started += 1
        return group_id

    def drop(self, group_id: int) -> None:
        del self.groups[group_id]
        self.dropped += 1

    def take(self) -> list[int] | None:
        order = sorted((version, group_id) for group_id, version in self.groups.items())
        batch = [group_id for _, group_id in order if group_id in self.finished][: self.size]
        if self.step > self.last() or len(batch) < self.size:
            return None
        left = [version for version, group_id in order if group_id not in batch]
        for version in left if not self.oversample else ():
            last = max(min(version + self.eta, self.last()), self.step)
            if sum(each <= version for each in left) > (last - self.step) * self.size:
                return None
        for group_id in batch:
            del self.groups[group_id]
        if self.oversample:
            self.dropped += len(self.groups)
            self.groups.clear()
            self.returned.clear()
        self.finished &= set(self.groups)
        self.step += 1
        return sorted(batch)


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 3),
    eta=st.integers(0, 4),
    num_steps=st.integers(1, 12),
    stride=st.integers(1, 3),
    oversampled=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_call_does_what_the_rules_say(size, eta, num_steps, stride, oversampled, seed):
    """Also in the middle of a mixture, with dropped and returned groups, and after restarts."""
    oversample = 0.5 * (oversampled and eta == 0)

    def fresh() -> DataBuffer:
        return DataBuffer(
            groups_per_step=size,
            max_staleness_steps=eta,
            num_steps=num_steps,
            id_stride=stride,
            oversample=oversample,
        )

    chance = random.Random(seed)
    buffer, naive = fresh(), Naive(size, eta, num_steps, stride, oversample)
    running: list[Lease] = []
    for _ in range(200):
        # The newest mostly: old ones that do not come are what a step has to wait for.
        lease = running[-1 - int(len(running) * chance.random() ** 4)] if running else None
        match chance.choice(CALLS):
            case "lease":
                found = buffer.lease()
                assert (found and found.group_id) == naive.lease()
                if found is not None:
                    assert found.start_version == naive.groups[found.group_id]
                    running.append(found)
            case "finish" if lease is not None:
                running.remove(lease)
                buffer.accept(group(lease.group_id, lease.start_version))
                naive.finished.add(lease.group_id)
            case "drop" if lease is not None:
                running.remove(lease)
                buffer.drop(lease.group_id, "unlucky")
                naive.drop(lease.group_id)
            case "back" if lease is not None:
                running.remove(lease)
                buffer.give_back(lease.group_id)
                naive.returned.append(lease.group_id)
            case "restart":
                state = decode(encode(buffer.state_dict()), BufferState)
                buffer = fresh()
                buffer.load_state_dict(state)
                naive.returned = sorted(naive.groups.keys() - naive.finished)
                running = []
            case "take":
                taken = buffer.take()
                assert (taken and [each.group_id for each in taken]) == naive.take()
                running = [each for each in running if each.group_id in naive.groups]
                if naive.step < num_steps and chance.random() < 0.9:
                    naive.version = max(naive.version, naive.step)
                    buffer.publish(naive.version)
        assert (buffer.num_accepted, buffer.num_running) == (len(naive.finished), len(running))
        assert set(buffer.blockers()) == {each.group_id for each in running}


@pytest.mark.parametrize(
    ("started", "accepted", "why"),
    [
        ([StartedState(version=0, first=0, undelivered=b"\1\2\1")], [], "version 0 are damaged"),
        ([StartedState(version=3, first=0, undelivered=b"\1")], [], "of version 3, where 4 have"),
        ([StartedState(version=1, first=3, undelivered=b"\1\1")], [], "groups up to 5"),
        (
            [StartedState(version=k, first=0, undelivered=b"\1") for k in (0, 1)],
            [],
            "version 1 are",
        ),
        ([StartedState(version=0, first=0, undelivered=b"\0\1")], [0], "group 0 .* delivered"),
        ([StartedState(version=0, first=0, undelivered=b"\1\1")], [7], "group 7 .* never started"),
        ([StartedState(version=0, first=0, undelivered=b"\1\1")], [1, 1], "group 1 is there"),
        ([StartedState(version=0, first=0, undelivered=b"\1\1\1\1")], [], "has 4 groups"),
    ],
)
def test_a_damaged_state_and_a_narrower_bound_are_refused(started, accepted, why):
    state = BufferState(
        version=1,
        num_started=4,
        next_step=1,
        started=started,
        accepted=[group(group_id) for group_id in accepted],
    )
    with pytest.raises(ValueError, match=why):
        DataBuffer(groups_per_step=2, max_staleness_steps=1).load_state_dict(state)
