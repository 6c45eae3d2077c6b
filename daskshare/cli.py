"""The command ``daskshare``. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from daskshare._cli_completion import complete_classes, complete_models
from daskshare.errors import DaskshareError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["main"]

#: Exit statuses beside 0 and click's 2 for wrong usage.
EXIT_FAILED = 1
EXIT_CHUNKS_FAILED = 3
EXIT_INTERRUPTED = 130


class _Group(click.Group):
    """Turns daskshare's errors into one message, and Ctrl-C into advice."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DaskshareError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(EXIT_FAILED)
        except KeyboardInterrupt as error:
            notes = getattr(error, "__notes__", [])
            click.echo("\n".join(["Stopped.", *notes]), err=True)
            ctx.exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, end a run as Ctrl-C does."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import daskshare

        click.echo(f"daskshare {daskshare.__version__}")
        ctx.exit()


# Dask's command line takes the name from here: `dask daskshare`.
@click.group("daskshare", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version and exit.",
)
@click.option("-v", "--verbose", count=True, help="Log what happens; -vv: in detail.")
def main(verbose: int) -> None:
    """One copy of a model on each GPU, shared by every concurrent task of a Dask cluster.

    Options that have no flag are in Dask's configuration, under daskshare: a YAML file in
    ~/.config/dask, or environment variables such as DASK_DASKSHARE__ENGINE__MAX_WAIT=2ms. Log
    levels are there too, under logging: daskshare: debug.
    """
    if verbose:
        _log_at("info" if verbose == 1 else "debug")


def _log_at(level: str) -> None:
    """Ask Dask's logging for daskshare's messages, here and in workers that are started here."""
    import dask.config

    # Dask's own messages stay as quiet as they are without the flag.
    levels = {"daskshare": level, "distributed": dask.config.get("logging.distributed", "warning")}
    for name, value in levels.items():
        dask.config.set({f"logging.{name}": value})
        # A worker process sets its logging up before it gets this process's configuration.
        os.environ[f"DASK_LOGGING__{name.upper()}"] = str(value)
    if "distributed" in sys.modules:
        # It sets logging up when it is imported, which was too early.
        from distributed.config import initialize_logging

        initialize_logging(dask.config.config)


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise click.BadParameter(f"{value!r} holds an empty name; expected car,bus for example.")
    return names


@main.command(short_help="Find objects in videos and write them as Parquet.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(),
    help="Folder for the results of these videos; those of others in it are replaced.",
)
@click.option(
    "--model",
    metavar="NAME",
    default=None,
    shell_complete=complete_models,
    help="Model by name.  [default: yolov3-tiny]",
)
@click.option("--cfg", type=click.Path(), help="Darknet cfg of a network of your own.")
@click.option("--weights", type=click.Path(), help="Its weights: Darknet or safetensors.")
@click.option("--names", type=click.Path(), help="Its class names, one a line.")
@click.option("--input-size", type=click.IntRange(min=1), help="Side of the network's input.")
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1),
    default=0.25,
    show_default=True,
    help="Least confidence of a detection.",
)
@click.option(
    "--iou",
    type=click.FloatRange(0, 1),
    default=0.45,
    show_default=True,
    help="Boxes of a class that overlap more are one object.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Of the network.  [default: fp16 on a GPU, fp32 on a CPU]",
)
@click.option(
    "--classes",
    metavar="NAME,...",
    callback=_names,
    shell_complete=complete_classes,
    help="Only these, such as car,bus.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Largest batch, frames.")
