"""The spread of everything seen so far, in numbers that a checkpoint can hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

_FIELDS = ("count", "mean", "squares")


@dataclass
class RunningStd:
    """Mean and spread of a stream, updated by batches (Chan et al. 1979; float64)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def add(self, values: Sequence[float]) -> None:
        """Count a batch in."""
        if not values:
            return
        batch = torch.tensor(values, dtype=torch.float64)
        mean = batch.mean().item()
        self.add_moments(len(values), mean, ((batch - mean) ** 2).sum().item())

    def add_moments(self, size: float, mean: float, squares: float) -> None:
        """The same of a batch that is spread over ranks: how many, their mean, the sum of squared
        distances from it."""
        if not size:
            return
        total, gap = self.count + size, mean - self.mean
        self.squares += squares + gap**2 * self.count * size / total
        self.mean += gap * size / total
        self.count = total

    @property
    def std(self) -> float:
        """Biased; 1 where nothing differs yet."""
        spread = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return spread if spread > 1e-8 else 1.0

    def state(self, prefix: str) -> dict[str, float]:
        """Its numbers by name."""
        return {f"{prefix}{name}": getattr(self, name) for name in _FIELDS}

    def restore(self, prefix: str, state: Mapping[str, float]) -> None:
        """Go on from them, where they are there."""
        for name in _FIELDS:
            setattr(self, name, state.get(f"{prefix}{name}", getattr(self, name)))
