"""What an engine answers to /generate: read up to a bound, checked, brought into arrays."""

import math
from dataclasses import dataclass

import aiohttp
import msgspec
import numpy as np

from rollout.reply_numbers import Logprob, TokenId

SEQUENCE_BYTES = 1 << 16
"""What a reply may have for each sequence beside its tokens, and a reply that is an error."""
TOKEN_BYTES = 512
"""For each sampled token: its id, its log-prob and its text, escaped."""
SCORED_BYTES = 128
"""For each id with its log-prob, without text."""
ROUTE_BYTES = 1 << 13
"""For the experts of each token: 4 bytes each, in base64, of 1,536 (layers times experts)."""


async def read_bounded(reply: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The whole body; ValueError once it has more bytes. Of an error its beginning."""
    data = bytearray()
    bound = max_bytes if reply.status == 200 else SEQUENCE_BYTES
    async for chunk in reply.content.iter_any():
        data += chunk
        if len(data) > bound:
            if reply.status == 200:
                raise ValueError(f"more than the {bound} bytes that what was asked for can take")
            break
    return bytes(data)


@dataclass(kw_only=True, slots=True)
class Generation:
    """One sampled continuation of R tokens, its end token included."""

    token_ids: np.ndarray
    """[R] int32."""
    logprobs: np.ndarray
    """[R] float32, at the sampling temperature."""
    versions: np.ndarray
    """[R] int32: policy version of each token."""
    finish: str
    """stop | length"""
    end_token: bool
    """The last token is an end-of-sequence or stop token, no part of the text."""
    routes: np.ndarray | None = None
    """[N, layers * k]: of the N last tokens before the very last one, as were asked for."""


class Finish(msgspec.Struct):
    """How a request ended, in SGLang's words."""

    type: str
    matched: int | str | list[int] | None = None
    message: str | None = None
    status_code: int | None = None


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Meta(msgspec.Struct):
    finish_reason: Finish
    output_token_logprobs: list[tuple[Logprob, TokenId, str | None]]
    weight_version: str
    weight_versions: list[_Span] | None = None
    routed_experts: str | None = None


class Reply(msgspec.Struct):
    output_ids: list[TokenId]
    meta_info: _Meta


decode_replies = msgspec.json.Decoder(list[Reply]).decode


def read_generation(reply: Reply, max_new_tokens: int) -> Generation:
    """Check one reply and bring it into arrays; ValueError says what does not fit."""
    meta = reply.meta_info
    tokens = reply.output_ids
    finish = meta.finish_reason
    if finish.type not in ("stop", "length"):
        raise ValueError(f"finish_reason is {finish.type!r}, not stop or length")
    if not 1 <= len(tokens) <= max_new_tokens:
        raise ValueError(f"{len(tokens)} tokens where 1 to {max_new_tokens} were asked for")
    if [entry[1] for entry in meta.output_token_logprobs] != tokens:
        raise ValueError(f"the log-probs are not those of the {len(tokens)} output_ids")
    logprobs = [entry[0] for entry in meta.output_token_logprobs]
    if not all(math.isfinite(value) and value <= 0 for value in logprobs):
        raise ValueError("a log-prob is not a finite number <= 0")
    return Generation(
        token_ids=np.array(tokens, dtype=np.int32),
        logprobs=np.array(logprobs, dtype=np.float32),
        versions=_versions(meta, len(tokens)),
        finish=finish.type,
        end_token=isinstance(finish.matched, int) and finish.matched == tokens[-1],
    )


def _versions(meta: _Meta, num_tokens: int) -> np.ndarray:
    """[R] int32 from the engine's spans, which must cover every token once."""
    spans = meta.weight_versions or [_Span(version=meta.weight_version, start=0, end=num_tokens)]
    versions = np.empty(num_tokens, dtype=np.int32)
    position = 0
    for span in spans:
        if span.start != position or span.end <= span.start:
            raise ValueError(f"weight_versions do not cover the tokens: {spans}")
        if not (span.version.isdecimal() and len(span.version) < 10):  # fits int32
            raise ValueError(
                f"weight_version is {span.version[:30]!r}, not a number of at most 9 digits"
            )
        versions[span.start : span.end] = int(span.version)
        position = span.end
    if position != num_tokens:
        raise ValueError(f"weight_versions cover {position} of {num_tokens} tokens")
    return versions
