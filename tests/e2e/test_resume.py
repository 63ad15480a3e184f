"""Live runs that stop and go on, by the command line: engine, rollout process and trainer."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework.checkpoints import list_checkpoints
from rollout.journal import list_steps, read_step
from rollout.run_dir import RunDir
from rollout.source import BufferClient
from tests.e2e.runs import TIMES, drivetrain, largest_difference, metrics, weights

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


@pytest.mark.timeout(600)
def test_n_and_n_steps_with_a_stop_between_are_2n_steps(engine, first_run, tmp_path):
    """Live: engine, rollout process, trainer; staleness 0; bit for bit. At the stop, which is a
    `kill -9`, groups of a step after the checkpoint's are in flight."""
    live = [*LIVE, f"rollout.engine.urls=[{engine.url}]"]
    live += [f"rollout.engine.api_key={engine.api_key}"]
    warm = first_run[0] / "warm_start" / "hf"
    start = ["warm_start.num_steps=0", f"model.init_from={warm}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    drivetrain(*live, *start, f"run_dir={whole}", "num_steps=6")
    stop_in_flight(parts, *live, *start, "num_steps=6", "checkpoint.async_save=false")
    assert 2 <= newest_step(parts) < 6
    drivetrain(*live, *start, f"run_dir={parts}", "num_steps=6", "checkpoint.resume=auto")
    norms = [row["train/grad_norm"] for row in metrics(whole) if "train/grad_norm" in row]
    assert norms[0] > 0, norms  # moments are kept by the checkpoint, and matter
    assert max(norms[2:]) > 0, norms
    assert largest_difference(weights(whole), weights(parts)) == 0.0
    for expected, row in zip(metrics(whole), metrics(parts), strict=True):
        # The first step of a run passes the gate, whose phase has a time.
        same = [
            {k: v for k, v in each.items() if not k.endswith(TIMES)} for each in (expected, row)
        ]
        assert same[0] == same[1]
    assert len(list_steps(parts / "rollouts")) == 6
    journals = (list_steps(path / "rollouts") for path in (parts, whole))
    for ours, theirs in zip(*journals, strict=True):
        assert_same_samples(read_step(ours)[1], read_step(theirs)[1])
    versions = [json.loads(line)["version"] for line in (parts / "eval.jsonl").open()]
    assert versions == [0, 3]


def stop_in_flight(run_dir: Path, *overrides: str) -> None:
    """Run until a checkpoint is there and groups are being generated, then kill the launcher."""
    launcher = subprocess.Popen(
        [str(Path(sys.executable).with_name("drivetrain")), *overrides, f"run_dir={run_dir}"],
        stdout=subprocess.DEVNULL,
    )
    try:
        paths = RunDir(run_dir)
        while not newest_step(run_dir):
            assert launcher.poll() is None, "the run was over before it saved a checkpoint"
            time.sleep(0.005)
        address, token = paths.read_address("rollout"), paths.token()
        assert address is not None
        source = BufferClient(address, token, 5.0)
        while not source.health().running:
            assert launcher.poll() is None, "the run was over before groups were met in flight"
    finally:
        launcher.kill()
        launcher.wait(timeout=30)


def newest_step(run_dir: Path) -> int:
    """Of the newest complete checkpoint; 0: there is none."""
    paths = list_checkpoints(run_dir / "checkpoints")
    return int(paths[-1].name.removeprefix("step_")) if paths else 0


def assert_same_samples(ours, theirs) -> None:
    """Every field, arrays bit for bit."""
    for mine, other in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(mine):
            a, b = getattr(mine, field.name), getattr(other, field.name)
            same = a.tobytes() == b.tobytes() if hasattr(a, "tobytes") else a == b
            assert same, (mine.group_id, mine.index, field.name)
