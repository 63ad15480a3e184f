"""Lifetime of a role's processes on one machine: nothing outlives what started it.

Linux tells a process when its parent dies (PR_SET_PDEATHSIG). Every role asks for that, so that
`kill -9` of the launcher leaves nothing behind; `end_process_group` is the orderly way.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

LAUNCHER_PID = "DRIVETRAIN_LAUNCHER_PID"
"""Environment variable: the process whose death must end this one."""

RESTARTS = "DRIVETRAIN_RESTARTS"
"""Environment variable: how often the launcher has started this role again after a death."""

_PR_SET_PDEATHSIG = 1
_UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when the *thread* that started it ends (Linux only).

    Whoever starts a role must therefore do so from a thread that lives as long as the role.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def follow_launcher(*, direct: bool = True) -> None:
    """End with the launcher, where there is one (DRIVETRAIN_LAUNCHER_PID); else do nothing.

    direct: the launcher is this process's parent. Not so for torchrun's workers: they end with
    torchrun, whoever started that. The launcher may have died before the kernel was asked, so its
    presence is checked afterwards.
    """
    if not direct and _UNDER_TORCHRUN in os.environ:
        die_with_parent()
    value = os.environ.get(LAUNCHER_PID)
    if not value:
        return
    die_with_parent()
    launcher = int(value)
    gone = os.getppid() != launcher if direct else not psutil.pid_exists(launcher)
    if gone:
        sys.exit(f"{LAUNCHER_PID}={launcher} has ended: so does this process")


def end_process_group(process: subprocess.Popen, timeout_s: float) -> None:
    """SIGTERM, then after timeout_s SIGKILL, to everything `process` started; waits for the end.

    `process` must lead its own group (start_new_session=True). Descendants that left the group
    for sessions of their own are found by their parentage and end as well.
    """
    tree = descendants(process.pid)
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and (process.poll() is None or _alive(tree)):
        time.sleep(0.05)
    tree += [p for p in descendants(process.pid) if p not in tree]
    _signal_group(process.pid, signal.SIGKILL)
    for child in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait(timeout=10)
    psutil.wait_procs(tree, timeout=10)


def kill_tree(pid: int, known: Sequence[psutil.Process] = ()) -> None:
    """SIGKILL, at once, to a process that leads its own group and to all that came of it.

    Its own session (start_new_session=True) is found even after it has ended; descendants that
    left for sessions of their own only while it lives, or where they are `known` from before.
    """
    tree = [*known, *descendants(pid)]
    _signal_group(pid, signal.SIGKILL)
    for child in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _signal_group(pgid: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pgid, signum)


def descendants(pid: int) -> list[psutil.Process]:
    """All that a process started and that lives, and what those started."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _alive(processes: list[psutil.Process]) -> bool:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
