"""Llama: grouped-query attention without biases, SwiGLU, RMSNorm, rotary positions.

The base of the dense family; others add rows to LLAMA_LAYER_ROWS and fields to `read_dense_config`.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from megatron_bridge.models.architecture import (
    EMBEDDING,
    OUTPUT,
    Architecture,
    HfTensor,
    ModelShape,
    Row,
    Section,
    engine_down,
    engine_gated,
    engine_qkv,
    engine_vocab,
    gated,
    qkv,
    replicate,
    row,
    vocab,
)
from megatron_bridge.models.config_fields import ConfigFields, read_rope

LAYER = "model.layers.{layer}."
QKV = tuple(f"{LAYER}self_attn.{x}_proj.weight" for x in "qkv")
GATE_UP = (f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight")
INPUT_NORM = f"{LAYER}input_layernorm.weight"
POST_NORM = f"{LAYER}post_attention_layernorm.weight"
O_PROJ = f"{LAYER}self_attn.o_proj.weight"
DOWN = f"{LAYER}mlp.down_proj.weight"
FINAL_NORM = "model.norm.weight"


def read_dense_config(
    fields: ConfigFields,
    *,
    head_dim: int | None,
    kv_heads: int | None,
    qk_layernorm: bool,
    eps: float = 1e-6,
    theta: float = 10000.0,
    attention_bias: bool = False,
    partial_rotary: float = 1.0,
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """Shape, TransformerConfig and GPTModel arguments of the dense family.

    head_dim, kv_heads, eps, theta, partial_rotary: what transformers takes for an absent field
    (None: the field is needed). attention_bias: the only value that is supported.
    """
    shape = ModelShape(
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=fields.integer("hidden_size"),
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=fields.integer("num_key_value_heads", kv_heads),
        head_dim=fields.integer("head_dim", head_dim),
        ffn_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        tied=fields.flag("tie_word_embeddings", False),
    )
    if shape.num_heads % shape.num_kv_heads:
        fields.complain(
            f"num_attention_heads = {shape.num_heads} is not a multiple of "
            f"num_key_value_heads = {shape.num_kv_heads}"
        )
    if shape.head_dim % 2:
        fields.complain(f"head_dim = {shape.head_dim} is odd; rotary positions need pairs")
    fields.must_be("hidden_act", "silu")
    fields.must_be("attention_bias", attention_bias)
    fields.must_be("mlp_bias", False)
    fields.must_be("is_encoder_decoder", False)
    transformer = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn_size,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": fields.number("rms_norm_eps", eps),
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": qk_layernorm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    gpt = {
        "share_embeddings_and_output_weights": shape.tied,
        **read_rope(fields, default_theta=theta, default_partial=partial_rotary),
    }
    return shape, transformer, gpt


def read_config(
    config: Mapping[str, Any],
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """A Llama config.json."""
    fields = ConfigFields(config, "LlamaForCausalLM")
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    fields.must_be("rope_interleaved", False)
    result = read_dense_config(
        fields, head_dim=max(hidden // heads, 1), kv_heads=heads, qk_layernorm=False
    )
    fields.finish()
    return result


LLAMA_TENSORS = (
    HfTensor(Section.EMBEDDING, EMBEDDING, lambda s: (s.vocab_size, s.hidden_size)),
    HfTensor(Section.LAYER, INPUT_NORM, lambda s: (s.hidden_size,)),
    HfTensor(Section.LAYER, QKV[0], lambda s: (s.num_heads * s.head_dim, s.hidden_size)),
    HfTensor(Section.LAYER, QKV[1], lambda s: (s.num_kv_heads * s.head_dim, s.hidden_size)),
    HfTensor(Section.LAYER, QKV[2], lambda s: (s.num_kv_heads * s.head_dim, s.hidden_size)),
    HfTensor(Section.LAYER, O_PROJ, lambda s: (s.hidden_size, s.num_heads * s.head_dim)),
    HfTensor(Section.LAYER, POST_NORM, lambda s: (s.hidden_size,)),
    HfTensor(Section.DENSE, GATE_UP[0], lambda s: (s.ffn_size, s.hidden_size)),
    HfTensor(Section.DENSE, GATE_UP[1], lambda s: (s.ffn_size, s.hidden_size)),
    HfTensor(Section.DENSE, DOWN, lambda s: (s.hidden_size, s.ffn_size)),
    HfTensor(Section.FINAL, FINAL_NORM, lambda s: (s.hidden_size,)),
    HfTensor(Section.OUTPUT, OUTPUT, lambda s: (s.vocab_size, s.hidden_size)),
)

LLAMA_ROWS = (
    Row(Section.EMBEDDING, "embedding.word_embeddings.weight", vocab, (EMBEDDING,)),
    Row(
        Section.LAYER,
        "input_layernorm.weight",
        replicate,
        (INPUT_NORM,),
        te_name="self_attention.linear_qkv.layer_norm_weight",
    ),
    Row(Section.LAYER, "self_attention.linear_qkv.weight", qkv, QKV),
    Row(Section.LAYER, "self_attention.linear_proj.weight", row, (O_PROJ,)),
    Row(
        Section.DENSE,
        "pre_mlp_layernorm.weight",
        replicate,
        (POST_NORM,),
        te_name="mlp.linear_fc1.layer_norm_weight",
    ),
    Row(Section.DENSE, "mlp.linear_fc1.weight", gated, GATE_UP),
    Row(Section.DENSE, "mlp.linear_fc2.weight", row, (DOWN,)),
    Row(Section.FINAL, "decoder.final_layernorm.weight", replicate, (FINAL_NORM,)),
    Row(Section.OUTPUT, "output_layer.weight", vocab, (OUTPUT,)),
    Row(Section.TIED_OUTPUT, "output_layer.weight", vocab, (EMBEDDING,)),
)

LLAMA_ENGINE_ROWS = (
    Row(Section.EMBEDDING, EMBEDDING, engine_vocab, (EMBEDDING,)),
    Row(Section.LAYER, INPUT_NORM, replicate, (INPUT_NORM,)),
    Row(Section.LAYER, f"{LAYER}self_attn.qkv_proj.weight", engine_qkv, QKV),
    Row(Section.LAYER, O_PROJ, row, (O_PROJ,)),
    Row(Section.LAYER, POST_NORM, replicate, (POST_NORM,)),
    Row(Section.DENSE, f"{LAYER}mlp.gate_up_proj.weight", engine_gated, GATE_UP),
    Row(Section.DENSE, DOWN, engine_down, (DOWN,)),
    Row(Section.FINAL, FINAL_NORM, replicate, (FINAL_NORM,)),
    Row(Section.OUTPUT, OUTPUT, engine_vocab, (OUTPUT,)),
)

LLAMA = Architecture(
    name="LlamaForCausalLM",
    read_config=read_config,
    tensors=LLAMA_TENSORS,
    rows=LLAMA_ROWS,
    engine_rows=LLAMA_ENGINE_ROWS,
    derived_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
