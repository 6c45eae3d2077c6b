"""The plan of a fused network: what becomes one step, and where results lie."""

from __future__ import annotations

import importlib.resources
import itertools

import pytest

from daskshare.models.darknet import parse_cfg
from daskshare.models.fusion import fuse
from daskshare.models.plan import NetworkPlan
from daskshare.models.steps import (
    Convolve,
    Copy,
    Enlarge,
    FusedPlan,
    Head,
    Pool,
    Stem,
    Sum,
    Unit,
    View,
    views_of,
)
from tests.networks import small_plan


def packaged(name: str, size: int = 416) -> NetworkPlan:
    text = importlib.resources.files("daskshare").joinpath("data", f"{name}.cfg").read_text()
    return parse_cfg(text, path=name, input_size=(size, size))


def kinds(plan: FusedPlan) -> dict[str, int]:
    names = sorted(type(step).__name__ for step in plan.steps)
    return {name: len(list(group)) for name, group in itertools.groupby(names)}


def targets(plan: FusedPlan) -> dict[int, View]:
    """By the layer whose convolution writes it."""
    return {step.layer: step.target for step in plan.steps if isinstance(step, Convolve)}


ALL = [
    pytest.param(name, options, id=f"{name}-{'-'.join(options) or 'plain'}")
    for name in ("small", "yolov3", "yolov3-spp", "yolov3-tiny")
    for options in ({}, {"stem": True, "units": (64, 128)}, {"strided": False})
]


def make(name: str, options: dict) -> FusedPlan:
    return fuse(small_plan() if name == "small" else packaged(name), **options)


def test_yolov3_is_its_convolutions_and_two_enlargements():
    plan = fuse(packaged("yolov3"))
    assert kinds(plan) == {"Convolve": 75, "Enlarge": 2, "Head": 3}
    # Every residual sum is taken along by the convolution before it.
    assert sum(isinstance(s, Convolve) and s.residual is not None for s in plan.steps) == 23


def test_kernels_of_several_convolutions_take_their_layers():
    plan = fuse(packaged("yolov3"), stem=True, units=(64, 128))
    assert kinds(plan) == {"Convolve": 67, "Enlarge": 2, "Head": 3, "Stem": 1, "Unit": 3}
    stem, unit, third = plan.steps[:3]
    assert (stem.first, stem.second) == (0, 1)
    assert (unit.first, unit.second) == (2, 3)
    assert unit.source == stem.target
    assert third.source == unit.target
    assert unit.target.buffer != unit.source.buffer


@pytest.mark.parametrize("name", ["small", "yolov3-tiny"])
def test_networks_without_such_layers_have_no_such_steps(name):
    assert make(name, {"stem": True, "units": (64, 128)}) == make(name, {})


def test_concatenations_are_written_in_place():
    plan = fuse(packaged("yolov3"))
    assert "Copy" not in kinds(plan)
    first, second = [step for step in plan.steps if isinstance(step, Enlarge)]
    assert (first.target.start, first.target.channels) == (0, 256)
    assert (second.target.start, second.target.channels) == (0, 128)
    # The other parts: the sums at layers 61 and 36, which end the blocks at 26 and 52 cells.
    parts = targets(plan)
    assert parts[60] == View(first.target.buffer, 256, 512)
    assert parts[35] == View(second.target.buffer, 128, 256)
    assert plan.buffers[first.target.buffer].channels == 768
    assert plan.buffers[second.target.buffer].channels == 384
    # Who reads them later reads the part, the next convolution the whole.
    sources = {s.layer: s.source for s in plan.steps if isinstance(s, Convolve)}
    assert sources[62] == parts[60]
    assert sources[87] == View(first.target.buffer, 0, 768)


def test_without_strides_only_enlargements_are_written_in_place():
    plan = fuse(packaged("yolov3"), strided=False)
    copies = [step for step in plan.steps if isinstance(step, Copy)]
    assert [(c.target.start, c.target.channels) for c in copies] == [(256, 512), (128, 256)]
    for step in plan.steps:
        if isinstance(step, Convolve):
            for view in filter(None, (step.source, step.target, step.residual)):
                assert view.channels == plan.buffers[view.buffer].channels


