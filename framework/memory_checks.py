"""What `memory` and `model.fp8` ask for that this model, layout or machine cannot give."""

import importlib.util
from collections.abc import Iterator

from framework.config import RunConfig
from framework.model_shape import ModelShape, read_hf_config
from framework.source_facts import MissingPackage, megatron_recompute_modules

WITHOUT_OUTPUT = ("layernorm", "moe_act", "mla_up_proj", "gdn_norm_out")
"""Modules whose output megatron-core frees and makes anew, by a class that works under Transformer
Engine only: 0.19.2 asks it for its fp8 state, and without it ends in a NameError."""
_OF_EXPERTS = ("moe", "moe_act", "shared_experts")
_NEEDS = {
    "mla_up_proj": ("kv_lora_rank", "multi-head latent attention"),
    "gdn_norm_out": ("linear_num_value_heads", "gated delta net"),
    "shared_experts": ("shared_expert_intermediate_size", "shared experts"),
}
"""What a model's config.json holds where the module exists. DeepSeek counts its shared experts."""
_ALSO = {"shared_experts": "n_shared_experts"}


def memory_errors(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """One line for everything that is wrong in `memory` and in `model.fp8`."""
    if config.memory.recompute == "selective":
        yield from _modules(config, shape)
    elif config.memory.recompute == "full":
        yield from _layers(config, shape)
    yield from _fp8(config)


def _modules(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    named = config.memory.recompute_modules
    key = f"memory.recompute_modules={named}"
    try:
        known = megatron_recompute_modules()
    except MissingPackage as error:
        yield f"{key}: cannot be checked: {error}"
        return
    if not named:
        yield f"{key}: memory.recompute=selective needs one of {', '.join(known)}"
    path = config.model.hf_path
    values = read_hf_config("model.hf_path", path) if path else {}
    for name in named:
        field, what = _NEEDS.get(name, ("", ""))
        if name not in known:
            yield f"{key}: {name} is none of {', '.join(known)}"
        elif name in _OF_EXPERTS and not shape.num_experts:
            yield f"{key}: {name}: {shape.architecture} has no experts"
        elif field and not (values.get(field) or values.get(_ALSO.get(name, field))):
            yield f"{key}: {name}: {shape.architecture} has no {what}"
        elif name in WITHOUT_OUTPUT and lacks_transformer_engine(config):
            yield f"{key}: {name} needs transformer_engine, which is not installed here"


def _layers(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    layout = config.parallel.layout
    most = max(
        sum(len(layout.chunk_layers(shape.num_layers, pp, k)) for k in range(layout.vpp))
        for pp in range(layout.pp)
    )
    if config.memory.recompute_layers > most:
        yield (
            f"memory.recompute_layers={config.memory.recompute_layers}: a pipeline stage has at "
            f"most {most} layers"
        )


def _fp8(config: RunConfig) -> Iterator[str]:
    model, memory = config.model, config.memory
    if model.fp8 == "none":
        return
    if model.dtype != "bfloat16":
        yield f"model.fp8={model.fp8}: needs model.dtype=bfloat16, not {model.dtype}"
    if lacks_transformer_engine(config):
        yield (
            f"model.fp8={model.fp8}: needs transformer_engine and a GPU; transformer_engine is not "
            "installed here"
        )
    if model.fp8_recipe == "delayed" and memory.recompute == "selective":
        for name in ("moe_act", "layernorm"):
            if name in memory.recompute_modules:
                yield (
                    f"model.fp8_recipe=delayed: megatron-core recomputes {name} "
                    "(memory.recompute_modules) under the other recipes only"
                )


def lacks_transformer_engine(config: RunConfig) -> bool:
    """Whether the trainers of this run cannot have Transformer Engine.

    The nodes of a Slurm job may have what the one that submits has not; their trainers ask again.
    """
    local = config.cluster.launcher == "local"
    return local and importlib.util.find_spec("transformer_engine") is None
