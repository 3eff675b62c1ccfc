"""Forget a user of a saved adapter: his row becomes zeros, where it lies, and his id leaves the list of users and all tables.

Everybody else keeps his row and stays bit-identical. The bytes go first and the id last, so what was cut off is done again by
calling once more. The shared factors have learned from him too, as from everybody; that cannot be taken back without training anew.
How much they lean on him can be measured before, with [`measure_influence`].
"""

import csv
import gzip
import io
import json
import lzma
import math
import mmap
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .confidence import CONFIDENCE_FOLDER, forget_in_confidence
from .data import check_preference_rows, load_preferences, tokenize_preference
from .errors import AdapterMismatchError, DataError, NonFiniteError, UnknownUserError, UserIdError
from .export import HEAD_MOVES, WEIGHTS_FILE
from .pessimism import EllipsoidSets
from .scoring import Scorer, load_reward_model
from .sharelora.config import PERSONAL_FACTOR, ShareLoraConfig
from .sharelora.store import (
    BANK_FOLDER,
    WORKING_FOLDER,
    clear_working_folders,
    erase_row,
    read_manifest,
    remove_unnamed,
)
from .users import USERS_FILE, UserRegistry


OPTIMIZER_FILE = "optimizer.pt"
# of every table per user that this package writes
ID_COLUMN = "user_id"
# How its CSV tables begin: those of `fit-users` and of the demo. Another's with such a column may be a log, which is not ours to change.
_CSV_TABLES = [[ID_COLUMN, "n"], [ID_COLUMN, "comparisons"]]
# What holds numbers only; the rest of a directory is searched for the id.
_TENSORS = {".safetensors", ".pt", ".pth", ".bin"}
# A shorter id would be found by chance wherever there are many bytes: it is searched in quotes and as a whole cell.
_SEARCHED_BYTES = 5
# How packed files begin, whatever they are called, and who unpacks them; None for what nobody here can.
_PACKED: dict[bytes, str | None] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"7z\xbc\xaf\x27\x1c": None,
    b"Rar!": None,
}
_PORTION = 1 << 20  # bytes
_OVERLAP = 64  # of portions, at least: a short id with what stands around it


@dataclass
class Influence:
    """How much the shared part of a reward model leans on one user, to first order; made by [`measure_influence`].

    Args:
        user_id (`str`):
            Whom; his pseudonym in a pseudonymous registry.
        comparisons (`int`), all_comparisons (`int`), users (`int`):
            How many are his, of how many, of how many users.
        parts ([`~pandas.DataFrame`], *optional*):
            A line for the shared factors, one for the score head (where all have one) and one for all of it: `part`, `norm_share`,
            `per_comparison`, `cosine`. None where nothing is shared.
    """

    user_id: str
    comparisons: int
    all_comparisons: int
    users: int
    parts: pd.DataFrame | None

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        parts = None if self.parts is None else json.loads(self.parts.to_json(orient="records"))
        return {**vars(self), "parts": parts}

    def __str__(self) -> str:
        first = (
            f"{self.user_id!r} gave {self.comparisons} of {self.all_comparisons} comparisons "
            f"({self.comparisons / self.all_comparisons:.1%}) of {self.users} users."
        )
        if self.parts is None:
            return f"{first} Nothing is shared between users in this adapter, so nothing of it has learned from him."
        formats = {"norm_share": "{:.2%}".format, "per_comparison": "{:.2f}".format, "cosine": "{:+.2f}".format}
        return (
            f"{first} Pull on the shared part, at the weights as they are:\n"
            + self.parts.to_string(index=False, formatters=formats)
            + "\nnorm_share: his pull beside the sum of everybody's; per_comparison: his mean pull per comparison in units of the "
            "others'; cosine: with the pull of all others together. First order only: not what retraining without him would change."
        )


