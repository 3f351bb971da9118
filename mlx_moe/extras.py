"""Optional libraries, and the extra of pyproject.toml that installs each."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from mlx_moe.errors import InputError

EXTRAS = {
    "mlx": "mlx",
    "torch": "torch",
    "transformers": "hub",
    "mlx_lm": "hub",
    "datasets": "hub",
    "huggingface_hub": "hub",
    "pyarrow": "hub",
    "matplotlib": "plots",
    "trackio": "trackers",
    "wandb": "trackers",
}

MODULES = {"mlx": "mlx.core"}  # other packages may leave a folder named `mlx`


def require(library: str, user: str) -> None:
    """Raise InputError, with the command to install it, if a library is missing. Loads nothing.

    `user` is what needs the library, as the message's subject: "a Parquet file", "mlxmoe plot".
    """
    if not is_installed(library):
        raise InputError(f"{user} needs {library}, which is not installed; {how_to_install(library)}")


def is_installed(library: str) -> bool:
    """Return whether a library can be imported, without importing it."""
    module = MODULES.get(library, library)
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def how_to_install(*libraries: str) -> str:
    """Return the end of a message: the command that installs the libraries."""
    extras = ",".join(dict.fromkeys(EXTRAS[library] for library in libraries))
    return f"install it with: pip install 'mlxmoe[{extras}]'"
