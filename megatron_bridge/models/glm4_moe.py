"""GLM-4.5 (MoE): grouped-query attention with biases, half of a head rotated, sigmoid router, MTP.

With norms of query and key (355B) or without (106B, Air): two tables, chosen by `use_qk_norm`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_bridge.models.architecture import Architecture, ModelShape
from megatron_bridge.models.config_fields import ConfigFields
from megatron_bridge.models.llama import read_dense_config
from megatron_bridge.models.mtp import MTP_ROWS, MTP_TENSORS
from megatron_bridge.models.qwen2 import QWEN2
from megatron_bridge.models.qwen3 import QK_NORM_ENGINE_ROWS, QK_NORM_ROWS, QK_NORM_TENSORS
from megatron_bridge.models.sigmoid_router import (
    ENGINE_ROWS_FLOAT32_ROUTER,
    ROWS,
    TENSORS,
    read_sigmoid_experts,
)


def read_config(
    config: Mapping[str, Any],
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """A GLM-4.5 config.json."""
    fields = ConfigFields(config, "Glm4MoeForCausalLM")
    if config.get("attention_bias") is not True:
        fields.complain("attention_bias is not true; only that is supported")
    head_dim = max(fields.integer("hidden_size") // fields.integer("num_attention_heads"), 1)
    shape, transformer, gpt = read_dense_config(
        fields,
        head_dim=head_dim,
        kv_heads=None,
        qk_layernorm=fields.flag("use_qk_norm", False),
        eps=1e-5,
        attention_bias=True,
        partial_rotary=0.5,
    )
    shape, experts = read_sigmoid_experts(fields, shape)
    fields.finish()
    return shape, transformer | experts | {"add_qkv_bias": True}, gpt


WITHOUT_QK_NORM = Architecture(
    name="Glm4MoeForCausalLM",
    read_config=read_config,
    tensors=(*QWEN2.tensors, *TENSORS, *MTP_TENSORS),
    rows=(*QWEN2.rows, *ROWS, *MTP_ROWS),
    engine_rows=(*QWEN2.engine_rows, *ENGINE_ROWS_FLOAT32_ROUTER),
)
WITH_QK_NORM = replace(
    WITHOUT_QK_NORM,
    tensors=(*WITHOUT_QK_NORM.tensors, *QK_NORM_TENSORS),
    rows=(*WITHOUT_QK_NORM.rows, *QK_NORM_ROWS),
    engine_rows=(*WITHOUT_QK_NORM.engine_rows, *QK_NORM_ENGINE_ROWS),
)
GLM4_MOE = replace(
    WITHOUT_QK_NORM,
    variant=lambda config: WITH_QK_NORM if config.get("use_qk_norm") else WITHOUT_QK_NORM,
)
