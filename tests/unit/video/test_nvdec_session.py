"""Numbers on their way through a decoder, with a stand-in for the library's."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from daskshare.video.nvdec_session import NvdecSession


class Packet:
    bsl = bsl_data = pts = 0


class Decoder:
    """Shows a picture for each byte; keeps the last ``kept`` until others come."""

    def __init__(self, kept=0):
        self.kept, self.waiting, self.fed = kept, [], []

    def Decode(self, packet):
        if packet.bsl:
            data = ctypes.string_at(packet.bsl_data, packet.bsl)
            self.fed.append(data)
            # A millisecond a frame would be 40; this is as far as it may go.
            self.waiting += [
                SimpleNamespace(timestamp=packet.pts + place * 40_000) for place in range(len(data))
            ]
        shown = self.waiting[: len(self.waiting) - self.kept]
        del self.waiting[: len(shown)]
        return shown


@pytest.fixture
def session():
    session = object.__new__(NvdecSession)
    session._base = session._latest = 0
    session._open = True
    session._new_packet_data = Packet
    session.stream = SimpleNamespace(synchronize=lambda: None)
    session._decoder = Decoder()
    return session


def numbers(found):
    return [number for _, number in found]


def test_pictures_carry_their_pieces_number(session):
    assert numbers(session.decode(b"abcd", 1024)) == [1024] * 4
    assert numbers(session.decode(b"e", 1026)) == [1026]
    assert session._decoder.fed == [b"abcd", b"e"]


def test_what_a_chunk_leaves_in_the_decoder_does_not_reach_the_next(session):
    session._decoder.kept = 2
    assert numbers(session.decode(b"abc", 5)) == [5]
    assert numbers(session.decode(b"d", 9)) == [5]
    session.drain()
    # Two come out now, one of piece 5 and one of piece 9; numbers begin anew.
    assert numbers(session.decode(b"ef", 0)) == []
    assert numbers(session.decode(b"gh", 5)) == [0, 0]


def test_numbers_need_not_be_fed_in_ascending_order(session):
    session._decoder.kept = 1
    session.decode(b"a", 9)
    session.decode(b"b", 3)
    session.drain()
    session._decoder.kept = 0
    assert numbers(session.decode(b"c", 0)) == [0]
