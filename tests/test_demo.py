"""The demo: its generator's truth, its split of one's own data, its table, and whole runs at reduced size.

A run's table is compared with rewards computed here, row by row and without padding, from the saved adapters.
"""

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers import preference_rows, save_tiny
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_sharelora import UserRegistry
from trl_sharelora.demo import generator, main, tasks
from trl_sharelora.demo.base_model import build_base_model
from trl_sharelora.demo.results import (
    draw_picture,
    mean_over_users,
    plain_table,
    print_table,
    summary_table,
    table_cells,
    user_table,
)
from trl_sharelora.errors import DataError


# ---------------------------------------------------------------- the generator


def make(seed=0, n_users=6, fewest=10, most=60, n_test=40):
    rng = np.random.default_rng(seed)
    users = generator.make_users(n_users, fewest, most, rng)
    return users, generator.make_log(users, n_test, rng)


def test_preferred_side_is_as_frequent_as_the_true_margin_says():
    users, rows = make(n_users=3, fewest=3000, most=3000, n_test=1)
    margins = np.array([row["true_margin"] for row in rows])
    # for pairs with |margin| = m the reply of higher true reward is chosen with probability sigmoid(m)
    for low, high in ((0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 5.0), (5.0, 20.0)):
        part = margins[(np.abs(margins) >= low) & (np.abs(margins) < high)]
        expected = float(np.mean(1 / (1 + np.exp(-np.abs(part)))))
        share = float(np.mean(part > 0) + np.mean(part == 0) / 2)
        assert len(part) > 300
        # five standard deviations
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / len(part)) + 1e-9, (low, high)


def attributes_of(text: str) -> np.ndarray:
    """Attributes read off a reply's words, by another road than the one that made it."""

    def has(sentences):
        return any(sentence.split(" {}")[0] in text for sentence in sentences)

    for yes, no in (
        (generator.POLITE, generator.RUDE),
        (generator.SAFE, generator.RECKLESS),
        (generator.CASUAL, generator.FORMAL),
        (generator.EXACT, generator.VAGUE),
    ):
        assert has(yes) != has(no)
    n_more = sum(sentence in text for sentence in generator.MORE)
    values = [has(generator.POLITE), has(generator.SAFE), n_more / 2, has(generator.CASUAL), has(generator.CHEERFUL)]
    return np.array([*values, has(generator.EXACT)], dtype=float)


def test_true_margin_is_what_the_texts_and_the_users_tastes_say():
    users, rows = make()
    weights = {}
    for user in users:
        # the documented formula, with the mixture as it is reported (4 decimals)
        weights[user.user_id] = generator.SHARED + sum(
            share * generator.TASTES[taste] for taste, share in user.mixture.items()
        )
        assert sum(user.mixture.values()) == pytest.approx(1, abs=2e-4)
        np.testing.assert_allclose(user.weights, weights[user.user_id], atol=2e-3)
    for row in rows:
        difference = attributes_of(row["chosen"]) - attributes_of(row["rejected"])
        assert row["true_margin"] == pytest.approx(float(weights[row["user_id"]] @ difference), abs=1e-2)


def test_best_possible_by_hand():
    # sigmoid(ln 3) = 3/4, sigmoid(-ln 9) = 1/10 so the other side wins with 9/10, a tie is a coin
    margins = np.array([math.log(3), -math.log(9), 0.0])
    assert generator.best_possible(margins) == pytest.approx((0.75 + 0.9 + 0.5) / 3, abs=1e-12)


def test_no_rule_beats_the_best_possible_and_the_true_reward_reaches_it():
    _, rows = make(n_users=2, fewest=1, most=1, n_test=4000)
    margins = np.array([row["true_margin"] for row in rows if row["split"] == "test"])
    best = generator.best_possible(margins)
    assert 0.8 < best < 0.95
    right = (margins > 0) + (margins == 0) / 2
    assert abs(right.mean() - best) < 4 * right.std() / math.sqrt(len(right))


def test_same_seed_same_log_other_seed_another():
    assert make(seed=3)[1] == make(seed=3)[1]
    assert make(seed=3)[1] != make(seed=4)[1]
    one, two = (generator.make_corpus(50, np.random.default_rng(7)) for _ in range(2))
    assert one == two


