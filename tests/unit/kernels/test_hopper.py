"""How weights are laid out for the matrix kernels, and how much of a multiprocessor they take."""

from __future__ import annotations

import pytest
import torch

from daskshare.kernels.hopper import SHARED_BYTES, is_hopper, prelude
from daskshare.kernels.residual_unit import (
    RESIDUAL_UNIT_VARIANTS,
    ResidualUnit,
    UnitTile,
    in_register_order,
    pack_planes,
)
from daskshare.kernels.stem import STEM_VARIANTS, Stem, StemTile, pack_bytes

#: Of a block on compute capability 9.0.
MAX_SHARED_BYTES = 227 * 1024
UNIT_TILES = [(c, tile) for c, tiles in RESIDUAL_UNIT_VARIANTS.items() for tile in tiles]


def numbered(*shape):
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).reshape(shape)


def test_planes_hold_eight_input_channels_of_every_output_channel():
    weight = numbered(5, 16, 3, 3)
    planes = pack_planes(weight)
    assert planes.shape == (3, 3, 2, 5, 8)
    assert planes.is_contiguous()
    for row, column, out, inner in [(0, 0, 0, 0), (2, 1, 4, 15), (1, 2, 3, 9)]:
        got = planes[row, column, inner // 8, out, inner % 8]
        assert got == weight[out, inner, row, column]


def test_bytes_are_in_the_order_of_a_row_of_pixels():
    weight, bias = numbered(4, 3, 3, 3) + 1, -numbered(4) - 1
    packed = pack_bytes(weight, bias)
    assert packed.shape == (4, 4, 8)
    taps = packed.transpose(1, 2).reshape(32, 4)
    for row in range(3):
        for column in range(3):
            for channel in range(3):
                got = taps[row * 10 + column * 3 + channel]
                assert torch.equal(got, weight[:, channel, row, column])
    # What is read beyond a row's nine bytes counts nothing; then comes the bias.
    assert taps[[9, 19, 29, 31]].count_nonzero() == 0
    assert torch.equal(taps[30], bias)


@pytest.mark.parametrize("channels", [64, 128])
def test_register_order_matches_what_four_lanes_hold(channels):
    """Emulate the fragments of a matrix instruction of 16 inner values."""
    weight = torch.randn(3, channels, 1, 1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(channels, generator=torch.Generator().manual_seed(1))
    reordered = in_register_order(weight).flatten(1)
    total = torch.zeros(3)
    for group in range(channels // 32):
        for step in range(2):
            columns = torch.zeros(16)
            for lane in range(4):
                # A lane loads eight channels in a row: four pairs, of which a step takes two.
                own = x[group * 32 + lane * 8 :][:8].reshape(4, 2)
                columns[2 * lane : 2 * lane + 2] = own[2 * step]
                columns[8 + 2 * lane : 10 + 2 * lane] = own[2 * step + 1]
            first = group * 32 + step * 16
            total += reordered[:, first : first + 16] @ columns
    torch.testing.assert_close(total, weight.flatten(1) @ x)


@pytest.mark.parametrize("variant", [*UNIT_TILES, *STEM_VARIANTS], ids=str)
def test_variants_fit_a_multiprocessor(variant):
    if isinstance(variant, tuple):
        channels, tile = variant
        used = tile.shared_bytes(channels)
    else:
        tile, used = variant, variant.shared_bytes
        assert tile.columns % 16 == 0
        assert tile.columns <= 256
    assert 0 < used <= MAX_SHARED_BYTES
    assert 1 <= tile.groups <= 4
    reached = tile.reach_bytes(channels) if isinstance(tile, UnitTile) else tile.reach_bytes
    assert reached <= used
    if isinstance(tile, UnitTile):
        assert tile.pixels >= (tile.height + 2) * (tile.width + 2)
        assert tile.resident(channels) * (used + 1024) <= SHARED_BYTES


def test_products_are_declared_once_each():
    source = prelude([(32, True), (224, False), (32, True)])
    assert source.count("void mma_registers_32(") == 1
    assert source.count("void mma_224(") == 1
    assert "m64n224k16" in source
    assert "mma_32(" not in source


def test_wrong_shapes_are_refused():
    zeros = torch.zeros
    with pytest.raises(ValueError, match="expected"):
        ResidualUnit((zeros(16, 32, 1, 1), zeros(16)), (zeros(32, 16, 3, 3), zeros(32)), None)
    with pytest.raises(ValueError, match=r"expected \(32, 3, 3, 3\)"):
        Stem((zeros(16, 3, 3, 3), zeros(16)), (zeros(64, 16, 3, 3), zeros(64)), None)


def test_tiles_that_read_beyond_their_memory_are_refused(monkeypatch):
    zeros = torch.zeros
    unit = (zeros(32, 64, 1, 1), zeros(32)), (zeros(64, 32, 3, 3), zeros(64))
    monkeypatch.setattr(UnitTile, "reach_bytes", lambda self, channels: 10**6)
    with pytest.raises(ValueError, match="reads 1000000 bytes of shared memory"):
        ResidualUnit(*unit, UnitTile(8, 26, 2))
    stem = (zeros(32, 3, 3, 3), zeros(32)), (zeros(64, 32, 3, 3), zeros(64))
    monkeypatch.setattr(StemTile, "reach_bytes", 10**6)
    with pytest.raises(ValueError, match="reads 1000000 bytes of shared memory"):
        Stem(*stem, StemTile(8, 26, 2))


def test_reach_is_that_of_the_furthest_row():
    # One plane's end is the start of the next; of the last of four, 16 x 28 pixels in blocks of 64
    # and two rows and two pixels of margin are read.
    tile = UnitTile(16, 26, 4)
    assert tile.pixels == 512
    assert tile.reach_bytes(64) == 3 * 512 * 16 + (448 + 2 * 28 + 2) * 16
    # Three planes of 2 x 243 + 2 x 216 pixels; the furthest tap begins in the last part, and 216
    # columns are rounded up to 224.
    stem = StemTile(8, 26, 1)
    product = (3 * 918 + 2 * 243 + 216 + 224) * 16
    window = 4 * 918 * 16 + 128 + 19 * 172 + 3 + 53 * 3 + 10
    kernels = 4 * 32 * 16 + 9 * 4 * 64 * 16
    assert stem.reach_bytes == kernels + max(product, window) <= stem.shared_bytes


def test_the_cpu_is_no_hopper():
    assert not is_hopper(torch.device("cpu"))
