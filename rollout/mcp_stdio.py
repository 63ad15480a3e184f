"""An MCP server as a process of ours: JSON-RPC messages, one a line, on its stdin and stdout."""

import asyncio
import contextlib
import shutil
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

from rollout.process import descendants, die_with_parent, kill_tree

_MAX_LINE_BYTES = 4 << 20
_MAX_BAD_LINES = 20
"""One after the other."""
_LEAVE_S = 1.0
"""How long a server whose stdin was closed is given to end by itself."""
_KILL_S = 6.0
"""How long the reaper is given to kill what came of it."""
# Its own imports alone, whatever `variables` say (-I).
_REAPER = (sys.executable, "-I", str(Path(__file__).with_name("mcp_reaper.py")))


@contextlib.asynccontextmanager
async def stdio_streams(
    command: Sequence[str], variables: Mapping[str, str]
) -> AsyncIterator[tuple[Any, Any]]:
    """The streams of messages from and to a server that this command starts (an mcp Transport).

    Not the SDK's own: nothing that came of it outlives this process, also where that is killed, and
    lines are bounded. Its environment is HOME, PATH and their like, and `variables`; what it writes
    to stderr is in our log. OSError: it cannot be started.
    """
    environment = get_default_environment() | dict(variables)
    if shutil.which(command[0], path=environment.get("PATH")) is None:
        raise FileNotFoundError(f"there is no program {command[0]}")
    process = await asyncio.create_subprocess_exec(
        *_REAPER,
        *command,
        stdin=PIPE,
        stdout=PIPE,
        env=environment,
        limit=_MAX_LINE_BYTES,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    try:
        received, receive = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        send, sent = anyio.create_memory_object_stream[SessionMessage](0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, process, received)
            tasks.start_soon(_write, process, sent, received)
            yield receive, send
            tasks.cancel_scope.cancel()
    finally:
        await _end(process)


async def _read(process: Process, received: Any) -> None:
    """Ends with the server's stdout, or with what is no use of it: calls then learn of the end."""
    assert process.stdout is not None
    bad_lines = 0
    async with received:
        with contextlib.suppress(ValueError, OSError, anyio.BrokenResourceError):  # too long a line
            while (line := await process.stdout.readline()) and bad_lines < _MAX_BAD_LINES:
                try:
                    message = SessionMessage(jsonrpc_message_adapter.validate_json(line))
                    bad_lines = 0
                except ValueError as error:
                    message = error
                    bad_lines += 1
                await received.send(message)


async def _write(process: Process, sent: Any, received: Any) -> None:
    assert process.stdin is not None
    try:
        async with sent:
            async for each in sent:
                line = each.message.model_dump_json(by_alias=True, exclude_unset=True)
                process.stdin.write(line.encode() + b"\n")
                await process.stdin.drain()
    except OSError:
        await received.aclose()


async def _end(process: Process) -> None:
    """It may leave by itself; then it and all that it started are killed, by its reaper."""
    assert process.stdin is not None
    started = descendants(process.pid)  # they cannot be found when the reaper has been killed
    with anyio.CancelScope(shield=True):
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _LEAVE_S)
        with contextlib.suppress(TimeoutError, ProcessLookupError):
            process.terminate()
            await asyncio.wait_for(process.wait(), _KILL_S)
        kill_tree(process.pid, started)
        await process.wait()
