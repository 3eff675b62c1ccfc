"""The data doctor: what is wrong with a preference log, what leaks, and how much there is to gain from knowing the user.

Nothing here needs a model or a GPU; 30,000 comparisons take some ten seconds. The report has three kinds of findings:
`unusable` (training would refuse the rows), `warning` (training runs, and the result may mislead) and `note`.

**Leaks.** A probe is a ridge logistic regression on differences of format features of the two replies, cross-validated by
item. Artefacts (end tokens, lists written as text, white space, final punctuation, ...) should not tell which reply was
chosen; length and layout may, because people mind them. The doctor tests itself: with labels drawn by coins the probe must
be at chance.

**How much can personalisation gain?** Accuracy of a rule for each user minus that of the best rule for all, two ways:

1. From pairs that several users judged, without a model. On a pair whose share of votes is p, the best common rule is right
   with probability max(p, 1 - p). Its mean over pairs lies between what the majority of the *others* says of each vote
   (achievable, so too low) and the majority including the vote itself (too high). A personal rule is bounded by 1, or, where
   users judged a pair twice, by their own consistency: if a user repeats his answer with probability c = q² + (1 - q)² then
   max(q, 1 - q) = (1 + sqrt(2c - 1)) / 2, and by Jensen's inequality the mean over users and pairs is at most this function of
   the mean of c. The difference of the two bounds is the hard limit.
2. From a model, on held-out comparisons: a logistic regression for all users, and one in which each user's weights are
   w_u ~ N(mu, s Sigma) (a hierarchical Bayesian logit, fitted by EM with Laplace's approximation; see Train, 2009, "Discrete
   choice methods with simulation", ch. 12, for the model). Features are hashed words and pairs of words reduced by SVD, a few of
   layout, and, for replies that many users judged, coordinates from the votes of the other half of the users. The
   strength s (0 is the common model) is chosen by the likelihood of the other folds, so the gain that is `reached` is
   honest. What is still missing for want of answers is the expected loss by the uncertainty of w_u: for a held-out pair with
   margin m ~ N(a, v) under the posterior, E sigmoid(|m|) - E sigmoid(sign(a) m). The estimate `at most` is reached plus
   missing: what a user's tastes would bring if they were known exactly, as far as these features can see them.

Where a user judged the same reply several times, folds are made of (user, reply), and such comparisons weigh less
((1/c_a + 1/c_b) / 2, c how often): pairs made of votes on single replies repeat each vote, and would be predicted from
themselves.
"""

import json
import math
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Dataset
from scipy import sparse, special, stats
from scipy.sparse.linalg import svds

from .data import check_preference_rows, check_row, load_preferences
from .errors import ConfigError, DataError, ShareLoraError, UserIdError, some_rows
from .splits import _hash, near_duplicates, pair_key, plain_text, prompts_of
from .users import user_id_as_text


UNUSABLE, WARNING, NOTE = "unusable", "warning", "note"
# Of the intervals that decide on a finding: with some ten of them in a report, 95 % would cry wolf in every third.
STRICT = 0.99
# Standard errors within which the probe on shuffled labels must be of chance.
SELF_TEST_LIMIT, SHUFFLES = 4.0, 10
# Rows of the probes and of the model, drawn by the seed; the figures have standard errors of half a point then.
MOST_PROBED, MOST_USERS, MOST_OF_USER = 20_000, 400, 200
# A single artefact that goes one way so often is a leak, whatever the probe's accuracy.
ONE_WAY, DISCORDANT = 0.95, 20
FEW, ENOUGH = 10, 50
# To cross-validate by; and what no taste explains: people choose the longer reply in 69 % (UKPConvArg), whoever cuts one side off in all.
FEWEST_ITEMS, BEYOND_TASTE = 10, 0.9
MOST_NAMES = 16  # of roles and keys in which the two replies of a pair differ; in an orderly log there is none
RESAMPLES = 500
# Of the hierarchical logit. 32 text directions hold what the demo's templates differ in; the strengths are 0 (common) to 1.
TEXT_DIMENSIONS, VOTE_DIMENSIONS, FOLDS, STRENGTHS = 32, 8, 4, (0.0, 0.1, 0.3, 1.0)
EM_STEPS, HASHED = 20, 1 << 13


def _layout(pattern: str, flags: int = 0) -> Callable[[str], float]:
    compiled = re.compile(pattern, flags)
    return lambda text: float(compiled.search(text) is not None)


END_TOKEN = r"(</s>|<eos>|<\|\w+\|>|\[SEP\]|\[EOS\]|<end_of_turn>)"
# What a person does not see, or not mind much, and a pipeline leaves behind.
ARTEFACTS: dict[str, Callable[[str], float]] = {
    "is a list or a record written as text": _layout(r"^\s*(\[.*\]|\{.*\})\s*$", re.DOTALL),
    "is in quotes": _layout(r"^\s*(\".*\"|'.*')\s*$", re.DOTALL),
    "starts with white space": _layout(r"^\s"),
    "ends with white space": _layout(r"\s$"),
    "ends with an end token": _layout(END_TOKEN + r"\s*$"),
    "has a special token": _layout(r"<\|\w+\|>|</?s>|\[/?INST\]|<(pad|unk|bos|eos)>"),
    "has escaped line breaks": _layout(r"\\[ntr]|\\u[0-9a-f]{4}"),
    "has carriage returns": _layout(r"\r"),
    "has double spaces or tabs": _layout(r"[^\S\n\r]{2}|\t"),
    "has a space before punctuation": _layout(r"\w [.,!?;](\s|$)"),
    "has HTML": _layout(r"&(amp|lt|gt|quot|nbsp|#\d+);|</?(br|p|div|span)\b"),
    "has typographic quotes or dashes": _layout(r"[‘’“”–—]"),
    "has broken or invisible characters": _layout("[\ufffd\u200b\u200c\u2060\ufeff\x00-\x08]"),
    "is cut off with dots": _layout(r"(\.\.\.|…)\s*$"),
    "ends with punctuation": _layout(r"[.!?:;…)\]\"'”’]\s*$"),
    "starts with a capital": lambda text: float(text.lstrip()[:1].isupper()),
    "is not in Unicode form NFC": lambda text: float(not unicodedata.is_normalized("NFC", text)),
}
# What people see and may well prefer.
LAYOUT: dict[str, Callable[[str], float]] = {
    "lines": lambda text: math.log1p(text.count("\n")),
    "bullets": _layout(r"^\s*([-*•]|\d+[.)])\s", re.MULTILINE),
    "headings or bold": _layout(r"^#+ |\*\*", re.MULTILINE),
    "code": _layout(r"```|`\w+`"),
    "exclamation marks": lambda text: math.log1p(text.count("!")),
    "question marks": lambda text: math.log1p(text.count("?")),
}
LENGTH: dict[str, Callable[[str], float]] = {"length": lambda text: math.log1p(len(text))}
IN_PROMPT = "comes first in the prompt"
MESSAGES = "number of messages"


