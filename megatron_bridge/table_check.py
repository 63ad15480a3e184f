"""What keeps a layout from holding a model exactly once, from the tables alone.

Every Hugging Face tensor must be tiled by the boxes of the ranks and used by one row only, every
parameter filled, every layer in one chunk: all that is wrong is listed, before a byte is read.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_bridge.layout import Layout
from megatron_bridge.mapping import (
    VOCAB_SECTIONS,
    holders,
    model_shapes,
    section_views,
    template_shapes,
    trainer_place,
)
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import ModelDescription, Row, Section
from megatron_bridge.views import Box, Index, fill_errors, tiling_errors


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
    errors = _row_errors(model, model.architecture.rows, model.shape.all_kinds)
    if model.architecture.engine_rows:
        errors += _row_errors(model, model.architecture.engine_rows, model.shape.layer_kinds)
    if model.shape.mtp_layers and model.shape.tied and layout.pp > 1:
        errors.append(
            f"parallel.pp={layout.pp}: megatron-core cannot have multi-token prediction behind "
            "another stage than that of a tied embedding; model.mtp=false leaves it out"
        )
    errors += _head_errors(model, layout.tp)
    errors += _expert_errors(model, layout)
    errors += _layer_errors(model, layout)
    errors += _section_errors(model, layout, vocab_pad_multiple)
    if found is not None:
        errors += check_names(model, found)
    return errors


def _row_errors(
    model: ModelDescription, rows: tuple[Row, ...], kinds: list[frozenset[Section]]
) -> list[str]:
    """Tensors that the table uses never or more than once, in each kind of layer."""
    errors: set[str] = set()
    ends = {Section.EMBEDDING, Section.FINAL, Section.OUTPUT}
    for kind in kinds:
        parts = kind | ends
        used = Counter(n for row in rows if row.section in parts for n in row.tensors)
        known = {t.name for t in model.architecture.tensors if t.section in parts}
        errors |= {f"tensor {n} is mapped {used[n]} times, not once" for n in known if used[n] != 1}
        errors |= {f"mapped tensor {n} is not in the table" for n in used.keys() - known}
    return sorted(errors)


def _head_errors(model: ModelDescription, tp: int) -> list[str]:
    """Attention that megatron-core cannot cut over `tp` ranks."""
    heads, kv_heads = model.shape.num_heads, model.shape.num_kv_heads
    errors = []
    if heads % tp:
        errors.append(f"parallel.tp={tp} does not divide num_attention_heads = {heads}")
    if kv_heads % tp and tp % kv_heads:
        errors.append(f"parallel.tp={tp} and num_key_value_heads = {kv_heads} do not divide")
    return errors


def _expert_errors(model: ModelDescription, layout: Layout) -> list[str]:
    """Expert parallelism without experts, or that does not divide them."""
    if not model.shape.num_experts:
        return [
            f"parallel.{name}={size}: {model.architecture.name} has no experts"
            for name, size in (("ep", layout.ep), ("etp", layout.etp))
            if size > 1
        ]
    if model.shape.num_experts % layout.ep:
        return [f"parallel.ep={layout.ep} does not divide num_experts = {model.shape.num_experts}"]
    return []


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
    shapes = template_shapes(model, frozenset(Section))
    output = Section.TIED_OUTPUT if model.shape.tied else Section.OUTPUT
    used = {Section.EMBEDDING, Section.FINAL, output}.union(*model.shape.all_kinds)
    if model.shape.mtp_layers:
        used.add(Section.MTP_EMBEDDING)
    for section in sorted(used):
        for rank in holders(layout, section):
            place = trainer_place(model, layout, layout.coords(rank), vocab_pad_multiple)
            try:
                cut = list(section_views(model, section, place, model.architecture.rows))
            except ValueError as error:
                name = "etp" if section is Section.EXPERT else "tp"
                errors.append(f"parallel.{name}={getattr(layout, name)}: {error}")
                break
            for row, view in cut:
                errors += fill_errors(row.name, view, padded=section in VOCAB_SECTIONS)
                for box in view.boxes:
                    boxes.setdefault(box.name, []).append(box)
    if not errors:
        for name, parts in boxes.items():
            errors += tiling_errors(name, shapes[name], [(b.start, b.size) for b in parts])
    return errors


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
