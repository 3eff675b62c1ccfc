"""Splits: what may not be torn apart, what is asked per user, the same for every order of the rows, checked when applied."""

import gzip
import hashlib
import json
import random
import time
from collections import Counter, defaultdict

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sharelora import cli
from trl_sharelora.errors import ConfigError, DataError
from trl_sharelora.splits import (
    LEFT_OUT,
    SHOTS,
    Split,
    near_duplicates,
    normalised,
    pair_key,
    row_digest,
    split_by_comparison,
    split_by_item,
    split_by_user,
)


def log(counts: dict[str, int], prompts: int = 5, seed: int = 0) -> list[dict]:
    """So many comparisons of each user, no two about the same pair of replies of a user."""
    draw = random.Random(seed)
    return [
        {
            "user_id": user,
            "prompt": f"question {draw.randrange(prompts)} {'abcdefgh'[draw.randrange(prompts)] * 9}",
            "chosen": f"{user} {number} yes {draw.random()}",
            "rejected": f"{number} no {draw.random()}",
        }
        for user, n in counts.items()
        for number in range(n)
    ]


def names_by_row(split: Split, rows: list[dict]) -> list[str]:
    return split.names_of(Dataset.from_list(rows))


# -- digests


def test_the_digest_is_a_keyless_hash_of_the_four_values():
    row = {"user_id": 7, "prompt": "p é", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}], "x": 1}
    text = r'["7","p \u00e9","a",[{"content":"b","role":"assistant"}]]'
    assert row_digest(row) == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    del row["prompt"], row["x"]
    assert row_digest(row) == row_digest({**row, "prompt": None})


def test_keys_that_datasets_fills_with_none_do_not_change_a_digest():
    row = {"user_id": "u", "chosen": [{"role": "a", "content": "b"}], "rejected": [{"role": "a", "content": "c"}]}
    filled = {**row, "chosen": [{"role": "a", "content": "b", "tool_calls": None}]}
    assert row_digest(row) == row_digest(filled)