@dataclass
class Finding:
    """One thing the doctor found.

    Args:
        level (`str`):
            `"unusable"`, `"warning"` or `"note"`.
        kind (`str`):
            A short name to tell findings apart: `"schema"`, `"ids"`, `"duplicates"`, `"contradictions"`, `"overlap"`, `"leak"`, ...
        message (`str`):
            What was found, what it does, what to do.
        rows (`list[int]`):
            The first rows concerned, at most 20.
        count (`int`):
            How many there are.
    """

    level: str
    kind: str
    message: str
    rows: list[int] = field(default_factory=list)
    count: int = 0


@dataclass
class Gain:
    """How much personalisation can gain on this log, in accuracy (0.01 is one point), macro over users.

    Args:
        verdict (`str`):
            `"something"` (the interval of `reached` is above 0), `"nothing seen"` or `"cannot be told"`.
        why (`str`):
            In words.
        reached (`float`, *optional*), reached_low, reached_high:
            Held-out gain of a simple personal model over the common one, and its 95 % interval over users.
        at_most (`float`, *optional*), at_most_low, at_most_high:
            The same with every user's tastes known exactly, as far as the features see them; never above `limit`.
        limit (`float`, *optional*):
            Hard limit from pairs that several users judged; None where there are none.
        common (`float`, *optional*), personal (`float`, *optional*):
            Held-out accuracy of the two models.
        users (`int`), tested (`int`):
            Users and held-out comparisons in these figures.
    """

    verdict: str
    why: str
    reached: float | None = None
    reached_low: float | None = None
    reached_high: float | None = None
    at_most: float | None = None
    at_most_low: float | None = None
    at_most_high: float | None = None
    limit: float | None = None
    common: float | None = None
    personal: float | None = None
    users: int = 0
    tested: int = 0


