"""Routed experts: the rows and the config fields that the mixture-of-experts families share."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_bridge.models.architecture import (
    HfTensor,
    ModelShape,
    Row,
    Section,
    engine_experts_down,
    engine_experts_gated,
    expert_gated,
    expert_row,
    replicate,
)
from megatron_bridge.models.config_fields import ConfigFields
from megatron_bridge.models.llama import LAYER, POST_NORM

Names = tuple[str, str, str]
"""The gate, up and down projection of one expert."""


def expert_names(module: str, gate: str, up: str, down: str) -> Names:
    """Templates of an expert's tensors within `module` of a layer."""
    prefix = f"{LAYER}{module}.experts.{{expert}}."
    return f"{prefix}{gate}.weight", f"{prefix}{up}.weight", f"{prefix}{down}.weight"


def expert_tensors(router: str, names: Names) -> tuple[HfTensor, ...]:
    """The router and the experts of a layer."""
    return (
        HfTensor(Section.MOE, router, lambda s: (s.num_experts, s.hidden_size)),
        HfTensor(Section.EXPERT, names[0], lambda s: (s.expert_ffn_size, s.hidden_size)),
        HfTensor(Section.EXPERT, names[1], lambda s: (s.expert_ffn_size, s.hidden_size)),
        HfTensor(Section.EXPERT, names[2], lambda s: (s.hidden_size, s.expert_ffn_size)),
    )


def expert_rows(router: str, names: Names) -> tuple[Row, ...]:
    """The same in Megatron."""
    local = "mlp.experts.local_experts.{expert}."
    return (
        Row(Section.MOE, "pre_mlp_layernorm.weight", replicate, (POST_NORM,)),
        Row(Section.MOE, "mlp.router.weight", replicate, (router,)),
        Row(
            Section.EXPERT,
            f"{local}linear_fc1.weight",
            expert_gated,
            names[:2],
            te_name="mlp.experts.linear_fc1.weight{expert}",
        ),
        Row(
            Section.EXPERT,
            f"{local}linear_fc2.weight",
            expert_row,
            names[2:],
            te_name="mlp.experts.linear_fc2.weight{expert}",
        ),
    )


def engine_expert_rows(module: str, router: str, names: Names) -> tuple[Row, ...]:
    """The same in SGLang, whose experts are stacked."""
    experts = f"{LAYER}{module}.experts."
    return (
        Row(Section.MOE, router, replicate, (router,)),
        Row(Section.MOE, f"{experts}w13_weight", engine_experts_gated, names[:2]),
        Row(Section.MOE, f"{experts}w2_weight", engine_experts_down, names[2:]),
    )


def read_experts(
    fields: ConfigFields,
    config: Mapping[str, Any],
    shape: ModelShape,
    *,
    ffn_size: int,
    moe_layers: frozenset[int],
    normalized: bool,
) -> tuple[ModelShape, dict[str, Any]]:
    """Shape with experts, and their TransformerConfig arguments: a softmax router in fp32, which
    balances nothing.

    normalized: whether the chosen experts' probabilities are made to sum to one.
    """
    fields.value("output_router_logits")
    fields.value("router_aux_loss_coef")  # the balancing loss of pre-training
    # transformers 5 saves num_local_experts, earlier versions and the hub may have num_experts.
    names = [n for n in ("num_experts", "num_local_experts") if config.get(n) is not None]
    counts = {fields.integer(name) for name in names or ["num_experts"]}
    if len(counts) > 1:
        fields.complain("num_experts and num_local_experts disagree")
    experts, top_k = max(counts), fields.integer("num_experts_per_tok")
    if top_k > experts:
        fields.complain(f"num_experts_per_tok = {top_k} exceeds num_experts = {experts}")
    if top_k == 1 and normalized:
        fields.complain("num_experts_per_tok = 1 with norm_topk_prob: megatron-core has no such")
    shape = replace(shape, num_experts=experts, expert_ffn_size=ffn_size, moe_layers=moe_layers)
    return shape, {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": ffn_size,
        "moe_layer_freq": [int(layer in moe_layers) for layer in range(shape.num_layers)],
        "moe_router_topk": top_k,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }
