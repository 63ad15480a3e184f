"""sglang-router before the engines of a run, as a process of ours.

`drivetrain-router --run-dir RUN` waits for every engine's address, starts the router before them,
writes its own address to the run directory, its log to logs/router.log, and ends on SIGTERM or
SIGINT. It carries generation only: pauses, weights and checksums go to each engine itself (the
router knows none of those paths).
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from rollout.config import EngineConfig, load_rollout_run
from rollout.process import follow_launcher
from rollout.run_dir import RunDir
from rollout.server.launch_router import API_KEY
from rollout.server.server_process import (
    ServerError,
    ServerProcess,
    end_on_signals,
    free_port,
)

_LAUNCH = "rollout.server.launch_router"
_WATCH_S = 0.5
_READY_S = 3.0
_CALL_TIMEOUT_S = 30.0
HEALTH_INTERVAL_S = 2
HEALTH_FAILURES = 2
"""An engine that is lost gets no further requests after interval * failures."""


class RouterProcess(ServerProcess):
    """A running router. Use as a context manager, or call stop()."""

    ready_path = "/readiness"

    def __init__(
        self, *, config: EngineConfig, engine_urls: list[str], api_key: str, log_path: Path
    ) -> None:
        super().__init__(
            name="router",
            host=config.host,
            start_timeout_s=config.start_timeout_s,
            log_path=log_path,
        )
        self.config = config
        self.engine_urls = engine_urls
        self.api_key = api_key

    def command(self, port: int) -> list[str]:
        """Our launch module with the router's arguments."""
        return [sys.executable, "-m", _LAUNCH, json.dumps(self.arguments(port))]

    def environment(self) -> dict[str, str]:
        """The key as well: a command line can be read by every user of the machine."""
        return super().environment() | {API_KEY: self.api_key}

    def is_ready(self, body: bytes) -> bool:
        """The router answers before it has met the engines: wait until it has met all of them."""
        return json.loads(body)["healthy_workers"] == len(self.engine_urls)

    def arguments(self, port: int) -> dict[str, Any]:
        """Every argument of this router by its RouterArgs field name."""
        return {
            "worker_urls": self.engine_urls,
            "host": self.config.host,
            "port": port,
            "policy": self.config.router_policy,
            "request_timeout_secs": math.ceil(self.config.request_timeout_s),
            "retry_max_retries": max(1, self.config.max_retries),
            # Not /ready nor /health: an engine that is paused for new weights fails both, would
            # count as lost, and the calls right after the push would find no engine.
            "health_check_endpoint": "/model_info",
            "health_check_interval_secs": HEALTH_INTERVAL_S,
            "health_failure_threshold": HEALTH_FAILURES,
            "health_success_threshold": 1,
            # It cannot be turned off, and its default is one fixed port.
            "prometheus_host": "127.0.0.1",
            "prometheus_port": free_port("127.0.0.1"),
            "log_level": "warn",
        }

    def replace(self, old: str, new: str) -> None:
        """An engine that was started again takes the place of the one that was lost.

        Raises:
            httpx.HTTPError: the router does not do so.
        """
        headers = {"Authorization": f"Bearer {self.api_key}"}
        with httpx.Client(
            base_url=self.url, headers=headers, timeout=_CALL_TIMEOUT_S, trust_env=False
        ) as router:
            workers = router.get("/workers").raise_for_status().json()["workers"]
            known = {worker["url"].rstrip("/"): worker["id"] for worker in workers}
            if new.rstrip("/") not in known:  # an earlier try may have got that far
                body = {"url": new, "api_key": self.api_key}
                router.post("/workers", json=body).raise_for_status()
            if old.rstrip("/") in known:
                router.delete(f"/workers/{known[old.rstrip('/')]}").raise_for_status()
        self.engine_urls = [new if url == old else url for url in self.engine_urls]


def serve(run_dir: RunDir) -> None:
    """Run the router of a run until it ends by itself: ServerError."""
    engine = load_rollout_run(run_dir.config).rollout.engine
    ours = [] if engine.urls else [f"engine_{k}" for k in range(engine.num_engines)]
    urls = engine.urls or [run_dir.wait_address(name, engine.start_timeout_s) for name in ours]
    router = RouterProcess(
        config=engine,
        engine_urls=urls,
        api_key=engine.api_key or run_dir.token(),
        log_path=run_dir.log("router"),
    )
    with router:
        run_dir.write_address("router", router.url)
        print(f"router: {', '.join(urls)} behind {router.url}", flush=True)
        try:
            status = _watch(router, run_dir, ours)
        finally:
            run_dir.remove_address("router")
        raise ServerError(f"router ended with status {status}; {router.tail()}")


def _watch(router: RouterProcess, run_dir: RunDir, ours: list[str]) -> int:
    """The router's status when it has ended; until then it follows engines that move."""
    assert router.process is not None
    while (status := router.process.poll()) is None:
        for k, name in enumerate(ours):
            url = run_dir.read_address(name)
            if url is None or url == router.engine_urls[k] or not _is_let_go(url):
                continue
            try:
                router.replace(router.engine_urls[k], url)
                print(f"router: {name} is at {url} now", flush=True)
            except httpx.HTTPError as error:
                print(f"router: {name} at {url} is not taken in yet: {error}", flush=True)
        time.sleep(_WATCH_S)
    return status


def _is_let_go(url: str) -> bool:
    """Whether an engine serves; the router would give up meeting one that is held for weights."""
    try:
        return httpx.get(f"{url}/ready", timeout=_READY_S, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def main() -> None:
    """`drivetrain-router`: exit 0 when told to end, 1 when the router failed, 2 when refused."""
    parser = argparse.ArgumentParser(prog="drivetrain-router", description=__doc__)
    parser.add_argument("--run-dir", required=True)
    arguments = parser.parse_args()
    follow_launcher()
    end_on_signals()
    run_dir = RunDir(arguments.run_dir)
    try:
        with run_dir.hold("router"):
            serve(run_dir)
    except (ServerError, TimeoutError) as error:
        sys.exit(f"drivetrain-router: {error}")
    except ValueError as error:
        print(f"drivetrain-router: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
