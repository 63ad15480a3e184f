"""The simulation of scripts/benchmarks/async.py: a case worked out by hand, and its bound."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "benchmarks" / "async_simulation.py"
    spec = importlib.util.spec_from_file_location("async_simulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_barrier_costs_its_longest_group_and_then_the_step(simulation: ModuleType) -> None:
    """Two groups of one sample, 10 and 30 tokens: 10 tokens at (1 + 2) s, 20 more at (1 + 1) s,
    then 5 s of training, 40 tokens at 0.1 s, and 1 s of pushing: 80 s a step."""
    machine = simulation.Machine(
        num_engines=1,
        token_s=1.0,
        token_per_sequence_s=1.0,
        max_sequences=9,
        step_s=5.0,
        step_per_token_s=0.1,
        push_s=1.0,
    )
    found = simulation.simulate(
        machine,
        lengths=lambda group: [10 if group % 2 else 30],
        groups_per_step=2,
        staleness=0,
        num_steps=3,
    )
    assert found.tokens_per_s == pytest.approx(40 / 80)
    assert found.engine_busy == pytest.approx(70 / 80)


def test_an_engine_that_is_full_lets_sequences_wait(simulation: ModuleType) -> None:
    """One at a time: 10 and 30 tokens at (1 + 1) s."""
    machine = simulation.Machine(
        num_engines=1,
        token_s=1.0,
        token_per_sequence_s=1.0,
        max_sequences=1,
        step_s=0.0,
        step_per_token_s=0.0,
        push_s=0.0,
    )
    found = simulation.simulate(
        machine,
        lengths=lambda group: [10 if group % 2 else 30],
        groups_per_step=2,
        staleness=0,
        num_steps=2,
    )
    assert found.tokens_per_s == pytest.approx(40 / 80)


def test_staleness_hides_the_tail_and_keeps_its_bound(simulation: ModuleType) -> None:
    machine = simulation.Machine(
        num_engines=2,
        token_s=0.02,
        token_per_sequence_s=0.0005,
        max_sequences=64,
        step_s=1.0,
        step_per_token_s=0.0,
        push_s=0.1,
    )
    lengths = simulation.pareto_lengths(0, samples=4, shortest=50, alpha=1.1, longest=4000)
    found = [
        simulation.simulate(
            machine, lengths=lengths, groups_per_step=8, staleness=staleness, num_steps=40
        )
        for staleness in (0, 1, 4)
    ]
    assert [each.staleness_max for each in found] == [0, 1, 4]
    speeds = [each.tokens_per_s for each in found]
    assert speeds[0] < speeds[1] < speeds[2]
