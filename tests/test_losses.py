"""The losses against mathematics: values worked by hand, slopes, identities."""

import inspect
import math

import pytest
import torch

from apo_trl import LOSSES, apo_blend, apo_down, apo_down_norm, apo_zero, apo_zero_norm

LN3 = math.log(3)  # sigmoid(ln 3) = 3/4
ZERO_OR_DOWN = pytest.mark.parametrize("loss", [apo_zero, apo_down])
BOUNDED = ["apo_zero", "apo_down", "apo_zero_norm", "apo_down_norm", "apo_blend"]
"""The losses of two sigmoids: in (0, 2), and 1 at the anchor."""


def t(*values, dtype=torch.float64, grad=False):
    return torch.tensor(values, dtype=dtype, requires_grad=grad)


def extras(name, pairs, *, length=1, wins=0.5):
    """What a loss takes besides log-ratios and beta, by the names of its parameters."""
    lengths = torch.full((pairs,), length)
    columns = {"chosen_lengths": lengths, "rejected_lengths": lengths, "chosen_wins": torch.full((pairs,), wins)}
    parameters = inspect.signature(LOSSES[name]).parameters
    return {column: value for column, value in columns.items() if column in parameters}


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected", "expected"),
    [
        (apo_zero, 0, 0, 1),
        (apo_zero, LN3, -LN3, 1 / 2),
        (apo_zero, -LN3, LN3, 3 / 2),
        (apo_zero, LN3, 0, 3 / 4),
        (apo_zero, 0, -LN3, 3 / 4),
        (apo_zero, LN3, LN3, 1),
        (apo_down, 0, 0, 1),
        (apo_down, LN3, 0, 1),
        (apo_down, 0, -LN3, 3 / 4),
        (apo_down, -LN3, -LN3, 3 / 4),
        (apo_down, -LN3, -2 * LN3, 1 / 2),
        (apo_down, 0, LN3, 5 / 4),
    ],
)
def test_values_worked_by_hand(loss, chosen, rejected, expected):
    assert loss(t(chosen), t(rejected), beta=1.0).item() == pytest.approx(expected, abs=1e-12)
    # Only beta times the log-ratio matters.
    assert loss(t(chosen * 4), t(rejected * 4), beta=0.25).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected", "slopes"),
    # sigmoid' is 1/4 at 0, 3/16 at +-ln 3, and 9/100 at +-2 ln 3.
    [
        (apo_zero, 0, 0, (-1 / 4, 1 / 4)),
        (apo_zero, LN3, 0, (-3 / 16, 1 / 4)),
        (apo_zero, -2 * LN3, LN3, (-9 / 100, 3 / 16)),
        (apo_down, 0, 0, (0, 1 / 4)),
        (apo_down, 0, -LN3, (1 / 4 - 3 / 16, 3 / 16)),
        (apo_down, LN3, -LN3, (3 / 16 - 9 / 100, 9 / 100)),
        (apo_down, 2 * LN3, LN3, (9 / 100 - 3 / 16, 3 / 16)),
    ],
)
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_slopes_worked_by_hand(loss, chosen, rejected, slopes, beta):
    c, r = t(chosen / beta, grad=True), t(rejected / beta, grad=True)
    loss(c, r, beta=beta).sum().backward()
    assert c.grad.item() == pytest.approx(beta * slopes[0], abs=1e-12)
    assert r.grad.item() == pytest.approx(beta * slopes[1], abs=1e-12)


@pytest.mark.parametrize("name", BOUNDED)
def test_one_at_the_anchor(name):
    zeros = torch.zeros(3)
    assert LOSSES[name](zeros, zeros, beta=0.1, **extras(name, 3)).tolist() == [1, 1, 1]


@pytest.fixture
def plane():
    """Log-ratios over the whole plane, dense around the anchor."""
    line = torch.tensor([-20, -9, -3, -1, -0.2, 0, 0.2, 1, 3, 9, 20], dtype=torch.float64)
    return torch.cartesian_prod(line, line).unbind(1)


def test_swapping_the_sides_of_apo_zero_gives_two_minus_it(plane):
    chosen, rejected = plane
    total = apo_zero(chosen, rejected, beta=0.3) + apo_zero(rejected, chosen, beta=0.3)
    torch.testing.assert_close(total, torch.full_like(total, 2))


def test_apo_zero_always_pulls_chosen_up_and_rejected_down(plane):
    chosen, rejected = (side.clone().requires_grad_() for side in plane)
    apo_zero(chosen, rejected, beta=0.5).sum().backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


def test_apo_down_pushes_rejected_down_everywhere_and_chosen_where_it_is_nearer_the_anchor_than_the_margin(plane):
    chosen, rejected = (side.clone().requires_grad_() for side in plane)
    apo_down(chosen, rejected, beta=0.5).sum().backward()
    assert (rejected.grad > 0).all()
    near, margin = chosen.detach().abs(), (chosen - rejected).detach().abs()
    assert (chosen.grad[near < margin] > 0).all()
    assert (chosen.grad[near > margin] < 0).all()
    assert chosen.grad[near == margin].abs().max() < 1e-12
    assert min((near < margin).sum(), (near > margin).sum(), (near == margin).sum()) > 5


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    torch.manual_seed(0)
    chosen, rejected = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kwargs = extras(name, 6, length=3, wins=0.3)
    assert torch.autograd.gradcheck(lambda c, r: LOSSES[name](c, r, beta=0.7, **kwargs), (chosen, rejected))


