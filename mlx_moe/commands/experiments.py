"""Commands on several runs, and on data: eval, sweep, fit, compare, data."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from mlx_moe.commands.errors import stop
from mlx_moe.commands.options import BackendOption, ConfigFile, DeviceOption, JsonOption, Level, Overrides, Preset, Seed
from mlx_moe.errors import InputError
from mlx_moe.limits import MAX_NEW_TOKENS
from mlx_moe.terminal import echo

data = typer.Typer(help="Describe the data of a run.", no_args_is_help=True)


def eval_(
    runs: Annotated[list[Path], typer.Argument(help="Runs, checkpoints, RUN/best, or Hugging Face folders.")],
    data: Annotated[
        str | None, typer.Option(help="stories, tinystories, or a path.", show_default="the run's own")
    ] = None,
    text_field: Annotated[str, typer.Option(help="The column of JSONL and Parquet.")] = "text",
    max_bytes: Annotated[int, typer.Option(min=1, max=1 << 40, help="Bytes of held-out text.")] = 250_000,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; repeatable.", show_default="three")
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "-n", min=0, max=MAX_NEW_TOKENS, help="Per sample; 0: no samples."),
    ] = 60,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Evaluate checkpoints on the same held-out text: loss, perplexity, bits per byte and samples."""
    from dataclasses import asdict

    from mlx_moe.analysis.evaluation import EvaluationOptions, check, evaluate
    from mlx_moe.training.backend import choose_backend
    from mlx_moe.training.console import Console
    from mlx_moe.training.phase_summary import PROMPTS

    if prompt is not None and not all(prompt):
        raise InputError("--prompt is empty; give it at least one character")
    options = EvaluationOptions(data, text_field, max_bytes, prompt or PROMPTS, max_new_tokens, device)
    for run in runs:  # check all before evaluating the first, which takes a while
        check(run, options)
    chosen, console = choose_backend(backend), Console(quiet=as_json)
    found = [evaluation for run in runs for evaluation in evaluate(run, chosen, options, console)]
    if as_json:
        echo(json.dumps([asdict(evaluation) for evaluation in found], indent=2))


def sweep(
    file: Annotated[str, typer.Argument(help="A YAML file, or the name of a built-in sweep.")],
    override: Overrides = None,
    data: Annotated[str | None, typer.Option(help="stories, tinystories, or a path.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, max=256, help="Runs at once.")] = 1,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder.", show_default="runs/NAME")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed runs again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs without training.")] = False,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Train every combination of a file's axes; run the same command again to resume."""
    from mlx_moe.analysis.sweep_runs import SweepOptions, run_sweep
    from mlx_moe.analysis.sweeps import expand, load_sweep
    from mlx_moe.presets import as_overrides
    from mlx_moe.training.stopping import TrainingStopped

    source = [] if data is None else as_overrides({"data.source": data})
    loaded = load_sweep(file)
    planned = expand(loaded, [*source, *(override or [])])
    if dry_run:
        for run in planned:
            echo(run.name)
        return
    folder = out or Path("runs") / loaded.name
    given = {"--data": data, "--jobs": str(jobs), "--out": str(folder), "--backend": backend, "--device": device}
    words = [word for text in override or [] for word in ("-o", text)]
    words += [word for option, value in given.items() if value is not None for word in (option, value)]
    words = [*words, "--", file] if file.startswith("-") else [file, *words]
    command = shlex.join(["mlxmoe", "sweep", *words])
    try:
        rows = run_sweep(planned, folder, SweepOptions(backend, device, jobs, retry, command))
    except TrainingStopped as stopped:
        stop(str(stopped), stopped.exit_code)
    if failed := [row["run"] for row in rows if row["status"] != "finished"]:
        stop(f"{len(failed)} of {len(rows)} runs did not finish: {', '.join(failed)}", 1)


def fit(
    results: Annotated[Path, typer.Argument(help="A sweep's folder, or its results.jsonl.")],
    law: Annotated[str, typer.Option(help="auto, N, D or ND.")] = "auto",
    parameters: Annotated[str, typer.Option(help="What N counts: non_embedding, active or total.")] = "non_embedding",
    resamples: Annotated[int, typer.Option(min=20, max=10_000, help="Bootstrap resamples for the intervals.")] = 1000,
    level: Level = 0.9,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="fits.json beside RESULTS")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit L(N), L(D) or L(N, D) to a sweep, with confidence intervals."""
    from mlx_moe.analysis.fitting import fit_results

    fit_results(results, law, parameters, resamples, level, seed, out, as_json)


def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Runs.", show_default=False)] = None,
    latest: Annotated[int | None, typer.Option(min=2, max=10_000, help="Compare the last N runs instead.")] = None,
    folder: Annotated[Path, typer.Option(help="The folder that --latest searches.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Rank runs, show how their settings differ, and their losses at equal tokens, FLOPs and time."""
    from mlx_moe.analysis import comparison

    if (latest is None) == (not runs):
        raise InputError("name the runs to compare, or give --latest N")
    compared = comparison.compare(runs or comparison.latest_runs(folder, latest or 2))
    if as_json:
        echo(json.dumps(compared.to_json(), indent=2))
    else:
        comparison.show(compared)


@data.command()
def describe(
    preset: Preset = "three-phase",
    config: ConfigFile = None,
    override: Overrides = None,
    data: Annotated[str | None, typer.Option(help="stories, tinystories, or a path.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="char, bpe:VOCAB, or a Hugging Face tokenizer.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("DATA.md"),
) -> None:
    """Write DATA.md: source, licence, documents, tokens, bytes per token, hashes."""
    from mlx_moe.data.describe import describe as describe_data
    from mlx_moe.data.tokens import prepare
    from mlx_moe.presets import as_overrides, load_run
    from mlx_moe.storage.atomic import output_file, writing

    shortcuts = {"data.source": data, "data.tokenizer": tokenizer}
    overrides = as_overrides({key: value for key, value in shortcuts.items() if value is not None})
    run = load_run(preset, config, [*overrides, *(override or [])])
    with writing(out, "DATA.md", "data describe") as partial:
        text = describe_data(prepare(run.data, progress=echo).provenance)
        partial.write_text(text, encoding="utf-8")
    echo(f"wrote {output_file(out, 'DATA.md')}")