@dataclass
class ForgetReport:
    """What [`forget_user`] did.

    Args:
        directory (`Path`):
            `model_dir`.
        adapters (`list[Path]`):
            Directories whose row of him was erased: the adapter, its checkpoints.
        tables (`list[Path]`):
            Tables that were written again without his lines.
        left (`list[Path]`):
            Files of the directory that this function does not change and in which his id still stands, or that are called by it, or lie
            in a folder that is: an adapter of his that was exported to `exports/ann` or `rm-ann`. Looked into are also packed ones:
            gzip, bz2, xz, zstd, lz4, zip and npz, Parquet and Arrow.
        unread (`list[Path]`):
            Files that could not be looked into: packed in another way, with a password, twice, or torn; and states of an optimizer
            in which no moments of his row are found where there should be some. He may be in them.
        influence ([`Influence`], *optional*):
            What was measured before.
    """

    directory: Path
    adapters: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    left: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)
    influence: Influence | None = None

    def __str__(self) -> str:
        lines = [str(self.influence)] if self.influence is not None else []
        lines.append(
            f"Erased: row, moments, own comparisons and id in {len(self.adapters)} saved adapter(s), lines in {len(self.tables)} table(s) "
            f"under {self.directory}."
        )
        if self.left:
            lines.append(
                f"His id still stands in {len(self.left)} file(s), or in their paths, that are not changed here: {self._some(self.left)}."
            )
        if self.unread:
            lines.append(
                f"Not looked into: {len(self.unread)} file(s) that are not understood here (packed, or of another optimizer), in which he "
                f"may be: {self._some(self.unread)}."
            )
        lines.append(
            "What the shared factors, the head and sums over all users learned from him stays in them; training again without his "
            "comparisons removes it. Copies elsewhere (exports, backups, caches of the data, the Hub, logs) are untouched."
        )
        return "\n".join(lines)

    def _some(self, paths: list[Path]) -> str:
        return ", ".join(str(path.relative_to(self.directory)) for path in paths[:5]) + ", ..." * (len(paths) > 5)


