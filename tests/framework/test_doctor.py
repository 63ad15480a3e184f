"""What drivetrain-doctor says of a machine that lacks something."""

import importlib.machinery
import importlib.metadata
import sys
from pathlib import Path

import pytest

from framework import doctor
from framework.doctor import Finding, Level


def test_pins_are_read_from_the_install_lists() -> None:
    pins = doctor.pinned_versions()
    assert pins["sglang"]
    assert pins["megatron-core"]
    assert pins["torch"]


def test_missing_package_fails_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name == "sglang":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0+cpu"

    monkeypatch.setattr(doctor, "pinned_versions", lambda: {"torch": "1.0", "sglang": "2.0"})
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.main() == 1
    stdout, stderr = capsys.readouterr()
    assert "[FAIL] sglang is not installed" in stdout
    assert "scripts/install" in stdout
    assert "1 thing" in stderr


def test_other_version_than_tested_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.1")
    (warning, _) = doctor.check_packages({"torch": "2.0"})
    assert warning.level is Level.WARN
    assert "2.1, tested with 2.0" in warning.what


def test_package_that_does_not_import_fails_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    findings = list(doctor.check_imports())
    assert {finding.level for finding in findings} == {Level.FAIL}


@pytest.mark.parametrize(("nvidias", "level"), [(True, Level.OK), (False, Level.WARN)])
def test_the_registrys_apex_is_told_from_nvidias(
    nvidias: bool, level: Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "apex"
    folder.mkdir()
    (folder / "__init__.py").touch()
    if nvidias:
        (folder / "multi_tensor_apply").mkdir()
    spec = importlib.machinery.PathFinder.find_spec("apex", [str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    assert doctor.check_apex().level is level


def test_a_healthy_machine_gets_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding(level=Level.NOTE, what="no GPU")])
    assert doctor.main() == 0
    assert "The CPU path can run." in capsys.readouterr().out


def test_this_machines_packages_are_the_tested_ones() -> None:
    assert [
        f for f in doctor.check_packages(doctor.pinned_versions()) if f.level is Level.FAIL
    ] == []
