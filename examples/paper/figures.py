"""Draw Figures 1, 2 and 3 of P-ShareLoRA (https://huggingface.co/papers/2503.19201) from `trl-sharelora compare`.

    python examples/paper/figures.py "GPT-J 6B=outputs/tldr_gptj_6b_qv" "Llama-3 8B=outputs/tldr_llama3_8b_qv"

Each folder holds the comparison.json of one base model; its name is found from the model's id if it is one of the
paper's. Beside ours stand the paper's own bars, hatched and pale, from published.json; `--no-published` leaves them
out. A method that was not run leaves a gap that says so; `"Llama-3 8B="`, without a folder, is a base model of the paper that was
not run at all.

Figure 1: mean accuracy over the labelers, one group for each base model, one colour for each method.
Figure 2: accuracy of each labeler and the mean, one colour for each method (the paper has it for Llama-3 8B only).
Figure 3: share A against share B, each labeler and the mean. Share B is PSL(WU), as in the paper's Llama-3 bars.

Labelers are numbered in the order of the file. Figures 2 and 3 are one file for each base model:
figure_2_llama-3-8b.png.
"""

import argparse
import json
import math
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from trl_sharelora.errors import DataError, ShareLoraError


PUBLISHED = Path(__file__).with_name("published.json")
# Names in the paper's figures, in the order of its Figure 1
LABELS = {
    "share-rep": "Share Rep",
    "lora-global": "LoRA-global",
    "lora-local": "LoRA-local",
    "psharelora-si": "PSL(SI)",
    "psharelora-g": "PSL(G)",
    "psharelora-wu": "PSL(WU)",
}
COLOURS = {
    "share-rep": "#9aa0a6",
    "lora-global": "#5f6368",
    "lora-local": "#f29900",
    "psharelora-si": "#7baaf7",
    "psharelora-g": "#1a73e8",
    "psharelora-wu": "#0b3d91",
    "share-a": "#c5221f",
    "share-b": "#0b3d91",
}
IN_FIGURE_2 = ("lora-global", "lora-local", "psharelora-si", "psharelora-g", "psharelora-wu")
# A column of a two-column page, inches; nothing is smaller than 5 points there
WIDTH = 3.5
MOST_LABELERS = 12  # beyond, bars for each labeler are no longer readable


def read_comparison(folder: str | Path) -> dict[str, Any]:
    """The comparison.json of a run.

    Args:
        folder (`str` or `Path`):
            Output folder of `trl-sharelora compare`.

    Raises:
        DataError: There is none, or it is of another form.
    """
    path = Path(folder, "comparison.json")
    try:
        comparison = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"There is no {path}. The output folder of one `trl-sharelora compare` is needed; has the run ended?"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Is the file cut off?") from error
    methods = comparison.get("methods") if isinstance(comparison, dict) else None
    if not isinstance(methods, dict) or not methods:
        raise DataError(f"{path} has no `methods`; a comparison.json of `trl-sharelora compare` is needed.")
    for name, method in methods.items():
        for checkpoint in ("best", "last"):
            cell = method.get(checkpoint) if isinstance(method, dict) else None
            if not isinstance(cell, dict) or not {"macro", "users"} <= set(cell):
                raise DataError(
                    f"{path}: methods[{name!r}] has no {checkpoint!r} with `macro` and `users`. Was it written by another version?"
                )
    return comparison


