"""The users' records in memory and in files, against a plain dict of bytes; and what happens to them when things go wrong."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trl_sharelora.errors import BankBusyError, BankError, BankFullError, CapacityError
from trl_sharelora.sharelora import store as store_module
from trl_sharelora.sharelora.store import Layout, UserStore, erase_row, read_manifest, read_row


USERS = 12
MODULES = (("one", (2, 3)), ("two", (2, 5)))
LAYOUT = Layout(MODULES)
KINDS = ("ram", "mmap")


def make_store(kind="mmap", layout=LAYOUT, registry="r", **kwargs):
    return UserStore(layout, kind, registry, **kwargs)


def records(rows, version=0, layout=LAYOUT):
    """A record for each row that tells the row and its version: `(rows, record_bytes)` uint8."""
    out = torch.zeros(len(rows), layout.record_bytes, dtype=torch.uint8)
    step, weight, first, second = layout.split(out)
    for place, row in enumerate(rows):
        generator = torch.Generator().manual_seed(1000 * version + row)
        step[place] = version
        for part in (weight, first, second):
            part[place] = torch.randn(part.shape[1:], generator=generator).to(part.dtype)
    return out


def put(store, rows, version=0):
    store.write(rows, records(rows, version))


def assert_holds(store, expected, users=USERS):
    """`expected`: {row: version}; everybody else is zero."""
    for row in range(users):
        found = store.read([row])
        if row in expected:
            assert torch.equal(found, records([row], expected[row])), row
        else:
            assert not found.any() and row not in store, row
    assert store.rows() == sorted(expected)


def segment_files(directory):
    return sorted(Path(directory).glob("rows-*.safetensors"))


def saved(directory, kind="mmap", rows=range(4), users=USERS):
    store = make_store(kind)
    put(store, list(rows))
    store.save(directory, users)
    return store


# -- a record


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("second_moment", "rank_axis", "second"), [("full", 0, 21), ("row", 0, 7 + 1), ("row", 1, 2 + 1)]
)
def test_a_record_keeps_each_part_by_itself(dtype, second_moment, rank_axis, second):
    """Odd sizes: 7 x 2 and 1 x 7 are 21 weights. What is written into one part is found there and nowhere else."""
    shapes = ((7, 2), (1, 7)) if rank_axis == 0 else ((7, 2), (7, 1))
    layout = Layout((("a", shapes[0]), ("b", shapes[1])), dtype, second_moment, rank_axis)
    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert (layout.numel, layout.second_numel) == (21, second)
    # 16 bytes for the step count, then three parts, each padded to 16 bytes
    parts = [16, -(-21 * width // 16) * 16, -(-21 * width // 16) * 16, -(-second * 4 // 16) * 16]
    assert layout.record_bytes == sum(parts)
    raw = torch.zeros(3, layout.record_bytes, dtype=torch.uint8)
    values = [torch.randn(size) for size in (1, 21, 21, second)]
    for number, value in enumerate(values):
        raw.zero_()
        part = layout.split(raw)[number]
        part[1] = value.to(part.dtype) if number else value[0]
        start = sum(parts[:number])
        types = [np.float32, *[np.float32 if dtype == "float32" else np.uint16] * 2, np.float32]
        stored = value.to(torch.bfloat16).view(torch.uint16).numpy() if types[number] == np.uint16 else value.numpy()
        assert raw[1, start : start + stored.nbytes].numpy().tobytes() == stored.tobytes()
        raw[1, start : start + stored.nbytes] = 0
        assert not raw.any()
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


# -- reading and writing


@pytest.mark.parametrize("kind", KINDS)
def test_written_overwritten_and_never_written(kind):
    store = make_store(kind)
    assert_holds(store, {})
    put(store, [3, 0, 7])
    assert_holds(store, {3: 0, 0: 0, 7: 0})
    put(store, [7, 11], version=1)
    put(store, [])
    assert_holds(store, {3: 0, 0: 0, 7: 1, 11: 1})
    assert torch.equal(
        store.read([7, 1, 7]), torch.cat([records([7], 1), torch.zeros_like(records([1])), records([7], 1)])
    )
    store.write([2, 2], torch.cat([records([2], 1), records([2], 2)]))  # the last word is what counts
    assert_holds(store, {3: 0, 0: 0, 7: 1, 11: 1, 2: 2})
    store.close()
    assert_holds(store, {})


def test_a_user_who_never_came_takes_no_space(tmp_path):
    store = make_store(folder=tmp_path / "work")
    put(store, [5, 900_000])
    (file,) = segment_files(tmp_path / "work")
    assert file.stat().st_size == 4096 + 2 * LAYOUT.record_bytes
    store.save(tmp_path / "bank", 1_000_000)
    assert sum(path.stat().st_size for path in (tmp_path / "bank").iterdir()) < 4096 + 2 * LAYOUT.record_bytes + 1500


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [-1, USERS])
def test_a_row_that_there_is_not(kind, row):
    store = make_store(kind, num_users=USERS)
    put(store, [USERS - 1])
    for act in (lambda: store.read([0, row]), lambda: put(store, [0, row], 1)):
        with pytest.raises(
            CapacityError, match=rf"Rows \[{row}\] came; this adapter has the rows 0 to 11.*grow_users"
        ):
            act()
    assert row not in store
    assert_holds(store, {USERS - 1: 0})


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_that_could_not_be_loaded_is_not_saved(kind, tmp_path):
    store = make_store(kind)
    put(store, [0, 9])
    with pytest.raises(CapacityError, match="Row 9 has a record, but the adapter has 9 users"):
        store.save(tmp_path, 9)
    assert not (tmp_path / "bank.json").exists()
    store.save(tmp_path, 10)
    assert_holds(store, {0: 0, 9: 0})


# -- saving and loading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_saved_and_loaded_in_all_combinations_of_kinds(kind, other, tmp_path):
    store = make_store(kind)
    put(store, range(5))
    put(store, [1], version=1)
    store.save(tmp_path / "a", USERS)
    expected = {0: 0, 1: 1, 2: 0, 3: 0, 4: 0}
    assert_holds(store, expected)
    second = make_store(other)
    put(second, [9, 1], version=7)  # is replaced
    second.load(tmp_path / "a", USERS)
    assert_holds(second, expected)
    put(second, [2, 8], version=2)
    second.save(tmp_path / "b", USERS)
    third = make_store(kind)
    third.load(tmp_path / "b", USERS + 3)  # users may have been added
    assert_holds(third, expected | {2: 2, 8: 2})
    assert_holds(store, expected)
    for row in range(USERS):
        moves = read_row(tmp_path / "b", row)
        weight = torch.cat([moves[name].flatten() for name, _ in MODULES])
        assert [tuple(move.shape) for move in moves.values()] == [shape for _, shape in MODULES]
        assert torch.equal(weight, LAYOUT.split(third.read([row]))[1][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_writes_what_changed_and_links_the_rest(kind, tmp_path):
    store = make_store(kind, folder=tmp_path / "work")
    put(store, range(6))
    store.save(tmp_path / "a", USERS)
    put(store, [2, 9], version=1)
    store.save(tmp_path / "b", USERS)
    store.save(tmp_path / "c", USERS)
    (first,), two, three = (segment_files(tmp_path / name) for name in "abc")
    assert [file.name for file in two] == [file.name for file in three] and two[0].name == first.name
    for one, other in [(first, two[0]), (first, three[0]), (two[1], three[1])]:
        assert one.samefile(other)
    tensors = load_file(two[1])  # an ordinary safetensors file
    assert tensors["rows"].tolist() == [2, 9]
    assert torch.equal(tensors["records"], records([2, 9], 1))
    assert tensors["crc32"].tolist() == [zlib.crc32(record.numpy().tobytes()) for record in records([2, 9], 1)]
    assert [item["records"] for item in read_manifest(tmp_path / "b")["segments"]] == [6, 2]
    store.save(tmp_path / "a", USERS)  # into a folder that has an older save
    assert [file.name for file in segment_files(tmp_path / "a")] == [file.name for file in two]


@pytest.mark.parametrize("kind", KINDS)
def test_mostly_outdated_files_become_one(kind, tmp_path):
    store = make_store(kind)
    put(store, range(8))
    store.save(tmp_path / "a", USERS)
    for version in (1, 2):
        put(store, range(6), version)
        store.save(tmp_path / "b", USERS)
    expected = dict.fromkeys(range(6), 2) | {6: 0, 7: 0}
    assert_holds(store, expected)
    put(store, [0], version=3)
    store.save(tmp_path / "b", USERS)
    counts = [len(load_file(file)["rows"]) for file in segment_files(tmp_path / "b")]
    assert sum(counts) <= 2 * 8
    assert_holds(store, expected | {0: 3})
    old = make_store(kind)
    old.load(tmp_path / "a", USERS)  # a checkpoint is what it was
    assert_holds(old, dict.fromkeys(range(8), 0))


@pytest.mark.parametrize("kind", KINDS)
def test_files_do_not_become_ever_more(kind, tmp_path, monkeypatch):
    """Other users at every save: nothing is ever outdated, yet each file is an open one and a link per checkpoint."""
    monkeypatch.setattr(store_module, "_MOST_SEGMENTS", 6)
    store = make_store(kind)
    written = 0
    for row in range(40):
        put(store, [row])
        store.save(tmp_path, 40)
        assert len(segment_files(tmp_path)) <= 6
        written += sum(file.stat().st_mtime_ns != 0 for file in segment_files(tmp_path)[-1:])
    again = make_store(kind)
    again.load(tmp_path, 40)
    assert_holds(again, dict.fromkeys(range(40), 0), users=40)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_it_is_a_dict(kind, seed, tmp_path, monkeypatch):
    """Random writes, saves, loads of older saves, deleted folders and copies, beside a plain dict."""
    monkeypatch.setattr(store_module, "_MOST_SEGMENTS", 5)
    draw = random.Random(seed)
    store, model, saves, version = make_store(kind), {}, {}, 0
    for number in range(60):
        action = draw.choices(["write", "save", "load", "rotate", "copy"], [8, 6, 1, 3, 1])[0]
        if action == "write":
            version += 1
            rows = draw.sample(range(USERS), draw.randint(1, 5))
            put(store, rows, version)
            model |= dict.fromkeys(rows, version)
        elif action == "save":
            name = draw.choice([*saves, f"save{number}"])  # sometimes over an old one
            store.save(tmp_path / name, USERS)
            saves[name] = dict(model)
        elif action == "load" and saves:
            name = draw.choice(list(saves))
            store.load(tmp_path / name, USERS)
            model = dict(saves[name])
        elif action == "rotate" and saves:
            name = draw.choice(list(saves))
            del saves[name]
            for path in (tmp_path / name).iterdir():
                path.unlink()
            (tmp_path / name).rmdir()
        elif action == "copy":
            copied = store.snapshot()
            put(store, [0], 10**6)  # the copy is a thing of its own
            store.close()
            store = copied
        assert_holds(store, model)
        for name, expected in list(saves.items())[-2:]:
            reader = make_store("mmap")
            reader.load(tmp_path / name, USERS)
            assert_holds(reader, expected)
            reader.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_several_owners_save_one_bank(kind, seed, tmp_path):
    """Each process keeps its own users and all write into one folder; a file that one of them has done with is still another's."""
    draw = random.Random(seed)
    saved(tmp_path / "bank", rows=range(USERS)).close()
    model, version = dict.fromkeys(range(USERS), 0), 0
    for run in range(4):  # a new run gives the users to other owners
        owner = np.array([draw.randrange(3) for _ in range(USERS)])
        stores = [make_store(kind) for _ in range(3)]
        for number, store in enumerate(stores):
            store.load(tmp_path / "bank", USERS)
            store.keep_only(owner == number)
        for save in range(3):
            for number, store in enumerate(stores):
                mine = np.flatnonzero(owner == number).tolist()
                for _ in range(draw.randrange(3)):
                    version += 1
                    rows = draw.sample(mine, draw.randint(0, len(mine)))
                    put(store, rows, version)
                    model |= dict.fromkeys(rows, version)
                assert_holds(store, {row: model[row] for row in mine})
            folder = tmp_path / f"{run}-{save}"
            draw.shuffle(stores_in_turn := list(stores))
            segments = [item for store in stores_in_turn for item in store.save_segments(folder)]
            stores[0].write_manifest(folder, list({item["file"]: item for item in segments}.values()), USERS)
            again = make_store(kind)
            again.load(folder, USERS)
            assert_holds(again, model)
        stores[0].write_manifest(folder, list({item["file"]: item for item in segments}.values()), USERS)
        os.rename(tmp_path / "bank", tmp_path / f"old-{run}")
        os.rename(folder, tmp_path / "bank")


