"""What metrics cost at full rate: frames a second with them and without, in turns.

Tasks of one worker hand over frames from host memory. With metrics: the report that daskshare adds
to each heartbeat of Dask's, and a scrape of the worker's and the scheduler's ``/metrics`` every
five seconds; Prometheus takes a minute unless told otherwise. Without: neither.
"""

from __future__ import annotations

import itertools
import sys
import urllib.request
from statistics import median
from typing import Any

from benchmarks import workload
from benchmarks.report import Report, argument_parser
from benchmarks.sharing import task, wait_ready
from daskshare.worker_plugin import PLUGIN_NAME


def report_with_heartbeats(wanted: bool, *, dask_worker: Any) -> None:
    """Runs on the worker's event loop: add daskshare's report to heartbeats, or leave it out."""
    if wanted:
        plugin = dask_worker.plugins[PLUGIN_NAME]
        dask_worker.metrics[PLUGIN_NAME] = plugin.heartbeat_report
    else:
        dask_worker.metrics.pop(PLUGIN_NAME, None)


class Scraper(workload.Every):
    """Reads some pages; ``sizes`` are the last ones', ``count`` says how often all were read."""

    def __init__(self, urls: list[str], interval_seconds: float) -> None:
        super().__init__(interval_seconds, self._read)
        self.sizes: list[int] = []
        self.count = 0
        self._urls = urls

    def _read(self) -> None:
        self.sizes = []
        for url in self._urls:
            with urllib.request.urlopen(url, timeout=10) as page:
                self.sizes.append(len(page.read()))
        self.count += 1


def turn(client: Any, model: Any, arguments: Any) -> float:
    """Frames a second of as many tasks as the worker has threads."""
    settings = {"request_frames": arguments.request_frames, "input_size": arguments.input_size}
    tasks = [
        client.submit(task, model, place, settings, arguments.seconds, pure=False)
        for place in range(sum(client.nthreads().values()))
    ]
    return workload.rate(client.gather(tasks))


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", help="default: yolov3 on a GPU, yolov3-tiny without")
    parser.add_argument("--input-size", type=int, default=416)
    parser.add_argument("--request-frames", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn")
    parser.add_argument("--scrape-seconds", type=float, default=5.0, help="from scrape to scrape")
    parser.add_argument("--turns", type=int, default=8, help="with metrics, and as many without")
    arguments = parser.parse_args()

    from distributed import Client

    import daskshare
    from daskshare.cluster import count_gpus

    gpus = count_gpus()
    model = arguments.model or ("yolov3" if gpus else "yolov3-tiny")
    options: dict[str, Any] = {"CUDA_VISIBLE_DEVICES": "0"} if gpus else {"threads_per_worker": 4}
    report = Report("metrics_cost", settings={k: str(v) for k, v in vars(arguments).items()})
    rates: dict[bool, list[float]] = {True: [], False: []}
    with (
        daskshare.local_cluster(
            dashboard_address=":0", worker_dashboard_address=":0", **options
        ) as cluster,
        Client(cluster) as client,
    ):
        daskshare.install(client)
        shared = daskshare.yolov3(
            model, weights=workload.random_weights(model), input_size=arguments.input_size
        )
        client.submit(wait_ready, shared, 300, pure=False).result()
        turn(client, shared, arguments)
        (worker,) = client.scheduler_info(n_workers=-1)["workers"].values()
        urls = [
            f"http://{worker['host']}:{worker['services']['dashboard']}/metrics",
            cluster.dashboard_link.replace("/status", "/metrics"),
        ]
        orders = itertools.cycle([(True, False), (False, True)])
        for _, order in zip(range(arguments.turns), orders, strict=False):
            for wanted in order:
                client.run(report_with_heartbeats, wanted)
                if wanted:
                    with Scraper(urls, arguments.scrape_seconds) as scraper:
                        rates[True].append(turn(client, shared, arguments))
                    if not scraper.count:
                        raise RuntimeError(
                            "a turn was over before the first scrape; give --seconds"
                        )
                else:
                    rates[False].append(turn(client, shared, arguments))
            print(f"with {rates[True][-1]:.1f}, without {rates[False][-1]:.1f}", file=sys.stderr)
    for wanted, way in ((True, "with metrics"), (False, "without")):
        report.add_row(way=way, frames_per_second=round(median(rates[wanted]), 1))
    report.rows[0]["bytes_a_scrape"] = sum(scraper.sizes)
    pairs = zip(rates[True], rates[False], strict=True)
    lost = 1 - median(on / off for on, off in pairs)
    report.add_bar("frames/s lost to metrics", lost, "x", bound=0.01, comparison="<=")
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
