"""A calculator as an MCP server, over stdin and stdout, and what may go wrong with a server."""

import asyncio
import itertools
import os
import subprocess

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from rollout.environments.arithmetic import evaluate

server = MCPServer("calculator")
_calls = itertools.count(1)


@server.tool()
def calculate(expression: str) -> str:
    """The value of an
    expression."""
    try:
        return str(evaluate(expression))
    except ValueError as error:
        raise ToolError(f"no expression: {error}") from error


@server.tool()
async def hang() -> str:
    """Never answers."""
    await asyncio.sleep(3600)
    return "too late"


@server.tool()
def processes() -> str:
    """Starts a child that outlives us if nobody cares; our own id and its."""
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return f"{os.getpid()} {child.pid}"


@server.tool()
def die() -> str:
    """Ends the server in the middle of the call."""
    os._exit(3)


@server.tool()
def count() -> str:
    """How often it was called in this process."""
    return str(next(_calls))


if __name__ == "__main__":
    server.run("stdio")
