"""What a user's program calls: install(), SharedModel and the functions that make one, stats()."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distributed.protocol.pickle import dumps

from daskshare.errors import ConfigurationError, InvalidInputError, NotOnWorkerError
from daskshare.models.spec import Detections, FrameSource, ModelSpec
from daskshare.models.torch_model import torch_model_spec
from daskshare.notebook import ClusterStats
from daskshare.option_names import check_option_names
from daskshare.scheduler_plugin import ask_allocator, install_on_scheduler
from daskshare.streaming import stream
from daskshare.worker_plugin import current_task, local_share, worker_report_async

if TYPE_CHECKING:
    import os

    import torch
    from distributed import Client

    from daskshare.share import Lease

__all__ = ["SharedModel", "install", "load", "share", "stats", "unload", "why", "yolov3"]

#: Modules in which Dask resolves annotations.
_RESOLVERS = ("distributed.scheduler", "dask._expr")


class _AnnotatedModel(str):
    """Key of a model with its handle: what an annotation becomes. Travels to workers as a str."""

    __slots__ = ("handle",)
    handle: SharedModel


class SharedModel:
    """Handle of a model of which each worker keeps one copy; call it inside Dask tasks.

    Making, pickling or comparing one loads nothing. The first task that calls it on a worker loads
    the model there; all tasks' inputs are batched together.

    Parameters
    ----------
    spec : ModelSpec
        Which model.

    Attributes
    ----------
    spec : ModelSpec
        As given.
    name, key : str
        The spec's. Handles of equal keys are equal and share one copy.

    Examples
    --------
    >>> yolo = daskshare.yolov3("yolov3-tiny")                       # doctest: +SKIP
    >>> client.submit(yolo, frames).result()                         # doctest: +SKIP
    [Detections(...), Detections(...)]
    """

    __slots__ = ("__name__", "__qualname__", "spec")

    #: By this, the scheduler knows a task that needs a model.
    __daskshare_model__ = True

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        # Dask names tasks after the function's __name__.
        self.__name__ = self.__qualname__ = spec.name

    @property
    def name(self) -> str:
        """The model's name, for people."""
        return self.spec.name

    @property
    def key(self) -> str:
        """Digest of all that decides what the model computes."""
        return self.spec.key

    def __call__(self, inputs: Any, *, computing_meta: bool = False) -> Any:
        """Run the model on ``inputs``; blocks until the results are there.

        Parameters
        ----------
        inputs : array, tensor, list of arrays, FrameSource, or iterable of FrameSources
            For YOLO-v3, frames: uint8, shape (n, height, width, 3), RGB; or a list of frames
            (height, width, 3) of any sizes. NumPy, torch or CuPy; memory of the worker's own
            device is read in place. Or video: a chunk, or a list or iterator of chunks (a
            partition of :func:`daskshare.read_video`'s bag). For models of
            :func:`daskshare.share`: whatever numbers the model takes, items first.
        computing_meta : bool
            Dask sets it when it tries a function on empty data; refused.

        Returns
        -------
        object
            For frames, a list of :class:`~daskshare.models.spec.Detections`, one a frame. For
            video, a list of dicts, one an object found, with keys
            :data:`~daskshare.models.spec.DETECTION_COLUMNS`. For other models, NumPy arrays in the
            structure that the model gives; on video, dicts with keys ``video``, ``frame``,
            ``pts_seconds`` and ``output``, one a frame.

        Raises
        ------
        NotOnWorkerError
            Outside a task, or on a worker that daskshare is not installed on.
        InvalidInputError
            When the model does not take such inputs.
        ModelError
            When the model cannot be loaded; the next call tries again.
        InferenceError
            When the model failed on one of these inputs.

        Notes
        -----
        Runs in the task's thread on a worker, any number at once. A video that cannot be read, or
        only in part, raises nothing: the rows end earlier, a warning is logged, and
        :func:`daskshare.stats` counts it under ``chunks``.
        """
        if sys._getframe(1).f_globals.get("__name__") in _RESOLVERS:
            # dask.annotate(model=self): Dask calls a callable annotation with the task's key.
            annotated = _AnnotatedModel(self.key)
            annotated.handle = self
            return annotated
        if computing_meta:
            raise NotOnWorkerError("A shared model has no result for empty data; give `meta`.")
        if hasattr(inputs, "__dask_graph__"):
            raise InvalidInputError(
                f"Model {self.name!r} got a Dask collection ({type(inputs).__name__}); expected "
                "data. Map the model over the collection instead: array.map_blocks(model, "
                "dtype=...), bag.map_partitions(model), or dask.delayed(model)(part)."
            )
        local = local_share()
        sources, inputs = _as_sources(inputs)
        with local.lease(self.spec) as lease:
            if sources is None:
                return lease.infer(inputs, task=current_task())
            return list(_rows(lease, sources))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedModel) and other.key == self.key

    def __hash__(self) -> int:
        return hash((SharedModel, self.key))

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedModel, (self.spec,)

    def __dask_tokenize__(self) -> tuple[str, str]:
        return "daskshare.SharedModel", self.key

    def __repr__(self) -> str:
        return f"SharedModel({self.name!r}, key={self.key[:8]})"

    def _repr_html_(self) -> str:
        """Show name, key and options as a table, in notebooks."""
        from daskshare.notebook import model_html

        return model_html(self.spec)


