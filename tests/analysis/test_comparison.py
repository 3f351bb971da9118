import json

import pytest
from support.small_experiments import train

from mlx_moe.accounting.flops import flops_per_token
from mlx_moe.analysis.comparison import BUDGETS, ComparedRun, CurvePoint, compare, curve, spent_to_reach
from mlx_moe.analysis.comparison import _speedup as speedup
from mlx_moe.analysis.run_reader import read_record


@pytest.fixture(scope="module")
def runs(mlxmoe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(mlxmoe, folder / "dense")
    train(mlxmoe, folder / "experts", phases=2)
    train(mlxmoe, folder / "letters", tokenizer="char")
    return folder


def test_budgets_add_up_over_phases(runs):
    record = read_record(runs / "experts")
    points = curve(record)
    per_phase = 10 * 4 * 32
    assert [(point.phase, point.step) for point in points] == [(1, 0), (1, 5), (1, 10), (2, 0), (2, 5), (2, 10)]
    assert [point.tokens for point in points] == [n * per_phase // 2 for n in (0, 1, 2, 2, 3, 4)]
    dense, experts = (flops_per_token(phase.model).training for phase in record.phases)
    assert points[-1].flops == per_phase * (dense + experts)
    assert points[0].seconds == 0 < points[2].seconds <= points[3].seconds < points[-1].seconds


def test_the_best_comes_first_and_only_differences_show(runs):
    compared = compare([runs / "dense", runs / "experts"])
    assert [run.run for run in compared.runs] == [str(runs / "experts"), str(runs / "dense")]
    assert compared.differences == {}
    assert compared.warnings == []
    tokens = compared.equal["tokens"]
    assert tokens["budget"] == 10 * 4 * 32
    # The same steps up to there, on the same data.
    assert tokens["losses"][0] == pytest.approx(tokens["losses"][1], abs=1e-6)
    assert compared.speedup["tokens"] == pytest.approx(1, abs=0.01)


def test_other_tokenizers_are_compared_by_the_byte(runs):
    compared = compare([runs / "dense", runs / "letters"])
    assert [run.bits_per_byte for run in compared.runs] == sorted(run.bits_per_byte for run in compared.runs)
    assert compared.differences["data.tokenizer"] == ["bpe:300", "char"] or compared.differences["data.tokenizer"] == [
        "char",
        "bpe:300",
    ]
    assert "bits per byte" in compared.warnings[0]


def test_speedup_is_what_the_slower_takes_over_what_the_faster_takes():
    fast, slow = (made(name, every) for name, every in (("fast", 100), ("slow", 250)))
    assert spent_to_reach(fast.curve, 3.5, "tokens") == pytest.approx(50)
    ratios = speedup(fast, slow)
    assert ratios["loss"] == 2.0
    assert [ratios[budget] for budget in BUDGETS] == pytest.approx([2.5, 2.5, 2.5])


def test_the_command(runs, mlxmoe):
    result = mlxmoe("compare", "--latest", 2, "--folder", runs, "--json")
    assert {run["run"] for run in json.loads(result.out)["runs"]} == {str(runs / "experts"), str(runs / "letters")}
    shown = mlxmoe("compare", runs / "dense", runs / "letters").out
    assert "data.tokenizer" in shown
    assert "2L-2H-32D-RoPE-LN-GELU-PreNorm" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the runs to compare, or give --latest N"),
        (["nowhere"], "no run at nowhere"),
        (["--latest", "2", "--folder", "nowhere"], "nowhere holds 0 runs"),
    ],
)
def test_nothing_to_compare(arguments, said, mlxmoe):
    result = mlxmoe("compare", *arguments)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert said in result.err


def made(name, tokens_per_point):
    """A run whose loss falls by 1 from 4 to 2 every so many tokens."""
    spent = [n * tokens_per_point for n in range(3)]
    points = [CurvePoint(1, n, n, 10 * n, 0.1 * n, 4.0 - i) for i, n in enumerate(spent)]
    return ComparedRun(name, "", 1, 1, 1, 1, spent[-1], 10 * spent[-1], 0.1 * spent[-1], 2.0, 2.0, None, points)
