"""The registry of users: what is an id, who keeps which row, and what is refused."""

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
import unicodedata
import uuid
from array import array
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import trl_sharelora
from trl_sharelora import users as users_module
from trl_sharelora.errors import ConfigError, DataError, UnknownUserError, UserIdError
from trl_sharelora.users import Pseudonym, UserRegistry, read_user_key, user_id_as_text


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
    with pytest.raises(UserIdError, match=r"One user id came .a text. where several are needed; give a list"):
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


SHAPES = {
    "as json.dump wrote it before": lambda content: json.dumps(content, ensure_ascii=False, indent=0),
    "on one line": json.dumps,
    "indented": lambda content: json.dumps(content, indent=2),
    "the users first": lambda content: json.dumps({"users": content["users"], **content}, indent=0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_any_json_of_the_same_content_is_read(tmp_path, shape):
    ids = ["ann", None, JOSE_ONE, 'a "quoted", one', "line\nbreak", "\u2028]}", "],"]
    content = {"version": 1, "registry_id": "f00", "users": ids}
    (tmp_path / "users.json").write_text(SHAPES[shape](content), encoding="utf-8")
    users = UserRegistry.load(tmp_path)
    assert users.ids == ids and users.registry_id == "f00"
    users.save(tmp_path)
    assert json.loads((tmp_path / "users.json").read_text(encoding="utf-8")) == content
    assert UserRegistry.load(tmp_path).ids == ids


@pytest.mark.parametrize("size", range(8))
def test_a_list_read_in_portions_is_whole_or_refused(tmp_path, monkeypatch, size):
    monkeypatch.setattr(users_module, "_PORTION", 3)
    users = UserRegistry([f"user {number}" for number in range(size)])
    path = users.save(tmp_path)
    assert UserRegistry.load(path) == users
    content = path.read_text(encoding="utf-8")
    for end in range(len(content) - 1):  # all but the last line break
        path.write_text(content[:end], encoding="utf-8")
        with pytest.raises(UserIdError, match="torn or edited"):
            UserRegistry.load(path)
    path.write_text(content + content, encoding="utf-8")
    with pytest.raises(UserIdError, match="torn or edited"):
        UserRegistry.load(path)


# -- forgetting


def test_a_forgotten_user_leaves_an_empty_row():
    users = UserRegistry(["ann", "bob", "cat"])
    assert users.forget("bob") == 1
    assert (len(users), users[1], users[-1], "bob" in users) == (3, None, "cat", False)
    assert users.ids == users[:] == list(users) == ["ann", None, "cat"]
    assert users.find(["ann", "bob", "cat"]) == [0, -1, 2]
    with pytest.raises(UnknownUserError, match=r"1 unknown user.s.: 'bob'. This adapter knows 2 users .'ann', 'cat'."):
        users.index(["bob"])
    assert users.add(["bob", "dan", "bob"]) == [3, 4, 3]
    assert users.ids == ["ann", None, "cat", "bob", "dan"]


def test_who_is_not_there_cannot_be_forgotten():
    users = UserRegistry([JOSE_ONE, "ann"])
    users.forget("ann")
    for user_id in ("ann", "bob"):
        with pytest.raises(UnknownUserError, match=f"'{user_id}'"):
            users.forget(user_id)
    with pytest.raises(UserIdError, match="differ only by Unicode normalisation"):
        users.forget(JOSE_TWO)
    with pytest.raises(UserIdError, match="is missing"):
        users.forget(None)
    assert users.ids == [JOSE_ONE, None]


def test_nothing_of_a_forgotten_id_is_left(tmp_path):
    users = UserRegistry(["ann", JOSE_ONE, 7])
    users.save(tmp_path)
    users.forget(JOSE_ONE)
    users.forget("7")
    assert b"Jos" not in users._text and b"7" not in users._text and b"Jos" not in pickle.dumps(users)
    path = users.save(tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"))["users"] == ["ann", None, None]
    for registry in (users, UserRegistry.load(tmp_path)):
        # neither his spelling nor his type is remembered
        assert registry.add([JOSE_TWO, "7"]) == [3, 4]


def test_forgotten_users_are_part_of_what_is_equal(tmp_path):
    users, other = UserRegistry(["ann", "bob"]), UserRegistry(["ann", "bartholomew"])
    users.forget("bob")
    assert users != other
    other.forget("bartholomew")
    assert users == other == UserRegistry.load(users.save(tmp_path))
    assert users != UserRegistry(["ann"]) and users != ["ann", None]


def test_an_id_of_null_characters_is_not_taken_for_a_forgotten_one(tmp_path):
    users = UserRegistry(["\0", "\0\0", "\xff"])
    assert users.forget("\0") == 0
    assert users.ids == UserRegistry.load(users.save(tmp_path)).ids == [None, "\0\0", "\xff"]


def test_none_is_no_id_outside_a_file():
    with pytest.raises(UserIdError, match="is missing .None. at place 1"):
        UserRegistry(["ann", None])


# -- the compact table


@pytest.mark.parametrize("hashes", ["good", "two", "all the same"])
@settings(deadline=None)
@given(distinct_ids, st.data())
def test_whatever_is_done_to_it_it_is_a_list_and_a_dict(tmp_path_factory, hashes, ids, data):
    if not ids:
        return
    with pytest.MonkeyPatch.context() as patch:
        if hashes != "good":
            patch.setattr(users_module, "hash", lambda text: 7 + len(text) % 2 * (hashes == "two"), raising=False)
        users = UserRegistry()
        model: list[str | None] = []
        for _ in range(data.draw(st.integers(1, 12))):
            action = data.draw(st.sampled_from(["add", "refuse", "forget", "pickle", "save"]))
            batch = data.draw(st.lists(st.sampled_from(ids), max_size=8))
            if action == "add":
                for user_id in batch:
                    if user_id not in model:
                        model.append(user_id)
                assert users.add(batch) == [model.index(user_id) for user_id in batch]
            elif action == "refuse":
                with pytest.raises(UserIdError):
                    users.add([*batch, *(f"new {number}" for number in range(20)), None])
            elif action == "forget" and batch:
                if batch[0] in model:
                    row = model.index(batch[0])
                    assert users.forget(batch[0]) == row
                    model[row] = None
                else:
                    with pytest.raises(UnknownUserError):
                        users.forget(batch[0])
            elif action == "pickle":
                users = pickle.loads(pickle.dumps(users))
            elif action == "save":
                users = UserRegistry.load(users.save(tmp_path_factory.mktemp("registry")))
            assert users.ids == model and len(users) == len(model)
            assert users.find(ids) == [model.index(user_id) if user_id in model else -1 for user_id in ids]
            assert [user_id in users for user_id in ids] == [user_id in model for user_id in ids]


def test_a_refused_batch_that_made_the_table_grow_leaves_it_as_it_was():
    users = UserRegistry(f"user {number}" for number in range(300))
    users.forget("user 17")
    expected = users.ids
    with pytest.raises(UserIdError):
        users.add([*(f"new {number}" for number in range(5000)), None])
    assert users.ids == expected
    assert users.find(f"new {number}" for number in range(5000)) == [-1] * 5000
    assert users.find(f"user {number}" for number in range(300)) == [*range(17), -1, *range(18, 300)]
    assert users.add(["new 4999"]) == [300]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda users: pickle.loads(pickle.dumps(users))])
def test_a_copy_goes_its_own_way(copied):
    users = UserRegistry(["ann", "bob", 7])
    users.forget("bob")
    other = copied(users)
    assert other == users and other.registry_id == users.registry_id
    assert (other.add(["dan"]), users.add(["eve", "dan"])) == ([3], [3, 4])
    assert other.forget("ann") == 0 and users.ids == ["ann", None, "7", "eve", "dan"]
    with pytest.raises(UserIdError, match="came as text and as an integer"):
        other.add(["7"])


def test_offsets_beyond_the_reach_of_their_type_get_a_wider_one():
    users = UserRegistry(["ann"])
    users._ends = array("B", users._ends)  # as if 4 GiB were 256 bytes
    ids = [f"user number {number}" for number in range(40)]
    users.add(ids)
    assert users._ends.typecode == "Q" and users.ids == ["ann", *ids] and users.index(ids) == list(range(1, 41))


def in_a_fresh_process(code: str, **environment: str) -> str:
    """What `code` prints; the package's own `__init__`, which imports torch, is left out."""
    package = str(Path(trl_sharelora.__file__).parent)
    stub = (
        f"import sys, types; stub = types.ModuleType('trl_sharelora'); stub.__path__ = [{package!r}]; "
        "sys.modules['trl_sharelora'] = stub\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", stub + code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pickle_is_read_by_a_process_with_other_hashes(tmp_path):
    users = UserRegistry([f"user {number}" for number in range(100)])
    (tmp_path / "users.pickle").write_bytes(pickle.dumps(users))
    code = (
        "import pickle\n"
        f"users = pickle.load(open({str(tmp_path / 'users.pickle')!r}, 'rb'))\n"
        "assert users.index(users.ids) == list(range(100)) and 'torch' not in sys.modules"
    )
    for seed in ("1", "2"):
        in_a_fresh_process(code, PYTHONHASHSEED=seed)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmRSS")
@pytest.mark.parametrize(
    "build",
    ["users = UserRegistry(ids)", "for user_id in ids: users.add([user_id])", "users = UserRegistry.load(directory)"],
)
def test_a_user_takes_some_thirty_bytes(tmp_path, build):
    """With Python strings and dicts it was 190. A million users have to fit beside a bank's own tables in 50 MB."""
    UserRegistry(f"user{number:07d}" for number in range(300_000)).save(tmp_path)
    code = f"""
from trl_sharelora.users import UserRegistry
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
directory = {str(tmp_path)!r}
ids = (f"user{{number:07d}}" for number in range(300_000))
users = UserRegistry(["ann"])
before = resident()
{build}
after = resident()
assert len(users) >= 300_000
print((after - before) / len(users))
"""
    assert float(in_a_fresh_process(code)) < 40


# -- which registry it is


def test_the_registry_id_stays_while_users_come_and_go(tmp_path):
    users = UserRegistry(["ann", "bob"])
    registry_id = users.registry_id
    assert len(registry_id) == 64 and int(registry_id, 16)
    users.add(["cat"])
    users.forget("ann")
    assert users.registry_id == registry_id
    loaded = UserRegistry.load(users.save(tmp_path))
    loaded.add(["dan"])
    assert loaded.registry_id == UserRegistry.load(loaded.save(tmp_path)).registry_id == registry_id


def test_processes_that_number_the_same_data_agree_on_the_registry_id(tmp_path):
    ids = [f"user {number}" for number in range(1200)]
    registry_id = UserRegistry(ids).registry_id
    assert UserRegistry(ids).registry_id == registry_id
    assert UserRegistry(ids[:1000]).registry_id == registry_id  # it looks at the first 1000
    assert UserRegistry(ids[:999]).registry_id != registry_id
    assert UserRegistry(reversed(ids)).registry_id != registry_id
    # an older file has none
    (tmp_path / "users.json").write_text(json.dumps({"version": 1, "users": ids}))
    assert UserRegistry.load(tmp_path).registry_id == registry_id


def test_the_registry_id_is_made_when_it_is_first_needed(tmp_path):
    users = UserRegistry()
    assert users.registry_id == UserRegistry.load(users.save(tmp_path)).registry_id == ""
    users.add(["ann"])
    users.save(tmp_path)  # needs it
    users.add(["bob"])
    assert users.registry_id == UserRegistry(["ann"]).registry_id != UserRegistry(["ann", "bob"]).registry_id


def test_the_registry_id_can_be_given_and_is_not_compared(tmp_path):
    users = UserRegistry(["ann"])
    users.registry_id = uuid.UUID(int=7).hex
    assert UserRegistry.load(users.save(tmp_path)).registry_id == uuid.UUID(int=7).hex
    assert users == UserRegistry(["ann"])


def test_a_registry_id_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "users.json").write_text('{"version": 1, "registry_id": 7, "users": ["ann"]}')
    with pytest.raises(UserIdError, match="torn or edited"):
        UserRegistry.load(tmp_path)


# -- pseudonyms


KEY = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv("SHARELORA_USER_KEY", raising=False)
    monkeypatch.delenv("SHARELORA_USER_KEY_FILE", raising=False)


def rfc_2104(key: bytes, message: bytes) -> str:
    """HMAC-SHA256 as its standard writes it."""
    key = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
    inner, outer = (bytes(byte ^ mask for byte in key) for mask in (0x36, 0x5C))
    return hashlib.sha256(outer + hashlib.sha256(inner + message).digest()).hexdigest()


def test_a_pseudonym_is_the_keyed_digest_of_the_id():
    users = UserRegistry(["ann", "bob"], key=KEY)
    assert users.ids == [f"u-{rfc_2104(KEY, b'id' + bytes(1) + name)[:32]}" for name in (b"ann", b"bob")]
    assert users.pseudonymous and not UserRegistry(["ann"]).pseudonymous
    assert users[0] == users.names(["ann"])[0] != UserRegistry(["ann"], key=KEY[::-1])[0]
    assert UserRegistry(["ann"]).names(["ann", 7]) == ["ann", "7"]
    assert repr(users) == "UserRegistry(2 users, pseudonymous)"


@settings(deadline=None)
@given(distinct_ids, st.data())
def test_with_a_key_it_is_the_same_list_and_dict(tmp_path_factory, ids, data):
    users, rows = UserRegistry(key=KEY), {}
    for _ in range(3):
        batch = data.draw(st.lists(st.sampled_from(ids), max_size=8)) if ids else []
        for user_id in batch:
            rows.setdefault(user_id, len(rows))
        assert users.add(batch) == [rows[user_id] for user_id in batch]
    loaded = UserRegistry.load(users.save(tmp_path_factory.mktemp("registry")), key=KEY)
    for registry in (users, loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert registry.find(ids) == [rows.get(user_id, -1) for user_id in ids]
        assert [user_id in registry for user_id in ids] == [user_id in rows for user_id in ids]
        assert registry == users and registry.find(users.ids) == list(range(len(users)))
    if rows:
        gone = data.draw(st.sampled_from(sorted(rows)))
        assert loaded.forget(gone) == rows[gone]
        assert gone not in loaded and loaded.ids[rows[gone]] is None
        again = UserRegistry.load(loaded.save(tmp_path_factory.mktemp("registry")), key=KEY)
        assert again == loaded and again.add([gone]) == [len(users)]


def test_raw_ids_are_in_no_file_no_buffer_and_no_message(tmp_path):
    users = UserRegistry(["ann-a9f3", "bob-77c1"], key=KEY)
    path = users.save(tmp_path)
    content = json.loads(path.read_text())
    assert content["version"] == 2 and content["users"] == users.ids
    assert content["key_check"] == rfc_2104(KEY, b"check" + bytes(1))[:16]
    for held in (path.read_bytes(), users._text, pickle.dumps(users.ids)):
        assert b"ann-a9f3" not in held and b"bob-77c1" not in held and KEY not in held
    assert KEY not in path.read_bytes()
    with pytest.raises(UnknownUserError) as raised:
        users.index(["ann-a9f3", "eve-1234"])
    assert "eve-1234" not in str(raised.value) and "ann-a9f3" not in str(raised.value)
    assert f"1 unknown user(s): '{users.names(['eve-1234'])[0]}'" in str(raised.value) and users[0] in str(
        raised.value
    )
    assert users.unknown_message(["eve-1234"]) == str(raised.value)
    for refused in ([71935], [71935.5], ["71935" * 60], ["71935\ud800"]):
        registry = UserRegistry(["71935"], key=KEY)
        with pytest.raises(UserIdError) as raised:
            registry.add(refused)
        assert "71935" not in str(raised.value) and "row 0" in str(raised.value)
    with pytest.raises(UserIdError, match="u-[0-9a-f]{32}' occurs twice"):
        UserRegistry(["ann", "ann"], key=KEY)


def test_nobody_takes_anothers_place_by_his_pseudonym():
    users = UserRegistry(["ann"], key=KEY)
    plain = "".join(users[0])
    assert isinstance(str(users[0]), Pseudonym) and f"{users[0]}" == plain
    assert isinstance(users[0], Pseudonym) and isinstance(users.ids[0], Pseudonym) and type(plain) is str
    assert users.find([users[0], plain]) == [0, -1] and users.add([plain, users[0]]) == [1, 0]
    assert plain in users and users[1] != plain


@pytest.mark.parametrize(
    "text", ["ann@example.com", "", "u-", "u-" + "A" * 32, "u-" + "0" * 33, "u-" + "0" * 32 + "\n"]
)
def test_a_pseudonym_that_is_none_is_refused_and_not_shown(text, tmp_path):
    """Taken, it would stand in the file as it is, and the file could not be read again."""
    users = UserRegistry(["ann"], key=KEY)
    for call in (
        lambda: users.add(["bob", Pseudonym(text)]),
        lambda: UserRegistry([Pseudonym(text)], key=KEY),
        lambda: users.find([Pseudonym(text)]),
        lambda: users.forget(Pseudonym(text)),
        lambda: Pseudonym(text) in users,
        lambda: UserRegistry.load(users.save(tmp_path)).names([Pseudonym(text)]),
    ):
        with pytest.raises(UserIdError, match="Pseudonym .*u- and 32 hex digits.*as plain text") as raised:
            call()
        assert "ann@" not in str(raised.value) and "00" not in str(raised.value)
    assert len(users) == 1 and UserRegistry.load(users.save(tmp_path), key=KEY) == users
    assert users.add([Pseudonym("u-" + "0" * 32)]) == [1]  # of an id that only another has


def test_ids_are_checked_in_the_words_of_the_registry(tmp_path):
    """Before rows are used; nobody is added."""
    plain, keyed = UserRegistry(["ann"]), UserRegistry(["ann"], key=KEY)
    locked = UserRegistry.load(keyed.save(tmp_path))
    for bad in (["bob", 71935.5], ["bob", "71935" * 60], ["bob", "71935\ud800"], [71935, "71935"]):
        rows = [{"who": user_id} for user_id in bad]
        with pytest.raises(UserIdError, match="71935"):
            plain.check_ids(rows, "who")
        for users in (keyed, locked):
            with pytest.raises(UserIdError, match="row 1 of column 'who'") as raised:
                users.check_ids(rows, "who")
            assert "71935" not in str(raised.value) and len(users) == 1
    with pytest.raises(UserIdError, match=keyed.names([71935])[0]):
        keyed.check_ids(rows, "who")
    for users in (plain, keyed, locked):
        users.check_ids([{"who": "ann"}, {"who": "bob"}], "who")
        assert len(users) == 1
        with pytest.raises(DataError, match="There is no column 'user_id'"):
            users.check_ids(Dataset.from_list([{"who": "ann"}]))


def test_ids_that_differ_by_normalisation_only_are_one_user_of_a_pseudonymous_list():
    assert UserRegistry([JOSE_ONE], key=KEY).index([JOSE_TWO]) == [0]


def test_the_number_7_and_the_text_7_do_not_mix_under_a_key_either(tmp_path):
    with pytest.raises(UserIdError, match="u-[0-9a-f]{32}' came as text and as an integer"):
        UserRegistry([7], key=KEY).add(["7"])
    assert UserRegistry.load(UserRegistry([7], key=KEY).save(tmp_path), key=KEY).add(["7"]) == [0]


def test_without_the_key_there_are_rows_and_pseudonyms_and_no_look_up(tmp_path):
    users = UserRegistry(["ann", "bob"], key=KEY)
    users.save(tmp_path)
    locked = UserRegistry.load(tmp_path)
    assert locked == users and len(locked) == 2 and locked.ids == users.ids and locked.registry_id == users.registry_id
    needed = "looked up by id without the key. Set SHARELORA_USER_KEY or SHARELORA_USER_KEY_FILE.*unlock"
    for call in (
        lambda: locked.find(["ann"]),
        lambda: locked.add(["ann"]),
        lambda: locked.forget("ann"),
        lambda: "ann" in locked,
        lambda: locked.names(["ann"]),
        lambda: locked.unlock(),
    ):
        with pytest.raises(ConfigError, match=needed) as raised:
            call()
        assert "'ann'" not in str(raised.value)
    assert locked.index([users[1]]) == [1] and locked.forget(users[1]) == 1
    assert locked.unlock(KEY).index(["ann"]) == [0]
    locked.save(tmp_path)
    assert UserRegistry.load(tmp_path, key=KEY).find(["ann", "bob"]) == [0, -1]


def test_another_key_is_noticed(tmp_path, monkeypatch):
    UserRegistry(["ann"], key=KEY).save(tmp_path)
    with pytest.raises(ConfigError, match="is not the one these users' pseudonyms were made with"):
        UserRegistry.load(tmp_path, key=KEY[::-1])
    with pytest.raises(ConfigError, match="is not the one"):
        UserRegistry.load(tmp_path).unlock(KEY[::-1])
    monkeypatch.setenv("SHARELORA_USER_KEY", KEY[::-1].decode())
    with pytest.raises(ConfigError, match="is not the one"):
        UserRegistry.load(tmp_path)
    assert len(UserRegistry.load(tmp_path, key=False)) == 1
    assert UserRegistry(["ann"], key=KEY) != UserRegistry(["ann"], key=KEY[::-1])
    assert UserRegistry(key=KEY) != UserRegistry(key=False)
    UserRegistry(["ann"], key=False).save(tmp_path / "plain")
    assert UserRegistry.load(tmp_path / "plain").ids == ["ann"]  # the environment's key is of others
    with pytest.raises(ConfigError, match="holds plain ids"):
        UserRegistry.load(tmp_path / "plain", key=KEY)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "user.key"
    file.write_bytes(KEY + b"\n")
    expected = UserRegistry(["ann"], key=KEY).ids
    assert UserRegistry(["ann"], key=file).ids == UserRegistry(["ann"], key=str(file)).ids == expected
    assert read_user_key() is None and UserRegistry(["ann"]).ids == ["ann"]
    rows = Dataset.from_dict({"user_id": ["ann"]})
    assert UserRegistry.from_dataset(rows, key=KEY).ids == expected
    with monkeypatch.context() as patch:
        patch.setenv("SHARELORA_USER_KEY_FILE", str(file))
        assert UserRegistry(["ann"]).ids == UserRegistry.from_dataset(rows).ids == expected
        path = UserRegistry(["ann"]).save(tmp_path)
        assert UserRegistry.load(path).index(["ann"]) == [0]
        assert UserRegistry(["ann"], key=False).ids == ["ann"]
        patch.setenv("SHARELORA_USER_KEY", KEY.decode())
        with pytest.raises(ConfigError, match="Both SHARELORA_USER_KEY and SHARELORA_USER_KEY_FILE"):
            UserRegistry()
        patch.delenv("SHARELORA_USER_KEY_FILE")
        assert UserRegistry(["ann"]).ids == expected


def test_a_key_that_cannot_be_used_is_refused_and_not_repeated(tmp_path, monkeypatch):
    (tmp_path / "short.key").write_text("too short\n")
    with pytest.raises(ConfigError, match="short.key' has 9 bytes; at least 16 random ones.*openssl rand -hex 32"):
        UserRegistry(key=tmp_path / "short.key")
    with pytest.raises(ConfigError, match="The key that came has 15 bytes"):
        UserRegistry(key=b"x" * 15)
    for text in (KEY.decode(), KEY.decode() * 20, str(tmp_path), "a\0b"):  # the key itself where its file is expected
        with pytest.raises(ConfigError, match="cannot be read") as raised:
            UserRegistry(key=text)
        assert text not in str(raised.value)
    for key in (True, 7):
        with pytest.raises(ConfigError, match="bytes, or the path of a file"):
            UserRegistry(key=key)
    monkeypatch.setenv("SHARELORA_USER_KEY", "secret")
    with pytest.raises(ConfigError, match="The key in SHARELORA_USER_KEY has 6 bytes"):
        UserRegistry()


@pytest.mark.parametrize("users", [["ann"], ["u-12"], ["u-" + "A" * 32]])
def test_a_list_of_pseudonyms_that_holds_something_else_is_refused(tmp_path, users):
    content = {"version": 2, "registry_id": "f00", "key_check": "0" * 16, "users": users}
    (tmp_path / "users.json").write_text(json.dumps(content))
    with pytest.raises(UserIdError, match="is a list of pseudonyms, and its place 0 holds something else"):
        UserRegistry.load(tmp_path)
    (tmp_path / "users.json").write_text(json.dumps({**content, "users": [], "key_check": 7}))
    with pytest.raises(UserIdError, match="torn or edited"):
        UserRegistry.load(tmp_path)


def test_a_plain_list_becomes_one_of_pseudonyms_row_by_row(tmp_path):
    plain = UserRegistry(["ann", 7, "José", "bob"], key=False)
    name = plain.registry_id
    plain.forget("bob")
    plain.add(["cat"])
    keyed = plain.pseudonymised(KEY)
    digests = [f"u-{rfc_2104(KEY, b'id' + bytes(1) + text.encode())[:32]}" for text in ("ann", "7", "José", "cat")]
    assert keyed.ids == [*digests[:3], None, digests[3]] and keyed.registry_id == name
    assert keyed.index(["cat", 7, "ann", "Jose\u0301"]) == [4, 1, 0, 2] and keyed.find(["bob"]) == [-1]
    assert keyed.add(["dan", "bob"]) == [5, 6] and len(plain) == 5 and plain.index(["cat"]) == [4]
    with pytest.raises(UserIdError, match="as text and as an integer"):
        keyed.add(["7"])  # what was known of how an id came is known still
    # over a file
    plain.save(tmp_path)
    UserRegistry.load(tmp_path, key=False).pseudonymised(KEY).save(tmp_path)
    content = (tmp_path / "users.json").read_text()
    assert not any(user_id in content for user_id in ("ann", "José", "cat", '"7"'))
    assert UserRegistry.load(tmp_path, key=KEY).index(["cat", "ann"]) == [4, 0]
    with pytest.raises(ConfigError, match="pseudonyms already"):
        keyed.pseudonymised(KEY)
    with pytest.raises(ConfigError, match="There is no key"):
        plain.pseudonymised()


def test_with_a_key_in_the_environment_no_message_shows_an_id(monkeypatch):
    """Also before there is a registry, as where a file is read."""
    for value in (1.25, "name@example.org" * 40, "ann\ud800"):
        with pytest.raises(UserIdError) as shown:
            user_id_as_text(value)
        with monkeypatch.context() as patch:
            patch.setenv("SHARELORA_USER_KEY", "k" * 32)
            with pytest.raises(UserIdError) as hidden:
                user_id_as_text(value)
        assert ("1.25" in str(shown.value)) or ("name@" in str(shown.value)) or ("ann" in str(shown.value))
        assert not any(part in str(hidden.value) for part in ("1.25", "name@", "ann"))
