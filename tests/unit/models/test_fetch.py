"""Downloads from a local HTTP server that misbehaves on demand."""

from __future__ import annotations

import hashlib
import http.server
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import dask
import pytest

from daskshare.errors import ChecksumError, ConfigurationError, DownloadError
from daskshare.models import fetch as fetch_module
from daskshare.models.fetch import KNOWN_WEIGHTS, MIRRORS, KnownWeights, cache_directory, fetch
from daskshare.models.weights import file_sha256

CONTENT = bytes(range(256)) * 12_000


@dataclass
class Mirror:
    """A server for one file; ``plan`` holds what to do with each request, the last for the rest.

    ``"ok"``, ``"ok-no-range"`` (ignores Range), ``"404"``, ``"wrong"`` (one byte differs),
    ``"cut"`` (closes after a third of what is left).
    """

    plan: list[str] = field(default_factory=lambda: ["ok"])
    requests: list[str | None] = field(default_factory=list)
    url: str = ""

    def next_step(self) -> str:
        return self.plan.pop(0) if len(self.plan) > 1 else self.plan[0]


@pytest.fixture
def serve():
    """Start mirrors; all are down at the end of the test."""
    servers = []

    def serve(*plan: str) -> Mirror:
        mirror = Mirror(list(plan))

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                mirror.requests.append(self.headers["Range"])
                step = mirror.next_step()
                if step == "404":
                    self.send_error(404)
                    return
                content = bytearray(CONTENT)
                if step == "wrong":
                    content[-1] ^= 1
                start = 0
                if self.headers["Range"] and step != "ok-no-range":
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                    if start >= len(content):
                        self.send_error(416)
                        return
                    self.send_response(206)
                    self.send_header(
                        "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                    )
                else:
                    self.send_response(200)
                rest = content[start:]
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[: len(rest) // 3] if step == "cut" else rest)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        mirror.url = f"http://127.0.0.1:{server.server_port}/"
        return mirror

    yield serve
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Let the name yolov3 mean the little file of these tests."""
    known = KnownWeights("yolov3.weights", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(KNOWN_WEIGHTS, "yolov3", known)
    return known


def closed_port_url() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/"


def left_over(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"yolov3.weights.lock"}


def test_download_and_then_the_cache(tmp_path, serve):
    mirror = serve("ok")
    path = fetch("yolov3", directory=tmp_path / "new", mirrors=(mirror.url,))
    assert path == tmp_path / "new" / "yolov3.weights"
    assert path.read_bytes() == CONTENT
    assert fetch("yolov3", directory=tmp_path / "new", mirrors=(mirror.url,)) == path
    assert len(mirror.requests) == 1
    assert left_over(tmp_path / "new") == {"yolov3.weights"}


def test_the_first_mirror_lacks_the_file(tmp_path, serve):
    first, second = serve("404"), serve("ok")
    path = fetch("yolov3", directory=tmp_path, mirrors=(closed_port_url(), first.url, second.url))
    assert path.read_bytes() == CONTENT
    assert len(first.requests) == len(second.requests) == 1


def test_a_wrong_byte(tmp_path, serve, known):
    mirror = serve("wrong")
    with pytest.raises(ChecksumError, match="content is not the expected one") as caught:
        fetch("yolov3", directory=tmp_path, mirrors=(mirror.url,))
    error = caught.value
    assert error.expected_sha256 == known.sha256
    assert error.got_sha256 == hashlib.sha256(CONTENT[:-1] + b"\xfe").hexdigest()
    assert error.path == str(tmp_path / "yolov3.weights")
    assert left_over(tmp_path) == set()
    assert len(mirror.requests) == 1


def test_a_wrong_byte_on_one_mirror_only(tmp_path, serve):
    path = fetch("yolov3", directory=tmp_path, mirrors=(serve("wrong").url, serve("ok").url))
    assert path.read_bytes() == CONTENT


def test_a_cut_connection_is_resumed_within_the_call(tmp_path, serve):
    mirror = serve("cut", "ok")
    path = fetch("yolov3", directory=tmp_path, mirrors=(mirror.url,))
    assert path.read_bytes() == CONTENT
    first, second = mirror.requests
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= len(CONTENT) // 3


def test_a_download_that_broke_off_is_continued_by_the_next_call(tmp_path, serve):
    mirror = serve("cut", "cut", "cut", "404")
    with pytest.raises(DownloadError):
        fetch("yolov3", directory=tmp_path, mirrors=(mirror.url,))
    part = tmp_path / "yolov3.weights.part"
    have = part.stat().st_size
    assert part.read_bytes() == CONTENT[:have]
    assert have > len(CONTENT) // 2
    # Another mirror goes on where the first one stopped.
    other = serve("ok")
    path = fetch("yolov3", directory=tmp_path, mirrors=(other.url,))
    assert path.read_bytes() == CONTENT
    assert other.requests == [f"bytes={have}-"]
    assert left_over(tmp_path) == {"yolov3.weights"}


@pytest.mark.parametrize(
    "part", [b"something else", CONTENT[:-1] + b"\0", CONTENT + b"too long", CONTENT]
)
def test_a_stale_part_does_no_harm(tmp_path, serve, part):
    (tmp_path / "yolov3.weights.part").write_bytes(part)
    path = fetch("yolov3", directory=tmp_path, mirrors=(serve("ok").url,))
    assert path.read_bytes() == CONTENT


def test_a_server_that_cannot_resume(tmp_path, serve):
    (tmp_path / "yolov3.weights.part").write_bytes(CONTENT[:1000])
    path = fetch("yolov3", directory=tmp_path, mirrors=(serve("ok-no-range").url,))
    assert path.read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_replaced(tmp_path, serve):
    (tmp_path / "yolov3.weights").write_bytes(b"damaged")
    path = fetch("yolov3", directory=tmp_path, mirrors=(serve("ok").url,))
    assert path.read_bytes() == CONTENT


def test_offline(tmp_path, known):
    with pytest.raises(DownloadError) as caught:
        fetch("yolov3", directory=tmp_path, mirrors=(closed_port_url(), closed_port_url()))
    error = caught.value
    assert error.path == str(tmp_path / "yolov3.weights")
    for words in ("any of 2 mirrors", error.path, known.sha256, "cache-directory", "weights=PATH"):
        assert words in str(error)
    # Having done what the message says, it works without a network.
    (tmp_path / "yolov3.weights").write_bytes(CONTENT)
    path = fetch("yolov3", directory=tmp_path, mirrors=(closed_port_url(),))
    assert path.read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written(tmp_path, serve):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match="could not be stored"):
        fetch("yolov3", directory=tmp_path / "file" / "x", mirrors=(serve("ok").url,))


def test_many_at_once_download_once(tmp_path, serve):
    mirror = serve("ok")
    results = []

    def work():
        results.append(fetch("yolov3", directory=tmp_path, mirrors=(mirror.url,)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [tmp_path / "yolov3.weights"] * 8
    assert len(mirror.requests) == 1


def test_the_packaged_file_needs_no_download(tmp_path):
    path = fetch("yolov3-tiny", directory=tmp_path, mirrors=())
    assert file_sha256(path) == KNOWN_WEIGHTS["yolov3-tiny"].sha256
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name(tmp_path):
    with pytest.raises(ConfigurationError, match="Did you mean 'yolov3-spp'"):
        fetch("yolov3-sp", directory=tmp_path)


def test_cache_directory(tmp_path):
    with dask.config.set({"daskshare.models.cache-directory": str(tmp_path)}):
        assert cache_directory() == tmp_path
        (tmp_path / "yolov3.weights").write_bytes(CONTENT)
        assert fetch("yolov3", mirrors=()) == tmp_path / "yolov3.weights"
    with dask.config.set({"daskshare.models.cache-directory": None}):
        assert cache_directory().name == "models"
        assert "daskshare" in cache_directory().parts


def test_known_files():
    assert fetch_module.KNOWN_WEIGHTS["yolov3-spp"].sha256.startswith("87a1e8c8")
    assert len(MIRRORS) >= 2
    assert all(mirror.startswith("https://") and mirror.endswith("/") for mirror in MIRRORS)


def test_progress_bar(tmp_path, serve):
    code = (
        "import sys; from daskshare.models import fetch as f; "
        "f.KNOWN_WEIGHTS['yolov3'] = f.KnownWeights('yolov3.weights', sys.argv[1]); "
        "f.fetch('yolov3', directory=sys.argv[2], mirrors=(sys.argv[3],), progress=True)"
    )
    digest = hashlib.sha256(CONTENT).hexdigest()
    done = subprocess.run(
        [sys.executable, "-c", code, digest, str(tmp_path), serve("ok").url],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert "yolov3.weights" in done.stderr
    assert "100%" in done.stderr
