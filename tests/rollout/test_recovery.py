"""A rollout process that takes the place of one which died: from its journal, nothing lost."""

import asyncio
import threading
import time

import pytest

from rollout.buffer import DataBuffer
from rollout.journal import list_steps, read_step
from rollout.source import BufferClient, RolloutFailure, RolloutGone
from rollout.types import Group
from tests.rollout.conftest import TOKEN, serving


def test_the_next_process_goes_on_where_the_journal_ends(chat, tmp_path):
    """Trainers keep their client: it finds the new address and says again what they published."""
    where: list[str] = []
    source = BufferClient(
        "http://127.0.0.1:9", TOKEN, 20.0, find_url=lambda: where[-1] if where else None
    )
    with serving(chat, tmp_path) as first:
        where.append(first.url)
        source.publish(0)
        source.take(0)
        first.client.version = 1
        source.publish(1)
        source.take(1)
        result = source.evaluate(1)
        first.client.gate = asyncio.Event()  # groups of step 2 and 3 are running when it dies
        source.publish(2)
        assert first.service._producer.buffer.num_running > 0
    where.clear()
    with serving(chat, tmp_path) as second:
        second.client.version = 2
        threading.Timer(0.5, where.append, [second.url]).start()
        assert source.take(2).step == 2
        assert source.take(1).step == 1
        assert [sample.index for sample in source.fetch(0, [2])] == [2]
        second.client.version = 3
        source.publish(3)
        assert source.take(3).step == 3
        assert source.health().policy_version == 3
        second.service._max_body_bytes = 1 << 20
        state = source.snapshot(2)
    with serving(chat, tmp_path) as third:  # and the trainers have died as well
        where.append(third.url)
        source.restore(2, state)
        source.publish(2)
        assert source.take(2).step == 2
        assert third.client.calls == [], "generated at an older version than the buffer's"
        third.client.version = 3
        source.publish(3)
        assert source.take(3).step == 3
    taken = [
        info.group_id for path in list_steps(tmp_path) for info in read_step(path)[0].samples[::3]
    ]
    assert taken == list(range(8)), "a group was lost or doubled"
    lines = (tmp_path / "eval.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert result.version == 1


def test_an_evaluation_that_was_measured_is_not_measured_again(chat, tmp_path):
    with serving(chat, tmp_path) as first:
        result = first.source().evaluate(0)
    with serving(chat, tmp_path) as second:
        assert second.source().evaluate(0) == result
        assert second.client.calls == []
    assert len((tmp_path / "eval.jsonl").read_text().splitlines()) == 1


def test_trainers_stop_trying_in_time(chat, tmp_path):
    with serving(chat, tmp_path) as process:
        source = BufferClient(process.url, TOKEN, 20.0, reconnect_s=0.5, find_url=lambda: None)
        source.publish(0)
    start = time.monotonic()
    with pytest.raises(RolloutGone, match="is gone"):
        source.take(0)
    assert time.monotonic() - start < 10


def test_an_outline_starts_finished_groups_again():
    buffer = DataBuffer(groups_per_step=1, max_staleness_steps=2)
    buffer.publish(0)
    leases = [buffer.lease() for _ in range(3)]
    assert all(leases)
    buffer.accept(Group(group_id=1, start_version=0, samples=[]))
    buffer.give_back(2)
    again = DataBuffer(groups_per_step=1, max_staleness_steps=2)
    again.load_state_dict(buffer.outline())
    assert [lease.group_id for _ in range(3) if (lease := again.lease())] == [0, 1, 2]
    assert again.lease() is None
    buffer.give_back_all()
    assert buffer.num_running == 0
    assert [lease.group_id for _ in range(2) if (lease := buffer.lease())] == [0, 2]


def test_a_next_process_that_refuses_our_version_is_no_silent_wait(chat, tmp_path):
    """It would start no group, and trainers wait for a batch until they give up."""
    where: list[str] = []
    source = BufferClient(
        "http://127.0.0.1:9", TOKEN, 20.0, find_url=lambda: where[-1] if where else None
    )
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    with serving(chat, tmp_path / "full") as first:
        where.append(first.url)
        source.publish(0)
        source.take(0)
        first.client.version = 1
        source.publish(1)
    with serving(chat, tmp_path / "empty") as other:  # another journal: it is at step 0
        where.append(other.url)
        with pytest.raises(RolloutFailure, match="/version: version is 1: it comes after step 0"):
            source.take(1)
