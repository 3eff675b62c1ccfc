"""Several methods on one data set: accuracies with intervals, paired gains, one table.

A run is one method with one seed, scored on the same comparisons as all others; what it leaves is the margin (reward of the chosen answer
minus that of the rejected one) of every comparison, at the best checkpoint and at the last. Everything here follows from those.

Three kinds of interval, all at 95 %, because they answer different questions:

- over seeds (Student's t): would another seed, and with one data set per seed another world, show the same?
- over users (Student's t, which keeps its level with five users, where a bootstrap covers .8): would other users of this kind?
- over comparisons (bootstrap within each user, paired): would other answers of the same users? With five labelers, the paper's case, this
  is the one; the paper itself gives none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .errors import MethodError
from .evaluation import LEVEL, PerUserResult, mean_interval, wilson_interval


CHECKPOINTS = ("last", "best")
RESULT_FILE = "result.json"
MARGINS_FILE = "margins.parquet"
RESAMPLES = 2000  # of every bootstrap; between seeds the ends move by less than a tenth of the width


@dataclass
class Run:
    """One method, one seed.

    Args:
        method (`str`), seed (`int`):
            Which.
        settings (`dict`):
            What it was trained with.
        history (`list[dict]`):
            `done` (share of the training), `stage`, `macro`, `micro` of each evaluation on the data that choose the best checkpoint.
        margins (`pd.DataFrame`):
            `row`, `user_id`, `best`, `last`: of every reported comparison, in units of reward.
    """

    method: str
    seed: int
    settings: dict[str, Any]
    history: list[dict[str, float]]
    margins: pd.DataFrame = field(repr=False)

    def save(self, folder: Path) -> None:
        """Write `margins.parquet` and, last, `result.json`: a folder with a result is a whole one."""
        folder.mkdir(parents=True, exist_ok=True)
        self.margins.to_parquet(folder / MARGINS_FILE, index=False)
        values = {"method": self.method, "seed": self.seed, "settings": self.settings, "history": self.history}
        part = folder / f"{RESULT_FILE}.part"
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / RESULT_FILE)

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Read what [`save`] wrote.

        Raises:
            MethodError: a file is missing or torn.
        """
        try:
            values = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
            return cls(**values, margins=pd.read_parquet(folder / MARGINS_FILE))
        except (OSError, ValueError, TypeError) as error:
            raise MethodError(
                f"{folder} does not hold a whole result ({error}). Remove the folder; the run is made again then."
            ) from None


def credits(margins: pd.Series) -> pd.Series:
    """1 for a comparison that is right, a half for a tie, else 0."""
    return (margins > 0) + (margins == 0) / 2


def summarise(runs: Sequence[Run], checkpoint: str, worlds: bool = False) -> dict[str, Any]:
    """The accuracies of one method: a cell of the table.

    Args:
        runs (`Sequence[Run]`):
            Of one method, one per seed.
        checkpoint (`str`):
            `"last"` or `"best"`.
        worlds (`bool`, *optional*, defaults to `False`):
            Whether each seed has data of its own; then users of different seeds are different users.

    Returns:
        `dict`: `macro` (mean over users, then seeds) with `low` and `high` over seeds (of one seed: over each user's comparisons, by
        bootstrap; None if that cannot be told), `macro_by_seed`, `micro`, and `users` with `accuracy`, `n`, `low`, `high` (Wilson) each.
    """
    tables = [_credits_of_users(run, checkpoint) for run in runs]
    by_seed = [float(table["accuracy"].mean()) for table in tables]
    if worlds:
        tables = [
            table.set_axis([f"{run.seed}/{user}" for user in table.index])
            for run, table in zip(runs, tables, strict=True)
        ]
        users = pd.concat(tables)
    else:
        users = pd.concat(tables).groupby(level=0, sort=False).mean()
    micro = float((users["accuracy"] * users["n"]).sum() / users["n"].sum())
    low, high = mean_interval(by_seed)
    if low is None:
        one = runs[0].margins
        low, high = _bootstrap_within(
            pd.DataFrame({"user": one["user_id"].astype(str), "d": credits(one[checkpoint])})
        )
    lows, highs = wilson_interval(users["accuracy"] * users["n"], users["n"])
    cells = {
        str(user): {"accuracy": float(a), "n": int(n), "low": float(lo), "high": float(hi)}
        for user, a, n, lo, hi in zip(users.index, users["accuracy"], users["n"], lows, highs, strict=True)
    }
    return {
        "macro": float(np.mean(by_seed)),
        "low": low,
        "high": high,
        "macro_by_seed": by_seed,
        "micro": micro,
        "users": cells,
    }


