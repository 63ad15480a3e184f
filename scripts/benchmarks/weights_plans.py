"""Plans of large models, from their config.json alone, for scripts/benchmarks/weights.py."""

import json
import time
from pathlib import Path

from weights_direct import plan_direct

CONFIGS = Path(__file__).resolve().parents[2] / "hydra_configs" / "model" / "hf_configs"
PLANNED = {
    "qwen3_30b_a3b": ({"tp": 2, "ep": 8, "dp": 8}, 2, 4),
    "qwen3_235b_a22b": ({"tp": 4, "pp": 2, "ep": 8, "dp": 8}, 8, 4),
    "deepseek_v3": (
        {"tp": 4, "pp": 8, "first_stage_layers": 7, "last_stage_layers": 6, "ep": 32, "dp": 8},
        16,
        8,
    ),
}
"""Model -> layout of the trainers, tensor-parallel size of an engine, engines."""


def print_plans() -> None:
    """Time to plan an export, bytes over least bytes, and what the bytes take at least."""
    import torch

    from framework.gpus import GPUS
    from megatron_bridge.export_plan import ExportPlan
    from megatron_bridge.layout import Layout
    from megatron_bridge.models.architecture import Spec

    names = list(GPUS)
    print("\nPlans of an export, and seconds at a network card's full speed: assembled and sent by")
    print(
        "one rank / sent shard to shard, every engine rank taking its own part (a lower bound).\n"
    )
    print(f"| model | ranks | GB | plan, s | plan, CPU s | sent / least | {' | '.join(names)} |")
    print("|---" * (6 + len(names)) + "|")
    direct = []
    for name, (sizes, engine_tp, num_engines) in PLANNED.items():
        path = CONFIGS / name / "config.json"
        layout = Layout(**sizes)
        started, wall = time.process_time(), time.perf_counter()
        plan = ExportPlan(
            hf_config=json.loads(path.read_text()),
            layout=layout,
            spec=Spec.TE,
            dtype=torch.bfloat16,
            vocab_pad_multiple=128,
            bucket_bytes=256 << 20,
        )
        buckets = plan.buckets
        seconds, wall = time.process_time() - started, time.perf_counter() - wall
        least = sum(bucket.size_bytes for bucket in buckets)
        sent = sum(
            piece.box.numel * bucket.dtype.itemsize
            for bucket in buckets
            for pieces in bucket.pieces.values()
            for piece in pieces
        )
        bounds = [least / GPUS[gpu].network_bytes_per_s for gpu in names]
        shown = " | ".join(f"{bound:.1f} / {bound / engine_tp:.2f}" for bound in bounds)
        print(
            f"| {name} | {layout.world_size} | {least / 1e9:.0f} | {wall:.2f} | {seconds:.2f} "
            f"| {sent / least:.2f} | {shown} |"
        )
        planned = plan_direct(plan, engine_tp, num_engines)
        direct.append(
            f"| {name} | {layout.world_size} to {num_engines} x {engine_tp} "
            f"| {planned.num_transfers:,} | {planned.wall_s:.2f} | {planned.plan_s:.2f} "
            f"| {planned.orders_s:.2f} | {planned.sent_over_least:.2f} |"
        )
    print(
        "\nPlans of weight_sync=direct: of one rank, with all that it sends; then, on rank 0 alone,"
    )
    print("what every engine rank must know.\n")
    print(
        "| model | trainers to engines | transfers | both, s | plan, CPU s | orders, CPU s "
        "| sent / least |"
    )
    print("|---" * 7 + "|", *direct, sep="\n")
