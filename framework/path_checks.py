"""Directories that a configuration names: they must hold what the run reads, and be writable."""

import os
from collections.abc import Iterator
from pathlib import Path

from framework.checkpoints import MANIFEST, TORCH_DIST, read_checkpoint
from framework.config import RunConfig
from framework.critic_checks import uses_critic
from framework.launch.resume import resume_errors
from framework.model_shape import read_hf_config
from megatron_bridge.models.score_head import has_score_head
from rollout.run_dir import RunDir


def _start(config: RunConfig, key: str, path: str) -> Iterator[str]:
    """Weights to start from: a Hugging Face directory or, for trainers, a Megatron checkpoint."""
    if not path or not (Path(path).expanduser() / TORCH_DIST).is_file():
        yield from _weights(key, path)
    elif config.mode in ("rollout_only", "eval"):
        yield (
            f"{key}={path}: a Megatron checkpoint, and the engines of mode={config.mode} read "
            "Hugging Face directories only; make one by drivetrain-convert to-hf"
        )
    elif config.stage == "reward_model":
        yield (
            f"{key}={path}: a Megatron checkpoint of a policy, and stage=reward_model gives it "
            "another output layer; name that run's hf/, or make one by drivetrain-convert to-hf"
        )


def _critic(config: RunConfig) -> Iterator[str]:
    """Where the critic begins: a Hugging Face directory, with or without a scalar head, or a
    reward model's Megatron checkpoint.
    """
    named, start = config.critic.init_from, config.model.init_from
    if not (Path(named).expanduser() / TORCH_DIST).is_file():
        yield from _weights("critic.init_from", named)
    else:
        yield from _scores(named)
    derived = uses_critic(config) and not config.critic.init_from and start
    if derived and (Path(start).expanduser() / TORCH_DIST).is_file():
        yield (
            f"model.init_from={start}: a Megatron checkpoint, whose output layer the critic does "
            "not have; name a Hugging Face directory by critic.init_from"
        )


def _scores(named: str) -> Iterator[str]:
    """One line unless what lies beside a Megatron checkpoint says that it is a reward model's."""
    path = Path(named).expanduser()
    try:
        if (path / MANIFEST).is_file():
            scored = read_checkpoint(path).manifest.stage == "reward_model"
        else:  # of drivetrain-convert
            scored = has_score_head(read_hf_config("critic.init_from", named))
    except ValueError as error:
        yield str(error)
        return
    if not scored:
        yield (
            f"critic.init_from={named}: a Megatron checkpoint without a score head; one of "
            "stage=reward_model, or a Hugging Face directory"
        )


def _weights(key: str, path: str) -> Iterator[str]:
    if not path:
        return
    try:
        read_hf_config(key, path)
    except ValueError as error:
        yield str(error)
    else:
        if not any(Path(path).expanduser().glob("*.safetensors")):
            yield f"{key}={path}: no *.safetensors in it"


def own_weight_errors(config: RunConfig) -> Iterator[str]:
    """Whether the policy has weights where no other directory gives them."""
    if not config.model.init_from and not config.dry_run:
        yield from _weights("model.hf_path", config.model.hf_path)


def path_errors(config: RunConfig) -> Iterator[str]:
    """Weights to start from, the run to go on with, and the run directory; one line each."""
    yield from _start(config, "model.init_from", config.model.init_from)
    yield from _start(config, "algorithm.reference", config.algorithm.reference)
    yield from _critic(config)
    path = Path(config.run_dir)
    yield from resume_errors(config)
    fresh = config.checkpoint.resume != "auto" and not config.dry_run  # which writes nothing
    if fresh and (path / "config.yaml").exists():
        saved = any(RunDir(path).checkpoints.glob("step_*"))
        yield (
            f"run_dir={config.run_dir}: already holds a run; choose another run_dir= or name=, "
            f"or remove it{', or go on with it by checkpoint.resume=auto' if saved else ''}"
        )
    elif path.exists() and not path.is_dir():
        yield f"run_dir={config.run_dir}: exists and is not a directory"
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield f"run_dir={config.run_dir}: {existing} is not a directory that can be written"
