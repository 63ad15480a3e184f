"""Fixtures shared by all tests: the tiny model, and one real SGLang server for the session."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from rollout.config import EngineConfig
from rollout.server.engine import EngineProcess

API_KEY = "key-of-the-test-server"
SERVER_FILES = {
    "tests/e2e/test_kill.py",
    "tests/e2e/test_modes.py",
    "tests/e2e/test_resume.py",
    "tests/e2e/test_run.py",
    "tests/framework/test_push.py",
    "tests/megatron_bridge/test_checksum.py",
    "tests/rollout/test_endpoint.py",
    "tests/rollout/test_engine.py",
    "tests/rollout/test_mcp_turns.py",
    "tests/rollout/test_router.py",
    "tests/rollout/test_side_models.py",
    "tests/rollout/test_turns.py",
}
"""Those with a test that asks for `engine`, or for a run that such a test asks for as well."""


def pytest_configure() -> None:
    """Take SIGINT even where we were started in the background, which ignores it: tests send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the server comes first: together it takes the longest."""
    for item in items:
        if "engine" in getattr(item, "fixturenames", ()) and _worker_of(item.nodeid) != "server":
            raise pytest.UsageError(f"{item.nodeid} uses the shared server: add to SERVER_FILES")
    items.sort(key=lambda item: _worker_of(item.nodeid) != "server")


class _OneServer(LoadScopeScheduling):
    """With `-n 2` a file stays in one worker, and all files with the server stay together."""

    def _split_scope(self, nodeid: str) -> str:
        return _worker_of(nodeid)


def _worker_of(nodeid: str) -> str:
    path = nodeid.split("::")[0]
    return "server" if path in SERVER_FILES else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Used where tests run in several workers."""
    config.option.loadscopereorder = False
    return _OneServer(config, log)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised tiny Qwen3 with its character tokenizer."""
    from framework.config import TinyModelConfig
    from framework.tiny_model import create_tiny_model

    path = tmp_path_factory.mktemp("tiny") / "model"
    create_tiny_model(TinyModelConfig(), path)
    return path


@pytest.fixture(scope="session")
def engine(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """The shared server (url, api_key). Tests may push weights: none may rely on the first ones."""
    log = tmp_path_factory.mktemp("engine") / "engine_0.log"
    process = EngineProcess(
        config=EngineConfig(device="cpu"),
        model_path=str(tiny_model_dir),
        api_key=API_KEY,
        log_path=log,
    )
    with process:
        yield process
