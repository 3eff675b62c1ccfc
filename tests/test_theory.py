"""benchmarks/theory.py: its worlds, estimates and policies against independent ones, and theorems on a small world."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize


BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import theory
finally:
    sys.path.remove(BENCHMARKS)


SMALL = {"users": 6, "d1": 12, "d2": 3, "k": 2}
COUNTS = (200, 800, 3200)
SEEDS = range(6)


def numpy_dist(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Def A.1 from the full singular value decompositions."""
    bases = [np.linalg.svd(np.concatenate(list(x), axis=1))[0][:, :k] for x in (a, b)]
    return float(np.linalg.norm(bases[0] @ bases[0].T - bases[1] @ bases[1].T) / math.sqrt(2))


@pytest.fixture(scope="module")
def fits():
    """`{(method, Np): list of (truth, estimate, score)}` over the seeds."""
    found: dict = {}
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        truth = theory.draw_truth(rng, **SMALL)
        z = theory.draw_comparisons(rng, truth.updates, max(COUNTS))
        for n in COUNTS:
            for kind in theory.METHODS:
                estimate = theory.fit(z[:, :n], kind, 3, 2)
                score = theory.score(kind, estimate.updates, truth)
                found.setdefault((kind, n), []).append((truth, estimate.updates, score))
    return found


def of(fits, kind: str, value: str) -> np.ndarray:
    return np.array([[run[2][value] for run in fits[kind, n]] for n in COUNTS]).T


# -- the worlds


def test_the_truth_is_what_it_is_said_to_be():
    truth = theory.draw_truth(np.random.default_rng(0))
    assert truth.updates.shape == (10, 20, 5)
    stack = np.concatenate(list(truth.updates), axis=1)
    values = np.linalg.svd(stack, compute_uv=False)
    assert (values > 1e-10).sum() == 3
    norms = np.sqrt(np.square(truth.updates).sum((1, 2)))
    np.testing.assert_allclose(norms.mean(), 2.3, rtol=1e-12)
    assert norms.std() > 0.1 and norms.max() < theory.RADIUS
    np.testing.assert_allclose(truth.nu, values[2] ** 2 / 10, rtol=1e-9)
    assert 0.8 < truth.nu < 1.8 and truth.tail == 0
    # only the k-th singular value is scaled
    weak = theory.draw_truth(np.random.default_rng(0), last=0.25)
    scaled = np.linalg.svd(np.concatenate(list(weak.updates), axis=1), compute_uv=False)
    np.testing.assert_allclose(scaled[:3], values[:3] * [1, 1, 0.25], rtol=1e-9)


def test_the_tail_has_its_norm_and_is_the_mean_b_i():
    exact = theory.draw_truth(np.random.default_rng(1))
    truth = theory.draw_truth(np.random.default_rng(1), tail=0.6)
    np.testing.assert_allclose(np.sqrt(np.square(truth.updates - exact.updates).sum((1, 2))), 0.6, rtol=1e-12)
    left, values, right = np.linalg.svd(np.concatenate(list(truth.updates), axis=1), full_matrices=False)
    best = np.stack(np.split(left[:, :3] * values[:3] @ right[:3], 10, axis=1))
    np.testing.assert_allclose(truth.diamond, best, atol=1e-10)
    b = np.square(truth.updates - best).sum((1, 2))
    np.testing.assert_allclose(truth.tail, b.mean(), rtol=1e-9)
    np.testing.assert_allclose(truth.tail, np.square(values[3:]).sum() / 10, rtol=1e-9)


def test_the_adversarial_tail_is_one_direction_close_to_the_kth():
    truth = theory.draw_adversarial(np.random.default_rng(2), 0.8)
    values = np.linalg.svd(np.concatenate(list(truth.updates), axis=1), compute_uv=False)
    assert (values > 1e-9).sum() == 4 and values[1] > 1.3 * values[2]
    np.testing.assert_allclose(values[2:4], [1.2 * math.sqrt(10), 0.8 * 1.2 * math.sqrt(10)], rtol=1e-9)
    np.testing.assert_allclose(truth.tail, (0.8 * 1.2) ** 2, rtol=1e-9)
    # the tail weighs as much on loud as on quiet users
    b = np.square(truth.updates - truth.diamond).sum((1, 2))
    np.testing.assert_allclose(b, b.mean(), rtol=1e-8)
    norms = np.linalg.norm(truth.updates, axis=(1, 2))
    assert norms[::2].min() > 2.5 * norms[1::2].max() and norms.max() < 8


