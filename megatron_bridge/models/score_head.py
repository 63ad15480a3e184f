"""A scalar head in place of the output layer: reward models, *ForSequenceClassification.

Body and names are those of the causal model; `score.weight`, [1, hidden], takes the place of
lm_head, an embedding that was tied is free, and nothing predicts later tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_bridge.models.architecture import (
    Architecture,
    HfTensor,
    ModelShape,
    Row,
    Section,
    replicate,
)

SCORE = "score.weight"
_CAUSAL, _SCORED = "ForCausalLM", "ForSequenceClassification"


def scored_name(name: str) -> str:
    """Qwen3ForCausalLM -> Qwen3ForSequenceClassification."""
    return name.removesuffix(_CAUSAL) + _SCORED


def has_score_head(hf_config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model with a scalar head."""
    return any(str(name).endswith(_SCORED) for name in hf_config.get("architectures") or ())


def score_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model with a scalar head."""
    names = [scored_name(str(each)) for each in hf_config.get("architectures") or ()]
    if has_score_head(hf_config):
        return dict(hf_config)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**hf_config, "architectures": names, **labels}


def with_score_head(causal: Architecture) -> Architecture:
    """The table of a causal model, changed where its output layer was; without SGLang's layout."""

    def read_config(
        config: Mapping[str, Any],
    ) -> tuple[ModelShape, dict[str, Any], dict[str, Any]]:
        shape, transformer, gpt = causal.read_config(config)
        free = {**gpt, "share_embeddings_and_output_weights": False}
        transformer = {k: v for k, v in transformer.items() if k != "mtp_num_layers"}
        return replace(shape, tied=False, mtp_layers=0), transformer, free

    outputs = {Section.OUTPUT, Section.TIED_OUTPUT}
    return replace(
        causal,
        name=scored_name(causal.name),
        read_config=read_config,
        tensors=(
            *(each for each in causal.tensors if each.section not in outputs),
            HfTensor(Section.OUTPUT, SCORE, lambda s: (1, s.hidden_size)),
        ),
        rows=(
            *(each for each in causal.rows if each.section not in outputs),
            Row(Section.OUTPUT, "output_layer.weight", replicate, (SCORE,)),
        ),
        engine_rows=(),
    )
