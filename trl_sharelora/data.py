"""Preference rows with a user column: load, check, tokenise, account for what is too long.

A row is `{"user_id", "prompt" (optional), "chosen", "rejected", "margin" (optional)}`; the texts are plain text (standard) or
lists of messages (conversational), as in TRL. Everything a bad row can do later (a crash at step 900, a NaN in every weight,
a user who silently disappears) is looked for here, before training. Nothing is repaired: what to do with a bad row is the
owner's decision.
"""

import difflib
import gzip
import json
import logging
import math
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .errors import ConfigError, DataError, UserIdError, some_rows
from .users import UserRegistry, user_id_as_text


logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
# Rows that were tokenised before; the second pair is TRL's older spelling, which it still takes.
TOKEN_COLUMNS = (("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids"))

# of the files that are read
_ENDINGS = ".jsonl, .json, .csv (each also with .gz) or .parquet"

# kind of problem -> (what is wrong with the column, what to do); the order is the order of the report
PROBLEMS = {
    "type": (
        "is neither text nor a list of messages",
        "Fill it in or drop the row (dataset.filter); a number must be written as text, a blank cell left out.",
    ),
    "message": (
        "holds a message without a text `role` and a text `content`",
        'Write messages as {"role": "user", "content": "..."}.',
    ),
    "tokens": (
        "is not a list of token ids",
        "Tokenised rows need lists of integers; leave the columns out to have the text tokenised.",
    ),
    "mixed": (
        "are partly text and partly lists of messages",
        "Use one format in the whole dataset: text, or lists of messages.",
    ),
    "columns": (
        "is there in some rows only",
        "Rows of one dataset have the same columns; fill it in everywhere or drop the column.",
    ),
    "empty": (
        "is empty",
        "Drop the row: an empty answer teaches the model only about the end token. Where prompts are empty, drop that column.",
    ),
    "same": ("are the same", "Such a row holds no preference; drop it."),
    "margin": (
        "is not a finite number",
        "One such margin turns every weight into NaN; give each row a number, or drop the column for no margins at all.",
    ),
}


class _Findings:
    """What is wrong with the rows seen so far: row numbers and a first example by kind of problem and column."""

    def __init__(self) -> None:
        self.columns: list[str] = []  # problems of the dataset as a whole
        self.ids: str | None = None
        self.rows: dict[tuple[str, str], list[int]] = {}
        self.examples: dict[tuple[str, str], Any] = {}

    def add(self, kind: str, column: str, row_number: int, value: Any = None) -> None:
        self.rows.setdefault((kind, column), []).append(row_number)
        self.examples.setdefault((kind, column), value)

    def raise_if_any(self, name: str) -> None:
        if not (self.columns or self.ids or self.rows):
            return
        lines = list(self.columns)
        order = list(PROBLEMS)
        found = sorted(self.rows, key=lambda key: order.index(key[0]))
        if self.ids:
            lines.append(self.ids)
        for kind, column in found:
            what, remedy = PROBLEMS[kind]
            value = self.examples[kind, column]
            shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
            example = "" if kind == "same" else f" ({shown} of type {type(value).__name__})"
            if kind in ("mixed", "columns"):
                example = f" ({value})"
            lines.append(f"{column} {what}: {some_rows(self.rows[kind, column])}{example}. {remedy}")
        only_ids = bool(self.ids) and len(lines) == 1
        message = f"The {name} dataset cannot be used: " + (
            lines[0] if len(lines) == 1 else f"{len(lines)} problems.\n" + "\n".join(f"- {line}" for line in lines)
        )
        raise UserIdError(message) if only_ids else DataError(message)


def _form_of(value: Any) -> str | None:
    """`"text"`, `"messages"` or None for anything else."""
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list) else None