def test_comparisons_follow_bradley_terry():
    rng = np.random.default_rng(3)
    updates = theory.draw_truth(rng, **SMALL).updates
    z = theory.draw_comparisons(rng, updates, 40_000)
    assert z.shape == (6, 40_000, 36)
    # a turned difference is as likely as it was: the second moment is untouched
    np.testing.assert_allclose(z[0].T @ z[0] / 40_000, 2 * np.eye(36), atol=0.08)
    margins = np.einsum("unf,uf->un", z, updates.reshape(6, -1)).ravel()
    for low, high in ((0.1, 0.3), (0.9, 1.1), (1.9, 2.1), (3.8, 4.2)):
        inside = margins[(np.abs(margins) > low) & (np.abs(margins) < high)]
        right = (inside > 0).mean()
        expected = np.mean(1 / (1 + np.exp(-np.abs(inside))))
        assert abs(right - expected) < 4 * math.sqrt(expected * (1 - expected) / len(inside)), (low, right, expected)


def test_arms_are_compared_as_often_as_said():
    rng = np.random.default_rng(4)
    arms = theory.Arms.draw(rng, 15, 0.004)
    assert arms.common == 20 and arms.features.shape == (60, 15)
    np.testing.assert_allclose(arms.chances[:20] / arms.chances[20:].mean(), 250, rtol=1e-12)
    np.testing.assert_allclose(arms.chances @ arms.centred, 0, atol=1e-12)
    z = arms.compare(rng, rng.normal(size=(2, 3, 5)), 5000)
    # find the pair behind each difference
    differences = arms.features[:, None] - arms.features[None]
    rows, columns = np.triu_indices(60, 1)
    pairs = np.concatenate([differences[rows, columns], differences[columns, rows]])
    near = -2 * z[0] @ pairs.T + np.square(pairs).sum(1)
    which = near.argmin(1)
    np.testing.assert_allclose(pairs[which], z[0], atol=1e-9)  # and none is a response with itself
    rare = (columns >= 20)[which % len(rows)].mean()
    chance = 1 - (20 * arms.chances[0]) * (19 * arms.chances[0]) / (1 - arms.chances[0])
    assert abs(rare - chance) < 4 * math.sqrt(chance / 5000)


# -- the fits


