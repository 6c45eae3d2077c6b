"""From compressed video to a table of boxes on one GPU, beside what its decoder can do alone.

48 copies of a clip go through ``daskshare.detect`` on a dask-cuda worker; the ceiling is NVDEC
decoding the same files and throwing the frames away, in threads and in processes. The clip is the
demo's, scaled up and repeated. Frames a second count from the first task to the last; the whole
call includes reading the files' indexes, and a further figure times the whole command.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import workload
from benchmarks.report import Report, argument_parser
from daskshare.device import list_devices

ENCODERS = {
    "h264": ("libx264", {"preset": "veryfast", "crf": "23", "x264-params": "keyint=50:bframes=2"}),
    "hevc": (
        "libx265",
        {"preset": "ultrafast", "crf": "26", "x265-params": "keyint=50:log-level=0"},
    ),
}
SIZES = {"720p": (1280, 720), "1080p": (1920, 1080), "2160p": (3840, 2160)}


def make_clip(path: Path, codec: str, size: str, num_frames: int) -> None:
    """Write a clip: the demo's frames scaled up, encoded once and repeated packet by packet."""
    import av

    from daskshare.demo import demo_clip

    width, height = SIZES[size]
    encoder, options = ENCODERS[codec]
    once = path.with_name(f"once-{path.name}")
    with av.open(str(demo_clip())) as source, av.open(str(once), "w") as target:
        stream = target.add_stream(encoder, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, frame in enumerate(source.decode(video=0)):
            scaled = frame.reformat(width, height, "yuv420p", interpolation="BILINEAR")
            scaled.pts, scaled.time_base = number, Fraction(1, 25)
            target.mux(stream.encode(scaled))
        target.mux(stream.encode(None))
    with av.open(str(path), "w") as target:
        stream = None
        written, offset = 0, 0
        while written < num_frames:
            with av.open(str(once)) as source:
                video = source.streams.video[0]
                stream = stream or target.add_stream_from_template(video)
                length = int(video.duration)
                for packet in source.demux(video):
                    if packet.dts is None:
                        continue
                    packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                    packet.stream = stream
                    target.mux(packet)
                    written += 1
                offset += length
    once.unlink()


def decode_alone(path: str) -> int:
    """Decode a file on the GPU with the decoder's own demultiplexer; frames stay there, unused."""
    import PyNvVideoCodec as nvc

    demuxer = nvc.CreateDemuxer(path)
    decoder = nvc.CreateDecoder(gpuid=0, codec=demuxer.GetNvCodecId(), usedevicememory=True)
    frames = 0
    for packet in demuxer:
        frames += len(decoder.Decode(packet))
    return frames


def decode_in_batches(path: str) -> int:
    """Decode a file with the library's own loop, which leaves the interpreter alone for longer."""
    import PyNvVideoCodec as nvc

    decoder = nvc.SimpleDecoder(path, gpu_id=0, use_device_memory=True)
    left = frames = len(decoder)
    while left > 0:
        left -= len(decoder.get_batch_frames(min(left, 16)))
    return frames


def rate_of_threads(paths: list[str], sessions: int, decode: Any = decode_alone) -> float:
    """Frames a second of ``sessions`` threads that share the files."""
    decode(paths[0])
    with ThreadPoolExecutor(sessions) as pool:
        started = time.perf_counter()
        frames = sum(pool.map(decode, paths))
        return frames / (time.perf_counter() - started)


def rate_of_batches(paths: list[str], sessions: int) -> float:
    """As :func:`rate_of_threads`, with the library's own loop."""
    return rate_of_threads(paths, sessions, decode_in_batches)


def process_main(paths: list[str], barrier: Any, results: Any) -> None:
    decode_alone(paths[0])
    barrier.wait()
    started = time.time()
    frames = sum(map(decode_alone, paths))
    results.put((frames, started, time.time()))


def rate_of_processes(paths: list[str], sessions: int) -> float:
    """Frames a second of as many processes, so that no interpreter's lock is in the way."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(sessions), context.Queue()
    processes = [
        context.Process(target=process_main, args=(paths[i::sessions], barrier, results))
        for i in range(sessions)
    ]
    for process in processes:
        process.start()
    rate = workload.rate([results.get(timeout=300) for _ in processes])
    for process in processes:
        process.join()
    return rate


CEILINGS = {
    "threads": rate_of_threads,
    "threads, library's loop": rate_of_batches,
    "processes": rate_of_processes,
}


class Watch(workload.Every):
    """Reads the GPU's memory; ``peak_bytes`` is the most it saw."""

    def __init__(self) -> None:
        super().__init__(0.1, self._look)
        self.peak_bytes = 0

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, workload.gpu_used_bytes())


