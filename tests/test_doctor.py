"""The data doctor: every planted fault is found and clean data are clean; statistics against textbooks and slow loops; the gain
against logs whose truth is known."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from scipy.optimize import approx_fprime, minimize
from scipy.special import expit

from trl_sharelora import cli
from trl_sharelora.demo import generator
from trl_sharelora.doctor import (
    ARTEFACTS,
    STRICT,
    DataReport,
    Finding,
    _cross_validated,
    _fit_population,
    _held_out,
    _interval_of_mean,
    _Log,
    _modes,
    _padded,
    _probe,
    agreement,
    check_data,
    fit_logistic,
    hard_limit,
)
from trl_sharelora.errors import ConfigError, DataError


WORDS = "oak elm ash fir yew box bay fig hop ivy rye oat tea pea rue nut".split()


def clean_log(users: int = 6, each: int = 60, seed: int = 0) -> list[dict]:
    """Comparisons without any system: each pair is new, all replies are of one form, labels are drawn by coins."""
    draw = random.Random(seed)
    rows = []
    for user in range(users):
        for number in range(each):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))).capitalize() + "." for _ in range(2)]
            rows.append(
                {
                    "user_id": f"user {user}",
                    "prompt": f"Question {user} {number}?",
                    "chosen": texts[0],
                    "rejected": texts[1],
                }
            )
    return rows


def examine(rows: list[dict], **arguments):
    return check_data(Dataset.from_list(rows), **{"gain": False, **arguments})


def the(report, kind: str) -> Finding:
    (finding,) = [finding for finding in report.findings if finding.kind == kind]
    return finding


# -- clean data, and what every report says


@pytest.mark.parametrize("seed", range(5))
def test_clean_data_are_clean(seed):
    report = examine(clean_log(seed=seed))
    assert report.status == 0 and not report.findings
    assert (report.n_rows, report.n_users) == (360, 6)
    assert report.comparisons["min"] == report.comparisons["max"] == report.comparisons["median"] == 60
    assert report.comparisons["under_10"] == report.comparisons["under_50"] == 0
    assert report.agreement is None
    for probe in ("length", "layout", "artefacts", "shuffled labels"):
        assert report.probes[probe]["low"] <= 0.5 <= report.probes[probe]["high"]
    assert "=> clean (status 0)" in str(report)


def test_clean_conversations_are_clean():
    rows = clean_log()
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": row[side]}]
    report = examine(rows)
    assert report.status == 0 and not report.findings


def test_comparisons_per_user_are_counted():
    rows = [row for n, count in enumerate((5, 9, 10, 49, 50, 77)) for row in clean_log(6, 77)[n * 77 : n * 77 + count]]
    found = examine(rows).comparisons
    assert (found["min"], found["max"], found["median"]) == (5, 77, 29.5)
    assert (found["under_10"], found["under_50"]) == (2, 4)
    assert found["q25"] == np.quantile([5, 9, 10, 49, 50, 77], 0.25)
    assert "few comparisons" not in examine(rows).kinds()
    assert the(examine(rows[:24]), "few comparisons").level == "note"


# -- schema and ids


def test_rows_that_training_refuses_are_named_and_the_rest_is_examined():
    rows = clean_log()
    rows[7]["chosen"] = ""
    rows[9]["rejected"] = rows[9]["chosen"]
    report = examine(rows)
    assert report.status == 2 and report.kinds() == ["schema"]
    assert "row 7" in the(report, "schema").message and "row 9" in the(report, "schema").message
    assert report.n_rows == 360 and report.comparisons["min"] == 58


def test_columns_that_are_not_there():
    rows = [{"worker": row["user_id"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in clean_log()]
    report = examine(rows)
    assert report.status == 2 and "There is no column 'user_id'" in the(report, "schema").message
    assert examine(rows, user_column="worker").status == 0
    with pytest.raises(ConfigError, match="position_column='place'"):
        examine(rows, user_column="worker", position_column="place")


def test_nothing_usable():
    report = examine([{"user_id": None, "chosen": "a", "rejected": "b"}])
    assert report.status == 2 and report.n_users == 0
    with pytest.raises(DataError, match="There is no file"):
        check_data("absent.jsonl")


@pytest.mark.parametrize(
    ("one", "two", "twins"),
    [
        ("user 0", "User 0", True),
        ("user 0", " user 0", True),
        ("user 0", "user  0", True),
        ("7", "007", True),
        ("é", "É", True),
        ("７", "7", True),
        ("user 0", "user-0", False),
        ("7", "70", False),
    ],
)
def test_ids_that_are_probably_one_person(one, two, twins):
    rows = clean_log()
    for row in rows:
        row["user_id"] = {"user 0": one, "user 1": two}.get(row["user_id"], row["user_id"])
    report = examine(rows)
    assert report.kinds() == (["ids"] if twins else [])
    if twins:
        finding = the(report, "ids")
        assert repr(one) in finding.message and repr(two) in finding.message
        assert finding.count == 120 and finding.rows == list(range(20))


@pytest.mark.parametrize(
    ("ids", "found"), [("1.0", True), ("1.2e16", True), (".5", True), ("12", False), ("v1.0", False)]
)
def test_ids_that_went_through_numbers(ids, found):
    rows = clean_log()
    for row in rows[:60]:
        row["user_id"] = ids
    report = examine(rows)
    assert report.kinds("warning") == (["ids"] if found else [])
    if found:
        assert "dtype=str" in the(report, "ids").message and the(report, "ids").count == 60


def test_row_ids_for_users_and_a_single_user():
    rows = clean_log()
    single = examine([{**row, "user_id": "ann"} for row in rows])
    assert "nothing is there to personalise" in the(single, "ids").message
    each = examine([{**row, "user_id": f"r{number}"} for number, row in enumerate(rows)])
    assert "Does the column name rows" in the(each, "ids").message


# -- repeats


def test_repeated_answers_and_contradictions_of_a_user():
    rows = clean_log()
    rows += [dict(rows[3]), dict(rows[3]), dict(rows[5])]
    turned = {**rows[10], "chosen": rows[10]["rejected"], "rejected": rows[10]["chosen"]}
    rows.append(turned)
    report = examine(rows)
    assert report.status == 1 and report.kinds() == ["duplicates", "contradictions"]
    duplicates = the(report, "duplicates")
    assert duplicates.rows == [360, 361, 362] and duplicates.count == 3
    contradictions = the(report, "contradictions")
    assert contradictions.rows == [10, 363] and contradictions.message.startswith("1 of 3 pairs")
    # two users of other opinions contradict nobody
    assert examine([*clean_log(), {**turned, "user_id": "user 1"}]).status == 0


def votes_log(users: int = 12, statements: int = 40, seed: int = 0) -> list[dict]:
    """Each user votes on statements by a coin, and every liked one is paired with several disliked ones."""
    draw = random.Random(seed)
    texts = [f"{WORDS[n % 16].capitalize()} {WORDS[n // 16]} number {n}." for n in range(statements)]
    rows = []
    for user in range(users):
        liked = [text for text in texts if draw.random() < 0.5]
        disliked = [text for text in texts if text not in liked]
        pairs = [(one, two) for one in liked for two in disliked]
        rows += [{"user_id": f"u{user}", "chosen": one, "rejected": two} for one, two in draw.sample(pairs, 80)]
    return rows


def test_pairs_that_are_made_of_votes_are_told_from_comparisons():
    assert the(examine(votes_log()), "made of votes").level == "note"
    draw = random.Random(1)
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if draw.random() < 0.1 else row
        for row in votes_log()
    ]
    assert "made of votes" not in examine(turned).kinds()


# -- overlap


def test_overlap_of_splits():
    rows = clean_log()
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 60 >= 50 else "train"
    report = examine(rows)
    assert report.status == 0 and report.kinds() == ["seen items"]
    assert (
        "0% have a prompt of 'train' (100% it or a near-duplicate), 0% are a pair of 'train', 0% have a reply"
        in the(report, "seen items").message
    )
    known = {**rows[4], "split": "test"}
    turned = {**rows[6], "chosen": rows[6]["rejected"], "rejected": rows[6]["chosen"], "split": "test"}
    near = {**rows[8], "chosen": rows[8]["chosen"].upper() + "!!", "split": "test"}
    other = {**rows[9], "user_id": "user 3", "split": "test"}
    report = examine([*rows, known, turned, near, other])
    assert the(report, "overlap").rows == [360, 361] and the(report, "near overlap").rows == [362]
    # of 64 test rows, four have a prompt of train, three the pair; the reply of another user does not count
    message = the(report, "seen items").message
    assert "6% have a prompt" in message and "5% are a pair" in message and "5% have a reply" in message
    # among the training rows alone nothing overlaps
    assert examine([{**row, "split": "train"} for row in rows]).status == 0


def test_near_duplicates_of_prompts_are_seen_across_splits():
    rows = [{**row, "split": "train"} for row in clean_log()]
    other = clean_log(seed=1)[:60]
    rows += [
        {**one, "prompt": row["prompt"].upper(), "split": "test"} for one, row in zip(other, rows[60:120], strict=True)
    ]
    assert (
        "of 'test', 0% have a prompt of 'train' (100% it or a near-duplicate)"
        in the(examine(rows), "seen items").message
    )


@pytest.mark.parametrize("names", [("Train", "Test"), (0, 1), ("test", "test")])
def test_splits_of_which_none_is_the_training_are_a_warning_and_their_gain_is_not_estimated(names):
    rows = [{**row, "split": names[number % 4 == 0]} for number, row in enumerate(demo_log(1.0)[0])]
    report = examine(rows, gain=True)
    finding = the(report, "overlap")
    assert finding.level == "warning" and "none is 'train'" in finding.message and report.status == 1
    assert report.gain.verdict == "cannot be told" and "'train'" in report.gain.why and report.gain.reached is None


def test_rows_of_no_split_are_left_out_of_all_unless_all_are_of_none():
    rows, _ = demo_log(1.0)
    without = examine(rows, gain=True)
    assert examine([{**row, "split": None} for row in rows], gain=True).gain == without.gain
    half = [{**row, "split": "train" if number % 2 else None} for number, row in enumerate(rows)]
    report = examine(half, gain=True)
    assert report.gain.tested < without.gain.tested and report.gain == examine(half[1::2], gain=True).gain
    assert the(report, "no split").count == len(rows) // 2 and report.status == 0


def test_a_column_that_is_named_and_not_there_is_an_error():
    for argument in ("split_column", "position_column"):
        with pytest.raises(ConfigError, match=f"{argument}='spilt' came; the columns are 'user_id'"):
            examine(clean_log(2, 20), **{argument: "spilt"})


# -- leaks


def plant(kind: str, text: str) -> str:
    return {
        "is a list or a record written as text": f"['{text}']",
        "is in quotes": f'"{text}"',
        "starts with white space": " " + text,
        "ends with white space": text + "\n",
        "ends with an end token": text + "</s>",
        "has a special token": "<|im_start|>" + text,
        "has escaped line breaks": text.replace(" ", "\\n", 1),
        "has carriage returns": text.replace(" ", "\r\n", 1),
        "has double spaces or tabs": text.replace(" ", "  ", 1),
        "has a space before punctuation": text.replace(".", " ."),
        "has HTML": text.replace(" ", "&nbsp;", 1),
        "has typographic quotes or dashes": text.replace(" ", " – ", 1),
        "has broken or invisible characters": text.replace(" ", "\u200b ", 1),
        "is cut off with dots": text[:-1] + "...",
        "ends with punctuation": text[:-1],
        "starts with a capital": text.lower(),
        "is not in Unicode form NFC": text.replace("a", "a\u0301", 1) + "a\u0301",
    }[kind]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("kind", ARTEFACTS)
def test_each_artefact_on_one_side_is_a_leak_and_is_named(kind, side):
    rows = clean_log()
    for row in rows:
        row[side] = plant(kind, row[side])
    report = examine(rows)
    assert report.status == 1 and the(report, "leak").level == "warning"
    assert report.probes["artefacts"]["accuracy"] > 0.95
    named = [line for line in report.probes["artefacts"]["features"] if line["name"] == kind]
    assert named and named[0]["pairs"] >= 350
    has_more = (
        side == "chosen" if kind not in ("ends with punctuation", "starts with a capital") else side == "rejected"
    )
    assert named[0]["chosen_has_more"] == float(has_more)
    assert kind in the(report, "leak").message or named[0]["tells"] == 0.5
    # the self-test holds on leaky data as well
    assert report.probes["shuffled labels"]["low"] <= 0.5 <= report.probes["shuffled labels"]["high"]


@pytest.mark.parametrize("kind", ARTEFACTS)
def test_an_artefact_on_both_sides_is_no_leak(kind):
    rows = clean_log()
    draw = random.Random(0)
    for row in rows:
        for side in ("chosen", "rejected"):
            if draw.random() < 0.5:
                row[side] = plant(kind, row[side])
    assert examine(rows).kinds("warning") == []


def test_a_rare_artefact_that_always_goes_one_way_is_a_leak():
    rows = clean_log()
    for row in rows[::12]:
        row["rejected"] += "<|endoftext|>"
    report = examine(rows)
    finding = the(report, "leak")
    # an end token is a special token too
    assert "in 30 pairs" in finding.message and "rejected one in 100%" in finding.message
    assert finding.count == 30 and finding.rows == list(range(0, 240, 12))
    # 17 pairs are too few to be sure of "always"
    assert examine(rows[:200]).kinds() == ["format"]


def test_lists_against_text():
    rows = clean_log()
    for row in rows:
        row["rejected"] = [{"role": "assistant", "content": row["rejected"]}]
    report = examine(rows)
    assert report.status == 2
    finding = the(report, "leak")
    assert finding.level == "unusable" and finding.count == 360
    assert "str against list in 360 rows" in finding.message


def test_a_prompt_that_shows_the_replies_in_the_order_of_the_label():
    rows = clean_log()
    for row in rows:
        row["prompt"] += f" A: {row['chosen']} B: {row['rejected']}"
    assert "comes first in the prompt" in the(examine(rows), "leak").message
    draw = random.Random(0)
    for row in (rows := clean_log()):
        first, second = draw.sample([row["chosen"], row["rejected"]], 2)
        row["prompt"] += f" A: {first} B: {second}"
    assert examine(rows).status == 0


def test_length_alone_is_told_and_is_a_leak_only_where_it_tells_nearly_all():
    rows = clean_log()
    for number, row in enumerate(rows):
        longer = sorted((row["chosen"], row["rejected"]), key=len, reverse=True)
        row["chosen"], row["rejected"] = longer if number % 5 else longer[::-1]
    rows = [row for row in rows if len(row["chosen"]) != len(row["rejected"])]
    report = examine(rows)
    assert report.status == 0 and 0.75 < report.probes["length"]["accuracy"] < 0.85
    assert "length alone: right in " in str(report)
    cut = [{**row, "rejected": " ".join(row["rejected"].split()[:3]) + "."} for row in clean_log()]
    finding = the(examine(cut), "leak")
    assert finding.level == "warning" and "length alone tells which reply was chosen in 100.0%" in finding.message
    bold = [{**row, "chosen": row["chosen"].replace(" ", " **", 1).replace(".", "**.")} for row in clean_log()]
    assert "length and layout" in the(examine(bold), "leak").message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"role": "model"}, "has the role 'model'"),
        ({"name": "a"}, "has the key 'name'"),
        ({"content": [{"type": "text", "text": "Oak elm."}]}, "has content in blocks"),
    ],
)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_how_messages_are_written_down_on_one_side_is_a_leak(change, named, side):
    rows = clean_log()
    for row in rows:
        for one in ("chosen", "rejected"):
            message = {"role": "assistant", "content": row[one]}
            row[one] = [message]
        (message,) = row[side]
        if "content" in change:
            change = {"content": [{"type": "text", "text": message["content"]}]}
        row[side] = [message | change]
    log = _Log(rows, list(range(len(rows))), "user_id")
    report = DataReport("log", len(rows))
    _probe(log, 0, report)
    finding = the(report, "leak")
    assert named in finding.message and f"it is the {side} one in 100%" in finding.message


def test_a_leak_is_found_in_a_log_with_few_prompts():
    rows = clean_log()
    for number, row in enumerate(rows):
        row["prompt"] = f"Question {number % 5}?"
        row["chosen"] += "</s>"
    assert "ends with an end token" in the(examine(rows), "leak").message


def test_a_format_that_tells_a_little_is_no_more_than_that():
    rows = clean_log(users=10, each=100)
    draw = random.Random(0)
    for row in rows:
        if draw.random() < 0.35:
            side = "rejected" if draw.random() < 0.7 else "chosen"
            row[side] = row[side][:-1]
    report = examine(rows)
    assert report.kinds() == ["format"]
    probe = report.probes["artefacts"]
    assert 0.5 < probe["low"] < probe["accuracy"] < 0.6 and "ends with punctuation" in the(report, "format").message


def test_the_place_where_the_chosen_reply_was_shown():
    rows = [{**row, "shown": "left" if number % 10 < 7 else "right"} for number, row in enumerate(clean_log())]
    finding = the(examine(rows, position_column="shown"), "position")
    assert finding.level == "warning" and "'left' was chosen in 70.0%" in finding.message
    assert examine(rows).status == 0
    fair = [{**row, "shown": ("left", "right")[number % 2]} for number, row in enumerate(clean_log())]
    assert not examine(fair, position_column="shown").findings
    three = [{**row, "shown": number % 3} for number, row in enumerate(clean_log())]
    assert the(examine(three, position_column="shown"), "position").level == "note"
    always = the(examine([{**row, "shown": "left"} for row in clean_log()], position_column="shown"), "position")
    assert always.level == "warning" and "one place was always chosen" in always.message


def test_too_few_items_for_a_probe():
    rows = [{**row, "prompt": "one"} for row in clean_log(2, 4)]
    report = examine(rows)
    assert the(report, "probes").level == "note" and not report.probes


# -- the probe itself


def test_logistic_regression_is_the_minimum_of_its_loss():
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((80, 4)), rng.random(80)
    y = (rng.random(80) < expit(x @ [2, -1, 0, 0.5])).astype(float)

    def loss(b):
        return (weights * np.logaddexp(0, -(2 * y - 1) * (x @ b))).sum() + 0.7 / 2 * b @ b

    expected = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(fit_logistic(x, y, weights, ridge=0.7), expected, atol=1e-5)


def test_a_logistic_regression_whose_newton_steps_are_too_long_is_held():
    x = np.concatenate([np.full(50, 1.0), [40.0, -40.0]])[:, None]
    y = np.concatenate([np.ones(50), [0.0, 1.0]])

    def slope(b):
        return x[:, 0] @ (y - expit(x[:, 0] * b)) - 1.0 * b

    found = fit_logistic(x, y)[0]
    assert abs(slope(found)) < 1e-5


def test_held_out_rows_are_not_seen():
    # a feature that is the row's own number tells everything in sample, nothing out of it
    rng = np.random.default_rng(1)
    y = rng.integers(2, size=200).astype(float)
    credit = _cross_validated(np.eye(200), y, rng.integers(5, size=200))
    assert (credit == 0.5).all()
    told = _cross_validated((2 * y - 1)[:, None], y, rng.integers(5, size=200))
    assert (told == 1).all()
    assert (_cross_validated(np.zeros((200, 2)), y, rng.integers(5, size=200)) == 0.5).all()


def test_an_interval_widens_with_clusters():
    rng = np.random.default_rng(2)
    own = rng.integers(2, size=400).astype(float)
    rows = np.arange(400)
    mean, low, high = _interval_of_mean(own, (rows,), STRICT)
    assert high - mean == pytest.approx(2.5758 * own.std() / 20, rel=1e-4) and mean - low == pytest.approx(high - mean)
    # each value four times over, known as one cluster: as if there were 100
    four = np.repeat(own[:100], 4)
    wide = _interval_of_mean(four, (rows, rows // 4), 0.95)
    assert wide[2] - wide[0] == pytest.approx(1.95996 * own[:100].std() / 10, rel=1e-4)


# -- agreement


def votes(table: dict[str, list[int]]):
    """`user -> vote on pair 0, 1, ...` (None for none) as the arguments of `agreement`."""
    rows = [(user, f"pair {n}", bool(v)) for user, own in table.items() for n, v in enumerate(own) if v is not None]
    users, pairs, sides = zip(*rows, strict=True)
    return users, pairs, np.array(sides)


def test_krippendorffs_own_example():
    # Krippendorff (2011), "Computing Krippendorff's alpha-reliability", A: binary data, two observers, alpha = 0.095
    found = agreement(*votes({"Meg": [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], "Owen": [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]}))
    assert found["alpha"] == pytest.approx(0.095, abs=5e-4) and found["raw"] == 0.6 and found["pairs"] == 10
    assert found["alpha_low"] < found["alpha"] < found["alpha_high"] and found["repeats"] == 0


def test_agreement_by_hand():
    # pair 0: 3 to 1; pair 1: 2 to 0; pair 2: one judge only
    found = agreement(*votes({"a": [1, 0, 1], "b": [1, 0, None], "c": [1, None, None], "d": [0, None, None]}))
    # pairs of judges who agree: 3 of 6, 1 of 1
    assert found["raw"] == pytest.approx((0.5 + 1) / 2) and found["pairs"] == 2
    # majority of the others: for each of the three 2 to 1, for the one 0 to 3; for either of the two 1 to 0
    assert found["others"] == pytest.approx((3 / 4 + 1) / 2)
    assert found["majority"] == pytest.approx((3 / 4 + 1) / 2)
    even = agreement(*votes({"a": [1], "b": [0]}))
    assert (even["raw"], even["others"], even["majority"]) == (0, 0, 0.5)
    assert agreement(*votes({"a": [1, 1], "b": [None, None]})) is None


def test_a_user_who_answers_again_is_one_vote_and_tells_his_consistency():
    users = ["a"] * 3 + ["b"] + ["c"] * 2
    found = agreement(users, ["p"] * 6, np.array([True, True, False, True, True, False]))
    # an answer of each: a is True with 2/3, b always, c with 1/2; two users agree with 2/3 (a, b), 1/2 (a, c), 1/2 (b, c)
    assert found["raw"] == pytest.approx(5 / 9) and found["users_per_pair"] == 3
    # the majority of the others is True for each of them
    assert found["others"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    # two of a's answers agree in one of three ways to draw them, c's never
    assert found["repeats"] == 2 and found["consistency"] == pytest.approx((1 / 3 + 0) / 2)


def test_the_report_compares_users_on_the_same_pairs():
    rows = clean_log(1, 80)
    like = [{**row, "user_id": "like"} for row in rows]
    unlike = [{**row, "user_id": "unlike", "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert examine(rows + like).agreement["raw"] == 1 and examine(rows + unlike).agreement["raw"] == 0
    found = examine(rows + like[:40] + unlike[40:])
    assert found.agreement["raw"] == 0.5 and found.agreement["pairs"] == 80
    assert "agreement of two users on a shared pair: 50.0%" in str(found)


def test_the_hard_limit():
    found = {"others": 0.7, "repeats": 0, "consistency": None}
    assert hard_limit(None) is None and hard_limit(found) == pytest.approx(0.3)
    # who repeats himself with .82 = .9² + .1² is predictable to .9 at most
    assert hard_limit({**found, "repeats": 30, "consistency": 0.82}) == pytest.approx(0.2)
    assert hard_limit({**found, "repeats": 29, "consistency": 0.82}) == pytest.approx(0.3)
    assert hard_limit({**found, "others": 0.2}) == pytest.approx(0.5)
    assert hard_limit({**found, "others": 0.95, "repeats": 50, "consistency": 0.6}) == 0


def test_the_bounds_hold_on_votes_of_known_probabilities():
    rng = np.random.default_rng(0)
    q = rng.beta(1, 1, (40, 300))  # user, pair: probability of A; tastes with nothing in common but a tilt of the pair
    q = (q + rng.beta(0.5, 0.5, 300)) / 2
    users, pairs = np.nonzero(np.ones_like(q))
    sides = rng.random(q.size) < q[users, pairs]
    again = rng.random(q.size) < q[users, pairs]
    found = agreement(
        [*map(str, users), *map(str, users)], [*map(str, pairs), *map(str, pairs)], np.concatenate([sides, again])
    )
    common = np.maximum(q.mean(0), 1 - q.mean(0)).mean()
    personal = np.maximum(q, 1 - q).mean()
    assert found["repeats"] == q.size and found["consistency"] == pytest.approx((q**2 + (1 - q) ** 2).mean(), abs=0.01)
    assert found["consistency"] <= personal <= (1 + np.sqrt(2 * found["consistency"] - 1)) / 2
    single = agreement([*map(str, users)], [*map(str, pairs)], sides)
    assert single["others"] < common < single["majority"]
    assert hard_limit(found) > personal - common


# -- the hierarchical logit


def test_modes_are_the_minima_of_each_users_loss():
    rng = np.random.default_rng(0)
    of = np.repeat([0, 1, 2], [5, 12, 3])
    x, y, weights = rng.standard_normal((20, 3)), rng.integers(2, size=20).astype(float), rng.random(20)
    mean, precision = rng.standard_normal(3), np.diag([1.0, 2.0, 4.0]) + 0.3
    w, spread = _modes(*_padded(of, 3, x, y, weights), mean, precision, np.tile(mean, (3, 1)), 12)
    for user in range(3):
        own = of == user

        def loss(b, own=own):
            fit = (weights[own] * np.logaddexp(0, -(2 * y[own] - 1) * (x[own] @ b))).sum()
            return fit + (b - mean) @ precision @ (b - mean) / 2

        expected = minimize(loss, mean, method="BFGS", options={"gtol": 1e-9}).x
        np.testing.assert_allclose(w[user], expected, atol=1e-5)
        curvature = approx_fprime(w[user], lambda b: approx_fprime(b, loss, 1e-5), 1e-4)  # noqa: B023 (used at once)
        np.testing.assert_allclose(np.linalg.inv(spread[user]), curvature, atol=0.02)


def test_em_finds_the_spread_of_the_users():
    rng = np.random.default_rng(1)
    n_users, n, true = 300, 60, np.diag([1.5, 0.1])
    w = rng.multivariate_normal([1.0, -0.5], true, n_users)
    x = rng.standard_normal((n_users, n, 2))
    y = (rng.random((n_users, n)) < expit(np.einsum("und,ud->un", x, w))).astype(float)
    mean, covariance = _fit_population(x, y, np.ones((n_users, n)), np.zeros(2))
    np.testing.assert_allclose(mean, [1.0, -0.5], atol=0.25)
    assert covariance[0, 0] == pytest.approx(1.5, rel=0.25) and covariance[1, 1] == pytest.approx(0.1, abs=0.07)


def test_held_out_means_both_replies_and_training_means_neither():
    rng = np.random.default_rng(0)
    n, texts = 400, 40
    block = rng.standard_normal((texts, 3))
    a, b, y = rng.integers(texts, size=n), rng.integers(texts, size=n), rng.integers(2, size=n).astype(float)
    fold_a, fold_b = rng.integers(4, size=(2, n))
    of = rng.integers(10, size=n)
    arguments = ([block, np.zeros((texts, 1))], a, b, y, of, np.ones(n), fold_a, fold_b)
    right = _held_out(*arguments)
    np.testing.assert_array_equal(~np.isnan(right[0]), fold_a == fold_b)
    # labels of rows between two folds are used for the training of the two others only
    fold = 0
    touching = (fold_a == fold) ^ (fold_b == fold)
    changed = np.where(touching, 1 - y, y)
    test = (fold_a == fold) & (fold_b == fold)
    again = _held_out(*arguments[:3], changed, *arguments[4:])
    np.testing.assert_array_equal(again[0, test], right[0, test])
    assert (right[2][fold_a == fold_b] >= 0).all() and (right[4][fold_a == fold_b] >= -1e-12).all()


# -- the gain, on logs whose truth is known


def demo_log(scale: float, users: int = 24, seed: int = 1) -> tuple[list[dict], float]:
    """A log of the demo with tastes `scale` times as different, and the true gain of knowing them."""
    rng = np.random.default_rng(seed)
    people = generator.make_users(users, 40, 150, rng)
    mean = np.mean([user.weights for user in people], axis=0)
    people = [replace(user, weights=mean + scale * (user.weights - mean)) for user in people]
    rows = generator.make_log(people, 0, rng)
    pairs = [rng.integers(12) for _ in range(4000)]
    differences = np.array([np.subtract(*(generator.make_reply(topic, rng)[1] for _ in "ab")) for topic in pairs])
    p = generator.preference_probability(differences @ np.array([user.weights for user in people]).T)
    best_common = np.maximum(p.mean(axis=1), 1 - p.mean(axis=1)).mean()
    return rows, float(np.maximum(p, 1 - p).mean() - best_common)


@pytest.mark.parametrize(("scale", "verdict"), [(0.0, "nothing seen"), (0.3, "something"), (1.0, "something")])
def test_the_gain_is_told_where_it_is_known(scale, verdict):
    rows, truth = demo_log(scale)
    report = examine(rows, gain=True)
    gain = report.gain
    assert report.status == 0 and gain.verdict == verdict and gain.users == 24 and gain.tested == len(rows)
    assert gain.at_most_low - 0.005 <= truth <= gain.at_most_high
    assert gain.reached_low <= gain.reached <= gain.reached_high and gain.reached <= gain.at_most + 1e-12
    assert gain.limit is None and "no limit that holds" in gain.why
    assert f"what personalisation can gain: {verdict}" in str(report)


def test_the_gain_is_gone_when_users_are_swapped():
    rows, _ = demo_log(1.0)
    users = random.Random(0).sample([row["user_id"] for row in rows], len(rows))
    gain = examine([{**row, "user_id": user} for row, user in zip(rows, users, strict=True)], gain=True).gain
    assert gain.verdict == "nothing seen" and gain.at_most < 0.01 and gain.at_most_high < 0.04


def test_votes_of_a_coin_are_not_predicted_from_themselves():
    # 45 users, so that coordinates from votes are used; a plain split by row would "predict" each vote from its other pairs
    rows = votes_log(users=45)
    gain = examine(rows, gain=True).gain
    assert gain.verdict == "nothing seen" and abs(gain.reached) < 0.02
    assert gain.tested < 0.4 * len(rows)


def test_copies_of_comparisons_are_no_evidence():
    rng = np.random.default_rng(1)
    rows = generator.make_log(generator.make_users(24, 20, 60, rng), 0, rng)
    once, twice = (examine(given, gain=True).gain for given in (rows, rows + rows))
    # as much is missing as before, and more, since fewer comparisons are left to train on
    assert twice.at_most - twice.reached > once.at_most - once.reached > 0.01


def test_groups_of_voters_are_found_by_their_votes():
    # two parties who vote alike, on statements whose words say nothing
    draw = random.Random(0)
    texts = [f"{WORDS[n % 16].capitalize()} {WORDS[n // 16]} number {n}." for n in range(40)]
    party = {text: n % 2 for n, text in enumerate(texts)}
    rows = []
    for user in range(60):
        likes = {text: (party[text] == user % 2) != (draw.random() < 0.1) for text in texts}
        pairs = [(one, two) for one in texts for two in texts if likes[one] and not likes[two]]
        rows += [{"user_id": f"u{user}", "chosen": one, "rejected": two} for one, two in draw.sample(pairs, 60)]
    gain = examine(rows, gain=True).gain
    assert gain.verdict == "something" and gain.reached > 0.2 and gain.common < 0.65
    assert gain.limit is not None and gain.at_most <= gain.limit


def test_test_rows_stay_untouched_and_too_little_data_is_said():
    rows, _ = demo_log(1.0)
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 4 == 0 else "train"
    gain = examine(rows, gain=True).gain
    other = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if row["split"] == "test" else row
        for row in rows
    ]
    assert examine(other, gain=True).gain == gain
    for few in (clean_log(4, 60), clean_log(30, 9), clean_log(6, 30)):
        gain = examine(few, gain=True).gain
        assert gain.verdict == "cannot be told" and gain.reached is None and "at least 5" in gain.why


# -- reports


def test_the_report_as_json_and_the_exit_status(tmp_path, capsys):
    def run(rows, *options):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return cli.main(["data", "check", str(tmp_path / "log.jsonl"), *options])

    rows = clean_log()
    assert run(rows, "--json", str(tmp_path / "report.json")) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["status"] == 0 and written["n_rows"] == 360 and written["gain"]["verdict"] == "nothing seen"
    assert run([*rows, rows[0]], "--no_gain") == 1
    out = capsys.readouterr().out
    assert "WARNING  duplicates" in out and "[row 360]" in out and "personalisation" not in out.split("duplicates")[1]
    assert run([*rows, {**rows[0], "chosen": ""}], "--no_gain") == 2
    assert "UNUSABLE schema" in capsys.readouterr().out
    assert cli.main(["data", "check", str(tmp_path / "absent.jsonl")]) == 2
    assert "DataError" in capsys.readouterr().err


def test_the_worst_comes_first_and_long_lists_are_cut():
    rows = clean_log()
    rows += [dict(row) for row in rows[:30]] + [{**rows[0], "chosen": ""}]
    report = examine(rows)
    assert [finding.level for finding in report.findings] == ["unusable", "warning"]
    assert "[rows 360, 361, 362, 363, 364, ... (30 in all)]" in str(report)
    assert len(the(report, "duplicates").rows) == 20