@pytest.mark.parametrize("kind", ["shared", "local", "full", "global", "frozen"])
def test_gradients_against_autograd_and_differences(kind):
    rng = np.random.default_rng(5)
    users, d1, d2, k = 3, 5, 4, 2
    z = rng.normal(size=(users, 7, d1 * d2))
    basis = np.linalg.qr(rng.normal(size=(d1, k)))[0]
    factors = theory.Factors(kind, users, d1, d2, k, basis)
    vector = rng.normal(size=factors.size)
    # of the users some are beyond the radius, some within, and some multipliers hold within
    multipliers, penalty, ridge, radius = np.array([0.0, 0.3, 0.6]), 0.7, 0.05, 2.5

    def independent(x: torch.Tensor) -> torch.Tensor:
        if kind == "full":
            theta = x.reshape(users, d1, d2)
        elif kind == "frozen":
            theta = torch.einsum("ak,ukb->uab", torch.from_numpy(basis), x.reshape(users, k, d2))
        elif kind == "local":
            up, down = x[: users * d1 * k].reshape(users, d1, k), x[users * d1 * k :].reshape(users, k, d2)
            theta = torch.einsum("uak,ukb->uab", up, down)
        else:
            up, down = x[: d1 * k].reshape(d1, k), x[d1 * k :].reshape(-1, k, d2)
            theta = torch.stack([up @ down[user if kind == "shared" else 0] for user in range(users)])
        total = torch.zeros((), dtype=torch.float64)
        for user in range(users):
            for row in z[user]:
                total = total + torch.log1p(torch.exp(-(theta[user].flatten() @ torch.from_numpy(row)))) / 7
            square = theta[user].square().sum()
            total = total + ridge * square
            push = multipliers[user] + penalty * (square - radius**2) / 2
            total = total + ((push**2 if push > 0 else 0.0) - multipliers[user] ** 2) / (2 * penalty)
        return total

    value, gradient = theory.objective(factors, z, ridge, radius, multipliers, penalty, vector)
    x = torch.from_numpy(vector).requires_grad_()
    expected = independent(x)
    expected.backward()
    np.testing.assert_allclose(value, float(expected.detach()), rtol=1e-12)
    np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-10)
    norms = np.linalg.norm(factors.updates(vector), axis=(1, 2))
    assert norms.max() > radius  # the constraint was part of it

    def at(x: np.ndarray) -> float:
        return theory.objective(factors, z, ridge, radius, multipliers, penalty, x)[0]

    steps = 1e-6 * np.eye(len(vector))
    slow = [(at(vector + step) - at(vector - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(gradient, slow, atol=1e-7)


def test_the_shared_fit_is_the_best_that_an_independent_optimiser_finds():
    rng = np.random.default_rng(6)
    truth = theory.draw_truth(rng, **SMALL)
    z = theory.draw_comparisons(rng, truth.updates, 400)
    found = theory.fit(z, "shared", 3, 2, radius=None)
    x = torch.from_numpy(z)
    losses = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        up = torch.randn(12, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        down = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([up, down], max_iter=400, history_size=20, line_search_fn="strong_wolfe")

        def closure(up=up, down=down, optimizer=optimizer):
            optimizer.zero_grad()
            margins = torch.einsum("unf,uf->un", x, (up @ down).flatten(1))
            loss = torch.nn.functional.softplus(-margins).mean(1).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        losses.append(float(closure().detach()))
    assert found.loss <= min(losses) + 1e-6
    assert found.loss >= min(losses) - 1e-4  # and no better than possible
    both = theory.fit(z, "shared", 3, 2, radius=None, starts=("random", "spectral"), seed=1)
    np.testing.assert_allclose(both.loss, found.loss, rtol=1e-6)
    assert both.evaluations > found.evaluations


@pytest.mark.parametrize("kind", ["shared", "local", "full", "global"])
def test_the_constraint_is_met_at_an_optimum(kind):
    """Karush, Kuhn and Tucker: inside, or on the sphere with the loss falling outwards; stationary along the class."""
    rng = np.random.default_rng(7)
    truth = theory.draw_truth(rng, **SMALL)
    z = theory.draw_comparisons(rng, truth.updates, 60)
    radius = 0.4 if kind == "global" else 2.2  # below what the free fit would have
    found = theory.fit(z, kind, 3, 2, radius=radius)
    norms = np.linalg.norm(found.updates, axis=(1, 2))
    assert norms.max() <= radius * (1 + 1e-9)
    held = found.multipliers > 0
    assert held.any() and (norms[held] > radius * (1 - 2e-3)).all()
    by_updates = theory.loss_and_gradient(z, found.updates)[1]
    rest = by_updates + found.multipliers[:, None, None] * found.updates
    stack = rest.transpose(1, 0, 2).reshape(12, -1)
    if kind == "full":
        tangent = rest
    elif kind == "shared":  # B^T R_i = 0 and sum_i R_i W_i^T = 0
        left, values, right = np.linalg.svd(found.updates.transpose(1, 0, 2).reshape(12, -1), full_matrices=False)
        tangent = np.concatenate([(left[:, :2].T @ stack).ravel(), (stack @ right[:2].T).ravel()])
    elif kind == "local":
        left, _, right = np.linalg.svd(found.updates, full_matrices=False)
        tangent = np.concatenate(
            [(left[:, :, :2].swapaxes(1, 2) @ rest).ravel(), (rest @ right[:, :2].swapaxes(1, 2)).ravel()]
        )
    else:
        left, _, right = np.linalg.svd(found.updates[0])
        tangent = np.concatenate([(left[:, :2].T @ rest.sum(0)).ravel(), (rest.sum(0) @ right[:2].T).ravel()])
    assert np.abs(tangent).max() < 2e-3 < 0.05 * np.abs(by_updates).max(), np.abs(tangent).max()
    if kind in ("shared", "global"):
        assert np.linalg.matrix_rank(found.updates.transpose(1, 0, 2).reshape(12, -1), tol=1e-8) == 2


def test_without_the_constraint_few_comparisons_blow_up():
    rng = np.random.default_rng(8)
    truth = theory.draw_truth(rng, **SMALL)
    z = theory.draw_comparisons(rng, truth.updates, 25)
    errors = {
        name: np.square(theory.fit(z, "local", 3, 2, steps=300, **how).updates - truth.updates).sum((1, 2)).mean()
        for name, how in {"none": {"radius": None}, "radius": {}, "ridge": {"radius": None, "ridge": 1e-2}}.items()
    }
    assert errors["none"] > 5 * errors["radius"] and errors["radius"] <= (2.3 + 2 * 4) ** 2
    assert errors["none"] > 5 * errors["ridge"]


def test_a_new_users_fit_on_a_frozen_basis_is_a_logistic_regression():
    rng = np.random.default_rng(9)
    truth = theory.draw_truth(rng, **SMALL)
    basis = truth.basis.numpy()
    z = theory.draw_comparisons(rng, truth.updates[:1], 300)
    found = theory.fit(z, "frozen", 3, 2, basis=basis, radius=None, ridge=1e-3)
    x = (basis.T @ z[0].reshape(-1, 12, 3)).reshape(300, -1)  # the features of W_0
    w = np.zeros(6)
    for _ in range(30):  # Newton
        p = 1 / (1 + np.exp(x @ w))
        gradient = -(p @ x) / 300 + 2e-3 * w
        w -= np.linalg.solve((x.T * (p * (1 - p))) @ x / 300 + 2e-3 * np.eye(6), gradient)
    np.testing.assert_allclose(found.updates[0], basis @ w.reshape(2, 3), atol=1e-4)
    full = theory.fit(z, "full", 3, 2).updates
    errors = [np.square(x[0] - truth.updates[0]).sum() for x in (found.updates, full)]
    assert errors[1] > 2 * errors[0]


# -- the theorems on the small world


def test_dist_falls_with_the_root_of_the_comparisons(fits):
    dist = of(fits, "shared", "dist")
    slopes = theory.slopes(COUNTS, dist)
    mean, half = theory.interval(slopes)
    assert -0.65 < mean < -0.35 and half < 0.2, (mean, half)
    assert (dist[:, 0] > dist[:, -1]).all()
    for truth, estimate, score in fits["shared", 800]:
        np.testing.assert_allclose(score["dist"], numpy_dist(estimate, truth.updates, 2), atol=1e-9)


def test_shared_is_nearer_than_local_and_local_than_full(fits):
    shared, local, full, pooled = (of(fits, kind, "error") for kind in theory.METHODS)
    assert (local[:, -1] > 1.8 * shared[:, -1]).all(), local[:, -1] / shared[:, -1]
    assert (full[:, -1] > local[:, -1]).all() and (full / local)[:, -1].mean() > 1.08
    assert (full / shared)[:, -1].mean() > 2.3  # 3.6 times as many parameters
    # one reward for all does not come near, however much data
    assert (pooled[:, -1] > 20 * shared[:, -1]).all() and (pooled[:, -1] > 0.8 * pooled[:, 0]).all()
    assert -1.35 < theory.interval(theory.slopes(COUNTS, shared))[0] < -0.8
    agreements = [of(fits, kind, "agreement")[:, -1].mean() for kind in theory.METHODS]
    assert agreements[0] > agreements[1] > agreements[2] > agreements[3]


def test_lemma_5_holds_on_every_fit(fits):
    for (kind, _), runs in fits.items():
        for truth, estimate, _ in runs:
            values = np.linalg.svd(np.concatenate(list(truth.updates), axis=1), compute_uv=False)
            right = np.square(estimate - truth.updates).sum() / values[1] ** 2
            constant = 4 if kind in ("local", "full") else 1
            assert numpy_dist(estimate, truth.updates, 2) ** 2 <= constant * right + 1e-9
    assert set(theory.LEMMA.ratios) >= set(theory.METHODS)
    assert max(theory.LEMMA.ratios["shared"]) <= 1


def test_the_lemma_check_sees_a_violation():
    """An estimate of rank 2 that puts the other direction first: dist 1, error .505: constant 1 fails, 4 holds."""
    truth = theory.Truth(np.array([[[1.0, 0.0], [0.0, 0.0]]]), 1)
    estimate = torch.tensor([[[0.5, 0.0], [0.0, 0.505]]], dtype=torch.float64)
    with pytest.raises(AssertionError, match="Lemma 5/8"):
        theory.Lemma().check("shared", estimate, truth)
    seen = theory.Lemma()
    seen.check("full", estimate, truth)
    np.testing.assert_allclose(seen.ratios["full"], [1 / (0.25 + 0.505**2)], rtol=1e-9)


def test_an_error_below_the_tail_is_an_error():
    truth = theory.draw_truth(np.random.default_rng(10), **SMALL, tail=0.5)
    with pytest.raises(AssertionError, match="below Sigma_tail"):
        theory.score("shared", truth.updates, truth)
    assert theory.score("full", truth.updates, truth)["error"] == 0
    np.testing.assert_allclose(theory.score("shared", truth.diamond, truth)["error"], truth.tail, rtol=1e-9)


def test_agreement_is_that_of_drawn_pairs():
    rng = np.random.default_rng(11)
    a, b = rng.normal(size=(2, 1, 4, 3))
    z = rng.normal(size=(200_000, 12))
    share = ((z @ a.ravel() > 0) == (z @ b.ravel() > 0)).mean()
    assert abs(theory.agreement(a, b) - share) < 0.005
    np.testing.assert_allclose(theory.agreement(a, 3 * a), 1, atol=1e-7)


def test_an_adversarial_tail_turns_the_subspace_and_an_isotropic_one_does_not():
    def dist(truth: theory.Truth, seed: int, n: int = 3200) -> float:
        z = theory.draw_comparisons(np.random.default_rng(100 + seed), truth.updates, n)
        return theory.score("shared", theory.fit(z, "shared", 3, 2, radius=8.0).updates, truth)["dist"]

    small = {"users": 6, "d1": 12, "d2": 3, "k": 2}
    found = {
        ratio: [dist(theory.draw_adversarial(np.random.default_rng(seed), ratio, **small), seed) for seed in range(3)]
        for ratio in (0.0, 0.4, 0.8)
    }
    none, some, much = (np.mean(found[ratio]) for ratio in (0.0, 0.4, 0.8))
    assert some > 1.8 * none and much > 1.8 * some, found
    # as large as the tail of ratio .8
    tail = 0.8 * 1.2
    plain = [dist(theory.draw_truth(np.random.default_rng(seed), **small, tail=tail), seed) for seed in range(3)]
    assert np.mean(plain) < 0.35 * much, plain


# -- policies


def test_grams_of_the_packages_sets():
    rng = np.random.default_rng(12)
    features = rng.normal(size=(7, 15))
    np.testing.assert_allclose(
        theory.gram(lambda x: theory.ball_width(x, 5), features), features @ features.T, atol=1e-9
    )
    z = rng.normal(size=(2, 30, 15))
    scale = np.square(z).mean()
    for discount in (0.0, 1.0):
        grams = theory.ellipsoid_grams(z, features, discount)
        pooled = sum(own.T @ own for own in z)
        for user in range(2):
            sigma = scale * np.eye(15) + discount * pooled + z[user].T @ z[user]
            np.testing.assert_allclose(grams[user], features @ np.linalg.solve(sigma, features.T), atol=1e-5)


@pytest.mark.parametrize(
    "dimensions", [5, 12]
)  # fewer than responses: other mixtures have the reference's mean feature, too
def test_policies_are_the_optimum_of_the_pessimistic_value(dimensions):
    rng = np.random.default_rng(13)
    arms, n, radii = 8, 4, (0.0, 0.1, 0.5, 1.5, 50.0)
    reference = rng.dirichlet(np.ones(arms))
    features = rng.normal(size=(n, arms, dimensions))
    features -= np.einsum("a,naf->nf", reference, features)[:, None]
    rewards = np.einsum("naf,nf->na", features, rng.normal(size=(n, dimensions)))
    grams = features @ features.swapaxes(1, 2)
    policies, left = theory.pessimistic_policies(rewards, grams, radii, reference, tolerance=1e-6)
    assert policies.shape == (5, n, arms) and left <= 1e-6
    np.testing.assert_allclose(policies.sum(2), 1, atol=1e-12)
    assert policies.min() >= 0
    for place, radius in enumerate(radii):
        for user in range(n):

            def value(p: np.ndarray, radius=radius, user=user) -> float:
                return float(p @ rewards[user] - radius * np.linalg.norm(p @ features[user]))

            candidates = [value(np.eye(arms)[arm]) for arm in range(arms)] + [value(reference)]
            for start in (np.full(arms, 1 / arms), np.eye(arms)[rewards[user].argmax()] * 0.9 + 0.1 / arms):
                found = optimize.minimize(
                    lambda p, value=value: -value(p),
                    start,
                    bounds=[(0, 1)] * arms,
                    constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
                    method="SLSQP",
                    options={"maxiter": 300, "ftol": 1e-10},
                )
                p = np.maximum(found.x, 0)
                candidates.append(value(p / p.sum()))
            assert value(policies[place, user]) >= max(candidates) - 1e-5
    np.testing.assert_array_equal(policies[0], np.eye(arms)[rewards.argmax(1)])  # radius 0 is greedy, exactly
    mixtures = (policies > 1e-9).sum(2)
    assert mixtures[1:4].max() > 1  # otherwise single responses would have done
    np.testing.assert_array_equal(policies[-1], np.tile(reference, (n, 1)))


def test_pessimism_on_thin_coverage():
    result = theory.e5(range(3), counts=(50,), tuning=2)
    assert result.verdicts[0].verdict == result.verdicts[1].verdict == "holds"
    rows = {row["set"]: row for row in result.rows}
    assert rows["ellipsoid, own"]["gap"] < 0.8 * rows["greedy"]["gap"] and rows["ellipsoid, own"]["off"] < 0.25
    assert rows["ball"]["gap"] > 0.9 * rows["greedy"]["gap"] < rows["reference"]["gap"]
    # the policy's share of rare responses falls with the radius of an ellipsoid
    scan = {row["radius"]: row["off"] for row in result.more["scan"] if row["set"] == "ellipsoid, own"}
    assert scan[10.0] < scan[1.0] < scan[0.0] == rows["greedy"]["off"]


def test_concentrability_bounds_every_gap():
    result = theory.e8(range(2), shares=(1.0, 0.03), n=100)
    assert result.verdicts[0].verdict == "holds"
    full, thin = result.rows
    assert thin["C_r"] > 1.5 * full["C_r"] and 0 < full["gap / bound"] < 1


def test_assumption_2_for_one_pair_and_for_all():
    result = theory.e6(range(2), counts=(100, 800, 3200))
    few, some, many = result.rows
    assert few["single pairs inside"] < 0.7 < 0.9 < some["single pairs inside"] <= many["single pairs inside"] == 1
    # Marchenko and Pastur: (1 -+ sqrt(d / n))^2
    np.testing.assert_allclose([many["smallest"], many["largest"]], [0.678, 1.385], rtol=0.06)
    assert few["smallest"] < 0.01


# -- what is printed


def test_slopes_intervals_and_verdicts_by_hand():
    np.testing.assert_allclose(theory.slopes((1, 10, 100), np.array([[3, 0.3, 0.03], [5, 5, 5]])), [-1, 0], atol=1e-12)
    mean, half = theory.interval([1.0, 2.0, 3.0])
    np.testing.assert_allclose([mean, half], [2, 4.302653 / math.sqrt(3)], rtol=1e-6)
    assert math.isnan(theory.interval([1.0])[1])
    values = [0.99, 1.0, 1.01]
    assert theory.judge("x", values, 0.9, 1.1).verdict == "holds"
    assert theory.judge("x", values, 1.0, 1.1).verdict == "undecided"
    assert theory.judge("x", values, 1.1).verdict == "fails"
    assert theory.judge("x", [1.0], 0.9).verdict == "undecided"
    assert theory.judge("x", values, 0.9, 1.1).claim == "x (0.9 to 1.1)"


def test_the_script_writes_tables_numbers_and_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # for common.py, as its folder is when it runs as a script
    output = tmp_path / "out" / "theory.json"
    results = theory.main(
        ["--only", "E3", "E7", "--quick", "--seeds", "1", "--output", str(output), "--pictures", str(tmp_path)]
    )
    printed = capsys.readouterr().out
    assert "### E3. Tail" in printed and "### E7. Lemma 5/8" in printed and "| verdict |" in printed
    content = json.loads(output.read_text(encoding="utf-8"))
    assert content["seeds"] == [0] and set(content["experiments"]) == {"E3", "E7"}
    assert len(content["experiments"]["E3"]["rows"]) == len(results[0].rows)
    assert (tmp_path / "theory_tail.png").stat().st_size > 5000
    assert not (tmp_path / "theory_rates.png").exists()  # of experiments that were not run
