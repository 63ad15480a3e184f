import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.buffer import DataBuffer
from rollout.buffer_state import BufferState, Lease
from rollout.types import Group
from rollout.wire import decode, encode


def group(lease: Lease) -> Group:
    return Group(group_id=lease.group_id, start_version=lease.start_version, samples=[])


def lease_all(buffer: DataBuffer) -> list[Lease]:
    leases = []
    while (lease := buffer.lease()) is not None:
        leases.append(lease)
    return leases


def taken(buffer: DataBuffer) -> list[int]:
    """Ids of the batch that is there."""
    batch = buffer.take()
    assert batch is not None
    return [each.group_id for each in batch]


def dropped(group_id: int) -> bool:
    """A filter of the test's: pure, so that every order of finishing drops the same groups."""
    return group_id * 2654435761 % 7 < 3


def finish(buffer: DataBuffer, lease: Lease, filtered: bool) -> None:
    if filtered and dropped(lease.group_id):
        buffer.drop(lease.group_id, "unlucky")
    else:
        buffer.accept(group(lease))


def test_nothing_starts_before_the_first_version():
    buffer = DataBuffer(groups_per_step=2, max_staleness_steps=3)
    assert buffer.lease() is None
    buffer.publish(0)
    assert len(lease_all(buffer)) == 2 * 4


def test_on_policy_batches_are_exactly_the_groups_of_their_version():
    buffer = DataBuffer(groups_per_step=3, max_staleness_steps=0)
    for version in range(3):
        assert buffer.take() is None
        buffer.publish(version)
        leases = lease_all(buffer)
        for lease in reversed(leases):  # completion order does not matter
            assert buffer.take() is None
            buffer.accept(group(lease))
        assert taken(buffer) == [3 * version, 3 * version + 1, 3 * version + 2]


def test_a_newer_group_does_not_pass_an_older_one_that_would_then_be_too_late():
    # One group a step, two steps of slack: groups 0 and 1 are slow. Taking 2 at step 0 is fine;
    # taking 3 at step 1 would leave both for step 2, where only one of them fits.
    buffer = DataBuffer(groups_per_step=1, max_staleness_steps=2)
    buffer.publish(0)
    slow_0, slow_1, quick = lease_all(buffer)
    buffer.accept(group(quick))
    assert taken(buffer) == [2]
    buffer.publish(1)
    (newer,) = lease_all(buffer)
    buffer.accept(group(newer))
    assert buffer.take() is None
    assert buffer.blockers() == [0, 1]
    buffer.accept(group(slow_1))
    assert taken(buffer) == [1]
    buffer.publish(2)
    buffer.accept(group(slow_0))
    assert taken(buffer) == [0]


def test_no_more_groups_start_than_the_run_can_train():
    buffer = DataBuffer(groups_per_step=2, max_staleness_steps=5, num_steps=3)
    buffer.publish(0)
    assert len(lease_all(buffer)) == 6


def test_a_dropped_group_is_replaced_and_counted():
    buffer = DataBuffer(groups_per_step=2, max_staleness_steps=0, num_steps=1)
    buffer.publish(0)
    first, second = lease_all(buffer)
    buffer.drop(first.group_id, "all_right")
    (third,) = lease_all(buffer)
    buffer.drop(third.group_id, "all_wrong")
    buffer.accept(group(second))
    (fourth,) = lease_all(buffer)
    assert buffer.dropped == {"all_right": 1, "all_wrong": 1}
    assert not buffer.may_take()
    buffer.accept(group(fourth))
    assert taken(buffer) == [1, 3]
    assert not buffer.dropped, "counted for the step that they were dropped for"
    assert buffer.lease() is None
    with pytest.raises(ValueError, match=r"group 0 is not running"):
        buffer.drop(0, "twice")


@pytest.mark.parametrize("misuse", ["twice", "unknown", "version"])
def test_misuse_is_refused(misuse):
    buffer = DataBuffer(groups_per_step=2, max_staleness_steps=0)
    buffer.publish(0)
    (lease, *_) = lease_all(buffer)
    if misuse == "twice":
        buffer.accept(group(lease))
    elif misuse == "unknown":
        lease = Lease(group_id=9, start_version=0)
    else:
        lease = Lease(group_id=lease.group_id, start_version=1)
    with pytest.raises(ValueError, match=r"group"):
        buffer.accept(group(lease))
    with pytest.raises(ValueError, match=r"published after"):
        buffer.publish(-1)


@settings(max_examples=150, deadline=None)
@given(
    groups_per_step=st.integers(1, 4),
    eta=st.integers(0, 4),
    num_steps=st.integers(1, 8),
    filtered=st.booleans(),
    choices=st.randoms(use_true_random=False),
)
def test_bound_kept_nothing_lost_or_doubled_no_deadlock(
    groups_per_step, eta, num_steps, filtered, choices
):
    """A trainer and generators of arbitrary speed, with restarts from saved state in between."""

    def fresh() -> DataBuffer:
        return DataBuffer(
            groups_per_step=groups_per_step, max_staleness_steps=eta, num_steps=num_steps
        )

    buffer = fresh()
    running: list[Lease] = []
    trained: list[Group] = []
    step = version = num_actions = 0
    buffer.publish(0)
    while step < num_steps:
        num_actions += 1
        action = choices.choice(("lease", "finish", "finish", "take", "give_back", "restart"))
        if num_actions % 40 == 0:  # everybody has caught up: a batch must come
            while running := running + lease_all(buffer):
                finish(buffer, running.pop(), filtered)
            action = "take"
            assert buffer.may_take()
        if action == "lease" and (lease := buffer.lease()) is not None:
            running.append(lease)
        elif action == "finish" and running:
            finish(buffer, running.pop(choices.randrange(len(running))), filtered)
        elif action == "give_back" and running:
            buffer.give_back(running.pop(choices.randrange(len(running))).group_id)
        elif action == "restart":
            state = decode(encode(buffer.state_dict()), BufferState)
            buffer = fresh()
            buffer.load_state_dict(state)
            running = []  # whoever ran them is gone; they are leased again
        elif action == "take" and (batch := buffer.take()) is not None:
            wanted = [k for k in range(1000) if not (filtered and dropped(k))]
            check_batch(batch, step, groups_per_step, eta, wanted)
            trained += batch
            step += 1
            version += 1
            if step < num_steps:
                buffer.publish(version)
        started = len(trained) + buffer.num_accepted + len(running)
        assert started <= (version + eta + 1) * groups_per_step
    ids = [g.group_id for g in trained]
    assert len(set(ids)) == num_steps * groups_per_step
    if not filtered:
        assert sorted(ids) == list(range(num_steps * groups_per_step))


def check_batch(
    batch: list[Group], step: int, groups_per_step: int, eta: int, wanted: list[int]
) -> None:
    ids = [g.group_id for g in batch]
    assert len(ids) == groups_per_step
    assert ids == sorted(ids)
    assert all(step - g.start_version <= eta for g in batch)
    assert set(ids) <= set(wanted)
    if eta == 0:
        first = step * groups_per_step
        assert ids == wanted[first : first + groups_per_step]
