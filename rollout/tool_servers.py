"""Tools of MCP servers (Model Context Protocol): one connection a server, shared by all episodes.

A server is a command of ours, which talks over its stdin and stdout, or a URL (streamable HTTP). It
is started when it is first asked, started again when it has died or does not answer any more, and
ended with the event loop. Nothing that it says is evaluated.
"""

import asyncio
import contextlib
import importlib
import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

logger = logging.getLogger(__name__)

_PROBE_S = 5.0
"""How long a server that left a call without an answer may take to list its tools."""
_MAX_PAGES = 20
_MAX_SCHEMA_BYTES = 1 << 16
_NO_MCP = "Server returned an error response"
"""The SDK's words for a status that is no answer of an MCP server, such as a proxy's 502."""
_MAX_RESULT = 20_000
"""Characters of a result that the policy is told."""


_held: set[asyncio.Task[None]] = set()


class ToolServerError(RuntimeError):
    """The server gave no answer, through no fault of the policy's: the sample fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSpec:
    """One of `command` and `url`."""

    command: tuple[str, ...] = ()
    url: str = ""
    api_key: str = ""
    """Sent to a url as `Authorization: Bearer`."""
    variables: tuple[tuple[str, str], ...] = ()
    """Environment of a command beyond PATH, HOME and their like."""
    start_timeout_s: float = 30.0
    call_timeout_s: float = 20.0
    own_session: bool = False
    """Of one episode: what the server keeps is kept for it alone, and lost with its session."""

    @property
    def name(self) -> str:
        """For errors."""
        return self.url or " ".join(self.command)


class _Connection:
    """One server's; a task of its own opens and closes it, as the SDK demands."""

    def __init__(self, spec: ServerSpec) -> None:
        self.loop = asyncio.get_running_loop()
        self.client: Any = None
        self.opened: asyncio.Future[dict[str, dict[str, Any]]] = self.loop.create_future()
        """The schemas of its tools by name; ToolServerError."""
        self.end = asyncio.Event()
        self.probe: asyncio.Task[None] | None = None
        """Whether it still answers; nobody calls it meanwhile."""
        self._task = asyncio.create_task(self._hold(spec), name=f"tool server {spec.name}")
        _held.add(self._task)  # tasks that nobody refers to may vanish before they have ended
        self._task.add_done_callback(_held.discard)

    @property
    def is_over(self) -> bool:
        """Whether another one has to be opened."""
        return self._task.done() or self.end.is_set() or self.loop.is_closed()

    async def _hold(self, spec: ServerSpec) -> None:
        why = "it was ended"
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(spec.start_timeout_s):
                    self.client = await _connect(spec, stack)
                    # One of an episode is not asked: its schemas are those of the shared one.
                    schemas = {} if spec.own_session else await _list_tools(self.client)
                self.opened.set_result(schemas)
                await self.end.wait()
        except TimeoutError:
            why = f"does not list its tools within {spec.start_timeout_s:g} s"
        except (Exception, BaseExceptionGroup) as error:  # of the SDK, which names no base class
            why = f"{type(first := _first(error)).__name__}: {' '.join(str(first).split())}"
        finally:
            if not self.opened.done():
                self.opened.set_exception(ToolServerError(f"{spec.name}: {why}"))
                self.opened.exception()  # also where nobody waits for it any more
            elif not self.end.is_set():
                logger.warning("tool server %s is gone: %s", spec.name, why)

    def doubt(self) -> None:
        """A call got no answer: unless the server lists its tools, another is started."""
        if self.probe is None or self.probe.done():
            self.probe = asyncio.create_task(self._ask_again())

    async def _ask_again(self) -> None:
        try:
            async with asyncio.timeout(_PROBE_S):
                await self.client.session.list_tools()
        except Exception as error:  # of the SDK; TimeoutError
            logger.warning("a tool server is ended: %s: %s", type(error).__name__, error)
            self.end.set()


async def _connect(spec: ServerSpec, stack: contextlib.AsyncExitStack) -> Any:
    from mcp import Client
    from mcp.client.streamable_http import streamable_http_client

    from rollout.mcp_http import http_client
    from rollout.mcp_stdio import stdio_streams

    if spec.command:
        transport = stdio_streams(spec.command, dict(spec.variables))
    else:
        http = http_client(spec.api_key, spec.call_timeout_s + _PROBE_S)
        transport = streamable_http_client(
            spec.url, http_client=await stack.enter_async_context(http)
        )
    # The protocol of 2026 knows no sessions: that of before does.
    mode = "legacy" if spec.own_session else "auto"
    return await stack.enter_async_context(Client(transport, mode=mode))


