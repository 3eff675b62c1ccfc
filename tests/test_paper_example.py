"""The TL;DR experiment of examples/paper: its data, its figures and its configurations, all on what is made here."""

import gzip
import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from helpers import save_tiny, tiny_tokenizer
from matplotlib.colors import to_rgba
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPTJConfig, LlamaConfig

from trl_sharelora import ShareLoraConfig
from trl_sharelora.data import check_preference_rows, load_preferences
from trl_sharelora.errors import DataError


FOLDER = Path(__file__).parent.parent / "examples" / "paper"
CONFIGS = sorted(FOLDER.glob("tldr_*.yaml"))
METHODS = ["share-rep", "lora-global", "lora-local", "psharelora-si", "psharelora-g", "psharelora-wu"]
METHODS += ["share-a", "kernel", "svd"]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"paper_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load_script("prepare_tldr")
figures = load_script("figures")
PUBLISHED = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))

# Usable rows of eight workers; "w2" and "w5" have as many in training, and w2 comes first in the file
TRAIN = {"w0": 3, "w1": 14, "w2": 9, "w3": 12, "w4": 2, "w5": 9, "w6": 20, "w7": 1}
VALIDATION = {"w0": 2, "w1": 5, "w2": 4, "w3": 9, "w5": 3, "w6": 6}
ARTICLES = {"w3": 2, "w6": 1}


def comparison(worker: str, number: int, split: str, /, **changes) -> dict:
    """A row in the schema of summarize_from_feedback; its texts say which row it is."""
    tag = f"{worker} {split} {number}"
    info = {"id": f"t3_{number}", "post": f"post {tag}", "title": f"title {tag}", "subreddit": "relationships"}
    row = {
        "info": info | {"site": None, "article": None},
        "summaries": [
            {"text": f"first {tag}", "policy": "sup2", "note": None},
            {"text": f"second {tag}", "policy": "ref", "note": "ok"},
        ],
        "choice": number % 2,
        "worker": worker,
        "batch": "batch3",
        "split": "train" if split == "train" else "valid1",
        "extra": {"confidence": None},
    }
    return row | changes


def article(worker: str, number: int) -> dict:
    """A row of the CNN/DM part: an article and no post."""
    info = {
        "id": f"c{number}",
        "post": None,
        "title": "news",
        "subreddit": None,
        "site": "cnn",
        "article": "It rained.",
    }
    return comparison(worker, number, "validation", info=info, batch="cnndm2")


def make_splits(seed: int = 0) -> dict[str, list[dict]]:
    """Train and validation, the workers' rows mixed; w2 appears before w5."""
    draw = random.Random(seed)
    train = [comparison(worker, n, "train") for worker, many in TRAIN.items() for n in range(many)]
    validation = [comparison(worker, n, "validation") for worker, many in VALIDATION.items() for n in range(many)]
    validation += [article(worker, n) for worker, many in ARTICLES.items() for n in range(many)]
    draw.shuffle(train)
    draw.shuffle(validation)
    train.sort(key=lambda row: (row["worker"] == "w5", 0))  # stable
    return {"train": train, "validation": validation}


def by_worker(rows: list[dict], split: str) -> dict[str, int]:
    return dict(Counter(row["user_id"] for row in rows if row["split"] == split))


# -- data -----------------------------------------------------------------------------------------------------------


def test_the_busiest_workers_are_taken_and_cut_to_the_smallest():
    rows, report = prepare.prepare_tldr(make_splits(), workers=3)
    # 20, 14, 12 for training; 6, 5, 9 for validation, where articles do not count
    assert by_worker(rows, "train") == {"w6": 12, "w1": 12, "w3": 12}
    assert by_worker(rows, "validation") == {"w6": 5, "w1": 5, "w3": 5}
    assert list(dict.fromkeys(row["user_id"] for row in rows)) == ["w6", "w1", "w3"]
    assert report["workers"] == [
        {"user_id": "w6", "train": 12, "validation": 5, "train_of": 20, "validation_of": 6, "articles": 1},
        {"user_id": "w1", "train": 12, "validation": 5, "train_of": 14, "validation_of": 5, "articles": 0},
        {"user_id": "w3", "train": 12, "validation": 5, "train_of": 12, "validation_of": 9, "articles": 2},
    ]
    assert report["left_out"] == {"train": {}, "validation": {"news articles": 3}}
    assert (report["all_workers"], report["cut_tie"]) == (8, [])
    shown = prepare.show_report(report)
    assert "12 of 20" in shown and "5 of 9" in shown and "without 2 of news" in shown
    assert (
        "36 rows for training, 15 for validation" in shown and "left out of validation: 3 with news articles" in shown
    )


