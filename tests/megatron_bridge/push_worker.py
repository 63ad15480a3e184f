"""Pushes a Hugging Face directory through a real megatron-core model to engines that run.

    python push_worker.py HF_DIR URL ENGINE_TP DTYPE SCRATCH_DIR TRANSPORT...

Started by tests: a process group of one rank, and what it leaves, end with the process. The
engine's key is in the environment (ENGINE_KEY). Each push but the first is of weights GROWTH times
as large, and waits for a line on stdin; after each a line of JSON, its report.
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from megatron_worker import build

from framework.weight_sync import WeightSync
from framework.weight_sync.base import PushContext
from framework.weight_sync.engines import Engines
from megatron_bridge.export import ExportBuffers
from megatron_bridge.load import parameters

GROWTH = 1.0625
"""Both sides multiply in float32, and so round alike."""


def push_all(
    hf_dir: Path, url: str, engine_tp: int, dtype: torch.dtype, scratch: Path, transports: list[str]
) -> None:
    """Load in float32, push as version 1, 2, ... in the engine's type, compare every checksum."""
    _, plan, chunks = build(0, hf_dir, {})
    plan = dataclasses.replace(plan, bucket_bytes=64 << 20, dtype=dtype)
    context = PushContext(
        plan=plan,
        chunks=chunks,
        buffers=ExportBuffers(),
        rank=0,
        engine_tp=engine_tp,
        engine_device="cpu",
        engine_dtype=dtype,
        host="127.0.0.1",
        scratch_dir=scratch,
        like=hf_dir,
        flush_cache=True,
    )
    for version, transport in enumerate(transports, 1):
        if version > 1:
            sys.stdin.readline()
            with torch.no_grad():
                for parameter in parameters(chunks).values():
                    parameter.mul_(GROWTH)
        engines = Engines([url], os.environ["ENGINE_KEY"], 300.0)
        sync = WeightSync(transport, context, engines, pause_mode="retract", verify=True)
        report = sync.push(version)
        sync.close()
        print(json.dumps(dataclasses.asdict(report)), flush=True)


def main() -> None:
    """Entry point."""
    hf_dir, url, engine_tp, dtype, scratch, *transports = sys.argv[1:]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        kind = getattr(torch, dtype)
        push_all(Path(hf_dir), url, int(engine_tp), kind, Path(scratch), transports)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
