"""Confidence sets against numerical minimisation, dense float64 inverses, autograd, simulation and numbers by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

from trl_sharelora.errors import ConfigError, NonFiniteError, PessimismError
from trl_sharelora.pessimism import (
    EllipsoidBuilder,
    EllipsoidSets,
    ball_norm,
    ball_radius,
    bootstrap_heads,
    conformal_coefficient,
    ensemble_estimate,
    ensemble_lower_bound,
    lower_bound,
)


FORMS = ["std", "variance", "worst"]
SIZE = 6
RIDGE, DISCOUNT, SCALE = 0.7, 0.2, 1.5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def comparisons(counts, size=SIZE):
    """User rows in random order, and features of both sides, for `counts[u]` comparisons of user u."""
    users = torch.tensor([user for user, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    users = users[torch.randperm(len(users))]
    spread = torch.linspace(0.2, 3, size)
    return users, torch.randn(len(users), size) * spread + 1, torch.randn(len(users), size) * spread


def build(users, chosen, rejected, num_users=None, batch=7, **kwargs):
    kwargs = {"ridge": RIDGE, "pooled_discount": DISCOUNT, "scale": SCALE} | kwargs
    builder = EllipsoidBuilder(chosen.shape[1], num_users or int(users.max()) + 1, **kwargs)
    for part in range(0, len(users), batch):
        rows = slice(part, part + batch)
        builder.add(users[rows], chosen[rows], rejected[rows])
    return builder.finish()


def dense_sigma(users, differences, user, ridge=RIDGE, discount=DISCOUNT, scale=SCALE):
    """The definition, term by term, in float64."""
    sigma = ridge * scale * np.eye(differences.shape[1])
    for owner, z in zip(users.tolist(), differences.double().numpy(), strict=True):
        sigma += discount * np.outer(z, z) + (owner == user) * np.outer(z, z)
    return sigma


def dense_width(features, index, users, differences, **kwargs):
    rows = zip(features.double().numpy(), index.tolist(), strict=True)
    return [
        math.sqrt(phi @ np.linalg.inv(dense_sigma(users, differences, user, **kwargs)) @ phi) for phi, user in rows
    ]


# -- lower ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_coefficient_zero_is_the_plain_reward_bit_by_bit(dtype):
    mean, std = torch.randn(50, dtype=dtype), torch.rand(50, dtype=dtype)
    std[3], std[4] = math.inf, math.nan
    assert torch.equal(lower_bound(mean, std, 0), mean)
    assert torch.equal(lower_bound(mean, std, 0.0), mean)
    rewards = torch.randn(5, 50, dtype=dtype)
    for form in FORMS:
        assert torch.equal(ensemble_lower_bound(rewards, 0, form), ensemble_estimate(rewards)[0])


def test_a_lower_end_never_exceeds_the_mean_and_falls_with_the_coefficient():
    mean, std = torch.randn(200) * 10, torch.rand(200).square() * (torch.rand(200) > 0.2)
    # three equal members whose float32 mean is not exactly them
    rewards = torch.cat([torch.randn(3, 200), torch.randn(1, 200).expand(3, 200)], dim=1)
    before = [mean] + [ensemble_estimate(rewards)[0]] * 3
    for coefficient in (0, 1e-9, 0.1, 1, 7, 1e6):
        ends = [lower_bound(mean, std, coefficient)] + [
            ensemble_lower_bound(rewards, coefficient, form) for form in FORMS
        ]
        assert all((end <= previous).all() for end, previous in zip(ends, before, strict=True))
        before = ends


def test_a_constant_added_to_all_rewards_shifts_the_lower_end_by_it():
    # multiples of 1/8 so that sums are exact
    mean, std = torch.randint(-40, 40, (100,)) / 8, torch.randint(0, 16, (100,)) / 8
    assert torch.equal(lower_bound(mean + 100, std, 2), lower_bound(mean, std, 2) + 100)
    rewards = torch.randint(-40, 40, (4, 100)).double() / 8
    for form in FORMS:
        torch.testing.assert_close(
            ensemble_lower_bound(rewards + 100, 1.5, form),
            ensemble_lower_bound(rewards, 1.5, form) + 100,
            rtol=1e-12,
            atol=0,
        )


@pytest.mark.parametrize("coefficient", [-0.1, math.inf, math.nan])
def test_a_coefficient_is_finite_and_not_negative(coefficient):
    with pytest.raises(ConfigError, match="pessimism_coefficient=.* came"):
        lower_bound(torch.zeros(2), torch.zeros(2), coefficient)
    with pytest.raises(ConfigError, match="pessimism_coefficient=.* came"):
        ensemble_lower_bound(torch.zeros(2, 2), coefficient)


# -- the ball


class Net(nn.Module):
    """Two layers over a sequence with explicit updates, and a reward per row that is not linear in them."""

    def __init__(self, size_in, hidden, linear=False):
        super().__init__()
        self.first, self.second = nn.Linear(size_in, hidden), nn.Linear(hidden, 3, bias=False)
        self.updates = nn.ParameterList([torch.zeros(hidden, size_in), torch.zeros(3, hidden)])
        self.head = nn.Parameter(torch.randn(3))
        self.linear = linear
        self.double()

    def forward(self, x, mask, seen=None):
        for layer, update in zip((self.first, self.second), self.updates, strict=True):
            inputs = x
            x = layer(x) + x @ update.T
            if seen is not None:
                x.retain_grad()
                seen.append((inputs, x))
            x = x if self.linear else torch.tanh(x)
        return ((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)) @ self.head


def net_and_batch(rows, seq, size_in, hidden):
    net = Net(size_in, hidden)
    mask = (torch.arange(seq) < torch.randint(1, seq + 1, (rows, 1))).double()
    return net, torch.randn(rows, seq, size_in, dtype=torch.float64), mask


def inputs_and_gradients(net, x, mask):
    seen = []
    net(x, mask, seen).sum().backward()
    return [inputs.detach() for inputs, _ in seen], [outputs.grad for _, outputs in seen]


# short and long against the layers: the Gram matrices and the explicit product
@pytest.mark.parametrize(("seq", "size_in", "hidden"), [(2, 8, 9), (11, 3, 4), (1, 1, 1)])
def test_ball_norm_is_the_norm_of_autograds_gradient_of_the_update(seq, size_in, hidden):
    rows = 7
    net, x, mask = net_and_batch(rows, seq, size_in, hidden)
    inputs, gradients = inputs_and_gradients(net, x, mask)
    each = [torch.autograd.grad(net(x, mask)[row], list(net.updates)) for row in range(rows)]
    wanted = [math.sqrt(sum(part.square().sum() for part in parts)) for parts in each]
    torch.testing.assert_close(ball_norm(inputs, gradients).tolist(), wanted, rtol=1e-10, atol=1e-12)

    weights = torch.tensor([0.5, 0.5, -1, 1, -0.25, -0.75, 1], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 3, 1, 1, 1])
    wanted = []
    for group in range(4):
        own = [row for row in range(rows) if groups[row] == group]
        sums = [sum((weights[row] * each[row][layer] for row in own), torch.zeros(1)) for layer in range(2)]
        wanted.append(math.sqrt(sum(part.square().sum() for part in sums)))
    torch.testing.assert_close(ball_norm(inputs, gradients, weights, groups).tolist(), wanted, rtol=1e-10, atol=1e-12)
    assert wanted[2] == 0  # nobody is in group 2
    unweighted = ball_norm(inputs, gradients, groups=groups)
    assert torch.equal(unweighted, ball_norm(inputs, gradients, torch.ones(rows, dtype=torch.float64), groups))


def test_ball_norm_in_bf16_is_computed_in_float32():
    inputs, gradients = [torch.randn(4, 5, 6).bfloat16()], [torch.randn(4, 5, 7).bfloat16()]
    norm = ball_norm(inputs, gradients)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(
        norm, ball_norm([inputs[0].double()], [gradients[0].double()]).float(), rtol=1e-5, atol=0
    )


def test_the_group_norm_is_at_most_the_mean_of_norms_per_row():
    inputs, gradients = inputs_and_gradients(*net_and_batch(12, 4, 5, 6))
    groups = torch.arange(12) % 3
    together = ball_norm(inputs, gradients, torch.full((12,), 0.25), groups)
    apart = ball_norm(inputs, gradients).view(4, 3).mean(0)
    assert (together <= apart).all() and (together < 0.99 * apart).any()


def test_the_ball_of_a_linear_reward_is_minimised_at_the_closed_form():
    """(3.4) and the inner problem of (3.5), solved by SLSQP over all entries of the update."""
    rows, seq, size_in, size_out, zeta = 5, 3, 3, 2, 0.49
    x = torch.randn(rows, seq, size_in, dtype=torch.float64)
    head, fitted = torch.randn(size_out, dtype=torch.float64), torch.randn(size_out, size_in, dtype=torch.float64)
    weights = torch.tensor(
        [1 / 3, 1 / 3, 1 / 3, -1 / 2, -1 / 2], dtype=torch.float64
    )  # three of the policy, two references

    def value(update):
        rewards = (x.numpy().mean(1) @ update.reshape(size_out, size_in).T) @ head.numpy()
        return float(weights.numpy() @ rewards)

    solved = optimize.minimize(
        value,
        fitted.numpy().flatten() + 0.01,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda update: zeta - ((update - fitted.numpy().flatten()) ** 2).sum()},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert solved.success
    gradients = (head / seq).expand(rows, seq, size_out)
    norm = ball_norm([x], [gradients], weights, torch.zeros(rows, dtype=torch.int64))
    closed = lower_bound(torch.tensor([value(fitted.numpy())], dtype=torch.float64), norm, ball_radius(zeta))
    assert closed.item() == pytest.approx(solved.fun, abs=1e-6)


def test_ball_norm_has_a_finite_gradient_at_zero_width():
    inputs = [torch.randn(3, 2, 4, requires_grad=True), torch.zeros(3, 9, 2, requires_grad=True)]
    gradients = [torch.zeros(3, 2, 5, requires_grad=True), torch.zeros(3, 9, 1, requires_grad=True)]
    for norm in (ball_norm(inputs, gradients), ball_norm(inputs, gradients, torch.ones(3), torch.tensor([0, 0, 1]))):
        assert torch.equal(norm, torch.zeros(len(norm)))
        norm.sum().backward()
    assert all(values.grad.isfinite().all() for values in inputs + gradients)


def test_ball_radius_is_the_root_because_3_4_bounds_the_square():
    assert ball_radius(0.25) == 0.5 and ball_radius(0) == 0
    for zeta in (-1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="zeta=.* came"):
            ball_radius(zeta)


def test_ball_norm_refuses_what_does_not_belong_together():
    x, d = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    for inputs, gradients in (([x], []), ([], []), ([x], [d[:2]]), ([x, x[:2]], [d, d[:2]]), ([x[0]], [d[0]])):
        with pytest.raises(PessimismError, match="came|needed"):
            ball_norm(inputs, gradients)
    with pytest.raises(PessimismError, match="without groups"):
        ball_norm([x], [d], torch.ones(3))
    with pytest.raises(PessimismError, match="groups of shape"):
        ball_norm([x], [d], torch.ones(3), torch.zeros(2, dtype=torch.int64))
    d[1, 2, 0] = math.nan
    with pytest.raises(NonFiniteError, match="row 1"):
        ball_norm([x], [d])


# -- the ellipsoid


# users with some, none, one, and more comparisons than dimensions
COUNTS = [4, 0, 1, 3 * SIZE, SIZE, 2]


@pytest.mark.parametrize("discount", [0.0, 0.2, 1.0])
def test_widths_are_those_of_a_dense_inverse(discount):
    users, chosen, rejected = comparisons(COUNTS)
    sets = build(users, chosen, rejected, pooled_discount=discount)
    features, index = torch.randn(40, SIZE) * 3, torch.randint(-1, len(COUNTS), (40,))
    wanted = dense_width(features, index, users, chosen - rejected, discount=discount)
    torch.testing.assert_close(sets.width(features.double(), index).tolist(), wanted, rtol=1e-6, atol=0)
    width = sets.width(features.bfloat16(), index)
    assert width.dtype == torch.float32
    torch.testing.assert_close(width.double().tolist(), wanted, rtol=2e-2, atol=0)


def test_the_ridge_is_in_the_unit_of_the_features():
    users, chosen, rejected = comparisons(COUNTS)
    z = chosen - rejected
    sets = build(users, chosen, rejected, scale=None)
    assert sets.scale == pytest.approx(float((z.double() ** 2).mean()), rel=1e-12)
    features, index = torch.randn(6, SIZE), torch.arange(-1, 5)
    wanted = dense_width(features, index, users, z, scale=sets.scale)
    torch.testing.assert_close(sets.width(features.double(), index).tolist(), wanted, rtol=1e-6, atol=0)
    # features in another unit: the same widths
    larger = build(users, 1024 * chosen, 1024 * rejected, scale=None)
    torch.testing.assert_close(larger.width(1024 * features, index), sets.width(features, index), rtol=1e-6, atol=0)


def test_a_reward_is_smallest_over_the_ellipsoid_at_the_closed_form():
    users, chosen, rejected = comparisons([3, 5], size=4)
    sets = build(users, chosen, rejected)
    head, radius, phi = np.array([1.0, -2, 0.5, 3]), 1.3, torch.randn(1, 4, dtype=torch.float64)
    for user in (-1, 0, 1):
        sigma = dense_sigma(users, chosen - rejected, user)
        solved = optimize.minimize(
            lambda theta: float(theta @ phi[0].numpy()),
            head,
            jac=lambda theta: phi[0].numpy(),
            method="SLSQP",
            constraints={
                "type": "ineq",
                "fun": lambda theta, s=sigma: radius**2 - (theta - head) @ s @ (theta - head),
                "jac": lambda theta, s=sigma: -2 * s @ (theta - head),
            },
            options={"ftol": 1e-10, "maxiter": 500},
        )
        assert solved.success
        closed = lower_bound(phi @ torch.from_numpy(head), sets.width(phi, torch.tensor([user])), radius)
        assert closed.item() == pytest.approx(solved.fun, abs=1e-6)


def test_huge_and_tiny_information_stays_sound():
    """A direction seen a million times over the prior, and repeated comparisons: never NaN, never negative."""
    users = torch.tensor([0] * 4 + [1] * 2)
    z = torch.zeros(6, SIZE)
    z[:3, 0], z[3, 1], z[4:, 2] = 1000, 1e-4, 1
    sets = build(users, z, torch.zeros_like(z))
    features, index = torch.eye(SIZE).repeat(2, 1), torch.arange(2).repeat_interleave(SIZE)
    wanted = dense_width(features, index, users, z)
    torch.testing.assert_close(sets.width(features, index).double().tolist(), wanted, rtol=1e-3, atol=0)
    assert sets.offsets.tolist() == [0, 2, 3]  # three equal comparisons are one direction


@pytest.mark.parametrize("trial", range(5))
def test_more_comparisons_never_widen_a_set(trial):
    torch.manual_seed(trial)
    users, chosen, rejected = comparisons(COUNTS)
    features, index = torch.randn(60, SIZE, dtype=torch.float64), torch.randint(-1, len(COUNTS), (60,))
    half = len(users) // 2
    before = build(users[:half], chosen[:half], rejected[:half], num_users=len(COUNTS)).width(features, index)
    after = build(users, chosen, rejected).width(features, index)
    assert (after <= before * (1 + 1e-6)).all()
    assert (after[index == -1] < before[index == -1]).all()  # others' comparisons count, too

    sets = build(users, chosen, rejected)
    wanted_users, wanted = users, chosen - rejected
    for _ in range(3):
        own, z = torch.tensor([trial, 3, trial]), torch.randn(3, SIZE)
        previous = sets.width(features, index)
        sets.add_comparisons(own, z)
        now = sets.width(features, index)
        assert (now <= previous * (1 + 1e-6)).all()
        others = ~torch.isin(index, own)
        assert torch.equal(now[others], previous[others])  # what is common to all stays as fitted
        wanted_users, wanted = torch.cat([wanted_users, own]), torch.cat([wanted, z])
    # own information counts fully, pooled information is that of the fit
    for row in range(60):
        sigma = dense_sigma(users, chosen - rejected, int(index[row]))
        for z in wanted[len(users) :][wanted_users[len(users) :] == index[row]].double().numpy():
            sigma += np.outer(z, z)
        phi = features[row].numpy()
        assert now[row].item() == pytest.approx(math.sqrt(phi @ np.linalg.inv(sigma) @ phi), rel=1e-5)


def test_a_new_users_comparisons_make_the_sets_grow():
    users, chosen, rejected = comparisons([3, 2])
    sets = build(users, chosen, rejected)
    phi = torch.randn(1, SIZE)
    unseen = sets.width(phi, torch.tensor([-1]))
    with pytest.raises(PessimismError, match="user_index 4 came .*the sets have 2 users"):
        sets.width(phi, torch.tensor([4]))
    sets.add_comparisons(torch.tensor([4, 4]), torch.randn(2, SIZE))
    assert sets.num_users == 5
    assert sets.has(torch.tensor([-1, 0, 1, 2, 3, 4])).tolist() == [False, True, True, False, False, True]
    assert sets.width(phi, torch.tensor([4])) < unseen
    assert torch.equal(sets.width(phi, torch.tensor([3])), unseen)


def test_a_removed_user_is_an_unseen_one():
    users, chosen, rejected = comparisons(COUNTS)
    sets = build(users, chosen, rejected)
    features, everybody = torch.randn(len(COUNTS), SIZE), torch.arange(len(COUNTS))
    before, unseen = sets.width(features, everybody), sets.width(features, torch.full_like(everybody, -1))
    sets.remove(3)
    after = sets.width(features, everybody)
    assert after[3] == unseen[3] and before[3] < unseen[3]
    rest = everybody != 3
    assert torch.equal(after[rest], before[rest])
    assert not sets.has(torch.tensor([3])).item() and len(sets.directions) == int(sets.offsets[-1])
    with pytest.raises(PessimismError, match="user_index 6 came"):
        sets.remove(6)


def test_storage_is_at_most_the_smaller_of_comparisons_and_dimensions_per_user():
    users, chosen, rejected = comparisons(COUNTS)
    sets = build(users, chosen, rejected)
    sets.add_comparisons(torch.tensor([0] * 20 + [1]), torch.randn(21, SIZE))
    counts = torch.tensor([24, 1, 1, 18, 6, 2])
    assert (sets.offsets.diff() <= counts.clamp(max=SIZE)).all()
    tensors = sets.tensors()
    assert all(tensor.ndim <= 2 for tensor in tensors.values())
    assert (
        sum(tensor.numel() for tensor in tensors.values())
        <= SIZE**2 + SIZE + int(counts.clamp(max=SIZE).sum()) * (SIZE + 1) + 7
    )


def test_stored_sets_come_back_bit_by_bit():
    users, chosen, rejected = comparisons(COUNTS)
    sets = build(users, chosen, rejected, scale=None)
    tensors = {name: tensor.clone() for name, tensor in sets.tensors().items()}
    again = EllipsoidSets.from_tensors(tensors, dict(sets.settings()))
    assert again.settings() == sets.settings()
    for name, tensor in sets.tensors().items():
        assert torch.equal(again.tensors()[name], tensor) and again.tensors()[name].dtype == tensor.dtype
    features, index = torch.randn(9, SIZE), torch.randint(-1, len(COUNTS), (9,))
    assert torch.equal(again.width(features, index), sets.width(features, index))
    assert torch.equal(again.to("cpu").centred(features), sets.centred(features))

    with pytest.raises(PessimismError, match="another version"):
        EllipsoidSets.from_tensors(tensors, {"ridge": 1.0})
    with pytest.raises(PessimismError, match="torn or of different adapters"):
        EllipsoidSets.from_tensors(tensors | {"directions": tensors["directions"][:-1]}, sets.settings())
    with pytest.raises(NonFiniteError, match="information"):
        EllipsoidSets.from_tensors(tensors | {"information": tensors["information"] / 0}, sets.settings())


def test_the_centre_is_the_mean_feature_of_the_training_completions():
    users, chosen, rejected = comparisons(COUNTS)
    sets = build(users, chosen, rejected)
    features = torch.randn(3, SIZE)
    mean = torch.cat([chosen, rejected]).double().mean(0)
    torch.testing.assert_close(sets.centred(features), (features.double() - mean).float(), rtol=1e-5, atol=1e-6)


def test_the_width_has_a_finite_gradient_at_zero_and_the_right_one_elsewhere():
    users, chosen, rejected = comparisons(COUNTS)
    sets = build(users, chosen, rejected)
    features = torch.zeros(4, SIZE, requires_grad=True)
    sets.width(features, torch.tensor([0, 1, 3, -1])).sum().backward()
    assert torch.equal(features.grad, torch.zeros(4, SIZE))
    phi = torch.randn(1, SIZE, dtype=torch.float64, requires_grad=True)
    sets.width(phi, torch.tensor([3])).backward()
    inverse = np.linalg.inv(dense_sigma(users, chosen - rejected, 3))
    wanted = inverse @ phi[0].detach().numpy()
    wanted /= math.sqrt(phi[0].detach().numpy() @ wanted)
    np.testing.assert_allclose(phi.grad[0].numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_no_trouble():
    users, chosen, rejected = comparisons(COUNTS)
    sets = build(users, chosen, rejected)
    none = torch.zeros(0, dtype=torch.int64)
    assert sets.width(torch.zeros(0, SIZE), none).shape == (0,)
    assert sets.has(none).shape == (0,)
    sets.add_comparisons(none, torch.zeros(0, SIZE))
    assert sets.num_users == len(COUNTS)
    empty = EllipsoidBuilder(SIZE, 3, ridge=2.0, scale=0.5).finish()  # with a scale, the prior alone is a set
    assert empty.width(torch.eye(SIZE)[:1], torch.tensor([2])).item() == pytest.approx(1.0)


def test_the_ellipsoid_refuses_what_does_not_fit():
    users, chosen, rejected = comparisons(COUNTS)
    sets, zero = build(users, chosen, rejected), torch.tensor([0])
    bad = torch.ones(1, SIZE)
    bad[0, 2] = math.nan
    with pytest.raises(NonFiniteError, match="features hold NaN .*row 0"):
        sets.width(bad, zero)
    with pytest.raises(NonFiniteError, match="differences hold NaN"):
        sets.add_comparisons(zero, bad)
    with pytest.raises(PessimismError, match=r"features of shape \(1, 5\) came"):
        sets.width(torch.ones(1, 5), zero)
    for index in (torch.tensor([0, 1]), torch.tensor([0.0]), torch.tensor([True])):
        with pytest.raises(PessimismError, match="one integer per row"):
            sets.width(torch.ones(1, SIZE), index)
    with pytest.raises(PessimismError, match="user_index -2 came"):
        sets.width(torch.ones(1, SIZE), torch.tensor([-2]))
    with pytest.raises(PessimismError, match="user_index -1 came"):
        sets.add_comparisons(torch.tensor([-1]), torch.ones(1, SIZE))
    builder = EllipsoidBuilder(SIZE, 2)
    with pytest.raises(PessimismError, match="user_index 2 came"):
        builder.add(torch.tensor([2]), torch.ones(1, SIZE), torch.ones(1, SIZE))
    with pytest.raises(PessimismError, match="1 chosen and 2 rejected"):
        builder.add(zero, torch.ones(1, SIZE), torch.ones(2, SIZE))
    builder.add(zero, torch.ones(1, SIZE), torch.ones(1, SIZE))
    with pytest.raises(PessimismError, match="all differences of features are zero"):
        builder.finish()
    for kwargs in ({"ridge": 0}, {"ridge": math.nan}, {"pooled_discount": -0.1}, {"pooled_discount": 2}, {"scale": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(kwargs))}=.* came"):
            EllipsoidBuilder(SIZE, 2, **kwargs)
    with pytest.raises(ConfigError, match="feature_size=0"):
        EllipsoidBuilder(0, 2)
    z = torch.zeros(1, SIZE)
    z[0, :2] = 1e9
    with pytest.raises(PessimismError, match="larger ridge"):
        build(zero, z, 0 * z, pooled_discount=1.0)


# -- ensembles


def test_ensembles_by_hand():
    rewards = torch.tensor([[1.0, 2, 0], [2, 2, 0], [6, 2, -3]])
    mean, std = ensemble_estimate(rewards)
    assert mean.tolist() == [3, 2, -1]
    torch.testing.assert_close(
        std, torch.tensor([math.sqrt(7), 0, math.sqrt(3)])
    )  # (4 + 1 + 9) / 2, 0, (1 + 1 + 4) / 2
    torch.testing.assert_close(
        ensemble_lower_bound(rewards, 2.0), torch.tensor([3 - 2 * math.sqrt(7), 2, -1 - 2 * math.sqrt(3)])
    )
    torch.testing.assert_close(ensemble_lower_bound(rewards, 0.5, "variance"), torch.tensor([3 - 7 / 3, 2, -2]))
    for coefficient in (0.1, 10):
        assert ensemble_lower_bound(rewards, coefficient, "worst").tolist() == [1, 2, -3]


def test_an_agreeing_ensemble_has_a_finite_gradient():
    rewards = torch.ones(3, 4, requires_grad=True)
    for form in FORMS:
        rewards.grad = None
        ensemble_lower_bound(rewards, 1.0, form).sum().backward()
        torch.testing.assert_close(rewards.grad.sum(0), torch.ones(4))


def test_an_ensemble_has_two_members_and_a_known_form():
    for rewards in (torch.zeros(1, 5), torch.zeros(5)):
        with pytest.raises(PessimismError, match="K = 2"):
            ensemble_estimate(rewards)
    with pytest.raises(ConfigError, match="form='mean' came"):
        ensemble_lower_bound(torch.zeros(2, 5), 1.0, "mean")
    with pytest.raises(NonFiniteError, match="row 1"):
        ensemble_estimate(torch.tensor([[0.0, math.inf], [0, 0]]))


@pytest.mark.parametrize("decades", [0, 3])
def test_a_refitted_head_solves_its_problem(decades):
    """With one comparison per user there is nothing to draw: the solution is that of the whole sample, by Newton's steps."""
    n, ridge = 40, 0.3
    z, head = (torch.randn(n, SIZE) + 0.5) * torch.logspace(-decades, decades, SIZE), torch.randn(SIZE)
    heads = bootstrap_heads(z, head, 2, ridge=ridge, user_index=torch.randperm(n))
    rows, start = z.double().numpy(), head.double().numpy()
    pull = ridge * (rows**2).mean()

    theta = start.copy()
    for _ in range(200):
        p = 1 / (1 + np.exp(np.clip(rows @ theta, -500, 500)))
        slope = pull * (theta - start) - p @ rows
        theta -= np.linalg.solve(pull * np.eye(SIZE) + rows.T @ (rows * (p * (1 - p))[:, None]), slope)
    assert np.abs(slope).max() < 1e-8 * max(1, pull)
    for member in heads:
        np.testing.assert_allclose(member.numpy(), theta, atol=1e-4)
    assert np.abs(theta - start).max() > 0.05


