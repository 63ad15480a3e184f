"""The policy's turns as OpenAI's clients want them: at once, as a stream's events, as an error."""

import json
import time
from typing import Any

from rollout.agents.protocol import ChatRequest, Completion


def response(completion: Completion, session_id: str, request: ChatRequest) -> dict[str, Any]:
    """The body of an answer that comes at once."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.content or None}
    if completion.tool_calls:
        message["tool_calls"] = _wire_calls(completion)
    else:
        message["content"] = completion.content
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": completion.finish,
        "logprobs": _wire_logprobs(completion) if request.logprobs else None,
    }
    return {
        **_head(completion, session_id, "chat.completion"),
        "choices": [choice],
        "usage": _usage(completion),
    }


def chunks(completion: Completion, session_id: str, request: ChatRequest) -> list[dict[str, Any]]:
    """The same as the events of a stream."""
    head = _head(completion, session_id, "chat.completion.chunk")
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    if completion.content:
        deltas.append({"content": completion.content})
    for k, call in enumerate(_wire_calls(completion)):
        deltas.append({"tool_calls": [{"index": k, **call}]})
    events = [
        {**head, "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas
    ]
    last = {"index": 0, "delta": {}, "finish_reason": completion.finish}
    if request.logprobs:
        last["logprobs"] = _wire_logprobs(completion)
    events.append({**head, "choices": [last]})
    if request.stream_usage:
        events.append({**head, "choices": [], "usage": _usage(completion)})
    return events


def error_body(reason: str, status: int, param: str | None, code: str | None) -> dict[str, Any]:
    """What OpenAI's clients make an exception of."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": reason, "type": kind, "param": param, "code": code}}


def _head(completion: Completion, session_id: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{session_id}-{completion.number}",
        "object": kind,
        "created": int(time.time()),
        "model": "policy",
    }


def _usage(completion: Completion) -> dict[str, int]:
    sampled = len(completion.logprobs)
    return {
        "prompt_tokens": completion.num_prompt_tokens,
        "completion_tokens": sampled,
        "total_tokens": completion.num_prompt_tokens + sampled,
    }


def _wire_calls(completion: Completion) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{completion.number}_{k}",
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"]["arguments"]),
            },
        }
        for k, call in enumerate(completion.tool_calls)
    ]


def _wire_logprobs(completion: Completion) -> dict[str, Any]:
    content = [
        {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
        for text, value in completion.logprobs
    ]
    return {"content": content, "refusal": None}
