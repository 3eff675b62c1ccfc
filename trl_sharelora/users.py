"""Who is who: `user_id` (text) <-> row of the bank.

The registry is append-only: a user keeps his row for life, so an adapter, its optimiser state and its tables never
need renumbering; a user who is to be forgotten leaves his row empty. It is stored with the adapter as `users.json`, a
list in row order. A million users take some 25 MB: their text and at most 17 bytes each. It needs no torch.

With a key it is *pseudonymous*: ids are digested where they come in, and it holds, writes and shows pseudonyms only. The key
stays outside, in a file or in the environment.
"""

import copy
import hashlib
import hmac
import json
import math
import operator
import os
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from .errors import ConfigError, DataError, UnknownUserError, UserIdError, some_rows


USERS_FILE = "users.json"
# An id is a key, not a document: a longer one is almost surely a text column given by mistake.
MAX_ID_BYTES = 256

# Where the key of pseudonymous registries comes from, if it is not given.
KEY_VARIABLE, KEY_FILE_VARIABLE = "SHARELORA_USER_KEY", "SHARELORA_USER_KEY_FILE"
# 128 bits. Who has a file and can guess its key can test guesses of ids against it; a passphrase is guessed.
MIN_KEY_BYTES = 16
_PSEUDONYM = re.compile("u-[0-9a-f]{32}")

# How an id came in the data. Ids read from a file are text there and may have been integers.
_UNKNOWN, _TEXT, _INTEGER = 0, 1, 2
# What a forgotten id's bytes begin with. UTF-8 never has it, so no id does.
_FORGOTTEN = b"\xff"
# Ids are read in portions, so that a million of them are never there as Python strings all at once.
_PORTION = 10_000


