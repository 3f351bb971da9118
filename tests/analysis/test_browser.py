"""The report in a real browser, where one is installed."""

import json
import shutil

import pytest
from support.browser import Browser, assert_opens, find

from mlx_moe.analysis.report import write_report
from mlx_moe.analysis.run_reader import read_record
from mlx_moe.storage import jsonl
from mlx_moe.storage.run_folder import METRICS

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium or Chrome is installed")


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A run whose steps took longer and longer, and more memory: what is measured may be even, or one for all steps."""
    folder = tmp_path_factory.mktemp("slowing") / "run"
    shutil.copytree(finished, folder)
    rows = jsonl.read(folder / METRICS)
    for n, row in enumerate(row for row in rows if "step_ms" in row):
        row |= {"step_ms": 10.0 * (n + 1), "peak_memory_bytes": 10**6 * (n + 1) ** 3}
        row |= {"tokens_per_s": 1e6 / (n + 1), "mfu": 0.5 / (n + 2)}
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def page(run, mlxmoe, tmp_path_factory):
    assert mlxmoe("experts", run, "--sequences", 16, "--backend", "torch").code == 0
    return write_report(run, tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_without_an_error_and_without_a_request(browser, page, width, dark):
    assert_opens(browser, page, width, dark)
    drawn = browser.evaluate("document.querySelectorAll('#chart path').length")
    assert drawn == 2 + 2  # training and validation, and the legend's two


def test_an_error_and_a_request_would_be_seen(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script src='gone.js'></script><script>fetch('http://127.0.0.1:9'); nothing.at.all</script>")
    browser.open(page)
    browser.evaluate("1")
    assert len(browser.requests) >= 3
    assert len(browser.errors) >= 2
    browser.errors.clear()


def test_pointing_at_the_curve_reads_its_values(browser, page, run):
    browser.open(page)
    browser.evaluate("chart.scrollIntoView({block: 'center'})")
    right, top = browser.evaluate("(({right, top}) => [right, top])(chart.getBoundingClientRect())")
    browser.point_at(right - 14, top + 100)
    last = read_record(run).phases[-1].rows[-1]
    said = browser.evaluate("reading.textContent")
    assert "3: larger experts, step 8" in said
    assert f"training {last['cross_entropy']:.4g}" in said
    assert f"validation {last['validation_loss']:.4g}" in said
    browser.evaluate("chart.focus()")
    browser.press("ArrowLeft")
    assert "3: larger experts, step 7" in browser.evaluate("reading.textContent")


def test_every_choice_of_a_curve_draws(browser, page):
    browser.open(page)
    paths = browser.evaluate("""(() => {
      const choose = (id, value) => {
        byId(id).value = value;
        byId(id).dispatchEvent(new Event("input"));
      };
      const paths = [];
      for (let metric = 0; metric < byId("metric").options.length; metric++) {
        choose("metric", metric);
        for (const axis of [0, 1, 2]) for (const span of [0, 1, 2, 3]) for (const smoothing of [0, 0.8]) {
          choose("axis", axis);
          choose("span", span);
          choose("smoothing", smoothing);
          paths.push([metric, axis, span, smoothing, byId("chart").querySelector("path:not(.raw)").getAttribute("d")]);
        }
      }
      return paths;
    })()""")
    assert browser.errors == []
    assert len(paths) == 8 * 3 * 4 * 2
    assert not [path for path in paths if "NaN" in path[-1]]
    differing = [path for _, axis, span, _, path in paths if axis != 1 and span == 0]  # tokens go with the steps
    assert len(set(differing)) == len(differing) == 8 * 2 * 2


def test_every_map_of_experts_draws(browser, page):
    browser.open(page)
    shown = browser.evaluate("""[...byId("checkpoint").options].map((_, checkpoint) => {
      byId("checkpoint").value = checkpoint;
      byId("checkpoint").dispatchEvent(new Event("input"));
      return [...byId("layer").options].map((_, layer) => {
        byId("layer").value = layer;
        byId("layer").dispatchEvent(new Event("input"));
        return byId("tokens").textContent;
      });
    })""")
    assert browser.errors == []
    assert [len(layers) for layers in shown] == [2, 2, 2, 3, 3, 3]
    assert len({text for layers in shown for text in layers}) > 10
    browser.evaluate("byId('loads').querySelector('canvas').scrollIntoView({block: 'center'})")
    place = "byId('loads').querySelector('canvas').getBoundingClientRect()"
    left, top = browser.evaluate(f"(({{left, top}}) => [left, top])({place})")
    browser.point_at(left + 2, top + 2)
    said = browser.evaluate("byId('load-reading').textContent")
    assert "2: experts, step 1: layer 0, expert 0:" in said


@pytest.mark.parametrize("kind", ["dense", "interrupted"])
def test_runs_that_are_not_whole(browser, kind, request, tmp_path):
    page = write_report(request.getfixturevalue(kind), tmp_path / "page.html")
    browser.open(page)
    assert browser.evaluate("document.querySelectorAll('#chart path').length") == 4
    assert browser.errors == []