@pytest.mark.parametrize("column", ["user_id", "prompt", "chosen", "rejected"])
def test_every_value_enters_the_digest(column):
    row = {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b"}
    assert row_digest(row) != row_digest({**row, column: "other"})


def test_a_pair_is_the_same_whichever_was_chosen():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert pair_key(row) == pair_key({"prompt": "p", "chosen": "b", "rejected": "a"})
    assert pair_key(row) != pair_key({**row, "prompt": "q"})


# -- near-duplicates


def jaccard(first: str, second: str) -> float:
    sets = [{text[i : i + 5] for i in range(max(1, len(text) - 4))} for text in map(normalised, (first, second))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def groups_by_brute_force(texts: list[str], threshold: float) -> list[set[int]]:
    groups = [{number} for number in range(len(texts))]
    for i in range(len(texts)):
        for j in range(i):
            if jaccard(texts[i], texts[j]) >= threshold or normalised(texts[i]) == normalised(texts[j]):
                one = next(group for group in groups if i in group)
                two = next(group for group in groups if j in group)
                if one is not two:
                    groups.remove(two)
                    one |= two
    return sorted(groups, key=min)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_near_duplicates_are_those_of_all_pairs_compared(threshold):
    draw = random.Random(3)
    letters = "abcdefghijklmnop "
    texts = []
    for _ in range(25):
        text = "".join(draw.choice(letters) for _ in range(draw.choice([20, 60, 200])))
        texts.append(text)
        for edits in (1, 2, 5):
            changed = list(text)
            for _ in range(edits):
                changed[draw.randrange(len(changed))] = draw.choice(letters)
            texts.append("".join(changed))
    found = near_duplicates(texts, threshold)
    groups = [{number for number, own in enumerate(found) if own == group} for group in range(max(found) + 1)]
    assert groups == groups_by_brute_force(texts, threshold)
    assert len(groups) < len(texts) or threshold == 1.0


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_on_a_template_are_those_of_all_pairs_compared(threshold):
    draw = random.Random(5)
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
    texts = [
        f"Please summarise ticket {draw.randrange(10**5):05d} in one short sentence: {' '.join(draw.choices(words, k=6))}"
        for _ in range(90)
    ]
    texts += [f"{text}{end}" for text in texts[:30] for end in ("x", " again")]
    texts += [f"{n} {'nothing in common with the others, but alike itself ' * 2}" for n in range(40)]
    draw.shuffle(texts)
    found = near_duplicates(texts, threshold)
    groups = [{number for number, own in enumerate(found) if own == group} for group in range(max(found) + 1)]
    assert groups == groups_by_brute_force(texts, threshold)


def test_a_thousand_prompts_on_one_template_take_a_second():
    draw = random.Random(7)
    words = "alpha beta gamma delta eps zeta eta theta iota kappa lam mu nu xi omi pi rho".split()
    texts = [
        "Please summarise the support ticket with the following number in one short sentence for the weekly report of our team: "
        f"{n * 7919 % 100003:05d} {''.join(draw.choices(words, k=3))} {' '.join(draw.choices(words, k=4))}"
        for n in range(1000)
    ]
    start = time.process_time()
    near_duplicates(texts)
    assert time.process_time() - start < 5  # 0.5 s alone; every pair by itself took 8 s


def test_case_punctuation_spaces_and_unicode_forms_are_no_difference():
    same = ["Boil it, in VINEGAR!", "boil it in vinegar", "  Boil  it (in vinegar).", "ｂｏｉｌ it in vinegar"]
    assert near_duplicates([*same, "boil it in milk"]) == [0, 0, 0, 0, 1]
    # what is nothing but punctuation keeps its form
    assert near_duplicates(["!", "?", "", "!"]) == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "texts",
    [
        [
            "a+b",
            "a-b",
            "a*b",
            "a/b",
            "a b",
            "a=b",
            "a^b",
            "a&b",
            "a<b",
            "a>b",
            "a!=b",
            "a**b",
            "a%b",
            "a×b",
            "a∩b",
            "a∪b",
        ],
        ["5", "-5", "+5", "5%", "$5", "€5", "5²", "±5"],
        ["What is 3 + 4?", "What is 3 - 4?", "What is 3 * 4?", "What is 3 / 4?"],
        ["Sort in C", "Sort in C++", "Sort in C#"],
        ["(x) - (y)", "(x) / (y)", "x y"],
        ["कि", "का", "क", "के"],  # vowel signs
        ["ก่า", "ก้า", "กา"],  # tones
        ["ex\u0304", "ex\u0302", "ex"],  # marks without a letter of their own
        ["1/2", "1-2", "1 2"],
    ],
)
def test_texts_that_differ_in_an_operator_or_a_mark_are_two(texts):
    assert near_duplicates(texts) == list(range(len(texts)))


@pytest.mark.parametrize(
    "texts",
    [
        ["a+b", "A + B", "a  +b.", "ａ＋ｂ"],
        ["3 - 4", "3 \u2212 4", "3\u20134"],
        [
            "well-known",
            "well known",
            "Well \u2013 known",
            "well/known",
            "*well* **known**",
            "# Well known",
            "well & known",
        ],
        ["> quoted\n> text", "quoted text"],
        ["Title\n=====\ntext", "title text", "title | text", "title\n---\ntext"],
        ["no. 3, and then - perhaps - more", "No 3 and then perhaps more"],
        ["café", "CAFE\u0301", "cafe\u0301!"],
        ["İstanbul", "istanbul", "Istanbul"],
        ["I \u2764\ufe0f it", "i \u2764 it"],
        ["see #tag", "see tag"],
    ],
)
def test_punctuation_that_looks_like_an_operator_is_no_difference(texts):
    assert len({normalised(text) for text in texts}) == 1 and set(near_duplicates(texts)) == {0}


def test_a_threshold_out_of_range():
    for threshold in (0, 1.5):
        with pytest.raises(ConfigError, match="similarity"):
            near_duplicates(["a"], threshold)


# -- by comparison


def test_a_users_answers_are_shared_out_exactly():
    rows = log({"ann": 10, "bob": 20, "cat": 5, "dan": 1})
    names = names_by_row(split_by_comparison(Dataset.from_list(rows)), rows)
    counts = defaultdict(Counter)
    for row, name in zip(rows, names, strict=True):
        counts[row["user_id"]][name] += 1
    assert counts["ann"] == {"train": 8, "validation": 1, "test": 1}
    assert counts["bob"] == {"train": 16, "validation": 2, "test": 2}
    # gaps to 4, .5, .5: four to train, then the first of two equals
    assert counts["cat"] == {"train": 4, "validation": 1}
    assert counts["dan"] == {"train": 1}


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8, 15])
def test_the_shares_of_many_users_with_few_answers_are_those_asked(n):
    rows = log({f"u{number}": n for number in range(100)})
    split = split_by_comparison(Dataset.from_list(rows))
    assert not split.notes
    for name, share in {"train": 0.8, "validation": 0.1, "test": 0.1}.items():
        assert abs(split.counts()[name] - share * 100 * n) <= 1
    shuffled = random.Random(n).sample(rows, len(rows))
    assert split_by_comparison(Dataset.from_list(shuffled)) == split
    counts = Counter((row["user_id"], name) for row, name in zip(rows, names_by_row(split, rows), strict=True))
    for (_, name), number in counts.items():  # and each user's within one
        assert abs(number - {"train": 0.8, "validation": 0.1, "test": 0.1}[name] * n) < 1


def test_the_shares_of_users_with_any_numbers_of_answers_are_those_asked():
    draw = random.Random(1)
    rows = log({f"u{number}": draw.choice([1, 2, 3, 5, 7, 12, 30]) for number in range(150)})
    fractions = {"train": 0.7, "test": 0.15, "dev": 0.1, "rest": 0.05}
    for fewest in ({}, {"train": 1}):
        split = split_by_comparison(Dataset.from_list(rows), fractions, fewest=fewest, too_few="keep")
        for name, share in fractions.items():
            assert abs(split.counts()[name] - share * len(rows)) <= 2
        users = Counter(
            row["user_id"] for row, name in zip(rows, names_by_row(split, rows), strict=True) if name == "train"
        )
        assert not fewest or len(users) == 150


