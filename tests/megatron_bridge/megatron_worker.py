"""What the ranks do with real megatron-core models; started by logits_parity.py."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bridge_models import TOKENS
from logits_cases import Case

MULTIPLE = 8
PEFT_DIR = Path(__file__).with_name("peft_qwen3_untied")


def plant_wrong_rule(which: str) -> None:
    """Replace a rule by a bijection that round-trips just as well, and is wrong."""
    from megatron_bridge import models
    from megatron_bridge.models.architecture import expert_gated, gated, qkv
    from megatron_bridge.views import concat, shard

    if which == "eh_proj":
        plant_swapped_halves()
        return

    def concatenated_then_cut(place: Any, *tensors: Any) -> Any:
        return shard(concat(0, tensors), 0, place.tp, place.tp_rank)

    right = {"qkv": qkv, "gated": gated, "expert_gated": expert_gated}[which]
    for name in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"):
        table = models.ARCHITECTURES[name]
        rows = tuple(
            dataclasses.replace(row, rule=concatenated_then_cut) if row.rule is right else row
            for row in table.rows
        )
        models.ARCHITECTURES[name] = dataclasses.replace(table, rows=rows)


def plant_swapped_halves() -> None:
    """The hidden state's half of eh_proj before the embedding's."""
    from megatron_bridge import models
    from megatron_bridge.models.mtp import PROJECTION
    from megatron_bridge.views import concat, shard, window

    def swapped(place: Any, tensor: Any) -> Any:
        half = tensor.shape[1] // 2
        halves = [window(tensor, 1, start, start + half) for start in (half, 0)]
        return shard(concat(1, halves), 0, place.tp, place.tp_rank)

    table = models.ARCHITECTURES["DeepseekV3ForCausalLM"]
    rows = tuple(
        dataclasses.replace(row, rule=swapped) if row.tensors == (PROJECTION,) else row
        for row in table.rows
    )
    models.ARCHITECTURES["DeepseekV3ForCausalLM"] = dataclasses.replace(table, rows=rows)


def build(
    rank: int, hf_dir: Path, sizes: dict[str, Any], *, mtp: bool = True
) -> tuple[Any, Any, list[Any]]:
    """The layout, its plan and this rank's loaded model chunks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from framework.config import ModelConfig, ParallelConfig
    from framework.megatron.model import build_chunks, transformer_config
    from megatron_bridge.export_plan import ExportPlan
    from megatron_bridge.hf_checkpoint import read_config
    from megatron_bridge.layout import Layout
    from megatron_bridge.load import detect_spec, load_hf
    from megatron_bridge.models.mtp import without_mtp

    tp, pp, vpp, ep, etp = (sizes.get(name, 1) for name in ("tp", "pp", "vpp", "ep", "etp"))
    layout = Layout(**sizes)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    model_parallel_cuda_manual_seed(1)
    config = read_config(hf_dir) if mtp else without_mtp(read_config(hf_dir))
    parallel = ParallelConfig(**sizes)
    model = ModelConfig(hf_path=str(hf_dir), vocab_pad_multiple=MULTIPLE)
    chunks = build_chunks(config, transformer_config(config, model, parallel), MULTIPLE)
    for chunk in chunks:
        for parameter in chunk.parameters():  # nothing may survive from the initialisation
            torch.nn.init.constant_(parameter, float("nan"))
    load_hf(chunks, hf_dir, layout, layout.coords(rank), MULTIPLE, config)
    plan = ExportPlan(
        hf_config=config,
        layout=layout,
        spec=detect_spec(chunks),
        dtype=torch.float32,
        vocab_pad_multiple=MULTIPLE,
        bucket_bytes=50_000,
    )
    return layout, plan, chunks


def forward(rank: int, layout: Any, chunks: list[Any], vocab_size: int) -> torch.Tensor | None:
    """Logits [2, 24, V] of TOKENS on the ranks of the last stage, behind them those of multi-token
    prediction; stages hand over by hand."""
    from megatron.core import parallel_state

    coords = layout.coords(rank)
    positions = torch.arange(TOKENS.shape[1])[None].expand(len(TOKENS), -1)
    logits = None
    with torch.no_grad():
        for stage in range(layout.pp * layout.vpp):
            chunk, pp = divmod(stage, layout.pp)
            if pp != coords.pp:
                continue
            model = chunks[chunk].eval()
            if stage > 0:
                hidden = torch.empty(TOKENS.shape[1], len(TOKENS), model.config.hidden_size)
                dist.recv(hidden, neighbour(layout, coords, (pp - 1) % layout.pp))
                model.set_input_tensor(hidden)
            output = (
                with_mtp(model, positions) if model.mtp_process else model(TOKENS, positions, None)
            )
            if stage < layout.pp * layout.vpp - 1:
                dist.send(output.contiguous(), neighbour(layout, coords, (pp + 1) % layout.pp))
                continue
            group = parallel_state.get_tensor_model_parallel_group()
            parts = [torch.empty_like(output) for _ in range(layout.tp)]
            dist.all_gather(parts, output.contiguous(), group=group)
            logits = torch.cat(parts, -1)[..., :vocab_size]
    return logits