def _is_message(message: Any) -> bool:
    """Whether a chat template can render it: a text role, and text, blocks of text or a tool call as content."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        return False
    content = message.get("content")
    if isinstance(content, list):
        return bool(content) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    # an assistant's turn may consist of tool calls alone
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _says_nothing(value: Any) -> bool:
    """Whether a text is blank, or a list of well-formed messages holds no content at all."""
    if isinstance(value, str):
        return not value.strip()
    for message in value:
        content = message["content"] if "content" in message else None
        blocks = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
        if message.get("tool_calls") or any(text.strip() for text in blocks):
            return False
    return True


def _token_columns(columns: Any) -> tuple[str, str] | None:
    """The pair of token columns among `columns`; None when the rows are not tokenised."""
    return next((pair for pair in TOKEN_COLUMNS if pair[0] in columns and pair[1] in columns), None)


def _check_texts(row: dict[str, Any], row_number: int, findings: _Findings) -> str | None:
    """Note what is wrong with the texts of a row; returns its form when it has one."""
    forms = {}
    sound = True
    for column in TEXT_COLUMNS:
        if column not in row:
            continue
        value = row[column]
        form = _form_of(value)
        if form is None:
            findings.add("type", f"`{column}`", row_number, value)
            sound = False
            continue
        forms[column] = form
        if form == "messages":
            malformed = [message for message in value if not _is_message(message)]
            if malformed:
                findings.add("message", f"`{column}`", row_number, malformed[0])
                sound = False
                continue
        if _says_nothing(value):
            findings.add("empty", f"`{column}`", row_number, value)
            sound = False
    if len(set(forms.values())) > 1:
        described = ", ".join(f"`{column}` holds {form}" for column, form in forms.items())
        findings.add("mixed", "The texts of a row", row_number, described)
        return None
    if sound and "rejected" in row and "chosen" in row and row["chosen"] == row["rejected"]:
        findings.add("same", "`chosen` and `rejected`", row_number)
    return next(iter(forms.values()), None)


def _check_tokens(row: dict[str, Any], pair: tuple[str, str], row_number: int, findings: _Findings) -> None:
    for column in pair:
        ids = row[column]
        if not isinstance(ids, list) or set(map(type, ids)) - {int}:
            findings.add("tokens", f"`{column}`", row_number, ids)
        elif not ids:
            findings.add("empty", f"`{column}`", row_number, ids)
    if row[pair[0]] and row[pair[0]] == row[pair[1]]:
        findings.add("same", f"`{pair[0]}` and `{pair[1]}`", row_number)


def _check_content(row: dict[str, Any], row_number: int, findings: _Findings) -> str | None:
    """Note what is wrong with everything but the user id of a row; returns the form of its texts."""
    pair = _token_columns(row)
    form: str | None = "tokens"
    if pair:
        _check_tokens(row, pair, row_number, findings)
    else:
        form = _check_texts(row, row_number, findings)
    if "margin" in row:
        margin = row["margin"]
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
            findings.add("margin", "`margin`", row_number, margin)
    return form


def _missing_columns(columns: list[str], user_column: str, prompts: bool = False) -> list[str]:
    """A sentence for each column that is needed and not there: of preference rows, or of rows of prompts."""
    listed = ", ".join(repr(column) for column in columns) or "none"
    problems = []
    if user_column not in columns:
        by_lower_case = {column.lower(): column for column in columns if column not in (*TEXT_COLUMNS, "margin")}
        near = difflib.get_close_matches(user_column.lower(), by_lower_case, n=1, cutoff=0.6)
        guess = f" Did you mean {by_lower_case[near[0]]!r}?" if near else ""
        problems.append(
            f"There is no column {user_column!r} to say whose preference each row is; the columns are {listed}.{guess} Name "
            "the right one with user_column=..., or rename it (dataset.rename_column)."
        )
    if prompts and "prompt" not in columns:
        problems.append(
            f"There is no column 'prompt'; the columns are {listed}. The policy completes prompts; if they are part of `chosen` and "
            "`rejected`, take them out first (trl.extract_prompt)."
        )
    elif not prompts and _token_columns(columns) is None:
        for column in ("chosen", "rejected"):
            if column not in columns:
                problems.append(
                    f"There is no column {column!r}; a preference row needs `chosen` and `rejected` (`prompt` is optional). "
                    f"The columns are {listed}."
                )
    return problems


def _require_dataset(dataset: Any, name: str) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    if isinstance(dataset, DatasetDict):
        raise DataError(
            f"The {name} dataset is a DatasetDict with the splits {sorted(dataset)}; take one: dataset['...']."
        )
    raise DataError(
        f"The {name} dataset is a {type(dataset).__name__}; a datasets.Dataset is needed. Make one of a list of rows with "
        "datasets.Dataset.from_list(rows); a stream's rows are checked as they come, with check_row."
    )


def check_preference_rows(
    dataset: Dataset, user_column: str = "user_id", name: str = "train", users: UserRegistry | None = None
) -> None:
    """Look at every row of a preference dataset before anything is trained on it.

    One error tells all kinds of problems found, with their row numbers. Rows are decoded in batches; 100,000 rows take a few
    seconds.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference rows: standard, conversational or tokenised (`chosen_ids`, `rejected_ids`).
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        name (`str`, *optional*, defaults to `"train"`):
            What to call the dataset in a message.
        users ([`UserRegistry`], *optional*):
            Of the model: if it is pseudonymous no message shows an id.

    Raises:
        UserIdError: The ids are the only thing wrong: blank, missing, a float or a bool, too long, or text and integers mixed.
        DataError: The dataset is empty, a column is missing, a text is missing, empty or not text, a message is malformed,
            standard and conversational rows are mixed, a margin is missing or not finite, or `chosen` equals `rejected`.
    """
    dataset = _require_dataset(dataset, name)
    columns = dataset.column_names
    findings = _Findings()
    if len(dataset) == 0:
        findings.columns.append("It is empty: 0 rows. Look at the name of the split and at the filters before it.")
    findings.columns += _missing_columns(columns, user_column) if columns else []

    # a "torch" or "numpy" format would hand out arrays; the checks are about Python values
    dataset = dataset.with_format(None)
    if user_column in columns:
        findings.ids = _problem_of_ids(dataset, user_column, users)
    pair = _token_columns(columns)
    # tokenised rows are not tokenised again, so the texts beside the ids have no effect
    needed = [column for column in (*(pair or TEXT_COLUMNS), "margin") if column in columns]
    forms: dict[str, list[int]] = {"text": [], "messages": [], "tokens": []}
    row_number = 0
    for batch in dataset.select_columns(needed).iter(batch_size=1000) if needed else ():
        for values in zip(*batch.values(), strict=True):
            form = _check_content(dict(zip(batch, values, strict=True)), row_number, findings)
            if form:
                forms[form].append(row_number)
            row_number += 1
    if forms["text"] and forms["messages"]:
        rarer, usual = sorted(("text", "messages"), key=lambda form: len(forms[form]))
        for row_number in forms[rarer]:
            findings.add("mixed", "The rows", row_number, f"these hold {rarer}, {len(forms[usual])} others {usual}")
    findings.raise_if_any(name)


def check_prompt_rows(
    dataset: Dataset, user_column: str = "user_id", name: str = "train", users: UserRegistry | None = None
) -> None:
    """Look at every row of a dataset of prompts, each of a user, before a policy is trained on it.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with a `prompt`, text or messages; other columns are for the reward functions and not looked at.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        name (`str`, *optional*, defaults to `"train"`):
            What to call the dataset in a message.
        users ([`UserRegistry`], *optional*):
            Of the model: if it is pseudonymous no message shows an id.

    Raises:
        UserIdError: The ids are the only thing wrong.
        DataError: The dataset is empty, a column is missing, or a prompt is missing, empty, malformed or of another form.
    """
    dataset = _require_dataset(dataset, name)
    findings = _Findings()
    if len(dataset) == 0:
        findings.columns.append("It is empty: 0 rows. Look at the name of the split and at the filters before it.")
    columns = dataset.column_names
    findings.columns += _missing_columns(columns, user_column, prompts=True) if columns else []
    dataset = dataset.with_format(None)
    if user_column in columns:
        findings.ids = _problem_of_ids(dataset, user_column, users)
    forms: dict[str | None, list[int]] = {}
    if "prompt" in columns:
        for row_number, prompt in enumerate(dataset["prompt"]):
            forms.setdefault(_check_texts({"prompt": prompt}, row_number, findings), []).append(row_number)
    if "text" in forms and "messages" in forms:
        rarer, usual = sorted(("text", "messages"), key=lambda form: len(forms[form]))
        for row_number in forms[rarer]:
            findings.add("mixed", "The rows", row_number, f"these hold {rarer}, {len(forms[usual])} others {usual}")
    findings.raise_if_any(name)


def check_prompt_row(
    row: dict[str, Any],
    row_number: int,
    user_column: str = "user_id",
    name: str = "train",
    users: UserRegistry | None = None,
) -> None:
    """The checks of [`check_prompt_rows`] for one row.

    Args:
        row (`dict`):
            The row.
        row_number (`int`):
            Its place, for the message.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        name (`str`, *optional*, defaults to `"train"`):
            What to call the dataset in a message.
        users ([`UserRegistry`], *optional*):
            Of the model: if it is pseudonymous no message shows an id.

    Raises:
        UserIdError, DataError: As in [`check_prompt_rows`].
    """
    findings = _Findings()
    findings.columns = [f"Row {row_number}: {problem}" for problem in _missing_columns(list(row), user_column, True)]
    if not findings.columns:
        try:
            hidden = True if users is not None and users.pseudonymous else None
            user_id_as_text(row[user_column], where=f"row {row_number} of column {user_column!r}", hidden=hidden)
        except UserIdError as error:
            findings.ids = str(error)
        _check_texts({"prompt": row["prompt"]}, row_number, findings)
    findings.raise_if_any(name)


def _problem_of_ids(dataset: Dataset, user_column: str, users: UserRegistry | None = None) -> str | None:
    if type(dataset.features[user_column]).__name__ == "Json":
        # datasets gives this type to a JSON column of mixed types and decodes its text too: '007' comes out as the number 7
        return (
            f"The column {user_column!r} was read from JSON with mixed types, and text ids that look like numbers have lost "
            "their form ('007' became 7). Give all ids as text in the file, or read it with trl_sharelora.data.load_preferences."
        )
    try:
        if users is not None and users.pseudonymous:
            users.check_ids(dataset, user_column)
        else:
            UserRegistry.from_dataset(dataset, user_column)
    except UserIdError as error:
        return str(error)
    return None


def check_row(
    row: dict[str, Any],
    row_number: int,
    user_column: str = "user_id",
    first_row: dict[str, Any] | None = None,
    name: str = "train",
    users: UserRegistry | None = None,
) -> None:
    """The checks of [`check_preference_rows`] for one row of a stream.

    Args:
        row (`dict`):
            The row.
        row_number (`int`):
            Its place in the stream, for the message.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        first_row (`dict`, *optional*):
            The first row of the stream. TRL decides by it whether the whole stream is conversational and whether it has
            margins, so a row of another form would be treated wrongly without a word; with `first_row` it raises.
        name (`str`, *optional*, defaults to `"train"`):
            What to call the stream in a message.
        users ([`UserRegistry`], *optional*):
            As of [`check_preference_rows`].

    Raises:
        UserIdError: The id is the only thing wrong.
        DataError: As in [`check_preference_rows`].
    """
    findings = _Findings()
    findings.columns = _missing_columns(list(row), user_column)
    if findings.columns:
        findings.columns = [f"Row {row_number}: {problem}" for problem in findings.columns]
    else:
        try:
            hidden = True if users is not None and users.pseudonymous else None
            user_id_as_text(row[user_column], where=f"row {row_number} of column {user_column!r}", hidden=hidden)
        except UserIdError as error:
            findings.ids = str(error)
    form = _check_content(row, row_number, findings)
    if first_row is not None:
        first_form = _check_content(first_row, 0, _Findings())
        if form and first_form and form != first_form:
            findings.add("mixed", "The rows", row_number, f"this one holds {form}, the first row {first_form}")
        for column in ("prompt", "margin"):
            if (column in row) != (column in first_row):
                findings.add(
                    "columns", f"`{column}`", row_number, "it is there" if column in row else "it is not there"
                )
    findings.raise_if_any(name)


def tokenize_preference(example: dict[str, Any], processing_class: Any) -> dict[str, list[int]]:
    """Token ids of a preference row, exactly as TRL's `RewardTrainer` makes them.

    Standard rows: the end token is added to `chosen` and `rejected` where missing, the prompt is put in front. Conversational
    rows: the chat template is applied to prompt + answer with the row's `tools` and `chat_template_kwargs`. Rows that are
    tokenised already pass through.

    Args:
        example (`dict`):
            A checked preference row.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        `dict` with `chosen_ids` and `rejected_ids`, each `list[int]`.
    """
    pair = _token_columns(example)
    if pair:
        return {"chosen_ids": example[pair[0]], "rejected_ids": example[pair[1]]}
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    template_arguments = {"tools": tools, **(example.get("chat_template_kwargs") or {})}
    chosen_ids, rejected_ids = (
        tokenize_completion(example.get("prompt"), example[side], processing_class, template_arguments)
        for side in ("chosen", "rejected")
    )
    return {"chosen_ids": chosen_ids, "rejected_ids": rejected_ids}


def tokenize_completion(
    prompt: Any,
    completion: Any,
    processing_class: Any,
    template_arguments: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt and its answer, as [`tokenize_preference`] makes them for either answer of a row.

    Args:
        prompt (`str` or `list[dict]`, *optional*):
            Text or messages; None where the answer holds it.
        completion (`str` or `list[dict]`):
            Of the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        template_arguments (`dict`, *optional*):
            For the chat template (`tools` and others); not used for text.

    Raises:
        ConfigError: The tokenizer has no end token, which closes every text.
    """
    if isinstance(completion, list):
        tokens = processing_class.apply_chat_template(
            (prompt or []) + completion, tokenize=True, return_dict=True, **(template_arguments or {})
        )
        return list(tokens["input_ids"])
    eos = processing_class.eos_token
    if eos is None:
        raise ConfigError(
            f"The tokenizer ({type(processing_class).__name__}) has no end token, which closes every standard row. Encoder "
            "tokenizers have none: set processing_class.eos_token = processing_class.sep_token (for the trainer: "
            'eos_token="[SEP]" in its config).'
        )
    text = (prompt or "") + (completion if completion.endswith(eos) else completion + eos)
    return list(processing_class(text=text)["input_ids"])


