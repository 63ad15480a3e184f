"""Rewards that somebody else computes, over HTTP: a scorer of yours, a judge, a reward model.

Each function here makes a reward from its arguments (`data.rewards.<name>.args`). Connections that
fail and statuses of 429 and 5xx raise ServiceBusyError, which rewards/weighted.py tries again;
everything else that is wrong is a ValueError with the address.
"""

import json
import math
import re
from typing import Any

import aiohttp

from rollout.rewards.base import Reward, RewardFunction, Task
from rollout.types import Sample

_MAX_REPLY_BYTES = 1 << 20
_PLACES = re.compile(r"\{(prompt|answer|reply|conversation)\}")


class ServiceBusyError(RuntimeError):
    """No usable answer this time; another attempt may get one."""


async def post_json(url: str, body: dict[str, Any], api_key: str = "") -> Any:
    """The JSON that `url` answers with; ServiceBusyError or ValueError, each with the address."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(url, json=body, allow_redirects=False) as reply,
        ):
            data = bytearray()
            async for chunk in reply.content.iter_chunked(1 << 16):
                data += chunk
                if len(data) > _MAX_REPLY_BYTES:
                    raise ValueError(f"{url}: the reply exceeds {_MAX_REPLY_BYTES} bytes")
    except (aiohttp.ClientError, ConnectionError) as error:
        raise ServiceBusyError(f"{url}: {type(error).__name__}: {error}") from error
    shown = " ".join(data[:200].decode(errors="replace").split())
    if reply.status == 429 or reply.status >= 500:
        raise ServiceBusyError(f"{url}: status {reply.status}: {shown}")
    if reply.status != 200:
        raise ValueError(f"{url}: status {reply.status}: {shown}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url}: the reply is no JSON: {shown!r}") from error


def _number(value: Any, url: str, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{url}: the reply has {value!r} where {wanted} is wanted")
    return float(value)


def http(*, url: str, api_key: str = "") -> RewardFunction:
    """Any scorer: answers {"reward": number} to {"prompt", "answer", "replies", "description",
    "environment_reward"}."""

    async def ask(sample: Sample, task: Task) -> Reward:
        body = {
            "prompt": task.description.get("prompt", ""),
            "answer": task.description.get("answer", ""),
            "replies": task.replies,
            "description": task.description,
            "environment_reward": task.environment_reward,
        }
        reply = await post_json(url, body, api_key)
        value = reply.get("reward") if isinstance(reply, dict) else reply
        return Reward(value=_number(value, url, '"reward", a number,'))

    return ask


def judge(
    *,
    url: str,
    model: str,
    template: str,
    pattern: str = r"(-?\d+(?:\.\d+)?)",
    divide_by: float = 1.0,
    api_key: str = "",
    max_tokens: int = 256,
) -> RewardFunction:
    """A language model's opinion, asked of any OpenAI-compatible endpoint.

    url: up to /v1. template: the question, with {prompt}, {answer}, {reply} (the last) or
    {conversation}. pattern: its last match in what the judge says has the score in its first group,
    which is divided by divide_by.
    """
    if not _PLACES.search(template):
        raise ValueError("template has none of {prompt}, {answer}, {reply}, {conversation}")
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r}: {error}") from error
    if found.groups < 1:
        raise ValueError(f"pattern={pattern!r}: has no group for the score")
    if divide_by == 0:
        raise ValueError("divide_by=0: must not be 0")
    address = url.rstrip("/") + "/chat/completions"

    async def ask(sample: Sample, task: Task) -> Reward:
        texts = {
            "prompt": task.description.get("prompt", ""),
            "answer": task.description.get("answer", ""),
            "reply": task.replies[-1] if task.replies else "",
            "conversation": "\n".join(task.replies),
        }
        # One pass: braces in a reply are a reply's, not ours.
        question = _PLACES.sub(lambda place: texts[place.group(1)], template)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        reply = await post_json(address, body, api_key)
        try:
            said = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{address}: the reply is no chat completion") from None
        scores = [match.group(1) for match in found.finditer(said)] if isinstance(said, str) else []
        if not scores:
            raise ValueError(
                f"{address}: no score ({pattern}) in what the judge said: {said!r:.80}"
            )
        try:
            score = float(scores[-1])
        except (TypeError, ValueError):
            raise ValueError(f"{address}: the score {scores[-1]!r} is no number") from None
        return Reward(value=_number(score / divide_by, address, "a finite score"))

    return ask


def reward_model(*, url: str, api_key: str = "") -> RewardFunction:
    """The score a reward model gives to the sample's own tokens; policy and reward model must share
    a tokenizer. url: an engine's /classify, as SGLang serves it for *ForSequenceClassification."""
    address = url.rstrip("/") + "/classify"

    async def ask(sample: Sample, task: Task) -> Reward:
        reply = await post_json(address, {"input_ids": sample.tokens.tolist()}, api_key)
        reply = reply[0] if isinstance(reply, list) and reply else reply
        scores = reply.get("embedding") if isinstance(reply, dict) else None
        if not isinstance(scores, list) or len(scores) != 1:
            raise ValueError(f"{address}: the reply has no single score in 'embedding'")
        return Reward(value=_number(scores[0], address, "a score"))

    return ask
