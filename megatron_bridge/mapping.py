"""From an architecture's table to views: per rank of Megatron, per rank of SGLang.

Views are computed once per layer template and renamed for each layer. Data- and context-parallel
replicas hold the same views and are never enumerated.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_bridge.layout import Coords, Layout
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import (
    ModelDescription,
    Place,
    Row,
    Section,
    Spec,
)
from megatron_bridge.views import Index, View, ref

Views = dict[tuple[int, str], View]
"""(model chunk, parameter name) -> view."""

ENGINE_CPU_FFN_MULTIPLE = 32

VOCAB_SECTIONS = frozenset(
    {Section.EMBEDDING, Section.OUTPUT, Section.TIED_OUTPUT, Section.MTP_EMBEDDING}
)
"""Sections whose parameters end in padding rows."""


def hf_shapes(hf_config: Mapping[str, Any]) -> dict[str, Index]:
    """Every weight of the checkpoint and its shape: embedding, layers in order, norm, output,
    multi-token prediction layers."""
    return model_shapes(describe(hf_config))


def model_shapes(model: ModelDescription) -> dict[str, Index]:
    """`hf_shapes` of a model already described."""
    shape = model.shape
    result = template_shapes(model, frozenset({Section.EMBEDDING}))
    kinds = {kind: template_shapes(model, kind) for kind in shape.all_kinds}

    def layers(numbers: range) -> dict[str, Index]:
        return {
            layer_name(name, number): size
            for number in numbers
            for name, size in kinds[shape.layer_sections(number)].items()
        }

    result |= layers(range(shape.num_layers))
    last = {Section.FINAL} | (set() if shape.tied else {Section.OUTPUT})
    return result | template_shapes(model, frozenset(last)) | layers(shape.mtp_numbers)


def template_shapes(model: ModelDescription, sections: frozenset[Section]) -> dict[str, Index]:
    """The tensors of some sections, experts numbered; layers keep their {layer}."""
    return {
        name: tensor.shape(model.shape)
        for tensor in model.architecture.tensors
        if tensor.section in sections
        for name in expert_names(tensor.name, range(model.shape.num_experts))
    }


def expert_names(template: str, experts: range) -> list[str]:
    """`template` for each of `experts`; by itself where it names none."""
    if "{expert}" not in template:
        return [template]
    return [template.replace("{expert}", str(expert)) for expert in experts]


def layer_name(template: str, layer: int) -> str:
    """`template` with its {layer} filled in."""
    return template.replace("{layer}", str(layer))


def sections(model: ModelDescription, layout: Layout, pp: int, chunk: int) -> list[Section]:
    """What a model chunk holds besides its layers."""
    first, last = layout.is_first(pp, chunk), layout.is_last(pp, chunk)
    held = [Section.EMBEDDING] if first else []
    if last:
        held.append(Section.FINAL)
        if not model.shape.tied:
            held.append(Section.OUTPUT)
        elif not first:
            held.append(Section.TIED_OUTPUT)
        if model.shape.mtp_layers and not first:
            held.append(Section.MTP_EMBEDDING)
    return held


def local_prefix(kind: frozenset[Section], section: Section, local: int) -> str:
    """What comes before the names of a section's rows in the parameters of a model chunk.

    local: number of the layer, of that kind or another, in the chunk; for multi-token prediction
    among those layers.
    """
    if Section.MTP not in kind:
        return f"decoder.layers.{local}."
    return f"mtp.layers.{local}." + ("" if section is Section.MTP else "mtp_model_layer.")


def section_views(
    model: ModelDescription, section: Section, place: Place, rows: tuple[Row, ...]
) -> Iterator[tuple[Row, View]]:
    """The rows of one section, cut for one rank; layer rows keep {layer} in their box names."""
    shapes = {t.name: t.shape(model.shape) for t in model.architecture.tensors}
    for row in rows:
        if row.section is not section:
            continue
        if section is not Section.EXPERT:
            everything = range(model.shape.num_experts)
            parts = [
                ref(name, shapes[template])
                for template in row.tensors
                for name in expert_names(template, everything)
            ]
            yield row, row.rule(place, *parts)
            continue
        for local, expert in enumerate(held_experts(place)):
            named = replace(
                row,
                name=row.name.replace("{expert}", str(local)),
                te_name=row.te_name.replace("{expert}", str(local)),
            )
            parts = [ref(x.replace("{expert}", str(expert)), shapes[x]) for x in row.tensors]
            yield named, row.rule(place, *parts)


def held_experts(place: Place) -> range:
    """Global numbers of the experts that a rank holds, consecutive ones."""
    count, rest = divmod(place.shape.num_experts, place.ep)
    if rest:
        raise ValueError(f"{place.shape.num_experts} experts cannot be cut into {place.ep} parts")
    return range(place.ep_rank * count, (place.ep_rank + 1) * count)


def trainer_place(
    model: ModelDescription,
    layout: Layout,
    coords: Coords,
    vocab_pad_multiple: int,
    spec: Spec = Spec.TORCH,
) -> Place:
    """What the rules need to know of the trainer rank at `coords`."""
    return Place(
        shape=model.shape,
        tp=layout.tp,
        tp_rank=coords.tp,
        ep=layout.ep,
        ep_rank=coords.ep,
        etp=layout.etp,
        etp_rank=coords.etp,
        te=spec is Spec.TE,
        vocab_multiple=vocab_pad_multiple,
    )


def holders(layout: Layout, section: Section) -> range:
    """Ranks of a pipeline stage that hold a section between them, replicas left out."""
    return range(layout.ep * layout.etp if section is Section.EXPERT else layout.tp)


def rank_views(
    hf_config: Mapping[str, Any],
    layout: Layout,
    coords: Coords,
    spec: Spec,
    vocab_pad_multiple: int,
) -> Views:
    """What the trainer rank at `coords` holds: a view for every parameter of its model chunks."""
    model = describe(hf_config)
    place = trainer_place(model, layout, coords, vocab_pad_multiple, spec)
    rows = model.architecture.rows
    templates = _layer_templates(model, place, rows, model.shape.all_kinds)
    views: Views = {}

    def add_layer(chunk: int, local: int, layer: int) -> None:
        kind = model.shape.layer_sections(layer)
        for row, view in templates[kind]:
            name = local_prefix(kind, row.section, local) + row.local_name(spec)
            views[chunk, name] = view.renamed(lambda x: layer_name(x, layer))

    for chunk in range(layout.vpp):
        for section in sections(model, layout, coords.pp, chunk):
            for row, view in section_views(model, section, place, rows):
                views[chunk, row.local_name(spec)] = view
        layers = layout.chunk_layers(model.shape.num_layers, coords.pp, chunk)
        for local, layer in enumerate(layers):
            add_layer(chunk, local, layer)
        if layout.is_last(coords.pp, chunk):
            for local, layer in enumerate(model.shape.mtp_numbers):
                add_layer(chunk, local, layer)
    return views


def _layer_templates(
    model: ModelDescription,
    place: Place,
    rows: tuple[Row, ...],
    kinds: list[frozenset[Section]],
) -> dict[frozenset[Section], list[tuple[Row, View]]]:
    """For each kind of layer its rows, cut for one rank."""
    return {
        kind: [each for part in sorted(kind) for each in section_views(model, part, place, rows)]
        for kind in kinds
    }


def engine_views(hf_config: Mapping[str, Any], tp: int, rank: int, device: str) -> dict[str, View]:
    """What rank `rank` of an SGLang server with `tp` tensor-parallel ranks holds, by its names;
    multi-token prediction is another model there (the draft of its speculative decoding).

    device: cpu | cuda. SGLang 0.5.23 pads widths on a CPU (`srt/configs/update_config.py`) and
    cannot repeat KV heads there.
    """
    model = describe(hf_config)
    place = _engine_place(model, tp, rank, device)
    rows = model.architecture.engine_rows
    views: dict[str, View] = {}
    for section in (Section.EMBEDDING, Section.FINAL, Section.OUTPUT):
        if section is Section.OUTPUT and model.shape.tied:
            continue
        views |= {row.name: view for row, view in section_views(model, section, place, rows)}
    templates = _layer_templates(model, place, rows, model.shape.layer_kinds)
    for layer in range(model.shape.num_layers):
        for row, view in templates[model.shape.layer_sections(layer)]:
            views[layer_name(row.name, layer)] = view.renamed(lambda x, n=layer: layer_name(x, n))
    return views


def engine_section_views(
    model: ModelDescription, section: Section, tp: int, rank: int, device: str
) -> dict[str, View]:
    """One section of `engine_views`; in layers names and box names keep their {layer}."""
    place = _engine_place(model, tp, rank, device)
    rows = model.architecture.engine_rows
    return {row.name: view for row, view in section_views(model, section, place, rows)}


def engine_float32_names(model: ModelDescription) -> set[str]:
    """SGLang's parameters that are in float32 whatever the type of the engine."""
    rows = [row for row in model.architecture.engine_rows if row.float32]
    layers = range(model.shape.num_layers)
    return {layer_name(row.name, layer) for row in rows for layer in layers}


