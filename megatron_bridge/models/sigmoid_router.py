"""The router of DeepSeek-V3 and its kin: sigmoid scores, a correction bias, shared experts.

The bias chooses experts and does not weigh them; it is a buffer in Megatron and stays in float32.
Pre-training balanced it; it is not moved here (arXiv 2412.19437, sec. 2.1.2).
"""

from dataclasses import replace
from typing import Any

from megatron_bridge.models.architecture import (
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
    expert_names,
    expert_rows,
    expert_tensors,
)
from megatron_bridge.models.llama import LAYER

ROUTER = f"{LAYER}mlp.gate.weight"
ROUTER_BIAS = f"{LAYER}mlp.gate.e_score_correction_bias"
EXPERT = expert_names("mlp", "gate_proj", "up_proj", "down_proj")
SHARED = f"{LAYER}mlp.shared_experts."
SHARED_GATE_UP = (f"{SHARED}gate_proj.weight", f"{SHARED}up_proj.weight")
SHARED_DOWN = f"{SHARED}down_proj.weight"

TENSORS = (
    *expert_tensors(ROUTER, EXPERT),
    HfTensor(Section.MOE, ROUTER_BIAS, lambda s: (s.num_experts,), float32=True),
    HfTensor(Section.MOE, SHARED_GATE_UP[0], lambda s: (s.shared_ffn_size, s.hidden_size)),
    HfTensor(Section.MOE, SHARED_GATE_UP[1], lambda s: (s.shared_ffn_size, s.hidden_size)),
    HfTensor(Section.MOE, SHARED_DOWN, lambda s: (s.hidden_size, s.shared_ffn_size)),
)
ROWS = (
    *expert_rows(ROUTER, EXPERT),
    Row(Section.MOE, "mlp.router.expert_bias", replicate, (ROUTER_BIAS,)),
    Row(Section.MOE, "mlp.shared_experts.linear_fc1.weight", gated, SHARED_GATE_UP),
    Row(Section.MOE, "mlp.shared_experts.linear_fc2.weight", row, (SHARED_DOWN,)),
)

ENGINE_ROWS = (
    *engine_expert_rows("mlp", ROUTER, EXPERT),
    Row(Section.MOE, ROUTER_BIAS, replicate, (ROUTER_BIAS,), float32=True),
    Row(Section.MOE, f"{SHARED}gate_up_proj.weight", engine_gated, SHARED_GATE_UP),
    Row(Section.MOE, SHARED_DOWN, engine_down, (SHARED_DOWN,)),
)
"""Where the shared expert is a module of its own: on a CPU, and on a GPU if SGLang is started with
disable_shared_experts_fusion (else it may be one more of the routed ones)."""

ENGINE_ROWS_FLOAT32_ROUTER = tuple(
    replace(each, float32=True) if each.name == ROUTER else each for each in ENGINE_ROWS
)


def read_sigmoid_experts(
    fields: ConfigFields, shape: ModelShape
) -> tuple[ModelShape, dict[str, Any]]:
    """Shape with experts, and their TransformerConfig arguments."""
    fields.value("output_router_logits")
    for name, only in (
        ("norm_topk_prob", True),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 1),
    ):
        fields.must_be(name, only)
    for name in ("ep_size", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef"):
        fields.value(name)  # of pre-training
    experts, top_k = fields.integer("n_routed_experts"), fields.integer("num_experts_per_tok")
    groups, top_groups = fields.integer("n_group", 1), fields.integer("topk_group", 1)
    if groups > 1 and top_k != 2 * top_groups:
        fields.complain(
            f"num_experts_per_tok = {top_k} with topk_group = {top_groups}: megatron-core ranks "
            "groups by their best num_experts_per_tok / topk_group experts, transformers by two"
        )
    if top_k == 1:
        fields.complain("num_experts_per_tok = 1: megatron-core does not normalise a single one")
    width, dense = fields.integer("moe_intermediate_size"), fields.count("first_k_dense_replace")
    shape = replace(
        shape,
        num_experts=experts,
        expert_ffn_size=width,
        shared_ffn_size=width * fields.integer("n_shared_experts"),
        moe_layers=frozenset(range(dense, shape.num_layers)),
        mtp_layers=fields.count("num_nextn_predict_layers"),
    )
    if not shape.moe_layers:
        fields.complain(f"first_k_dense_replace = {dense}: no layer has experts")
    mtp = {"mtp_num_layers": shape.mtp_layers} if shape.mtp_layers else {}
    return shape, {
        **mtp,
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": shape.shared_ffn_size,
        "moe_layer_freq": [int(layer in shape.moe_layers) for layer in range(shape.num_layers)],
        "moe_router_topk": top_k,
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": top_groups if groups > 1 else None,
        "moe_router_topk_scaling_factor": fields.number("routed_scaling_factor", 1.0),
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }
