"""Reading what HTTP clients send: within a bound, and a request that is refused says why."""

import hmac
import socket

from starlette.requests import ClientDisconnect, Request


class Refused(Exception):
    """A request that gets `status` and one line."""

    def __init__(self, status: int, reason: str, *, param: str | None = None) -> None:
        """param: the field of the request that is at fault."""
        super().__init__(reason)
        self.status = status
        self.param = param


def carries(request: Request, *keys: str) -> bool:
    """Whether the request's `Authorization: Bearer` is one of the keys; compared in equal time."""
    given = request.headers.get("authorization", "").encode()
    matches = [hmac.compare_digest(given, f"Bearer {key}".encode()) for key in keys]
    return any(matches)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; Refused (400, 413) where it is too large or breaks off."""
    length = request.headers.get("content-length", "0")
    if not length.isdecimal():
        raise Refused(400, f"content-length {length!r} is not a number")
    too_large = Refused(413, f"the body exceeds rollout.max_body_bytes={max_bytes}")
    if int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise Refused(400, "the request broke off") from None
    return bytes(body)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections send what they have at once.

    asyncio sees to that only for sockets that name their protocol, which those of create_server do
    not: an answer of two writes then waits 40 ms for the acknowledgement of the first.
    """
    listener = socket.create_server((host, port), backlog=1024)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    return listener
