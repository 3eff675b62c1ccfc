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
    """Many texts, each in one comparison, and users whose gains differ: little is added to the error of the users' means."""
    user = np.repeat(range(20), 30)
    draw = np.random.default_rng(0)
    gain = torch.from_numpy(draw.standard_normal(20)[user] + 0.3 * draw.standard_normal(600))
    judge = held_out(user.tolist(), own_texts(600))
    means = [float(gain[user == one].mean()) for one in range(20)]
    assert judge.mean(gain) == pytest.approx(np.mean(means))
    assert judge.error(gain) == pytest.approx(stats.sem(means), rel=0.01)
    # users with few comparisons count as much as others
    uneven = np.r_[user, 20, 21]
    gain = torch.cat([gain, torch.tensor([5.0, -5.0])])
    means = [float(gain[uneven == one].mean()) for one in range(22)]
    assert held_out(uneven.tolist(), own_texts(602)).mean(gain) == pytest.approx(np.mean(means))


def test_over_texts_it_is_the_sum_over_comparisons_that_share_one():
    draw = np.random.default_rng(0)
    texts, n = 12, 200
    pairs = [tuple(draw.choice(texts, 2, replace=False).tolist()) for _ in range(n)]
    effect = draw.standard_normal(texts)
    gain = torch.tensor([effect[one] + effect[other] + 0.1 * draw.standard_normal() for one, other in pairs])
    centred = (gain.numpy() - float(gain.mean())) / n  # each comparison a user of his own
    sharing = sum(centred[i] * centred[j] for i, j in product(range(n), repeat=2) if set(pairs[i]) & set(pairs[j]))
    users = (centred**2).sum()
    expected = users * n / (n - 1) + sharing * 12 * 11 / (10 * 9) - users
    assert held_out(range(n), pairs).error(gain) == pytest.approx(math.sqrt(expected))


def test_over_prompts_where_there_are_several():
    draw = np.random.default_rng(0)
    prompt = np.repeat(range(10), 40)
    gain = torch.from_numpy(draw.standard_normal(10)[prompt] + 0.1 * draw.standard_normal(400))
    of_prompts = held_out(range(400), own_texts(400), [f"p{one}" for one in prompt]).error(gain)
    assert of_prompts == pytest.approx(stats.sem([float(gain[prompt == one].mean()) for one in range(10)]), rel=0.01)
    assert held_out(range(400), own_texts(400)).error(gain) == pytest.approx(stats.sem(gain), rel=0.05)


def all_pairs(texts):
    return [pair for pair in product(range(texts), repeat=2) if pair[0] < pair[1]]


def stars(texts):
    return [(0, other) for other in range(1, texts)]


@pytest.mark.parametrize("design, texts", [(all_pairs, 6), (all_pairs, 12), (stars, 10)])
def test_a_gain_on_few_new_texts_is_taken_as_often_as_its_error_says(design, texts):
    """Texts with effects of their own, no gain in truth: a normal gain is above its error with probability .16; over users alone it is nearly every other time."""
    taken, alone, runs = 0, 0, 400
    for seed in range(runs):
        draw = np.random.default_rng(seed)
        effect = draw.standard_normal(texts) * 0.1
        effect[0] *= design is not stars  # a text in all comparisons
        asked = design(texts)
        pairs = [asked[place] for place in draw.integers(0, len(asked), 600)]
        user = np.repeat(np.arange(100), 6)
        gain = torch.tensor([effect[one] + effect[other] + 0.1 * draw.standard_normal() for one, other in pairs])
        judge = held_out(user, pairs)
        states = {"common": Judged(0.5, torch.zeros(600)), "shrunk": Judged(0.5, gain)}
        taken += judge.best(states, needs_more="shrunk") == "shrunk"
        alone += judge.mean(gain) > stats.sem([gain[user == one].mean() for one in range(100)])
    assert 0.08 * runs < taken < 0.24 * runs
    assert alone > 0.35 * runs


def test_with_one_user_or_hardly_a_text_nothing_can_be_told():
    gain = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    assert held_out([3, 3, 3], own_texts(3)).error(gain) == math.inf
    assert held_out([1, 2, 3], [("a", "b"), ("b", "c"), ("a", "c")]).error(gain) == math.inf
    assert held_out([1, 2, 3], [("a", "b")] * 3).error(gain) == math.inf


def test_shrunk_needs_a_gain_beyond_its_error():
    n = 400
    judge = held_out(range(n), own_texts(n))
    shrunk = torch.full((n,), -0.5, dtype=torch.float64)
    noise = torch.tensor([2.0, -2.0] * (n // 2), dtype=torch.float64)  # standard error .1

    def best(**states):
        return judge.best({state: Judged(0.5, one) for state, one in states.items()}, needs_more="shrunk")

    assert best(common=shrunk - 0.098 + noise, shrunk=shrunk) == "common"
    assert best(common=shrunk - 0.102 + noise, shrunk=shrunk) == "shrunk"
    assert best(common=shrunk - 0.102 + noise, trained=shrunk + 0.01, shrunk=shrunk) == "trained"


def test_margins_are_judged_at_the_factor_that_suits_them():
    judge = held_out([0, 0, 1], own_texts(3))
    margins = torch.tensor([4.0, -4.0, 0.0], dtype=torch.float64)
    found = judge.judged(margins)
    assert found.accuracy == pytest.approx((0.5 + 0.5) / 2)
    # a coin's margins tell nothing: the lowest factor, next to log(1/2)
    assert judge.mean(found.log_likelihood) > judge.mean(torch.nn.functional.logsigmoid(margins))
    small = torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)  # all right, and hardly said so: as good as larger ones
    assert judge.mean(judge.judged(small).log_likelihood) == pytest.approx(math.log(1 / (1 + math.exp(-1))))
