"""Tools of MCP servers: real ones, as processes of their own, and what may go wrong with them."""

import asyncio
import contextlib
import gzip
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rollout import tool_servers
from rollout.config import DataConfig
from rollout.data import PromptStream
from rollout.environments.base import Environment
from rollout.tool_servers import ServerSpec, ToolServer, ToolServerError, tool_server
from tests.rollout.mcp_server import server

HERE = Path(__file__).parent
COMMAND = [sys.executable, str(HERE / "mcp_server.py")]
VARIABLES = {"PYTHONPATH": str(HERE.parents[1])}
UNKNOWN = {"code": -32601, "message": "no such method"}
ODD = str(HERE / "odd_mcp_server.py")


def call(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


def calculate(expression: Any) -> str:
    return call(json.dumps({"name": "calculate", "arguments": {"expression": expression}}))


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def gone(*pids: int) -> bool:
    """Now, or in a moment: one that was killed takes one to end."""
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def stream(path: Path, **args: Any) -> PromptStream:
    (path / "q.jsonl").write_text('{"question": "12*34+56?", "answer": 464}\n')
    (path / "e.jsonl").write_text('{"question": "1*1?", "answer": 1}\n')
    files = {"path": str(path / "q.jsonl"), "eval_path": str(path / "e.jsonl"), "system": "Count."}
    server = {"command": COMMAND, "variables": VARIABLES}
    wanted = {"task": "jsonl", "args": files, **(server if "url" not in args else {}), **args}
    return PromptStream(DataConfig(task="mcp", args=wanted), 0, "train")


def test_a_task_is_played_with_the_tools_of_a_server(tmp_path):
    """From the schemas to the server's death and its successor, and nothing is left of either."""

    async def play() -> list[int]:
        prompts = stream(tmp_path, max_calls=9)
        one, other = prompts.environments(0, 2)
        system, question = await one.initial_messages()
        assert system["content"].startswith("Count.\n\nYou may call these functions")
        assert '"description": "The value of an expression."' in system["content"]
        assert '"properties": {"expression": {' in system["content"]
        assert question == {"role": "user", "content": "12*34+56?"}
        step = await one.step(calculate("12*34+56") + calculate("7+") + calculate(7))
        assert not step.done
        assert [each["role"] for each in step.messages] == ["tool"] * 3
        right, wrong, refused = (each["content"] for each in step.messages)
        assert right == "464"
        assert wrong.startswith("error: ")
        assert "no expression" in wrong
        assert refused.startswith("error: ")
        for text, said in (
            ("[1]", "error: a name of calculate, hang, processes, die, count is wanted"),
            ('{"name": "calculate", "arguments": [1]}', "error: arguments are [1]; an object"),
            ("calculate(1)", "error: no JSON"),
        ):
            (message,) = (await one.step(call(text))).messages
            assert message["content"].startswith(said)
        assert (await one.step("464")).reward == 1.0
        (message,) = (await one.step(call('{"name": "processes"}'))).messages
        pids = [int(pid) for pid in message["content"].split()]
        # A call without an answer costs itself alone: the server and its other calls go on.
        hanging = asyncio.create_task(asyncio.wait_for(one.step(call('{"name": "hang"}')), 0.5))
        assert (await other.step(calculate("1+1"))).messages[0]["content"] == "2"
        with pytest.raises(TimeoutError):  # as data.timeout_s ends a step
            await hanging
        assert (await other.step(calculate("1+2"))).messages[0]["content"] == "3"
        assert all(map(alive, pids))
        with pytest.raises(ToolServerError, match=r"mcp_server\.py: die: Connection closed"):
            await one.step(call('{"name": "die"}'))
        (message,) = (await other.step(call('{"name": "processes"}'))).messages
        assert gone(pids[0])
        return [pids[0], *(int(pid) for pid in message["content"].split())]

    dead, server, child = asyncio.run(play())
    assert gone(dead, server, child)


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL of an ASGI application."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        http = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        http.install_signal_handlers = lambda: None  # pyright: ignore
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
        http.should_exit = True
        thread.join(20)


def test_a_server_that_is_somewhere_is_asked_over_http_with_its_key():
    app = server.streamable_http_app()
    keys = set()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        keys.update(v for k, v in scope.get("headers", []) if k == b"authorization")
        await app(scope, receive, send)

    async def ask(url: str) -> None:
        there = tool_server(ServerSpec(url=url, api_key="sesame"))
        assert "calculate" in await there.schemas()
        assert await there.call("calculate", {"expression": "6*7"}) == "42"
        nobody = tool_server(ServerSpec(url="http://127.0.0.1:9/mcp", start_timeout_s=10.0))
        with pytest.raises(ToolServerError, match=r"^http://127\.0\.0\.1:9/mcp: .*onnect"):
            await nobody.schemas()

    with served(guarded) as url:
        asyncio.run(ask(url))
    assert keys == {b"Bearer sesame"}


def test_episodes_may_have_servers_of_their_own_which_end_with_them(tmp_path):
    async def play() -> list[int]:
        async def ask(environment: Environment, tool: str) -> str:
            (message,) = (await environment.step(call(json.dumps({"name": tool})))).messages
            return message["content"]

        prompts = stream(tmp_path, max_calls=9, session="episode")
        one, other, idle = prompts.environments(0, 3)
        for each in (one, other, idle):  # for the schemas the shared one is asked
            await each.initial_messages()
        (shared,) = psutil.Process().children()
        assert [await ask(one, "count") for _ in range(3)] == ["1", "2", "3"]
        assert await ask(other, "count") == "1"
        assert len(psutil.Process().children()) == 3
        pids = [int(pid) for each in (one, other) for pid in (await ask(each, "processes")).split()]
        for each in (one, one, idle):
            each.close()
        assert await ask(other, "count") == "2"
        assert await asyncio.to_thread(gone, *pids[:2])
        with pytest.raises(ToolServerError, match="the session of this episode is over"):
            await ask(one, "count")
        with pytest.raises(ToolServerError, match="Connection closed"):
            await ask(other, "die")
        with pytest.raises(ToolServerError, match="the session of this episode is over"):
            await ask(other, "count")  # what it had counted is lost: nobody goes on with another
        assert alive(shared.pid)
        return pids

    assert gone(*asyncio.run(play()))


def test_sessions_at_a_server_that_is_somewhere_are_begun_and_ended():
    app, begun, ended = server.streamable_http_app(), set(), set()
    all_ended = threading.Event()

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        ids = {v for k, v in scope.get("headers", []) if k == b"mcp-session-id"}
        begun.update(ids)
        if scope.get("method") == "DELETE":
            ended.update(ids)
            if len(ended) == 2:
                all_ended.set()
        await app(scope, receive, send)

    async def ask(url: str) -> None:
        sessions = [ToolServer(ServerSpec(url=url, own_session=True)) for _ in range(2)]
        for each in sessions * 2:
            assert await each.call("calculate", {"expression": "6*7"}) == "42"
        assert (len(begun), len(ended)) == (2, 0)
        for each in sessions:
            each.end()
        await asyncio.to_thread(all_ended.wait, 10)

    with served(watched) as url:
        asyncio.run(ask(url))
    assert begun == ended


async def forgetful(request: Request) -> Response:
    """An MCP server that forgets its sessions after the first call, as one that starts again."""
    if request.method != "POST":
        return Response(status_code=405)
    asked = await request.json()
    known, given = request.app.state, request.headers.get("mcp-session-id")
    headers = {}
    if asked["method"] == "server/discover":
        answer: dict[str, Any] = {"error": UNKNOWN}
    elif asked["method"] == "initialize":
        known.session = str(next(known.numbers))
        headers = {"mcp-session-id": known.session}
        result = {"protocolVersion": "2025-06-18", "capabilities": {}}
        answer = {"result": {**result, "serverInfo": {"name": "forgets", "version": "1"}}}
    elif given != known.session:
        return Response("gone", status_code=404)
    elif "id" not in asked:
        return Response(status_code=202)
    elif asked["method"] == "tools/list":
        answer = {"result": {"tools": [{"name": "say", "inputSchema": {"type": "object"}}]}}
    else:
        answer = {"result": {"content": [{"type": "text", "text": known.session}]}}
        known.session = ""
    reply = json.dumps({"jsonrpc": "2.0", "id": asked["id"], **answer})
    return Response(reply, media_type="application/json", headers=headers)


def test_a_session_that_the_server_forgot_is_begun_again():
    """It costs one sample, and no policy is told that it was its fault."""

    async def ask(url: str) -> None:
        shared = tool_server(ServerSpec(url=url))
        for number in ("1", "2"):
            assert await shared.call("say", {}) == number
            with pytest.raises(ToolServerError, match="say: Session terminated"):
                await shared.call("say", {})

    routes = [Route("/mcp", forgetful, methods=["GET", "POST", "DELETE"])]
    app = Starlette(routes=routes)
    app.state.session, app.state.numbers = "", itertools.count(1)
    with served(app) as url:
        asyncio.run(ask(url))


async def flooding(request: Request) -> Response:
    """An MCP server whose right answers are as large as its tool is asked to make them."""
    if request.method != "POST":
        return Response(status_code=405)
    asked = await request.json()
    if "id" not in asked:
        return Response(status_code=202)
    result: dict[str, Any] = {"content": [{"type": "text", "text": "right"}]}
    if asked["method"] == "initialize":
        result = {"protocolVersion": "2025-06-18", "capabilities": {}}
        result["serverInfo"] = {"name": "flood", "version": "1"}
    if asked["method"] == "tools/list":
        result = {"tools": [{"name": "flood", "inputSchema": {"type": "object"}}]}
    given = asked.get("params", {}).get("arguments") or {}
    reply = json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result})
    if asked["method"] == "server/discover":
        reply = json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": UNKNOWN})
    padded = (reply + " " * given.get("spaces", 0)).encode()
    if given.get("zipped"):
        zipped, headers = gzip.compress(padded), {"content-encoding": "gzip"}
        return Response(zipped, headers=headers, media_type="application/json")
    if count := given.get("events"):
        told = {"level": "info", "data": "a" * 900_000}
        notice = {"jsonrpc": "2.0", "method": "notifications/message", "params": told}
        events = [f"event: message\ndata: {text}\n\n" for text in (json.dumps(notice), reply)]
        return Response(events[0] * count + events[1], media_type="text/event-stream")
    return Response(padded, media_type="application/json")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"spaces": 5 << 20}, "an answer of more than 4194304 bytes"),
        ({"zipped": True, "spaces": 5 << 20}, "content-encoding gzip, which was not asked for"),
        ({"events": 6}, "SSE stream ended without a response"),
    ],
)
def test_what_a_server_somewhere_says_is_read_up_to_a_bound(arguments, said):
    async def ask(url: str) -> None:
        server = tool_server(ServerSpec(url=url))
        for right in ({}, {"spaces": 1 << 20}, {"events": 2}):
            assert await server.call("flood", right) == "right"
        with pytest.raises(ToolServerError, match=said):
            await server.call("flood", arguments)
        assert await server.call("flood", {}) == "right"

    with served(
        Starlette(routes=[Route("/mcp", flooding, methods=["GET", "POST", "DELETE"])])
    ) as url:
        asyncio.run(ask(url))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("malformed", "tool odd: no JSON schema: 'whole' is not valid"),
        ("no schema", "ValidationError: .*inputSchema.type Input should be 'object'"),
        ("twice", "tool odd: is listed twice"),
        ("no list", "ValidationError: .* validation error"),
        ("large", "its tools take 7.* bytes to describe; 65536 fit"),
        ("endless", "tool odd: is listed twice"),
        ("rubbish", "does not list its tools within 2 s"),
        ("silent", "does not list its tools within 2 s"),
        ("ends", "Connection closed"),
    ],
)
def test_servers_of_no_use_are_told_by_name(how, said):
    command = (sys.executable, ODD, how) if how != "ends" else ("true",)

    async def ask() -> None:
        bound = 2.0 if "within 2 s" in said else 20.0
        server = tool_server(ServerSpec(command=command, start_timeout_s=bound))
        with pytest.raises(ToolServerError, match=f"^{' '.join(command)}: .*{said}"):
            await server.schemas()

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    asyncio.run(ask())
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before


