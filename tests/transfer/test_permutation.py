import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import architectures, logit_difference, small, weights

from mlx_moe.transfer.permutation import plan_permutation
from mlx_moe.transfer.plan import apply_numpy


@settings(deadline=None, max_examples=50, derandomize=True, database=None)
@given(architectures(), st.sampled_from([None, {"n_experts": 3, "top_k": 2}]))
def test_another_order_is_the_same_model(config, moe):
    config = config.model_copy(update={"moe": small(moe=moe).moe})
    arrays = weights(config)
    assert logit_difference(config, arrays, config, apply_numpy(plan_permutation(config), arrays)) < 1e-9


def test_every_layer_has_an_order_of_its_own_and_the_stream_has_one():
    config = small(d_model=32, d_ff=48)
    plan = {tensor.target: tensor for tensor in plan_permutation(config).tensors}
    stream, neurons = plan["layers.0.mlp.down_proj.weight"].maps
    for axis_map, size in ((stream, 32), (neurons, 48)):
        assert sorted(axis_map.index) == list(range(size))
        assert list(axis_map.index) != list(range(size))
    np.testing.assert_array_equal(plan["layers.0.mlp.up_proj.weight"].maps[0].index, neurons.index)
    np.testing.assert_array_equal(plan["embed_tokens.weight"].maps[0].index, stream.index)
    assert not np.array_equal(plan["layers.1.mlp.up_proj.weight"].maps[0].index, neurons.index)
