"""Floating-point operations of training on one sequence, from a Hugging Face config.json.

The formula is megatron-core's own (`num_floating_point_operations` of megatron.training, for packed
sequences): matrices and attention scores only, 2 operations a multiply-add, the backward pass twice
the forward pass, half of the causal score matrix, of a mixture of experts the active ones alone.
Norms, rotary embedding, the router and recomputation are left out, there and here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_bridge.models.score_head import has_score_head

# Forward, gradient of the input, gradient of the weight; a multiply-add each.
_TRAINING_OPERATIONS = 3 * 2
_FORWARD_OPERATIONS = 2
# Frozen weights have no gradient. What adapters cost themselves is left out.
_FROZEN_OPERATIONS = 2 * 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFlops:
    """What one sequence costs, forward and backward: per_token * L + per_token_squared * L^2."""

    per_token: int
    per_token_squared: int

    def __call__(self, length: int) -> int:
        """Operations on one sequence of `length` tokens; an integer, exact."""
        return length * (self.per_token + self.per_token_squared * length)

    def __add__(self, other: "TrainingFlops") -> "TrainingFlops":
        """Of both."""
        return TrainingFlops(
            per_token=self.per_token + other.per_token,
            per_token_squared=self.per_token_squared + other.per_token_squared,
        )


def training_flops(
    hf_config: Mapping[str, Any], padded_vocab_size: int = 0, *, frozen: bool = False
) -> TrainingFlops:
    """The cost function of a decoder: dense or mixture of experts, grouped or latent attention.

    Args:
        hf_config: config.json of the model, as a dict.
        padded_vocab_size: rows of the output layer; 0: the vocabulary as it is.
        frozen: whether adapters are trained in place of the weights.
    """
    weights, scores = _matrices(hf_config, padded_vocab_size)
    return TrainingFlops(
        per_token=(_FROZEN_OPERATIONS if frozen else _TRAINING_OPERATIONS) * weights,
        per_token_squared=_TRAINING_OPERATIONS * scores // 2,
    )


def forward_flops(hf_config: Mapping[str, Any]) -> TrainingFlops:
    """The same of a pass without a gradient."""
    weights, scores = _matrices(hf_config, 0)
    return TrainingFlops(
        per_token=_FORWARD_OPERATIONS * weights,
        per_token_squared=_FORWARD_OPERATIONS * scores // 2,
    )


def _matrices(hf_config: Mapping[str, Any], padded_vocab_size: int) -> tuple[int, int]:
    """(weights that a token passes through, width of scores and values) of all layers."""
    attention, scores = _attention(hf_config)
    layers, hidden = hf_config["num_hidden_layers"], hf_config["hidden_size"]
    moe_layers = _num_moe_layers(hf_config)
    # A gated MLP has three matrices of hidden x ffn.
    dense = 3 * hidden * hf_config["intermediate_size"]
    outputs = 1 if has_score_head(hf_config) else padded_vocab_size or hf_config["vocab_size"]
    logits = hidden * outputs
    weights = layers * attention + (layers - moe_layers) * dense + logits
    if moe_layers:
        weights += moe_layers * 3 * hidden * _active_ffn_size(hf_config)
    return weights, layers * scores


def _attention(hf: Mapping[str, Any]) -> tuple[int, int]:
    """(weights of the projections, width of scores and values together) of one layer."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    if hf.get("kv_lora_rank"):
        nope, rope, value = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
        query, rank, latent = heads * (nope + rope), hf.get("q_lora_rank"), hf["kv_lora_rank"]
        # + 1: megatron counts the norms of the latents.
        weights = rank * (hidden + query + 1) if rank else hidden * query
        weights += latent * (hidden + heads * (nope + value) + 1) + hidden * rope
        return weights + heads * value * hidden, query + heads * value
    head_dim = hf.get("head_dim") or hidden // heads
    query, keys = heads * head_dim, (hf.get("num_key_value_heads") or heads) * head_dim
    return hidden * (2 * query + 2 * keys), 2 * query


def _num_experts(hf: Mapping[str, Any]) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((hf[name] for name in names if hf.get(name)), 0)


def _num_moe_layers(hf: Mapping[str, Any]) -> int:
    """Layers with experts, by the rules of Qwen-MoE, Mixtral, and DeepSeek and GLM."""
    if not _num_experts(hf):
        return 0
    dense_first, every = hf.get("first_k_dense_replace", 0), hf.get("decoder_sparse_step", 1) or 1
    dense = set(hf.get("mlp_only_layers") or [])
    return sum(
        layer >= dense_first and layer not in dense and (layer + 1) % every == 0
        for layer in range(hf["num_hidden_layers"])
    )


def _active_ffn_size(hf: Mapping[str, Any]) -> int:
    """Width that one token passes through: its routed experts and the shared ones."""
    width = hf.get("moe_intermediate_size") or hf["intermediate_size"]
    shared = hf.get("shared_expert_intermediate_size") or width * (hf.get("n_shared_experts") or 0)
    return width * hf["num_experts_per_tok"] + shared
