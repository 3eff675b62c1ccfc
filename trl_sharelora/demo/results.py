"""What the demo shows: the table of users, its summary lines and the picture. Numbers come in as accuracies, 0 to 1."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats


# Beyond this many users a line for each is no longer a picture (or a screen) anybody reads.
MANY_USERS = 40
GREY, BLUE, RED, DARK = "#9aa0a6", "#1a73e8", "#c5221f", "#202124"


def user_table(
    comparisons: dict[str, int],
    pooled: pd.DataFrame,
    personal: pd.DataFrame,
    truth: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One line per user with test rows, the user with most comparisons first.

    Args:
        comparisons (`dict[str, int]`):
            Training rows of each user.
        pooled (`pd.DataFrame`), personal (`pd.DataFrame`):
            Tables of [`~trl_sharelora.evaluate_users`] on the same test rows.
        truth (`pd.DataFrame`, *optional*):
            Further columns by `user_id`: `main_taste`, `best_possible`, `best_realised`.

    Returns:
        `pd.DataFrame`: `user_id`, `comparisons`, the columns of `truth`, `test_rows`, `pooled`, `pooled_low`,
        `pooled_high`, `sharelora`, `sharelora_low`, `sharelora_high`, `gain` (`sharelora - pooled`).
    """
    columns = {"accuracy": "", "low": "_low", "high": "_high"}
    parts = []
    for name, table in (("pooled", pooled), ("sharelora", personal)):
        part = table.set_index("user_id")[["n", *columns]]
        parts.append(part.rename(columns={old: name + new for old, new in columns.items()}))
    table = parts[0].join(parts[1].drop(columns="n"), how="outer", validate="1:1").rename(columns={"n": "test_rows"})
    table.insert(0, "comparisons", [comparisons.get(user_id, 0) for user_id in table.index])
    if truth is not None:
        for place, column in enumerate(truth.columns.drop("user_id"), start=1):
            table.insert(place, column, truth.set_index("user_id")[column].reindex(table.index))
    table["gain"] = table["sharelora"] - table["pooled"]
    # stable, and by id among equals, so that two runs give one file
    return table.reset_index().sort_values(["comparisons", "user_id"], ascending=[False, True], ignore_index=True)


def mean_over_users(values: Sequence[float]) -> tuple[float, float]:
    """Mean over users and the half width of its 95 % Student interval (for users drawn like these); NaN for one user."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), math.nan
    return float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * stats.sem(array))


def summary_table(table: pd.DataFrame) -> pd.DataFrame:
    """Means over all users and over the busiest, the middle and the thinnest third, each user counting the same.

    Args:
        table (`pd.DataFrame`):
            Of [`user_table`].

    Returns:
        `pd.DataFrame`: `users` (what they are), `n_users`, `fewest` and `most` (comparisons), and mean and half width of
        the 95 % interval (`_pm`) of `pooled`, `sharelora`, `gain` and, where known, the mean `best_possible`.
    """
    groups = [(f"all {len(table)}", table)]
    if len(table) >= 12:  # thirds of four users and more
        third = len(table) // 3
        groups += [
            (f"busiest {third}", table[:third]),
            (f"middle {len(table) - 2 * third}", table[third : len(table) - third]),
            (f"thinnest {third}", table[len(table) - third :]),
        ]
    lines = []
    for name, part in groups:
        line: dict[str, Any] = {
            "users": name,
            "n_users": len(part),
            "fewest": int(part["comparisons"].min()),
            "most": int(part["comparisons"].max()),
        }
        if "best_possible" in part:
            line["best_possible"] = float(part["best_possible"].mean())
        for column in ("pooled", "sharelora", "gain"):
            line[column], line[f"{column}_pm"] = mean_over_users(part[column])
        lines.append(line)
    return pd.DataFrame(lines)


def _percent(value: float, plus_minus: float | None = None, sign: str = "") -> str:
    text = f"{100 * value:{sign}.1f}"
    if plus_minus is None:
        return text
    return f"{text} ± {100 * plus_minus:.1f}" if math.isfinite(plus_minus) else text


def _one_line(text: str) -> str:
    """An id as it can be shown in a cell: short, and without control characters."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 24 else text[:21] + "..."


