"""docs/results.md and its pictures, from the figures of benchmarks/real_data.py."""

import gzip
import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np


matplotlib.use("Agg")
from matplotlib import pyplot as plt

from trl_sharelora import check_data
from trl_sharelora.evaluation import mean_interval


COMMON = ("common head", "common LoRA")
SHRUNK = "ShareLoRA B, shrunk"
PRIOR = "common head + learned prior"  # what shrink_users learns, without LoRA: shown, and no baseline
# All that there is; what no file has yet is named on the page.
METHODS = (
    "popularity",
    *COMMON,
    "common head + own ridge",
    "low-rank basis + user weights",
    PRIOR,
    "LoRA per user",
    "ShareLoRA B (paper)",
    "ShareLoRA B, A_0 trained",
    "ShareLoRA A, B_0 trained",
    "ShareLoRA AB",
    SHRUNK,
)
Counts = dict[str, tuple[float, int]]  # right answers and answers by user
TITLES = {"seen": "new pairs of known users", "new_items": "known users, new statements or prompts"}
COLOURS = ("#5f6368", "#9aa0a6", "#7baaf7", "#f29900", "#188038", "#c5221f", "#0b3d91", "#a142f4")


class Difference(NamedTuple):
    """Points of mean accuracy over users, with 95 % Student intervals."""

    mean: float
    users: tuple[float, float]  # over users, each his mean over seeds
    seeds: tuple[float, float]  # over seeds; NaN for one

    def __str__(self) -> str:
        if not np.isfinite(self.mean):  # no seed has both
            return ""
        over_seeds = f" [{self.seeds[0]:+.1f}, {self.seeds[1]:+.1f}]" if np.isfinite(self.seeds[0]) else ""
        return f"{self.mean:+.2f} [{self.users[0]:+.1f}, {self.users[1]:+.1f}]{over_seeds}"


def _accuracies(counts: Iterable[Counts]) -> list[dict[str, float]]:
    return [{user: right / n for user, (right, n) in one.items()} for one in counts]


def _interval(groups: Iterable[list[float]]) -> tuple[float, float]:
    """95 % of the mean over groups, each its mean; NaN for one group."""
    low, high = mean_interval([float(np.mean(one)) for one in groups])
    return (np.nan, np.nan) if low is None or high is None else (low, high)


