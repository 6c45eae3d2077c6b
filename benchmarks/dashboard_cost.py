"""What an open dashboard page costs the scheduler, by the size of the cluster.

A real scheduler with its dashboard runs in a process of its own; its workers are simulated: they
send no heartbeats over a network, but their reports, the real ones' size and form, are replaced as
often as real workers would send them. One client holds the page open over Bokeh's websocket and
reads everything that is sent, as a browser does. Cost is the CPU time of the scheduler's process
with the page open, less the same without it, over the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import re
import time
import urllib.request
from typing import Any

import dask
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from benchmarks.report import Report, argument_parser
from daskshare.timesplit import STATES

GIB = 2**30
MODEL_NAMES = (
    *("yolov3", "yolov3-tiny", "resnet50", "vehicle-colour", "plate-reader", "pedestrians"),
    *("depth", "segmenter", "face-blur", "helmet", "traffic-light", "lane", "clip-b32"),
    *("animal", "fire-smoke", "parking", "bus-number", "crowd", "weather", "re-id"),
)


class SimulatedWorkers:
    """Reports of workers that live only here.

    Parameters
    ----------
    num_gpus, num_models : int
        Each GPU holds up to that many of that many models.
    seed : int
        Of all random choices.
    """

    def __init__(self, num_gpus: int, num_models: int, *, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.names = [MODEL_NAMES[i % len(MODEL_NAMES)] for i in range(num_models)]
        self.frames = [[0.0] * num_models for _ in range(num_gpus)]
        self.loads = [
            [self.random.choices((0.0, 1.0), (1, 2))[0] for _ in self.names]
            for _ in range(num_gpus)
        ]
        # Some decode too slowly, some have nothing to do.
        self.busy = [self.random.choice((0.93, 0.85, 0.6, 0.3, 0.05)) for _ in range(num_gpus)]

    def reports(self, seconds: float) -> list[dict[str, Any]]:
        """Return every worker's report, ``seconds`` after the last."""
        return [self._report(gpu, seconds) for gpu in range(len(self.frames))]

    def _report(self, gpu: int, seconds: float) -> dict[str, Any]:
        pick = self.random
        busy = min(0.99, max(0.0, self.busy[gpu] + pick.uniform(-0.04, 0.04)))
        rest = 1 - busy
        shares = {"loading": 0.02, "decoding": 0.62, "input": 0.16, "scheduler": 0.2}
        models: dict[str, Any] = {}
        recent: dict[str, Any] = {}
        present = sum(self.loads[gpu]) or 1
        for i, name in enumerate(self.names):
            key = f"{i:08x}" + "0" * 56
            here = bool(self.loads[gpu][i])
            rate = busy * 5500 / present * pick.uniform(0.8, 1.2) if here else 0.0
            self.frames[gpu][i] += rate * seconds
            frames = int(self.frames[gpu][i])
            batches = frames // 57
            # A few are being loaded or could not be.
            place = (gpu * 31 + i * 7) % 211
            state = "ready" if here else "loading" if place == 5 else "unloaded"
            models[key] = {
                "name": name,
                "key": key,
                "state": state,
                "loads": int(here),
                "leases": 16 // len(self.names) + 1 if rate > 50 else 0,
                "model_bytes": int((0.12 + 0.02 * i) * GIB) if here else 0,
                "frames": frames,
                "batches": batches,
                "mean_batch_size": 57.0,
                "busy_seconds": frames / 5500,
                "errors": 0,
                "peak_leases": 16 // len(self.names) + 2 if here else 0,
                "load_error": "ModelLoadError: no such file" if not here and place == 9 else "",
                "rebuilds": 0,
                "engine": {
                    "frames": frames,
                    "batches": batches,
                    "queue_frames": int(rate / 30),
                    "queue_age_seconds": 0.02 + 0.4 * (busy > 0.9) * pick.random(),
                    "busy_seconds": frames / 5500,
                    "mode": "compiled",
                    "graphs": 7,
                    "ceiling": 64,
                    "errors": 0,
                    "compile_error": "",
                    "graph_error": "",
                }
                if here
                else None,
            }
            if rate:
                recent[key] = rate
        return {
            "state": "ready",
            "reason": "",
            "share": f"share-{gpu}",
            "device": {
                "kind": "cuda",
                "index": gpu % 8,
                "uuid": f"GPU-{gpu:032x}",
                "name": "simulated GPU",
                "total_bytes": 80 * GIB,
            },
            "budget_bytes": 64 * GIB,
            "models": models,
            "batch_bins": {"1": 3, "32": 900, "64": int(sum(self.frames[gpu]) / 60)},
            "recent": {
                "seconds": 5.0,
                "time_fraction": {
                    state: busy if state == "busy" else rest * shares[state] for state in STATES
                },
                "frames": int(5 * sum(recent.values())),
                "batches": int(5 * sum(recent.values()) / 58) + 1,
                "batch_bins": {"16": 1, "32": 8, "64": int(sum(recent.values()) / 12)},
                "frames_per_second": recent,
            },
        }


