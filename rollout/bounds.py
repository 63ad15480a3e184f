"""Bounds on the time of other people's code, which its waits for its turn do not count to.

What is bounded is what code computes: beside many others it would else fail for their number.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar


class Bound:
    """As asyncio.timeout(limit_s): `async with`, TimeoutError. Stands still in `off_the_clock`."""

    def __init__(self, limit_s: float) -> None:
        self._timeout = asyncio.timeout(limit_s)
        self._left_s = limit_s
        self._num_waits = 0
        self._is_over = False

    async def __aenter__(self) -> "Bound":
        await self._timeout.__aenter__()
        self._token = _bounds.set((*_bounds.get(), self))
        return self

    async def __aexit__(self, *error) -> bool | None:
        self._is_over = True
        _bounds.reset(self._token)
        return await self._timeout.__aexit__(*error)

    def expired(self) -> bool:
        """Whether it has ended what it is around."""
        return self._timeout.expired()

    def pause(self) -> None:
        """Once for each of those who wait; until the last `go_on` the clock stands still."""
        self._num_waits += 1
        if self._num_waits == 1 and (when := self._timeout.when()) is not None and self._is_live:
            self._left_s = when - asyncio.get_running_loop().time()
            self._timeout.reschedule(None)

    def go_on(self) -> None:
        """One of those who wait does so no longer."""
        self._num_waits -= 1
        if not self._num_waits and self._is_live:
            self._timeout.reschedule(asyncio.get_running_loop().time() + self._left_s)

    @property
    def _is_live(self) -> bool:
        return not self._is_over and not self.expired()


_bounds: ContextVar[tuple[Bound, ...]] = ContextVar("bounds", default=())


@contextlib.contextmanager
def off_the_clock() -> Iterator[None]:
    """Around a wait that is nobody's fault, and has an end: no Bound around it runs meanwhile."""
    bounds = _bounds.get()
    for bound in bounds:
        bound.pause()
    try:
        yield
    finally:
        for bound in bounds:
            bound.go_on()


@contextlib.asynccontextmanager
async def turn(places: asyncio.Semaphore) -> AsyncIterator[None]:
    """One of the places, waited for off the clock."""
    with off_the_clock():
        await places.acquire()
    try:
        yield
    finally:
        places.release()
