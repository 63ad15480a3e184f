"""From an architecture's table to views: per rank of Megatron, per rank of SGLang, and their check.

Views are computed once per layer template and renamed for each layer. Data- and context-parallel
replicas hold the same views and are never enumerated.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
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
from megatron_bridge.views import Box, Index, View, fill_errors, ref, tiling_errors

Views = dict[tuple[int, str], View]
"""(model chunk, parameter name) -> view."""

ENGINE_CPU_FFN_MULTIPLE = 32

VOCAB_SECTIONS = frozenset({Section.EMBEDDING, Section.OUTPUT, Section.TIED_OUTPUT})
"""Sections whose parameters end in padding rows."""


def hf_shapes(hf_config: Mapping[str, Any]) -> dict[str, Index]:
    """Every weight of the checkpoint and its shape: embedding, layers in order, norm, output."""
    return model_shapes(describe(hf_config))


def model_shapes(model: ModelDescription) -> dict[str, Index]:
    """`hf_shapes` of a model already described."""
    shape, tensors = model.shape, model.architecture.tensors
    result = {t.name: t.shape(shape) for t in tensors if t.section is Section.EMBEDDING}
    layer = [(t.name, t.shape(shape)) for t in tensors if t.section is Section.LAYER]
    for number in range(shape.num_layers):
        result |= {layer_name(name, number): size for name, size in layer}
    last = {Section.FINAL} | (set() if shape.tied else {Section.OUTPUT})
    return result | {t.name: t.shape(shape) for t in tensors if t.section in last}


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
    return held


def section_views(
    model: ModelDescription, section: Section, place: Place, rows: tuple[Row, ...]
) -> Iterator[tuple[Row, View]]:
    """The rows of one section, cut for one rank; layer rows keep {layer} in their box names."""
    shapes = {t.name: t.shape(model.shape) for t in model.architecture.tensors}
    for row in rows:
        if row.section is section:
            yield row, row.rule(place, *(ref(name, shapes[name]) for name in row.tensors))


def rank_views(
    hf_config: Mapping[str, Any],
    layout: Layout,
    coords: Coords,
    spec: Spec,
    vocab_pad_multiple: int,
) -> Views:
    """What the trainer rank at `coords` holds: a view for every parameter of its model chunks."""
    model = describe(hf_config)
    place = Place(
        shape=model.shape, tp=layout.tp, tp_rank=coords.tp, vocab_multiple=vocab_pad_multiple
    )
    rows = model.architecture.rows
    template = list(section_views(model, Section.LAYER, place, rows))
    views: Views = {}
    for chunk in range(layout.vpp):
        for section in sections(model, layout, coords.pp, chunk):
            for row, view in section_views(model, section, place, rows):
                views[chunk, row.local_name(spec)] = view
        layers = layout.chunk_layers(model.shape.num_layers, coords.pp, chunk)
        for local, layer in enumerate(layers):
            for row, view in template:
                name = f"decoder.layers.{local}.{row.local_name(spec)}"
                views[chunk, name] = view.renamed(lambda x, n=layer: layer_name(x, n))
    return views


def engine_views(hf_config: Mapping[str, Any], tp: int, rank: int, device: str) -> dict[str, View]:
    """What rank `rank` of an SGLang server with `tp` tensor-parallel ranks holds, by its names.

    device: cpu | cuda. SGLang 0.5.23 pads widths on a CPU (`srt/configs/update_config.py`) and
    cannot repeat KV heads there.
    """
    model = describe(hf_config)
    shape = model.shape
    fits = shape.num_kv_heads % tp == 0 or (device != "cpu" and tp % shape.num_kv_heads == 0)
    if shape.num_heads % tp or not fits:
        raise ValueError(
            f"rollout.engine.tp={tp}: SGLang on {device} cannot cut {shape.num_heads} heads with "
            f"{shape.num_kv_heads} KV heads into {tp} parts"
        )
    multiple = ENGINE_CPU_FFN_MULTIPLE if device == "cpu" else 1
    place = Place(shape=shape, tp=tp, tp_rank=rank, ffn_multiple=multiple)
    rows = model.architecture.engine_rows
    views: dict[str, View] = {}
    for section in (Section.EMBEDDING, Section.FINAL, Section.OUTPUT):
        if section is Section.OUTPUT and model.shape.tied:
            continue
        views |= {row.name: view for row, view in section_views(model, section, place, rows)}
    template = list(section_views(model, Section.LAYER, place, rows))
    for layer in range(model.shape.num_layers):
        for row, view in template:
            views[layer_name(row.name, layer)] = view.renamed(lambda x, n=layer: layer_name(x, n))
    return views


def check_names(model: ModelDescription, found: Mapping[str, Index]) -> list[str]:
    """What is wrong with a checkpoint's tensors: missing, extra or misshapen, all of them."""
    wanted = model_shapes(model)
    errors = [f"tensor {name} is missing" for name in wanted.keys() - found.keys()]
    for name, shape in found.items():
        if name not in wanted:
            errors.append(f"tensor {name} is not one of {model.architecture.name}")
        elif tuple(shape) != wanted[name]:
            errors.append(f"tensor {name} has shape {tuple(shape)}, expected {wanted[name]}")
    return sorted(errors)