class View:
    """One file asked one question: right answers by method, seed and user.

    Args:
        results (`list[dict]`): One per seed.
    """

    def __init__(self, results: list[dict[str, Any]]):
        self.set, self.view = results[0]["set"], results[0]["view"]
        self.seeds = len(results)
        self.rows = results[0]["rows"]
        self.methods = [name for name in METHODS if any(name in one["methods"] for one in results)]
        of = {name: [one for one in results if name in one["methods"]] for name in self.methods}
        # what takes long has fewer seeds: it is compared on these, and neither the best nor chosen
        self.partly = {name: len(those) for name, those in of.items() if len(those) < len(results)}
        self.counts, self.validations = (
            {name: {one["seed"]: one["methods"][name][part] for one in those} for name, those in of.items()}
            for part in ("test", "validation_counts")
        )
        self.validation = {
            name: float(np.mean([one["methods"][name]["validation"] for one in those])) for name, those in of.items()
        }
        self.settings = {name: [one["methods"][name]["settings"] for one in those] for name, those in of.items()}
        self.shared = [name for name in self.methods if name.startswith("ShareLoRA")]
        self.baselines = [name for name in self.methods if name not in (*self.shared, PRIOR, *self.partly)]
        if not self.shared or not any(name in self.baselines for name in COMMON):
            raise ValueError(
                f"{self.set}, {self.view}: a comparison needs a common model in all seeds and a ShareLoRA form."
            )
        self.chosen = self._choice(results[0]["seed"])
        self.best = max(self.baselines, key=self.accuracy)
        self.common = max((name for name in COMMON if name in self.baselines), key=self.accuracy)

    def _choice(self, seed: int) -> str:
        """The form of ShareLoRA with the best validation, on the first seed, among those that beat [`SHRUNK`] there by an interval over users that excludes zero;
        else that one."""
        forms = [name for name in self.shared if name not in self.partly] or self.shared
        first = {name: {seed: counts[seed]} for name, counts in self.validations.items() if seed in counts}
        if SHRUNK not in first or SHRUNK in self.partly:
            return max(forms, key=self.validation.__getitem__)
        better = {
            name: found.mean
            for name in forms
            if name in first and name != SHRUNK and (found := self._paired(first, name, SHRUNK)).users[0] > 0
        }
        return max(better, key=better.__getitem__, default=SHRUNK)

    def by_seed(self, method: str) -> list[dict[str, float]]:
        return _accuracies(self.counts[method].values())

    def accuracy(self, method: str) -> float:
        return float(np.mean([np.mean(list(one.values())) for one in self.by_seed(method)]))

    def micro(self, method: str) -> float:
        pairs = [np.sum(list(one.values()), axis=0) for one in self.counts[method].values()]
        return float(np.mean([right / n for right, n in pairs]))

    def worst_tenth(self, method: str) -> float:
        lists = [sorted(one.values()) for one in self.by_seed(method)]
        return float(np.mean([np.mean(one[: max(1, round(len(one) / 10))]) for one in lists]))

    def interval(self, method: str) -> tuple[float, float]:
        own = defaultdict(list)
        for one in self.by_seed(method):
            for user, accuracy in one.items():
                own[user].append(accuracy)
        low, high = _interval(own.values())
        return 100 * low, 100 * high

    def difference(self, method: str, other: str) -> Difference:
        return self._paired(self.counts, method, other)

    @staticmethod
    def _paired(counts: dict[str, dict[int, Counts]], method: str, other: str) -> Difference:
        own: dict[str, list[float]] = defaultdict(list)
        seeds = []
        both = [seed for seed in counts[method] if seed in counts[other]]
        if not both:
            nothing = (np.nan, np.nan)
            return Difference(np.nan, nothing, nothing)
        pairs = (_accuracies(counts[name][seed] for seed in both) for name in (method, other))
        for one, two in zip(*pairs, strict=True):
            for user in one:
                own[user].append(100 * (one[user] - two[user]))
            seeds.append(100 * float(np.mean([one[user] - two[user] for user in one])))
        return Difference(float(np.mean(seeds)), _interval(own.values()), _interval([[one] for one in seeds]))


def verdict(difference: Difference) -> str:
    """What the two intervals say together: a difference must be clear over users and, if there are several, over splits."""
    intervals = [one for one in (difference.users, difference.seeds) if np.isfinite(one[0])]
    if not intervals:
        return ""
    if all(low > 0 for low, _ in intervals):
        return "better"
    return "worse" if all(high < 0 for _, high in intervals) else "level"


