"""Tiny models with multi-token prediction, and what it computes, by the formula of its report.

transformers drops these layers: it saves none and computes none. Their tensors are written here by
hand, under the names of the hub's checkpoints, and their logits follow arXiv 2412.19437, eq. 21 to
23, around transformers' own decoder layer. Nothing of the converter is used.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import rms_norm

COPIES = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}

GLM = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": True,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
}
"""config.json of a GLM-4.5 with one such layer."""


@dataclass
class MtpReference:
    """A model, its layers for later tokens, and what each has of its own."""

    model: Any
    layers: list[Any]
    own: list[dict[str, torch.Tensor]]

    def logits(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """[B, S, V] of the next token, [B, S - k, V] of depth k = 1, 2, ..."""
        hidden = self.model.model(tokens).last_hidden_state
        found = [self.model.lm_head(hidden)]
        for depth, (layer, own) in enumerate(zip(self.layers, self.own, strict=True), 1):
            hidden = depth_hidden(self.model, layer, own, hidden, tokens, depth)
            found.append(self.model.lm_head(hidden)[:, :-depth])
        return found


def save_with_mtp(model: Any, path: Path, depths: int) -> MtpReference:
    """Save `model`, whose last `depths` layers are for multi-token prediction, under `path`."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    layers = model.model.layers
    main = len(layers) - depths
    model.save_pretrained(path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    own = [_own_tensors(model.config.hidden_size) for _ in range(depths)]
    for depth, added in enumerate(own):
        prefix = f"model.layers.{main + depth}."
        tensors |= {f"{prefix}{name}.weight": value for name, value in added.items()}
        for copy, original in COPIES.items():
            tensors[f"{prefix}{copy}.weight"] = tensors[original].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(path)
    config.num_hidden_layers, config.num_nextn_predict_layers = main, depths
    config.save_pretrained(path)
    model.config.num_hidden_layers = main
    model.model.layers = layers[:main]
    return MtpReference(model, list(layers[main:]), own)


def _own_tensors(hidden_size: int) -> dict[str, torch.Tensor]:
    norms = ("enorm", "hnorm", "shared_head.norm")
    tensors = {name: 1 + 0.3 * torch.randn(hidden_size) for name in norms}
    projection = torch.randn(hidden_size, 2 * hidden_size)
    return tensors | {"eh_proj": projection / (2 * hidden_size) ** 0.5}


def depth_hidden(
    model: Any,
    layer: Any,
    own: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    depth: int,
) -> torch.Tensor:
    """What the shared head sees at `depth`, [B, S, H], from what it saw at the depth before.

    The last `depth` positions know no token t_{i + depth}; token 0 stands in.
    """
    eps = model.config.rms_norm_eps
    size = hidden.shape[-1:]
    later = torch.nn.functional.pad(tokens[:, depth:], (0, depth))
    embedded = rms_norm(model.model.embed_tokens(later), size, own["enorm"], eps)
    before = rms_norm(hidden, size, own["hnorm"], eps)
    half = own["eh_proj"].shape[1] // 2  # M [Emb; h], as on disk
    merged = embedded @ own["eh_proj"][:, :half].T + before @ own["eh_proj"][:, half:].T
    positions = torch.arange(tokens.shape[1])[None]
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    output = layer(
        merged,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=model.model.rotary_emb(merged, positions),
    )
    output = output[0] if isinstance(output, tuple) else output
    return rms_norm(output, size, own["shared_head.norm"], eps)
