"""Preference rows: what is refused and how it is said, tokens against TRL's own, files against what was written into them."""

import csv
import gzip
import json
import logging
import time

import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from helpers import preference_rows, save_tiny, tiny_tokenizer

from trl_sharelora import cli
from trl_sharelora.data import (
    check_long_rows,
    check_preference_rows,
    check_prompt_row,
    check_prompt_rows,
    check_row,
    count_long_rows,
    load_preferences,
    tokenize_preference,
)
from trl_sharelora.errors import ConfigError, DataError, ShareLoraError, UserIdError
from trl_sharelora.users import UserRegistry


MESSAGE = {"role": "assistant", "content": "w1"}


def refusal(dataset, error=DataError, **arguments) -> str:
    with pytest.raises(error) as raised:
        check_preference_rows(dataset, **arguments)
    assert type(raised.value) is error
    return str(raised.value)


def rows_with(changes: dict[int, dict], **arguments) -> list[dict]:
    """Six good rows of two users with `changes` made to some of them."""
    rows = preference_rows(2, 6, **arguments)
    return [{**row, **changes.get(number, {})} for number, row in enumerate(rows)]


# -- good rows


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("margin", [False, True])
def test_good_rows_pass_as_a_dataset_and_as_a_stream(conversational, prompt, margin):
    rows = preference_rows(3, 20, conversational=conversational, prompt=prompt, margin=margin)
    dataset = Dataset.from_list(rows)
    check_preference_rows(dataset)
    check_preference_rows(dataset.with_format("torch"))
    for number, row in enumerate(dataset.to_iterable_dataset()):
        check_row(row, number, first_row=rows[0])


def test_tokenised_rows_pass_and_their_texts_do_not_matter():
    rows = [{"user_id": 3, "chosen_ids": [1, 2], "rejected_ids": [1, 3], "chosen": None}] * 3
    check_preference_rows(Dataset.from_list(rows))
    older = Dataset.from_list(rows).rename_columns(
        {"chosen_ids": "chosen_input_ids", "rejected_ids": "rejected_input_ids"}
    )
    check_preference_rows(older)
    check_row(rows[0], 0)


def test_messages_of_tool_calls_or_of_blocks_of_text_pass():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    blocks = {"role": "assistant", "content": [{"type": "text", "text": "w1"}]}
    check_row(
        {"user_id": "ann", "prompt": [{"role": "user", "content": "w2"}], "chosen": [call], "rejected": [blocks]}, 0
    )


# -- what is refused in a row; the dataset and the stream say the same


BAD_ROWS = [
    ({"chosen": None}, "`chosen` is neither text nor a list of messages: {rows} (None of type NoneType)"),
    ({"prompt": None}, "`prompt` is neither text nor a list of messages: {rows} (None of type NoneType)"),
    ({"rejected": ""}, "`rejected` is empty: {rows} ('' of type str)"),
    ({"chosen": " \n"}, "`chosen` is empty: {rows}"),
    ({"prompt": ""}, "`prompt` is empty: {rows}"),
    (
        {"chosen": "w1 w2", "rejected": "w1 w2"},
        "`chosen` and `rejected` are the same: {rows}. Such a row holds no preference",
    ),
    ({"margin": float("nan")}, "`margin` is not a finite number: {rows} (nan of type float)"),
    ({"margin": float("-inf")}, "`margin` is not a finite number: {rows} (-inf of type float)"),
    ({"margin": None}, "`margin` is not a finite number: {rows} (None of type NoneType)"),
]
BAD_CONVERSATIONS = [
    (
        {"chosen": [{"role": "assistant", "content": None}]},
        "`chosen` holds a message without a text `role` and a text `content`",
    ),
    ({"rejected": [{"role": None, "content": "w1"}]}, "`rejected` holds a message without a text `role`"),
    ({"prompt": [{"role": "", "content": "w1"}]}, "`prompt` holds a message without a text `role`"),
    (
        {"chosen": [MESSAGE, None]},
        "`chosen` holds a message without a text `role` and a text `content`: {rows} (None of type",
    ),
    ({"chosen": []}, "`chosen` is empty: {rows} ([] of type list)"),
    ({"prompt": []}, "`prompt` is empty: {rows} ([] of type list)"),
    ({"chosen": [{"role": "assistant", "content": " "}]}, "`chosen` is empty"),
    ({"chosen": [MESSAGE], "rejected": [MESSAGE]}, "`chosen` and `rejected` are the same: {rows}"),
    ({"chosen": None}, "`chosen` is neither text nor a list of messages: {rows}"),
    ({"margin": float("inf")}, "`margin` is not a finite number: {rows}"),
]