def _over_seeds(settings: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Every value a setting has on some seed, in the order of the seeds."""
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: [one[name] for one in settings if name in one] for name in names}
    return {name: list(dict.fromkeys(str(v) if isinstance(v, bool) else v for v in of)) for name, of in values.items()}


def table(view: View) -> str:
    lines = [
        "| method | validation | accuracy [over users] | micro | worst tenth | over the common model [over users] [over splits] | setting |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in view.methods:
        low, high = view.interval(name)
        mark = " **chosen**" if name == view.chosen else ""
        mark += f" ({view.partly[name]} of {view.seeds} seeds)" if name in view.partly else ""
        gain = "" if name == view.common else str(view.difference(name, view.common))
        hidden = ("share", "train_common", "personal_head")
        settings = ", ".join(
            f"{key} {'/'.join(one if isinstance(one, str) else format(one, 'g') for one in value)}"
            for key, value in _over_seeds(view.settings[name]).items()
            if key not in hidden
        )
        lines.append(
            f"| {name}{mark} | {100 * view.validation[name]:.1f} | {100 * view.accuracy(name):.1f} [{low:.1f}, {high:.1f}] | "
            f"{100 * view.micro(name):.1f} | {100 * view.worst_tenth(name):.1f} | {gain} | {settings} |"
        )
    return "\n".join(lines)


def summary(views: list[View], gains: dict[str, Any]) -> str:
    lines = [
        "| file | question | doctor: something to gain? reached, at most | common model | best baseline, its gain | ShareLoRA, its gain | "
        "ShareLoRA over the best baseline [over users] [over splits] | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for view in views:
        gain = gains.get(view.set)
        said = f"{gain['verdict']}: {100 * gain['reached']:+.1f}, {100 * gain['at_most']:.1f}" if gain else ""
        over = view.difference(view.chosen, view.best)
        lines.append(
            f"| {view.set} | {view.view} | {said} | {100 * view.accuracy(view.common):.1f} ({view.common}) | "
            f"{view.best}, {view.difference(view.best, view.common).mean:+.2f} | "
            f"{view.chosen.removeprefix('ShareLoRA ')}, {view.difference(view.chosen, view.common)} | {over} | {verdict(over)} |"
        )
    return "\n".join(lines)


def newcomer_curves(results: list[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """Mean accuracy over newcomers by method, number of answers and seed."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in results:
        for method, by_answers in one["by_answers"].items():
            for n, counts in by_answers.items():
                found[method][int(n)].append(100 * float(np.mean([right / total for right, total in counts.values()])))
    return found


def newcomer_gains(
    results: list[dict[str, Any]], method: str, n: str, other: str, others_n: str
) -> tuple[float, tuple[float, float]] | None:
    """Points of one method with n answers over another with so many, with a 95 % interval over users; who was a newcomer in several seeds is one. None where no seed
    has both."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in results:
        by_answers = one["by_answers"]
        than = by_answers.get(other, {}).get(others_n, {})
        for user, (right, total) in by_answers.get(method, {}).get(n, {}).items():
            if user in than:
                found[user].append(100 * (right - than[user][0]) / total)
    return (float(np.mean([np.mean(one) for one in found.values()])), _interval(found.values())) if found else None


def answers_given(results: list[dict[str, Any]], path: Path) -> dict[int, float]:
    """Share of the newcomers who have at least n answers in the file, by n: the others give what they have."""
    if not path.is_file():
        return {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    users = sorted({row["user_id"] for row in rows})
    counts = Counter(row["user_id"] for row in rows if row["split"] == "train")
    found = [[by for method in one["by_answers"].values() for by in method.items()] for one in results]
    new = [users[int(user)] for by_answers in found for user in by_answers[0][1]]
    answers = {int(n) for by_answers in found for n, _ in by_answers}
    return {n: float(np.mean([counts[user] >= n for user in new])) for n in answers}


def newcomer_table(results: list[dict[str, Any]], given: dict[int, float]) -> str:
    curves = newcomer_curves(results)
    answers = sorted(n for n in {n for by_answers in curves.values() for n in by_answers} if given.get(n, 1.0) >= 0.5)
    lines = ["| method | " + " | ".join(map(str, answers)) + " |", "|---" * (len(answers) + 1) + "|"]
    for method, by_answers in curves.items():
        cells = [f"{np.mean(by_answers[n]):.1f}" if n in by_answers else "" for n in answers]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    ours = "ShareLoRA, newcomers by the learned prior"
    if ours in curves:
        over_common, over_best = [], []
        for n in answers:
            draws = len(curves[ours].get(n, ()))
            rivals = {
                name: np.mean(by[n])
                for name, by in curves.items()
                if draws and not name.startswith("ShareLoRA") and len(by.get(n, ())) == draws
            }
            best = max(rivals, key=rivals.__getitem__, default="")
            for cells, other, others_n in ((over_common, "ShareLoRA, common model", 0), (over_best, best, n)):
                gain = newcomer_gains(results, ours, str(n), other, str(others_n))
                cells.append(f"{gain[0]:+.1f} [{gain[1][0]:+.1f}, {gain[1][1]:+.1f}]" if gain else "")
        lines.append("| ShareLoRA over its common model [over users] | " + " | ".join(over_common) + " |")
        lines.append("| ShareLoRA over the best baseline [over users] | " + " | ".join(over_best) + " |")
    return "\n".join(lines)


def draw_gains(views: list[View], path: Path) -> None:
    """One row per file and question: gain of the best baseline and of ShareLoRA over the common model."""
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(views) + 1.1), constrained_layout=True)
    for place, view in enumerate(reversed(views)):
        for shift, name, colour in ((0.15, view.chosen, "#0b3d91"), (-0.15, view.best, "#f29900")):
            found = view.difference(name, view.common)
            error = [[found.mean - found.users[0]], [found.users[1] - found.mean]]
            axes.errorbar(found.mean, place + shift, xerr=error, fmt="o", color=colour, capsize=2, markersize=4)
    axes.axvline(0, color="#5f6368", linewidth=0.8)
    labels = [f"{view.set}\n{view.view}" for view in reversed(views)]
    axes.set_yticks(range(len(views)), labels, fontsize=7)
    axes.set_xlabel("points of accuracy over the common model (mean over users, 95 % over users)", fontsize=8)
    for colour, name in (("#0b3d91", "ShareLoRA, chosen on validation"), ("#f29900", "best baseline (by test)")):
        axes.plot([], [], "o", color=colour, markersize=4, label=name)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_newcomers(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(max(7.2, 3.6 * columns), 2.6 * rows + 1), squeeze=False, constrained_layout=True
    )
    for axes in grid.flat[len(results) :]:
        axes.axis("off")
    for axes, (name, of) in zip(grid.flat, results.items(), strict=False):
        curves = newcomer_curves(of)
        answers = sorted(next(iter(curves.values())))
        for colour, (method, by_answers) in zip(COLOURS, curves.items(), strict=False):
            if method == "alone":
                continue
            places = [answers.index(n) for n in sorted(by_answers)]
            heights = [float(np.mean(by_answers[n])) for n in sorted(by_answers)]
            if len(places) == 1:
                axes.axhline(heights[0], color=colour, linestyle=":", linewidth=1, label=method)
            else:
                axes.plot(places, heights, "o-", color=colour, markersize=2.5, linewidth=1.2, label=method)
        axes.set_xticks(range(len(answers)), answers, fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(f"{name}, {len(of)} seed{'s' * (len(of) > 1)}", fontsize=8)
        axes.grid(alpha=0.3)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)
    for axes in grid[-1]:  # not of the figure: its legend would lie on it
        axes.set_xlabel("answers of the newcomer", fontsize=8)
    figure.supylabel("accuracy, mean over newcomers, %", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def gains_at_most(names: list[str], data_dir: Path, cache: Path) -> dict[str, Any]:
    """What `check_data` says can be gained on each file; kept in `cache`."""
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    for name in names:
        if name not in known and (path := data_dir / f"{name}.jsonl.gz").is_file():
            gain = check_data(str(path)).gain
            fields = ("verdict", "reached", "reached_low", "reached_high", "at_most", "at_most_high")
            known[name] = {key: getattr(gain, key) for key in fields} if gain and gain.reached is not None else None
            cache.write_text(json.dumps(known))
    return known


def _missing(views: list[View], newcomers: Iterable[str]) -> str:
    """What has no figures, by methods and where, and files without newcomers, as a paragraph; empty where all is there."""
    absent: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for view in views:
        absent[tuple(name for name in METHODS if name not in view.methods)].append(f"{view.set} ({view.view})")
    names = [f"{', '.join(methods)} on {', '.join(where)}" for methods, where in absent.items() if methods]
    without = sorted({view.set for view in views} - set(newcomers))
    names += [f"users who were not in the training of {', '.join(without)}"] if without else []
    if not names:
        return ""
    return f"**Not measured on this code yet, or left out as it takes long:** {'; '.join(names)}. [log.md](log.md) has what was found before.\n\n"


def write(figures: Path, page: Path, data_dir: Path) -> bool:
    """The page and, in `images` beside it, its pictures; whether there was anything to report.

    Args:
        figures (`Path`): Where benchmarks/real_data.py left its .json files.
        page (`Path`): The Markdown file.
        data_dir (`Path`): Of the preference files, for what the doctor says.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(figures.glob("*-[0-9]*.json")):
        one = json.loads(path.read_text())
        found[one["set"], one["view"]].append(one)
    for of in found.values():
        of.sort(key=lambda one: one["seed"])
    order = sorted({name for name, _ in found}, key=lambda name: (name.split(".")[0], len(name), name))
    views = [View(found[name, view]) for view in ("seen", "new_items") for name in order if (name, view) in found]
    newcomers = {name: found[name, "new_users"] for name in order if (name, "new_users") in found}
    gains = gains_at_most(order, data_dir, figures / "doctor_gains.json")
    if not views:
        print("Nothing to report: no file and question has baselines and ShareLoRA in every seed yet.")
        return False
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    prefix = "results"
    draw_gains(views, images / f"{prefix}_gains.png")
    parts = [
        HEAD.format(
            missing=_missing(views, newcomers),
            seeds="/".join(map(str, sorted({view.seeds for view in views}))),
            commits=", ".join(
                sorted({name for of in found.values() for one in of for name in one.get("commits", [])})
            ),
        ),
        summary(views, gains),
        GAINS,
    ]
    if newcomers:
        draw_newcomers(newcomers, images / f"{prefix}_new_users.png")
        parts.append(NEWCOMERS)
        for name, of in newcomers.items():
            given = answers_given(of, data_dir / f"{name}.jsonl.gz")
            parts.append(
                f"### {name}: {of[0]['newcomers']} newcomers, {len(of)} draws of them\n\n{newcomer_table(of, given)}"
            )
    parts.append("## All methods\n\nBest baseline and common model of the first table are picked by test (in their favour), ShareLoRA's form by validation on the first "
                 "seed. `setting`: what validation chose, in the order of the seeds where it differs.")  # fmt: skip
    for view in views:
        counts = ", ".join(f"{name} {n:,}" for name, n in view.rows.items())
        parts.append(f"### {view.set}, {TITLES[view.view]} ({view.seeds} seeds; seed 0: {counts})\n\n{table(view)}")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(textwrap.dedent(part).strip("\n") for part in parts) + "\n", encoding="utf-8")
    return True