def test_the_same_rows_as_the_authors_code_takes():
    """Their way, with `datasets`: filter a worker's rows, shuffle(seed=42), select the first."""
    splits = make_splits()
    rows, _ = prepare.prepare_tldr({name: list(part) for name, part in splits.items()}, workers=3)
    for worker in ("w6", "w1", "w3"):
        own = Dataset.from_list(splits["train"]).filter(lambda row, worker=worker: row["worker"] == worker)
        taken = own.shuffle(seed=42).select(range(12))
        expected = []
        for row in taken:
            text = "SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR: ".format(**row["info"])
            better, worse = row["summaries"][row["choice"]], row["summaries"][1 - row["choice"]]
            expected.append((text + better["text"], text + worse["text"]))
        ours = [row for row in rows if row["user_id"] == worker and row["split"] == "train"]
        assert [(row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) for row in ours] == expected
    assert all(row["prompt"].endswith("\nTL;DR:") and row["chosen"].startswith(" ") for row in rows)


def test_a_tie_at_the_cut_goes_to_who_comes_first_and_is_reported():
    splits = make_splits()
    rows, report = prepare.prepare_tldr(splits, workers=4)
    assert list(by_worker(rows, "train")) == ["w6", "w1", "w3", "w2"] and report["cut_tie"] == ["w5"]
    assert "w5" in prepare.show_report(report).splitlines()[-1]
    # the other order of appearance
    splits["train"].sort(key=lambda row: row["worker"] != "w5")
    rows, report = prepare.prepare_tldr(splits, workers=4)
    assert list(by_worker(rows, "train")) == ["w6", "w1", "w3", "w5"] and report["cut_tie"] == ["w2"]
    # both taken: no tie at the cut, and still in order of appearance
    rows, report = prepare.prepare_tldr(splits, workers=5)
    assert list(by_worker(rows, "train")) == ["w6", "w1", "w3", "w5", "w2"] and report["cut_tie"] == []


def test_caps_and_seeds():
    splits = make_splits()
    rows, _ = prepare.prepare_tldr(splits, workers=3, cap=4, cap_validation=2)
    assert set(by_worker(rows, "train").values()) == {4} and set(by_worker(rows, "validation").values()) == {2}
    # a cap beyond the smallest changes nothing
    assert prepare.prepare_tldr(splits, workers=3, cap=99) == prepare.prepare_tldr(splits, workers=3)
    # the smaller sample is the beginning of the larger one, of every worker
    whole, _ = prepare.prepare_tldr(splits, workers=3)
    for worker in ("w6", "w1", "w3"):
        first, more = (
            [row for row in some if row["user_id"] == worker and row["split"] == "train"] for some in (rows, whole)
        )
        assert first == more[:4]
    assert prepare.prepare_tldr(splits, workers=3, seed=42)[0] == whole
    other, _ = prepare.prepare_tldr(splits, workers=3, seed=7)
    assert other != whole and by_worker(other, "train") == by_worker(whole, "train")
    # the least busy worker is taken whole whatever the seed
    assert sorted(row["prompt"] for row in other if (row["user_id"], row["split"]) == ("w3", "train")) == sorted(
        row["prompt"] for row in whole if (row["user_id"], row["split"]) == ("w3", "train")
    )


def test_rows_that_hold_no_preference_are_left_out_before_workers_are_counted():
    splits = make_splits()
    same = [{"text": "the same", "policy": "ref", "note": None}] * 2
    blank = [{"text": " ", "policy": "ref", "note": None}, {"text": "x", "policy": "ref", "note": None}]
    splits["train"] += [comparison("w7", 100 + n, "train", summaries=same) for n in range(30)]
    splits["train"] += [comparison("w6", 200, "train", summaries=blank)]
    rows, report = prepare.prepare_tldr(splits, workers=3)
    assert list(by_worker(rows, "train")) == ["w6", "w1", "w3"]
    assert report["left_out"]["train"] == {"equal summaries": 30, "empty summaries": 1}
    check_preference_rows(Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("split", "row", "said"),
    [
        # the other config, axis: one summary with grades
        ("train", {"info": {"post": "p"}, "summary": {"text": "s"}, "worker": "w1"}, "no summaries and no choice"),
        ("validation", comparison("w1", 0, "validation", choice=2), "`choice` is 2, not 0 or 1"),
        ("train", comparison("w1", 0, "train", choice=True), "`choice` is True"),
        ("train", comparison("w1", 0, "train", summaries=[{"text": "one"}]), "`summaries` is not two records"),
        ("train", comparison("w1", 0, "train", worker=" "), "`worker` is ' '"),
        ("train", comparison("w1", 0, "train", worker=17), "`worker` is 17"),
        ("train", comparison("w1", 0, "train", info={"post": "p", "subreddit": "s"}), "a post and no title"),
        ("train", comparison("w1", 0, "train", info={"id": "x"}), "neither a post nor an article"),
        ("train", comparison("w1", 0, "train", info="text"), "`info` is a str"),
    ],
)
def test_another_schema_is_refused(split, row, said):
    splits = make_splits()
    splits[split].insert(3, row)
    with pytest.raises(DataError) as error:
        prepare.prepare_tldr(splits)
    assert said in str(error.value) and f"The {split} split" in str(error.value) and "row 3" in str(error.value)


