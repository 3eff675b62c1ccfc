"""Accuracy per user: statistics against scipy and numbers by hand, rewards against a slow loop with a merged model per user."""

import copy
import logging
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers import ARCHITECTURES, MAX_POSITIONS, preference_rows, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from scipy import stats

from trl_sharelora import ShareLoraConfig
from trl_sharelora.data import tokenize_preference
from trl_sharelora.errors import ConfigError, DataError, NonFiniteError, UnknownUserError
from trl_sharelora.evaluation import (
    evaluate_users,
    expected_calibration_error,
    jackknife_interval,
    mean_interval,
    per_user_table,
    width_calibration,
    wilson_interval,
)


# -- intervals


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_is_scipys_for_whole_numbers(level):
    cases = [(k, n) for n in (1, 2, 7, 50, 1000) for k in sorted({0, 1, n // 2, n - 1, n})]
    correct, trials = zip(*cases, strict=True)
    low, high = wilson_interval(correct, trials, level)
    for place, (k, n) in enumerate(cases):
        theirs = stats.binomtest(k, n).proportion_ci(level, method="wilson")
        assert low[place] == pytest.approx(theirs.low, abs=1e-12)
        assert high[place] == pytest.approx(theirs.high, abs=1e-12)


def test_wilson_ends_solve_its_equation_for_half_numbers_too():
    correct, n = np.array([0.5, 2.5, 9.5, 33.5]), np.array([1, 4, 10, 50])
    z = 1.959963984540054
    for end in wilson_interval(correct, n):
        assert (correct / n - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, rel=1e-9)


@pytest.mark.parametrize(("correct", "n", "level"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95)])
def test_wilson_refuses_impossible_counts(correct, n, level):
    with pytest.raises(DataError, match="1 or more trials and between 0 and n successes"):
        wilson_interval([correct], [n], level)


def test_a_level_is_between_0_and_1():
    with pytest.raises(ConfigError, match="level=95 came"):
        wilson_interval([1], [2], level=95)


# -- calibration


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_calibration_error_by_hand():
    # two bins, [.5, .75) with .6 right, .7 wrong, .5 a tie: |1.5 - 1.8|; [.75, 1] with .9 right: |1 - .9|; over four rows
    margins = [logit(0.6), -logit(0.7), logit(0.9), 0.0]
    assert expected_calibration_error(margins, bins=2) == pytest.approx((0.3 + 0.1) / 4)
    # sure and always wrong; a row on the last edge belongs to the last bin
    assert expected_calibration_error([-1000.0, -1000.0]) == 1.0
    assert expected_calibration_error([1000.0]) == 0.0
    assert expected_calibration_error([0.0, 0.0]) == 0.0


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_has_not():
    draw = np.random.default_rng(0)
    margins = draw.uniform(0, 4, 200_000)
    signed = np.where(draw.random(len(margins)) < 1 / (1 + np.exp(-margins)), margins, -margins)
    assert expected_calibration_error(signed) < 0.005
    # three times the margins: the mean distance of the two probabilities, integrated
    grid = np.linspace(0, 4, 100_001)
    expected = np.mean(1 / (1 + np.exp(-3 * grid)) - 1 / (1 + np.exp(-grid)))
    assert expected_calibration_error(3 * signed) == pytest.approx(expected, abs=0.005)


# -- do narrow sets go with right answers?


def test_calibration_of_widths_by_hand():
    # by width: ann +, bob +, ann +, bob tie | ann -, bob +, ann -, bob -
    ids = ["bob", "ann"] * 4
    widths = [0.8, 0.1, 0.4, 0.3, 0.6, 0.5, 0.2, 0.7]
    margins = [-1.0, 2.0, 0.0, 1.0, 3.0, -1.0, 1.0, -2.0]
    found = width_calibration(ids, margins, torch.tensor(widths))
    assert found.table["n"].tolist() == [2, 2, 2, 2]
    assert found.table["accuracy"].tolist() == [1.0, 0.75, 0.5, 0.0]
    assert found.table["mean_std"].tolist() == pytest.approx([0.15, 0.35, 0.55, 0.75])
    users = found.users.set_index("user_id")
    assert users.loc["ann"].tolist() == [4, 1.0, 0.0]
    assert users.loc["bob"].tolist() == [4, 0.75, 0.5]
    assert (found.gap, found.gap_low, found.gap_high) == (1.0, 1.0, 1.0)  # so it is with each of the two
    alone = width_calibration(["ann"] * 5 + ["bob"], np.ones(6), np.arange(6))
    assert alone.users["n"].tolist() == [5, 1] and np.isnan(alone.users["accuracy_wide"][1])
    assert width_calibration(["ann"] * 4, np.ones(4), np.arange(4))[3:] == (None, None)
    with pytest.raises(DataError, match="at least 4 rows"):
        width_calibration(["ann"] * 3, np.ones(3), np.ones(3))
    with pytest.raises(DataError, match=r"margins of shape \(4,\) and widths of shape \(5,\)"):
        width_calibration(["ann"] * 4, np.ones(4), np.ones(5))


def test_the_interval_of_the_gap_holds_what_it_should():
    draw = np.random.default_rng(3)
    inside = 0
    for _ in range(60):
        ids = np.repeat(np.arange(40), 12).tolist()
        widths = draw.random(len(ids))
        # the chance of being right falls from .9 to .5: .85 and .55 in the outer quarters
        margins = np.where(draw.random(len(ids)) < 0.9 - 0.4 * widths, 1.0, -1.0)
        found = width_calibration(ids, margins, widths)
        inside += found.gap_low <= 0.3 <= found.gap_high
    assert inside >= 52  # of 60 at 95 %: fewer in 1 of 150 cases
    flat = width_calibration(ids, np.where(draw.random(len(ids)) < 0.7, 1.0, -1.0), widths)
    assert flat.gap_low < 0 < flat.gap_high


# -- the table


def test_the_table_by_hand():
    result = per_user_table(
        ["bob", "ann", "bob", "bob", "ann", "cat"], [1.0, 0.5, 2.0, 0.0, 3.0, -1.0], [0.0, 0.5, 3.0, -1.0, 3.0, 1.0]
    )
    table = result.table
    assert list(table.columns) == ["user_id", "n", "correct", "ties", "accuracy", "low", "high"]
    assert table["user_id"].tolist() == ["bob", "ann", "cat"]
    assert table["n"].tolist() == [3, 2, 1]
    assert table["correct"].tolist() == [2, 0, 0]
    assert table["ties"].tolist() == [0, 2, 0]
    assert table["accuracy"].tolist() == [pytest.approx(2 / 3), 0.5, 0.0]
    theirs = stats.binomtest(2, 3).proportion_ci(0.95, method="wilson")
    assert (table["low"][0], table["high"][0]) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    assert result.macro == pytest.approx((2 / 3 + 0.5 + 0) / 3)
    assert result.micro == pytest.approx((2 + 1 + 0) / 6)
    assert result.worst_tenth == 0.0
    assert (result.n_users, result.n, result.ties, result.unseen, result.dropped) == (3, 6, 2, 0, 0)
    assert result.ece == expected_calibration_error([1.0, 0.0, -1.0, 1.0, 0.0, -2.0])


def test_order_follows_the_registry_then_first_appearance():
    ids = ["new2", "bob", "new1", "ann"]
    result = per_user_table(ids, np.arange(4), np.zeros(4), order=["ann", "absent", "bob"])
    assert result.table["user_id"].tolist() == ["ann", "bob", "new2", "new1"]
    assert result.table["correct"].tolist() == [1, 1, 0, 1]


def test_it_is_what_a_slow_loop_finds():
    draw = random.Random(0)
    ids = [f"u{draw.randint(0, 20)}" for _ in range(500)]
    chosen, rejected = ([draw.randint(0, 4) for _ in ids] for _ in range(2))
    shares = {}
    for user_id in set(ids):
        credits = [
            1.0 if a > b else 0.5 if a == b else 0.0
            for u, a, b in zip(ids, chosen, rejected, strict=True)
            if u == user_id
        ]
        shares[user_id] = sum(credits) / len(credits)
    result = per_user_table(ids, chosen, torch.tensor(rejected))
    found = dict(zip(result.table["user_id"], result.table["accuracy"], strict=True))
    assert found == pytest.approx(shares)
    assert result.macro == pytest.approx(sum(shares.values()) / 21)
    assert result.worst_tenth == pytest.approx(sum(sorted(shares.values())[:3]) / 3)  # 21 users: three


def test_the_interval_of_macro_is_that_of_a_mean():
    draw = np.random.default_rng(1)
    ids = np.repeat(np.arange(400), 20).tolist()
    margins = draw.normal(0.7, 1, len(ids))
    result = per_user_table(ids, margins, np.zeros(len(ids)))
    accuracy = result.table["accuracy"]
    half = 1.96 * accuracy.std() / math.sqrt(400)
    assert result.macro_low == pytest.approx(result.macro - half, abs=0.1 * half)
    assert result.macro_high == pytest.approx(result.macro + half, abs=0.1 * half)
    again = per_user_table(ids, margins, np.zeros(len(ids)))
    assert (again.macro_low, again.macro_high) == (result.macro_low, result.macro_high)
    alone = per_user_table(["ann"], [1.0], [0.0])
    assert (alone.macro_low, alone.micro_low, alone.worst_tenth_low) == (None, None, None)
    assert (alone.macro_high, alone.micro_high, alone.worst_tenth_high) == (None, None, None)
    assert (alone.macro, alone.micro, alone.worst_tenth) == (1, 1, 1)


def drawn_users(draw, users: int):
    """Ids and signs of rows of users whose true accuracies are beta(8, 4); each has 5 to 59 rows."""
    sizes = draw.integers(5, 60, users)
    right = draw.random(sizes.sum()) < np.repeat(draw.beta(8, 4, users), sizes)
    return np.repeat(np.arange(users), sizes).tolist(), np.where(right, 1.0, -1.0)


@pytest.mark.parametrize("users", [5, 30])
def test_the_intervals_hold_what_they_should(users):
    """What other users drawn alike would have; at 95 % fewer than 179 of 200 come once in 500 cases."""
    draw = np.random.default_rng(users)
    # the truth from 400,000 users: the tenth of binomial shares, the rest are means of the beta distribution
    sizes = draw.integers(5, 60, 400_000)
    shares = np.sort(draw.binomial(sizes, draw.beta(8, 4, len(sizes))) / sizes)
    truth = {"macro": 2 / 3, "micro": 2 / 3, "worst_tenth": shares[: len(shares) // 10].mean()}
    inside, narrow = dict.fromkeys(truth, 0), 0
    for _ in range(200):
        ids, margins = drawn_users(draw, users)
        values = per_user_table(ids, margins, np.zeros(len(ids))).as_dict()
        for name, value in truth.items():
            assert 0 <= values[f"{name}_low"] <= values[name] <= values[f"{name}_high"] <= 1
            inside[name] += values[f"{name}_low"] <= value <= values[f"{name}_high"]
        narrow += values["macro_high"] - values["macro_low"] < 0.95
    assert min(inside.values()) >= 179 and narrow == 200
    # the comparison can fail: rows as if they were independent
    low, high = wilson_interval([(margins > 0).sum()], [len(margins)])
    assert values["micro_high"] - values["micro_low"] > 1.2 * (high - low)


def test_the_intervals_by_hand():
    # three users, of 4, 2 and 2 rows: accuracies 1, .5, 0; micro 5 / 8
    ids = ["ann"] * 4 + ["bob"] * 2 + ["cat"] * 2
    result = per_user_table(ids, [1.0] * 5 + [-1.0] * 3, [0.0] * 8)
    t = stats.t.ppf(0.975, 2)
    assert mean_interval([1, 0.5, 0]) == pytest.approx((0.5 - t * 0.5 / 3**0.5, 0.5 + t * 0.5 / 3**0.5))
    assert (result.macro_low, result.macro_high) == (0, 1)  # clipped
    without = [1 / 4, 4 / 6, 5 / 6]
    error = math.sqrt(2 / 3 * sum((value - 5 / 8) ** 2 for value in without))
    low, high = jackknife_interval(5 / 8, without)
    assert (low, high) == pytest.approx((5 / 8 - t * error, 5 / 8 + t * error))
    assert (result.micro_low, result.micro_high) == (max(low, 0), min(high, 1))
    # of a mean, the jackknife is Student's t
    values = np.random.default_rng(0).normal(size=9)
    expected = stats.t.interval(0.95, 8, loc=values.mean(), scale=stats.sem(values))
    assert jackknife_interval(values.mean(), (values.sum() - values) / 8) == pytest.approx(expected)
    assert mean_interval(values) == pytest.approx(expected)
    assert jackknife_interval(0.5, [0.5]) == jackknife_interval(0.5, [0.5, math.nan]) == (None, None)
    # all users alike: nothing tells how others would differ
    same = per_user_table(["ann", "bob"] * 2, [1.0, 1.0, -1.0, -1.0], [0.0] * 4)
    assert (same.micro_low, same.micro_high, same.worst_tenth_low, same.worst_tenth_high) == (0.5,) * 4


def test_the_standard_error_of_the_worst_tenth_is_that_of_a_mean_of_a_tail():
    """With many users against the formula: var((q - x)+) / .1² / N, q the tenth's end."""
    draw = np.random.default_rng(5)
    accuracy = draw.beta(8, 4, 2000)
    ids = np.arange(2000).repeat(50).tolist()
    margins = (np.tile(np.arange(50), 2000) < np.round(accuracy * 50).repeat(50)) - 0.5
    result = per_user_table(ids, margins, np.zeros(len(ids)))
    shares = np.round(accuracy * 50) / 50
    error = np.std(np.maximum(np.quantile(shares, 0.1) - shares, 0)) / 0.1 / math.sqrt(2000)
    half = stats.t.ppf(0.975, 199) * error
    assert result.worst_tenth_high - result.worst_tenth == pytest.approx(half, rel=0.12)
    assert result.worst_tenth - result.worst_tenth_low == pytest.approx(half, rel=0.12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rewards_that_are_no_numbers_name_the_users(bad):
    with pytest.raises(NonFiniteError) as raised:
        per_user_table(["ann", "bob", "ann", "cat"], [0.0, bad, 0.0, 1.0], [1.0, 0.0, 1.0, bad])
    message = str(raised.value)
    assert "2 of 4 rows are NaN or infinite" in message and "'bob', 'cat', rows 1, 3" in message


def test_another_number_of_ids_than_of_rewards_is_refused():
    with pytest.raises(
        DataError, match=r"2 user ids, chosen rewards of shape \(3,\) and rejected rewards of shape \(3,\)"
    ):
        per_user_table(["ann", "bob"], np.zeros(3), np.zeros(3))
    with pytest.raises(DataError, match="0 user ids"):
        per_user_table([], [], [])


def test_the_result_prints_saves_and_gives_its_scalars(tmp_path):
    few = per_user_table(["ann", "b\x1b[31mob\n"], [1.0, 0.0], [0.0, 0.0])
    text = str(few)
    assert "2 users, 2 rows, 1 ties" in text and "mean over users 0.750 (95 % 0.000 to 1.000)" in text
    assert "over rows 0.750 (95 % 0.000 to 1.000)  worst tenth of users 0.500 (95 % 0.000 to 1.000)" in text
    assert r"'b\x1b[31mob\n'" in text and "\x1b" not in text  # no control characters from an id reach a terminal
    assert text.index("ob\\n") < text.index("'ann'")  # the worst first

    ids = [f"user{number:02}" for number in range(30)]
    many = per_user_table(ids * 2, [1.0] * 25 + [0.0] * 35, [0.5] * 60)
    many.unseen, many.dropped = 4, 7
    text = str(many)
    assert "4 rows of unseen users (common model), 7 rows too long and left out" in text
    worst, best = text.split("the worst five:")[1].split("the best five:")
    assert worst.count("'user") == best.count("'user") == 5 and "'user29'" in worst and "'user24'" in best
    assert many.as_dict()["worst_tenth"] == 0.0 and set(many.as_dict()) == set(vars(many)) - {"table"}

    path = many.to_parquet(tmp_path / "users" / "eval.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(path), many.table)


# -- with a model

USERS = ["ann", "bob", "cat"]


def moved(model, seed: int = 0):
    """`model` with every trainable parameter moved at random, so that users differ."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


def sharelora(arch: str = "llama", **arguments):
    config = ShareLoraConfig(task_type="SEQ_CLS", r=4, users=USERS, lora_dropout=0.5, **arguments)
    return moved(get_peft_model(tiny_model(arch), config))


def one_by_one(model_of, rows: list[dict]) -> pd.DataFrame:
    """The table made the slow way: one sequence per forward, no padding, with the plain model of each user."""
    credits: dict[str, list[float]] = {}
    for row in rows:
        model = model_of(row["user_id"]).eval()
        ids = tokenize_preference(row, tiny_tokenizer())
        with torch.no_grad():
            chosen, rejected = (
                model(input_ids=torch.tensor([ids[side]])).logits.item() for side in ("chosen_ids", "rejected_ids")
            )
        credits.setdefault(row["user_id"], []).append(1.0 if chosen > rejected else 0.0)
    return pd.DataFrame(
        {"user_id": list(credits), "n": map(len, credits.values()), "correct": [int(sum(c)) for c in credits.values()]}
    )


def forwards_of(model) -> list[int]:
    """Grows by the number of sequences at each forward of `model`."""
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return counts


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_row_is_scored_once_with_its_own_users_model(arch, conversational):
    model = sharelora(arch)
    rows = preference_rows(USERS, 41, seed=2, conversational=conversational)
    plain = {user_id: copy.deepcopy(model).merge_and_unload(user=user_id) for user_id in USERS}
    counts = forwards_of(model)
    result = evaluate_users(model, Dataset.from_list(rows), tiny_tokenizer(), batch_size=4)
    expected = one_by_one(plain.get, rows)
    pd.testing.assert_frame_equal(result.table[["user_id", "n", "correct"]], expected)
    assert (sum(counts), max(counts), result.n, result.ties) == (2 * 41, 8, 41, 0)
    # the comparison can fail: with the others' models the table is another
    others = one_by_one(lambda user_id: plain[USERS[(USERS.index(user_id) + 1) % 3]], rows)
    assert others["correct"].tolist() != expected["correct"].tolist()


def test_batches_formats_and_column_names_do_not_matter():
    model, tokenizer = sharelora(), tiny_tokenizer()
    rows = preference_rows(USERS, 30, seed=3)
    expected = evaluate_users(model, Dataset.from_list(rows), tokenizer)
    assert evaluate_users(model, Dataset.from_list(rows), tokenizer, batch_size=1).table.equals(expected.table)
    assert evaluate_users(model, Dataset.from_list(rows).with_format("torch"), tokenizer).table.equals(expected.table)
    shuffled = evaluate_users(model, Dataset.from_list(rows).shuffle(seed=0), tokenizer)
    assert shuffled.table.equals(expected.table)  # in the order of the registry
    tokenized = [{"labeller": row["user_id"], **tokenize_preference(row, tokenizer)} for row in rows]
    assert evaluate_users(model, Dataset.from_list(tokenized), tokenizer, "labeller").table.equals(expected.table)


def test_the_mode_of_every_module_is_left_as_it_was_and_dropout_is_off():
    model, tokenizer = sharelora(), tiny_tokenizer()
    dataset = Dataset.from_list(preference_rows(USERS, 12))
    expected = evaluate_users(model.eval(), dataset, tokenizer)
    assert not any(module.training for module in model.modules())
    model.train()
    model.base_model.model.score.eval()
    before = [module.training for module in model.modules()]
    found = evaluate_users(model, dataset, tokenizer)
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2
    assert found.ece == expected.ece  # a function of all rewards: lora_dropout=0.5 would show
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_restored_after_a_failure():
    model = sharelora().train()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="'ann', 'bob', 'cat'"):
        evaluate_users(model, Dataset.from_list(preference_rows(USERS, 6)), tiny_tokenizer())
    assert all(module.training for module in model.modules())


def test_a_ruined_user_is_named_alone():
    model = sharelora()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and len(parameter) == len(USERS) and parameter.ndim == 3:
                parameter[1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"2 of 6 rows .* user\(s\) 'bob', rows 1, 4\."):
        evaluate_users(model, Dataset.from_list(preference_rows(USERS, 6)), tiny_tokenizer())


def test_unseen_users_are_refused_before_any_forward():
    model = sharelora()
    counts = forwards_of(model)
    rows = preference_rows([*USERS, "zoe", "yan"], 20)
    with pytest.raises(UnknownUserError) as raised:
        evaluate_users(model, Dataset.from_list(rows), tiny_tokenizer())
    assert "2 unknown user(s): 'zoe', 'yan'" in str(raised.value) and 'unseen="common"' in str(raised.value)
    assert counts == []
    with pytest.raises(ConfigError, match="unseen='mean' is unknown; one of 'raise', 'common'"):
        evaluate_users(model, Dataset.from_list(rows), tiny_tokenizer(), unseen="mean")


def test_unseen_users_get_the_common_model_and_are_counted_and_logged(caplog):
    model = sharelora()
    plain = {user_id: copy.deepcopy(model).merge_and_unload(user=user_id) for user_id in USERS}
    common = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in common.parameters():
            if parameter.requires_grad and len(parameter) == len(USERS) and parameter.ndim == 3:
                parameter.zero_()
    common = common.merge_and_unload(user="ann")
    rows = preference_rows(["zoe", "cat", "yan", "ann"], 40, seed=5)
    with caplog.at_level(logging.WARNING, "trl_sharelora.evaluation"):
        result = evaluate_users(model, Dataset.from_list(rows), tiny_tokenizer(), unseen="common", batch_size=3)
    expected = one_by_one(lambda user_id: plain.get(user_id, common), rows).set_index("user_id")
    assert result.table["user_id"].tolist() == ["ann", "cat", "zoe", "yan"]
    assert result.table["correct"].tolist() == expected.loc[["ann", "cat", "zoe", "yan"], "correct"].tolist()
    assert (result.unseen, result.n) == (20, 40)
    [record] = caplog.records
    assert "20 of 40 evaluation rows are of 2 users whom the adapter does not know" in record.getMessage()


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_for_a_model_without_users_they_only_group_the_rows(kind):
    model = tiny_model("llama")
    if kind == "lora":
        model = moved(get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4)))
    rows = preference_rows(["zoe", "ann"], 25, seed=7)
    result = evaluate_users(model, Dataset.from_list(rows), tiny_tokenizer(), batch_size=4)
    pd.testing.assert_frame_equal(result.table[["user_id", "n", "correct"]], one_by_one(lambda _: model, rows))
    assert result.unseen == 0


def test_a_base_in_bfloat16_is_scored():
    config = ShareLoraConfig(task_type="SEQ_CLS", r=4, users=USERS)
    model = moved(get_peft_model(tiny_model("llama").to(torch.bfloat16), config))
    result = evaluate_users(model, Dataset.from_list(preference_rows(USERS, 30)), tiny_tokenizer())
    assert (result.n, result.ties) == (30, 0)


def test_too_long_rows_are_left_out_and_counted(caplog):
    model, tokenizer = sharelora(), tiny_tokenizer()
    rows = preference_rows(USERS, 30, seed=4)
    length = [max(map(len, tokenize_preference(row, tokenizer).values())) for row in rows]
    limit = sorted(length)[20]
    kept = [row for row, n in zip(rows, length, strict=True) if n <= limit]
    with caplog.at_level(logging.WARNING, "trl_sharelora.data"):
        result = evaluate_users(model, Dataset.from_list(rows), tokenizer, max_length=limit)
    assert result.dropped == 30 - len(kept) > 0
    assert f"{result.dropped} of 30 rows of the evaluation dataset are longer than max_length={limit}" in caplog.text
    assert result.table.equals(evaluate_users(model, Dataset.from_list(kept), tokenizer).table)
    with pytest.raises(DataError, match="All rows of 3 of 3 users in the evaluation dataset are longer"):
        evaluate_users(model, Dataset.from_list(rows), tokenizer, max_length=3)


def test_rows_beyond_the_models_positions_are_refused_with_the_remedy():
    model = sharelora("gpt2")
    rows = preference_rows(USERS, 6)
    rows[4]["chosen"] = "w1 " * MAX_POSITIONS
    with pytest.raises(DataError) as raised:
        evaluate_users(model, Dataset.from_list(rows), tiny_tokenizer())
    message = str(raised.value)
    assert f"1 evaluation rows have more tokens than the model has positions ({MAX_POSITIONS})" in message
    assert "row 4" in message and f"Give max_length={MAX_POSITIONS}" in message
    result = evaluate_users(model, Dataset.from_list(rows), tiny_tokenizer(), max_length=MAX_POSITIONS)
    assert (result.dropped, result.n) == (1, 5)


def test_bad_rows_are_refused_before_any_forward():
    model = sharelora()
    counts = forwards_of(model)
    rows = preference_rows(USERS, 6)
    rows[2]["chosen"] = ""
    with pytest.raises(DataError, match="The evaluation dataset cannot be used: `chosen` is empty: row 2"):
        evaluate_users(model, Dataset.from_list(rows), tiny_tokenizer())
    with pytest.raises(DataError, match="There is no column 'user'.*Did you mean 'user_id'"):
        evaluate_users(model, Dataset.from_list(preference_rows(USERS, 6)), tiny_tokenizer(), user_column="user")
    assert counts == []


def test_a_model_that_would_be_read_at_the_wrong_token_is_refused():
    rows, tokenizer = Dataset.from_list(preference_rows(USERS, 6)), tiny_tokenizer()
    model = sharelora()
    model.config.pad_token_id = 5
    with pytest.raises(ConfigError, match="pad token has the id 0, the model's config says 5; .* wrong token"):
        evaluate_users(model, rows, tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(
        ConfigError, match="pad token has the id None.*processing_class.pad_token = processing_class.eos_token"
    ):
        evaluate_users(sharelora(), rows, tokenizer)


def test_a_model_of_two_outputs_and_no_batch_at_all_are_refused():
    rows = Dataset.from_list(preference_rows(USERS, 6))
    with pytest.raises(ConfigError, match="num_labels=2; a reward model has one output"):
        evaluate_users(tiny_model("llama", num_labels=2), rows, tiny_tokenizer())
    with pytest.raises(ConfigError, match="batch_size=0 came"):
        evaluate_users(tiny_model("llama"), rows, tiny_tokenizer(), batch_size=0)
