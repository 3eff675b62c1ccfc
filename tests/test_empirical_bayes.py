"""The users' distribution by EM, against scipy on each user alone, numerical integration and people whose distribution is known."""

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats

from trl_sharelora.empirical_bayes import Comparisons, Prior, Texts, learn_prior, mean_beside_texts
from trl_sharelora.errors import ConfigError, NonFiniteError


def people(n_users, n, k, root, seed=0, mean=None):
    """Comparisons of users whose own parts are drawn from N(mean, root root')."""
    draw = np.random.default_rng(seed)
    own = draw.standard_normal((n_users, root.shape[1])) @ root.T + (0 if mean is None else mean)
    user = np.repeat(np.arange(n_users), n)
    x = draw.standard_normal((len(user), k))
    offset = draw.standard_normal(len(user))
    margins = offset + (x * own[user]).sum(1)
    flip = np.where(draw.random(len(user)) < special.expit(margins), 1.0, -1.0)  # the better side is `chosen`
    return x * flip[:, None], offset * flip, user, own


def comparisons(x, offset, user, n_users):
    return Comparisons(
        torch.tensor(x, dtype=torch.float32), torch.tensor(offset), torch.tensor(user, dtype=torch.long), n_users
    )


@pytest.mark.parametrize("m", [3, 6], ids=["fewer entries than comparisons", "more"])
def test_solve_is_the_mode_of_each_user_alone(m):
    draw = np.random.default_rng(1)
    counts, k = [5, 1, 4, 0, 5], 7
    user = np.repeat(np.arange(5), counts)
    draw.shuffle(user)
    x, offset = draw.standard_normal((len(user), k)), draw.standard_normal(len(user))
    root, mean = draw.standard_normal((k, m)), 0.3 * draw.standard_normal(k)
    problem = comparisons(x, offset, user, 5)
    y, second, evidence = problem.solve(
        Prior(torch.tensor(mean, dtype=torch.float32), torch.tensor(root, dtype=torch.float32))
    )
    expected_second, expected_evidence = np.zeros((m, m)), 0.0
    for one in range(5):
        features, middle = x[user == one] @ root, offset[user == one] + x[user == one] @ mean

        def loss(v, features=features, middle=middle):
            return -special.log_expit(middle + features @ v).sum() + v @ v / 2

        found = optimize.minimize(loss, np.zeros(m), method="BFGS", options={"gtol": 1e-10})
        np.testing.assert_allclose(y[one], found.x, atol=2e-4)
        if counts[one]:
            p = special.expit(middle + features @ found.x)
            hessian = np.eye(m) + features.T @ ((p * (1 - p))[:, None] * features)
            expected_second += (np.outer(found.x, found.x) + np.linalg.inv(hessian)) / 4
            expected_evidence += -found.fun - np.linalg.slogdet(hessian)[1] / 2
    np.testing.assert_allclose(second, expected_second, atol=3e-4)
    assert evidence == pytest.approx(expected_evidence, abs=1e-3)


def test_the_evidence_is_about_the_integral():
    x, offset, user, _ = people(1, 6, 1, np.array([[0.7]]), seed=3)
    _, _, evidence = comparisons(x, offset, user, 1).solve(Prior(torch.zeros(1), torch.tensor([[0.7]])))
    exact = integrate.quad(
        lambda z: np.exp(special.log_expit(offset + x[:, 0] * z).sum()) * stats.norm.pdf(z, scale=0.7), -8, 8
    )[0]
    assert evidence == pytest.approx(np.log(exact), abs=0.02)  # Laplace's approximation, not our sums, is off by that


def test_padding_and_chunks_do_not_matter(monkeypatch):
    x, offset, user, _ = people(12, 9, 4, 0.5 * np.eye(4))
    kept = np.random.default_rng(0).random(len(user)) < 0.6
    x, offset, user = x[kept], offset[kept], user[kept]
    prior = Prior(torch.zeros(4), torch.eye(4))
    together = comparisons(x, offset, user, 12).solve(prior)
    monkeypatch.setattr("trl_sharelora.empirical_bayes.CHUNK", 60)
    apart = comparisons(x, offset, user, 12)
    assert len(apart.chunks) > 3
    for one, other in zip(together, apart.solve(prior), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [4, 30], ids=["fewer entries than comparisons", "more"])
