"""Fixtures shared by all tests: the tiny model, and one real SGLang server for the session."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.config import EngineConfig
from rollout.server.engine import EngineProcess

API_KEY = "key-of-the-test-server"


def pytest_configure() -> None:
    """Take SIGINT even where we were started in the background, which ignores it: tests send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `-n 2 --dist loadgroup`: a file stays in one worker, and one worker has the server.

    Files with a test that asks for the server come first: together they take the longest.
    """
    serving = {item.path for item in items if "engine" in getattr(item, "fixturenames", ())}
    for item in items:
        group = "server" if item.path in serving else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path not in serving)


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