def test_the_shares_of_seen_users_with_few_answers_are_those_asked():
    rows = log({f"u{number:02d}": 5 for number in range(100)})
    split = split_by_user(Dataset.from_list(rows), unseen=20, shots=(0, 2), n_test=3)
    assert split.counts() == {"train": 320, "validation": 40, "test": 40, "unseen_support": 40, "unseen_test": 60}


def test_a_split_without_rows_is_told_with_the_reason():
    rows = log({f"u{number}": 1 for number in range(100)})
    split = split_by_comparison(Dataset.from_list(rows))
    assert split.counts() == {"train": 100}
    assert split.notes == ["no row in validation, test: what each user must have elsewhere (fewest) leaves none"]
    split = split_by_comparison(Dataset.from_list(log({"ann": 4})))
    assert split.notes == ["no row in test: too few rows for so small a share"]
    split = split_by_user(Dataset.from_list(log({"ann": 4, "bob": 4})), 1, [0], 4)
    assert "no row in test: too few rows for so small a share" in split.notes


def test_fewest_is_served_before_the_shares():
    rows = log({"ann": 6, "bob": 50})
    split = split_by_comparison(Dataset.from_list(rows), fewest={"train": 1, "test": 3})
    counts = Counter((row["user_id"], name) for row, name in zip(rows, names_by_row(split, rows), strict=True))
    assert counts["ann", "test"] == 3 and counts["ann", "train"] == 3
    assert counts["bob", "test"] == 5 and counts["bob", "train"] == 40


def test_repeated_and_turned_answers_of_a_user_stay_together():
    rows = log({"ann": 30})
    again = [dict(row) for row in rows] + [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows
    ]
    split = split_by_comparison(Dataset.from_list(rows + again), fractions={"train": 0.5, "test": 0.5})
    names = names_by_row(split, rows + again)
    assert names[:30] == names[30:60] == names[60:]
    assert Counter(names[:30]) == {"train": 15, "test": 15}
    assert split.counts() == {"train": 45, "test": 45}


def test_what_happens_to_users_with_too_few_rows():
    rows = log({"ann": 2, "bob": 50, "cat": 1})
    dataset = Dataset.from_list(rows)
    wanted = {"train": 2, "test": 1}
    with pytest.raises(DataError, match="2 of 3 users have fewer rows than asked .*'ann' has 0 of 1 in test"):
        split_by_comparison(dataset, fewest=wanted)
    left = split_by_comparison(dataset, fewest=wanted, too_few="leave_out")
    names = names_by_row(left, rows)
    assert {row["user_id"] for row, name in zip(rows, names, strict=True) if name != LEFT_OUT} == {"bob"}
    assert "left out: 2 of 3 users" in left.notes[0]
    assert sum(map(len, left.apply(dataset).values())) == 50
    kept = split_by_comparison(dataset, fewest=wanted, too_few="keep")
    names = names_by_row(kept, rows)
    assert names[:2] == ["train", "train"] and names[-1] == "train"
    assert "kept as they are: 2 of 3 users" in kept.notes[0]
    with pytest.raises(DataError, match="Nobody would be left"):
        split_by_comparison(dataset, fewest={"train": 60}, too_few="leave_out")


@pytest.mark.parametrize(
    "arguments",
    [
        {"fractions": {"train": 0.5, "test": 0.4}},
        {"fractions": {"validation": 0.5, "test": 0.5}},
        {"fractions": {"train": 0.9, LEFT_OUT: 0.1}},
        {"fractions": {"train": 1.2, "test": -0.2}},
        {"fewest": {"dev": 1}},
        {"fewest": {"train": -1}},
        {"too_few": "drop"},
        {"seed": 1.5},
    ],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ConfigError, match="came"):
        split_by_comparison(Dataset.from_list(log({"ann": 10})), **arguments)


def test_unusable_rows_are_not_split():
    with pytest.raises(DataError, match="is empty"):
        split_by_comparison(
            Dataset.from_list([*log({"ann": 3}), {"user_id": "ann", "prompt": "p", "chosen": "", "rejected": "b"}])
        )
    tokens = Dataset.from_list([{"user_id": "u", "chosen_ids": [1], "rejected_ids": [2]}] * 3)
    with pytest.raises(DataError, match="tokenised"):
        split_by_comparison(tokens)


# -- by item


def test_no_prompt_nor_its_near_duplicate_is_on_two_sides():
    rows = log({f"u{n}": 40 for n in range(5)}, prompts=8)
    for number, row in enumerate(rows):
        if number % 3 == 0:
            row["prompt"] = row["prompt"].upper() + " !"
    split = split_by_item(Dataset.from_list(rows), seed=2, too_few="keep")
    sides = defaultdict(set)
    for row, name in zip(rows, names_by_row(split, rows), strict=True):
        sides[normalised(row["prompt"])].add(name)
    assert all(len(names) == 1 for names in sides.values())
    assert set.union(*sides.values()) == {"train", "validation", "test"}
    assert split.notes[0] == "an item is a prompt"


