"""The engine client against servers that misbehave; test_engine.py has the real one."""

import asyncio
import copy
import json
from collections.abc import Callable

import pytest
from aiohttp import web

from rollout.client import EngineClient, EngineFailure, Generation
from rollout.config import EngineConfig, SamplingConfig

GOOD = {
    "text": "ab",
    "output_ids": [5, 6, 2],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 2},
        "output_token_logprobs": [[-0.5, 5, None], [-1.25, 6, None], [-0.0, 2, None]],
        "weight_version": "4",
        "weight_versions": [
            {"version": "3", "start": 0, "end": 2},
            {"version": "4", "start": 2, "end": 3},
        ],
    },
}


def ask(*handlers: Callable, num_prompts: int = 1, **config) -> list[Generation]:
    """One call of the client to fake engines, one for each handler."""

    async def main() -> list[Generation]:
        runners, urls = [], []
        for handler in handlers:
            app = web.Application()
            app.router.add_post("/generate", handler)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            urls.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")  # pyright: ignore
            runners.append(runner)
        try:
            async with EngineClient(urls, "secret", EngineConfig(**config)) as client:
                sampling = SamplingConfig(max_new_tokens=4, stop=["x"])
                seeds = list(range(num_prompts))
                return await client.generate([[1, 2]] * num_prompts, sampling, seeds)
        finally:
            for runner in runners:
                await runner.cleanup()

    return asyncio.run(main())


def reply_with(body: object, status: int = 200) -> Callable:
    async def handler(request: web.Request) -> web.Response:
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(text=text, status=status)

    return handler


def changed(**meta) -> list[dict]:
    reply = copy.deepcopy(GOOD)
    reply["meta_info"].update(meta)
    return [reply]


def test_a_good_reply_becomes_arrays():
    seen = {}

    async def handler(request: web.Request) -> web.Response:
        seen.update(await request.json(), authorization=request.headers["Authorization"])
        return web.json_response([GOOD, GOOD])

    first, second = ask(handler, num_prompts=2)
    assert first.token_ids.tolist() == second.token_ids.tolist() == [5, 6, 2]
    assert first.logprobs.tolist() == [-0.5, -1.25, 0.0]
    assert first.versions.tolist() == [3, 3, 4]
    assert (first.finish, first.end_token) == ("stop", True)
    assert seen["authorization"] == "Bearer secret"
    assert seen["input_ids"] == [[1, 2], [1, 2]]
    assert [params["sampling_seed"] for params in seen["sampling_params"]] == [0, 1]
    assert seen["sampling_params"][0]["stop"] == ["x"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("nonsense", "refused"),
        ([], "0 replies to 1 prompts"),
        ([GOOD, GOOD], "2 replies to 1 prompts"),
        ([{"output_ids": [1]}], "meta_info"),
        (GOOD, "refused"),
        (changed(output_token_logprobs=[[-0.5, 5, None]]), "log-probs are not those"),
        (changed(output_token_logprobs=[[-0.5, 5, ""], [-1, 9, ""], [-1, 2, ""]]), "not those"),
        (changed(output_token_logprobs=[[None, 5, ""], [-1, 6, ""], [-1, 2, ""]]), "float"),
        (changed(output_token_logprobs=[[0.5, 5, ""], [-1, 6, ""], [-1, 2, ""]]), "<= 0"),
        (changed(weight_versions=[{"version": "3", "start": 0, "end": 2}]), "cover 2 of 3"),
        (changed(weight_versions=[{"version": "3", "start": 1, "end": 3}]), "do not cover"),
        (changed(weight_versions=None, weight_version="default"), "'default', not a number"),
        (changed(finish_reason={"type": "banana"}), "banana"),
        (changed(finish_reason=None), "finish_reason"),
        ([GOOD | {"output_ids": []}], "0 tokens where 1 to 4"),
        ([GOOD | {"output_ids": [1] * 5}], "5 tokens where 1 to 4"),
        ([GOOD | {"output_ids": "12"}], "output_ids"),
        ([GOOD | {"output_ids": [5, 6, 2**31]}], r"<= 2147483647 - at .*output_ids"),
        ([GOOD | {"output_ids": [5, 6, 2**70]}], "output_ids"),
        ([GOOD | {"output_ids": [5, 6, -1]}], r">= 0 - at .*output_ids"),
        (
            changed(output_token_logprobs=[[-1e39, 5, ""], [-1, 6, ""], [-1, 2, ""]]),
            r"3\.40.*e\+38 - at",
        ),
        (changed(weight_versions=None, weight_version="9" * 12), "'999999999999', not a number"),
    ],
)
def test_rubbish_is_refused_at_once_with_the_reason(body, reason):
    with pytest.raises(EngineFailure, match=reason) as error:
        ask(reply_with(body), max_retries=50)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (200, "the engine's reply is refused: more than the 135168 bytes that what was asked for"),
        (500, "status 500: aaaa"),
        (400, "status 400: aaaa"),
    ],
)
def test_a_reply_without_end_is_read_up_to_a_bound(status, said):
    """Two prompts of at most 4 tokens each: 2 * (64 Ki + 4 * 512) bytes."""
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        reply = web.StreamResponse(status=status)
        await reply.prepare(request)
        while True:
            await reply.write(b"a" * (1 << 16))
            sent += 1 << 16

    with pytest.raises(EngineFailure, match=said) as error:
        ask(endless, num_prompts=2, max_retries=0, request_timeout_s=30.0)
    assert "no answer within" not in str(error.value)
    assert sent < 20 << 20, "beyond what sockets hold, somebody went on reading"