def forget_user(
    model_dir: str | os.PathLike,
    user_id: str,
    *,
    report_influence: Dataset | str | os.PathLike | None = None,
    key: bytes | str | os.PathLike | bool | None = None,
    **measuring: Any,
) -> ForgetReport:
    """Forget one user of a saved adapter and of everything beside and below it; changes no other user's row.

    Erased are his row and its moments, also of a personal head and of all adapters and checkpoints in the directory; his comparisons
    in confidence sets; his lines in tables (`*.parquet` with a column `user_id`: those of evaluations; of `*.csv` only this package's
    own, of `fit-users` and the demo); and last his id, whose place in `users.json` stays as a tombstone, so that nobody gets his row.
    Moments are those of the trainers' optimizer, or tensors of a bank's shape in the state of another.

    Not erased, because it is not his alone: what the shared factors and the score head have learned, and sums over all users (the
    pooled part of ellipsoids, ensembles of heads, accuracies in `summary.json` and `trainer_state.json`). Not erased, and named only
    if its path names him: an adapter of his from [`~trl_sharelora.export_user`].

    Args:
        model_dir (`str` or `os.PathLike`):
            The directory of a saved adapter, or the `output_dir` of a training: its `checkpoint-*` are seen to as well. Copies
            elsewhere (exports, backups, the Hub) are not.
        user_id (`str`):
            Whom. Of a pseudonymous adapter without its key: a [`~trl_sharelora.users.Pseudonym`].
        report_influence ([`~datasets.Dataset`], `str` or `os.PathLike`, *optional*):
            The comparisons of the training: before anything is erased, measure with [`measure_influence`] how much the shared part
            leans on him.
        key (`bytes`, `str`, `os.PathLike` or `False`, *optional*):
            Of a pseudonymous adapter, see [`~trl_sharelora.users.read_user_key`].
        **measuring:
            For [`measure_influence`]: `user_column`, `batch_size`, `max_length`; and for
            [`~trl_sharelora.scoring.load_reward_model`].

    Returns:
        [`ForgetReport`], to print.

    Raises:
        UnknownUserError: nobody there has this id; nothing is written.
        AdapterMismatchError: the adapter's tensors are missing or torn, there are not as many rows as users, or a checkpoint's moments
            or the confidence sets are torn; nothing is written.
        DataError: a table cannot be read, or the comparisons that came have none of his; nothing is written.
        ConfigError: the adapter is pseudonymous and the key is missing or another; nothing is written.
        BankError: the bank is torn.
        BankBusyError: a training is writing into `model_dir`; nothing is written.

    Example:

    ```python
    print(forget_user("rm", "ann", report_influence="train.jsonl"))
    ```
    """
    model_dir = Path(model_dir)
    # the adapter, its checkpoints, other adapters beside it, the reference of a policy
    folders = sorted(path.parent for path in model_dir.rglob(USERS_FILE))
    if not folders:
        UserRegistry.load(model_dir)  # says what is missing
    registries = {folder: UserRegistry.load(folder, _key_for(folder, key)) for folder in folders}
    # a call that was cut off may have done with some of the folders
    rows = {folder: registry.find([user_id])[0] for folder, registry in registries.items()}
    known = [folder for folder, row in rows.items() if row >= 0]
    names = {str(user_id), *(registry.names([user_id])[0] for registry in registries.values())}
    tables = [path for path in _files(model_dir) if _is_in_table(path, names)]
    if not known and not tables:
        raise UnknownUserError(next(iter(registries.values())).unknown_message([user_id]))
    configs = {folder: ShareLoraConfig.from_pretrained(str(folder)) for folder in known}
    banks = {
        folder: _bank_tensors(folder, configs[folder])
        for folder in known
        if configs[folder].bank not in ("ram", "mmap")
    }
    for folder in known:
        if (folder / OPTIMIZER_FILE).is_file():
            _read_moments(folder / OPTIMIZER_FILE)
        _check_sets(folder / CONFIDENCE_FOLDER)
    report = ForgetReport(model_dir, known, tables)
    if report_influence is not None:
        report.influence = _influence_of_saved(model_dir, report_influence, user_id, key, measuring)
    elif measuring:
        raise TypeError(f"{', '.join(measuring)} came without report_influence, for which it is.")
    for folder in sorted(model_dir.rglob(WORKING_FOLDER)):
        clear_working_folders(folder)  # what a killed run has left there
    for path in tables:
        _erase_lines(path, names)
    for folder in known:
        if folder in banks:
            _erase_resident(folder / WEIGHTS_FILE, banks[folder], rows[folder])
        else:
            erase_row(folder / BANK_FOLDER, rows[folder])
            # what a save that was cut off has left there
            remove_unnamed(folder / BANK_FOLDER, read_manifest(folder / BANK_FOLDER)["segments"])
        # rows in a store have their moments there
        if not _erase_moments(folder / OPTIMIZER_FILE, rows[folder], [shape for *_, shape in banks.get(folder, ())]):
            report.unread.append(folder / OPTIMIZER_FILE)
        for path in (folder / CONFIDENCE_FOLDER).glob("*.tmp"):
            path.unlink()  # sets of a save that was cut off
        forget_in_confidence(folder, rows[folder])
    for folder in known:
        registries[folder].registry_id  # noqa: B018  made from the ids, if an older file has none: before one is gone
        registries[folder].forget(user_id)
        registries[folder].save(folder)
    report.left += _called(model_dir, names)
    # who is in a list of users is known exactly: "user1" is not to be found in it for the sake of "user10"
    settled = {*report.left, *(folder / USERS_FILE for folder in folders)}
    for path in _files(model_dir):
        if path in settled or path.suffix in _TENSORS:
            continue
        found = _holds(path, names)
        if found:
            report.left.append(path)
        elif found is None:
            report.unread.append(path)
    return report


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path


def _key_for(folder: Path, key: Any) -> Any:
    """The key that was given, for a list of pseudonyms; plain ones beside it need none."""
    return key if UserRegistry.load(folder, key=False).pseudonymous else None


# -- tables


def _is_in_table(path: Path, names: set[str]) -> bool:
    """Whether a file is a table with lines of a user."""
    if path.suffix == ".csv":
        return any(line[:1] and line[0] in names for line in (_csv_table(path) or [])[1:])
    if path.suffix != ".parquet":
        return False
    try:
        schema = pq.read_schema(path)
        # lists or records of ids are nobody's lines, so the file is none of this package's tables: it is searched as all others are
        if ID_COLUMN not in schema.names or pa.types.is_nested(schema.field(ID_COLUMN).type):
            return False
        return bool(pc.any(_his(pq.read_table(path, columns=[ID_COLUMN]), names)).as_py())
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read ({error}), so it is not known whether he is in it: torn, or no parquet file. Remove it, or take it from "
            "a backup."
        ) from error


