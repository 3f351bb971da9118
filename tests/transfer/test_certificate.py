import json

import numpy as np
import pytest

from mlx_moe.transfer.certificate import ROUNDING_MARGIN, Replay, probe

BATCH = np.random.default_rng(0).integers(0, 7, (3, 6)).astype(np.int32)
TABLE = np.random.default_rng(1).normal(size=(7, 7)).astype(np.float32)


def model(change=None):
    def logits(tokens_BT):
        assert tokens_BT.shape == (3, 5)
        for tokens_T in tokens_BT:
            out = TABLE[tokens_T][None]
            if change is not None:
                change(out)
            yield out[0]

    return logits


def certify(change=None):
    return probe(model(), model(change), BATCH, max_logit_difference=1e-4, max_loss_jump=1e-3)


def test_the_same_model_passes():
    certificate = certify()
    assert certificate.passed
    assert certificate.logit_differences == (0, 0, 0)
    assert certificate.loss_jump == 0
    assert certificate.argmax_agreement == 1
    logits_BTV = TABLE[BATCH[:, :-1]].astype(np.float64)
    log_sum = np.log(np.exp(logits_BTV).sum(-1))
    chosen = np.take_along_axis(logits_BTV, BATCH[:, 1:, None].astype(int), -1)[..., 0]
    assert certificate.loss_before == pytest.approx((log_sum - chosen).mean())


def test_a_shift_of_all_logits_fails_by_the_logits_alone():
    certificate = certify(lambda logits: logits.__iadd__(1))
    assert not certificate.passed
    assert certificate.max_logit_difference == pytest.approx(1, abs=1e-6)
    assert abs(certificate.loss_jump) < 1e-6


@pytest.mark.parametrize("factor", [0, -1])
def test_a_jump_of_the_loss_is_judged_in_both_directions(factor):
    def other(logits):
        logits *= factor

    before, after = (probe(*models, BATCH, 100, 1e-3) for models in ((model(), model(other)), (model(other), model())))
    assert before.loss_jump == -after.loss_jump
    assert not before.passed
    assert not after.passed


def test_large_logits_do_not_overflow():
    certificate = certify(lambda logits: logits.__iadd__(1e6))
    assert np.isfinite(certificate.loss_after)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails_even_in_both(value):
    def spoil(logits):
        logits[0, 2, 3] = value

    certificate = probe(model(spoil), model(spoil), BATCH, np.inf, np.inf)
    assert not certificate.passed
    assert json.loads(json.dumps(certificate.to_json(), allow_nan=False))["loss_after"] is None


def test_json_holds_all_figures():
    certificate = certify(lambda logits: logits.__iadd__(1e-5))
    values = json.loads(json.dumps(certificate.to_json()))
    assert values["passed"] is True
    assert values["limit_logit_difference"] == 1e-4
    assert len(values["logit_differences"]) == 3


def test_a_sequence_is_replayed_only_where_it_differs_and_flipped():
    asked = []

    def replay_with(flipped, router_difference):
        def replay(tokens_BT):
            asked.append(tokens_BT)
            return Replay(TABLE[tokens_BT], router_difference, flipped)

        return replay

    def judge(change, flipped=1, router_difference=1e-6):
        return probe(model(), model(change), BATCH, 1e-4, 1e-3, replay_with(flipped, router_difference))

    def last_logit(logits):
        logits[0, -1, 0] += 1e-3

    assert judge(None).passed
    assert not asked
    certificate = judge(last_logit)
    assert certificate.passed
    assert (certificate.routing_flips, certificate.max_logit_difference) == (3, 0)
    assert certificate.free_logit_difference == pytest.approx(1e-3, rel=1e-3)
    assert not judge(last_logit, flipped=0).passed
    assert not judge(last_logit, router_difference=1e-3).passed
    assert not judge(last_logit, router_difference=np.nan).passed


def test_a_limit_below_what_rounding_does_is_widened():
    asked = []

    def judge(change, floor):
        def measure(tokens_BT):
            asked.append(tokens_BT)
            return floor

        return probe(model(), model(change), BATCH, 1e-4, 1e-3, rounding_floor=measure)

    def last_logit(logits):
        logits[0, -1, 0] += 1e-3

    assert judge(None, 1.0).passed
    assert not asked
    certificate = judge(last_logit, 3e-4)
    assert certificate.passed
    assert certificate.limit_logit_difference == ROUNDING_MARGIN * 3e-4
    assert json.loads(json.dumps(certificate.to_json()))["rounding_floor"] == 3e-4
    (tokens_BT,) = asked
    np.testing.assert_array_equal(tokens_BT[0], BATCH[np.argmax(certificate.logit_differences), :-1])
    for floor in (2e-4, 1e-9, np.nan):
        assert not judge(last_logit, floor).passed
    assert judge(last_logit, 1e-9).limit_logit_difference == 1e-4