@click.option("--scheduler", metavar="ADDRESS", help="Use this Dask cluster.")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Worker processes of the local cluster."
)
@click.option("--threads", type=click.IntRange(min=1), help="Tasks at once in each of them.")
@click.option(
    "--chunk-seconds",
    type=click.FloatRange(0, min_open=True),
    help="Aim for the length of a task's piece of video.  [default: 10]",
)
@click.option("--dashboard", is_flag=True, help="Show Dask's pages for the local cluster.")
@click.option("--annotate", is_flag=True, help="Also write videos with boxes, sheets, plots.")
@click.option("--overwrite", is_flag=True, help="Do everything again.")
@click.option(
    "--progress/--no-progress",
    default=None,
    help="Draw a progress bar.  [default: on a terminal]",
)
@click.pass_context
def detect(
    ctx: click.Context,
    paths: tuple[str, ...],
    output: str,
    model: str | None,
    cfg: str | None,
    weights: str | None,
    names: str | None,
    input_size: int | None,
    confidence: float,
    iou: float,
    precision: str | None,
    classes: list[str] | None,
    batch_size: int | None,
    scheduler: str | None,
    workers: int | None,
    threads: int | None,
    chunk_seconds: float | None,
    dashboard: bool,
    annotate: bool,
    overwrite: bool,
    progress: bool | None,
) -> None:
    """Find objects in videos (files, folders, globs, URLs) and write them as Parquet.

    The Parquet files in OUTPUT/detections get one row a detection, OUTPUT/chunks.parquet one row a
    piece of video. Run the same command again after an interruption: only what is missing is done.

    \b
    daskshare detect cams/ -o out --classes car,bus --annotate
    daskshare detect s3://bucket/cam.mp4 -o out --model yolov3 --scheduler tcp://10.0.0.5:8786

    Exit status: 0 all done; 1 an error; 2 wrong usage; 3 some pieces of video failed (the same
    command tries them again); 130 interrupted.
    """
    if scheduler is not None and (workers is not None or threads is not None or dashboard):
        raise click.UsageError(
            "--workers, --threads and --dashboard shape a local cluster; drop them or --scheduler."
        )
    from daskshare.client import yolov3
    from daskshare.results.connect import local_client, remote_client
    from daskshare.results.detect import detect_on
    from daskshare.results.summary import describe

    shared = yolov3(
        # A network of the user's own is named after its cfg.
        model or ("yolov3" if cfg else "yolov3-tiny"),
        cfg=cfg,
        weights=weights,
        names=names,
        input_size=input_size,
        precision=precision,
        confidence_threshold=confidence,
        iou_threshold=iou,
        classes=classes,
        max_batch_size=batch_size,
    )

    def connect() -> Client:
        if scheduler is not None:
            return remote_client(stack, scheduler)
        client = local_client(stack, workers=workers, threads=threads, dashboard=dashboard)
        if dashboard:
            click.echo(f"Dask's pages: {client.dashboard_link}", err=True)
        return client

    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminate_like_interrupt())
        summary = detect_on(
            connect,
            list(paths),
            shared,
            output,
            chunk_seconds=chunk_seconds,
            annotate=annotate,
            overwrite=overwrite,
            progress=sys.stderr.isatty() if progress is None else progress,
        )
    click.echo(str(summary))
    for path in summary.annotated:
        click.echo(f"  wrote {path}")
    if summary.failed:
        click.echo(
            f"Error: {len(summary.failed)} of {summary.chunks} pieces of video failed. First, "
            f"{describe(summary.failed[0])}\n{summary.chunks_path} lists all; the same command "
            "tries them again.",
            err=True,
        )
        ctx.exit(EXIT_CHUNKS_FAILED)


@main.command(short_help="Download a model's weights.")
@click.argument("name", shell_complete=complete_models)
def fetch(name: str) -> None:
    """Download a model's weights (yolov3, yolov3-spp, yolov3-tiny) and print where they lie."""
    from daskshare.models.fetch import fetch as fetch_weights

    click.echo(str(fetch_weights(name, progress=sys.stderr.isatty())))


@main.command(short_help="Run it on a real clip and show what sharing saves.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="demo-output",
    show_default=True,
    help="Folder for the results.",
)
def demo(output: Path) -> None:
    """Find cars, buses and people in a real clip, with tasks that share one model."""
    from daskshare.demo import run_demo

    with _terminate_like_interrupt():
        run_demo(output)


@main.command(short_help="Say what this machine lacks, and the fix.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option(
    "--require",
    type=click.Choice(["gpu", "nvdec", "spark", "jupyter"]),
    multiple=True,
    help="Count its absence as an error; may be given several times.",
)
@click.option("--strict", is_flag=True, help="Count warnings as errors.")
@click.option("--scheduler", metavar="ADDRESS", help="Also look at this Dask cluster's workers.")
@click.pass_context
def doctor(
    ctx: click.Context, as_json: bool, require: tuple[str, ...], strict: bool, scheduler: str | None
) -> None:
    """Say what this machine has and what is missing, and how to correct it.

    Looks at Python, versions that clash, video libraries, GPUs, driver, CuPy, NVDEC, compiler,
    Java for Spark, Jupyter, and daskshare's configuration.

    \b
    daskshare doctor
    daskshare doctor --require gpu --require nvdec --scheduler tcp://10.0.0.5:8786

    Exit status: 0 all is well, or works with warnings; 1 something will fail; 2 wrong usage.
    """
    import json

    from daskshare.doctor import report as reporting
    from daskshare.doctor.checks import diagnose
    from daskshare.doctor.findings import Status
    from daskshare.doctor.probe import probe_machine

    report = {"this machine": diagnose(probe_machine(), needs=require)}
    if scheduler is not None:
        from daskshare.doctor.cluster import diagnose_cluster, probe_cluster
        from daskshare.results.connect import remote_client

        with contextlib.ExitStack() as stack:
            cluster = probe_cluster(remote_client(stack, scheduler))
        # What is required is required of the workers.
        report = {"this machine": diagnose(probe_machine())}
        report |= diagnose_cluster(cluster, needs=require)
    answer = reporting.as_json(report, strict=strict)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        colours = {Status.OK: "green", Status.WARNING: "yellow", Status.ERROR: "red"}
        click.echo(
            reporting.render(
                report,
                width=min(shutil.get_terminal_size().columns, 120),
                style=lambda text, status: click.style(text, fg=colours.get(status)),
            )
        )
    ctx.exit(answer["exit_status"])
