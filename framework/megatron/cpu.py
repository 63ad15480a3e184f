"""Let the unmodified megatron-core train where there is no CUDA device. A no-op where there is one.

megatron-core 0.19 hard-codes "the current CUDA device" in places. On a host without CUDA those
calls raise; here they get their CPU meaning: the current device is the CPU, streams and events are
in order already, the CUDA generator is the CPU generator. `torch.cuda.is_available()` stays False.

Two replacements change calls that do work on a CPU, and are therefore narrow:
`torch.cuda.manual_seed` (on a CPU host a silent no-op) seeds the CPU generator, and `Tensor.type()`
answers 'torch.cuda.FloatTensor' to callers inside megatron.core.optimizer, which sort by that name.

Each patch says when it can go. All of them hold for megatron-core 0.19.2 only, which is checked.
"""

# Replacing attributes of modules and classes is what this file is for.
# pyright: reportAttributeAccessIssue=false

import collections
import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device as device_context

from framework.megatron.packing import zigzag_positions

MEGATRON_VERSION = "0.19.2"
CPU = torch.device("cpu")
_installed = False


def install() -> None:
    """Patch torch.cuda and megatron-core, once, if this host has no CUDA device.

    Raises:
        RuntimeError: another version of megatron-core is installed, for which nothing is proven.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    found = importlib.metadata.version("megatron-core")
    if found != MEGATRON_VERSION:
        raise RuntimeError(
            f"megatron-core {found} is installed; its CPU support here is proven for "
            f"{MEGATRON_VERSION} only: install megatron-core=={MEGATRON_VERSION}"
        )
    # megatron-core warns at import that apex and Transformer Engine are missing: here they must be.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    _patch_cuda()
    _patch_factories()
    _patch_tensor_type()
    _patch_megatron()
    _installed = True


class _InOrder:
    """A CUDA stream or event on a device where everything runs in program order."""

    cuda_stream, device, priority = 0, CPU, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_InOrder":
        return self

    def __exit__(self, *exc: object) -> bool:
        return False

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def query(self) -> bool:
        return True

    def record_event(self, event: "_InOrder | None" = None) -> "_InOrder":
        return event or _InOrder()

    def elapsed_time(self, other: "_InOrder") -> float:
        return 0.0

    def _ordered(self, *args: Any, **kwargs: Any) -> None:
        return None

    synchronize = wait = record = wait_event = wait_stream = _ordered


def _returning(value: Any) -> Callable[..., Any]:
    # A new function each time: torch._dynamo refuses one object under two of torch's names.
    return lambda *args, **kwargs: value


def _patch_cuda() -> None:
    """torch.cuda's queries and generator. Goes when megatron-core asks for a device abstraction."""
    cuda, stream = torch.cuda, _InOrder()
    cuda.current_device = _returning(CPU)
    cuda.synchronize = _returning(None)
    cuda.set_device = _returning(None)
    cuda.current_stream = cuda.default_stream = _returning(stream)
    cuda.is_current_stream_capturing = _returning(False)
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream = cuda.Event = _InOrder
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _returning(None))
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)


def _on_cpu(device: Any) -> Any:
    """`device`, with any CUDA device replaced by the CPU."""
    if isinstance(device, str) and device.split(":")[0] == "cuda":
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