@pytest.mark.parametrize(
    ("conversational", "change", "said"),
    [(False, *bad) for bad in BAD_ROWS] + [(True, *bad) for bad in BAD_CONVERSATIONS],
)
def test_a_bad_row_is_refused_with_its_numbers(conversational, change, said):
    rows = rows_with({1: change, 4: change}, margin=True, conversational=conversational)
    message = refusal(Dataset.from_list(rows))
    assert message.startswith("The train dataset cannot be used: ")
    assert said.format(rows="rows 1, 4") in message
    for number, row in enumerate(rows):
        if number in (1, 4):
            with pytest.raises(DataError) as raised:
                check_row(row, number, first_row=rows[0])
            assert said.format(rows=f"row {number}") in str(raised.value)
        else:
            check_row(row, number, first_row=rows[0])


@pytest.mark.parametrize("value", [3, float("nan"), True, {"role": "assistant", "content": "w1"}])
def test_a_text_of_another_type_is_refused_with_its_type(value):
    rows = [{"user_id": "ann", "chosen": value, "rejected": "w1"}] * 2
    message = refusal(Dataset.from_list(rows))
    assert (
        f"`chosen` is neither text nor a list of messages: rows 0, 1 ({value!r} of type {type(value).__name__})"
        in message
    )
    assert "a number must be written as text" in message


@pytest.mark.parametrize("margin", ["0.5", True])
def test_a_margin_that_is_no_number_is_refused(margin):
    message = refusal(Dataset.from_list(rows_with({number: {"margin": margin} for number in range(6)})))
    assert f"`margin` is not a finite number: rows 0, 1, 2, 3, 4, 5 ({margin!r} of type" in message


def test_a_row_that_is_half_text_half_messages_is_refused():
    rows = [{"user_id": "ann", "prompt": "w1", "chosen": [MESSAGE], "rejected": [{**MESSAGE, "content": "w2"}]}] * 2
    message = refusal(Dataset.from_list(rows))
    assert "The texts of a row are partly text and partly lists of messages: rows 0, 1" in message
    assert "`prompt` holds text, `chosen` holds messages" in message


def test_standard_and_conversational_rows_do_not_mix():
    standard, conversational = preference_rows(1, 3)[0], preference_rows(1, 3, conversational=True)[1]
    # TRL looks at the first row only: after a conversational one, a standard row would silently get no end token
    for first, other, said in [
        (standard, conversational, "this one holds messages, the first row text"),
        (conversational, standard, "this one holds text, the first row messages"),
    ]:
        with pytest.raises(DataError) as raised:
            check_row(other, 5, first_row=first)
        assert f"The rows are partly text and partly lists of messages: row 5 ({said})" in str(raised.value)


def test_a_dataset_that_mixes_them_is_refused():
    Json = pytest.importorskip("datasets", minversion="4.7").Json  # the one column type that can hold both
    rows = preference_rows(1, 4, prompt=False)
    rows[2] = preference_rows(1, 4, conversational=True, prompt=False)[2]
    features = Features({"user_id": Value("string"), "chosen": Json(), "rejected": Json()})
    message = refusal(Dataset.from_list(rows, features=features))
    assert (
        "The rows are partly text and partly lists of messages: row 2 (these hold messages, 3 others text)" in message
    )


