"""Commands that a run will start, looked at before it starts anything."""

import shutil
from collections.abc import Sequence
from pathlib import Path

_SCRIPTS = (".py", ".sh", ".js")


def missing_program(command: Sequence[str]) -> str:
    """What of a command is not there, its program or the script that it is to run; else ""."""
    if shutil.which(command[0]) is None:
        return f"there is no program {command[0]}"
    script = next((word for word in command[1:] if word.endswith(_SCRIPTS)), "")
    if script and not Path(script).exists():
        return f"{script}: no such file in {Path.cwd()}"
    return ""