def _his(table: pa.Table, names: set[str]) -> pa.ChunkedArray:
    return pc.is_in(table[ID_COLUMN].cast(pa.string()), value_set=pa.array(map(str, names), pa.string()))


def _csv_table(path: Path) -> list[list[str]] | None:
    """The lines of a CSV table of this package, the first of which names the columns; None if it is somebody else's."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            first = next(reader, [])
            return [first, *reader] if first[:2] in _CSV_TABLES else None
    except (UnicodeDecodeError, csv.Error):
        return None


def _erase_lines(path: Path, names: set[str]) -> None:
    if path.suffix == ".csv":
        first, *lines = _csv_table(path) or [[]]
        with open(path, "rb") as before:
            ending = "\r\n" if before.readline().endswith(b"\r\n") else "\n"
        kept = [first, *(line for line in lines if not line[:1] or line[0] not in names)]
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator=ending).writerows(kept)
        with _replacing(path) as file:
            file.write(text.getvalue().encode())
        return
    table = pq.read_table(path)
    table = table.filter(pc.invert(_his(table, names)))
    for place, column in enumerate(table.schema):
        # a dictionary keeps the values that no line has any more
        if pa.types.is_dictionary(column.type):
            table = table.set_column(place, column.name, table[column.name].cast(column.type.value_type))
    with _replacing(path) as file:
        pq.write_table(table, file)


# -- what this function does not know


def _called(directory: Path, names: set[str]) -> Iterator[Path]:
    """Files, links and empty folders of a directory that are called by one of these names, or lie in a folder that is."""
    for path in sorted(directory.rglob("*")):
        if any(_is_called(part, names) for part in path.relative_to(directory).parts) and (
            path.is_symlink() or not path.is_dir() or not any(path.iterdir())
        ):
            yield path


def _is_called(part: str, names: set[str]) -> bool:
    """Whether a part of a path is one of these names, or has it between signs ("rm-ann", "ann.pt").

    Numbers stand in many paths (checkpoint-12, dates), so one that is an id has to be all of it, but for an ending or "user" before it.
    """
    return any(
        re.fullmatch(rf"(user[-_]?)?{re.escape(name)}(\..*)?", part)
        or (not name.isdecimal() and re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", part))
        for name in names
    )


def _holds(path: Path, names: set[str]) -> bool | None:
    """Whether a file has one of these names in it, as text or as JSON writes it; short ones in quotes, or as a whole value, only.

    None if it is packed and cannot be looked into.
    """
    if path.suffix == ".csv" and (table := _csv_table(path)) is not None:
        # his lines are gone; "ann1" in another's is "ann10", and a short id beside it a count
        searched = [name for name in names if len(name.encode()) >= _SEARCHED_BYTES]
        return any(name in cell for line in table for cell in line[1:] for name in searched)
    needles = {json.dumps(name).encode() for name in names} | {
        json.dumps(n, ensure_ascii=False).encode() for n in names
    }
    needles |= {('"' + name.replace('"', '""') + '"').encode() for name in names}  # as CSV writes it
    # numpy writes text in four bytes a letter, some table programs in two
    needles |= {
        name.encode(code)
        for name in names
        if len(name.encode()) >= _SEARCHED_BYTES
        for code in ("utf-8", "utf-16-le", "utf-32-le")
    }
    if path.stat().st_size == 0:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if any(content.find(needle) >= 0 for needle in needles):
            return True
        packing = _packing(content[:8])
    if packing is None:
        return None
    if not packing:
        cells = _cells(path.name, names)
        if cells is None:
            return False
        with open(path, "rb") as file:
            return _holds_stream(file, needles, cells)
    try:
        return _holds_packed(path, packing, needles, names)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError):
        # torn, or a zip with a password (RuntimeError) or a packing of its own (NotImplementedError); pa.ArrowInvalid is a ValueError
        return None


def _cells(file_name: str, names: set[str]) -> re.Pattern[bytes] | None:
    """What finds a name that is too short to be searched for as it is where it is a value of its own: a cell of CSV, a number in JSON."""
    endings = set(file_name.lower().split(".")[1:])
    short = b"|".join(re.escape(name.encode()) for name in sorted(names) if len(name.encode()) < _SEARCHED_BYTES)
    if short and endings & {"csv", "tsv"}:
        return re.compile(rb"[,;\t\r\n](" + short + rb")[,;\t\r\n]")
    if short and endings & {"json", "jsonl"}:
        return re.compile(rb'"' + ID_COLUMN.encode() + rb'" ?: ?(' + short + rb")[,}\s]")
    return None


def _packing(start: bytes) -> str | None:
    """What packed a file that starts so; `""` if nothing did, None if nobody here can unpack it."""
    return next((packed for magic, packed in _PACKED.items() if start.startswith(magic)), "")


def _holds_packed(path: Path, packed: str, needles: set[bytes], names: set[str]) -> bool | None:
    if packed in ("parquet", "arrow"):
        return _holds_columns(path, packed, needles, names)
    if packed != "zip":
        with _unpacked(path, packed) as stream:
            return _holds_stream(stream, needles, _cells(path.name, names))
    unread = False
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                found = _holds_stream(stream, needles, _cells(member.filename, names))
            if found:
                return True
            unread = unread or found is None
    return None if unread else False


def _unpacked(path: Path, packed: str) -> Any:
    if packed == "gzip":
        return gzip.open(path)  # several members too, as appending writes them
    return lzma.open(path) if packed == "xz" else pa.input_stream(str(path), compression=packed)


def _holds_stream(stream: Any, needles: set[bytes], cells: re.Pattern[bytes] | None) -> bool | None:
    """None if what was packed is packed again."""
    overlap = max(_OVERLAP, *map(len, needles))
    portion = stream.read(_PORTION)
    packing = _packing(portion[:8])
    kept = b"\n" + portion  # a cell at the start, and one at the end, has a line's end on either side too
    while True:
        if any(needle in kept for needle in needles) or (cells is not None and cells.search(kept)):
            return True
        if not portion:
            return False if packing == "" else None
        portion = stream.read(_PORTION)
        kept = kept[-overlap:] + (portion or b"\n")


def _holds_columns(path: Path, kind: str, needles: set[bytes], names: set[str]) -> bool:
    """Whether a text anywhere in the columns of a Parquet or Arrow file has one of the names in it, or is one."""
    with pa.memory_map(str(path)) as source:
        batches = pq.ParquetFile(source).iter_batches() if kind == "parquet" else _batches_of(source)
        for batch in batches:
            for column in batch.columns:
                for texts in _texts_in(column):
                    for needle in needles:
                        if pc.any(pc.match_substring(texts, needle)).as_py():
                            return True
                    if pc.any(pc.is_in(texts, value_set=pa.array([n.encode() for n in names], texts.type))).as_py():
                        return True
    return False


def _batches_of(source: Any) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_file(source)
    return (reader.get_batch(number) for number in range(reader.num_record_batches))


def _texts_in(column: pa.Array) -> Iterator[pa.Array]:
    """The arrays of text, as bytes, of which a column is made."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        yield from _texts_in(column.dictionary)
    elif pa.types.is_struct(kind):
        for child in column.flatten():
            yield from _texts_in(child)
    elif pa.types.is_map(kind):
        yield from _texts_in(column.keys)
        yield from _texts_in(column.items)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _texts_in(column.flatten())
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        yield column.cast(pa.binary())
    elif pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        yield column.cast(pa.large_binary())


