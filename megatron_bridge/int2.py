"""Two-bit weights: -1, 0 or 1 times a scale for every 32 of a row, the largest magnitude in them.

Symmetric rounding to nearest, in blocks as large as MXFP4's, but of any scale. Only what is left of
a weight after it has been stored so, not the storage.
"""

import torch

BLOCK = 32


def round_int2(weight: torch.Tensor) -> torch.Tensor:
    """A weight [R, C] of any float type, rounded to the nearest that the format holds, float32.

    Raises:
        ValueError: the weight is not finite.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK))
    blocks = padded.view(rows, -1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True)
    if not scale.isfinite().all():
        raise ValueError("it holds values that are not finite, which two bits cannot")
    scale[scale == 0] = 1.0
    return ((blocks / scale).round() * scale).view(rows, -1)[:, :columns]
