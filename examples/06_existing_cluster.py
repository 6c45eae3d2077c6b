"""Add daskshare to a Dask cluster that is already running.

    python examples/06_existing_cluster.py [SCHEDULER-ADDRESS]

Without an address it starts a plain Dask cluster to stand for yours, which knows nothing of
daskshare, and lets a worker join afterwards. On a cluster of several machines daskshare must be
installed on the scheduler and the workers.
"""

import sys

import numpy as np
from distributed import Client, LocalCluster

import daskshare


def load_scale(device):
    """Any model; see 02_any_torch_model.py."""
    return lambda batch: batch * 2


def use(client) -> None:
    # Once, from any client; again does no harm. Tasks that run go on running.
    daskshare.install(client)

    model = daskshare.share(load_scale, name="scale")
    # Not needed: copies follow the tasks. It has one on each worker before the first task.
    daskshare.load(client, model, replicas=len(client.nthreads()))
    futures = client.map(model, [np.full((4, 3), i, np.float32) for i in range(20)])
    right = all(np.all(result == 2 * i) for i, result in enumerate(client.gather(futures)))
    print(f"20 tasks, results {'right' if right else 'WRONG'}")
    for worker, report in sorted(daskshare.stats(client).items()):
        print(f"  {worker}: {report['state']}, {report['loads']} copy, {report['frames']} items")


def main() -> None:
    if len(sys.argv) > 1:
        with Client(sys.argv[1]) as client:
            use(client)
        return
    with LocalCluster(n_workers=1, threads_per_worker=4) as cluster, Client(cluster) as client:
        print(f"before: {[report['state'] for report in daskshare.stats(client).values()]}")
        use(client)
        # Workers that join later get it from the scheduler.
        cluster.scale(2)
        client.wait_for_workers(2)
        use(client)


if __name__ == "__main__":
    main()
