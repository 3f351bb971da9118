import numpy as np
from architectures import small

from mlx_moe.transfer.plan import AxisMap, Pad, Plan, TensorPlan, apply, fresh_tensor


def run(array, **tensor):
    plan = Plan(small(), small(), (TensorPlan("out", (), source="in", **tensor),))
    return apply(plan, {"in": array})["out"]


def test_maps_point_into_the_source_and_then_into_the_pad():
    array = np.array([[1, 2], [3, 4]], np.float32)
    maps = (AxisMap(1, np.array([2, 0, 1]), np.array([1, 10, 1.0])), AxisMap(0, np.array([1, 0, 1])))
    out = run(array, pad=Pad(1, 1, "constant", 7), maps=maps)
    np.testing.assert_array_equal(out, [[7, 30, 4], [7, 10, 2], [7, 30, 4]])


def test_the_mean_is_taken_in_float64_and_rounded_once():
    array = np.array([[2.0**24, 1, 1, 2]], np.float32)
    out = run(array, pad=Pad(1, 2, "mean"))
    np.testing.assert_array_equal(out[:, 4:], [[2.0**22 + 1, 2.0**22 + 1]])
    assert out.dtype == np.float32


def test_random_rows_do_not_depend_on_the_dtype():
    pad = Pad(0, 3, "normal", 0.5, "name", seed=1)
    rows = {dtype: pad.rows(np.zeros((2, 4), dtype)) for dtype in (np.float32, np.float64)}
    np.testing.assert_array_equal(rows[np.float32], rows[np.float64])
    assert rows[np.float32].shape == (3, 4)
    assert rows[np.float64].dtype == np.float64


def test_the_target_shares_no_memory_with_the_source():
    array = np.ones((2, 3), np.float32)
    for new_axis in (False, True):
        assert not np.shares_memory(run(array, new_axis=new_axis), array)


def test_a_tensor_without_a_source_takes_the_dtype_of_the_others():
    tensor = fresh_tensor("out", (2, 3), "normal", 0.5)
    assert tensor.fresh().dtype == np.float32
    out = apply(Plan(small(), small(), (tensor,)), {"in": np.ones(1)})["out"]
    assert out.dtype == np.float64
    np.testing.assert_array_equal(out, tensor.fresh())