def test_workers_who_cannot_be_had():
    splits = make_splits()
    with pytest.raises(DataError, match="9 workers were asked for and 8 have usable training rows"):
        prepare.prepare_tldr(splits, workers=9)
    # w4 and w7 have nothing in validation; of w7 an article only
    splits["validation"].append(article("w7", 9))
    with pytest.raises(
        DataError, match=r"\['w4', 'w7'\] are among the 8 busiest and have no usable row in validation"
    ):
        prepare.prepare_tldr(splits, workers=8)
    with pytest.raises(DataError, match="workers=0; at least 1"):
        prepare.prepare_tldr(splits, workers=0)
    with pytest.raises(DataError, match="cap=0; at least 1"):
        prepare.prepare_tldr(splits, cap=0)


def write_sources(folder: Path) -> list[str]:
    """The same data as a file of lines, packed, a Parquet file, a folder in the hub's layout, a folder of the original
    batches, whose news rows have other keys, and a saved dataset."""
    splits = make_splits()
    rows = [row for part in splits.values() for row in part]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "all.jsonl").write_text(text, encoding="utf-8")
    with gzip.open(folder / "all.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    Dataset.from_list(rows).to_parquet(folder / "all.parquet")
    for split, part in splits.items():
        (folder / "comparisons" / split).mkdir(parents=True)
        Dataset.from_list(part).to_parquet(folder / "comparisons" / split / "0000.parquet")
    DatasetDict({split: Dataset.from_list(part) for split, part in splits.items()}).save_to_disk(folder / "saved")
    (folder / "batches").mkdir()
    posts, news = [], []
    for row in rows:
        info = {key: value for key, value in row["info"].items() if value is not None}
        (news if "article" in info else posts).append(json.dumps(row | {"info": info}) + "\n")
    (folder / "batches" / "batch3.json").write_text("".join(posts), encoding="utf-8")
    (folder / "batches" / "cnndm2.json").write_text("".join(news), encoding="utf-8")
    names = ("all.jsonl", "all.jsonl.gz", "all.parquet", "comparisons", "batches", "saved")
    return [str(folder / name) for name in names]


def test_every_form_of_the_source_gives_the_same_bytes(tmp_path, capsys):
    outputs = []
    for number, source in enumerate(write_sources(tmp_path)):
        output = tmp_path / f"out{number}.jsonl.gz"
        assert prepare.main([str(output), "--source", source, "--workers", "4"]) == 0, capsys.readouterr().err
        outputs.append(output.read_bytes())
    assert len(set(outputs)) == 1 and len(outputs) == 6
    assert prepare.main([str(tmp_path / "plain.jsonl"), "--source", source, "--workers", "4"]) == 0
    assert gzip.decompress(outputs[0]) == (tmp_path / "plain.jsonl").read_bytes()
    # what was written is what the trainer reads
    for split, many in (("train", 9), ("validation", 4)):
        rows = load_preferences(tmp_path / "out0.jsonl.gz", split=split)
        check_preference_rows(rows, name=split)
        assert Counter(rows["user_id"]) == dict.fromkeys(("w6", "w1", "w3", "w2"), many)
        assert set(rows.column_names) == {"user_id", "prompt", "chosen", "rejected", "split"}


def test_sources_that_cannot_be_used(tmp_path, capsys):
    def error_of(*arguments: str) -> str:
        assert prepare.main([str(tmp_path / "out.jsonl"), *arguments]) == 2
        return capsys.readouterr().err

    # HF_HUB_OFFLINE is set: the hub cannot be reached
    assert "DataError" in (said := error_of()) and "--source" in said and "openai/summarize_from_feedback" in said
    assert "cannot be read" in error_of("--source", str(tmp_path / "nothing"))
    rows = make_splits()["train"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "has only the splits {'train': 70}" in error_of("--source", str(tmp_path / "train.jsonl"))
    rows[5] = rows[5] | {"split": "test"}
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "row 5: split='test'" in error_of("--source", str(tmp_path / "test.jsonl"))
    (tmp_path / "none.jsonl").write_text(json.dumps({"a": 1}) + "\n")
    assert "without a column 'split'" in error_of("--source", str(tmp_path / "none.jsonl"))
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows)}).save_to_disk(tmp_path / "two")
    assert "the splits ['test', 'train']" in error_of("--source", str(tmp_path / "two"))
    (tmp_path / "cut.jsonl").write_text(json.dumps(rows[0])[:-20] + "\n")
    assert "is not JSON at line 1" in error_of("--source", str(tmp_path / "cut.jsonl"))
    with pytest.raises(DataError, match=r"does not end in .jsonl or .jsonl.gz"):
        prepare.write_rows([], tmp_path / "out.csv")
    assert not (tmp_path / "out.jsonl").exists()


def answers(prompt: str, first: list[int], second: list[int]) -> list[dict]:
    return [
        {"prompt": prompt, "response": f"{name} to {prompt}", **dict(zip(prepare.ATTRIBUTES, scores, strict=True))}
        for name, scores in (("one", first), ("two", second))
    ]


