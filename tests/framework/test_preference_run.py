"""Stages preference and reward_model whole, on one rank; a stop between changes nothing.

Ranks are forked from this process, which has imported megatron-core once.
"""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from framework.config import AlgorithmConfig, ModelConfig, RunConfig
from framework.config_critic import CriticConfig
from framework.critic import build_critic
from framework.megatron.parallel import start_mesh, stop_mesh
from framework.path_checks import path_errors
from rollout.config import DataConfig
from rollout.preferences import open_preferences
from rollout.tokens import Chat
from tests.forked_ranks import run_ranks
from tests.framework.forked_run import rows, train

pytestmark = pytest.mark.timeout(240)


def _compare_critics(run_dir, _) -> None:
    """One begins with the run's Hugging Face directory, one with its checkpoint: the same."""
    critics = []
    for start in (run_dir / "hf", run_dir / "checkpoints" / "step_000002"):
        config = RunConfig(
            model=ModelConfig(hf_path=str(run_dir / "hf")),
            algorithm=AlgorithmConfig(advantage="gae"),
            critic=CriticConfig(init_from=str(start)),
        )
        assert not [error for error in path_errors(config) if "critic" in error]
        if not critics:
            mesh = start_mesh(config.parallel, config.seed)
        critics.append(build_critic(config, mesh, None).model.chunks[0].state_dict())
    stop_mesh()
    tensors = [name for name, each in critics[0].items() if isinstance(each, torch.Tensor)]
    assert any(critics[0][name].any() for name in tensors if name.startswith("output_layer"))
    assert all(torch.equal(critics[0][name], critics[1][name]) for name in tensors)


@pytest.fixture(scope="module")
def overrides(tiny_model_dir):
    return [
        *("experiment=smoke", "warm_start.num_steps=0"),
        *(f"model.hf_path={tiny_model_dir}", "preference.batch_size=8"),
        *("data.eval_num_prompts=8", "optimizer.lr=1e-3", "optimizer.warmup_steps=2"),
        *("checkpoint.every_steps=2", "checkpoint.async_save=false", "tracker.tensorboard=false"),
    ]


def test_supervised_training_from_a_file_stops_and_goes_on(overrides, tmp_path):
    """Bit for bit, in the middle of an epoch of 20 records by 8; the loss falls."""
    data = tmp_path / "answers.jsonl"
    records = [{"prompt": f"{k}{k}=", "completion": f"{k % 10}"} for k in range(10, 30)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    line = [*overrides, "stage=sft", f"data.path={data}", "warm_start.batch_size=8"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, [*line, "num_steps=6"])
    train(parts, [*line, "num_steps=2"])
    train(parts, [*line, "num_steps=6", "checkpoint.resume=auto"])
    a, b = (load_file(path / "hf" / "model.safetensors") for path in (parts, whole))
    assert all(torch.equal(a[key], b[key]) for key in a)
    losses = [row["train/loss"] for row in rows(whole)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("dpo", "preference"),
        pytest.param("kto", "preference", marks=pytest.mark.nightly),  # the same path
        pytest.param("bradley_terry", "reward_model", marks=pytest.mark.nightly),  # nearly so
    ],
)
def test_n_and_n_steps_with_a_stop_between_are_2n_steps(name, stage, overrides, tmp_path):
    """Bit for bit; the reference is what the run began with, also after the stop."""
    line = [*overrides, f"algorithm={name}", f"stage={stage}"]
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
    assert trained[0]["train/chosen_reward"] == 0  # at the reference itself, or at a head of 0
    assert trained[-1]["train/chosen_reward"] != 0
    start, end = (row for row in rows(whole) if "eval/loss" in row)
    assert (start["step"], end["step"]) == (0, 4)
    assert end["eval/loss"] < start["eval/loss"]
    assert "train/rollout_logprob_abs_diff_max" not in trained[0]


def test_a_reward_model_is_what_transformers_scores_with(overrides, tiny_model_dir, tmp_path):
    """Trained from a causal model and gone on with from its own directory; scores agree."""
    from transformers import AutoModelForSequenceClassification

    line = [*overrides, "stage=reward_model", "algorithm=bradley_terry", "data.args.num_digits=3"]
    line += ["preference.batch_size=32"]
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, [*line, "num_steps=2"])
    train(second, [*line, "num_steps=2", f"model.init_from={first / 'hf'}"])
    before, after = ([row for row in rows(path) if "eval/loss" in row] for path in (first, second))
    assert before[0]["eval/loss"] == pytest.approx(0.6931472)  # the head begins at zero
    start = {key: value for key, value in after[0].items() if key != "step"}
    end = {key: value for key, value in before[-1].items() if key != "step"}
    assert start == pytest.approx(end, abs=1e-6)  # the head came along
    run_ranks("critics", 1, functools.partial(_compare_critics, first), tmp_path, 60.0)
    model = AutoModelForSequenceClassification.from_pretrained(second / "hf")
    assert type(model).__name__ == "Qwen3ForSequenceClassification"
    chat = Chat.load(str(tiny_model_dir))
    data = DataConfig(args={"num_digits": 3}, eval_num_prompts=8)
    samples = open_preferences(data, chat, 0, paired=True).held_out()
    with torch.no_grad():
        scores = [
            model(torch.tensor(sample.tokens[None].astype("int64"))).logits.item()
            for sample in samples
        ]
    assert after[-1]["eval/chosen_reward"] == pytest.approx(sum(scores[::2]) / 8, abs=1e-5)
    assert after[-1]["eval/rejected_reward"] == pytest.approx(sum(scores[1::2]) / 8, abs=1e-5)
