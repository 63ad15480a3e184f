"""The architectures: one table each. `describe` turns a config.json into what all else needs."""

from collections.abc import Mapping
from typing import Any

from megatron_bridge.models.architecture import Architecture, ModelDescription
from megatron_bridge.models.deepseek_v3 import DEEPSEEK_V3
from megatron_bridge.models.glm4_moe import GLM4_MOE
from megatron_bridge.models.llama import LLAMA
from megatron_bridge.models.mistral import MISTRAL
from megatron_bridge.models.mixtral import MIXTRAL
from megatron_bridge.models.qwen2 import QWEN2
from megatron_bridge.models.qwen2_moe import QWEN2_MOE
from megatron_bridge.models.qwen3 import QWEN3
from megatron_bridge.models.qwen3_moe import QWEN3_MOE
from megatron_bridge.models.score_head import scored_name, with_score_head

ARCHITECTURES: dict[str, Architecture] = {
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
}

SCORED: dict[str, Architecture] = {
    scored_name(name): with_score_head(each)
    for name, each in ARCHITECTURES.items()
    if each.variant is None
}
"""The same with a scalar head: reward models."""


def describe(hf_config: Mapping[str, Any]) -> ModelDescription:
    """A config.json, understood; ValueError lists everything in it that cannot be used."""
    names = hf_config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(
            f"config.json: architectures is {names!r}; it must name one of "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    architecture = ARCHITECTURES.get(names[0]) or SCORED.get(names[0])
    if architecture is None:
        raise ValueError(
            f"config.json: architecture {names[0]!r} is not supported; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    if architecture.variant is not None:
        architecture = architecture.variant(hf_config)
    shape, transformer, gpt = architecture.read_config(hf_config)
    return ModelDescription(
        architecture=architecture, shape=shape, transformer=transformer, gpt=gpt
    )
