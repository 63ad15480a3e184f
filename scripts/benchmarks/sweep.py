"""Trainings of experiments, several at a time, on engines that stay up: for learning.py and others.

An engine takes half a minute of CPU to start and serves whatever weights a run pushes to it, so a
lane has one for all its runs. The supervised warm start of an experiment is trained once for each
seed; the runs begin with its weights. A run that fails or takes too long is an outcome like any
other; its lane then gets a new engine.
"""

import argparse
import contextlib
import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from framework.compose import compose_config
from framework.config import RunConfig
from framework.config_lora import LoraConfig
from framework.launch.prepare import write_run
from framework.launch.roles import trainer_role
from framework.progress import RunHistory
from framework.tiny_model import create_tiny_model
from rollout.process import end_process_group
from rollout.run_dir import RunDir
from rollout.server.engine import EngineProcess

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    name: str
    """Of its arm; with the seed its run directory."""
    seed: int
    overrides: tuple[str, ...]
    """`experiment=...` and what differs from it."""

    def config(self) -> RunConfig:
        """As composed, without a warm start's weights."""
        return compose_config([*self.overrides, f"seed={self.seed}"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to."""

    run: Run
    seconds: float
    accuracies: list[float]
    """Of its evaluations, in order."""
    run_dir: Path
    problem: str
    """Empty: it ended well."""

    @property
    def gain(self) -> float:
        """Accuracy of the last evaluation less that of the first."""
        return self.accuracies[-1] - self.accuracies[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    command: tuple[str, ...]
    run_dir: Path
    env: tuple[tuple[str, str], ...] = ()

    @property
    def log(self) -> Path:
        """What it says."""
        return self.run_dir.with_name(f"{self.run_dir.name}.log")


def sweep(runs: Sequence[Run], root: Path, *, jobs: int, timeout_s: float) -> Iterator[Outcome]:
    """Outcomes as they come; everything that was started has ended when the iterator has.

    Args:
        root: where run directories, warm starts and engine logs go.
        jobs: runs at a time; each needs about one CPU core.
        timeout_s: bound of one run.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what follows is undone
    root = root.resolve()
    warm, problems = _warm_starts(runs, root, jobs, timeout_s)
    ready = [run for run in runs if _warm_key(run) not in problems]
    for run in runs:
        if problem := problems.get(_warm_key(run)):
            yield Outcome(
                run=run, seconds=0, accuracies=[], run_dir=root, problem=f"warm start: {problem}"
            )
    if not ready:
        return
    by_job = {_job(run, root, warm): run for run in ready}
    with contextlib.ExitStack() as stack:
        engines = _start_engines(ready[0].config(), root, min(jobs, len(ready)), stack)
        ended = stack.enter_context(contextlib.closing(_run_all([*by_job], engines, timeout_s)))
        for job, seconds, problem in ended:
            history = RunHistory(RunDir(job.run_dir), by_job[job].config().num_steps)
            history.poll()
            accuracies = history.accuracies
            if not problem and len(accuracies) < 2:
                problem = f"{len(accuracies)} evaluations"
            yield Outcome(
                run=by_job[job],
                seconds=seconds,
                accuracies=accuracies,
                run_dir=job.run_dir,
                problem=problem,
            )


def options(description: str, timeout_s: float) -> argparse.ArgumentParser:
    """The command line that sweeps share; `timeout_s`: bound of one run, where it says nothing."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a CPU core each")
    parser.add_argument("--timeout-s", type=float, default=timeout_s, help="bound of one run")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--keep", type=Path, help="where the runs stay (default: nowhere)")
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    return parser


def sweep_as_told(runs: Sequence[Run], arguments: argparse.Namespace) -> Iterator[Outcome]:
    """`sweep`, by what `options` were given."""
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.keep or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        yield from sweep(runs, root, jobs=arguments.jobs, timeout_s=arguments.timeout_s)


def _warm_key(run: Run) -> str:
    """What runs have in common that can begin with the same weights."""
    config = run.config()
    model = dataclasses.replace(config.model, lora=LoraConfig())  # a warm start trains the whole
    return repr((model, config.data.task, config.data.args, config.warm_start, run.seed))


def _warm_starts(
    runs: Sequence[Run], root: Path, jobs: int, timeout_s: float
) -> tuple[dict[str, Path], dict[str, str]]:
    """Key -> Hugging Face directory, key -> what went wrong."""
    found: dict[_Job, str] = {}
    for key, run in {_warm_key(run): run for run in runs}.items():
        run_dir = root / f"warm_start_{len(found)}"
        overrides = [*run.overrides, f"seed={run.seed}", f"run_dir={run_dir}"]
        stage = write_run(compose_config(overrides)).warm_start
        if stage is None:
            raise ValueError(f"{run.name}: an experiment with warm_start.num_steps is wanted")
        role = trainer_role(stage, "warm_start")
        assert role is not None
        found[_Job(command=tuple(role.command), run_dir=run_dir, env=(*role.env.items(),))] = key
    problems = {}
    with contextlib.closing(_run_all([*found], [None] * jobs, timeout_s)) as ended:
        for job, _, problem in ended:
            if problem:
                problems[found[job]] = problem
    return {key: job.run_dir / "warm_start" / "hf" for job, key in found.items()}, problems


def _job(run: Run, root: Path, warm: dict[str, Path]) -> _Job:
    run_dir = root / f"{run.name}_{run.seed}"
    command = [
        str(Path(sys.executable).with_name("drivetrain")),
        *run.overrides,
        f"seed={run.seed}",
        f"model.hf_path={warm[_warm_key(run)]}",
        "warm_start.num_steps=0",
        "tracker=quiet",
        f"run_dir={run_dir}",
    ]
    return _Job(command=tuple(command), run_dir=run_dir)


def _start_engines(
    config: RunConfig, root: Path, count: int, stack: contextlib.ExitStack
) -> list[EngineProcess]:
    model_dir = root / "engines" / "tiny_model"
    create_tiny_model(config.model.tiny, model_dir)
    engines = [
        EngineProcess(
            config=config.rollout.engine,
            model_path=str(model_dir),
            api_key=secrets.token_hex(16),
            log_path=root / "engines" / f"engine_{k}.log",
            index=k,
        )
        for k in range(count)
    ]
    return [stack.enter_context(engine) for engine in engines]


def _run_all(
    jobs: Sequence[_Job], engines: Sequence[EngineProcess | None], timeout_s: float
) -> Generator[tuple[_Job, float, str], None, None]:
    """(job, seconds, what went wrong) as they end, one at a time on each engine (None: without)."""
    waiting, free = deque(jobs), [*range(len(engines))]
    running: dict[int, tuple[_Job, subprocess.Popen, float]] = {}
    try:
        while waiting or running:
            while waiting and free:
                job, lane = waiting.popleft(), free.pop()
                running[lane] = job, _start(job, engines[lane]), time.monotonic()
            time.sleep(0.2)
            for lane, (job, process, started) in [*running.items()]:
                seconds = time.monotonic() - started
                late = seconds > timeout_s
                if process.poll() is None and not late:
                    continue
                end_process_group(process, STOP_S)
                del running[lane]
                problem = _problem(job, process.returncode)
                problem = f"not done after {timeout_s:g} s" if late else problem
                engine = engines[lane]
                if problem and engine is not None:  # it may have been left paused
                    engine.stop()
                    engine.start()
                free.append(lane)
                yield job, seconds, problem
    finally:
        for _, process, _ in running.values():
            end_process_group(process, STOP_S)


def _start(job: _Job, engine: EngineProcess | None) -> subprocess.Popen:
    command = [*job.command]
    if engine is not None:
        command += [
            f"rollout.engine.urls=[{engine.url}]",
            f"rollout.engine.api_key={engine.api_key}",
        ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with job.log.open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | dict(job.env),
            start_new_session=True,
        )


def _problem(job: _Job, status: int) -> str:
    """Empty where the run ended well; else its last words."""
    if not status:
        return ""
    lines = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("drivetrain: ")] or lines
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"{name}: {''.join(said[-1:])[:300]} (log: {job.log})"
