"""`drivetrain` as a whole, with small scripts in place of its roles: status, last line, stages."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from framework.compose import compose_config, load_run_config
from framework.config import RunConfig
from framework.launch import local
from framework.launch.prepare import resolve_stages
from framework.launch.roles import Role, engine_roles, rollout_role, router_role, trainer_role
from framework.main import main

FAST = ["experiment=smoke", "tracker=quiet", "cluster.stop_timeout_s=5"]


def script(config: RunConfig, name: str, code: str) -> Role:
    """A role of `config` that runs a piece of Python."""
    log = Path(config.run_dir) / "logs" / f"{name}.log"
    return Role(name=name, command=[sys.executable, "-S", "-c", code], log=log)


@pytest.fixture
def fake_roles(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """name -> code; the trainer logs an accuracy before and after, as the real one does."""
    codes = {"trainer": "", "warm_start": "", "engine_0": "import time; time.sleep(600)"}

    def trainer(config: RunConfig, name: str = "trainer") -> Role:
        rows = [
            {"step": 0, "eval/accuracy": 0.25},
            {"step": 1, "train/loss": 1.5},
            {"step": 1, "eval/accuracy": 0.75},
        ]
        lines = "".join(json.dumps(row) + "\\n" for row in rows)
        path = Path(config.run_dir) / "metrics.jsonl"
        default = f"open({str(path)!r}, 'w').write({lines!r}.replace('\\\\n', chr(10)))"
        return script(config, name, codes[name] or default)

    monkeypatch.setattr("framework.cluster_checks.visible_gpus", list)
    monkeypatch.setattr(local, "trainer_role", trainer)
    monkeypatch.setattr(
        local, "engine_roles", lambda config: [script(config, "engine_0", codes["engine_0"])]
    )
    monkeypatch.setattr(local, "rollout_role", lambda config: None)
    return codes


def test_finished_run_ends_with_0_and_one_line_that_tells_all(
    fake_roles: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([*FAST, f"run_dir={run_dir}", "tracker.report=true"]) == 0
    stdout, stderr = capsys.readouterr()
    last = stdout.splitlines()[-1]
    assert last.startswith("drivetrain: accuracy 0.250 -> 0.750, 1 steps, ")
    assert last.endswith(f"report {run_dir}/report.html")
    assert stderr == ""
    assert (run_dir / "report.html").stat().st_size > 10_000


def test_the_supervised_stage_comes_first_and_its_weights_are_taken_on(
    fake_roles: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert main([*FAST, f"run_dir={run_dir}", "warm_start.lr=0.5", "warm_start.num_steps=7"]) == 0
    first, second = load_run_config(run_dir / "warm_start"), load_run_config(run_dir)
    assert (first.stage, first.num_steps, first.optimizer.lr) == ("sft", 7, 0.5)
    assert (second.stage, second.optimizer.lr) == ("rl", 2e-4)
    assert second.model.init_from == str(run_dir / "warm_start" / "hf")
    assert second.model.hf_path == first.model.hf_path == str(run_dir / "tiny_model")


@pytest.mark.parametrize("role", ["engine_0", "warm_start", "trainer"])
def test_failed_role_ends_with_1_its_reason_first(
    role: str, fake_roles: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_roles[role] = "print('noise'); print('trainer: ValueError: out of luck'); exit(1)"
    if role == "engine_0":
        fake_roles["trainer"] = fake_roles["warm_start"] = "import time; time.sleep(600)"
    assert main([*FAST, f"run_dir={tmp_path / 'run'}"]) == 1
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith(f"drivetrain: {role} ended with exit code 1 after ")
    assert "ValueError: out of luck; see " in first
    assert f"/logs/{role}.log" in first


def test_ctrl_c_ends_with_130(
    fake_roles: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt = f"import os, time; os.kill({os.getpid()}, {signal.SIGINT:d}); time.sleep(600)"
    fake_roles["trainer"] = interrupt
    assert main([*FAST, f"run_dir={tmp_path / 'run'}"]) == 130
    assert "ended by SIGINT; every process has been stopped" in capsys.readouterr().err


def test_a_run_directory_in_use_is_refused_by_its_holder(
    fake_roles: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from framework.launch.lock import hold_run_dir"
        f"\nwith hold_run_dir(Path({str(run_dir)!r})):\n print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert main([*FAST, f"run_dir={run_dir}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run_dir={run_dir}: is being run by process {holder.pid} on " in line
    assert [path.name for path in run_dir.iterdir()] == ["lock"], "something was started"
    holder.kill()
    holder.wait()
    assert main([*FAST, f"run_dir={run_dir}"]) == 0


def test_manual_launch_writes_the_run_and_prints_every_role(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    assert main(["experiment=smoke", "cluster=manual", f"run_dir={run_dir}"]) == 0
    stdout = capsys.readouterr().out
    for command in (
        f"drivetrain-engine --run-dir {run_dir} --index 0",
        f"drivetrain-rollout --run-dir {run_dir}",
        f"-m framework.train --run-dir {run_dir}/warm_start",
        f"-m framework.train --run-dir {run_dir}\n",
    ):
        assert command in stdout
    assert (run_dir / "token").stat().st_mode & 0o077 == 0
    assert (run_dir / "tiny_model" / "config.json").is_file()
    assert load_run_config(run_dir).name == "smoke"


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        (["rollout.engine.num_engines=2"], ["engine_0", "engine_1", "rollout", "trainer"]),
        (
            ["rollout.engine.num_engines=2", "rollout.engine.router=true"],
            ["engine_0", "engine_1", "router", "rollout", "trainer"],
        ),
        (["stage=sft", "rollout.engine.router=true"], ["trainer"]),
        (["mode=train_only"], ["trainer"]),
        (["mode=rollout_only"], ["engine_0", "rollout"]),
        (["mode=eval"], ["engine_0", "rollout"]),
        (["rollout.engine.urls=[http://a:1]"], ["rollout", "trainer"]),
        (
            ["rollout.engine.urls=[http://a:1]", "rollout.engine.router=true"],
            ["router", "rollout", "trainer"],
        ),
        (["rollout.address=http://a:1"], ["trainer"]),
    ],
)
def test_each_mode_starts_the_roles_it_needs(overrides: list[str], roles: list[str]) -> None:
    config = resolve_stages(compose_config(overrides)).main
    others = [router_role(config), rollout_role(config), trainer_role(config)]
    started = [*engine_roles(config), *others]
    assert [role.name for role in started if role is not None] == roles


def test_gpus_are_dealt_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.launch.roles.visible_gpus", lambda: list("01234567"))
    config = compose_config(
        ["parallel.dp=4", "rollout.engine.num_engines=2", "rollout.engine.tp=2"]
    )
    roles = [*engine_roles(config), trainer_role(config)]
    devices = [role.env["CUDA_VISIBLE_DEVICES"] for role in roles if role is not None]
    assert devices == ["4,5", "6,7", "0,1,2,3"]