def test_a_stream_row_that_lacks_what_the_first_row_has_is_refused():
    with_margin, without = preference_rows(1, 1, margin=True)[0], preference_rows(1, 1)[0]
    with pytest.raises(DataError, match="`margin` is there in some rows only: row 7 .it is not there."):
        check_row(without, 7, first_row=with_margin)
    with pytest.raises(DataError, match="`prompt` is there in some rows only: row 7 .it is there."):
        check_row(without, 7, first_row={key: without[key] for key in ("user_id", "chosen", "rejected")})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen_ids": None}, "`chosen_ids` is not a list of token ids: row 1 (None of type NoneType)"),
        ({"rejected_ids": []}, "`rejected_ids` is empty: row 1"),
        ({"rejected_ids": [1, None]}, "`rejected_ids` is not a list of token ids: row 1 ([1, None] of type list)"),
        ({"rejected_ids": [1, 2]}, "`chosen_ids` and `rejected_ids` are the same: row 1"),
        ({"margin": float("inf")}, "`margin` is not a finite number: row 1"),
    ],
)
def test_bad_tokenised_rows_are_refused(change, said):
    good = {"user_id": "ann", "chosen_ids": [1, 2], "rejected_ids": [1, 3], "margin": 0.0}
    assert said in refusal(Dataset.from_list([good, {**good, **change}]))


def test_token_ids_that_are_not_whole_numbers_are_refused():
    rows = [{"user_id": "ann", "chosen_ids": [1.0, 2.0], "rejected_ids": [1, 3]}]
    assert "`chosen_ids` is not a list of token ids: row 0 ([1.0, 2.0] of type list)" in refusal(
        Dataset.from_list(rows)
    )


# -- ids


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["ann", None, "bob"], "A user id is missing (None) at row 1 of column 'user_id'"),
        (["ann", " ", "bob"], "A user id is blank (' ') at row 1"),
        ([7.0, 8.0, float("nan")], "A user id is 7.0 of type float at row 0"),
        ([True, False, True], "A user id is True of type bool at row 0"),
    ],
)
def test_bad_ids_alone_are_an_error_of_ids(ids, said):
    rows = [{**row, "user_id": user_id} for row, user_id in zip(preference_rows(1, 3), ids, strict=True)]
    assert said in refusal(Dataset.from_list(rows), UserIdError)
    with pytest.raises(UserIdError):
        for number, row in enumerate(rows):
            check_row(row, number)


def test_ids_that_datasets_decoded_to_numbers_are_refused(tmp_path):
    from datasets import load_dataset

    path = tmp_path / "mixed.jsonl"
    rows = rows_with({0: {"user_id": "007"}, 1: {"user_id": 7}, 2: {"user_id": "ann"}})
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    if not any(isinstance(user_id, int) for user_id in dataset["user_id"]):
        pytest.skip("this version of datasets keeps them as text")
    assert dataset["user_id"][0] == 7  # the loss that the check is about
    assert "text ids that look like numbers have lost their form ('007' became 7)" in refusal(dataset, UserIdError)


# -- columns and the whole


@pytest.mark.parametrize(
    ("there", "asked", "guess"),
    [
        ("user_id", "user", "user_id"),
        ("User-ID", "user_id", "User-ID"),
        ("uid", "user_id", "uid"),
        ("labeller", "user_id", None),
    ],
)
def test_a_missing_user_column_lists_the_columns_and_guesses(there, asked, guess):
    dataset = Dataset.from_list([{there: row.pop("user_id"), **row} for row in preference_rows(2, 4)])
    message = refusal(dataset, user_column=asked)
    assert f"There is no column '{asked}' to say whose preference each row is" in message
    assert f"the columns are '{there}', 'prompt', 'chosen', 'rejected'" in message
    assert (f"Did you mean '{guess}'?" in message) if guess else ("Did you mean" not in message)
    with pytest.raises(DataError, match=f"Row 0: There is no column '{asked}'"):
        check_row(dataset[0], 0, asked)


def test_a_missing_answer_column_is_named():
    dataset = Dataset.from_list(preference_rows(2, 4)).remove_columns("rejected")
    assert "There is no column 'rejected'; a preference row needs `chosen` and `rejected`" in refusal(dataset)
    with pytest.raises(DataError, match="Row 3: There is no column 'rejected'"):
        check_row(dataset[3], 3)


def test_an_empty_dataset_is_refused_by_its_name():
    rows = Dataset.from_list(preference_rows(1, 2))
    for empty in (rows.select([]), Dataset.from_list([])):
        message = refusal(empty, name="eval")
        assert message.startswith("The eval dataset cannot be used: It is empty: 0 rows.")


def test_what_is_no_dataset_is_refused():
    rows = preference_rows(1, 2)
    assert "a list; a datasets.Dataset is needed" in refusal(rows)
    splits = DatasetDict(test=Dataset.from_list(rows), train=Dataset.from_list(rows))
    assert "a DatasetDict with the splits ['test', 'train']; take one" in refusal(splits)


