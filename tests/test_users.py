"""The registry of users: what is an id, who keeps which row, and what is refused."""

import json
import unicodedata

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sharelora.errors import DataError, UnknownUserError, UserIdError
from trl_sharelora.users import UserRegistry, user_id_as_text


JOSE_ONE, JOSE_TWO = unicodedata.normalize("NFC", "José"), unicodedata.normalize("NFD", "José")

# Texts that are ids: not blank, not too long, encodable. `st.text()` draws from all of Unicode, control characters included.
usable_ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
distinct_ids = st.lists(usable_ids, unique_by=lambda text: unicodedata.normalize("NFC", text), max_size=12)
unusable_ids = st.sampled_from([None, float("nan"), 1.0, True, "", "  ", b"ann", ["ann"], "x" * 257, "\ud800"])


# -- what is an id


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("ann", "ann"),
        ("007", "007"),
        (" ann ", " ann "),
        (7, "7"),
        (-7, "-7"),
        (np.int64(2**60), str(2**60)),
        ("1e5", "1e5"),
    ],
)
def test_text_is_kept_as_it_is_and_whole_numbers_are_written_in_decimal(value, text):
    assert user_id_as_text(value) == text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "is blank ('')"),
        (" \t", r"is blank (' \t')"),
        (None, "is missing (None)"),
        (float("nan"), "is missing (nan)"),
        (1.0, "1.0 of type float"),
        (np.float32(2), "of type float32"),
        (True, "True of type bool"),
        (np.bool_(True), "of type bool"),
        (b"ann", "of type bytes"),
        ("é" * 129, "258 bytes"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_what_is_no_id_is_refused_with_the_place_and_what_came(value, said):
    with pytest.raises(UserIdError) as raised:
        user_id_as_text(value, where="row 17 of column 'user_id'")
    assert said in str(raised.value)
    assert "row 17 of column 'user_id'" in str(raised.value)


def test_a_float_id_comes_with_the_remedy():
    with pytest.raises(UserIdError, match=r"read the column as text \(pandas: dtype=str\)"):
        user_id_as_text(7.0)


def test_an_id_of_256_bytes_is_the_longest():
    assert user_id_as_text("x" * 256) == "x" * 256


# -- rows


def test_users_keep_the_order_of_first_appearance():
    users = UserRegistry.from_dataset(Dataset.from_dict({"user_id": ["bob", "ann", "bob", "cat"]}))
    assert users.ids == ["bob", "ann", "cat"] == list(users)
    assert users.index(["cat", "bob"]) == [2, 0]
    assert users.find(["dan", "ann"]) == [-1, 1]
    assert users.add(["dan", "ann", "dan"]) == [3, 1, 3]
    assert (len(users), users[3], "dan" in users, "eve" in users) == (4, "dan", True, False)


@settings(deadline=None)
@given(distinct_ids, st.data())
def test_it_does_what_a_dict_does(ids, data):
    users, rows = UserRegistry(), {}
    for _ in range(3):
        batch = data.draw(st.lists(st.sampled_from(ids), max_size=8)) if ids else []
        for user_id in batch:
            rows.setdefault(user_id, len(rows))
        assert users.add(batch) == [rows[user_id] for user_id in batch]
    assert users.ids == list(rows)
    assert users.find(ids) == [rows.get(user_id, -1) for user_id in ids]
    assert users == UserRegistry(rows)


@settings(deadline=None)
@given(distinct_ids)
def test_saved_and_loaded_it_is_the_same(tmp_path_factory, ids):
    directory = tmp_path_factory.mktemp("registry")
    users = UserRegistry(ids)
    path = users.save(directory)
    assert path == directory / "users.json" and [file.name for file in directory.iterdir()] == ["users.json"]
    assert UserRegistry.load(directory).ids == UserRegistry.load(path).ids == ids


@settings(deadline=None)
@given(distinct_ids, st.lists(usable_ids, max_size=4), unusable_ids, st.data())
def test_a_refused_batch_adds_nobody(ids, before, bad, data):
    users = UserRegistry(ids)
    batch = [*before]
    position = data.draw(st.integers(0, len(batch)))
    batch.insert(position, bad)
    with pytest.raises(UserIdError):
        users.add(batch)
    assert users.ids == ids
    assert users.index(ids) == list(range(len(ids)))
    # nothing of the refused ones is remembered: each can still come on its own, unless it twins with a known one
    for user_id in before:
        if all(unicodedata.normalize("NFC", user_id) != unicodedata.normalize("NFC", known) for known in ids):
            assert UserRegistry(ids).add([user_id]) == users.add([user_id]) == [len(ids)]
            users = UserRegistry(ids)


def test_a_refused_batch_leaves_no_memory_of_how_an_id_was_written(tmp_path):
    users = UserRegistry.load(UserRegistry([7]).save(tmp_path))
    with pytest.raises(UserIdError):
        users.add([7, None])
    assert users.add(["7"]) == [0]


# -- refusals


def test_all_bad_rows_are_named_at_once():
    with pytest.raises(UserIdError) as raised:
        UserRegistry.from_dataset(Dataset.from_dict({"user_id": ["ann", None, " ", "bob", None]}))
    message = str(raised.value)
    assert "row 1 of column 'user_id'" in message
    assert "3 ids cannot be used: rows 1, 2, 4" in message


def test_the_number_7_and_the_text_7_do_not_mix():
    with pytest.raises(
        UserIdError, match="'7' came as text and as an integer .again at row 1.; .* Give all ids as text"
    ):
        UserRegistry().add(["7", 7])


def test_007_is_not_7():
    assert UserRegistry(["007", "7"]).index(["7", "007"]) == [1, 0]


def test_ids_that_differ_by_unicode_normalisation_only_are_refused_wherever_they_meet():
    assert JOSE_ONE != JOSE_TWO
    with pytest.raises(UserIdError, match="differ only by Unicode normalisation") as raised:
        UserRegistry().add([JOSE_ONE, "ann", JOSE_TWO])
    assert r"'Jos\xe9', 'Jose\u0301'" in str(raised.value) and "row 2" in str(raised.value)
    # looked up, he would otherwise be an unseen user and silently get the common model
    users = UserRegistry([JOSE_ONE])
    for look_up in (users.find, users.index):
        with pytest.raises(UserIdError, match="differ only by Unicode normalisation"):
            look_up([JOSE_TWO])
    assert JOSE_TWO not in users


def test_a_user_named_twice_is_refused():
    with pytest.raises(UserIdError, match="'ann' occurs twice in the list of users .again at place 2."):
        UserRegistry(["ann", "bob", "ann"])


@pytest.mark.parametrize(
    "call", [UserRegistry, UserRegistry().add, UserRegistry(["a", "n"]).find, UserRegistry(["a"]).index]
)
def test_one_id_where_several_are_needed_is_not_taken_letter_by_letter(call):
    with pytest.raises(UserIdError, match=r"One user id came \('an'\) .* give a list: \['an'\]"):
        call("an")


def test_unknown_users_are_named_with_what_is_known():
    users = UserRegistry([f"u{number}" for number in range(9)])
    with pytest.raises(UnknownUserError) as raised:
        users.index(["u1", "zoe", "yan", "zoe"])
    message = str(raised.value)
    assert "2 unknown user(s): 'yan', 'zoe'" in message
    assert "knows 9 users ('u0', 'u1', 'u2', 'u3', 'u4', ...)" in message
    assert 'unseen="common"' in message


def test_a_missing_column_is_named_with_the_columns_there_are():
    with pytest.raises(DataError, match="There is no column 'user_id'; the columns are 'user', 'chosen'"):
        UserRegistry.from_dataset(Dataset.from_dict({"user": ["ann"], "chosen": ["x"]}))
    with pytest.raises(DataError, match="There is no column 'user_id' in row 1"):
        UserRegistry.from_dataset([{"user_id": "ann"}, {"user": "bob"}])


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
def test_users_come_out_of_a_dataset_of_any_format_and_of_a_stream(kind):
    dataset = Dataset.from_dict({"user_id": [3, 1, 3], "chosen": ["x", "y", "z"]})
    assert UserRegistry.from_dataset(dataset.with_format(kind)).ids == ["3", "1"]
    assert UserRegistry.from_dataset(dataset.to_iterable_dataset()).ids == ["3", "1"]


# -- the file


def test_a_saved_list_does_not_remember_that_ids_were_whole_numbers(tmp_path):
    UserRegistry([7]).save(tmp_path)
    assert UserRegistry.load(tmp_path).add(["7"]) == [0]
    assert UserRegistry.load(tmp_path).add([7]) == [0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"version": 1, "users": ["ann"', "torn or edited"),
        ("[]", "is not a list of users"),
        ('{"version": 1}', "is not a list of users"),
        ('{"version": 1, "users": ["ann", 7]}', "ids that are not text"),
        ('{"version": 1, "users": "ann"}', "ids that are not text"),
        ('{"version": 1, "users": ["ann", "ann"]}', "'ann' occurs twice"),
        ('{"version": 1, "users": ["ann", ""]}', "is blank"),
    ],
)
def test_a_torn_or_edited_file_is_refused(tmp_path, content, said):
    (tmp_path / "users.json").write_text(content)
    with pytest.raises(UserIdError, match=said):
        UserRegistry.load(tmp_path)


def test_a_missing_file_says_that_it_cannot_be_rebuilt(tmp_path):
    with pytest.raises(UserIdError, match="No users.json in .* it cannot be rebuilt from the weights"):
        UserRegistry.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    UserRegistry(["ann"]).save(tmp_path)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(json, "dump", full_disk)
    with pytest.raises(OSError, match="No space left"):
        UserRegistry(["ann", "bob"]).save(tmp_path)
    assert UserRegistry.load(tmp_path).ids == ["ann"]
