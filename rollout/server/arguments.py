"""SGLang's server arguments by their own field names, read from the installed source.

The names are taken from the text of the installed package (its AST): importing SGLang to learn
them would cost seconds and needs its stand-ins. `framework.checks` may use `server_fields` too.
"""

import ast
import difflib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

OURS = {
    "model_path": "model.hf_path",
    "tokenizer_path": "model.hf_path",
    "host": "rollout.engine.host",
    "port": "(chosen freely)",
    "device": "rollout.engine.device",
    "dtype": "rollout.engine.dtype",
    "tp_size": "rollout.engine.tp",
    "enable_deterministic_inference": "rollout.engine.deterministic",
    "max_total_tokens": "rollout.engine.max_total_tokens",
    "max_running_requests": "rollout.engine.max_running_requests",
    "enable_return_routed_experts": "rollout.engine.return_routes",
    "api_key": "rollout.engine.api_key",
    "weight_version": "(set by the run)",
}
"""SGLang fields that have a key of their own here."""


@cache
def server_fields() -> dict[str, str]:
    """Field name of ServerArgs -> its command-line option, for every field that has one."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("sglang is not installed: see scripts/install/")
    srt = Path(spec.submodule_search_locations[0], "srt")
    folder = srt / "arg_groups" / "fields"
    fields: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                option = _option(node.target.id, node.annotation)
                if option:
                    fields[node.target.id] = option
    if "model_path" not in fields:
        raise ValueError(f"{folder}: no server arguments found; is this sglang 0.5.23?")
    return fields | _added_by_hand(srt / "server_args.py")


def _added_by_hand(path: Path) -> dict[str, str]:
    """Fields without an option in their annotation, whose option the parser adds itself."""
    options: dict[str, str] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="add_argument"),
                args=[ast.Constant(value=str(option)), *_],
            ) if option not in ("--config", "-h"):
                options[option.removeprefix("--").replace("-", "_")] = option
    return options


def _option(name: str, annotation: ast.expr) -> str | None:
    """`A[type, "help"]` or `A[type, Arg(...)]` -> the option, None where there is none."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="A"), slice=ast.Tuple(elts=[_, metadata, *_])):
            pass
        case _:
            return None
    option = "--" + name.replace("_", "-")
    if isinstance(metadata, ast.Call):
        for keyword in metadata.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "no_cli" and value:
                return None
            if keyword.arg == "cli_name" and isinstance(value, str):
                option = value
    return option


@cache
def serves_architecture(name: str) -> bool:
    """Whether the installed SGLang has a model of this architecture, by its sources."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("sglang is not installed: see scripts/install/")
    folder = Path(spec.submodule_search_locations[0], "srt", "models")
    return any(f"class {name}(" in path.read_text("utf-8") for path in folder.glob("*.py"))


def check_names(arguments: dict[str, Any], where: str = "rollout.engine.args") -> list[str]:
    """One line for every name that SGLang lacks or that has a key of its own here."""
    errors = []
    for name in arguments:
        if name in OURS:
            errors.append(f"{where}.{name}: use {OURS[name]} instead")
        elif name not in server_fields():
            nearest = difflib.get_close_matches(name, server_fields(), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            errors.append(f"{where}.{name}: the installed SGLang has no such argument{hint}")
    return errors


def command_line(arguments: dict[str, Any]) -> list[str]:
    """Arguments by field name -> the options of the command line.

    None and False leave an option out (SGLang's switches are off unless named); a list becomes
    several values, a dict one JSON value.
    """
    line: list[str] = []
    for name, value in arguments.items():
        option = server_fields()[name]
        match value:
            case None | False:
                continue
            case True:
                line.append(option)
            case list() | tuple():
                line += [option, *(str(item) for item in value)]
            case dict():
                line += [option, json.dumps(value)]
            case _:
                line += [option, str(value)]
    return line
