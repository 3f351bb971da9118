"""What all tests share. The backends come before their frameworks: they say how those should load."""

import contextlib
import io
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# On matrices as small as the tests', threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx_moe.model  # noqa: F401
import torch_ref  # noqa: F401
from cli import main

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and by all that a test starts

TESTS = Path(__file__).parent
# Folders and modules that `make check` leaves out, since each takes more than about 3 seconds of CPU time.
SLOW = (
    "accounting/test_flops.py",
    "accounting/test_memory.py",
    "analysis",
    "data/test_broken_sources.py",
    "data/test_stories.py",
    "data/test_token_cache.py",
    "data/test_tokens.py",
    "faults",
    "hub",
    "model/test_adapters.py",
    "model/test_backends_agree.py",
    "model/test_cache.py",
    "inference/test_decoding.py",
    "model/test_causality.py",
    "model/test_engine.py",
    "model/test_optimizers.py",
    "model/test_registries.py",
    "inference/test_detokenizer.py",
    "parity",
    "storage/test_checkpoint.py",
    "storage/test_run_folder.py",
    "test_api_arguments.py",
    "test_cli.py",
    "test_examples.py",
    "test_extras.py",
    "test_house.py",
    "test_readme.py",
    "test_site.py",
    "test_tutorial.py",
    "training/test_changed_runs.py",
    "training/test_ends.py",
    "training/test_exact_resume.py",
    "training/test_kill.py",
    "training/test_loop.py",
    "training/test_phases.py",
    "training/test_processes.py",
    "training/test_resume_as_printed.py",
    "training/test_resuming_document.py",
    "training/test_sequences.py",
    "training/test_stopping.py",
    "training/test_trackers.py",
    "training/test_ways_to_upcycle.py",
    "transfer/test_growth.py",
    "transfer/test_moments.py",
)


def pytest_configure() -> None:
    if missing := [name for name in SLOW if not (TESTS / name).exists()]:
        raise pytest.UsageError(f"SLOW in tests/conftest.py names what is not there: {', '.join(missing)}")


def is_slow(path: Path) -> bool:
    return any(path.is_relative_to(TESTS / name) for name in SLOW)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip slow modules that `-m "not slow"` leaves out: to import them all takes longer than the fast tests."""
    return True if "not slow" in config.option.markexpr and is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path):
            item.add_marker("slow")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def mlxmoe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Run the command in this process, with a token cache of its own and no network."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*arguments: object) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr("sys.argv", ["mlxmoe", *map(str, arguments)])
            for name, value in {"MLXMOE_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}.items():
                patch.setenv(name, value)
            try:
                main()
                code = 0
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        return Result(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def as_nobody() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which nothing may be written but what everybody may; root may write everywhere."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        import mlx_moe.analysis.plots  # noqa: F401  # matplotlib loads from folders that may be root's alone

        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return context
