"""`kill -9` at random moments of an engine, the router, the rollout process, a trainer rank.

The run goes on by itself, and ends in the same journal and weights as one that nothing disturbed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from runs import COMMON, drivetrain, largest_difference, metrics, weights

from rollout.journal import list_steps, read_step
from tests.e2e.test_resume import assert_same_samples

ROLES = ("engine_0", "router", "rollout", "trainer")
GROUPS_PER_STEP = 4
SURVIVES = [
    "rollout.engine.router=true",
    "rollout.engine.router_policy=round_robin",  # there is one engine only
    "checkpoint.every_steps=2",
    "tracker.report=false",
    "parallel.dp=2",
    "warm_start.num_steps=0",
]


@dataclass
class Run:
    """A run under fire."""

    run_dir: Path
    launcher: subprocess.Popen

    def kill(self, role: str, rng: random.Random) -> str:
        """SIGKILL to one process of the role; what it was. "" where none is alive just now."""
        victims = self.processes(role)
        if not victims:
            return ""
        victim = rng.choice(victims)
        try:
            what = f"{role} (process {victim.pid}: {' '.join(victim.cmdline())[-60:]})"
            os.kill(victim.pid, signal.SIGKILL)
        except (psutil.NoSuchProcess, ProcessLookupError):
            return ""
        return what

    def processes(self, role: str) -> list[psutil.Process]:
        """A server's launcher and all that it started; the rollout process; the trainer ranks."""
        if role == "trainer":
            children = psutil.Process(self.launcher.pid).children(recursive=True)
            return [child for child in children if _is_rank(child, self.run_dir)]
        try:
            pid = json.loads((self.run_dir / "addresses" / f"{role}.json").read_bytes())["pid"]
            process = psutil.Process(pid)
            return [process, *process.children(recursive=True)]
        except (FileNotFoundError, psutil.NoSuchProcess):
            return []

    def step(self) -> int:
        """Steps trained, as metrics.jsonl says."""
        path = self.run_dir / "metrics.jsonl"
        return (
            max((row["step"] for row in metrics(self.run_dir)), default=0) if path.exists() else 0
        )


def _is_rank(process: psutil.Process, run_dir: Path) -> bool:
    try:
        line = process.cmdline()
        return (
            str(run_dir) in line and "framework.train" in line and "torchrun" not in " ".join(line)
        )
    except psutil.NoSuchProcess:
        return False


def start(run_dir: Path, *overrides: str) -> Run:
    command = [str(Path(sys.executable).with_name("drivetrain")), *COMMON, *SURVIVES, *overrides]
    log = (run_dir.parent / f"{run_dir.name}.log").open("wb")
    with log:
        launcher = subprocess.Popen(
            [*command, f"run_dir={run_dir}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},  # filters of tests
        )
    return Run(run_dir, launcher)


def wait_end(run: Run, timeout_s: float) -> None:
    """Until the launcher ends, with status 0."""
    try:
        status = run.launcher.wait(timeout=timeout_s)
    finally:
        run.launcher.terminate()
    said = (run.run_dir.parent / f"{run.run_dir.name}.log").read_text()
    assert status == 0, said[-3000:]


def audit(killed: Path, calm: Path, num_steps: int) -> None:
    """No group lost or doubled; the same samples; the same weights; every step logged once."""
    steps = list_steps(killed / "rollouts")
    assert len(steps) == num_steps
    groups = [sorted({sample.group_id for sample in read_step(path)[1]}) for path in steps]
    every = [group for batch in groups for group in batch]
    assert every == list(range(num_steps * GROUPS_PER_STEP))
    for ours, theirs in zip(steps, list_steps(calm / "rollouts"), strict=True):
        assert_same_samples(read_step(ours)[1], read_step(theirs)[1])
    assert largest_difference(weights(killed), weights(calm)) == 0.0
    logged = [row["step"] for row in metrics(killed) if "train/loss" in row]
    assert logged == list(range(1, num_steps + 1))


@pytest.mark.timeout(900)
def test_four_kills_lose_nothing(first_run, tmp_path):
    """Each role once, in a random order, each at a random moment of a step."""
    calm, _ = first_run
    rng = random.Random(5)
    roles = rng.sample(ROLES, len(ROLES))
    run = start(tmp_path / "killed", f"model.init_from={calm / 'warm_start' / 'hf'}")
    try:
        for step, role in enumerate(roles, start=1):
            deadline = time.monotonic() + 200
            while run.step() < step:
                assert run.launcher.poll() is None, "the run ended before the kill"
                assert time.monotonic() < deadline, f"step {step} was not reached"
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            while not (what := run.kill(role, rng)):
                assert run.launcher.poll() is None, f"{role} was not met alive"
                time.sleep(0.01)
            print(f"after step {step}: killed {what}")
    except BaseException:
        run.launcher.terminate()
        run.launcher.wait(timeout=60)
        print((tmp_path / "killed.log").read_text()[-3000:])
        raise
    wait_end(run, 250)
    audit(run.run_dir, calm, 6)


def survive(run: Run, num_kills: int, num_steps: int, seed: int) -> None:
    """Kills at random times, whoever is alive then; also while others are still coming back."""
    rng, kills, step = random.Random(seed), [], 0
    most = num_steps // num_kills - 1  # steps between two kills, so that there are enough for all
    try:
        while len(kills) < num_kills:
            # Time for a few steps between two kills, now and then less than a role needs to start.
            until = time.monotonic() + rng.expovariate(1 / 15)
            while run.step() < step + most and (
                time.monotonic() < until or (run.step() <= step and rng.random() < 0.99)
            ):
                time.sleep(0.1)
                if run.launcher.poll() is not None:
                    break
            if run.launcher.poll() is not None or run.step() >= num_steps - 1:
                break
            if what := run.kill(rng.choice(ROLES), rng):
                step = run.step()
                kills.append(f"at step {step}: {what}")
    except BaseException:
        run.launcher.terminate()
        raise
    finally:
        print("\n".join(kills))
    wait_end(run, 900)
    assert len(kills) == num_kills, f"the run was over after {len(kills)} kills"


def num_kills() -> int:
    """20; more with DRIVETRAIN_KILLS=100."""
    return int(os.environ.get("DRIVETRAIN_KILLS", "20"))


@pytest.mark.nightly  # 200 steps with 20 restarts, among them of engines: minutes
@pytest.mark.timeout(3600)
def test_twenty_kills_lose_nothing(tmp_path):
    kills, calm = num_kills(), tmp_path / "calm"
    steps = f"num_steps={10 * kills}"
    drivetrain(
        *COMMON, *SURVIVES[2:5], "warm_start.num_steps=80", steps, f"run_dir={calm}", timeout_s=900
    )
    start_from = f"model.init_from={calm / 'warm_start' / 'hf'}"
    run = start(tmp_path / "killed", steps, start_from, "cluster.max_restarts=1000")
    survive(run, kills, 10 * kills, seed=7)
    audit(run.run_dir, calm, 10 * kills)
