"""scripts/benchmarks/effects.py: its rows, from runs and evaluations that ended well or badly."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EVALUATION = """#!/bin/sh
for each in "$@"; do case $each in
    run_dir=*without_1*) exit 3;;
    run_dir=*having_2*) exec sleep 60;;
    run_dir=*) mkdir "${each#run_dir=}"; echo '{"accuracy": 0.5}' > "${each#run_dir=}/eval.jsonl";;
esac; done
"""


@pytest.fixture
def effects(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "benchmarks" / "effects.py"
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("effects", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_an_evaluation_that_fails_costs_its_row_alone(
    effects: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def ended(run: Any) -> Any:
        run_dir = tmp_path / f"{run.name}_{run.seed}"
        run_dir.mkdir()
        line = json.dumps({"train/rollout_logprob_abs_diff_mean": 0.25})
        (run_dir / "metrics.jsonl").write_text(line)
        return effects.Outcome(
            run=run, seconds=1.0, accuracies=[0.1, 0.2], run_dir=run_dir, problem=""
        )

    (tmp_path / "drivetrain").write_text(EVALUATION)
    (tmp_path / "drivetrain").chmod(0o755)
    table = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "argv", ["effects.py", "--effects", "tis", "--json", str(table)])
    monkeypatch.setattr(effects, "EVAL_TIMEOUT_S", 1.0)
    monkeypatch.setattr(effects, "sweep_as_told", lambda runs, _: map(ended, runs))
    assert effects.main() == 1
    rows = json.loads(table.read_text())
    assert [row["verdict"].split(" ")[0] for row in rows] == ["does", "failed:", "failed:"]
    assert "exit status 3" in rows[1]["verdict"]
    assert "timed out" in rows[2]["verdict"]
    assert (rows[0]["without"], rows[0]["with"]) == (0.5, 0.5)
    assert "before" not in rows[0]  # served, so rounded: of other weights than these
    assert "tis: more accuracy by 0.1 on 0 of 3 seeds" in capsys.readouterr().out