@pytest.mark.parametrize("users", [1, 3])
def test_bootstrapped_heads_spread_as_the_estimate_does(users):
    """Their covariance is close to the sandwich H^-1 J H^-1 of logistic regression, and falls with the ridge."""
    truth, n = torch.tensor([1.0, -0.5, 0.0]), 600
    z = torch.randn(n, 3)
    z = torch.where((torch.rand(n) < torch.sigmoid(z @ truth))[:, None], z, -z)
    heads = bootstrap_heads(z, truth, 100, ridge=1e-3, user_index=torch.arange(n) % users)
    assert heads.shape == (100, 3) and heads.dtype == truth.dtype
    centre = heads.mean(0)
    p = torch.sigmoid(z @ centre)
    hessian = (z * (p * (1 - p))[:, None]).T @ z
    meat = (z * (1 - p)[:, None].square()).T @ z
    wanted = (hessian.inverse() @ meat @ hessian.inverse()).diagonal().sqrt()
    ratio = heads.std(0) / wanted
    assert ((ratio > 0.75) & (ratio < 1.33)).all()
    tight = bootstrap_heads(z, truth, 5, ridge=1e6)
    torch.testing.assert_close(tight, truth.expand(5, 3), rtol=0, atol=1e-3)


def test_bootstraps_repeat_with_their_seed_and_draw_within_users():
    z, users = torch.randn(30, SIZE), torch.arange(30) % 3
    head = torch.zeros(SIZE)
    first = bootstrap_heads(z, head, 3, seed=1, user_index=users)
    assert torch.equal(first, bootstrap_heads(z, head, 3, seed=1, user_index=users))
    assert not torch.equal(first, bootstrap_heads(z, head, 3, seed=2, user_index=users))
    # users 1 and 2 have zero differences: the ten of user 0 are always drawn ten times in all
    z[users != 0] = 0
    z[users == 0] = torch.eye(SIZE)[0]
    first, *others = bootstrap_heads(z, head, 4, user_index=users)
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)
    apart = bootstrap_heads(z, head, 4)
    assert apart.std(0)[0] > 1e-2


