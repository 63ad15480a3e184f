"""Hugging Face -> Megatron: every rank fills its own parameters from its own slices of the files.

Names and shapes of the model, of the checkpoint and of the table must agree before a byte is read.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_bridge.hf_checkpoint import DTYPES, HfCheckpoint
from megatron_bridge.layout import Coords, Layout
from megatron_bridge.mapping import Views, rank_views
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import EMBEDDING, OUTPUT, ModelDescription, Spec
from megatron_bridge.models.mtp import mtp_copies
from megatron_bridge.models.score_head import SCORE, has_score_head, score_config
from megatron_bridge.table_check import check
from megatron_bridge.views import fill

TE_MARKS = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight",
)
ROUTER_BIAS = "mlp.router.expert_bias"
ADAPTER = "adapter"
"""Name of the module that holds a linear's low-rank adapters, below it."""


def unwrap(chunk: nn.Module) -> nn.Module:
    """The GPTModel inside Megatron's wrappers (DistributedDataParallel, Float16Module)."""
    while not hasattr(chunk, "decoder"):
        inner = getattr(chunk, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"{type(chunk).__name__} holds no GPTModel (nothing named decoder)")
        chunk = inner
    return chunk


def detect_spec(chunks: Sequence[nn.Module]) -> Spec:
    """Which layer spec built these model chunks, told from the parameters present."""
    names = (name for chunk in chunks for name, _ in unwrap(chunk).named_parameters())
    return Spec.TE if any(name.endswith(TE_MARKS) for name in names) else Spec.TORCH


def parameters(chunks: Sequence[nn.Module]) -> dict[tuple[int, str], torch.Tensor]:
    """(chunk, name) -> parameter, detached: it shares memory and records no gradient.

    The correction bias of a router is among them; megatron-core keeps it as a buffer. Adapters are
    not: the weights are those without them.
    """
    found = {}
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        for name, parameter in model.named_parameters():
            if f".{ADAPTER}." not in name:
                found[number, name] = parameter.detach()
        for name, buffer in model.named_buffers():
            if name.endswith(ROUTER_BIAS):
                found[number, name] = buffer
    return found


def check_model(
    chunks: Sequence[nn.Module], views: Views, num_layers: int, layout: Layout, coords: Coords
) -> None:
    """ValueError with every difference between a built model and the views of its rank."""
    errors = []
    if len(chunks) != layout.vpp:
        raise ValueError(f"{len(chunks)} model chunks were built, parallel.vpp is {layout.vpp}")
    for number, chunk in enumerate(chunks):
        # The names count from 0 in every chunk; only layer_number says which layer it is.
        decoder: Any = unwrap(chunk).decoder
        built = [layer.layer_number - 1 for layer in decoder.layers]
        planned = list(layout.chunk_layers(num_layers, coords.pp, number))
        if built != planned:
            errors.append(f"chunk {number} holds layers {built}, the layout says {planned}")
    held = parameters(chunks)
    for key in sorted(views.keys() | held.keys()):
        where = f"parameter {key[1]} of chunk {key[0]}"
        if key not in held:
            errors.append(f"{where} is in the table, not in the model")
        elif key not in views:
            errors.append(f"{where} is in the model, not in the table")
        elif tuple(held[key].shape) != views[key].shape:
            errors.append(
                f"{where} has shape {tuple(held[key].shape)}, the table says {views[key].shape}"
            )
    if errors:
        raise ValueError(f"model and weight table differ at {coords}:\n" + "\n".join(errors))


def checkpoint_errors(
    checkpoint: HfCheckpoint, layout: Layout, vocab_pad_multiple: int
) -> list[str]:
    """All that is wrong with a checkpoint's tensors, and with cutting them for `layout`."""
    model = describe(checkpoint.config)
    left_out = set(unused_tensors(checkpoint, model))
    found = {name: shape for name, shape in checkpoint.shapes.items() if name not in left_out}
    copies = copies_in(checkpoint, model)  # compared with the originals when read
    once = {name: shape for name, shape in found.items() if name not in copies}
    errors = check(checkpoint.config, layout, vocab_pad_multiple, once)
    for copy, original in copies.items():
        sizes = [checkpoint.shapes.get(name) for name in (copy, original)]
        if sizes[0] != sizes[1]:
            errors.append(f"tensor {copy} has shape {sizes[0]}, {original} (tied) {sizes[1]}")
    for name in sorted(found.keys() | {*checkpoint.mtp_names}):  # which an export carries on
        dtype = checkpoint.tensors[name].dtype
        if dtype not in DTYPES:
            errors.append(f"tensor {name} has type {dtype}; only {', '.join(DTYPES)} are read")
    return errors


def unused_tensors(checkpoint: HfCheckpoint, model: ModelDescription) -> list[str]:
    """Tensors that are not read: rotary tables, multi-token prediction layers that are left out."""
    derived = [re.compile(pattern) for pattern in model.architecture.derived_tensors]
    beyond = set() if model.shape.mtp_layers else {*checkpoint.mtp_names}
    return [
        name
        for name in checkpoint.tensors
        if name in beyond or any(pattern.fullmatch(name) for pattern in derived)
    ]


