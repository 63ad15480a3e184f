"""On-policy distillation whole: a teacher from demonstrations, then its students."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from runs import drivetrain, metrics

pytestmark = [
    pytest.mark.nightly,  # three trainings and four servers: seven minutes on two cores
    pytest.mark.timeout(5400),
]


@pytest.fixture(scope="module")
def teacher_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs/distill_teacher is."""
    root = tmp_path_factory.mktemp("distill")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        drivetrain("experiment=distill_teacher", timeout_s=1500)
    return root


@pytest.mark.parametrize("name", ["distill", "distill_gkd"])
def test_a_student_gains_what_the_experiment_promises(
    name: str, teacher_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And comes nearer to its teacher, which is all that it is trained by."""
    monkeypatch.chdir(teacher_root)
    drivetrain(f"experiment={name}", timeout_s=1500)
    run_dir = Path("runs") / name
    gain = OmegaConf.load(run_dir / "config.yaml").eval.target_gain
    rows = metrics(run_dir)
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    teacher_kl = [row["rollout/teacher_kl"] for row in rows if "rollout/teacher_kl" in row]
    assert gain > 0
    assert accuracy[-1] >= accuracy[0] + gain
    assert len(teacher_kl) == 60
    assert sum(teacher_kl[-5:]) < 0.5 * sum(teacher_kl[:5])
    divergence = [r["train/teacher_divergence"] for r in rows if "train/teacher_divergence" in r]
    if name == "distill_gkd":
        assert len(divergence) == 60
        assert sum(divergence[-5:]) < 0.5 * sum(divergence[:5])
