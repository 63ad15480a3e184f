"""Blocking code of somebody else's, off the event loop."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)


async def in_thread(function: Callable[..., T], *args: Any, **named: Any) -> T:
    """What function(*args, **named) gives, computed in a daemon thread of its own.

    Not asyncio.to_thread: its pool is small and shared, so a few calls that never return would
    block everybody else's, and the end of the process. A call that is given up costs its thread.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # pyright: ignore[reportArgumentType]

    def work() -> None:
        result, error = None, None
        try:
            result = function(*args, **named)
        except BaseException as raised:  # somebody else's code: anything may come, sys.exit() too
            plain = isinstance(raised, Exception) and not isinstance(raised, StopIteration)
            error = raised if plain else RuntimeError(repr(raised))
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=work, name=f"call of {function}", daemon=True).start()
    return await done


def leave_to_thread(function: Callable[[], Any], what: str) -> None:
    """function() in a daemon thread that nobody waits for; where it fails, that is told."""

    def work() -> None:
        try:
            function()
        except BaseException as error:  # somebody else's code
            logger.warning("%s: %s: %s", what, type(error).__name__, error)

    threading.Thread(target=work, name=what, daemon=True).start()
