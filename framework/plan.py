"""`dry_run=true`: what a configuration amounts to, computed, with nothing started or written.

The memory and time figures are estimates from the model's shape, named as such; what a run really
took is in metrics.jsonl (`perf/...`).
"""

from framework.compose import config_yaml
from framework.config import RunConfig
from framework.launch.manual import command_lines
from framework.launch.prepare import resolve_stages
from framework.launch.roles import needs_engines, needs_trainer
from framework.model_shape import ModelShape, read_model_shape
from megatron_bridge.layout import padded_vocab_size

BYTES = {"float32": 4, "bfloat16": 2}
MAX_RANKS_SHOWN = 64
# Sustained floating-point operations a second of one device at training, for the time estimate.
CPU_CORE_FLOPS = 2e10
GPU_BF16_FLOPS = 4e14


def describe_run(config: RunConfig) -> str:
    """Everything `dry_run=true` prints."""
    stages = resolve_stages(config)
    shape = read_model_shape(config.model)
    sections = ["# Resolved configuration", config_yaml(stages.main).rstrip()]
    if needs_trainer(config):
        sections += ["", "# Trainer ranks", *rank_table(config, shape)]
        sections += ["", "# Estimate (from the model's shape; not measured)"]
        sections += estimate(config, shape)
    if config.cluster.launcher == "slurm":
        from framework.launch.slurm import render

        sections += ["", f"# {config.run_dir}/job.sbatch", render(stages).rstrip()]
    else:
        sections += ["", "# Commands", *command_lines(stages)]
    sections += ["", "# Nothing was started and nothing was written."]
    return "\n".join(sections)


def rank_table(config: RunConfig, shape: ModelShape) -> list[str]:
    """One line for each rank: coordinates, layers, its share of a step's samples."""
    layout = config.parallel.layout
    total = step_samples(config)
    lines = [f"world size {layout.world_size} = tp * pp * cp * dp"]
    for rank in range(min(layout.world_size, MAX_RANKS_SHOWN)):
        at = layout.coords(rank)
        held = []
        for chunk in range(layout.vpp):
            layers = layout.chunk_layers(shape.num_layers, at.pp, chunk)
            held.append(f"{layers.start}-{layers.stop - 1}" if len(layers) else "none")
        ends = [
            name
            for name, holds in (
                ("embedding", layout.is_first(at.pp, 0)),
                ("output", layout.is_last(at.pp, layout.vpp - 1)),
            )
            if holds
        ]
        share = total // layout.dp + (1 if at.dp < total % layout.dp else 0)
        lines.append(
            f"  rank {rank}: tp={at.tp} cp={at.cp} dp={at.dp} pp={at.pp}  "
            f"layers {', '.join(held)}{' + ' if ends else ''}{' + '.join(ends)}  "
            f"about {share} of {total} samples a step"
        )
    if layout.world_size > MAX_RANKS_SHOWN:
        lines.append(f"  ... and {layout.world_size - MAX_RANKS_SHOWN} more, in the same order")
    return lines


def step_samples(config: RunConfig) -> int:
    """Samples of one training step."""
    if config.stage == "sft":
        return config.warm_start.batch_size
    return config.rollout.prompts_per_step * config.rollout.samples_per_prompt


def stage_parameters(config: RunConfig, shape: ModelShape, pp: int) -> int:
    """Parameters of one rank of pipeline stage `pp` (matrices; norm vectors are left out)."""
    layout = config.parallel.layout
    layers = sum(
        len(layout.chunk_layers(shape.num_layers, pp, chunk)) for chunk in range(layout.vpp)
    )
    count = layers * shape.layer_parameters // layout.tp
    rows = padded_vocab_size(shape.vocab_size, config.model.vocab_pad_multiple, layout.tp)
    embedding = rows * shape.hidden_size // layout.tp
    first, last = layout.is_first(pp, 0), layout.is_last(pp, layout.vpp - 1)
    # Tied weights on one stage are one matrix; on two stages each holds a copy.
    count += embedding * (first + (last and not (shape.tied and first)))
    return count


def estimate(config: RunConfig, shape: ModelShape) -> list[str]:
    """Memory of the worst rank and compute time of a step, line by line."""
    parallel = config.parallel
    counts = [stage_parameters(config, shape, pp) for pp in range(parallel.pp)]
    worst = max(range(parallel.pp), key=counts.__getitem__)
    parameters, width = counts[worst], BYTES[config.model.dtype]
    shards = parallel.dp * parallel.cp if parallel.distributed_optimizer else 1
    # AdamW keeps two fp32 moments, and an fp32 master copy where parameters are not fp32.
    optimizer = parameters * (8 if width == 4 else 12) // shards
    rows = padded_vocab_size(shape.vocab_size, config.model.vocab_pad_multiple, parallel.tp)
    tokens = config.batch.max_tokens_per_microbatch // parallel.cp
    logits = 4 * tokens * rows // parallel.tp if worst == parallel.pp - 1 else 0
    lines = [
        f"pipeline stage {worst} holds most: {parameters:,} parameters a rank "
        f"({shape.architecture}, {shape.num_layers} layers)",
        f"  parameters ({config.model.dtype}): {_size(parameters * width)}",
        f"  gradients (float32): {_size(parameters * 4)}",
        f"  optimizer state{f' / {shards} ranks' if shards > 1 else ''}: {_size(optimizer)}",
    ]
    if logits:
        lines.append(
            f"  fp32 logits of a full micro-batch ({tokens:,} tokens): {_size(logits)} a copy"
        )
    lines.append("  activations: not estimated")
    return [*lines, *_time(config, shape)]


def _time(config: RunConfig, shape: ModelShape) -> list[str]:
    """6 operations a parameter and token, forward and backward; attention is left out."""
    whole = shape.num_layers * shape.layer_parameters + shape.vocab_size * shape.hidden_size
    tokens = step_samples(config) * config.rollout.sampling.max_new_tokens
    gpu = config.cluster.launcher == "slurm" and config.rollout.engine.device != "cpu"
    rate = GPU_BF16_FLOPS if gpu else CPU_CORE_FLOPS
    seconds = 6 * whole * tokens / (rate * config.parallel.world_size)
    what = "GPU at 4e14" if gpu else "core at 2e10"
    lines = [
        f"training compute of a step: about {seconds:.2g} s at most (6 x {whole:,} parameters x "
        f"{tokens:,} response tokens, one {what} operations/s a rank); start-up, attention, "
        "communication and Python come on top"
    ]
    if needs_engines(config):
        lines.append("generation and weight pushes: not estimated")
    return lines


def _size(count: float) -> str:
    """1,536 -> 1.5 KiB"""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
