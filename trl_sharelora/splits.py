"""Splits that can be repeated and handed on: by comparison, by item, by user.

Which split a row goes to depends on the seed and on what the row says, not on where it stands in the file: every order
is made by a keyed hash of the content, so the same rows in another order, or on another machine, are split in the same
way. A split is written down as a file (row digest -> split) and is checked against the data whenever it is applied.

What may not be torn apart stays on one side: all answers of a user to the same two replies (by comparison and by user),
all rows of a prompt or of a pair and of its near-duplicates (by item). Near-duplicates are texts whose character
5-shingles have a Jaccard similarity of at least `NEAR`, found with MinHash (Broder, 1997, "On the resemblance and
containment of documents") and then compared exactly.
"""

import gzip
import hashlib
import json
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from .data import check_preference_rows, not_written
from .errors import ConfigError, DataError, some_rows
from .users import user_id_as_text


FORMAT, VERSION = "trl_sharelora split", 1
FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
# Answers of a user whom the model has not seen; those of the few-shot curves of personalisation benchmarks.
SHOTS = (0, 1, 2, 5, 10, 20, 50, 100)
# Rows that belong to no part, because a rule or the caller leaves them out. `apply` does not give them back.
LEFT_OUT = "left_out"
SUPPORT, UNSEEN_TEST = "unseen_support", "unseen_test"
# At 0.8, sentences with another capital, comma or typo are one; sentences with another word of ten are two.
NEAR = 0.8
SHINGLE = 5  # characters
# In bands of r rows, a pair of similarity t meets in one of the 144 / r bands with probability 1 - (1 - t^r)^(144 / r): for t
# = 0.8 and r = 6 that is 0.9993, and 0.31 for one of 0.5. r is the largest number for which a pair at the threshold is found
# with RECALL.
PERMUTATIONS, MOST_ROWS, RECALL = 144, 6, 0.99
# Buckets of more texts are compared by matrix products. What one text in twelve has there is cheaper in a dense one.
_FEW_TEXTS, _DENSE, _BLOCK = 32, 1 / 12, 2048
DIGEST_BYTES = 16
# hyphens, dashes and the minus sign are typed for each other
_DASHES = dict.fromkeys([*range(0x2010, 0x2016), 0x2212], "-")
# where the reply begins in a dialogue written as one text: "Assistant:", "<|assistant|>", "<|im_start|>assistant" and a line break
_REPLY = re.compile(r"(?is).*\bassistant(?:\|?>|<\||:|\n)")
TOO_FEW = ("raise", "leave_out", "keep")
_FEWEST_TAKES_ALL = "what each user must have elsewhere (fewest) leaves none"
ITEMS = ("auto", "prompt", "pair", "reply")


def _without_none(value: Any) -> Any:
    """`datasets` fills the keys that some messages lack with None; a digest must not depend on that."""
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, (list, tuple)) else value


def _canonical(*values: Any) -> str:
    return json.dumps([_without_none(value) for value in values], sort_keys=True, separators=(",", ":"))


def _hash(*parts: Any) -> str:
    return hashlib.blake2b(_canonical(*parts).encode(), digest_size=DIGEST_BYTES).hexdigest()


def row_digest(row: Mapping[str, Any], user_column: str = "user_id") -> str:
    """What a row is called in a split file: 32 hexadecimal digits of its user, prompt, chosen and rejected.

    Other columns do not enter, so a file may gain some. Keep in mind that a digest can be recomputed by whoever has the row.

    Args:
        row (`Mapping`):
            A preference row.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
    """
    return _hash(user_id_as_text(row[user_column]), row.get("prompt"), row["chosen"], row["rejected"])


def plain_text(value: Any) -> str:
    """A text or the contents of a list of messages as one string; "" for None."""
    if isinstance(value, str):
        return value
    parts = []
    for message in value or []:
        content = message.get("content") if isinstance(message, dict) else None
        blocks = [part.get("text") or "" for part in content] if isinstance(content, list) else [content or ""]
        parts.append(" ".join(blocks))
    return "\n".join(parts)


def prompt_of(row: Mapping[str, Any]) -> str:
    """A row's prompt as one string; of a conversational row without a column for it, the messages both answers begin with."""
    sides = [row.get("chosen"), row.get("rejected")]
    if row.get("prompt") is not None or not all(isinstance(side, list) for side in sides):
        return plain_text(row.get("prompt"))
    common = []
    for one, other in zip(*sides, strict=False):
        if one != other:
            break
        common.append(one)
    return plain_text(common)


def _common_beginning(chosen: str, rejected: str) -> str:
    """What two texts begin with, as TRL's `extract_prompt` has it, but to the end of a word, and of a dialogue to where the reply begins."""
    common = os.path.commonprefix([chosen, rejected])
    reply = _REPLY.match(common)
    if reply:
        return reply[0].rstrip()
    # the word in which they part belongs to the replies; the dot stands for it where they part after a space
    words = f"{common}.".rsplit(None, 1)
    return words[0] if len(words) > 1 else ""


def prompts_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """[`prompt_of`] of each row; of texts without a column for it, what both answers begin with, or "" if in most rows that is nothing."""
    prompts = [prompt_of(row) for row in rows]
    if any(prompts) or not all(isinstance(row["chosen"], str) for row in rows):
        return prompts
    common = [_common_beginning(row["chosen"], row["rejected"]) for row in rows]
    return common if sum(map(bool, common)) > len(rows) / 2 else prompts