def test_one_error_tells_everything_the_most_important_first():
    rows = rows_with(
        {
            0: {"margin": float("nan")},
            1: {"chosen": "w1", "rejected": "w1"},
            2: {"rejected": ""},
            3: {"chosen": None},
            4: {"user_id": None},
            5: {"margin": float("inf")},
        },
        margin=True,
    )
    message = refusal(Dataset.from_list(rows).rename_column("prompt", "question"))
    assert "5 problems" in message
    places = [
        message.index(part)
        for part in (
            "A user id is missing (None) at row 4",
            "`chosen` is neither text",
            "`rejected` is empty: row 2",
            "are the same: row 1",
            "`margin` is not a finite number: rows 0, 5",
        )
    ]
    assert places == sorted(places)


def test_many_bad_rows_are_counted():
    rows = rows_with({}, margin=True) * 5
    message = refusal(Dataset.from_list([{**row, "margin": None} for row in rows]))
    assert "rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (30 in all)" in message


def test_a_hundred_thousand_rows_take_seconds():
    rows = preference_rows(300, 1000, margin=True)
    dataset = Dataset.from_list(rows * 100).shuffle(seed=0)
    start = time.perf_counter()
    check_preference_rows(dataset)
    assert time.perf_counter() - start < 15  # about 2 s; the rest is for a busy machine


# -- tokens, against TRL's trainer


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_tokens_are_those_of_trl(conversational, prompt, tmp_path):
    from trl import RewardConfig, RewardTrainer

    rows = preference_rows(3, 12, seed=1, conversational=conversational, prompt=prompt)
    if conversational:
        for number, row in enumerate(rows):
            row["tools"] = json.dumps([{"name": "f"}]) if number % 2 else None
            row["chat_template_kwargs"] = {"shout": number % 3 == 0}
    else:
        rows[0]["chosen"] += "<eos>"  # stays as it is
    dataset = Dataset.from_list(rows)
    trainer = RewardTrainer(
        model=save_tiny("llama", tmp_path / "model"),
        args=RewardConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False),
        train_dataset=dataset,
    )
    theirs = trainer.train_dataset
    ours = [tokenize_preference(row, tiny_tokenizer()) for row in dataset]
    assert len(theirs) == len(rows) and len({len(row["chosen_ids"]) for row in ours}) > 1
    for column in ("chosen_ids", "rejected_ids"):
        assert [row[column] for row in ours] == theirs[column][:]
    if conversational:  # the arguments did arrive: token 6 is <tools>, token 8 is w0
        assert [row["chosen_ids"][:2] for row in ours[:4]] == [[8, 4], [6, 4], [4, ours[2]["chosen_ids"][1]], [6, 8]]
    else:
        assert all(row["chosen_ids"].count(1) == 1 and row["chosen_ids"][-1] == 1 for row in ours)


def test_tokenised_rows_pass_through():
    row = {"chosen_ids": [1, 2], "rejected_ids": [3], "chosen": "w1", "user_id": "ann"}
    assert tokenize_preference(row, tiny_tokenizer()) == {"chosen_ids": [1, 2], "rejected_ids": [3]}
    assert tokenize_preference({"chosen_input_ids": [1, 2], "rejected_input_ids": [3]}, None)["chosen_ids"] == [1, 2]


def test_a_tokenizer_without_an_end_token_is_refused_with_the_remedy():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end token.*processing_class.eos_token = processing_class.sep_token"):
        tokenize_preference(preference_rows(1, 1)[0], tokenizer)


# -- files


IDS = ["007", "7", "12345678901234567", "12345678901234568", "1e5", "NA", "null", "true", "2024-01-01", " ann "]


def rows_with_awkward_ids() -> list[dict]:
    return [
        {"user_id": user_id, "prompt": 'w1, "w2"\nw3 ', "chosen": "NA", "rejected": f"w{number}", "margin": number / 4}
        for number, user_id in enumerate(IDS)
    ]