@dataclass
class DataReport:
    """What [`check_data`] found; printing it gives a readable page.

    Args:
        source (`str`):
            What was examined.
        n_rows (`int`), n_users (`int`):
            All rows, and users of the usable ones.
        findings (`list[Finding]`):
            The worst first.
        comparisons (`dict`):
            Comparisons per user: quantiles, users under 10 and under 50.
        agreement (`dict`, *optional*):
            Of users on shared pairs, see [`agreement`]; None where there are none.
        probes (`dict`):
            Accuracy with interval of each probe, and the artefacts by how much they tell.
        gain ([`Gain`], *optional*):
            How much personalisation can gain.
    """

    source: str
    n_rows: int
    n_users: int = 0
    findings: list[Finding] = field(default_factory=list)
    comparisons: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, Any] | None = None
    probes: dict[str, Any] = field(default_factory=dict)
    gain: Gain | None = None

    @property
    def status(self) -> int:
        """0 clean, 1 something to look at, 2 unusable as it is; the exit status of `trl-sharelora data check`."""
        levels = {finding.level for finding in self.findings}
        return 2 if UNUSABLE in levels else 1 if WARNING in levels else 0

    def kinds(self, level: str | None = None) -> list[str]:
        """The kinds of the findings, of one level or of all."""
        return [finding.kind for finding in self.findings if level in (None, finding.level)]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain numbers and texts, for JSON."""
        return asdict(self) | {"status": self.status}

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.n_rows:,} rows, {self.n_users:,} users"]
        for finding in self.findings:
            more = f", ... ({finding.count:,} in all)" if finding.count > 5 else ""
            where = f" [{some_rows(finding.rows[:5])}{more}]" if finding.rows else ""
            lines.append(f"{finding.level.upper():<8} {finding.kind}: {finding.message}{where}")
        if self.comparisons:
            found = self.comparisons
            lines.append(
                f"comparisons per user: {found['min']} to {found['max']}, median {found['median']:g}; {found['under_10']} users under {FEW}, "
                f"{found['under_50']} under {ENOUGH}"
            )
        for name in ("length", "layout", "artefacts", "shuffled labels"):
            if name in self.probes:
                probe = self.probes[name]
                alone = "length alone" if name == "length" else name
                lines.append(
                    f"probe, {alone}: right in {probe['accuracy']:.1%} [{probe['low']:.1%}, {probe['high']:.1%}] of held-out comparisons"
                )
        if self.agreement:
            found = self.agreement
            lines.append(
                f"agreement of two users on a shared pair: {found['raw']:.1%} [{found['raw_low']:.1%}, {found['raw_high']:.1%}], Krippendorff's "
                f"alpha {found['alpha']:.2f} [{found['alpha_low']:.2f}, {found['alpha_high']:.2f}], on {found['pairs']:,} pairs"
            )
        elif self.n_users > 1:
            lines.append("agreement: no pair was judged by two users")
        if self.gain:
            lines.append(f"what personalisation can gain: {self.gain.verdict}. {self.gain.why}")
        verdict = ("clean", "there is something to look at", "training would refuse these rows")[self.status]
        return "\n".join([*lines, f"=> {verdict} (status {self.status})"])


class _Log:
    """The usable rows in the form that the examinations need."""

    def __init__(self, rows: list[dict[str, Any]], numbers: list[int], user_column: str):
        self.rows, self.numbers = rows, numbers
        self.users = [user_id_as_text(row[user_column]) for row in rows]
        self.pairs = [pair_key(row) for row in rows]
        self.sides = [(plain_text(row["chosen"]), plain_text(row["rejected"])) for row in rows]
        self.prompts = prompts_of(rows)
        # A direction that knows neither the label nor the format: the reply whose hash comes first is A. (In the order of the
        # alphabet, a quote before one reply of each pair would make it A always.)
        self.a_chosen = np.array([_hash(row["chosen"]) < _hash(row["rejected"]) for row in rows], dtype=bool)
        prompts = Counter(self.prompts)
        # what cross-validation keeps together: prompts, or pairs where there are few prompts or one has most rows
        by_pair = len(prompts) < FEWEST_ITEMS or max(prompts.values()) > len(rows) / 2
        self.items = np.unique(self.pairs if by_pair else self.prompts, return_inverse=True)[1]
        self.user_of = np.unique(self.users, return_inverse=True)[1]


def check_data(
    dataset: Dataset | str | os.PathLike,
    user_column: str = "user_id",
    split_column: str = "split",
    position_column: str | None = None,
    gain: bool = True,
    seed: int = 0,
) -> DataReport:
    """Examine a preference log before anything is trained on it.

    Args:
        dataset ([`~datasets.Dataset`], `str` or `os.PathLike`):
            Preference rows, or what [`load_preferences`] takes.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        split_column (`str`, *optional*, defaults to `"split"`):
            The column that names the split, if there is one. Overlap is looked for between `train` and each other split; the gain is
            estimated on `train` alone, so that the test rows stay untouched. Rows that name none are of no split, unless none does.
        position_column (`str`, *optional*):
            A column that says where the chosen reply was shown: two values, such as "left" and "right".
        gain (`bool`, *optional*, defaults to `True`):
            Whether to estimate what personalisation can gain, the slowest part.
        seed (`int`, *optional*, defaults to 0):
            Of folds, of samples of large logs and of coins.

    Returns:
        [`DataReport`]: Also for rows that cannot be trained on (`status` 2): what is wrong with them, and all that can be told
        from the others.

    Raises:
        DataError: The file cannot be read.
        ConfigError: A column is named that is not there.
    """
    source = "dataset" if isinstance(dataset, Dataset) else str(dataset)
    dataset = dataset if isinstance(dataset, Dataset) else load_preferences(dataset)
    report = DataReport(source, len(dataset))
    try:
        check_preference_rows(dataset, user_column, name="examined")
    except (DataError, UserIdError) as error:
        report.findings.append(Finding(UNUSABLE, "schema", str(error)))
    needed = {user_column, "chosen", "rejected"}
    if not needed <= set(dataset.column_names):
        return report
    extra = [name for name in ("prompt", split_column, position_column) if name in dataset.column_names]
    for argument, column in (("split_column", split_column), ("position_column", position_column)):
        # a log without splits is an ordinary one
        if column not in (None, *dataset.column_names) and (argument, column) != ("split_column", "split"):
            raise ConfigError(
                f"{argument}={column!r} came; the columns are {', '.join(map(repr, dataset.column_names))}."
            )
    all_rows = list(dataset.with_format(None).select_columns([*sorted(needed), *extra]))
    _check_types(all_rows, report)
    rows, numbers = [], []
    for number, row in enumerate(all_rows):
        try:
            check_row(row, number, user_column)
        except ShareLoraError:
            continue
        rows.append(row)
        numbers.append(number)
    if not rows:
        return report
    log = _Log(rows, numbers, user_column)
    report.n_users = len(set(log.users))
    _check_ids(log, report)
    _count_comparisons(log, report)
    _check_repeats(log, report)
    has_splits = any(row.get(split_column) is not None for row in rows)
    if has_splits:
        _check_overlap(log, split_column, report)
    if position_column is not None:
        _check_position(log, position_column, report)
    _probe(log, seed, report)
    report.agreement = agreement(log.users, log.pairs, log.a_chosen)
    if gain:
        training = [place for place, row in enumerate(rows) if not has_splits or row[split_column] == "train"]
        report.gain = (
            estimate_gain(log, training, report.agreement, seed)
            if training
            else Gain("cannot be told", f"No row is of the split 'train' in {split_column!r}.")
        )
    report.findings.sort(key=lambda finding: (UNUSABLE, WARNING, NOTE).index(finding.level))
    return report


def _add(
    report: DataReport, log: _Log | None, level: str, kind: str, message: str, places: Sequence[int] = ()
) -> None:
    rows = [log.numbers[place] if log else place for place in places]
    report.findings.append(Finding(level, kind, message, rows[:20], len(rows)))


def _check_types(rows: list[dict[str, Any]], report: DataReport) -> None:
    forms = Counter((type(row["chosen"]).__name__, type(row["rejected"]).__name__) for row in rows)
    different = [
        number for number, row in enumerate(rows) if type(row["chosen"]).__name__ != type(row["rejected"]).__name__
    ]
    if different:
        shown = ", ".join(f"{chosen} against {rejected} in {n}" for (chosen, rejected), n in forms.most_common())
        _add(
            report,
            None,
            UNUSABLE,
            "leak",
            f"`chosen` and `rejected` are of different types ({shown} rows): the type alone tells which was chosen. Write both in one form.",
            different,
        )


def _check_ids(log: _Log, report: DataReport) -> None:
    users = sorted(set(log.users))
    forms: dict[str, list[str]] = defaultdict(list)
    for user in users:
        form = " ".join(unicodedata.normalize("NFKC", user).casefold().split())
        # 7 and 007
        forms[str(int(form)) if re.fullmatch(r"[0-9]+", form) else form].append(user)
    twins = [found for found in forms.values() if len(found) > 1]
    if twins:
        shown = "; ".join(" and ".join(map(repr, found)) for found in twins[:5]) + "; ..." * (len(twins) > 5)
        merged = {user for found in twins for user in found}
        _add(
            report,
            log,
            WARNING,
            "ids",
            f"{len(twins)} groups of ids differ only by white space, case, Unicode form or leading zeros ({shown}). If they are one person, his "
            "answers are split among several users; give them one id.",
            [place for place, user in enumerate(log.users) if user in merged],
        )
    numeric = [
        user for user in users if re.fullmatch(r"[+-]?([0-9]+\.[0-9]*|[0-9]*\.[0-9]+|[0-9.]+[eE][+-]?[0-9]+)", user)
    ]
    if numeric:
        shown = ", ".join(map(repr, numeric[:5]))
        _add(
            report,
            log,
            WARNING,
            "ids",
            f"{len(numeric)} ids look like decimal numbers ({shown}): they have probably passed through a table program, in which 007 becomes 7.0 "
            "and long ids are rounded together. Read the id column as text (dtype=str).",
            [place for place, user in enumerate(log.users) if user in set(numeric)],
        )
    if len(users) > 20 and len(users) > 0.9 * len(log.users):
        _add(
            report,
            log,
            WARNING,
            "ids",
            f"{len(users)} users in {len(log.users)} rows: almost everybody has a single row. Does the column name rows instead of users?",
        )
    if len(users) == 1:
        _add(report, log, WARNING, "ids", f"There is one user ({users[0]!r}): nothing is there to personalise.")


def _count_comparisons(log: _Log, report: DataReport) -> None:
    counts = np.bincount(log.user_of)
    quantiles = {f"q{round(100 * q):02d}": float(np.quantile(counts, q)) for q in (0.1, 0.25, 0.75, 0.9)}
    report.comparisons = {
        "min": int(counts.min()),
        **quantiles,
        "median": float(np.median(counts)),
        "max": int(counts.max()),
        "under_10": int((counts < FEW).sum()),
        "under_50": int((counts < ENOUGH).sum()),
    }
    if (counts < FEW).mean() > 0.5:
        _add(
            report,
            log,
            NOTE,
            "few comparisons",
            f"{(counts < FEW).mean():.0%} of the users have fewer than {FEW} comparisons; of them, little more than the common taste can be learnt.",
        )


def _check_repeats(log: _Log, report: DataReport) -> None:
    """Repeated answers, contradictions, and pairs that are made of votes."""
    seen: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, key in enumerate(zip(log.users, log.pairs, strict=True)):
        seen[key].append(place)
    repeated, contradictory, rows_of_contradictions = [], 0, []
    for places in seen.values():
        if len({bool(log.a_chosen[place]) for place in places}) > 1:
            contradictory += 1
            rows_of_contradictions += places
        for side in (True, False):
            repeated += [place for place in places if log.a_chosen[place] == side][1:]
    asked_again = sum(len(places) > 1 for places in seen.values())
    if repeated:
        _add(
            report,
            log,
            WARNING,
            "duplicates",
            f"{len(repeated)} rows repeat an answer that the same user has given before to the same pair. They count twice; drop them unless the "
            "user was really asked again.",
            sorted(repeated),
        )
    if contradictory:
        _add(
            report,
            log,
            WARNING,
            "contradictions",
            f"{contradictory} of {asked_again} pairs that a user judged several times were judged both ways. People do that (it is the noise of "
            "the log); if it is many, look at whether sides were swapped or two people share an id.",
            sorted(rows_of_contradictions),
        )
    # a reply that a user met in several pairs: does it always win or always lose?
    sides: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
    for user, prompt, (chosen, rejected) in sorted(set(zip(log.users, log.prompts, log.sides, strict=True))):
        sides[user, prompt, chosen].append(True)
        sides[user, prompt, rejected].append(False)
    several = [own for own in sides.values() if len(own) > 1]
    one_way = sum(len(set(own)) == 1 for own in several)
    if len(several) >= DISCORDANT and one_way >= 0.99 * len(several):
        _add(
            report,
            log,
            NOTE,
            "made of votes",
            f"{len(several)} replies stand in several comparisons of a user and {one_way / len(several):.0%} of them always win or always lose: the "
            "pairs were probably made of votes on single replies. Split the votes before pairing them, or a test pair is known from training.",
        )


def _check_overlap(log: _Log, split_column: str, report: DataReport) -> None:
    splits = [row[split_column] for row in log.rows]
    names = Counter(splits)
    if "train" not in names:
        _add(
            report,
            log,
            WARNING,
            "overlap",
            f"The column {split_column!r} has the values {dict(names)}, of which none is 'train': overlap is not looked for, nor what is to be gained. Name "
            "the training rows 'train', or give the column that does (split_column=...).",
        )
        return
    if names[None]:
        _add(
            report,
            log,
            NOTE,
            "no split",
            f"{names[None]} rows are of no split ({split_column!r} is empty), so they are left out of 'train' and of every other.",
            [place for place, split in enumerate(splits) if split is None],
        )
    in_train = np.array([name == "train" for name in splits])
    texts = [text for sides in log.sides for text in sides]
    groups = near_duplicates(texts)
    near = [tuple(sorted(pair)) for pair in zip(groups[::2], groups[1::2], strict=True)]
    near_prompts = near_duplicates(log.prompts)
    replies = list(zip(log.users, log.prompts, log.sides, strict=True))
    keys: dict[str, list[Any]] = {
        "answer": list(zip(log.users, log.pairs, strict=True)),
        "near": list(zip(log.users, near_prompts, near, strict=True)),
    }
    trained = {name: {key for key, train in zip(own, in_train, strict=True) if train} for name, own in keys.items()}
    pairs_of_train = {pair for pair, train in zip(log.pairs, in_train, strict=True) if train}
    known_prompts = [
        (own, {prompt for prompt, train in zip(own, in_train, strict=True) if train})
        for own in (log.prompts, near_prompts)
    ]
    replies_of_train = {
        (user, prompt, text)
        for (user, prompt, own), train in zip(replies, in_train, strict=True)
        if train
        for text in own
    }
    for name in sorted({str(name) for name in names if name is not None} - {"train"}):
        held_out = [place for place, split in enumerate(splits) if split is not None and str(split) == name]
        same = [place for place in held_out if keys["answer"][place] in trained["answer"]]
        if same:
            _add(
                report,
                log,
                WARNING,
                "overlap",
                f"{len(same)} of {len(held_out)} rows of {name!r} are pairs that the same user judged in 'train': their answers are known. Split anew "
                "(trl-sharelora data split).",
                same,
            )
        almost = [place for place in held_out if keys["near"][place] in trained["near"] and place not in set(same)]
        if almost:
            _add(
                report,
                log,
                WARNING,
                "near overlap",
                f"{len(almost)} rows of {name!r} are near-duplicates (case, punctuation, small edits) of pairs that the same user judged in 'train'.",
                almost,
            )
        known = [
            place
            for place in held_out
            if any((*replies[place][:2], text) in replies_of_train for text in replies[place][2])
        ]
        others = sum(log.pairs[place] in pairs_of_train for place in held_out) / len(held_out)
        prompts, nearly = (
            sum(own[place] in own_of_train for place in held_out) / len(held_out)
            for own, own_of_train in known_prompts
        )
        _add(
            report,
            log,
            NOTE,
            "seen items",
            f"of {name!r}, {prompts:.0%} have a prompt of 'train' ({nearly:.0%} it or a near-duplicate), {others:.0%} are a pair of 'train', {len(known) / len(held_out):.0%} have a reply that "
            "the same user judged in 'train' (in another pair); a result on them is one on seen items.",
        )


def _check_position(log: _Log, column: str, report: DataReport) -> None:
    shown = Counter(str(row[column]) for row in log.rows)
    if len(shown) != 2:
        _add(
            report,
            log,
            WARNING if len(shown) == 1 else NOTE,
            "position",
            f"{column!r} has the value{'s' * (len(shown) > 1)} {dict(shown.most_common(5))}; two are needed to say where the chosen reply was shown."
            + " If it does say so, one place was always chosen." * (len(shown) == 1),
        )
        return
    (value, count), total = shown.most_common(1)[0], shown.total()
    interval = stats.binomtest(count, total).proportion_ci(STRICT, method="wilson")
    report.probes["position"] = {"value": value, "accuracy": count / total, "low": interval.low, "high": interval.high}
    if interval.low > 0.5:
        _add(
            report,
            log,
            WARNING,
            "position",
            f"the reply at {value!r} was chosen in {count / total:.1%} [{interval.low:.1%}, {interval.high:.1%}]: people, or whoever made the file, "
            "favour a place. Show replies in random order, and never let the model see the place.",
        )


# -- probes


def _features(log: _Log, places: np.ndarray, functions: dict[str, Callable[[str], float]]) -> np.ndarray:
    """Differences A - B `(rows, features)` of what the functions say of the two replies."""
    cache: dict[str, list[float]] = {}

    def of(text: str) -> list[float]:
        if text not in cache:
            cache[text] = [function(text) for function in functions.values()]
        return cache[text]

    differences = np.array([np.subtract(of(log.sides[place][0]), of(log.sides[place][1])) for place in places])
    return differences * np.where(log.a_chosen[places], 1, -1)[:, None]


def _prompt_features(log: _Log, places: np.ndarray) -> np.ndarray:
    """Which reply comes first in the prompt, and which has more messages; `(rows, 2)`, A - B."""
    found = np.zeros((len(places), 2))
    for line, place in enumerate(places):
        where = [log.prompts[place].find(text) if text else -1 for text in log.sides[place]]
        if min(where) >= 0 and where[0] != where[1]:
            found[line, 0] = 1 if where[0] < where[1] else -1
        chosen, rejected = log.rows[place]["chosen"], log.rows[place]["rejected"]
        if isinstance(chosen, list):
            found[line, 1] = len(chosen) - len(rejected)
    return found * np.where(log.a_chosen[places], 1, -1)[:, None]


def _structure(side: Any) -> set[str]:
    """How the messages of a conversational reply are written down, whatever they say."""
    found: set[str] = set()
    for message in side if isinstance(side, list) else []:
        if isinstance(message, dict):
            found.add(f"has the role {message.get('role')!r}")
            found |= {f"has the key {key!r}" for key, value in message.items() if value is not None}
            if isinstance(message.get("content"), list):
                found.add("has content in blocks")
    return found


def _structure_features(log: _Log, places: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Which reply's messages have which roles, keys and blocks, where the two differ; `(rows, names)`, A - B."""
    sides = [tuple(_structure(log.rows[place][side]) for side in ("chosen", "rejected")) for place in places]
    common = Counter(name for chosen, rejected in sides for name in chosen ^ rejected).most_common(MOST_NAMES)
    names = [name for name, _ in common]
    found = np.array(
        [[(name in chosen) - (name in rejected) for name in names] for chosen, rejected in sides], dtype=float
    ).reshape(len(places), len(names))
    return found * np.where(log.a_chosen[places], 1, -1)[:, None], names


