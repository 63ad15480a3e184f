"""Fixtures shared by all tests: the tiny model, and one real SGLang server for the session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.config import EngineConfig
from rollout.server.engine import EngineProcess

API_KEY = "key-of-the-test-server"


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
