"""The OpenAI chat-completions protocol, as far as a policy in training can speak it.

Requests are checked field by field. What would change the distribution that training assumes
(another temperature, penalties, constrained decoding, ...) is refused by name: log-probs are of
what was sampled, as it was sampled.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rollout.bodies import Refused
from rollout.config import SamplingConfig
from rollout.tools import CALL

IGNORED = {
    *("model", "seed", "user", "store", "metadata", "parallel_tool_calls", "service_tier"),
    *("safety_identifier", "prompt_cache_key", "stream_options", "prediction", "modalities"),
}
"""Fields that change nothing here; seeds are the run's own."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "function_call": (),
    "functions": ([],),
    "best_of": (1,),
    "echo": (False,),
    "reasoning_effort": (),
    "verbosity": (),
    "audio": (),
    "web_search_options": (),
}
"""Fields that may only say what is so anyway; null is always right."""


class _Fields(msgspec.Struct):
    """The fields with a meaning of their own."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    tool_choice: Any = None


@dataclass(kw_only=True, slots=True)
class ChatRequest:
    """A request that was understood."""

    messages: list[dict[str, Any]]
    """Normalised: role, content (a text), and of an assistant perhaps tool_calls."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """JSON schemas (`{"type": "function", "function": ...}`) that the policy is told of."""
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    stream_usage: bool = False
    logprobs: bool = False


@dataclass(kw_only=True, slots=True)
class Completion:
    """What the policy said to one request."""

    content: str
    tool_calls: list[dict[str, Any]]
    """Normalised: `{"type": "function", "function": {"name", "arguments": {...}}}`."""
    finish: str
    """stop | length | tool_calls"""
    num_prompt_tokens: int
    logprobs: list[tuple[str, float]]
    """(text, log-prob) of each sampled token."""
    number: int
    """Of this turn in its session."""

    def message(self) -> dict[str, Any]:
        """Normalised, as it looks when an agent sends it back."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        return message | ({"tool_calls": self.tool_calls} if self.tool_calls else {})


def parse_request(body: bytes, sampling: SamplingConfig, *, override: bool) -> ChatRequest:
    """A request's body, checked against how this run samples.

    override: other sampling parameters than the run's are replaced by the run's, not refused.

    Raises:
        Refused: 400, with the field that is wrong.
    """
    try:
        value = msgspec.json.decode(body)
        if not isinstance(value, dict):
            raise Refused(400, f"a JSON object is wanted, not {type(value).__name__}")
        fields = msgspec.convert(value, _Fields)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"not a chat completion request: {error}") from None
    _refuse_unknown(value)
    if not override:
        _refuse_other_sampling(fields, sampling)
    limits = [n for n in (fields.max_tokens, fields.max_completion_tokens) if n is not None]
    if limits and min(limits) < 1:
        raise Refused(400, f"max_tokens is {min(limits)}: at least 1", param="max_tokens")
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    if not all(stop):
        raise Refused(400, "stop holds an empty text", param="stop")
    if not fields.messages:
        raise Refused(400, "messages is empty", param="messages")
    messages = [_message(k, message) for k, message in enumerate(fields.messages)]
    if messages[-1]["role"] == "assistant":
        raise Refused(400, "the last message is the assistant's own", param="messages")
    return ChatRequest(
        messages=messages,
        tools=[] if fields.tool_choice == "none" else _tools(fields.tools or []),
        max_tokens=min(limits, default=None),
        stop=stop,
        stream=bool(fields.stream),
        stream_usage=bool((fields.stream_options or {}).get("include_usage")),
        logprobs=bool(fields.logprobs),
    )


def _refuse_unknown(value: dict[str, Any]) -> None:
    for name, given in value.items():
        if name in IGNORED or (name in _Fields.__struct_fields__ and name not in NEUTRAL):
            continue
        if name not in NEUTRAL:
            raise Refused(400, f"{name}: this endpoint knows no such field", param=name)
        if given is not None and given not in NEUTRAL[name]:
            allowed = " or ".join(map(json.dumps, NEUTRAL[name])) or "null"
            raise Refused(
                400,
                f"{name} is {json.dumps(given)[:80]}; a policy in training is sampled as it is, "
                f"so only {allowed} goes",
                param=name,
            )


def _refuse_other_sampling(fields: _Fields, sampling: SamplingConfig) -> None:
    for name in ("temperature", "top_p", "top_k"):
        given, ours = getattr(fields, name), getattr(sampling, name)
        if given is not None and given != ours:
            raise Refused(
                400,
                f"{name} is {given:g}, the run samples with rollout.sampling.{name}={ours:g}; "
                "leave it out, or let the run's own go (data.agent.override_sampling=true)",
                param=name,
            )


def _message(place: int, message: dict[str, Any]) -> dict[str, Any]:
    where = f"messages[{place}]"
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant", "tool"):
        raise Refused(400, f"{where}.role is {role!r}", param="messages")
    if message.get("function_call"):
        raise Refused(400, f"{where}.function_call: tool_calls are wanted", param="messages")
    calls = message.get("tool_calls") or []
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(content) else None
    if not isinstance(content, str):
        raise Refused(400, f"{where}.content: a text is wanted (or text parts)", param="messages")
    normal: dict[str, Any] = {"role": role, "content": content}
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise Refused(400, f"{where}.tool_calls: of an assistant, a list", param="messages")
        normal["tool_calls"] = [_call(where, call) for call in calls]
    return normal


def _call(where: str, call: Any) -> dict[str, Any]:
    try:
        function = call["function"]
        name, arguments = function["name"], function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        msgspec.json.encode(arguments)  # half of a surrogate pair is no text
        if not isinstance(name, str):
            raise TypeError(f"name is {name!r:.40}")
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        reason = f"{where}.tool_calls: function.name and function.arguments, a JSON text: {error}"
        raise Refused(400, reason, param="messages") from None
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for place, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise Refused(400, f"tools[{place}]: type=function is wanted", param="tools")
        if not isinstance(function.get("name"), str):
            raise Refused(400, f"tools[{place}].function.name: a text is wanted", param="tools")
    return tools


def parse_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """(the text before, the calls) of a reply; the whole text where a call is no call."""
    found = CALL.findall(text)
    calls = []
    for each in found:
        try:
            call = json.loads(each)
            name, arguments = call["name"], call.get("arguments", {})
            msgspec.json.encode(call)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return text, []
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return text, []
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return (text[: text.index("<tool_call>")].strip() if calls else text), calls