def gain(runs: Sequence[Run], baseline: Sequence[Run], checkpoint: str, worlds: bool = False) -> dict[str, Any]:
    """Macro accuracy of one method minus that of another, seed by seed and comparison by comparison.

    What each interval covers, and what it holds fixed:

    - `seeds`: the gain of a run with another seed, for these users and comparisons (with `worlds`: for a world of its own). Student's t
      over the seeds' gains; needs two seeds, and three to be of use (t is 12.7 with two, 4.3 with three).
    - `users`: the mean gain of other users drawn like these, with as many comparisons each and the seeds that were run. Student's t over
      users' gains, each the mean over his comparisons and the seeds.
    - `comparisons`: the gain of these users, with these runs, on other comparisons of theirs. Bootstrap within each user.

    None of them covers two of these at once. A claim about new users by any run needs both `seeds` and `users` away from 0.

    Args:
        runs (`Sequence[Run]`), baseline (`Sequence[Run]`):
            Of the same seeds.
        checkpoint (`str`):
            `"last"` or `"best"`.
        worlds (`bool`, *optional*, defaults to `False`):
            As in [`summarise`].

    Returns:
        `dict`: `gain`, `by_seed`, and the ends `seeds`, `users`, `comparisons` of three intervals (`[low, high]`, or None).

    Raises:
        MethodError: the two do not have the same seeds, or were not scored on the same comparisons.
    """
    others = {run.seed: run for run in baseline}
    if [run.seed for run in runs] != list(others):
        raise MethodError(
            f"{runs[0].method} has the seeds {[run.seed for run in runs]}, {baseline[0].method} {list(others)}; a paired comparison needs "
            "the same ones."
        )
    differences = []
    for run in runs:
        mine, theirs = run.margins, others[run.seed].margins
        if not mine[["row", "user_id"]].equals(theirs[["row", "user_id"]]):
            raise MethodError(
                f"{run.method} and {others[run.seed].method} (seed {run.seed}) were not scored on the same comparisons. Give them the same "
                "data and max_length."
            )
        difference = credits(mine[checkpoint]) - credits(theirs[checkpoint])
        names = mine["user_id"].astype(str)
        differences.append(
            pd.DataFrame({"user": f"{run.seed}/" + names if worlds else names, "row": mine["row"], "d": difference})
        )
    by_seed = [float(part.groupby("user")["d"].mean().mean()) for part in differences]
    whole = pd.concat(differences)
    if not worlds:  # the same comparison under several seeds is one comparison
        whole = whole.groupby(["user", "row"], as_index=False)["d"].mean()
    of_users = whole.groupby("user")["d"].mean().tolist()
    return {
        "gain": float(np.mean(by_seed)),
        "by_seed": by_seed,
        "seeds": _ends(mean_interval(by_seed)),
        "users": _ends(mean_interval(of_users)),
        "comparisons": _ends(_bootstrap_within(whole)),
    }


