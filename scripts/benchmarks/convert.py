"""drivetrain-convert beside a plain copy of the same bytes: GB/s, and how much memory it takes.

    python scripts/benchmarks/convert.py [--mb 500] [--root DIR]

Makes a random Qwen3 in bf16 and runs every command in a process of its own. "Copied": the same
bytes read and written in pieces of 1 MiB and synced, as the converter's are. Memory: how far the
process grew from its start (imports done) to its largest; pages that merely map a file aside. Needs
no GPU; a minute and 4 x the model's size on disk.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PIECE_BYTES = 1 << 20


def make_model(path: Path, size_mb: int) -> int:
    """A Qwen3 of about `size_mb` in bf16; its bytes."""
    import torch
    from safetensors.torch import save_file

    from megatron_bridge.mapping import hf_shapes

    hidden = 1024
    layer = 2 * (hidden * 128 * (16 + 8 + 8 + 16) + 3 * hidden * 3072)
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 32_001,  # padded in Megatron
        "hidden_size": hidden,
        "intermediate_size": 3072,
        "num_hidden_layers": max(2, round((size_mb * 1e6 - 2 * 32_001 * hidden) / layer)),
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    tensors = {
        name: torch.randint(-30000, 30000, shape, dtype=torch.int16).view(torch.bfloat16)
        for name, shape in hf_shapes(config).items()
    }
    save_file(tensors, path / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def copy(source: Path, target: Path) -> None:
    """Every byte of a directory's large files, synced."""
    target.mkdir()
    for file in source.glob("*.safetensors"):
        with file.open("rb") as reader, (target / file.name).open("wb") as writer:
            while piece := reader.read(PIECE_BYTES):
                writer.write(piece)
            writer.flush()
            os.fsync(writer.fileno())


def convert(*arguments: Any) -> None:
    """One command of drivetrain-convert."""
    from megatron_bridge.convert import main

    if status := main([str(each) for each in arguments]):
        sys.exit(status)


def anonymous_bytes() -> int:
    """Memory of this process that maps no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def measured(action: Callable[..., None], arguments: tuple[Any, ...], out: Any) -> None:
    """Seconds of `action` and how far memory grew meanwhile, into the queue `out`."""
    import torch

    from megatron_bridge import conversion, verify  # noqa: F401

    torch.set_num_threads(1)
    start_bytes, peak, ended = anonymous_bytes(), 0, Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    action(*arguments)
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    out.put((seconds, max(0, peak - start_bytes)))


def measure(action: Callable[..., None], *arguments: Any) -> tuple[float, int]:
    """The same in a fresh process."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=measured, args=(action, arguments, out))
    process.start()
    result = out.get(timeout=1800)
    process.join(60)
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--root", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.root) as directory:
        root = Path(directory)
        hf, megatron = root / "hf", root / "megatron"
        size = make_model(hf, arguments.mb)
        rows = {
            "copied": measure(copy, hf, root / "copy"),
            "to-megatron": measure(convert, "to-megatron", hf, megatron),
            "to-hf": measure(convert, "to-hf", megatron, root / "back", "--like", hf),
            "verify --tp 2 --pp 2": measure(
                convert, "verify", hf, "--tp", 2, "--pp", 2, "--spec", "te"
            ),
            "copied again": measure(copy, hf, root / "copy_again"),
        }
    print(f"\n{size / 1e6:.0f} MB, bf16, one thread\n")
    print("| | seconds | GB/s | memory | of the model |\n|---|---|---|---|---|")
    for name, (seconds, memory) in rows.items():
        print(
            f"| {name} | {seconds:.2f} | {size / 1e9 / seconds:.2f} | {memory / 1e6:.0f} MB "
            f"| {100 * memory / size:.0f} % |"
        )


if __name__ == "__main__":
    main()