def _as_sources(inputs: Any) -> tuple[Iterable[FrameSource] | None, Any]:
    """Tell video from other inputs: (sources, ...) or (None, the inputs)."""
    if isinstance(inputs, FrameSource):
        return [inputs], None
    if isinstance(inputs, Iterator):
        first = list(itertools.islice(inputs, 1))
        if not first or isinstance(first[0], FrameSource):
            return itertools.chain(first, inputs), None
        return None, [*first, *inputs]
    if isinstance(inputs, (list, tuple)) and (not inputs or isinstance(inputs[0], FrameSource)):
        return inputs, None
    return None, inputs


def _rows(lease: Lease, sources: Iterable[FrameSource]) -> Iterator[dict[str, Any]]:
    task = current_task()
    for source in sources:
        with stream(lease, source, task=task) as batches:
            for batch, results in batches:
                times = batch.pts_seconds.tolist()
                for i, pts_seconds in enumerate(times):
                    at = {
                        "video": source.video,
                        "frame": batch.first_frame + i,
                        "pts_seconds": pts_seconds,
                    }
                    if isinstance(results, list) and isinstance(results[i], Detections):
                        yield from _detection_rows(at, results[i])
                    else:
                        yield {**at, "output": _item(results, i)}


def _detection_rows(at: dict[str, Any], detections: Detections) -> Iterator[dict[str, Any]]:
    objects = zip(
        detections.class_id.tolist(),
        detections.names(),
        detections.confidence.tolist(),
        detections.xyxy.tolist(),
        strict=True,
    )
    for class_id, class_name, confidence, (x_min, y_min, x_max, y_max) in objects:
        yield {
            **at,
            "class_id": class_id,
            "class_name": class_name,
            "confidence": confidence,
            "x_min": x_min,
            "y_min": y_min,
            "x_max": x_max,
            "y_max": y_max,
        }


