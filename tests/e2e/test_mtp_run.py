"""Whole runs on a model with multi-token prediction: nothing of it is lost; it learns if asked."""

import json

import pytest
from runs import drivetrain, metrics, weights
from safetensors.torch import load_file, save_file

from framework.config import TinyModelConfig
from framework.tiny_model import create_tiny_model
from megatron_bridge.convert import main
from tests.megatron_bridge.mtp_models import GLM
from tests.random_weights import random_weights

pytestmark = [
    pytest.mark.nightly,  # two trainings through the command: a minute
    pytest.mark.timeout(600),
]

LATER = "model.layers.4."
COPIES = {
    f"{LATER}embed_tokens.weight": "model.embed_tokens.weight",
    f"{LATER}shared_head.head.weight": "lm_head.weight",
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A GLM-4.5 with the tiny models' tokenizer."""
    path = tmp_path_factory.mktemp("glm")
    create_tiny_model(TinyModelConfig(), path)
    tiny = json.loads((path / "config.json").read_text())
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    config = GLM | {name: tiny[name] for name in kept} | {"dtype": "float32"}
    (path / "config.json").write_text(json.dumps(config))
    tensors = random_weights(config, 3)
    tensors |= {copy: tensors[original].clone() for copy, original in COPIES.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def run(start, run_dir, *overrides, mtp, check=True):
    """Supervised training of that model; the finished process."""
    return drivetrain(
        "experiment=smoke",
        "stage=sft",
        f"model.hf_path={start}",
        f"model.mtp={mtp}",
        f"run_dir={run_dir}",
        "warm_start.num_steps=0",
        "optimizer.lr=1e-3",
        "checkpoint.every_steps=3",
        "tracker.tensorboard=false",
        *overrides,
        check=check,
    )


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """The directories of a run without and of one with such layers, by model.mtp."""
    root = tmp_path_factory.mktemp("runs")
    for mtp in (False, True):
        run(start, root / str(mtp), "num_steps=3", mtp=mtp)
    return {mtp: root / str(mtp) for mtp in (False, True)}


def test_a_run_that_builds_none_carries_them_on(start, finished):
    before, after = load_file(start / "model.safetensors"), weights(finished[False])
    assert after.keys() == before.keys()
    moved = {name for name in before if not after[name].equal(before[name])}
    assert "model.layers.3.mlp.gate.weight" in moved
    assert {name for name in moved if name.startswith(LATER)} == COPIES.keys()
    assert all(after[copy].equal(after[original]) for copy, original in COPIES.items())
    config = json.loads((finished[False] / "hf" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1


def test_a_run_that_trains_them_trains_the_same_policy(finished):
    without, trained = weights(finished[False]), weights(finished[True])
    assert trained.keys() == without.keys()
    moved = {name for name in without if not trained[name].equal(without[name])}
    assert f"{LATER}eh_proj.weight" in moved
    assert all(name.startswith(LATER) for name in moved)
    assert all(trained[copy].equal(trained[original]) for copy, original in COPIES.items())
    assert all(
        line["train/mtp_loss"] > 0 for line in metrics(finished[True]) if "train/loss" in line
    )
    assert not any("train/mtp_loss" in line for line in metrics(finished[False]))


@pytest.mark.parametrize("mtp", [False, True])
def test_checkpoints_give_the_same_directory(start, finished, tmp_path, mtp):
    saved = finished[mtp] / "checkpoints" / "step_000003"
    assert main(["to-hf", str(saved), str(tmp_path / "hf"), "--like", str(start)]) == 0
    found, wanted = load_file(tmp_path / "hf" / "model.safetensors"), weights(finished[mtp])
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_a_run_goes_on_only_with_them(start, finished, tmp_path):
    onward = ("num_steps=4", f"checkpoint.resume={finished[True] / 'checkpoints' / 'step_000003'}")
    done = run(start, tmp_path / "without", *onward, mtp=False, check=False)
    assert done.returncode == 2
    assert f"{onward[1]}: its multi-token prediction layers would be lost" in done.stderr
    assert not (tmp_path / "without").exists()
    run(start, tmp_path / "with", *onward, mtp=True)
    assert "train/mtp_loss" in metrics(tmp_path / "with")[-1]
