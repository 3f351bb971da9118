"""A comparison as one HTML page that opens without a network: from the JSON that says the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from parity.charts import error_growth, number, routing_margins

Json = dict[str, Any]

STYLE = """
:root { color-scheme: light dark; --text: #1d2127; --dim: #67707c; --line: #d9dde3; --paper: #fff; --one: #2a6fdb;
  --other: #d9730d; --floor: #8b95a3; --good: #1a7f45; --bad: #c62828; --c0: #e3f4e8; --c1: #f1f5d8; --c2: #fdeecb;
  --c3: #fbd3cd; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --dim: #98a2ae; --line: #363c45; --paper: #16191d;
  --one: #74a9ff; --other: #ffa657; --floor: #78828f; --good: #5dd08b; --bad: #ff8a80; --c0: #17331f; --c1: #2f3414;
  --c2: #40300f; --c3: #4d1f1b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper); max-width: 68rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; } .dim, th, summary small, figcaption { color: var(--dim); } code { font-size: .85em; }
.verdict { font-weight: 700; } .same { color: var(--good); } .differs { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th { font-weight: 500; } th, td { text-align: right; padding: .18rem .6rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; } th.text, td.text { text-align: left; } td.text { white-space: normal; }
td.c0 { background: var(--c0); } td.c1 { background: var(--c1); } td.c2 { background: var(--c2); }
td.c3 { background: var(--c3); } details { border-bottom: 1px solid var(--line); padding: .35rem 0; }
summary { cursor: pointer; } figure { margin: .8rem 0; } svg { width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--dim); }
"""
STEPS = (1.5, 2.0)  # of a ratio's colour, in the limit's units of 2; what fails is c3


def page(document: Json) -> str:
    """The whole page."""
    passed = document["passed"]
    verdict = {True: ("same", "the same"), False: ("differs", "DIFFERS"), None: ("differs", "not judged")}[passed]
    libraries = ", ".join(f"{name} {version}" for name, version in document["libraries"].items() if version)
    parts = [
        f'<h1>Parity: <span class="{verdict[0]}">{verdict[1]}</span></h1>',
        f"<p><code>{escape(document['command'])}</code></p>",
        f'<p class="dim">{escape(libraries)}; Python {document["python"]} on {escape(document["platform"])}; '
        f"seed {document['seed']}</p>",
        *(_model(document["model"]) if "model" in document else []),
        *(_comparisons(document["comparisons"]) if "comparisons" in document else []),
        *(_self_test(document) if "faults" in document else []),
    ]
    title = f"Parity: {verdict[1]}"
    return (
        "<!doctype html>\n<!-- written by mlxmoe parity -->\n"
        f'<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _comparisons(comparisons: Sequence[Json]) -> Iterable[str]:
    yield "<h2>MLX and PyTorch against the truth</h2>"
    yield (
        '<p class="dim">Errors of the logits, RMSE against a float64 model in NumPy. float32: that model in float32, '
        "added up in the plainest order. Floor: the truth, rounded to float32.</p>"
    )
    yield _table(
        ["model", "MLX", "torch", "ratio", "float32", "floor", "boundary", ""],
        [_comparison_row(comparison) for comparison in comparisons],
    )
    for comparison in comparisons:
        opened = "" if comparison["passed"] else " open"
        subject, architecture = escape(comparison["subject"]), escape(comparison["architecture"])
        yield f"<details{opened}><summary>{subject} <small>{architecture}</small></summary>"
        yield from _comparison(comparison)
        yield "</details>"


def _comparison_row(comparison: Json) -> list[str]:
    numbers = [""] * 5
    if "tensors" in comparison:
        logits = [tensor for tensor in comparison["tensors"] if tensor["scope"] == "whole"][-1]
        errors = [_error(logits[key]) for key in ("mlx", "torch", "float32", "floor")]
        mlx, torch = (max(number(logits[key]["rmse"]), logits["floor"]["rmse"]) for key in ("mlx", "torch"))
        numbers = [*errors[:2], _coloured(mlx / torch, logits["passed"]), *errors[2:]]
    boundaries = [comparison[f"boundary_{name}"] for name in ("mlx", "torch") if f"boundary_{name}" in comparison]
    worst = max((number(boundary["max_logit_difference"]) for boundary in boundaries), default=None)
    return [_text(comparison["subject"]), *numbers, _cell("" if worst is None else f"{worst:.1e}"), _word(comparison)]


def _comparison(comparison: Json) -> Iterable[str]:
    if comparison.get("first_fault"):
        yield f'<p class="differs">{escape(comparison["first_fault"])}</p>'
    for claim in comparison["claims"]:
        where = f", most in {claim['where']}" if claim["where"] else ""
        kept = "same" if claim["passed"] else "differs"
        yield (
            f'<p class="{kept}">{escape(claim["name"])}: off by {number(claim["error"]):.1e} '
            f'<span class="dim">(limit {claim["limit"]:g}{escape(where)})</span></p>'
        )
    if "tensors" not in comparison:
        yield f"<p>{escape(comparison['without_truth'])}</p>"
        return
    propagated = comparison["propagated"]
    yield error_growth(propagated, ("MLX", "PyTorch"))
    yield routing_margins([(m["smallest"], m["median"], m["error"]) for m in comparison["routing_margins"]])
    rows = [
        [*_tensor_row(t), *_so_far(propagated.get(t["name"]))] for t in comparison["tensors"] if t["scope"] == "own"
    ]
    yield _table(
        ["module, fed the truth's input", "MLX", "torch", "float32", "ratio", "MLX so far", "torch so far"], rows
    )
    for scopes, title in ((("whole", "way"), "in the model as a whole"), (("step", "bf16"), "of a training step")):
        rows = [_tensor_row(tensor) for tensor in comparison["tensors"] if tensor["scope"] in scopes]
        yield _table([title, "MLX", "torch", "float32", "ratio"], rows)


def _model(model: Json) -> Iterable[str]:
    yield f"<h2>{escape(model['folder'])}: mlx-lm against transformers</h2>"
    yield (
        f'<p class="dim">{escape(model["model_type"])}, {model["parameters"] / 1e6:.1f} M parameters; the truth is '
        "transformers in float64, its casts to float32 lifted</p>"
    )
    causes = [f"cause: {cause}" for cause in model["causes"]] + [
        f"tensor {t}" for t in model["tensors_dropped_or_made_up"]
    ]
    for line in filter(None, [model["problem"], *causes, model["repair"], *model.get("remarks", [])]):
        yield f"<p>{escape(line)}</p>"
    if "ways" not in model:
        return
    yield _table(["logits", "mlx-lm", "transformers", "floor", "ratio"], [_library_row(way) for way in model["ways"]])
    if model["first_module"] and not model["passed"]:
        yield f"<p>First wrong by itself: <code>{escape(model['first_module'])}</code></p>"
    modules = model["modules"]
    propagated = {m["name"]: dict(zip(("mlx", "torch"), m["propagated"], strict=True)) for m in modules}
    yield error_growth(propagated, ("mlx-lm", "transformers"))
    rows = [[*_library_row(m), *(_error(error) for error in m["propagated"])] for m in modules]
    head = [
        "module, fed the truth's input",
        "mlx-lm",
        "transformers",
        "floor",
        "ratio",
        "mlx-lm so far",
        "transformers",
    ]
    yield f"<details><summary>{len(rows)} modules</summary>{_table(head, rows)}</details>"
    keys = [
        [_text(f["key"]), _text(str(f["value"])), _text(f["ignored_by"])] for f in model["keys_that_one_library_uses"]
    ]
    if keys:
        yield "<h2>Keys of config.json that only one library uses</h2>"
        yield _table(["key", "value", "ignored by"], keys)


def _self_test(document: Json) -> Iterable[str]:
    faults, caught = document["faults"], document["caught"]
    yield f"<h2>Mutation score: {100 * caught / len(faults):.0f} %</h2>"
    yield f"<p>{caught} of {len(faults)} known faults, put into PyTorch's side one at a time, were found.</p>"
    yield _table(
        ["fault", "model", "found first in"],
        [
            [_text(f["name"]), _text(f["model"]), _text(f["where"]) if f["caught"] else _cell("MISSED", "c3")]
            for f in faults
        ],
    )
    sizes = [
        [_text(name), _cell("none caught" if smallest is None else f"{smallest:g} of itself")]
        for name, smallest in document["smallest_caught"].items()
    ]
    yield _table(["fault with a size", "smallest caught"], sizes)


def _tensor_row(tensor: Json) -> list[str]:
    errors = [_error(tensor[key]) for key in ("mlx", "torch", "float32")]
    return [_text(tensor["name"]), *errors, _ratio_cell(tensor)]


def _library_row(judged: Json) -> list[str]:
    errors = [_error(judged[key]) for key in ("mlx", "torch", "floor")]
    return [_text(judged["name"]), *errors, _coloured(number(judged["ratios"][0]), judged["passed"])]


def _so_far(errors: Json | None) -> list[str]:
    return [_error(errors[side]) if errors else _cell("") for side in ("mlx", "torch")]


def _ratio_cell(tensor: Json) -> str:
    mlx, torch, float32 = (number(tensor[key]["rmse"]) for key in ("mlx", "torch", "float32"))
    least = max(float32, 1e-300)
    references = (max(torch, least), max(mlx, least)) if tensor["scope"] == "bf16" else (least, least)
    ratio = max(max(mlx, least) / references[0], max(torch, least) / references[1])
    return _coloured(ratio, tensor["passed"])


def _coloured(ratio: float, passed: bool) -> str:
    step = sum(ratio > limit for limit in STEPS) if passed else 3
    return _cell(f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.0e}", f"c{step}")


def _error(error: Json) -> str:
    value = number(error["rmse"])
    return _cell("∞" if value == math.inf else f"{value:.1e}")


def _word(result: Json) -> str:
    return _cell("same", "same") if result["passed"] else _cell("DIFFERS", "differs verdict")


def _text(value: str) -> str:
    return _cell(value, "text")


def _cell(value: str, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(value)}</td>' if kind else f"<td>{escape(value)}</td>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    are_text = [cell.startswith('<td class="text"') for cell in rows[0]]
    head = "".join(
        f'<th class="text">{escape(column)}</th>' if is_text else f"<th>{escape(column)}</th>"
        for column, is_text in zip(columns, are_text, strict=True)
    )
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
