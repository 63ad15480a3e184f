"""One process at a time has a role of a run: launcher, trainer, rollout process, each engine.

A lock is a file in the run directory that the kernel frees when its holder ends, however it ends.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

ENDING_S = 10.0
"""How long roles whose launcher was killed may still be there."""
_POLL_S = 0.1
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class InUseError(ValueError):
    """Another living process holds the lock; the message names it."""


@contextlib.contextmanager
def hold(path: Path, what: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, which is made where it is missing.

    A file system without locks (Lustre mounted without flock) gives a warning and no protection.

    Args:
        what: what the message says is in use, e.g. `run_dir=/runs/x`.
        wait_s: how long a holder that may be ending is waited for.

    Raises:
        InUseError: another process holds it; the message names its host and process.
        OSError: the file cannot be written.
    """
    deadline = time.monotonic() + wait_s
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise InUseError(f"{what}: is being run by {holder}") from None
                time.sleep(_POLL_S)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logging.warning("%s: no locks here (%s); start nothing twice", path, error)
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
