"""The figures of the documentation, and the numbers that it gives of them."""

from __future__ import annotations

import pytest

from conftest import ROOT, load_example

IMAGES = ROOT / "docs" / "images"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("matplotlib")
    pytest.importorskip("torchdeq")
    return load_example("report_figures")


def test_one_radius_and_two_directions(example):
    cosines = {}
    for leading in (-1.4, 1.4):
        report = example.linear_map(leading)
        assert report.radius == pytest.approx(1.4, rel=1e-2)
        cosines[leading] = [result.cosine for result in report.results]
    assert cosines[-1.4][:2] == pytest.approx([1, 0.996], abs=1e-3)
    assert cosines[1.4][:2] == pytest.approx([1, -0.674], abs=1e-3)


@pytest.mark.slow
def test_the_command_writes_what_is_in_the_documentation(example, tmp_path, capsys):
    example.main(["--steps", "1", "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in IMAGES.iterdir()}
    assert capsys.readouterr().out.startswith((tmp_path / "report.txt").read_text())
    for path in tmp_path.glob("*.svg"):
        assert b"<svg" in path.read_bytes()
