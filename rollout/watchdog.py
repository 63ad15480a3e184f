"""What a process waits for, told when it takes long: in words, and by the stacks of its threads.

The log then says which wait it is before any bound ends the run. `kill -USR1 PID` asks for the
stacks of a trainer rank or of the rollout process at any time.
"""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator


def dump_stacks_on_signal() -> None:
    """From now on SIGUSR1 writes the stacks of all threads to stderr; nothing else happens."""
    # The process's own stderr: what stands in for it in a test has no file descriptor.
    stderr = sys.__stderr__ or sys.stderr
    faulthandler.register(signal.SIGUSR1, file=stderr, all_threads=True, chain=False)


class Watchdog:
    """Of one process."""

    def __init__(self, who: str, after_s: float) -> None:
        """after_s: what takes longer is told, and again after as long; 0: nothing is."""
        self._who = who
        self._after_s = after_s

    @contextlib.contextmanager
    def watch(self, what: str, missing: Callable[[], str] = lambda: "") -> Iterator[None]:
        """Around a wait for `what`.

        missing: asked, in a thread of its own, what is not there yet; it must be bounded.
        """
        if not self._after_s:
            yield
            return
        over = threading.Event()
        arguments = (what, missing, over)
        threading.Thread(target=self._tell, args=arguments, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _tell(self, what: str, missing: Callable[[], str], over: threading.Event) -> None:
        start = time.monotonic()
        while not over.wait(self._after_s):
            said = missing()
            if over.is_set():
                return
            waited = time.monotonic() - start
            why = f": {said}" if said else ""
            print(
                f"watchdog: {self._who} has waited {waited:.0f} s for {what}{why}; its stacks:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
