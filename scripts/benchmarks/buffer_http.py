"""The part of scripts/benchmarks/buffer.py that asks a rollout process over HTTP."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from rollout.config import EngineConfig, RolloutConfig, SamplingConfig
from rollout.run_dir import RunDir
from rollout.source import BufferClient

ROOT = Path(__file__).resolve().parents[2]
HTTP_TAKES = 200
WAIT_S = 300.0
HEADER = (
    f"{'held':>8} {'samples':>8} {'tokens':>7} {'puts/s':>9} {'takes/s':>8} {'batch ms':>8} "
    f"{'p99':>8} {'samples':>8} {'p99':>8} {'KB a step':>10}"
)


def check(ids: list[int], count: int) -> None:
    """Exit unless these are all groups, once each, in order."""
    if ids != list(range(count)):
        sys.exit("groups were lost, doubled, or came out of order")


def over_http(size: int, per_step: int, tokens: int, per_prompt: int = 1) -> None:
    """One line: groups made and taken over HTTP with `size` groups held."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = make_run(Path(directory), size // per_step, per_step, tokens, per_prompt)
        command = [sys.executable, "-m", "rollout.main", "--run-dir", str(run_dir.path)]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts" / "benchmarks")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        log = run_dir.log("rollout")
        with log.open("wb") as file:
            server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            url = run_dir.wait_address("rollout", WAIT_S)
            measure_http(BufferClient(url, run_dir.token(), WAIT_S), run_dir, size, per_step)
        except TimeoutError as error:
            sys.exit(f"{error}; its log ends with\n{log.read_text()[-2000:]}")
        finally:
            server.terminate()
            server.wait(30)


def make_run(root: Path, steps: int, per_step: int, tokens: int, per_prompt: int) -> RunDir:
    """A run directory whose engines nobody asks."""
    from framework.config import TinyModelConfig
    from framework.tiny_model import create_tiny_model

    create_tiny_model(TinyModelConfig(), root / "model")
    run_dir = RunDir(root / "run")
    run_dir.create()
    rollout = RolloutConfig(
        prompts_per_step=per_step,
        samples_per_prompt=per_prompt,
        max_staleness_steps=steps - 1,
        sampling=SamplingConfig(max_new_tokens=tokens),
        # Few at a time: what is made up waits for nothing, and would keep the server busy.
        engine=EngineConfig(urls=["http://127.0.0.1:9"], max_running_requests=16),
    )
    config = {
        "mode": "train",
        "seed": 0,
        "num_steps": steps,
        "model": {"hf_path": str(root / "model"), "init_from": ""},
        "batch": {"max_tokens_per_microbatch": 8192, "overlong": "refuse"},
        "parallel": {"cp": 1},
        "rollout": OmegaConf.to_container(OmegaConf.structured(rollout)),
        "data": {
            "task": "made_up_answers.NothingEnvironment",
            "generate": "made_up_answers.answer",
        },
    }
    OmegaConf.save(OmegaConf.create(config), run_dir.config)
    return run_dir


def measure_http(source: BufferClient, run_dir: RunDir, size: int, per_step: int) -> None:
    """Publish, wait until all groups are held, take some steps; one line."""
    held = size // per_step * per_step
    start = time.perf_counter()
    source.publish(0)
    deadline = time.monotonic() + WAIT_S
    while (health := source.health()).accepted < held:
        if time.monotonic() > deadline or health.failure:
            sys.exit(f"{health.accepted} of {held} groups within {WAIT_S} s {health.failure}")
        time.sleep(0.05)
    puts_per_s = held / (time.perf_counter() - start)
    batch_s, samples_s, ids = [], [], []
    for step in range(min(HTTP_TAKES, size // per_step)):
        start = time.perf_counter()
        batch = source.take(step)
        batch_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        samples = source.fetch(step, list(range(len(batch.samples))))
        samples_s.append(time.perf_counter() - start)
        ids += [sample.group_id for sample in samples if sample.index == 0]
    check(ids, len(ids))
    files = list(run_dir.rollouts.glob("step_*"))
    kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1e3
    takes_per_s = len(ids) / per_step / (sum(batch_s) + sum(samples_s))
    cells = [np.percentile(each, q) * 1e3 for each in (batch_s, samples_s) for q in (50, 99)]
    print(
        f"{held:8d} {len(samples):8d} {len(samples[0].tokens):7d} {puts_per_s:9.0f} "
        f"{takes_per_s:8.0f} " + " ".join(f"{each:8.2f}" for each in cells) + f" {kilobytes:10.0f}",
        flush=True,
    )
