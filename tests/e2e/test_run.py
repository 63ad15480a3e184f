"""Whole runs with the real SGLang server and real torchrun trainers, through the command line."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from runs import COMMON, TIMES, drivetrain, largest_difference, metrics, weights
from safetensors.torch import load_file

from framework.weight_sync.engines import Engines, WeightSyncError


def test_a_run_ends_with_everything_it_promises(first_run):
    run_dir, done = first_run
    last = done.stdout.strip().splitlines()[-1]
    assert "accuracy" in last
    assert "6 steps" in last
    assert str(run_dir / "report.html") in last
    rows = metrics(run_dir)
    trained = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    for row in trained:
        assert row["train/rollout_logprob_abs_diff_max"] < 1e-4
        assert row["rollout/staleness_max"] == 0
        assert row["perf/weight_sync_bytes"] > 4e5
    assert any(row["train/grad_norm"] > 0 for row in trained), "no step learnt anything"
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 6]
    assert len(list((run_dir / "rollouts").glob("step_*.msgpack"))) == 6
    for name in ("engine_0", "rollout", "trainer"):
        assert (run_dir / "logs" / f"{name}.log").stat().st_size
    start = load_file(run_dir / "warm_start" / "hf" / "model.safetensors")
    assert largest_difference(start, weights(run_dir)) > 1e-4


def test_no_process_of_the_run_is_left(first_run):
    run_dir, _ = first_run
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if str(run_dir) in " ".join(process.info["cmdline"] or [])
    ]
    assert not left


def test_hf_directory_gives_the_engines_greedy_answers_in_transformers(first_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, _ = first_run
    last = json.loads((run_dir / "eval.jsonl").read_text().splitlines()[-1])
    assert last["version"] == 6
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    assert last["samples"]
    for sample in last["samples"]:
        message = [{"role": "user", "content": sample["prompt"].removeprefix("<bos>")}]
        ids = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, do_sample=False, max_new_tokens=8)  # pyright: ignore
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
        assert answer == sample["response"]


def test_the_same_seed_gives_the_same_run_bit_for_bit(first_run, engine, tmp_path):
    """Again, on another engine, which other tests use as well and which here takes turns with the
    trainers: in theirs it sleeps, without weights and cache. Pushes go through shared memory."""
    run_dir, _ = first_run
    again = tmp_path / "again"
    drivetrain(
        *COMMON,
        "warm_start.num_steps=0",
        "parallel.dp=2",
        f"run_dir={again}",
        f"model.init_from={run_dir / 'warm_start' / 'hf'}",
        f"rollout.engine.urls=[{engine.url}]",
        f"rollout.engine.api_key={engine.api_key}",
        "rollout.engine.colocated=true",
        "weight_sync=tensor",
    )
    assert largest_difference(weights(run_dir), weights(again)) == 0.0
    log = engine.log_path.read_text()
    assert log.count("released weights") == log.count("released kv_cache") == 8  # start, steps, end
    for first, second in zip(metrics(run_dir), metrics(again), strict=True):
        assert first.keys() == second.keys()
        for name in first:
            if not name.endswith(TIMES):
                assert first[name] == second[name], (first["step"], name)


@pytest.mark.parametrize("layout", ["parallel.dp=1", "parallel.tp=2", "parallel.pp=2"])
def test_every_layout_trains_the_journal_to_the_same_weights(first_run, tmp_path, layout):
    run_dir, _ = first_run
    replay = tmp_path / "replay"
    drivetrain(
        *COMMON,
        "mode=train_only",
        f"replay_dir={run_dir / 'rollouts'}",
        "warm_start.num_steps=0",
        layout,
        f"run_dir={replay}",
        f"model.init_from={run_dir / 'warm_start' / 'hf'}",
    )
    assert largest_difference(weights(run_dir), weights(replay)) <= 1e-5


def test_a_journal_of_another_policy_is_stopped_by_the_gate(first_run, tmp_path):
    run_dir, _ = first_run
    done = drivetrain(
        *COMMON,
        "mode=train_only",
        f"replay_dir={run_dir / 'rollouts'}",
        "warm_start.num_steps=0",
        f"run_dir={tmp_path / 'other'}",
        "model.tiny.init_seed=5",
        check=False,
    )
    assert done.returncode == 1
    assert "gate.logprob_abs_diff_max=0.0001" in done.stderr
    assert not (tmp_path / "other" / "hf").exists()


def test_a_planted_wrong_weight_stops_the_run_and_is_named(engine, tiny_model_dir, tmp_path):
    """One element of one tensor is changed on its way to the engine."""
    run_dir = tmp_path / "planted"
    drivetrain(
        *COMMON,
        "cluster=manual",
        "warm_start.num_steps=0",
        f"run_dir={run_dir}",
        f"model.hf_path={tiny_model_dir}",
        f"rollout.engine.urls=[{engine.url}]",
        f"rollout.engine.api_key={engine.api_key}",
        "rollout.address=http://127.0.0.1:9",
    )
    trainer = Path(__file__).with_name("planted_trainer.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", str(trainer), "--run-dir", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    try:
        assert done.returncode != 0
        (line,) = [row for row in done.stderr.splitlines() if row.startswith("trainer: ")]
        assert "WeightSyncError" in line
        assert "model.layers.1.mlp.down_proj.weight" in line
        assert "model.layers.0" not in line
        assert not (run_dir / "metrics.jsonl").read_text()
    finally:
        resume(engine)


def test_a_weight_session_of_a_dead_trainer_does_not_lock_the_engine(engine):
    """Engines that outlive a trainer (rollout.engine.urls) take the next one's push."""
    engines = Engines([engine.url], engine.api_key, 30.0)
    engines.post("/begin_weight_update", {})
    with pytest.raises(WeightSyncError, match="already open"):
        engines.post("/begin_weight_update", {})
    engines.end_session()
    engines.end_session()  # none is open
    engines.post("/begin_weight_update", {})
    engines.end_session()
    engines.close()


def resume(engine) -> None:
    """A stopped run leaves its engines paused: the shared one must serve other tests."""
    import httpx

    headers = {"Authorization": f"Bearer {engine.api_key}"}
    for path in ("/end_weight_update", "/continue_generation"):
        httpx.post(engine.url + path, json={}, headers=headers, timeout=30)
