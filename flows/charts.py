"""Charts of a training, as small SVG images that a markdown text holds; drawn from ``metrics.jsonl``."""

from __future__ import annotations

import base64
import json
import math
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from diffsynth_pipe.training.metrics import METRICS_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    Point = tuple[float, float]

MAX_POINTS = 300
"""A line has no more points, so that an image stays below 40 KB however long the run."""

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 34, 40
_RAW, _SMOOTH, _VALIDATION, _BASE = "#b9cdf0", "#2255bb", "#d1481f", "#777777"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``, without one that is still being written."""
    try:
        lines = (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def loss_chart(metrics: Iterable[Mapping[str, Any]]) -> str | None:
    """Draw the losses over the optimizer steps; None if there are none.

    The training loss is shown pale, and as a moving average; it varies with the noise that each step draws, so the
    validation loss, at fixed noise, is what shows progress.
    """
    train: list[Point] = []
    validation: list[Point] = []
    base = None
    for entry in metrics:
        if "loss" in entry:
            train.append((entry["step"], entry["loss"]))
        if "validation_loss" in entry:
            validation.append((entry["step"], entry["validation_loss"]))
            base = entry.get("validation_base_loss", base)
    raw, validation = _thinned(train), _thinned(validation)
    if not raw and not validation:
        return None
    last = max(step for step, _ in [*raw, *validation])
    plot = _Plot("step", (0, max(last, 1)), [value for _, value in [*raw, *validation]])
    if raw:
        plot.line(raw, _RAW, 1)
        plot.line(_smoothed(raw), _SMOOTH, 2, "training loss, smoothed")
    if base is not None:
        plot.line([(0, base), (last, base)], _BASE, 1, "base model", dashes="5 4")
    if validation:
        plot.line(validation, _VALIDATION, 1.5, "validation loss, fixed noise")
    for point in validation:
        plot.dot(point, _VALIDATION)
    return plot.markdown("Loss over steps")


def decile_chart(metrics: Iterable[Mapping[str, Any]]) -> str | None:
    """Draw the newest training loss of each tenth of the noise levels, the noisiest first; None if there is none."""
    losses: dict[int, float] = {}
    num_deciles = 0
    for entry in metrics:
        for number, loss in enumerate(entry.get("loss_by_noise_decile", ()), 1):
            num_deciles = max(num_deciles, number)
            if loss is not None:
                losses[number] = loss
    if not losses:
        return None
    label = "tenth of the noise levels, 1 is the noisiest"
    plot = _Plot(label, (0.4, num_deciles + 0.6), [0, *losses.values()])
    for number, loss in losses.items():
        plot.bar(number, loss, _SMOOTH)
    plot.legend("training loss by noise level", _SMOOTH)
    return plot.markdown("Training loss by noise level")


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return the points, or means of neighbours where they are too many."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Return exponential moving averages over about a tenth of the points, unbiased at the start."""
    decay = 1 - 1 / max(1, len(points) / 10)
    smoothed, total, weight = [], 0.0, 0.0
    for step, value in points:
        total, weight = decay * total + value, decay * weight + 1
        smoothed.append((step, total / weight))
    return smoothed


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return at most about ``count`` round numbers from ``low`` to ``high``."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


class _Plot:
    """Axes with numbers on white, which is legible on a dark page too."""

    def __init__(self, x_label: str, x_range: tuple[float, float], values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        self._x_range = x_range
        self._y_range = (low if low == 0 else low - margin, high + margin)
        self._legend_x = _LEFT
        self._svg = ElementTree.Element(
            "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", width=str(_WIDTH),
            height=str(_HEIGHT), style="font: 12px sans-serif",
        )  # fmt: skip
        self._add("rect", width=_WIDTH, height=_HEIGHT, fill="white")
        bottom = _HEIGHT - _BOTTOM
        for value in _ticks(*self._y_range, 6):
            y = self._y(value)
            self._add("path", d=f"M{_LEFT} {y}H{_WIDTH - _RIGHT}", stroke="#e4e4e4")
            self._text(_LEFT - 6, y + 4, f"{value:.4g}", "end")
        for value in _ticks(*x_range, 12):
            if value == int(value):
                self._text(self._x(value), bottom + 16, f"{int(value)}", "middle")
        self._add("path", d=f"M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}", stroke="#444444", fill="none")
        self._text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label, "middle")

    def line(self, points: Sequence[Point], color: str, width: float, name: str = "", dashes: str = "none") -> None:
        """Draw a line through points; a name gives it a place in the legend."""
        text = " ".join(f"{self._x(x)},{self._y(y)}" for x, y in points)
        style = {"stroke-width": width, "stroke-linejoin": "round", "stroke-dasharray": dashes}
        self._add("polyline", points=text, fill="none", stroke=color, **style)
        if name:
            self.legend(name, color)

    def dot(self, point: Point, color: str) -> None:
        self._add("circle", cx=self._x(point[0]), cy=self._y(point[1]), r=3, fill=color)

    def bar(self, x: float, value: float, color: str) -> None:
        """Draw a bar with its value on top."""
        left, right, top = self._x(x - 0.35), self._x(x + 0.35), self._y(value)
        self._add("path", d=f"M{left} {self._y(0)}V{top}H{right}V{self._y(0)}Z", fill=color)
        self._text(self._x(x), top - 4, f"{value:.3g}", "middle")

    def legend(self, name: str, color: str) -> None:
        self._add("rect", x=self._legend_x, y=12, width=14, height=4, fill=color)
        self._text(self._legend_x + 20, 18, name, "start")
        self._legend_x += 40 + 7 * len(name)

    def markdown(self, title: str) -> str:
        """Return an image that needs no file: pages of the server show it wherever they are opened."""
        data = base64.b64encode(ElementTree.tostring(self._svg)).decode()
        return f"![{title}](data:image/svg+xml;base64,{data})"

    def _x(self, value: float) -> float:
        low, high = self._x_range
        return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def _y(self, value: float) -> float:
        low, high = self._y_range
        return round(_HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def _add(self, tag: str, **attributes: object) -> ElementTree.Element:
        values = {name: str(value) for name, value in attributes.items()}
        return ElementTree.SubElement(self._svg, tag, values)

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        element = self._add("text", x=x, y=y, fill="#333333", **{"text-anchor": anchor})
        element.text = text
