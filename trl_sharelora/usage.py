"""Does a reward model use the user? Three looks at it; a model that ignores him fails the first two, the third says whether it can follow him.

Swapped: every comparison is scored with another user's parameters; how much accuracy is lost? Spread: how much of the variance of
the rewards of the same texts is between users? Flipped: a user's labels are turned round and he is fitted again; how many of his
other comparisons turn round too?
"""

import copy
import functools
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel

from .data import TOKEN_COLUMNS, check_preference_rows, tokenize_preference
from .errors import ConfigError, DataError, NonFiniteError
from .evaluation import _check_positions, _longest, mean_interval
from .new_users import fit_users
from .scoring import Scorer


Fit = Callable[[PeftModel, Dataset], Any]

# Half of them are fitted and half are scored.
MIN_FLIPPED = 4
# of a sample of comparisons: 32 users in 512, with 8 to fit and 8 to score where users are fitted again
PER_SAMPLED_USER = 16
# Not "auto", which doubts few answers and leaves who gave them near the common model: that would tell of its caution and not of the model. On
# planted models with 8, 20 and 40 comparisons a user, users who matter turn .50, .38, .28 with this (auto .08, .08, .24), users whose rows
# are all zero .13, .17, .19 (auto .04, .02, .11).
FIT_METHOD = "gauss-newton"


@dataclass
class UsageReport:
    """Whether and how much a reward model uses the user; made by [`user_usage`]. Accuracies are means over users, ties half.

    Args:
        n_users (`int`), n (`int`):
            Users and comparisons that were scored.
        accuracy (`float`):
            Each with his own parameters.
        swapped (`float`):
            Each with another's, mean over the draws.
        common (`float`):
            All with the common model (D = 0).
        drop (`float`), drop_low (`float`, *optional*), drop_high (`float`, *optional*):
            `accuracy - swapped` and its 95 % interval for users drawn like these (Student's t over users, which unlike the percentile
            bootstrap keeps its level with five of them; of a single user, over his comparisons). 0 if the user is not used.
        gain (`float`), gain_low (`float`, *optional*), gain_high (`float`, *optional*):
            `accuracy - common`, likewise.
        changed (`float`):
            Share of comparisons in which another's parameters prefer the other answer, mean over users and draws. Needs no labels.
        reward_share (`float`):
            Share of the variance of rewards that is between users for the same text. It counts what lifts all rewards of a
            user alike, which no comparison sees.
        margin_share (`float`):
            The same of the differences between two answers: mean over pairs of the variance between users, of the mean square. What
            decides; 0 if all users get the same differences.
        variance_users (`int`), variance_comparisons (`int`):
            Over how many the two are.
        flips (`float`, *optional*), flips_low (`float`, *optional*), flips_high (`float`, *optional*):
            Share of a user's held-out comparisons that turn round when the labels he is fitted to do, mean over users, and its 95 %
            interval over users. None if it was not measured.
        flip_users (`int`):
            Users behind it.
        flips_missing (`str`, *optional*):
            Why it was not measured.
        unseen (`int`), dropped (`int`):
            Comparisons of users whom the model does not know, and those longer than `max_length`: part of nothing here.
        sample_of (`int`, *optional*):
            Comparisons of known users that came, if these are a sample of them.
        draws (`int`), seed (`int`):
            How many swaps were made, and what the draws depend on.
        table ([`~pandas.DataFrame`]):
            A line per user: `user_id`, `n`, `accuracy`, `swapped`, `common`, `changed`.
    """

    n_users: int
    n: int
    accuracy: float
    swapped: float
    common: float
    drop: float
    drop_low: float | None
    drop_high: float | None
    gain: float
    gain_low: float | None
    gain_high: float | None
    changed: float
    reward_share: float
    margin_share: float
    variance_users: int
    variance_comparisons: int
    draws: int
    seed: int
    unseen: int = 0
    dropped: int = 0
    sample_of: int | None = None
    flips: float | None = None
    flips_low: float | None = None
    flips_high: float | None = None
    flip_users: int = 0
    flips_missing: str | None = None
    table: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)

    @property
    def verdict(self) -> str:
        """One sentence: what the swap tells."""
        by = f"{_points(self.drop)}{_between(self.drop_low, self.drop_high)}"
        if self.changed == 0:
            return "It does not use the user: with another user's parameters every comparison comes out the same."
        if self.drop_low is not None and self.drop_low > 0:
            return f"It uses the user: with another user's parameters accuracy falls by {by}."
        if self.drop_high is not None and self.drop_high < 0:
            return (
                f"Another user's parameters serve users better than their own (accuracy falls by {by}): are ids or rows mixed up, or was "
                "it trained on too few comparisons for too long?"
            )
        return f"That it uses the user cannot be told from these comparisons: with another user's parameters accuracy falls by {by}."

    def as_dict(self) -> dict[str, Any]:
        """The scalars and the verdict, for a JSON file; what is not a number there is None."""
        values = {name: value for name, value in vars(self).items() if not isinstance(value, pd.DataFrame)}
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        return {**finite, "verdict": self.verdict}

    def __str__(self) -> str:
        lines = [
            f"{self.n_users} users, {self.n} comparisons"
            + (f" (drawn from {self.sample_of})" if self.sample_of else "")
            + f", {self.draws} swap(s)"
            + (f", {self.unseen} of unseen users left out" if self.unseen else "")
            + (f", {self.dropped} too long and left out" if self.dropped else ""),
            self.verdict,
            f"accuracy  own parameters {self.accuracy:.3f}  another user's {self.swapped:.3f}  common model {self.common:.3f}",
            f"own minus common {_points(self.gain)}{_between(self.gain_low, self.gain_high)}",
            f"another user's parameters prefer the other answer in {self.changed:.1%} of the comparisons",
            f"variance between users for the same texts: {_share(self.reward_share)} of rewards, {_share(self.margin_share)} of "
            f"differences ({self.variance_users} users, {self.variance_comparisons} comparisons)",
            self._flips(),
        ]
        return "\n".join(lines)

    def _flips(self) -> str:
        if self.flips is None:
            return f"flipped labels: not measured ({self.flips_missing})"
        ends = "" if self.flips_low is None else f" (95 % {self.flips_low:.1%} to {self.flips_high:.1%})"
        return f"flipped labels: fitted to them, {self.flips:.1%}{ends} of the other comparisons of {self.flip_users} users turn round"


