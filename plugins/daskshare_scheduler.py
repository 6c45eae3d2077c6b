"""Preload script for a scheduler: `dask scheduler --preload daskshare_scheduler.py`.

Installs daskshare on the scheduler and on every worker that ever joins it, so that neither a
worker's command line nor a user's program needs a word about it. daskshare must be installed on
scheduler and workers.
"""

from distributed import Scheduler


async def dask_setup(scheduler: Scheduler) -> None:
    """Run by the scheduler when it starts."""
    try:
        from daskshare.scheduler_plugin import install_on_scheduler

        await install_on_scheduler(scheduler)
    except Exception as error:
        # Dask logs a preload's exception and goes on without it; a scheduler like that is useless.
        raise SystemExit(f"daskshare could not be installed on the scheduler: {error}") from error