def _item(outputs: Any, index: int) -> Any:
    if isinstance(outputs, dict):
        return {name: _item(value, index) for name, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return [_item(value, index) for value in outputs]
    return outputs[index]


def share(
    load: Callable[[torch.device], Callable[[torch.Tensor], Any]],
    *,
    name: str,
    max_batch_size: int | None = None,
    batch_sizes: Sequence[int] = (),
    input_dtype: str | None = None,
    cuda_graph: bool = False,
    version: str | None = None,
) -> SharedModel:
    """Share any torch model: each worker keeps one copy of what ``load`` returns.

    Parameters
    ----------
    load : callable
        ``load(device) -> model``: called once on each worker with a ``torch.device``; returns a
        ``torch.nn.Module`` (moved there and set to ``eval()``) or another callable. The model is
        called with a batch tensor on the device, in inference mode, always by the same thread,
        and returns a tensor, or a tuple, list or dict of tensors, each with the batch as its first
        axis. An item's outputs must not depend on the other items of its batch (no batch
        statistics); :func:`daskshare.testing.check_loader` tries that.
    name : str
        For people: in messages, statistics, names of tasks.
    max_batch_size : int, optional
        Largest batch, items. Default 32.
    batch_sizes : sequence of int, optional
        Sizes to which batches are padded (with zeros); for models that are slow on every new size.
    input_dtype : str, optional
        Dtype to which batches are converted on the device, "float16" for example; so uint8 items
        travel as uint8. Default: as they come.
    cuda_graph : bool
        Whether to capture a CUDA graph for each batch size (powers of two by default). The model
        must then do the same work for all inputs of a shape and never wait for the GPU.
    version : str, optional
        Names what ``load`` loads, in place of looking into it; see Notes.

    Returns
    -------
    SharedModel
        Callable inside tasks on an array or tensor (items, ...) or a list of equally shaped
        arrays; gives NumPy arrays in the structure that the model returns.

    Raises
    ------
    ConfigurationError
        When an option is wrong or ``load`` cannot be pickled.

    Notes
    -----
    Runs in the client. ``load`` is pickled with cloudpickle at once and unpickled on workers only.
    Two models are one when name, options and the pickled bytes of ``load`` agree. These bytes have
    limits: a function imported from a module is pickled by its name, so a change of the module, or
    of a weights file that it reads, does not show; a function of a notebook or script is pickled
    by value, and may give other bytes in another run of Python. Give ``version`` (the weights'
    digest, a date) where either matters: it then counts instead of the bytes.

    Examples
    --------
    >>> def load(device):                                            # doctest: +SKIP
    ...     model = torchvision.models.resnet50(weights="DEFAULT")
    ...     return model.to(device)
    >>> resnet = daskshare.share(load, name="resnet50")              # doctest: +SKIP
    >>> client.submit(resnet, images).result().shape                 # doctest: +SKIP
    (8, 1000)
    """
    return SharedModel(
        torch_model_spec(
            load,
            name=name,
            max_batch_size=max_batch_size,
            batch_sizes=tuple(batch_sizes),
            input_dtype=input_dtype,
            cuda_graph=cuda_graph,
            version=version,
        )
    )


def yolov3(
    name: str = "yolov3",
    *,
    cfg: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    names: str | os.PathLike[str] | None = None,
    input_size: int | None = None,
    precision: str | None = None,
    confidence_threshold: float = 0.25,
    iou_threshold: float = 0.45,
    classes: Sequence[str] | None = None,
    max_batch_size: int | None = None,
) -> SharedModel:
    """Share a detector of the YOLO-v3 family.

    Takes the parameters of :func:`daskshare.models.yolov3.yolov3_spec`, which describes them.

    Returns
    -------
    SharedModel
        Callable inside tasks on frames and on video.

    Raises
    ------
    DaskshareError
        When an option or a file is wrong.

    Examples
    --------
    >>> yolo = daskshare.yolov3("yolov3-tiny", classes=["car", "bus"])
    >>> yolo.name
    'yolov3-tiny'
    >>> client.submit(yolo, frames).result()                         # doctest: +SKIP
    [Detections(...), Detections(...)]
    """
    from daskshare.models.yolov3 import yolov3_spec

    return SharedModel(
        yolov3_spec(
            name,
            cfg=cfg,
            weights=weights,
            names=names,
            input_size=input_size,
            precision=precision,
            confidence_threshold=confidence_threshold,
            iou_threshold=iou_threshold,
            classes=classes,
            max_batch_size=max_batch_size,
        )
    )


def install(client: Client) -> Any:
    """Install daskshare on a Dask cluster: a plugin on the scheduler and one on each worker.

    Workers that join later get it too. Calling it again, from any client, changes nothing.
    Running tasks are not disturbed.

    Parameters
    ----------
    client : distributed.Client
        Connected; with ``asynchronous=True``, await what this returns.

    Raises
    ------
    ConfigurationError
        When the scheduler or a worker has no daskshare, or Dask's configuration here holds an
        option of daskshare that does not exist.

    Notes
    -----
    Not needed on clusters started with one of the preload scripts in ``plugins/``. Loads no model.
    """
    client = _client(client)
    check_option_names()
    return client.sync(_install, client)


async def _install(client: Client) -> None:
    try:
        await client.run_on_scheduler(install_on_scheduler)
    except ImportError as error:
        raise ConfigurationError(
            f"Dask's scheduler could not import daskshare ({error}); expected it to be installed "
            "there. Install the same version on scheduler, workers and client.",
            reason=str(error),
        ) from error


def load(
    client: Client,
    model: SharedModel,
    *,
    replicas: int | None = None,
    devices: Sequence[str] | None = None,
    replaces: SharedModel | None = None,
    timeout_seconds: float = 600.0,
) -> Any:
    """Load a model ahead of its first task, and say on how many or on which GPUs it belongs.

    Parameters
    ----------
    client : distributed.Client
        Connected, of a cluster with daskshare installed; with ``asynchronous=True``, await what
        this returns.
    model : SharedModel
        The model.
    replicas : int, optional
        Keep exactly so many copies loaded, with and without tasks. Default: load one now; how many
        there are later follows from the tasks that wait.
    devices : sequence of str, optional
        Pin the model to these: uuids of devices, or addresses of workers on them. It is never
        unloaded there to make room, and runs nowhere else.
    replaces : SharedModel, optional
        A model that this one takes over from, new weights for example. This one is loaded beside
        it; the old one leaves when its last task is done. No task fails.
    timeout_seconds : float
        How long to wait for the model.

    Returns
    -------
    list of str
        Addresses of the workers where it is ready.

    Raises
    ------
    ModelLoadError
        When it cannot be loaded, or is not ready in time.
    ModelTooLargeError
        When no device has room for it even alone.
    ConfigurationError
        When an argument is wrong, or the cluster's scheduler has no allocator.

    Notes
    -----
    Runs in the client; workers load in threads of their own, beside running tasks.
    :func:`unload` lifts what was asked for here.
    """
    client = _client(client)
    if not isinstance(model, SharedModel):
        raise ConfigurationError(
            f"model is {model!r}; expected a SharedModel such as daskshare.yolov3('yolov3-tiny').",
            option="model",
        )
    if sum(argument is not None for argument in (replicas, devices, replaces)) > 1:
        raise ConfigurationError(
            "Got more than one of replicas, devices and replaces; expected at most one.",
            option="replicas",
        )
    if replicas is not None and (isinstance(replicas, bool) or replicas < 1):
        raise ConfigurationError(
            f"Got replicas={replicas!r}; expected an integer >= 1. Use daskshare.unload to have "
            "none.",
            option="replicas",
        )
    if isinstance(devices, str) or (devices is not None and not devices):
        raise ConfigurationError(
            f"Got devices={devices!r}; expected a list of device uuids or worker addresses.",
            option="devices",
        )
    return client.sync(
        _ask,
        client,
        "load",
        model=dumps(model),
        replicas=replicas,
        devices=None if devices is None else list(devices),
        replaces=None if replaces is None else replaces.key,
        timeout_seconds=timeout_seconds,
    )


def unload(client: Client, model: SharedModel, *, timeout_seconds: float = 60.0) -> Any:
    """Unload a model from all workers, and lift its pins and number of copies.

    Parameters
    ----------
    client : distributed.Client
        Connected, of a cluster with daskshare installed; with ``asynchronous=True``, await what
        this returns.
    model : SharedModel
        The model. Tasks that run it may finish; tasks that wait for it load it again.
    timeout_seconds : float
        How long to wait for its tasks.

    Returns
    -------
    list of str
        Addresses of the workers that held it.

    Raises
    ------
    ModelError
        When it is still in use after that time; it leaves as soon as it is not.
    ConfigurationError
        When the cluster's scheduler has no allocator.
    """
    client = _client(client)
    return client.sync(
        _ask,
        client,
        "unload",
        key=model.key,
        timeout_seconds=timeout_seconds,
    )


def why(client: Client, task: Any) -> Any:
    """Say in one sentence why a task waits, or why it runs where it runs.

    Parameters
    ----------
    client : distributed.Client
        Connected, of a cluster with daskshare installed; with ``asynchronous=True``, await what
        this returns.
    task : distributed.Future or key
        The task.

    Returns
    -------
    str
        For people.

    Raises
    ------
    ConfigurationError
        When the cluster's scheduler has no allocator.
    """
    client = _client(client)
    return client.sync(_ask, client, "why", key=getattr(task, "key", task))


async def _ask(client: Client, request: str, **arguments: Any) -> Any:
    answer, error = await client.run_on_scheduler(ask_allocator, request, arguments)
    if error is not None:
        raise error
    return answer


def stats(client: Client) -> Any:
    """Ask all workers what their models have done so far.

    Parameters
    ----------
    client : distributed.Client
        Connected; with ``asynchronous=True``, await what this returns.

    Returns
    -------
    ClusterStats
        A dict of str to dict that notebooks show as a table. By worker address: ``state``
        ("ready", "starting", "failed" with a ``reason``, or "absent" without the plugin),
        ``device``, ``models`` (by key, each with name, state, loads, frames, batches,
        mean_batch_size, model_bytes), the totals of ``loads``, ``frames``, ``batches``,
        ``mean_batch_size`` and ``model_bytes``, ``chunks``: videos' chunks by outcome and decoder,
        and ``placement``: ``failure`` (why the allocator sends nothing there, or "") and its last
        ``decisions`` about the worker, oldest first, each with ``kind`` ("dispatch", "load",
        "unload"), ``task``, ``model`` (its key) and ``reason``. Plain JSON-able data but for the
        keys of tasks.

    Notes
    -----
    Asked now, not taken from heartbeats; works also where only the workers have a plugin. Workers
    that share one process share one copy of each model, and each reports all of it.
    """
    return _client(client).sync(_stats, client)


async def _stats(client: Client) -> ClusterStats:
    answers = await client.run(worker_report_async, on_error="return")
    try:
        placement = await _ask(client, "placement")
    except (ConfigurationError, ImportError):
        # Only the workers have a plugin.
        placement = {}
    return ClusterStats(
        {
            address: (
                {"state": "failed", "reason": f"{type(answer).__name__}: {answer}", "models": {}}
                if isinstance(answer, Exception)
                else answer
            )
            | {"placement": placement.get(address, {"failure": "", "decisions": []})}
            for address, answer in answers.items()
        }
    )


def _client(client: Any) -> Client:
    from distributed import Client

    if not isinstance(client, Client):
        raise ConfigurationError(
            f"Got {type(client).__name__}; expected a distributed.Client. Pass Client(cluster).",
            option="client",
        )
    return client
