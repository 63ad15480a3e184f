"""Checkpoints as files, and which configuration may go on with which run. No trainer is started."""

import json
import shutil
from pathlib import Path

import pytest

from framework.checkpoints import (
    Manifest,
    begin,
    commit,
    find_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    prune,
    read_checkpoint,
    remove_unfinished,
)
from framework.compose import load_run_config
from framework.launch.prepare import write_run
from framework.launch.resume import resume_errors
from framework.main import main, read_config
from framework.metrics import MetricsLogger
from rollout.journal import trim_lines
from rollout.run_dir import RunDir
from tests.e2e.journals import write_journal

BASE = ["experiment=smoke", "warm_start.num_steps=0", "cluster=manual", "checkpoint.every_steps=2"]


def save(root: Path, step: int, *, stage: str = "rl", rollout: bytes = b"state") -> Path:
    """A complete checkpoint without tensors."""
    writing = begin(root, step)
    (writing / "__0_0.distcp").write_bytes(b"x" * 100)
    if rollout:
        (writing / "rollout.msgpack").write_bytes(rollout)
    manifest = Manifest(
        format=0,
        step=step,
        num_updates=step,
        stage=stage,
        mode="train",
        layout={"tp": 1},
        versions={},
        files={},
    )
    return commit(writing, manifest)


def steps(root: Path) -> list[int]:
    return [read_checkpoint(path).step for path in list_checkpoints(root)]


def test_only_what_was_committed_is_found(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 2)
    writing = begin(tmp_path, 4)
    (writing / "__0_0.distcp").write_bytes(b"half")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2
    assert found.rollout_state() == b"state"
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_a_second_save_of_a_step_replaces_the_first(tmp_path):
    save(tmp_path, 2, rollout=b"old")
    save(tmp_path, 2, rollout=b"new")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.rollout_state() == b"new"


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(2, 0, [8, 10]), (1, 4, [4, 8, 10]), (0, 0, [2, 4, 6, 8, 10]), (9, 0, [2, 4, 6, 8, 10])],
)
def test_kept_by_count_and_by_interval(tmp_path, keep, every, left):
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, step)
    prune(tmp_path, keep, every)
    assert steps(tmp_path) == left
    assert not list(tmp_path.glob(".*"))


def test_damage_is_named_and_not_passed_over(tmp_path):
    save(tmp_path, 2)
    file = save(tmp_path, 4) / "__0_0.distcp"
    file.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"step_000004/__0_0.distcp has 5 bytes, not 100"):
        newest_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"__0_0.distcp is missing.*remove .*step_000004"):
        newest_checkpoint(tmp_path)
    (tmp_path / "step_000004" / "complete.json").write_text("{")
    with pytest.raises(ValueError, match=r"complete\.json: "):
        newest_checkpoint(tmp_path)


def test_a_path_means_a_checkpoint_or_the_newest_of_a_run(tmp_path):
    for step in (2, 4):
        save(tmp_path / "checkpoints", step)
    assert find_checkpoint(tmp_path / "checkpoints" / "step_000002").step == 2
    assert find_checkpoint(tmp_path / "checkpoints").step == 4
    assert find_checkpoint(tmp_path).step == 4
    with pytest.raises(ValueError, match=r"checkpoint.resume=.*/none: no such directory"):
        find_checkpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path / "empty")


def test_metrics_hold_no_step_twice(tmp_path):
    logger = MetricsLogger(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        logger.log(step, {"train/loss": 1.0})
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tra')  # killed
    logger = MetricsLogger(tmp_path, tensorboard=False, done=2)
    logger.log(3, {"train/loss": 2.0})
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1), (2, 1), (3, 2)]
    trim_lines(tmp_path / "absent.jsonl", "step", 2)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.fixture
def stopped(tmp_path) -> RunDir:
    """A run that was killed after step 3; its newest checkpoint is of step 2."""
    run_dir = RunDir(tmp_path / "run")
    write_run(read_config([*BASE, "num_steps=4", f"run_dir={run_dir.path}"]))
    save(run_dir.checkpoints, 2)
    write_journal(run_dir.rollouts, num_steps=4)
    run_dir.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in (0, 1, 2, 3)))
    run_dir.eval.write_text('{"version": 0}\n{"version": 3}\n')
    run_dir.write_address("rollout", "http://127.0.0.1:1")
    run_dir.log("trainer").write_text("old")
    return run_dir


