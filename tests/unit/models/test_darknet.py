"""Darknet's cfg files: shapes, references, and errors that name file, line and section."""

from __future__ import annotations

import importlib.resources
import pickle

import pytest

from daskshare.errors import DarknetConfigError
from daskshare.models.darknet import parse_cfg
from daskshare.models.plan import Convolutional, MaxPool, Route, Shortcut, Upsample, Yolo
from tests.networks import SMALL_CFG, small_plan


def packaged(name: str, **options):
    text = importlib.resources.files("daskshare").joinpath("data", f"{name}.cfg").read_text("utf-8")
    return parse_cfg(text, path=f"{name}.cfg", **options)


@pytest.mark.parametrize(
    ("name", "weights_bytes", "grids"),
    [
        ("yolov3", 248_007_048, [13, 26, 52]),
        ("yolov3-spp", 252_209_544, [19, 38, 76]),
        ("yolov3-tiny", 35_434_956, [13, 26]),
    ],
)
def test_packaged_networks_have_the_published_sizes(name, weights_bytes, grids):
    plan = packaged(name)
    assert 20 + 4 * plan.num_parameters == weights_bytes
    assert [head.width for head in plan.heads] == grids
    assert plan.num_classes == 80
    assert plan.stride == 32


def test_input_size_changes_the_grids_alone():
    plan = packaged("yolov3-tiny", input_size=(320, 256))
    assert (plan.height, plan.width) == (320, 256)
    assert [(head.height, head.width) for head in plan.heads] == [(10, 8), (20, 16)]
    assert plan.num_parameters == packaged("yolov3-tiny").num_parameters
    assert plan.num_boxes == (80 + 320) * 3


def test_layers_of_a_small_network():
    plan = small_plan()
    kinds = [type(layer) for layer in plan.layers]
    assert kinds[:5] == [Convolutional, Convolutional, Shortcut, MaxPool, Convolutional]
    assert [(layer.channels, layer.height, layer.width) for layer in plan.layers] == [
        (8, 24, 32),
        (8, 24, 32),
        (8, 24, 32),
        (8, 12, 16),
        (16, 12, 16),
        (16, 12, 16),
        (16, 12, 16),
        (16, 6, 8),
        (8, 6, 8),
        (21, 6, 8),
        (21, 6, 8),
        (8, 6, 8),
        (8, 12, 16),
        (24, 12, 16),
        (14, 12, 16),
        (14, 12, 16),
    ]
    assert plan.layers[2].sources == (0,)
    assert plan.layers[4].weight_shape == (16, 4, 3, 3)
    route = plan.layers[8]
    assert isinstance(route, Route)
    assert (route.sources, route.groups, route.group_id) == ((7,), 2, 1)
    assert plan.layers[13].sources == (12, 5)
    assert isinstance(plan.layers[12], Upsample)
    head = plan.layers[10]
    assert isinstance(head, Yolo)
    assert head.anchors == ((12.0, 20.0), (30.0, 24.0), (8.0, 8.0))
    assert plan.layers[15].scale_xy == 1.1


@pytest.mark.parametrize(
    ("size", "stride", "length", "out", "pads"),
    [
        (2, 2, 416, 208, (0, 0)),
        (2, 2, 13, 7, (0, 1)),
        (2, 1, 13, 13, (0, 1)),
        (3, 2, 12, 6, (1, 0)),
        (5, 1, 13, 13, (2, 2)),
        (13, 1, 19, 19, (6, 6)),
    ],
)
def test_pooling_pads_as_darknet_does(size, stride, length, out, pads):
    cfg = f"""[net]
width={length}
height={length}
[maxpool]
size={size}
stride={stride}
[convolutional]
filters=6
activation=linear
[upsample]
stride={length}
[maxpool]
size=1
stride={out}
[yolo]
anchors=1,1
classes=1
"""
    pool = parse_cfg(cfg).layers[0]
    assert (pool.height, pool.width) == (out, out)
    assert pool.pads == (*pads, *pads)


def test_comments_blanks_aliases_and_training_options_are_accepted():
    cfg = SMALL_CFG.replace("[convolutional]", "[conv]", 1).replace("channels=3", "burn_in = 1000")
    cfg = cfg.replace("classes=2", " classes = 2  # two\n; remark\njitter=.3\nignore_thresh=.7")
    cfg = cfg.replace("30,24", "30,24,")
    strip = [type(layer) for layer in small_plan().layers]
    assert [type(layer) for layer in parse_cfg(cfg).layers] == strip


def bad(old: str, new: str, *, count: int = 1) -> str:
    assert old in SMALL_CFG
    return SMALL_CFG.replace(old, new, count)


