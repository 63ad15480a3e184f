"""Rounding to MXFP4, and to two bits, against the formats written out, value by value."""

import pytest
import torch

from megatron_bridge.int2 import round_int2
from megatron_bridge.mxfp4 import round_mxfp4

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.mark.parametrize("columns", [32, 64, 80, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_is_the_nearest_that_its_block_holds(columns, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(9, columns) * torch.logspace(-6, 6, 9)[:, None]).to(dtype)
    found = round_mxfp4(weight)
    for first in range(0, columns, 32):
        block, ours = (x[:, first : first + 32].double() for x in (weight, found))
        scale = 2.0 ** (block.abs().amax(1, keepdim=True).log2().floor() - 2)
        values = GRID.double() * scale[..., None]  # [9, 1, 8]
        nearest = (block.abs()[..., None] - values).abs().min(-1).values
        assert torch.equal((ours.abs() - block.abs()).abs(), nearest)
        assert ((ours * block) >= 0).all()


def test_ties_go_to_the_even_code_and_large_values_to_six():
    row = torch.tensor([[7.9, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, -0.25, 0.0]])
    assert round_mxfp4(row).tolist() == [[6, 0, 1, 1, 2, 2, 4, 4, -4, 0, 0]]


def test_what_is_rounded_stays_as_it_is():
    torch.manual_seed(1)
    once = round_mxfp4(torch.randn(5, 100))
    assert torch.equal(round_mxfp4(once), once)
    assert not round_mxfp4(torch.zeros(2, 33)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_least_and_the_largest_are_rounded_like_all_others(dtype):
    """Scales are e8m0, 2^-127 or more; a block of zeros has one too."""
    least = 2.0 ** (-149 if dtype is torch.float32 else -133)
    huge = torch.finfo(dtype).max
    rows = torch.tensor(
        [
            [least, 0.0, -least],
            [2.0**-128, 2.0**-129, -1.5 * 2.0**-127],
            [6 * 2.0**-127, 2.0**-128, -(2.0**-129)],
            [0.0, 0.0, 0.0],
            [huge, -huge / 2, 0.0],
        ],
        dtype=dtype,
    )
    assert round_mxfp4(rows).tolist() == [
        [0, 0, 0],
        [2.0**-128, 0, -1.5 * 2.0**-127],
        [6 * 2.0**-127, 2.0**-128, 0],
        [0, 0, 0],
        [6 * 2.0**125, -4 * 2.0**125, 0],
    ]
    assert round_int2(rows).tolist() == [
        [least, 0, -least],
        [0, 0, -1.5 * 2.0**-127],
        [6 * 2.0**-127, 0, 0],
        [0, 0, 0],
        [huge, 0, 0],
    ]


def test_two_bits_hold_a_sign_or_nothing_of_the_largest_of_32():
    weight = torch.tensor([[4.0, -2.1, 1.9, -4.0], [0.0, 0.0, 0.0, 0.0], [0.1, 0.3, -0.4, 0.05]])
    assert round_int2(weight).tolist() == [
        [4, -4, 0, -4],
        [0, 0, 0, 0],
        pytest.approx([0, 0.4, -0.4, 0]),
    ]
    torch.manual_seed(0)
    weight = torch.randn(5, 70) * torch.logspace(-3, 3, 5)[:, None]
    found = round_int2(weight)
    for first in (0, 32, 64):
        block, ours = (x[:, first : first + 32] for x in (weight, found))
        scale = block.abs().amax(1, keepdim=True)
        assert torch.equal(ours, torch.where(block.abs() > scale / 2, block.sign() * scale, 0.0))
    assert torch.equal(round_int2(found), found)