def test_auto_brings_the_directory_back_to_the_checkpoint(stopped, capsys):
    token = stopped.token()
    arguments = [*BASE, f"run_dir={stopped.path}", "checkpoint.resume=auto"]
    assert main([*arguments, "num_steps=8", "parallel.dp=2"]) == 0
    assert [json.loads(row)["step"] for row in stopped.metrics.open()] == [0, 1, 2]
    assert [json.loads(row)["version"] for row in stopped.eval.open()] == [0]
    assert [path.name for path in sorted(stopped.rollouts.iterdir())] == [
        "step_000000.msgpack",
        "step_000001.msgpack",
    ]
    assert stopped.read_address("rollout") is None
    assert (stopped.logs / "trainer.1.log").read_text() == "old"
    config = load_run_config(stopped.path)
    assert (config.num_steps, config.parallel.dp) == (8, 2)
    assert stopped.token() == token


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=3"], "seed=3: the run in {run} has seed=0"),
        (["model.tiny.num_layers=4"], "model.tiny.num_layers=4"),
        (["rollout.sampling.temperature=0.5"], "rollout.sampling.temperature=0.5"),
        (["num_steps=1"], "num_steps=1: {run}/checkpoints/step_000002 has trained 2 already"),
        (["mode=eval"], "mode=eval has no checkpoints"),
        (["checkpoint.resume=/nowhere"], "checkpoint.resume=/nowhere: no such directory"),
        (["checkpoint.resume=never"], "run_dir={run}: already holds a run"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(stopped, capsys, overrides, said):
    before = stopped.config.read_bytes(), stopped.metrics.read_bytes()
    arguments = [*BASE, "num_steps=4", f"run_dir={stopped.path}", "checkpoint.resume=auto"]
    assert main([*arguments, *overrides]) == 2
    assert said.format(run=stopped.path) in capsys.readouterr().err
    assert (stopped.config.read_bytes(), stopped.metrics.read_bytes()) == before


@pytest.mark.parametrize("by_path", [False, True])
@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        (["max_tokens_per_microbatch=8191"], 8183),
        (["max_tokens_per_microbatch=8000", "overlong=truncate"], 7999),
        (["max_tokens_per_microbatch=8186", "overlong=truncate"], None),
        (["max_tokens_per_microbatch=9000"], None),
    ],
)
def test_prompts_that_wait_to_be_trained_still_fit(
    stopped, tmp_path, capsys, overrides, left, by_path
):
    """The run has taken such of up to 8192 - 8 tokens."""
    checkpoint = newest_checkpoint(stopped.checkpoints)
    assert checkpoint is not None
    shutil.copy(stopped.config, checkpoint.path / "config.yaml")
    run_dir, resume = (tmp_path / "new", checkpoint.path) if by_path else (stopped.path, "auto")
    arguments = [*BASE, "num_steps=4", f"run_dir={run_dir}", f"checkpoint.resume={resume}"]
    status = main([*arguments, *(f"batch.{each}" for each in overrides)])
    said = capsys.readouterr().err
    if left is None:
        assert status == 0, said
    else:
        assert status == 2
        assert f"leaves {left} tokens to a prompt" in said
        assert f"up to 8184, which may wait to be trained; raise it by {8184 - left} or" in said


def test_context_parallelism_lowers_the_bound_as_well(stopped):
    arguments = [*BASE, "num_steps=4", f"run_dir={stopped.path}", "checkpoint.resume=auto"]
    config = read_config([*arguments, "batch.max_tokens_per_microbatch=8193"])
    assert [*resume_errors(config)] == []
    config.parallel.cp = 4  # 8192 is a multiple of 2 * 4
    assert [*resume_errors(config)] == []
    config.parallel.cp = 5
    (said,) = resume_errors(config)
    assert "parallel.cp=5 it leaves 8182 tokens to a prompt" in said


def test_a_refused_resume_shows_no_secrets(stopped, capsys):
    """Another key is no other run."""
    arguments = [*BASE, "num_steps=4", f"run_dir={stopped.path}", "checkpoint.resume=auto"]
    keys = ["data.args.variables={TOKEN: sesame}", "data.args.api_key=sesame"]
    assert main([*arguments, *keys]) == 2
    said = capsys.readouterr().err
    assert "data.args={" in said
    assert "sesame" not in said


def test_a_run_that_saved_nothing_is_not_begun_again_by_auto(tmp_path, capsys):
    arguments = [*BASE, f"run_dir={tmp_path / 'run'}", "checkpoint.every_steps=0"]
    assert main(arguments) == 0
    assert main([*arguments, "checkpoint.resume=auto"]) == 2
    assert "saved no checkpoints" in capsys.readouterr().err


def test_a_live_run_needs_the_rollout_state(tmp_path, capsys):
    path = save(tmp_path / "replay", 2, rollout=b"")
    arguments = [*BASE, f"run_dir={tmp_path / 'run'}", f"checkpoint.resume={path}"]
    assert main(arguments) == 2
    assert "without the state of a rollout process" in capsys.readouterr().err
    path = save(tmp_path / "sft", 2, stage="sft")
    assert main([*arguments[:-1], f"checkpoint.resume={path}"]) == 2
    assert "a checkpoint of stage=sft; this run is stage=rl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_adapters_go_on_with_the_base_they_were_made_for(tmp_path, tiny_model_dir, capsys):
    """Their checkpoint does not hold it."""
    lora = [*BASE, f"model.hf_path={tiny_model_dir}", "model.lora.rank=4", "model.lora.alpha=8"]
    path = save(tmp_path / "first", 2, rollout=b"state")
    write_run(read_config([*lora, f"run_dir={tmp_path / 'first'}"]))
    shutil.copy(tmp_path / "first" / "config.yaml", path / "config.yaml")
    arguments = [*lora, f"run_dir={tmp_path / 'run'}", f"checkpoint.resume={path}"]
    assert main(arguments) == 0
    arguments[-2] = f"run_dir={tmp_path / 'other'}"
    assert main([*arguments, "model.lora.alpha=9"]) == 2
    assert "model.lora.alpha=9: the adapters of" in capsys.readouterr().err
    assert main([*arguments, "model.hf_path=", "warm_start.num_steps=3"]) == 2
    said = capsys.readouterr().err
    assert f"are for {tiny_model_dir}" in said
    assert "warm_start.num_steps=3" in said


def test_a_finished_warm_start_is_not_repeated(tmp_path):
    arguments = [*BASE, "warm_start.num_steps=5", f"run_dir={tmp_path / 'run'}"]
    write_run(read_config(arguments))
    again = read_config([*arguments, "checkpoint.resume=auto"])
    assert write_run(again).warm_start is not None
    (tmp_path / "run" / "warm_start" / "hf").mkdir()
    assert write_run(again).warm_start is None