HEAD = """
# Preferences of real people

Made by `python benchmarks/real_data.py` (its docstring says what is measured and how; {seeds} seeds, the most of Polis' new statements, each with a split of its own; commits {commits}) from
the files described there; not edited by hand. Base: all-MiniLM-L6-v2, frozen, mean over tokens and log length (385 numbers); above it a linear layer, a frozen one that
adds how similar the result is to each of the file's texts (it knows the texts and no vote), a second linear layer and a linear head. Both linear layers are the identity, and LoRA goes
on both. The linear baselines stand on the same numbers: one ridge head, a ridge offset per user, a low-rank basis with user weights (the form of LoRe); `popularity` is the text that more
training comparisons chose, whoever judged: it knows texts by identity and nothing of new ones. All LoRA starts from the ridge head: `common LoRA` by TRL's RewardTrainer, ShareLoRA by
ShareLoraRewardTrainer. `ShareLoRA B, shrunk` is the common LoRA with a row per user (`from_lora`) and then `shrink_users`, without a training of its own.

{missing}Read it with this in mind. `common head + learned prior` is what `shrink_users` does, without any LoRA: the same EM beside the ridge head, on at most 1,024 of the directions in which the same numbers are largest. It is shown
and does not count as a baseline, as it is ours. On this frozen base, whose upper layer is linear, most of the gain is that of the prior which all users teach; what the layer adds is that
it works in any base and in all layers.

Accuracy in %, mean over users. Intervals are 95 % Student: [over users], each his mean over seeds, paired; and [over splits], of the mean over users; splits of one
file share rows, so this one is too narrow as a statement about other data (Nadeau and Bengio, 2003). "better" and "worse" need both; a dozen such verdicts stand
here uncorrected. The common model is the better of ridge head and common LoRA on test; what was measured on some of the seeds is compared on these and is neither best nor chosen. ShareLoRA's form is `shrunk` unless another one is better on the first seed's validation by an
interval over users that excludes zero. Test is scored once per seed. "Doctor" is `trl-sharelora data check`: what a simple personal model gains, and the most any could.
"""
GAINS = "![Gain over the common model](images/results_gains.png)"
NEWCOMERS = """
## Users who were not in the training

Accuracy by number of the newcomer's own answers, the file's own split; a draw of newcomers per seed. Columns that fewer than half of them can fill are left
out; who has fewer answers gives what he has. ShareLoRA's are fitted by `fit_users` with the prior that `shrink_users` learned from the others; intervals over users. "Its common
model" is ShareLoRA's with D = 0; the best baseline is picked by test, for each number of answers. Settings are chosen on the others' validation rows (that of the common LoRA on all users').

![Accuracy of newcomers](images/results_new_users.png)
"""
