"""Computation that may never end, in processes of their own that can be killed and replaced.

One that computes on the event loop holds up every group; in a thread it cannot be ended. A worker
answers JSON lines on its stdin with JSON lines on its stdout, one at a time, the first being
`{"ready": true}`, and ends with us.
"""

import asyncio
import contextlib
import json
import os
import weakref
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from typing import Any

from rollout.bounds import off_the_clock, turn
from rollout.process import die_with_parent

_MAX_REPLY_BYTES = 1 << 16


class WorkerError(RuntimeError):
    """A request without a result: why, for the sample's status."""


class Workers:
    """As many processes of one command as there are CPU cores, each started when it is needed."""

    def __init__(
        self, command: Sequence[str], *, timeout_s: float, start_timeout_s: float = 60.0
    ) -> None:
        """timeout_s: of one request; neither it nor a Bound counts the wait for a free worker."""
        self._command = list(command)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        # What asyncio makes belongs to one event loop, and ends with it.
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = (
            weakref.WeakKeyDictionary()
        )

    async def ask(self, request: dict[str, Any]) -> Any:
        """What a worker makes of a request.

        Raises:
            WorkerError: nothing within timeout_s, the worker died of it, or it says what is wrong.
        """
        loop = asyncio.get_running_loop()
        if (pool := self._pools.get(loop)) is None:
            self._pools[loop] = pool = _Pool()
        async with turn(pool.places):
            with off_the_clock():
                worker = pool.take() or await self._start()
            answered = False
            try:
                reply = await _within(self._timeout_s, _talk(worker, request))
                answered = True
            finally:
                if answered:
                    pool.idle.append(worker)
                else:
                    await _end([worker])
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["result"]

    async def _start(self) -> Process:
        worker = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=PIPE,
            stdout=PIPE,
            limit=_MAX_REPLY_BYTES,
            preexec_fn=die_with_parent,
        )
        ready = False
        try:
            await _within(self._start_timeout_s, _line(worker))
            ready = True
        finally:
            if not ready:
                await _end([worker])
        return worker


class _Pool:
    """The workers of one event loop."""

    def __init__(self) -> None:
        self.places = asyncio.Semaphore(max(1, len(os.sched_getaffinity(0))))
        self.idle: list[Process] = []
        self._keeper = asyncio.create_task(self._keep())

    def take(self) -> Process | None:
        """An idle worker that lives, if there is one."""
        while self.idle:
            if (worker := self.idle.pop()).returncode is None:
                return worker
        return None

    async def _keep(self) -> None:
        """Ends the idle ones with the loop, which cancels what runs on it; busy ones end with
        whoever asked them."""
        try:
            await asyncio.Event().wait()
        finally:
            await _end(self.idle)


async def _within(timeout_s: float, call: Any) -> dict[str, Any]:
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except TimeoutError:
        raise WorkerError(f"no result within {timeout_s:g} s") from None


async def _talk(worker: Process, request: dict[str, Any]) -> dict[str, Any]:
    assert worker.stdin is not None
    with contextlib.suppress(ConnectionError):  # it has died: that is told by what it says
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        await worker.stdin.drain()
    return await _line(worker)


async def _line(worker: Process) -> dict[str, Any]:
    assert worker.stdout is not None
    line = await worker.stdout.readline()
    if not line:
        raise WorkerError(f"the process that computes it died (status {await worker.wait()})")
    try:
        return json.loads(line)
    except ValueError:
        raise WorkerError(f"the process that computes it says {line!r:.80}") from None


async def _end(workers: list[Process]) -> None:
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
    for worker in workers:
        await worker.wait()