def with_mtp(model: Any, positions: torch.Tensor) -> torch.Tensor:
    """Logits as `save_with_mtp` has them, this rank's part of the vocabulary."""
    hidden: list[torch.Tensor] = []
    hook = model.mtp.register_forward_hook(lambda module, given, output: hidden.append(output))
    logits = [model(TOKENS, positions, None)]
    hook.remove()
    depths = model.config.mtp_num_layers
    for depth, seen in enumerate(hidden[0].chunk(1 + depths)[1:], 1):
        found, _ = model.output_layer(seen)
        logits.append(found.transpose(0, 1)[:, :-depth])
    return torch.cat(logits, dim=1)


def neighbour(layout: Any, coords: Any, pp: int) -> int:
    """The rank at the same place of another stage."""
    return layout.rank(tp=coords.tp, cp=coords.cp, dp=coords.dp, pp=pp)


def run_case(rank: int, root: Path, case: Case) -> dict[str, Any]:
    """Load, compare logits with transformers', export and compare with the file, bit for bit."""
    from safetensors.torch import load_file

    from megatron_bridge.export import ExportBuffers, export_buckets
    from megatron_bridge.mapping import hf_shapes
    from megatron_bridge.table_check import check

    hf_dir = root / case.model
    layout, plan, chunks = build(rank, hf_dir, case.layout, mtp=case.mtp)
    result: dict[str, Any] = {"errors": check(plan.hf_config, layout, MULTIPLE)}
    wanted = torch.load(root / f"{case.model}.logits")
    logits = forward(rank, layout, chunks, wanted.shape[-1])
    if logits is not None:
        wanted = wanted[:, : None if case.mtp else TOKENS.shape[1]]
        result["difference"] = _relative(logits, wanted)
    result["exported"] = 0
    original = load_file(hf_dir / "model.safetensors")
    streamed = sorted(hf_shapes(plan.hf_config))
    dst, buffers = case.dst, ExportBuffers()
    for _ in range(2):  # the second time in the same memory
        names = []
        with export_buckets(plan, chunks, rank, dst, buffers=buffers) as stream:
            for bucket in stream:
                names += bucket.names
                for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                    if not torch.equal(tensor, original[name]):
                        result["errors"].append(f"exported {name} differs from the file")
        if rank == dst and (sorted(names) != streamed or not original.keys() >= {*streamed}):
            result["errors"].append(f"exported {names}")
        result["exported"] = len(names)
    if original.keys() > {*streamed}:
        result["errors"] += save_with_copies(rank, root, case, plan, chunks, original)
    elif original.keys() != {*streamed}:
        result["errors"].append("the file holds other tensors")
    if case.save:
        result |= save(rank, root, hf_dir, plan, chunks)
    if case.convert:
        result["errors"] += load_converted(rank, root, case, plan, chunks)
        result["errors"] += convert_saved(rank, root, case, chunks, original)
    if case.adapter:  # last: the model keeps them
        result |= with_adapters(rank, case, layout, plan, chunks, original)
    return result