def test_rows_given_away_before_a_save_do_not_come_back(tmp_path):
    """Also where there is more room for rows than users, as it is grown in steps."""
    store = make_store(folder=tmp_path / "work")
    for row in range(6):
        put(store, [row])
    store.keep_only(np.array([True, False, True, True, True, False]))
    put(store, [0], version=1)
    store.save(tmp_path / "a", 6)
    assert_holds(store, {0: 1, 2: 0, 3: 0, 4: 0}, users=6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_it_reads_from_is_deleted(kind, tmp_path):
    saved(tmp_path / "old", rows=range(6)).close()
    store = make_store(kind)
    store.load(tmp_path / "old", USERS)
    put(store, [1], version=1)
    for path in (tmp_path / "old").iterdir():
        path.unlink()
    expected = dict.fromkeys(range(6), 0) | {1: 1}
    assert_holds(store, expected)
    store.save(tmp_path / "new", USERS)
    again = make_store(kind)
    again.load(tmp_path / "new", USERS)
    assert_holds(again, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_leaves_the_original_where_it_is(kind, tmp_path):
    """The copy's own folder goes with it; the original must not take it for where its files are, and copy all of them anew."""
    saved(tmp_path / "a", rows=range(6)).close()
    store = make_store(kind)
    store.load(tmp_path / "a", USERS)
    store.snapshot().close()
    store.save(tmp_path / "b", USERS)
    (one,), (other,) = segment_files(tmp_path / "a"), segment_files(tmp_path / "b")
    assert one.samefile(other)
    copied = make_store(kind, num_users=20).snapshot()
    assert copied.num_users == 20


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_files_are_copied_where_they_cannot_be_linked(reason, tmp_path, monkeypatch):
    store = saved(tmp_path / "a")
    put(store, [3], version=1)

    def refuse(source, target):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", refuse)
    store.save(tmp_path / "b", USERS)
    for file in segment_files(tmp_path / "a"):
        other = tmp_path / "b" / file.name
        assert not file.samefile(other) and file.read_bytes() == other.read_bytes()
    assert not list((tmp_path / "b").glob("*.tmp"))
    again = make_store()
    again.load(tmp_path / "b", USERS)
    assert_holds(again, {0: 0, 1: 0, 2: 0, 3: 1})


def test_erased_rows_are_zero_in_every_save_that_shares_the_file(tmp_path):
    store = make_store(folder=tmp_path / "work")
    put(store, range(6))
    store.save(tmp_path / "a", USERS)
    put(store, [1, 2, 3], version=1)
    store.save(tmp_path / "b", USERS)
    before = {file: file.read_bytes() for name in "ab" for file in segment_files(tmp_path / name)}
    assert erase_row(tmp_path / "b", 2) == 2  # the outdated one as well
    assert erase_row(tmp_path / "b", 11) == 0
    for kind in KINDS:
        again = make_store(kind)
        again.load(tmp_path / "b", USERS)  # checksums hold
        assert not again.read([2]).any()
        assert torch.equal(again.read([1, 3]), records([1, 3], 1))
    for file, old in before.items():
        changed = [
            place for place, (one, other) in enumerate(zip(old, file.read_bytes(), strict=True)) if one != other
        ]
        assert len(file.read_bytes()) == len(old) and len(changed) <= LAYOUT.record_bytes + 4
    assert not any(
        records([2], version).numpy().tobytes() in file.read_bytes() for file in before for version in (0, 1)
    )


# -- bad input: a typed error with file, expected, found and remedy; what was there before is still there


def refused(directory, match, kind="mmap", error=BankError, layout=LAYOUT, registry="r", users=USERS):
    """Loading is refused by a store with users of its own, who are untouched by it."""
    for each in KINDS if kind is None else (kind,):
        store = make_store(each, layout, registry)
        store.write([0, 5], records([0, 5], 4, layout))
        with pytest.raises(error, match=match) as raised:
            store.load(directory, users)
        assert str(directory) in str(raised.value)
        assert torch.equal(store.read([0, 5]), records([0, 5], 4, layout)) and store.rows() == [0, 5]


@pytest.mark.parametrize("size", [0, 5, 100, 4095, 4200, -1])
def test_a_truncated_file(tmp_path, size):
    saved(tmp_path).close()
    (file,) = segment_files(tmp_path)
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    refused(
        tmp_path, r"is not a whole file of users' rows.*truncated, damaged or of another adapter: copy it again", None
    )
    for act in (lambda: read_row(tmp_path, 1), lambda: erase_row(tmp_path, 1)):
        with pytest.raises(BankError, match="is not a whole file"):
            act()


def test_a_missing_file(tmp_path):
    saved(tmp_path).close()
    (file,) = segment_files(tmp_path)
    file.unlink()
    refused(tmp_path, r"rows-.* is missing, but bank.json names it.*Copy the whole folder again", None)


def test_a_damaged_record(tmp_path):
    saved(tmp_path).close()
    (file,) = segment_files(tmp_path)
    content = bytearray(file.read_bytes())
    content[4096 + 2 * LAYOUT.record_bytes + 40] ^= 1
    file.write_bytes(content)
    refused(tmp_path, r"record of row 2 in .* is damaged \(its checksum differs\)", kind="ram")
    store = make_store("mmap")  # reads when somebody comes
    store.load(tmp_path, USERS)
    assert torch.equal(store.read([0, 1, 3]), records([0, 1, 3]))
    for act in (lambda: store.read([2]), lambda: store.read([2]), lambda: read_row(tmp_path, 2)):
        with pytest.raises(BankError, match="record of row 2 in .* is damaged.*Copy the file again"):
            act()


@pytest.mark.parametrize("what", ["rows", "crc32", "header"])
def test_a_damaged_table_gives_nobody_anothers_row(tmp_path, what):
    saved(tmp_path).close()
    (file,) = segment_files(tmp_path)
    content = bytearray(file.read_bytes())
    if what == "header":
        content = bytearray(content.replace(b'"data_offsets": [0, ', b'"data_offsets": [9, ', 1))
    else:
        content[4096 + 4 * LAYOUT.record_bytes + (0 if what == "rows" else 4 * 8)] ^= 1
    file.write_bytes(content)
    match = {
        "rows": "list of its rows is damaged",
        "crc32": "record of row 0 .* is damaged",
        "header": "places records",
    }
    refused(tmp_path, match[what], kind="ram")


def test_a_file_of_another_layout_under_the_same_name(tmp_path):
    saved(tmp_path / "a").close()
    other = make_store(layout=Layout((("one", (9, 9)),)))
    other.write([0], torch.zeros(1, other.layout.record_bytes, dtype=torch.uint8))
    other.save(tmp_path / "b", USERS)
    os.replace(segment_files(tmp_path / "b")[0], segment_files(tmp_path / "a")[0])
    refused(
        tmp_path / "a", rf"records of {other.layout.record_bytes} bytes; records of {LAYOUT.record_bytes} bytes were"
    )


def test_files_of_two_different_saves(tmp_path):
    saved(tmp_path / "a").close()
    saved(tmp_path / "b", rows=range(5)).close()
    os.replace(segment_files(tmp_path / "b")[0], segment_files(tmp_path / "a")[0])
    refused(tmp_path / "a", r"has 5 records up to row 4; bank.json names 4 records of 12 users.*two different saves")


def test_no_manifest(tmp_path):
    saved(tmp_path).close()
    (tmp_path / "bank.json").unlink()
    refused(tmp_path, r"There is no .*bank.json.*save was cut off.*take another checkpoint", None)


def edit(directory, **values):
    path = directory / "bank.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN = {
    "segments": [
        5,
        [1],
        [{}],
        [{"file": "../rows-1-a.safetensors", "records": 4}],
        [{"file": "rows-000001-0a.safetensors"}],
        None,
    ],
    "num_users": ["12", None],
    "record_bytes": [1, None],
    "registry_id": [7],
    "layout": [
        {},
        [],
        None,
        LAYOUT.to_json() | {"dtype": "float16"},
        LAYOUT.to_json() | {"rank_axis": 3, "second_moment": "row"},
    ],
    "format": ["something"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BROKEN.items() for value in values], ids=str
)
def test_an_edited_manifest(tmp_path, key, value):
    saved(tmp_path).close()
    edit(tmp_path, **{key: value})
    refused(tmp_path, "is not the list of a bank's files .*torn or edited. Take it from a backup")


def test_a_torn_manifest(tmp_path):
    saved(tmp_path).close()
    text = (tmp_path / "bank.json").read_text()
    for torn in ("", text[:50], text[:-5], "[1]", "\0" * 20, b"\xff\xfe"):
        (tmp_path / "bank.json").write_bytes(torn if isinstance(torn, bytes) else torn.encode())
        refused(tmp_path, "is not the list of a bank's files .*torn or edited. Take it from a backup")


def test_another_version(tmp_path):
    saved(tmp_path).close()
    edit(tmp_path, version=2)
    refused(
        tmp_path,
        "was written as version 2 of the format; this version of trl_sharelora reads version 1. Read it with",
        None,
    )


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        (
            Layout((("one", (4, 3)), ("two", (4, 5)))),
            r"one has a move of shape \(2, 3\) in the file and \(4, 3\) here. r, share",
        ),
        (Layout((("one", (2, 3)),)), r"two has a move of shape \(2, 5\) in the file and none here"),
        (Layout((*MODULES, ("six", (2, 3)))), r"six has a move of shape none in the file and \(2, 3\) here"),
        (
            Layout(MODULES, "bfloat16"),
            "dtype is 'float32' in the file and 'bfloat16' here. Give the config the file's value",
        ),
        (Layout(MODULES, second_moment="row"), "second_moment is 'full' in the file and 'row' here"),
        (Layout(MODULES[::-1]), "the modules come in another order"),
    ],
    ids=["r", "fewer", "more", "dtype", "second_moment", "order"],
)
def test_another_layout(tmp_path, layout, match):
    saved(tmp_path).close()
    refused(tmp_path, match, layout=layout)


