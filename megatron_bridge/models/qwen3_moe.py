"""Qwen3-MoE: Qwen3 whose layers, all or some, have routed experts in place of the feed-forward."""

from collections.abc import Mapping
from typing import Any

from megatron_bridge.models.architecture import Architecture, ModelShape
from megatron_bridge.models.config_fields import ConfigFields
from megatron_bridge.models.experts import (
    engine_expert_rows,
    expert_names,
    expert_rows,
    expert_tensors,
    read_experts,
)
from megatron_bridge.models.llama import LAYER, read_dense_config
from megatron_bridge.models.qwen3 import QWEN3, refuse_sliding_windows

ROUTER = f"{LAYER}mlp.gate.weight"
EXPERT = expert_names("mlp", "gate_proj", "up_proj", "down_proj")


def read_config(
    config: Mapping[str, Any],
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """A Qwen3-MoE config.json."""
    fields = ConfigFields(config, "Qwen3MoeForCausalLM")
    refuse_sliding_windows(fields)
    shape, transformer, gpt = read_dense_config(
        fields, head_dim=None, kv_heads=None, qk_layernorm=True
    )
    shape, experts = read_experts(
        fields,
        config,
        shape,
        ffn_size=fields.integer("moe_intermediate_size"),
        moe_layers=read_moe_layers(fields, shape.num_layers),
        normalized=fields.flag("norm_topk_prob", False),
    )
    fields.finish()
    return shape, transformer | experts, gpt


def read_moe_layers(fields: ConfigFields, num_layers: int) -> frozenset[int]:
    """Layers with experts: every decoder_sparse_step-th, those of mlp_only_layers left out."""
    step, dense = fields.integer("decoder_sparse_step", 1), fields.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        fields.complain(f"mlp_only_layers is {dense!r}; it must be a list of layer numbers")
        dense = []
    layers = frozenset(n for n in range(num_layers) if (n + 1) % step == 0 and n not in dense)
    if not layers:
        fields.complain("no layer has experts (mlp_only_layers, decoder_sparse_step)")
    return layers


def engine_limit(shape: ModelShape) -> str:
    """SGLang 0.5.23's model has experts in every layer and an output layer of its own."""
    if len(shape.moe_layers) < shape.num_layers:
        return "it gives every layer experts (mlp_only_layers, decoder_sparse_step)"
    return "it does not tie embeddings (tie_word_embeddings)" if shape.tied else ""


QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    read_config=read_config,
    engine_limit=engine_limit,
    tensors=(*QWEN3.tensors, *expert_tensors(ROUTER, EXPERT)),
    rows=(*QWEN3.rows, *expert_rows(ROUTER, EXPERT)),
    engine_rows=(*QWEN3.engine_rows, *engine_expert_rows("mlp", ROUTER, EXPERT)),
)
