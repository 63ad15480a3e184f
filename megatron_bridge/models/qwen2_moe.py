"""Qwen2-MoE: Qwen2 with routed experts, and a shared expert behind a gate of its own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_bridge.models import qwen2
from megatron_bridge.models.architecture import (
    Architecture,
    HfTensor,
    ModelShape,
    Row,
    Section,
    engine_down,
    engine_gated,
    gated,
    replicate,
    row,
)
from megatron_bridge.models.config_fields import ConfigFields
from megatron_bridge.models.experts import (
    engine_expert_rows,
    expert_rows,
    expert_tensors,
    read_experts,
)
from megatron_bridge.models.llama import LAYER
from megatron_bridge.models.qwen2 import QWEN2, read_biased_config
from megatron_bridge.models.qwen3_moe import EXPERT, ROUTER, read_moe_layers

SHARED = f"{LAYER}mlp.shared_expert."
SHARED_GATE_UP = (f"{SHARED}gate_proj.weight", f"{SHARED}up_proj.weight")
SHARED_DOWN = f"{SHARED}down_proj.weight"
SHARED_GATE = f"{LAYER}mlp.shared_expert_gate.weight"


def read_config(
    config: Mapping[str, Any],
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """A Qwen2-MoE config.json."""
    fields = ConfigFields(config, "Qwen2MoeForCausalLM")
    fields.must_be("qkv_bias", True)
    shape, transformer, gpt = read_biased_config(fields)
    shape, experts = read_experts(
        fields,
        config,
        shape,
        ffn_size=fields.integer("moe_intermediate_size"),
        moe_layers=read_moe_layers(fields, shape.num_layers),
        normalized=fields.flag("norm_topk_prob", False),
    )
    shape = replace(shape, shared_ffn_size=fields.integer("shared_expert_intermediate_size"))
    fields.finish()
    shared = {
        "moe_shared_expert_intermediate_size": shape.shared_ffn_size,
        "moe_shared_expert_gate": True,
    }
    return shape, transformer | experts | shared, gpt


def engine_limit(shape: ModelShape) -> str:
    """SGLang 0.5.23's model has heads of the usual size and an output layer of its own."""
    tied = "it does not tie embeddings (tie_word_embeddings)" if shape.tied else ""
    return qwen2.engine_limit(shape) or tied


QWEN2_MOE = Architecture(
    name="Qwen2MoeForCausalLM",
    read_config=read_config,
    engine_limit=engine_limit,
    tensors=(
        *QWEN2.tensors,
        *expert_tensors(ROUTER, EXPERT),
        HfTensor(Section.MOE, SHARED_GATE_UP[0], lambda s: (s.shared_ffn_size, s.hidden_size)),
        HfTensor(Section.MOE, SHARED_GATE_UP[1], lambda s: (s.shared_ffn_size, s.hidden_size)),
        HfTensor(Section.MOE, SHARED_DOWN, lambda s: (s.hidden_size, s.shared_ffn_size)),
        HfTensor(Section.MOE, SHARED_GATE, lambda s: (1, s.hidden_size)),
    ),
    rows=(
        *QWEN2.rows,
        *expert_rows(ROUTER, EXPERT),
        Row(Section.MOE, "mlp.shared_experts.linear_fc1.weight", gated, SHARED_GATE_UP),
        Row(Section.MOE, "mlp.shared_experts.linear_fc2.weight", row, (SHARED_DOWN,)),
        Row(Section.MOE, "mlp.shared_experts.gate_weight", replicate, (SHARED_GATE,)),
    ),
    engine_rows=(
        *QWEN2.engine_rows,
        *engine_expert_rows("mlp", ROUTER, EXPERT),
        Row(Section.MOE, f"{SHARED}gate_up_proj.weight", engine_gated, SHARED_GATE_UP),
        Row(Section.MOE, SHARED_DOWN, engine_down, (SHARED_DOWN,)),
        Row(Section.MOE, SHARED_GATE, replicate, (SHARED_GATE,)),
    ),
)