def load_preferences(path_or_id: str | os.PathLike, split: str | None = None) -> Dataset:
    """Preference rows from a file, a saved dataset or the hub; [`check_preference_rows`] looks at what they hold.

    User ids come out as they are written. JSON and CSV files are therefore read here and not by `load_dataset`, whose guesses
    turn the CSV id 007 into 7, the JSON text "007" beside a number into 7, and ids that look like dates into timestamps. In
    a CSV every column is text except `margin`.

    Args:
        path_or_id (`str` or `os.PathLike`):
            A `.jsonl`, `.json`, `.csv` (each also with `.gz`) or `.parquet` file; a directory written by `save_to_disk`; or
            what [`~datasets.load_dataset`] takes (a dataset of the hub, a directory of data files).
        split (`str`, *optional*):
            The split to take. In a file, the rows whose column `split` says so; a file without this column is `"train"`.

    Raises:
        DataError: There is no such file or dataset, it is damaged or cannot be parsed (the line is named), it ends in something else,
            a column mixes types or holds half of a character, or the split is not there or not named where there are several.
    """
    path = Path(path_or_id)
    suffix = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()
    reader = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}.get(
        suffix.removesuffix(".gz")
    )
    if reader and (path.is_file() or not path.exists()):
        if not path.is_file():
            raise DataError(f"There is no file {str(path)!r} (looked for in {Path.cwd()}).")
        return _split_of_rows(reader(path), split, str(path))
    if path.is_file():
        raise DataError(
            f"The file {str(path)!r} does not end in {_ENDINGS}. Rename it if it is one of these, or convert it."
        )
    saved = path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        loaded = load_from_disk(str(path)) if saved else load_dataset(str(path_or_id))
    except Exception as error:  # `datasets` raises a dozen kinds, from the network's to pyarrow's
        raise DataError(
            f"{str(path_or_id)!r} cannot be read: {type(error).__name__}: {str(error).rstrip('.')}. It is "
            + (
                "a folder; one that save_to_disk wrote whole, or of data files, is needed."
                if path.is_dir()
                else f"no file here (looked for in {Path.cwd()}; one ends in {_ENDINGS}) and could not be had from the hub."
            )
        ) from error
    if isinstance(loaded, Dataset):
        return _split_of_rows(loaded, split, str(path_or_id))
    if split in loaded:
        return loaded[split]
    if len(loaded) == 1:
        return _split_of_rows(next(iter(loaded.values())), split, str(path_or_id))
    raise DataError(f"{str(path_or_id)!r} has the splits {sorted(loaded)}; split={split!r} names none of them.")