def test_attributes_of_helpsteer2_are_labelers_who_prefer_the_higher_score(tmp_path, capsys):
    splits = {
        "train": answers("p0", [4, 3, 2, 1, 0], [3, 4, 0, 2, 4]) + answers("p1", [1, 1, 4, 4, 0], [0, 2, 3, 2, 1]),
        "validation": answers("p2", [4, 4, 4, 4, 4], [0, 0, 0, 0, 0]),
    }
    rows, report = prepare.prepare_helpsteer2(splits)
    better = {(row["user_id"], row["prompt"]): row["chosen"].split()[0] for row in rows}
    for prompt, expected in {
        "p0": ["one", "two", "one", "two", "two"],
        "p1": ["one", "two", "one", "one", "two"],
        "p2": ["one"] * 5,
    }.items():
        assert [better[attribute, prompt] for attribute in prepare.ATTRIBUTES] == expected
    assert [worker["ties"] for worker in report["workers"]] == [0] * 5
    assert all({row["chosen"].split()[0], row["rejected"].split()[0]} == {"one", "two"} for row in rows)

    # equal scores: a coin of the seed, about half each way; what is not equal does not depend on the seed
    many = [row for n in range(400) for row in answers(f"p{n}", [2, 2, 2, 2, 3], [2, 2, 2, 2, 1])]
    rows, report = prepare.prepare_helpsteer2({"train": many, "validation": many[:2]}, seed=1)
    again, _ = prepare.prepare_helpsteer2({"train": many, "validation": many[:2]}, seed=1)
    other, _ = prepare.prepare_helpsteer2({"train": many, "validation": many[:2]}, seed=2)
    assert rows == again and rows != other
    assert [worker["ties"] for worker in report["workers"]] == [401, 401, 401, 401, 0]
    for attribute in prepare.ATTRIBUTES:
        first = [row["chosen"].startswith(" one") for row in rows if row["user_id"] == attribute][:400]
        # 400 fair coins: 200 ± 10, four standard deviations
        assert sum(first) == 400 if attribute == "verbosity" else 160 <= sum(first) <= 240

    # equal answers hold no preference
    many[1]["response"] = many[0]["response"]
    _, report = prepare.prepare_helpsteer2({"train": many, "validation": many[:2]})
    assert report["left_out"] == {"train": {"equal answers": 1}, "validation": {"equal answers": 1}}

    for bad, said in (
        (many[1:4], "3 rows; two consecutive rows make a pair"),
        (many[1:3], "have different prompts"),
        ([many[0] | {"helpfulness": 1.5}, many[1]], "is not of nvidia/HelpSteer2: row 0"),
        ([], "0 rows"),
    ):
        with pytest.raises(DataError, match=said):
            prepare.prepare_helpsteer2({"train": bad, "validation": many[:2]})

    folder = tmp_path / "helpsteer2"
    folder.mkdir()
    for split, part in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    output = tmp_path / "out.jsonl"
    assert prepare.main([str(output), "--dataset", "helpsteer2", "--source", str(folder)]) == 0
    assert Counter(load_preferences(output, split="train")["user_id"]) == dict.fromkeys(prepare.ATTRIBUTES, 2)
    capsys.readouterr()
    assert prepare.main([str(output), "--dataset", "helpsteer2", "--source", str(folder), "--workers", "3"]) == 2
    assert "--workers is for tldr" in capsys.readouterr().err


# -- figures ----------------------------------------------------------------------------------------------------------


def cell(macro: float, users: dict[str, float], seeds: list[float]) -> dict:
    return {
        "macro": macro,
        "low": macro - 0.01,
        "high": macro + 0.012,
        "macro_by_seed": seeds,
        "micro": macro - 0.1,
        "users": {name: {"accuracy": a, "low": a - 0.03, "high": a + 0.02, "n": 100} for name, a in users.items()},
    }


def make_comparison(model: str, methods: dict[str, float], users: int = 5) -> dict:
    """Each method's best checkpoint is its number, each user's that and a thousandth for his place; the last is .02 less."""
    written = {}
    for method, macro in methods.items():
        both = {}
        for name, value in (("best", macro), ("last", macro - 0.02)):
            of_users = {f"worker{place}": round(value + place / 1000, 6) for place in range(users)}
            both[name] = cell(value, of_users, [value - 0.005, value + 0.005])
        written[method] = {"seeds": [0, 1]} | both
    return {
        "title": "TL;DR",
        "model": model,
        "dataset": "tldr.jsonl.gz",
        "split": "validation",
        "seeds": [0, 1],
        "methods": written,
    }


LLAMA = {"lora-global": 0.71, "lora-local": 0.62, "psharelora-si": 0.72, "psharelora-wu": 0.74, "share-a": 0.7}


def write_run(folder: Path, comparison: dict) -> str:
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(comparison), encoding="utf-8")
    return str(folder)


def heights(figure) -> dict[str, float]:
    """Height of each bar by what it stands for."""
    patches = [patch for axes in figure.axes for patch in axes.patches]
    found = {patch.get_gid(): patch.get_height() for patch in patches}
    assert len(found) == len(patches) and None not in found
    return found


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """`draw(*arguments)` runs the command and returns the figures by the name of their file."""

    def draw(*arguments: str) -> dict:
        kept = {}
        whole = figures.draw_figure

        def keep(rows, title, labels, note, path):
            kept[path.name] = whole(rows, title, labels, note, path)
            return kept[path.name]

        with monkeypatch.context() as patched:
            patched.setattr(figures, "draw_figure", keep)
            assert figures.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
        for name, figure in kept.items():
            assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
            # as drawn, nothing is below 5 points and nothing hangs over the edge
            renderer = figure.canvas.get_renderer()
            texts = figure.findobj(lambda artist: hasattr(artist, "get_fontsize") and artist.get_text().strip())
            assert min(text.get_fontsize() for text in texts) >= 5
            for text in texts:
                box = text.get_window_extent(renderer)
                assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height, text
        return kept

    return draw