def measure_daskshare(
    paths: list[str], scratch: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run the job several times in one warm cluster."""
    from distributed import Client

    import daskshare
    from benchmarks.sharing import wait_ready

    weights = workload.random_weights(arguments.model)
    before = workload.gpu_used_bytes()
    rates, whole_rates, detections = [], [], 0
    cluster = daskshare.local_cluster(threads_per_worker=arguments.threads, dashboard_address=":0")
    with cluster, Client(cluster) as client, contextlib.ExitStack() as stack:
        daskshare.install(client)
        model = daskshare.yolov3(arguments.model, weights=weights, precision="fp16")
        daskshare.detect(paths[:2], model, scratch / "warm", client=client, progress=False)
        client.submit(wait_ready, model, 240, pure=False).result()
        # At full rate: not while kernels are tried and eager passes serve.
        watch = stack.enter_context(Watch())
        for turn in range(arguments.repeat):
            started = time.perf_counter()
            summary = daskshare.detect(
                paths, model, scratch / f"out-{turn}", client=client, progress=False
            )
            seconds = time.perf_counter() - started
            rates.append(summary.frames_per_second)
            whole_rates.append(summary.frames / seconds)
            detections = summary.num_detections
            print(
                f"{summary.frames} frames in {seconds:.2f} s: {whole_rates[-1]:.0f}/s, "
                f"{rates[-1]:.0f}/s from the first task on",
                file=sys.stderr,
                flush=True,
            )
            if summary.failed or set(summary.decoders) != {"nvdec"}:
                print(f"failed {summary.failed[:2]}, decoders {summary.decoders}", file=sys.stderr)
        (worker,) = daskshare.stats(client).values()
        (entry,) = worker["models"].values()
    return {
        "frames_per_second": median(rates),
        "whole_call_per_second": median(whole_rates),
        "detections": detections,
        "mean_batch_size": entry["mean_batch_size"],
        "peak_bytes": watch.peak_bytes - before,
        "decoders": summary.decoders,
    }


def measure_command(paths: list[str], scratch: Path, arguments: argparse.Namespace) -> float:
    """Frames a second of ``daskshare detect`` from the start of its process to its end."""
    weights = workload.random_weights(arguments.model)
    started = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "daskshare", "detect", *paths, "--model", arguments.model),
            *("--weights", str(weights), "--precision", "fp16", "--no-progress"),
            *("--output", str(scratch / "command"), "--threads", str(arguments.threads)),
        ],
        check=True,
        stdout=sys.stderr,
    )
    return len(paths) * arguments.frames / (time.perf_counter() - started)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="yolov3")
    parser.add_argument("--cases", default="h264-1080p", help="such as h264-1080p,hevc-720p")
    parser.add_argument("--copies", type=int, default=48)
    parser.add_argument("--frames", type=int, default=1500, help="of the clip")
    parser.add_argument("--sessions", default="8,16", help="of NVDEC alone")
    parser.add_argument("--ceilings", default=";".join(CEILINGS), help="ways to decode alone")
    parser.add_argument("--threads", type=int, default=16, help="task threads of the worker")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--command", action="store_true", help="also time the whole command")
    arguments = parser.parse_args()
    if not list_devices():
        parser.exit(0, "benchmarks.video needs an NVIDIA GPU; nothing was measured.\n")
    report = Report("video", settings={k: str(v) for k, v in vars(arguments).items()})
    for case in arguments.cases.split(","):
        codec, size = case.split("-")
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            first = scratch / "clip-00.mp4"
            make_clip(first, codec, size, arguments.frames)
            megabits = first.stat().st_size * 8 / 1e6 / (arguments.frames / 25)
            paths = [str(first)] + [
                str(shutil.copy(first, scratch / f"clip-{number:02}.mp4"))
                for number in range(1, arguments.copies)
            ]
            ceiling = 0.0
            for sessions in map(int, arguments.sessions.split(",")):
                for kind in arguments.ceilings.split(";"):
                    measure = CEILINGS[kind]
                    rate = measure(paths[: 2 * sessions], sessions)
                    ceiling = max(ceiling, rate)
                    way = f"NVDEC alone, {sessions} {kind}"
                    report.add_row(case=case, way=way, frames_per_second=round(rate, 1))
                    print(f"{case} {way}: {rate:.0f} frames/s", file=sys.stderr)
            ours = measure_daskshare(paths, scratch, arguments)
            report.add_row(
                case=case,
                way="daskshare.detect",
                frames_per_second=round(ours["frames_per_second"], 1),
                of_ceiling=round(ours["frames_per_second"] / ceiling, 3),
                whole_call_per_second=round(ours["whole_call_per_second"], 1),
                megabits_per_second=round(megabits, 1),
                mean_batch_size=round(ours["mean_batch_size"], 1),
                peak_mib=round(ours["peak_bytes"] / 2**20),
                detections=ours["detections"],
            )
            if size != "2160p":
                ratio = ours["frames_per_second"] / ceiling
                report.add_bar(f"{case}: of NVDEC's ceiling", ratio, "x", bound=0.93)
                gib = ours["peak_bytes"] / 2**30
                report.add_bar(f"{case}: worker's memory", gib, "GiB", bound=3, comparison="<=")
            if arguments.command:
                rate = measure_command(paths, scratch, arguments)
                report.add_row(case=case, way="whole command", frames_per_second=round(rate, 1))
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