def test_with_a_single_prompt_an_item_is_a_pair():
    rows = [{**row, "prompt": "the same"} for row in log({"ann": 60})]
    # the same pairs judged by another user, the other way round and with other punctuation
    other = [
        {**row, "user_id": "bob", "chosen": row["rejected"] + "!", "rejected": row["chosen"].upper()} for row in rows
    ]
    split = split_by_item(Dataset.from_list(rows + other))
    names = names_by_row(split, rows + other)
    assert names[:60] == names[60:]
    assert Counter(names[:60]) == {"train": 48, "validation": 6, "test": 6}
    assert split.notes[0].startswith("an item is a pair: one prompt has 100%")


def test_by_reply_no_reply_is_on_two_sides_and_the_crossing_rows_are_counted():
    draw = random.Random(0)
    replies = [f"{word * 7} number {n}" for n, word in enumerate("qwertyuiopasdfghjklzxcvbnm")]
    rows = [
        {"user_id": f"u{n % 3}", "chosen": one, "rejected": two}
        for n in range(900)
        for one, two in [draw.sample(replies, 2)]
    ]
    rows = list({(row["user_id"], row["chosen"], row["rejected"]): row for row in rows}.values())
    split = split_by_item(Dataset.from_list(rows), fractions={"train": 0.5, "test": 0.5}, item="reply", too_few="keep")
    names = names_by_row(split, rows)
    sides = {
        name: {
            row[side] for row, own in zip(rows, names, strict=True) if own == name for side in ("chosen", "rejected")
        }
        for name in ("train", "test")
    }
    assert sides["train"] and sides["test"] and not sides["train"] & sides["test"]
    crossing = names.count(LEFT_OUT)
    assert crossing and split.notes[0] == f"left out: {crossing} rows whose two replies are on different sides"
    # and nothing is left out that need not be
    for row, name in zip(rows, names, strict=True):
        inside = [side for side in sides if {row["chosen"], row["rejected"]} <= sides[side]]
        assert (name == LEFT_OUT) == (not inside)


def test_too_few_items_and_uneven_ones():
    rows = log({"ann": 30}, prompts=1)
    with pytest.raises(DataError, match="There are 1 items .* for 3 splits"):
        split_by_item(Dataset.from_list(rows), item="prompt")
    large = [{**row, "prompt": "the large one"} for row in log({"ann": 60})]
    small = [{**row, "prompt": f"{'xyz'[n % 3] * 12}"} for n, row in enumerate(log({"ann": 30}, seed=1))]
    split = split_by_item(Dataset.from_list(large + small), item="prompt", fractions={"train": 0.5, "test": 0.5})
    assert any("of the rows instead of 50%: items are not cut" in note for note in split.notes)
    with pytest.raises(ConfigError, match="item='topic'"):
        split_by_item(Dataset.from_list(rows), item="topic")


def test_every_split_gets_an_item_however_small_its_share():
    rows = [{**row, "prompt": "xyz"[n % 3] * 12} for n, row in enumerate(log({"ann": 90}))]
    split = split_by_item(Dataset.from_list(rows), fractions={"train": 0.98, "validation": 0.01, "test": 0.01})
    assert split.counts() == {"train": 30, "validation": 30, "test": 30}


def test_a_user_left_without_training_rows():
    rows = [{**row, "prompt": f"{letter * 15}"} for letter in "abcdefghij" for row in log({f"user {letter}": 4})]
    with pytest.raises(DataError, match=r"0 of 1 in train.*take another seed"):
        split_by_item(Dataset.from_list(rows))
    split = split_by_item(Dataset.from_list(rows), too_few="leave_out")
    assert set(split.counts()) == {"train", LEFT_OUT}


# -- by user


USERS = {f"u{n:02d}": 40 + n for n in range(20)}


def test_unseen_users_are_seen_nowhere_else_and_their_support_sets_are_nested():
    rows = log(USERS)
    dataset = Dataset.from_list(rows)
    split = split_by_user(dataset, unseen=5, shots=(0, 1, 5, 20), n_test=15)
    parts = split.apply(dataset)
    assert set(parts) == {"train", "validation", "test", "unseen_support", "unseen_test"}
    unseen = set(parts["unseen_test"]["user_id"])
    assert len(unseen) == 5 == len(set(parts["unseen_support"]["user_id"]))
    assert not unseen & set(parts["train"]["user_id"]) and len(set(parts["train"]["user_id"])) == 15
    previous = set()
    for n in (0, 1, 2, 5, 20):
        support = split.support(dataset, n)
        assert Counter(support["user_id"]) == (dict.fromkeys(unseen, n) if n else {})
        found = set(support["chosen"])
        assert previous <= found
        previous = found
    # the same test set for every n, without any support row, never fewer than asked
    assert not previous & set(parts["unseen_test"]["chosen"])
    tests = Counter(parts["unseen_test"]["user_id"])
    assert tests == {user: USERS[user] - 20 for user in unseen} and min(tests.values()) >= 15
    assert split.notes[0] == "5 unseen users, drawn among the 20 with at least 35 answers"
    for n in (-1, 21):
        with pytest.raises(ConfigError, match="0 to 20"):
            split.support(dataset, n)
    with pytest.raises(ConfigError, match="by comparison"):
        split_by_comparison(dataset).support(dataset, 1)