def test_another_registry_or_more_users(tmp_path):
    saved(tmp_path).close()
    refused(
        tmp_path,
        "belongs to other users: registry r with 12 users, this adapter has registry x with 12.*from the same save",
        registry="x",
    )
    refused(tmp_path, "registry r with 12 users, this adapter has registry r with 11", users=11)


# -- a full disk


class Disk:
    """A disk with a number of free bytes, or a number of calls that still succeed."""

    def __init__(self, monkeypatch, call, after):
        self.left, self.real, self.call = after, getattr(os, call), call
        monkeypatch.setattr(os, call, self)

    def __call__(self, *args):
        if self.left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        return self.real(*args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "link"])
def test_a_full_disk_at_any_moment_loses_nothing_and_can_be_retried(kind, call, tmp_path, monkeypatch):
    """Every call of one kind fails once: while writing back, while closing a file, while linking, while the list is written."""
    failures = 0
    for after in range(40):
        store = make_store(kind, folder=tmp_path / f"work{after}")
        put(store, range(6))
        store.save(tmp_path / f"a{after}", USERS)
        put(store, [0, 1], version=1)
        store.save(tmp_path / f"a{after}", USERS)
        expected = dict.fromkeys(range(6), 0) | {0: 1, 1: 1}
        before = {path.name: path.read_bytes() for path in (tmp_path / f"a{after}").iterdir()}
        with monkeypatch.context() as patch:
            disk = Disk(patch, call, after)
            written = False
            try:
                put(store, [1, 2, 3, 9], version=2)
                written = True
                store.save(tmp_path / f"b{after}", USERS)
                failed = False
            except BankFullError as error:
                failed = True
                assert (
                    "cannot be written" in str(error) and "MiB free" in str(error) and "save_total_limit" in str(error)
                )
                assert str(tmp_path) in str(error)
        new = expected | dict.fromkeys([1, 2, 3, 9], 2)
        assert disk.left == 0 or not failed
        assert_holds(store, new if written else expected)
        assert before == {path.name: path.read_bytes() for path in (tmp_path / f"a{after}").iterdir()}
        if failed:
            failures += 1
            # only a failure after the list is in its place may leave it there
            assert call == "fsync" or not (tmp_path / f"b{after}" / "bank.json").exists()
            assert not list(tmp_path.glob("**/*.tmp"))
            if after % 2:  # others come in between, or the same again
                put(store, [10], version=3)
                new[10] = 3
            put(store, [1, 2, 3, 9], version=2)
            store.save(tmp_path / f"b{after}", USERS)
        again = make_store("mmap")
        again.load(tmp_path / f"b{after}", USERS)
        assert_holds(again, new)
        again.close()
        store.close()
        if not failed:
            break
    assert not failed and failures >= {"posix_fallocate": 1, "pwrite": 4, "fsync": 2, "link": 1}[call]


