"""Asyncio client of the SGLang engines: token ids in, token ids with log-probs and versions out.

One list call serves a group, or one call a sample where sglang-router stands between. Connections
that fail, 5xx and aborted requests are tried again, on the least loaded engine, a bounded number of
times and within one total bound; engines that come back are waited for within that bound. A reply
that does not fit what was asked is refused with the reason.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import TypeVar

import aiohttp
import msgspec

from rollout.config import EngineConfig, SamplingConfig
from rollout.engine_reply import (
    ROUTE_BYTES,
    SEQUENCE_BYTES,
    TOKEN_BYTES,
    Finish,
    Generation,
    decode_replies,
    read_bounded,
    read_generation,
)
from rollout.routes import read_routes

T = TypeVar("T")

_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 2.0
_LOOK_S = 1.0
"""Between two looks for engines that were lost."""


class EngineFailure(RuntimeError):
    """No engine answered a request within its bounds, or one refused it, or answered rubbish."""


class EngineRefusal(EngineFailure):
    """An engine does not take this request, whoever asks again: too long, or not well formed."""


class _Retry(Exception):
    """This attempt failed in a way that another may not."""


class _Lost(_Retry):
    """Nobody was there to answer."""


class EngineClient:
    """Talks to all engines of a run, or to their router. Use as an async context manager."""

    def __init__(
        self,
        urls: list[str],
        api_key: str,
        config: EngineConfig,
        find_urls: Callable[[], list[str]] | None = None,
        what: str = "generation",
    ) -> None:
        """urls: of the engines; with config.router the router's alone.

        find_urls: where they are now, for engines that are started again when they die: calls then
        wait for those, within their total bound. None: whoever is lost stays so.
        """
        if not urls:
            raise ValueError("rollout.engine.urls: no engine to talk to")
        self._in_flight = {url.rstrip("/"): 0 for url in urls}
        self._wanted = len(urls)
        self._find_urls = find_urls
        self._what = what
        self._looked = -math.inf
        self._api_key = api_key
        self._config = config
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "EngineClient":
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._api_key}"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            connector=aiohttp.TCPConnector(limit=0),
            json_serialize=lambda value: msgspec.json.encode(value).decode(),
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        *,
        routes_from: int | None = None,
    ) -> list[Generation]:
        """One continuation of each prompt (token ids), sampled with its own seed, in order.

        routes_from: with the routes of all tokens from this one on; None: without any.

        Raises EngineFailure after max_retries further attempts or request_timeout_s in total.
        """
        params = [_sampling_params(sampling, seed) for _, seed in zip(prompts, seeds, strict=True)]
        if not self._config.router:
            return await self._call(prompts, params, sampling, routes_from)
        # The router refuses a list of sampling_params (status 422): one call for each sample.
        calls = [
            asyncio.ensure_future(self._call([prompt], each, sampling, routes_from))
            for prompt, each in zip(prompts, params, strict=True)
        ]
        try:
            return [generation for (generation,) in await asyncio.gather(*calls)]
        finally:
            for call in calls:
                call.cancel()

    async def _call(
        self,
        prompts: list[list[int]],
        params: list[dict] | dict,
        sampling: SamplingConfig,
        routes_from: int | None,
    ) -> list[Generation]:
        body = {"input_ids": prompts, "sampling_params": params, "return_logprob": True}
        if routes_from is not None:
            body |= {"return_routed_experts": True, "routed_experts_start_len": routes_from}

        def read(url: str, data: bytes) -> list[Generation]:
            replies = decode_replies(data)
            if len(replies) != len(prompts):
                raise ValueError(f"{len(replies)} replies to {len(prompts)} prompts")
            for reply in replies:
                check_not_aborted(url, reply.meta_info.finish_reason)
            found = [read_generation(reply, sampling.max_new_tokens) for reply in replies]
            if routes_from is not None:
                for prompt, reply, generation in zip(prompts, replies, found, strict=True):
                    computed = len(prompt) + len(generation.token_ids) - 1
                    generation.routes = read_routes(
                        reply.meta_info.routed_experts, computed - routes_from
                    )
            return found

        new = sampling.max_new_tokens
        max_bytes = len(prompts) * (SEQUENCE_BYTES + new * TOKEN_BYTES)
        if routes_from is not None:
            computed = sum(len(prompt) + new - routes_from for prompt in prompts)
            max_bytes += computed * ROUTE_BYTES
        return await self.request(body, read, max_bytes)

    async def request(
        self, body: dict, read: Callable[[str, bytes], list[T]], max_bytes: int
    ) -> list[T]:
        """What /generate answers to a list of input_ids, tried until its bounds are used up.

        Args:
            max_bytes: of a reply; one that is larger is refused and read no further.
            read: (url, reply) -> one for each; ValueError or DecodeError: the reply is refused.
        """
        reasons: list[str] = []
        tried: set[str] = set()
        failed = 0
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                while failed <= self._config.max_retries:
                    if reasons:
                        backoff = _BACKOFF_S * 2 ** (min(len(reasons), 9) - 1)
                        await asyncio.sleep(min(_MAX_BACKOFF_S, backoff))
                    try:
                        return await self._attempt(body, read, max_bytes, tried)
                    except _Retry as error:
                        reasons.append(str(error))
                        # One that is lost comes back, or its launcher ends the run.
                        comes_back = isinstance(error, _Lost) and self._find_urls is not None
                        failed += not comes_back
        except TimeoutError:
            limit = self._config.request_timeout_s
            reasons.append(f"no answer within rollout.engine.request_timeout_s={limit:g}")
        raise EngineFailure(f"{self._what} failed after {len(reasons)} attempts: {reasons[-1]}")

    async def _attempt(
        self,
        body: dict,
        read: Callable[[str, bytes], list[T]],
        max_bytes: int,
        tried: set[str],
    ) -> list[T]:
        self._look_for_lost(bool(tried))
        if not self._in_flight:
            raise _Lost("no engine has an address")
        # A dead engine is idle, so it would always seem the least loaded.
        url = min(self._in_flight, key=lambda each: (each in tried, self._in_flight[each]))
        tried.add(url)
        num_sequences = len(body["input_ids"])
        self._in_flight[url] += num_sequences
        try:
            data = await self._post(url, body, max_bytes)
            return read(url, data)
        except (msgspec.DecodeError, ValueError) as error:
            raise EngineFailure(f"{url}: the engine's reply is refused: {error}") from error
        finally:
            if url in self._in_flight:
                self._in_flight[url] -= num_sequences

    def _look_for_lost(self, is_retry: bool) -> None:
        """Take in engines that were started again, drop those that are gone."""
        due = self._looked + _LOOK_S < time.monotonic()
        complete = len(self._in_flight) == self._wanted
        if self._find_urls is None or not due or (complete and not is_retry):
            return
        self._looked = time.monotonic()
        now = [url.rstrip("/") for url in self._find_urls()]
        self._in_flight = {url: self._in_flight.get(url, 0) for url in now}

    async def _post(self, url: str, body: dict, max_bytes: int) -> bytes:
        assert self._session is not None, "use `async with EngineClient(...)`"
        try:
            async with self._session.post(f"{url}/generate", json=body) as reply:
                data = await read_bounded(reply, max_bytes)
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _Lost(f"{url}: {type(error).__name__}: {error}") from error
        if reply.status >= 500:
            # 502, 503: of a router whose engines are lost.
            kind = _Lost if self._config.router and reply.status in (502, 503) else _Retry
            raise kind(f"{url}: status {reply.status}: {_one_line(data)}")
        if reply.status in (400, 413, 422):
            raise EngineRefusal(f"{url}: status {reply.status}: {_one_line(data)}")
        if reply.status != 200:
            raise EngineFailure(f"{url}: status {reply.status}: {_one_line(data)}")
        return data


def _sampling_params(sampling: SamplingConfig, seed: int) -> dict:
    params: dict = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "sampling_seed": seed,
    }
    if sampling.stop:
        params["stop"] = sampling.stop
    if sampling.stop_token_ids:
        params["stop_token_ids"] = sampling.stop_token_ids
    return params


def check_not_aborted(url: str, finish: Finish) -> None:
    """EngineRefusal where another attempt would be refused too; else it is tried again."""
    if finish.type != "abort":
        return
    if finish.status_code is not None and 400 <= finish.status_code < 500:
        raise EngineRefusal(f"{url}: the engine refuses the request: {finish.message}")
    raise _Retry(f"{url}: the engine aborted the request: {finish.message}")


def _one_line(data: bytes) -> str:
    return " ".join(data[:500].decode(errors="replace").split())
