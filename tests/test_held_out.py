"""Standard errors of a gain on held-out comparisons, against slow sums over pairs of comparisons and against chance itself."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from trl_sharelora.held_out import HeldOut, Judged


def held_out(user, pairs, prompts=None):
    chosen, rejected = zip(*pairs, strict=True)
    return HeldOut(torch.tensor(user), chosen, rejected, prompts or [""] * len(user))


def own_texts(n):
    return [(f"a{i}", f"b{i}") for i in range(n)]


def test_over_users_it_is_that_of_their_means():
    user = [4, 4, 4, 9, 9, 11]
    gain = torch.tensor([0.1, 0.4, -0.2, 0.7, 0.3, 0.2], dtype=torch.float64)
    means = [0.1, 0.5, 0.2]
    judge = held_out(user, own_texts(6))
    assert judge.mean(gain) == pytest.approx(np.mean(means))
    over_texts = held_out(user, own_texts(6)).error(torch.zeros(6, dtype=torch.float64))
    assert over_texts == 0
    assert judge.error(gain) >= stats.sem(means) - 1e-12
    # each user one comparison: over texts it is about the same, over users exactly that of a mean
    assert held_out(range(6), own_texts(6)).error(gain) == pytest.approx(stats.sem(gain), rel=0.05)


def test_over_texts_it_is_the_sum_over_comparisons_that_share_one():
    draw = np.random.default_rng(0)
    texts, n = 12, 200
    pairs = [tuple(draw.choice(texts, 2, replace=False).tolist()) for _ in range(n)]
    user = draw.integers(0, 40, n).tolist()
    effect = draw.standard_normal(texts)
    gain = torch.tensor([effect[one] + effect[other] + 0.1 * draw.standard_normal() for one, other in pairs])
    judge = held_out(user, pairs)
    counts = np.bincount(user)
    weights = np.array([1 / (len(np.unique(user)) * counts[one]) for one in user])
    centred = weights * (gain.numpy() - (weights * gain.numpy()).sum())
    by_text = sum((centred[i] * sum(centred[j] for j in range(n) if t in pairs[j])) for t, i in product(range(texts), range(n)) if t in pairs[i])  # fmt: skip
    both = sum(centred[i] * centred[j] for i, j in product(range(n), repeat=2) if set(pairs[i]) == set(pairs[j]))
    expected = math.sqrt(by_text * texts / (texts - 1) - both)
    assert judge.error(gain) == pytest.approx(expected)
    sharing = sum(centred[i] * centred[j] for i, j in product(range(n), repeat=2) if set(pairs[i]) & set(pairs[j]))
    assert by_text - both == pytest.approx(sharing)


def test_over_prompts_where_there_are_several():
    gain = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    judge = held_out(range(6), own_texts(6), ["x", "x", "x", "y", "y", "y"])
    assert judge.error(gain) == pytest.approx(stats.sem([1.0, 0.0]))
    assert held_out(range(6), own_texts(6), ["x"] * 6).error(gain) == pytest.approx(stats.sem(gain), rel=0.05)


def test_a_gain_on_few_new_texts_is_mostly_chance_however_many_users_share_it():
    """Ten texts with effects of their own, no gain in truth: the rule takes about one in six, the error over users alone nearly half."""
    taken = {"rule": 0, "over users": 0}
    for seed in range(200):
        draw = np.random.default_rng(seed)
        effect = draw.standard_normal(10) * 0.1
        pairs = [tuple(draw.choice(10, 2, replace=False).tolist()) for _ in range(600)]
        user = np.repeat(np.arange(100), 6)
        gain = torch.tensor([effect[one] + effect[other] + 0.1 * draw.standard_normal() for one, other in pairs])
        judge = held_out(user, pairs)
        common = torch.zeros(600)
        states = {"common": Judged(0.5, common), "shrunk": Judged(0.5, gain)}
        taken["rule"] += judge.best(states, needs_more="shrunk") == "shrunk"
        taken["over users"] += judge.mean(gain) > stats.sem([gain[user == one].mean() for one in range(100)])
    assert 20 < taken["rule"] < 56  # a normal gain is above its error with probability .16: 32 of 200
    assert taken["over users"] > 80


def test_shrunk_needs_a_gain_beyond_its_error():
    judge = held_out(range(4), own_texts(4))
    shrunk = torch.tensor([-0.5, -0.6, -0.7, -0.4], dtype=torch.float64)
    noise = torch.tensor([0.2, -0.2, 0.1, -0.1], dtype=torch.float64)  # standard error .091

    def best(**states):
        return judge.best({state: Judged(0.5, one) for state, one in states.items()}, needs_more="shrunk")

    assert best(common=shrunk - 0.08 + noise, shrunk=shrunk) == "common"
    assert best(common=shrunk - 0.10 + noise, shrunk=shrunk) == "shrunk"
    assert best(common=shrunk - 0.10 + noise, trained=shrunk + 0.01, shrunk=shrunk) == "trained"
    one = held_out([3, 3], own_texts(2))
    assert one.error(torch.tensor([0.1, 0.2], dtype=torch.float64)) == math.inf


def test_margins_are_judged_at_the_factor_that_suits_them():
    judge = held_out([0, 0, 1], own_texts(3))
    margins = torch.tensor([4.0, -4.0, 0.0], dtype=torch.float64)
    found = judge.judged(margins)
    assert found.accuracy == pytest.approx((0.5 + 0.5) / 2)
    # a coin's margins tell nothing: the lowest factor, next to log(1/2)
    assert judge.mean(found.log_likelihood) > judge.mean(torch.nn.functional.logsigmoid(margins))