def test_figure_1_has_the_numbers_and_the_papers(tmp_path, drawn, capsys):
    llama = write_run(tmp_path / "llama", make_comparison("meta-llama/Meta-Llama-3-8B", LLAMA))
    gptj = write_run(
        tmp_path / "gptj", make_comparison("EleutherAI/gpt-j-6b", {"share-rep": 0.6, "psharelora-g": 0.45})
    )
    kept = drawn(gptj, llama)
    figure = kept["figure_1.png"]
    expected = {}
    for model, ours in (("GPT-J 6B", {"share-rep": 0.6, "psharelora-g": 0.45}), ("Llama-3 8B", LLAMA)):
        expected |= {f"{name}/{model}/ours": value for name, value in ours.items() if name != "share-a"}
        paper = PUBLISHED["models"][model]["figure_1"]
        assert set(paper) == set(METHODS[:6])
        expected |= {f"{name}/{model}/paper": value for name, value in paper.items()}
    assert heights(figure) == pytest.approx(expected)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["GPT-J 6B", "Llama-3 8B"]
    # from below the lowest bar on
    assert axes.get_ylim()[0] <= 0.45
    # hatched and on white are the paper's alone
    for patch in axes.patches:
        paper = patch.get_gid().endswith("/paper")
        assert bool(patch.get_hatch()) == paper and (patch.get_facecolor()[:3] == (1, 1, 1)) == paper
        colour = patch.get_edgecolor() if paper else patch.get_facecolor()
        assert colour[:3] == to_rgba(figures.COLOURS[patch.get_gid().split("/")[0]])[:3]
    # a gap for each method that was not run: four of GPT-J, two of Llama-3, each where its bar would be
    gaps = [text for text in axes.texts if text.get_text() == "not run"]
    assert len(gaps) == 4 + 2
    places = {round(patch.get_x() + patch.get_width() / 2, 6) for patch in axes.patches}
    assert not places & {round(text.xy[0], 6) for text in gaps}
    assert len(places | {round(text.xy[0], 6) for text in gaps}) == 2 * 12
    # error bars from low to high
    lines = {
        container.get_label(): container.lines[2][0].get_segments()[0][:, 1].tolist() for container in axes.containers
        if container.get_label().startswith("_psh") or container.get_label().startswith("_share")
    }  # fmt: skip
    assert lines["_psharelora-wu/Llama-3 8B"] == pytest.approx([0.73, 0.752])
    assert lines["_share-rep/GPT-J 6B"] == pytest.approx([0.59, 0.612])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["Share Rep", "LoRA-global", "LoRA-local", "PSL(SI)", "PSL(G)", "PSL(WU)", "the paper's"]
    assert {name.partition("_")[2] for name in kept} == {
        "1.png", "2_gpt-j-6b.png", "3_gpt-j-6b.png", "2_llama-3-8b.png", "3_llama-3-8b.png",
    }  # fmt: skip


def test_figures_2_and_3_have_each_labeler_and_the_mean(tmp_path, drawn):
    llama = write_run(tmp_path / "llama", make_comparison("meta-llama/Meta-Llama-3-8B", LLAMA))
    kept = drawn(f"Llama-3 8B={llama}")
    paper = PUBLISHED["models"]["Llama-3 8B"]
    expected = {}
    for method in METHODS[1:6]:
        for place in range(5):
            if method in LLAMA:
                expected[f"{method}/labeler {place}/ours"] = LLAMA[method] + place / 1000
            expected[f"{method}/labeler {place}/paper"] = paper["figure_2"][method]["labelers"][place]
        if method in LLAMA:
            expected[f"{method}/mean/ours"] = LLAMA[method]
        expected[f"{method}/mean/paper"] = paper["figure_2"][method]["average"]
    figure = kept["figure_2_llama-3-8b.png"]
    assert heights(figure) == pytest.approx(expected)
    assert sum(text.get_text() == "not run" for axes in figure.axes for text in axes.texts) == 6  # (G), six groups
    assert len({axes.get_ylim() for axes in figure.axes}) == 1

    # share B is PSL(WU)
    expected = {}
    for name, macro in (("share-a", 0.7), ("share-b", 0.74)):
        for place in range(5):
            expected[f"{name}/{place}/ours"] = macro + place / 1000
            expected[f"{name}/{place}/paper"] = paper["figure_3"][name]["labelers"][place]
        expected |= {f"{name}/mean/ours": macro, f"{name}/mean/paper": paper["figure_3"][name]["average"]}
    assert heights(kept["figure_3_llama-3-8b.png"]) == pytest.approx(expected)


