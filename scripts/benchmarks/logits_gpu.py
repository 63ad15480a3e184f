"""Logits of every architecture on this machine's device, beside transformers' in fp32.

    python scripts/benchmarks/logits_gpu.py [--json FILE] [MODEL ...]

One process. With Transformer Engine it is the spec that runs on GPUs and nowhere else; without a
GPU it is row `tp1` of logits.py. Each model is also exported and compared with its file, bit for
bit. fp32 is bounded as in logits.py, with room for another order of sums; bf16 is not judged: near
a tie it routes a token to another expert. Exit status 1 when fp32 or an export is off.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "megatron_bridge")]

# Before CUDA starts, as train.py does: Transformer Engine would multiply fp32 in TF32.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

import torch  # noqa: E402

# pyright: reportMissingImports=false
from bridge_models import MODELS, TOKENS, create_model  # noqa: E402

import framework.megatron  # noqa: E402, F401 - prepares megatron-core for this machine
from framework.config import ModelConfig, ParallelConfig  # noqa: E402
from framework.megatron.model import DTYPES, build_chunks, transformer_config  # noqa: E402
from framework.megatron.parallel import start_mesh, stop_mesh  # noqa: E402
from megatron_bridge.export import export_buckets  # noqa: E402
from megatron_bridge.export_plan import ExportPlan  # noqa: E402
from megatron_bridge.hf_checkpoint import read_config  # noqa: E402
from megatron_bridge.layout import Layout  # noqa: E402
from megatron_bridge.load import detect_spec, load_hf  # noqa: E402

BOUND = 4e-6
MULTIPLE = 8
LAYOUT = Layout()


def measure(hf_dir: Path, wanted: torch.Tensor, dtype: str) -> dict[str, Any]:
    """One model in one type: how far its logits are off, and tensors not exported alike."""
    from safetensors.torch import load_file

    config = read_config(hf_dir)
    model = ModelConfig(hf_path=str(hf_dir), vocab_pad_multiple=MULTIPLE, dtype=dtype)
    (chunk,) = build_chunks(config, transformer_config(config, model, ParallelConfig()), MULTIPLE)
    chunk = chunk.to(DTYPES[dtype])
    load_hf([chunk], hf_dir, LAYOUT, LAYOUT.coords(0), MULTIPLE)
    device = next(chunk.parameters()).device
    positions = torch.arange(TOKENS.shape[1], device=device)[None].expand(len(TOKENS), -1)
    with torch.no_grad():
        logits = chunk.eval()(TOKENS.to(device), positions, None)
    logits = logits[..., : wanted.shape[-1]].float().cpu()
    row: dict[str, Any] = {
        "spec": detect_spec([chunk]),
        "difference": ((logits - wanted).abs().max() / wanted.abs().max()).item(),
    }
    if dtype == "float32":
        row["differing"] = differing(chunk, config, load_file(hf_dir / "model.safetensors"))
    return row


def differing(chunk: Any, config: dict[str, Any], original: dict[str, torch.Tensor]) -> list[str]:
    """Tensors whose export is not, bit for bit, the one of the file."""
    plan = ExportPlan(
        hf_config=config,
        layout=LAYOUT,
        spec=detect_spec([chunk]),
        dtype=torch.float32,
        vocab_pad_multiple=MULTIPLE,
        bucket_bytes=50_000,
    )
    wrong, seen = [], set()
    with export_buckets(plan, [chunk], 0) as stream:
        for bucket in stream:
            for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                seen.add(name)
                if not torch.equal(tensor.cpu(), original[name]):
                    wrong.append(name)
    return wrong + sorted(original.keys() - seen)


def main() -> int:
    """Measure the models that the command line names."""
    parser = argparse.ArgumentParser(description="How far each model's logits are off, here")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"no model is named {', '.join(sorted(unknown))}")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(rank, MASTER_PORT="0")
    mesh = start_mesh(ParallelConfig(), seed=1)
    print(f"{mesh.device}, torch {torch.__version__}; relative, bound {BOUND:g} in fp32.\n")
    print("| model | spec | fp32 | exported | bf16 |\n|---|---|---|---|---|", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as root:
        # Layers that predict later tokens have no place in this table; rows of logits.py have them.
        for name in arguments.models or (each for each in MODELS if not each.endswith("_mtp")):
            wanted = create_model(name, Path(root, name))
            row = {"model": name, **measure(Path(root, name), wanted, "float32")}
            row["bf16"] = measure(Path(root, name), wanted, "bfloat16")["difference"]
            row["right"] = row["difference"] <= BOUND and not row["differing"]
            rows.append(row)
            exported = ", ".join(row["differing"]) or "bit for bit"
            print(
                f"| {name} | {row['spec']} | {row['difference']:.1e} | {exported} "
                f"| {row['bf16']:.0e} |",
                flush=True,
            )
    stop_mesh()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
