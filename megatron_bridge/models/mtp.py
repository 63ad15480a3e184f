"""Multi-token prediction (MTP): decoder layers beyond the others that predict later tokens.

Of depth k = 1, 2, ... (arXiv 2412.19437, eq. 21 to 23):

    h'_i = M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i)]    -> a decoder layer -> the shared head

where h is what the head of the depth before sees. The paper writes the two halves the other way
round; checkpoints, SGLang and megatron-core all have the embedding's first, so nothing is swapped.
On disk depth k is layer num_hidden_layers + k - 1, the last of the layers with experts.

`num_nextn_predict_layers` of a config.json says how many there are. Whoever leaves them out
describes the model by `without_mtp` of it.
"""

from collections.abc import Mapping
from typing import Any

from megatron_bridge.models.architecture import (
    EMBEDDING,
    OUTPUT,
    HfTensor,
    ModelShape,
    Row,
    Section,
    column,
    replicate,
    vocab,
)
from megatron_bridge.models.llama import LAYER

FIELD = "num_nextn_predict_layers"
EMBEDDING_NORM = f"{LAYER}enorm.weight"
HIDDEN_NORM = f"{LAYER}hnorm.weight"
PROJECTION = f"{LAYER}eh_proj.weight"
HEAD_NORM = f"{LAYER}shared_head.norm.weight"

MTP_TENSORS = (
    HfTensor(Section.MTP, EMBEDDING_NORM, lambda s: (s.hidden_size,)),
    HfTensor(Section.MTP, HIDDEN_NORM, lambda s: (s.hidden_size,)),
    HfTensor(Section.MTP, PROJECTION, lambda s: (s.hidden_size, 2 * s.hidden_size)),
    HfTensor(Section.MTP, HEAD_NORM, lambda s: (s.hidden_size,)),
)
MTP_ROWS = (
    Row(Section.MTP, "enorm.weight", replicate, (EMBEDDING_NORM,)),
    Row(Section.MTP, "hnorm.weight", replicate, (HIDDEN_NORM,)),
    Row(Section.MTP, "eh_proj.weight", column, (PROJECTION,)),
    Row(Section.MTP, "final_layernorm.weight", replicate, (HEAD_NORM,)),
    Row(Section.MTP_EMBEDDING, "embedding.word_embeddings.weight", vocab, (EMBEDDING,)),
)
_COPIES = (("embed_tokens.weight", EMBEDDING), ("shared_head.head.weight", OUTPUT))


def mtp_copies(shape: ModelShape) -> dict[str, str]:
    """What an MTP layer on disk may repeat of the model -> what it must be equal to."""
    return {
        f"model.layers.{layer}.{name}": EMBEDDING if shape.tied else original
        for layer in shape.mtp_numbers
        for name, original in _COPIES
    }


def without_mtp(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model without its MTP layers."""
    return {**hf_config, FIELD: 0} if hf_config.get(FIELD) else dict(hf_config)


def mtp_prefixes(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names of MTP tensors begin; none where config.json tells of no such layers."""
    last, count = hf_config.get("num_hidden_layers"), hf_config.get(FIELD)
    if not isinstance(last, int) or not isinstance(count, int):
        return ()  # which `describe` refuses
    return tuple(f"model.layers.{last + number}." for number in range(count))
