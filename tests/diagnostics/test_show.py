"""How a report looks: specs as typed, axes that can be read, nothing compared with nothing."""

from __future__ import annotations

import html
import itertools
import json
import math
from dataclasses import replace

import pytest

import deq_phantom_plugin as dpp
from deq_phantom_plugin.diagnostics.measure.labels import label
from deq_phantom_plugin.diagnostics.show.recommendation import recommend
from deq_phantom_plugin.testing import make_equilibrium

figures = pytest.importorskip("deq_phantom_plugin.diagnostics.show.figures")


@pytest.fixture(scope="module")
def report():
    equilibrium = make_equilibrium([(3, 4)])
    return dpp.gradient_report(
        equilibrium.func,
        equilibrium.state,
        equilibrium.probe,
        equilibrium.params,
        ["ift", "upg", "npg( k=15 )", {"name": "npg", "k": 3}, dpp.IFT(tol=1e-9), dpp.JFB, "exact"],
        repeats=1,
    )


# --- names ------------------------------------------------------------------------------------

TYPED = ["ift", "upg", "npg( k=15 )", "npg(k=3)", "ift(tol=1e-09)", "jfb", "exact"]


def test_specs_are_shown_as_they_were_typed(report, tmp_path):
    assert [result.label for result in report.results] == TYPED
    lines = str(report).splitlines()
    assert all(any(line.startswith(f"{name}  ") for line in lines) for name in TYPED)
    assert "max_iter" not in str(report).partition("cosine")[2]
    report.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for result in report.results:
        assert f'<td title="{html.escape(result.strategy)}">{result.label}</td>' in page


def test_what_a_spec_stands_for_is_in_the_numbers(report):
    first = report.to_dict()["results"][0]
    assert first["label"] == "ift"
    assert first["strategy"] == repr(dpp.IFT())


@pytest.mark.parametrize("name", dpp.list_strategies())
def test_the_name_of_an_object_parses_back_to_it(name):
    try:
        strategy = dpp.get_strategy(name)
    except ValueError:
        pytest.skip("has arguments without a default")
    assert label(strategy, strategy) == name
    assert dpp.get_strategy(label(strategy, strategy)) == strategy


def test_an_object_is_named_by_what_differs():
    strategy = dpp.UPG(k=7, checkpoint=True)
    assert label(strategy, strategy) == "upg(k=7, checkpoint=True)"
    assert dpp.get_strategy(label(strategy, strategy)) == strategy


def test_of_methods_that_are_equally_fast_the_most_accurate_is_named(report):
    def advice(**seconds):
        timed = [
            replace(
                result,
                cosine=1.0 - 1e-3 * seconds[result.label][1],
                forward_seconds=0.0,
                backward_seconds=seconds[result.label][0],
            )
            for result in report.results
            if result.label in seconds
        ]
        return " ".join(recommend(replace(report, results=timed)))

    assert "upg is the cheapest" in advice(upg=(2.03, 9), jfb=(2.3, 1), ift=(9.0, 0))
    assert "jfb is the cheapest" in advice(upg=(2.03, 9), jfb=(2.09, 1), ift=(9.0, 0))
    text = advice(upg=(2.03, 9), jfb=(2.09, 1), ift=(2.1, 0))
    assert "ift is the cheapest" in text
    assert "times as fast" not in text


# --- a reference that is none -----------------------------------------------------------------


def test_without_a_reference_there_is_no_cosine(report, tmp_path):
    poor = replace(report, reference_residual=0.3)
    poor = replace(poor, recommendation=recommend(poor))
    good, text = str(report), str(poor)
    for result in report.results[1:4]:
        assert f"{result.cosine:.4f}" in good
        assert f"{result.relative_error:.2e}" in good
        assert f"{result.relative_error:.2e}" not in text
    assert all(row.split("  ")[-1] != "" for row in text.splitlines() if row.startswith("ift "))
    assert "No cosine and no error: the reference itself has a residual of 3.0e-01" in text
    assert "No cosine" not in good
    assert "cheapest" in good
    assert "cheapest" not in text
    poor.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"{report.results[1].cosine:.4f}" not in page
    assert "No cosine and no error" in page
    assert page.count("<img ") == 2  # nor a figure of errors
    poor.save_json(tmp_path / "report.json")
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["results"][1]["cosine"] == report.results[1].cosine


