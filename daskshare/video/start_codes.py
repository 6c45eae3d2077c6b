"""H.264 and HEVC packets as a hardware decoder's parser wants them: with start codes.

MP4 and Matroska put the length of each NAL unit before it and keep parameter sets in a header
(ISO/IEC 14496-15: avcC and hvcC). FFmpeg's filters do the same as this module, but in them each
packet gives the interpreter's lock away three times, which a dozen decoding threads notice.
"""

from __future__ import annotations

__all__ = ["StartCodes"]

_START_CODE = b"\x00\x00\x00\x01"


class StartCodes:
    """Converts the packets of one stream.

    Parameters
    ----------
    codec : {"h264", "hevc"}
    header : bytes
        The stream's extradata. One that is empty or holds start codes says that packets do, too.

    Attributes
    ----------
    parameter_sets : bytes
        Of the header, with start codes; to be put before the first packet that a decoder gets.

    Raises
    ------
    ValueError
        When the header cannot be read.
    """

    def __init__(self, codec: str, header: bytes) -> None:
        self.parameter_sets = b""
        self._length_bytes = 0
        if not header or header.startswith((_START_CODE, _START_CODE[1:])):
            return
        try:
            units = _avc_units(header) if codec == "h264" else _hevc_units(header)
        except IndexError:
            raise ValueError(
                f"the {codec} header of {len(header)} bytes is cut off; expected parameter sets"
            ) from None
        self.parameter_sets = b"".join(_START_CODE + unit for unit in units)
        self._length_bytes = (header[4 if codec == "h264" else 21] & 3) + 1

    def convert(self, packet: memoryview) -> bytes | None:
        """Put start codes in the place of lengths.

        Parameters
        ----------
        packet : memoryview
            Bytes of one packet, writable.

        Returns
        -------
        bytes or None
            The converted packet; ``None`` when it was converted in place or needs no conversion.

        Raises
        ------
        ValueError
            When a length points past the packet's end.
        """
        size, width = self._length_bytes, len(packet)
        if not size:
            return None
        pieces: list[bytes | memoryview] | None = None if size == len(_START_CODE) else []
        position = 0
        while position < width:
            begin = position + size
            end = begin + int.from_bytes(packet[position:begin], "big")
            if end > width:
                raise ValueError(
                    f"a NAL unit ends at byte {end} of a packet of {width} bytes; the packet is "
                    "damaged"
                )
            if pieces is None:
                packet[position:begin] = _START_CODE
            else:
                pieces += [_START_CODE, packet[begin:end]]
            position = end
        return None if pieces is None else b"".join(pieces)


def _avc_units(header: bytes) -> list[bytes]:
    units, position = [], 5
    for mask in (0x1F, 0xFF):  # sequence parameter sets, picture parameter sets
        count, position = header[position] & mask, position + 1
        for _ in range(count):
            unit, position = _unit(header, position)
            units.append(unit)
    return units


def _hevc_units(header: bytes) -> list[bytes]:
    units, position = [], 23
    for _ in range(header[22]):  # arrays of one kind of unit each
        count, position = _number(header, position + 1), position + 3
        for _ in range(count):
            unit, position = _unit(header, position)
            units.append(unit)
    return units


def _unit(header: bytes, position: int) -> tuple[bytes, int]:
    begin = position + 2
    end = begin + _number(header, position)
    if not begin < end <= len(header):
        raise IndexError(end)
    return header[begin:end], end


def _number(header: bytes, position: int) -> int:
    return header[position] << 8 | header[position + 1]
