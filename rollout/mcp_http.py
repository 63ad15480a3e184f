"""The HTTP client for MCP servers that are somewhere: what they say is read up to a bound alone."""

from collections.abc import AsyncIterator

import httpx2

_MAX_BODY_BYTES = 4 << 20


def http_client(api_key: str, timeout_s: float) -> httpx2.AsyncClient:
    """One that ends each answer of more than _MAX_BODY_BYTES (httpx2.StreamError where it is read).

    api_key: sent as `Authorization: Bearer`; empty: none. timeout_s: of a silence.
    """
    headers = {"Accept-Encoding": "identity"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    hooks = {"response": [_bound]}
    return httpx2.AsyncClient(headers=headers, timeout=timeout_s, event_hooks=hooks)


async def _bound(response: httpx2.Response) -> None:
    encoding = response.headers.get("content-encoding", "identity")
    events = response.headers.get("content-type", "").lower().startswith("text/event-stream")
    refusal = ""
    if encoding.lower() != "identity":  # a few bytes of it may become any number
        refusal = f"content-encoding {encoding}, which was not asked for"
    elif response.request.method == "GET" and events:
        return  # notifications for as long as we live; the SDK bounds each
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _BoundedStream(response.stream, refusal)


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, refusal: str) -> None:
        self._stream = stream
        self._refusal = refusal

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._refusal:
            raise httpx2.StreamError(self._refusal)
        num_bytes = 0
        async for part in self._stream:
            num_bytes += len(part)
            if num_bytes > _MAX_BODY_BYTES:
                raise httpx2.StreamError(f"an answer of more than {_MAX_BODY_BYTES} bytes")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