def test_what_was_solved_before_does_not_matter(k):
    """It is where the search begins, and no more."""
    x, offset, user, _ = people(8, 9, k, 0.5 * np.eye(k))
    for first, then in ((3, 0.4), (0.02, 6)):
        problem, prior = comparisons(x, offset, user, 8), Prior(torch.zeros(k), then * torch.eye(k))
        problem.solve(Prior(torch.ones(k), first * torch.eye(k)))
        for one, other in zip(problem.solve(prior), comparisons(x, offset, user, 8).solve(prior), strict=True):
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), atol=2e-3, rtol=1e-3)


def test_em_finds_the_directions_users_differ_in():
    k = 12
    root = np.zeros((k, 2))
    root[3, 0], root[7, 1] = 1.2, 0.6
    x, offset, user, own = people(200, 40, k, root)
    steps = list(learn_prior(comparisons(x, offset, user, 200), tau=0.3, steps=20))
    learned = (steps[-1].prior.root @ steps[-1].prior.root.T).double().numpy()
    values, vectors = np.linalg.eigh(learned)
    assert abs(vectors[3, -1]) > 0.95 and abs(vectors[7, -2]) > 0.9
    # Laplace's approximation finds variances of binary answers too small, the less so the more answers there are
    assert values[-1] == pytest.approx(1.44, rel=0.3) and values[-2] == pytest.approx(0.36, rel=0.4)
    assert values[-3] < 0.05
    evidence = [step.evidence for step in steps]
    assert evidence == sorted(evidence)

    def error(step):
        return ((step.users.numpy() - own) ** 2).sum(1).mean()

    assert error(steps[-1]) < 0.8 * min(error(steps[0]), (own**2).sum(1).mean())


@pytest.mark.parametrize("tau", [0.2, 5.0])
def test_many_answers_of_each_user_do_not_make_it_swing(tau):
    """Then plain EM is there in one step, and twice the step would go from far too small to far too large and back."""
    x, offset, user, own = people(60, 200, 3, np.eye(3))
    steps = list(learn_prior(comparisons(x, offset, user, 60), tau=tau, steps=6))
    evidence = [step.evidence for step in steps]
    assert all(after > before - 0.5 for before, after in zip(evidence[1:], evidence[2:], strict=False))
    values = np.linalg.eigvalsh((steps[-1].prior.root @ steps[-1].prior.root.T).double().numpy())
    truth = np.linalg.eigvalsh(own.T @ own / 60)
    np.testing.assert_allclose(values, truth, rtol=0.25)


def test_the_mean_is_found_from_far_away():
    draw = np.random.default_rng(0)
    x, offset = draw.standard_normal((400, 3)), np.full(400, 12.0)
    x, offset = np.concatenate([x, draw.standard_normal((20, 3))]), np.concatenate([offset, np.full(20, -12.0)])
    problem = comparisons(x, offset, np.zeros(420, dtype=int), 1)
    mean = problem.refit_mean(torch.zeros(3), torch.zeros(1, 3), ridge=0.1, steps=30)

    def loss(w):
        return -special.log_expit(offset + x @ w).sum() + 0.05 * w @ w

    assert loss(mean.double().numpy()) == pytest.approx(optimize.minimize(loss, np.zeros(3)).fun, rel=1e-3)


def test_users_who_are_alike_stay_alike():
    x, offset, user, own = people(200, 12, 6, np.zeros((6, 1)))
    steps = list(learn_prior(comparisons(x, offset, user, 200), tau=0.5, steps=10))
    before, after = (float(step.users.square().sum(1).mean()) for step in (steps[0], steps[-1]))
    assert after < 0.4 * before


def test_the_mean_of_users_is_fitted():
    mean = np.array([1.0, -1.0, 0, 0, 0])
    x, offset, user, _ = people(200, 15, 5, 0.3 * np.eye(5), mean=mean)
    *_, last = learn_prior(comparisons(x, offset, user, 201), tau=0.5, steps=6)
    np.testing.assert_allclose(last.prior.mean, mean, atol=0.15)
    assert torch.equal(last.users[200], last.prior.mean)  # who has no comparison is the mean
    *_, without = learn_prior(comparisons(x, offset, user, 201), tau=0.5, steps=6, mean=False)
    assert not without.prior.mean.any()


