"""SGLang on a CPU through its own plugin entry points: a platform, and hooks. No file is patched.

`activate` (group sglang.srt.platforms) and `register` (group sglang.srt.plugins) are named in
pyproject.toml and called by SGLang in each of its processes. With CUDA both do nothing.

SGLang logs a plugin's failure and goes on without it; `check_hooks` turns that into an error.
Delete a hook when SGLang supports device=cpu there itself; the version below is what was read.
"""

import importlib.metadata

import torch

SGLANG_VERSION = "0.5.23"


def activate() -> str | None:
    """The platform's class path, or None where there is CUDA."""
    if torch.cuda.is_available():
        return None
    return "rollout.server.cpu_platform:CpuNativePlatform"


def register() -> None:
    """Hooks for deterministic inference, whose kernels are Triton's upstream."""
    if torch.cuda.is_available():
        return
    installed = importlib.metadata.version("sglang")
    if installed != SGLANG_VERSION:
        raise RuntimeError(
            f"sglang {installed} is installed; this plugin was written for {SGLANG_VERSION}: "
            f"check its hooks against the new version, then change SGLANG_VERSION"
        )
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_deterministic_attention_backend_choices(["torch_native"])
    for target, replacement in _replacements().items():
        HookRegistry.register(target, replacement, HookType.REPLACE)


def _replacements() -> dict:
    from rollout.server import cpu_deterministic

    return {
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode": (
            cpu_deterministic.enable_batch_invariant_mode
        ),
        "sglang.srt.layers.sampler.murmur_hash32": cpu_deterministic.murmur_hash32,
    }


def check_hooks() -> None:
    """Raise when SGLang did not apply a hook (it only logs that)."""
    if torch.cuda.is_available():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry

    if missing := sorted(set(_replacements()) - HookRegistry._patched):
        raise RuntimeError(f"SGLang did not apply the CPU hooks {missing}; see its log above")