def _engine_place(model: ModelDescription, tp: int, rank: int, device: str) -> Place:
    """What the rules need to know of an engine rank."""
    shape = model.shape
    if not model.architecture.engine_rows:
        raise ValueError(
            f"how SGLang lays out {model.architecture.name} is not known here, so neither "
            "its checksums nor the parts of weights that its ranks hold can be told"
        )
    if limit := model.architecture.engine_limit(shape):
        raise ValueError(f"SGLang cannot serve this {model.architecture.name}: {limit}")
    fits = shape.num_kv_heads % tp == 0 or (device != "cpu" and tp % shape.num_kv_heads == 0)
    if shape.num_heads % tp or not fits:
        raise ValueError(
            f"rollout.engine.tp={tp}: SGLang on {device} cannot cut {shape.num_heads} heads with "
            f"{shape.num_kv_heads} KV heads into {tp} parts"
        )
    multiple = ENGINE_CPU_FFN_MULTIPLE if device == "cpu" else 1
    return Place(shape=shape, tp=tp, tp_rank=rank, ffn_multiple=multiple)


def float32_names(model: ModelDescription) -> set[str]:
    """Tensors of the checkpoint that stay in float32."""
    kept = {tensor.name for tensor in model.architecture.tensors if tensor.float32}
    return {layer_name(name, number) for name in kept for number in model.shape.all_layers}
