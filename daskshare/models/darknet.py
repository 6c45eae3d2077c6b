"""Darknet's cfg files read into a checked plan of layers, without torch.

Everything that decides what the network computes is validated here, with the file, the line and
the section in each error, so that building the network cannot fail half-way on a worker.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from daskshare.errors import DarknetConfigError
from daskshare.models.plan import (
    ACTIVATIONS,
    Convolutional,
    Layer,
    MaxPool,
    NetworkPlan,
    Route,
    Shortcut,
    Upsample,
    Yolo,
)

__all__ = ["parse_cfg"]

T = TypeVar("T")

# fmt: off
# Options that steer only training, or only Darknet's own binary; accepted and ignored.
_TRAINING = {
    "dontload", "dontloadscales", "dontsave", "dot", "flipped", "learning_rate", "onlyforward",
    "stopbackward", "train", "train_only_bn",
}
_YOLO_TRAINING = _TRAINING | {
    "beta_nms", "cls_normalizer", "counters_per_class", "focal_loss", "ignore_thresh", "iou_loss",
    "iou_normalizer", "iou_thresh", "iou_thresh_kind", "jitter", "label_smooth_eps", "map", "max",
    "max_delta", "obj_normalizer", "objectness_smooth", "random", "resize", "show_details",
    "truth_thresh",
}
# fmt: on
_OPTIONS = {
    "convolutional": _TRAINING
    | {"batch_normalize", "filters", "size", "stride", "pad", "padding", "activation", "groups"}
    | {"dilation", "binary", "xnor", "antialiasing", "share_index", "deform"},
    "shortcut": _TRAINING | {"from", "activation", "weights_type", "weights_normalization"},
    "route": _TRAINING | {"layers", "groups", "group_id"},
    "upsample": _TRAINING | {"stride", "scale"},
    "maxpool": _TRAINING | {"size", "stride", "padding", "maxpool_depth", "antialiasing"},
    "yolo": _YOLO_TRAINING
    | {"mask", "anchors", "classes", "num", "scale_x_y", "new_coords", "nms_kind"},
}
_ALIASES = {"conv": "convolutional", "max": "maxpool", "network": "net"}


@dataclass(slots=True)
class _Section:
    """Options of one section, each with its line; they are read once and checked."""

    path: str
    name: str
    line: int
    options: dict[str, tuple[str, int]] = field(default_factory=dict)

    def error(self, message: str, *, line: int | None = None) -> DarknetConfigError:
        line = self.line if line is None else line
        return DarknetConfigError(
            f"{self.path}, line {line}, [{self.name}]: {message}",
            path=self.path,
            line=line,
            section=self.name,
        )

    def option_error(self, option: str, expected: str) -> DarknetConfigError:
        if option not in self.options:
            return self.error(f"option '{option}' is missing; expected {expected}.")
        value, line = self.options[option]
        return self.error(f"{option}={value}; expected {expected}.", line=line)

    def read(self, option: str, convert: Callable[[str], T], default: T | None, what: str) -> T:
        if option not in self.options:
            if default is None:
                raise self.option_error(option, what)
            return default
        try:
            return convert(self.options[option][0])
        except ValueError:
            raise self.option_error(option, what) from None

    def integer(self, option: str, default: int | None = None, *, minimum: int = 1) -> int:
        what = f"an integer >= {minimum}"
        value = self.read(option, int, default, what)
        if value < minimum:
            raise self.option_error(option, what)
        return value

    def flag(self, option: str) -> bool:
        value = self.integer(option, 0, minimum=0)
        if value > 1:
            raise self.option_error(option, "0 or 1")
        return bool(value)

    def numbers(self, option: str, convert: Callable[[str], T], what: str) -> tuple[T, ...]:
        def split(text: str) -> tuple[T, ...]:
            # A trailing comma is common in cfg files that people write.
            return tuple(convert(part) for part in text.rstrip(", ").split(","))

        return self.read(option, split, None, what)

    def choice(self, option: str, choices: tuple[str, ...], default: str) -> str:
        value = self.read(option, str, default, "")
        if value not in choices:
            raise self.option_error(option, "one of " + ", ".join(choices))
        return value

    def unsupported(self, **neutral: str) -> None:
        """Refuse options that change the network in ways that are not computed here."""
        for option, value in neutral.items():
            if option in self.options and self.options[option][0] != value:
                raise self.option_error(option, f"{value} (nothing else is supported)")


def _split_sections(text: str, path: str) -> list[_Section]:
    sections: list[_Section] = []
    for number, raw in enumerate(text.splitlines(), 1):
        content = raw.split("#", 1)[0].split(";", 1)[0].strip()
        if not content:
            continue
        if content.startswith("["):
            name = content[1:-1].strip().lower()
            name = _ALIASES.get(name, name)
            section = _Section(path, name, number)
            if not content.endswith("]"):
                raise section.error(f"got {content!r}; expected a section such as [convolutional].")
            sections.append(section)
            continue
        if not sections:
            raise _Section(path, "", number).error(
                f"got {content!r} before any section; expected [net] first."
            )
        section = sections[-1]
        option, equals, value = (part.strip() for part in content.partition("="))
        if not equals or not option or not value:
            raise section.error(f"got {content!r}; expected option=value.", line=number)
        if option in section.options:
            first = section.options[option][1]
            raise section.error(f"option '{option}' stands on line {first} already.", line=number)
        section.options[option] = (value, number)
    return sections


def _check_options(section: _Section) -> None:
    known = _OPTIONS[section.name]
    for option, (_, line) in section.options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise section.error(
                f"unknown option '{option}'; expected one of {', '.join(sorted(known))}.{hint}",
                line=line,
            )


def parse_cfg(
    text: str, *, path: str = "<cfg>", input_size: tuple[int, int] | None = None
) -> NetworkPlan:
    """Read a cfg of the YOLO-v3 family.

    Sections ``convolutional``, ``shortcut``, ``route`` (with ``groups``), ``upsample``,
    ``maxpool`` and ``yolo`` after one ``net``. Of ``net`` only ``width``, ``height`` and
    ``channels`` count: the rest is training.

    Parameters
    ----------
    text : str
        Content of the file.
    path : str
        Its name, for errors.
    input_size : (int, int), optional
        Height and width in pixels in place of those in ``[net]``.

    Returns
    -------
    NetworkPlan
        Layers with resolved indices and shapes.

    Raises
    ------
    DarknetConfigError
        For an unknown section, option or activation, a wrong value, a reference to a layer that
        is not there, or shapes that do not fit; with ``path``, ``line`` and ``section``.

    Notes
    -----
    Pure; runs in any process, also where torch is missing.
    """
    sections = _split_sections(text, path)
    if not sections or sections[0].name != "net":
        first = sections[0] if sections else _Section(path, "", 1)
        raise first.error("the file begins otherwise; expected the section [net] first.")
    net = sections[0]
    channels = net.integer("channels", 3)
    if channels != 3:
        raise net.option_error("channels", "3 (frames are RGB)")
    height, width = input_size or (net.integer("height"), net.integer("width"))
    layers: list[Layer] = []
    for section in sections[1:]:
        builder = _BUILDERS.get(section.name)
        if builder is None:
            near = difflib.get_close_matches(section.name, _BUILDERS, 1)
            hint = f" Did you mean [{near[0]}]?" if near else ""
            expected = ", ".join(f"[{name}]" for name in _BUILDERS)
            raise section.error(f"unknown section; expected one of {expected}.{hint}")
        _check_options(section)
        before = layers[-1] if layers else None
        shape = (before.channels, before.height, before.width) if before else (3, height, width)
        layers.append(builder(section, layers, shape, (height, width)))
    plan = NetworkPlan(height, width, tuple(layers))
    if not plan.heads:
        raise net.error("the network has no [yolo] section; expected at least one.")
    for head in plan.heads:
        if head.num_classes != plan.num_classes:
            raise net.error(
                f"the [yolo] on line {head.line} has {head.num_classes} classes, the first one "
                f"{plan.num_classes}; expected the same in all."
            )
    return plan


_Shape = tuple[int, int, int]


def _convolutional(
    section: _Section, layers: list[Layer], shape: _Shape, _: tuple[int, int]
) -> Layer:
    section.unsupported(dilation="1", binary="0", xnor="0", antialiasing="0", deform="0")
    if "share_index" in section.options:
        raise section.option_error("share_index", "no such option (layers do not share weights)")
    channels, height, width = shape
    size, stride = section.integer("size", 1), section.integer("stride", 1)
    filters, groups = section.integer("filters", 1), section.integer("groups", 1)
    # Darknet: `pad` is a switch for size // 2 and wins over the number in `padding`.
    padding = size // 2 if section.flag("pad") else section.integer("padding", 0, minimum=0)
    if channels % groups or filters % groups:
        raise section.option_error(
            "groups", f"a divisor of the {channels} input channels and the {filters} filters"
        )
    out_height = (height + 2 * padding - size) // stride + 1
    out_width = (width + 2 * padding - size) // stride + 1
    if out_height < 1 or out_width < 1:
        raise section.error(
            f"a {size}x{size} kernel does not fit the input of {width}x{height} pixels; expected "
            "a larger input size or more padding."
        )
    return Convolutional(
        index=len(layers),
        line=section.line,
        channels=filters,
        height=out_height,
        width=out_width,
        in_channels=channels,
        size=size,
        stride=stride,
        padding=padding,
        groups=groups,
        batch_normalize=section.flag("batch_normalize"),
        activation=section.choice("activation", ACTIVATIONS, "logistic"),
    )


def _sources(section: _Section, layers: list[Layer], option: str) -> tuple[int, ...]:
    got = section.numbers(option, int, "layer numbers, such as -1, 8")
    # Negative numbers count back from this layer, others from the network's first.
    sources = tuple(len(layers) + number if number < 0 else number for number in got)
    if any(not 0 <= source < len(layers) for source in sources):
        raise section.option_error(
            option,
            f"layers before this one, which is layer {len(layers)}: "
            f"{-len(layers)} to -1, or 0 to {len(layers) - 1}",
        )
    return sources


def _shortcut(section: _Section, layers: list[Layer], shape: _Shape, _: tuple[int, int]) -> Layer:
    section.unsupported(weights_type="none", weights_normalization="none")
    sources = _sources(section, layers, "from")
    for source in sources:
        other = (layers[source].channels, layers[source].height, layers[source].width)
        if other != shape:
            raise section.option_error(
                "from",
                f"a layer of the same channels, height and width {shape}; layer {source} "
                f"(line {layers[source].line}) has {other}",
            )
    channels, height, width = shape
    return Shortcut(
        index=len(layers),
        line=section.line,
        channels=channels,
        height=height,
        width=width,
        sources=sources,
        activation=section.choice("activation", ACTIVATIONS, "linear"),
    )


def _route(section: _Section, layers: list[Layer], _: _Shape, __: tuple[int, int]) -> Layer:
    sources = _sources(section, layers, "layers")
    first = layers[sources[0]]
    groups = section.integer("groups", 1)
    group_id = section.integer("group_id", 0, minimum=0)
    if group_id >= groups:
        raise section.option_error("group_id", f"0 to {groups - 1}, as groups={groups}")
    channels = 0
    for source in sources:
        layer = layers[source]
        if (layer.height, layer.width) != (first.height, first.width):
            raise section.option_error(
                "layers",
                f"layers of one size; layer {sources[0]} (line {first.line}) is "
                f"{first.width}x{first.height}, layer {source} (line {layer.line}) "
                f"{layer.width}x{layer.height}. An input size that the network's stride "
                "divides may be needed",
            )
        if layer.channels % groups:
            raise section.option_error(
                "groups", f"a divisor of the {layer.channels} channels of layer {source}"
            )
        channels += layer.channels // groups
    return Route(
        index=len(layers),
        line=section.line,
        channels=channels,
        height=first.height,
        width=first.width,
        sources=sources,
        groups=groups,
        group_id=group_id,
    )


def _upsample(section: _Section, layers: list[Layer], shape: _Shape, _: tuple[int, int]) -> Layer:
    section.unsupported(scale="1")
    stride = section.integer("stride", 2)
    channels, height, width = shape
    return Upsample(
        index=len(layers),
        line=section.line,
        channels=channels,
        height=height * stride,
        width=width * stride,
        stride=stride,
    )


def _maxpool(section: _Section, layers: list[Layer], shape: _Shape, _: tuple[int, int]) -> Layer:
    section.unsupported(maxpool_depth="0", antialiasing="0")
    channels, height, width = shape
    stride = section.integer("stride", 1)
    size = section.integer("size", stride)
    padding = section.integer("padding", size - 1, minimum=0)

    def along(length: int) -> tuple[int, int, int]:
        # Darknet's `padding` is that of both sides together; windows start half of it outside
        # and may overhang the far side by any amount.
        count = (length + padding - size) // stride + 1
        before = padding // 2
        return count, before, max(0, (count - 1) * stride + size - before - length)

    out_height, top, bottom = along(height)
    out_width, left, right = along(width)
    if out_height < 1 or out_width < 1:
        raise section.error(
            f"a {size}x{size} window does not fit the input of {width}x{height} pixels; expected "
            "a larger input size."
        )
    return MaxPool(
        index=len(layers),
        line=section.line,
        channels=channels,
        height=out_height,
        width=out_width,
        size=size,
        stride=stride,
        pads=(left, right, top, bottom),
    )


def _yolo(
    section: _Section, layers: list[Layer], shape: _Shape, input_size: tuple[int, int]
) -> Layer:
    section.unsupported(new_coords="0")
    section.choice("nms_kind", ("default", "greedynms"), "default")
    classes = section.integer("classes", 20)
    values = section.numbers("anchors", float, "pairs of numbers, such as 10,14, 23,27")
    if len(values) % 2 or any(not value > 0 for value in values):
        raise section.option_error("anchors", "pairs of positive numbers: width, height, ...")
    pairs = tuple(zip(values[::2], values[1::2], strict=True))
    if section.integer("num", len(pairs)) != len(pairs):
        raise section.option_error("num", f"{len(pairs)}, as there are {len(pairs)} anchors")
    mask = tuple(range(len(pairs)))
    if "mask" in section.options:
        mask = section.numbers("mask", int, "numbers of anchors, such as 0,1,2")
    if any(not 0 <= number < len(pairs) for number in mask):
        raise section.option_error("mask", f"numbers of anchors, 0 to {len(pairs) - 1}")
    channels, height, width = shape
    if channels != len(mask) * (5 + classes):
        raise section.error(
            f"the layer before has {channels} channels; expected {len(mask) * (5 + classes)} "
            f"({len(mask)} anchors x (5 + {classes} classes)). Set its filters to that."
        )
    if input_size[0] % height or input_size[1] % width:
        raise section.error(
            f"the input of {input_size[1]}x{input_size[0]} pixels gives a grid of "
            f"{width}x{height} cells; expected an input size that the network's stride divides."
        )
    scale = section.read("scale_x_y", float, 1.0, "a number >= 1")
    if not scale >= 1:
        raise section.option_error("scale_x_y", "a number >= 1")
    return Yolo(
        index=len(layers),
        line=section.line,
        channels=channels,
        height=height,
        width=width,
        anchors=tuple(pairs[number] for number in mask),
        num_classes=classes,
        scale_xy=scale,
    )


_Builder = Callable[[_Section, list[Layer], _Shape, tuple[int, int]], Layer]
_BUILDERS: dict[str, _Builder] = {
    "convolutional": _convolutional,
    "shortcut": _shortcut,
    "route": _route,
    "upsample": _upsample,
    "maxpool": _maxpool,
    "yolo": _yolo,
}
