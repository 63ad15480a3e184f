"""The rollout process's HTTP interface and its client, over real sockets (`running`: conftest)."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from rollout.bodies import listen
from rollout.buffer_state import BufferState
from rollout.client import EngineFailure
from rollout.data import PromptStream
from rollout.journal import list_steps, read_step, write_step
from rollout.messages import VersionRequest
from rollout.source import BufferClient, RolloutFailure
from rollout.state import ProducerState, newest_state
from rollout.wire import decode, encode
from tests.rollout.conftest import TOKEN


def test_steps_are_delivered_once_journaled_and_repeatable(running):
    source = running.source()
    assert source.health().policy_version == -1
    source.publish(0)
    batch = source.take(0)
    assert [(s.group_id, s.index) for s in batch.samples] == [
        (g, i) for g in (0, 1) for i in range(3)
    ]
    assert batch.metrics["rollout/accuracy"] == 1.0
    assert source.take(0) == batch
    assert running.source().take(0) == batch
    (path,) = list_steps(running.rollouts)
    assert read_step(path)[0] == batch
    fetched = source.fetch(0, [4, 1])
    assert [(s.group_id, s.index) for s in fetched] == [(1, 1), (0, 1)]
    for version in range(1, 5):
        running.client.version = version
        source.publish(version)
        assert source.take(version).step == version
    # No longer in memory: from the journal.
    assert source.take(0) == batch
    assert source.fetch(0, [4])[0].tokens.tolist() == fetched[0].tokens.tolist()
    source.finish()


def test_many_ranks_asking_at_once_get_the_same_batch(running):
    running.client.gate = asyncio.Event()
    results: list = []
    threads = [
        threading.Thread(target=lambda: results.append(running.source().take(0))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    running.source().publish(0)
    time.sleep(0.3)
    running.loop.call_soon_threadsafe(running.client.gate.set)
    for thread in threads:
        thread.join(20)
    assert len(results) == 6
    assert all(result == results[0] for result in results)
    assert len(list_steps(running.rollouts)) == 1


def test_evaluation_measures_the_version_it_was_asked_for(running):
    source = running.source()
    result = source.evaluate(0)
    assert (result.version, result.accuracy, result.num_prompts) == (0, 1.0, 5)
    assert '"accuracy": 1.0' in (running.rollouts / "eval.jsonl").read_text()
    # Asked again, as when the answer was lost on its way.
    assert running.source().evaluate(0) == result
    assert len((running.rollouts / "eval.jsonl").read_text().splitlines()) == 1
    with pytest.raises(RolloutFailure, match=r"evaluation of version 3: .* \[0\]|version 0 where"):
        source.evaluate(3)


def test_requests_need_the_token(running):
    for token in ("x", TOKEN[:-1], TOKEN + "x"):
        reply = running.post("/version", encode(VersionRequest(version=0)), token)
        assert reply.status_code == 401
        with pytest.raises(RolloutFailure, match=r"token is missing or wrong"):
            running.source(token=token).publish(0)
    assert httpx.get(running.url + "/health", trust_env=False).status_code == 401
    assert running.source().health().policy_version == -1


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/batch", b"", 400),
        ("/batch", b"\xff\xff\xff", 400),
        ("/batch", encode({"step": "zero"}), 400),
        ("/batch", encode({"step": -1}), 400),
        ("/batch", encode({"stepp": 0}), 400),
        ("/batch", encode({"step": 7}), 409),
        ("/batch", b"x" * 1001, 413),
        ("/samples", encode({"step": 0, "indices": [0]}), 409),
        ("/samples", encode({"step": 0, "indices": "all"}), 400),
        ("/samples", encode({"step": -1, "indices": [0]}), 400),
        ("/version", encode({"version": -3}), 400),
        ("/version", b"\xcf" + b"\xff" * 8, 400),
        ("/evaluate", encode([1, 2]), 400),
        ("/nowhere", b"", 404),
    ],
)
def test_malformed_requests_get_one_line_and_change_nothing(running, path, body, status):
    reply = running.post(path, body)
    assert reply.status_code == status
    assert "\n" not in reply.text
    assert reply.text
    assert running.source().health().policy_version == -1


def test_a_body_without_a_length_is_cut_off_too(running):
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 100

    headers = {"Authorization": f"Bearer {TOKEN}"}
    reply = httpx.post(running.url + "/batch", content=endless(), headers=headers, trust_env=False)
    assert reply.status_code == 413


def test_sample_indices_and_versions_out_of_range(running):
    source = running.source()
    source.publish(0)
    source.take(0)
    with pytest.raises(RolloutFailure, match=r"step 0 has 6 samples, not \[6, -1\]"):
        source.fetch(0, [0, 6, -1])
    running.client.version = 1
    source.publish(1)
    with pytest.raises(RolloutFailure, match=r"version 0 was published after version 1"):
        source.publish(0)


def test_waiting_ranks_learn_why_generation_ended(running):
    async def broken(*arguments: object, **named: object) -> None:
        await asyncio.sleep(0.3)
        raise EngineFailure("the engine is on fire")

    running.client.generate = broken
    source = running.source()
    source.publish(0)
    with pytest.raises(RolloutFailure, match=r"the engine is on fire"):
        source.take(0)
    with pytest.raises(RolloutFailure, match=r"the engine is on fire"):
        source.publish(0)
    assert source.health().failure == "the engine is on fire"


def test_a_task_that_cannot_even_start_is_reported(running, monkeypatch):
    def explode(*arguments: object) -> None:
        raise KeyError("no such row")

    monkeypatch.setattr(PromptStream, "environments", explode)
    source = running.source()
    source.publish(0)
    with pytest.raises(RolloutFailure, match=r"group 0: KeyError: 'no such row'"):
        source.take(0)


def test_a_fault_of_our_own_is_told_to_those_who_wait(running, monkeypatch):
    def explode(*arguments: object) -> None:
        raise LookupError("no such place")

    monkeypatch.setattr(running.service._producer.buffer, "accept", explode)
    source = running.source()
    source.publish(0)
    start = time.monotonic()
    with pytest.raises(RolloutFailure, match=r"group \d: LookupError: no such place"):
        source.take(0)
    assert time.monotonic() - start < 10, "they were told when their poll was over"


def test_an_evaluation_that_cannot_be_written_says_why(running, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("rollout.evaluate.Evaluator._write", full)
    source = running.source()
    source.publish(0)
    with pytest.raises(RolloutFailure, match=r"/evaluate: no space left on device"):
        source.evaluate(0)


def test_a_rank_that_asks_while_the_step_is_being_written_waits(running, monkeypatch):
    def slow(*arguments) -> None:
        time.sleep(0.5)
        write_step(*arguments)

    monkeypatch.setattr("rollout.producer.write_step", slow)
    first = running.source()
    first.publish(0)
    results: list = []
    thread = threading.Thread(target=lambda: results.append(first.take(0)))
    thread.start()
    time.sleep(0.25)
    other = running.source()
    assert other.take(0).step == 0
    assert len(other.fetch(0, [0])) == 1
    thread.join(10)
    assert results == [other.take(0)]


def test_no_more_groups_run_at_a_time_than_allowed(running):
    running.client.gate = asyncio.Event()
    running.service._producer.domains[0].max_running_groups = 3
    source = running.source()
    source.publish(0)
    time.sleep(0.2)
    assert source.health().running == 3
    running.loop.call_soon_threadsafe(running.client.gate.set)
    assert source.take(0).step == 0
    running.client.version = 1
    source.publish(1)
    assert source.take(1).step == 1


def test_a_wait_is_bounded_and_says_what_is_missing(running, monkeypatch):
    monkeypatch.setattr("rollout.service._LONG_POLL_S", 0.2)
    running.client.gate = asyncio.Event()
    source = running.source(timeout_s=0.5)
    source.publish(0)
    with pytest.raises(TimeoutError, match=r"batch_timeout_s=0.5.*0 groups finished and 4 running"):
        source.take(0)


def test_a_process_that_is_gone_is_reported(monkeypatch):
    monkeypatch.setattr("rollout.source._RECONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RolloutFailure, match=r"is gone"):
        BufferClient(f"http://127.0.0.1:{port}", TOKEN, 5.0).take(0)
    # At the end it may be gone before its answer is out: a trained run has not failed.
    BufferClient(f"http://127.0.0.1:{port}", TOKEN, 5.0).finish()


def test_all_samples_of_a_step_failing_ends_the_run(running):
    async def no_reward(sample: object, task: object) -> None:
        raise RuntimeError("the judge is away")

    running.service._producer.domains[0].generator.reward = no_reward
    source = running.source()
    source.publish(0)
    with pytest.raises(RolloutFailure, match=r"every sample of step 0 failed.*the judge is away"):
        source.take(0)


def test_a_journal_that_cannot_be_written_ends_the_run(running, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("rollout.producer.write_step", full)
    source = running.source()
    source.publish(0)
    with pytest.raises(RolloutFailure, match=r"journal cannot be written: no space"):
        source.take(0)


def test_trainers_that_go_back_get_the_same_batches_from_the_journal(running):
    """Whatever was generated since: at staleness 1, groups are ahead when the state is taken."""
    source = running.source()
    running.service._max_body_bytes = 1 << 20
    source.publish(0)
    source.take(0)
    state = source.snapshot(1)
    for version in (1, 2):
        running.client.version = version
        source.publish(version)
        source.take(version)
    batches = [source.take(step) for step in (1, 2)]
    later = source.snapshot(3)
    calls = len(running.client.calls)
    source.restore(1, state)
    assert source.health().running == 0
    for step in (1, 2):
        source.publish(step)
        assert source.take(step) == batches[step - 1]
        if step == 1:
            assert len(running.client.calls) == calls, "generated although the journal has it"
            between = decode(source.snapshot(2), ProducerState)
            assert between.buffer.next_step == 2
    running.client.version = 3
    source.publish(3)
    groups = [info.group_id for info in source.take(3).samples]
    assert groups == [6, 6, 6, 7, 7, 7]
    source.restore(0, b"")  # trainers without a checkpoint
    source.publish(0)
    assert source.take(0).step == 0
    assert decode(later, ProducerState).buffer.next_step == 3


def test_trainers_go_on_from_a_state_that_the_journal_does_not_reach(running, tmp_path):
    """A checkpoint of another run: what starts there is remembered for whoever takes our place."""
    source = running.source()
    running.service._max_body_bytes = 1 << 20
    source.publish(0)
    source.take(0)
    state = decode(source.snapshot(1), ProducerState)
    state.buffer.domains[""] = BufferState(version=4, num_started=12, next_step=5)
    state.buffer.shares.before, state.buffer.shares.through = {"": 10}, {"": [12]}
    running.client.version = 5
    source.restore(5, encode(state))
    assert newest_state(running.rollouts) == state
    source.publish(5)
    assert [info.group_id for info in source.take(5).samples] == [12, 12, 12, 13, 13, 13]


def test_states_that_do_not_fit_are_refused(running):
    source = running.source()
    with pytest.raises(RolloutFailure, match="the state before step 3 was asked for; step 0 is"):
        source.snapshot(3)
    assert running.post("/restore", b"rubbish").status_code == 400
    state = {"format": 9, "buffer": EMPTY_BUFFER}
    reply = running.post("/restore", encode({"step": 0, "state": state}))
    assert (reply.status_code, reply.text) == (400, "rollout state 9; this version reads 3")
    apart = {name: {"version": 0, "num_started": 0, "next_step": k} for k, name in enumerate("ab")}
    shares = {
        "credits": {"a": 0, "b": 0},
        "before": {"a": 0, "b": 0},
        "through": {"a": [], "b": []},
    }
    state = {"format": 3, "buffer": {"domains": apart, "shares": shares}}
    reply = running.post("/restore", encode({"step": 0, "state": state}))
    assert reply.status_code == 400
    assert "domain b is at version 0 before step 1, a at version 0 before step 0" in reply.text
    for domain in apart.values():
        domain.update(version=2**63, next_step=0)
    reply = running.post("/restore", encode({"step": 0, "state": state}))
    assert (reply.status_code, "comes after step 0" in reply.text) == (400, True)
    reply = running.post("/restore", encode({"step": 9}))
    assert reply.status_code == 400
    assert "begin at step 9, with no state of that moment; step 0 is next" in reply.text
    with pytest.raises(ValueError, match="holds no rollout state"):
        source.restore(3, b"")
    assert running.post("/state", b"", token="no").status_code == 401


EMPTY_BUFFER = {
    "domains": {"": {"version": -1, "num_started": 0, "next_step": 0}},
    "shares": {"credits": {"": 0}, "before": {"": 0}, "through": {"": []}},
}


def test_what_is_answered_is_sent_at_once():
    """Without TCP_NODELAY every answer of two writes takes 40 ms."""
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