def fit_logistic(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None, ridge: float = 1.0) -> np.ndarray:
    """Ridge logistic regression without intercept: the minimiser of sum_i w_i log(1 + exp(-s_i x_i b)) + ridge/2 |b|².

    Newton's method, in which a step changes no margin by more than 4; ten features and the rows of a log are too few for more.

    Args:
        x (`np.ndarray`):
            `(rows, features)`.
        y (`np.ndarray`):
            `(rows,)`, 0 or 1 (s = 2y - 1).
        weights (`np.ndarray`, *optional*):
            `(rows,)`; 1 by default.
        ridge (`float`, *optional*, defaults to 1.0):
            For features of about unit spread: as much as a few rows.
    """
    weights = np.ones(len(x)) if weights is None else weights
    coefficients = np.zeros(x.shape[1])
    for _ in range(50):
        p = special.expit(x @ coefficients)
        gradient = x.T @ (weights * (y - p)) - ridge * coefficients
        curvature = (x * (weights * p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(coefficients))
        step = np.linalg.solve(curvature, gradient)
        coefficients += step * min(1.0, 4 / max(np.abs(x @ step).max(initial=0), 1e-12))
        if np.abs(gradient).max(initial=0) < 1e-8 * max(len(x), 1):
            break
    return coefficients


def _cross_validated(x: np.ndarray, y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Credit `(rows,)` of held-out rows: 1 right, 0 wrong, 1/2 where the probe cannot tell."""
    credit = np.full(len(y), 0.5)
    for held in np.unique(fold):
        train, test = fold != held, fold == held
        spread = np.sqrt((x[train] ** 2).mean(axis=0))
        use = spread > 0
        if not use.any():
            continue
        scaled = x[:, use] / spread[use]
        margin = scaled[test] @ fit_logistic(scaled[train], y[train])
        margin[np.abs(margin) < 1e-12] = 0
        credit[test] = (np.sign(margin) * (2 * y[test] - 1) + 1) / 2
    return credit


def _interval_of_mean(credit: np.ndarray, clusters: Sequence[np.ndarray], level: float) -> tuple[float, float, float]:
    """Mean with an interval for rows that come in clusters; of several ways to cluster, the one with the widest."""
    mean = float(credit.mean())
    error = max(float(np.sqrt((np.bincount(own, credit - mean) ** 2).sum())) / len(credit) for own in clusters)
    half = stats.norm.ppf((1 + level) / 2) * error
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def _probe(log: _Log, seed: int, report: DataReport) -> None:
    random = np.random.default_rng(seed)
    places = np.arange(len(log.rows))
    if len(places) > MOST_PROBED:
        places = np.sort(random.choice(places, MOST_PROBED, replace=False))
    items, users = log.items[places], log.user_of[places]
    if len(np.unique(items)) < FEWEST_ITEMS:
        _add(
            report,
            log,
            NOTE,
            "probes",
            f"{len(np.unique(items))} different pairs are too few to look for leaks across them ({FEWEST_ITEMS} at least).",
        )
        return
    fold = random.integers(5, size=items.max() + 1)[items]
    y = log.a_chosen[places].astype(float)
    structure, structure_names = _structure_features(log, places)
    artefacts = np.hstack([_features(log, places, ARTEFACTS), _prompt_features(log, places), structure])
    length = _features(log, places, LENGTH)
    layout = np.hstack([length, _features(log, places, LAYOUT)])
    for name, x, level in (("length", length, 0.95), ("layout", layout, 0.95), ("artefacts", artefacts, STRICT)):
        credit = _cross_validated(x, y, fold)
        mean, low, high = _interval_of_mean(credit, (items, users), level)
        report.probes[name] = {"accuracy": mean, "low": low, "high": high, "level": level}
    names = [*ARTEFACTS, IN_PROMPT, MESSAGES, *structure_names]
    signs = np.sign(artefacts) * (2 * y - 1)[:, None]  # +1: the chosen reply has more of it
    table: list[dict[str, Any]] = []
    for column, name in enumerate(names):
        n = int((signs[:, column] != 0).sum())
        if n:
            ahead = int((signs[:, column] > 0).sum())
            table.append(
                {"name": name, "pairs": n, "chosen_has_more": ahead / n, "tells": abs(ahead - n / 2) / len(y)}
            )
    table.sort(key=lambda line: -line["tells"])
    report.probes["artefacts"]["features"] = table
    _report_leaks(log, table, signs, names, places, report)
    if "leak" not in report.kinds():  # which would tell why
        _report_layout(log, report)
    # the doctor's own test: the same probe, all features, on labels that mean nothing
    everything = np.hstack([artefacts, layout])
    means = [
        _cross_validated(everything, random.integers(2, size=len(y)).astype(float), fold).mean()
        for _ in range(SHUFFLES)
    ]
    mean, error = float(np.mean(means)), 0.5 / math.sqrt(SHUFFLES * len(y))
    low, high = mean - SELF_TEST_LIMIT * error, mean + SELF_TEST_LIMIT * error
    report.probes["shuffled labels"] = {"accuracy": mean, "low": low, "high": high}
    if not low <= 0.5 <= high:
        _add(
            report,
            log,
            WARNING,
            "self-test",
            f"on labels drawn by coins the probe is right in {mean:.1%} instead of 50 %: the other probes are not to be trusted on this log.",
        )


def _report_leaks(
    log: _Log, table: list[dict], signs: np.ndarray, names: list[str], places: np.ndarray, report: DataReport
) -> None:
    probe = report.probes["artefacts"]
    one_way = [
        line
        for line in table
        if line["pairs"] >= DISCORDANT and max(line["chosen_has_more"], 1 - line["chosen_has_more"]) >= ONE_WAY
    ]
    if probe["low"] <= 0.5 and not one_way:
        return
    told = one_way or table[:3]
    shown = "; ".join(
        f"{line['name']}: in {line['pairs']} pairs one reply only or more, and it is the "
        f"{'chosen' if line['chosen_has_more'] >= 0.5 else 'rejected'} one in {max(line['chosen_has_more'], 1 - line['chosen_has_more']):.0%}"
        for line in told[:3]
    )
    column = names.index(told[0]["name"])
    leak = bool(one_way) or probe["accuracy"] >= 0.6
    what = (
        "format tells chosen from rejected"
        if leak
        else "format tells a little of which reply was chosen; people may mind it, or a pipeline has left it"
    )
    _add(
        report,
        log,
        WARNING,
        "leak" if leak else "format",
        f"{what}: artefacts alone are right in {probe['accuracy']:.1%} [{probe['low']:.1%}, {probe['high']:.1%}] ({shown}). Look at some rows; "
        "write both replies in the same way before training.",
        [int(place) for place in places[np.flatnonzero(signs[:, column])]],
    )


def _report_layout(log: _Log, report: DataReport) -> None:
    for name, words in (
        ("length", "length alone"),
        ("layout", "length and layout (lines, bullets, bold, code, marks)"),
    ):
        probe = report.probes[name]
        if probe["low"] >= BEYOND_TASTE:
            _add(
                report,
                log,
                WARNING,
                "leak",
                f"{words} tells which reply was chosen in {probe['accuracy']:.1%} [{probe['low']:.1%}, {probe['high']:.1%}], more than any taste "
                "would: was one side cut off, or rewritten? A model learns that and nothing else.",
            )
            return


# -- agreement


def agreement(users: Sequence[str], pairs: Sequence[str], a_chosen: np.ndarray) -> dict[str, Any] | None:
    """How far users agree on the pairs that several of them judged.

    A user is one vote on a pair; of one who answered several times an answer is drawn, and all figures are expectations over that. With
    n_0 and n_1 the votes on a pair and m = n_0 + n_1 at least 2:

    - raw agreement: the mean over pairs of the probability that two different users agree;
    - Krippendorff's alpha for nominal data, 1 - (N - 1) sum_pairs [n_0 n_1 / (m - 1)] / (N_0 N_1), with N, N_0, N_1 the sums over
      pairs (Krippendorff, 2018, "Content analysis", ch. 12);
    - `others`: how often the majority of the other users is right (a tie half), and `majority`, the majority itself: below and
      above the accuracy of the best common rule.

    Intervals (95 %) are percentile bootstraps over pairs.

    Args:
        users (`Sequence[str]`), pairs (`Sequence[str]`), a_chosen (`np.ndarray`):
            One of each per row: who judged which pair (in a fixed direction), and how.

    Returns:
        `dict`, *optional*: `pairs`, `raw`, `alpha`, `others`, `majority` with `_low`, `_high`; `repeats` and `consistency`, of users who judged a
        pair several times (None where nobody did). None where no pair was judged by two users.
    """
    votes: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for user, pair, side in zip(users, pairs, a_chosen, strict=True):
        votes[pair, user][int(side)] += 1
    shares: dict[str, list[float]] = defaultdict(list)
    repeats: list[float] = []
    for (pair, _), (zero, one) in votes.items():
        shares[pair].append(one / (zero + one))
        if zero + one > 1:
            # two of his answers, drawn without replacement, are the same
            repeats.append((zero * (zero - 1) + one * (one - 1)) / ((zero + one) * (zero + one - 1)))
    columns = []
    for own in shares.values():
        m = len(own)
        if m < 2:
            continue
        p = np.array(own)
        n_1, n_0 = p.sum(), (1 - p).sum()
        differ = (n_0 * n_1 - (p * (1 - p)).sum()) / (
            m - 1
        )  # over the users, how many of the others differ, on average
        others = np.sign((n_1 - p) - (n_0 - (1 - p)))
        right = (p * (1 + others) / 2 + (1 - p) * (1 - others) / 2).mean()
        columns.append((m, n_0, n_1, 1 - 2 * differ / m, right, max(n_0, n_1) / m, differ))
    if not columns:
        return None
    judges, zero, one, same, others, majority, crossed = np.array(columns).T

    def alpha(crossed: np.ndarray, zero: np.ndarray, one: np.ndarray, axis: int = -1) -> np.ndarray:
        n_0, n_1 = zero.sum(axis), one.sum(axis)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(n_0 * n_1 > 0, 1 - (n_0 + n_1 - 1) * crossed.sum(axis) / (n_0 * n_1), 1.0)

    found: dict[str, Any] = {"pairs": len(columns), "users_per_pair": float(judges.mean())}
    for name, data, statistic in (
        ("raw", (same,), np.mean),
        ("others", (others,), np.mean),
        ("majority", (majority,), np.mean),
        ("alpha", (crossed, zero, one), alpha),
    ):
        found[name] = float(statistic(*data))
        found[f"{name}_low"] = found[f"{name}_high"] = found[name]
        if len(columns) > 1:
            interval = stats.bootstrap(
                data,
                statistic,
                paired=True,
                vectorized=True,
                n_resamples=RESAMPLES,
                method="percentile",
                batch=max(1, 2_000_000 // len(columns)),
                random_state=np.random.default_rng(0),
            ).confidence_interval
            found[f"{name}_low"], found[f"{name}_high"] = float(interval.low), float(interval.high)
    found["repeats"] = len(repeats)
    found["consistency"] = float(np.mean(repeats)) if repeats else None
    return found


def hard_limit(found: dict[str, Any] | None) -> float | None:
    """The most that personalisation can gain by the agreement on shared pairs: a personal rule's limit minus what a common rule reaches.

    A common rule reaches at least what the majority of the others says (`others`). A personal one is right at most always, or
    (1 + sqrt(2c - 1)) / 2 where users repeat their answers with probability c (from 30 repeats on).
    """
    if found is None:
        return None
    consistency = found["consistency"]
    personal = 1.0
    if consistency is not None and found["repeats"] >= 30:
        personal = (1 + math.sqrt(max(0.0, 2 * consistency - 1))) / 2
    return max(0.0, personal - max(found["others"], 0.5))


# -- what personalisation can gain


def _words(text: str) -> list[str]:
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    return [*words, *(f"{first} {second}" for first, second in pairwise(words))]


def _text_features(texts: list[str]) -> np.ndarray:
    """Coordinates `(texts, dimensions)` from hashed words and pairs of words, weighted by rarity, by SVD."""
    lines, columns, values = [], [], []
    for line, text in enumerate(texts):
        for word, n in Counter(_words(text)).items():
            hashed = zlib.crc32(word.encode("utf-8", "surrogatepass"))
            lines.append(line)
            columns.append(hashed % HASHED)
            values.append((1 + math.log(n)) * (1 if hashed >> 31 else -1))
    counts = sparse.csr_matrix((values, (lines, columns)), shape=(len(texts), HASHED))
    in_texts = counts.getnnz(axis=0)
    use = np.flatnonzero((in_texts >= 2) & (in_texts < len(texts)))
    if len(use) < 2 or len(texts) < 3:
        return np.zeros((len(texts), 0))
    weighted = counts[:, use] @ sparse.diags(np.log((1 + len(texts)) / (1 + in_texts[use])))
    lengths = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    weighted = sparse.csr_matrix(sparse.diags(1 / np.maximum(lengths, 1e-9)) @ weighted)
    return _left_factor(weighted, TEXT_DIMENSIONS)


def _left_factor(matrix: Any, dimensions: int) -> np.ndarray:
    dimensions = min(dimensions, min(matrix.shape) - 1)
    if dimensions < 1:
        return np.zeros((matrix.shape[0], 0))
    # a start of our own: ARPACK's is random
    left, values, _ = svds(matrix, dimensions, v0=np.random.default_rng(0).standard_normal(min(matrix.shape)))
    return left * values


def _vote_features(
    users: np.ndarray, a: np.ndarray, b: np.ndarray, y: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Coordinates `(texts, 1 + dimensions)` of texts from who liked them: mean vote, and the SVD of the votes less that."""
    signs = np.where(y == 1, 1.0, -1.0)
    cells = (np.concatenate([users, users]), np.concatenate([a, b]))
    votes = sparse.csr_matrix((np.concatenate([signs, -signs]), cells), shape=shape)
    times = sparse.csr_matrix((np.ones(2 * len(a)), cells), shape=shape)
    given = times.copy()
    times.data = 1 / times.data
    votes = votes.multiply(times)  # each user's mean vote on each text
    given.data[:] = 1
    n = np.asarray(given.sum(axis=0)).ravel()
    mean = np.asarray(votes.sum(axis=0)).ravel() / (n + 3)  # shrunk by three votes
    centred = sparse.csr_matrix(votes - given @ sparse.diags(mean))
    return np.hstack([mean[:, None], _left_factor(centred.T.tocsr(), VOTE_DIMENSIONS) / np.sqrt(n + 10)[:, None]])


def _padded(of: np.ndarray, n_users: int, *arrays: np.ndarray) -> list[np.ndarray]:
    """Rows of arrays by user: `(users, most rows of a user, ...)`, zeros at the end."""
    counts = np.bincount(of, minlength=n_users)
    order = np.argsort(of, kind="stable")
    column = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    padded = []
    for array in arrays:
        block = np.zeros((n_users, max(counts.max(initial=0), 1), *array.shape[1:]))
        block[of[order], column] = array[order]
        padded.append(block)
    return padded


def _modes(
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    mean: np.ndarray,
    precision: np.ndarray,
    start: np.ndarray,
    steps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior modes `(users, d)` of all users' weights under N(mean, precision^-1), and Laplace covariances `(users, d, d)`.

    Args:
        x (`np.ndarray`):
            `(users, rows, d)`; weights 0 mark what is no row.
    """
    w = start
    for step in range(steps + 1):
        p = special.expit(np.einsum("und,ud->un", x, w))
        curvature = np.matmul(x.transpose(0, 2, 1) * (p * (1 - p) * weights)[:, None, :], x) + precision
        if step == steps:
            break
        gradient = np.einsum("und,un->ud", x, (y - p) * weights) - (w - mean) @ precision
        move = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        longest = np.abs(np.einsum("und,ud->un", x, move)).max(axis=1)
        w = w + move * np.minimum(1.0, 4 / np.maximum(longest, 1e-12))[:, None]
    return w, np.linalg.inv(curvature)


def _fit_population(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean `(d,)` and covariance `(d, d)` of the users' weights, by EM with Laplace's approximation in the E step."""
    n_users, _, d = x.shape
    covariance = 0.3 * np.eye(d)
    w = np.tile(mean, (n_users, 1))
    for step in range(EM_STEPS):
        w, spread = _modes(x, y, weights, mean, np.linalg.inv(covariance), w, 2 if step else 4)
        mean = w.mean(axis=0)
        moved = w - mean
        # as if three more users with next to no taste of their own had been seen, which keeps it invertible
        covariance = (moved.T @ moved + spread.sum(axis=0) + 0.03 * np.eye(d)) / (n_users + 3)
    return mean, covariance


def estimate_gain(log: _Log, places: Sequence[int], found: dict[str, Any] | None, seed: int) -> Gain:
    """What personalisation can gain on the rows `places` of a log; see the top of this module."""
    limit = hard_limit(found)
    random = np.random.default_rng([seed, 1])
    counts = Counter(log.users[place] for place in places)
    users = sorted(user for user, n in counts.items() if n >= FEW)
    if len(users) < 5 or sum(counts[user] for user in users) < 200:
        why = f"{len(users)} users have {FEW} or more comparisons; at least 5 of them with 200 in all are needed."
        return Gain("cannot be told", why, limit=limit, users=len(users))
    if len(users) > MOST_USERS:
        users = sorted(random.choice(users, MOST_USERS, replace=False).tolist())
    number = {user: n for n, user in enumerate(users)}
    taken: Counter[str] = Counter()
    rows = []
    for place in random.permutation(places):
        user = log.users[place]
        if user in number and taken[user] < MOST_OF_USER:
            taken[user] += 1
            rows.append(int(place))
    texts = sorted({text for place in rows for text in log.sides[place]})
    index = {text: n for n, text in enumerate(texts)}
    sides = np.array([[index[text] for text in log.sides[place]] for place in rows])
    y = log.a_chosen[rows].astype(float)
    a, b = np.where(y[:, None] == 1, sides, sides[:, ::-1]).T
    user_of = np.array([number[log.users[place]] for place in rows])
    # how often did a user judge the reply?
    met, inverse, times = np.unique(
        np.concatenate([user_of * len(texts) + a, user_of * len(texts) + b]), return_inverse=True, return_counts=True
    )
    of_a, of_b = inverse[: len(rows)], inverse[len(rows) :]
    if ((times[of_a] > 1) | (times[of_b] > 1)).mean() > 0.05:
        weights = (1 / times[of_a] + 1 / times[of_b]) / 2
        fold_of_reply = random.integers(FOLDS, size=len(met))
        fold_a, fold_b = fold_of_reply[of_a], fold_of_reply[of_b]
    else:
        weights = np.ones(len(rows))
        pairs = np.unique([log.users[place] + log.pairs[place] for place in rows], return_inverse=True)[1]
        fold_a = fold_b = random.integers(FOLDS, size=pairs.max() + 1)[pairs]
    judged = np.bincount(np.concatenate([a, b]), minlength=len(texts))
    by_votes = len(users) >= 40 and (np.minimum(judged[a], judged[b]) >= 10).mean() > 0.5
    base = np.hstack([_text_features(texts), [[f(text) for f in (LENGTH | LAYOUT).values()] for text in texts]])
    right = np.full((5, len(rows)), np.nan)  # as of _held_out
    if by_votes:
        half = random.permutation(len(users)) % 2
        for side in (0, 1):
            other = half[user_of] == side
            votes = _vote_features(user_of[other], a[other], b[other], y[other], (len(users), len(texts)))
            own = np.flatnonzero(~other)
            blocks = [base[:, : -len(LENGTH | LAYOUT)], base[:, -len(LENGTH | LAYOUT) :], votes[:, :1], votes[:, 1:]]
            right[:, own] = _held_out(
                blocks, a[own], b[own], y[own], user_of[own], weights[own], fold_a[own], fold_b[own]
            )
    else:
        blocks = [base[:, : -len(LENGTH | LAYOUT)], base[:, -len(LENGTH | LAYOUT) :]]
        right = _held_out(blocks, a, b, y, user_of, weights, fold_a, fold_b)
    tested = ~np.isnan(right[0])
    n = np.bincount(user_of[tested], minlength=len(users))
    means = np.array([np.bincount(user_of[tested], line[tested], len(users))[n > 0] / n[n > 0] for line in right])
    return _verdict(means, int(tested.sum()), limit)


def _verdict(means: np.ndarray, tested: int, limit: float | None) -> Gain:
    """The estimate from what [`_held_out`] finds, as means of each user, `(5, users)`."""
    common, personal, missing, weak, missing_weak = means

    def interval(values: np.ndarray) -> tuple[float, float, float]:
        centre = float(values.mean())
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
        return centre, centre - half, centre + half

    reached = interval(personal - common)
    cut = math.inf if limit is None else limit
    whole = interval(personal - common + missing)
    # where the common model was preferred, its gain is 0 without an interval; what a weak taste would bring is not excluded
    highest = max(whole[2], interval(weak - common + missing_weak)[2])
    at_most, lowest, highest = (min(max(value, 0.0), cut) for value in (*whole[:2], highest))
    verdict = "something" if reached[1] > 0 else "nothing seen"
    why = (
        f"A simple personal model gains {100 * reached[0]:+.1f} points [{100 * reached[1]:+.1f}, {100 * reached[2]:+.1f}] over the common one "
        f"({common.mean():.1%}) on {tested:,} held-out comparisons of {len(common)} users; with every taste known exactly it would be about "
        f"{100 * at_most:.1f} [{100 * lowest:.1f}, {100 * highest:.1f}], as far as words and layout tell."
    )
    if limit is None:
        why += " No pair was judged by two users, so there is no limit that holds for every model."
    else:
        why += f" No model gains more than {100 * limit:.1f}, by how far users agree."
    return Gain(
        verdict,
        why,
        reached=reached[0],
        reached_low=reached[1],
        reached_high=reached[2],
        at_most=at_most,
        at_most_low=lowest,
        at_most_high=highest,
        limit=limit,
        common=float(common.mean()),
        personal=float(personal.mean()),
        users=len(common),
        tested=tested,
    )


def _held_out(
    blocks: list[np.ndarray],
    a: np.ndarray,
    b: np.ndarray,
    y: np.ndarray,
    user_of: np.ndarray,
    weights: np.ndarray,
    fold_a: np.ndarray,
    fold_b: np.ndarray,
) -> np.ndarray:
    """Which held-out rows are right, `(5, rows)`: by the common model; by the personal one of the strength that the other folds
    choose, and what it still misses; the same for the weakest strength above 0. NaN for rows that are not held out.

    Args:
        blocks (`list[np.ndarray]`):
            Features `(texts, ...)`; the differences of a block are scaled together by its largest spread (coordinates of an SVD), the
            second block (layout) column by column.
    """
    scaled = []
    for place, block in enumerate(blocks):
        difference = block[a] - block[b]
        spread = np.sqrt((difference**2).mean(axis=0))
        if place != 1 and spread.size:
            spread = np.full_like(spread, spread.max())
        scaled.append(difference / np.where(spread > 0, spread, 1.0))
    x = np.hstack(scaled)
    n_users = len(np.unique(user_of))
    of = np.unique(user_of, return_inverse=True)[1]
    nodes, masses = np.polynomial.hermite_e.hermegauss(41)
    masses = masses / masses.sum()
    likelihood = np.zeros((FOLDS, len(STRENGTHS)))
    margins: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for fold in range(FOLDS):
        train, test = (fold_a != fold) & (fold_b != fold), (fold_a == fold) & (fold_b == fold)
        if not test.any() or not train.any():
            continue
        common = fit_logistic(x[train], y[train], weights[train])
        rows, labels, shares = _padded(of[train], n_users, x[train], y[train], weights[train])
        mean, covariance = _fit_population(rows, labels, shares, common)
        signs = 2 * y[test] - 1
        margins[fold] = []
        for place, strength in enumerate(STRENGTHS):
            if strength == 0:
                margin, variance = x[test] @ common, np.zeros(int(test.sum()))
            else:
                precision = np.linalg.inv(strength * covariance)
                w, spread = _modes(rows, labels, shares, mean, precision, np.tile(mean, (n_users, 1)), 8)
                margin = np.einsum("nd,nd->n", x[test], w[of[test]])
                variance = np.einsum("nd,nde,ne->n", x[test], spread[of[test]], x[test])
            # the logistic of a normal variable, by MacKay's approximation
            softened = margin / np.sqrt(1 + math.pi / 8 * variance)
            likelihood[fold, place] = -np.logaddexp(0, -signs * softened).sum()
            margins[fold].append((margin, variance))
    right = np.full((5, len(y)), np.nan)
    for fold, found in margins.items():
        test = (fold_a == fold) & (fold_b == fold)
        best = int(np.argmax(likelihood.sum(axis=0) - likelihood[fold]))
        signs = 2 * y[test] - 1
        right[0, test] = (np.sign(found[0][0]) * signs + 1) / 2
        for line, (margin, variance) in ((1, found[best]), (3, found[1])):
            right[line, test] = (np.sign(margin) * signs + 1) / 2
            draws = margin[:, None] + np.sqrt(variance)[:, None] * nodes
            lost = special.expit(np.abs(draws)) - special.expit(np.sign(margin)[:, None] * draws)
            right[line + 1, test] = lost @ masses
    return right


def write_report(report: DataReport, path: str | os.PathLike) -> None:
    """Write a report as JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report.as_dict(), file, indent=1, ensure_ascii=False)
        file.write("\n")
