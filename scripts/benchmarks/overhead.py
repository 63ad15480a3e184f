"""A trainer step of ours beside a bare megatron-core loop on the same batches, in turns.

    python scripts/benchmarks/overhead.py [--steps 12]

One process, one rank, fp32. Ours: the whole `Trainer.train_step` (plan, fetch, advantages, packing,
log-probs and entropy, GRPO, figures of the step). Bare: megatron-core's schedule and optimizer on
the micro-batches packed beforehand, with its own cross entropy weighted by advantage, no entropy,
no figures. The goal is 5 %. Needs no GPU; three minutes.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "benchmarks")]

# pyright: reportMissingImports=false
from memory import make_config, write_inputs  # noqa: E402
from step import megatron_step, prepare  # noqa: E402

# layers, hidden, feed-forward, heads, KV heads, vocabulary, tokens of a step
MODELS = {
    "0.1 M parameters, 2,048 tokens": (2, 64, 192, 4, 2, 72, 2048),
    "5 M parameters, 2,048 tokens": (4, 256, 704, 4, 4, 2048, 2048),
    "23 M parameters, 1,024 tokens": (8, 448, 1216, 7, 7, 4096, 1024),
}


def measure(model: tuple[int, ...], steps: int) -> list[tuple[float, float]]:
    """(seconds of ours, seconds of the bare loop) for each step after two warm-up steps."""
    from framework.megatron.parallel import start_mesh, stop_mesh
    from framework.train import build_models
    from framework.trainer import Trainer
    from rollout.source import JournalSource

    pairs = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_inputs(model, root, steps + 2)
        config = make_config(model[-1], root, steps=steps + 2)
        mesh = start_mesh(config.parallel, config.seed)
        policy, _ = build_models(config, mesh, None)
        source = JournalSource(root / "rollouts")
        trainer = Trainer(
            config=config, mesh=mesh, policy=policy, source=source, sync=None, logger=None
        )
        for step in range(steps + 2):
            batch = source.take(step)
            packed = prepare(trainer, batch)
            pair = [0.0, 0.0]
            for which in (0, 1) if step % 2 else (1, 0):
                start = time.perf_counter()
                if which == 0:
                    trainer.train_step(batch)
                else:
                    megatron_step(policy, packed, config.optimizer.lr)
                pair[which] = time.perf_counter() - start
            if step >= 2:
                pairs.append((pair[0], pair[1]))
        stop_mesh()
    return pairs


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A trainer step beside a bare megatron-core loop")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    for name, model in MODELS.items():
        pairs = measure(model, arguments.steps)
        ratios = sorted(ours / bare for ours, bare in pairs)
        low, middle, high = statistics.quantiles(ratios, n=4)
        ours, bare = (statistics.median(each) for each in zip(*pairs, strict=True))
        print(
            f"{name}: ours {ours:.3f} s, bare {bare:.3f} s a step; overhead {middle - 1:+.1%} "
            f"(quartiles {low - 1:+.1%} to {high - 1:+.1%}, {len(pairs)} pairs)",
            flush=True,
        )


if __name__ == "__main__":
    main()
