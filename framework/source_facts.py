"""Names read from source files without importing them.

Configuration is refused in a fraction of a second, before torch, SGLang or megatron-core are
loaded; the sources themselves say which fields and table rows there are.
"""

import ast
import contextlib
import functools
import importlib.util
from pathlib import Path
from typing import Any


class MissingPackage(ValueError):
    """A package whose fields a key refers to is not installed."""


def _package_dir(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"{package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _annotated_fields(path: Path, class_names: set[str] | None) -> dict[str, str]:
    """Field name -> annotation text of the named classes (None: all classes) of one file."""
    found: dict[str, str] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        if class_names is not None and node.name not in class_names:
            continue
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                found[item.target.id] = ast.unparse(item.annotation)
    return found


@functools.cache
def megatron_config_fields() -> dict[str, str]:
    """Field name -> type text of the installed megatron-core's TransformerConfig."""
    root = _package_dir("megatron") / "core"
    fields = _annotated_fields(root / "model_parallel_config.py", {"ModelParallelConfig"})
    path = root / "transformer" / "transformer_config.py"
    fields.update(_annotated_fields(path, {"TransformerConfig"}))
    return fields


@functools.cache
def row_knobs(folder: str, row: str) -> dict[str, str]:
    """Knob -> type text of the Config in framework/algorithm/<folder>/<row>.py."""
    path = _package_dir("framework") / "algorithm" / folder / f"{row}.py"
    return _annotated_fields(path, {"Config"})


@functools.cache
def row_defaults(folder: str, row: str) -> dict[str, Any]:
    """Knob -> what it is unless given, of the same Config; knobs without a literal are left out."""
    path = _package_dir("framework") / "algorithm" / folder / f"{row}.py"
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or node.name != "Config":
            continue
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value:
                with contextlib.suppress(ValueError):
                    found[item.target.id] = ast.literal_eval(item.value)
    return found


@functools.cache
def megatron_recompute_modules() -> tuple[str, ...]:
    """What the installed megatron-core allows in `recompute_modules`, sorted.

    Raises MissingPackage when TransformerConfig has no such literal set.
    """
    path = _package_dir("megatron") / "core" / "transformer" / "transformer_config.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Set):
            found = ast.literal_eval(node.value)
            if {"core_attn", "layernorm"} <= found:  # the set for offloading has other names
                return tuple(sorted(found))
    raise MissingPackage(f"{path} names no modules to recompute: another megatron-core is wanted")


@functools.cache
def table_keys(package: str, module: str, table: str) -> tuple[str, ...]:
    """Keys of one of our literal tables, e.g. ("rollout", "environments/__init__.py", ...).

    Raises ValueError when the file has no such literal dict: the table was moved or computed.
    """
    keys = [
        key.value for key in _table(package, module, table).keys if isinstance(key, ast.Constant)
    ]
    return tuple(str(key) for key in keys)


@functools.cache
def row_flags(package: str, module: str, table: str) -> dict[str, dict[str, Any]]:
    """Of such a table whose rows are calls: row -> its literal keyword arguments."""
    node = _table(package, module, table)
    return {
        str(key.value): {
            str(each.arg): each.value.value
            for each in row.keywords
            if isinstance(each.value, ast.Constant)
        }
        for key, row in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(row, ast.Call)
    }


def _table(package: str, module: str, table: str) -> ast.Dict:
    path = _package_dir(package) / module
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        named = any(isinstance(target, ast.Name) and target.id == table for target in targets)
        if named and isinstance(node, ast.Assign | ast.AnnAssign):
            if isinstance(node.value, ast.Dict):
                return node.value
            break
    raise ValueError(f"{path} has no literal table {table}")
