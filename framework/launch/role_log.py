"""What the end of a role's log says of why it ended."""

import os

from framework.launch.roles import Role

TAIL_BYTES = 65536
STARTS = "--- start "
"""How a line begins with which a role that was started again begins its log anew."""
CONSEQUENCES = (
    "ChildFailedError",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistNetworkError",
    "SignalException",
)
"""What the other ranks say when one has died."""


def log_tail(role: Role) -> list[str]:
    """The last 64 KiB of a role's log since it was started last, in lines."""
    try:
        with role.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    starts = [number for number, line in enumerate(lines) if line.startswith(STARTS)]
    return lines[starts[-1] + 1 :] if starts else lines


def failure_reason(tail: list[str]) -> str:
    """The line of a log that says why the process failed; "" where none does.

    Preferred: the role's own one-line reason, then a line that ends a traceback; the first that is
    a cause and not what the death of one rank does to the others. Where nobody said anything (a
    rank was killed), torchrun's account of who ended first.
    """
    lines = [line.strip() for line in tail]
    for wanted in (_is_own_reason, _ends_traceback):
        found = [line for line in lines if wanted(line)]
        causes = [line for line in found if not any(word in line for word in CONSEQUENCES)]
        if causes:
            return causes[0]
    return _killed_rank(lines)


def _killed_rank(lines: list[str]) -> str:
    """torchrun's own account of a rank that ended without a word; "" where there is none."""
    start = next((i for i, line in enumerate(lines) if line.startswith("Root Cause")), len(lines))
    account = [line.partition(":") for line in lines[start:]]
    facts = {name.strip(): value.strip() for name, colon, value in account if colon}
    if "rank" not in facts or "exitcode" not in facts:
        return ""
    return f"rank {facts['rank']} ended first, with exit code {facts['exitcode']}"


def _is_own_reason(line: str) -> bool:
    """`drivetrain-rollout: no engine ...`, `trainer: ValueError: ...`: how our roles say it."""
    name, colon, rest = line.partition(": ")
    ours = name == "trainer" or (name.startswith("drivetrain") and " " not in name)
    return bool(colon and rest) and ours


def _ends_traceback(line: str) -> bool:
    text = line.split("]: ", 1)[1] if line.startswith("[rank") and "]: " in line else line
    name, colon, _ = text.partition(":")
    last = name.rsplit(".", 1)[-1]
    return (
        bool(colon)
        and name.replace(".", "").replace("_", "").isalnum()
        and last.endswith(("Error", "Exception", "Timeout", "Interrupt"))
        and last[:1].isupper()
    )