def _split_of_rows(dataset: Dataset, split: str | None, source: str) -> Dataset:
    """The rows of one split, by their column `split`."""
    if split is None:
        return dataset
    if "split" not in dataset.column_names:
        if split == "train":
            return dataset
        raise DataError(
            f"{source!r} has no column 'split', so all of it is 'train'; there is no {split!r} to take from it."
        )
    splits = dataset.with_format(None)["split"][:]
    rows = [row for row, value in enumerate(splits) if value == split]
    if not rows:
        raise DataError(f"{source!r} has no row with split={split!r}; its splits are {dict(Counter(splits))}.")
    return dataset.select(rows)


def check_output(path: str | os.PathLike, endings: Sequence[str]) -> None:
    """Try a place where a file is to be written: before the work that makes it, not after it.

    Args:
        path (`str` or `os.PathLike`):
            The file. Its folder is made; what is there stays as it is.
        endings (`Sequence[str]`):
            It has one of these.

    Raises:
        DataError: It ends in something else, or it cannot be written.
    """
    path = Path(path)
    if not path.name.endswith(tuple(endings)):
        raise DataError(
            f"The output {str(path)!r} does not end in {', '.join(endings[:-1])} or {endings[-1]}."
            if len(endings) > 1
            else f"The output {str(path)!r} does not end in {endings[0]}."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not os.path.lexists(path)
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: str | os.PathLike, error: Exception) -> DataError:
    """The error for a file that cannot be written, to be raised."""
    return DataError(
        f"The output {os.fspath(path)!r} cannot be written: {type(error).__name__}: {error}. A file in a folder that can be made and written to, "
        "with room on its disk, is needed; what Parquet cannot hold, .jsonl can."
    )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read: {type(error).__name__}: {str(error).rstrip('.')}. Is it cut off or damaged (copy it again), or not of the format that "
        "its ending says?"
    )


