"""Preload script for workers: `dask worker ADDRESS --preload daskshare_worker.py`.

For clusters whose scheduler cannot be given a preload script. Where the scheduler has one, workers
need none; both together do no harm.
"""

from distributed import Worker


async def dask_setup(worker: Worker) -> None:
    """Run by each worker before it joins the scheduler."""
    try:
        from daskshare.worker_plugin import DaskshareWorkerPlugin

        await worker.plugin_add(plugin=DaskshareWorkerPlugin(), catch_errors=False)
    except Exception as error:
        # Dask logs a preload's exception and goes on without it; then tasks would fail later.
        raise SystemExit(f"daskshare could not be installed on this worker: {error}") from error
