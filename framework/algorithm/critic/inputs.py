"""The policy's tokens of a micro-batch as rows, one a sample, and recurrences along them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ValuedTokens:
    """[N, L] float64 each: row i holds the policy's tokens of sample i one after the other and
    zeros behind them. Tokens that others wrote are not there, so nothing is discounted or
    estimated at them: value and advantage are carried across.
    """

    values: torch.Tensor
    """The critic's estimate before the token was chosen."""
    rewards: torch.Tensor
    """What the token earned: a turn's reward is at its last token, what the sample's holds beyond
    its turns' at the last policy token of all."""
    mask: torch.Tensor
    """1 where there is a token."""
    turn_ends: torch.Tensor
    """1 at the last token of each of the policy's turns."""


class TokenRows:
    """Packed positions <-> rows: token k of sample i's policy tokens is at [i, k]."""

    def __init__(self, mask: torch.Tensor, ids: torch.Tensor, count: int) -> None:
        """
        Args:
            mask: [T], nonzero where a token counts.
            ids: [T] int64 in [0, count), which does not decrease.
        """
        self._places = mask.nonzero()[:, 0]
        self._rows = ids[self._places]
        lengths = torch.bincount(self._rows, minlength=count)
        starts = lengths.cumsum(0) - lengths
        order = torch.arange(len(self._places), device=mask.device)
        self._columns = order - starts[self._rows]
        self._shape = (count, int(lengths.max()) if count else 0)
        self._size = len(mask)

    def rows(self, packed: torch.Tensor) -> torch.Tensor:
        """[T] -> [N, L] float64."""
        found = packed.new_zeros(self._shape, dtype=torch.float64)
        found[self._rows, self._columns] = packed[self._places].double()
        return found

    def packed(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, L] -> [T], 0 where no token counts."""
        found = rows.new_zeros(self._size)
        found[self._places] = rows[self._rows, self._columns]
        return found

    def last(self, of_each: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, L]: the value of each row at its last token, 0 elsewhere; a row without tokens
        loses its value."""
        found = of_each.new_zeros(self._shape, dtype=torch.float64)
        lengths = torch.bincount(self._rows, minlength=self._shape[0])
        some = lengths > 0
        found[some, lengths[some] - 1] = of_each[some].double()
        return found


def following(values: torch.Tensor, distance: int = 1) -> torch.Tensor:
    """[N, L]: what stands `distance` places further in the row; 0 beyond its end."""
    return torch.nn.functional.pad(values[:, distance:], (0, min(distance, values.shape[1])))


def backward_sums(terms: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """s_t = terms_t + factors_t s_{t+1} along each row, in log2 L steps instead of L.

    A pair of neighbouring steps is one step of twice the length: s_t = (a_t + f_t a_{t+k}) +
    (f_t f_{t+k}) s_{t+2k}.
    """
    distance = 1
    while distance < terms.shape[1]:
        terms = terms + factors * following(terms, distance)
        factors = factors * following(factors, distance)
        distance *= 2
    return terms