def _retarget(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory: device="cuda" means the CPU, whose memory is never pinned."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper


def _patch_factories() -> None:
    """Tensor factories and moves given a literal "cuda". Goes with _patch_cuda."""
    # `with torch.device(...)` looks its functions up in a table that is filled at first use: filled
    # with our wrappers it would miss the real ones, and transformers would build wrong tables.
    device_context._device_constructors()
    for name in (
        *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange"),
        *("rand", "randn", "randint", "empty_like", "zeros_like", "ones_like", "full_like"),
    ):
        setattr(torch, name, _retarget(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None
    tensor_to = torch.Tensor.to
    retargeted_to = _retarget(tensor_to)
    torch.Tensor.to = functools.wraps(tensor_to)(
        lambda self, *args, **kwargs: retargeted_to(self, *map(_on_cpu, args), **kwargs)
    )


def _patch_tensor_type() -> None:
    """megatron.core.optimizer sorts parameters by 'torch.cuda.*Tensor'. Goes when it asks dtype."""
    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith("megatron.core.optimizer"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_


def _patch_megatron() -> None:
    """The places inside megatron-core itself."""
    # One MoE module imports triton unconditionally, for GPU kernels. Goes when that is guarded.
    if importlib.util.find_spec("triton") is None:
        name = "megatron.core.transformer.moe.ops.paged_stash"
        stub: Any = types.ModuleType(name)
        stub.GLOBAL_BLOCK_SIZE = stub.paged_stash_copy_kernel = stub.paged_stash_pop_kernel = None
        sys.modules[name] = stub

    # `jit_fuser = torch.compile` is bound at import: compiling would cost minutes on a CPU.
    compile_ = torch.compile
    torch.compile = lambda function=None, **kwargs: function or (lambda f: f)
    try:
        import megatron.core.models.common.embeddings.rope_utils as rope_utils
        import megatron.core.tensor_parallel.mappings as mappings
        import megatron.core.tensor_parallel.random as random
        import megatron.core.transformer.moe.token_dispatcher as dispatcher
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    finally:
        torch.compile = compile_

    # Goes through torch._C and a lazy CUDA initialisation that would never come.
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )
    # "CPU RNG state changed within GPU RNG context": they are the same generator here.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    # All-to-all split sizes must end as numpy arrays; upstream skips tensors already on the CPU.
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    mappings._gather_along_first_dim = _uneven_gather(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _uneven_reduce_scatter(
        mappings._reduce_scatter_along_first_dim
    )
    rope_utils._apply_rotary_pos_emb_thd = _packed_rope(rope_utils)
    _patch_distributed_optimizer(DistributedOptimizer)
    _patch_fsdp()


@functools.lru_cache(maxsize=64)
def _rope_positions(cu_seqlens: tuple[int, ...], cp_size: int, cp_rank: int) -> torch.Tensor:
    """[t / cp] position of every packed token within its own sequence."""
    positions = torch.tensor(zigzag_positions(cu_seqlens, cp_size, cp_rank), dtype=torch.long)
    starts = torch.tensor(cu_seqlens)
    return positions - starts[torch.bucketize(positions, starts, right=True) - 1]


def _packed_rope(rope_utils: Any) -> Callable[..., torch.Tensor]:
    """RoPE of packed sequences in one operation: upstream's unfused path loops over sequences in
    Python, which dominates a step of hundreds of short ones. Same arithmetic, bit for bit. Goes
    when upstream indexes the frequencies instead (its fused path is CUDA only)."""

    def apply(
        t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        group = kwargs.pop("cp_group")
        kwargs.pop("multi_latent_attention", None)
        positions = _rope_positions(tuple(cu_seqlens.tolist()), group.size(), group.rank())
        rotated = rope_utils._apply_rotary_pos_emb_bshd(
            t.unsqueeze(1), freqs[positions], *args, **kwargs
        )
        return rotated.squeeze(1)

    return apply


def _uneven_gather(even: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """All-gather of unequal parts along dim 0: gloo offers that in all-to-all only."""

    def gather(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer=False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        output = input_.new_empty(sum(sizes), *input_.shape[1:])
        inputs = torch.cat([input_] * group.size())
        torch.distributed.all_to_all_single(
            output, inputs, sizes, [len(input_)] * group.size(), group=group
        )
        return output

    return gather


def _uneven_reduce_scatter(even: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Reduce-scatter of unequal parts along dim 0, likewise."""

    def reduce_scatter(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer=False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        rows = sizes[group.rank()]
        parts = input_.new_empty(group.size(), rows, *input_.shape[1:])
        torch.distributed.all_to_all_single(
            parts.flatten(0, 1), input_.contiguous(), [rows] * group.size(), sizes, group=group
        )
        return parts.sum(0)

    return reduce_scatter


def _patch_fsdp() -> None:
    """Megatron-FSDP writes "cuda" into its device mesh and compares its device with one by number.
    Goes when it takes the type from the device that it is given."""
    import megatron.core.distributed.fsdp.mcore_fsdp_adapter as adapter
    import megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp as megatron_fsdp
    from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import (
        AllGatherPipeline,
    )

    class CpuMesh(adapter.DeviceMesh):
        @staticmethod
        def from_group(group: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
            return mesh.from_group(group, "cpu", *args, **kwargs)

    class Torch(types.ModuleType):
        @staticmethod
        def device(spec: Any) -> torch.device:
            return CPU if str(spec).startswith("cuda") else torch.device(spec)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    mesh = adapter.DeviceMesh
    adapter.DeviceMesh = CpuMesh
    megatron_fsdp.torch = Torch("torch")
    # Streams order its gathers and the reuse of their memory; gloo's threads know no streams.
    gather = AllGatherPipeline.all_gather_params
    AllGatherPipeline.all_gather_params = lambda self, *args, **kwargs: gather(
        self, *args, **{**kwargs, "async_param_gather": False}
    )


def _patch_distributed_optimizer(cls: Any) -> None:
    """Loading a checkpoint into torch.optim.AdamW, upstream's fallback without apex or TE.

    Three faults of 0.19.2: it reads `step` from state that AdamW makes only in its first step; it
    expects `step` among the sharded tensors; it gives all parameters one shared `step` tensor.
    Goes when upstream's own test loads a distributed optimizer over torch's AdamW.
    """
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict
    set_states = cls._set_main_param_and_optimizer_states

    def state_dict_(self: Any) -> Any:
        for param in (p for group in self.optimizer.param_groups for p in group["params"]):
            if not self.optimizer.state[param]:
                self.optimizer.state[param].update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(param),
                    exp_avg_sq=torch.zeros_like(param),
                )
        return state_dict(self)

    def set_states_(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        return set_states(self, model_param, collections.defaultdict(lambda: None, tensors))

    def load_state_dict_(self: Any, state: Any) -> None:
        load_state_dict(self, state)
        for each in self.optimizer.state.values():
            each["step"] = each["step"].clone()

    cls.state_dict, cls.load_state_dict = state_dict_, load_state_dict_
    cls._set_main_param_and_optimizer_states = set_states_
