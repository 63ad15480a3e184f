"""Batch-invariant matrix products on a CPU: a row's bits depend on that row alone.

A BLAS picks its kernel by the number of rows, so the same row can come out different in the last
bit next to other rows (seen: 1, 2 and 3 rows against 4 and more). Here rows are computed only in
numbers that were *seen*, on this machine and for these very shapes, to give every row the same
bits; rows of zeros fill up. SGLang's own batch-invariant mode does this with Triton kernels.
"""

from functools import cache

import torch

ROW_SIZES = (16, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that a product may have; more rows are cut into pieces."""

_ATTENTION_ROWS = (4, 8, 16, 32)
_ATTENTION_KEYS = 1024
"""Numbers of keys beyond this are taken to behave like it: trying them out would cost seconds."""
_library: torch.library.Library | None = None


def enable() -> None:
    """Make mm and addmm of this process batch-invariant on the CPU (once; for good)."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("mm", invariant_mm, "CPU", allow_override=True)
    _library.impl("addmm", _invariant_addmm, "CPU", allow_override=True)


def enabled() -> bool:
    """Whether this process computes batch-invariantly."""
    return _library is not None


def invariant_mm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[M, K] @ [K, N] -> [M, N]; each row has the bits it would have in any other batch."""
    num_rows, columns = rows.shape[0], weight.shape[1]
    if num_rows == 0 or rows.shape[1] == 0:
        return torch.zeros(num_rows, columns, dtype=rows.dtype)
    transposed = weight.stride(0) == 1
    width, sizes = _invariant_shape(rows.shape[1], columns, rows.dtype, transposed)
    if width != columns:
        weight = torch.nn.functional.pad(weight.t(), (0, 0, 0, width - columns)).t()
    if num_rows <= sizes[-1]:
        product = _padded_mm(rows, weight, sizes)
    else:
        pieces = [_padded_mm(piece, weight, sizes) for piece in rows.split(sizes[-1])]
        product = torch.cat(pieces)
    return product[:num_rows, :columns]


def _invariant_addmm(
    bias: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    product = invariant_mm(rows, weight)
    return product.mul_(alpha).add_(bias if beta == 1 else bias * beta)


def _padded_mm(rows: torch.Tensor, weight: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """The product with zeros appended up to the next allowed number of rows."""
    size = next(size for size in sizes if size >= rows.shape[0])
    if size != rows.shape[0] or not rows.is_contiguous() or rows.data_ptr() % 64:
        padded = rows.new_zeros(size, rows.shape[1])
        padded[: rows.shape[0]] = rows
        rows = padded
    return _plain_mm(rows, weight)


def _plain_mm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # The out= variant is another entry of the dispatcher: it stays torch's own.
    out = torch.empty(rows.shape[0], weight.shape[1], dtype=rows.dtype)
    return torch.mm(rows, weight, out=out)


@cache
def _invariant_shape(
    depth: int, columns: int, dtype: torch.dtype, transposed: bool
) -> tuple[int, tuple[int, ...]]:
    """Number of columns to compute and numbers of rows that give a row the same bits; by trying.

    Very narrow products can depend on a row's place; zero columns take them out of that range.
    """
    for multiple in (1, 16, 64):
        width = -(-columns // multiple) * multiple
        # A widened weight is laid out as a transposed one.
        if sizes := _invariant_sizes(depth, width, dtype, transposed or width != columns):
            return width, sizes
    raise RuntimeError(
        f"no batch-invariant product on this machine: [rows, {depth}] @ [{depth}, {columns}] in "
        f"{dtype} depends on the row's place; set rollout.engine.deterministic=false"
    )


def _invariant_sizes(
    depth: int, columns: int, dtype: torch.dtype, transposed: bool
) -> tuple[int, ...]:
    """Those of ROW_SIZES under which a row's bits are those it has among the fewest; or none."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROW_SIZES[-1], depth, generator=generator).to(dtype)
    shape = (columns, depth) if transposed else (depth, columns)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight = weight.t() if transposed else weight
    base = ROW_SIZES[0]
    expected = torch.cat([_plain_mm(piece, weight) for piece in rows.split(base)])
    order = torch.randperm(base, generator=generator)
    if not torch.equal(_plain_mm(rows[:base][order], weight), expected[:base][order]):
        return ()
    return tuple(
        size for size in ROW_SIZES if torch.equal(_plain_mm(rows[:size], weight), expected[:size])
    )


def attention_rows(depth: int, num_keys: int) -> int:
    """Least number of query rows from which on a row's bits do not change any more.

    For [rows, depth] @ [depth, num_keys] and [rows, num_keys] @ [num_keys, depth] as float32
    batched products, which is what rollout.server.cpu_attention computes.
    """
    return _attention_rows(depth, min(num_keys, _ATTENTION_KEYS))


@cache
def _attention_rows(depth: int, num_keys: int) -> int:
    generator = torch.Generator().manual_seed(0)
    most = 64
    queries = torch.randn(1, most, depth, generator=generator)
    keys = torch.randn(1, num_keys, depth, generator=generator)
    transposed = keys.transpose(1, 2)
    scores = torch.bmm(queries, transposed)
    values = torch.bmm(scores, keys)
    for least in _ATTENTION_ROWS:
        sizes = {least, least + 1, least + 2, least + 3, 15, 16, 17, 31, 48, most - 1}
        if all(
            torch.equal(torch.bmm(queries[:, :rows], transposed), scores[:, :rows])
            and torch.equal(torch.bmm(scores[:, :rows], keys), values[:, :rows])
            for rows in sizes
            if rows >= least
        ):
            return least
    raise RuntimeError(
        f"no batch-invariant attention on this machine for head size {depth} and {num_keys} keys; "
        f"set rollout.engine.deterministic=false"
    )