def test_pyramid_pooling_is_written_in_place():
    pools = [s for s in fuse(packaged("yolov3-spp")).steps if isinstance(s, Pool)]
    assert [pool.target.start for pool in pools] == [1024, 512, 0]
    assert len({pool.target.buffer for pool in pools}) == 1


def test_channels_that_only_a_head_reads_are_rounded_up():
    plan = fuse(packaged("yolov3"))
    heads = [step for step in plan.steps if isinstance(step, Head)]
    assert [head.source.channels for head in heads] == [256, 256, 256]
    assert [targets(plan)[head.layer - 1] for head in heads] == [head.source for head in heads]


def test_sums_that_no_convolution_can_take_along_stay_steps():
    cfg = """
    [net]
    width=32
    height=32
    channels=3
    [convolutional]
    filters=8
    size=3
    stride=1
    pad=1
    activation=leaky
    [convolutional]
    filters=8
    size=3
    stride=1
    pad=1
    activation=leaky
    [shortcut]
    from=-2
    activation=leaky
    [convolutional]
    filters=21
    size=1
    stride=1
    pad=1
    activation=linear
    [yolo]
    mask=0,1,2
    anchors=8,8, 12,20, 30,24
    classes=2
    """
    plan = fuse(small_plan("\n".join(line.strip() for line in cfg.splitlines())))
    (step,) = [step for step in plan.steps if isinstance(step, Sum)]
    assert [view.buffer for view in step.sources] == [1, 0]
    assert kinds(plan) == {"Convolve": 3, "Head": 1, "Sum": 1}


@pytest.mark.parametrize(("name", "options"), ALL)
def test_buffers_that_live_at_the_same_time_do_not_overlap(name, options):
    plan = make(name, options)
    for a, b in itertools.combinations(plan.buffers, 2):
        together = a.first_step <= b.last_step and b.first_step <= a.last_step
        apart = a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
        assert apart or not together
    assert plan.arena_size == max(b.offset + b.size for b in plan.buffers)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_everything_is_written_before_it_is_read(name, options):
    plan = make(name, options)
    written: dict[int, set[int]] = {}
    for step in plan.steps:
        target = getattr(step, "target", None)
        for view in views_of(step):
            if view != target:
                channels = set(range(view.start, view.start + view.channels))
                assert channels <= written[view.buffer]
        if target is not None:
            channels = set(range(target.start, target.start + target.channels))
            # Nobody writes twice, nor where it reads.
            assert not channels & written.get(target.buffer, set())
            written.setdefault(target.buffer, set()).update(channels)
        if isinstance(step, (Stem, Unit, Convolve)):
            buffer = plan.buffers[step.target.buffer]
            assert step.target.start + step.target.channels <= buffer.channels


def test_memory_is_shared_between_layers():
    plan = fuse(packaged("yolov3"), stem=True, units=(64, 128))
    largest = max(buffer.size for buffer in plan.buffers)
    assert sum(buffer.size for buffer in plan.buffers) > 5 * plan.arena_size
    # No less is possible: the residual unit reads one and writes another of the largest.
    assert plan.arena_size == 2 * largest
    # Two bytes each, 64 frames of 608 x 608: under 1.5 GiB.
    wide = fuse(packaged("yolov3", 608), stem=True, units=(64, 128))
    assert wide.arena_size * 2 * 64 < 1.5 * 2**30


def test_a_network_that_begins_otherwise_is_refused():
    cfg = """
[net]
width=32
height=32
channels=3
[maxpool]
size=2
stride=2
[convolutional]
filters=21
size=1
stride=1
pad=1
activation=linear
[yolo]
mask=0,1,2
anchors=8,8, 12,20, 30,24
classes=2
"""
    with pytest.raises(ValueError, match="does not begin with a convolution"):
        fuse(small_plan(cfg))