def test_a_refused_request_is_not_repeated():
    with pytest.raises(EngineFailure, match=r"status 400: too long"):
        ask(reply_with("too long", 400), max_retries=50)
    refusal = {"type": "abort", "message": "prompt too long", "status_code": 400}
    with pytest.raises(EngineFailure, match=r"refuses the request: prompt too long"):
        ask(reply_with(changed(finish_reason=refusal)), max_retries=50)


def test_passing_trouble_is_tried_again_elsewhere():
    calls = []

    async def flaky(request: web.Request) -> web.Response:
        calls.append("flaky")
        if len(calls) == 1:
            return web.Response(status=503)
        if len(calls) == 2:
            return web.json_response(changed(finish_reason={"type": "abort", "message": "paused"}))
        if len(calls) == 3:
            request.transport.close()  # pyright: ignore
        return web.json_response([GOOD])

    (generation,) = ask(flaky)
    assert generation.finish == "stop"
    assert len(calls) == 4


def test_trouble_that_stays_ends_with_the_reason():
    with pytest.raises(EngineFailure, match=r"after 3 attempts.*status 500: out of memory"):
        ask(reply_with("out of memory", 500), max_retries=2)


def test_a_silent_engine_is_given_up_in_time():
    async def silent(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    with pytest.raises(EngineFailure, match=r"request_timeout_s=0.5"):
        ask(silent, request_timeout_s=0.5)


def test_calls_spread_over_engines():
    counts = [0, 0]

    def counting(k: int) -> Callable:
        async def handler(request: web.Request) -> web.Response:
            counts[k] += 1
            await asyncio.sleep(0.2)
            return web.json_response([GOOD])

        return handler

    async def main() -> None:
        runners, urls = [], []
        for k in range(2):
            app = web.Application()
            app.router.add_post("/generate", counting(k))
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            urls.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")  # pyright: ignore
            runners.append(runner)
        async with EngineClient(urls, "", EngineConfig()) as client:
            await asyncio.gather(*(client.generate([[1]], SamplingConfig(), [0]) for _ in range(6)))
        for runner in runners:
            await runner.cleanup()

    asyncio.run(main())
    assert counts == [3, 3]


def test_a_call_waits_for_an_engine_that_is_started_again_elsewhere(tmp_path):
    """The only engine dies with the call in its hands and comes back under another address."""

    async def serve(handler: Callable) -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_post("/generate", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # pyright: ignore

    async def main() -> list[str]:
        asked: list[str] = []
        where: list[str] = []

        async def dies(request: web.Request) -> web.Response:
            asked.append("first")
            where.clear()
            request.transport.close()  # pyright: ignore
            return web.Response()

        async def lives(request: web.Request) -> web.Response:
            asked.append("second")
            return web.json_response([GOOD])

        first, url = await serve(dies)
        where.append(url)
        config = EngineConfig(max_retries=0, request_timeout_s=20)
        async with EngineClient([url], "", config, lambda: list(where)) as client:
            call = asyncio.create_task(client.generate([[1]], SamplingConfig(), [0]))
            await asyncio.sleep(1.5)
            await first.cleanup()
            second, url = await serve(lives)
            where.append(url)
            (generation,) = await call
            assert generation.token_ids.tolist() == [5, 6, 2]
            await client.generate([[1]], SamplingConfig(), [0])
        await second.cleanup()
        return asked

    assert asyncio.run(main()) == ["first", "second", "second"]


def test_an_engine_that_never_comes_back_is_given_up_in_time():
    async def main() -> None:
        config = EngineConfig(max_retries=0, request_timeout_s=2.5)
        async with EngineClient(["http://127.0.0.1:9"], "", config, list) as client:
            await client.generate([[1]], SamplingConfig(), [0])

    with pytest.raises(EngineFailure, match=r"no answer within rollout.engine.request_timeout_s"):
        asyncio.run(main())
