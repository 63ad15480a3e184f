"""MXFP4: four bits a weight, one power of two for every 32 of a row (OCP Microscaling 1.0).

An element is e2m1, 0, .5, 1, 1.5, 2, 3, 4 or 6 with a sign, times its block's scale, which is the
power of two that makes the block's largest magnitude at least 4 and less than 8, but never below
2^-127, the least that e8m0 has (its 2^127 is more than float32 asks for); what is over 6 becomes 6.
Here only what is left of a weight after it has been stored so, not the storage.
"""

import torch

BLOCK = 32
LARGEST = 6.0
LARGEST_EXPONENT = 2
"""Of LARGEST, as a power of two."""
LEAST_SCALE_EXPONENT = -127
"""Of e8m0."""


def round_mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """A weight [R, C] of any float type, rounded to the nearest that MXFP4 holds, ties to even.

    Raises:
        ValueError: the weight is not finite.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK))
    blocks = padded.view(rows, -1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("it holds values that are not finite, which fp4 cannot")
    exponents = torch.frexp(largest).exponent - 1  # floor(log2(largest)); -1 where that is 0
    exponents = (exponents - LARGEST_EXPONENT).clamp_min(LEAST_SCALE_EXPONENT)
    scale = torch.ldexp(torch.ones_like(largest), exponents)
    magnitudes = (blocks.abs() / scale).clamp_max(LARGEST)
    step = torch.where(magnitudes < 2, 0.5, torch.where(magnitudes < 4, 1.0, 2.0))
    rounded = (magnitudes / step).round() * step  # round() takes ties to even
    return (rounded.copysign(blocks) * scale).view(rows, -1)[:, :columns]
