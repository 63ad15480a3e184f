"""sglang-router before the shared engine: what passes through it, and how it ends."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from rollout.client import EngineClient, EngineFailure, Generation
from rollout.config import EngineConfig, SamplingConfig
from rollout.process import LAUNCHER_PID
from rollout.run_dir import RunDir
from rollout.server.engine import EngineProcess
from rollout.server.router import HEALTH_FAILURES, HEALTH_INTERVAL_S, RouterProcess
from rollout.server.server_process import free_port
from tests.conftest import API_KEY

CONFIG = EngineConfig(router=True, start_timeout_s=60.0, max_retries=1)


def bits(generation: Generation) -> tuple[bytes, bytes, bytes, str]:
    arrays = (generation.token_ids, generation.logprobs, generation.versions)
    return *(array.tobytes() for array in arrays), generation.finish  # pyright: ignore


def generate(url: str, config: EngineConfig, key: str = API_KEY) -> list[Generation]:
    """Six samples of one prompt, each with a seed of 62 bits."""

    async def main() -> list[Generation]:
        async with EngineClient([url], key, config) as client:
            sampling = SamplingConfig(temperature=0.7, max_new_tokens=12, stop_token_ids=[5])
            seeds = [2**62 - k for k in range(6)]
            return await client.generate([[1, 9, 8, 7]] * 6, sampling, seeds)

    return asyncio.run(main())


@pytest.fixture(scope="module")
def router(engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """`drivetrain-router` as a person starts it, before the engine that all tests share."""
    run_dir = RunDir(tmp_path_factory.mktemp("router"))
    run_dir.create()
    engine_section = {"urls": [engine.url], "api_key": API_KEY, "router": True}
    engine_section["router_policy"] = "round_robin"  # there is one engine only
    config = {
        **{"mode": "train", "seed": 0, "num_steps": 1, "data": {}},
        "model": {"hf_path": "", "init_from": ""},
        "rollout": {"engine": engine_section},
        "batch": {"max_tokens_per_microbatch": 8192, "overlong": "refuse"},
        "parallel": {"cp": 1},
    }
    run_dir.config.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "rollout.server.router", "--run-dir", str(run_dir.path)]
    env = os.environ | {LAUNCHER_PID: str(os.getpid())}  # it ends with the tests, however they end
    process = subprocess.Popen(command, start_new_session=True, env=env)
    try:
        run_dir.wait_address("router", timeout_s=60)
        yield run_dir
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0
        assert run_dir.read_address("router") is None
        assert not _processes_of(run_dir.path)
    finally:
        process.kill()
        process.wait()


def _processes_of(path: Path) -> list[int]:
    """Those that name the run directory, or write to a file in it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        named = str(path) in " ".join(process.info["cmdline"] or [])
        try:
            writes = os.readlink(f"/proc/{process.pid}/fd/1").startswith(str(path))
        except OSError:
            writes = False
        if named or writes:
            found.append(process.pid)
    return found


def test_a_group_has_the_same_bits_through_the_router(engine: EngineProcess, router: RunDir):
    """Seeds, stops, temperature, log-probs and versions all pass; one call a sample."""
    url = str(router.read_address("router"))
    direct = generate(engine.url, EngineConfig())
    assert len({bits(generation) for generation in direct}) > 1
    assert [bits(each) for each in generate(url, CONFIG)] == [bits(each) for each in direct]


def test_the_router_asks_for_the_key_and_knows_nothing_of_weights(router: RunDir):
    url = str(router.read_address("router"))
    with pytest.raises(EngineFailure, match="status 401"):
        generate(url, CONFIG, key="wrong")
    headers = {"Authorization": f"Bearer {API_KEY}"}
    for path in ("pause_generation", "begin_weight_update", "weights_checker"):
        reply = httpx.post(f"{url}/{path}", json={}, headers=headers, trust_env=False)
        assert reply.status_code == 404, path
    for pid in _processes_of(router.path):
        assert API_KEY not in " ".join(psutil.Process(pid).cmdline())
    assert router.log("router").stat().st_mode & 0o077 == 0


def test_the_router_drops_what_asks_for_routes(engine: EngineProcess, router: RunDir):
    """It writes every request anew from the fields that it knows, and these are none of them: why
    rollout.engine.return_routes with a router is refused (framework/routing_checks.py). A request
    that the engine itself does not take shows who has read it."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    body = {
        "input_ids": [1, 9, 8, 7],
        "sampling_params": {"max_new_tokens": 2},
        "return_routed_experts": True,
        "routed_experts_start_len": 5,  # beyond the prompt
    }
    finish = []
    for url in (engine.url, str(router.read_address("router"))):
        reply = httpx.post(f"{url}/generate", json=body, headers=headers, trust_env=False)
        told = reply.json()
        finish.append(told["meta_info"]["finish_reason"]["type"] if reply.is_success else told)
    assert "routed_experts_start_len" in str(finish[0])
    assert finish[1] in ("stop", "length")


def test_an_engine_that_was_paused_for_long_is_not_lost(engine: EngineProcess, router: RunDir):
    """A push may take longer than the router's patience with an engine that does not answer."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    client = httpx.Client(base_url=engine.url, headers=headers, trust_env=False)
    assert client.post("/pause_generation", json={"mode": "retract"}).status_code == 200
    time.sleep(HEALTH_INTERVAL_S * (HEALTH_FAILURES + 0.5))
    assert client.get("/ready").status_code == 503  # what the router must not go by
    assert client.post("/continue_generation", json={}).status_code == 200
    assert len(generate(str(router.read_address("router")), replace(CONFIG, max_retries=0))) == 6


def test_a_lost_router_ends_generation_with_its_address_soon():
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(EngineFailure, match=f"after 2 attempts: {url}: ClientConnector"):
        generate(url, CONFIG)


def test_router_arguments_are_fields_of_the_installed_version():
    from sglang_router.router_args import RouterArgs

    router = RouterProcess(
        config=CONFIG, engine_urls=["http://a:1"], api_key="", log_path=Path("x")
    )
    arguments = router.arguments(1234)
    assert arguments.keys() <= RouterArgs.__dataclass_fields__.keys()
    assert RouterArgs(**arguments).retry_max_retries == 1
    assert not router.is_ready(b'{"status": "ready", "healthy_workers": 0, "total_workers": 1}')
