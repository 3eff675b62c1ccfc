"""Who is who: `user_id` (text) <-> row of the bank.

The registry is append-only: a user keeps his row for life, so an adapter, its optimiser state and its tables never
need renumbering. It is stored with the adapter as `users.json`, a list in row order. It needs no torch.
"""

import json
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import DataError, UnknownUserError, UserIdError, some_rows


USERS_FILE = "users.json"
# An id is a key, not a document: a longer one is almost surely a text column given by mistake.
MAX_ID_BYTES = 256


def user_id_as_text(value: Any, where: str = "") -> str:
    """The one text form of a user id.

    Text is taken as it is; an integer is written in decimal. Everything else is refused, because the usual ways to lose
    ids (`007` read as 7, two long ids rounded to the same float, a blank cell read as NaN) all arrive as another type.

    Args:
        value (`str` or `int`):
            The id as it came.
        where (`str`, *optional*):
            Where it was found, for the message ("row 17 of column 'user_id'").

    Raises:
        UserIdError: `value` is a float, a bool, None, blank, longer than 256 bytes or not valid Unicode.
    """
    at = f" at {where}" if where else ""
    if isinstance(value, str):
        if not value.strip():
            raise UserIdError(
                f"A user id is blank ({value!r}){at}; every row needs the id of the user who gave the answer. Fill it in, "
                "or drop the rows without one."
            )
        try:
            size = len(value.encode("utf-8"))
        except UnicodeEncodeError:
            raise UserIdError(
                f"The user id {value!r}{at} is not valid Unicode (it holds half of a surrogate pair), so it could not be "
                "stored. It was probably decoded with the wrong codec; read the file as UTF-8."
            ) from None
        if size > MAX_ID_BYTES:
            raise UserIdError(
                f"A user id of {size} bytes{at} (starting {value[:40]!r}); at most {MAX_ID_BYTES} are taken. Is another "
                "column given as the user column?"
            )
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserIdError(
            f"A user id is missing ({value!r}){at}. Fill it in or drop the row; if the file says 'NA', 'null' or 'None', "
            "read the column as text (pandas: dtype=str, keep_default_na=False)."
        )
    if isinstance(value, bool) or not isinstance(value, int):
        # numpy integers register as numbers.Integral but are not `int`; datasets hands out plain Python values
        if type(value).__module__ == "numpy" and "int" in type(value).__name__:
            return str(int(value))
        raise UserIdError(
            f"A user id is {value!r} of type {type(value).__name__}{at}; text or an integer is needed. Ids that pass through "
            "numbers are lost (007 becomes 7, long ids are rounded together): read the column as text (pandas: dtype=str)."
        )
    return str(value)


def _as_list(user_ids: Iterable[Any]) -> list[Any]:
    if isinstance(user_ids, (str, bytes)):
        # its letters would be taken for users
        raise UserIdError(f"One user id came ({user_ids!r}) where several are needed; give a list: [{user_ids!r}].")
    return list(user_ids)