# -- what stays in the shared part


def measure_influence(
    model: PeftModel,
    dataset: Dataset,
    user_id: str,
    processing_class: Any,
    *,
    user_column: str = "user_id",
    batch_size: int = 8,
    max_length: int | None = None,
) -> Influence:
    """How much the shared part of a reward model leans on one user's comparisons, at its weights as they are.

    With l(m) = -log sigmoid(m) the loss of a comparison with margin m, and S the parameters that all users share and training moved
    (the shared factor or factors, the common start with `train_common`, the score head), the *pull* of a user is

    `g_u = sum over his comparisons of dl / dS`

    The result tells `|g_u|` as a share of the sum of `|g_v|` over all users v (`norm_share`; 1 / users each, if all pull alike),
    `|g_u| / n_u` in units of the same ratio of the others' sums (`per_comparison`; 1 is usual), and the cosine of `g_u` with the sum
    of the others' `g_v`.

    What it is: how hard S is held where it is by him. Where training has come to rest the pulls of all add up to nothing, so a cosine
    near -1 there means that his comparisons balance everybody else's and S would move without them; near 0, that he pulls in
    directions of his own. What it is not: the change of S if one trained again without him. That would need the curvature (influence
    functions, Koh and Liang, 2017, https://huggingface.co/papers/1703.04730) and the whole path; and a user whose comparisons are all
    fitted well has no pull left, although S may be what it is because of him. It bounds nothing and is no proof of erasure.

    Measured on a toy (8 users with 10 to 80 comparisons, whole batches): the norm share ranks users as the distance does by which B
    moves when it is trained without each (Spearman .95; their numbers of comparisons alone: .98). With batches of 16 leaving out
    anybody moved B by nine tenths of its norm, because the order of the data changes too; the ranks then agreed less (.07 and .62 on
    two logs).

    Args:
        model ([`~peft.PeftModel`]):
            A ShareLoRA reward model.
        dataset ([`~datasets.Dataset`]):
            The comparisons it was trained on. Those of users it does not know are left out.
        user_id (`str`):
            Whom.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        batch_size (`int`, *optional*, defaults to 8):
            Comparisons per forward; there is at least one forward and backward per user.
        max_length (`int`, *optional*):
            Comparisons with a longer text are left out, as in training.

    Raises:
        UnknownUserError: the model does not know him.
        DataError: none of the comparisons is his.
        NonFiniteError: a gradient is NaN or infinite.
    """
    scorer = Scorer(model, processing_class, batch_size)
    check_preference_rows(dataset, user_column, name="influence", users=scorer.users)
    me = scorer.users.index([user_id])[0]
    dataset = dataset.with_format(None)
    of_user: dict[int, list[dict[str, list[int]]]] = {}
    for row, owner in zip(dataset, scorer.users.find(dataset[user_column][:]), strict=True):
        if owner >= 0:
            pair = tokenize_preference(row, processing_class)
            if max_length is None or max(map(len, (pair["chosen_ids"], pair["rejected_ids"]))) <= max_length:
                of_user.setdefault(owner, []).append(pair)
    name = scorer.users.names([user_id])[0]
    if me not in of_user:
        raise DataError(
            f"None of the {len(dataset)} comparisons (column {user_column!r}) is of the user {name!r}, so his influence cannot be measured "
            "on them. Give those of the training."
        )
    counts = {owner: len(pairs) for owner, pairs in of_user.items()}
    total = sum(counts.values())
    parts = _shared_parts(scorer)
    if not parts:
        return Influence(name, counts[me], total, len(counts), None)
    parameters = [parameter for some in parts.values() for parameter in some]
    norms: dict[int, list[float]] = {}
    mine: list[torch.Tensor] = []
    others = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    with scorer.scoring(), _trainable(parameters):
        for owner, pairs in of_user.items():
            pull = _pull(scorer, pairs, owner, parameters)
            norms[owner] = [_norm(some) for some in _split(pull, parts)]
            if not all(map(math.isfinite, norms[owner])):
                raise NonFiniteError(
                    f"The gradient of the comparisons of user {scorer.users[owner]!r} is NaN or infinite: his training has diverged, or the "
                    "base's dtype overflows. Go back to an earlier checkpoint, or load it in float32."
                )
            if owner == me:
                mine = pull
            else:
                others = [one + two for one, two in zip(others, pull, strict=True)]
    lines = []
    for place, (part, own, rest) in enumerate(
        zip([*parts, "all"], _split(mine, parts), _split(others, parts), strict=True)
    ):
        every = sum(norm[place] for norm in norms.values())
        without = every - norms[me][place]
        inner = sum(float((one.double() * two.double()).sum()) for one, two in zip(own, rest, strict=True))
        lengths = norms[me][place] * _norm(rest)
        lines.append(
            {
                "part": part,
                "norm_share": norms[me][place] / every if every else float("nan"),
                "per_comparison": (norms[me][place] / counts[me]) / (without / (total - counts[me]))
                if without
                else float("nan"),
                "cosine": inner / lengths if lengths else float("nan"),
            }
        )
    return Influence(name, counts[me], total, len(counts), pd.DataFrame(lines))


