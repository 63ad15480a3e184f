"""SGLang on a CPU through its own plugin entry points: a platform, and hooks. No file is patched.

`activate` (group sglang.srt.platforms) and `register` (group sglang.srt.plugins) are named in
pyproject.toml and called by SGLang in each of its processes. With CUDA both do nothing.

SGLang logs a plugin's failure and goes on without it; `check_hooks` turns that into an error.
Delete a hook when SGLang supports device=cpu there itself; the version below is what was read.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from rollout.server import cpu_invariant

SGLANG_VERSION = "0.5.23"


def activate() -> str | None:
    """The platform's class path, or None where there is CUDA."""
    if torch.cuda.is_available():
        return None
    return "rollout.server.cpu_platform:CpuNativePlatform"


def register() -> None:
    """Hooks for deterministic inference, whose kernels are Triton's upstream, and for sleep."""
    if torch.cuda.is_available():
        return
    installed = importlib.metadata.version("sglang")
    if installed != SGLANG_VERSION:
        raise RuntimeError(
            f"sglang {installed} is installed; this plugin was written for {SGLANG_VERSION}: "
            f"check its hooks against the new version, then change SGLANG_VERSION"
        )
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    # Asked for by absorbed latent attention (MLA), which reads its cache as attention does.
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    for target, (kind, hook) in _hooks().items():
        HookRegistry.register(target, hook, HookType(kind))


def _hooks() -> dict[str, tuple[str, Callable]]:
    """What is hooked: (HookType, ours) by the dotted name of SGLang's own."""
    from rollout.server import cpu_attention, cpu_memory, cpu_sampling

    attention = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    updater = "sglang.srt.managers.scheduler_components.weight_updater"
    manager = f"{updater}.SchedulerWeightUpdaterManager"
    host = "sglang.srt.mem_cache.pool_host.common"
    sampler = "sglang.srt.layers.sampler"
    return {
        f"{runner}.maybe_enable_batch_invariant_mode": ("replace", _enable_batch_invariant_mode),
        f"{attention}._run_sdpa_forward_decode": ("around", cpu_attention.run_decode),
        f"{attention}._run_sdpa_forward_extend": ("around", cpu_attention.run_extend),
        f"{manager}.release_memory_occupation": ("after", cpu_memory.release),
        f"{manager}.resume_memory_occupation": ("before", cpu_memory.resume),
        f"{host}._cuda_host_register": ("replace", cpu_memory.register),
        f"{sampler}.murmur_hash32": ("replace", cpu_sampling.murmur_hash32),
        f"{sampler}.top_k_top_p_min_p_sampling_from_probs_torch": (
            "around",
            cpu_sampling.draw_by_id,
        ),
    }


def _enable_batch_invariant_mode(model_runner: Any) -> None:
    """Called once by every model runner, before it computes anything."""
    from sglang.srt.runtime_context import get_exec

    if get_exec().deterministic.enable_deterministic_inference:
        cpu_invariant.enable()


def check_hooks() -> None:
    """Raise when SGLang did not apply a hook (it only logs that)."""
    if torch.cuda.is_available():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry

    if missing := sorted(set(_hooks()) - HookRegistry._patched):
        raise RuntimeError(f"SGLang did not apply the CPU hooks {missing}; see its log above")
