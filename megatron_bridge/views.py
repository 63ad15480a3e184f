"""The algebra of layouts: what a rank holds, told as axis-aligned boxes of Hugging Face tensors.

Every parallel layout of every framework (Megatron's ranks, SGLang's ranks) is written in the same
coordinates, those of the Hugging Face checkpoint. One `View` of a parameter then serves to load it,
to export it, to check shapes and coverage before a byte is read, and to hash what another framework
must hold. Planning is pure Python; torch is needed only by whoever copies.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch

Index = tuple[int, ...]


class Box(NamedTuple):
    """A rectangular part of a Hugging Face tensor and where it lies in a local tensor."""

    name: str
    """Hugging Face tensor."""
    start: Index
    """First element, in that tensor's coordinates."""
    size: Index
    """Extent; as many dimensions as `start`."""
    local_start: Index
    """First element in the local tensor, its leading indices (`lead`) aside."""
    lead: Index = ()
    """Fixed leading indices of the local tensor (stacked experts have one)."""

    @property
    def numel(self) -> int:
        """Elements of the box."""
        return prod(self.size)

    @property
    def source(self) -> tuple[slice, ...]:
        """Index of the box in the Hugging Face tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))

    @property
    def local(self) -> tuple[int | slice, ...]:
        """Index of the box in the local tensor."""
        inner = tuple(slice(a, a + n) for a, n in zip(self.local_start, self.size, strict=True))
        return self.lead + inner


class View(NamedTuple):
    """A local tensor: its shape, the boxes that fill it; what none covers is padding (zero)."""

    shape: Index
    boxes: tuple[Box, ...]

    @property
    def covered(self) -> int:
        """Elements that come from Hugging Face tensors."""
        return sum(box.numel for box in self.boxes)

    def renamed(self, rename: Callable[[str], str]) -> "View":
        """The same view of other Hugging Face tensors (a layer template made into layer 7)."""
        return View(self.shape, tuple(box._replace(name=rename(box.name)) for box in self.boxes))


def _with(index: Index, dim: int, value: int) -> Index:
    return (*index[:dim], value, *index[dim + 1 :])


def ref(name: str, shape: Sequence[int]) -> View:
    """A whole Hugging Face tensor."""
    zero = (0,) * len(shape)
    return View(tuple(shape), (Box(name, zero, tuple(shape), zero),))


def window(view: View, dim: int, start: int, stop: int) -> View:
    """Rows [start, stop) of dimension `dim`."""
    boxes = []
    for box in view.boxes:
        first = max(start, box.local_start[dim])
        last = min(stop, box.local_start[dim] + box.size[dim])
        if first < last:
            skipped = first - box.local_start[dim]
            boxes.append(
                Box(
                    box.name,
                    start=_with(box.start, dim, box.start[dim] + skipped),
                    size=_with(box.size, dim, last - first),
                    local_start=_with(box.local_start, dim, first - start),
                    lead=box.lead,
                )
            )
    return View(_with(view.shape, dim, stop - start), tuple(boxes))


def concat(dim: int, views: Iterable[View]) -> View:
    """The views one after another along `dim`."""
    boxes: list[Box] = []
    shape: Index = ()
    offset = 0
    for view in views:
        if shape and _with(view.shape, dim, 0) != _with(shape, dim, 0):
            raise ValueError(f"concat along {dim}: shapes {shape} and {view.shape} do not fit")
        shape = view.shape
        for box in view.boxes:
            moved = _with(box.local_start, dim, box.local_start[dim] + offset)
            boxes.append(Box(box.name, box.start, box.size, moved, box.lead))
        offset += view.shape[dim]
    return View(_with(shape, dim, offset), tuple(boxes))


def shard(view: View, dim: int, parts: int, part: int) -> View:
    """Part `part` of `parts` equal contiguous parts of `dim`."""
    if parts == 1:
        return view
    size, rest = divmod(view.shape[dim], parts)
    if rest:
        names = sorted({box.name for box in view.boxes})
        raise ValueError(
            f"{', '.join(names)}: dimension {dim} of {view.shape} cannot be cut into {parts} "
            "equal parts"
        )
    return window(view, dim, part * size, (part + 1) * size)


def shard_replicated(view: View, dim: int, parts: int, part: int, units: int) -> View:
    """Cut `units` whole units (KV heads) over `parts`; with more parts than units, repeat units."""
    if units >= parts:
        return shard(view, dim, parts, part)
    if parts % units:
        raise ValueError(f"{units} units cannot be repeated evenly over {parts} parts")
    return shard(view, dim, units, part * units // parts)


def interleave(dim: int, groups: int, views: Sequence[View]) -> View:
    """[a0 b0 c0 | a1 b1 c1 | ...]: every view cut into `groups`, one part of each in turn."""
    return concat(dim, [shard(view, dim, groups, g) for g in range(groups) for view in views])


def pad(view: View, dim: int, size: int) -> View:
    """`view` with padding after its end, up to `size` along `dim`."""
    if size < view.shape[dim]:
        raise ValueError(f"cannot pad dimension {dim} of {view.shape} to {size}")
    return View(_with(view.shape, dim, size), view.boxes)


def stack(views: Sequence[View]) -> View:
    """The views along a new first dimension."""
    boxes = tuple(
        Box(*box[:4], lead=(i, *box.lead)) for i, view in enumerate(views) for box in view.boxes
    )
    return View((len(views), *views[0].shape), boxes)


def copy_in(view: View, read: Callable[[Box], torch.Tensor], out: torch.Tensor) -> None:
    """Fill the local tensor `out`; `read` gives the content of a box. Padding becomes zero."""
    fill(view, lambda box, part: part.copy_(read(box)), out)


def fill(view: View, place: Callable[[Box, torch.Tensor], object], out: torch.Tensor) -> None:
    """The same where `place` puts the content of a box into its part of `out`."""
    if view.covered != out.numel():
        out.zero_()
    for box in view.boxes:
        place(box, out[box.local])


def copy_out(view: View, local: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    """Write the boxes of `local` into whole Hugging Face tensors."""
    for box in view.boxes:
        tensors[box.name][box.source].copy_(local[box.local])


def tiling_errors(
    name: str, shape: Index, boxes: Iterable[tuple[Index, Index]], *, gaps: bool = False
) -> list[str]:
    """Why `boxes`, (start, size) each, equal ones counted once, do not tile `shape` exactly once.

    gaps: whether elements that no box covers are allowed (padding).
    """
    distinct = sorted(set(boxes))
    errors = []
    for start, size in distinct:
        fits = len(start) == len(shape) and all(
            a >= 0 and n > 0 and a + n <= d for a, n, d in zip(start, size, shape, strict=True)
        )
        if not fits:
            errors.append(f"{name}: box at {start} of size {size} lies outside its shape {shape}")
    if errors:
        return errors
    for i, (start, size) in enumerate(distinct):
        for other, extent in distinct[i + 1 :]:
            if start and other[0] >= start[0] + size[0]:
                break  # sorted by first coordinate: nothing later can touch this box
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(start, size, other, extent, strict=True)
            ):
                errors.append(f"{name}: boxes at {start} and {other} overlap")
    covered = sum(prod(size) for _, size in distinct)
    if covered != prod(shape) and not gaps:
        errors.append(f"{name}: {covered} of {prod(shape)} elements are mapped")
    return errors


def fill_errors(name: str, view: View, *, padded: bool) -> list[str]:
    """Why the boxes of `view` do not fill the local tensor `name` exactly once.

    padded: whether a tail may stay empty.
    """
    ones = (1,) * len(view.shape)
    local = [(box.lead + box.local_start, ones[: len(box.lead)] + box.size) for box in view.boxes]
    errors = tiling_errors(name, view.shape, local, gaps=padded)
    if len(set(local)) != len(local):
        errors.append(f"{name}: two boxes fill the same place")
    return errors
