"""What `memory` and `model.fp8` ask for that this model, layout or machine cannot give."""

import importlib.util
from collections.abc import Iterator

from framework.config import RunConfig
from framework.model_shape import ModelShape

MODULES = ("core_attn", "mlp", "layernorm", "moe", "moe_act", "shared_experts", "mla_up_proj")
"""Parts of a layer that megatron-core can recompute by themselves."""
_OF_EXPERTS = ("moe", "moe_act", "shared_experts")


def memory_errors(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """One line for everything that is wrong in `memory` and in `model.fp8`."""
    yield from _recompute(config, shape)
    yield from _fp8(config)


def _recompute(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    memory = config.memory
    if memory.recompute == "selective":
        named = memory.recompute_modules
        key = f"memory.recompute_modules={named}"
        if not named:
            yield f"{key}: memory.recompute=selective needs one of {', '.join(MODULES)}"
        for name in named:
            if name not in MODULES:
                yield f"{key}: {name} is none of {', '.join(MODULES)}"
            elif name in _OF_EXPERTS and not shape.num_experts:
                yield f"{key}: {name}: {shape.architecture} has no experts"
        if "moe_act" in named and _lacks_transformer_engine(config):
            yield f"{key}: moe_act needs transformer_engine, which is not installed here"
    if memory.recompute == "full":
        layout = config.parallel.layout
        most = max(
            sum(len(layout.chunk_layers(shape.num_layers, pp, k)) for k in range(layout.vpp))
            for pp in range(layout.pp)
        )
        if memory.recompute_layers > most:
            yield (
                f"memory.recompute_layers={memory.recompute_layers}: a pipeline stage has at most "
                f"{most} layers"
            )


def _fp8(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.fp8 == "none":
        return
    if model.dtype != "bfloat16":
        yield f"model.fp8={model.fp8}: needs model.dtype=bfloat16, not {model.dtype}"
    if _lacks_transformer_engine(config):
        yield (
            f"model.fp8={model.fp8}: needs transformer_engine and a GPU; transformer_engine is not "
            "installed here"
        )


def _lacks_transformer_engine(config: RunConfig) -> bool:
    # Slurm's nodes may have what the one that submits has not; their trainers ask again.
    local = config.cluster.launcher == "local"
    return local and importlib.util.find_spec("transformer_engine") is None