@pytest.mark.parametrize(
    ("cfg", "section", "at", "words"),
    [
        (bad("[shortcut]", "[shortcutt]"), "shortcutt", "[shortcutt]", "unknown section"),
        (bad("[upsample]", "[region]"), "region", "[region]", "unknown section"),
        (bad("leaky", "swish"), "convolutional", "activation=swish", "leaky, linear"),
        (bad("filters=8", "filters=eight"), "convolutional", "filters=eight", "integer >= 1"),
        (bad("filters=8", "filters=0"), "convolutional", "filters=0", "integer >= 1"),
        (bad("stride=2", "stride=-2"), "convolutional", "stride=-2", "integer >= 1"),
        (bad("pad=1", "pad=2"), "convolutional", "pad=2", "0 or 1"),
        (bad("pad=1", "paad=1"), "convolutional", "paad=1", "Did you mean 'pad'"),
        (bad("pad=1", "dilation=2"), "convolutional", "dilation=2", "nothing else is supported"),
        (bad("pad=1", "pad 1"), "convolutional", "pad 1", "option=value"),
        (bad("size=3", "size=3\nsize=3"), "convolutional", "size=3\nsize=3", "already"),
        (bad("groups=2", "groups=3"), "convolutional", "groups=3", "divisor"),
        (bad("from=-2", "from=-9"), "shortcut", "from=-9", "-2 to -1, or 0 to 1"),
        (bad("from=-2", "from=2"), "shortcut", "from=2", "layers before this one"),
        (bad("layers=-1, 5", "layers=-1, 40"), "route", "layers=-1, 40", "0 to 12"),
        (bad("layers=-1, 5", "layers=-1, x"), "route", "layers=-1, x", "layer numbers"),
        (bad("layers=-1, 5", "layers=-1, 0"), "route", "layers=-1, 0", "layers of one size"),
        (bad("group_id=1", "group_id=2"), "route", "group_id=2", "0 to 1"),
        (bad("layers=-1\ngroups=2", "layers=-1\ngroups=5"), "route", "groups=5", "divisor"),
        (bad("mask=0,1", "mask=0,3"), "yolo", "mask=0,3", "0 to 2"),
        (bad("anchors=8,8,", "anchors=8,"), "yolo", "anchors=8,", "pairs"),
        (bad("classes=2", "classes=2\nnum=9"), "yolo", "num=9", "3 anchors"),
        (bad("classes=2", "classes=2\nnew_coords=1"), "yolo", "new_coords=1", "nothing else"),
        (bad("classes=2", "classes=3"), "yolo", "[yolo]", "expected 24"),
        (bad("channels=3", "channels=1"), "net", "channels=1", "RGB"),
        (bad("width=64", "width=wide"), "net", "width=wide", "integer >= 1"),
        (bad("width=64\n", ""), "net", "[net]", "'width' is missing"),
        (bad("[net]", "[convolutional]"), "convolutional", "[convolutional]", "[net] first"),
        (bad("[net]", "[net"), "ne", "[net", "expected a section"),
        ("width=3\n" + SMALL_CFG, "", "width=3", "before any section"),
    ],
)
def test_an_error_names_file_line_and_section(cfg, section, at, words):
    line = cfg[: cfg.index(at)].count("\n") + at.count("\n") + 1
    with pytest.raises(DarknetConfigError) as caught:
        parse_cfg(cfg, path="mine.cfg")
    error = caught.value
    assert (error.path, error.line, error.section) == ("mine.cfg", line, section)
    assert f"mine.cfg, line {line}, [{section}]" in str(error)
    assert words in str(error)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (str(again), again.line) == (str(error), line)


def test_shapes_that_do_not_add_up():
    cfg = bad("filters=8\nsize=1", "filters=4\nsize=1")
    with pytest.raises(DarknetConfigError, match=r"layer 0 .*\(8, 24, 32\)"):
        parse_cfg(cfg)
    with pytest.raises(DarknetConfigError, match="network's stride"):
        parse_cfg(SMALL_CFG, input_size=(50, 64))


def test_a_network_without_a_head():
    with pytest.raises(DarknetConfigError, match=r"no \[yolo\]"):
        parse_cfg("[net]\nwidth=32\nheight=32\n[maxpool]\nsize=2\nstride=2\n")
    with pytest.raises(DarknetConfigError, match=r"expected the section \[net\]"):
        parse_cfg("\n# nothing\n")


def test_heads_must_have_the_same_classes():
    cfg = SMALL_CFG.replace("filters=14", "filters=16")
    cfg = cfg[: cfg.rindex("classes=2")] + "classes=3\n"
    with pytest.raises(DarknetConfigError, match="has 3 classes, the first one 2"):
        parse_cfg(cfg)
