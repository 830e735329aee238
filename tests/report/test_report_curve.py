"""Curves: text as text, the page's colours, nothing global touched, whatever the numbers."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from lorakit.errors import OutputError, UsageError
from lorakit.report import Curve, curve_svg, save_picture
from lorakit.report.picture import MOST_POINTS, running_mean, thin


def curve(**changes) -> Curve:
    points = [(float(step), math.exp(-step / 30)) for step in range(100)]
    parts = {
        "title": "Loss",
        "x_label": "step",
        "y_label": "nats",
        "series": {"training": points, "other": points[::9]},
    }
    return Curve(**(parts | changes))


def texts(svg: str) -> list[str]:
    return [node.text for node in ET.fromstring(svg).iter("text")]


def test_words_stay_words_and_carry_no_font_of_their_own():
    svg = curve_svg(curve())
    assert {"step", "nats", "training", "other"} <= set(texts(svg))
    assert "font-family" not in svg
    assert ET.fromstring(svg).get("aria-label") == "Loss"


def test_colours_follow_the_page():
    svg = curve_svg(curve())
    assert "var(--line-1, #0072b2)" in svg
    assert "var(--line-2, #d55e00)" in svg
    assert svg.count("#0072b2") == svg.count("var(--line-1, #0072b2)")
    assert "fill: #ffffff" not in svg  # no background: the page's shows
    assert "<style" not in svg
    assert "metadata" not in svg


def test_the_same_whatever_the_users_settings_and_those_come_back():
    expected = curve_svg(curve())
    with matplotlib.rc_context(
        {"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red", "lines.linewidth": 9}
    ):
        before = dict(matplotlib.rcParams)
        assert curve_svg(curve()) == expected
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_loaded_and_importing_loads_no_matplotlib():
    code = (
        "import sys; import lorakit.report as r; assert not {'matplotlib', 'jinja2'} & set(sys.modules);"
        "r.curve_svg(r.Curve('t', 'x', 'y', {'a': [(0, 1), (1, 2)]})); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_points_that_are_not_finite_are_left_out():
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0), (3.0, math.inf), (math.nan, 1.0), (4.0, 1e300)]
    assert curve(series={"a": points}).drawable() == {"a": [(0.0, 1.0), (2.0, 3.0)]}
    assert curve_svg(curve(series={"a": points})) == curve_svg(curve(series={"a": [(0.0, 1.0), (2.0, 3.0)]}))


def test_nothing_to_draw_is_an_error_that_names_the_curve():
    with pytest.raises(UsageError, match=r"'Loss'.*at least one point"):
        curve_svg(curve(series={"a": [(0.0, math.nan)]}))


@pytest.mark.parametrize(
    "points",
    [
        [(5.0, 2.0)],
        [(0.0, 1.0), (1.0, 1.0)],
        [(0.0, 0.0), (1.0, 1e37), (2.0, -1e37)],
        [(0.0, 1e-300), (1.0, 2e-300)],
        [(1e9, 1e-9), (2e9, 2e-9)],
        [(3.0, 1.0), (1.0, 2.0), (3.0, 0.5)],
    ],
    ids=["one", "flat", "huge", "tiny", "far", "unsorted"],
)
def test_odd_numbers_draw(points):
    for smooth in ((), ("a",)):
        assert "<path" in curve_svg(curve(series={"a": points}, smooth=smooth))


@pytest.mark.parametrize("name", ["", "_", "$a_{", "a\nb", "x" * 300, "مرحبا", "😀", "<b>&\x00\ud800", "日本"])
def test_odd_names_draw(name):
    points = [(0.0, 1.0), (1.0, 2.0)]
    odd = Curve(name, name, name, {name: points, "b": points}, marks=[(0.5, name)], smooth=[name])
    assert "b" in texts(curve_svg(odd))


def test_a_long_run_stays_small_and_keeps_its_spikes():
    xs = np.arange(50_000.0)
    ys = np.sin(xs / 900)
    ys[31_234] = 40.0
    thin_x, thin_y = thin(xs, ys)
    assert len(thin_x) <= MOST_POINTS
    assert thin_y.max() == 40.0
    assert thin_x[thin_y.argmax()] == 31_234
    assert (np.diff(thin_x) > 0).all()
    svg = curve_svg(curve(series={"a": list(zip(xs, ys, strict=True))}, smooth=["a"]))
    assert len(svg) < 60_000


def test_running_mean_against_a_plain_loop():
    ys = np.random.default_rng(0).normal(size=157)
    half = 157 // 30
    expected = [ys[max(0, at - half) : at + half + 1].mean() for at in range(157)]
    np.testing.assert_allclose(running_mean(ys), expected, rtol=1e-12)
    np.testing.assert_allclose(running_mean(np.array([2.0, 4.0])), [3.0, 3.0])


def test_pictures_are_whole_files_and_the_same_each_time(tmp_path):
    png = save_picture(curve(), tmp_path / "new" / "loss.PNG")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.read_bytes() == save_picture(curve(), tmp_path / "again.png").read_bytes()
    svg = save_picture(curve(), tmp_path / "loss.svg")
    words = ["".join(node.itertext()) for node in ET.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert "Loss" in words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.png", "loss.svg", "new"]


def test_a_picture_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\.png or \.svg, got 'loss\.gif'"):
        save_picture(curve(), tmp_path / "loss.gif")


def test_a_picture_where_a_folder_is_is_an_output_error(tmp_path):
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(OutputError, match=r"loss\.png"):
        save_picture(curve(), tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
