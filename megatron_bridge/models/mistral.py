"""Mistral: Llama's weights. Models with a sliding window are refused."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_bridge.models.architecture import ModelShape
from megatron_bridge.models.config_fields import ConfigFields
from megatron_bridge.models.llama import LLAMA, read_dense_config


def read_config(
    config: Mapping[str, Any],
) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
    """A Mistral config.json."""
    fields = ConfigFields(config, "MistralForCausalLM")
    window = fields.value("sliding_window")
    if "sliding_window" not in config:
        fields.complain("sliding_window is missing, which means 4096; only null is supported")
    elif window is not None:
        fields.complain(f"sliding_window is {window!r}; only null is supported")
    head_dim = max(fields.integer("hidden_size") // fields.integer("num_attention_heads"), 1)
    result = read_dense_config(fields, head_dim=head_dim, kv_heads=None, qk_layernorm=False)
    fields.finish()
    return result


MISTRAL = replace(LLAMA, name="MistralForCausalLM", read_config=read_config, derived_tensors=())
