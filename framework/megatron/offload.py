"""A trainer rank without its device memory, while the engines have their turn on the device."""

from collections.abc import Iterator
from typing import Any

import torch

from framework.megatron.model import Policy


class Offload:
    """Moves the state of models to the host and back, storage by storage: views stay views.

    Parameters, the optimizer's master copies and its moments are kept, in pinned memory that all
    turns reuse; gradients are dropped, for every update begins with zeros. On a CPU, where the
    state is on the host already, only the gradients are freed.
    """

    def __init__(self, *policies: Policy, everything: bool | None = None) -> None:
        """everything: move also what is on the host already (a test's way to see it on a CPU)."""
        self._policies = policies
        self._everything = bool(everything)
        self._host: dict[int, torch.Tensor] = {}
        self._away: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self.is_away = False

    def away(self) -> None:
        """Free the device memory; the state must not be touched until `back`."""
        if self.is_away:
            return
        self.is_away = True
        for storage in self._storages():
            held = self._held(storage)
            held.copy_(_bytes(storage), non_blocking=True)
            self._away.append((storage, held))
        _synchronize()
        for storage, _ in self._away:
            storage.resize_(0)
        for model in self._wrapped():
            model.offload_grad_buffers(synchronize=False, empty_cache=False)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def back(self) -> None:
        """Everything where it was, to the bit."""
        if not self.is_away:
            return
        self.is_away = False
        for storage, held in self._away:
            storage.resize_(held.numel())
            _bytes(storage).copy_(held, non_blocking=True)
        self._away.clear()
        for model in self._wrapped():
            model.restore_grad_buffers(synchronize=False)
        _synchronize()

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        seen: set[int] = set()
        for tensor in self._state():
            storage = tensor.untyped_storage()
            here = tensor.is_cuda or self._everything
            if here and storage.nbytes() and storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage

    def _wrapped(self) -> Iterator[Any]:
        for policy in self._policies:
            yield from policy.wrapped

    def _state(self) -> Iterator[torch.Tensor]:
        for policy in self._policies:
            yield from self._state_of(policy)

    @staticmethod
    def _state_of(policy: Policy) -> Iterator[torch.Tensor]:
        for chunk in policy.chunks:
            yield from (each.detach() for each in chunk.parameters())
        whole = policy.optimizer
        for optimizer in getattr(whole, "chained_optimizers", [whole]):
            inner = optimizer.optimizer
            for group in inner.param_groups:
                yield from (each.detach() for each in group["params"])
            for state in inner.state.values():
                yield from (each for each in state.values() if isinstance(each, torch.Tensor))

    def _held(self, storage: torch.UntypedStorage) -> torch.Tensor:
        held = self._host.get(storage._cdata)
        if held is None or held.numel() != storage.nbytes():
            pinned = torch.cuda.is_available()
            held = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            self._host[storage._cdata] = held
        return held


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
