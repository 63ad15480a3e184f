"""Which engines live now: their launchers say so in the run directory.

An engine that died and was started again has another address or process. It starts held (it
generates nothing, requests wait) and is let go by the push that gives it the trainers' weights.
"""

import time
from typing import NamedTuple

from rollout.run_dir import RunDir

_POLL_S = 0.1


class Entry(NamedTuple):
    """One engine process."""

    url: str
    pid: int


class Roster:
    """The engines that have been met, beside those that live; on the pushing rank."""

    def __init__(self, run_dir: RunDir, num_engines: int, start_timeout_s: float) -> None:
        """start_timeout_s: how long to wait for one where none lives."""
        self._run_dir = run_dir
        self._num_engines = num_engines
        self._start_timeout_s = start_timeout_s
        self._met: list[Entry] = []

    def living(self) -> list[Entry]:
        """Those that have an address, in the order of their numbers."""
        found = (self._run_dir.read_entry(f"engine_{k}") for k in range(self._num_engines))
        return [Entry(*entry) for entry in found if entry is not None]

    def wait_living(self) -> list[Entry]:
        """`living`, as soon as there is one.

        Raises:
            TimeoutError: none came within rollout.engine.start_timeout_s.
        """
        deadline = time.monotonic() + self._start_timeout_s
        while not (living := self.living()):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    "no engine lives and none was started within rollout.engine.start_timeout_s="
                    f"{self._start_timeout_s:g}"
                )
            time.sleep(_POLL_S)
        return living

    def newcomers(self) -> list[Entry]:
        """Those that live and have not been met."""
        return [entry for entry in self.living() if entry not in self._met]

    def meet(self, entries: list[Entry]) -> list[str]:
        """From now on the engines are these and, of those met before, the living; their URLs."""
        self._met = [each for each in self.living() if each in self._met or each in entries]
        return [each.url for each in self._met]

    def wait_lost(self, timeout_s: float, entries: list[Entry] | None = None) -> bool:
        """Whether one of these (default: of those met) turns out to be gone within timeout_s."""
        deadline = time.monotonic() + timeout_s
        while set(self._met if entries is None else entries) <= set(self.living()):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True
