"""The rollout process's HTTP interface to the trainers: a token, bounded bodies, typed messages."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rollout.bodies import Refused, carries, read_body
from rollout.client import EngineFailure
from rollout.evaluate import Evaluator
from rollout.messages import (
    BatchRequest,
    Health,
    RestoreRequest,
    SamplesRequest,
    VersionRequest,
)
from rollout.producer import Producer, ProducerFailure
from rollout.wire import CONTENT_TYPE, decode, encode

T = TypeVar("T")

_LONG_POLL_S = 20.0


class Service:
    """The routes. `finished` is set by POST /finish."""

    def __init__(
        self, *, producer: Producer, evaluator: Evaluator, token: str, max_body_bytes: int
    ) -> None:
        self.finished = asyncio.Event()
        self._producer = producer
        self._evaluator = evaluator
        self._token = token
        self._max_body_bytes = max_body_bytes

    def app(self) -> Starlette:
        """The ASGI application."""
        posts = {
            "/batch": self._batch,
            "/samples": self._samples,
            "/version": self._version,
            "/evaluate": self._evaluate,
            "/state": self._state,
            "/restore": self._restore,
            "/finish": self._finish,
        }
        routes = [Route("/health", self._guarded(self._health), methods=["GET"])]
        for path, handler in posts.items():
            routes.append(Route(path, self._guarded(handler), methods=["POST"]))
        return Starlette(routes=routes)

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Check the token first; turn refusals and failures into one line of text."""

        async def endpoint(request: Request) -> Response:
            if not carries(request, self._token):
                return _line(401, "this run's token is missing or wrong (Authorization: Bearer)")
            try:
                return await handler(request)
            except Refused as error:
                return _line(error.status, str(error))
            except (
                ProducerFailure,
                EngineFailure,
                OSError,
                ValueError,
            ) as error:  # a full disk, too
                return _line(500, str(error))

        return endpoint

    async def _read(self, request: Request, wanted: type[T]) -> T:
        body = await read_body(request, self._max_body_bytes)
        try:
            return decode(body, wanted)
        except ValueError as error:
            raise Refused(400, str(error)) from None

    async def _health(self, request: Request) -> Response:
        buffer = self._producer.buffer
        return _message(
            Health(
                policy_version=buffer.version,
                accepted=buffer.num_accepted,
                running=buffer.num_running,
                ready=self._producer.failure is None,
                failure=self._producer.failure or "",
                waiting_for=buffer.blockers()[:8],
            )
        )

    async def _batch(self, request: Request) -> Response:
        wanted = await self._read(request, BatchRequest)
        delivered = await self._get_step(wanted.step, _LONG_POLL_S)
        return Response(status_code=204) if delivered is None else _message(delivered[0])

    async def _samples(self, request: Request) -> Response:
        wanted = await self._read(request, SamplesRequest)
        if wanted.step >= self._producer.buffer.next_step:
            raise Refused(409, f"step {wanted.step} has not been delivered yet")
        delivered = await self._get_step(wanted.step, _LONG_POLL_S)
        assert delivered is not None
        _, samples = delivered
        if bad := [k for k in wanted.indices if not 0 <= k < len(samples)]:
            raise Refused(400, f"step {wanted.step} has {len(samples)} samples, not {bad[:5]}")
        return _message([samples[k] for k in wanted.indices])

    async def _get_step(self, step: int, wait_s: float):
        if step < 0:
            raise Refused(400, f"step is {step}: steps count from 0")
        try:
            return await self._producer.batch(step, wait_s)
        except ValueError as error:
            raise Refused(409, str(error)) from None

    async def _version(self, request: Request) -> Response:
        wanted = await self._read(request, VersionRequest)
        if wanted.version < 0:
            raise Refused(400, f"version is {wanted.version}: versions count from 0")
        if self._producer.failure is not None:
            raise ProducerFailure(self._producer.failure)
        if wanted.version > (step := self._producer.buffer.next_step):
            raise Refused(
                409, f"version is {wanted.version}: it comes after step {step}, which is next"
            )
        try:
            self._producer.publish(wanted.version)
        except ValueError as error:
            raise Refused(409, str(error)) from None
        return Response(status_code=200)

    async def _evaluate(self, request: Request) -> Response:
        wanted = await self._read(request, VersionRequest)
        return _message(await self._evaluator.run(wanted.version))

    async def _state(self, request: Request) -> Response:
        wanted = await self._read(request, VersionRequest)
        try:
            return _message(await self._producer.state_dict(wanted.version))
        except ValueError as error:
            raise Refused(409, str(error)) from None

    async def _restore(self, request: Request) -> Response:
        wanted = await self._read(request, RestoreRequest)
        try:
            await self._producer.go_back(wanted.step, wanted.state)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        await self._evaluator.forget_after(wanted.step)
        return Response(status_code=200)

    async def _finish(self, request: Request) -> Response:
        self.finished.set()
        return Response(status_code=200)


def _message(value: object) -> Response:
    return Response(encode(value), media_type=CONTENT_TYPE)


def _line(status: int, text: str) -> Response:
    return Response(" ".join(text.split()), status_code=status, media_type="text/plain")
