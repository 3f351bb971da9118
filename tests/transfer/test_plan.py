import numpy as np
import pytest
from support.architectures import small, weights

from mlx_moe.config import MoEConfig
from mlx_moe.transfer.growth import grow_config, plan_growth
from mlx_moe.transfer.plan import (
    AxisMap,
    Pad,
    Plan,
    TensorPlan,
    apply_lazily,
    apply_numpy,
    apply_streaming,
    blocks,
    fresh_tensor,
)
from mlx_moe.transfer.upcycling import plan_upcycling

EXPERTS = small(moe={"n_experts": 3}, normalization="layernorm", bias=True)
PLANS = {
    "experts": plan_upcycling(small(ffn_type="swiglu"), MoEConfig(n_experts=3)),
    "twice as wide": plan_growth(small(), grow_config(small(), d_model=12, n_layers=2)),
    "wider": plan_growth(EXPERTS, grow_config(EXPERTS, d_model=10, n_layers=2)),
    "deeper": plan_growth(EXPERTS, grow_config(EXPERTS, d_model=6, n_layers=5)),
    "all of it": plan_growth(EXPERTS, grow_config(EXPERTS, d_model=15, n_layers=3, n_heads=5, d_ff=11)),
    "all of it, even": plan_growth(EXPERTS, grow_config(EXPERTS, d_model=15, n_layers=3, n_heads=5, d_ff=11), "even"),
}


def run(array, **tensor):
    plan = Plan(small(), small(), (TensorPlan("out", (), source="in", **tensor),))
    return apply_numpy(plan, {"in": array})["out"]


def test_maps_point_into_the_source_and_then_into_the_pad():
    array = np.array([[1, 2], [3, 4]], np.float32)
    maps = (AxisMap(1, np.array([2, 0, 1]), np.array([1, 10, 1.0])), AxisMap(0, np.array([1, 0, 1])))
    out = run(array, pads=(Pad(1, 1, "constant", 7),), maps=maps)
    np.testing.assert_array_equal(out, [[7, 30, 4], [7, 10, 2], [7, 30, 4]])


def test_the_mean_is_taken_in_float64_and_rounded_once():
    array = np.array([[2.0**24, 1, 1, 2]], np.float32)
    out = run(array, pads=(Pad(1, 2, "mean"),))
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
    out = apply_numpy(Plan(small(), small(), (tensor,)), {"in": np.ones(1)})["out"]
    assert out.dtype == np.float64
    np.testing.assert_array_equal(out, tensor.fresh())


@pytest.mark.parametrize("size", [1, 7, 40, 10_000])
@pytest.mark.parametrize("name", PLANS)
def test_in_pieces_it_is_the_same_bit_for_bit(name, size):
    plan = PLANS[name]
    arrays = weights(plan.source_config, np.float32)
    whole = apply_numpy(plan, arrays)
    for tensor in plan.tensors:
        pieces = list(blocks(tensor, None if tensor.source is None else arrays[tensor.source], size))
        assert max(piece.size for piece in pieces) <= size
        assert b"".join(piece.tobytes() for piece in pieces) == whole[tensor.target].tobytes(), tensor.target


def test_one_by_one_it_is_the_same():
    plan = PLANS["all of it"]
    arrays = weights(plan.source_config, np.float32)
    whole, one_by_one, in_blocks = apply_numpy(plan, arrays), apply_lazily(plan, arrays), apply_streaming(plan, arrays)
    assert list(one_by_one) == list(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(one_by_one[name], array)
        np.testing.assert_array_equal(np.concatenate(list(in_blocks(name))), array)


def test_experts_are_written_from_where_the_source_lies():
    array = np.ones((5, 7), np.float32)
    (plan,) = (tensor for tensor in PLANS["experts"].tensors if tensor.target == "layers.0.mlp.experts.up_proj.weight")
    assert all(np.shares_memory(piece, array) for piece in blocks(plan, array, 35))
