"""`trl-sharelora compare`: all methods in one command, resumed method by method, with honest choices."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from helpers import preference_rows, save_tiny

from trl_sharelora.cli import main
from trl_sharelora.comparison import Run
from trl_sharelora.data import load_preferences
from trl_sharelora.demo.base_model import make_model, make_tokenizer
from trl_sharelora.demo.tasks import make_world
from trl_sharelora.errors import DataError
from trl_sharelora.scripts import compare
from trl_sharelora.trainers.methods import METHODS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("base"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def log(tmp_path):
    rows = preference_rows(3, 48)
    for number, row in enumerate(rows):
        row["split"] = ("train", "train", "validation", "test")[number // 3 % 4]
    return write(tmp_path / "log.jsonl", rows)


def arguments(base, log, out, **changes):
    values = dict(
        model_name_or_path=base,
        dataset_name=log,
        dataset_validation_split="validation",
        output_dir=str(out),
        per_device_train_batch_size=6,
        num_train_epochs=3,
        learning_rate=1e-2,
        evaluations=3,
        lora_r=4,
        lora_target_modules=["q_proj", "v_proj"],
        use_cpu="true",
        bf16="false",
        gradient_checkpointing="false",
        logging_strategy="no",
        report_to="none",
        disable_tqdm="true",
    )
    flat = ["compare"]
    for name, value in (values | changes).items():
        flat += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return flat


def test_all_methods_in_one_command_and_again_without_training(base, log, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(arguments(base, log, out)) == 0
    printed = capsys.readouterr().out
    assert "chosen on 'validation'; the reported split chose nothing" in printed
    found = json.loads((out / "comparison.json").read_text())
    assert list(found["methods"]) == list(METHODS) and found["baseline"] == "lora-global"
    for name in METHODS:
        assert f"| {name} | 1 |" in printed
        cell = found["methods"][name]["last"]
        assert list(cell["users"]) == ["user0", "user1", "user2"] and all(u["n"] == 4 for u in cell["users"].values())
        run = Run.load(out / name / "seed-42")
        assert [entry["done"] for entry in run.history] == pytest.approx([1 / 3, 2 / 3, 1.0], abs=0.1)
        assert (out / name / "seed-42" / "adapter_config.json").is_file()
        own = [entry for entry in run.history if entry["stage"] == run.history[-1]["stage"]]
        assert len(own) == {"psharelora-g": 1}.get(name, len(run.history))  # 2 of 3 evaluations are in its warm-up
        if own[-1]["macro"] > max((entry["macro"] for entry in own[:-1]), default=-1):
            assert run.margins["best"].equals(run.margins["last"])
    # the second time nothing is trained; a result that is missing is made alone
    (out / "svd" / "seed-42" / "result.json").unlink()
    trained, train = [], compare.train_method
    monkeypatch.setattr(
        compare, "train_method", lambda name, *args, **kwargs: trained.append(name) or train(name, *args, **kwargs)
    )
    assert main(arguments(base, log, out)) == 0
    assert trained == ["svd"] and capsys.readouterr().out.count("there already") == 8
    assert json.loads((out / "comparison.json").read_text()) == found


def test_results_of_other_settings_are_not_mixed_in(base, log, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(base, log, out, methods=["svd"], baseline="svd")) == 0
    assert main(arguments(base, log, out, methods=["svd"], baseline="svd", num_train_epochs=1)) == 2
    error = capsys.readouterr().err
    assert "MethodError" in error and "holds a result of other settings (num_train_epochs changed)" in error
    for what, value in (("use_rslora", "true"), ("model_revision", "other")):
        assert main(arguments(base, log, out, methods=["svd"], baseline="svd", **{what: value})) == 2
        assert f"({what} changed)" in capsys.readouterr().err
    # the same base by another path, another batch of the evaluation: the same result
    same = dict(model_name_or_path=os.path.relpath(base), per_device_eval_batch_size=3)
    assert main(arguments(base, log, out, methods=["svd"], baseline="svd", **same)) == 0
    assert "there already" in capsys.readouterr().out
    assert main(arguments(base, log, tmp_path / "dora", methods=["svd"], baseline="svd", use_dora="true")) == 2
    assert "use_dora=True is an option of plain LoRA" in capsys.readouterr().err
    rows = [json.loads(line) for line in open(log)]
    rows[0]["chosen"] += " w1"
    write(tmp_path / "log.jsonl", rows)
    assert main(arguments(base, log, out, methods=["svd"], baseline="svd")) == 2
    assert "(data changed)" in capsys.readouterr().err


def test_learning_rates_are_chosen_on_validation_for_each_method(base, log, tmp_path, capsys):
    out = tmp_path / "out"
    changes = dict(methods=["lora-global", "psharelora-si"], seeds=[1, 2], learning_rates=[1e-6, 2e-2])
    assert main(arguments(base, log, out, **changes)) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "comparison.json").read_text())
    for name in changes["methods"]:
        tried = {
            rate: max(entry["macro"] for entry in Run.load(out / name / f"lr-{rate:g}" / "seed-1").history)
            for rate in (1e-6, 2e-2)
        }
        taken = found["methods"][name]["learning_rate"]
        assert tried[taken] == max(tried.values()) and f"{name}: learning rate {taken:g} of" in printed
        assert (out / name / f"lr-{taken:g}" / "seed-2" / "result.json").is_file()
        assert len(list((out / name).glob("*/seed-2"))) == 1
    assert len(found["gains"]["psharelora-si"]["last"]["by_seed"]) == 2


def test_without_a_validation_split_the_table_says_that_best_is_optimistic(base, log, tmp_path, capsys):
    changes = dict(methods=["svd"], baseline="svd", num_train_epochs=1)
    command = arguments(base, log, tmp_path / "out", **changes)
    place = command.index("--dataset_validation_split")
    assert main(command[:place] + command[place + 2 :]) == 0
    assert "which is the reported split: 'best' is optimistic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(methods=["lora-globl"]), "method='lora-globl' is unknown (did you mean 'lora-global'?)"),
        (dict(seeds=[1, 1]), "seeds=[1, 1]; one or more are needed, each once"),
        (dict(evaluations=0), "evaluations=0; at least 1 is needed"),
        (dict(dataset_streaming="true"), "dataset_streaming came"),
        (dict(methods="svd", seeds=1, dataset_name="missing-{seed}.jsonl"), "missing-1.jsonl"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(base, log, tmp_path, capsys, changes, message):
    assert main(arguments(base, log, tmp_path / "out", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/*/result.json"))


def test_a_world_of_ones_own_is_made_once(tmp_path):
    made = make_world(tmp_path, 3, 4, 5)
    rows = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    counts = Counter((row["user_id"], row["split"]) for row in rows)
    assert set(counts.values()) == {4, 50, 100} and len(counts) == 9
    assert (made / "base_model" / "config.json").is_file()
    before = (made / "log.jsonl").stat().st_mtime_ns
    assert make_world(tmp_path, 3, 4, 5) == made and (made / "log.jsonl").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="asked for is {'users': 4"):
        make_world(tmp_path, 4, 4, 5)


def test_one_user_and_users_without_comparisons(base, tmp_path, capsys):
    rows = [{**row, "split": "train"} for row in preference_rows(["ann", "bob"], 12)]
    rows += [{**row, "split": "test"} for row in preference_rows(["ann", "eve"], 4, seed=1)]
    changes = dict(methods=["svd"], baseline="svd", num_train_epochs=1, dataset_validation_split="test")
    assert main(arguments(base, write(tmp_path / "a.jsonl", rows), tmp_path / "a", **changes)) == 2
    assert "1 users of the validation split" in (error := capsys.readouterr().err) and "'eve'" in error
    changes["unseen"] = "common"
    assert main(arguments(base, write(tmp_path / "a.jsonl", rows), tmp_path / "a", **changes)) == 0
    assert "1 of 2 users have no comparisons in the test split (seed 42)" in capsys.readouterr().out
    alone = [row for row in rows if row["user_id"] == "ann"]
    assert main(arguments(base, write(tmp_path / "b.jsonl", alone), tmp_path / "b", **changes)) == 2
    assert "has 1 user(s) to train on; there is nothing to share" in capsys.readouterr().err


def test_real_comparisons_of_the_busiest_people(tmp_path, capsys):
    """The path of the TL;DR experiment on votes of real people: the five busiest, capped to the least busy of them."""
    source = Path(__file__).parents[2] / "shared" / "data" / "polis_bowling_green.small.jsonl.gz"
    if not source.is_file():
        pytest.skip(f"{source} is not here; the data are not part of this repository")
    rows = load_preferences(source).to_list()
    busiest = [user for user, _ in Counter(row["user_id"] for row in rows if row["split"] == "train").most_common(5)]
    kept = []
    for split in ("train", "validation", "test"):
        parts = [[row for row in rows if row["user_id"] == user and row["split"] == split] for user in busiest]
        cap = min(40, *map(len, parts))
        kept += [{**row, "prompt": "Which do you agree with? "} for part in parts for row in part[:cap]]
    tokenizer = make_tokenizer([row["prompt"] + row[side] for row in kept for side in ("chosen", "rejected")])
    tokenizer.save_pretrained(tmp_path / "base")
    make_model(tokenizer, hidden_size=32).save_pretrained(tmp_path / "base")
    names = ["meta", *(name for name in kept[0] if name not in ("user_id", "prompt", "chosen", "rejected", "split"))]
    rows = [{name: value for name, value in row.items() if name not in names} for row in kept]
    changes = dict(methods=["lora-global", "psharelora-wu"], seeds=[1, 2], num_train_epochs=2, learning_rate=1e-3)
    command = arguments(str(tmp_path / "base"), write(tmp_path / "five.jsonl", rows), tmp_path / "out", **changes)
    assert main(command) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    tested = Counter(row["user_id"] for row in kept if row["split"] == "test")
    for cells in found["methods"].values():
        assert {user: cell["n"] for user, cell in cells["last"]["users"].items()} == dict(tested) and len(tested) == 5
    assert found["gains"]["psharelora-wu"]["best"]["comparisons"] is not None
