"""Phases of a step, and a trace that names them."""

import gzip
import json
from pathlib import Path

import torch

from framework.config_system import ProfileConfig
from framework.profiling import Phases, StepProfiler


def train(profiler: StepProfiler, phases: Phases, steps: int) -> list[dict[str, float]]:
    figures = []
    for number in range(1, steps + 1):
        with profiler.step(number):
            with phases.measure("fetch"):
                weights = torch.ones(64, 64)
            for _ in range(2):
                with phases.measure("update"):
                    (weights @ weights).sum().item()
            figures.append(phases.take())
    profiler.finish()
    return figures


def test_a_step_is_split_into_its_phases(tmp_path: Path):
    profiler = StepProfiler(ProfileConfig(), tmp_path, rank=0)
    first, second = train(profiler, Phases(), 2)
    wanted = {"perf/fetch_s", "perf/update_s", "perf/peak_memory_bytes"}
    assert set(first) == set(second) == wanted
    assert first["perf/update_s"] > 0
    assert first["perf/peak_memory_bytes"] > 1e7  # a process with torch in it
    assert not list(tmp_path.iterdir())


def test_the_trace_holds_the_steps_asked_for_and_no_others(tmp_path: Path):
    config = ProfileConfig(first_step=2, num_steps=2, ranks=[1])
    train(StepProfiler(config, tmp_path, rank=0), Phases(), 4)
    assert not list(tmp_path.iterdir())
    train(StepProfiler(config, tmp_path, rank=1), Phases(), 4)
    with gzip.open(tmp_path / "rank_1.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("fetch") == 2
    assert names.count("update") == 4
    assert "aten::mm" in names


def test_a_run_that_ends_early_still_writes_its_trace(tmp_path: Path):
    train(StepProfiler(ProfileConfig(first_step=1, num_steps=9), tmp_path, 0), Phases(), 2)
    assert (tmp_path / "rank_0.json.gz").stat().st_size > 1000
