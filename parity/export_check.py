"""Compare the logits of transformers and mlx-lm on an exported folder with ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_moe.convert.probes import checkpoint_probes
from mlx_moe.errors import InputError, one_line
from mlx_moe.extras import how_to_install, is_installed
from mlx_moe.hub.export import fill
from mlx_moe.hub.models import open_model
from mlx_moe.storage.atomic import creating
from mlx_moe.storage.checkpoint import Checkpoint
from mlx_moe.training.backend import choose_backend
from mlx_moe.training.certify import permute_units, rounding_floor
from mlx_moe.training.console import Console
from mlx_moe.transfer.certificate import ROUNDING_MARGIN, max_difference

LIMIT = 1e-4  # of logits; widened where rounding alone exceeds it, as at a boundary
SEQUENCES = 4
# Library -> its framework, and the module of our backend that runs it.
COMPARED_LIBRARIES = {
    "transformers": ("torch", "parity.libraries.transformers"),
    "mlx_lm": ("mlx", "parity.libraries.mlx_lm"),
}


def export_checked(path: Path, out: Path, requested: str, verify: bool) -> None:
    """Export a model and print what was verified.

    Raises InputError where a library disagrees; then nothing is kept.
    """
    console, found = Console(), dict[str, tuple[float, float]]()
    with creating(out) as partial:
        source = open_model(path)
        name = fill(source, partial, requested, _checker(source, found) if verify else None)
    console.title(f"{source.config.display_name} in the format {name}")
    console.summary([("read back", "the same weights, bit for bit")] + [
        (f"logits of {library}", f"{difference:.1e} from ours (limit {limit:.2g})")
        for library, (difference, limit) in found.items()
    ])  # fmt: skip
    if verify:
        for library in COMPARED_LIBRARIES.keys() - found.keys():
            to_install = how_to_install(library, COMPARED_LIBRARIES[library][0])
            console.warn(f"not compared with {library}, which is not installed; {to_install}")
    console.line(f"wrote {out}")


def _checker(source: Checkpoint, found: dict[str, tuple[float, float]]) -> Callable[[Path], None]:
    """Return a check of a folder that puts each library's largest logit difference and its limit into `found`."""

    def check(folder: Path) -> None:
        tokens_BT = checkpoint_probes(source, SEQUENCES)[:, :-1]
        backend = choose_backend()
        ours = backend.streamed(source.config, source.weights, "cpu")
        for library, (framework, module) in COMPARED_LIBRARIES.items():
            if not (is_installed(framework) and is_installed(library)):
                continue
            try:
                theirs_BTV = importlib.import_module(module).logits(folder, tokens_BT)
            except Exception as error:  # libraries raise anything
                raise InputError(f"{library} cannot open the export: {one_line(error)}; nothing was kept") from None
            difference_B = np.array(list(map(max_difference, ours.each_logits(tokens_BT), theirs_BTV)))
            # Experts that tie up to rounding may be chosen differently; not in most sequences.
            judged = float(np.median(difference_B) if source.config.moe else np.max(difference_B))
            limit = LIMIT
            if judged > LIMIT:
                permuted = backend.streamed(source.config, permute_units(source.config, source.weights), "cpu")
                at = int(np.abs(difference_B - judged).argmin())
                limit = max(LIMIT, ROUNDING_MARGIN * rounding_floor(ours, permuted, tokens_BT[[at]]))
            found[library] = (judged, limit)
            if not judged <= limit:
                raise InputError(
                    f"{library} gives logits that differ by {judged:.1e} (limit {limit:.2g}) from the export; "
                    "nothing was kept"
                )

    return check
