"""The CuPy kernel gives the same bytes as its twin, which equals the CPU's decoder."""

from __future__ import annotations

import numpy as np
import pytest

from daskshare.kernels.colour import semiplanar_to_rgb, surface_to_rgb, yuv_conversion
from daskshare.kernels.preprocess import Letterbox
from daskshare.kernels.surface import MAX_SURFACES, SurfaceLetterbox, surface_letterbox_host

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    # From here on a missing package is a failure.
    import cupy  # noqa: F401

    return torch


@pytest.mark.parametrize("sample_bytes", [1, 2])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (66, 50), (65, 47), (1920, 1080), (2, 2)])
@pytest.mark.parametrize(("matrix", "full_range"), [(5, False), (1, False), (9, True)])
def test_kernel_equals_twin(torch, sample_bytes, width, height, matrix, full_range):
    rng = np.random.default_rng(0)
    dtype, top = (np.uint8, 256) if sample_bytes == 1 else (np.uint16, 65536)
    # Rows are longer than the picture, as NVDEC's are.
    pitch = (width + 31) // 2 * 2
    rows, chroma_rows = height, -(-height // 2)
    host = rng.integers(0, top, (rows + chroma_rows, pitch)).astype(dtype)
    luma = host[:rows, :width]
    chroma = host[rows:, : 2 * (-(-width // 2))].reshape(chroma_rows, -1, 2)
    conversion = yuv_conversion(matrix, full_range=full_range)
    surface = torch.from_numpy(host.view(np.uint8)).cuda()
    out = torch.full((3, height, width, 3), 77, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    pitch_bytes = pitch * sample_bytes
    surface_to_rgb(
        surface.data_ptr(),
        surface.data_ptr() + pitch_bytes * rows,
        out[1],
        conversion,
        luma_pitch_bytes=pitch_bytes,
        chroma_pitch_bytes=pitch_bytes,
        sample_bytes=sample_bytes,
        stream=stream.cuda_stream,
    )
    stream.synchronize()
    np.testing.assert_array_equal(out[1].cpu().numpy(), semiplanar_to_rgb(luma, chroma, conversion))
    # The frames beside it in the batch stay as they were.
    assert (out[0] == 77).all()
    assert (out[2] == 77).all()


@pytest.mark.parametrize("sample_bytes", [1, 2])
@pytest.mark.parametrize(
    ("width", "height", "target"),
    [
        (64, 48, (416, 416)),
        (1920, 1080, (416, 416)),
        (66, 50, (64, 96)),
        (1080, 1920, (608, 608)),
        (2, 2, (32, 32)),
        (416, 416, (416, 416)),
    ],
)
@pytest.mark.parametrize(("matrix", "full_range"), [(5, False), (1, False), (9, True)])
def test_surface_to_input_equals_its_twin(
    torch, sample_bytes, width, height, target, matrix, full_range
):
    rng = np.random.default_rng(1)
    dtype, top = (np.uint8, 256) if sample_bytes == 1 else (np.uint16, 65536)
    pitch = (width + 31) // 2 * 2
    rows, chroma_rows = height, -(-height // 2)
    # More than one launch takes.
    count = MAX_SURFACES + 2
    host = rng.integers(0, top, (count, rows + chroma_rows, pitch)).astype(dtype)
    luma = host[:, :rows, :width]
    chroma = host[:, rows:, : 2 * (-(-width // 2))].reshape(count, chroma_rows, -1, 2)
    conversion = yuv_conversion(matrix, full_range=full_range)
    surface = torch.from_numpy(host.view(np.uint8)).cuda()
    out = torch.full((count + 2, *target, 3), 77, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    pitch_bytes = pitch * sample_bytes
    to_input = SurfaceLetterbox(
        Letterbox(height, width, *target),
        conversion,
        pitch_bytes=pitch_bytes,
        chroma_offset=pitch_bytes * rows,
        sample_bytes=sample_bytes,
        device_index=0,
        stream=stream.cuda_stream,
    )
    # In another order than they lie in memory.
    order = rng.permutation(count)
    to_input([surface[number].data_ptr() for number in order], out[1].data_ptr())
    stream.synchronize()
    got = out.cpu().numpy()
    assert (got[[0, -1]] == 77).all(), "wrote outside of its frames"
    height, width = target
    for place, number in enumerate(order, 1):
        expected = surface_letterbox_host(
            luma[number], chroma[number], conversion, height=height, width=width
        )
        np.testing.assert_array_equal(got[place], expected)
