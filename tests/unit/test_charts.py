"""The charts of a run, read back from their SVG."""

import base64
import json
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from flows.charts import MAX_POINTS, decile_chart, loss_chart, read_metrics

SVG = "{http://www.w3.org/2000/svg}"


def parse(markdown):
    head, data = markdown.removesuffix(")").split("(data:image/svg+xml;base64,")
    assert head.startswith("![")
    return ElementTree.fromstring(base64.b64decode(data))


def lines(svg):
    """Return the points of each line, in pixels."""
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in svg.iter(f"{SVG}polyline")
    ]


def axis(svg, anchor):
    """Return pixel and number of each label, and from two of them the scale in pixels per unit."""
    name = "y" if anchor == "end" else "x"
    labels = [
        (float(text.get(name)), text.text) for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == anchor
    ]
    return [(pixel, float(text)) for pixel, text in labels if text.replace(".", "").isdigit()]


def test_points_lie_where_the_numbers_of_the_axes_say():
    metrics = [{"step": step, "loss": 2 - step / 100} for step in range(1, 101)]
    metrics += [{"step": 0, "validation_loss": 1.9, "validation_base_loss": 1.9}, {"step": 100, "validation_loss": 1.2}]
    svg = parse(loss_chart(metrics))
    (x0, first), (x1, second), *_ = axis(svg, "middle")
    (y0, low), (y1, high), *_ = axis(svg, "end")

    def values(points):
        # the labels of the left axis stand 4 px below their line
        scale_x, scale_y = (second - first) / (x1 - x0), (high - low) / (y1 - y0)
        return [(first + (x - x0) * scale_x, low + (y + 4 - y0) * scale_y) for x, y in points]

    raw, smoothed, base, validation = map(values, lines(svg))
    assert raw == [pytest.approx((entry["step"], entry["loss"]), abs=0.1) for entry in metrics[:100]]
    assert [point for point, _ in smoothed] == [point for point, _ in raw]
    assert smoothed[0] == pytest.approx(raw[0])
    assert all(later[1] < earlier[1] for earlier, later in pairwise(smoothed))
    assert base == [pytest.approx(point, abs=0.1) for point in ((0, 1.9), (100, 1.9))]
    assert validation == [pytest.approx(point, abs=0.1) for point in ((0, 1.9), (100, 1.2))]


def test_a_long_run_stays_small():
    markdown = loss_chart({"step": step, "loss": 1.0 + step % 7, "validation_loss": 1.0} for step in range(1, 100_001))
    assert len(lines(parse(markdown))[0]) <= MAX_POINTS
    assert len(markdown) < 100_000


@pytest.mark.parametrize("loss", [0.0, 1.0, 1e-9, 1e9])
def test_a_single_loss_is_drawn(loss):
    assert len(lines(parse(loss_chart([{"step": 1, "loss": loss}])))) == 2


def test_deciles_show_the_newest_loss_of_each():
    svg = parse(decile_chart([{"loss_by_noise_decile": [1.0, 2.0, None]}, {"loss_by_noise_decile": [None, 3.0, None]}]))
    assert {"1", "3"} <= {text.text for text in svg.iter(f"{SVG}text")}
    assert len([path for path in svg.iter(f"{SVG}path") if path.get("d").endswith("Z")]) == 2


def test_nothing_yet_is_no_chart(tmp_path):
    assert read_metrics(tmp_path) == []
    assert loss_chart([]) is None
    assert decile_chart([{"step": 1, "loss": 1.0}, {"loss_by_noise_decile": [None, None]}]) is None


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    entries = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    text = "\n".join(map(json.dumps, entries))
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_metrics(tmp_path) == entries[:1]