def _influence_of_saved(model_dir: Path, dataset: Any, user_id: str, key: Any, measuring: dict[str, Any]) -> Influence:
    if not isinstance(dataset, Dataset):
        dataset = load_preferences(os.fspath(dataset))
    if not (model_dir / USERS_FILE).is_file():
        raise UserIdError(
            f"No {USERS_FILE} in {model_dir}, only in folders below it; influence is measured on one adapter. Give its directory."
        )
    own = {name: measuring.pop(name) for name in ("user_column", "batch_size", "max_length") if name in measuring}
    model, tokenizer = load_reward_model(model_dir, **measuring)
    config = model.peft_config[model.active_adapter]
    if key is not None and key is not False and config.users.pseudonymous:
        config.users.unlock(key)
    return measure_influence(model, dataset, user_id, tokenizer, **own)


def _shared_parts(scorer: Scorer) -> dict[str, list[nn.Parameter]]:
    """What all users share and training moved, by kind."""
    config = scorer.config
    own = [PERSONAL_FACTOR[config.share]]
    if not config.train_common:
        own += ["common", "B"] if config.share == "none" else ["common"]
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in scorer.model.named_parameters():
        if f".{scorer.adapter}." not in name or name.endswith(HEAD_MOVES):
            continue
        if ".sharelora_" in name and not any(f".sharelora_{factor}." in name for factor in own):
            parts.setdefault("shared factors", []).append(parameter)
        elif ".modules_to_save." in name:
            parts.setdefault("head", []).append(parameter)
    return parts


