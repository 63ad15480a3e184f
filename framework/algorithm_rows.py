"""How a configuration chooses a loss, an advantage or a correction: by name, or the user's own."""

import dataclasses
import inspect
from collections.abc import Mapping

from framework.algorithm.rows import Row
from rollout.own_code import import_own_module


def find_row(table: Mapping[str, Row], name: str, function: str) -> Row:
    """A row by its name, or the user's own by `package.module`: its `Config` and its `function`.

    Raises:
        ValueError: no such module, or one without a `Config` dataclass and a function of
            (inputs, config).
    """
    if name in table:
        return table[name]
    if "." not in name:
        raise ValueError(f"must be one of {', '.join(table)}, or a module of yours: package.module")
    module = import_own_module(name)
    found, config = getattr(module, function, None), getattr(module, "Config", None)
    if not callable(found) or len(inspect.signature(found).parameters) != 2:
        raise ValueError(f"{name} has no function {function}(inputs, config)")
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise ValueError(f"{name} has no dataclass Config")
    return Row(found, config)
