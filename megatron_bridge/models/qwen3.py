"""Qwen3 (dense): Llama plus an RMSNorm over each query and key head."""

from collections.abc import Mapping
from typing import Any

from megatron_bridge.models.architecture import (
    Architecture,
    HfTensor,
    ModelShape,
    Row,
    Section,
    replicate,
)
from megatron_bridge.models.config_fields import ConfigFields
from megatron_bridge.models.llama import (
    LAYER,
    LLAMA_ENGINE_ROWS,
    LLAMA_ROWS,
    LLAMA_TENSORS,
    read_dense_config,
)

Q_NORM = f"{LAYER}self_attn.q_norm.weight"
K_NORM = f"{LAYER}self_attn.k_norm.weight"


def read_config(
    config: Mapping[str, Any],
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """A Qwen3 config.json. Sliding windows are refused."""
    fields = ConfigFields(config, "Qwen3ForCausalLM")
    refuse_sliding_windows(fields)
    result = read_dense_config(fields, head_dim=None, kv_heads=None, qk_layernorm=True)
    fields.finish()
    return result


def refuse_sliding_windows(fields: ConfigFields) -> None:
    """Complain about attention that does not see everything before it."""
    fields.must_be("use_sliding_window", False)
    fields.value("max_window_layers")
    fields.value("sliding_window")  # both mean nothing while use_sliding_window is false
    others = sorted(set(map(str, fields.value("layer_types") or ())) - {"full_attention"})
    if others:
        fields.complain(f"layer_types has {', '.join(others)}; only full_attention is supported")


QK_NORM_TENSORS = (
    HfTensor(Section.LAYER, Q_NORM, lambda s: (s.head_dim,)),
    HfTensor(Section.LAYER, K_NORM, lambda s: (s.head_dim,)),
)
QK_NORM_ROWS = (
    Row(Section.LAYER, "self_attention.q_layernorm.weight", replicate, (Q_NORM,)),
    Row(Section.LAYER, "self_attention.k_layernorm.weight", replicate, (K_NORM,)),
)
QK_NORM_ENGINE_ROWS = (
    Row(Section.LAYER, Q_NORM, replicate, (Q_NORM,)),
    Row(Section.LAYER, K_NORM, replicate, (K_NORM,)),
)

QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    read_config=read_config,
    tensors=(*LLAMA_TENSORS, *QK_NORM_TENSORS),
    rows=(*LLAMA_ROWS, *QK_NORM_ROWS),
    engine_rows=(*LLAMA_ENGINE_ROWS, *QK_NORM_ENGINE_ROWS),
)
