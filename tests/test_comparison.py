"""Intervals and tables of several methods, against numbers by hand and scipy's own."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from trl_sharelora.comparison import Run, as_markdown, compare_results, compare_runs, credits, gain, summarise
from trl_sharelora.errors import MethodError
from trl_sharelora.evaluation import mean_interval, per_user_table


def run(method, seed, margins, users=("a", "a", "b", "b")):
    frame = pd.DataFrame({"row": range(len(margins)), "user_id": list(users), "best": margins, "last": margins})
    return Run(method, seed, {"learning_rate": 0.1}, [{"done": 1.0, "macro": 0.5, "micro": 0.5}], frame)


def test_by_hand():
    """User a: one right, one tie = .75; user b: both wrong = 0. Macro .375."""
    assert credits(pd.Series([1.0, 0.0, -2.0])).tolist() == [1.0, 0.5, 0.0]
    cell = summarise([run("m", 0, [1.0, 0.0, -1.0, -1.0])], "last")
    assert cell["macro"] == 0.375 and cell["micro"] == 0.375
    assert cell["users"]["a"]["accuracy"] == 0.75 and cell["users"]["b"]["n"] == 2
    assert cell["low"] < 0.375 < cell["high"]  # binomial, one seed


def test_seeds_are_averaged_and_their_interval_is_students():
    runs = [run("m", seed, margins) for seed, margins in enumerate([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, -1, 1, -1]])]
    cell = summarise(runs, "last")
    assert cell["macro_by_seed"] == [1.0, 0.75, 0.5] and cell["macro"] == 0.75
    expected = stats.t.interval(0.95, 2, loc=0.75, scale=stats.sem([1.0, 0.75, 0.5]))
    assert (cell["low"], cell["high"]) == pytest.approx(expected)
    assert cell["users"]["a"]["accuracy"] == pytest.approx((1 + 1 + 0.5) / 3) and cell["users"]["a"]["n"] == 2
    assert mean_interval([0.3]) == (None, None)


def test_a_paired_gain_has_the_smaller_interval_the_pairing_deserves():
    """The same 400 comparisons, one method right on five percent more: paired, that is clear; unpaired it is not."""
    rng = np.random.default_rng(0)
    users = np.repeat(["a", "b", "c", "d"], 100)
    base = np.where(rng.random(400) < 0.65, 1.0, -1.0)
    better = base.copy()
    better[np.flatnonzero(base < 0)[:24]] = 1.0
    found = gain([run("x", 0, better, users)], [run("y", 0, base, users)], "last")
    assert found["gain"] == pytest.approx(24 / 400) and found["seeds"] is None
    low, high = found["comparisons"]
    # of a difference that is 1 in 24 places and else 0, within four users: var = sum over users of p (1 - p) / 100 / 16
    shares = [(better - base).reshape(4, 100)[user].sum() / 2 / 100 for user in range(4)]
    error = np.sqrt(sum(p * (1 - p) / 100 for p in shares) / 16)
    assert low == pytest.approx(0.06 - 1.96 * error, abs=0.006) and high == pytest.approx(
        0.06 + 1.96 * error, abs=0.006
    )
    assert low > 0
    unpaired = np.sqrt(2 * 0.65 * 0.35 / 400)
    assert 0.06 - 1.96 * unpaired < 0


def test_results_of_evaluations_are_paired_as_runs_are():
    rng = np.random.default_rng(3)
    users = np.repeat(list("abcde"), 12)

    def result(margins):
        made = per_user_table(users.tolist(), margins, np.zeros(60))
        made.rows = pd.DataFrame({"row": range(60), "user_id": users, "margin": margins})
        return made

    mine, theirs = (rng.normal(shift, 1, (3, 60)) for shift in (0.8, 0.0))
    found = compare_results([result(m) for m in mine], [result(m) for m in theirs])
    # by hand: per user the mean over rows and seeds, per seed the mean over users; Student's t of each
    difference = (mine > 0).astype(float) - (theirs > 0)
    of_users = difference.reshape(3, 5, 12).mean((0, 2))
    of_seeds = difference.reshape(3, 5, 12).mean((1, 2))
    assert found["gain"] == pytest.approx(difference.mean()) and found["by_seed"] == pytest.approx(of_seeds.tolist())
    for name, values in (("users", of_users), ("seeds", of_seeds)):
        expected = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
        assert found[name] == pytest.approx(list(expected))
    assert found["comparisons"][0] < found["gain"] < found["comparisons"][1]
    one = compare_results([result(mine[0])], [result(theirs[0])])
    assert one["seeds"] is None and one["gain"] == pytest.approx(of_seeds[0])
    with pytest.raises(MethodError, match="A result of 'ours' has no rows"):
        compare_results([per_user_table(["a"], [1.0], [0.0])], [result(theirs[0])], ("ours", "theirs"))
    with pytest.raises(MethodError, match="0 and 1 results came"):
        compare_results([], [result(theirs[0])])
    with pytest.raises(MethodError, match=r"model has the seeds \[0, 1, 2\], baseline \[0\]"):
        compare_results([result(m) for m in mine], [result(theirs[0])])


def test_the_interval_over_users_of_a_gain_holds_what_it_should():
    """Five users whose true gains are normal(.05, .1), 20 comparisons each; at 95 % fewer than 179 of 200 come once in 500 cases."""
    rng = np.random.default_rng(11)
    users, inside = np.repeat(list("abcde"), 20), 0
    for _ in range(200):
        better = np.repeat(rng.normal(0.05, 0.1, 5), 20)
        mine, theirs = (np.where(rng.random(100) < 0.6 + shift, 1.0, -1.0) for shift in (better, 0))
        low, high = gain([run("x", 0, mine, users)], [run("y", 0, theirs, users)], "last")["users"]
        inside += low <= 0.05 <= high
    assert inside >= 179


def test_worlds_keep_the_users_of_different_seeds_apart():
    runs = [run("m", 0, [1.0, 1, 1, 1]), run("m", 1, [1.0, 1, -1, -1])]
    assert len(summarise(runs, "last", worlds=True)["users"]) == 4
    others = [run("o", 0, [1.0, 1, -1, 1]), run("o", 1, [1.0, 1, -1, -1])]
    apart, together = gain(runs, others, "last", worlds=True), gain(runs, others, "last")
    assert apart["gain"] == together["gain"] == 0.125 and apart["by_seed"] == [0.25, 0.0]


def test_what_cannot_be_paired():
    with pytest.raises(MethodError, match=r"m has the seeds \[0\], o \[1\]"):
        gain([run("m", 0, [1.0] * 4)], [run("o", 1, [1.0] * 4)], "last")
    with pytest.raises(MethodError, match="were not scored on the same comparisons"):
        gain([run("m", 0, [1.0] * 4)], [run("o", 0, [1.0] * 4, users="abab")], "last")


def test_the_table_and_the_files(tmp_path):
    runs = {"lora-global": [run("lora-global", 0, [1.0, -1, 1, 1])], "svd": [run("svd", 0, [1.0, 1, 1, 1])]}
    runs["svd"][0].save(tmp_path / "svd")
    loaded = Run.load(tmp_path / "svd")
    assert loaded.margins.equals(runs["svd"][0].margins) and loaded.settings == {"learning_rate": 0.1}
    table = as_markdown(compare_runs(runs, "lora-global"))
    assert "| svd | 1 | 100.00 | 100.00 | 100.00 | +25.00 |" in table
    assert "| lora-global | 1 | 75.00 | 75.00 | 50.00 |  |" in table
    (tmp_path / "svd" / "result.json").write_text("{")
    with pytest.raises(MethodError, match="does not hold a whole result"):
        Run.load(tmp_path / "svd")
