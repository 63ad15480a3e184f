import json
import os
import stat

import pytest

from rollout.batch import make_batch
from rollout.journal import list_steps, read_step, step_path, write_step
from rollout.run_dir import RunDir, write_atomic
from rollout.source import JournalSource
from rollout.types import Group, Status
from tests.rollout.test_wire import make_sample


def make_groups(num_groups: int = 2, version: int = 5) -> list[Group]:
    return [
        Group(
            group_id=g,
            start_version=version,
            samples=[make_sample(group_id=g, index=i, reward=float(i)) for i in range(2)],
        )
        for g in range(num_groups)
    ]


def test_a_step_is_read_as_it_was_written(tmp_path):
    batch, samples = make_batch(6, make_groups(), 2.0)
    path = write_step(tmp_path, batch, samples)
    read_batch, read_samples = read_step(path)
    assert read_batch == batch
    assert [s.tokens.tolist() for s in read_samples] == [s.tokens.tolist() for s in samples]
    assert list_steps(tmp_path) == [step_path(tmp_path, 6)]
    source = JournalSource(tmp_path)
    assert source.take(6) == batch
    assert [s.index for s in source.fetch(6, [3, 0])] == [1, 0]


def test_damaged_and_missing_steps_name_the_file(tmp_path):
    source = JournalSource(tmp_path)
    with pytest.raises(ValueError, match=r"step_000000.msgpack: missing"):
        source.take(0)
    batch, samples = make_batch(0, make_groups(version=0), 1.0)
    path = write_step(tmp_path, batch, samples)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"step_000000.msgpack: not a JournalEntry"):
        source.take(0)
    write_step(tmp_path, batch, samples[:-1])
    with pytest.raises(ValueError, match=r"step_000000.msgpack: 3 of 4 samples"):
        source.take(0)
    write_step(tmp_path, batch, samples[::-1])
    with pytest.raises(ValueError, match=r"sample \(1, 1, .* is not \(0, 0, .*as its batch says"):
        source.take(0)
    write_step(tmp_path, batch, samples).rename(step_path(tmp_path, 3))
    with pytest.raises(ValueError, match=r"step_000003.msgpack: holds step 0"):
        source.take(3)
    samples[0].rollout_logprobs[0] = float("nan")
    write_step(tmp_path, batch, samples)
    with pytest.raises(ValueError, match=r"step_000000.msgpack: sample 0/0: rollout_logprobs"):
        source.take(0)
    with pytest.raises(ValueError, match=r"no such directory"):
        JournalSource(tmp_path / "nowhere")


def test_figures_of_a_batch():
    groups = make_groups()
    groups[0].samples[0].status = Status.FAILED
    groups[0].samples[0].loss_mask[:] = 0
    groups[1].samples[0].versions[0] = 6
    groups[1].samples[0].reward = 1.0
    batch, samples = make_batch(7, groups, 2.0)
    assert [(info.group_id, info.index) for info in batch.samples] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert [info.num_loss_tokens for info in batch.samples] == [0, 3, 3, 3]
    assert batch.staleness_max == 2
    figures = batch.metrics
    assert figures["rollout/reward_mean"] == 0.75
    assert figures["rollout/accuracy"] == 0.75
    assert figures["rollout/failed_fraction"] == 0.25
    assert figures["rollout/truncated_fraction"] == 0.75
    assert figures["rollout/groups_uniform_fraction"] == 0.5
    assert figures["rollout/tokens"] == 9
    assert figures["rollout/tokens_per_s"] == 4.5
    assert figures["rollout/staleness_max"] == 2
    assert len(samples) == 4


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_run_dir_keeps_its_secret_and_finds_roles(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    with pytest.raises(ValueError, match=r"is .* a run directory"):
        run_dir.token()
    run_dir.create()
    token = run_dir.token()
    run_dir.create()
    assert run_dir.token() == token
    assert len(token) == 64
    assert stat.S_IMODE(run_dir.token_file.stat().st_mode) == 0o600
    with pytest.raises(TimeoutError, match=r"addresses/engine_0.json: no address of engine_0"):
        run_dir.wait_address("engine_0", timeout_s=0.1)
    run_dir.write_address("engine_0", "http://127.0.0.1:1")
    assert run_dir.wait_address("engine_0", timeout_s=0.1) == "http://127.0.0.1:1"
    assert json.loads(run_dir.address_file("engine_0").read_text())["pid"] == os.getpid()
    run_dir.address_file("engine_0").write_text("[]")
    with pytest.raises(ValueError, match=r"not an address file"):
        run_dir.read_address("engine_0")
