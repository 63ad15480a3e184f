"""Frozen models beside the policy: reward models, judges, teachers. `rollout.side_models`.

    rollout:
      side_models:
        score: {kind: classify, model_path: runs/rm/hf}
        judge: {kind: generate, model_path: /models/Qwen3-8B, tp: 2, args: {context_length: 8192}}

Each is an SGLang server of this run (role side_<name>), started, watched and ended as the policy's
engines are, which nobody ever gives other weights; or, by its url, one that somebody else runs.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rollout.config import EngineConfig
from rollout.mixture import check_row
from rollout.run_dir import RunDir

KINDS = ("generate", "classify")
DTYPES = ("float32", "bfloat16")
_ROLE = "side_"


@dataclass(kw_only=True, frozen=True, slots=True)
class SideModel:
    """One of `rollout.side_models`."""

    kind: str = "generate"
    """generate: a causal model, asked for text or log-probs | classify: one with a score head,
    *ForSequenceClassification, asked for scores."""
    model_path: str = ""
    """Hugging Face directory that a server of this run serves."""
    url: str = ""
    """Instead of model_path: http://host:port of a server that somebody else runs."""
    api_key: str = ""
    """What requests to url carry; a server of this run wants the run's own token."""
    tp: int = 1
    """Tensor-parallel ranks."""
    dtype: str = "float32"
    """float32 | bfloat16: what it computes in."""
    max_total_tokens: int = 65536
    """KV-cache capacity in tokens."""
    max_running_requests: int = 256
    args: dict[str, Any] = field(default_factory=dict)
    """Any SGLang server argument by its own field name, checked against the installed version."""

    def engine_config(self, engine: EngineConfig) -> EngineConfig:
        """How its server is run: where and how long it may take as the policy's engines."""
        return replace(
            engine,
            **{name: getattr(self, name) for name in _OF_ENGINE},
            num_engines=1,
            return_routes=False,
            colocated=False,
            router=False,
            urls=[],
            api_key="",
        )


_OF_ENGINE = ("tp", "dtype", "max_total_tokens", "max_running_requests", "args")


def role_of(name: str) -> str:
    """The role of a side model's server; also the name of its address file, log and lock."""
    return _ROLE + name


def read_side_models(rows: Mapping[str, Any]) -> dict[str, SideModel]:
    """`rollout.side_models` as objects. Raises ValueError with the key and what would be right."""
    models = {}
    for name, row in rows.items():
        key = f"rollout.side_models.{name}"
        if not str(name).isidentifier():
            raise ValueError(f"{key}: choose another name, of letters, digits and _")
        if not isinstance(row, Mapping):
            raise ValueError(f"{key}={row!r}: must be a mapping with a `model_path`")
        models[str(name)] = _side_model(key, row)
    return models


def _side_model(key: str, row: Mapping[str, Any]) -> SideModel:
    known = {each.name: each for each in fields(SideModel)}
    for name, value in check_row(key, row, list(known)).items():
        wanted = Mapping if name == "args" else known[name].type
        if isinstance(value, bool) or not isinstance(value, wanted):  # pyright: ignore
            shown = "mapping" if name == "args" else getattr(wanted, "__name__", "value")
            raise ValueError(f"{key}.{name}={value!r}: {shown} wanted")
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{key}.{name}={value}: must be greater than 0")
    model = SideModel(**{**row, "args": dict(row.get("args", {}))})
    for name, allowed in (("kind", KINDS), ("dtype", DTYPES)):
        if (value := getattr(model, name)) not in allowed:
            raise ValueError(f"{key}.{name}={value}: must be one of {', '.join(allowed)}")
    if bool(model.model_path) == bool(model.url):
        found = "both" if model.url else "neither"
        raise ValueError(f"{key}: one of model_path and url, not {found}")
    if model.url and not model.url.startswith(("http://", "https://")):
        raise ValueError(f"{key}.url={model.url}: an address starts with http:// or https://")
    if model.api_key and not model.url:
        raise ValueError(f"{key}.api_key: only with url; ours want the run's own token")
    return model


def with_absolute_paths(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The same rows, whatever directory their readers start in."""
    return {
        name: {**row, "model_path": str(Path(row["model_path"]).expanduser().absolute())}
        if row.get("model_path")
        else row
        for name, row in rows.items()
    }


class SideModels:
    """Where the side models of a run are; servers that are started again have other addresses."""

    def __init__(self, rows: Mapping[str, Any], run_dir: RunDir) -> None:
        self.models = read_side_models(rows)
        self._run_dir = run_dir

    def find(self, name: str) -> tuple[str, str] | None:
        """(url, api key) of one; None while its server is being started."""
        model = self.models[name]
        if model.url:
            return model.url.rstrip("/"), model.api_key
        url = self._run_dir.read_address(role_of(name))
        return None if url is None else (url, self._run_dir.token())

    async def wait(self, timeout_s: float) -> None:
        """Until every server of this run has an address; TimeoutError names one that has none."""
        ours = [role_of(name) for name, model in self.models.items() if model.model_path]
        await asyncio.gather(*(self._run_dir.wait_address_async(role, timeout_s) for role in ours))