def table_cells(table: pd.DataFrame, summary: pd.DataFrame) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """The two tables as text: headings (of two lines each), lines of users, lines of the summary. Accuracies in percent."""
    titles = {
        "user_id": "\nuser",
        "main_taste": "main\ntaste",
        "comparisons": "training\ncomparisons",
        "best_possible": "best\npossible",
        "pooled": "pooled\nLoRA",
        "sharelora": "\nShareLoRA",
        "gain": "\ngain",
    }
    names = [name for name in titles if name in table]
    shown = table
    if len(table) > MANY_USERS:
        shown = pd.concat([table.head(MANY_USERS // 4), table.tail(MANY_USERS // 4)])
    lines = []
    for row in shown.to_dict("records"):
        row |= {
            name: _percent(row[name], sign="+" if name == "gain" else "")
            for name in names[names.index("comparisons") + 1 :]
        }
        lines.append([_one_line(str(row[name])) for name in names])
    if len(table) > MANY_USERS:
        lines.insert(MANY_USERS // 4, ["...", *[""] * (len(names) - 1)])
    means = []
    for row in summary.to_dict("records"):
        row["user_id"], row["main_taste"] = row["users"], ""
        row["comparisons"] = str(row["most"]) if row["fewest"] == row["most"] else f"{row['fewest']}-{row['most']}"
        for name in names[names.index("comparisons") + 1 :]:
            row[name] = _percent(row[name], row.get(f"{name}_pm"), sign="+" if name == "gain" else "")
        means.append([row[name] for name in names])
    return [titles[name] for name in names], lines, means


def print_table(table: pd.DataFrame, summary: pd.DataFrame) -> None:
    """Print users and summary; in colour with `rich` where it is installed, else as plain text."""
    headings, lines, means = table_cells(table, summary)
    n_text = 2 if "main_taste" in table else 1
    plain = plain_table(headings, lines, means, n_text)
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain)
        return
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if place < n_text else "right", no_wrap=True)
    for line in lines:
        # Text: an id may hold what rich would take for markup
        *cells, gain = map(Text, line)
        gain.stylize("red" if line[-1].startswith("-") else "green")
        shown.add_row(*cells, gain)
    shown.add_row()
    for place, line in enumerate(means):
        shown.add_row(*map(Text, line), style="bold" if place == 0 else "")
    console = Console()
    # never cut a number off: where the screen is too narrow it wraps
    console.width = max(console.width, *map(len, plain.splitlines()))
    console.print(shown)


def plain_table(headings: list[str], lines: list[list[str]], means: list[list[str]], n_text: int) -> str:
    """The table in plain text, columns two blanks apart; the first `n_text` columns stand left, the others right."""
    upper, lower = zip(*(heading.split("\n") for heading in headings), strict=True)
    widths = [max(map(len, column)) for column in zip(upper, lower, *lines, *means, strict=True)]

    def join(cells: Sequence[str]) -> str:
        placed = [
            cell.ljust(width) if place < n_text else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(placed).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([join(upper), join(lower), rule, *map(join, lines), rule, *map(join, means)])


def draw_picture(table: pd.DataFrame, summary: pd.DataFrame, path: Path) -> None:
    """One PNG: a line per user up to 40 users, gain against number of comparisons beyond."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # a Figure of its own, so that nobody's pyplot state or backend is touched
    figure = Figure(figsize=(9, 2.6 + 0.27 * len(table)) if len(table) <= MANY_USERS else (9, 6), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    (_draw_users if len(table) <= MANY_USERS else _draw_gains)(axes, table, summary)
    axes.spines[["top", "right"]].set_visible(False)
    line = summary.iloc[0]
    title = f"ShareLoRA {_percent(line['sharelora'])} %, pooled LoRA {_percent(line['pooled'])} %"
    if "best_possible" in line:
        title += f", best possible {_percent(line['best_possible'])} %"
    # placed in inches: the figure's height depends on the number of users
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.16 / height, title, va="top", fontsize=14, fontweight="bold", color=DARK)
    subtitle = f"accuracy on test comparisons, mean over {len(table)} users"
    figure.text(0.02, 1 - 0.46 / height, subtitle, va="top", fontsize=10, color="#5f6368")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.62 / height))
    figure.savefig(path)


def _draw_users(axes: Any, table: pd.DataFrame, summary: pd.DataFrame) -> None:
    places = -np.arange(len(table), dtype=float)
    pooled, personal = 100 * table["pooled"].to_numpy(), 100 * table["sharelora"].to_numpy()
    axes.hlines(
        places, pooled, personal, color=np.where(personal >= pooled, BLUE, RED), alpha=0.35, linewidth=3, zorder=1
    )
    axes.scatter(pooled, places, color=GREY, s=42, zorder=2, label="pooled LoRA")
    axes.scatter(personal, places, color=BLUE, s=42, zorder=3, label="ShareLoRA")
    values = [pooled, personal]
    if "best_possible" in table:
        best = 100 * table["best_possible"].to_numpy()
        values.append(best)
        axes.scatter(best, places, color=DARK, marker="|", s=130, linewidths=2, zorder=4, label="best possible")
    labels = [f"{_one_line(row.user_id)}   {row.comparisons:>4}" for row in table.itertuples()]

    # the means stand below the users, with their intervals
    below = places[-1] - 1.6 - np.arange(len(summary), dtype=float)
    for column, colour in (("pooled", GREY), ("sharelora", BLUE)):
        mean, half = 100 * summary[column].to_numpy(), 100 * summary[f"{column}_pm"].fillna(0.0).to_numpy()
        axes.errorbar(
            mean, below, xerr=half, fmt="D", color=colour, markersize=5.5, capsize=3, linewidth=1.5, zorder=3
        )
        values += [mean - half, mean + half]
    if "best_possible" in summary:
        axes.scatter(100 * summary["best_possible"], below, color=DARK, marker="|", s=130, linewidths=2, zorder=4)
    axes.axhline((places[-1] + below[0]) / 2, color="#dadce0", linewidth=1)
    labels += [f"mean of {name}" for name in summary["users"]]

    axes.set_yticks([*places, *below], labels, fontsize=9, parse_math=False)  # an id may hold $
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(below[-1] - 0.8, 0.8)
    low, high = float(np.min(np.concatenate(values))), float(np.max(np.concatenate(values)))
    axes.set_xlim(max(0, 5 * math.floor((low - 1) / 5)), min(100, 5 * math.ceil((high + 1) / 5)))
    axes.grid(axis="x", color="#e8eaed", linewidth=1, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("accuracy, % (means with 95 % interval over users)", fontsize=9)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=9.5, handletextpad=0.3)
    # a heading for the labels of the users
    axes.annotate(
        "user and number of\ntraining comparisons",
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(-6, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color="#5f6368",
    )


def _draw_gains(axes: Any, table: pd.DataFrame, summary: pd.DataFrame) -> None:
    x, gain = np.maximum(table["comparisons"].to_numpy(), 0.5), 100 * table["gain"].to_numpy()
    axes.axhline(0, color=DARK, linewidth=1)
    axes.scatter(x, gain, color=np.where(gain >= 0, BLUE, RED), alpha=0.35, s=18, linewidths=0, label="one user")
    groups = summary.iloc[1:]
    if len(groups):
        middle = np.sqrt(np.maximum(groups["fewest"], 0.5) * np.maximum(groups["most"], 0.5))
        axes.errorbar(
            middle,
            100 * groups["gain"],
            yerr=100 * groups["gain_pm"],
            xerr=[middle - np.maximum(groups["fewest"], 0.5), groups["most"] - middle],
            fmt="D",
            color=DARK,
            markersize=6,
            capsize=3,
            label="mean of a third of the users, 95 % interval",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="#e8eaed", linewidth=1)
    axes.set_axisbelow(True)
    axes.set_xlabel("training comparisons of the user", fontsize=9)
    axes.set_ylabel("gain of ShareLoRA over pooled LoRA, points of accuracy", fontsize=9)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=9.5)
