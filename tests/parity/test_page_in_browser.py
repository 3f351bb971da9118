"""The parity page in a real browser, where one is installed."""

from dataclasses import replace

import pytest
from support.browser import Browser, assert_opens, find

from parity.page import render
from parity.run import ParityRequest, run

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium or Chrome is installed")
FAULT = "torch's error is 606 times that of plain float32 (RMSE 1.1e-05 against 1.8e-08; limit 3)"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """One model that agrees, and one with a fault."""
    report = run(ParityRequest(presets=("nano",)))
    good, bad = report.comparisons[:2]
    tensors = [replace(tensor, faults=(FAULT,) if "mlp" in tensor.name else ()) for tensor in bad.verdict.tensors]
    bad = replace(bad, verdict=replace(bad.verdict, tensors=tuple(tensors)))
    file = tmp_path_factory.mktemp("page") / "parity.html"
    file.write_text(render(replace(report, comparisons=(good, bad))), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("width", [1600, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_without_an_error_a_request_or_overflow(browser, page, width, dark):
    assert_opens(browser, page, width, dark)


def test_only_what_differs_is_open(browser, page):
    browser.open(page)
    models = "[...document.querySelectorAll('details.model')]"
    assert browser.evaluate(f"{models}.map((model) => model.open)") == [False, True]
    assert browser.evaluate("document.querySelectorAll('details.tensors[open]').length") == 1


def test_a_click_on_a_heading_sorts(browser, page):
    browser.open(page)
    table = "document.querySelector('details.tensors table')"
    column = f"[...{table}.tBodies[0].rows].map((row) => Number(row.cells[1].textContent))"
    for expected in (sorted(browser.evaluate(column), reverse=True), sorted(browser.evaluate(column))):
        browser.evaluate(f"{table}.tHead.rows[0].cells[1].firstChild.click()")
        assert browser.evaluate(column) == expected