def compare_results(
    results: Sequence[PerUserResult], baseline: Sequence[PerUserResult], names: tuple[str, str] = ("model", "baseline")
) -> dict[str, Any]:
    """[`gain`] between models that [`~trl_sharelora.evaluation.evaluate_users`] has scored on the same rows.

    Args:
        results (`Sequence[PerUserResult]`), baseline (`Sequence[PerUserResult]`):
            Of each seed one, in the same order; a single model is a list of one, which leaves the interval over seeds out.
        names (`tuple[str, str]`, *optional*):
            Of the two, for messages.

    Returns:
        `dict`: As [`gain`].

    Raises:
        MethodError: a result was not made by `evaluate_users`, or they are not of as many seeds or of the same rows.
    """
    runs: list[list[Run]] = []
    for name, several in zip(names, (results, baseline), strict=True):
        of_name = []
        for seed, result in enumerate(several):
            if result.rows is None:
                raise MethodError(
                    f"A result of {name!r} has no rows, so it cannot be paired. Give what evaluate_users returns, not a table."
                )
            margins = result.rows.rename(columns={"margin": "last"}).assign(best=result.rows["margin"])
            of_name.append(Run(name, seed, {}, [], margins))
        runs.append(of_name)
    if not runs[0] or not runs[1]:
        raise MethodError(f"{len(runs[0])} and {len(runs[1])} results came; at least one of each is needed.")
    return gain(runs[0], runs[1], "last")


def compare_runs(runs: dict[str, list[Run]], baseline: str, worlds: bool = False) -> dict[str, Any]:
    """All methods beside each other: what `comparison.json` holds under `methods` and `gains`.

    Args:
        runs (`dict[str, list[Run]]`):
            The runs of each method, ordered by seed.
        baseline (`str`):
            The method that gains are over; left out where it is not among the methods.
        worlds (`bool`, *optional*, defaults to `False`):
            As in [`summarise`].
    """
    methods = {
        name: {
            "seeds": [run.seed for run in of_method],
            "learning_rate": of_method[0].settings.get("learning_rate"),
            **{checkpoint: summarise(of_method, checkpoint, worlds) for checkpoint in CHECKPOINTS},
        }
        for name, of_method in runs.items()
    }
    gains = {}
    if baseline in runs:
        for name in runs:
            if name != baseline:
                gains[name] = {c: gain(runs[name], runs[baseline], c, worlds) for c in CHECKPOINTS}
    return {"methods": methods, "baseline": baseline, "gains": gains}


def as_markdown(comparison: dict[str, Any], checkpoint: str = "last") -> str:
    """The table of methods, in percent.

    Args:
        comparison (`dict`):
            Of [`compare_runs`].
        checkpoint (`str`, *optional*, defaults to `"last"`):
            The one that gains are shown for.
    """
    lines = [
        f"| method | seeds | last | best | users' worst | gain over {comparison['baseline']} ({checkpoint}) | over seeds | over users | over "
        "comparisons |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f}"

    def interval(ends: list[float] | None) -> str:
        return "" if ends is None else f"[{100 * ends[0]:+.2f}, {100 * ends[1]:+.2f}]"

    for name, cells in comparison["methods"].items():
        found = comparison["gains"].get(name, {}).get(checkpoint)
        worst = min(cell["accuracy"] for cell in cells[checkpoint]["users"].values())
        parts = [
            name,
            str(len(cells["seeds"])),
            percent(cells["last"]["macro"]),
            percent(cells["best"]["macro"]),
            percent(worst),
        ]
        if found is None:
            parts += ["", "", "", ""]
        else:
            parts += [
                f"{100 * found['gain']:+.2f}",
                *(interval(found[kind]) for kind in ("seeds", "users", "comparisons")),
            ]
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines)


def _credits_of_users(run: Run, checkpoint: str) -> pd.DataFrame:
    frame = pd.DataFrame({"user": run.margins["user_id"].astype(str), "credit": credits(run.margins[checkpoint])})
    return frame.groupby("user", sort=False)["credit"].agg(accuracy="mean", n="size")


def _ends(interval: tuple[float | None, float | None]) -> list[float] | None:
    return None if interval[0] is None or interval[1] is None else [interval[0], interval[1]]


def _bootstrap_within(differences: pd.DataFrame) -> tuple[float | None, float | None]:
    """Of the mean over users of the mean over each user's comparisons, these drawn anew."""
    rng = np.random.default_rng(0)
    groups = [group.to_numpy() for _, group in differences.groupby("user")["d"]]
    if max(map(len, groups)) < 2:
        return None, None
    # a mean of n draws with replacement, all resamples of a user at once
    means = np.mean(
        [group[rng.integers(len(group), size=(RESAMPLES, len(group)))].mean(1) for group in groups], axis=0
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
