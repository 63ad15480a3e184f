"""Everything that is refused before a run starts, found all at once.

`check_config(config)` returns one line per error, each naming the key to change, its value and what
would be right. Type and spelling errors never come this far: `framework.compose` finds them.
Nothing heavy is imported: model and package facts are read from files.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from framework.config import RunConfig
from framework.field_rules import field_errors
from framework.launch.devices import visible_gpus
from framework.launch.resume import resume_errors
from framework.model_shape import ModelShape, read_hf_config, read_model_shape
from framework.passthrough import passthrough_errors
from rollout.data import PromptStream


DIVISORS = {
    *(f"parallel.{name}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")),
    *(f"model.tiny.{name}" for name in ("hidden_size", "num_heads", "num_kv_heads")),
    "rollout.engine.tp",
    "cluster.trainer_nodes",
}


def check_config(config: RunConfig) -> list[str]:
    """All that is wrong with `config`, one line each; empty: the run may start."""
    wrong_fields = dict(field_errors(config))
    errors = list(wrong_fields.values())
    if DIVISORS & wrong_fields.keys():
        return errors  # the checks below divide by these numbers
    errors += _mode_and_stage(config)
    errors += _sampling(config)
    errors += _asynchrony(config)
    errors += _batch(config)
    try:
        shape = read_model_shape(config.model)
    except ValueError as error:
        errors.append(str(error))
    else:
        errors += _layout(config, shape)
        errors += _lengths(config, shape)
    errors += _paths(config)
    errors += _cluster(config)
    errors += passthrough_errors(config)
    # Last, and only where all else is right: it imports the environment's package.
    return errors or list(_task(config))


def _mode_and_stage(config: RunConfig) -> Iterator[str]:
    if config.stage == "sft" and config.mode != "train":
        yield f"mode={config.mode}: stage=sft knows only mode=train"
    if config.stage == "sft" and config.warm_start.num_steps:
        yield (
            f"warm_start.num_steps={config.warm_start.num_steps}: stage=sft is itself the warm "
            "start; set num_steps= and warm_start.num_steps=0"
        )
    if config.model.init_from and config.warm_start.num_steps:
        yield (
            f"warm_start.num_steps={config.warm_start.num_steps}: model.init_from already names "
            "the weights to start from; set one of them"
        )
    if config.mode != "train" and config.warm_start.num_steps:
        yield (
            f"warm_start.num_steps={config.warm_start.num_steps}: only mode=train has a warm start "
            f"(mode={config.mode}); set warm_start.num_steps=0 and model.init_from="
        )
    if config.mode == "train_only":
        yield from _journal(config)
    elif config.replay_dir:
        yield f"replay_dir={config.replay_dir}: only mode=train_only reads a journal"


def _journal(config: RunConfig) -> Iterator[str]:
    directory = Path(config.replay_dir).expanduser()
    if not config.replay_dir:
        yield "replay_dir: mode=train_only needs the rollouts/ directory of an earlier run"
    elif not directory.is_dir():
        yield f"replay_dir={config.replay_dir}: no such directory"
    else:
        missing = [
            step
            for step in range(config.num_steps)
            if not (directory / f"step_{step:06d}.msgpack").is_file()
        ]
        if missing:
            yield (
                f"num_steps={config.num_steps}: {config.replay_dir} has no "
                f"step_{missing[0]:06d}.msgpack; {config.num_steps - len(missing)} of its steps "
                "can be replayed"
            )


def _sampling(config: RunConfig) -> Iterator[str]:
    sampling = config.rollout.sampling
    if config.stage == "sft" or config.mode == "eval":
        return
    if sampling.top_p != 1.0:
        yield (
            f"rollout.sampling.top_p={sampling.top_p}: truncated sampling biases the policy ratio; "
            "must be 1.0 for training"
        )
    if sampling.top_k != -1:
        yield (
            f"rollout.sampling.top_k={sampling.top_k}: truncated sampling biases the policy ratio; "
            "must be -1 for training"
        )
    if config.algorithm.advantage == "group_normalized" and config.rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt}: "
            "algorithm.advantage=group_normalized compares samples of a prompt; at least 2"
        )


def _asynchrony(config: RunConfig) -> Iterator[str]:
    if config.weight_sync.pause_mode == "in_place" and config.rollout.max_staleness_steps == 0:
        yield (
            "weight_sync.pause_mode=in_place: keeps attention state of the old weights, which "
            "rollout.max_staleness_steps=0 (exactly on-policy) rules out; use retract"
        )
    if config.rollout.engine.urls and config.rollout.engine.num_engines != len(
        config.rollout.engine.urls
    ):
        yield (
            f"rollout.engine.num_engines={config.rollout.engine.num_engines}: rollout.engine.urls "
            f"names {len(config.rollout.engine.urls)}"
        )
    for url in [*config.rollout.engine.urls, config.rollout.address]:
        if url and not url.startswith(("http://", "https://")):
            key = "rollout.address" if url == config.rollout.address else "rollout.engine.urls"
            yield f"{key}={url}: an address starts with http:// or https://"


def _batch(config: RunConfig) -> Iterator[str]:
    rollout, parallel = config.rollout, config.parallel
    supervised = config.stage == "sft" or config.warm_start.num_steps > 0
    if supervised and config.warm_start.batch_size < parallel.dp:
        yield (
            f"warm_start.batch_size={config.warm_start.batch_size}: fewer demonstrations than "
            f"parallel.dp={parallel.dp}"
        )
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    if config.stage == "rl" and samples < parallel.dp:
        yield (
            f"parallel.dp={parallel.dp}: more replicas than samples of a step "
            f"(rollout.prompts_per_step * rollout.samples_per_prompt = {samples})"
        )
    if config.stage == "rl" and config.algorithm.updates_per_step > samples:
        yield (
            f"algorithm.updates_per_step={config.algorithm.updates_per_step}: more than the "
            f"{samples} samples of a step"
        )


def _layout(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    parallel = config.parallel
    for key in ("vpp", "cp", "ep", "etp"):
        if getattr(parallel, key) != 1:
            yield f"parallel.{key}={getattr(parallel, key)}: must be 1 in this version"
    if shape.num_heads % parallel.tp:
        yield (
            f"parallel.tp={parallel.tp}: does not divide the model's {shape.num_heads} "
            "attention heads"
        )
    kv, tp = max(1, shape.num_kv_heads), parallel.tp
    if kv % tp and tp % kv:
        yield f"parallel.tp={tp}: neither divides nor is a multiple of the {kv} key-value heads"
    if shape.ffn_size % parallel.tp:
        yield f"parallel.tp={parallel.tp}: does not divide the feed-forward size {shape.ffn_size}"
    if shape.num_layers % (parallel.pp * parallel.vpp):
        yield f"parallel.pp={parallel.pp}: does not divide the model's {shape.num_layers} layers"
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel=True: needs parallel.tp of at least 2"
    engine_tp = config.rollout.engine.tp
    if shape.num_heads % engine_tp or (kv % engine_tp and engine_tp % kv):
        yield (
            f"rollout.engine.tp={engine_tp}: does not fit {shape.num_heads} attention heads and "
            f"{kv} key-value heads"
        )
    if not config.model.hf_path:
        tiny = config.model.tiny
        if tiny.hidden_size % tiny.num_heads:
            yield (
                f"model.tiny.num_heads={tiny.num_heads}: does not divide model.tiny.hidden_size="
                f"{tiny.hidden_size}"
            )
        if tiny.num_heads % tiny.num_kv_heads:
            yield (
                f"model.tiny.num_kv_heads={tiny.num_kv_heads}: does not divide "
                f"model.tiny.num_heads={tiny.num_heads}"
            )


def _task(config: RunConfig) -> Iterator[str]:
    """Make the first prompt: the environment itself knows its arguments best."""
    supervised = config.stage == "sft" or config.warm_start.num_steps > 0
    try:
        stream = PromptStream(config.data, config.seed, "sft" if supervised else "train")
        (environment,) = stream.environments(0, 1)
        if supervised:
            environment.demonstration()
    except (ValueError, ImportError) as error:
        yield f"data.task={config.data.task} with data.args={config.data.args}: {error}"


def _lengths(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    new, budget = config.rollout.sampling.max_new_tokens, config.batch.max_tokens_per_microbatch
    if new >= budget:
        yield (
            f"batch.max_tokens_per_microbatch={budget}: must exceed the longest response, "
            f"rollout.sampling.max_new_tokens={new}, by the prompt's tokens"
        )
    if new >= config.rollout.engine.max_total_tokens:
        yield (
            f"rollout.engine.max_total_tokens={config.rollout.engine.max_total_tokens}: must "
            f"exceed rollout.sampling.max_new_tokens={new}"
        )
    if shape.max_positions and new >= shape.max_positions:
        yield (
            f"rollout.sampling.max_new_tokens={new}: the model has {shape.max_positions} positions "
            "for prompt and response"
        )


def _paths(config: RunConfig) -> Iterator[str]:
    if config.model.init_from:
        try:
            read_hf_config("model.init_from", config.model.init_from)
        except ValueError as error:
            yield str(error)
        else:
            if not any(Path(config.model.init_from).expanduser().glob("*.safetensors")):
                yield f"model.init_from={config.model.init_from}: no *.safetensors in it"
    path = Path(config.run_dir)
    yield from resume_errors(config)
    if (path / "config.yaml").exists() and config.checkpoint.resume != "auto":
        yield (
            f"run_dir={config.run_dir}: already holds a run; choose another run_dir= or name=, "
            "or remove it, or go on with it by checkpoint.resume=auto"
        )
    elif path.exists() and not path.is_dir():
        yield f"run_dir={config.run_dir}: exists and is not a directory"
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield f"run_dir={config.run_dir}: {existing} is not a directory that can be written"


def _cluster(config: RunConfig) -> Iterator[str]:
    cluster, parallel, engine = config.cluster, config.parallel, config.rollout.engine
    engine_gpus = 0 if engine.urls else engine.num_engines * engine.tp
    if cluster.launcher == "local":
        gpus = visible_gpus()
        if engine.device == "cuda" and not gpus:
            yield "rollout.engine.device=cuda: this machine has no GPU; use auto or cpu"
        if cluster.num_nodes != 1:
            yield f"cluster.num_nodes={cluster.num_nodes}: cluster=local is one machine"
        needed = _local_gpus(config, engine_gpus)
        if gpus and engine.device != "cpu" and needed > len(gpus):
            yield (
                f"parallel.dp={parallel.dp}: trainers ({parallel.world_size}) and engines "
                f"({engine_gpus}) need {needed} GPUs, this machine has {len(gpus)}"
            )
    if cluster.launcher == "slurm":
        yield from _slurm(config, engine_gpus)


def _local_gpus(config: RunConfig, engine_gpus: int) -> int:
    trainers = config.parallel.world_size
    if config.mode == "train_only" or config.stage == "sft":
        return trainers
    return engine_gpus + (trainers if config.mode == "train" else 0)


def _slurm(config: RunConfig, engine_gpus: int) -> Iterator[str]:
    cluster, parallel = config.cluster, config.parallel
    if not config.dry_run and shutil.which("sbatch") is None:
        yield "cluster.launcher=slurm: no sbatch on this machine; dry_run=true shows the script"
    if cluster.trainer_nodes + cluster.engine_nodes > cluster.num_nodes:
        yield (
            f"cluster.num_nodes={cluster.num_nodes}: fewer than cluster.trainer_nodes="
            f"{cluster.trainer_nodes} and cluster.engine_nodes={cluster.engine_nodes} together"
        )
    if parallel.world_size % cluster.trainer_nodes:
        yield (
            f"cluster.trainer_nodes={cluster.trainer_nodes}: does not divide the "
            f"{parallel.world_size} trainers"
        )
    per_node = -(-parallel.world_size // cluster.trainer_nodes)
    if config.rollout.engine.device != "cpu":
        on_trainers = engine_gpus if cluster.engine_nodes == 0 else 0
        if per_node + -(-on_trainers // cluster.trainer_nodes) > cluster.gpus_per_node:
            yield (
                f"cluster.gpus_per_node={cluster.gpus_per_node}: {per_node} trainers"
                + (" and their engines" if on_trainers else "")
                + f" would share a node; raise cluster.trainer_nodes={cluster.trainer_nodes}"
            )
        if cluster.engine_nodes and engine_gpus > cluster.engine_nodes * cluster.gpus_per_node:
            yield (
                f"cluster.engine_nodes={cluster.engine_nodes}: {engine_gpus} engine GPUs do not "
                f"fit on them with cluster.gpus_per_node={cluster.gpus_per_node}"
            )
    hosts = {"rollout.host": config.rollout.host, "rollout.engine.host": config.rollout.engine.host}
    for key, host in hosts.items():
        if host in ("127.0.0.1", "localhost") and cluster.num_nodes > 1:
            yield f"{key}={host}: other nodes cannot reach it; set {key}=0.0.0.0"
