"""Which roles are started again when they die, and how often."""

import time
from collections import defaultdict, deque

from framework.launch.roles import Restart, Role

EXIT_REFUSED = 2
"""How a role says that its configuration cannot work: it would refuse it again."""


class Restarts:
    """Counts deaths. A role that dies more than `max_restarts` times within `window_s` is lost."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self.max_restarts = max_restarts
        self._window_s = window_s
        self._deaths: dict[str, deque[float]] = defaultdict(deque)
        self._starts: dict[str, int] = defaultdict(int)

    def after(self, role: Role, code: int, was_ready: bool) -> int:
        """How often `role` will have been started again, this time included; 0: it must not be.

        Args:
            code: how it ended; below 0 by a signal.
            was_ready: it had said where it listens.
        """
        if not _may_come_back(role, code, was_ready):
            return 0
        deaths, now = self._deaths[role.name], time.monotonic()
        deaths.append(now)
        while deaths[0] < now - self._window_s:
            deaths.popleft()
        if len(deaths) > self.max_restarts:
            return 0
        self._starts[role.name] += 1
        return self._starts[role.name]


def _may_come_back(role: Role, code: int, was_ready: bool) -> bool:
    match role.restart:
        case Restart.NEVER:
            return False
        case Restart.KILLED:
            return code < 0
        case Restart.LOST:
            return code < 0 or (was_ready and code != EXIT_REFUSED)
