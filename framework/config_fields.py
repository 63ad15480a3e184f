"""The configuration's fields as data: every dotted key with its type, default and docstring.

Read from the dataclasses of `framework.config` and `rollout.config`, so that error messages,
`--help` and the checks speak of the same keys as the code. Imports nothing heavy.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from framework.config import RunConfig

OPEN_DICT = dict[str, Any]

ELSEWHERE = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "steps": "num_steps",
    "max_steps": "num_steps",
    "total_steps": "num_steps",
    "batch_size": "rollout.prompts_per_step",
    "group_size": "rollout.samples_per_prompt",
    "num_generations": "rollout.samples_per_prompt",
    "max_tokens": "rollout.sampling.max_new_tokens",
    "temperature": "rollout.sampling.temperature",
    "save_every": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "eval.every_steps",
    "beta": "algorithm.kl_coef",
}
"""Last parts of keys, as other frameworks name them, where no likeness of letters finds ours."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConfigField:
    """One settable key."""

    key: str
    """Dotted, as on the command line: rollout.sampling.temperature"""
    type_name: str
    default: Any
    doc: str
    """First docstring line of the field; empty where its name says it all."""
    is_open: bool
    """A dict whose own keys belong to somebody else (SGLang, megatron-core, an environment)."""


def _field_docs(cls: type) -> dict[str, str]:
    """Attribute docstrings of a dataclass, which only its source has."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs: dict[str, str] = {}
    for node, following in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[node.target.id] = " ".join(following.value.value.split())
    return docs


def _walk(cls: type, prefix: str) -> Iterator[ConfigField]:
    hints, docs = typing.get_type_hints(cls), _field_docs(cls)
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _walk(hint, f"{key}.")
            continue
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        type_name = hint.__name__ if isinstance(hint, type) else str(hint)
        if typing.get_origin(hint) is not None:
            type_name = str(hint).replace("typing.", "")
        yield ConfigField(
            key=key,
            type_name=type_name,
            default=default,
            doc=docs.get(field.name, ""),
            is_open=hint == OPEN_DICT,
        )


@functools.cache
def config_fields() -> dict[str, ConfigField]:
    """Every key of a run, in the order of the dataclasses."""
    return {field.key: field for field in _walk(RunConfig, "")}


@functools.cache
def section_docs() -> dict[str, str]:
    """What each section of RunConfig is about: section name -> first line of its docstring."""
    hints = typing.get_type_hints(RunConfig)
    return {
        field.name: (inspect.getdoc(hints[field.name]) or "").splitlines()[0]
        for field in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(hints[field.name])
    }


def open_dict_of(key: str) -> str | None:
    """The open dict that `key` lies in (`data.args` for data.args.n), or None."""
    for field in config_fields().values():
        if field.is_open and key.startswith(f"{field.key}."):
            return field.key
    return None


def nearest(name: str, candidates: typing.Iterable[str]) -> str | None:
    """The candidate most like `name`: by whole key, else by its last part; None if none is like."""
    candidates = list(candidates)
    whole = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    last = name.rsplit(".", 1)[-1]
    by_last: dict[str, str] = {}
    for candidate in candidates:
        by_last.setdefault(candidate.rsplit(".", 1)[-1], candidate)
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    if close:
        return by_last[close[0]]
    loose = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return loose[0] if loose else None