class UserRegistry:
    """The users of an adapter in row order: `user_id` (text) <-> `user_index` (row of the bank).

    Ids are compared as they are written. Ids that differ only by Unicode normalisation ("José" typed in two ways)
    are refused, because they are one person far more often than two.

    Args:
        user_ids (`Iterable[str | int]`, *optional*):
            The users, in row order. Each may occur once.

    Example:

    ```python
    >>> users = UserRegistry(["ann", "bob"])
    >>> users.index(["bob", "ann", "bob"])
    [1, 0, 1]
    >>> users.add(["cat", "ann"])
    [2, 0]
    >>> len(users), users[2], "cat" in users
    (3, 'cat', True)
    ```
    """

    def __init__(self, user_ids: Iterable[str | int] = ()):
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._normalised: dict[str, str] = {}
        # From int to text happens once: a registry that has met both 7 and "7" cannot know whether they are one user.
        self._kinds: dict[str, type] = {}
        for row, user_id in enumerate(_as_list(user_ids)):
            text = self._append(user_id, where=f"place {row}")
            if self._rows[text] != row:
                raise UserIdError(f"The user id {text!r} occurs twice in the list of users (again at place {row}).")

    @classmethod
    def from_dataset(cls, dataset: Any, column: str = "user_id") -> "UserRegistry":
        """The users of a dataset, in order of first appearance.

        Args:
            dataset ([`~datasets.Dataset`] or iterable of `dict`):
                Preference rows.
            column (`str`, *optional*, defaults to `"user_id"`):
                The column that names the user.

        Raises:
            UserIdError: naming the rows whose id cannot be used, all of them at once.
            DataError: there is no such column.
        """
        registry = cls()
        where = f"column {column!r}"
        if hasattr(dataset, "with_format") and hasattr(dataset, "__len__"):
            # a datasets.Dataset hands out one column, as Python values, without decoding the others
            if column not in dataset.column_names:
                raise DataError(f"There is no {where}; the columns are {', '.join(map(repr, dataset.column_names))}.")
            registry.add(dataset.with_format(None)[column][:], where=where)
        else:
            values, missing = [], []
            for number, row in enumerate(dataset):  # keeps the ids only: a stream's texts may not fit into memory
                if column in row:
                    values.append(row[column])
                else:
                    missing.append(number)
            if missing:
                raise DataError(f"There is no {where} in {some_rows(missing)}.")
            registry.add(values, where=where)
        return registry

    def add(self, user_ids: Iterable[Any], where: str = "") -> list[int]:
        """Rows of `user_ids`; those not met before get the next free rows.

        Raises:
            UserIdError: naming every position with an unusable id. Nothing is added then.
        """
        user_ids = _as_list(user_ids)
        before = len(self._ids)
        kindless = [text for text in map(str, user_ids) if text in self._rows and text not in self._kinds]
        bad: dict[str, list[int]] = {}
        rows = []
        for position, user_id in enumerate(user_ids):
            try:
                rows.append(
                    self._rows[self._append(user_id, where=f"row {position}" + (f" of {where}" if where else ""))]
                )
            except UserIdError as error:
                bad.setdefault(str(error), []).append(position)
        if bad:
            for text in self._ids[before:]:
                del self._rows[text], self._kinds[text], self._normalised[unicodedata.normalize("NFC", text)]
            del self._ids[before:]
            for text in kindless:
                self._kinds.pop(text, None)
            positions = sorted(position for found in bad.values() for position in found)
            message = next(iter(bad))
            if len(positions) > 1:
                message += f" In all {len(positions)} ids cannot be used: {some_rows(positions)}."
            raise UserIdError(message)
        return rows

    def index(self, user_ids: Iterable[str | int]) -> list[int]:
        """Rows of users that are all known.

        Raises:
            UnknownUserError: naming the unknown ids, how many users there are and some of them.
            UserIdError: an id is not usable, or is a known one in another Unicode normalisation.
        """
        user_ids = _as_list(user_ids)
        rows = self.find(user_ids)
        unknown = sorted({str(user_id) for user_id, row in zip(user_ids, rows, strict=True) if row < 0})
        if unknown:
            raise UnknownUserError(self.unknown_message(unknown))
        return rows

    def find(self, user_ids: Iterable[str | int]) -> list[int]:
        """Rows of users, -1 for one who is not in the registry.

        Raises:
            UserIdError: an id is not usable, or is a known one in another Unicode normalisation.
        """
        rows = []
        for user_id in _as_list(user_ids):
            text = user_id_as_text(user_id)
            row = self._rows.get(text, -1)
            if row < 0:
                self._refuse_twin(text, where="")
            rows.append(row)
        return rows

    def unknown_message(self, unknown: list[str]) -> str:
        known = ", ".join(repr(user_id) for user_id in self._ids[:5]) + (", ..." if len(self._ids) > 5 else "")
        some = ", ".join(repr(user_id) for user_id in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        return (
            f"{len(unknown)} unknown user(s): {some}. This adapter knows {len(self._ids)} users ({known}). Either the id is "
            'misspelt, or the user was not in the training data: score him with the common model (unseen="common"), or add '
            "him to the training data."
        )

    def _append(self, user_id: Any, where: str) -> str:
        text = user_id_as_text(user_id, where)
        kind = str if isinstance(user_id, str) else int
        if text in self._rows:
            if self._kinds.setdefault(text, kind) is not kind:
                raise UserIdError(
                    f"The user id {text!r} came as text and as an integer (again at {where}); they may be one user or two. "
                    "Give all ids as text."
                )
            return text
        self._refuse_twin(text, where=f" (at {where})")
        self._rows[text] = len(self._ids)
        self._kinds[text] = kind
        self._normalised[unicodedata.normalize("NFC", text)] = text
        self._ids.append(text)
        return text

    def _refuse_twin(self, text: str, where: str) -> None:
        twin = self._normalised.get(unicodedata.normalize("NFC", text))
        if twin is not None:
            raise UserIdError(
                f"The user ids {twin!r} and {text!r}{where} differ only by Unicode normalisation ({ascii(twin)}, "
                f"{ascii(text)}); they are most likely one user. Normalise the column first "
                '(unicodedata.normalize("NFC", user_id)).'
            )

    @property
    def ids(self) -> list[str]:
        """The user ids in row order (a copy)."""
        return list(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> str:
        return self._ids[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __contains__(self, user_id: Any) -> bool:
        return user_id_as_text(user_id) in self._rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserRegistry) and self._ids == other._ids

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __repr__(self) -> str:
        return f"UserRegistry({len(self._ids)} users)"

    def save(self, directory: str | os.PathLike) -> Path:
        """Write `users.json` into `directory`, whole or not at all."""
        path = Path(directory) / USERS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".json.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"version": 1, "users": self._ids}, file, ensure_ascii=False, indent=0)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "UserRegistry":
        """Read `users.json` from a directory (or the file itself).

        Raises:
            UserIdError: the file is missing, torn or names a user twice.
        """
        path = Path(directory)
        if path.is_dir():
            path = path / USERS_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            user_ids = content["users"]
        except FileNotFoundError:
            raise UserIdError(
                f"No {USERS_FILE} in {path.parent}: the adapter's list of users is missing, so its rows belong to nobody. Copy "
                "the file from where the adapter was saved; it cannot be rebuilt from the weights."
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserIdError(
                f"{path} is not a list of users ({error!r}): torn or edited. Take it from a backup."
            ) from error
        # in a file every id is text; anything else was put there by hand
        if not isinstance(user_ids, list) or not all(isinstance(user_id, str) for user_id in user_ids):
            raise UserIdError(f"{path} holds ids that are not text. Write them as JSON strings.")
        registry = cls(user_ids)
        registry._kinds.clear()  # ids that were integers in the data are text here
        return registry