def test_rows_that_could_not_be_written_are_not_found_in_the_file_later(tmp_path, monkeypatch):
    """As on a file system where even reserved space can run out: the new rows of a failed write are not taken for records."""
    store = make_store(folder=tmp_path / "work")
    put(store, [0, 1])
    store.save(tmp_path / "a", USERS)
    put(store, [5])
    with monkeypatch.context() as patch:
        Disk(patch, "pwrite", 1)
        with pytest.raises(BankFullError):
            put(store, [0, 1], version=1)
    store.save(tmp_path / "b", USERS)  # without a retry
    assert_holds(store, {0: 0, 1: 0, 5: 0})
    again = make_store()
    again.load(tmp_path / "b", USERS)
    assert_holds(again, {0: 0, 1: 0, 5: 0})


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting is not permitted")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_really_full_disk(kind, small_disk):
    layout = Layout((("one", (4, 250)),))
    store = make_store(kind, layout, folder=small_disk / "work")
    first = records(range(6), 0, layout)
    store.write(range(6), first)
    store.save(small_disk / "a", 100)  # 72 of 256 KiB
    (small_disk / "filler").write_bytes(bytes(150 * 1024))
    second = records(range(4, 10), 1, layout)
    with pytest.raises(BankFullError, match=r"No space left on device \(0 MiB free\)"):
        store.write(range(4, 10), second)
        store.save(small_disk / "b", 100)
    again = make_store("ram", layout)
    again.load(small_disk / "a", 100)
    assert torch.equal(again.read(range(6)), first)
    (small_disk / "filler").unlink()
    store.write(range(4, 10), second)
    store.save(small_disk / "b", 100)
    again.load(small_disk / "b", 100)
    assert torch.equal(again.read(range(10)), torch.cat([first[:4], second]))
    store.close()
    again.close()


