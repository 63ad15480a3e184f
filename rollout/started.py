"""The groups of one policy version between their start and their delivery."""

from collections.abc import Iterator

from rollout.buffer_state import StartedState
from rollout.ready import ReadyGroups


class Started:
    """Groups that started at one version: their places, in the order of starting, are a range."""

    def __init__(self, *, version: int, first: int, undelivered: bytes = b"") -> None:
        """first: place of the first. undelivered: see StartedState."""
        self.version = version
        self.ready = ReadyGroups()
        """Those that are finished."""
        self._first = first
        self._undelivered = bytearray(undelivered)
        self.num_undelivered = self._undelivered.count(1)

    @classmethod
    def of(cls, state: StartedState) -> "Started":
        """As saved; nothing is finished."""
        return cls(version=state.version, first=state.first, undelivered=state.undelivered)

    def state(self) -> StartedState:
        """To be saved; without the finished groups."""
        return StartedState(
            version=self.version, first=self._first, undelivered=bytes(self._undelivered)
        )

    def start(self) -> None:
        """One more, at the next place."""
        self._undelivered.append(1)
        self.num_undelivered += 1

    def leave(self, place: int) -> None:
        """The group of this place is delivered or dropped."""
        self._undelivered[place - self._first] = 0
        self.num_undelivered -= 1

    def holds(self, place: int) -> bool:
        """Whether the group of this place started and has not left."""
        k = place - self._first
        return 0 <= k < len(self._undelivered) and bool(self._undelivered[k])

    def places(self) -> Iterator[int]:
        """Of all that have not left, in order."""
        return (self._first + k for k, left in enumerate(self._undelivered) if left)