def check(
    hf_config: Mapping[str, Any],
    layout: Layout,
    vocab_pad_multiple: int,
    found: Mapping[str, Index] | None = None,
) -> list[str]:
    """Everything that keeps `layout` from holding this model exactly once.

    Each Hugging Face tensor must be tiled by the boxes of the tensor-parallel ranks, used by one
    row only, and every parameter filled; each layer must sit in one chunk. `found` (name -> shape,
    from the checkpoint's headers) is compared with what the architecture wants.
    """
    model = describe(hf_config)
    errors = _row_errors(model, model.architecture.rows)
    errors += _row_errors(model, model.architecture.engine_rows)
    errors += _head_errors(model, layout.tp)
    errors += _layer_errors(model, layout)
    errors += _section_errors(model, layout, vocab_pad_multiple)
    if found is not None:
        errors += check_names(model, found)
    return errors


def _row_errors(model: ModelDescription, rows: tuple[Row, ...]) -> list[str]:
    """Tensors that the table uses never or more than once."""
    used = Counter(n for row in rows if row.section is not Section.TIED_OUTPUT for n in row.tensors)
    known = {t.name for t in model.architecture.tensors}
    errors = [f"tensor {n} is mapped {used[n]} times, not once" for n in known if used[n] != 1]
    return sorted(errors + [f"mapped tensor {n} is not in the table" for n in used.keys() - known])


def _head_errors(model: ModelDescription, tp: int) -> list[str]:
    """Attention that megatron-core cannot cut over `tp` ranks."""
    heads, kv_heads = model.shape.num_heads, model.shape.num_kv_heads
    errors = []
    if heads % tp:
        errors.append(f"parallel.tp={tp} does not divide num_attention_heads = {heads}")
    if kv_heads % tp and tp % kv_heads:
        errors.append(f"parallel.tp={tp} and num_key_value_heads = {kv_heads} do not divide")
    return errors


def _layer_errors(model: ModelDescription, layout: Layout) -> list[str]:
    """Layers that no chunk or more than one holds."""
    held: Counter[int] = Counter()
    for pp in range(layout.pp):
        for chunk in range(layout.vpp):
            try:
                held.update(layout.chunk_layers(model.shape.num_layers, pp, chunk))
            except ValueError as error:
                return [str(error)]
    wanted = range(model.shape.num_layers)
    errors = [f"layer {n} is held by {held[n]} chunks" for n in wanted if held[n] != 1]
    return errors + [f"layer {n} does not exist" for n in sorted(held.keys() - set(wanted))]


def _section_errors(model: ModelDescription, layout: Layout, vocab_pad_multiple: int) -> list[str]:
    """Tensors not tiled exactly once, parameters not filled, cuts that do not divide."""
    errors: list[str] = []
    boxes: dict[str, list[Box]] = {}
    shapes = {t.name: t.shape(model.shape) for t in model.architecture.tensors}
    used = set(Section) - {Section.OUTPUT if model.shape.tied else Section.TIED_OUTPUT}
    for section in sorted(used):
        for tp_rank in range(layout.tp):
            place = Place(
                shape=model.shape,
                tp=layout.tp,
                tp_rank=tp_rank,
                vocab_multiple=vocab_pad_multiple,
            )
            try:
                cut = list(section_views(model, section, place, model.architecture.rows))
            except ValueError as error:
                errors.append(f"parallel.tp={layout.tp}: {error}")
                break
            for row, view in cut:
                errors += fill_errors(row.name, view, padded=section in VOCAB_SECTIONS)
                for box in view.boxes:
                    boxes.setdefault(box.name, []).append(box)
    if not errors:
        for name, parts in boxes.items():
            errors += tiling_errors(name, shapes[name], [(b.start, b.size) for b in parts])
    return errors
