"""What model.mtp asks for that this model or run cannot give. Reads headers of files only."""

from collections.abc import Iterator

from framework.config import RunConfig
from framework.lora_checks import uses_lora
from framework.model_shape import ModelShape, read_hf_config
from megatron_bridge.hf_checkpoint import HfCheckpoint
from megatron_bridge.models.mtp import FIELD
from megatron_bridge.torch_dist import is_torch_dist

_PREFIX = "mtp_"


def mtp_errors(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """One line for everything that is wrong."""
    model = config.model
    if not model.mtp:
        for name in model.megatron:
            if name.startswith(_PREFIX):
                yield f"model.megatron.{name}: there are no such layers; set model.mtp=true"
        return
    key = "model.mtp=True"
    if config.stage == "reward_model":
        yield f"{key}: a reward model predicts no tokens; must be false"
    if uses_lora(config):
        yield f"{key}: not with model.lora.rank={model.lora.rank}; must be false"
    if config.parallel.fsdp:
        yield f"{key}: not with parallel.fsdp=True; set it to false"
    if config.parallel.pp > 1 and shape.tied:
        yield (
            f"{key}: the embedding is tied, which megatron-core cannot have under "
            f"parallel.pp={config.parallel.pp}; must be 1"
        )
    memory = config.memory
    if memory.recompute == "full" and memory.recompute_method == "block":
        yield f"{key}: not recomputed with memory.recompute_method=block; must be uniform"
    elif memory.recompute == "full" and memory.recompute_layers != 1:
        yield f"{key}: needs memory.recompute_layers=1, not {memory.recompute_layers}"
    yield from _files(config, key)


def _files(config: RunConfig, key: str) -> Iterator[str]:
    model = config.model
    if not model.hf_path:
        yield f"{key}: model.tiny has no multi-token prediction layers; must be false"
        return
    where = f"model.hf_path={model.hf_path}"
    if not read_hf_config("model.hf_path", model.hf_path).get(FIELD):
        yield f"{key}: {where} has none ({FIELD} of its config.json is 0); must be false"
        return
    for name, path in (("model.init_from", model.init_from), ("model.hf_path", model.hf_path)):
        if not path or config.dry_run or is_torch_dist(path):
            continue
        try:
            with HfCheckpoint(path) as checkpoint:
                held = checkpoint.mtp_names
        except ValueError:
            return  # told by its own check, or when it is loaded
        if not held:
            yield f"{key}: the files of {name}={path} hold no tensor of such layers; must be false"
        return
