"""What model.mtp asks for that this model or run cannot give. Reads headers of files only."""

from collections.abc import Iterator

from framework.config import RunConfig
from framework.lora_checks import uses_lora
from framework.model_shape import ModelShape, read_hf_config
from framework.preference_checks import needs_reference
from megatron_bridge.hf_checkpoint import HfCheckpoint
from megatron_bridge.models.mtp import FIELD
from megatron_bridge.torch_dist import TorchDistCheckpoint, is_torch_dist

_PREFIX = "mtp_"


def mtp_errors(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """One line for everything that is wrong."""
    model = config.model
    if not model.mtp:
        yield from _lost(config)
        for name in model.megatron:
            if name.startswith(_PREFIX):
                yield f"model.megatron.{name}: there are no such layers; set model.mtp=true"
        return
    key = "model.mtp=True"
    if config.stage == "reward_model":
        yield f"{key}: a reward model predicts no tokens; must be false"
    if config.stage == "preference":
        yield f"{key}: heads would learn rejected answers of stage=preference too; must be false"
    if uses_lora(config):
        yield f"{key}: not with model.lora.rank={model.lora.rank}; must be false"
    if config.parallel.fsdp:
        yield f"{key}: not with parallel.fsdp=True; set it to false"
    if config.parallel.pp > 1 and shape.tied:
        yield (
            f"{key}: the embedding is tied, which megatron-core cannot have under "
            f"parallel.pp={config.parallel.pp}; must be 1"
        )
    if config.parallel.pp > 1 and config.parallel.overlap:
        yield (
            f"{key}: under parallel.pp={config.parallel.pp} the last stage's copy of the embedding "
            "has no gradient that parallel.overlap=True could wait for; set it to false"
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
    key_of_first = "model.init_from" if model.init_from else "model.hf_path"
    read = {key_of_first: model.init_from or model.hf_path}
    if needs_reference(config) and config.algorithm.reference:
        read["algorithm.reference"] = config.algorithm.reference
    for name, path in read.items():
        if config.dry_run or _holds_heads(path) is not False:
            continue
        what = f"{key}: the files of {name}={path} hold no tensor of such layers"
        built = ", which the reference is built with too" if name == "algorithm.reference" else ""
        yield f"{what}{built}; must be false"


def _lost(config: RunConfig) -> Iterator[str]:
    """Trained layers that an export of this run would replace by those of another directory."""
    path = config.model.init_from
    if config.dry_run or config.stage == "reward_model" or not path or not is_torch_dist(path):
        return
    if _holds_heads(path):
        yield (
            f"model.init_from={path}: its multi-token prediction layers would be lost, for only "
            "those of a Hugging Face directory are carried on; set model.mtp=true or convert it "
            "first with drivetrain-convert to-hf"
        )


def _holds_heads(path: str) -> bool | None:
    """Whether a directory or a checkpoint holds such layers; None where it cannot be read, which
    its own check tells, or the load."""
    try:
        if is_torch_dist(path):
            return TorchDistCheckpoint(path).has_mtp
        with HfCheckpoint(path) as checkpoint:
            return bool(checkpoint.mtp_names)
    except ValueError:
        return None
