"""Tensors that SGLang computes from its weights once they are loaded, brought up to date by us.

Latent attention (MLA) keeps the two halves of kv_b_proj beside it, transposed. SGLang's own loaders
that bypass a model's `load_weights` end in the same call (`srt/model_loader/loader.py`).
"""

from typing import Any


def refresh_derived(model: Any) -> None:
    """After parameters were written in place; nothing where a model derives nothing."""
    if hasattr(model, "post_load_weights"):
        model.post_load_weights()
