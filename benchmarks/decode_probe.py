"""What the GPU's video decoder does here: capabilities, surfaces, times, speed, differences.

    python benchmarks/decode_probe.py VIDEO [--sessions 1,2,4,8] [--output probe.json]

Each step prints its own result or failure, so that one run shows all that is wrong.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import traceback
from typing import Any

import numpy as np

from daskshare.device import current_device
from daskshare.video import decode, nvdec
from daskshare.video.probe import probe_videos
from daskshare.video.sources import open_av

RESULTS: dict[str, Any] = {}


def step(name: str) -> Any:
    def run(function: Any) -> Any:
        print(f"--- {name}", flush=True)
        try:
            RESULTS[name] = function()
            print(json.dumps(RESULTS[name], indent=1, default=str), flush=True)
        except Exception as error:
            RESULTS[name] = {"failed": f"{type(error).__name__}: {error}"}
            traceback.print_exc()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video")
    parser.add_argument("--sessions", default="1,2,4,8")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    device = current_device()
    chunks = probe_videos(arguments.video, chunk_seconds=10)
    chunk = chunks[0]
    key = nvdec._key(chunk, device)
    print(chunk)

    @step("capabilities")
    def _() -> Any:
        return {
            f"{codec} {bits}": nvdec._capabilities(device.index, codec, bits)
            for codec in nvdec._CODECS
            for bits in (8, 10)
        }

    @step("refusal")
    def _() -> Any:
        return nvdec.refusal(chunk, device)

    @step("surfaces")
    def _() -> Any:
        found: dict[str, Any] = {}
        with (
            open_av(chunk.video) as container,
            nvdec._session(key) as session,
        ):
            stream = decode.video_stream(container, chunk)
            source = nvdec.NvdecFrames(chunk, container, device, batch_frames=8, fall_back=False)
            expected = chunk.pts()
            times = []
            for surface, ticks in source._surfaces(session, stream, int(expected[0])):
                times.append(ticks)
                if len(times) == 1:
                    planes = [int(surface.GetPtrToPlane(p)) for p in (0, 1)]
                    found = {
                        "format": str(surface.format),
                        "shape": surface.shape,
                        "strides": surface.strides,
                        "dtype": surface.dtype,
                        "framesize": surface.framesize(),
                        "chroma_offset": planes[1] - planes[0],
                        "views": [str(v.__cuda_array_interface__) for v in surface.cuda()],
                        "pitch": (planes[1] - planes[0]) / key.height,
                    }
        found["frames"] = len(times)
        found["expected_frames"] = len(expected)
        found["first_times"] = times[:8]
        found["first_expected"] = expected[:8].tolist()
        found["ascending"] = bool((np.diff(times) > 0).all())
        found["all_expected_came"] = set(expected.tolist()) <= set(times)
        return found

    @step("difference from the CPU")
    def _() -> Any:
        worst, count = 0, 0
        with (
            chunk.open_frames(decoder="pyav", batch_frames=16) as cpu,
            chunk.open_frames(device=device, decoder="nvdec", batch_frames=16) as gpu,
        ):
            for ours, theirs in zip(cpu, gpu, strict=True):
                difference = np.abs(ours.frames.astype(int) - theirs.frames.cpu().numpy())
                worst, count = max(worst, int(difference.max())), count + len(difference)
        return {"frames": count, "largest_difference": worst}

    @step("opening a session")
    def _() -> Any:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            with nvdec._session(key):
                seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    for name, options in (
        ("pyav", {"decoder": "pyav"}),
        ("nvdec", {"decoder": "nvdec", "device": device}),
    ):
        for sessions in map(int, arguments.sessions.split(",")):

            @step(f"{name}, {sessions} at once")
            def _(sessions: int = sessions, options: dict[str, Any] = options) -> Any:
                frames = [0] * sessions

                def work(place: int) -> None:
                    # Each thread takes every chunk, so that the loads are equal.
                    for one in chunks:
                        with one.open_frames(batch_frames=16, **options) as stream:
                            for batch in stream:
                                frames[place] += len(batch.pts_seconds)

                threads = [threading.Thread(target=work, args=(n,)) for n in range(sessions)]
                start = time.perf_counter()
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                seconds = time.perf_counter() - start
                return {"frames": sum(frames), "frames_per_second": sum(frames) / seconds}

    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(RESULTS, file, indent=1, default=str)


if __name__ == "__main__":
    main()
