"""Between us and a tool server: starts the command it is given, and outlives all that came of it.

A program of its own (mcp_stdio.py starts it): what a server leaves behind, daemons included,
becomes its child (PR_SET_CHILD_SUBREAPER), and is killed when the server ends, when it is told to
end (SIGTERM), or when whoever started it has died, however that came.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_KILL_S = 5.0


def main() -> None:
    """Exit with the server's status."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if sys.platform == "linux":
        _ask_kernel(_PR_SET_CHILD_SUBREAPER, 1)
        _ask_kernel(_PR_SET_PDEATHSIG, signal.SIGTERM)  # until here SIGKILL, set by who started us
    try:
        server = subprocess.Popen(sys.argv[1:], preexec_fn=_die_with_us)
        for stream in (0, 1):  # their ends are the server's to close
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        while (ended := os.wait())[0] != server.pid:
            pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_descendants()
    sys.exit(os.waitstatus_to_exitcode(ended[1]) & 255)


def _kill_descendants() -> None:
    """Until there are none: what a dead one had started comes to us. Bounded by _KILL_S."""
    deadline = time.monotonic() + _KILL_S
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for each in left:
            with contextlib.suppress(psutil.Error):
                each.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def _die_with_us() -> None:
    if sys.platform == "linux":
        _ask_kernel(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _ask_kernel(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


if __name__ == "__main__":
    main()
