"""Boxes, labels and captions on RGB frames, with OpenCV."""

from __future__ import annotations

import colorsys

import numpy as np

__all__ = ["add_caption", "class_colour", "draw_boxes"]

_GOLDEN_RATIO = 0.618033988749895


def class_colour(class_id: int) -> tuple[int, int, int]:
    """RGB colour of a class, the same in every picture; neighbouring classes differ clearly.

    Parameters
    ----------
    class_id : int
    """
    hue = (0.03 + int(class_id) * _GOLDEN_RATIO) % 1.0
    # Blue and violet are dark to the eye at the same lightness.
    lightness = 0.68 if 0.58 < hue < 0.85 else 0.56
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def _sizes(frame: np.ndarray) -> tuple[float, int]:
    """Text scale and line thickness that stay readable from 320 to 4,000 pixels."""
    extent = min(frame.shape[0] * 16 / 9, frame.shape[1])
    return min(max(extent / 1400, 0.36), 1.6), max(1, round(extent / 420))


def draw_boxes(
    frame: np.ndarray, xyxy: np.ndarray, labels: list[str], class_ids: np.ndarray
) -> None:
    """Draw objects into a frame.

    Parameters
    ----------
    frame : numpy.ndarray, shape (height, width, 3), uint8, contiguous
        RGB; changed in place.
    xyxy : numpy.ndarray, shape (n, 4)
        Corners in pixels; may reach beyond the frame.
    labels : list of str
        Text of each box.
    class_ids : numpy.ndarray, shape (n,)
        Decide the colours.
    """
    import cv2

    height, width = frame.shape[:2]
    scale, thickness = _sizes(frame)
    limit = [width - 1, height - 1, width - 1, height - 1]
    corners = np.clip(np.nan_to_num(xyxy), 0, limit).round().astype(int)
    # Small objects are drawn last, or large ones would hide their labels.
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    order = np.argsort(-areas, kind="stable")
    for i in order:
        left, top, right, bottom = corners[i].tolist()
        colour = class_colour(class_ids[i])
        # A dark rim keeps the box visible on a background of its own colour.
        cv2.rectangle(frame, (left, top), (right, bottom), (16, 16, 16), thickness + 2)
        cv2.rectangle(frame, (left, top), (right, bottom), colour, thickness, cv2.LINE_AA)
    taken: list[tuple[int, int, int, int]] = []
    for i in order[::-1]:
        left, top, right, bottom = corners[i].tolist()
        _draw_label(frame, labels[i], (left, top, bottom), class_colour(class_ids[i]), scale, taken)


def _draw_label(
    frame: np.ndarray,
    text: str,
    box: tuple[int, int, int],
    colour: tuple[int, int, int],
    scale: float,
    taken: list[tuple[int, int, int, int]],
) -> None:
    import cv2

    left, top, bottom = box
    font = cv2.FONT_HERSHEY_SIMPLEX
    (text_width, text_height), baseline = cv2.getTextSize(text, font, scale, 1)
    pad = max(2, round(4 * scale))
    wide, high = text_width + 2 * pad, text_height + baseline // 2 + 2 * pad
    x = max(0, min(left, frame.shape[1] - wide))
    # Above the box, else inside it, else further down: the first place where no label lies.
    places = [top - high, top, *range(top + high, max(top + high, bottom - high) + 1, high)]
    places = [min(max(0, y), max(0, frame.shape[0] - high)) for y in places]
    free = [y for y in places if not any(_overlap((x, y, wide, high), other) for other in taken)]
    y = free[0] if free else places[0]
    taken.append((x, y, wide, high))
    cv2.rectangle(frame, (x, y), (x + wide - 1, y + high - 1), colour, cv2.FILLED)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = (0, 0, 0) if luminance > 110 else (255, 255, 255)
    cv2.putText(frame, text, (x + pad, y + pad + text_height), font, scale, ink, 1, cv2.LINE_AA)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def add_caption(frame: np.ndarray, text: str) -> np.ndarray:
    """Return a frame with a dark strip and a line of text below it.

    Parameters
    ----------
    frame : numpy.ndarray, shape (height, width, 3), uint8
        RGB.
    text : str

    Returns
    -------
    numpy.ndarray, shape (height + strip, width, 3), uint8
    """
    import cv2

    scale = max(0.4, frame.shape[1] / 1100)
    (_, text_height), baseline = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    strip = text_height + baseline + 8
    result = cv2.copyMakeBorder(frame, 0, strip, 0, 0, cv2.BORDER_CONSTANT, value=(40, 40, 40))
    place = (6, result.shape[0] - baseline - 3)
    cv2.putText(
        result, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (245, 245, 245), 1, cv2.LINE_AA
    )
    return np.asarray(result)