# -- two processes


HOLDER = """
import sys, torch
from trl_sharelora.sharelora.store import Layout, UserStore
store = UserStore(Layout((("one", (2, 3)), ("two", (2, 5)))), "mmap", "r", sys.argv[1])
store.write([1], torch.ones(1, store.layout.record_bytes, dtype=torch.uint8))
print("ready", flush=True)
sys.stdin.read()
"""


def test_two_processes_on_one_folder(tmp_path):
    work = tmp_path / "work"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "ready\n"
        store = make_store(folder=work)
        for _ in range(2):
            with pytest.raises(
                BankBusyError,
                match=rf"work is being written to by another process \(pid {holder.pid}\).*another output_dir",
            ):
                put(store, [0])
        assert len(segment_files(work)) == 1 and store.rows() == []
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert len(segment_files(work)) == 1  # left behind
        put(store, [0])
        assert len(segment_files(work)) == 1 and (work / "lock").read_text() == str(os.getpid())
        assert_holds(store, {0: 0})
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    store.close()
    assert not work.exists()


def test_two_stores_of_one_process_on_one_folder(tmp_path):
    first, second = make_store(folder=tmp_path / "work"), make_store(folder=tmp_path / "work")
    put(first, [0])
    with pytest.raises(BankBusyError, match=r"by an earlier model of this process.*\(or delete the object\)"):
        put(second, [0])
    del first
    put(second, [0])
    assert_holds(second, {0: 0})


def test_a_lock_that_its_owner_removed_in_between_is_none(tmp_path, monkeypatch):
    """Opened, then removed by the one who had it, then locked: a third could lock the new file as well."""
    import fcntl

    work, real, calls = tmp_path / "work", fcntl.flock, []

    def flock(file, how):
        calls.append(how)
        if len(calls) == 1:
            (work / "lock").unlink()
        return real(file, how)

    store, third = make_store(folder=work), make_store(folder=work)
    monkeypatch.setattr(fcntl, "flock", flock)
    put(store, [0])
    assert len(calls) == 2
    with pytest.raises(BankBusyError):
        put(third, [0])
    store.close()


def test_a_forked_worker_neither_keeps_the_lock_nor_removes_the_folder(tmp_path):
    """As the workers of a DataLoader, which outlive a training."""
    store = make_store(folder=tmp_path / "work")
    put(store, [0])
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    worker = context.Process(target=stop.wait, daemon=True)
    worker.start()
    try:
        assert_holds(store, {0: 0})
        store.close()
        second = make_store(folder=tmp_path / "work")
        put(second, [1])
        stop.set()
        worker.join(20)
        assert worker.exitcode == 0
        assert_holds(second, {1: 0})
        put(second, [2])
    finally:
        worker.kill()
