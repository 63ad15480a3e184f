"""Any task with the tools of an MCP server (Model Context Protocol) beside it.

    data=mcp data.args.task=jsonl data.args.args.path=train.jsonl \\
        'data.args.command=[python, my_server.py]'

Needs the package `mcp`.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any

from rollout.environments.base import Environment, EnvironmentStep, Message
from rollout.programs import missing_program
from rollout.tool_servers import ServerSpec, ToolServer, tool_server
from rollout.tools import CALL, read_call, tools_prompt

SESSIONS = ("server", "episode")


class McpEnvironment(Environment):
    """Replies with calls are answered by the server, all others by the task.

    Schemas go into the system message and calls are written as for data.args.tools of jsonl. What
    is wrong with a call, and errors of a tool, are told to the policy; a server that dies or does
    not answer costs its sample, and is started again. All episodes share one server, which should
    keep nothing between calls; with session=episode each that calls has one of its own.
    """

    def __init__(
        self,
        *,
        seed: int,
        task: str = "",
        args: Mapping[str, Any] | None = None,
        command: Sequence[str] = (),
        url: str = "",
        api_key: str = "",
        variables: Mapping[str, str] | None = None,
        tools: Sequence[str] = (),
        max_calls: int = 4,
        session: str = "server",
        start_timeout_s: float = 30.0,
        call_timeout_s: float = 20.0,
    ) -> None:
        """task, args: as data.task and data.args would be without tools. command: starts a server
        that talks over its stdin and stdout, with `variables` in its environment; or url (and
        api_key): of one that is there (streamable HTTP). tools: those offered; none named: all. The
        policy may call in at most max_calls of its replies. session: `server`, one for all, or
        `episode`: begun by an episode's first call (a command is started then), ended with it.
        start_timeout_s, call_timeout_s: of the
        server's start and of each call."""
        if max_calls < 1:
            raise ValueError(f"data.args.max_calls={max_calls}: must be at least 1")
        for key, value in (("start", start_timeout_s), ("call", call_timeout_s)):
            if not 0 < value < float("inf"):
                raise ValueError(f"data.args.{key}_timeout_s={value}: must be more than 0")
        if session not in SESSIONS:
            raise ValueError(f"data.args.session={session}: must be one of {', '.join(SESSIONS)}")
        _check_address(command, url)
        of_task = _find(task)
        with _keys_of_the_task():
            self._task = of_task(seed=seed, **(args or {}))
        self._wanted = list(tools)
        self._calls_left = max_calls
        spec = ServerSpec(
            command=tuple(command),
            url=url,
            api_key=api_key,
            variables=tuple(sorted((variables or {}).items())),
            start_timeout_s=start_timeout_s,
            call_timeout_s=call_timeout_s,
        )
        self._server = self._called = tool_server(spec)
        if session == "episode":
            self._called = ToolServer(replace(spec, own_session=True))

    @property
    def hold_out(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the task has it."""
        return self._task.hold_out

    @classmethod
    def finite(cls, split: str, **args: Any) -> list[int] | None:
        """The task's."""
        known = inspect.signature(cls).parameters
        for name in args:
            if name not in known:
                raise ValueError(
                    f"data.args.{name}: data.task=mcp has no such argument; those of the task go "
                    f"below data.args.args (data.args.args.{name}=...)"
                )
        of_task = _find(args.get("task", ""))
        with _keys_of_the_task():
            return of_task.finite(split, **(args.get("args") or {}))

    async def initial_messages(self) -> list[Message]:
        """The task's, after what there is to call."""
        schemas = await self._server.schemas()
        if missing := [name for name in self._wanted if name not in schemas]:
            raise ValueError(f"data.args.tools={missing}: the server has {', '.join(schemas)}")
        about = tools_prompt([schemas[name] for name in self._wanted or schemas])
        first, *others = await self._task.initial_messages()
        if first["role"] == "system":
            return [{"role": "system", "content": f"{first['content']}\n\n{about}"}, *others]
        return [{"role": "system", "content": about}, first, *others]

    async def step(self, reply: str) -> EnvironmentStep:
        """Calls of tools, or the task's."""
        calls = CALL.findall(reply) if self._calls_left else []
        if not calls:
            return await self._task.step(reply)
        self._calls_left -= 1
        names = self._wanted or list(await self._server.schemas())
        messages: list[Message] = [
            {"role": "tool", "content": await self._call(text, names)} for text in calls
        ]
        return EnvironmentStep(messages=messages, done=False)

    async def _call(self, text: str, names: list[str]) -> str:
        try:
            name, arguments = read_call(text, names)
            if not isinstance(arguments, dict):
                raise ValueError(f"arguments are {arguments!r:.60}; an object is wanted")
        except ValueError as error:
            return f"error: {error}"
        return await self._called.call(name, arguments)

    def close(self) -> None:
        """The episode's own session, and what the task holds."""
        if self._called is not self._server:
            self._called.end()
        self._task.close()

    def identity(self) -> str:
        """The task's."""
        return self._task.identity()

    def state(self) -> str:
        """The task's."""
        return self._task.state()

    def describe(self) -> dict[str, str]:
        """The task's."""
        return self._task.describe()

    def demonstration(self) -> list[str]:
        """The task's, which calls nothing."""
        return self._task.demonstration()

    def mistake(self, random: Random) -> list[str]:
        """The task's."""
        return self._task.mistake(random)


def _check_address(command: Sequence[str], url: str) -> None:
    if isinstance(command, str):
        raise ValueError(f"data.args.command={command}: must be a list, as [python, server.py]")
    if not command and not url:
        raise ValueError("data.args: set command or url of the MCP server")
    if command and url:
        raise ValueError(f"data.args.command={command}, data.args.url={url}: set one of them")
    if url and not url.startswith(("http://", "https://")):
        raise ValueError(f"data.args.url={url}: must begin with http:// or https://")
    if not all(isinstance(word, str) and word for word in command):
        raise ValueError(f"data.args.command={command}: a list of words is wanted")
    if command and (missing := missing_program(command)):
        raise ValueError(f"data.args.command={command}: {missing}")


@contextmanager
def _keys_of_the_task() -> Iterator[None]:
    """A task's refusals name its arguments where it is played alone."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("data.args.", "data.args.args.")) from error


def _find(task: str) -> type[Environment]:
    from rollout.environments import find_environment  # which has a row for this class

    if not task:
        raise ValueError("data.args.task: names no task to play with the server's tools")
    try:
        return find_environment(task)
    except ValueError as error:
        raise ValueError(f"data.args.task={task}: {error}") from error
