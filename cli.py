"""The `mlxmoe` command."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer

from mlx_moe.address_space import check_room_to_start
from mlx_moe.commands.errors import stop
from mlx_moe.commands.experiments import compare, data, eval_, fit, sweep
from mlx_moe.commands.models import generate, grow, import_, upcycle
from mlx_moe.commands.reports import experts, plot, report
from mlx_moe.commands.training import doctor, params, plan, train
from mlx_moe.errors import InputError
from mlx_moe.terminal import check_folders, describe_crash, prepare_streams
from parity.commands import export, parity

INTERRUPTED = 130
MAX_MESSAGE = 200  # characters of Typer's message, which may quote the user's input

app = typer.Typer(
    help="Train a small language model, upcycle it to a mixture of experts, grow it: no loss spike, MLX or PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(train, params, plan, upcycle, grow, generate, parity, import_, export),
    *(eval_, sweep, fit, compare, experts, plot, report, doctor),
):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(data, name="data")


def main() -> None:
    """Run the command. Bad input gives one line and exit code 2; all other errors give one line, too."""
    prepare_streams()
    try:
        check_folders()
        check_room_to_start()
        code = app(prog_name="mlxmoe", standalone_mode=False)
        if code == INTERRUPTED:  # Typer's exit code for Ctrl-C
            stop("interrupted", INTERRUPTED)
        sys.exit(code)
    except InputError as error:
        stop(str(error), 2)
    except KeyboardInterrupt:
        stop("interrupted", INTERRUPTED)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust panics do not derive from Exception
        if hasattr(error, "format_message"):  # an exception of Typer, which does not export its classes
            _stop_usage(error)
        stop(*describe_crash(error))


def _stop_usage(error: Any) -> NoReturn:
    """Exit on invalid arguments: with one line, or with the help if there are no arguments."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    if "\n" in message:
        error.show()
        sys.exit(error.exit_code)
    hint = f"; see {context.command_path} --help" if context else ""
    stop(f"{message[:MAX_MESSAGE].rstrip('.?')}{hint}", error.exit_code)


if __name__ == "__main__":
    main()