def usage_card(report: UsageReport) -> str:
    """The section of a model card: the verdict and the numbers behind it, in Markdown.

    Args:
        report ([`UsageReport`]):
            Of the model.
    """
    flips = (
        f"not measured ({report.flips_missing})"
        if report.flips is None
        else f"{report.flips:.1%}{_between_shares(report.flips_low, report.flips_high)} of {report.flip_users} users"
    )
    rows = {
        "accuracy with the user's own parameters": f"{report.accuracy:.1%}",
        "with another user's parameters": f"{report.swapped:.1%} ({report.draws} swaps)",
        "with the common model": f"{report.common:.1%}",
        "lost by the swap": f"{_points(report.drop)}{_between(report.drop_low, report.drop_high)}",
        "own minus common": f"{_points(report.gain)}{_between(report.gain_low, report.gain_high)}",
        "comparisons that another user's parameters decide otherwise": f"{report.changed:.1%}",
        "variance of rewards between users, same texts": _share(report.reward_share),
        "the same of differences between two answers": _share(report.margin_share),
        "held-out comparisons that turn round when a user's labels do": flips,
    }
    lines = ["## Does it use the user?", "", report.verdict, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += [
        "",
        f"Means over {report.n_users} users, {report.n} held-out comparisons"
        + (f", drawn from {report.sample_of}" if report.sample_of else "")
        + "; intervals are 95 %, over users (`trl-sharelora usage`).",
    ]
    return "\n".join(lines) + "\n"


def user_usage(
    model: PeftModel,
    dataset: Dataset,
    processing_class: Any,
    *,
    user_column: str = "user_id",
    batch_size: int = 16,
    max_length: int | None = None,
    max_comparisons: int | None = None,
    draws: int = 5,
    sample_users: int = 16,
    sample_comparisons: int = 64,
    flip_users: int = 8,
    fit: Fit | None = None,
    seed: int = 0,
) -> UsageReport:
    """Whether and how much a reward model uses the user.

    Costs `draws + 2` times scoring the comparisons, `sample_users * sample_comparisons` comparisons more, and the fitting of
    `2 * flip_users` users. The model is left as it came.

    Args:
        model ([`~peft.PeftModel`]):
            A ShareLoRA reward model.
        dataset ([`~datasets.Dataset`]):
            Comparisons that it was not trained on, of at least one user whom it knows. (On its training data the first and the
            last look are too good.)
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        batch_size (`int`, *optional*, defaults to 16):
            Texts per forward.
        max_length (`int`, *optional*):
            Comparisons with more tokens are left out and counted.
        max_comparisons (`int`, *optional*):
            Look at no more than this many, of users drawn at random, of each at most 16 (what is said of users needs many of them, and
            refitting one needs some of his), or their equal share if they are few. By default all.
        draws (`int`, *optional*, defaults to 5):
            How often users are swapped. In each draw every user gets another's parameters, and never the same one's twice; at most
            one less than there are users. Each costs as much as scoring the comparisons.
        sample_users (`int`, *optional*, defaults to 16), sample_comparisons (`int`, *optional*, defaults to 64):
            At most so many, at random, for the shares of variance.
        flip_users (`int`, *optional*, defaults to 8):
            At most so many users, at random, are fitted again, of those with at least 4 comparisons here; 0 leaves it out. Half of
            a user's comparisons are fitted once as they are and once turned round, with the shared part frozen; the other half are
            scored.
        fit (`Callable`, *optional*):
            `fit(model, comparisons)` gives the users of `comparisons` (all new, column `user_column`) parameters fitted to these,
            in place; it gets a copy of the model. By default
            [`~trl_sharelora.new_users.fit_users`] with `method="gauss-newton"`, which needs no trained users and takes the answers at their
            word. That a refitted user can be moved does not mean that the trained ones differ: the swap tells that.
        seed (`int`, *optional*, defaults to 0):
            Of what is drawn.

    Raises:
        DataError: No comparison of a known user, or there is only one user; or see
            [`~trl_sharelora.data.check_preference_rows`].
        ConfigError: A number is out of range, or it is no ShareLoRA reward model.
        NonFiniteError: A reward is NaN or infinite; names the users.
    """
    counts = {"draws": (draws, 1), "sample_users": (sample_users, 2), "flip_users": (flip_users, 0)}
    if max_comparisons is not None:
        counts["max_comparisons"] = (max_comparisons, 1)
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} came; a whole number of at least {least} is needed.")
    if sample_comparisons < 1:
        raise ConfigError(f"sample_comparisons={sample_comparisons} came; at least 1 is needed.")
    scorer = Scorer(model, processing_class, batch_size)
    check_preference_rows(dataset, user_column, name="usage", users=scorer.users)
    dataset = dataset.with_format(None)
    owners = np.array(scorer.users.find(dataset[user_column][:]))
    rng = np.random.default_rng(seed)
    known = int((owners >= 0).sum())
    sample_of = None
    if max_comparisons is not None and known > max_comparisons:
        some, sample_of = _some_of_some(owners, max_comparisons, rng), known
        dataset, owners = dataset.select(some), owners[some]
    pairs = [tokenize_preference(row, processing_class) for row in dataset]
    kept = [row for row, pair in enumerate(pairs) if max_length is None or _longest(pair) <= max_length]
    places = [row for row in kept if owners[row] >= 0]
    if not places:
        raise DataError(
            f"None of the {len(kept)} comparisons is of a user whom the model knows ({len(scorer.users)} users), so there is nothing to "
            "swap. Give held-out comparisons of the users it was trained on; is the user column the right one?"
        )
    pairs, index = [pairs[row] for row in places], np.array([owners[row] for row in places])
    _check_positions(model, pairs)
    users = np.unique(index)
    # who can be swapped with: those of the comparisons, or for a single one all whom the model knows
    circle = (
        users if len(users) > 1 else np.array([row for row, user_id in enumerate(scorer.users) if user_id is not None])
    )
    if len(circle) < 2:
        raise DataError("The model knows one user, so there is nobody to swap him with.")

    margins = _Margins(scorer, pairs)
    own, common = margins(index), margins(np.full_like(index, -1))
    swaps = [margins(partner[index]) for partner in _swaps(circle, draws, rng)]
    of_user = pd.Series(index)

    def per_user(values: np.ndarray) -> np.ndarray:
        return pd.Series(values).groupby(of_user).mean().to_numpy()

    changed = np.mean([np.abs(np.sign(own) - np.sign(swap)) / 2 for swap in swaps], axis=0)
    credit = {
        "accuracy": _credit(own),
        "swapped": np.mean([_credit(swap) for swap in swaps], axis=0),
        "common": _credit(common),
    }
    table = pd.DataFrame(
        {
            "user_id": [scorer.users[row] for row in users.tolist()],
            "n": of_user.groupby(of_user).size().to_numpy(),
            **{name: per_user(values) for name, values in credit.items()},
            "changed": per_user(changed),
        }
    )
    differences: dict[str, Any] = {}
    for name, other in (("drop", "swapped"), ("gain", "common")):
        of_users = (table["accuracy"] - table[other]).to_numpy()
        sample = of_users if len(users) > 1 else credit["accuracy"] - credit[other]
        differences |= {name: float(of_users.mean()), **_ends(name, mean_interval(sample))}

    some_users = rng.permutation(circle)[:sample_users]
    some_pairs = rng.permutation(len(pairs))[:sample_comparisons]
    shares = _shares(scorer, [pairs[place] for place in some_pairs], some_users)
    report = UsageReport(
        n_users=len(users),
        n=len(pairs),
        accuracy=float(table["accuracy"].mean()),
        swapped=float(table["swapped"].mean()),
        common=float(table["common"].mean()),
        changed=float(table["changed"].mean()),
        **differences,
        reward_share=shares[0],
        margin_share=shares[1],
        variance_users=len(some_users),
        variance_comparisons=len(some_pairs),
        draws=len(swaps),
        seed=seed,
        unseen=len(kept) - len(places),
        dropped=len(dataset) - len(kept),
        sample_of=sample_of,
        table=table,
    )
    _add_flips(report, scorer, dataset.select(places), index, pairs, user_column, flip_users, fit, rng)
    return report