def test_a_server_that_answers_nothing_any_more_is_replaced(monkeypatch):
    monkeypatch.setattr(tool_servers, "_PROBE_S", 0.3)

    async def ask() -> None:
        server = tool_server(ServerSpec(command=(sys.executable, ODD, "mute"), call_timeout_s=0.5))
        assert list(await server.schemas()) == ["odd"]
        (first,) = psutil.Process().children()
        given_up = asyncio.create_task(server.call("odd", {}))
        with pytest.raises(ToolServerError, match=r"odd: no answer within 0\.5 s"):
            await given_up
        await asyncio.to_thread(first.wait, 10)
        assert list(await server.schemas()) == ["odd"]
        assert len(psutil.Process().children()) == 1

    asyncio.run(ask())


def test_an_answer_that_is_none_by_the_protocol_fails_the_sample_alone():
    async def ask() -> None:
        server = tool_server(ServerSpec(command=(sys.executable, ODD, "no content")))
        for _ in range(2):
            with pytest.raises(ToolServerError, match=r"odd: ValidationError: .*content"):
                await server.call("odd", {"a": 1})

    asyncio.run(ask())


US = """
import asyncio, sys
from rollout.tool_servers import ServerSpec, tool_server
async def run():
    server = tool_server(ServerSpec(command=tuple(sys.argv[1:])))
    print(await server.call("odd", {}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
asyncio.run(run())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="daemons are found by means of Linux")
@pytest.mark.parametrize("killed", [True, False])
def test_a_daemon_of_a_server_ends_with_us_however_we_end(killed):
    command = [sys.executable, "-c", US, sys.executable, ODD, "leaves a daemon"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as us:
        assert us.stdout is not None
        pids = json.loads(us.stdout.readline())
        assert all(map(alive, pids))
        if killed:
            us.kill()
        us.communicate(timeout=30)
    assert us.returncode == (-9 if killed else 0)
    assert gone(*pids)


@pytest.mark.parametrize("how", ["slow pattern", "chatty"])
def test_what_a_server_says_beside_its_answers_does_no_harm(how):
    """A schema of its own whose pattern computes for ever; now and then a line of no protocol."""

    async def ask() -> None:
        server = tool_server(ServerSpec(command=(sys.executable, ODD, how)))
        for _ in range(4):
            assert await server.call("odd", {}) == "right"

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"command": []}, "set command or url"),
        ({"url": "http://127.0.0.1:9/mcp", "command": ["true"]}, "set one of them"),
        ({"command": "python"}, "must be a list"),
        ({"url": "file:///etc/passwd", "command": []}, "must begin with http:// or https://"),
        ({"command": ["no-such-program"]}, "there is no program no-such-program"),
        ({"command": ["python", "gone.py"]}, "gone.py: no such file in "),
        ({"command": ["true", 7]}, "a list of words is wanted"),
        ({"task": ""}, "names no task"),
        ({"task": "sport"}, "data.args.task=sport"),
        ({"max_calls": 0}, "max_calls=0"),
        ({"session": "group"}, "session=group: must be one of server, episode"),
        ({"call_timeout_s": 0}, "call_timeout_s=0"),
        ({"args": {}}, "data.args.args.path: names no file"),
        ({"question_key": "q"}, "data.args.question_key: data.task=mcp has no such argument"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(tmp_path, args, said):
    with pytest.raises(ValueError, match=said):
        stream(tmp_path, **args).environments(0, 1)
