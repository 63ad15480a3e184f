"""Python functions as tools: their JSON schema from the signature, calls parsed, checked and run.

The format is the one of Hermes and Qwen: schemas in the system message, and in a reply
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

import inspect
import json
import re
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from rollout.own_code import import_own
from rollout.threads import in_thread

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_PROMPT = """You may call these functions:
<tools>
{schemas}
</tools>
For each call write the function's name and its arguments as JSON:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""


@dataclass(kw_only=True, slots=True)
class Tool:
    """One function that the policy may call."""

    function: Callable[..., Any]
    schema: dict[str, Any]
    """What the policy is told: name, description, parameters (JSON schema)."""
    arguments: type
    """A msgspec struct of the parameters: what a call must fit."""


def make_tool(function: Callable[..., Any]) -> Tool:
    """A tool of a function whose parameters are annotated with plain types.

    Raises:
        ValueError: a parameter has no annotation, or one that JSON cannot hold; by its name.
    """
    name = getattr(function, "__name__", repr(function))
    hints = typing.get_type_hints(function)
    properties: dict[str, Any] = {}
    fields: list[tuple] = []
    for parameter in inspect.signature(function).parameters.values():
        where = f"{name}, parameter {parameter.name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{where}: is *args, **kwargs or positional only; give it a name")
        if parameter.name not in hints:
            raise ValueError(f"{where}: has no type; annotate it (int, str, list[float], ...)")
        kind = hints[parameter.name]
        try:
            schema = msgspec.json.schema(kind)
        except TypeError as error:
            raise ValueError(f"{where}: {kind} has no JSON schema: {error}") from None
        if "$ref" in json.dumps(schema):
            raise ValueError(f"{where}: {kind} is a class; plain types, lists and dicts are wanted")
        properties[parameter.name] = schema
        optional = parameter.default is not parameter.empty
        default = (parameter.default,) if optional else ()
        fields.append((parameter.name, kind, *default))
    parameters = {
        "type": "object",
        "properties": properties,
        "required": [field[0] for field in fields if len(field) == 2],
    }
    about = (inspect.getdoc(function) or "").split("\n\n")[0]
    return Tool(
        function=function,
        schema={"name": name, "description": " ".join(about.split()), "parameters": parameters},
        arguments=msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True),
    )


def tools_prompt(schemas: Sequence[dict[str, Any]]) -> str:
    """What a system message says of functions with these schemas."""
    lines = [json.dumps({"type": "function", "function": schema}) for schema in schemas]
    return _PROMPT.format(schemas="\n".join(lines))


def read_call(text: str, names: Collection[str]) -> tuple[str, Any]:
    """Name and arguments of one call; ValueError is for the policy to read."""
    try:
        call = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"no JSON: {error}") from None
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"a name of {', '.join(names)} is wanted")
    return name, call.get("arguments", {})


class Tools:
    """The tools of a task."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._tools = {tool.schema["name"]: tool for tool in map(make_tool, functions)}

    def prompt(self) -> str:
        """What the system message says of them."""
        return tools_prompt([tool.schema for tool in self._tools.values()])

    async def answer(self, reply: str) -> list[str]:
        """The result of each call in a reply, in order; empty: it makes none.

        What is wrong with a call, or what the function raised, is its result: the policy is told.
        """
        return [await self._run(text) for text in CALL.findall(reply)]

    async def _run(self, text: str) -> str:
        try:
            name, given = read_call(text, self._tools)
            tool = self._tools[name]
            arguments = msgspec.convert(given, tool.arguments)
        except ValueError as error:  # msgspec's are such
            return f"error: {error}"
        named = {name: getattr(arguments, name) for name in tool.arguments.__struct_fields__}
        try:
            if inspect.iscoroutinefunction(tool.function):
                result = await tool.function(**named)
            else:  # in a thread: others go on meanwhile
                result = await in_thread(tool.function, **named)
            return result if isinstance(result, str) else json.dumps(result)
        except Exception as error:  # somebody else's code: anything may come
            return f"error: {type(error).__name__}: {error}"


@lru_cache(maxsize=8)
def find_tools(names: tuple[str, ...]) -> Tools:
    """Functions of the user's own, each package.module.function.

    Raises:
        ValueError: one is not there, or cannot be a tool; the line names it.
    """
    functions = []
    for name in names:
        try:
            found = import_own(name)
            if not inspect.isfunction(found):
                raise ValueError("is no function")
            make_tool(found)
        except (ValueError, NameError) as error:
            raise ValueError(f"data.args.tools={name}: {error}") from error
        functions.append(found)
    return Tools(functions)