def write(rows: list[dict], path) -> str:
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        text = json.dumps(rows, indent=1) if ".json" in path.suffixes else "\n".join(map(json.dumps, rows)) + "\n\n"
        (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)
    return str(path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz", "x.csv", "x.parquet"])
def test_what_was_written_is_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = rows_with_awkward_ids()
    dataset = load_preferences(write(rows, tmp_path / name))
    assert list(dataset) == rows
    check_preference_rows(dataset)


def test_a_saved_dataset_is_read_and_its_split_taken(tmp_path):
    rows = preference_rows(2, 6)
    train, test = Dataset.from_list(rows[:4]), Dataset.from_list(rows[4:])
    train.save_to_disk(tmp_path / "one")
    assert list(load_preferences(tmp_path / "one")) == rows[:4]
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    assert list(load_preferences(tmp_path / "two", split="test")) == rows[4:]
    for split in (None, "validation"):
        with pytest.raises(DataError, match=r"has the splits \['test', 'train'\]; split=.* names none of them"):
            load_preferences(tmp_path / "two", split=split)


def test_a_directory_of_data_files_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = preference_rows(2, 6)
    (tmp_path / "data").mkdir()
    write(rows[:4], tmp_path / "data" / "train.jsonl")
    write(rows[4:], tmp_path / "data" / "test.jsonl")
    assert list(load_preferences(tmp_path / "data", split="test")) == rows[4:]


def test_the_split_column_of_a_file_is_used(tmp_path):
    rows = [{**row, "split": ["train", "test"][number % 2]} for number, row in enumerate(preference_rows(2, 6))]
    path = write(rows, tmp_path / "x.jsonl")
    assert list(load_preferences(path)) == rows
    assert list(load_preferences(path, split="test")) == rows[1::2]
    with pytest.raises(DataError, match="no row with split='dev'; its splits are {'train': 3, 'test': 3}"):
        load_preferences(path, split="dev")
    plain = write(preference_rows(2, 6), tmp_path / "plain.jsonl")
    assert len(load_preferences(plain, split="train")) == 6
    with pytest.raises(DataError, match="has no column 'split', so all of it is 'train'"):
        load_preferences(plain, split="test")


def test_whole_number_ids_of_a_json_file_stay_exact_beside_a_missing_one(tmp_path):
    rows = [{"user_id": 12345678901234567}, {"user_id": 12345678901234568}, {"user_id": None}]
    assert load_preferences(write(rows, tmp_path / "x.jsonl"))["user_id"][:] == [
        12345678901234567,
        12345678901234568,
        None,
    ]


def test_a_margin_that_only_a_later_json_row_has_is_not_lost(tmp_path):
    rows = rows_with({3: {"margin": 1.0}})
    dataset = load_preferences(write(rows, tmp_path / "x.jsonl"))
    assert "`margin` is not a finite number: rows 0, 1, 2, 4, 5 (None of type NoneType)" in refusal(dataset)


BAD_FILES = [
    ("x.jsonl", '{"user_id": "ann"}\n{"user_id": ', "is not JSON at line 2"),
    ("x.json", '[{"user_id": "ann"},\n{"user_id"', "is not JSON at line 2"),
    ("x.jsonl", '{"user_id": "ann"}\n3\n"x"\n', "a row must be a JSON object with named columns; rows 1, 2 are not"),
    (
        "x.jsonl",
        '{"user_id": "a"}\n{"user_id": 7}\n{"user_id": "b"}\n',
        "'user_id' mixes types (2 str, 1 int; int at row 1)",
    ),
    ("x.jsonl", '{"user_id": 1e400}\n{"user_id": 123456789012345678901}', "'user_id' mixes types"),
    ("x.csv", "", "is not a CSV file in UTF-8"),
    (
        "x.csv",
        "user_id,chosen\nann,w1,w2\n",
        "Expected 2 fields in line 2, saw 3. Texts with commas or line breaks need quotes",
    ),
    ("x.csv", "user_id,chosen,chosen\nann,w1,w2\n", "the first line must name every column, each differently"),
    ("x.csv", "user_id,margin\nann,0.5\nbob,high\n", "`margin` is not a number: row 1 ('high')"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_FILES)
def test_a_file_that_cannot_be_read_says_where(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as raised:
        load_preferences(tmp_path / name)
    assert said in str(raised.value) and str(tmp_path / name) in str(raised.value)


def test_a_short_or_blank_csv_cell_is_found_by_the_check(tmp_path):
    (tmp_path / "x.csv").write_text("user_id,chosen,rejected,margin\nann,w1,w2,0.5\n,w1,w2,\nbob,w1\n")
    dataset = load_preferences(tmp_path / "x.csv")
    message = refusal(dataset)
    assert "A user id is blank ('') at row 1" in message
    assert "`rejected` is" in message and "row 2" in message
    assert "`margin` is not a finite number: rows 1, 2" in message


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    for name in ("x.csv", "x.jsonl"):
        (tmp_path / name).write_bytes("user_id\nJosé\n".encode("latin-1"))
        with pytest.raises(DataError, match="UTF-8"):
            load_preferences(tmp_path / name)


def damaged(content: bytes) -> bytes:
    """Compressed, with one byte that is another."""
    packed = bytearray(gzip.compress(content, mtime=0))
    packed[len(packed) // 2] ^= 255
    return bytes(packed)


def parquet(rows: list[dict], tmp_path) -> bytes:
    Dataset.from_list(rows).to_parquet(tmp_path / "whole.parquet")
    return (tmp_path / "whole.parquet").read_bytes()


LINES = "".join(f"u{number % 3},w{number * number},w{number}\n" for number in range(400))
DAMAGED_FILES = [
    ("x.csv.gz", lambda _: gzip.compress(LINES.encode())[:300], "EOFError"),
    ("x.csv.gz", lambda _: LINES.encode(), "BadGzipFile"),
    ("x.csv.gz", lambda _: damaged(LINES.encode()), "x.csv.gz"),
    ("x.jsonl.gz", lambda _: gzip.compress(LINES.encode())[:300], "EOFError"),
    ("x.jsonl.gz", lambda _: LINES.encode(), "BadGzipFile"),
    ("x.jsonl.gz", lambda _: damaged(LINES.encode()), "x.jsonl.gz"),
    ("x.parquet", lambda path: parquet(rows_with({}), path)[:500], "ArrowInvalid"),
    ("x.parquet", lambda _: b"", "x.parquet"),
]


@pytest.mark.parametrize(("name", "content", "said"), DAMAGED_FILES)
def test_a_damaged_file_is_an_error_of_the_data_with_status_2(name, content, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(content(tmp_path))
    with pytest.raises(DataError, match=said):
        load_preferences(tmp_path / name)
    assert cli.main(["data", "check", str(tmp_path / name)]) == 2
    assert f"DataError: {tmp_path / name}" in capsys.readouterr().err


def test_a_damaged_byte_that_gzip_finds_is_an_error_of_the_data(tmp_path):
    for name in ("x.csv.gz", "x.jsonl.gz"):
        packed = bytearray(gzip.compress(LINES.encode(), mtime=0))
        packed[10] = 0xFF  # a block of a type that does not exist: zlib.error
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(DataError, match=r"error: Error -3 .*cut off or damaged"):
            load_preferences(tmp_path / name)


@pytest.mark.parametrize("value", ["bad \ud800 text", [{"role": "assistant", "content": "bad \udfff"}]])
def test_half_a_character_is_named_with_its_row(value, tmp_path):
    good = "good" if isinstance(value, str) else [{"role": "assistant", "content": "good"}]
    rows = [{"user_id": "ann", "chosen": good, "rejected": good} for _ in range(5)]
    rows[3]["chosen"] = value
    path = write(rows, tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"'chosen' holds half of a character in row 3: .*\\u[a-f\d]{4}"):
        load_preferences(path)
    (tmp_path / "y.jsonl").write_text('{"user_id": "ann", "ch\\ud800sen": "a"}')
    with pytest.raises(DataError, match="half of a character"):
        load_preferences(tmp_path / "y.jsonl")


@pytest.mark.parametrize(
    "text", ["9" * 5000, '{"a": ' * 100_000], ids=["a number of 5,000 digits", "100,000 objects in each other"]
)
def test_json_that_python_does_not_read_is_refused(text, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"user_id": "ann"}\n{"user_id": ' + text + "}")
    with pytest.raises(DataError, match="is not JSON at line 2"):
        load_preferences(tmp_path / "x.jsonl")


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(DataError, match="There is no file '.*none.jsonl'"):
        load_preferences(tmp_path / "none.jsonl")


def test_a_file_with_another_ending_is_refused_with_those_that_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_sharelora.data.load_dataset", None)  # nothing is looked for elsewhere
    for name in ("log.txt", "log", "log.tsv.gz"):
        (tmp_path / name).write_text("user_id")
        with pytest.raises(DataError, match=rf"{name}' does not end in \.jsonl, \.json, \.csv .*\.gz.* or \.parquet"):
            load_preferences(tmp_path / name)


def test_what_is_neither_a_file_nor_to_be_had_from_the_hub_is_said_to_be_so(tmp_path, monkeypatch, capsys):
    def unreachable(path):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr("trl_sharelora.data.load_dataset", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'log\.jsnol' cannot be read: ConnectionError: .*looked for in .*\.jsonl, "):
        load_preferences("log.jsnol")
    assert cli.main(["data", "check", "log.jsnol"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "state.json").write_text("{")
    for folder in (tmp_path / "folder", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            load_preferences(folder)


# -- rows that are too long


def long_rows(lengths: list[tuple[str, int, int]]) -> Dataset:
    features = Features(
        {"user_id": Value("string"), "chosen_ids": List(Value("int64")), "rejected_ids": List(Value("int64"))}
    )
    rows = [{"user_id": user_id, "chosen_ids": [5] * a, "rejected_ids": [6] * b} for user_id, a, b in lengths]
    return Dataset.from_list(rows, features=features)


LENGTHS = [("ann", 10, 9), ("bob", 11, 2), ("ann", 2, 11), ("bob", 3, 3), ("cat", 1, 1), ("ann", 12, 12)]


def test_long_rows_are_counted_per_user_as_trl_drops_them():
    dataset = long_rows(LENGTHS)
    assert count_long_rows(dataset, 10) == {"ann": (2, 3), "bob": (1, 2), "cat": (0, 1)}
    assert count_long_rows(dataset, 12) == {"ann": (0, 3), "bob": (0, 2), "cat": (0, 1)}
    # the same rows in another order and behind an index
    assert count_long_rows(dataset.shuffle(seed=3), 10) == {"ann": (2, 3), "bob": (1, 2), "cat": (0, 1)}


def test_dropped_rows_are_logged_in_one_line(caplog):
    with caplog.at_level(logging.WARNING, "trl_sharelora.data"):
        assert check_long_rows(long_rows(LENGTHS), 10) == 3
        assert check_long_rows(long_rows(LENGTHS), 12) == 0
    [record] = caplog.records
    assert record.getMessage() == (
        "3 of 6 rows of the train dataset are longer than max_length=10 tokens and are dropped; they belong to 2 of 3 users. "
        "Most affected: 'ann' 2 of 3, 'bob' 1 of 2."
    )


def test_a_user_who_would_lose_all_rows_is_an_error():
    with pytest.raises(DataError) as raised:
        check_long_rows(long_rows(LENGTHS + [("dan", 40, 1), ("dan", 1, 40)]), 10)
    message = str(raised.value)
    assert "All rows of 1 of 4 users in the train dataset are longer than max_length=10" in message
    assert "'dan' (2 rows)" in message and "Raise max_length" in message


def test_every_error_here_is_one_of_the_family():
    assert issubclass(DataError, ShareLoraError) and issubclass(UserIdError, ShareLoraError)


@pytest.mark.parametrize(
    "ids",
    [[4915112345678.0, 4915112345679.0], ["ann.secret@example.com " + "x" * 300, "bob"], ["Jos\u00e9", "Jose\u0301"]],
)
def test_messages_for_a_pseudonymous_model_show_no_id(ids):
    users = UserRegistry(["someone"], key=b"0123456789abcdef0123456789abcdef")
    rows = Dataset.from_list(
        [{"user_id": user_id, "prompt": "p", "chosen": "good", "rejected": "bad"} for user_id in ids]
    )
    checks = [
        lambda: check_preference_rows(rows, users=users),
        lambda: check_prompt_rows(rows.remove_columns(["chosen", "rejected"]), users=users),
        lambda: check_row(rows[0], 0, users=users),
        lambda: check_prompt_row(rows[0], 0, users=users),
    ]
    for check in checks:
        try:
            check()
        except UserIdError as error:
            assert not any(str(user_id)[:8] in str(error) for user_id in ids)
        else:
            # two forms of one name are one user there, so for a pseudonymous registry nothing is wrong with them
            assert ids[0] == "Jos\u00e9"
