"""`kill -9` of trainers that write a checkpoint: the run always goes on, to the same end."""

import random
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from framework.checkpoints import list_checkpoints, newest_checkpoint, read_checkpoint
from framework.main import main
from tests.e2e.journals import write_journal
from tests.e2e.trainers import kill_trainers, start_trainers, wait_trainers

LONGEST_WAIT_S = 1.5
"""From the beginning of a save to the kill: within that one or, saving every step, a later one."""


def prepare(run_dir: Path, journal: Path, num_steps: int, *overrides: str) -> None:
    """A run directory for two data-parallel trainers on the tiny model."""
    status = main(
        [
            *("experiment=smoke", "mode=train_only", "cluster=manual", "gate.enabled=false"),
            *("warm_start.num_steps=0", "eval.at_start=false", "eval.at_end=false"),
            *("tracker.tensorboard=false", "optimizer.lr=1e-3", "parallel.dp=2"),
            *("parallel.distributed_optimizer=true", f"num_steps={num_steps}"),
            *(f"run_dir={run_dir}", f"replay_dir={journal}", *overrides),
        ]
    )
    assert status == 0


def writing(run_dir: Path) -> list[Path]:
    """Checkpoints that are not complete."""
    return list((run_dir / "checkpoints").glob(".step_*.writing"))


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Trainers and their writers."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and str(run_dir) in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def kill_during_a_save(run_dir: Path, rng: random.Random) -> bool:
    """Start the trainers, kill them at a random moment of a save; whether it was cut short."""
    before = newest_checkpoint(run_dir / "checkpoints")
    target = (before.step if before else 0) + rng.randint(1, 2)
    ranks = start_trainers(run_dir, 2)
    try:
        deadline = time.monotonic() + 120
        while not any(f"_{target:06d}" in path.name for path in writing(run_dir)):
            assert time.monotonic() < deadline, f"no save of step {target} began"
            assert all(process.poll() is None for process in ranks), "a trainer ended"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, LONGEST_WAIT_S))
    finally:
        kill_trainers(ranks if rng.random() < 0.7 else ranks[::-1])
    deadline = time.monotonic() + 5
    while processes_of(run_dir):
        assert time.monotonic() < deadline, "a writer outlived its trainer"
        time.sleep(0.02)
    for path in list_checkpoints(run_dir / "checkpoints"):
        read_checkpoint(path)
    return bool(writing(run_dir))


def survive(tmp_path: Path, num_kills: int, seed: int) -> None:
    """Kill, go on, kill, ...; the end must be that of an undisturbed run, bit for bit."""
    num_steps, rng = 3 * num_kills + 2, random.Random(seed)
    journal, run_dir, calm = tmp_path / "journal", tmp_path / "killed", tmp_path / "calm"
    write_journal(journal, num_steps=num_steps)
    prepare(calm, journal, num_steps)
    wait_trainers(start_trainers(calm, 2))
    prepare(run_dir, journal, num_steps, "checkpoint.every_steps=1", "checkpoint.resume=auto")
    steps, cut = [0], 0
    for _ in range(num_kills):
        cut += kill_during_a_save(run_dir, rng)
        found = newest_checkpoint(run_dir / "checkpoints")
        steps.append(found.step if found else 0)
    assert cut, "no kill fell inside a save: nothing was shown"
    assert steps == sorted(steps), "a complete checkpoint was lost"
    wait_trainers(start_trainers(run_dir, 2))
    print(f"{num_kills} kills, {cut} within a save; complete afterwards: {steps[1:]}")
    assert not writing(run_dir)
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (run_dir, calm))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == num_steps
    assert len(list_checkpoints(run_dir / "checkpoints")) == 2


@pytest.mark.nightly  # three starts of two trainers: 2.5 minutes
def test_two_kills_during_saves(tmp_path):
    survive(tmp_path, num_kills=2, seed=1)


@pytest.mark.nightly  # 22 starts of two trainers: 5 minutes
@pytest.mark.timeout(1800)
def test_twenty_kills_during_saves(tmp_path):
    survive(tmp_path, num_kills=20, seed=2)