def of_texts(n_texts, n, k, whims, seed=0):
    """Comparisons of texts that are liked for what features tell of them and, with standard deviation `whims`, for reasons of their own."""
    draw = np.random.default_rng(seed)
    features, mean = draw.standard_normal((n_texts, k)), draw.standard_normal(k) / np.sqrt(k)
    liked = features @ mean + whims * draw.standard_normal(n_texts)
    one, other = np.array([draw.choice(n_texts, 2, replace=False) for _ in range(n)]).T
    better = draw.random(n) < special.expit(liked[one] - liked[other])
    chosen, rejected = (torch.tensor(np.where(better, *pair)) for pair in ((one, other), (other, one)))
    return torch.tensor(features, dtype=torch.float32), chosen, rejected, mean


def test_the_mean_beside_texts_is_the_mode_by_scipy():
    features, chosen, rejected, _ = of_texts(9, 120, 4, 1.0)
    features = torch.cat([features, features[:1]])  # and a text that nobody was asked about
    offsets = torch.tensor(np.random.default_rng(1).standard_normal(120))
    mean, effects = mean_beside_texts(Texts(chosen, rejected, features), offsets, tau=0.7, scale=1.3)
    differences = (features[chosen] - features[rejected]).double().numpy()

    def loss(point):
        margins = offsets.numpy() + differences @ point[:4] + point[4:][chosen] - point[4:][rejected]
        return (
            -special.log_expit(margins).sum()
            + (point[:4] ** 2).sum() / 2 / 0.7**2
            + (point[4:] ** 2).sum() / 2 / 1.3**2
        )

    found = optimize.minimize(loss, np.zeros(14), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(mean, found.x[:4], atol=1e-4)
    np.testing.assert_allclose(effects, found.x[4:], atol=1e-4)
    assert effects[9] == 0
    again = mean_beside_texts(Texts(chosen, rejected, features + 5), offsets, tau=0.7, scale=1.3)
    np.testing.assert_allclose(again.mean, mean, atol=1e-4)  # only differences of texts count


def test_beside_texts_the_mean_is_a_better_guide_to_new_ones():
    gains = []
    for seed in range(5):
        features, chosen, rejected, truth = of_texts(60, 6000, 30, 1.5, seed)
        nothing, new = torch.zeros(6000).double(), np.random.default_rng(99).standard_normal((2000, 30))
        by_heart = mean_beside_texts(Texts(chosen, rejected, features), nothing, tau=0.3, scale=1e-3).mean.numpy()
        beside = mean_beside_texts(Texts(chosen, rejected, features), nothing, tau=0.3, scale=1.5).mean.numpy()
        right = [np.corrcoef(new @ one, new @ truth)[0, 1] for one in (by_heart, beside)]
        gains.append(right[1] - right[0])
    assert np.mean(gains) > 0.1 and min(gains) > 0


@pytest.mark.parametrize("arguments", [{"tau": 0.0}, {"tau": float("nan")}, {"scale": -1.0}, {"scale": float("inf")}])
def test_a_mean_beside_texts_needs_standard_deviations(arguments):
    features, chosen, rejected, _ = of_texts(5, 20, 2, 1.0)
    with pytest.raises(ConfigError, match="a finite standard deviation above 0"):
        mean_beside_texts(
            Texts(chosen, rejected, features), torch.zeros(20), **{"tau": 1.0, "scale": 1.0, **arguments}
        )
    offsets, nothing = torch.zeros(20), torch.zeros(20)
    offsets[3] = float("nan")
    with pytest.raises(NonFiniteError, match="0 of 5 texts have NaN or infinite features, 1 of 20 comparisons"):
        mean_beside_texts(Texts(chosen, rejected, features), offsets, tau=1.0, scale=1.0)
    with pytest.raises(NonFiniteError, match="1 of 5 texts"):
        mean_beside_texts(
            Texts(chosen, rejected, features.index_fill(0, torch.tensor([2]), float("inf"))),
            nothing,
            tau=1.0,
            scale=1.0,
        )


def test_bad_input():
    x, offset, user, _ = people(3, 4, 2, np.eye(2))
    good = comparisons(x, offset, user, 3)
    with pytest.raises(ConfigError, match="tau=0"):
        next(learn_prior(good, tau=0, steps=1))
    with pytest.raises(ConfigError, match="steps=-1"):
        next(learn_prior(good, tau=1.0, steps=-1))
    with pytest.raises(ConfigError, match="numbers from 0 to 1"):
        comparisons(x, offset, user, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        comparisons(x[:0], offset[:0], user[:0], 2)
    x[5] = np.nan
    with pytest.raises(NonFiniteError, match="the first is number 5"):
        comparisons(x, offset, user, 3)
