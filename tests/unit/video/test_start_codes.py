from __future__ import annotations

import av
import pytest
from av.bitstream import BitStreamFilterContext

from daskshare.video.start_codes import StartCodes

CODECS = {"h264": "libx264", "hevc": "libx265"}
FILTERS = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}
PARAMETER_SETS = {"h264": {7, 8}, "hevc": {32, 33, 34}}


def units(data: bytes) -> list[bytes]:
    """NAL units between start codes."""
    return [unit.rstrip(b"\0") for unit in data.split(b"\0\0\1") if unit.strip(b"\0")]


def kind(codec: str, unit: bytes) -> int:
    return unit[0] & 0x1F if codec == "h264" else unit[0] >> 1 & 0x3F


@pytest.fixture(params=CODECS)
def stream(request, clips, tmp_path):
    quiet = {"x265-params": "log-level=0:slices=2", "x264-params": "slices=2"}
    path = clips.write(tmp_path / "a.mp4", CODECS[request.param], frames=20, options=quiet)
    with av.open(path) as container:
        video = container.streams.video[0]
        yield request.param, video, container.demux(video)


def narrow(packet: bytes, size: int) -> bytes:
    """Lengths of ``size`` bytes in the place of those of four."""
    result, position = b"", 0
    while position < len(packet):
        length = int.from_bytes(packet[position : position + 4], "big")
        unit = packet[position + 4 : position + 4 + length]
        result += length.to_bytes(size, "big") + unit
        position += 4 + length
    return result


@pytest.mark.parametrize("size", [4, 3, 2])
def test_packets_are_those_of_the_filter(stream, size):
    codec, video, packets = stream
    header = bytearray(video.codec_context.extradata)
    header[4 if codec == "h264" else 21] = header[4 if codec == "h264" else 21] & 0xFC | size - 1
    convert = StartCodes(codec, bytes(header))
    reference = BitStreamFilterContext(FILTERS[codec], in_stream=video)
    from_header = units(convert.parameter_sets)
    added: list[bytes] = []
    count = 0
    for packet in packets:
        if not packet.size:
            continue
        data = bytearray(bytes(packet) if size == 4 else narrow(bytes(packet), size))
        converted = convert.convert(memoryview(data))
        assert (converted is None) == (size == 4)
        (expected,) = reference.filter(packet)
        # The filter puts what the header holds before some packets.
        all_units = units(bytes(expected))
        added += [unit for unit in all_units if unit in from_header]
        rest = [unit for unit in all_units if unit not in from_header]
        assert units(bytes(data) if converted is None else converted) == rest
        count += 1
    assert count == 20
    assert added[: len(from_header)] == from_header
    assert {kind(codec, unit) for unit in from_header} >= PARAMETER_SETS[codec]


@pytest.mark.parametrize("header", [b"", b"\0\0\0\1\x67", b"\0\0\1\x67"])
def test_streams_with_start_codes_are_left_alone(header):
    convert = StartCodes("h264", header)
    assert convert.parameter_sets == b""
    data = bytearray(b"\0\0\0\1\x65abc")
    assert convert.convert(memoryview(data)) is None
    assert data == b"\0\0\0\1\x65abc"


@pytest.mark.parametrize("codec", CODECS)
def test_a_header_that_is_cut_off(stream, codec):
    if stream[0] != codec:
        pytest.skip("of the other codec")
    header = bytes(stream[1].codec_context.extradata)
    for length in range(5, len(header) - 4, 7):
        with pytest.raises(ValueError, match="is cut off"):
            StartCodes(codec, header[:length])


def test_a_length_past_the_end():
    convert = StartCodes("h264", b"\1dddd\xe1\0\1g\1\0\1h")
    assert convert.parameter_sets == b"\0\0\0\1g\0\0\0\1h"
    with pytest.raises(ValueError, match="ends at byte 13 of a packet of 6"):
        convert.convert(memoryview(bytearray(b"\0\0\0\x09ab")))