def test_checkpoint_and_published_can_be_chosen(tmp_path, drawn):
    llama = write_run(tmp_path / "llama", make_comparison("meta-llama/Meta-Llama-3-8B", LLAMA))
    figure = drawn(llama, "--checkpoint", "last", "--no-published")["figure_1.png"]
    expected = {f"{name}/Llama-3 8B/ours": value - 0.02 for name, value in LLAMA.items() if name != "share-a"}
    assert heights(figure) == pytest.approx(expected)
    assert "Last checkpoint" in figure.texts[-1].get_text() and "paper" not in figure.texts[-1].get_text()
    figure = drawn(llama, "--published")["figure_1.png"]
    said = " ".join(figure.texts[-1].get_text().split())
    assert "Best checkpoint, chosen on the pairs shown. Error bars: 95 %, of a mean over seeds" in said
    # another split chose
    comparison = make_comparison("meta-llama/Meta-Llama-3-8B", LLAMA) | {"split": "test", "chosen_on": "validation"}
    figure = drawn(write_run(tmp_path / "apart", comparison | {"seeds": [0]}))["figure_1.png"]
    assert figure.texts[-1].get_text().startswith("Best checkpoint. Error bars: 95 %, over pairs; one seed.")


def test_other_models_and_other_numbers_of_users_have_no_bars_of_the_paper(tmp_path, drawn, capsys):
    other = write_run(tmp_path / "other", make_comparison("some/other-model", LLAMA))
    kept = drawn(other)
    assert not [name for figure in kept.values() for name in heights(figure) if name.endswith("paper")]
    assert "None of these base models is in the paper" in kept["figure_1.png"].texts[-1].get_text()
    assert "figure_2_other-model.png" in kept
    # three labelers on a model of the paper: its mean over five can stand in Figure 1, its labelers are others
    three = write_run(tmp_path / "three", make_comparison("meta-llama/Meta-Llama-3-8B", LLAMA, users=3))
    kept = drawn(three)
    assert [name for name in heights(kept["figure_1.png"]) if name.endswith("paper")]
    assert not [name for name in heights(kept["figure_2_llama-3-8b.png"]) if name.endswith("paper")]
    assert (
        len(heights(kept["figure_2_llama-3-8b.png"])) == 4 * 4
    )  # methods of Figure 2 that were run, three users and the mean
    capsys.readouterr()
    many = write_run(tmp_path / "many", make_comparison("some/other-model", LLAMA, users=40))
    assert set(drawn(many)) == {"figure_1.png"}
    assert "Figure 2 has bars for each labeler and other-model has 40" in capsys.readouterr().out


