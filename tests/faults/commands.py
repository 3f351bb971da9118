"""One table of all commands: a small call of each that works, and where its output goes. A new command adds one row.

Paths in a call are relative to a copy of the materials (`materials.py`), which is the working folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# A file; a folder that must not be there yet; several files in a folder that may be there already.
Output = Literal["file", "folder", "files"]

SIZE = (
    *("model.d_model=32", "model.n_layers=1", "model.n_heads=2", "model.context_length=16", "phases.moe.n_experts=2"),
    *("data.source=stories", "data.tokenizer=char", "data.n_documents=50", "data.validation_fraction=0.2"),
    *("training.batch_size=2", "training.eval_sequences=4", "training.log_every=1"),
)
SMALL = tuple(word for override in SIZE for word in ("-o", override))
ON_CPU = ("--backend", "torch", "--device", "cpu")
# `llama` can be exported, with experts and without.
TRAIN = ("--preset", "llama", "--steps", "2", *ON_CPU, *SMALL)
DENSE, EXPERTS = "run/phases/1-dense", "run/phases/2-moe"


@dataclass(frozen=True)
class Command:
    """A call of a command.

    `option` takes the place of the `output`; None: the last argument does. `default`: the files that are written where
    no place is named, in folders of ours. `is_slow`: it takes a second or more, without the start of the process.
    `goes_on`: called again in the same place, it goes on with, or repeats, what it did there.
    """

    name: str
    arguments: tuple[str, ...] = ()
    output: Output | None = None
    option: str | None = "--out"
    default: tuple[str, ...] = ()
    is_slow: bool = False
    goes_on: bool = False

    def argv(self, place: str | None = None) -> list[str]:
        """The words after `mlxmoe`, the output in `place`; without one, where the command puts it by itself."""
        where = [] if place is None else [self.option, place] if self.option else [place]
        return [*self.name.split(), *self.arguments, *where]

    def __str__(self) -> str:
        return self.name.replace(" ", "-") + ("" if self.option in (None, "--out") else self.option)


COMMANDS = (
    Command("train", ("--phases", "1", *TRAIN), "folder", is_slow=True),
    Command("sweep", ("sweep.yaml", *ON_CPU), "folder", is_slow=True, goes_on=True),
    Command("upcycle", (DENSE, "--experts", "2", *ON_CPU), "folder", None),
    Command("grow", (EXPERTS, "--d-model", "48", *ON_CPU), "folder", None),
    Command("import", ("model",), "folder", None),
    Command("export", (DENSE, "--no-verify"), "folder", None),
    Command("generate", (DENSE, "-n", "2", *ON_CPU)),
    Command(
        *("eval", ("run", "-n", "1", "--max-bytes", "100", *ON_CPU)),
        default=("run/evaluation_results.csv", "run/generations.md"),
    ),
    Command("report", ("run",), "file", default=("run/report.html",), goes_on=True),
    Command("plot", ("run",), "files", default=("run/plots",), is_slow=True, goes_on=True),
    Command("experts", ("run", "--sequences", "4", *ON_CPU), "file", default=("run/experts.json",), goes_on=True),
    Command("compare", ("run", "sweep/seed=0")),
    Command("fit", ("scaling", "--resamples", "20"), "file", default=("scaling/fits.json",), goes_on=True),
    Command("parity", (DENSE,), "file", is_slow=True, goes_on=True),
    Command("parity", (DENSE,), "file", "--html", is_slow=True, goes_on=True),
    Command("data describe", TRAIN[:2] + SMALL, "file", default=("DATA.md",), goes_on=True),
    Command("params", TRAIN[:2] + SMALL),
    Command("plan", (*TRAIN[:2], *SMALL, "--machine", "M2 Max 32GB")),
    Command("doctor"),
)
WRITING = [command for command in COMMANDS if command.output is not None]
