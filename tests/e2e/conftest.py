"""The run that several files look at, made once."""

import pytest

from tests.e2e.runs import COMMON, drivetrain


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """Its directory and the finished command: warm start, its own engine, two data-parallel
    trainers, six steps of GRPO."""
    run_dir = tmp_path_factory.mktemp("run") / "first"
    done = drivetrain(*COMMON, "warm_start.num_steps=80", "parallel.dp=2", f"run_dir={run_dir}")
    return run_dir, done
