"""Tolerances for a tensor's error against the float64 reference.

Four errors are known of every tensor: those of the two programs compared, the floor (the reference rounded to float32),
and that of plain float32 (the NumPy model run in float32). A backend's error is compared with the other backend's and,
because two backends may share a fault, with that of plain float32. Errors below plain float32's count as plain
float32's, so a backend that is unusually exact does not fail the other one.

Measured without a fault on all presets (dense, experts, grown; six seeds): RMSEs at most 1.27 times the other backend's
or plain float32's, largest errors at most 2.8 times. Over four seeds: decoding at most 1.4 times the other backend's,
gradients at most 1.75 times.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed multiples of another program's error."""

    rmse: float
    largest: float  # of the largest error of any element

    def widened(self, slack: float) -> Tolerance:
        """Return both limits times `slack`."""
        return Tolerance(slack * self.rmse, slack * self.largest)

    def allows(self, ratios: tuple[float, float]) -> bool:
        """Return whether (RMSE ratio, largest-error ratio) lie within the limits; NaN does not."""
        return ratios[0] <= self.rmse and ratios[1] <= self.largest


TO_OTHER = Tolerance(rmse=2.0, largest=4.0)  # one program's error, as a multiple of the other's
TO_FLOAT32 = Tolerance(rmse=3.0, largest=6.0)  # either backend's, as a multiple of plain float32's
TO_OTHER_IN_HALF = Tolerance(rmse=3.0, largest=4.0)  # one backend's to the other's, products in half precision
# Slack for single modules and gradients of a checkpoint. The models of the comparison are made to show small faults. In
# a model that was hardly trained, numbers are so small that the last bit of a GELU is most of the error.
CHECKPOINT_SLACK = 2.0