def test_bootstraps_refuse_what_cannot_be_fitted():
    z, head = torch.randn(5, SIZE), torch.zeros(SIZE)
    with pytest.raises(ConfigError, match="members=1"):
        bootstrap_heads(z, head, 1)
    with pytest.raises(ConfigError, match="ridge=0 came"):
        bootstrap_heads(z, head, 2, ridge=0)
    with pytest.raises(PessimismError, match="No comparison"):
        bootstrap_heads(z[:0], head, 2)
    with pytest.raises(PessimismError, match=r"head of shape \(1, 6\)"):
        bootstrap_heads(z, head[None], 2)
    assert torch.equal(bootstrap_heads(z * 0, head + 1, 2), torch.ones(2, SIZE))  # nothing to learn: the head


# -- calibration


def test_a_conformal_coefficient_by_hand():
    # nine comparisons; wrong ones need 1, 2 and 4 widths
    margins = torch.tensor([-1.0, 5, 1, -1, 0, 3, 2, -2, 1])
    widths = torch.tensor([1.0, 1, 2, 0.5, 0, 3, 1, 0.5, 1])
    assert conformal_coefficient(margins, widths, 0.5) == 0  # 5 of 9
    assert conformal_coefficient(margins, widths, 0.6) == 0  # 6 of 9
    assert conformal_coefficient(margins, widths, 0.7) == 1
    assert conformal_coefficient(margins, widths, 0.8) == 2
    assert conformal_coefficient(margins, widths, 0.9) == 4  # 9 of 9: ceil(10 * .9)
    with pytest.raises(PessimismError, match="9 held-out comparisons are too few for coverage=0.95: at least 19"):
        conformal_coefficient(margins, widths, 0.95)
    # 19 are indeed enough
    assert conformal_coefficient(torch.arange(19) - 18.0, torch.ones(19), 0.95) == 18