@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_and_finite_far_from_the_anchor(name):
    chosen, rejected = t(-1e4, 1e4, -1e4, 1e4, grad=True), t(-1e4, -1e4, 1e4, 1e4, grad=True)
    loss = LOSSES[name](chosen, rejected, beta=1.0, **extras(name, 4))
    loss.sum().backward()
    assert ((loss >= 0) & (loss <= 2)).all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize(("norm", "plain"), [(apo_zero_norm, apo_zero), (apo_down_norm, apo_down)])
class TestLengthNormalised:
    def test_by_hand(self, norm, plain):
        # 5 ln 3 nats over 5 tokens and -2 ln 3 over 2: ln 3 and -ln 3 per token.
        got = norm(t(5 * LN3), t(-2 * LN3), beta=1.0, chosen_lengths=t(5), rejected_lengths=t(2))
        expected = {apo_zero: 1 / 2, apo_down: 3 / 4 + 1 / 10}[plain]  # sigmoid(-2 ln 3) = 1/10
        assert got.item() == pytest.approx(expected, abs=1e-12)

    def test_one_token_each_is_the_plain_loss(self, norm, plain, plane):
        ones = torch.ones_like(plane[0])
        got = norm(*plane, beta=0.2, chosen_lengths=ones, rejected_lengths=ones)
        assert torch.equal(got, plain(*plane, beta=0.2))

    def test_longer_answers_with_the_same_ratio_per_token_lose_the_same(self, norm, plain):
        def at(length):
            lengths = torch.tensor([length])
            return norm(t(0.3 * length), t(-0.1 * length), beta=5.0, chosen_lengths=lengths, rejected_lengths=lengths)

        torch.testing.assert_close(at(1), at(700))

    def test_an_empty_completion_counts_as_one_token(self, norm, plain):
        none = torch.tensor([0])
        assert norm(t(0.0), t(0.0), beta=5.0, chosen_lengths=none, rejected_lengths=none).item() == 1


def test_blend_has_zero_and_down_at_its_ends_exactly(plane):
    chosen, rejected = (side.float() for side in plane)
    ones = torch.ones_like(chosen)
    assert torch.equal(apo_blend(chosen, rejected, beta=0.1, chosen_wins=ones), apo_zero(chosen, rejected, beta=0.1))
    assert torch.equal(
        apo_blend(chosen, rejected, beta=0.1, chosen_wins=0 * ones), apo_down(chosen, rejected, beta=0.1)
    )


def test_blend_by_hand_and_per_pair():
    # At (ln 3, -ln 3): zero is 1/2, down is 3/4 + 1/10; three quarters of the way to zero.
    got = apo_blend(t(LN3, LN3), t(-LN3, -LN3), beta=1.0, chosen_wins=t(0.75, 0.0))
    assert got.tolist() == pytest.approx([0.75 * 0.5 + 0.25 * 0.85, 0.85], abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(name, low):
    chosen, rejected = torch.tensor([8.0, -3.0]), torch.tensor([-8.0, 2.0])
    kwargs = extras(name, 2)
    got = LOSSES[name](chosen.to(low), rejected.to(low), beta=1.0, **kwargs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, LOSSES[name](chosen, rejected, beta=1.0, **kwargs))
    assert LOSSES[name](chosen.double(), rejected.double(), beta=1.0, **kwargs).dtype == torch.float64


@ZERO_OR_DOWN
def test_slopes_survive_float32_where_the_plain_form_loses_them(loss):
    """At rewards of 18, 1 - sigmoid(x) has no digits left in float32; compare errors against float64."""

    def plain(c, r):
        first = 1 - torch.sigmoid(c) if loss is apo_zero else torch.sigmoid(c)
        return first + (torch.sigmoid(r) if loss is apo_zero else 1 - torch.sigmoid(c - r))

    def value(function, dtype):
        return function(t(18.0, dtype=dtype), t(-18.0 if loss is apo_zero else 0.0, dtype=dtype)).double().item()

    def ours(c, r):
        return loss(c, r, beta=1.0)

    truth = value(plain, torch.float64)
    assert abs(value(ours, torch.float32) - truth) <= abs(value(plain, torch.float32) - truth)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_would_broadcast_are_refused(name):
    with pytest.raises(ValueError, match="Shapes must be equal"):
        LOSSES[name](torch.zeros(3), torch.zeros(3, 1), beta=0.1, **extras(name, 3))


@pytest.mark.parametrize("name", ["apo_zero_norm", "apo_blend"])
def test_extras_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match="Shapes must be equal"):
        LOSSES[name](torch.zeros(3), torch.zeros(3), beta=0.1, **extras(name, 1))
