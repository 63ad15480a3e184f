"""Tiny random Hugging Face models, every weight (norms too) drawn so that a misplaced one shows."""

from pathlib import Path
from typing import Any

import torch
from mtp_models import save_with_mtp

TOKENS = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(1))

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SIZES: dict[str, Any] = {
    "vocab_size": 101,  # padded in every layout
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,  # heads * head_dim is not hidden_size
    "max_position_embeddings": 128,
}

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}

SIGMOID_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}

LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,  # what transformers rotates
    "moe_layer_freq": 1,  # not read by transformers; SGLang's model wants these
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3_untied": ("Qwen3", {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "tie_word_embeddings": False}),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        {
            **EXPERTS,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
        },
    ),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_untied": ("Qwen2", {"tie_word_embeddings": False}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **EXPERTS,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 48,
            "tie_word_embeddings": False,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **SIGMOID_EXPERTS,
            "attention_bias": True,
            "use_qk_norm": True,
            "tie_word_embeddings": False,
        },
    ),
    "glm4_moe_air": (
        "Glm4Moe",
        {**SIGMOID_EXPERTS, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **SIGMOID_EXPERTS,
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": YARN,
        },
    ),
    "deepseek_v3_rope": (
        "DeepseekV3",
        {**SIGMOID_EXPERTS, **LATENT, "n_group": 1, "topk_group": 1},
    ),
    "llama3": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE}),
}
MODELS |= {
    "deepseek_v3_mtp": (
        "DeepseekV3",
        {**MODELS["deepseek_v3"][1], "num_nextn_predict_layers": 2},
    ),
    "glm4_moe_mtp": ("Glm4Moe", {**MODELS["glm4_moe"][1], "num_nextn_predict_layers": 1}),
}


def create_model(name: str, path: Path, **sizes: Any) -> torch.Tensor:
    """Save model `name` under `path`; returns transformers' logits of TOKENS, [2, 24, V] fp32;
    behind them those of multi-token prediction, where its tokens are known."""
    model, depths = random_model(name, **sizes)
    with torch.no_grad():
        if depths:
            return torch.cat(save_with_mtp(model, path, depths).logits(TOKENS), dim=1)
        model.save_pretrained(path)
        return model(TOKENS).logits


def random_model(name: str, **sizes: Any) -> tuple[Any, int]:
    """transformers' model in fp32, and how many of its layers, the last ones, are for multi-token
    prediction."""
    import transformers

    family, settings = MODELS[name]
    settings = {**SIZES, **settings, **sizes}
    depths = settings.get("num_nextn_predict_layers", 0)
    settings["num_hidden_layers"] += depths
    config = getattr(transformers, f"{family}Config")(
        **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # enough to change what is chosen
                buffer.copy_(0.2 * torch.randn_like(buffer))
    return model, depths


def patterned(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """fp32 weights by a formula: the same under every version of torch, no two tensors alike."""
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        values = torch.arange(torch.Size(shape).numel()) * 31 + number * 7
        tensors[name] = ((values % 1009).float() / 512 - 1).reshape(shape)
    return tensors


def create_patterned_model(name: str, path: Path, **sizes: Any) -> dict[str, torch.Tensor]:
    """Save model `name` with patterned weights under `path`; returns them."""
    import transformers
    from safetensors.torch import save_file

    from megatron_bridge.mapping import hf_shapes

    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **settings, **sizes}, architectures=[f"{family}ForCausalLM"]
    )
    config.save_pretrained(path)
    tensors = patterned(hf_shapes(config.to_dict()))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return tensors