def paper_of(model: str, published: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and bars of a base model in the paper.

    Args:
        model (`str`):
            Its name in the paper, or its id on the hub, in any case.
        published (`dict`):
            Of published.json.
    """
    for name, bars in published["models"].items():
        if model.lower() in (name.lower(), *(model_id.lower() for model_id in bars["ids"])):
            return name, bars
    return None


def _bar(axes: Any, x: float, width: float, height: float, colour: str, gid: str, paper: bool = False) -> None:
    look = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.3}
    if paper:
        look = {"facecolor": "white", "edgecolor": colour, "linewidth": 0.5, "hatch": "//////", "alpha": 0.6}
    (patch,) = axes.bar([x], [height], width=width, zorder=2, **look)
    patch.set_gid(gid)


def _number(axes: Any, x: float, height: float, value: float, size: float, colour: str) -> None:
    from matplotlib.patheffects import withStroke

    text = f"{value:.3f}".removeprefix("0")
    shown = axes.annotate(
        text, (x, height), (0, 2.5), textcoords="offset points", rotation=90, ha="center", va="bottom", fontsize=size
    )
    # readable before a taller neighbour too
    shown.set(color=colour, path_effects=[withStroke(linewidth=1.2, foreground="white")])


def draw_groups(
    axes: Any, groups: list[str], series: list[dict[str, Any]], published: bool = True, number_size: float = 5.5
) -> None:
    """Groups of bars: in each group a pair for each series, ours and the paper's.

    Args:
        axes ([`~matplotlib.axes.Axes`]):
            Where to draw.
        groups (`list[str]`):
            Labels below.
        series (`list[dict]`):
            `name`, `colour`, and for each group a value or None: `ours`, records `{"value", "low", "high", "seeds"}`,
            and `paper`, numbers. A bar's height is its value; its gid is `name/group/ours` or `name/group/paper`. The
            error bar goes from `low` to `high`.
        published (`bool`, *optional*, defaults to `True`):
            Whether there is room for the paper's bars.
        number_size (`float`, *optional*, defaults to `5.5`):
            Of the numbers on the bars, points.
    """
    per_pair = 2 if published else 1
    slot = 1 / (len(series) * per_pair + 1)  # the distance between groups is one slot more
    tops = []
    for place, group in enumerate(groups):
        for number, one in enumerate(series):
            x = place + (number * per_pair - (len(series) * per_pair - 1) / 2) * slot
            ours, paper = one["ours"][place], one["paper"][place]
            if ours is None:
                axes.annotate(
                    "not run",
                    (x, 0),
                    (0, 2),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=max(5, number_size - 0.5),
                    color="#80868b",
                )
            else:
                value = ours["value"]
                _bar(axes, x, 0.92 * slot, value, one["colour"], f"{one['name']}/{group}/ours")
                low, high = (ours[key] for key in ("low", "high"))
                top = value
                if all(limit is not None and math.isfinite(limit) for limit in (low, high)):
                    container = axes.errorbar(
                        [x], [value], [[value - low], [high - value]], fmt="none", ecolor="#202124", elinewidth=0.6
                    )
                    container.set_label(f"_{one['name']}/{group}")
                    top = max(top, high)
                if len(ours["seeds"]) > 1:
                    axes.plot(
                        [x] * len(ours["seeds"]), ours["seeds"], "o", color="white", mec="#202124", mew=0.4, ms=1.8
                    )
                    top = max(top, *ours["seeds"])
                _number(axes, x, top, value, number_size, "#202124")
                tops += [top, low if low is not None and math.isfinite(low) else value, value]
            if published and paper is not None:
                _bar(axes, x + slot, 0.92 * slot, paper, one["colour"], f"{one['name']}/{group}/paper", paper=True)
                _number(axes, x + slot, paper, paper, number_size, "#80868b")
                tops.append(paper)
    axes.set_xticks(range(len(groups)), groups, fontsize=7, parse_math=False)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    # from chance upwards, or from lower where a bar is; room for the numbers above
    bottom = min([0.5, *(0.05 * math.floor(value / 0.05 - 1e-9) for value in tops)])
    top = max([0.6, *tops])
    axes.set_ylim(bottom, top + 0.26 * (top - bottom))
    axes.tick_params(axis="both", length=0, labelsize=7)
    axes.set_ylabel("accuracy", fontsize=7)
    axes.grid(axis="y", color="#e8eaed", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _record(cell: dict[str, Any] | None, user: str | None) -> dict[str, Any] | None:
    """A cell's mean, or its value for one user, for [`draw_groups`]."""
    if cell is None:
        return None
    if user is None:
        return {
            "value": cell["macro"],
            "low": cell.get("low"),
            "high": cell.get("high"),
            "seeds": cell.get("macro_by_seed") or [],
        }
    own = cell["users"].get(user)
    return own and {"value": own["accuracy"], "low": own.get("low"), "high": own.get("high"), "seeds": []}


def _cell(comparison: dict[str, Any], method: str, checkpoint: str) -> dict[str, Any] | None:
    return comparison["methods"][method][checkpoint] if method in comparison["methods"] else None


def mean_series(comparisons: dict[str, dict[str, Any]], published: dict[str, Any], checkpoint: str) -> list[dict]:
    """Series of Figure 1; its groups are the base models.

    Args:
        comparisons (`dict[str, dict]`):
            Of [`read_comparison`], by the name of the base model.
        published (`dict`):
            Of published.json.
        checkpoint (`str`):
            `"best"` or `"last"`.
    """
    series = []
    for method in LABELS:
        of_paper = [paper_of(name, published) for name in comparisons]
        series.append(
            {
                "name": method,
                "colour": COLOURS[method],
                "ours": [_record(_cell(one, method, checkpoint), None) for one in comparisons.values()],
                "paper": [found[1]["figure_1"].get(method) if found else None for found in of_paper],
            }
        )
    return series


def labeler_series(
    comparison: dict[str, Any], name: str, published: dict[str, Any], checkpoint: str, figure: int
) -> tuple[list[str], list[dict]]:
    """Groups and series of Figure 2 or 3: each labeler and the mean.

    Args:
        comparison (`dict`):
            Of [`read_comparison`].
        name (`str`):
            The base model's name.
        published (`dict`):
            Of published.json. Its bars are taken for five labelers only.
        checkpoint (`str`):
            `"best"` or `"last"`.
        figure (`int`):
            2 or 3.

    Raises:
        DataError: More labelers than can be told apart.
    """
    users: list[str] = []
    for method in comparison["methods"].values():
        users += [user for user in method[checkpoint]["users"] if user not in users]
    if len(users) > MOST_LABELERS:
        raise DataError(
            f"Figure {figure} has bars for each labeler and {name} has {len(users)}; at most {MOST_LABELERS} can be read."
        )
    found = paper_of(name, published)
    if found and not comparison["methods"]:
        users = [str(number) for number in range(5)]
    bars = (found[1].get(f"figure_{figure}") or {}) if found and len(users) == 5 else {}
    methods = {"share-a": "share-a", "share-b": "psharelora-wu"} if figure == 3 else {key: key for key in IN_FIGURE_2}
    series = []
    for key, method in methods.items():
        cell = _cell(comparison, method, checkpoint)
        paper = [*bars[key]["labelers"], bars[key]["average"]] if key in bars else [None] * (len(users) + 1)
        ours = [_record(cell, user) for user in [*users, None]]
        series.append({"name": key, "colour": COLOURS[key], "ours": ours, "paper": paper})
    return [f"labeler {number}" if figure == 2 else str(number) for number in range(len(users))] + ["mean"], series


def draw_figure(
    rows: list[tuple[list[str], list[dict[str, Any]]]], title: str, labels: dict[str, str], note: str, path: Path
) -> Any:
    """One PNG, a column wide: rows of groups, a legend above, a note below.

    Args:
        rows (`list[tuple[list[str], list[dict]]]`):
            Groups and series of each row, see [`draw_groups`].
        title (`str`):
            Stands above.
        labels (`dict[str, str]`):
            Name of each series.
        note (`str`):
            Stands below.
        path (`Path`):
            Where to write.

    Returns:
        [`~matplotlib.figure.Figure`]: as it was written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    series = [one for _, of_row in rows for one in of_row]
    published = any(value is not None for one in series for value in one["paper"])
    per_row = max(len(groups) for groups, _ in rows)
    note = textwrap.fill(note, 88)
    head, foot = 0.45 if len(labels) > 2 else 0.33, 0.09 + 0.09 * len(note.splitlines())
    height = head + foot + 1.6 * len(rows)
    # a Figure of its own, so that nobody's pyplot state or backend is touched
    figure = Figure(figsize=(WIDTH, height), dpi=300)
    FigureCanvasAgg(figure)
    limits = []
    for number, (groups, of_row) in enumerate(rows):
        axes = figure.add_subplot(len(rows), 1, number + 1)
        slots = per_row * (len(of_row) * (2 if published else 1) + 1)
        draw_groups(axes, groups, of_row, published, number_size=5.5 if slots <= 30 else 5)
        axes.set_xlim(-0.5, per_row - 0.5)
        limits.append(axes.get_ylim())
    for axes in figure.axes:  # rows are there to be compared
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    figure.text(0.02, 1 - 0.05 / height, title, va="top", fontsize=7.5, fontweight="bold", parse_math=False)
    colours = {one["name"]: one["colour"] for one in series}
    handles = [Patch(facecolor=colours[name], label=label) for name, label in labels.items() if name in colours]
    if published:
        handles.append(
            Patch(
                facecolor="white", edgecolor="#5f6368", hatch="//////", alpha=0.6, linewidth=0.5, label="the paper's"
            )
        )
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.15 / height),
        borderaxespad=0.2,
        ncols=4 if len(handles) > 3 else 3,
        frameon=False,
        fontsize=6,
        handlelength=1.2,
        columnspacing=1.0,
        labelspacing=0.3,
    )
    figure.text(0.02, 0.04 / height, note, va="bottom", fontsize=5, color="#5f6368", linespacing=1.3)
    figure.tight_layout(rect=(0, foot / height, 1, 1 - head / height), pad=0.3, h_pad=0.8)
    figure.savefig(path)
    return figure


def _in_rows(groups: list[str], series: list[dict[str, Any]], most_bars: int = 36) -> list:
    """The same groups in as few rows of equal length as leave at most `most_bars` bars in a row."""
    per_row = max(1, most_bars // (2 * len(series)))
    per_row = math.ceil(len(groups) / math.ceil(len(groups) / per_row))
    return [
        (
            groups[start : start + per_row],
            [one | {key: one[key][start : start + per_row] for key in ("ours", "paper")} for one in series],
        )
        for start in range(0, len(groups), per_row)
    ]


def draw_all(
    comparisons: dict[str, dict[str, Any]], output_dir: Path, checkpoint: str = "best", with_published: bool = True
) -> list[Path]:
    """Figures 1, 2 and 3.

    Args:
        comparisons (`dict[str, dict]`):
            Of [`read_comparison`], by the name of the base model, in the order of drawing.
        output_dir (`Path`):
            Where to write.
        checkpoint (`str`, *optional*, defaults to `"best"`):
            The paper's numbers fit best checkpoints, chosen on the validation pairs they are reported on. `"last"`
            does not choose.
        with_published (`bool`, *optional*, defaults to `True`):
            Whether to draw the paper's bars.

    Returns:
        `list[Path]`: the files written. Figures 2 and 3 are left out, with a line that says so, where there are too
        many labelers.
    """
    published = json.loads(PUBLISHED.read_text(encoding="utf-8")) if with_published else {"models": {}}
    output_dir.mkdir(parents=True, exist_ok=True)
    parts = [f"{checkpoint.capitalize()} checkpoint"]
    if checkpoint == "best" and any(
        one.get("chosen_on", one.get("split")) == one.get("split") for one in comparisons.values()
    ):
        parts.append("chosen on the pairs shown")
    several = any(len(one.get("seeds") or []) > 1 for one in comparisons.values())
    note = f"{', '.join(parts)}. Error bars: 95 %, " + (
        "of a mean over seeds (dots), of a labeler over pairs." if several else "over pairs; one seed."
    )
    in_paper = [name for name in comparisons if paper_of(name, published)]
    if in_paper:
        note += (
            " The paper's bars: one run, no error bars; sampling of the pairs alone gives a standard error of .006 for a mean over "
            "labelers, .013 for a labeler."
        )
    elif with_published:
        note += " None of these base models is in the paper."
    written = [output_dir / "figure_1.png"]
    series = mean_series(comparisons, published, checkpoint)
    draw_figure([(list(comparisons), series)], "Figure 1. Mean accuracy over labelers", LABELS, note, written[0])
    for name, comparison in comparisons.items():
        stem = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        for number in (2, 3):
            try:
                groups, series = labeler_series(comparison, name, published, checkpoint, number)
            except DataError as error:
                print(f"left out: {error}")
                continue
            labels = {"share-a": "share A (down-projection)", "share-b": "share B (up-projection)"}
            what = "Share A against share B" if number == 3 else "Accuracy of each labeler"
            written.append(output_dir / f"figure_{number}_{stem}.png")
            draw_figure(
                _in_rows(groups, series),
                f"Figure {number}. {what}, {name}",
                labels if number == 3 else LABELS,
                note,
                written[-1],
            )
    return written


def read_all(named: list[str]) -> dict[str, dict[str, Any]]:
    """Comparisons by the name of their base model, from `NAME=FOLDER` or `FOLDER`.

    Raises:
        DataError: A folder has no comparison, or two have the same name.
    """
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    comparisons: dict[str, dict[str, Any]] = {}
    for text in named:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            name, folder = "", text
        if name and not folder:
            if paper_of(name, published) is None:
                raise DataError(
                    f"{text!r} names no folder, which stands for a base model of the paper that was not run; it has {', '.join(published['models'])}."
                )
            comparison: dict[str, Any] = {"model": name, "methods": {}}
        else:
            comparison = read_comparison(folder)
        if not name:
            model = str(comparison.get("model", "model")).rstrip("/")
            found = paper_of(model, published)
            name = found[0] if found else Path(model).name
        if name in comparisons:
            raise DataError(f"Two runs are called {name!r}; name them apart: NAME=FOLDER.")
        comparisons[name] = comparison
    return comparisons


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", metavar="OUT", help="output folder of a comparison, NAME=FOLDER, or NAME= (not run)"
    )
    parser.add_argument(
        "--published", action=argparse.BooleanOptionalAction, default=True, help="the paper's bars beside ours"
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="by default the folder of the first run")
    args = parser.parse_args(argv)
    try:
        comparisons = read_all(args.runs)
        first = args.runs[0]
        folder = Path(first if Path(first).is_dir() else first.partition("=")[2])
        written = draw_all(comparisons, args.output_dir or folder, args.checkpoint, args.published)
    except ShareLoraError as error:
        print(f"figures: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
