"""The end of a process that other people's code runs in: bounded, whatever that code does."""

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

logger = logging.getLogger(__name__)


class BoundedRunner:
    """As asyncio.Runner: `with` gives one. At its end tasks are cancelled and threads waited for.

    asyncio, and after it Python, would wait for both without bound. Where one takes no notice for
    limit_s, the process ends there, by os._exit, with the status it would have had: so this is the
    outermost thing in a process, which has nothing to do after it.
    """

    def __init__(self, limit_s: float = 5.0) -> None:
        self._limit_s = limit_s
        self._runner = asyncio.Runner()
        self._pool = ThreadPoolExecutor(thread_name_prefix="asyncio")

    def __enter__(self) -> asyncio.Runner:
        self._runner.get_loop().set_default_executor(self._pool)
        return self._runner

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        left = [repr(task) for task in self._runner.run(_cancel_tasks(self._limit_s))]
        self._pool.shutdown(wait=False, cancel_futures=True)
        left += [repr(thread) for thread in _join_threads(self._limit_s)]
        if left:
            logger.warning("ends although something takes no notice: %s", "; ".join(left))
            _end(error)
        self._runner.close()


async def _cancel_tasks(limit_s: float) -> set[asyncio.Task]:
    """Those that live on."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    return (await asyncio.wait(tasks, timeout=limit_s))[1] if tasks else set()


def _join_threads(limit_s: float) -> list[threading.Thread]:
    """Those that live on and that Python would wait for."""
    deadline = time.monotonic() + limit_s
    here = threading.current_thread()
    threads = [each for each in threading.enumerate() if each is not here and not each.daemon]
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [thread for thread in threads if thread.is_alive()]


def _end(error: BaseException | None) -> None:
    """What Python does with an error that nobody caught, but now."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
