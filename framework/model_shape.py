"""The few numbers of a model that layout checks and estimates need, from its config.json."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from framework.config import ModelConfig

TINY_VOCAB_SIZE = 69
TINY_MAX_POSITIONS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder's dimensions; dense unless num_experts > 0."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied: bool
    num_experts: int
    expert_ffn_size: int
    has_dense_layers: bool
    max_positions: int
    latent_attention: bool
    """Multi-head latent attention (MLA), which has other linears."""

    @property
    def layer_parameters(self) -> int:
        """Parameters of one dense layer's matrices (norm vectors left out)."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.ffn_size


def read_model_shape(model: ModelConfig) -> ModelShape:
    """The policy's shape, from hf_path's config.json or from `tiny`.

    Raises:
        ValueError: no directory, no config.json, not JSON, or a number missing from it.
    """
    if not model.hf_path:
        tiny = model.tiny
        return ModelShape(
            architecture="Qwen3MoeForCausalLM" if tiny.num_experts else "Qwen3ForCausalLM",
            num_layers=tiny.num_layers,
            hidden_size=tiny.hidden_size,
            num_heads=tiny.num_heads,
            num_kv_heads=tiny.num_kv_heads,
            head_dim=tiny.hidden_size // max(1, tiny.num_heads),
            ffn_size=tiny.ffn_size,
            vocab_size=TINY_VOCAB_SIZE,
            tied=tiny.tied,
            num_experts=tiny.num_experts,
            expert_ffn_size=tiny.ffn_size,
            has_dense_layers=not tiny.num_experts,
            max_positions=TINY_MAX_POSITIONS,
            latent_attention=False,
        )
    values = read_hf_config("model.hf_path", model.hf_path)
    return _from_hf(values, f"model.hf_path={model.hf_path}: config.json")


def read_hf_config(key: str, directory: str) -> dict[str, Any]:
    """config.json of a Hugging Face directory that `key` names; ValueError names the key."""
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise ValueError(
            f"{key}={directory}: no such directory; a Hugging Face model directory is wanted"
            + _made_by(path)
        )
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{key}={directory}: no config.json in it; not a Hugging Face model")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{key}={directory}: config.json is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{key}={directory}: config.json is not a JSON object")
    return values


def _made_by(path: Path) -> str:
    """Which experiment would leave a directory of this name, where one is called as its run is."""
    ours = resources.files("hydra_configs") / "experiment"
    names = (name for name in path.parts if (ours / f"{name}.yaml").is_file())
    return "".join(f"; drivetrain experiment={name} makes it" for name in names)


def _from_hf(values: dict[str, Any], where: str) -> ModelShape:
    def number(name: str, default: int | None = None) -> int:
        value = values.get(name, default)
        if value is None and default is not None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{where}: {name} is {value!r}; a whole number is wanted")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    if not hidden or not heads:
        raise ValueError(f"{where}: hidden_size and num_attention_heads must be positive")
    architectures = values.get("architectures") or [""]
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = max(number(name, 0) for name in names)
    return ModelShape(
        architecture=str(architectures[0]),
        num_layers=number("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        ffn_size=number("intermediate_size"),
        vocab_size=number("vocab_size"),
        tied=bool(values.get("tie_word_embeddings", False)),
        num_experts=experts,
        expert_ffn_size=number("moe_intermediate_size", number("intermediate_size")),
        has_dense_layers=not experts
        or bool(values.get("mlp_only_layers"))
        or number("decoder_sparse_step", 1) > 1
        or number("first_k_dense_replace", 0) > 0,
        max_positions=number("max_position_embeddings", 0),
        latent_attention=number("kv_lora_rank", 0) > 0,
    )
