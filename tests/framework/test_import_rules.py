"""Who may import whom: read from every file's syntax tree, so that no import hides."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("framework", "megatron_bridge", "rollout")
OURS = {*PACKAGES, "hydra_configs"}
ALGORITHM_MAY = {"torch", "math", "dataclasses", "collections", "typing", "framework"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.lineno, node.module or ""


def breaches(path: Path) -> Iterator[str]:
    """What a file imports that it must not."""
    name = path.relative_to(ROOT).as_posix()
    package = name.split("/")[0]
    for line, module in imports(path):
        top = module.split(".")[0]
        where = f"{name}:{line} imports {module}"
        if package != "framework" and top in set(PACKAGES) - {package}:
            yield f"{where}: rollout and megatron_bridge know only themselves"
        if module.startswith("megatron.") and not name.startswith(
            ("framework/megatron/", "megatron_bridge/")
        ):
            yield f"{where}: only framework/megatron and megatron_bridge know megatron-core"
        if top == "sglang" and not name.startswith("rollout/server/"):
            yield f"{where}: everything outside rollout/server speaks HTTP"
        if name.startswith("framework/algorithm/"):
            ours = top != "framework" or module.startswith("framework.algorithm")
            if top not in ALGORITHM_MAY or not ours:
                yield f"{where}: an algorithm imports torch alone"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_keep_to_the_import_rule(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    assert [breach for path in files for breach in breaches(path)] == []


def test_the_rule_catches_a_breach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker itself: an import inside a function of rollout is found."""
    path = tmp_path / "rollout" / "bad.py"
    path.parent.mkdir()
    path.write_text("def f():\n    import sglang.srt\n    from framework.config import RunConfig\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [breach.split(":")[1] for breach in breaches(path)] == [
        "2 imports sglang.srt",
        "3 imports framework.config",
    ]