def test_counts_are_uneven_and_kept():
    users, rows = make(n_users=6, fewest=10, most=160, n_test=40)
    frame = pd.DataFrame(rows)
    counts = frame[frame.split == "train"].user_id.value_counts()
    # equal ratios: 160 / 10 = 16 = 2^4 over five gaps, that is 2^(4/5) each
    expected = [round(160 / 2 ** (0.8 * place)) for place in range(6)]
    assert [counts[user.user_id] for user in users] == expected
    assert expected[0] == 160 and expected[-1] == 10
    assert set(frame[frame.split == "test"].user_id.value_counts()) == {40}


def test_users_main_tastes_take_turns_and_differ():
    users, _ = make(n_users=6)
    assert len({user.main_taste for user in users}) == 3
    weights = np.array([user.weights for user in users])
    np.testing.assert_allclose(weights[:, :2], np.tile(generator.SHARED[:2], (6, 1)))  # all want these alike
    assert (np.sign(weights[:, 3]).min(), np.sign(weights[:, 3]).max()) == (-1, 1)  # some like casual talk, some not


def test_no_test_pair_occurs_in_training():
    _, rows = make(n_users=8, fewest=50, most=400, n_test=200)
    pairs = {"train": set(), "test": set()}
    for row in rows:
        pairs[row["split"]].add((row["prompt"], frozenset((row["chosen"], row["rejected"]))))
        assert row["chosen"] != row["rejected"]
    assert not pairs["train"] & pairs["test"]
    assert len(pairs["train"]) + len(pairs["test"]) == len(rows)  # no pair twice at all
    assert len({row["prompt"] for row in rows}) == len(generator.TOPICS) * len(generator.QUESTIONS)


def test_too_many_users_are_refused():
    with pytest.raises(ValueError, match=f"names for 2 to {len(generator.NAMES)}"):
        generator.make_users(len(generator.NAMES) + 1, 10, 20, np.random.default_rng(0))
    assert len(set(generator.NAMES)) == len(generator.NAMES)


