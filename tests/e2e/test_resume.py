"""Runs that stop and go on, by the command line: in another layout, and with live engines."""

import dataclasses
import json
from pathlib import Path

import pytest

from framework.checkpoints import list_checkpoints, read_checkpoint
from rollout.journal import list_steps, read_step
from tests.e2e.journals import write_journal
from tests.e2e.test_run import TIMES, drivetrain, largest_difference, metrics, weights

TOLERANCE = 1e-5
REPLAY = [
    "experiment=smoke",
    "mode=train_only",
    "gate.enabled=false",
    "warm_start.num_steps=0",
    "eval.at_start=false",
    "eval.at_end=false",
    "tracker.tensorboard=false",
    "tracker.report=false",
    "optimizer.lr=1e-3",
    "checkpoint.every_steps=3",
]
LIVE = [
    "experiment=smoke",
    "data.args.num_digits=3",
    "data.eval_num_prompts=16",
    "eval.every_steps=3",
    "eval.at_end=false",
    "rollout.samples_per_prompt=8",
    "optimizer.lr=1e-3",
    "checkpoint.every_steps=2",
    "tracker.tensorboard=false",
    "tracker.report=false",
]


@pytest.fixture(scope="module")
def journal(tmp_path_factory) -> Path:
    """Six random batches."""
    path = tmp_path_factory.mktemp("journal") / "rollouts"
    write_journal(path, num_steps=6)
    return path


@pytest.fixture(scope="module")
def uninterrupted(journal, tmp_path_factory) -> Path:
    """Six steps by one trainer."""
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    drivetrain(*REPLAY, "num_steps=6", f"run_dir={run_dir}", f"replay_dir={journal}")
    return run_dir


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            ["parallel.tp=2", "parallel.pp=2"],
            ["parallel.dp=2", "parallel.distributed_optimizer=true"],
        ),
        (
            ["parallel.dp=2", "parallel.distributed_optimizer=true", "checkpoint.async_save=false"],
            ["parallel.pp=2"],
        ),
    ],
)
def test_a_run_goes_on_in_another_layout(journal, uninterrupted, tmp_path, before, after):
    run_dir = tmp_path / "parts"
    common = [*REPLAY, f"run_dir={run_dir}", f"replay_dir={journal}"]
    drivetrain(*common, *before, "num_steps=3")
    drivetrain(*common, *after, "num_steps=6", "checkpoint.resume=auto")
    whole, parts = metrics(uninterrupted), metrics(run_dir)
    assert [row["step"] for row in parts] == [1, 2, 3, 4, 5, 6]
    for expected, row in zip(whole, parts, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=TOLERANCE)
        assert row["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=TOLERANCE)
    assert largest_difference(weights(uninterrupted), weights(run_dir)) <= TOLERANCE
    kept = [read_checkpoint(path) for path in list_checkpoints(run_dir / "checkpoints")]
    assert [each.step for each in kept] == [3, 6]
    assert kept[0].manifest.layout != kept[1].manifest.layout


def test_another_configuration_is_refused_by_its_key(uninterrupted, journal):
    done = drivetrain(
        *REPLAY,
        *("checkpoint.resume=auto", "optimizer.lr=2e-3", "seed=4", "num_steps=8"),
        *(f"run_dir={uninterrupted}", f"replay_dir={journal}", "parallel.dp=2"),
        check=False,
    )
    assert done.returncode == 2
    assert "optimizer.lr=0.002" in done.stderr
    assert "optimizer.lr=0.001" in done.stderr
    assert "seed=4" in done.stderr
    assert "parallel" not in done.stderr
    assert len(metrics(uninterrupted)) == 6


@pytest.mark.timeout(600)
def test_n_and_n_steps_with_a_stop_between_are_2n_steps(engine, tmp_path):
    """Live: engine, rollout process, trainer; staleness 0; bit for bit."""
    live = [*LIVE, f"rollout.engine.urls=[{engine.url}]"]
    live += [f"rollout.engine.api_key={engine.api_key}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    drivetrain(*live, f"run_dir={whole}", "num_steps=4", "warm_start.num_steps=80")
    start = ["warm_start.num_steps=0", f"model.init_from={whole / 'warm_start' / 'hf'}"]
    drivetrain(*live, *start, f"run_dir={parts}", "num_steps=2")
    drivetrain(*live, *start, f"run_dir={parts}", "num_steps=4", "checkpoint.resume=auto")
    norms = [row["train/grad_norm"] for row in metrics(whole) if "train/grad_norm" in row]
    assert norms[0] > 0, norms  # moments are kept by the checkpoint, and matter
    assert max(norms[2:]) > 0, norms
    assert largest_difference(weights(whole), weights(parts)) == 0.0
    for expected, row in zip(metrics(whole), metrics(parts), strict=True):
        assert expected.keys() == row.keys()
        for name in row:
            assert name.endswith(TIMES) or expected[name] == row[name], (row["step"], name)
    assert len(list_steps(parts / "rollouts")) == 4
    journals = (list_steps(path / "rollouts") for path in (parts, whole))
    for ours, theirs in zip(*journals, strict=True):
        assert_same_samples(read_step(ours)[1], read_step(theirs)[1])
    versions = [json.loads(line)["version"] for line in (parts / "eval.jsonl").open()]
    assert versions == [0, 3]


def assert_same_samples(ours, theirs) -> None:
    """Every field, arrays bit for bit."""
    for mine, other in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(mine):
            a, b = getattr(mine, field.name), getattr(other, field.name)
            same = a.tobytes() == b.tobytes() if hasattr(a, "tobytes") else a == b
            assert same, (mine.group_id, mine.index, field.name)
