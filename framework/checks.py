"""Everything that is refused before a run starts, found all at once.

`check_config(config)` returns one line per error, each naming the key to change, its value and what
would be right. Type and spelling errors never come this far: `framework.compose` finds them.
Nothing heavy is imported: model and package facts are read from files.
"""

from collections.abc import Iterator
from pathlib import Path

from framework.algorithm_checks import algorithm_errors
from framework.cluster_checks import cluster_errors, colocation_errors
from framework.config import RunConfig
from framework.critic_checks import critic_errors
from framework.data_checks import task_errors
from framework.field_rules import field_errors
from framework.launch.devices import visible_gpus
from framework.layout_checks import layout_errors
from framework.lora_checks import lora_errors
from framework.memory_checks import memory_errors
from framework.mixture_checks import mixture_errors
from framework.model_shape import ModelShape, read_model_shape
from framework.mtp_checks import mtp_errors
from framework.passthrough import passthrough_errors
from framework.path_checks import own_weight_errors, path_errors
from framework.preference_checks import preference_errors
from framework.routing_checks import routing_errors
from framework.side_model_checks import side_model_errors
from framework.sync_checks import sync_errors
from rollout.filters import num_kept

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
    errors += algorithm_errors(config)
    errors += critic_errors(config)
    errors += preference_errors(config)
    errors += mixture_errors(config)
    errors += _asynchrony(config)
    errors += _oversample(config)
    errors += _batch(config)
    errors += _waits(config)
    errors += _router(config)
    errors += sync_errors(config)
    errors += _profile(config)
    try:
        shape = read_model_shape(config.model)
    except ValueError as error:
        errors.append(str(error))
    else:
        wrong_layout = list(layout_errors(config, shape))
        errors += wrong_layout
        # Layers of a stage can be counted only where the stages are right.
        errors += [] if wrong_layout else memory_errors(config, shape)
        errors += _lengths(config, shape)
        errors += lora_errors(config, shape)
        errors += mtp_errors(config, shape)
        errors += routing_errors(config, shape)
    errors += path_errors(config)
    if beside := list(side_model_errors(config)):
        return [*errors, *beside]  # the checks below count their GPUs
    errors += cluster_errors(config)
    errors += colocation_errors(config)
    errors += passthrough_errors(config)
    # Last, and only where all else is right: it imports the environment's package.
    return errors or [*own_weight_errors(config), *task_errors(config)]


def _mode_and_stage(config: RunConfig) -> Iterator[str]:
    if config.dry_run_rank >= 0 and not config.dry_run:
        yield f"dry_run_rank={config.dry_run_rank}: needs dry_run=true"
    if not -1 <= config.dry_run_rank < config.parallel.world_size:
        yield (
            f"dry_run_rank={config.dry_run_rank}: the layout has {config.parallel.world_size} ranks"
        )
    if config.stage != "rl" and config.mode != "train":
        yield f"mode={config.mode}: stage={config.stage} knows only mode=train"
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
    if config.stage != "rl" or config.mode == "eval":
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
    address = config.rollout.address
    if address and config.mode in ("rollout_only", "eval"):
        yield f"rollout.address={address}: mode={config.mode} is a rollout process; leave it empty"
    elif address and not config.rollout.engine.urls and config.cluster.launcher != "manual":
        yield (
            f"rollout.address={address}: who runs the rollout process runs the engines as well; "
            "name them in rollout.engine.urls"
        )
    for url in [*config.rollout.engine.urls, config.rollout.address]:
        if url and not url.startswith(("http://", "https://")):
            key = "rollout.address" if url == config.rollout.address else "rollout.engine.urls"
            yield f"{key}={url}: an address starts with http:// or https://"


def _oversample(config: RunConfig) -> Iterator[str]:
    rollout = config.rollout
    if not rollout.oversample:
        return
    key = f"rollout.oversample={rollout.oversample:g}"
    if rollout.max_staleness_steps or config.mode == "rollout_only":
        yield (
            f"{key}: only with rollout.max_staleness_steps=0 and mode=train; where groups run "
            "ahead of the trainers, late ones go on under the next weights"
        )
    if rollout.engine.deterministic:
        yield (
            f"{key}: who finishes first depends on time, which rollout.engine.deterministic=true "
            "rules out; set it false"
        )


