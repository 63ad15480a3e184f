"""How many parameters each pipeline stage has on one rank: exact, from the converter's tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from framework.config import RunConfig
from framework.lora import lora_of
from framework.lora_checks import uses_lora
from framework.model_shape import TINY_VOCAB_SIZE, read_hf_config
from megatron_bridge.adapters import adapted_linears
from megatron_bridge.mapping import rank_views
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import Spec
from megatron_bridge.models.mtp import without_mtp

ROUTER_BIAS = "router.expert_bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One rank of a pipeline stage; all ranks of a stage hold as much."""

    pp: int
    dense: int
    """Parameters sharded by tp, replicated over dp and cp."""
    expert: int
    """Parameters sharded by ep and etp."""
    adapters: int = 0
    """Parameters of low-rank adapters; where there are any, they alone are trained."""
    chunks: tuple[tuple[int, ...], ...]
    """Global numbers of the layers of each of its model chunks."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Of all its chunks."""
        return tuple(layer for chunk in self.chunks for layer in chunk)

    @property
    def parameters(self) -> int:
        """Of both kinds, without adapters."""
        return self.dense + self.expert


def model_values(config: RunConfig) -> dict[str, Any]:
    """The config.json that the run will train, also where it is not written yet (model.tiny)."""
    if config.model.hf_path:
        values = read_hf_config("model.hf_path", config.model.hf_path)
        return values if config.model.mtp else without_mtp(values)
    tiny = config.model.tiny
    experts: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": tiny.num_experts,
        "num_experts_per_tok": tiny.experts_per_token,
        "moe_intermediate_size": tiny.ffn_size,
        "norm_topk_prob": True,
    }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": TINY_VOCAB_SIZE,
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.ffn_size,
        "num_hidden_layers": tiny.num_layers,
        "num_attention_heads": tiny.num_heads,
        "num_key_value_heads": tiny.num_kv_heads,
        "head_dim": tiny.hidden_size // tiny.num_heads,
        "tie_word_embeddings": tiny.tied,
        **(experts if tiny.num_experts else {}),
    }


def read_stages(config: RunConfig, values: Mapping[str, Any]) -> list[Stage]:
    """Every pipeline stage of the layout."""
    layout, stages = config.parallel.layout, []
    for pp in range(layout.pp):
        coords = layout.coords(layout.rank(pp=pp))
        views = rank_views(values, layout, coords, Spec.TE, config.model.vocab_pad_multiple)
        sizes = {"dense": 0, "expert": 0}
        for (_, name), view in views.items():
            if not name.endswith(ROUTER_BIAS):  # a buffer: neither gradient nor optimizer state
                sizes["expert" if ".mlp.experts." in name else "dense"] += prod(view.shape)
        chunks = tuple(
            tuple(layout.chunk_layers(values["num_hidden_layers"], pp, chunk))
            for chunk in range(layout.vpp)
        )
        adapters = 0
        if uses_lora(config):
            lora, model = lora_of(config.model.lora), describe(values)
            linears = adapted_linears(model, lora, layout, coords, Spec.TE)
            adapters = sum(prod(view.shape) for x in linears.values() for view in (x.a, x.b))
        stages.append(Stage(pp=pp, chunks=chunks, adapters=adapters, **sizes))
    return stages
