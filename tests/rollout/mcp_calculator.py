"""`calculator` whose tool is an MCP server: a task of a user's own that asks one by itself."""

import sys
from pathlib import Path

from rollout.environments.base import EnvironmentStep
from rollout.environments.calculator import CalculatorEnvironment
from rollout.tool_servers import ServerSpec, tool_server

_HERE = Path(__file__).resolve()
SERVER = ServerSpec(
    command=(sys.executable, str(_HERE.with_name("mcp_server.py"))),
    variables=(("PYTHONPATH", str(_HERE.parents[2])),),
)


class McpCalculator(CalculatorEnvironment):
    """The same prompts and answers."""

    async def call(self, expression: str) -> str:
        """What the server says, in the terse words of this task."""
        said = await tool_server(SERVER).call("calculate", {"expression": expression})
        return "error" if said.startswith("error: ") else said


class EveryReplyCalls(McpCalculator):
    """For a policy that has not learned to call: whatever it says is an expression, once."""

    async def step(self, reply: str) -> EnvironmentStep:
        """A call, then the answer."""
        return await super().step(f"[{reply}]" if self._calls_left else reply)