def test_the_coefficient_reaches_its_own_rows_in_spite_of_rounding():
    margins, widths = torch.randn(4000, dtype=torch.float64) - 3, torch.rand(4000, dtype=torch.float64) * 10 + 1e-3
    for coverage in np.linspace(0.5, 0.99, 40):
        coefficient = conformal_coefficient(margins, widths, coverage)
        rank = math.ceil(4001 * coverage - 1e-9)
        assert (margins + coefficient * widths >= 0).sum() == rank
        assert (margins + coefficient * (1 - 1e-12) * widths >= 0).sum() < rank


@pytest.mark.parametrize(("n", "coverage"), [(20, 0.8), (19, 0.95), (100, 0.9)])
def test_new_comparisons_are_covered_as_often_as_wanted(n, coverage):
    draws, total = 3000, 0.0
    generator = np.random.default_rng(0)
    width = generator.uniform(0.1, 2, (draws, n + 1))
    margin = generator.standard_t(3, (draws, n + 1)) * width**2 - 0.5  # the width is a bad guess of the spread
    for m, w in zip(torch.from_numpy(margin), torch.from_numpy(width), strict=True):
        coefficient = conformal_coefficient(m[:n], w[:n], coverage)
        total += float(m[n] + coefficient * w[n] >= 0)
    # expected: ceil((n + 1) coverage) / (n + 1), with a standard error of at most .0073
    expected = math.ceil((n + 1) * coverage - 1e-9) / (n + 1)
    assert expected >= coverage
    assert total / draws == pytest.approx(expected, abs=0.022)


def test_conformal_refuses_what_it_cannot_calibrate():
    margins, widths = torch.full((20,), -1.0), torch.ones(20)
    with pytest.raises(PessimismError, match="20 of 20 held-out comparisons are ranked wrongly with a width of 0"):
        conformal_coefficient(margins, widths * 0, 0.9)
    with pytest.raises(PessimismError, match="one of each per held-out comparison"):
        conformal_coefficient(margins, widths[:3], 0.9)
    with pytest.raises(PessimismError, match="Negative widths"):
        conformal_coefficient(margins, -widths, 0.9)
    with pytest.raises(NonFiniteError, match="margins"):
        conformal_coefficient(margins * math.nan, widths, 0.9)
    for coverage in (0, 1, 95, math.nan):
        with pytest.raises(ConfigError, match="coverage=.* came"):
            conformal_coefficient(margins, widths, coverage)
