"""What one architecture is: a function that reads its config.json, and a table of weight rows.

A row says which Hugging Face tensors make up one local parameter and by which rule. The rules below
are the vocabulary of those tables; all of them speak in Hugging Face coordinates (`views`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_bridge.layout import padded_vocab_size
from megatron_bridge.views import (
    View,
    concat,
    interleave,
    pad,
    shard,
    shard_replicated,
    stack,
)

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


class Spec(StrEnum):
    """Which layer spec built the Megatron model; they differ in parameter names only."""

    TORCH = "torch"
    """Norms are modules of their own (CPU, or GPU without Transformer Engine)."""
    TE = "te"
    """Transformer Engine: norms are fused into the linear that follows."""


class Section(StrEnum):
    """Which part of the model a row or a tensor belongs to."""

    EMBEDDING = "embedding"
    """Held by the first chunk."""
    LAYER = "layer"
    """Once a layer; names are templates with {layer}, local ones relative to the layer."""
    DENSE = "dense"
    """Once a layer without experts."""
    MOE = "moe"
    """Once a layer with experts; a tensor named with {expert} stands for those of all experts."""
    EXPERT = "expert"
    """Once an expert; names hold {expert}, in local ones the number among the rank's experts."""
    FINAL = "final"
    """Held by the last chunk."""
    OUTPUT = "output"
    """Held by the last chunk when embedding and output are not tied."""
    TIED_OUTPUT = "tied_output"
    """The copy of a tied embedding in a last chunk that isn't also the first."""
    MTP = "mtp"
    """Once a multi-token prediction layer: what it has besides a layer with experts."""
    MTP_EMBEDDING = "mtp_embedding"
    """The copy of the embedding, for those layers, in a last chunk that isn't also the first."""


