"""Mixtral: Llama's attention, and routed experts in every layer under names of its own."""

from collections.abc import Mapping
from typing import Any

from megatron_bridge.models import qwen2
from megatron_bridge.models.architecture import Architecture, ModelShape
from megatron_bridge.models.config_fields import ConfigFields
from megatron_bridge.models.experts import (
    engine_expert_rows,
    expert_names,
    expert_rows,
    expert_tensors,
    read_experts,
)
from megatron_bridge.models.llama import (
    LAYER,
    LLAMA_ENGINE_ROWS,
    LLAMA_ROWS,
    LLAMA_TENSORS,
    read_dense_config,
)

MODULE = "block_sparse_moe"
ROUTER = f"{LAYER}{MODULE}.gate.weight"
EXPERT = expert_names(MODULE, "w1", "w3", "w2")


def read_config(
    config: Mapping[str, Any],
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """A Mixtral config.json. Sliding windows are refused."""
    fields = ConfigFields(config, "MixtralForCausalLM")
    fields.must_be("sliding_window", None)
    fields.must_be("router_jitter_noise", 0.0)
    head_dim = max(fields.integer("hidden_size") // fields.integer("num_attention_heads"), 1)
    shape, transformer, gpt = read_dense_config(
        fields, head_dim=head_dim, kv_heads=None, qk_layernorm=False, eps=1e-5, theta=1e6
    )
    shape, experts = read_experts(
        fields,
        config,
        shape,
        ffn_size=shape.ffn_size,
        moe_layers=frozenset(range(shape.num_layers)),
        normalized=True,
    )
    fields.finish()
    return shape, transformer | experts, gpt


def engine_limit(shape: ModelShape) -> str:
    """SGLang 0.5.23's model has heads of the usual size and an output layer of its own."""
    tied = "it does not tie embeddings (tie_word_embeddings)" if shape.tied else ""
    return qwen2.engine_limit(shape) or tied


MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    read_config=read_config,
    engine_limit=engine_limit,
    tensors=(*LLAMA_TENSORS, *expert_tensors(ROUTER, EXPERT)),
    rows=(*LLAMA_ROWS, *expert_rows(ROUTER, EXPERT)),
    engine_rows=(*LLAMA_ENGINE_ROWS, *engine_expert_rows(MODULE, ROUTER, EXPERT)),
)
