"""`dry_run=true`: what a configuration amounts to, computed, with nothing started or written.

Parameters are exact, from the converter's tables; memory, traffic and time are estimates from the
model's shape, each line with its reason. What a run really took is in metrics.jsonl (`perf/...`).
"""

from math import prod

from framework.compose import shown_yaml
from framework.config import RunConfig
from framework.launch.manual import command_lines
from framework.launch.needs import needs_engines, needs_trainer
from framework.launch.prepare import resolve_stages
from framework.plan.memory import engine_lines, gpu_of, memory_lines, worst_rank
from framework.plan.ranks import rank_table
from framework.plan.stages import model_values, read_stages
from framework.plan.traffic import push_line, step_lines
from megatron_bridge.mapping import hf_shapes
from megatron_bridge.models.mtp import without_mtp


def describe_run(config: RunConfig) -> str:
    """Everything `dry_run=true` prints."""
    stages = resolve_stages(config)
    sections = ["# Resolved configuration", shown_yaml(stages.main).rstrip()]
    if needs_trainer(config):
        sections += estimate_sections(config)
        if config.dry_run_rank >= 0:
            sections += rank_section(config)
    if config.cluster.launcher == "slurm":
        from framework.launch.slurm import render

        sections += ["", f"# {config.run_dir}/job.sbatch", render(stages).rstrip()]
    else:
        sections += ["", "# Commands", *command_lines(stages)]
    sections += ["", "# Nothing was started and nothing was written."]
    return "\n".join(sections)


def estimate_sections(config: RunConfig) -> list[str]:
    """Ranks, memory, a step and a push, each under its title."""
    values = model_values(config)
    stages = read_stages(config, values)
    worst = worst_rank(config, values, stages, torch_spec=gpu_of(config) is None)
    whole = sum(prod(shape) for shape in hf_shapes(values).values())
    sections = ["", "# Trainer ranks", *rank_table(config, values["num_hidden_layers"])]
    sections += ["", f"# Memory of a trainer rank (estimated; {whole:,} parameters in all)"]
    sections += memory_lines(config, worst)
    sections += ["", "# A step (estimated)", *step_lines(config, values, stages[worst.pp])]
    if needs_engines(config):
        pushed = sum(prod(shape) for shape in hf_shapes(without_mtp(values)).values())
        weights = pushed * (4 if config.rollout.engine.dtype == "float32" else 2)
        sections += [push_line(config, weights), *engine_lines(config, weights)]
        sections += ["generation: not estimated"]
    return sections


def rank_section(config: RunConfig) -> list[str]:
    """What megatron-core builds on one rank; ValueError where it is not what the table says."""
    from framework.megatron.meta_rank import build_rank  # imports megatron-core

    rank, world = config.dry_run_rank, config.parallel.world_size
    found = build_rank(config, model_values(config), rank)
    size = sum(map(prod, found.values()))
    return [
        "",
        f"# Rank {rank} of {world:,}, built by megatron-core on the meta device",
        f"{len(found)} tensors, {size:,} values; each is in the weight table, in its shape:",
        *(f"  {name} {list(shape)}" for name, shape in found.items()),
    ]