@contextlib.asynccontextmanager
async def simulated_cluster(num_gpus: int, num_models: int) -> Any:
    """A scheduler with a dashboard, and daskshare on it, whose workers are simulated."""
    from distributed import Scheduler, Status
    from distributed.scheduler import WorkerState

    from daskshare.scheduler_plugin import install_on_scheduler

    # These two of Dask's would miss real workers.
    quiet = {
        "distributed.scheduler.active-memory-manager.start": False,
        "distributed.scheduler.worker-ttl": None,
    }
    with dask.config.set(quiet):
        scheduler = Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0")
    async with scheduler:
        await install_on_scheduler(scheduler)
        workers = SimulatedWorkers(num_gpus, num_models)
        for gpu in range(num_gpus):
            address = f"tcp://10.0.{gpu // 8}.{gpu % 8 + 1}:40000"
            scheduler.workers[address] = WorkerState(
                address=address,
                status=Status.running,
                pid=1,
                scheduler=scheduler,
                name=f"node{gpu // 8:02d}-gpu{gpu % 8}",
                nthreads=16,
                memory_limit=0,
                local_directory="",
                nanny="",
                server_id=address,
            )
        interval_seconds = 1.0 if num_gpus < 50 else 2.0

        async def report() -> None:
            while True:
                reports = workers.reports(interval_seconds)
                for state, one in zip(list(scheduler.workers.values()), reports, strict=True):
                    state.metrics["daskshare"] = one
                await asyncio.sleep(interval_seconds)

        reporting = asyncio.create_task(report())
        await asyncio.sleep(0)
        try:
            yield scheduler
        finally:
            reporting.cancel()
            # Nothing of Dask is to say farewell to workers that do not exist.
            scheduler.workers.clear()


def scheduler_main(num_gpus: int, num_models: int, pipe: Any) -> None:
    """Process of the scheduler: tells its port, then its CPU seconds whenever asked."""

    async def run() -> None:
        async with simulated_cluster(num_gpus, num_models) as scheduler:
            pipe.send(scheduler.http_server.port)
            while await asyncio.to_thread(pipe.recv) is not None:
                pipe.send(time.process_time())

    asyncio.run(run())


def page_main(port: int, pipe: Any) -> None:
    """Process of the one who looks: opens the page as a browser does and reads what comes."""

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/daskshare") as answer:
        found = re.search(r'"token":"([^"]+)"', answer.read().decode())
    assert found, "the page carries no session token"
    token = found[1]

    async def run() -> None:
        request = HTTPRequest(
            f"ws://127.0.0.1:{port}/daskshare/ws",
            headers={"Sec-WebSocket-Protocol": f"bokeh, {token}"},
        )
        socket = await websocket_connect(request)
        pipe.send("open")
        told = asyncio.create_task(asyncio.to_thread(pipe.recv))
        messages = num_bytes = 0
        while not told.done():
            coming = asyncio.ensure_future(socket.read_message())
            await asyncio.wait((told, coming), return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                message = coming.result()
                assert message is not None, "the scheduler closed the page"
                messages += 1
                num_bytes += len(message)
        pipe.send((messages, num_bytes))
        socket.close()

    asyncio.run(run())


def measure(num_gpus: int, num_models: int, seconds: float) -> dict[str, Any]:
    """CPU use of a scheduler, without and with an open page."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    scheduler = context.Process(target=scheduler_main, args=(num_gpus, num_models, theirs))
    scheduler.start()
    port = ours.recv()

    def cpu_seconds() -> float:
        ours.send("cpu")
        return float(ours.recv())

    def over(length_seconds: float) -> float:
        before = cpu_seconds()
        time.sleep(length_seconds)
        return (cpu_seconds() - before) / length_seconds

    over(2.0)
    closed = [over(seconds)]
    mine, its = context.Pipe()
    page = context.Process(target=page_main, args=(port, its))
    page.start()
    assert mine.recv() == "open"
    opened_at = time.perf_counter()
    over(3.0)
    opened = [over(seconds), over(seconds)]
    mine.send("close")
    messages, num_bytes = mine.recv()
    page_seconds = time.perf_counter() - opened_at
    page.join()
    over(2.0)
    closed.append(over(seconds))
    started = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/daskshare.json") as answer:
        json_bytes = len(answer.read())
    json_seconds = time.perf_counter() - started
    ours.send(None)
    scheduler.join()
    # The first message only says that the page is open.
    assert messages > 1, "an open page got no figures"
    return {
        "gpus": num_gpus,
        "models": num_models,
        "closed_percent_of_a_core": round(100 * sum(closed) / len(closed), 3),
        "open_percent_of_a_core": round(100 * sum(opened) / len(opened), 3),
        "page_percent_of_a_core": round(100 * (sum(opened) - sum(closed)) / 2, 3),
        "page_bytes_per_second": round(num_bytes / page_seconds),
        "json_bytes": json_bytes,
        "json_milliseconds": round(1000 * json_seconds, 1),
    }


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument(
        "--clusters",
        default="1x1,8x4,100x20",
        help="GPUs x models, with commas between (default: %(default)s)",
    )
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    report = Report("dashboard_cost", settings={"seconds": arguments.seconds})
    for size in arguments.clusters.split(","):
        num_gpus, num_models = map(int, size.split("x"))
        row = measure(num_gpus, num_models, arguments.seconds)
        report.add_row(**row)
        report.add_bar(
            f"an open page at {num_gpus} GPUs and {num_models} models",
            row["page_percent_of_a_core"],
            "% of a core",
            bound=1.0,
            comparison="<",
        )
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
