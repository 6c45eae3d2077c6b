"""predict_batch_udf whose model is loaded once a device instead of once a Python worker."""

from __future__ import annotations

import inspect
import math
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

import cloudpickle

from daskshare.errors import ConfigurationError
from daskshare.host import HostedModel, PredictSpec
from daskshare.spark.connection import check_closure, client_of_process, task_device
from daskshare.spark.memory import release_unused

if TYPE_CHECKING:
    from pyspark.sql.types import DataType

__all__ = ["predict_batch_udf"]

# Whoever hands over less holds too little to give memory back while it waits, and who waits no
# longer than this, as for a GPU, too briefly.
_WORTH_RELEASING_BYTES = 2**20
_WORTH_RELEASING_SECONDS = 0.1


def predict_batch_udf(
    make_predict_fn: Callable[[], Callable[..., Any]],
    *,
    return_type: DataType,
    batch_size: int,
    input_tensor_shapes: list[list[int] | None] | Mapping[int, list[int]] | None = None,
    concurrent_calls: int = 1,
) -> Any:
    """Use a model in Spark as ``pyspark.ml.functions.predict_batch_udf`` does, with one copy of it.

    Same parameters and one more, same results. ``make_predict_fn`` runs once for each device of a
    machine, in the device's host, instead of once in each Python worker; and rows of concurrent
    tasks are put together into calls of at most ``batch_size`` rows.

    Parameters
    ----------
    make_predict_fn : callable
        Loads the model and returns ``predict``, which takes one or more NumPy arrays, rows first,
        and returns an array, a dict of arrays or a list of dicts, with as many rows. What
        ``predict`` says of a row must not depend on the rows next to it.
    return_type : pyspark.sql.types.DataType
        Of the column.
    batch_size : int
        Rows of a call at most.
    input_tensor_shapes : list or mapping, optional
        Shapes of the rows of columns that hold flattened tensors.
    concurrent_calls : int
        Calls of ``predict`` that may run at once on a device, in threads of one process. One, as in
        a Python worker of Spark, unless ``predict`` is known to be thread-safe: it must then write
        to nothing that calls share, which the forward pass of a network in evaluation mode does
        not. Without a GPU, as many as the machine has cores is fastest: torch's threads and the
        ``batch_size`` rows are divided among the calls, so that memory stays that of one.

    Returns
    -------
    callable
        A pandas UDF.

    Raises
    ------
    ConfigurationError
        When ``make_predict_fn`` cannot be pickled, or carries more than 64 MiB; when
        ``concurrent_calls`` is no whole number of 1 or more.

    Notes
    -----
    Called in the driver; works with Spark classic and Spark Connect. Executors need daskshare. The
    function is handed to the host as pickled code over a socket that only the same user's
    processes can reach (``daskshare.host.allow-code``). In the host there is no Spark:
    broadcast variables and ``SparkFiles`` do not work inside ``make_predict_fn``. It finds the
    Python worker's modules, and its files while it loads. Each call of this function makes a model
    of its own, so that new weights are read; it is unloaded some time after the last Python worker
    that used it has ended.

    Examples
    --------
    >>> from daskshare.spark import predict_batch_udf        # instead of pyspark.ml.functions
    >>> classify = predict_batch_udf(                                # doctest: +SKIP
    ...     make_classifier, return_type=FloatType(), batch_size=64, input_tensor_shapes=[[784]]
    ... )
    >>> df.withColumn("score", classify("pixels"))                   # doctest: +SKIP
    """
    from pyspark.ml.functions import predict_batch_udf as of_pyspark

    if type(concurrent_calls) is not int or concurrent_calls < 1:
        raise ConfigurationError(
            f"Got concurrent_calls={concurrent_calls!r}; expected a whole number of 1 or more.",
            option="concurrent_calls",
        )
    try:
        # Not pyspark's own copy of cloudpickle: a host needs no pyspark.
        loader = cloudpickle.dumps(make_predict_fn)
    except Exception as error:
        raise ConfigurationError(
            f"make_predict_fn cannot be pickled ({type(error).__name__}: {error}); expected a "
            "function that can travel to the executors. Open files, sessions and the like inside "
            "it, not around it.",
            option="make_predict_fn",
        ) from error
    name = getattr(make_predict_fn, "__qualname__", type(make_predict_fn).__qualname__)
    check_closure(f"make_predict_fn ({name})", len(loader))
    remote = _RemotePredict(name, uuid.uuid4().hex, loader, batch_size, concurrent_calls)
    return of_pyspark(
        remote,
        return_type=return_type,
        batch_size=batch_size,
        input_tensor_shapes=input_tensor_shapes,
    )


class _RemotePredict:
    """What pyspark calls in a Python worker for the predict function."""

    def __init__(
        self, name: str, key: str, loader: bytes, max_batch_size: int, concurrent_calls: int
    ) -> None:
        self._name = name
        self._key = key
        self._loader = loader
        self._max_batch_size = max_batch_size
        self._concurrent_calls = concurrent_calls

    def __call__(self) -> Callable[..., Any]:
        models: dict[str, HostedModel] = {}
        waited_seconds = math.inf

        def call(arrays: Sequence[Any] | None) -> Any:
            nonlocal waited_seconds
            device = task_device()
            shared = client_of_process(device, allow_code=True)
            with shared.lock:
                if device not in models:
                    # The first of a machine's workers waits for a load, and the others with it.
                    release_unused()
                    models[device] = shared.client.open(self._spec())
                model = models[device]
                if arrays is None:
                    return model.info["parameters"]
                request = shared.client.submit("infer", value=list(arrays), model=model)
                submitted_seconds = monotonic()
                if (
                    waited_seconds > _WORTH_RELEASING_SECONDS
                    and shared.client.num_pending_bytes >= _WORTH_RELEASING_BYTES
                ):
                    release_unused()
                result = shared.client.result(request)
                waited_seconds = monotonic() - submitted_seconds
                return result

        def predict(*arrays: Any) -> Any:
            return call(arrays)

        # pyspark counts the parameters to tell one tensor from several columns.
        count = call(None)
        kind = inspect.Parameter.POSITIONAL_ONLY
        predict.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(f"input{i}", kind) for i in range(count)]
        )
        return predict

    def _spec(self) -> PredictSpec:
        return PredictSpec(
            self._name,
            self._key,
            self._loader,
            self._max_batch_size,
            paths=tuple(path for path in sys.path if path),
            directory=os.getcwd(),
            concurrent_calls=self._concurrent_calls,
        )
