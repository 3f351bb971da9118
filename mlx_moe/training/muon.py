"""Muon's constants, and the size of its steps; the same in both backends."""

from __future__ import annotations

from collections.abc import Sequence

# The quintic of Jordan et al. 2024: steep at 0 rather than exact at 1. After 5 steps, singular values that were 0.15 %
# or more of the matrix's Frobenius norm lie between 0.68 and 1.21.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
SMALLEST_NORM = 1e-7  # a gradient of 0, such as that of an expert that no token chose, gives a direction of 0


def update_rms(shape: Sequence[int]) -> float:
    """Return 0.2·√max(out, in), which scales an orthogonal matrix (…, out, in) to AdamW's usual root mean square.

    So one learning rate and one decay serve both rules (Moonlight, Liu et al. 2025).
    """
    return float(0.2 * max(shape[-2:]) ** 0.5)
