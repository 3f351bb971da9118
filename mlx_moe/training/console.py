"""Terminal output of a run: aligned blocks, a progress bar, plain lines without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mlx_moe.accounting import ParameterCount
from mlx_moe.accounting.flops import Flops
from mlx_moe.errors import unbroken
from mlx_moe.terminal import printable
from mlx_moe.transfer.certificate import Certificate


class Console:
    """Writer to standard output, silent if `quiet`."""

    def __init__(self, quiet: bool = False):
        self._rich = RichConsole(highlight=False, quiet=quiet)

    def line(self, text: str = "") -> None:
        self._rich.print(Text(printable(text)))

    def warn(self, text: str) -> None:
        self._rich.print(Text(printable(f"warning: {unbroken(text)}"), style="yellow"))

    def title(self, text: str) -> None:
        self._rich.print()
        self._rich.rule(Text(printable(text), style="bold"), align="left")

    def summary(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print names and values, aligned."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in pairs:
            grid.add_row(Text(printable(name)), Text(printable(value)))
        self._rich.print(grid)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table with its first column left-aligned and the others right-aligned."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
        for i, column in enumerate(columns):
            table.add_column(Text(printable(column)), justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._rich.print(table)

    def parameters(self, count: ParameterCount, architecture: str, flops: Flops | None = None) -> None:
        summary = [
            ("architecture", architecture),
            ("parameters", millions(count.total)),
            ("active per token", f"{millions(count.active)}, efficiency {100 * count.efficiency:.1f} %"),
            ("inactive", f"{millions(count.inactive)} in {count.idle_experts} idle experts"),
        ]
        if flops is not None:
            parts = ("projections", "attention", "router", "ffn", "head")
            shares = {part: getattr(flops, part) / flops.forward for part in parts}
            summary += [
                ("FLOPs per token", f"{flops.forward / 1e6:,.2f} M forward, {flops.training / 1e6:,.2f} M to train"),
                ("of these", ", ".join(f"{part} {100 * share:.1f} %" for part, share in shares.items() if share)),
            ]
        self.summary(summary)

    def step(self, row: dict[str, Any], n_steps: int) -> None:
        """Print a line of at most 80 columns; `load`: the busiest expert's over the mean, `val`: validation loss."""
        parts = [
            f"{row['step']:>{len(str(n_steps))}}/{n_steps}",
            f"loss {row['cross_entropy']:.3f}",
            f"lr {row['learning_rate']:.1e}",
            "grad overflow" if row["grad_norm"] is None else f"grad {row['grad_norm']:.2f}",
            f"{row['tokens_per_s']:,} tok/s",
        ]
        if "load_imbalance" in row:
            parts.append(f"load {row['load_imbalance']:.2f}")
        if "validation_loss" in row:
            parts.append(f"val {row['validation_loss']:.3f}")
        self.line("  ".join(parts))

    @contextmanager
    def progress(self, title: str, n_steps: int, done: int) -> Iterator[Callable[[int, dict[str, Any]], None]]:
        """Show a bar with loss, tokens/s and time left; yield a function of (steps done, latest row or empty)."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        last = {"text": ""}
        with Progress(
            *columns,
            TextColumn("{task.fields[latest]}", markup=False),
            console=self._rich,
            transient=True,
            refresh_per_second=2,  # drawing takes milliseconds of the interpreter, which the steps need
            disable=not self._rich.is_terminal,
        ) as bar:
            task = bar.add_task(title, total=n_steps, completed=done, latest="")

            def advance(step: int, row: dict[str, Any]) -> None:
                if row:
                    last["text"] = f"loss {row['cross_entropy']:.3f}  {row['tokens_per_s']:,} tokens/s"
                bar.update(task, completed=step, latest=last["text"])

            yield advance

    def boundary(self, title: str, certificate: Certificate) -> None:
        self.title(title)
        self.summary(
            [
                (
                    "max |Δlogit|",
                    f"{certificate.max_logit_difference:.2e} (limit {certificate.limit_logit_difference:.2g})",
                ),
                *self._floor(certificate),
                ("per sequence", "  ".join(f"{difference:.1e}" for difference in certificate.logit_differences)),
                *self._ties(certificate),
                ("loss", f"{certificate.loss_before:.6f} -> {certificate.loss_after:.6f}"),
                ("jump", f"{certificate.loss_jump:+.2e} (limit {certificate.limit_loss_jump:g})"),
                ("same likeliest token", f"{100 * certificate.argmax_agreement:.2f} % of positions"),
                ("verdict", "lossless" if certificate.passed else "NOT lossless"),
            ]
        )

    def _floor(self, certificate: Certificate) -> list[tuple[str, str]]:
        if certificate.rounding_floor is None:
            return []
        return [("by rounding alone", f"{certificate.rounding_floor:.2e}, the model before with its sums reordered")]

    def _ties(self, certificate: Certificate) -> list[tuple[str, str]]:
        if not certificate.routing_flips:
            return []
        return [
            (
                "routing ties",
                f"{certificate.routing_flips} flipped by rounding ({certificate.router_difference:.1e} in the router "
                f"logits), so judged with the same experts; {certificate.free_logit_difference:.2e} without",
            )
        ]


def millions(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
