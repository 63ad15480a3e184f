"""stage=preference whole, on one rank: what it logs, and that a stop between changes nothing.

Ranks are forked from this process, which has imported megatron-core once.
"""

import json
import multiprocessing
import os
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import framework.megatron.checkpoint
import framework.preference_trainer  # noqa: F401  # imported here and not in every rank
from framework.compose import compose_config
from framework.launch.prepare import write_run
from framework.train import run
from rollout.run_dir import RunDir

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def overrides(tiny_model_dir):
    return [
        *("experiment=smoke", "stage=preference", "warm_start.num_steps=0"),
        *(f"model.hf_path={tiny_model_dir}", "preference.batch_size=8"),
        *("data.eval_num_prompts=8", "optimizer.lr=1e-3", "optimizer.warmup_steps=2"),
        *("checkpoint.every_steps=2", "checkpoint.async_save=false", "tracker.tensorboard=false"),
    ]


def train(run_dir: Path, overrides: list[str]) -> None:
    """One run in a process of its own."""
    config = compose_config([*overrides, f"run_dir={run_dir}"])
    main = write_run(config).main
    rank = multiprocessing.get_context("fork").Process(target=_rank, args=(main, run_dir))
    rank.start()
    rank.join(120)
    log = run_dir / "failed.txt"
    assert rank.exitcode == 0, log.read_text() if log.exists() else rank


def _rank(config, run_dir: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    store = run_dir / f"store_{config.num_steps}"
    dist.init_process_group(
        "gloo", f"file://{store}", rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    try:
        run(config, RunDir(run_dir))
    except BaseException:
        (run_dir / "failed.txt").write_text(traceback.format_exc())
        raise


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name",
    ["dpo", pytest.param("kto", marks=pytest.mark.nightly)],  # the same path, seconds more
)
def test_n_and_n_steps_with_a_stop_between_are_2n_steps(name, overrides, tmp_path):
    """Bit for bit; the reference is what the run began with, also after the stop."""
    line = [*overrides, f"algorithm={name}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, [*line, "num_steps=4"])
    train(parts, [*line, "num_steps=2", "eval.at_end=false"])
    train(parts, [*line, "num_steps=4", "checkpoint.resume=auto"])
    for ours, theirs in zip(rows(parts), rows(whole), strict=True):
        figures = {k for k in theirs if k.startswith(("train/", "eval/"))}
        assert {k: ours[k] for k in figures} == {k: theirs[k] for k in figures}
    a, b = (load_file(path / "hf" / "model.safetensors") for path in (parts, whole))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    trained = [row for row in rows(whole) if "train/loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert trained[0]["train/chosen_reward"] == 0  # at the reference itself
    assert trained[-1]["train/chosen_reward"] != 0
    start, end = (row for row in rows(whole) if "eval/loss" in row)
    assert (start["step"], end["step"]) == (0, 4)
    assert end["eval/loss"] < start["eval/loss"]
    assert "train/rollout_logprob_abs_diff_max" not in trained[0]
