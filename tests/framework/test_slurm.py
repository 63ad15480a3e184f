"""The sbatch script: the whole text as a snapshot, its syntax, and how submission can fail.

After a wanted change of the script:
    DRIVETRAIN_UPDATE_SNAPSHOTS=1 pytest tests/framework/test_slurm.py
"""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from framework.compose import compose_config
from framework.launch import slurm
from framework.launch.prepare import resolve_stages
from framework.main import main

SNAPSHOTS = Path(__file__).parent / "snapshots"
CASES = {
    "gpu_two_node_kinds": [
        "experiment=quickstart",
        "cluster=slurm",
        "run_dir=/shared/runs/quickstart",
        "parallel.tp=2",
        "parallel.dp=8",
        "cluster.num_nodes=3",
        "cluster.trainer_nodes=2",
        "cluster.engine_nodes=1",
        "rollout.engine.num_engines=4",
        "rollout.engine.tp=2",
        "rollout.engine.router=true",
        "cluster.partition=gpu",
        "cluster.account=lab",
        "cluster.extra_sbatch=['--exclusive']",
        "cluster.setup='source /shared/venv/bin/activate'",
        "cluster.container_image=/shared/image.sqsh",
    ],
    "cpu_shared_nodes": [
        "experiment=smoke",
        "cluster=slurm",
        "run_dir=/shared/runs/smoke",
        "parallel.dp=2",
        "cluster.num_nodes=1",
        "cluster.engine_nodes=0",
        "rollout.engine.device=cpu",
        "cluster.setup='source /shared/venv/bin/activate'",
        "tracker=quiet",
    ],
}


def rendered(overrides: list[str]) -> str:
    return slurm.render(resolve_stages(compose_config(overrides)))


@pytest.mark.parametrize("name", CASES)
def test_script_is_the_one_we_know(name: str) -> None:
    path, script = SNAPSHOTS / f"{name}.sbatch", rendered(CASES[name])
    if os.environ.get("DRIVETRAIN_UPDATE_SNAPSHOTS"):
        path.write_text(script)
    assert script == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_script_is_valid_bash_that_keeps_hostile_names_as_text(name: str, tmp_path: Path) -> None:
    hostile = "run_dir='/shared/a b;touch $(x)'"
    script = tmp_path / "job.sbatch"
    script.write_text(rendered([*CASES[name], hostile, "name='n $(touch x)'"]))
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "RUN='/shared/a b;touch $(x)'" in script.read_text()
    comment, *others = [line for line in script.read_text().splitlines() if "n $(touch x)" in line]
    assert comment.startswith("# ")
    assert others == ["NAME='n $(touch x)'"]


def test_engines_never_share_a_gpu_with_trainers_or_each_other() -> None:
    """Four trainers and two engines of two GPUs on one node of eight."""
    script = rendered(
        [
            "cluster=slurm",
            "cluster.num_nodes=1",
            "cluster.engine_nodes=0",
            "parallel.dp=4",
            "rollout.engine.num_engines=2",
            "rollout.engine.tp=2",
        ]
    )
    steps = [line for line in script.splitlines() if line.startswith("step ")]
    devices = [shlex.split(line.rstrip("\\"))[4] for line in steps]
    assert devices == ["4,5", "6,7", "", "0,1,2,3"]


def test_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([*CASES["cpu_shared_nodes"], f"run_dir={run_dir}", "dry_run=true"]) == 0
    stdout = capsys.readouterr().out
    assert "#SBATCH --nodes=1" in stdout
    assert "rank 1: tp=0 cp=0 dp=1 pp=0" in stdout
    assert not run_dir.exists()


@pytest.fixture
def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `sbatch` that does what its own text says; Slurm itself is not needed to test ours."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


def install(program: Path, text: str) -> None:
    program.write_text(f"#!/bin/bash\n{text}\n")
    program.chmod(0o755)


def test_submission_tells_the_job(
    fake_sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(fake_sbatch, 'cp "$2" "$(dirname "$0")/taken"; echo "42;cluster"')
    run_dir = tmp_path / "run"
    assert main([*CASES["cpu_shared_nodes"], f"run_dir={run_dir}"]) == 0
    assert "job 42 submitted" in capsys.readouterr().out
    assert (fake_sbatch.parent / "taken").read_text() == (run_dir / "job.sbatch").read_text()
    assert (run_dir / "warm_start" / "config.yaml").is_file()
    assert (run_dir / "tiny_model" / "config.json").is_file()


def test_refused_submission_is_a_failure_with_slurms_own_reason(
    fake_sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(fake_sbatch, "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    assert main([*CASES["cpu_shared_nodes"], f"run_dir={tmp_path / 'run'}"]) == 1
    assert "invalid partition specified: gpu" in capsys.readouterr().err


SRUN = """#!/bin/bash
for word in "$@"; do
    case $word in --output=*) role=$(basename "${word#--output=}" .log) ;; esac
done
echo "$role $DRIVETRAIN_RESTARTS" >>$CALLS
count=$(grep -c "^$role " $CALLS)
case $role in
engine_0) ((count < 3)) && exit 137 ;;
rollout) ((count < 2)) && exit 137 ;;
esac
until [[ -e $CALLS.end ]]; do
    [[ $role == trainer ]] && grep -q "engine_0 2" $CALLS && grep -q "rollout 1" $CALLS && exit 0
    sleep 0.05
done
"""


@pytest.mark.parametrize(("max_restarts", "status"), [(2, 0), (1, 1)])
def test_the_job_starts_again_what_dies(tmp_path: Path, max_restarts: int, status: int) -> None:
    """With stand-ins for Slurm's commands: an engine dies twice, the rollout process once."""
    bin_dir, run_dir = tmp_path / "bin", tmp_path / "run"
    for path in (bin_dir, run_dir / "addresses", run_dir / "logs"):
        path.mkdir(parents=True)
    (run_dir / "addresses" / "engine_0.json").write_text("of the dead one")
    commands = {"srun": SRUN, "scancel": "#!/bin/bash\ntouch $CALLS.end\n"}
    commands["scontrol"] = "#!/bin/bash\necho node0 NodeAddr=127.0.0.1\n"
    for name, text in commands.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    case = [each for each in CASES["cpu_shared_nodes"] if not each.startswith("run_dir=")]
    overrides = [f"run_dir={run_dir}", "tracker.report=false", "warm_start.num_steps=0"]
    script = tmp_path / "job.sbatch"
    script.write_text(rendered([*case, *overrides, f"cluster.max_restarts={max_restarts}"]))
    env = os.environ | {"PATH": f"{bin_dir}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    env |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node0", "SLURM_CPUS_PER_TASK": "1"}
    done = subprocess.run(
        ["bash", script], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if call.startswith("engine_0")] == [
        f"engine_0 {count}" for count in range(max_restarts + 1)
    ]
    assert not (run_dir / "addresses" / "engine_0.json").exists()
    if status:
        assert "engine_0 ended with exit code 137" in done.stderr
