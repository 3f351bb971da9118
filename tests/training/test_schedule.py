from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_moe.config import PhaseConfig
from mlx_moe.training.schedule import learning_rate


def rates(**fields):
    phase = PhaseConfig(**({"learning_rate": 1.0} | fields))
    return [learning_rate(phase, step) for step in range(phase.steps)]


def test_warm_up_climbs_in_equal_steps_to_the_peak():
    assert rates(steps=10, warmup_steps=4, schedule="constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


def test_constant_stays():
    assert rates(steps=5, schedule="constant", final_lr_fraction=0) == [1] * 5


def test_linear_falls_in_equal_steps():
    assert rates(steps=5, schedule="linear", final_lr_fraction=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_way_down_in_the_middle():
    falling = rates(steps=9, schedule="cosine", final_lr_fraction=0.1)
    assert falling[0] == 1
    assert falling[2] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)
    assert falling[4] == pytest.approx(0.55)
    assert falling[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_begins_after_warm_up_and_ends_with_the_phase(schedule):
    falling = rates(steps=20, warmup_steps=5, schedule=schedule, final_lr_fraction=0.1)
    assert falling[4] == falling[5] == 1
    assert falling[6] < 1
    assert falling[-1] == pytest.approx(0.1)


def test_a_phase_of_one_step_takes_the_peak():
    assert rates(steps=1) == [1]


def test_a_phase_that_is_all_warm_up_is_cut_off():
    assert rates(steps=2, warmup_steps=4) == [0.25, 0.5]


phases = st.builds(
    PhaseConfig,
    steps=st.integers(1, 200),
    learning_rate=st.floats(1e-8, 10),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup_steps=st.integers(0, 250),
    final_lr_fraction=st.floats(1e-3, 1),
)


@given(phases)
def test_never_above_the_peak_always_positive_and_one_hill(phase):
    values = [learning_rate(phase, step) for step in range(phase.steps)]
    assert all(0 < value <= phase.learning_rate * (1 + 1e-12) for value in values)
    climbing, falling = values[: phase.warmup_steps], values[phase.warmup_steps :]
    assert climbing == sorted(climbing)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(falling))


@given(phases, st.integers(0, 10))
def test_after_the_phase_the_rate_stays_at_its_end(phase, beyond):
    if phase.warmup_steps < phase.steps - 1:
        last = learning_rate(phase, phase.steps - 1)
        assert learning_rate(phase, phase.steps - 1 + beyond) == pytest.approx(last)
