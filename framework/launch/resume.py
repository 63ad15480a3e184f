"""Going on with an earlier run: what must be the same, and its directory back to a checkpoint."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framework.checkpoints import Checkpoint, find_checkpoint, newest_checkpoint
from framework.compose import ConfigError, load_run_config, without_keys
from framework.config import RunConfig
from framework.lora_checks import uses_lora
from megatron_bridge.torch_dist import TorchDistCheckpoint, is_torch_dist
from rollout.config import RolloutBatch
from rollout.journal import drop_steps, trim_lines
from rollout.mixture import read_domains
from rollout.prompt_bound import bound_prompts
from rollout.run_dir import RunDir
from rollout.side_models import read_side_models, with_absolute_paths
from rollout.state import drop_start

MAY_DIFFER = (
    *("name", "run_dir", "num_steps", "dry_run", "dry_run_rank", "parallel", "memory", "batch"),
    *("cluster", "tracker", "profile", "checkpoint", "eval", "gate"),
    *(f"weight_sync.{name}" for name in ("transport", "bucket_mb", "verify", "timeout_s")),
    *("weight_sync.pause_mode", "weight_sync.full_every_pushes"),
    *(f"rollout.{name}" for name in ("host", "port", "address", "batch_timeout_s")),
    "rollout.max_body_bytes",
    "rollout.reconnect_timeout_s",
    *(f"rollout.engine.{name}" for name in ("num_engines", "tp", "host", "urls", "api_key")),
    *("rollout.engine.router", "rollout.engine.router_policy"),
    *(f"rollout.engine.{name}" for name in ("max_total_tokens", "max_running_requests")),
    *(f"rollout.engine.{name}" for name in ("start_timeout_s", "request_timeout_s")),
    *("rollout.engine.max_retries", "data.timeout_s"),
)
"""Sections and keys that say where and how long a run computes, not what. Of `batch` and
`parallel.cp` depends how long a prompt may be, which a run that goes on does not lower."""
_PATHS = (
    *("replay_dir", "algorithm.reference", "data.path", "data.eval_path"),
    *("model.lora.init_from", "critic.init_from"),
)
_IMPLIED = ("model.hf_path", "model.init_from")
"""Filled in by the run itself where the user leaves them empty."""


def resume_errors(config: RunConfig) -> Iterator[str]:
    """Why checkpoint.resume cannot be done, one line each."""
    resume, run_dir = config.checkpoint.resume, RunDir(config.run_dir)
    if resume == "never":
        return
    if config.mode not in ("train", "train_only"):
        yield f"checkpoint.resume={resume}: mode={config.mode} has no checkpoints"
        return
    try:
        if resume != "auto":
            found = find_checkpoint(resume)
            if found.manifest.stage != config.stage:
                yield (
                    f"checkpoint.resume={resume}: a checkpoint of stage={found.manifest.stage}; "
                    f"this run is stage={config.stage}"
                )
            elif config.mode == "train" and config.stage == "rl" and not found.rollout_state():
                yield (
                    f"checkpoint.resume={resume}: a checkpoint of mode={found.manifest.mode}, "
                    "without the state of a rollout process; start from its run's hf/ with "
                    "model.init_from"
                )
            else:
                old = load_run_config(found.path)
                yield from _lower_bound(old, config)
                yield from _lost_heads(found, config)
                if uses_lora(config):
                    yield from _other_base(old, config)
        elif not run_dir.config.exists():
            return
        else:
            found = newest_checkpoint(run_dir.checkpoints)
            old = load_run_config(run_dir.path)
            yield from _differences(old, config)
            if found is not None:
                yield from _lower_bound(old, config)
            if found is None and _is_without_checkpoints(run_dir):
                yield (
                    f"checkpoint.resume=auto: the run in {run_dir.path} saved no checkpoints "
                    "(its checkpoint.every_steps is 0)"
                )
    except (ValueError, ConfigError) as error:
        yield str(error)
        return
    if found is not None and found.step > config.num_steps:
        yield f"num_steps={config.num_steps}: {found.path} has trained {found.step} already"


def rewind(run_dir: RunDir) -> int:
    """Drop what an earlier run wrote after its newest checkpoint; the steps that one has trained.

    Its processes' addresses go, and their logs move aside (trainer.log -> trainer.1.log).
    """
    found: Checkpoint | None = newest_checkpoint(run_dir.checkpoints)
    done = found.step if found is not None else 0
    last = done if found is not None else -1
    trim_lines(run_dir.metrics, "step", last)
    trim_lines(run_dir.eval, "version", last)
    drop_steps(run_dir.rollouts, done)
    drop_start(run_dir.rollouts)  # trainers tell anew where they begin
    for path in run_dir.addresses.glob("*.json"):
        path.unlink()
    for path in sorted(run_dir.logs.glob("*.log")):
        if not path.stem.rpartition(".")[2].isdecimal():
            _move_aside(path)
    return done


def _move_aside(log: Path) -> None:
    number = 1
    while (target := log.with_name(f"{log.stem}.{number}.log")).exists():
        number += 1
    log.rename(target)


def _is_without_checkpoints(run_dir: RunDir) -> bool:
    return load_run_config(run_dir.path).checkpoint.every_steps == 0


def _differences(old: RunConfig, new: RunConfig) -> Iterator[str]:
    """Keys of which the run that is gone on with had another value."""
    before, now = _flat(old), _flat(new)
    for each in (before, now):
        each["rollout.side_models"] = _side_models(each["rollout.side_models"])
        for key in ("data.args", "data.rewards", "data.mixture", "eval.sets"):
            each[key] = without_keys(each[key])
    for key, value in now.items():
        if any(key == free or key.startswith(f"{free}.") for free in MAY_DIFFER):
            continue
        if key in _PATHS and value:
            value = str(Path(value).expanduser().absolute())
        if key in _IMPLIED:
            value = str(Path(value).expanduser().absolute()) if value else ""
            if not value and before[key].startswith(str(RunDir(new.run_dir).path)):
                continue
        if before[key] != value:
            yield (
                f"{key}={value}: the run in {new.run_dir} has {key}={before[key]}; "
                "checkpoint.resume=auto goes on with the same"
            )


def _lower_bound(old: RunConfig, new: RunConfig) -> Iterator[str]:
    """Groups that wait in a checkpoint, accepted under the old bound, must still be held."""
    if new.stage != "rl" or new.mode != "train":
        return
    for domain in read_domains(old.data, old.rollout).values():
        before, now = (
            bound_prompts(
                RolloutBatch(
                    max_tokens_per_microbatch=each.batch.max_tokens_per_microbatch,
                    overlong=each.batch.overlong,
                ),
                cp=each.parallel.cp,
                max_new_tokens=domain.sampling.max_new_tokens,
            ).max_tokens
            for each in (old, new)
        )
        if now < before:
            yield (
                f"batch.max_tokens_per_microbatch={new.batch.max_tokens_per_microbatch}: with "
                f"batch.overlong={new.batch.overlong} and parallel.cp={new.parallel.cp} it leaves "
                f"{now} tokens to a prompt; the run that is gone on with has taken prompts of up "
                f"to {before}, which may wait to be trained; raise it by {before - now} or more"
            )
            return


def _lost_heads(found: Checkpoint, new: RunConfig) -> Iterator[str]:
    """A policy that is built without them would go on without a word."""
    held = is_torch_dist(found.path) and TorchDistCheckpoint(found.path).has_mtp
    if held and not new.model.mtp:
        yield (
            f"checkpoint.resume={new.checkpoint.resume}: its multi-token prediction layers would "
            "be lost; set model.mtp=true"
        )


def _other_base(old: RunConfig, new: RunConfig) -> Iterator[str]:
    """A checkpoint of adapters holds no base: where this run's would be another one."""
    path = f"the adapters of checkpoint.resume={new.checkpoint.resume}"
    before, now = _flat(old.model.lora), _flat(new.model.lora)
    for name in ("rank", "alpha", "targets"):
        if before[name] != now[name]:
            yield f"model.lora.{name}={now[name]}: {path} have {before[name]}"
    base = new.model.init_from or new.model.hf_path
    wanted = old.model.init_from or old.model.hf_path
    if not base or Path(base).expanduser().absolute() != Path(wanted):
        yield f"model.init_from={new.model.init_from}: {path} are for {wanted}"
    if new.warm_start.num_steps:
        yield (
            f"warm_start.num_steps={new.warm_start.num_steps}: {path} are for {wanted} as it is; "
            "must be 0"
        )


def _side_models(values: dict[str, Any]) -> dict[str, Any]:
    """Of each only what its answers depend on: not where its server is."""
    kept = ("kind", "model_path", "dtype", "args")
    return {
        name: {key: getattr(model, key) for key in kept} | {"url": bool(model.url)}
        for name, model in read_side_models(with_absolute_paths(values)).items()
    }


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= _flat(value, f"{prefix}{field.name}.")
        else:
            values[f"{prefix}{field.name}"] = value
    return values