def _split(tensors: list[torch.Tensor], parts: dict[str, list[nn.Parameter]]) -> Iterator[list[torch.Tensor]]:
    """By part, and all of them."""
    start = 0
    for some in parts.values():
        yield tensors[start : start + len(some)]
        start += len(some)
    yield tensors


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors)) ** 0.5


@contextmanager
def _trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """These parameters have gradients in here, and are afterwards what they were."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was in zip(parameters, before, strict=True):
            parameter.requires_grad_(was)


def _pull(
    scorer: Scorer, pairs: list[dict[str, list[int]]], owner: int, parameters: list[nn.Parameter]
) -> list[torch.Tensor]:
    """The gradient of a user's summed loss."""
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for batch in scorer.batches([[*pair["chosen_ids"], *pair["rejected_ids"]] for pair in pairs]):
        sequences = [pairs[place][side] for side in ("chosen_ids", "rejected_ids") for place in batch]
        with torch.enable_grad():
            rewards, _ = scorer.forward(sequences, torch.full((len(sequences),), owner))
            chosen, rejected = rewards.chunk(2)
            loss = -nn.functional.logsigmoid(chosen - rejected).sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        total = [one + two.float() for one, two in zip(total, found, strict=True)]
    return total


# -- the adapter's files


def _bank_tensors(folder: Path, config: ShareLoraConfig) -> list[tuple[int, int, tuple[int, ...]]]:
    """Where the banks of a resident adapter lie in its file: start, bytes of a row and shape of each."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterMismatchError(
            f"No {WEIGHTS_FILE} in {folder}: the adapter's tensors are missing, or not in safetensors. Save it again with "
            "save_pretrained."
        )
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if length <= path.stat().st_size else b"")
        except ValueError as error:
            raise AdapterMismatchError(
                f"{path} is not a safetensors file ({error}): torn. Take it from a backup."
            ) from None
    size = path.stat().st_size
    ends = [tensor["data_offsets"][1] for tensor in header.values() if "data_offsets" in tensor]
    needed = 8 + length + max(ends, default=0)
    if size != needed:
        raise AdapterMismatchError(
            f"{path} has {size} bytes, and its header tells of {needed}: torn. Nothing has been erased; take it from a backup."
        )
    found = []
    for name, tensor in header.items():
        own_head = config.personal_head and name.endswith(HEAD_MOVES)
        if own_head or name.endswith(f".sharelora_{PERSONAL_FACTOR[config.share]}.weight"):
            users, (start, end) = tensor["shape"][0], tensor["data_offsets"]
            if users != len(config.users):
                raise AdapterMismatchError(
                    f"{name} in {path} has {users} rows for {len(config.users)} users: the adapter's files are of two different saves. "
                    "Copy the whole directory again."
                )
            found.append((8 + length + start, (end - start) // users, tuple(tensor["shape"])))
    if not found:
        raise AdapterMismatchError(
            f"{path} has no users' rows (sharelora_{PERSONAL_FACTOR[config.share]}) although {folder / 'adapter_config.json'} says "
            f"share={config.share!r}, bank={config.bank!r}. The files are of two different saves: copy the whole directory again."
        )
    return found


def _erase_resident(path: Path, banks: list[tuple[int, int, tuple[int, ...]]], row: int) -> None:
    with open(path, "r+b") as file:
        for start, size, _ in banks:
            file.seek(start + row * size)
            file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())


def _read_moments(path: Path) -> dict[str, Any]:
    """An optimiser's state; raises if it is torn, before anything else is erased."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds
        raise AdapterMismatchError(
            f"{path} cannot be read ({type(error).__name__}: {error}): torn. Nothing has been erased; take it from a backup, or remove it if no "
            "training is to go on from there."
        ) from None