def test_users_with_too_few_answers_for_the_curve():
    rows = log({"ann": 130, "bob": 60, "cat": 60, "dan": 10})
    dataset = Dataset.from_list(rows)
    with pytest.raises(DataError, match="1 of 4 users have the 120 answers .100 to learn from, 20 to test."):
        split_by_user(dataset, unseen=2)
    kept = split_by_user(dataset, unseen=3, too_few="keep")
    assert set(kept.apply(dataset)["train"]["user_id"]) == {"dan"}
    assert Counter(kept.support(dataset, 100)["user_id"]) == {"ann": 100, "bob": 40, "cat": 40}
    assert Counter(kept.apply(dataset)["unseen_test"]["user_id"]) == {"ann": 30, "bob": 20, "cat": 20}
    assert "at 50 answers, 2 of 3 unseen users have fewer (the least 40)" in kept.notes
    assert not any(note.startswith("at 20 answers") for note in kept.notes)
    left = split_by_user(dataset, unseen=2, too_few="leave_out")
    assert set(left.apply(dataset)["unseen_support"]["user_id"]) == {"ann"}
    assert "only these are kept back" in left.notes[0]
    assert SHOTS == (0, 1, 2, 5, 10, 20, 50, 100)


def test_the_remedy_for_too_few_answers_is_one_that_helps():
    dataset = Dataset.from_list(log({f"u{number:02d}": 10 for number in range(20)}))
    with pytest.raises(DataError) as raised:
        split_by_user(dataset, shots=(0, 5, 10), too_few="keep")
    message = str(raised.value)
    assert "0 of 20 users have the 21 answers (1 to learn from, 20 to test)" in message
    assert message.endswith("Ask for n_test=9 or less.")
    assert split_by_user(dataset, shots=(0, 5, 10), too_few="keep", n_test=9).counts()["unseen_test"] == 36
    # more test answers than anybody has: taking users with fewer is not enough
    with pytest.raises(DataError, match=r"the 30 answers .*needs\. Ask for n_test=9 or less with too_few='keep'\.$"):
        split_by_user(dataset, shots=(0, 5, 10))
    with pytest.raises(DataError, match=r"Ask for a curve .shots. of at most 5, or for users .* .too_few='keep'.\.$"):
        split_by_user(dataset, shots=(0, 5, 10), n_test=5)
    split_by_user(dataset, shots=(0, 5), n_test=5), split_by_user(dataset, shots=(0, 5, 10), n_test=5, too_few="keep")
    with pytest.raises(
        DataError, match=r"Ask for a curve .shots. of at most 2, or for n_test=5 or less, or for users"
    ):
        split_by_user(dataset, shots=(0, 5), n_test=8)
    split_by_user(dataset, shots=(0, 2), n_test=8), split_by_user(dataset, shots=(0, 5), n_test=5)
    uneven = Dataset.from_list(log({"ann": 40, "bob": 40, "cat": 1, "dan": 1}))
    with pytest.raises(DataError, match=r"2 of 4 users have the 21 answers .*\. Ask for 2 unseen users or fewer\.$"):
        split_by_user(uneven, unseen=3, too_few="keep")
    single = Dataset.from_list(log({f"u{number:02d}": 1 for number in range(20)}))
    with pytest.raises(DataError, match=r"Split by comparison or by item\.$"):
        split_by_user(single, too_few="keep")


def test_as_many_users_as_are_wanted_are_enough():
    dataset = Dataset.from_list(log({"ann": 30, "bob": 29, "cat": 30, "dan": 29}))
    for too_few in ("raise", "keep", "leave_out"):
        split = split_by_user(dataset, unseen=2, shots=[10], n_test=20, too_few=too_few)
        assert split.notes[0] == "2 unseen users, drawn among the 2 with at least 30 answers"
        assert set(split.support(dataset, 10)["user_id"]) == {"ann", "cat"}


@pytest.mark.parametrize(
    "arguments", [{"unseen": 0}, {"unseen": 4}, {"unseen": True}, {"shots": []}, {"shots": [-1]}, {"n_test": 0}]
)
def test_arguments_of_the_split_by_user(arguments):
    with pytest.raises(ConfigError, match="came"):
        split_by_user(
            Dataset.from_list(log({"a": 9, "b": 9, "c": 9, "d": 9})), **{"shots": [1], "n_test": 1, **arguments}
        )


def test_pairs_known_from_others_are_told():
    rows = log({"ann": 30})
    other = [{**row, "user_id": "bob"} for row in rows]
    split = split_by_user(
        Dataset.from_list(rows + other), unseen=1, shots=[5], n_test=5, fractions={"train": 1.0}, fewest={}
    )
    assert split.notes[-1] == "100% of the unseen users' test pairs were judged by others in training"


# -- order, seeds