def json_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines, `.gz` or not, each as it is.

    Args:
        path (`Path`):
            The file.

    Raises:
        DataError: it is damaged, not UTF-8 text, not JSON (with the line), or holds something else than objects.
    """
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as file:
            text = file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}. Save it in UTF-8.") from error
    except (EOFError, OSError, zlib.error) as error:
        raise _unreadable(path, error) from error
    rows: list[Any] = []
    is_list = text.lstrip().startswith("[")
    # not splitlines(): JSON text may hold U+2028 and its like as they are
    for number, part in enumerate([text] if is_list else text.split("\n"), start=1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, and lists in lists in lists
            line = error.lineno if is_list and isinstance(error, json.JSONDecodeError) else number
            raise DataError(
                f"{path} is not JSON at line {line}: {error}. Is the file cut off or edited by hand?"
            ) from error
        rows.extend(value if is_list else [value])
    bad = [number for number, row in enumerate(rows) if not isinstance(row, dict)]
    if bad:
        raise DataError(f"{path}: a row must be a JSON object with named columns; {some_rows(bad)} are not.")
    return rows


def _read_json(path: Path) -> Dataset:
    """Rows of a JSON list or of JSON lines; a key that a row lacks is None."""
    rows = json_records(path)
    columns = dict.fromkeys(column for row in rows for column in row)
    return _from_columns({column: [row.get(column) for row in rows] for column in columns}, path)


def _read_csv(path: Path) -> Dataset:
    """Rows of a CSV file, every column as text but `margin`; a cell that a short line lacks is None."""
    try:
        # With header=None a line with too many cells is an error that names it; with a header pandas would take the first
        # column of such a file for an index and move every cell by one.
        frame = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a CSV file in UTF-8 with the names of the columns in its first line: {str(error).strip()}. Texts "
            "with commas or line breaks need quotes."
        ) from error
    except (EOFError, OSError, zlib.error) as error:
        raise _unreadable(path, error) from error
    names = frame.iloc[0].tolist()
    if len(set(names)) < len(names) or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"{path}: the first line must name every column, each differently; it is {names}.")
    # pandas fills short lines up with NaN, whatever keep_default_na says
    columns: dict[str, list[Any]] = {
        name: [value if isinstance(value, str) else None for value in frame[position].iloc[1:]]
        for position, name in enumerate(names)
    }
    if "margin" in columns:
        margins: list[float | None] = []
        bad = []
        for row, value in enumerate(columns["margin"]):
            try:
                margins.append(None if value is None or not value.strip() else float(value))
            except ValueError:
                bad.append(row)
        if bad:
            raise DataError(
                f"{path}: `margin` is not a number: {some_rows(bad)} ({columns['margin'][bad[0]]!r}). Write numbers with a "
                "decimal point, or drop the column."
            )
        columns["margin"] = margins
    return _from_columns(columns, path)


def _read_parquet(path: Path) -> Dataset:
    try:
        return load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # pyarrow's, or what `datasets` makes of them
        raise _unreadable(path, error) from error


def _is_unicode(value: Any) -> bool:
    """Whether all text in it can be written down: JSON may hold one half of a character of two."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_columns(columns: dict[str, list[Any]], path: Path) -> Dataset:
    for column, values in columns.items():
        try:
            pa.array([column])
            pa.array(values)
        except UnicodeEncodeError as error:
            rows = [row for row, value in enumerate(values) if not _is_unicode(value)]
            raise DataError(
                f"{path}: the column {column!r} holds half of a character in {some_rows(rows) if rows else 'its name'}: {error}. Was text cut in the "
                'middle of an emoji? Write it anew (text.encode("utf-8", "replace").decode()), or drop the row.'
            ) from error
        except (pa.ArrowException, OverflowError) as error:
            types = Counter(type(value).__name__ for value in values if value is not None)
            rarest = min(types, key=lambda kind: types[kind])
            rows = [row for row, value in enumerate(values) if type(value).__name__ == rarest]
            found = ", ".join(f"{count} {kind}" for kind, count in types.most_common())
            raise DataError(
                f"{path}: the column {column!r} mixes types ({found}; {rarest} at {some_rows(rows)}) or holds a value that does "
                f"not fit its type ({error}). Write the whole column in one type; ids and texts as text."
            ) from error
    return Dataset.from_dict(columns)


