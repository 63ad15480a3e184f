"""Qwen3-MoE: Qwen3 whose layers, all or some, have routed experts in place of the feed-forward."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_bridge.models.architecture import (
    Architecture,
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
from megatron_bridge.models.llama import LAYER, POST_NORM, read_dense_config
from megatron_bridge.models.qwen3 import QWEN3, refuse_sliding_windows

ROUTER = f"{LAYER}mlp.gate.weight"
EXPERT = f"{LAYER}mlp.experts.{{expert}}."
EXPERT_GATE_UP = (f"{EXPERT}gate_proj.weight", f"{EXPERT}up_proj.weight")
EXPERT_DOWN = f"{EXPERT}down_proj.weight"


def read_config(
    config: Mapping[str, Any],
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """A Qwen3-MoE config.json. The router computes in fp32 and balances nothing."""
    fields = ConfigFields(config, "Qwen3MoeForCausalLM")
    refuse_sliding_windows(fields)
    fields.value("output_router_logits")
    fields.value("router_aux_loss_coef")  # the balancing loss of pre-training
    shape, transformer, gpt = read_dense_config(
        fields, head_dim=None, kv_heads=None, qk_layernorm=True
    )
    # transformers 5 saves num_local_experts, earlier versions and the hub have num_experts.
    names = [n for n in ("num_experts", "num_local_experts") if config.get(n) is not None]
    counts = {fields.integer(name) for name in names or ["num_experts"]}
    if len(counts) > 1:
        fields.complain("num_experts and num_local_experts disagree")
    experts, top_k = max(counts), fields.integer("num_experts_per_tok")
    normalized = fields.flag("norm_topk_prob", False)
    if top_k > experts:
        fields.complain(f"num_experts_per_tok = {top_k} exceeds num_experts = {experts}")
    if top_k == 1 and normalized:
        fields.complain("num_experts_per_tok = 1 with norm_topk_prob: megatron-core has no such")
    shape = replace(
        shape,
        num_experts=experts,
        expert_ffn_size=fields.integer("moe_intermediate_size"),
        moe_layers=_moe_layers(fields, shape.num_layers),
    )
    if not shape.moe_layers:
        fields.complain("no layer has experts (mlp_only_layers, decoder_sparse_step)")
    fields.finish()
    transformer |= {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": shape.expert_ffn_size,
        "moe_layer_freq": [int(layer in shape.moe_layers) for layer in range(shape.num_layers)],
        "moe_router_topk": top_k,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }
    return shape, transformer, gpt


def _moe_layers(fields: ConfigFields, num_layers: int) -> frozenset[int]:
    """Layers with experts: every decoder_sparse_step-th, those of mlp_only_layers left out."""
    step, dense = fields.integer("decoder_sparse_step", 1), fields.value("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        fields.complain(f"mlp_only_layers is {dense!r}; it must be a list of layer numbers")
        dense = []
    return frozenset(n for n in range(num_layers) if (n + 1) % step == 0 and n not in dense)


def engine_limit(shape: ModelShape) -> str:
    """SGLang 0.5.23's model has experts in every layer and an output layer of its own."""
    if len(shape.moe_layers) < shape.num_layers:
        return "it gives every layer experts (mlp_only_layers, decoder_sparse_step)"
    return "it does not tie embeddings (tie_word_embeddings)" if shape.tied else ""


QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    read_config=read_config,
    engine_limit=engine_limit,
    tensors=(
        *QWEN3.tensors,
        HfTensor(Section.MOE, ROUTER, lambda s: (s.num_experts, s.hidden_size)),
        HfTensor(Section.EXPERT, EXPERT_GATE_UP[0], lambda s: (s.expert_ffn_size, s.hidden_size)),
        HfTensor(Section.EXPERT, EXPERT_GATE_UP[1], lambda s: (s.expert_ffn_size, s.hidden_size)),
        HfTensor(Section.EXPERT, EXPERT_DOWN, lambda s: (s.hidden_size, s.expert_ffn_size)),
    ),
    rows=(
        *QWEN3.rows,
        Row(Section.MOE, "pre_mlp_layernorm.weight", replicate, (POST_NORM,)),
        Row(Section.MOE, "mlp.router.weight", replicate, (ROUTER,)),
        Row(
            Section.EXPERT,
            "mlp.experts.local_experts.{expert}.linear_fc1.weight",
            expert_gated,
            EXPERT_GATE_UP,
            te_name="mlp.experts.linear_fc1.weight{expert}",
        ),
        Row(
            Section.EXPERT,
            "mlp.experts.local_experts.{expert}.linear_fc2.weight",
            expert_row,
            (EXPERT_DOWN,),
            te_name="mlp.experts.linear_fc2.weight{expert}",
        ),
    ),
    engine_rows=(
        *QWEN3.engine_rows,
        Row(Section.MOE, ROUTER, replicate, (ROUTER,)),
        Row(Section.MOE, f"{LAYER}mlp.experts.w13_weight", engine_experts_gated, EXPERT_GATE_UP),
        Row(Section.MOE, f"{LAYER}mlp.experts.w2_weight", engine_experts_down, (EXPERT_DOWN,)),
    ),
)