def test_an_interval_that_is_not_there_is_not_drawn(tmp_path, drawn):
    comparison = make_comparison("some/other", {"lora-global": 0.7})
    cell = comparison["methods"]["lora-global"]["best"]
    cell |= {"low": None, "high": None, "macro_by_seed": [0.7]}
    figure = drawn(write_run(tmp_path / "one", comparison))["figure_1.png"]
    assert heights(figure) == {"lora-global/other/ours": 0.7}
    assert not [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert not [one for one in figure.axes[0].containers if one.get_label().startswith("_lora")]


def test_runs_that_cannot_be_drawn(tmp_path, capsys):
    def error_of(*arguments: str) -> str:
        assert figures.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "There is no" in error_of(str(tmp_path / "nothing")) and not (tmp_path / "out").exists()
    run = write_run(tmp_path / "run", make_comparison("some/model", LLAMA))
    assert "Two runs are called 'model'" in error_of(run, f"model={run}")
    write_run(tmp_path / "old", {"methods": {"lora-global": {"best": {"macro": 0.7}}}})
    assert "methods['lora-global'] has no 'best' with `macro` and `users`" in error_of(str(tmp_path / "old"))
    write_run(tmp_path / "empty", {"title": "t"})
    assert "has no `methods`" in error_of(str(tmp_path / "empty"))
    (tmp_path / "empty" / "comparison.json").write_text('{"title"')
    assert "is not JSON" in error_of(str(tmp_path / "empty"))


def test_the_published_bars_fit_one_another_and_the_text():
    llama, gptj = PUBLISHED["models"]["Llama-3 8B"], PUBLISHED["models"]["GPT-J 6B"]
    for bars in [*llama["figure_2"].values(), *llama["figure_3"].values(), gptj["figure_3"]["share-a"]]:
        # five numbers of four decimals, read off a picture
        assert sum(bars["labelers"]) / 5 == pytest.approx(bars["average"], abs=1.5e-4)
    # one bar of the paper is not the mean of its labelers, by more than rounding; its note says so
    share_b = gptj["figure_3"]["share-b"]
    assert sum(share_b["labelers"]) / 5 == pytest.approx(0.6549, abs=5e-5) and share_b["average"] == 0.6547
    assert "the mean of the five bars is .6549" in share_b["note"]
    for method, bars in llama["figure_2"].items():
        assert bars["average"] == pytest.approx(llama["figure_1"][method], abs=1.5e-4)
    assert llama["figure_3"]["share-b"]["labelers"] == llama["figure_2"]["psharelora-wu"]["labelers"]
    # the abstract's numbers: 74.65 against 73.25, 66.93 against 66.13 (a bar of .6612)
    assert max(llama["figure_1"].values()) == 0.7465 and llama["figure_1"]["lora-global"] == 0.7325
    assert max(gptj["figure_1"].values()) == 0.6693 and gptj["figure_1"]["lora-global"] == 0.6612
    # share B is above share A for every labeler of both models
    for bars in (llama["figure_3"], gptj["figure_3"]):
        assert all(b > a for a, b in zip(bars["share-a"]["labelers"], bars["share-b"]["labelers"], strict=True))
    assert gptj["figure_3"]["share-b"]["average"] not in gptj["figure_1"].values()
    of_pairs = PUBLISHED["binomial_standard_error_at_0.70"]
    for name, n in PUBLISHED["n_validation"].items():
        assert (0.7 * 0.3 / n) ** 0.5 == pytest.approx(of_pairs[name], rel=0.01)


# -- configurations -----------------------------------------------------------------------------------------------------


def real_config(model: str, layers: int = 2):
    """The published shape of an attention layer, with few layers and a tiny vocabulary."""
    few = {"vocab_size": 64, "num_labels": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if model == "EleutherAI/gpt-j-6b":
        return GPTJConfig(n_embd=4096, n_head=16, rotary_dim=64, n_layer=layers, **few)
    assert model == "meta-llama/Meta-Llama-3-8B"
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, **heads, **few)


def test_there_is_a_configuration_for_each_model_and_each_reading():
    names = [f"tldr_{model}_{which}" for model in ("gptj_6b", "llama3_8b") for which in ("qk", "qv")]
    assert [path.stem for path in CONFIGS] == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_has_the_papers_values_and_fits_the_real_architecture(path):
    text = path.read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] == 128
    assert config["lora_alpha"] / config["lora_r"] == 0.5 and config["lora_r"] == 32
    assert (config["learning_rate"], config["lr_scheduler_type"], config["lora_dropout"]) == (5e-5, "linear", 0.05)
    assert (config["num_train_epochs"], config["max_length"]) == (3, 2048)
    assert config["bf16"] is True and config["gradient_checkpointing"] is True and config["dtype"] == "bfloat16"
    assert sorted(config["methods"]) == sorted(METHODS) and config["seeds"][0] == 42
    # 26,865 rows: 210 steps an epoch, hence the authors' checkpoints 420 (two epochs) and 63 (.3)
    steps = -(-5 * 5373 // 128)
    assert (steps, 2 * steps, round(0.3 * steps)) == (210, 420, 63)
    # every value says where it is from
    for line in text.splitlines():
        if line.strip() and line[0] != "#" and not line.endswith((":", "_proj")):
            assert any(tag in line for tag in ("[paper]", "[code]", "[ours]")), line
    assert yaml.safe_load(text.replace("# load_in_8bit: true ", "load_in_8bit: true "))["load_in_8bit"] is True
    assert "load_in_8bit" not in config

    # the adapter that these values describe, on the model's own shapes; nothing is allocated
    targets = {"qv": ["q_proj", "v_proj"], "qk": ["q_proj", "k_proj"]}[path.stem[-2:]]
    assert config["lora_target_modules"] == targets
    workers = [f"w{number}" for number in range(5)]
    with torch.device("meta"):
        base = AutoModelForSequenceClassification.from_config(real_config(config["model_name_or_path"]))
        model = get_peft_model(
            base,
            ShareLoraConfig(
                task_type="SEQ_CLS",
                r=config["lora_r"],
                lora_alpha=config["lora_alpha"],
                lora_dropout=config["lora_dropout"],
                target_modules=config["lora_target_modules"],
                users=workers,
            ),
        )
    found = [name.rsplit(".", 1)[1] for name in model.targeted_module_names]
    assert Counter(found) == dict.fromkeys(targets, 2)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    # Llama-3 has 8 heads of 128 for keys and values; GPT-J 16 of 256 for all
    out = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024} if "lama" in config["model_name_or_path"] else {}
    for target in targets:
        own = {name: shape for name, shape in shapes.items() if f".{target}." in name}
        assert sorted(own.values()) == sorted([(5, 32, 4096), (out.get(target, 4096), 32)] * 2)
    assert sum(f".{target}." in name for name in shapes for target in targets) == len(shapes) - 1
    (head,) = (shape for name, shape in shapes.items() if "score" in name)
    assert head == (1, 4096)