def normalised(text: str) -> str:
    """A text without what does not make it another one: case, punctuation, spaces, Unicode form.

    Kept are letters with their marks (without its vowel signs a Hindi word is another one), digits, and the operators between them:
    "a+b" is not "a-b", "C" not "C++", "5" not "-5", "5 %" or "$5". A sign that is an operator or punctuation (`-`, `*`, `/`, `&`, `%`,
    `#`) is taken for an operator where it stands as one does: between numbers, single letters and brackets, or before or after a number.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    # folding may take a letter apart; a Turkish capital i leaves its dot behind
    text = unicodedata.normalize("NFKC", text.replace("i\u0307", "i"))
    text = text.replace("!=", "\u2260").translate(_DASHES)
    marks, operators = (kind & set(text) for kind in _marks_and_operators())
    # only what is there: a search for all of them is twenty times as slow
    pattern = _pattern(frozenset(marks), frozenset(operators))
    if not operators:
        return " ".join(pattern.findall(text))
    tokens = list(pattern.finditer(text))
    return " ".join(token[0] for place, token in enumerate(tokens) if _is_kept(tokens, place))


@cache
def _marks_and_operators() -> tuple[frozenset[str], frozenset[str]]:
    marks, operators = set(), set("-*/&%#^")
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        # not the selectors, which say how the character before is drawn
        if category[0] == "M" and not (0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF):
            marks.add(chr(code))
        elif category in ("Sm", "Sc") and chr(code) not in "|~":  # these two are layout far more often
            operators.add(chr(code))
    return frozenset(marks), frozenset(operators)


@lru_cache(1024)
def _pattern(marks: frozenset[str], operators: frozenset[str]) -> re.Pattern:
    """Words, and runs of one operator."""
    word = rf"[\w{''.join(sorted(marks))}]+"
    return re.compile(rf"{word}|([{re.escape(''.join(sorted(operators)))}])\1*" if operators else word)


def _is_kept(tokens: list[re.Match], place: int) -> bool:
    """Whether a token is a word, or an operator and no punctuation."""
    token = tokens[place]
    sign = token[1]
    if sign is None:
        return True
    text, run = token.string, token.end() - token.start()
    before, after = text[: token.start()][-1:], text[token.end() :][:1]
    if sign == ">" and not text[: token.start()].rpartition("\n")[2].strip("> "):
        return False  # a quotation
    if sign == "#":
        return before.isalnum() and not after.isalnum()  # c#, and no heading or hashtag
    if sign not in "-*/&%":
        return run < 3 or sign == "^"  # a line of === is a rule
    if run > 2:
        return False
    if (sign == "%" and before.isdigit()) or (sign == "-" and after.isdigit() and not before.isalnum()):
        return True
    neighbours = [tokens[other][0] if 0 <= other < len(tokens) else "" for other in (place - 1, place + 1)]
    return all(len(word) == 1 or any(map(str.isdigit, word)) for word in neighbours)


def pair_key(row: Mapping[str, Any]) -> str:
    """The same for a prompt with two replies, whichever of them was chosen."""
    return _hash(row.get("prompt"), *sorted((_canonical(row["chosen"]), _canonical(row["rejected"]))))


def _shingles(text: str) -> np.ndarray:
    """Hashes `(shingles,)` of the distinct runs of `SHINGLE` characters of a text, sorted."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if len(codes) < SHINGLE:
        codes = np.pad(codes, (0, SHINGLE - len(codes)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, SHINGLE)
    hashes = np.zeros(len(windows), dtype=np.uint64)
    for place in range(SHINGLE):  # wraps around, which is what a hash wants
        hashes = (hashes ^ windows[:, place]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def near_duplicates(texts: Sequence[str], threshold: float = NEAR) -> list[int]:
    """Group texts that are the same but for case, punctuation, spaces or small edits.

    Texts equal after [`normalised`] are one; others are joined where the Jaccard similarity of their character 5-shingles
    reaches `threshold`, and so is who is joined to the same text. Candidates come from MinHash (144 permutations; a pair at the
    threshold is missed in less than 1 % of all cases), the decision from the shingles themselves. Grouping does not depend on
    the order of the texts.

    Args:
        texts (`Sequence[str]`):
            Any texts, with repetitions.
        threshold (`float`, *optional*, defaults to 0.8):
            Of the similarity; above 0, at most 1.

    Returns:
        `list[int]`: A group number for each text, in order of first appearance.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold={threshold} came; a similarity above 0 and at most 1 is needed.")
    forms = [normalised(text) or text for text in texts]
    distinct = list(dict.fromkeys(forms))
    labels = np.arange(len(distinct))
    if threshold < 1 and len(distinct) > 1:
        labels = _joined([_shingles(text) for text in distinct], threshold)
    group_of = dict(zip(distinct, labels.tolist(), strict=True))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(group_of[form], len(numbers)) for form in forms]


def _joined(shingles: list[np.ndarray], threshold: float) -> np.ndarray:
    """A label for each set of shingles, the same for those that pairs of a similarity of `threshold` connect."""
    random = np.random.default_rng(0)  # the permutations, not the split
    slopes = random.integers(1, 2**63, PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
    shifts = random.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)
    signatures = np.empty((len(shingles), PERMUTATIONS), dtype=np.uint32)
    for number, hashes in enumerate(shingles):
        values = (hashes[:, None] * slopes + shifts) >> np.uint64(32)
        signatures[number] = values.min(axis=0)
    height = max(
        rows
        for rows in range(1, MOST_ROWS + 1)
        if rows == 1 or 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL
    )
    bands = []
    met = np.zeros(len(shingles), dtype=bool)
    for start in range(0, PERMUTATIONS - height + 1, height):
        part = np.ascontiguousarray(signatures[:, start : start + height]).view(f"V{4 * height}")
        bands.append(np.unique(part[:, 0], return_inverse=True)[1])
        met |= np.bincount(bands[-1])[bands[-1]] > 1
    labels = np.arange(len(shingles))
    members = np.flatnonzero(met)
    if len(members):
        own = [band[members] for band in bands]
        labels[members] = len(shingles) + _joined_in_bands(own, [shingles[member] for member in members], threshold)
    return labels


def _joined_in_bands(bands: list[np.ndarray], shingles: list[np.ndarray], threshold: float) -> np.ndarray:
    """[`_joined`], of the pairs that are in one bucket of some band."""
    n = len(shingles)
    columns = np.unique(np.concatenate(shingles), return_inverse=True)[1].astype(np.int32)
    ends = np.cumsum([0, *map(len, shingles)])
    texts = csr_matrix((np.ones(len(columns), dtype=np.float32), columns, ends))
    labels = np.arange(n)
    compared = np.empty(0, dtype=np.int64)
    for band in bands:
        order = np.argsort(band, kind="stable")
        keys = band[order]
        sizes = np.bincount(keys)[keys]
        large = np.flatnonzero((sizes > _FEW_TEXTS) & np.diff(keys, prepend=-1).astype(bool))
        for start in large:
            bucket = order[start : start + sizes[start]]
            if (labels[bucket] != labels[bucket[0]]).any():
                for first, second in _near_pairs(texts[bucket], threshold):
                    labels = _connected(labels, bucket[first], bucket[second])
        pairs = [np.empty(0, dtype=np.int64)]
        for apart in range(1, _FEW_TEXTS):
            same = np.flatnonzero((keys[apart:] == keys[:-apart]) & (sizes[apart:] <= _FEW_TEXTS))
            pairs.append(order[same] * n + order[same + apart])
        # what was compared in another band is not compared again
        found = np.setdiff1d(np.concatenate(pairs), compared)
        found = found[labels[found // n] != labels[found % n]]
        compared = np.union1d(compared, found)
        for place in range(0, len(found), _BLOCK):
            first, second = np.divmod(found[place : place + _BLOCK], n)
            one, other = texts[first], texts[second]
            common = np.asarray(one.multiply(other).sum(axis=1), dtype=float)[:, 0]
            near = common >= threshold * (np.diff(one.indptr) + np.diff(other.indptr) - common)
            labels = _connected(labels, first[near], second[near])
    return labels


def _near_pairs(texts: csr_matrix, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows whose similarity reaches `threshold`, all rows compared with all."""
    n = texts.shape[0]
    counts = np.bincount(texts.indices, minlength=texts.shape[1])
    # a template is in all texts and need not be multiplied, a number or name in one
    everywhere = (counts == n).sum()
    dense = texts[:, np.flatnonzero((counts < n) & (counts > _DENSE * n))]
    sparse = texts[:, np.flatnonzero((counts > 1) & (counts <= _DENSE * n))]
    sizes = np.diff(texts.indptr)
    step = int(np.clip(2**24 // max(dense.shape[1], 1), 64, _BLOCK))
    blocks = [slice(start, start + step) for start in range(0, n, step)]
    for place, rows in enumerate(blocks):
        left = dense[rows].toarray()
        for others in blocks[place:]:
            common = (left @ dense[others].toarray().T).astype(float)
            common += (sparse[rows] @ sparse[others].T).toarray() + everywhere
            near = common >= threshold * (sizes[rows, None] + sizes[others] - common)
            first, second = np.nonzero(np.triu(near, 1) if rows == others else near)
            yield first + rows.start, second + others.start


def _connected(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Labels after the pairs `(first, second)` have been joined."""
    ends = labels[first], labels[second]
    if (ends[0] == ends[1]).all():
        return labels
    graph = csr_matrix((np.ones(len(first), dtype=bool), ends), shape=(len(labels),) * 2)
    return connected_components(graph, directed=False)[1][labels]


@dataclass
class Split:
    """Which row belongs where, and how that was decided.

    Args:
        kind (`str`):
            `"comparison"`, `"item"` or `"user"`.
        seed (`int`):
            Of the keyed hashes.
        arguments (`dict`):
            What it was made with, for the record.
        user_column (`str`):
            The column that names the user.
        rows (`dict[str, str]`):
            `row_digest(row) -> split`. Rows of the split `"left_out"` belong to none.
        copies (`dict[str, int]`):
            How often a row occurs, where it does more than once.
        places (`dict[str, int]`):
            By user only: the place of a support row among those of its user. The support set of n answers is the places
            below n, so that each contains the smaller ones.
        notes (`list[str]`):
            What was decided and what could not be had: users with fewer rows than asked, parts of another size.
    """

    kind: str
    seed: int
    arguments: dict[str, Any]
    user_column: str
    rows: dict[str, str]
    copies: dict[str, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Rows of each split."""
        counts: Counter[str] = Counter()
        for digest, name in self.rows.items():
            counts[name] += self.copies.get(digest, 1)
        return dict(counts)

    def names_of(self, dataset: Dataset) -> list[str]:
        """The split of each row of `dataset`, in its order.

        Raises:
            DataError: The rows are not those the split was made of; the message names what is missing and what is new.
        """
        digests = _digests(dataset, self.user_column)
        counts = Counter(digests)
        extra = [number for number, digest in enumerate(digests) if digest not in self.rows]
        missing = [digest for digest in self.rows if digest not in counts]
        changed = [
            digest for digest in self.rows if counts.get(digest) and counts[digest] != self.copies.get(digest, 1)
        ]
        problems = []
        if extra:
            problems.append(f"{some_rows(extra)} of the data are not in the split")
        if missing:
            shown = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
            problems.append(f"{len(missing)} rows of the split are not in the data (digests {shown})")
        if changed:
            numbers = [number for number, digest in enumerate(digests) if digest in set(changed)]
            problems.append(f"{some_rows(numbers)} occur more or less often than they did")
        if problems:
            raise DataError(
                f"The split (by {self.kind}, {sum(self.counts().values())} rows) was made of other data than the {len(digests)} rows that came: "
                f"{'; '.join(problems)}. Digests cover {self.user_column!r}, prompt, chosen and rejected to the letter: was the file edited, "
                "imported anew or cut, or is it another one? Use the file it was made of, or split anew."
            )
        return [self.rows[digest] for digest in digests]

    def apply(self, dataset: Dataset) -> dict[str, Dataset]:
        """The rows of each split, in the order of `dataset`; rows that were left out are not among them.

        Args:
            dataset ([`~datasets.Dataset`]):
                The rows the split was made of, in any order.

        Raises:
            DataError: see [`Split.names_of`].
        """
        rows: dict[str, list[int]] = {name: [] for name in _in_order(self.rows.values()) if name != LEFT_OUT}
        for number, name in enumerate(self.names_of(dataset)):
            if name != LEFT_OUT:
                rows[name].append(number)
        return {name: dataset.select(numbers) for name, numbers in rows.items()}

    def support(self, dataset: Dataset, n: int) -> Dataset:
        """The first `n` answers of every unseen user (fewer of who has fewer, see `notes`).

        Args:
            dataset ([`~datasets.Dataset`]):
                The rows the split was made of.
            n (`int`):
                One of the numbers of answers asked for, or any up to the largest of them.

        Raises:
            ConfigError: The split is not by user, or `n` is above what it was made for.
            DataError: see [`Split.names_of`].
        """
        most = max(self.arguments.get("shots", [-1]))
        if not 0 <= n <= most:
            raise ConfigError(
                f"n={n} support answers were asked for; this split (by {self.kind}) has 0 to {max(most, 0)} of each unseen user. Make one "
                "with split_by_user(..., shots=...)."
            )
        self.names_of(dataset)
        places = self.places_of(dataset)
        return dataset.select([row for row, place in enumerate(places) if place is not None and place < n])

    def places_of(self, dataset: Dataset) -> list[int | None]:
        """The place of each row among its user's support rows; None for other rows."""
        return [self.places.get(digest) for digest in _digests(dataset, self.user_column)]

    def save(self, path: str | os.PathLike) -> None:
        """Write the split down. The same split always gives the same bytes; users' ids and texts are not in it.

        Args:
            path (`str` or `os.PathLike`):
                Ends in `.json` or `.json.gz`.

        Raises:
            DataError: Another ending, or the file cannot be written.
        """
        path = _split_path(path)
        content: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        content |= {name: dict(sorted(content[name].items())) for name in ("rows", "copies", "places")}
        head = {"format": FORMAT, "version": VERSION, "checksum": _hash(content)}
        data = (json.dumps(head | content, indent=0, sort_keys=True) + "\n").encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        except OSError as error:
            raise not_written(path, error) from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Split":
        """Read a split that [`Split.save`] has written.

        Raises:
            DataError: It is no such file, of another version, or damaged.
        """
        path = _split_path(path)
        try:
            data = path.read_bytes()
            content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(
                f"The split file {str(path)!r} cannot be read: {type(error).__name__}: {error}. Make it with trl-sharelora data split, or copy "
                "it again."
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(
                f"{str(path)!r} is JSON but no split file (its format is not {FORMAT!r}). Was the data file given instead?"
            )
        if content.get("version") != VERSION:
            raise DataError(
                f"{str(path)!r} is a split file of version {content.get('version')!r}; this package reads version {VERSION}. Update the package "
                "or split anew."
            )
        found: dict[str, Any] = {name: content.get(name) for name in _FIELDS}
        if _hash(found) != content.get("checksum"):
            raise DataError(
                f"{str(path)!r} is damaged or was edited: its checksum does not fit. Take it from where it was made."
            )
        return cls(**found)

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in self.counts().items())
        return "\n".join([f"split by {self.kind}, seed {self.seed}: {counts}", *(f"- {note}" for note in self.notes)])


_FIELDS = ("kind", "seed", "arguments", "user_column", "rows", "copies", "places", "notes")


def _split_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.name.endswith((".json", ".json.gz")):
        raise DataError(f"A split file ends in .json or .json.gz; {str(path)!r} does not.")
    return path


def _in_order(names: Iterable[str]) -> list[str]:
    """Names of splits in the order people expect."""
    usual = ("train", "validation", "test", SUPPORT, UNSEEN_TEST)
    found = set(names)
    return [name for name in usual if name in found] + sorted(found - set(usual))


def _digests(dataset: Dataset, user_column: str) -> list[str]:
    columns = dataset.column_names
    missing = [name for name in (user_column, "chosen", "rejected") if name not in columns]
    if missing:
        remedies = []
        if user_column in missing:
            remedies.append(
                f"The split says that {user_column!r} names the user: say which column does here (--user_column; in Python "
                "dataclasses.replace(split, user_column=...)), or rename it."
            )
        if missing != [user_column]:
            remedies.append("A split is of texts: apply it before tokenisation.")
        raise DataError(
            f"The split cannot be applied: there is no column {', '.join(map(repr, missing))}; the columns are "
            f"{', '.join(map(repr, columns)) or 'none'}. {' '.join(remedies)}"
        )
    return [row_digest(row, user_column) for row in _texts_of(dataset, user_column)]


def _texts_of(dataset: Dataset, user_column: str) -> list[dict[str, Any]]:
    columns = [name for name in (user_column, "prompt", "chosen", "rejected") if name in dataset.column_names]
    return list(dataset.with_format(None).select_columns(columns))


class _Rows:
    """The rows of a dataset with what splitting needs: digests, users, pairs, and an order that only the seed knows."""

    def __init__(self, dataset: Dataset, user_column: str, seed: int):
        check_preference_rows(dataset, user_column, name="split")
        if "chosen" not in dataset.column_names:
            raise DataError(
                f"The dataset is tokenised ({dataset.column_names}); a split is made of texts, before tokenisation."
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"seed={seed!r} of type {type(seed).__name__} came; a whole number is needed.")
        self.rows = _texts_of(dataset, user_column)
        self.users = [user_id_as_text(row[user_column]) for row in self.rows]
        self.digests = [row_digest(row, user_column) for row in self.rows]
        self.pairs = [pair_key(row) for row in self.rows]
        self.seed = seed
        self.copies = {digest: count for digest, count in Counter(self.digests).items() if count > 1}

    def place(self, *key: Any) -> str:
        """A place in an order drawn by the seed; depends on nothing but the key."""
        return _hash(self.seed, *key)

    def answers(self) -> dict[str, list[list[int]]]:
        """`user -> answers`, in drawn order: all rows of a user on the same two replies are one answer."""
        answers: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, (user, pair) in enumerate(zip(self.users, self.pairs, strict=True)):
            answers[user][pair].append(number)
        return {
            user: [own[pair] for pair in sorted(own, key=lambda pair: self.place(user, pair))]
            for user, own in answers.items()
        }

    def split(
        self, kind: str, names: list[str], arguments: dict, user_column: str, notes: list[str], places: dict[int, int]
    ) -> Split:
        rows = dict(zip(self.digests, names, strict=True))
        kept = {self.digests[number]: place for number, place in places.items()}
        return Split(kind, self.seed, arguments, user_column, rows, self.copies, kept, notes)


def _check_fractions(fractions: Mapping[str, float], fewest: Mapping[str, int]) -> dict[str, float]:
    bad = [name for name, value in fractions.items() if not name or name == LEFT_OUT or not 0 < value <= 1]
    if bad or "train" not in fractions or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ConfigError(
            f"fractions={dict(fractions)} came; names of splits (train among them) with shares above 0 that add up to 1 are needed, such as "
            f"{FRACTIONS}."
        )
    if set(fewest) - set(fractions) or any(
        isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in fewest.values()
    ):
        raise ConfigError(
            f"fewest={dict(fewest)} came; numbers of rows of 0 and more for some of the splits {list(fractions)} are needed."
        )
    return dict(fractions)


def _check_too_few(too_few: str) -> None:
    if too_few not in TOO_FEW:
        raise ConfigError(f"too_few={too_few!r} came; one of {', '.join(map(repr, TOO_FEW))} is needed.")


def _share_out(
    answers: Mapping[str, list[list[int]]],
    fractions: Mapping[str, float],
    fewest: Mapping[str, int],
    rows: _Rows,
    names: list[str],
) -> None:
    """Give each user's answers to the splits, by writing into `names`.

    First what is asked of each split, in their order, then whole parts of the user's shares, then what is left by what the splits
    lack over all users so far: a user with 5 answers cannot give half a one to two splits of 10 %, a hundred of them can give 50 to each.
    """
    lacking = dict.fromkeys(fractions, 0.0)
    # by their ids and the seed, not by the file
    for user in sorted(answers, key=lambda user: rows.place("user", user)):
        own = answers[user]
        shares = {name: share * len(own) for name, share in fractions.items()}
        numbers = dict.fromkeys(fractions, 0)
        for name in fractions:
            numbers[name] = min(fewest.get(name, 0), len(own) - sum(numbers.values()))
            lacking[name] += shares[name] - numbers[name]
        for _ in range(len(own) - sum(numbers.values())):
            # rounded: 10 % of 30 are 3.0000000000000004
            gaps = {name: round(shares[name] - numbers[name], 9) for name in fractions}
            behind = [name for name in fractions if gaps[name] >= 1]
            if behind:
                name = max(behind, key=gaps.__getitem__)
            else:
                part = [name for name in fractions if gaps[name] > 0] or list(fractions)
                name = max(part, key=lambda name: round(lacking[name], 9))  # among equals the first
            numbers[name] += 1
            lacking[name] -= 1
        start = 0
        for name, number in numbers.items():
            for answer in own[start : start + number]:
                for row in answer:
                    names[row] = name
            start += number


def _users_named(users: Sequence[str]) -> str:
    return ", ".join(map(repr, users[:5])) + ", ..." * (len(users) > 5)


def _treat_the_few(
    names: list[str], users: Sequence[str], fewest: Mapping[str, int], too_few: str, notes: list[str], remedy: str
) -> None:
    """Raise, leave out or keep the users with fewer rows in a split than asked, and say so."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for user, name in zip(users, names, strict=True):
        counts[user][name] += 1
    short = {
        user: [f"{own[name]} of {n} in {name}" for name, n in fewest.items() if own[name] < n]
        for user, own in sorted(counts.items())
    }
    short = {user: found for user, found in short.items() if found}
    if not short:
        return
    first = next(iter(short))
    number = (
        f"{len(short)} of {len(counts)} users have fewer rows than asked"  # a split is handed on: no ids in its notes
    )
    what = f"{number} ({_users_named(list(short))}; {first!r} has {', '.join(short[first])})"
    if too_few == "raise":
        raise DataError(
            f"The split is not possible as asked: {what}. Ask for fewer (fewest={dict(fewest)} came), {remedy}leave these users out "
            "(too_few='leave_out') or take what there is (too_few='keep')."
        )
    if too_few == "leave_out":
        if len(short) == len(counts):
            raise DataError(f"Nobody would be left: {what}. Ask for fewer rows of a user.")
        names[:] = [LEFT_OUT if user in short else name for user, name in zip(users, names, strict=True)]
        notes.append(f"left out: {number}")
    else:
        notes.append(f"kept as they are: {number}")


def split_by_comparison(
    dataset: Dataset,
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int = 0,
    user_column: str = "user_id",
    fewest: Mapping[str, int] | None = None,
    too_few: str = "raise",
) -> Split:
    """Each user's answers shared out: the users and the items of the test are known from training.

    All rows of a user on the same two replies (repeated or contradictory) are one answer and stay together. A user's
    answers are shared out by `fractions` to within one answer, and rounded so that the shares of all users together are exact too.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference rows.
        fractions (`Mapping[str, float]`, *optional*, defaults to 0.8 train, 0.1 validation, 0.1 test):
            Splits and their shares.
        seed (`int`, *optional*, defaults to 0):
            Another seed, another split.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        fewest (`Mapping[str, int]`, *optional*, defaults to `{"train": 1}`):
            Rows that each user must have in a split, served before the shares.
        too_few (`str`, *optional*, defaults to `"raise"`):
            What to do with a user who has fewer: `"raise"`, `"leave_out"`, or `"keep"` what there is (train first). The last
            two are written into the notes.

    Raises:
        DataError: The rows are unusable, or a user has fewer rows than asked.
        ConfigError: An argument is out of range.
    """
    fewest = {"train": 1} if fewest is None else dict(fewest)
    fractions = _check_fractions(fractions, fewest)
    _check_too_few(too_few)
    rows = _Rows(dataset, user_column, seed)
    names = [""] * len(rows.rows)
    _share_out(rows.answers(), fractions, fewest, rows, names)
    notes: list[str] = []
    _treat_the_few(names, rows.users, fewest, too_few, notes, "")
    _note_empty(names, fractions, notes, _FEWEST_TAKES_ALL)
    arguments = {"fractions": fractions, "fewest": fewest, "too_few": too_few}
    return rows.split("comparison", names, arguments, user_column, notes, {})


def split_by_item(
    dataset: Dataset,
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int = 0,
    user_column: str = "user_id",
    item: str = "auto",
    near: float = NEAR,
    fewest: Mapping[str, int] | None = None,
    too_few: str = "raise",
) -> Split:
    """New items for known users: no item, and none of its near-duplicates, is on two sides.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference rows.
        fractions (`Mapping[str, float]`, *optional*, defaults to 0.8 train, 0.1 validation, 0.1 test):
            Splits and their shares of the rows. Items are not cut, so shares are met as well as their sizes allow; the notes
            say where one is off by more than 5 points.
        seed (`int`, *optional*, defaults to 0):
            Another seed, another split.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        item (`str`, *optional*, defaults to `"auto"`):
            `"prompt"`: the prompt (without a column for it, what both answers begin with); `"pair"`: the prompt with its two replies, in
            either order; `"reply"`: each reply by itself (no reply on two sides; rows whose replies fall on different sides are left out
            and counted: about half); `"auto"`: `"prompt"`, or `"pair"` where there are no prompts or one of them (with its
            near-duplicates) has more than half of the rows.
        near (`float`, *optional*, defaults to 0.8):
            Similarity from which texts are near-duplicates, see [`near_duplicates`]; 1 for none but the equal (but for case,
            punctuation and spaces).
        fewest (`Mapping[str, int]`, *optional*, defaults to `{"train": 1}`):
            Rows that each user must have in a split.
        too_few (`str`, *optional*, defaults to `"raise"`):
            What to do with a user who has fewer: `"raise"`, `"leave_out"` or `"keep"`; the last two are written into the notes.

    Raises:
        DataError: The rows are unusable, there are fewer items than splits, or a user has fewer rows than asked.
        ConfigError: An argument is out of range.
    """
    fewest = {"train": 1} if fewest is None else dict(fewest)
    fractions = _check_fractions(fractions, fewest)
    _check_too_few(too_few)
    if item not in ITEMS:
        raise ConfigError(f"item={item!r} came; one of {', '.join(map(repr, ITEMS))} is needed.")
    rows = _Rows(dataset, user_column, seed)
    notes: list[str] = []
    if item in ("auto", "prompt"):
        prompts = prompts_of(rows.rows)
        groups = near_duplicates(prompts, near)
        largest = max(Counter(groups).values()) / len(groups)
        if item == "auto":
            item = "prompt" if largest <= 0.5 else "pair"
            notes.append(
                f"an item is a {item}" + (f": one prompt has {largest:.0%} of the rows" if item == "pair" else "")
            )
        if "prompt" not in rows.rows[0]:
            notes.append(
                "no column 'prompt': what both answers begin with is taken for it"
                if any(prompts)
                else "no column 'prompt', and most answers do not begin alike: if they hold prompts, these cannot be told and may be on both sides"
            )
    sides = [[plain_text(row[side]) for row in rows.rows] for side in ("chosen", "rejected")]
    if item == "reply":
        groups = near_duplicates(sides[0] + sides[1], near)
        # a row stays where both of its replies are, so a part's share of the rows goes with the square of its share of the replies
        roots = {name: share**0.5 for name, share in fractions.items()}
        of_replies = {name: root / sum(roots.values()) for name, root in roots.items()}
        names_of_texts = _deal_out(groups, sides[0] + sides[1], of_replies, rows)
        half = len(rows.rows)
        both = zip(names_of_texts[:half], names_of_texts[half:], strict=True)
        names = [first if first == second else LEFT_OUT for first, second in both]
        crossing = names.count(LEFT_OUT)
        if crossing:
            notes.append(f"left out: {crossing} rows whose two replies are on different sides")
    else:
        if item == "pair":
            replies = near_duplicates(sides[0] + sides[1], near)
            # a prompt that both texts begin with is compared with them
            around = near_duplicates([prompt_of(row) for row in rows.rows], near)
            half = len(rows.rows)
            keys = [
                (prompt, *sorted(pair)) for prompt, *pair in zip(around, replies[:half], replies[half:], strict=True)
            ]
            numbers: dict[Any, int] = {}
            groups = [numbers.setdefault(key, len(numbers)) for key in keys]
        names = _deal_out(groups, prompts if item == "prompt" else rows.pairs, fractions, rows)
    _note_empty(names, fractions, notes, "no row has both of its replies there")
    taken = [name for name in names if name != LEFT_OUT]
    for name, share in fractions.items():
        found = taken.count(name) / max(len(taken), 1)
        if abs(found - share) > 0.05 and found:
            notes.append(f"{name} has {found:.0%} of the rows instead of {share:.0%}: items are not cut")
    users = list(rows.users)
    _treat_the_few(names, users, fewest, too_few, notes, "take another seed, ")
    arguments = {"fractions": fractions, "item": item, "near": near, "fewest": fewest, "too_few": too_few}
    return rows.split("item", names, arguments, user_column, notes, {})


def _deal_out(groups: list[int], texts: list[str], fractions: Mapping[str, float], rows: _Rows) -> list[str]:
    """A split for each row: groups in drawn order, each to the split that lacks most of its share."""
    sizes = Counter(groups)
    if len(sizes) < len(fractions):
        raise DataError(
            f"There are {len(sizes)} items (near-duplicates count as one) for {len(fractions)} splits; each needs one at least. Split by "
            "another kind of item, or by comparison."
        )
    # a group is called by the least of its texts, whichever comes first in the file
    called: dict[int, str] = {}
    for group, text in zip(groups, texts, strict=True):
        called[group] = min(called.get(group, text), text)
    lacking = {name: share * len(groups) for name, share in fractions.items()}
    names: dict[int, str] = {}
    empty = list(fractions)
    order = sorted(sizes, key=lambda group: rows.place("item", called[group]))
    for number, group in enumerate(order):
        # when no more groups than empty splits are left, each of them gets one
        name = max(empty if len(order) - number <= len(empty) else fractions, key=lambda name: lacking[name])
        names[group] = name
        lacking[name] -= sizes[group]
        if name in empty:
            empty.remove(name)
    return [names[group] for group in groups]


def _note_empty(names: list[str], fractions: Mapping[str, float], notes: list[str], otherwise: str) -> None:
    """Say which splits got no row and why: their shares are less than a row, or `otherwise`."""
    taken = len(names) - names.count(LEFT_OUT)
    for reason, small in (("too few rows for so small a share", True), (otherwise, False)):
        empty = [name for name, share in fractions.items() if name not in names and (share * taken < 1) == small]
        if empty:
            notes.append(f"no row in {', '.join(empty)}: {reason}")


def _remedy(lengths: Sequence[int], wanted: int, eligible: int, shots: int, n_test: int, too_few: str) -> str:
    """What would give `wanted` unseen users, of users with `lengths` answers of whom `eligible` have enough."""
    there = sorted(lengths)[-wanted]  # so many users have so many
    keep = too_few == "keep"
    remedies = []
    if not keep and there > n_test:
        remedies.append(f"a curve (shots) of at most {there - n_test}")
    if not keep and there > shots:
        remedies.append(f"n_test={there - shots} or less")
    if not keep and there > n_test:
        remedies.append("users with fewer answers (too_few='keep')")
    elif there > 1:
        remedies.append(f"n_test={there - 1} or less" + " with too_few='keep'" * (not keep))
    if eligible:
        remedies.append(f"{eligible} unseen users or fewer")
    return f"Ask for {', or for '.join(remedies)}." if remedies else "Split by comparison or by item."


def split_by_user(
    dataset: Dataset,
    unseen: float | int = 0.2,
    shots: Sequence[int] = SHOTS,
    n_test: int = 20,
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int = 0,
    user_column: str = "user_id",
    fewest: Mapping[str, int] | None = None,
    too_few: str = "raise",
) -> Split:
    """Users whom training never sees, with a few answers of each to get to know them by: the few-shot curve.

    Unseen users get `unseen_support` (at most `max(shots)` answers, in a drawn order: the set of 5 contains the set of 2)
    and `unseen_test` (the rest, the same for every number of answers). The rows of all others are split by comparison.
    Unseen users are drawn among those with at least `max(shots) + n_test` answers; the notes say how many these are.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference rows.
        unseen (`float` or `int`, *optional*, defaults to 0.2):
            Share (below 1) or number of the users to keep back.
        shots (`Sequence[int]`, *optional*, defaults to 0, 1, 2, 5, 10, 20, 50, 100):
            Numbers of answers of the curve.
        n_test (`int`, *optional*, defaults to 20):
            Test answers that each unseen user must have. With 20, one user's accuracy has a standard error of 10 points, the
            mean of 100 users one of 1.
        fractions, seed, user_column, fewest:
            Of the users who are seen, as in [`split_by_comparison`].
        too_few (`str`, *optional*, defaults to `"raise"`):
            When too few users have that many answers: `"raise"`, or `"keep"`: draw among all with at least `n_test + 1`, test
            first and support with what is left; the notes say for how many answers how many users have fewer.
            `"leave_out"` takes as many unseen users as have enough. For the others it means what it means in
            [`split_by_comparison`].

    Raises:
        DataError: The rows are unusable, or too few users have enough answers.
        ConfigError: An argument is out of range.
    """
    fewest = {"train": 1} if fewest is None else dict(fewest)
    fractions = _check_fractions(fractions, fewest)
    _check_too_few(too_few)
    shots = sorted(set(shots))
    if not shots or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shots) or n_test < 1:
        raise ConfigError(
            f"shots={shots}, n_test={n_test} came; numbers of answers of 0 and more and at least 1 test answer are needed."
        )
    rows = _Rows(dataset, user_column, seed)
    answers = rows.answers()
    wanted = round(unseen * len(answers)) if isinstance(unseen, float) else unseen
    if isinstance(unseen, bool) or not 1 <= wanted < len(answers):
        raise ConfigError(
            f"unseen={unseen!r} of {len(answers)} users came; at least 1 must be kept back and 1 be left to train on."
        )
    notes: list[str] = []
    most = shots[-1]
    need = most + n_test
    eligible = [user for user in answers if len(answers[user]) >= need]
    if len(eligible) < wanted:
        what = "{} of {} users have the {} answers ({} to learn from, {} to test) that each of {} unseen users needs"
        found = what.format(len(eligible), len(answers), need, most, n_test, wanted)
        if too_few == "keep":
            notes.append(found)
            need = n_test + 1
            eligible = [user for user in answers if len(answers[user]) >= need]
            found = what.format(len(eligible), len(answers), need, 1, n_test, wanted)
        if too_few == "leave_out" and eligible:
            wanted = len(eligible)
            notes.append(f"{found}; only these are kept back")
        if len(eligible) < wanted:
            lengths = [len(own) for own in answers.values()]
            raise DataError(
                f"The split is not possible as asked: {found}. {_remedy(lengths, wanted, len(eligible), most, n_test, too_few)}"
            )
    drawn = set(sorted(eligible, key=lambda user: rows.place("user", user))[:wanted])
    notes.append(f"{wanted} unseen users, drawn among the {len(eligible)} with at least {need} answers")
    names = [""] * len(rows.rows)
    places: dict[int, int] = {}
    lengths = []
    for user, own in answers.items():
        if user in drawn:
            n_support = min(most, len(own) - n_test)
            lengths.append(n_support)
            for number, answer in enumerate(own):
                for row in answer:
                    names[row] = SUPPORT if number < n_support else UNSEEN_TEST
                    if number < n_support:
                        places[row] = number
    _share_out({user: own for user, own in answers.items() if user not in drawn}, fractions, fewest, rows, names)
    for n in shots:
        fewer = sum(length < n for length in lengths)
        if fewer:
            notes.append(f"at {n} answers, {fewer} of {wanted} unseen users have fewer (the least {min(lengths)})")
    seen = [row for row, user in enumerate(rows.users) if user not in drawn]
    own_names = [names[row] for row in seen]
    _treat_the_few(own_names, [rows.users[row] for row in seen], fewest, too_few, notes, "")
    _note_empty(own_names, fractions, notes, _FEWEST_TAKES_ALL)
    for row, name in zip(seen, own_names, strict=True):
        names[row] = name
    trained = {pair for pair, name in zip(rows.pairs, names, strict=True) if name == "train"}
    tests = [pair for pair, name in zip(rows.pairs, names, strict=True) if name == UNSEEN_TEST]
    known = sum(pair in trained for pair in tests)
    notes.append(f"{known / len(tests):.0%} of the unseen users' test pairs were judged by others in training")
    arguments = {
        "unseen": unseen,
        "shots": shots,
        "n_test": n_test,
        "fractions": fractions,
        "fewest": fewest,
        "too_few": too_few,
    }
    return rows.split("user", names, arguments, user_column, notes, places)
