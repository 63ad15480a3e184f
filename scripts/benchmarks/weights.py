"""What weights cost to load, to export and to plan, beside a plain copy of the same bytes.

    python scripts/benchmarks/weights.py [--mb 500] [--root DIR] [--mbridge]

A random Qwen3 in bf16 is loaded into a real megatron-core model (one rank, one thread) and exported
from it, each three times: the best one is in warm buffers, files in the page cache. "memcpy": the
same bytes from one touched buffer to another; "of its copies": the rate beside as many memcpys as
the row's way of the bytes needs (each is read once and written once a copy). Memory: how far the
process grew beyond the model.
"direct": what weight_sync=direct does to the same model for an engine of two ranks, packing and
placing, which are two machines' work, each by itself and one after the other (`weights_direct.py`).
Then plans of large models, from their config.json alone, and what their bytes take at least on
named clusters. --mbridge: the same load and export by mbridge 0.15.1, where it is installed, of the
same megatron-core model (`weights_mbridge.py`); its tensors are compared with the files first.
Needs no GPU; a minute, and on disk the size of the model.
"""

import argparse
import dataclasses
import importlib.metadata
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
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "benchmarks")]

from convert import anonymous_bytes, make_model  # noqa: E402
from weights_direct import direct_actions  # noqa: E402
from weights_plans import print_plans  # noqa: E402

REPEATS = 3
ERRORS = "stderr"


@dataclasses.dataclass
class Timed:
    """Seconds of each repeat, and the most memory that any of them took."""

    seconds: list[float]
    extra_bytes: int
    copies: int = 1
    """How often every byte is read and written, at least."""


def timed(action: Callable[[], None], copies: int = 1) -> Timed:
    """Run `action` REPEATS times."""
    start_bytes, peak, ended = anonymous_bytes(), 0, Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = Thread(target=watch)
    watcher.start()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    ended.set()
    watcher.join()
    return Timed(seconds, max(0, peak - start_bytes), copies)


def copied(size: int) -> Timed:
    """A plain copy of `size` bytes between touched buffers."""
    import torch

    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros(size, dtype=torch.uint8)

    def copy() -> None:
        target.copy_(source)

    return timed(copy)


def start_rank(root: Path) -> None:
    """A process group of one, and megatron's groups in it."""
    import torch
    import torch.distributed as dist

    import framework.megatron  # noqa: F401  # what megatron-core needs where there is no GPU
    from megatron.core import parallel_state  # isort: skip
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    init = f"file://{root / 'store'}"
    dist.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def build(hf_dir: Path) -> tuple[dict[str, Any], list[Any]]:
    """config.json and the megatron-core model, weights not yet loaded."""
    from framework.config import ModelConfig, ParallelConfig
    from framework.megatron.model import build_chunks, transformer_config
    from megatron_bridge.hf_checkpoint import read_config

    config = read_config(hf_dir)
    model = ModelConfig(hf_path=str(hf_dir), dtype="bfloat16")
    return config, build_chunks(config, transformer_config(config, model, ParallelConfig()), 8)


def ours(hf_dir: Path, root: Path, size: int, out: Any) -> None:
    """Load and export by this project; rows into the queue `out`."""
    import torch

    start_rank(root)
    from megatron_bridge.export import ExportBuffers, export_buckets
    from megatron_bridge.export_plan import ExportPlan
    from megatron_bridge.layout import Layout
    from megatron_bridge.load import detect_spec, load_hf

    layout = Layout()
    config, chunks = build(hf_dir)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.zero_()  # the model's own memory is no part of the first load
    plan = ExportPlan(
        hf_config=config,
        layout=layout,
        spec=detect_spec(chunks),
        dtype=torch.bfloat16,
        vocab_pad_multiple=8,
        bucket_bytes=64 << 20,
    )
    buffers = ExportBuffers()

    def export() -> None:
        with export_buckets(plan, chunks, 0, buffers=buffers) as stream:
            assert sum(bucket.flat.nbytes for bucket in stream) == size

    rows = {"memcpy": copied(size)}
    rows["load"] = timed(lambda: load_hf(chunks, hf_dir, layout, layout.coords(0), 8))
    rows["export"] = timed(export)
    actions, over_least = direct_actions(plan, chunks)
    assert over_least == 1.0
    rows |= {name: timed(action, copies) for name, (action, copies) in actions.items()}
    out.put(rows)


def mbridge(hf_dir: Path, root: Path, size: int, out: Any) -> None:
    """The same by mbridge; an error goes to a file under `root`."""
    sys.stderr = (root / ERRORS).open("w")
    start_rank(root)
    from safetensors.torch import load_file
    from weights_mbridge import actions

    truth = {n: t for path in hf_dir.glob("*.safetensors") for n, t in load_file(path).items()}
    todo = actions(hf_dir, build(hf_dir)[1], size, truth)
    out.put({name: timed(action) for name, action in todo.items()})


def in_process(action: Callable[..., None], *arguments: Any) -> dict[str, Timed]:
    """The rows of `action`, run in a process of its own.

    Raises:
        RuntimeError: it ended without any.
    """
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    process = context.Process(target=action, args=(*arguments, out))
    process.start()
    while process.is_alive() and out.empty():
        process.join(0.2)
    if out.empty():
        raise RuntimeError(f"{action.__name__} ended with status {process.exitcode}")
    rows = out.get()
    process.join(30)
    return rows


def print_rows(rows: dict[str, Timed], size: int) -> None:
    """The table of what was measured."""
    copy_rate = size / 1e9 / min(rows["memcpy"].seconds)
    print(f"\n{size / 1e6:.0f} MB, bf16, one rank, one thread\n")
    print("| | first, s | best, s | best, GB/s | of memcpy | of its copies | extra memory |")
    print("|---" * 7 + "|")
    for name, row in rows.items():
        rate = size / 1e9 / min(row.seconds)
        bound = f"{rate * row.copies / copy_rate:.2f} (of {row.copies})"
        print(
            f"| {name} | {row.seconds[0]:.3f} | {min(row.seconds):.3f} | {rate:.2f} "
            f"| {rate / copy_rate:.2f} | {bound} | {row.extra_bytes / 1e6:.0f} MB |"
        )


def print_mbridge(hf_dir: Path, root: Path, size: int, rows: dict[str, Timed]) -> None:
    """The rows of mbridge beside ours, or one that tells its error."""
    root.mkdir()
    try:
        version = importlib.metadata.version("mbridge")
    except importlib.metadata.PackageNotFoundError:
        print("| mbridge | is not installed | | | | | |")
        return
    try:
        theirs = in_process(mbridge, hf_dir, root, size)
    except RuntimeError:
        lines = (root / ERRORS).read_text().splitlines()
        where = [line.strip() for line in lines if "/mbridge/" in line][-1]
        print(f"| mbridge {version} | fails: {lines[-1]} ({where}) | | | | | |")
        return
    named = {name.replace("mbridge", f"mbridge {version}"): row for name, row in theirs.items()}
    print_rows({"memcpy": rows["memcpy"], **named}, size)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Loading, exporting and planning weights")
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--root", type=Path, help="where the model is written and read")
    parser.add_argument("--mbridge", action="store_true", help="beside it mbridge, if there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.root) as directory:
        root = Path(directory)
        size = make_model(root / "hf", arguments.mb)
        rows = in_process(ours, root / "hf", root, size)
        print_rows(rows, size)
        if arguments.mbridge:
            print_mbridge(root / "hf", root / "other", size, rows)
    print_plans()


if __name__ == "__main__":
    main()
