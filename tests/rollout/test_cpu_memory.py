"""An engine's weights and cache on a CPU: freed when it sleeps, there again when it wakes."""

from types import SimpleNamespace

import pytest
import torch

from rollout.server import cpu_memory


def make_manager():
    """Two parameters that share memory, and one layer of a cache."""
    whole = torch.randn(10, 4)
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(whole[:6], requires_grad=False)
    model.b = torch.nn.Parameter(whole[6:].t(), requires_grad=False)
    pool = SimpleNamespace(k_buffer=[torch.ones(3, 2)], v_buffer=[torch.ones(3, 2)])
    runner = SimpleNamespace(model=model, token_to_kv_pool=pool)
    return SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner)), model, pool


def test_asleep_nothing_is_held_and_awake_every_view_is_as_it_was():
    manager, model, pool = make_manager()
    everything = SimpleNamespace(tags=None)
    cpu_memory.release(None, manager, everything)
    cpu_memory.release(None, manager, everything)  # asked twice is asked once
    tensors = [model.a, model.b, *pool.k_buffer, *pool.v_buffer]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0

    cpu_memory.resume(manager, SimpleNamespace(tags=["weights"]))
    assert (model.a.shape, model.b.shape, model.b.stride()) == ((6, 4), (4, 4), (1, 4))
    assert model.a.untyped_storage().data_ptr() == model.b.untyped_storage().data_ptr()
    model.b.fill_(2.0)
    assert not model.a.any()
    assert not pool.k_buffer[0].numel()

    cpu_memory.resume(manager, SimpleNamespace(tags=["kv_cache", "cuda_graph"]))
    assert pool.k_buffer[0].tolist() == [[0.0, 0.0]] * 3


def test_a_cache_of_another_kind_is_not_taken_for_released():
    manager, _, pool = make_manager()
    del pool.k_buffer, pool.v_buffer
    with pytest.raises(RuntimeError, match="SimpleNamespace: no cache that could be released"):
        cpu_memory.release(None, manager, SimpleNamespace(tags=["kv_cache"]))