def count_long_rows(dataset: Dataset, max_length: int, user_column: str = "user_id") -> dict[str, tuple[int, int]]:
    """How many rows of each user are longer than `max_length`, the ones TRL drops without a word.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenised rows (`chosen_ids`, `rejected_ids`) with a user column.
        max_length (`int`):
            Tokens; a row is too long when `chosen_ids` or `rejected_ids` has more.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.

    Returns:
        `dict[str, tuple[int, int]]`: `user_id -> (too long, all)` in order of first appearance.
    """
    dropped: Counter[str] = Counter()
    total: Counter[str] = Counter()
    chosen, rejected = TOKEN_COLUMNS[0]
    # lengths are read off the Arrow offsets; no row is decoded
    tables = dataset.select_columns([user_column, chosen, rejected]).with_format("arrow")
    for table in tables.iter(batch_size=10_000):
        longest = pc.max_element_wise(*(pc.list_value_length(table[column]) for column in (chosen, rejected)))
        for user_id, length in zip(table[user_column].to_pylist(), longest.to_pylist(), strict=True):
            user_id = user_id_as_text(user_id)
            total[user_id] += 1
            dropped[user_id] += length > max_length
    return {user_id: (dropped[user_id], count) for user_id, count in total.items()}


def check_long_rows(dataset: Dataset, max_length: int, user_column: str = "user_id", name: str = "train") -> int:
    """Log how many rows of how many users are longer than `max_length`, and refuse to lose a user altogether.

    Args:
        dataset ([`~datasets.Dataset`]):
            Tokenised rows (`chosen_ids`, `rejected_ids`) with a user column, before the long ones are dropped.
        max_length (`int`):
            Tokens; a row is too long when `chosen_ids` or `rejected_ids` has more.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        name (`str`, *optional*, defaults to `"train"`):
            What to call the dataset in a message.

    Returns:
        `int`: The number of rows that are too long.

    Raises:
        DataError: All rows of some user are too long.
    """
    counts = count_long_rows(dataset, max_length, user_column)
    losing = {user_id: pair for user_id, pair in counts.items() if pair[0]}
    dropped = sum(pair[0] for pair in losing.values())
    lost = [user_id for user_id, (long, total) in losing.items() if long == total]
    if lost:
        some = ", ".join(f"{user_id!r} ({counts[user_id][1]} rows)" for user_id in lost[:5]) + ", ..." * (
            len(lost) > 5
        )
        raise DataError(
            f"All rows of {len(lost)} of {len(counts)} users in the {name} dataset are longer than max_length={max_length} tokens "
            f"and would be dropped: {some}. Nothing would be learnt or known about these users. Raise max_length, shorten the "
            "texts, or leave these users out of the dataset."
        )
    if dropped:
        worst = sorted(losing, key=lambda user_id: losing[user_id][0] / losing[user_id][1], reverse=True)[:5]
        shares = ", ".join(f"{user_id!r} {losing[user_id][0]} of {losing[user_id][1]}" for user_id in worst)
        logger.warning(
            f"{dropped} of {len(dataset)} rows of the {name} dataset are longer than max_length={max_length} tokens and are "
            f"dropped; they belong to {len(losing)} of {len(counts)} users. Most affected: {shares}."
        )
    return dropped
