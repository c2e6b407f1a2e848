"""Places labels of points that are close together: each near its point, without covering another label or point."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RADII = (9, 16, 26, 38, 52, 68, 86, 106, 130, 160, 195)
"""Distances of a label from its point, in typographic points (1/72 inch)."""
_ANGLES = (35, -35, 145, -145, 0, 180, 90, -90, 15, -15, 165, -165, 60, -60, 120, -120, 75, -75, 105, -105)
"""Directions in degrees, the preferred ones first."""
_NEAR = 16
"""Largest distance at which it is clear which point a label belongs to; a label further away gets a thin line to its point."""
_MARKER = 6.0
_COVERED = 1000.0
"""Cost of a covered pixel, in points of distance; so large that a label covers something only if there is no room at all."""

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""


def place_labels(
    axes: "Axes", points: Sequence[tuple[float, float]], labels: Sequence[str], colours: Sequence[str], *, fontsize: float = 8
) -> list[Any]:
    """Draw each label next to its point. Call this last: limits and scales of the axes must be final.

    Args:
        points: x and y in data coordinates.
        labels: one for each point; colours: of each label.

    Returns: the annotations, in order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure: Any = axes.figure
    # text has no size before a renderer measures it
    renderer: Any = FigureCanvasAgg(figure).get_renderer()
    scale = figure.dpi / 72
    # what is written must not move the axes again
    made: list[Any] = []
    for label, point, colour in zip(labels, points, colours):
        made.append(axes.annotate(label, point, xytext=(0, 0), textcoords="offset points", fontsize=fontsize, color=colour))
        made[-1].set_in_layout(False)
    # the constrained layout moves the axes now; positions in pixels are valid only after it
    if layout := figure.get_layout_engine():
        layout.execute(figure)
    else:
        figure.draw_without_rendering()
    places = [tuple(axes.transData.transform(point)) for point in points]
    markers = [(x - _MARKER * scale, y - _MARKER * scale, x + _MARKER * scale, y + _MARKER * scale) for x, y in places]
    inside = axes.get_window_extent(renderer)
    taken: list[Box] = []
    for number, (text, place) in enumerate(zip(made, places)):
        extent = text.get_window_extent(renderer)
        # a little air around the text
        size = (extent.width + 2 * scale, extent.height + 1 * scale)
        others = [other for at, other in enumerate(places) if at != number]
        lowest, radius, box = math.inf, 0.0, (0.0, 0.0, 0.0, 0.0)
        for further, candidate in _candidates(place, size, scale):
            # the nearest come first, and the distance alone is a cost: two for each point, next to which a covered pixel decides
            if 2 * further > lowest:
                break
            cost = _cost(candidate, taken, markers, inside) + _doubt(candidate, place, others) + 2 * further
            # of equal costs the first counts, so the same picture comes out each time
            if cost < lowest:
                lowest, radius, box = cost, further, candidate
        taken.append(box)
        text.set_position(((box[0] - place[0]) / scale + 1, (box[1] - place[1]) / scale + 1))
        text.set_verticalalignment("bottom")
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.3})
        if radius > _NEAR or _doubt(box, place, others):
            # the line ends at the nearest edge or corner of the box
            nearest = (min(max(place[0], box[0]), box[2]), min(max(place[1], box[1]), box[3]))
            _tie(axes, text.xy, ((nearest[0] - place[0]) / scale, (nearest[1] - place[1]) / scale))
    return made


def _candidates(place: tuple[float, float], size: tuple[float, float], scale: float) -> list[tuple[float, Box]]:
    """Return (distance, box) around a point, nearest first. The distance is that of the box's nearest edge or corner."""
    width, height = size
    found = []
    for radius in _RADII:
        for angle in _ANGLES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # the box leans away from the point: its centre is half its size further out
            x = place[0] + dx * radius * scale + width / 2 * (dx if abs(dx) < 0.3 else math.copysign(1, dx))
            y = place[1] + dy * radius * scale + height / 2 * (dy if abs(dy) < 0.3 else math.copysign(1, dy))
            found.append((radius, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)))
    return found


def _cost(box: Box, taken: Sequence[Box], markers: Sequence[Box], inside: Any) -> float:
    """Return the cost of the pixels that the box would cover: other labels, points, and the area outside the axes."""
    left, bottom, right, top = box
    area = (right - left) * (top - bottom)
    within = overlap(box, (inside.x0, inside.y0, inside.x1, inside.y1))
    # leaving the axes counts double: there a label is cut off
    covered = sum(overlap(box, other) for other in (*taken, *markers)) + 2 * (area - within)
    return _COVERED * covered


def _doubt(box: Box, place: tuple[float, float], others: Sequence[tuple[float, float]]) -> float:
    """Return the cost of a box that is as near to another point as to its own: that of 75 points more distance, where a line is drawn."""
    own = _distance(box, place)
    # a fifth of tolerance: a box that is nearly as near is as unclear
    near = any(_distance(box, other) <= 1.2 * own for other in others)
    return 150.0 if near else 0.0


def _distance(box: Box, place: tuple[float, float]) -> float:
    """Return the distance from a point to the nearest place of a box."""
    x = max(box[0] - place[0], 0.0, place[0] - box[2])
    y = max(box[1] - place[1], 0.0, place[1] - box[3])
    return math.hypot(x, y)


def overlap(one: Box, other: Box) -> float:
    """Return the area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _tie(axes: "Axes", point: tuple[float, float], offset: tuple[float, float]) -> None:
    """Draw a thin line from the point to the nearest place of its label's box."""
    line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    axes.annotate("", xy=point, xytext=offset, textcoords="offset points", arrowprops=line, zorder=1).set_in_layout(False)