def _erase_moments(path: Path, row: int, shapes: list[tuple[int, ...]]) -> bool:
    """The user's moments in a checkpoint of resident banks of these shapes. A file of its own, and of the size of the bank: written anew.

    Whether all of them are found: of another optimizer than the trainers' what has a bank's shape is taken for its moments.
    """
    if not path.is_file():
        return True
    state = _read_moments(path)
    if not isinstance(state, dict) or not {"state", "param_groups"} <= set(state):
        return False
    ours = any("rowwise" in group for group in state["param_groups"])
    erased, known, unknown = False, 0, 0
    for moments in state["state"].values():
        tensors = [value for value in moments.values() if isinstance(value, torch.Tensor) and value.numel() > 1]
        his: list[torch.Tensor] = []
        if ours:
            step: Any = moments.get("step")
            # only the users' rows have a step count each; who was added after the checkpoint has none
            if isinstance(step, torch.Tensor) and step.ndim == 1 and row < len(step):
                his = list(moments.values())
        else:
            his = [tensor for tensor in tensors if tuple(tensor.shape) in shapes]
            known += bool(his) and len(his) == len(tensors)
            unknown += len(his) < len(tensors)
        for tensor in his:
            tensor[row] = 0
        erased = erased or bool(his)
    if erased:
        with _replacing(path) as file:
            torch.save(state, file)
    return ours or known >= len(shapes) or not (known or unknown)


def _check_sets(folder: Path) -> None:
    """Read the ellipsoids as they will be when he is taken out; raises if they are torn, before anything is erased."""
    settings, tensors = folder / "ellipsoid.json", folder / "ellipsoid.safetensors"
    if not settings.is_file() and not tensors.is_file():
        return
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))["set"]
        loaded = load_file(tensors)
        own = {name.removeprefix("set."): value for name, value in loaded.items() if name.startswith("set.")}
        EllipsoidSets.from_tensors(own, content)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterMismatchError(
            f"The confidence sets in {folder} cannot be read ({type(error).__name__}: {error}): torn, or of two different saves. Nothing has "
            "been erased; take them from a backup, or remove the folder and fit them again."
        ) from None


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777)  # mkstemp's is for the owner only
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