def copies_in(checkpoint: HfCheckpoint, model: ModelDescription) -> dict[str, str]:
    """Tensors of the files that repeat another one -> that one."""
    copies = mtp_copies(model.shape)
    if model.shape.tied:
        copies[OUTPUT] = EMBEDDING
    return {copy: original for copy, original in copies.items() if copy in checkpoint.tensors}


def check_checkpoint(
    checkpoint: HfCheckpoint, layout: Layout, vocab_pad_multiple: int
) -> ModelDescription:
    """Describe the checkpoint's model; ValueError with all that is wrong with its tensors."""
    if errors := checkpoint_errors(checkpoint, layout, vocab_pad_multiple):
        raise ValueError(f"{checkpoint.path} cannot be loaded:\n" + "\n".join(errors))
    return describe(checkpoint.config)


def load_hf(
    chunks: Sequence[nn.Module],
    hf_dir: str | Path,
    layout: Layout,
    coords: Coords,
    vocab_pad_multiple: int,
    hf_config: Mapping[str, Any] | None = None,
) -> None:
    """Fill this rank's model chunks from a Hugging Face directory; values are cast to their types.

    hf_config: the config.json that the model was built from, where that is another directory's, or
    one without multi-token prediction; else the two must describe the same computation.
    """
    mtp = hf_config is None or describe(hf_config).shape.mtp_layers > 0
    with HfCheckpoint(hf_dir, mtp=mtp) as checkpoint:
        model = check_checkpoint(checkpoint, layout, vocab_pad_multiple)
        if hf_config is not None:
            _refuse(model_differences(model, describe(hf_config)), checkpoint)
        spec = detect_spec(chunks)
        views = rank_views(checkpoint.config, layout, coords, spec, vocab_pad_multiple)
        check_model(chunks, views, model.shape.num_layers, layout, coords)
        check_copies(checkpoint, model, views)
        for key, parameter in parameters(chunks).items():
            fill(views[key], checkpoint.read_into, parameter)


def load_hf_body(
    chunks: Sequence[nn.Module],
    hf_dir: str | Path,
    layout: Layout,
    coords: Coords,
    vocab_pad_multiple: int,
    hf_config: Mapping[str, Any],
) -> None:
    """`load_hf` for a model with a scalar head (`hf_config`), from a directory with or without one.

    Without one the head begins at zero, and every score with it.
    """
    with HfCheckpoint(hf_dir, mtp=False) as checkpoint:
        found = check_checkpoint(checkpoint, layout, vocab_pad_multiple)
        if has_score_head(checkpoint.config):
            load_hf(chunks, hf_dir, layout, coords, vocab_pad_multiple, hf_config)
            return
        model = describe(hf_config)
        _refuse(model_differences(describe(score_config(checkpoint.config)), model), checkpoint)
        views = rank_views(hf_config, layout, coords, detect_spec(chunks), vocab_pad_multiple)
        check_model(chunks, views, found.shape.num_layers, layout, coords)
        for key, parameter in parameters(chunks).items():
            if any(box.name == SCORE for box in views[key].boxes):
                parameter.zero_()
            else:
                fill(views[key], checkpoint.read_into, parameter)


def _refuse(differences: list[str], checkpoint: HfCheckpoint) -> None:
    if differences:
        raise ValueError(f"{checkpoint.path} holds another model: {'; '.join(differences)}")


def model_differences(found: ModelDescription, wanted: ModelDescription) -> list[str]:
    """How a model computes something else than the one that is wanted."""
    errors = []
    if found.architecture is not wanted.architecture:
        errors.append(f"architecture {found.architecture.name}, not {wanted.architecture.name}")
    for mine, theirs in ((found.transformer, wanted.transformer), (found.gpt, wanted.gpt)):
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                errors.append(f"{name} = {mine.get(name)}, not {theirs.get(name)}")
    if found.shape.vocab_size != wanted.shape.vocab_size:
        errors.append(f"vocab_size = {found.shape.vocab_size}, not {wanted.shape.vocab_size}")
    return errors


def check_copies(checkpoint: HfCheckpoint, model: ModelDescription, views: Views) -> None:
    """A tied checkpoint may repeat its embedding as lm_head.weight, a multi-token prediction layer
    both; then the copies must be equal to what they repeat."""
    copies = copies_in(checkpoint, model)
    boxes = {box for view in views.values() for box in view.boxes if box.name in copies.values()}
    for copy, original in copies.items():
        for box in boxes:
            if box.name == original and not torch.equal(
                checkpoint.read(box), checkpoint.read(box._replace(name=copy))
            ):
                hint = "megatron-core shares them"
                if copy == OUTPUT:
                    hint = "tie_word_embeddings is true: set it to false"
                raise ValueError(
                    f"{checkpoint.path}: {copy} differs from {original}; {hint} or remove {copy}"
                )