KINDS = {
    "comparison": lambda dataset, seed: split_by_comparison(dataset, seed=seed, too_few="keep"),
    "prompt": lambda dataset, seed: split_by_item(dataset, seed=seed, item="prompt", too_few="keep"),
    "pair": lambda dataset, seed: split_by_item(dataset, seed=seed, item="pair", too_few="keep"),
    "reply": lambda dataset, seed: split_by_item(dataset, seed=seed, item="reply", too_few="keep"),
    "user": lambda dataset, seed: split_by_user(dataset, 2, (0, 2), 2, seed=seed, too_few="keep"),
}


@settings(max_examples=15, deadline=None)
@given(st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_rows_does_not_matter(kind, data):
    letters = st.sampled_from("abcdefgh")
    drawn = data.draw(st.lists(st.tuples(letters, letters, letters, letters), min_size=10, max_size=40))
    rows = [{"user_id": u, "prompt": p * 8, "chosen": c * 9, "rejected": r * 3} for u, p, c, r in drawn]
    rows += [row for user in "xyzw" for row in log({user: 6}, seed=ord(user))]
    shuffled = data.draw(st.permutations(rows))
    seed = data.draw(st.integers(0, 3))
    one, two = (KINDS[kind](Dataset.from_list(list(given)), seed) for given in (rows, shuffled))
    assert one == two
    assert dict(zip(map(str, rows), names_by_row(one, rows), strict=True)) == dict(
        zip(map(str, shuffled), names_by_row(two, list(shuffled)), strict=True)
    )


def test_which_of_several_near_duplicates_comes_first_does_not_matter():
    words = "abcdefghijklmnopqrst"
    rows = [
        {**row, "prompt": f"{letter * 30} {spelling}"}
        for letter, row in zip(words * 2, log({"ann": 40}), strict=True)
        for spelling in ("please", "PLEASE!", "pleese")
    ]
    for seed in range(3):
        one, two = (split_by_item(Dataset.from_list(given), seed=seed) for given in (rows, rows[::-1]))
        assert one == two and one.notes[0] == "an item is a prompt"


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_another_split(kind):
    rows = log({f"u{n}": 30 for n in range(8)}, prompts=8)
    dataset = Dataset.from_list(rows)
    assert KINDS[kind](dataset, 0).rows == KINDS[kind](dataset, 0).rows != KINDS[kind](dataset, 1).rows


# -- files


def test_a_split_is_written_down_and_read_back(tmp_path):
    rows = log(USERS)
    dataset = Dataset.from_list(rows)
    split = split_by_user(dataset, unseen=5, shots=(0, 1, 5), n_test=15)
    for name in ("a.json", "sub/b.json.gz"):
        split.save(tmp_path / name)
        loaded = Split.load(tmp_path / name)
        assert loaded == split and loaded.support(dataset, 5)["chosen"] == split.support(dataset, 5)["chosen"]
    first = (tmp_path / "sub/b.json.gz").read_bytes()
    split_by_user(Dataset.from_list(rows[::-1]), unseen=5, shots=(5, 0, 1), n_test=15).save(tmp_path / "sub/b.json.gz")
    assert (tmp_path / "sub/b.json.gz").read_bytes() == first
    text = (tmp_path / "a.json").read_text()
    assert "u07" not in text and "question" not in text


def test_a_split_is_checked_against_the_data_it_is_applied_to():
    rows = log({"ann": 20, "bob": 20})
    split = split_by_comparison(Dataset.from_list(rows))
    shuffled = random.Random(0).sample(rows, len(rows))
    parts, again = (split.apply(Dataset.from_list(given)) for given in (rows, shuffled))
    assert {name: set(part["chosen"]) for name, part in parts.items()} == {
        name: set(part["chosen"]) for name, part in again.items()
    }
    assert parts["train"]["chosen"][:] == [
        row["chosen"] for row in rows if row["chosen"] in set(parts["train"]["chosen"])
    ]
    with pytest.raises(DataError, match=r"1 rows of the split are not in the data .digests [0-9a-f]{32}."):
        split.apply(Dataset.from_list(rows[:-1]))
    changed = [*rows[:3], {**rows[3], "rejected": "edited"}, *rows[4:]]
    with pytest.raises(DataError, match="row 3 of the data are not in the split; 1 rows of the split"):
        split.apply(Dataset.from_list(changed))
    with pytest.raises(DataError, match="rows 5, 40 occur more or less often"):
        split.apply(Dataset.from_list([*rows, rows[5]]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: {**content, "rows": dict.fromkeys(content["rows"], "test")}, "checksum"),
        (lambda content: {**content, "seed": 7}, "checksum"),
        (lambda content: {**content, "version": 2}, "version 2"),
        (lambda content: {"user_id": "u"}, "no split file"),
        (lambda content: [1], "no split file"),
    ],
)
def test_files_that_are_damaged_or_something_else(tmp_path, damage, message):
    path = tmp_path / "split.json"
    split_by_comparison(Dataset.from_list(log({"ann": 20}))).save(path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=message):
        Split.load(path)