def _waits(config: RunConfig) -> Iterator[str]:
    """While rank 0 waits for engines or an evaluation, the others wait for it in a collective."""
    parallel = config.parallel
    if config.mode != "train" or config.stage != "rl" or parallel.world_size == 1:
        return
    engine, sync = config.rollout.engine, config.weight_sync
    calls = 2 if engine.colocated else 1  # a turn is two requests
    bounds = {
        f"rollout.batch_timeout_s={config.rollout.batch_timeout_s:g}": (
            config.rollout.batch_timeout_s
        ),
        f"rollout.reconnect_timeout_s={config.rollout.reconnect_timeout_s:g}": (
            config.rollout.reconnect_timeout_s
        ),
        f"rollout.engine.start_timeout_s={engine.start_timeout_s:g}": engine.start_timeout_s,
        f"weight_sync.timeout_s={sync.timeout_s:g}{' x 2' * (calls - 1)}": calls * sync.timeout_s,
    }
    for bound, seconds in bounds.items():
        if seconds > parallel.timeout_s:
            yield (
                f"parallel.timeout_s={parallel.timeout_s:g}: trainers that wait for rank 0 would "
                f"give up before it does; at least {bound}"
            )


def _router(config: RunConfig) -> Iterator[str]:
    engine = config.rollout.engine
    if engine.router and engine.router_policy == "power_of_two" and engine.num_engines < 2:
        yield (
            f"rollout.engine.router_policy={engine.router_policy}: sglang-router wants two engines "
            f"for it, rollout.engine.num_engines={engine.num_engines}; use round_robin, or "
            "rollout.engine.router=false"
        )


def _profile(config: RunConfig) -> Iterator[str]:
    profile, world_size = config.profile, config.parallel.world_size
    if not profile.first_step:
        return
    last = profile.first_step + profile.num_steps - 1
    if last > config.num_steps:
        yield (
            f"profile.first_step={profile.first_step}: with profile.num_steps={profile.num_steps} "
            f"its last step is {last}, but num_steps={config.num_steps}"
        )
    for rank in profile.ranks:
        if not 0 <= rank < world_size:
            yield f"profile.ranks={profile.ranks}: the layout has ranks 0 to {world_size - 1}"
            break
    if profile.memory_snapshot and config.cluster.launcher == "local" and not visible_gpus():
        yield "profile.memory_snapshot=true: needs a GPU, and there is none here"


def _batch(config: RunConfig) -> Iterator[str]:
    rollout, parallel = config.rollout, config.parallel
    supervised = config.stage == "sft" or config.warm_start.num_steps > 0
    if supervised and config.warm_start.batch_size < parallel.dp:
        yield (
            f"warm_start.batch_size={config.warm_start.batch_size}: fewer demonstrations than "
            f"parallel.dp={parallel.dp}"
        )
    if config.stage == "rl" and rollout.keep_share < 1 and rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt={rollout.samples_per_prompt}: rollout.keep_share="
            f"{rollout.keep_share:g} chooses groups by how their rewards differ; at least 2"
        )
    groups = num_kept(rollout.prompts_per_step, rollout.keep_share)
    samples = groups * rollout.samples_per_prompt
    if config.stage == "rl" and samples < parallel.dp:
        yield (
            f"parallel.dp={parallel.dp}: more replicas than samples of a step "
            f"({groups} * rollout.samples_per_prompt = {samples})"
        )
    if config.stage == "rl" and config.algorithm.updates_per_step > samples:
        yield (
            f"algorithm.updates_per_step={config.algorithm.updates_per_step}: more than the "
            f"{samples} samples of a step"
        )
    if "dynamic_sampling" in rollout.filters and rollout.samples_per_prompt == 1:
        yield (
            "rollout.filters=dynamic_sampling: drops every group of one sample, "
            "rollout.samples_per_prompt=1; at least 2 are wanted"
        )


def _lengths(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    new, budget = config.rollout.sampling.max_new_tokens, config.batch.max_tokens_per_microbatch
    if new >= budget and config.batch.overlong == "refuse":
        yield (
            f"batch.max_tokens_per_microbatch={budget}: must exceed the longest response, "
            f"rollout.sampling.max_new_tokens={new}, by the prompt's tokens (or set "
            "batch.overlong=truncate)"
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
