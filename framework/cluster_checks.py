"""Whether the cluster a configuration names can hold the roles it asks for."""

import shutil
from collections.abc import Iterator

from framework.config import RunConfig
from framework.launch.devices import visible_gpus
from framework.launch.needs import needs_trainer
from framework.launch.placement import (
    local_places,
    own_side_models,
    slurm_places,
    trainers_per_node,
)
from framework.preference_checks import needs_reference


def cluster_errors(config: RunConfig) -> Iterator[str]:
    """One line for every role that has no place to run."""
    cluster, engine = config.cluster, config.rollout.engine
    if cluster.launcher == "local":
        gpus = visible_gpus()
        if engine.device == "cuda" and not gpus:
            yield "rollout.engine.device=cuda: this machine has no GPU; use auto or cpu"
        if cluster.num_nodes != 1:
            yield f"cluster.num_nodes={cluster.num_nodes}: cluster=local is one machine"
        if gpus and engine.device != "cpu":
            yield from _local_gpus(config, len(gpus))
    if cluster.launcher == "slurm":
        yield from _slurm(config)
    if config.weight_sync.transport == "tensor":
        yield from _shared_memory(config)


def _shared_memory(config: RunConfig) -> Iterator[str]:
    cluster, engine, key = config.cluster, config.rollout.engine, "weight_sync.transport=tensor"
    if cluster.num_nodes > 1:
        yield (
            f"{key}: shared memory of one host, cluster.num_nodes={cluster.num_nodes}; "
            "use distributed or disk"
        )
    if not on_gpus(config):
        return
    one = engine.num_engines == 1 and engine.tp == config.parallel.world_size
    if not (engine.colocated and one):
        yield (
            f"{key}: on GPUs both sides must see the same devices: rollout.engine.colocated=true, "
            f"one engine, rollout.engine.tp={config.parallel.world_size}; else use disk"
        )
    if not config.weight_sync.verify:
        yield (
            f"weight_sync.verify=false: with {key} an engine on GPUs answers before it has copied; "
            "only its checksums tell that it has"
        )


def on_gpus(config: RunConfig) -> bool:
    """Whether engines would run on GPUs."""
    slurm = config.cluster.launcher == "slurm"
    return config.rollout.engine.device != "cpu" and (slurm or bool(visible_gpus()))


def colocation_errors(config: RunConfig) -> Iterator[str]:
    """One line for everything that engines and trainers on the same devices rule out."""
    engine, key = config.rollout.engine, "rollout.engine.colocated=true"
    if not engine.colocated:
        return
    if config.mode != "train" or config.stage != "rl":
        yield f"{key}: mode={config.mode} stage={config.stage} has nobody to share devices with"
    if config.rollout.max_staleness_steps:
        yield (
            f"rollout.max_staleness_steps={config.rollout.max_staleness_steps}: {key} lets engines "
            "sleep while trainers work; must be 0"
        )
    if engine.router:
        yield f"rollout.engine.router=true: a router takes sleeping engines for dead; {key}"
    if config.cluster.engine_nodes:
        yield (
            f"cluster.engine_nodes={config.cluster.engine_nodes}: {key} puts the engines on the "
            "trainers' nodes; must be 0"
        )
    if needs_reference(config) and config.algorithm.reference_on == "device":
        yield f"algorithm.reference_on=device: would stay there in the engines' turn ({key}); host"
    slurm = config.cluster.launcher == "slurm"
    if slurm and config.warm_start.num_steps:
        yield (
            f"warm_start.num_steps={config.warm_start.num_steps}: the engines would load beside it "
            f"({key}); run stage=sft first and set model.init_from="
        )
    transport = config.weight_sync.transport
    if transport == "delta":
        yield (
            f"weight_sync.transport=delta: an engine that slept holds nothing that could change "
            f"({key}); use tensor or disk"
        )
    if on_gpus(config) and transport in ("distributed", "direct"):
        yield (
            f"weight_sync.transport={transport}: NCCL takes no device twice ({key}); use tensor "
            "where one engine has all the trainers' devices, else disk"
        )


def _local_gpus(config: RunConfig, there: int) -> Iterator[str]:
    parallel, (engines, beside) = config.parallel, local_places(config)
    servers = [*engines, *beside]
    trainers = parallel.world_size if needs_trainer(config) else 0
    needed = max(trainers, *(place.end for place in servers), 0)
    if needed > there:
        yield (
            f"parallel.dp={parallel.dp}: trainers ({trainers}) and engines "
            f"({sum(place.count for place in servers)}) need {needed} GPUs, "
            f"this machine has {there}"
        )


def _slurm_gpus(config: RunConfig) -> Iterator[str]:
    """Nodes of Slurm on which there are more trainers and servers than GPUs."""
    cluster, trainers = config.cluster, trainers_per_node(config)
    there, (engines, beside) = cluster.gpus_per_node, slurm_places(config)
    needed = max((place.end for place in engines), default=0)
    shared = needed if cluster.engine_nodes == 0 else 0
    if max(trainers, shared) > there:
        yield (
            f"cluster.gpus_per_node={there}: {trainers} trainers"
            + (" and their engines" if shared else "")
            + f" would share a node; raise cluster.trainer_nodes={cluster.trainer_nodes}"
        )
    if cluster.engine_nodes and needed > there:
        yield (
            f"cluster.engine_nodes={cluster.engine_nodes}: one of them would need {needed} GPUs "
            f"for its engines of rollout.engine.tp={config.rollout.engine.tp}, "
            f"cluster.gpus_per_node={there}"
        )
    if needed > there:
        return
    for name, place in zip(own_side_models(config), beside, strict=True):
        if place.end > there:
            yield (
                f"cluster.gpus_per_node={there}: with rollout.side_models.{name} a node would "
                f"need {place.end}; raise cluster.engine_nodes={cluster.engine_nodes}"
            )
            return


def _slurm(config: RunConfig) -> Iterator[str]:
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
    if config.rollout.engine.device != "cpu":
        yield from _slurm_gpus(config)
    hosts = {"rollout.host": config.rollout.host, "rollout.engine.host": config.rollout.engine.host}
    for key, host in hosts.items():
        if host in ("127.0.0.1", "localhost") and cluster.num_nodes > 1:
            yield f"{key}={host}: other nodes cannot reach it; set {key}=0.0.0.0"