def test_files_that_cannot_be_read(tmp_path):
    split = split_by_comparison(Dataset.from_list(log({"ann": 20})))
    path = tmp_path / "split.json"
    split.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "no.json.gz").write_bytes(b"{}")
    packed = bytearray(gzip.compress(path.read_bytes(), mtime=0))
    packed[10] = 0xFF  # a block of a type that does not exist: zlib.error
    (tmp_path / "damaged.json.gz").write_bytes(packed)
    for bad in (path, tmp_path / "no.json.gz", tmp_path / "absent.json", tmp_path / "damaged.json.gz"):
        with pytest.raises(DataError, match="cannot be read"):
            Split.load(bad)
    with pytest.raises(DataError, match="ends in .json"):
        split.save(tmp_path / "split.pkl")
    with pytest.raises(DataError, match="cannot be written"):
        split.save(path / "below a file" / "split.json")


# -- at the command line


def test_the_command_writes_a_split_and_applies_it(tmp_path, capsys):
    rows = log({"ann": 20, "bob": 20})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, out, applied = (str(tmp_path / name) for name in ("log.jsonl", "split.json", "rows.jsonl"))
    assert cli.main(["data", "split", source, out, "--fractions", "train=0.5,test=0.5", "--seed", "3"]) == 0
    assert "split by comparison, seed 3: train 20, test 20" in capsys.readouterr().out
    assert cli.main(["data", "split", source, applied, "--apply", out]) == 0
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["split"] for row in written] == names_by_row(Split.load(out), rows)
    assert [{**row, "split": None} for row in written] == [{**row, "split": None} for row in rows]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert cli.main(["data", "split", source, applied, "--apply", out]) == 2
    assert "DataError" in capsys.readouterr().err
    options = ["--by", "user", "--unseen", "1", "--shots", "0,2", "--n_test", "3"]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", "split", source, str(tmp_path / "rows.parquet"), *options]) == 0
    table = Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    assert sorted(place for place in table["support_place"] if place is not None) == [0, 1]
    assert cli.main(["data", "split", source, out, "--by", "item", "--item", "pair"]) == 0
    for bad in (["--fractions", "train"], ["--by", "user", "--unseen", "x"], ["--by", "user", "--shots", "1,x"]):
        assert cli.main(["data", "split", source, out, *bad]) == 2