async def _list_tools(client: Any) -> dict[str, dict[str, Any]]:
    """What the policy is told of each tool, by its name; ValueError: of no use."""
    from jsonschema import SchemaError, validators
    from mcp_types import PaginatedRequestParams

    found: dict[str, dict[str, Any]] = {}
    cursor = None
    for _ in range(_MAX_PAGES):
        page = await client.session.list_tools(params=PaginatedRequestParams(cursor=cursor))
        for tool in page.tools:
            try:
                validators.validator_for(tool.input_schema).check_schema(tool.input_schema)
            except SchemaError as error:
                raise ValueError(f"tool {tool.name}: no JSON schema: {error.message}") from None
            if tool.name in found:
                raise ValueError(f"tool {tool.name}: is listed twice")
            about = " ".join((tool.description or "").split())
            schema = {"name": tool.name, "description": about, "parameters": tool.input_schema}
            found[tool.name] = schema
        if (size := len(json.dumps(list(found.values())))) > _MAX_SCHEMA_BYTES:
            raise ValueError(f"its tools take {size} bytes to describe; {_MAX_SCHEMA_BYTES} fit")
        if (cursor := page.next_cursor) is None:
            return found
    raise ValueError(f"lists more than {_MAX_PAGES} pages of tools")


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class ToolServer:
    """A server by its spec; made without starting it."""

    def __init__(self, spec: ServerSpec) -> None:
        self._spec = spec
        self._connection: _Connection | None = None

    async def schemas(self) -> dict[str, dict[str, Any]]:
        """Name, description and parameters (JSON schema) of its tools; ToolServerError."""
        return await asyncio.shield((await self._open()).opened)

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """What a tool says, as text; `error: ...` where tool or server refuse the call.

        Raises:
            ToolServerError: no answer: the server is gone, or took longer than call_timeout_s.
        """
        from mcp import MCPError
        from mcp_types import (
            CONNECTION_CLOSED,
            INVALID_REQUEST,
            PARSE_ERROR,
            REQUEST_TIMEOUT,
            CallToolRequest,
            CallToolRequestParams,
            CallToolResult,
        )

        # Not client.call_tool: that validates what we do not use by a schema of the server's, whose
        # patterns can compute for ever, on our event loop.
        request = CallToolRequest(params=CallToolRequestParams(name=name, arguments=arguments))
        connection = await self._open()
        bound, answered = self._spec.call_timeout_s, False
        try:
            result = await connection.client.session.send_request(
                request, CallToolResult, request_read_timeout_seconds=bound
            )
            answered = True
        except MCPError as error:
            # Requests are ours, so an invalid one is of a session that the server forgot.
            lost = (CONNECTION_CLOSED, INVALID_REQUEST, PARSE_ERROR, REQUEST_TIMEOUT)
            answered = error.code not in lost and str(error) != _NO_MCP
            if answered:
                return f"error: {error}"
            why = f"no answer within {bound:g} s" if error.code == REQUEST_TIMEOUT else str(error)
            raise ToolServerError(f"{self._spec.name}: {name}: {why}") from error
        except Exception as error:  # of the SDK, on what is no answer by the protocol
            raise ToolServerError(
                f"{self._spec.name}: {name}: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        finally:
            if not answered:
                connection.doubt()
        text = "\n".join(
            part.text if part.type == "text" else f"[{part.type}]" for part in result.content
        )
        return f"{'error: ' if result.is_error else ''}{text[:_MAX_RESULT]}"

    def end(self) -> None:
        """Its session ends, in a moment; of a command so does the process. May be called again."""
        if self._connection is not None:
            self._connection.end.set()

    async def _open(self) -> _Connection:
        """The connection of the running loop, when it is open; another one where it is over."""
        found, loop = self._connection, asyncio.get_running_loop()
        if found is not None and found.loop is loop and found.probe is not None:
            await asyncio.shield(found.probe)
        found = self._connection
        if self._spec.own_session and found is not None and found.is_over:
            raise ToolServerError(f"{self._spec.name}: the session of this episode is over")
        if found is None or found.loop is not loop or found.is_over:
            self._connection = found = _Connection(self._spec)
        await asyncio.shield(found.opened)
        return found


@lru_cache(maxsize=64)
def tool_server(spec: ServerSpec) -> ToolServer:
    """The one of this process. ValueError: the package is not there."""
    try:
        importlib.import_module("mcp")  # here and not on the event loop: it takes a second
    except ImportError as error:
        raise ValueError(f"MCP servers need `pip install mcp`: {error}") from error
    return ToolServer(spec)
