"""Claims: drawings show the data they are given (position, width, order) and stay XML whatever the names."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.formats import format_seconds
from fedmira.report import charts, graph_charts, svg
from fedmira.report.charts import Bar, Line, Step

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\n\u202e]]>"
finite = st.floats(-1e6, 1e6)


def parse(drawing: str) -> ElementTree.Element:
    """The drawing as XML: whatever is not escaped fails here."""
    return ElementTree.fromstring(drawing)


def found(drawing: str, name: str, css: str = "") -> list[ElementTree.Element]:
    return [e for e in parse(drawing).iter(name) if css in f" {e.get('class', '')} "]


def length(element: ElementTree.Element, attribute: str) -> float:
    return float(element.get(attribute) or "nan")


def test_line_chart_puts_higher_losses_higher_and_leaves_gaps_for_what_is_not_finite() -> None:
    low = Line("low", [(1, 1.0), (2, math.nan), (3, 1.0)], "s0")
    high = Line("high", [(1, 3.0), (2, 3.0), (3, 2.0)], "s1")
    drawing = charts.line_chart([low, high], "losses")
    dots = {dot.get("class"): dot for dot in found(drawing, "circle")}
    assert length(dots["fill s1"], "cy") < length(dots["fill s0"], "cy")
    assert length(dots["fill s1"], "cx") == length(dots["fill s0"], "cx")
    assert [path.get("d", "").count(" ") for path in found(drawing, "path")] == [2, 3]
    assert "nan" not in drawing


def test_line_labels_keep_their_distance_and_order() -> None:
    lines = [Line(f"method{k}", [(1, 2.0), (2, 2.0 + 0.001 * k)], f"s{k}") for k in range(6)]
    labels = found(charts.line_chart(lines, "close"), "text", " label ")
    heights = sorted(length(label, "y") for label in labels)
    assert all(above + 16.9 <= below for above, below in zip(heights, heights[1:], strict=False))
    assert max(heights) <= 290
    by_name = {label.text: length(label, "y") for label in labels}
    assert by_name["method5"] < by_name["method0"]


def test_bars_are_as_long_as_their_values_and_marked_where_not_finite() -> None:
    groups = [("task", [Bar("a", 1.0, "s0"), Bar("b", 2.0, "s1"), Bar("c", math.nan, "s2")])]
    drawing = charts.grouped_bars(groups, "bars", highest=2.0)
    one, two, _ = (length(bar, "width") for bar in found(drawing, "rect"))
    assert two == pytest.approx(2 * one, abs=0.02)
    assert [value.text for value in found(drawing, "text", " value ")] == ["1.000", "2.000", "nan"]


def test_changes_are_sorted_coloured_by_the_tolerance_and_clipped_at_the_shared_scale() -> None:
    changes = [("worse", 0.05), ("better", -0.2), ("same", 0.005), ("gone", math.inf)]
    drawing = charts.change_bars(changes, "changes", low=-0.2, high=0.05, tolerance=0.01)
    bars = found(drawing, "rect")
    assert [bar.get("class", "").split()[-1] for bar in bars] == ["better", "level", "worse", "worse"]
    assert length(bars[0], "x") < length(bars[1], "x") < length(bars[2], "x")
    assert length(bars[0], "height") == pytest.approx(4 * length(bars[2], "height"), rel=0.01)
    assert length(bars[3], "height") == pytest.approx(length(bars[2], "height"))
    # below the zero line and above it
    assert length(bars[0], "y") == pytest.approx(length(bars[2], "y") + length(bars[2], "height"), abs=0.02)


def test_paired_dots_lie_left_of_zero_where_better() -> None:
    drawing = charts.paired_dots([("m", [("seed 0", -0.2), ("seed 1", 0.1)], "s0")], "pairs")
    left, right = (length(dot, "cx") for dot in found(drawing, "circle"))
    zero = length(found(drawing, "line", " zero ")[0], "x1")
    centre = length(found(drawing, "line", " bold ")[0], "x1")
    assert left < zero < right
    assert zero - left == pytest.approx(2 * (right - zero), abs=0.1)
    assert centre == pytest.approx((left + right) / 2, abs=0.02)


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_a_difference_that_is_not_finite_is_a_cross_at_the_right_end(lost: float) -> None:
    drawing = charts.paired_dots(
        [("m", [("seed 0", -0.2), ("seed 1", lost)], "s0"), ("n", [("s", 0.1)], "s1")], "pairs"
    )
    assert len(found(drawing, "circle")) == 2
    (cross,) = found(drawing, "path")
    assert float(cross.get("d", "")[1:].split()[0]) > max(length(dot, "cx") for dot in found(drawing, "circle"))
    assert "m, seed 1: the loss was not finite" in drawing
    # a mean without the lost run would flatter the method
    assert len(found(drawing, "line", " bold ")) == 1


def test_what_is_not_a_number_is_never_at_the_low_end() -> None:
    assert svg.Scale(0.0, 1.0, 10.0, 20.0)(math.nan) == 20.0


def test_stacks_add_up() -> None:
    parts = [Bar("train", 3.0, "s0"), Bar("merge", 0.0, "s1"), Bar("evaluate", 1.0, "s2")]
    rows = charts.stacked_bars([("m", parts), ("nothing", [])], "seconds", format_seconds)
    train, evaluate = found(rows, "rect")
    assert length(train, "width") == pytest.approx(3 * length(evaluate, "width"), abs=0.1)
    assert length(evaluate, "x") == pytest.approx(length(train, "x") + length(train, "width"), abs=0.02)
    columns = charts.stacked_columns([(1, parts), (3, parts)], "seconds", format_seconds, ("s", 1.0))
    first = found(columns, "rect")[:2]
    assert length(first[1], "y") + length(first[1], "height") == pytest.approx(length(first[0], "y"), abs=0.02)
    # two rounds that are two apart leave the place of the missing one free
    xs = sorted({length(rect, "x") for rect in found(columns, "rect")})
    assert xs[1] - xs[0] > 1.9 * length(first[0], "width")


def test_merge_steps_fall_and_take_a_logarithmic_scale_for_wide_ranges() -> None:
    linear = charts.merge_steps([Step(1, 40.0, 10.0), Step(2, 20.0, 5.0)], "energy", "s0")
    wide = charts.merge_steps([Step(1, 1000.0, 100.0), Step(2, 10.0, 1.0)], "energy", "s0")
    for drawing in (linear, wide):
        for ring, dot in zip(found(drawing, "circle", " ring "), found(drawing, "circle", " fill "), strict=True):
            assert length(ring, "cy") < length(dot, "cy")
    drops = [length(line, "y2") - length(line, "y1") for line in found(wide, "line", " line ")]
    assert drops[0] == pytest.approx(drops[1], abs=0.05)
    parse(charts.merge_steps([Step(1, 0.0, 0.0)], "nothing to merge", "s0"))


def test_heat_map_shades_by_weight_and_orders_by_group() -> None:
    graph = graph_charts.order_by_group(
        ["a", "b", "c"], ["x", "y", "x"], [[0.0, 0.1, 1.0], [0.1, 0.0, 0.0], [1.0, 0.0, 0.0]]
    )
    assert graph.names == ("a", "c", "b")
    assert graph.weights[0] == (0.0, 1.0, 0.1)
    cells = {
        (cell.get("x"), cell.get("y")): cell.get("class")
        for cell in found(graph_charts.heat_map(graph, "heat"), "rect", "h")
    }
    cells = {place: css for place, css in cells.items() if css in {f"h{level}" for level in range(1, 9)}}
    assert cells == {("1", "0"): "h8", ("0", "1"): "h8", ("2", "0"): "h1", ("0", "2"): "h1"}
    assert graph_charts.share_within_groups(graph) == pytest.approx(2.0 / 2.2)


def test_large_graphs_stay_small_and_say_how_much_is_drawn() -> None:
    size = 80
    names = [f"client{k}" for k in range(size)]
    groups = [f"task{k // 5}" for k in range(size)]
    weights = [[0.0 if i == j else 0.25 + ((i * 37 + j * 37) % 75) / 100 for j in range(size)] for i in range(size)]
    graph = graph_charts.order_by_group(names, groups, weights)
    heat, drawn = graph_charts.heat_map(graph, "heat"), graph_charts.node_link(graph, "drawn")
    assert drawn is not None
    assert len(heat) + len(drawn) < 120_000
    strokes = sum(path.get("d", "").count("M") for path in found(heat, "path", " strokes "))
    assert strokes == size * (size - 1)
    edges = graph_charts.edges_of(graph)
    assert len(edges) == size * (size - 1) // 2
    assert len(found(drawn, "path", " edge ")) == graph_charts.MAXIMUM_EDGES
    assert edges[0][0] == max(max(row) for row in weights)


def test_very_many_clients_share_cells() -> None:
    size = 252
    one = [[float(i != j) for j in range(size)] for i in range(size)]
    graph = graph_charts.order_by_group([str(k) for k in range(size)], [""] * size, one)
    heat = graph_charts.heat_map(graph, "heat")
    assert graph_charts.node_link(graph, "drawn") is None
    # three clients a cell
    assert sum(path.get("d", "").count("M") for path in found(heat, "path", " strokes ")) == math.ceil(size / 3) ** 2
    assert len(heat) < 120_000


@pytest.mark.parametrize("size", [0, 1, 2])
def test_graphs_without_edges_are_drawn_too(size: int) -> None:
    graph = graph_charts.order_by_group(["a", "b"][:size], [""] * size, [[0.0] * size] * size)
    parse(graph_charts.heat_map(graph, "heat"))
    parse(graph_charts.node_link(graph, "drawn") or "")
    assert graph_charts.share_within_groups(graph) is None


@given(st.text(max_size=30), st.lists(st.tuples(st.integers(1, 50), finite), max_size=6), finite)
def test_no_name_and_no_number_breaks_a_drawing(name: str, points: list[tuple[int, float]], value: float) -> None:
    name = name.encode("utf-8", "replace").decode() + HOSTILE
    bars = [Bar(name, abs(value), "s0")]
    graph = graph_charts.order_by_group([name, name + "2"], [name, ""], [[0.0, abs(value)], [abs(value), 0.0]])
    for drawing in (
        charts.line_chart([Line(name, sorted(points), "s0"), Line(name, points, "s1", bold=False)], name),
        charts.grouped_bars([(name, bars)], name, highest=abs(value)),
        charts.change_bars([(name, value)], name, low=min(value, 0.0), high=max(value, 0.0), tolerance=0.01),
        charts.paired_dots([(name, [(name, value)], "s0")], name),
        charts.stacked_bars([(name, bars)], name, format_seconds),
        charts.stacked_columns([(1, bars)], name, format_seconds, (name, 1.0)),
        charts.merge_steps([Step(1, abs(value), 0.0)], name, "s0"),
        graph_charts.heat_map(graph, name),
        graph_charts.node_link(graph, name) or "",
    ):
        root = parse(drawing)
        assert {element.tag for element in root.iter()} <= {
            "svg",
            "g",
            "path",
            "line",
            "rect",
            "circle",
            "text",
            "title",
        }
        assert "\x1b" not in drawing
        assert "\n" not in drawing


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_within_and_not_too_many(low: float, span: float, wanted: int) -> None:
    high = low + span
    if not high > low or span < 1e-9 * abs(low):
        return
    values = svg.ticks(low, high, wanted)
    slack = 1e-6 * span
    assert all(low - slack <= value <= high + slack for value in values)
    assert len(values) <= 1.5 * wanted + 1
    assert values == sorted(set(values))


def test_a_chart_of_many_methods_has_room_for_all_their_labels() -> None:
    lines = [Line(f"method{k}", [(1, 2.0), (2, 2.0 + 0.001 * k)], f"s{k % 8}") for k in range(31)]
    drawing = charts.line_chart(lines, "many")
    heights = sorted(length(label, "y") for label in found(drawing, "text", " label "))
    assert min(heights) > 0
    assert all(above + 16.9 <= below for above, below in zip(heights, heights[1:], strict=False))