def test_a_reference_of_16_bits_is_compared_with_and_said_to_be_inexact(report):
    coarse = replace(report, reference_residual=5e-3)
    coarse = replace(coarse, recommendation=recommend(coarse))
    assert f"{report.results[1].cosine:.4f}" in str(coarse)
    assert "cosines and errors compare with a gradient that is not exact" in " ".join(
        coarse.recommendation
    )
    assert "No cosine" not in str(coarse)


# --- axes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [1e-9, 0.00317, 0.7, 1.0, 42.0])
@pytest.mark.parametrize("ratio", [1.96, 2.5, 4, 7, 9.9, 10, 60, 900, 1100, 1e5, 1e9, 3e15])
def test_a_logarithmic_axis_has_ticks_enough_and_not_too_many(low, ratio):
    ticks = figures.log_ticks(low, low * ratio)
    assert 3 <= len(ticks) <= 10
    assert ticks == sorted(ticks)
    assert low * (1 - 1e-9) <= ticks[0] < ticks[-1] <= low * ratio * (1 + 1e-9)
    assert all(len(f"{tick:g}".replace(".", "").strip("0")) <= 7 for tick in ticks)


def drawn(results):
    """The axes of errors against time, laid out as on a page."""
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": figures.TEXT}):
        figure = Figure(figsize=figures.INCHES, layout="constrained")
        agg.FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        figures.draw_errors(axes, results)
        figure.canvas.draw()
    return axes


def visible(axis):
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1
        for tick in axis.get_major_ticks()
        if low <= tick.get_loc() <= high and tick.label1.get_text()
    ]


# Within one decade, over some and over many, and one method alone.
TIMES = [(2e-3, 3e-3, 5e-3), (2e-4, 2e-3, 3e-2), (1e-4, 2e-2, 3.0), (1e-3, 1e-3, 1e-3)]
ERRORS = [(0.2, 0.5, 0.0), (1e-4, 0.6, 1e-16), (0.3, 0.31, 0.32), (0.3, 0.01, 1e30)]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("errors", [*ERRORS, (0.3, 1e-16, math.inf)])
def test_errors_against_time_can_be_read(report, times, errors):
    results = [
        replace(result, forward_seconds=0.0, backward_seconds=time, relative_error=error)
        for result, time, error in zip(report.results, times, errors, strict=False)
    ]
    axes = drawn(results)
    for axis in (axes.xaxis, axes.yaxis):
        labels = visible(axis)
        assert len(labels) >= 3
        boxes = [text.get_window_extent() for text in labels]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    # What is no rounding has most of the height.
    low, high = (math.log(y) for y in axes.get_ylim())
    own = [math.log(error) for error in errors if 1e-6 < error < 1e2]
    assert max(own) < high
    assert min(own) > low
    if len(own) > 1 and max(own) - min(own) > 1:
        assert (max(own) - min(own)) / (high - low) > 0.3
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sum(": " in text for text in texts) == 3 - len(own)
    sizes = [text.get_fontsize() for text in (*axes.get_legend().get_texts(), axes.xaxis.label)]
    assert min(sizes) >= 9


def test_only_errors_of_rounding_are_drawn_too(report):
    results = [replace(result, relative_error=0.0) for result in report.results[:2]]
    axes = drawn([replace(r, forward_seconds=0.0, backward_seconds=1e-3) for r in results])
    assert visible(axes.yaxis) == []
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "ift: 0e+00",
        "upg: 0e+00",
    ]


def test_a_gradient_of_zero_has_no_figure_of_errors(report):
    none = [replace(result, relative_error=math.nan) for result in report.results]
    assert figures.of_report(report).count("<img ") == 3
    assert figures.of_report(replace(report, results=none)).count("<img ") == 2


def test_the_radii_stand_in_columns(report, tmp_path):
    head = str(report).splitlines()
    (lams,) = [line for line in head if line.startswith("damped by lam")]
    radii = head[head.index(lams) + 1]
    assert lams.split()[3:] == [f"{lam:g}" for lam in report.damped_radii]
    assert radii.split()[2:] == [f"{radius:.3f}" for radius in report.damped_radii.values()]
    assert len(lams) == len(radii)
    report.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    row = "".join(f"<td>{lam:g}</td>" for lam in report.damped_radii)
    assert f"<tr><th>damped by lam</th>{row}</tr>" in page


@pytest.mark.parametrize(("spread", "is_said"), [(1.1, False), (None, False), (2.6, True)])
def test_times_that_differ_from_run_to_run_are_said_to_be_uncertain(report, spread, is_said):
    results = [replace(result, time_spread=spread) for result in report.results]
    text = " ".join(str(replace(report, results=results)).split())
    assert ("runs of one method differ by a factor of up to 2.6." in text) is is_said