class Pseudonym(str):
    """A user's name in a pseudonymous [`UserRegistry`]: `u-` and 32 hex digits of HMAC-SHA256(key, id).

    What such a registry gives out (`ids`, `users[row]`) is of this type, and is looked up as it is. Plain text is an id, even if it
    reads like a pseudonym: nobody takes another user's place by calling himself what stands in a public file.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return self  # str(user_id) is common, and would make it plain text


def read_user_key(key: bytes | str | os.PathLike | None = None) -> bytes | None:
    """The key of a pseudonymous registry.

    Args:
        key (`bytes`, `str` or `os.PathLike`, *optional*):
            The key itself as bytes, or a file that holds it (`openssl rand -hex 32 > user.key`). By default the environment is asked:
            `SHARELORA_USER_KEY` is the key, `SHARELORA_USER_KEY_FILE` a file. White space around it does not count.

    Returns:
        `bytes` or None: None if nothing was given and nothing is in the environment.

    Raises:
        ConfigError: the file cannot be read, the key has fewer than 16 bytes, or the environment has both variables.
    """
    source = "The key that came"
    if key is None:
        text, file = os.environ.get(KEY_VARIABLE), os.environ.get(KEY_FILE_VARIABLE)
        if text and file:
            raise ConfigError(
                f"Both {KEY_VARIABLE} and {KEY_FILE_VARIABLE} are set; one key is needed. Unset one of them."
            )
        if not text and not file:
            return None
        key = os.fsencode(text) if text else file
        source = f"The key in {KEY_VARIABLE}"
    if not isinstance(key, bytes):
        if not isinstance(key, str | os.PathLike):
            raise ConfigError(
                f"key is of type {type(key).__name__}; bytes, or the path of a file with the key, are needed."
            )
        source = f"The key in {os.fspath(key)!r}"
        try:
            key = Path(key).read_bytes()
        except (OSError, ValueError) as error:
            # a key given as text would be taken for a path: do not repeat what came
            raise ConfigError(
                f"The file with the key cannot be read ({type(error).__name__}). Give the path of a file (`openssl rand -hex 32 > "
                "user.key` makes one), or the key itself as bytes."
            ) from None
    key = key.strip()
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"{source} has {len(key)} bytes; at least {MIN_KEY_BYTES} random ones are needed, because a short key is guessed. Make one: "
            "openssl rand -hex 32 > user.key"
        )
    return key


def user_id_as_text(value: Any, where: str = "", hidden: bool | None = None) -> str:
    """The one text form of a user id.

    Text is taken as it is; an integer is written in decimal. Everything else is refused, because the usual ways to lose
    ids (`007` read as 7, two long ids rounded to the same float, a blank cell read as NaN) all arrive as another type.

    Args:
        value (`str` or `int`):
            The id as it came.
        where (`str`, *optional*):
            Where it was found, for the message ("row 17 of column 'user_id'").
        hidden (`bool`, *optional*):
            Leave the value out of the message; by default if the environment holds a key: then ids are for no log.

    Raises:
        UserIdError: `value` is a float, a bool, None, blank, longer than 256 bytes or not valid Unicode.
    """
    if hidden is None:
        hidden = any(os.environ.get(name) for name in (KEY_VARIABLE, KEY_FILE_VARIABLE))
    at = f" at {where}" if where else ""
    shown = "(not shown)" if hidden else repr(value)
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
                f"The user id {shown}{at} is not valid Unicode (it holds half of a surrogate pair), so it could not be "
                "stored. It was probably decoded with the wrong codec; read the file as UTF-8."
            ) from None
        if size > MAX_ID_BYTES:
            raise UserIdError(
                f"A user id of {size} bytes{at} (starting {'(not shown)' if hidden else repr(value[:40])}); at most {MAX_ID_BYTES} are taken. Is another "
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
            f"A user id is {shown} of type {type(value).__name__}{at}; text or an integer is needed. Ids that pass through "
            "numbers are lost (007 becomes 7, long ids are rounded together): read the column as text (pandas: dtype=str)."
        )
    return str(value)


def _several(user_ids: Iterable[Any]) -> Iterable[Any]:
    if isinstance(user_ids, (str, bytes)):
        # its letters would be taken for users
        # the id itself is not repeated: a registry may be pseudonymous
        raise UserIdError("One user id came (a text) where several are needed; give a list: [user_id].")
    return user_ids


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


class UserRegistry:
    """The users of an adapter in row order: `user_id` (text) <-> `user_index` (row of the bank).

    Ids are compared as they are written. Ids that differ only by Unicode normalisation ("José" typed in two ways)
    are refused, because they are one person far more often than two.

    The row of a user who was forgotten stays taken: it counts in `len`, and `users[row]`, `ids` and iteration give None
    there. Iteration thus gives one value for each row.

    With a key the registry is pseudonymous. `add`, `index`, `find`, `forget` and `in` take ids as before; what it holds, what it
    gives out (`ids`, `users[row]`, messages) and what `users.json` names are [`Pseudonym`]s. The ids cannot be told from them without
    the key; with the key whoever guesses an id can tell whether it is there (GDPR calls such data personal still). An adapter that
    was loaded without the key is used by row; a look-up by id is an error until [`~UserRegistry.unlock`]. Ids that differ only by
    Unicode normalisation are one user here: their digests could not be compared later. Lost, a key cannot be made again.

    Args:
        user_ids (`Iterable[str | int]`, *optional*):
            The users, in row order. Each may occur once.
        key (`bytes`, `str`, `os.PathLike` or `False`, *optional*):
            Makes it pseudonymous, see [`read_user_key`]. By default the environment's, if it has one; `False` is none.

    Raises:
        ConfigError: the key cannot be used.

    Example:

    ```python
    >>> users = UserRegistry(["ann", "bob"])
    >>> users.index(["bob", "ann", "bob"])
    [1, 0, 1]
    >>> users.add(["cat", "ann"])
    [2, 0]
    >>> len(users), users[2], "cat" in users
    (3, 'cat', True)
    >>> users = UserRegistry(["ann"], key=b"64 hex digits of openssl rand -hex 32")
    >>> users.index(["ann"]), users.ids
    ([0], ['u-95eef940bbc43f9598f3e0e3e63581ad'])
    ```
    """

    def __init__(self, user_ids: Iterable[str | int] = (), key: bytes | str | os.PathLike | bool | None = None):
        # Row r is the bytes of `_text` from where row r - 1 ends to `_ends[r]`. Plain buffers instead of Python strings and
        # dicts, which take about 190 bytes a user.
        self._text = bytearray()
        self._ends = array("I")
        # From int to text happens once: a registry that has met both 7 and "7" cannot know whether they are one user.
        self._kinds = bytearray()
        # A hash table with open addressing: row + 1, or 0 for a free slot, at the first free slot from the hash of the id's
        # NFC form on. Ids that differ by normalisation only thus meet in it. Slots are never freed, see `forget`.
        self._table = array("I", bytes(4 * 8))
        self._registry_id = ""
        self._key: bytes | None = None if key is False else read_user_key(key)  # type: ignore[arg-type]  # True is refused there
        # what tells its key from others, "" without one; kept where the key is not
        self._key_check = "" if self._key is None else _check_value(self._key)
        for user_id in _several(user_ids):
            self._append_new(user_id)

    def __getstate__(self) -> dict[str, Any]:
        # Python's hashes of text are others in each process. Copies, or a shallow copy of the registry would share its rows.
        return {name: copy.copy(value) for name, value in self.__dict__.items() if name != "_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        size = 8
        while self._is_full(size):
            size *= 2
        self._make_table(size)

    @classmethod
    def from_dataset(
        cls, dataset: Any, column: str = "user_id", key: bytes | str | os.PathLike | bool | None = None
    ) -> "UserRegistry":
        """The users of a dataset, in order of first appearance.

        Args:
            dataset ([`~datasets.Dataset`] or iterable of `dict`):
                Preference rows.
            column (`str`, *optional*, defaults to `"user_id"`):
                The column that names the user.
            key (`bytes`, `str`, `os.PathLike` or `False`, *optional*):
                As of the class.

        Raises:
            UserIdError: naming the rows whose id cannot be used, all of them at once.
            DataError: there is no such column.
        """
        registry = cls(key=key)
        where = f"column {column!r}"
        if hasattr(dataset, "with_format") and hasattr(dataset, "__len__"):
            # a datasets.Dataset hands out one column, as Python values, without decoding the others
            if column not in dataset.column_names:
                raise DataError(f"There is no {where}; the columns are {', '.join(map(repr, dataset.column_names))}.")
            values_of = dataset.with_format(None)[column]
            portions = (values_of[start : start + _PORTION] for start in range(0, len(dataset), _PORTION))
            registry._add((value for portion in portions for value in portion), where)
        else:
            values, missing = [], []
            for number, row in enumerate(dataset):  # keeps the ids only: a stream's texts may not fit into memory
                if column in row:
                    values.append(row[column])
                else:
                    missing.append(number)
            if missing:
                raise DataError(f"There is no {where} in {some_rows(missing)}.")
            registry._add(values, where)
        return registry

    def add(self, user_ids: Iterable[Any], where: str = "") -> list[int]:
        """Rows of `user_ids`; those not met before get the next free rows.

        Raises:
            UserIdError: naming every position with an unusable id. Nothing is added then.
        """
        rows: list[int] = []
        self._add(list(_several(user_ids)), where, rows)
        return rows

    def _add(self, user_ids: Iterable[Any], where: str, rows: list[int] | None = None) -> None:
        before = len(self)
        of = f" of {where}" if where else ""
        bad: dict[str, list[int]] = {}
        told = array("q")
        for position, user_id in enumerate(user_ids):
            try:
                row = self._append(user_id, f"row {position}{of}", told)
            except UserIdError as error:
                bad.setdefault(str(error), []).append(position)
            else:
                if rows is not None:
                    rows.append(row)
        if bad:
            self._take_back(before)
            for row in told:
                if row < before:
                    self._kinds[row] = _UNKNOWN
            positions = sorted(position for found in bad.values() for position in found)
            message = next(iter(bad))
            if len(positions) > 1:
                message += f" In all {len(positions)} ids cannot be used: {some_rows(positions)}."
            raise UserIdError(message)

    def index(self, user_ids: Iterable[str | int]) -> list[int]:
        """Rows of users that are all known.

        Raises:
            UnknownUserError: naming the unknown ids, how many users there are and some of them.
            UserIdError: an id is not usable, or is a known one in another Unicode normalisation.
        """
        user_ids = list(_several(user_ids))
        rows = self.find(user_ids)
        unknown = sorted(set(self.names(user_id for user_id, row in zip(user_ids, rows, strict=True) if row < 0)))
        if unknown:
            raise UnknownUserError(self.unknown_message(unknown))
        return rows

    def find(self, user_ids: Iterable[str | int]) -> list[int]:
        """Rows of users, -1 for one who is not in the registry.

        Raises:
            UserIdError: an id is not usable, or is a known one in another Unicode normalisation.
        """
        return [self._find(self._stored(user_id))[0] for user_id in _several(user_ids)]

    def names(self, user_ids: Iterable[str | int]) -> list[str]:
        """What may be shown and written of these ids, known or not: their pseudonyms, or without a key the ids as text.

        Look-ups take them too.

        Raises:
            UserIdError: an id is not usable.
            ConfigError: the registry is pseudonymous and was loaded without its key.
        """
        return [self._stored(user_id, f"row {number}") for number, user_id in enumerate(_several(user_ids))]

    def check_ids(self, dataset: Any, column: str = "user_id") -> None:
        """Look at the ids of a dataset before they are used; adds nobody. What is said of them shows what may be shown here.

        It needs no key: without it messages name places only, or pseudonyms of nobody.

        Args:
            dataset ([`~datasets.Dataset`] or iterable of `dict`):
                As of [`~UserRegistry.from_dataset`].
            column (`str`, *optional*, defaults to `"user_id"`):
                The column that names the user.

        Raises:
            UserIdError, DataError: As of [`~UserRegistry.from_dataset`].
        """
        # any other key hides as well
        key = (self._key or os.urandom(MIN_KEY_BYTES).hex().encode()) if self._key_check else False
        UserRegistry.from_dataset(dataset, column, key=key)

    @property
    def pseudonymous(self) -> bool:
        """Whether it holds pseudonyms instead of ids."""
        return bool(self._key_check)

    def unlock(self, key: bytes | str | os.PathLike | None = None) -> "UserRegistry":
        """Give a pseudonymous registry that was loaded without its key the key; itself.

        Args:
            key (`bytes`, `str` or `os.PathLike`, *optional*):
                See [`read_user_key`].

        Raises:
            ConfigError: it is another key, there is none, or the registry holds plain ids.
        """
        if not self._key_check:
            raise ConfigError(
                "A key came for a list of users that holds plain ids. Leave it out; pseudonyms are made when a registry is: "
                "UserRegistry(key=...)."
            )
        found = read_user_key(key)
        if found is None:
            raise ConfigError(self._needs_key())
        if not hmac.compare_digest(_check_value(found), self._key_check):
            raise ConfigError(
                f"The key that came (check value {_check_value(found)}) is not the one these users' pseudonyms were made with "
                f"({self._key_check}): every user would be unknown. Give the key of this adapter (key=..., {KEY_VARIABLE} or "
                f"{KEY_FILE_VARIABLE})."
            )
        self._key = found
        return self

    def pseudonymised(self, key: bytes | str | os.PathLike | None = None) -> "UserRegistry":
        """The same users in the same rows with pseudonyms for ids; a new registry, this one stays as it is.

        Saved over a plain `users.json`, it makes that adapter pseudonymous: rows, and what belongs to them, stay valid. Everything else
        that names users is the caller's to see to (tables, logs, copies). `registry_id` stays, as other files refer to it; it is a
        digest of the plain ids, with which who guesses all of the first 1000 at once can test the guess.

        Args:
            key (`bytes`, `str` or `os.PathLike`, *optional*):
                See [`read_user_key`].

        Raises:
            ConfigError: there is no key, or it holds pseudonyms already.
        """
        if self._key_check:
            raise ConfigError(
                f"These users are pseudonyms already (check value of their key {self._key_check}). Another key's cannot be made of them: the "
                "ids are needed, from a list before it or from the data."
            )
        found = read_user_key(key)
        if found is None:
            raise ConfigError(
                f"There is no key. Give it, or set {KEY_VARIABLE} or {KEY_FILE_VARIABLE}; `openssl rand -hex 32 > user.key` makes one."
            )
        registry = UserRegistry(key=found)
        for user_id in self:
            if user_id is None:
                registry._push(_FORGOTTEN, _UNKNOWN, slot=None)
            else:
                registry._append_new(user_id)
        registry._kinds = self._kinds[:]
        registry.registry_id = self.registry_id
        return registry

    def forget(self, user_id: str | int) -> int:
        """Take a user's id out of the registry, for good.

        His row stays taken and belongs to nobody; the caller clears what the adapter holds there. The id is overwritten in
        memory, and is gone from the file with the next `save`. If it comes again it gets a new row. A `registry_id` that
        was made before stays, see there.

        Returns:
            `int`: the row that was his.

        Raises:
            UnknownUserError: there is no such user.
            UserIdError: the id is not usable, or is a known one in another Unicode normalisation.
        """
        row = self.index([user_id])[0]
        # The slot in the table stays too: those that come after it could not be found past a free one.
        start, end = self._span(row)
        self._text[start:end] = _FORGOTTEN.ljust(end - start, b"\0")
        self._kinds[row] = _UNKNOWN
        return row

    @property
    def registry_id(self) -> str:
        """What tells this registry from others, in files that are of no use with another one (`str`, hexadecimal).

        It stays the same while users come and are forgotten, and is saved in `users.json`, so that copies have it too. `==`
        does not look at it. Together with a number of rows it names a state of the registry, as rows are never renumbered.

        It is made when it is first needed, here or in `save`, from the first 1000 ids there are at that time: processes that
        number the same data by themselves agree on it. An empty registry has none yet (`""`). Who has all of these ids but
        a forgotten one can test guesses of that one against it; assign a random one beforehand
        (`users.registry_id = uuid.uuid4().hex`, the same in all processes) where that matters.
        """
        if not self._registry_id and len(self):
            first = json.dumps(self[:1000]).encode()
            self._registry_id = hashlib.sha256(first).hexdigest()
        return self._registry_id

    @registry_id.setter
    def registry_id(self, registry_id: str) -> None:
        self._registry_id = registry_id

    def unknown_message(self, unknown: list[str]) -> str:
        unknown = self.names(unknown)
        first = [repr(user_id) for user_id in islice((user_id for user_id in self if user_id is not None), 6)]
        known = ", ".join(first[:5]) + (", ..." if len(first) > 5 else "")
        some = ", ".join(repr(user_id) for user_id in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        users = len(self) - self._text.count(_FORGOTTEN)
        return (
            f"{len(unknown)} unknown user(s): {some}. This adapter knows {users} users ({known}). Either the id is "
            'misspelt, or the user was not in the training data: score him with the common model (unseen="common"), or add '
            "him to the training data."
        )

    # -- the border

    def _stored(self, user_id: Any, where: str = "") -> str:
        """What stands for an id in the table: its text, or its pseudonym."""
        if not self._key_check:
            return user_id_as_text(user_id, where)
        if isinstance(user_id, Pseudonym):
            if not _PSEUDONYM.fullmatch(user_id):
                at = f" at {where}" if where else ""
                raise UserIdError(
                    f"A Pseudonym (not shown){at} does not read like one: u- and 32 hex digits, as UserRegistry.ids gives them, are needed. If "
                    "it is an id, give it as plain text, and the key."
                )
            return user_id
        text = user_id_as_text(user_id, where, hidden=True)
        if self._key is None:
            raise ConfigError(self._needs_key())
        return Pseudonym(f"u-{_digest(self._key, b'id', _nfc(text).encode())[:32]}")

    def _needs_key(self) -> str:
        return (
            f"These users are pseudonyms (check value of the key {self._key_check}), and a user is looked up by id without the key. Set "
            f"{KEY_VARIABLE} or {KEY_FILE_VARIABLE}, or give it: users.unlock(key). Without it users can be named by row (a tensor) or "
            "pseudonym (UserRegistry.ids)."
        )

    # -- the table

    def _slot(self, text: str) -> tuple[int, int, str | None]:
        """Slot and row of an id or its twin, and which of them is there; the slot where it would go, -1 and None for neither."""
        form = _nfc(text)
        table = self._table  # another thread's `add` may put a larger one in its place
        last = len(table) - 1
        slot = hash(form) & last
        while entry := table[slot]:
            known = self._id(entry - 1)
            if known == text or (known is not None and _nfc(known) == form):
                return slot, entry - 1, known
            slot = (slot + 1) & last
        return slot, -1, None

    def _find(self, text: str, where: str = "") -> tuple[int, int]:
        """The row of an id, -1 if it is not known, and its slot."""
        slot, row, known = self._slot(text)
        if known is not None and known != text:
            at = f" (at {where})" if where else ""
            raise UserIdError(
                f"The user ids {known!r} and {text!r}{at} differ only by Unicode normalisation ({ascii(known)}, "
                f"{ascii(text)}); they are most likely one user. Normalise the column first "
                '(unicodedata.normalize("NFC", user_id)).'
            )
        return row, slot

    def _append(self, user_id: Any, where: str, told: array | None = None) -> int:
        """The row of an id that may be new; `told` collects the rows of known ones whose kind was unknown."""
        text = self._stored(user_id, where)
        kind = _TEXT if isinstance(user_id, str) else _INTEGER
        if self._key_check and isinstance(user_id, Pseudonym):
            kind = _UNKNOWN
        row, slot = self._find(text, where)
        if row < 0:
            return self._push(text.encode(), kind, slot)
        if kind == _UNKNOWN:
            return row
        if self._kinds[row] == _UNKNOWN:
            self._kinds[row] = kind
            if told is not None:
                told.append(row)
        elif self._kinds[row] != kind:
            raise UserIdError(
                f"The user id {text!r} came as text and as an integer (again at {where}); they may be one user or two. "
                "Give all ids as text."
            )
        return row

    def _append_new(self, user_id: Any) -> None:
        row = len(self)
        if self._append(user_id, where=f"place {row}") != row:
            raise UserIdError(
                f"The user id {self._stored(user_id)!r} occurs twice in the list of users (again at place {row})."
            )

    def _push(self, text: bytes, kind: int, slot: int | None) -> int:
        """Take the next row, found by `slot` if one is given."""
        row = len(self)
        self._text += text
        try:
            self._ends.append(len(self._text))
        except OverflowError:  # 4 GiB of text
            self._ends = array("Q", self._ends)
            self._ends.append(len(self._text))
        self._kinds.append(kind)
        if slot is not None:
            self._table[slot] = row + 1
        if self._is_full(len(self._table)):
            self._make_table(2 * len(self._table))
        return row

    def _is_full(self, size: int) -> bool:
        return 3 * len(self) > 2 * size

    def _make_table(self, size: int) -> None:
        table = array("I", [0]) * size
        for row, user_id in enumerate(self):
            if user_id is not None:
                slot = hash(_nfc(user_id)) & (size - 1)
                while table[slot]:
                    slot = (slot + 1) & (size - 1)
                table[slot] = row + 1
        self._table = table

    def _take_back(self, rows: int) -> None:
        """Remove all but the first `rows` rows, none of them forgotten."""
        # The last first: no other id was put behind its slot since.
        for row in range(len(self) - 1, rows - 1, -1):
            self._table[self._slot(self[row])[0]] = 0
        del self._text[self._ends[rows - 1] if rows else 0 :], self._ends[rows:], self._kinds[rows:]

    # -- the rows

    def _span(self, row: int) -> tuple[int, int]:
        return (self._ends[row - 1] if row else 0), self._ends[row]

    def _id(self, row: int) -> str | None:
        start, end = self._span(row)
        text = self._text[start:end]
        if text.startswith(_FORGOTTEN):
            return None
        return Pseudonym(text.decode()) if self._key_check else text.decode()

    @property
    def ids(self) -> list[Any]:
        """The user ids in row order (a copy), None for a forgotten one."""
        return list(self)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: Any) -> Any:
        rows = range(len(self))[row]
        return [self._id(row) for row in rows] if isinstance(rows, range) else self._id(rows)

    def __iter__(self) -> Iterator[Any]:
        return map(self._id, range(len(self)))

    def __contains__(self, user_id: Any) -> bool:
        text = self._stored(user_id)
        return self._slot(text)[2] == text

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UserRegistry) or len(self) != len(other) or self._key_check != other._key_check:
            return False
        # forgotten ids of one registry may take more bytes than those of the other
        return (self._ends == other._ends and self._text == other._text) or all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __repr__(self) -> str:
        return f"UserRegistry({len(self)} users{', pseudonymous' * self.pseudonymous})"

    # -- the file

    def save(self, directory: str | os.PathLike) -> Path:
        """Write `users.json` into `directory`, whole or not at all."""
        path = Path(directory) / USERS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".json.tmp")
        encode = json.JSONEncoder(ensure_ascii=False).encode
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            # JSON with one id a line, so that `load` can take it in portions
            # 2, so that who reads version 1 does not take pseudonyms for ids
            file.write(f'{{"version": {2 if self.pseudonymous else 1}, "registry_id": ')
            json.dump(self.registry_id, file)
            if self.pseudonymous:
                file.write(f', "key_check": "{self._key_check}"')
            file.write(', "users": [')
            for row, user_id in enumerate(self):
                file.write((",\n" if row else "\n") + encode(user_id))
            file.write("]}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, directory: str | os.PathLike, key: bytes | str | os.PathLike | bool | None = None) -> "UserRegistry":
        """Read `users.json` from a directory (or the file itself).

        Args:
            directory (`str` or `os.PathLike`):
                Where it is.
            key (`bytes`, `str`, `os.PathLike` or `False`, *optional*):
                Of a pseudonymous list, by default the environment's if it has one. Without it, or with `False`, ids cannot be looked
                up, see [`~UserRegistry.unlock`].

        Raises:
            UserIdError: the file is missing, torn or names a user twice.
            ConfigError: the list was made with another key, or a key was given and it was made with none.
        """
        path = Path(directory)
        if path.is_dir():
            path = path / USERS_FILE
        registry = cls(key=False)
        try:
            with open(path, encoding="utf-8", newline="\n") as file:
                registry._registry_id, registry._key_check, portions = _read_users(file)
                for user_ids in portions:
                    # in a file every id is text; anything else was put there by hand
                    if not isinstance(user_ids, list) or not all(isinstance(i, str | None) for i in user_ids):
                        raise UserIdError(f"{path} holds ids that are not text. Write them as JSON strings.")
                    for user_id in user_ids:
                        if user_id is None:
                            registry._push(_FORGOTTEN, _UNKNOWN, slot=None)
                        elif registry._key_check:
                            if not _PSEUDONYM.fullmatch(user_id):
                                raise UserIdError(
                                    f"{path} is a list of pseudonyms, and its place {len(registry)} holds something else: torn or edited. Take "
                                    "it from a backup."
                                )
                            registry._append_new(Pseudonym(user_id))
                        else:
                            registry._append_new(user_id)
        except FileNotFoundError:
            raise UserIdError(
                f"No {USERS_FILE} in {path.parent}: the adapter's list of users is missing, so its rows belong to nobody. Copy "
                "the file from where the adapter was saved; it cannot be rebuilt from the weights."
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserIdError(
                f"{path} is not a list of users ({error!r}): torn or edited. Take it from a backup."
            ) from error
        registry._kinds = bytearray(len(registry))  # ids that were integers in the data are text here
        if key is not False and (key is not None or (registry._key_check and read_user_key() is not None)):
            registry.unlock(key)  # type: ignore[arg-type]  # True is refused there
        return registry


def _digest(key: bytes, purpose: bytes, message: bytes) -> str:
    return hmac.digest(key, purpose + b"\0" + message, "sha256").hex()


def _check_value(key: bytes) -> str:
    return _digest(key, b"check", b"")[:16]


def _read_users(file: TextIO) -> tuple[str, str, Iterable[Any]]:
    """Of a `users.json` the registry id, the check value of its key and its users in portions: those of `save`, or all at once."""
    head = file.readline()
    by_line = head.startswith(('{"version": 1, "registry_id": ', '{"version": 2, "registry_id": ')) and head.endswith(
        ', "users": [\n'
    )
    content = json.loads(head + ("]}" if by_line else file.read()))
    users = content["users"]
    registry_id = content.get("registry_id", "")  # an older file has none
    if not isinstance(registry_id, str):
        raise TypeError(f"the registry_id is {registry_id!r}")
    key_check = content.get("key_check", "")
    if not isinstance(key_check, str):
        raise TypeError(f"the key_check is {key_check!r}")
    return registry_id, key_check, _portions(file) if by_line else [users]


def _portions(lines: TextIO) -> Iterator[Any]:
    portion = list(islice(lines, _PORTION))
    while True:
        following = list(islice(lines, _PORTION))
        text = "".join(portion)
        if following:
            text = text.removesuffix(",\n") + "]}"
        yield json.loads('{"users": [' + text)["users"]  # the last one has to bring its own end
        if not following:
            return
        portion = following