def test_base_model_learns_to_read_and_knows_every_word(tmp_path):
    rng = np.random.default_rng(0)
    _, rows = make()
    replies = [row["chosen"] for row in rows]
    built = build_base_model(tmp_path, generator.make_corpus(200, rng), replies, steps=30, seed=0, hidden_size=32)
    assert built["last_loss"] < built["first_loss"] - 0.5
    # an untrained model is no better than guessing among the words
    assert built["first_loss"] == pytest.approx(math.log(built["words"]), rel=0.2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.unk_token_id not in tokenizer(" ".join(replies))["input_ids"]


# ---------------------------------------------------------------- one's own rows


def own_rows(counts, seed=0, **kwargs):
    ids = [user_id for user_id, count in counts.items() for _ in range(count)]
    rows = preference_rows(1, n=len(ids), seed=seed, **kwargs)
    return [row | {"user_id": user_id} for row, user_id in zip(rows, ids, strict=True)]


def test_split_takes_a_fifth_of_each_users_pairs():
    dataset = Dataset.from_list(own_rows({"ann": 50, "bob": 10, "cat": 2, "dan": 1}))
    splits = tasks.split_of_rows(dataset, "user_id", seed=0)
    frame = pd.DataFrame({"user": dataset["user_id"][:], "split": splits})
    tested = frame[frame.split == "test"].user.value_counts().to_dict()
    assert tested == {"ann": 10, "bob": 2, "cat": 1}  # dan's only comparison is for training
    assert splits == tasks.split_of_rows(dataset, "user_id", seed=0)
    assert splits != tasks.split_of_rows(dataset, "user_id", seed=1)


def test_split_keeps_repeated_pairs_of_a_user_together():
    rows = own_rows({"ann": 20}, conversational=True)
    # each pair three times: as it is, again, and decided the other way
    rows += [dict(row) for row in rows] + [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows
    ]
    splits = tasks.split_of_rows(Dataset.from_list(rows), "user_id", seed=0)
    assert splits[:20] == splits[20:40] == splits[40:]
    assert splits.count("test") == 12


def test_split_column_is_used_as_it_is():
    rows = own_rows({"ann": 5})
    for row, split in zip(rows, ("train", "train", "validation", "test", "holdout"), strict=True):
        row["split"] = split
    assert tasks.split_of_rows(Dataset.from_list(rows), "user_id", 0) == ["train", "train", None, "test", None]
    # validation stands in where there is no test
    assert tasks.split_of_rows(Dataset.from_list(rows[:3]), "user_id", 0) == ["train", "train", "test"]


def test_split_column_without_test_rows_says_what_to_do():
    rows = [row | {"split": "dev"} for row in own_rows({"ann": 3})]
    with pytest.raises(DataError, match=r"'split' holds \{'dev': 3\}.*'train'.*Rename its values, or drop the column"):
        tasks.split_of_rows(Dataset.from_list(rows), "user_id", 0)


@pytest.mark.parametrize(
    "arguments, missing", [(["--dataset", "x.jsonl"], "--model"), (["--model", "somewhere"], "--dataset")]
)
def test_dataset_and_model_go_together(arguments, missing, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"was given without {missing}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--epochs", "3", "--user_column", "worker"],
            "--user_column, --epochs would have no effect without --dataset",
        ),
        (["--quick", "--dataset", "x", "--model", "y"], "--quick would have no effect with --dataset"),
    ],
)
def test_arguments_without_effect_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_rows_that_leave_no_test_name_the_likely_cause(tmp_path):
    rows = [row | {"user_id": f"row{number}"} for number, row in enumerate(own_rows({"ann": 4}))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match="4 rows, and no user has two different pairs. Is 'user_id' the column"):
        main(["--dataset", str(data), "--model", "nowhere", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "log.jsonl").exists()


# ---------------------------------------------------------------- the table


def accuracies(values):
    return pd.DataFrame({"user_id": list(values), "n": 10, "accuracy": list(values.values()), "low": 0.1, "high": 0.9})


def test_table_sorts_by_comparisons_and_means_are_over_users():
    pooled, personal = {"ann": 0.5, "bob": 0.6, "cat": 0.7}, {"cat": 0.8, "ann": 0.9, "bob": 0.6}
    table = user_table({"bob": 7, "ann": 3, "cat": 30}, accuracies(pooled), accuracies(personal))
    assert table["user_id"].tolist() == ["cat", "bob", "ann"]
    assert table["comparisons"].tolist() == [30, 7, 3]
    np.testing.assert_allclose(table["gain"], [0.1, 0.0, 0.4])
    summary = summary_table(table)
    assert len(summary) == 1  # three users are not cut into thirds
    line = summary.iloc[0]
    assert line["sharelora"] == pytest.approx((0.8 + 0.6 + 0.9) / 3)
    # by hand: gains .1, 0, .4; mean 1/6; sample variance .13/3 = .04333; t(2 degrees, 97.5 %) = 4.302653
    assert line["gain"] == pytest.approx(1 / 6)
    assert line["gain_pm"] == pytest.approx(4.302653 * math.sqrt(0.13 / 3 / 3), rel=1e-6)
    headings, lines, means = table_cells(table, summary)
    assert lines[0] == ["cat", "30", "70.0", "80.0", "+10.0"]
    assert means[0][:2] == ["all 3", "3-30"] and means[0][-1] == "+16.7 ± 51.7"
    text = plain_table(headings, lines, means, 1).splitlines()
    assert len({len(line) for line in text[2:]}) == 1  # columns stand under each other
    assert "best possible" not in " ".join(headings)


def test_thirds_of_users_by_comparisons():
    ids = [f"u{number}" for number in range(13)]
    values = {user_id: number / 100 for number, user_id in enumerate(ids)}
    table = user_table({u: 100 - n for n, u in enumerate(ids)}, accuracies(values), accuracies(values))
    summary = summary_table(table)
    assert summary["users"].tolist() == ["all 13", "busiest 4", "middle 5", "thinnest 4"]
    np.testing.assert_allclose(summary["pooled"], [0.06, 0.015, 0.06, 0.105])
    assert summary[["fewest", "most"]].to_numpy().tolist() == [[88, 100], [97, 100], [92, 96], [88, 91]]


def test_one_user_has_no_interval():
    assert mean_over_users([0.75])[0] == 0.75
    assert math.isnan(mean_over_users([0.75])[1])


@pytest.mark.parametrize("rich", [True, False])
def test_ids_are_shown_and_never_interpreted(rich, capsys, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)  # import raises ImportError
    values = {"[bold]x[/bold]": 0.5, "a\nb\x1b[31m": 0.5, "long" * 20: 0.5}
    table = user_table(dict.fromkeys(values, 1), accuracies(values), accuracies(values))
    print_table(table, summary_table(table))
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in out
    assert "'a\\nb\\x1b[31m'" in out and "\x1b[31m" not in out
    assert "longlonglonglonglongl..." in out


@pytest.mark.parametrize("n_users", [1, 3, 12, 41])
def test_picture_is_drawn_for_any_number_of_users_and_any_id(n_users, tmp_path):
    values = {f"$\\frac{{{number}$": 0.5 + number / 100 for number in range(n_users)}  # broken TeX
    table = user_table(
        {user_id: number for number, user_id in enumerate(values)}, accuracies(values), accuracies(values)
    )
    draw_picture(table, summary_table(table), tmp_path / "users.png")
    assert (tmp_path / "users.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_many_users_are_abridged():
    values = {f"u{number:03}": 0.5 for number in range(100)}
    table = user_table(dict.fromkeys(values, 1), accuracies(values), accuracies(values))
    _, lines, _ = table_cells(table, summary_table(table))
    assert len(lines) == 21 and lines[10][0] == "..." and (lines[9][0], lines[11][0]) == ("u009", "u090")


# ---------------------------------------------------------------- whole runs


def row_by_row(model, tokenizer, rows, user_column="user_id", personal=False):
    """Accuracy per user; one text at a time, so that there is no padding and no mixing of users."""

    def reward(text, user_id):
        inputs = tokenizer(text + tokenizer.eos_token, return_tensors="pt")
        with torch.no_grad():
            kwargs = {"user_ids": [user_id]} if personal else {}
            return float(
                model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **kwargs).logits
            )

    right = {}
    for row in rows:
        user_id = row[user_column]
        difference = reward(row["prompt"] + row["chosen"], user_id) - reward(row["prompt"] + row["rejected"], user_id)
        right.setdefault(user_id, []).append((np.sign(difference) + 1) / 2)
    return {user_id: float(np.mean(values)) for user_id, values in right.items()}


def saved_reward_model(base, adapter):
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    torch.manual_seed(99)  # the head must come from the adapter, not from this draw
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    return PeftModel.from_pretrained(model, adapter).eval(), tokenizer


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A whole quick run, as a user starts it: another process, nothing set but what `make demo` sets."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "trl_sharelora.cli", "demo", "--quick", "--output_dir", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out", done


def test_run_writes_everything_and_frightens_nobody(quick):
    out, done = quick
    for name in ("users.png", "users.csv", "summary.csv", "log.jsonl", "truth.jsonl", "base_model/model.safetensors"):
        assert (out / name).stat().st_size > 0, name
    for name in ("pooled_lora", "sharelora", "one_user"):
        assert (out / name / "adapter_model.safetensors").exists(), name
    assert (out / "users.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # on a CPU with AVX512-BF16, bitsandbytes says one line of its own when it is imported
    said = [line for line in done.stderr.splitlines() if "gemm_4bit_forward" not in line]
    assert said == []
    assert "Warning" not in done.stdout and "{" not in done.stdout
    assert "trl-sharelora eval --model_name_or_path out/sharelora" in done.stdout


def test_table_is_what_the_saved_adapters_give(quick):
    out, _ = quick
    rows = [row for row in read_lines(out / "log.jsonl") if row["split"] == "test"]
    table = pd.read_csv(out / "users.csv").set_index("user_id")
    pooled = row_by_row(*saved_reward_model(out / "base_model", out / "pooled_lora"), rows)
    personal = row_by_row(*saved_reward_model(out / "base_model", out / "sharelora"), rows, personal=True)
    assert table["pooled"].to_dict() == pytest.approx(pooled, abs=1e-12)
    assert table["sharelora"].to_dict() == pytest.approx(personal, abs=1e-12)
    assert (table["pooled"] != table["sharelora"]).any()
    summary = pd.read_csv(out / "summary.csv").iloc[0]
    assert summary["pooled"] == pytest.approx(np.mean(list(pooled.values())))
    assert summary["sharelora"] == pytest.approx(np.mean(list(personal.values())))


def test_table_has_the_truth(quick):
    out, _ = quick
    table, log = pd.read_csv(out / "users.csv").set_index("user_id"), pd.DataFrame(read_lines(out / "log.jsonl"))
    for user_id, line in table.iterrows():
        own = log[log.user_id == user_id]
        assert line["comparisons"] == (own.split == "train").sum()
        margins = own[own.split == "test"].true_margin.abs()
        assert line["test_rows"] == len(margins)
        assert line["best_possible"] == pytest.approx((1 / (1 + np.exp(-margins))).mean())
    assert {row["user_id"]: row["main_taste"] for row in read_lines(out / "truth.jsonl")} == table[
        "main_taste"
    ].to_dict()


def test_exported_user_is_an_ordinary_lora_with_the_same_accuracy(quick):
    out, _ = quick
    config = json.loads((out / "one_user" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    rows = [row for row in read_lines(out / "log.jsonl") if row["split"] == "test"]
    table = pd.read_csv(out / "users.csv")
    busiest = table["user_id"][0]
    tokenizer = AutoTokenizer.from_pretrained(out / "sharelora")
    model = AutoModelForSequenceClassification.from_pretrained(
        out / "base_model", num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    model = PeftModel.from_pretrained(model, out / "one_user").eval()
    own = row_by_row(model, tokenizer, [row for row in rows if row["user_id"] == busiest])
    assert own[busiest] == pytest.approx(table["sharelora"][0], abs=1e-12)


def test_own_data_and_own_model(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base", causal=True)
    rows = own_rows({"ann": 12, "bob": 7, "cat": 5}, seed=1)
    rows = [{"worker" if name == "user_id" else name: value for name, value in row.items()} for row in rows]
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 4 == 0 else "train"
        row["note"] = "not used"
    rows.append(rows[0] | {"worker": "eve", "split": "test"})  # never trained on
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    threads = torch.get_num_threads()
    arguments = ["--dataset", str(data), "--model", base, "--user_column", "worker", "--output_dir", str(out)]
    assert main([*arguments, "--learning_rate", "1e-2", "--epochs", "1"]) == 0

    test = [row for row in rows if row["split"] == "test"]
    table = pd.read_csv(out / "users.csv").set_index("user_id")
    assert "best_possible" not in table.columns
    assert table["comparisons"].to_dict() == {"ann": 9, "bob": 5, "cat": 4, "eve": 0}
    pooled = row_by_row(*saved_reward_model(base, out / "pooled_lora"), test, "worker")
    known = [row for row in test if row["worker"] != "eve"]
    personal = row_by_row(*saved_reward_model(base, out / "sharelora"), known, "worker", personal=True)
    assert table["pooled"].to_dict() == pytest.approx(pooled, abs=1e-12)
    assert table["sharelora"].drop("eve").to_dict() == pytest.approx(personal, abs=1e-12)
    assert UserRegistry.load(out / "sharelora").ids == ["ann", "bob", "cat"]
    assert read_lines(out / "log.jsonl")[0].keys() == {"worker", "prompt", "chosen", "rejected", "split"}
    printed = capsys.readouterr().out
    assert "1 test rows are of users without training rows" in printed
    assert "best" not in printed.split("Accuracy on test")[1] and "--user_column worker" in printed
    assert torch.get_num_threads() == threads


def test_own_data_without_split_on_an_encoder(tmp_path):
    base = save_tiny("bert", tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in own_rows({"ann": 10, "bob": 5})), encoding="utf-8")
    out = tmp_path / "out"
    assert main(["--dataset", str(data), "--model", base, "--output_dir", str(out), "--epochs", "1"]) == 0
    assert pd.read_csv(out / "users.csv")[["user_id", "comparisons", "test_rows"]].to_numpy().tolist() == [
        ["ann", 8, 2],
        ["bob", 4, 1],
    ]