def _some_of_some(owners: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Places of at most `most` comparisons of known users, whole users' samples at a time as far as they fit."""
    chosen: list[np.ndarray] = []
    users = rng.permutation(np.unique(owners[owners >= 0]))
    each = max(PER_SAMPLED_USER, math.ceil(most / len(users)))
    for user in users:
        own = rng.permutation(np.flatnonzero(owners == user))[:each]
        chosen.append(own[: most - sum(map(len, chosen))])
        if sum(map(len, chosen)) == most:
            break
    return np.sort(np.concatenate(chosen))


def _credit(margins: np.ndarray) -> np.ndarray:
    return (np.sign(margins) + 1) / 2


class _Margins:
    """Reward of `chosen` minus that of `rejected` of some comparisons, with any users' parameters; -1 is the common model."""

    def __init__(self, scorer: Scorer, pairs: Sequence[dict[str, list[int]]]):
        self.scorer, self.pairs = scorer, pairs
        self.sequences = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in pairs]

    def rewards(self, index: np.ndarray) -> np.ndarray:
        """`(2, comparisons)` in float64."""
        rewards = self.scorer.rewards(self.sequences, torch.from_numpy(np.tile(index, 2))).double().cpu().numpy()
        rewards = rewards.reshape(2, -1)
        bad = ~np.isfinite(rewards).all(0)
        if bad.any():
            rows = np.unique(index[bad]).tolist()
            named = ", ".join(repr(self.scorer.users[row]) if row >= 0 else "the common model" for row in rows[:5])
            raise NonFiniteError(
                f"The rewards of {int(bad.sum())} of {len(self.pairs)} comparisons are NaN or infinite with the parameters of {named}"
                f"{', ...' * (len(rows) > 5)}: their training has diverged, or the base's dtype overflows. Go back to an earlier checkpoint, "
                "or load it in float32."
            )
        return rewards

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """`(comparisons,)`."""
        chosen, rejected = self.rewards(index)
        return chosen - rejected


