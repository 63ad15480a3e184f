"""Memory of a trainer rank on this machine: what dry_run estimates beside what it really took.

    python scripts/benchmarks/memory.py [--recompute none|full]

Three models, each in a process of its own: one rank, fp32, full micro-batches of random tokens, two
steps of GRPO. Measured: growth of the resident set from before the model is built to its peak, with
glibc's mmap threshold fixed, so that a freed tensor is gone: with its default a CPU rank's resident
set is up to a quarter larger by fragments. The goal is 15 %. Needs no GPU; three minutes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# layers, hidden, feed-forward, heads, KV heads, vocabulary, tokens of a micro-batch
MODELS = {
    "wide": (4, 768, 2048, 12, 4, 4096, 4096),
    "deep": (12, 384, 1024, 6, 2, 4096, 4096),
    "vocabulary": (4, 512, 1408, 8, 8, 16384, 2048),
}
SAMPLES, PROMPT = 16, 16


def make_config(tokens: int, root: Path, recompute: str = "none", steps: int = 2):
    """The run of a model with micro-batches of `tokens`: mode=train_only, one rank."""
    from framework.config import (
        BatchConfig,
        GateConfig,
        MemoryConfig,
        ModelConfig,
        RunConfig,
    )
    from rollout.config import RolloutConfig, SamplingConfig

    return RunConfig(
        mode="train_only",
        num_steps=steps,
        model=ModelConfig(hf_path=str(root / "model")),
        memory=MemoryConfig(recompute=recompute),
        batch=BatchConfig(max_tokens_per_microbatch=tokens),
        rollout=RolloutConfig(
            prompts_per_step=1,
            samples_per_prompt=SAMPLES,
            sampling=SamplingConfig(max_new_tokens=tokens // SAMPLES - PROMPT),
        ),
        gate=GateConfig(enabled=False),
    )


def write_inputs(model: tuple[int, ...], root: Path, steps: int = 2) -> None:
    """A model without weights worth the name, and a journal whose batches fill a micro-batch."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from megatron_bridge.mapping import hf_shapes
    from rollout.batch import make_batch
    from rollout.journal import write_step
    from rollout.types import Group, Sample

    layers, hidden, ffn, heads, kv_heads, vocab, tokens = model
    values = {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(json.dumps(values))
    tensors = {key: torch.randn(shape) * 0.02 for key, shape in hf_shapes(values).items()}
    save_file(tensors, root / "model" / "model.safetensors")
    (root / "rollouts").mkdir()
    random = np.random.default_rng(0)
    length = tokens // SAMPLES
    for step in range(steps):
        samples = [
            Sample(
                group_id=step,
                index=i,
                tokens=random.integers(0, vocab, length).astype(np.int32),
                prompt_length=PROMPT,
                loss_mask=np.ones(length - PROMPT, dtype=np.uint8),
                rollout_logprobs=np.full(length - PROMPT, -8.0, dtype=np.float32),
                versions=np.full(length - PROMPT, step, dtype=np.int32),
                turn_starts=np.zeros(1, dtype=np.int32),
                reward=float(i % 2),
            )
            for i in range(SAMPLES)
        ]
        group = Group(group_id=step, start_version=step, samples=samples)
        write_step(root / "rollouts", *make_batch(step, [group], generate_time_s=1.0))


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def train(name: str, root: Path, recompute: str) -> None:
    """In a process of its own: train, print the growth."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29581")
    from framework.megatron.parallel import start_mesh, stop_mesh
    from framework.train import build_models
    from framework.trainer import Trainer
    from rollout.source import JournalSource

    config = make_config(MODELS[name][-1], root, recompute)
    mesh = start_mesh(config.parallel, config.seed)
    before = resident_bytes()
    policy, _ = build_models(config, mesh, None)
    source = JournalSource(root / "rollouts")
    Trainer(config=config, mesh=mesh, policy=policy, source=source, sync=None, logger=None).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stop_mesh()
    print(f"growth {peak - before}")


def main() -> int:
    """Measure each model; exit status 1 where an estimate is off by more than 15 %."""
    parser = argparse.ArgumentParser(description="Memory of a trainer rank, estimated and measured")
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train(arguments.child[0], Path(arguments.child[1]), arguments.recompute)
        return 0
    from framework.plan.memory import memory_lines, worst_rank
    from framework.plan.stages import model_values, read_stages

    worst_error = 0.0
    for name in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            write_inputs(MODELS[name], root)
            config = make_config(MODELS[name][-1], root, arguments.recompute)
            values = model_values(config)
            estimate = worst_rank(config, values, read_stages(config, values), torch_spec=True)
            command = [sys.executable, __file__, "--recompute", arguments.recompute]
            done = subprocess.run(
                [*command, "--child", name, directory],
                capture_output=True,
                text=True,
                timeout=300,
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"},
                check=False,
            )
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return 1
        measured = int(done.stdout.split("growth ")[-1])
        error = estimate.total / measured - 1
        worst_error = max(worst_error, abs(error))
        print(f"## {name}: {MODELS[name]}", *memory_lines(config, estimate), sep="\n")
        print(f"  measured: {measured / 2**20:,.1f} MiB; the estimate is off by {error:+.1%}\n")
    return int(worst_error > 0.15)


if __name__ == "__main__":
    sys.exit(main())