@pytest.mark.parametrize("arch", ["gptj", "llama"])
def test_pad_is_the_end_token_and_the_reward_is_read_at_the_text_s_end(arch, tmp_path):
    """Neither tokenizer has a pad token; as in the authors' code it becomes the end token, also in the model's config."""
    from trl_sharelora import ShareLoraRewardConfig, ShareLoraRewardTrainer

    save_tiny(arch, tmp_path / "base", pad_token_id=None)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").pad_token is None
    rows, _ = prepare.prepare_tldr(make_splits(), workers=2, cap=3)
    # in words that the tokenizer knows
    texts = ("prompt", "chosen", "rejected")
    words: dict[str, str] = {}
    for row in rows:
        for key in texts:
            row[key] = "".join(" " + words.setdefault(word, f"w{len(words)}") for word in row[key].split())
    assert len(words) <= 90
    trainer = ShareLoraRewardTrainer(
        model=str(tmp_path / "base"),
        args=ShareLoraRewardConfig(
            output_dir=str(tmp_path / "model"),
            use_cpu=True,
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([row for row in rows if row["split"] == "train"]),
        peft_config=ShareLoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    assert trainer.processing_class.pad_token == trainer.processing_class.eos_token == "<eos>"
    assert trainer.model.config.pad_token_id == trainer.processing_class.eos_token_id
    assert trainer.users.ids == ["w6", "w1"]

    model = trainer.model.eval()
    ids = [row["chosen_ids"] for row in trainer.train_dataset]
    assert all(one[-1] == tokenizer.eos_token_id for one in ids)
    assert trainer.processing_class.padding_side == "right"
    longest = max(map(len, ids)) + 3
    padded = torch.tensor([one + [tokenizer.eos_token_id] * (longest - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
    users = ["w6"] * 3 + ["w1"] * 3
    with torch.no_grad():
        together = model(input_ids=padded, attention_mask=mask, user_ids=users).logits[:, 0]
        alone = [
            model(input_ids=torch.tensor([one]), user_ids=[user]).logits.item()
            for one, user in zip(ids, users, strict=True)
        ]
        # the end token is a pad token too: the reward is that of the text's last word
        cut = [
            model(input_ids=torch.tensor([one[:-1]]), user_ids=[user]).logits.item()
            for one, user in zip(ids, users, strict=True)
        ]
    assert together.tolist() == pytest.approx(alone, abs=1e-5) and alone == pytest.approx(cut, abs=1e-5)
    assert together.std() > 1e-3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_compare_command_takes_every_key(path):
    from trl_sharelora.scripts import compare, launch

    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    # an unknown key is an error there
    argv = ["--config", str(path), "--use_cpu"]
    script_args, training_args, model_args = launch.parse_arguments(compare.make_parser(), argv)
    for name, value in config.items():
        holders = [one for one in (script_args, training_args, model_args) if hasattr(one, name)]
        assert holders and all(getattr(one, name) == value for one in holders), name
    assert model_args.load_in_8bit is False
    assert {name: method.title for name, method in compare.METHODS.items() if name in figures.LABELS} == figures.LABELS
    assert sorted(compare.METHODS) == sorted(METHODS)
    # three epochs whatever the stages: .3 + 2.7 and 2 + 1 at a third of the rate
    of = compare.METHODS
    assert 3 * of["psharelora-wu"].warm_up == pytest.approx(0.3) and 3 * of["psharelora-g"].warm_up == pytest.approx(2)
    assert of["psharelora-g"].second_rate * training_args.learning_rate == pytest.approx(1.67e-5, rel=2e-3)


def test_the_three_steps_run_one_after_another(tmp_path, drawn, capsys):
    """As the README has it, a configuration as shipped; only data, base, steps and the choice of methods are small."""
    from trl_sharelora.scripts import compare

    (tmp_path / "raw.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for part in make_splits().values() for row in part)
    )
    data = tmp_path / "tldr.jsonl.gz"
    assert prepare.main([str(data), "--source", str(tmp_path / "raw.jsonl"), "--workers", "3"]) == 0
    run = tmp_path / "run"
    argv = ["--config", str(FOLDER / "tldr_gptj_6b_qv.yaml"), "--dataset_name", str(data), "--output_dir", str(run)]
    argv += ["--model_name_or_path", save_tiny("gptj", tmp_path / "base"), "--use_cpu", "--disable_tqdm", "True"]
    argv += ["--gradient_accumulation_steps", "1", "--max_steps", "10", "--report_to", "none", "--dtype", "float32"]
    argv += ["--methods", "psharelora-wu", "share-a", "--seeds", "42"]
    assert compare.main(argv) == 0
    written = json.loads((run / "comparison.json").read_text(encoding="utf-8"))
    assert sorted(written["methods"]) == ["psharelora-wu", "share-a"]
    # labelers in the order of the file: the busiest first
    for method in written["methods"].values():
        assert list(method["best"]["users"]) == ["w6", "w1", "w3"]
        assert {user["n"] for user in method["best"]["users"].values()} == {5}
    capsys.readouterr()
    kept = drawn(f"GPT-J 6B={run}", "--checkpoint", "last")
    bars = heights(kept["figure_1.png"])
    assert bars["psharelora-wu/GPT-J 6B/ours"] == written["methods"]["psharelora-wu"]["last"]["macro"]
    of_figure_3 = heights(kept["figure_3_gpt-j-6b.png"])
    for name, method in (("share-a", "share-a"), ("share-b", "psharelora-wu")):
        users = written["methods"][method]["last"]["users"]
        assert [of_figure_3[f"{name}/{place}/ours"] for place in range(3)] == [
            users[w]["accuracy"] for w in ("w6", "w1", "w3")
        ]
