"""How well a reward model serves each of its users: accuracy per user with intervals, and honest summaries.

Every row is scored exactly once and counts once; a tie counts half and is reported. (A mean of batch means is not an accuracy,
and neither is one in which ties are wrong.) Statistics of rewards come first, as functions of arrays; [`evaluate_users`], which
makes the rewards, comes last.
"""

import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy import special, stats

from .data import check_long_rows, check_preference_rows, tokenize_preference
from .errors import ConfigError, DataError, NonFiniteError, UnknownUserError, some_rows
from .sharelora.routing import UNSEEN, use_users
from .users import UserRegistry, user_id_as_text


if TYPE_CHECKING:
    from .rewards import UserReward

logger = logging.getLogger(__name__)

LEVEL = 0.95  # of all intervals of a result
# Only a standard error is taken from them, which 500 give within 3 %.
BOOTSTRAP_RESAMPLES = 500


def wilson_interval(correct: Any, n: Any, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Wilson score interval of shares `p = correct / n`, element by element.

    With `z` the standard normal quantile at `(1 + level) / 2`:

    `(p + z² / 2n ± z sqrt(p (1 - p) / n + z² / 4n²)) / (1 + z² / n)`

    (Wilson, 1927, "Probable inference, the law of succession, and statistical inference", JASA 22). Unlike p ± z·se it stays
    within [0, 1] and keeps its level for users with few rows. `correct` may be a half number, as ties make it;
    `scipy.stats.binomtest` takes whole numbers only.

    Args:
        correct (`array_like` of shape `(users,)`):
            Number of successes, 0 to `n`.
        n (`array_like` of shape `(users,)`):
            Number of trials, at least 1.
        level (`float`, *optional*, defaults to 0.95):
            Level of the interval.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Lower and upper ends.
    """
    correct, n = np.asarray(correct, dtype=float), np.asarray(n, dtype=float)
    if not 0 < level < 1:
        raise ConfigError(f"level={level} came; a level of confidence lies between 0 and 1, such as 0.95.")
    if np.any(n < 1) or np.any(correct < 0) or np.any(correct > n):
        raise DataError("An interval needs 1 or more trials and between 0 and n successes.")
    z = stats.norm.ppf((1 + level) / 2)
    share = correct / n
    centre = share + z**2 / (2 * n)
    half_width = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # at 0 or n successes an end is 0 or 1 exactly; rounding must not carry it beyond
    return np.clip((centre - half_width) / scale, 0, 1), np.clip((centre + half_width) / scale, 0, 1)


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Student's t interval of a mean; None for fewer than two values.

    Of the values themselves nothing but their spread is known, so it also holds what varies within each: where they are accuracies of
    users, how many rows each has. Five users are enough for its level (.94 to .95 on users drawn from a beta distribution, where a
    percentile bootstrap covers .8).

    Args:
        values (`Sequence[float]`):
            Independent draws: one per user, or one per seed.
    """
    if len(values) < 2:
        return None, None
    return _around(float(np.mean(values)), float(stats.sem(values)), len(values) - 1)


def jackknife_interval(estimate: float, without: Any) -> tuple[float | None, float | None]:
    """Interval of a statistic over users, such as a ratio of sums, from what it is without each of them.

    `estimate ± t sqrt((N - 1) / N sum_u (estimate - without_u)²)`, t with N - 1 degrees of freedom: the jackknife of clusters
    (called CV3 by MacKinnon, Nielsen and Webb, 2022, https://huggingface.co/papers/2205.03288, who advise it for few or uneven
    clusters). Of a mean it is Student's t interval exactly.

    Args:
        estimate (`float`):
            The statistic.
        without (`array_like` of shape `(users,)`):
            The same without the rows of each user.

    Returns:
        `tuple`: Lower and upper end; None, None for fewer than two users, or where the statistic is undefined without one of them.
    """
    without = np.asarray(without, dtype=float)
    users = len(without)
    if users < 2 or not np.isfinite(without).all():
        return None, None
    error = math.sqrt((users - 1) / users * float(((without - estimate) ** 2).sum()))
    return _around(estimate, error, users - 1)


def _around(centre: float, error: float, freedom: int) -> tuple[float, float]:
    half = error * float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    return centre - half, centre + half


def expected_calibration_error(margins: Any, bins: int = 15) -> float:
    """How far the model's own probabilities are from how often it is right.

    A reward model says with probability `sigmoid(|margin|)` (Bradley-Terry) that the side with the higher reward is the
    chosen one. Rows are put into `bins` equal bins of that probability over [0.5, 1], and

    `ECE = sum over bins b of (n_b / n) |share right in b - mean probability in b|`

    (Guo et al., 2017, "On calibration of modern neural networks", eq. 3 and 5). A tie is half right.

    Args:
        margins (`array_like` of shape `(rows,)`):
            Reward of `chosen` minus reward of `rejected`.
        bins (`int`, *optional*, defaults to 15):
            Number of bins, as in the paper.

    Returns:
        `float`: Between 0 (calibrated) and 1.
    """
    margins = np.asarray(margins, dtype=float)
    probability = special.expit(np.abs(margins))
    right = (np.sign(margins) + 1) / 2
    place = np.minimum(((probability - 0.5) * 2 * bins).astype(int), bins - 1)
    # n_b |mean right - mean probability| = |sum right - sum probability|
    gaps = np.bincount(place, right, bins) - np.bincount(place, probability, bins)
    return float(np.abs(gaps).sum() / len(margins))


@dataclass
class PerUserResult:
    """Accuracy per user and its summaries; printing it gives a readable table.

    The three intervals are for other users drawn like these, with as many rows each, and the same model: another seed is another
    question ([`~trl_sharelora.comparison.gain`]). They are None for a single user, and of no width where all users are alike.
    Measured where users' true accuracies are beta(8, 4) and each has 20 rows, or 5 to 59: `macro` is covered in .93 to .96 of all
    cases from 3 users on, `micro` in .92 to .95 (.91 where one user in ten has half of the rows), `worst_tenth` in .93 or more, where
    the percentile bootstrap covers .2 with 5 users, .6 with 20 and .9 with 100.

    Args:
        table ([`~pandas.DataFrame`]):
            One line per user: `user_id`, `n` (rows), `correct` (strict wins of `chosen`), `ties`, `accuracy`
            (`(correct + ties / 2) / n`), `low` and `high` (95 % Wilson interval).
        macro (`float`), macro_low (`float`, *optional*), macro_high (`float`, *optional*):
            Mean accuracy over users: each user counts the same. Its 95 % interval is Student's t over users.
        micro (`float`), micro_low (`float`, *optional*), micro_high (`float`, *optional*):
            Accuracy over rows: each row counts the same. Its interval takes each user's rows together ([`jackknife_interval`]): rows of
            a user are alike, and an interval that takes them for independent is too narrow.
        worst_tenth (`float`), worst_tenth_low (`float`, *optional*), worst_tenth_high (`float`, *optional*):
            Mean accuracy of the worst tenth of the users (k, rounded up), on these rows. It is low by chance alone where users
            have few rows: compare models on it, not with `macro`. Its interval is Student's t with k - 1 degrees of freedom (at
            least 1) and the standard error of a bootstrap over users. Up to some 20 users it is so wide that it says: unknown.
        ece (`float`):
            Expected calibration error over all rows.
        n_users (`int`), n (`int`), ties (`int`):
            Users, rows and ties in all.
        unseen (`int`):
            Rows of users whom the adapter does not know, scored with the common model. They are part of all figures.
        dropped (`int`):
            Rows longer than `max_length`, which are part of none.
        calibration_gap, calibration_gap_low, calibration_gap_high (`float`, *optional*):
            With `confidence` only. Accuracy in the quarter of the rows where the width is smallest minus that where it is
            largest, and its 95 % interval over users: above 0, the widths know where the rewards are wrong.
        calibration ([`~pandas.DataFrame`], *optional*), calibration_users ([`~pandas.DataFrame`], *optional*):
            The rest of it, see [`width_calibration`].
        rows ([`~pandas.DataFrame`], *optional*):
            Of [`evaluate_users`]: `row` (its number in the dataset), `user_id` and `margin` (reward of `chosen` minus that of
            `rejected`) of every scored row, for paired comparisons of models.
    """

    table: pd.DataFrame
    macro: float
    micro: float
    worst_tenth: float
    ece: float
    n_users: int
    n: int
    ties: int
    macro_low: float | None = None
    macro_high: float | None = None
    micro_low: float | None = None
    micro_high: float | None = None
    worst_tenth_low: float | None = None
    worst_tenth_high: float | None = None
    unseen: int = 0
    dropped: int = 0
    calibration_gap: float | None = None
    calibration_gap_low: float | None = None
    calibration_gap_high: float | None = None
    calibration: pd.DataFrame | None = field(default=None, init=False)
    calibration_users: pd.DataFrame | None = field(default=None, init=False)
    rows: pd.DataFrame | None = field(default=None, init=False, repr=False)

    @classmethod
    def from_table(cls, table: pd.DataFrame, ece: float, **others: Any) -> "PerUserResult":
        """The summaries of a table, with their intervals.

        Args:
            table ([`~pandas.DataFrame`]):
                As `table` above.
            ece (`float`):
                The calibration error, which is not in the table.
            **others:
                `unseen`, `dropped`.
        """
        accuracy, n = table["accuracy"].to_numpy(dtype=float), table["n"].to_numpy(dtype=float)
        credit = (table["correct"] + table["ties"] / 2).to_numpy()
        micro = float(credit.sum() / n.sum())
        with np.errstate(invalid="ignore", divide="ignore"):  # of a single user nothing is left
            micro_without = (credit.sum() - credit) / (n.sum() - n)
        summaries = {
            "macro": (float(accuracy.mean()), mean_interval(accuracy)),
            "micro": (micro, jackknife_interval(micro, micro_without)),
            "worst_tenth": (float(_worst_tenth(accuracy)), _interval_of_worst_tenth(accuracy)),
        }
        values: dict[str, Any] = {}
        for name, (value, (low, high)) in summaries.items():
            # accuracies end at 0 and 1
            ends = (None, None) if low is None or high is None else (max(low, 0.0), min(high, 1.0))
            values |= {name: value, f"{name}_low": ends[0], f"{name}_high": ends[1]}
        return cls(
            table=table,
            ece=ece,
            n_users=len(table),
            n=int(table["n"].sum()),
            ties=int(table["ties"].sum()),
            **values,
            **others,
        )

    def as_dict(self) -> dict[str, float | int | None]:
        """The scalars, for a log."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, pd.DataFrame)}

    def to_parquet(self, path: str | os.PathLike) -> Path:
        """Write the table; its folder is made where needed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.table.to_parquet(path, index=False)
        return path

    def __str__(self) -> str:
        lines = [
            f"{self.n_users} users, {self.n} rows, {self.ties} ties"
            + (f", {self.unseen} rows of unseen users (common model)" if self.unseen else "")
            + (f", {self.dropped} rows too long and left out" if self.dropped else ""),
            f"accuracy  mean over users {self.macro:.3f}{_between(self.macro_low, self.macro_high)}  "
            f"over rows {self.micro:.3f}{_between(self.micro_low, self.micro_high)}  "
            f"worst tenth of users {self.worst_tenth:.3f}{_between(self.worst_tenth_low, self.worst_tenth_high)}",
            f"calibration error {self.ece:.3f}",
        ]
        if self.calibration is not None:
            over = _between(self.calibration_gap_low, self.calibration_gap_high)
            accuracy = ", ".join(f"{value:.3f}" for value in self.calibration["accuracy"])
            lines.append(
                f"accuracy from the narrowest to the widest quarter {accuracy}; first minus last {self.calibration_gap:.3f}{over}"
            )
        # repr: an id may hold a line break or a terminal's control characters
        shown = self.table.assign(user_id=self.table["user_id"].map(repr))
        shown = shown.sort_values("accuracy", kind="stable", ignore_index=True)
        formats = dict.fromkeys(("accuracy", "low", "high"), "{:.3f}".format)
        parts = [("", shown)]
        if len(shown) > 12:
            parts = [("the worst five:\n", shown.head(5)), ("the best five:\n", shown.tail(5))]
        lines += [title + part.to_string(index=False, formatters=formats) for title, part in parts]
        return "\n".join(lines)


def per_user_table(
    user_ids: Sequence[str | int],
    chosen_rewards: Any,
    rejected_rewards: Any,
    order: Iterable[str] | None = None,
) -> PerUserResult:
    """Accuracy per user from rewards.

    Args:
        user_ids (`Sequence[str | int]` of length `rows`):
            The user of each row.
        chosen_rewards (`array_like` of shape `(rows,)`):
            Reward of each chosen answer, in float32 or better (in bf16 close rewards become ties).
        rejected_rewards (`array_like` of shape `(rows,)`):
            Reward of each rejected answer.
        order (`Iterable[str]`, *optional*):
            User ids in the order the table is to have, such as a registry; users not in it follow. Without it, the order of
            first appearance.

    Raises:
        NonFiniteError: A reward is NaN or infinite; names the users.
        DataError: No rows, or another number of ids than of rewards.
    """
    chosen, rejected = np.asarray(chosen_rewards, dtype=float), np.asarray(rejected_rewards, dtype=float)
    ids = [user_id_as_text(user_id, where=f"row {row}") for row, user_id in enumerate(user_ids)]
    if not (chosen.shape == rejected.shape == (len(ids),)) or not ids:
        raise DataError(
            f"{len(ids)} user ids, chosen rewards of shape {chosen.shape} and rejected rewards of shape {rejected.shape} came; "
            "one of each per row is needed, and at least one row."
        )
    bad = np.flatnonzero(~(np.isfinite(chosen) & np.isfinite(rejected)))
    if len(bad):
        users = list(dict.fromkeys(ids[row] for row in bad))
        named = ", ".join(map(repr, users[:5])) + ", ..." * (len(users) > 5)
        raise NonFiniteError(
            f"The rewards of {len(bad)} of {len(ids)} rows are NaN or infinite, so they cannot be compared: user(s) {named}, "
            f"{some_rows(bad.tolist())}. The training of these users (or of all, if all are named) has diverged, or the model's "
            "dtype overflows: load it in float32 or bfloat16, or go back to an earlier checkpoint."
        )

    margins = chosen - rejected
    rows = pd.DataFrame({"user_id": ids, "n": 1, "correct": margins > 0, "ties": margins == 0})
    table = rows.groupby("user_id", sort=False).sum()
    if order is not None:
        known = [user_id for user_id in order if user_id in table.index]
        placed = set(known)
        table = table.loc[known + [user_id for user_id in table.index if user_id not in placed]]
    table = table.astype("int64").reset_index()
    credit = table["correct"] + table["ties"] / 2
    table["accuracy"] = credit / table["n"]
    table["low"], table["high"] = wilson_interval(credit, table["n"])

    return PerUserResult.from_table(table, expected_calibration_error(margins))


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" (95 % {low:.3f} to {high:.3f})"


def _worst_tenth(accuracy: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the least tenth along the last axis."""
    worst = math.ceil(accuracy.shape[-1] / 10)
    return np.partition(accuracy, worst - 1)[..., :worst].mean(-1)


def _interval_of_worst_tenth(accuracy: np.ndarray) -> tuple[float | None, float | None]:
    users = len(accuracy)
    if users < 2:
        return None, None
    error = stats.bootstrap(
        (accuracy,),
        _worst_tenth,
        method="basic",  # its ends are not used: with few users they are too near, as those of all bootstraps of a tail
        n_resamples=BOOTSTRAP_RESAMPLES,
        batch=max(1, 2_000_000 // users),  # all resamples at once would take gigabytes at 100,000 users
        random_state=np.random.default_rng(0),
    ).standard_error
    # the tenth is known from its own users only
    return _around(float(_worst_tenth(accuracy)), float(error), max(math.ceil(users / 10) - 1, 1))


class WidthCalibration(NamedTuple):
    """Whether narrow confidence sets go with right answers; see [`width_calibration`]."""

    table: pd.DataFrame
    users: pd.DataFrame
    gap: float
    gap_low: float | None
    gap_high: float | None


def width_calibration(user_ids: Sequence[str | int], margins: Any, widths: Any) -> WidthCalibration:
    """How accuracy falls with the width of a confidence set: a width that does not go with errors is no use as a penalty.

    Args:
        user_ids (`Sequence[str | int]` of length `rows`):
            The user of each row.
        margins (`array_like` of shape `(rows,)`):
            Reward of `chosen` minus reward of `rejected`; a tie is half right.
        widths (`array_like` of shape `(rows,)`):
            Width (standard deviation) of this difference.

    Returns:
        `WidthCalibration`: `table`, the rows in four quarters by width: `quantile` (upper end), `n`, `accuracy`,
        `mean_std`; `users`, a line per user: `user_id`, `n`, `accuracy_narrow`, `accuracy_wide` (his narrower and his
        wider half; NaN with a single row); `gap`, accuracy in the narrowest minus in the widest quarter, and its 95 %
        interval for users drawn like these ([`jackknife_interval`]; None for a single user, or if one user is all of a quarter).

    Raises:
        DataError: Fewer than 4 rows, or another number of one than of the others.
    """
    margins, widths = np.asarray(margins, dtype=float), np.asarray(widths, dtype=float)
    ids = np.array([user_id_as_text(user_id) for user_id in user_ids], dtype=object)
    if not (margins.shape == widths.shape == ids.shape) or len(ids) < 4:
        raise DataError(
            f"{len(ids)} user ids, margins of shape {margins.shape} and widths of shape {widths.shape} came; one of each per row is "
            "needed, and at least 4 rows for four quarters."
        )
    credit = (np.sign(margins) + 1) / 2
    order = np.argsort(widths, kind="stable")
    quarters = np.array_split(order, 4)
    table = pd.DataFrame(
        {
            "quantile": [0.25, 0.5, 0.75, 1.0],
            "n": [len(rows) for rows in quarters],
            "accuracy": [credit[rows].mean() for rows in quarters],
            "mean_std": [widths[rows].mean() for rows in quarters],
        }
    )
    names, user_of = np.unique(ids.astype(str), return_inverse=True)
    own = np.argsort(user_of[order], kind="stable")  # rows user by user, each from narrow to wide
    lines = []
    for name, rows in zip(names, np.split(order[own], np.cumsum(np.bincount(user_of))[:-1]), strict=True):
        half = len(rows) // 2
        narrow, wide = (credit[rows[:half]].mean(), credit[rows[-half:]].mean()) if half else (np.nan, np.nan)
        lines.append({"user_id": name, "n": len(rows), "accuracy_narrow": narrow, "accuracy_wide": wide})
    gap = float(table["accuracy"].iloc[0] - table["accuracy"].iloc[-1])
    # per user: right and all, in the narrowest and in the widest quarter
    counts = np.stack(
        [
            np.bincount(user_of[rows], weights, len(names))
            for rows in (quarters[0], quarters[-1])
            for weights in (credit[rows], None)
        ]
    )
    return WidthCalibration(table, pd.DataFrame(lines), gap, *_interval_of_gap(counts))


def _interval_of_gap(counts: np.ndarray) -> tuple[float | None, float | None]:
    """`counts` `(4, users)`: right and all in the narrowest quarter, right and all in the widest."""

    def gap(sums: np.ndarray) -> np.ndarray:
        return sums[0] / sums[1] - sums[2] / sums[3]

    sums = counts.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return jackknife_interval(float(gap(sums)[0]), gap(sums - counts))


def evaluate_users(
    model: Any,
    dataset: Dataset,
    processing_class: Any,
    user_column: str = "user_id",
    unseen: str = "raise",
    batch_size: int = 16,
    max_length: int | None = None,
    confidence: Any = None,
) -> PerUserResult:
    """Score every preference row once, each with its user's model, and tell how often `chosen` wins.

    A model without personal parameters (a pooled LoRA, a full reward model) is scored as it is; users then only group the rows.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A sequence classifier with one output. Left in the mode (train or eval) in which it came.
        dataset ([`~datasets.Dataset`]):
            Preference rows: standard, conversational or tokenised.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        unseen (`str`, *optional*, defaults to `"raise"`):
            What happens to users whom the adapter does not know: an error, or with `"common"` they are scored with the common
            model (D = 0), counted in the result and logged.
        batch_size (`int`, *optional*, defaults to 16):
            Rows per forward; each is two sequences.
        max_length (`int`, *optional*):
            Rows with more tokens are left out and counted, as in training; a user who would lose all his rows is an error.
            Whatever remains and is beyond the model's `max_position_embeddings` is an error.
        confidence ([`~trl_sharelora.rewards.UserReward`] or [`~trl_sharelora.pessimism.EllipsoidSets`], *optional*):
            Measures the width of each comparison as well, and adds to the result how accuracy falls with it: a pessimistic
            reward, or the last-layer ellipsoids of this model. One more forward per row.

    Raises:
        UnknownUserError: Users whom the adapter does not know, with `unseen="raise"`; before any forward.
        DataError, UserIdError: See [`~trl_sharelora.data.check_preference_rows`]; or rows are too long.
        ConfigError: A setting is unknown, the model has not one output, or its pad token is not the tokenizer's.
        NonFiniteError: A reward is NaN or infinite; names the users.
    """
    if unseen not in UNSEEN:
        raise ConfigError(f"unseen={unseen!r} is unknown; one of {', '.join(map(repr, UNSEEN))} is needed.")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} came; at least 1 is needed.")
    _check_model(model, processing_class)
    check_preference_rows(dataset, user_column, name="evaluation", users=_users_of(model))

    dataset = dataset.with_format(None)
    users = _users_of(model)
    if users is None:
        ids = list(map(user_id_as_text, dataset[user_column][:]))
    else:
        ids = users.names(dataset[user_column][:])
        unknown = list(dict.fromkeys(user_id for user_id, row in zip(ids, users.find(ids), strict=True) if row < 0))
        if unknown and unseen == "raise":
            raise UnknownUserError(users.unknown_message(unknown))

    rows: list[dict[str, Any]] = [
        {user_column: user_id, **tokenize_preference(row, processing_class)}
        for user_id, row in zip(ids, dataset, strict=True)
    ]
    dropped, numbers = 0, list(range(len(rows)))
    if max_length is not None:
        dropped = check_long_rows(Dataset.from_list(rows), max_length, user_column, name="evaluation")
        numbers = [number for number in numbers if _longest(rows[number]) <= max_length]
        rows = [rows[number] for number in numbers]
    _check_positions(model, rows)

    user_ids = [row[user_column] for row in rows]
    index = None if users is None else torch.tensor(users.find(user_ids))  # (rows,), -1 for an unseen user
    n_unseen = 0 if index is None else int((index < 0).sum())
    if n_unseen:
        logger.warning(
            f"{n_unseen} of {len(user_ids)} evaluation rows are of {len(unknown)} users whom the adapter does not know; they are "
            "scored with the common model."
        )
    chosen, rejected = _score(model, rows, index, unseen, batch_size, processing_class.pad_token_id)
    result = per_user_table(user_ids, chosen, rejected, order=users)
    result.unseen, result.dropped = n_unseen, dropped
    result.rows = pd.DataFrame({"row": numbers, "user_id": user_ids, "margin": chosen - rejected})
    if confidence is not None:
        reward = _pessimistic(model, confidence, processing_class, batch_size, unseen)
        found = width_calibration(user_ids, chosen - rejected, reward.compare(rows, user_ids).std)
        result.calibration, result.calibration_users = found.table, found.users
        result.calibration_gap, result.calibration_gap_low, result.calibration_gap_high = found[2:]
    return result


def _pessimistic(model: Any, confidence: Any, processing_class: Any, batch_size: int, unseen: str) -> "UserReward":
    from .pessimism import EllipsoidSets
    from .rewards import UserReward  # it imports this module

    if isinstance(confidence, EllipsoidSets):
        return UserReward(
            model,
            "ellipsoid",
            sets=confidence,
            processing_class=processing_class,
            batch_size=batch_size,
            unseen=unseen,
        )
    if not isinstance(confidence, UserReward) or confidence.pessimism is None:
        raise ConfigError(
            f"confidence={confidence!r} came; a UserReward with a pessimism, or the EllipsoidSets that fit_confidence returned, is needed."
        )
    return confidence


@dataclass
class Calibration:
    """A pessimism coefficient and what it covers; made by [`calibrate`].

    Args:
        coefficient (`float`):
            For `UserReward(..., pessimism_coefficient=...)`.
        coverage (`float`):
            Share of these comparisons that it covers.
        n (`int`):
            Comparisons.
        table ([`~pandas.DataFrame`]):
            A line per user: `user_id`, `n`, `coverage`, `low` and `high` (95 % Wilson interval). The promise is for all users
            together; here is for whom it does not hold.
        curve ([`~pandas.DataFrame`]):
            `coefficient`, `coverage`: from 0 (accuracy, with ties as covered) to twice the coefficient.
    """

    coefficient: float
    coverage: float
    n: int
    table: pd.DataFrame
    curve: pd.DataFrame

    def __str__(self) -> str:
        worst = self.table.sort_values("coverage", kind="stable", ignore_index=True).head(5)
        worst = worst.assign(user_id=worst["user_id"].map(repr))
        formats = dict.fromkeys(("coverage", "low", "high"), "{:.3f}".format)
        return (
            f"pessimism_coefficient {self.coefficient:.4g} covers {self.coverage:.3f} of {self.n} comparisons; least covered:\n"
            + worst.to_string(index=False, formatters=formats)
        )


def calibrate(
    model_or_path: Any,
    dataset: Dataset,
    coverage: float = 0.9,
    pessimism: str = "ellipsoid",
    *,
    user_column: str = "user_id",
    max_length: int | None = None,
    **options: Any,
) -> Calibration:
    """The pessimism coefficient with which held-out comparisons lie within the confidence sets as often as wanted.

    A comparison is *covered* when some reward in the set agrees with its label: `margin + c * width >= 0`, the width
    being that of the difference of rewards. The coefficient is the least c that covers at least `coverage` of the
    comparisons, by split conformal prediction with its (n + 1) correction
    ([`~trl_sharelora.pessimism.conformal_coefficient`]): a new comparison that is exchangeable with these is covered
    with at least this probability. Two cautions. Covered are *labels*, not true rewards: where labelers err, a high
    coverage asks for sets wider than the truth needs. And the promise is for all users' comparisons together, not for
    each user. (Ours; the paper leaves the radius of its sets as an unknown constant.)

    Args:
        model_or_path ([`~trl_sharelora.rewards.UserReward`], [`~peft.PeftModel`], `str` or a list of paths):
            A pessimistic reward, or what [`~trl_sharelora.rewards.UserReward`] takes to make one.
        dataset ([`~datasets.Dataset`]):
            Comparisons that were used neither for the training nor for the sets.
        coverage (`float`, *optional*, defaults to 0.9):
            Share to cover, between 0 and 1. 0.9 as is usual in conformal prediction.
        pessimism (`str`, *optional*, defaults to `"ellipsoid"`):
            The set, where `model_or_path` is not a reward.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        max_length (`int`, *optional*):
            Comparisons with a longer text are left out and counted in the log, as in training.
        **options:
            Of [`~trl_sharelora.rewards.UserReward`].

    Raises:
        PessimismError: Too few comparisons for this coverage, or widths of 0 where the reward is wrong; or no set.
        DataError, UserIdError, UnknownUserError, NonFiniteError: As [`evaluate_users`].
    """
    from .pessimism import conformal_coefficient
    from .rewards import UserReward  # it imports this module

    if isinstance(model_or_path, UserReward):
        if options:
            raise ConfigError(
                f"{', '.join(options)} came beside a UserReward, which has settings of its own; give one of them."
            )
        reward = model_or_path
    else:
        reward = UserReward(model_or_path, pessimism, **options)
    if reward.pessimism is None:
        raise ConfigError(
            "A reward without pessimism has no width to calibrate; give pessimism='ellipsoid', 'ensemble' or 'ball'."
        )
    if reward.pessimism == "ensemble" and reward.form == "worst":
        raise ConfigError(
            "form='worst' takes the least member whatever the coefficient, so there is none to find. Give form='std' or 'variance'."
        )
    check_preference_rows(dataset, user_column, name="calibration", users=reward.scorer.users)
    tokenizer = reward.scorer.processing_class
    dataset = dataset.with_format(None)
    rows: list[dict[str, Any]] = [
        {user_column: user_id, **tokenize_preference(row, tokenizer)}
        for user_id, row in zip(reward.scorer.users.names(dataset[user_column][:]), dataset, strict=True)
    ]
    if max_length is not None:
        check_long_rows(Dataset.from_list(rows), max_length, user_column, name="calibration")
        rows = [row for row in rows if _longest(row) <= max_length]
    ids = [row[user_column] for row in rows]
    margins, widths = reward.compare(rows, ids)
    margins, widths = margins.double(), widths.double()
    coefficient = conformal_coefficient(margins, widths, coverage)

    def covered(c: float) -> np.ndarray:
        return (margins + c * widths >= 0).numpy()

    table = pd.DataFrame({"user_id": ids, "n": 1, "coverage": covered(coefficient)})
    table = table.groupby("user_id", sort=False).sum().astype("int64").reset_index()
    table["low"], table["high"] = wilson_interval(table["coverage"], table["n"])
    table["coverage"] = table["coverage"] / table["n"]
    grid = np.linspace(0, 2 * coefficient or 1, 21)
    curve = pd.DataFrame({"coefficient": grid, "coverage": [covered(c).mean() for c in grid]})
    return Calibration(coefficient, float(covered(coefficient).mean()), len(ids), table, curve)


def _longest(row: dict[str, Any]) -> int:
    return max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _users_of(model: Any) -> UserRegistry | None:
    """The registry of the active adapter; None for a model without personal parameters."""
    configs = getattr(model, "peft_config", None)
    name = getattr(model, "active_adapter", None)
    return getattr(configs[name], "users", None) if configs and isinstance(name, str) else None


def _check_model(model: Any, processing_class: Any) -> None:
    num_labels = getattr(model.config, "num_labels", None)
    if num_labels != 1:
        raise ConfigError(
            f"The model has num_labels={num_labels}; a reward model has one output. Load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)."
        )
    pad = processing_class.pad_token_id
    model_pad = model.config.get_text_config().pad_token_id
    if pad is None or pad != model_pad:
        # a decoder's reward is read at the last token that is not the pad token of the model's config
        raise ConfigError(
            f"The tokenizer's pad token has the id {pad}, the model's config says {model_pad}; the reward of a padded row would "
            "be read at the wrong token. Set what the model was trained with, as the trainer does: processing_class.pad_token = "
            "processing_class.eos_token if there is none, then model.config.pad_token_id = processing_class.pad_token_id."
        )


def _check_positions(model: Any, rows: list[dict[str, Any]]) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    too_long = [] if positions is None else [number for number, row in enumerate(rows) if _longest(row) > positions]
    if too_long:
        raise DataError(
            f"{len(too_long)} evaluation rows have more tokens than the model has positions ({positions}), the longest "
            f"{max(map(_longest, rows))}: {some_rows(too_long)}. Give max_length={positions} (or less) to leave such rows out and "
            "have them counted, or shorten the texts."
        )


def _score(
    model: Any,
    rows: list[dict[str, Any]],
    user_index: torch.Tensor | None,
    unseen: str,
    batch_size: int,
    pad_token_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of the chosen and of the rejected answers, each `(rows,)`.

    Args:
        rows (`list[dict]`):
            With `chosen_ids` and `rejected_ids`.
        user_index (`torch.Tensor` of shape `(rows,)`, *optional*):
            Rows of the bank, -1 for an unseen user; None for a model without personal parameters.
    """
    # rows of a length together, so that little is computed on padding; the longest first, so that memory runs out at once
    order = sorted(range(len(rows)), key=lambda row: _longest(rows[row]), reverse=True)
    rewards = np.full((2, len(rows)), np.nan)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                # as TRL's collator: all chosen, then all rejected
                sequences = [torch.tensor(rows[row][side]) for side in ("chosen_ids", "rejected_ids") for row in part]
                input_ids = torch.nn.utils.rnn.pad_sequence(sequences, True, pad_token_id).to(
                    model.device
                )  # (batch, seq)
                lengths = torch.tensor([len(sequence) for sequence in sequences])
                mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long().to(model.device)
                inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
                if user_index is None:
                    outputs = model(**inputs)
                else:
                    with use_users(model, user_index[part].repeat(2).to(model.device), unseen=unseen):
                        outputs = model(**inputs)
                rewards[:, part] = outputs.logits.squeeze(-1).float().view(2, len(part)).cpu().numpy()
    finally:
        for module, mode in modes:
            module.training = mode
    return rewards[0], rewards[1]
