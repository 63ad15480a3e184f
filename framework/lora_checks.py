"""Whether a run trains adapters, and what it then needs."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from framework.config import RunConfig
from framework.config_lora import ATTENTION_TARGETS, LORA_TARGETS, LoraConfig
from framework.critic_checks import uses_critic
from framework.model_shape import ModelShape
from megatron_bridge.peft_config import WEIGHTS, read_peft_config


def uses_lora(config: RunConfig) -> bool:
    """Whether a run trains adapters instead of the model."""
    return config.model.lora.rank > 0


def lora_errors(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """One line for everything that is set for nobody or cannot work."""
    lora = config.model.lora
    if not uses_lora(config):
        for each, value in dataclasses.asdict(lora).items():
            if each != "rank" and value != getattr(LoraConfig(), each):
                yield f"model.lora.{each}={value}: there are no adapters; set model.lora.rank"
        return
    key = f"model.lora.rank={lora.rank}"
    if config.mode in ("rollout_only", "eval"):
        yield (
            f"{key}: mode={config.mode} trains nothing; engines take the merged model (a run's "
            "hf/) by model.init_from"
        )
    if uses_critic(config):
        yield (
            f"{key}: a critic (algorithm.advantage={config.algorithm.advantage}) trains the whole "
            "of a second model; choose an algorithm without one"
        )
    if config.parallel.fsdp:
        yield f"{key}: not with parallel.fsdp=True; set it to false"
    if config.model.fp8 != "none":
        yield f"{key}: not with model.fp8={config.model.fp8}; set it to none"
    if path := config.algorithm.reference:
        yield f"algorithm.reference={path}: the reference of adapters is their base; leave it empty"
    if every := config.algorithm.reference_refresh_steps:
        yield (
            f"algorithm.reference_refresh_steps={every}: the reference of adapters is their base; "
            "must be 0"
        )
    yield from _targets(config, shape)
    yield from _start(config)


def _targets(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    targets = config.model.lora.targets
    key = f"model.lora.targets={targets}"
    if shape.latent_attention:
        yield f"model.lora.rank={config.model.lora.rank}: not for {shape.architecture}"
        return
    known = ATTENTION_TARGETS if shape.num_experts else LORA_TARGETS
    wrong = [name for name in targets if name not in known]
    if not targets or wrong or len(set(targets)) < len(targets):
        named = f"{', '.join(wrong)} " if wrong else ""
        why = "; experts have no adapters" if set(wrong) & set(LORA_TARGETS) else ""
        yield f"{key}: {named}must be some of {', '.join(known)}, each once{why}"


def _start(config: RunConfig) -> Iterator[str]:
    lora = config.model.lora
    if not lora.init_from:
        return
    key = f"model.lora.init_from={lora.init_from}"
    try:
        found = read_peft_config(lora.init_from)
    except ValueError as error:
        yield f"{key}: {error}"
        return
    if not (Path(lora.init_from).expanduser() / WEIGHTS).is_file():
        yield f"{key}: no {WEIGHTS} in it"
    if found.rank != lora.rank:
        yield f"model.lora.rank={lora.rank}: the adapters of {lora.init_from} have {found.rank}"
    if found.alpha != lora.alpha:
        yield f"model.lora.alpha={lora.alpha}: the adapters of {lora.init_from} have {found.alpha}"
    if set(found.targets) != set(lora.targets):
        yield (
            f"model.lora.targets={lora.targets}: the adapters of {lora.init_from} are of "
            f"{list(found.targets)}"
        )
    if config.warm_start.num_steps:
        yield (
            f"{key}: made for weights that a warm start would train further; set "
            "warm_start.num_steps=0"
        )
    if found.has_score and config.stage != "reward_model":
        yield f"{key}: adapters of a reward model; stage={config.stage} has no scalar head"
