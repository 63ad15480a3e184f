"""DeepSeek-V3: latent attention (MLA), sigmoid router, shared experts, first layers dense, MTP.

Latent attention as megatron-core has it: down-projections to the latents, their norms, and
up-projections by heads; keys share one rotated part.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from megatron_bridge.models.architecture import (
    Architecture,
    HfTensor,
    LatentAttention,
    ModelShape,
    Row,
    Section,
    column,
    column_unless_te,
    replicate,
    replicate_fused,
)
from megatron_bridge.models.config_fields import ConfigFields, read_latent_rope
from megatron_bridge.models.llama import (
    INPUT_NORM,
    LAYER,
    LLAMA_ENGINE_ROWS,
    LLAMA_ROWS,
    LLAMA_TENSORS,
    O_PROJ,
)
from megatron_bridge.models.mtp import MTP_ROWS, MTP_TENSORS
from megatron_bridge.models.sigmoid_router import (
    ENGINE_ROWS,
    ROWS,
    TENSORS,
    read_sigmoid_experts,
)

ATTENTION = f"{LAYER}self_attn."
Q_DOWN, Q_UP = f"{ATTENTION}q_a_proj.weight", f"{ATTENTION}q_b_proj.weight"
KV_DOWN, KV_UP = f"{ATTENTION}kv_a_proj_with_mqa.weight", f"{ATTENTION}kv_b_proj.weight"
Q_NORM, KV_NORM = f"{ATTENTION}q_a_layernorm.weight", f"{ATTENTION}kv_a_layernorm.weight"


def read_config(
    config: Mapping[str, Any],
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """A DeepSeek-V3 config.json; its weights must be in bf16 or fp32, not in fp8."""
    fields = ConfigFields(config, "DeepseekV3ForCausalLM")
    latent = LatentAttention(
        q_rank=fields.integer("q_lora_rank"),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
    )
    heads = fields.integer("num_attention_heads")
    shape = ModelShape(
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=fields.integer("hidden_size"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=latent.nope_dim + latent.rope_dim,
        ffn_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        tied=fields.flag("tie_word_embeddings", False),
        latent=latent,
    )
    if shape.num_kv_heads != heads:
        fields.complain(f"num_key_value_heads = {shape.num_kv_heads}, not {heads}: one a head")
    for name, only in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("rope_interleave", True),
        ("qk_head_dim", shape.head_dim),
        ("head_dim", latent.rope_dim),
        ("tie_word_embeddings", False),
        ("quantization_config", None),
        ("is_encoder_decoder", False),
    ):
        fields.must_be(name, only)
    shape, experts = read_sigmoid_experts(fields, shape)
    transformer = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": heads,
        "ffn_hidden_size": shape.ffn_size,
        "multi_latent_attention": True,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.nope_dim,
        "qk_pos_emb_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        **read_latent_rope(fields, default_theta=10000.0),
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "add_bias_linear": False,
        "qk_layernorm": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **experts,
    }
    fields.finish()
    gpt = {"share_embeddings_and_output_weights": False, "position_embedding_type": "rope"}
    return shape, transformer, gpt


def _latent(shape: ModelShape) -> LatentAttention:
    assert shape.latent is not None
    return shape.latent


# What a decoder has besides its attention is Llama's.
FRAME_TENSORS = tuple(each for each in LLAMA_TENSORS if ".self_attn." not in each.name)
FRAME_ROWS = tuple(each for each in LLAMA_ROWS if "linear_qkv" not in each.name + each.te_name)

ATTENTION_TENSORS = (
    HfTensor(Section.LAYER, Q_DOWN, lambda s: (_latent(s).q_rank, s.hidden_size)),
    HfTensor(
        Section.LAYER, KV_DOWN, lambda s: (_latent(s).kv_rank + _latent(s).rope_dim, s.hidden_size)
    ),
    HfTensor(Section.LAYER, Q_NORM, lambda s: (_latent(s).q_rank,)),
    HfTensor(Section.LAYER, Q_UP, lambda s: (s.num_heads * s.head_dim, _latent(s).q_rank)),
    HfTensor(Section.LAYER, KV_NORM, lambda s: (_latent(s).kv_rank,)),
    HfTensor(
        Section.LAYER,
        KV_UP,
        lambda s: (s.num_heads * (_latent(s).nope_dim + _latent(s).value_dim), _latent(s).kv_rank),
    ),
    HfTensor(Section.LAYER, O_PROJ, lambda s: (s.hidden_size, s.num_heads * _latent(s).value_dim)),
)


def _latent_rows(kind: str, down: str, norm: str, up: str) -> tuple[Row, ...]:
    """The way of the query (q), or of key and value (kv), through their latent."""
    name = f"self_attention.linear_{kind}_up_proj."
    return (
        Row(
            Section.LAYER,
            f"self_attention.linear_{kind}_down_proj.weight",
            column_unless_te,
            (down,),
        ),
        Row(
            Section.LAYER,
            f"self_attention.{kind}_layernorm.weight",
            replicate,
            (norm,),
            te_name=f"{name}layer_norm_weight",
        ),
        Row(Section.LAYER, f"{name}weight", column, (up,)),
    )


DEEPSEEK_V3 = Architecture(
    name="DeepseekV3ForCausalLM",
    read_config=read_config,
    tensors=(*FRAME_TENSORS, *ATTENTION_TENSORS, *TENSORS, *MTP_TENSORS),
    rows=(
        *FRAME_ROWS,
        Row(Section.LAYER, "input_layernorm.weight", replicate, (INPUT_NORM,)),
        *_latent_rows("q", Q_DOWN, Q_NORM, Q_UP),
        *_latent_rows("kv", KV_DOWN, KV_NORM, KV_UP),
        *ROWS,
        *MTP_ROWS,
    ),
    engine_rows=(
        *(each for each in LLAMA_ENGINE_ROWS if ".qkv_proj." not in each.name),
        Row(
            Section.LAYER,
            f"{ATTENTION}fused_qkv_a_proj_with_mqa.weight",
            replicate_fused,
            (Q_DOWN, KV_DOWN),
        ),
        Row(Section.LAYER, Q_NORM, replicate, (Q_NORM,)),
        Row(Section.LAYER, Q_UP, column, (Q_UP,)),
        Row(Section.LAYER, KV_NORM, replicate, (KV_NORM,)),
        Row(Section.LAYER, KV_UP, column, (KV_UP,)),
        *ENGINE_ROWS,
    ),
    together=((Q_DOWN, KV_DOWN),),
)
