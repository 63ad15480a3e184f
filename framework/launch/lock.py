"""One launcher at a time works in a run directory."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from framework.compose import ConfigError


@contextlib.contextmanager
def hold_run_dir(path: Path) -> Iterator[None]:
    """Hold `path`/lock, which is made where it is missing; the kernel lets go when we die.

    Roles do not inherit it: they end with their launcher.

    Raises:
        ConfigError: another launcher holds it; the line names its host and process.
        OSError: the directory cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                [f"run_dir={path}: is being run by {holder}; wait, or choose another run_dir="]
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
