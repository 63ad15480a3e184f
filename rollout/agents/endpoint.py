"""The OpenAI-compatible endpoint that black-box agents talk to.

Each episode is a session with a base URL of its own, `http://host:port/agents/<session>/v1`, and a
key of its own (HMAC-SHA256 of the session under the run's token), so that an agent reaches its own
episode and nothing else of the run. The run's token itself opens every session.

    POST .../v1/chat/completions    OpenAI's protocol; streams too
    GET  .../v1/models              one model, `policy`
    GET  .../v1/task                {"messages": [...], "description": {...}}
    POST .../v1/reward              {"reward": 0.5}: what the episode was worth
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import math
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rollout.agents.answers import chunks, error_body, response
from rollout.agents.engine import AgentTask, PolicyEngine
from rollout.agents.protocol import parse_request
from rollout.agents.session import CONTEXT_SPENT, Session
from rollout.bodies import Refused, carries, listen, read_body
from rollout.client import EngineFailure, EngineRefusal
from rollout.config import SamplingConfig

_KEEP_ALIVE_S = 10.0


class AgentEndpoint:
    """The sessions and their HTTP interface. Use as an async context manager: it serves inside."""

    def __init__(
        self,
        *,
        token: str,
        host: str,
        port: int,
        max_body_bytes: int,
        sampling: SamplingConfig,
        override_sampling: bool,
    ) -> None:
        """sampling: the run's, which requests may name; a session may have another (evaluation)."""
        self._token = token
        self._host = host
        self._port = port
        self._max_body_bytes = max_body_bytes
        self._sampling = sampling
        self._override_sampling = override_sampling
        self._sessions: dict[str, Session] = {}
        self._url = ""

    async def __aenter__(self) -> "AgentEndpoint":
        self._listener = listen(self._host, self._port)
        host = socket.gethostname() if self._host == "0.0.0.0" else self._host  # noqa: S104
        self._url = f"http://{host}:{self._listener.getsockname()[1]}"
        config = uvicorn.Config(
            self.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # pyright: ignore  # the process's own
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        return self

    async def __aexit__(self, *exception: object) -> None:
        for session in list(self._sessions.values()):
            self.close(session)
        self._server.should_exit = True
        await self._serving
        self._listener.close()

    def open(self, engine: PolicyEngine, task: AgentTask, sampling: SamplingConfig) -> Session:
        """A session for an episode."""
        session = Session(
            f"{task.group_id}-{task.index}-{secrets.token_hex(4)}", engine, task, sampling
        )
        self._sessions[session.id] = session
        return session

    def close(self, session: Session) -> None:
        """The episode is over: its address is gone."""
        self._sessions.pop(session.id, None)
        session.close()

    def base_url(self, session: Session) -> str:
        """What an OpenAI client calls base_url."""
        return f"{self._url}/agents/{session.id}/v1"

    def key(self, session: Session) -> str:
        """What an OpenAI client calls api_key."""
        return self._key(session.id)

    def _key(self, session_id: str) -> str:
        return hmac.new(self._token.encode(), session_id.encode(), hashlib.sha256).hexdigest()

    def app(self) -> Starlette:
        """The ASGI application."""
        base = "/agents/{session}/v1"
        routes = {
            "/chat/completions": ("POST", self._chat),
            "/models": ("GET", self._models),
            "/task": ("GET", self._task),
            "/reward": ("POST", self._reward),
        }
        return Starlette(
            routes=[
                Route(base + path, self._guarded(handler), methods=[method])
                for path, (method, handler) in routes.items()
            ]
        )

    def _guarded(
        self, handler: Callable[[Request, Session], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            session_id = request.path_params["session"]
            if not carries(request, self._token, self._key(session_id)):
                return _error(401, "the key of this session is missing or wrong")
            session = self._sessions.get(session_id)
            if session is None:
                return _error(404, f"session {session_id} is over, or never was")
            try:
                return await handler(request, session)
            except (Refused, EngineFailure) as error:
                return _refusal(error)

        return endpoint

    async def _chat(self, request: Request, session: Session) -> Response:
        body = await read_body(request, self._max_body_bytes)
        wanted = parse_request(body, self._sampling, override=self._override_sampling)
        repeated = request.headers.get("x-stainless-retry-count", "0") != "0"
        answer = asyncio.create_task(session.complete(wanted, repeated=repeated))
        if not wanted.stream:
            return JSONResponse(response(await answer, session.id, wanted))
        # What is refused at once gets its status; later there is only the stream to say it in.
        await asyncio.wait({answer}, timeout=0.05)
        if answer.done() and answer.exception() is not None:
            await answer

        async def events() -> AsyncIterator[str]:
            while not answer.done():
                await asyncio.wait({answer}, timeout=_KEEP_ALIVE_S)
                if not answer.done():
                    yield ": the policy is at it\n\n"
            try:
                for event in chunks(answer.result(), session.id, wanted):
                    yield f"data: {json.dumps(event)}\n\n"
            except (Refused, EngineFailure) as error:
                yield f"data: {bytes(_refusal(error).body).decode()}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _models(self, request: Request, session: Session) -> Response:
        model = {"id": "policy", "object": "model", "created": 0, "owned_by": "drivetrain"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _task(self, request: Request, session: Session) -> Response:
        return JSONResponse(await task_message(session.task))

    async def _reward(self, request: Request, session: Session) -> Response:
        body = await read_body(request, self._max_body_bytes)
        try:
            value = json.loads(body)
            reward = value["reward"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Refused(400, '{"reward": number} is wanted', param="reward") from None
        number = isinstance(reward, int | float) and not isinstance(reward, bool)
        if not number or not math.isfinite(reward):
            raise Refused(400, f"reward is {str(reward)[:80]}; a finite number", param="reward")
        session.reported = float(reward)
        return JSONResponse({"reward": session.reported})


async def task_message(task: AgentTask) -> dict[str, Any]:
    """What an agent is told of its episode: not the answer."""
    described = task.environment.describe()
    return {
        "messages": [dict(message) for message in await task.initial_messages()],
        "description": {str(k): str(v) for k, v in described.items() if k != "answer"},
    }


def _refusal(error: Refused | EngineFailure) -> JSONResponse:
    text = " ".join(str(error).split())
    if isinstance(error, Refused):
        code = CONTEXT_SPENT if text.startswith(CONTEXT_SPENT) else None
        return _error(error.status, text, error.param, code)
    # 503 would be tried again by clients; a lost engine ends the run.
    return _error(400 if isinstance(error, EngineRefusal) else 500, text)


def _error(
    status: int, reason: str, param: str | None = None, code: str | None = None
) -> JSONResponse:
    return JSONResponse(error_body(reason, status, param, code), status_code=status)


@contextlib.contextmanager
def closing(endpoint: AgentEndpoint, session: Session):
    """The session ends with the block, however that ends."""
    try:
        yield session
    finally:
        endpoint.close(session)
