"""One launcher at a time works in a run directory, and none while a run's roles are alive."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from framework.compose import ConfigError
from rollout.lock import ENDING_S, InUseError, hold


@contextlib.contextmanager
def hold_run_dir(path: Path) -> Iterator[None]:
    """Hold `path`/lock; the kernel lets go when we die.

    Each role holds `path`/lock.<role> itself, whoever started it: a Slurm job or a person's
    terminal goes on after the launcher, and nobody may rewind its directory meanwhile.

    Raises:
        ConfigError: another launcher or a role holds it; the line names its host and process.
        OSError: the directory cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    what = f"run_dir={path}"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(path / "lock", what))
            for role in sorted([*path.glob("lock.*"), *path.glob("warm_start/lock.*")]):
                with hold(role, f"{what} ({role.suffix[1:]})", ENDING_S):
                    pass
        except InUseError as error:
            raise ConfigError([f"{error}; wait, or choose another run_dir="]) from None
        yield