DENSE_LAYER = frozenset({Section.LAYER, Section.DENSE})
MOE_LAYER = frozenset({Section.LAYER, Section.MOE, Section.EXPERT})
MTP_LAYER = MOE_LAYER | {Section.MTP}


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Widths of multi-head latent attention (MLA)."""

    q_rank: int
    kv_rank: int
    nope_dim: int
    """Of a head's query and key, not rotated."""
    rope_dim: int
    """The rest of them, rotated; the key's is one for all heads."""
    value_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The numbers that weight shapes are made of."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied: bool
    """Embedding and output layer share their weight."""
    num_experts: int = 0
    expert_ffn_size: int = 0
    shared_ffn_size: int = 0
    """Width of the expert that sees every token; 0 where there is none."""
    moe_layers: frozenset[int] = frozenset()
    """Numbers of the layers with experts."""
    mtp_layers: int = 0
    """Multi-token prediction layers, numbered on from the others (`models/mtp.py`)."""
    latent: LatentAttention | None = None
    """None: grouped-query attention."""

    def layer_sections(self, layer: int) -> frozenset[Section]:
        """The sections that layer `layer` is made of."""
        if layer >= self.num_layers:
            return MTP_LAYER
        return MOE_LAYER if layer in self.moe_layers else DENSE_LAYER

    @property
    def layer_kinds(self) -> list[frozenset[Section]]:
        """The different kinds of layers that this model has, without multi-token prediction."""
        moe, dense = bool(self.moe_layers), len(self.moe_layers) < self.num_layers
        return [DENSE_LAYER] * dense + [MOE_LAYER] * moe

    @property
    def all_kinds(self) -> list[frozenset[Section]]:
        """The same with it."""
        return self.layer_kinds + [MTP_LAYER] * bool(self.mtp_layers)

    @property
    def mtp_numbers(self) -> range:
        """Numbers of the multi-token prediction layers."""
        return range(self.num_layers, self.num_layers + self.mtp_layers)

    @property
    def all_layers(self) -> range:
        """Numbers of all layers, those of multi-token prediction last."""
        return range(self.num_layers + self.mtp_layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a rule may ask of the rank that it cuts for."""

    shape: ModelShape
    tp: int
    tp_rank: int
    ep: int = 1
    ep_rank: int = 0
    etp: int = 1
    etp_rank: int = 0
    te: bool = False
    """The model was built by Transformer Engine's layer spec."""
    vocab_multiple: int = 1
    """Megatron's padded vocabularies are a multiple of this times tp."""
    ffn_multiple: int = 1
    """SGLang's padded feed-forward widths are a multiple of this times tp."""


Rule = Callable[..., View]
"""(Place, *views of the row's Hugging Face tensors) -> view of the local parameter."""


@dataclass(frozen=True, slots=True)
class Row:
    """One local parameter."""

    section: Section
    name: str
    """Parameter name under the torch spec (or in SGLang)."""
    rule: Rule
    tensors: tuple[str, ...]
    """The Hugging Face tensors it is made of, in the rule's order."""
    te_name: str = ""
    """Parameter name under Transformer Engine's spec, where it differs."""
    float32: bool = False
    """SGLang holds it in float32 whatever the type of the model."""

    def local_name(self, spec: Spec) -> str:
        """Parameter name under `spec`."""
        return self.te_name if spec is Spec.TE and self.te_name else self.name


@dataclass(frozen=True, slots=True)
class HfTensor:
    """One tensor of the Hugging Face checkpoint."""

    section: Section
    name: str
    shape: Callable[[ModelShape], tuple[int, ...]]
    float32: bool = False
    """Stays in float32 whatever the type of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """A config.json, understood."""

    architecture: "Architecture"
    shape: ModelShape
    transformer: Mapping[str, Any]
    """Arguments of megatron-core's TransformerConfig that the model fixes."""
    gpt: Mapping[str, Any]
    """Arguments of megatron-core's GPTModel that the model fixes (the padded vocab_size aside)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One row of ARCHITECTURES."""

    name: str
    read_config: Callable[[Mapping[str, Any]], tuple[ModelShape, dict[str, Any], dict[str, Any]]]
    """config.json -> shape, TransformerConfig arguments, GPTModel arguments; ValueError lists every
    field that is missing, unknown or not computed alike."""
    tensors: tuple[HfTensor, ...]
    rows: tuple[Row, ...]
    """Megatron's parameters."""
    engine_rows: tuple[Row, ...]
    """SGLang's parameters; none where their layout is not known here: no push can be verified."""
    together: tuple[tuple[str, ...], ...] = ()
    """Runs of neighbours among the tensors that SGLang takes in one message or not at all."""
    variant: Callable[[Mapping[str, Any]], "Architecture"] | None = None
    """Chooses by config.json among tables that differ in their rows."""
    derived_tensors: tuple[str, ...] = ()
    """Regular expressions of checkpoint tensors that hold no weights (saved rotary tables)."""
    engine_limit: Callable[[ModelShape], str] = lambda shape: ""
    """Why SGLang 0.5.23 would serve such a model wrongly; empty where it serves it."""


def replicate(place: Place, tensor: View) -> View:
    """The whole tensor on every tensor-parallel rank."""
    return tensor


def replicate_fused(place: Place, *tensors: View) -> View:
    """SGLang: the whole tensors one under another, on every tensor-parallel rank."""
    return concat(0, tensors)


def column(place: Place, tensor: View) -> View:
    """Cut along the output dimension."""
    return shard(tensor, 0, place.tp, place.tp_rank)


def column_unless_te(place: Place, tensor: View) -> View:
    """A latent's down-projection: whole on every rank in Transformer Engine's spec, else cut."""
    return tensor if place.te else column(place, tensor)


def row(place: Place, tensor: View) -> View:
    """Cut along the input dimension."""
    return shard(tensor, 1, place.tp, place.tp_rank)


def vocab(place: Place, tensor: View) -> View:
    """Zero-padded at the end, then cut along the vocabulary."""
    size = padded_vocab_size(tensor.shape[0], place.vocab_multiple, place.tp)
    return shard(pad(tensor, 0, size), 0, place.tp, place.tp_rank)


def qkv(place: Place, q: View, k: View, v: View) -> View:
    """Megatron: [q q k v] of each KV group in turn, then cut evenly, through a group if need be."""
    groups = interleave(0, place.shape.num_kv_heads, [q, k, v])
    return shard(groups, 0, place.tp, place.tp_rank)


def gated(place: Place, gate: View, up: View) -> View:
    """Each of gate and up is cut, then this rank's two parts are concatenated."""
    return concat(0, [column(place, gate), column(place, up)])


def expert_gated(place: Place, gate: View, up: View) -> View:
    """`gated`, cut over the expert's own tensor-parallel ranks."""
    return concat(0, [shard(x, 0, place.etp, place.etp_rank) for x in (gate, up)])


def expert_row(place: Place, tensor: View) -> View:
    """`row`, cut over the expert's own tensor-parallel ranks."""
    return shard(tensor, 1, place.etp, place.etp_rank)


def engine_qkv(place: Place, q: View, k: View, v: View) -> View:
    """SGLang: [q; k; v], each cut by heads; with tp > KV heads a KV head sits on several ranks."""
    units = place.shape.num_kv_heads
    kv = (shard_replicated(x, 0, place.tp, place.tp_rank, units) for x in (k, v))
    return concat(0, [shard(q, 0, place.tp, place.tp_rank), *kv])


def _padded_ffn(place: Place, tensor: View, dim: int) -> View:
    return pad(tensor, dim, place.tp * _padded_part(place, tensor.shape[dim]))


def _padded_part(place: Place, width: int) -> int:
    """What a rank of SGLang has of a feed-forward width."""
    step = place.ffn_multiple * place.tp
    return -(-width // step) * place.ffn_multiple


def _expert_part(place: Place, tensor: View, dim: int) -> View:
    """Unlike other widths those of experts are cut, then padded."""
    part = shard(tensor, dim, place.tp, place.tp_rank)
    return pad(part, dim, _padded_part(place, tensor.shape[dim]))


def engine_gated(place: Place, gate: View, up: View) -> View:
    """SGLang: each of gate and up is padded, then cut, then the two parts are concatenated."""
    return concat(0, [column(place, _padded_ffn(place, x, 0)) for x in (gate, up)])


def engine_down(place: Place, tensor: View) -> View:
    """SGLang: padded along the feed-forward width, then cut along it."""
    return row(place, _padded_ffn(place, tensor, 1))


def engine_experts_gated(place: Place, *tensors: View) -> View:
    """SGLang: [gate; up] of every expert, stacked; all gates come first, then all ups."""
    half = len(tensors) // 2
    pairs = zip(tensors[:half], tensors[half:], strict=True)
    return stack([concat(0, [_expert_part(place, each, 0) for each in pair]) for pair in pairs])


def engine_experts_down(place: Place, *tensors: View) -> View:
    """SGLang: the down-projection of every expert, stacked."""
    return stack([_expert_part(place, tensor, 1) for tensor in tensors])


ENGINE_VOCAB_PADDING = 64


def engine_vocab(place: Place, tensor: View) -> View:
    """SGLang: padded to a multiple of 64, or of 64 * tp where that does not divide by tp."""
    size = padded_vocab_size(tensor.shape[0], ENGINE_VOCAB_PADDING, 1)
    if size % place.tp:
        size = padded_vocab_size(tensor.shape[0], ENGINE_VOCAB_PADDING, place.tp)
    return shard(pad(tensor, 0, size), 0, place.tp, place.tp_rank)
