"""SGLang's release and resume of memory on a CPU, where torch_memory_saver does not exist.

On a GPU the server frees weights and caches when told to sleep (`--enable-memory-saver`). Here the
same two requests free the host memory under the same tensors, which get new memory, zeroed, when it
wakes. Delete when SGLang's own saver knows the CPU.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch

WEIGHTS, CACHE = "weights", "kv_cache"
_CACHE_BUFFERS = ("k_buffer", "v_buffer", "kv_buffer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lay, to lie there again in new memory."""

    tensor: torch.Tensor
    storage: int
    """What tensors of the same memory have in common."""
    num_bytes: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


_released: dict[str, list[_Place]] = {}
"""By tag, while it sleeps."""


def release(result: Any, manager: Any, request: Any) -> None:
    """After SchedulerWeightUpdaterManager.release_memory_occupation, which has checked all else."""
    for tag in request.tags or (WEIGHTS, CACHE):
        if tag not in (WEIGHTS, CACHE) or tag in _released:
            continue
        places = [_place(tensor) for tensor in _tensors(manager, tag)]
        _released[tag] = places
        with torch.no_grad():
            for place in places:
                place.tensor.set_(torch.UntypedStorage(0), 0, (0,), (1,))
        sizes = {place.storage: place.num_bytes for place in places}
        logger.info("released %s: %d bytes", tag, sum(sizes.values()))


def resume(manager: Any, request: Any) -> None:
    """Before SchedulerWeightUpdaterManager.resume_memory_occupation, which copies buffers back."""
    for tag in request.tags or (WEIGHTS, CACHE):
        storages: dict[int, torch.Tensor] = {}
        for place in _released.pop(tag, ()):
            if place.storage not in storages:
                # No rest of anything: masked attention multiplies what it masks by zero.
                storages[place.storage] = torch.zeros(place.num_bytes, dtype=torch.uint8)
            storage = storages[place.storage].untyped_storage()
            with torch.no_grad():
                place.tensor.set_(storage, place.offset, place.size, place.stride)


def register(buffer: torch.Tensor, granularity_bytes: int | None = None) -> None:
    """In place of pinning a host buffer (that of routed experts): there is no device to copy to."""


def _place(tensor: torch.Tensor) -> _Place:
    storage = tensor.untyped_storage()
    return _Place(
        tensor,
        storage.data_ptr(),
        storage.nbytes(),
        int(tensor.storage_offset()),
        tensor.size(),
        tensor.stride(),
    )


def _tensors(manager: Any, tag: str) -> list[torch.Tensor]:
    runner = manager.tp_worker.model_runner
    if tag == WEIGHTS:
        return list(runner.model.parameters())
    pool = runner.token_to_kv_pool
    buffers = [getattr(pool, name, None) or () for name in _CACHE_BUFFERS]
    tensors = [tensor for buffer in buffers for tensor in buffer]
    if not tensors:
        raise RuntimeError(f"{type(pool).__name__}: no cache that could be released on a CPU")
    return tensors