def _swaps(users: np.ndarray, draws: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Per draw a map row -> row of another user: the users stand in a circle in random order and move on."""
    circle = rng.permutation(users)
    maps = []
    for step in rng.permutation(np.arange(1, len(circle)))[:draws]:
        partner = np.full(circle.max() + 1, -1)
        partner[circle] = np.roll(circle, -step)
        maps.append(partner)
    return maps


def _shares(scorer: Scorer, pairs: Sequence[dict[str, list[int]]], users: np.ndarray) -> tuple[float, float]:
    """Of the variance of rewards, and of the mean square of their differences, what is between users."""
    margins = _Margins(scorer, pairs)
    rewards = np.stack([margins.rewards(np.full(len(pairs), user)) for user in users])  # (users, 2, pairs)
    total = rewards.var()
    differences = rewards[:, 0] - rewards[:, 1]
    # around 0 and not around a mean, which depends on which of the two answers is called the first
    square = np.mean(differences**2)
    return (
        float(rewards.var(0).mean() / total) if total else math.nan,
        float(differences.var(0).mean() / square) if square else math.nan,
    )


def _add_flips(
    report: UsageReport,
    scorer: Scorer,
    dataset: Dataset,
    index: np.ndarray,
    pairs: Sequence[dict[str, list[int]]],
    user_column: str,
    flip_users: int,
    fit: Fit | None,
    rng: np.random.Generator,
) -> None:
    candidates = [
        row for row, count in zip(*np.unique(index, return_counts=True), strict=True) if count >= MIN_FLIPPED
    ]
    chosen = rng.permutation(candidates)[:flip_users].tolist()
    if fit is None:
        fit = functools.partial(
            fit_users, processing_class=scorer.processing_class, user_column=user_column, method=FIT_METHOD
        )
    if not flip_users:
        report.flips_missing = "not asked for"
    elif not chosen:
        report.flips_missing = f"no user has {MIN_FLIPPED} comparisons here"
    if report.flips_missing:
        return
    rows: list[dict[str, Any]] = []
    scored: list[np.ndarray] = []
    name = uuid.uuid4().hex  # nobody's id
    for row in chosen:
        own = rng.permutation(np.flatnonzero(index == row))
        fitted, rest = own[: len(own) // 2], own[len(own) // 2 :]
        scored.append(rest)
        for place in fitted.tolist():
            comparison = dataset[place]
            rows.append({**comparison, user_column: f"{name}-{row}-as-they-are"})
            rows.append({**_turned(comparison), user_column: f"{name}-{row}-turned"})
    model = _copied(scorer.model)
    fit(model, Dataset.from_list(rows))
    fitted_scorer = Scorer(model, scorer.processing_class, scorer.batch_size)
    places = np.concatenate(scored)
    owners = np.repeat(chosen, [len(part) for part in scored])
    margins = _Margins(fitted_scorer, [pairs[place] for place in places])
    signs = []
    for side in ("as-they-are", "turned"):
        found = fitted_scorer.users.find([f"{name}-{row}-{side}" for row in owners.tolist()])
        if min(found) < 0:
            raise ConfigError(
                "`fit` did not add the users of its comparisons to the model. Let it call add_users, or fit_users."
            )
        signs.append(np.sign(margins(np.array(found))))
    turned = pd.Series(np.abs(signs[0] - signs[1]) / 2).groupby(owners).mean().to_numpy()
    report.flips, report.flip_users = float(turned.mean()), len(chosen)
    low, high = mean_interval(turned)
    if low is not None and high is not None:
        report.flips_low, report.flips_high = max(low, 0.0), min(high, 1.0)


def _turned(comparison: dict[str, Any]) -> dict[str, Any]:
    turned = dict(comparison)
    for chosen, rejected in (("chosen", "rejected"), *TOKEN_COLUMNS):
        if chosen in comparison:
            turned[chosen], turned[rejected] = comparison[rejected], comparison[chosen]
    return turned


def _copied(model: PeftModel) -> PeftModel:
    """A copy with adapters of its own, on the same base weights."""
    base = {
        id(parameter): parameter
        for name, parameter in model.named_parameters()
        if ".sharelora_" not in name and ".modules_to_save." not in name
    }
    return copy.deepcopy(model, base)


def _ends(name: str, interval: tuple[float | None, float | None]) -> dict[str, float | None]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" (95 % {100 * low:+.1f} to {100 * high:+.1f})"


def _between_shares(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" (95 % {low:.1%} to {high:.1%})"


def _share(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.1%}"