def with_adapters(
    rank: int,
    case: Case,
    layout: Any,
    plan: Any,
    chunks: list[Any],
    original: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Adapters that PEFT wrote, beside the weights: how far logits are from PEFT's own, whether the
    same files come back, how far merged weights are from W + alpha / r B A, and whether the base
    comes back bit for bit once they are put aside."""
    from safetensors.torch import load_file

    from framework.megatron.lora import adapters_off, attach_adapters
    from megatron_bridge.adapters import Lora, adapted_linears
    from megatron_bridge.export import export_buckets
    from megatron_bridge.peft_checkpoint import PREFIX, PeftCheckpoint, gather_adapters
    from megatron_bridge.peft_config import WEIGHTS, read_peft_config

    config = read_peft_config(PEFT_DIR)
    lora = Lora(rank=config.rank, alpha=config.alpha, targets=config.targets)
    linears = adapted_linears(plan.model, lora, layout, layout.coords(rank), plan.spec)
    wanted = load_file(PEFT_DIR / "logits.safetensors")["logits"]
    base = forward(rank, layout, chunks, wanted.shape[-1])
    with PeftCheckpoint(PEFT_DIR, plan.model, lora) as found:
        attach_adapters(chunks, linears, lora.scale, found.read)
    result: dict[str, Any] = {}
    logits = forward(rank, layout, chunks, wanted.shape[-1])
    if logits is not None:
        result["adapter_difference"] = _relative(logits, wanted)
    stored = load_file(PEFT_DIR / WEIGHTS)
    gathered = gather_adapters(plan.model, lora, layout, chunks, rank)
    same = all(stored[PREFIX + name].equal(tensor) for name, tensor in gathered.items())
    if rank == 0:
        result["adapter_back"] = same and {PREFIX + name for name in gathered} == stored.keys()
    differences = []
    with export_buckets(plan, chunks, rank) as stream:
        for bucket in stream:
            for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                expected, key = original[name], PREFIX + name.removesuffix(".weight")
                if f"{key}.lora_A.weight" in stored:
                    a, b = (stored[f"{key}.lora_{x}.weight"].double() for x in "AB")
                    expected = expected + config.alpha / config.rank * b @ a
                differences.append((tensor - expected).abs().max().item())
    if rank == 0:
        result["merged_difference"] = max(differences)
    with adapters_off(chunks):
        logits = forward(rank, layout, chunks, wanted.shape[-1])
    if logits is not None:
        assert base is not None
        result["base_difference"] = _relative(logits, wanted)
        result["base_back"] = logits.equal(base)
    return result


def _relative(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((logits - wanted).abs().max() / wanted.abs().max()).item()


def load_converted(rank: int, root: Path, case: Case, plan: Any, chunks: list[Any]) -> list[str]:
    """What `to-megatron` wrote must fill this rank's model as the Hugging Face directory did."""
    from framework.megatron.checkpoint import load_weights
    from megatron_bridge.load import parameters

    held = parameters(chunks)
    before = {key: tensor.clone() for key, tensor in held.items()}
    for tensor in held.values():
        tensor.fill_(float("nan"))
    load_weights(str(root / f"{case.model}.megatron"), chunks, plan.hf_config)
    wrong = [key for key, tensor in parameters(chunks).items() if not tensor.equal(before[key])]
    return [f"rank {rank}: converted {name} of chunk {chunk} differs" for chunk, name in wrong]


def convert_saved(
    rank: int, root: Path, case: Case, chunks: list[Any], original: dict[str, torch.Tensor]
) -> list[str]:
    """`to-hf` of what these ranks save together must be the file that they were loaded from."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from safetensors.torch import load_file

    from framework.megatron.checkpoint import _WriterReport
    from framework.megatron.sharded_state import sharded_model
    from megatron_bridge.conversion import to_hf

    saved = root / f"{case.name}.saved"
    if rank == 0:
        saved.mkdir()
    dist.barrier()
    filesystem_async._results_queue = _WriterReport()  # as CheckpointWriter does
    dist_checkpointing.save({"model": sharded_model(chunks)}, str(saved), async_strategy="mcore")
    if rank:
        return []
    out = root / f"{case.name}.hf"
    to_hf(saved, out, root / case.model, 1 << 30)
    found = load_file(out / "model.safetensors")
    wrong = [
        name
        for name in found.keys() | original.keys()
        if name not in found or name not in original or not found[name].equal(original[name])
    ]
    return [f"{name} of what was saved differs" for name in wrong]


def save_with_copies(
    rank: int,
    root: Path,
    case: Case,
    plan: Any,
    chunks: list[Any],
    original: dict[str, torch.Tensor],
) -> list[str]:
    """A directory saved with multi-token prediction, built or carried, is what it came from."""
    from safetensors.torch import load_file

    from megatron_bridge.save import save_hf

    out = root / f"{case.name}.dir"
    save_hf(plan, chunks, rank, out, root / case.model)
    if rank:
        return []
    found = load_file(out / "model.safetensors")
    errors = [
        f"saved {n} differs" for n in found.keys() & original if not found[n].equal(original[n])
    ]
    errors += [f"saved {name} is not in both" for name in sorted(found.keys() ^ original.keys())]
    if (out / "config.json").read_text() != (root / case.model / "config.json").read_text():
        errors.append("config.json differs")
    return errors


def save(rank: int, root: Path, hf_dir: Path, plan: Any, chunks: list[Any]) -> dict[str, Any]:
    """save_hf, then again where it must fail, and an export that its consumer gives up."""
    from megatron_bridge.export import export_buckets
    from megatron_bridge.save import save_hf

    out, outcome = root / "saved", {}
    save_hf(plan, chunks, rank, out, hf_dir, max_file_bytes=40_000)
    before = sorted(path.name for path in root.iterdir())
    try:
        save_hf(plan, chunks, rank, out, hf_dir)
    except (ValueError, RuntimeError) as error:
        outcome["second_save"] = f"{type(error).__name__}: {error}"
    dist.barrier()
    if rank == 0:
        outcome["left_over"] = [n for n in os.listdir(root) if n not in before]
    with export_buckets(plan, chunks, rank) as stream:
        if rank == 0:
            next(stream)  # and gives up here
        else:
            next(stream, None)
    dist.barrier()
    outcome["survived"] = True
    return outcome
