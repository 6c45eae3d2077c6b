"""One Spark session for all tests here; skipped, with the reason, where Spark cannot run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import dask.config
import psutil
import pytest

from daskshare.host import HostClient

ROOT = Path(__file__).parents[2]
#: Bound of every wait; nothing here should come near it.
TIMEOUT = 60
OPTIONS = {
    # Spark's own defaults are for clusters; this is one machine with two cores.
    "spark.driver.memory": "1g",
    "spark.ui.enabled": "false",
    "spark.sql.shuffle.partitions": "2",
    "spark.default.parallelism": "2",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "64",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.python.daemon.module": "tests.spark.daemon",
}


def missing() -> str:
    """Why Spark cannot run here; "" when it can."""
    if importlib.util.find_spec("pyspark") is None:
        return "needs pyspark: pip install 'daskshare[spark]'"
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        return "needs Java 17 or newer: apt-get install openjdk-17-jre-headless"
    return ""


def spark_release():
    """(3, 5), for example; (0, 0) without pyspark."""
    if importlib.util.find_spec("pyspark") is None:
        return 0, 0
    import pyspark

    major, minor = pyspark.__version__.split(".")[:2]
    return int(major), int(minor)


#: For tests of what Spark 3 has not.
needs_data_sources = pytest.mark.skipif(
    spark_release() < (4, 0), reason="needs pyspark 4.0 or newer: Python data sources"
)


def pytest_collection_modifyitems(items):
    reason = missing()
    leaves_sockets = spark_release() < (4, 1)
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
            # pyspark's own, about versions and about Python's future.
            for kind in ("FutureWarning", "DeprecationWarning", "UserWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}:pyspark"))
            if leaves_sockets:
                # Older releases leave closing the sockets of collect() to the garbage collector.
                ignored = "ignore:unclosed <socket:ResourceWarning"
                item.add_marker(pytest.mark.filterwarnings(ignored))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def wait_until(condition):
    never = threading.Event()
    for _ in range(int(TIMEOUT / 0.05)):
        if condition():
            return True
        never.wait(0.05)
    return False


def host_processes(folder):
    """Hosts that were started on demand and use the folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "daskshare._host_process" in line and str(folder) in line:
            found.append(process)
    return found


@pytest.fixture(scope="package")
def host_folder():
    """Where the hosts of these tests are found: by the driver, and by Spark's Python workers."""
    # Short: the path of a Unix socket has at most 107 bytes.
    folder = tempfile.mkdtemp(prefix="ds-")
    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set({"daskshare.host.directory": folder}),
    ):
        patch.setenv("DASK_DASKSHARE__HOST__DIRECTORY", folder)
        patch.setenv("DASK_DASKSHARE__HOST__IDLE_TIMEOUT", "2s")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        yield folder
        ended = wait_until(lambda: not host_processes(folder))
        shutil.rmtree(folder)
        assert ended, "a host stayed behind"


@pytest.fixture(scope="package")
def spark(host_folder):
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[4]").appName("daskshare tests")
    for name, value in OPTIONS.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


@pytest.fixture
def host(host_folder):
    """A client of the host that the Spark tasks of the test use."""
    with HostClient("cpu") as client:
        yield client