def write_log(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_where_the_command_cannot_write_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    source = write_log(tmp_path / "log.jsonl", log({"ann": 20}))
    (tmp_path / "there.json").write_text("kept")

    def working(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr("trl_sharelora.scripts.data.load_preferences", working)
    for out, said in (
        (f"{source}/split.json", "cannot be written"),
        (f"{source}/rows.jsonl", "cannot be written"),
        (str(tmp_path / "split.txt"), "does not end in"),
    ):
        assert cli.main(["data", "split", source, out]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(AssertionError, match="the work began"):
        cli.main(["data", "split", source, str(tmp_path / "there.json")])
    with pytest.raises(AssertionError, match="the work began"):
        cli.main(["data", "split", source, str(tmp_path / "new.json")])
    assert (tmp_path / "there.json").read_text() == "kept" and not (tmp_path / "new.json").exists()


def test_a_split_is_applied_to_a_log_with_another_user_column(tmp_path, capsys):
    rows = log({"ann": 20, "bob": 20})
    renamed = [{"worker": row.pop("user_id"), **row} for row in map(dict, rows)]
    source, other = (write_log(tmp_path / name, own) for name, own in (("a.jsonl", rows), ("b.jsonl", renamed)))
    out, applied = str(tmp_path / "split.json"), str(tmp_path / "rows.jsonl")
    assert cli.main(["data", "split", source, out]) == 0
    capsys.readouterr()
    assert cli.main(["data", "split", other, applied, "--apply", out]) == 2
    message = capsys.readouterr().err
    assert "no column 'user_id'" in message and "'worker'" in message and "--user_column" in message
    assert cli.main(["data", "split", other, applied, "--apply", out, "--user_column", "worker"]) == 0
    written = [json.loads(line)["split"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert written == names_by_row(Split.load(out), rows)


def test_a_split_applied_to_rows_without_texts():
    split = split_by_comparison(Dataset.from_list(log({"ann": 20})))
    for use in (split.names_of, split.apply, split.places_of):
        with pytest.raises(DataError, match="no column 'chosen', 'rejected'.*before tokenisation"):
            use(Dataset.from_list([{"user_id": "ann", "chosen_ids": [1], "rejected_ids": [2]}]))


@pytest.mark.parametrize(
    "option",
    [
        ["--by", "item"],
        ["--by", "comparison"],
        ["--seed", "0"],
        ["--fractions", "train=1"],
        ["--fewest", "train=1"],
        ["--too_few", "keep"],
        ["--item", "pair"],
        ["--near", "0.9"],
        ["--unseen", "3"],
        ["--shots", "1"],
        ["--n_test", "2"],
    ],
)
def test_an_option_that_a_split_file_settles_is_refused(option, tmp_path, capsys):
    source, out = write_log(tmp_path / "a.jsonl", log({"ann": 20})), str(tmp_path / "split.json")
    assert cli.main(["data", "split", source, out]) == 0
    assert cli.main(["data", "split", source, str(tmp_path / "rows.jsonl"), "--apply", out, *option]) == 2
    assert f"ConfigError: {option[0]}" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_split_that_is_handed_on_names_nobody(tmp_path):
    rows = [{"user_id": "secret-0", "prompt": "p0", "chosen": "a0", "rejected": "b0"}]
    rows += [{"user_id": "u", "prompt": f"p{n}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(1, 40)]
    split = split_by_comparison(Dataset.from_list(rows), fewest={"train": 5}, too_few="leave_out")
    split.save(tmp_path / "s.json")
    assert "1 of 2 users have fewer rows than asked" in " ".join(split.notes)
    assert "secret" not in (tmp_path / "s.json").read_text()
    with pytest.raises(DataError, match="'secret-0' has 0 of 5 in train|'secret-0' has 1 of 5 in train"):
        split_by_comparison(Dataset.from_list(rows), fewest={"train": 5})


def test_a_prompt_that_both_answers_begin_with_is_on_one_side_only():
    def side(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [
        {
            "user_id": f"u{n % 4}",
            "chosen": side(f"what is {n % 10}", f"c{n}"),
            "rejected": side(f"what is {n % 10}", f"r{n}"),
        }
        for n in range(80)
    ]
    dataset = Dataset.from_list(rows)
    names = split_by_item(dataset, near=1.0, too_few="keep").names_of(dataset)
    sides = {}
    for row, name in zip(rows, names, strict=True):
        sides.setdefault(row["chosen"][0]["content"], set()).add(name)
    assert len(sides) == 10 and all(len(found) == 1 for found in sides.values())
    assert len({name for found in sides.values() for name in found}) > 1


def dialogues(answers) -> list[dict]:
    """Four rows on each of 40 questions, in HH-RLHF's form: the prompt is the beginning of both answers."""
    return [
        {
            "user_id": f"u{n % 4}",
            "chosen": f"\n\nHuman: what is {'abcdefgh'[n % 8] * 9} {n % 40}?\n\nAssistant: {one}",
            "rejected": f"\n\nHuman: what is {'abcdefgh'[n % 8] * 9} {n % 40}?\n\nAssistant: {two}",
        }
        for n in range(160)
        for one, two in [answers(n)]
    ]


@pytest.mark.parametrize(
    "answers",
    [
        lambda n: (f"c{n}", f"r{n}"),
        lambda n: (f"yes{n}", f"year{n}"),  # alike in letters
        lambda n: (f"{'I am' if n % 3 else 'So it'} may{n}", f"{'I am' if n % 3 else 'So it'} not{n}"),  # in words
        lambda n: (f"no{n}", f"no{n} really"),  # one goes on where the other ends
    ],
)
@pytest.mark.parametrize("near", [0.8, 1.0])
def test_a_prompt_that_both_texts_begin_with_is_on_one_side_only(answers, near):
    rows = dialogues(answers)
    split = split_by_item(Dataset.from_list(rows), near=near, too_few="keep")
    assert split.notes[:2] == [
        "an item is a prompt",
        "no column 'prompt': what both answers begin with is taken for it",
    ]
    sides = defaultdict(set)
    for row, name in zip(rows, names_by_row(split, rows), strict=True):
        sides[row["chosen"].split("?")[0]].add(name)
    assert len(sides) == 40 and all(len(found) == 1 for found in sides.values())
    assert set.union(*sides.values()) == {"train", "validation", "test"}
    assert split == split_by_item(Dataset.from_list(rows[::-1]), near=near, too_few="keep")


def test_the_prompt_of_both_texts_is_trls():
    from trl import extract_prompt

    from trl_sharelora.splits import _common_beginning

    for row in dialogues(lambda n: (f"{n % 7} is so", f"{n % 7 + 8} is")):
        assert _common_beginning(row["chosen"], row["rejected"]) == extract_prompt(row)["prompt"].rstrip()
    # but it ends with a whole word, and where the reply begins
    assert _common_beginning("what? year", "what? yes") == "what?"
    assert _common_beginning("q Assistant: I am", "q Assistant: I do") == "q Assistant:"
    assert _common_beginning("q <|assistant|>\nI am", "q <|assistant|>\nI do") == "q <|assistant|>"
    assert _common_beginning("q one", "q one two") == "q" and _common_beginning("one", "onetwo") == ""
    assert _common_beginning("one", "two") == _common_beginning("yes", "year") == ""


def test_prompts_that_cannot_be_told_are_noted():
    rows = [{key: row[key] for key in ("user_id", "chosen", "rejected")} for row in log({"ann": 30, "bob": 30})]
    split = split_by_item(Dataset.from_list(rows))
    assert split.notes[0].startswith("an item is a pair: one prompt has 100%")
    assert split.notes[1].startswith("no column 'prompt', and most answers do not begin alike: ")
    assert "may be on both sides" in split.notes[1]
    # pairs and replies are asked for: nothing is said of prompts
    for item in ("pair", "reply"):
        assert not any(
            "prompt" in note for note in split_by_item(Dataset.from_list(rows), item=item, too_few="keep").notes
        )
