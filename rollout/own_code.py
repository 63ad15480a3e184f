"""Code of the user's own, which the configuration names by a dotted path."""

import importlib
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def import_own_module(name: str) -> ModuleType:
    """The module `name`, from anywhere on PYTHONPATH.

    Raises:
        ValueError: it cannot be imported, whatever its own code raised; one line.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; is the directory that holds it on PYTHONPATH?") from error
    except Exception as error:  # somebody else's code: anything may come
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = (
            "" if isinstance(error, SyntaxError) else f" ({where.filename}, line {where.lineno})"
        )
        raise ValueError(
            f"{name} cannot be imported: {type(error).__name__}: {error}{place}"
        ) from error


def look_up(table: Mapping[str, T], name: str, kind: str) -> T:
    """A row of `table` by its name, or what package.module.<kind> of the user's own names.

    That what is the user's own is of the table's type is the caller's to check.

    Raises:
        ValueError: there is none such; one line, without the key.
    """
    if name in table:
        return table[name]
    if "." not in name:
        raise ValueError(f"must be one of {', '.join(table)}, or package.module.{kind}")
    return import_own(name)


def import_own(path: str) -> Any:
    """What `package.module.name` names. Raises ValueError, one line."""
    module, _, name = path.rpartition(".")
    found = getattr(import_own_module(module), name, None)
    if found is None:
        raise ValueError(f"{module} has no {name}")
    return found
