"""Qwen2 and Qwen2.5 (dense): Llama plus biases of the query, key and value projections."""

from collections.abc import Mapping
from typing import Any

from megatron_bridge.models.architecture import (
    Architecture,
    HfTensor,
    ModelShape,
    Row,
    Section,
    engine_qkv,
    qkv,
)
from megatron_bridge.models.config_fields import ConfigFields
from megatron_bridge.models.llama import (
    LAYER,
    LLAMA_ENGINE_ROWS,
    LLAMA_ROWS,
    LLAMA_TENSORS,
    read_dense_config,
)
from megatron_bridge.models.qwen3 import refuse_sliding_windows

QKV_BIAS = tuple(f"{LAYER}self_attn.{x}_proj.bias" for x in "qkv")


def read_biased_config(
    fields: ConfigFields,
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """The dense family's fields; attention has biases. Sliding windows are refused."""
    refuse_sliding_windows(fields)
    head_dim = max(fields.integer("hidden_size") // fields.integer("num_attention_heads"), 1)
    shape, transformer, gpt = read_dense_config(
        fields, head_dim=head_dim, kv_heads=None, qk_layernorm=False
    )
    return shape, transformer | {"add_qkv_bias": True}, gpt


def read_config(
    config: Mapping[str, Any],
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """A Qwen2 config.json."""
    fields = ConfigFields(config, "Qwen2ForCausalLM")
    result = read_biased_config(fields)
    fields.finish()
    return result


def engine_limit(shape: ModelShape) -> str:
    """SGLang 0.5.23's model on a CPU takes heads of the usual size, whatever head_dim says."""
    if shape.head_dim * shape.num_heads != shape.hidden_size:
        return "its heads are hidden_size / num_attention_heads wide (head_dim)"
    return ""


QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    read_config=read_config,
    engine_limit=engine_limit,
    tensors=(
        *LLAMA_TENSORS,
        HfTensor(Section.LAYER, QKV_BIAS[0], lambda s: (s.num_heads * s.head_dim,)),
        HfTensor(Section.LAYER, QKV_BIAS[1], lambda s: (s.num_kv_heads * s.head_dim,)),
        HfTensor(Section.LAYER, QKV_BIAS[2], lambda s: (s.num_kv_heads * s.head_dim,)),
    ),
    rows=(
        *LLAMA_ROWS,
        Row(Section.LAYER, "self_attention.linear_qkv.bias", qkv, QKV_BIAS),
    ),
    engine_rows=(
        *LLAMA_ENGINE_ROWS,
        Row(Section.LAYER, f"{LAYER}self_attn.qkv_proj.bias", engine_qkv, QKV_BIAS),
    ),
)
