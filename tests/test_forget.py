"""A user leaves a saved adapter, and users come to a model: one row is touched, all others stay bit by bit what they were."""

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers import preference_rows, tiny_model, tiny_tokenizer
from peft import PeftModel, get_peft_model
from pyarrow import feather
from safetensors.torch import load_file
from sharelora.reference import SHARES, batch, share_config, share_model

from trl_sharelora import (
    ShareLoraConfig,
    ShareLoraRewardConfig,
    ShareLoraRewardTrainer,
    UserRegistry,
    evaluate_users,
    export_user,
    use_users,
)
from trl_sharelora.confidence import fit_confidence
from trl_sharelora.data import tokenize_preference
from trl_sharelora.demo.results import user_table
from trl_sharelora.errors import (
    AdapterMismatchError,
    BankBusyError,
    ConfigError,
    DataError,
    NonFiniteError,
    RoutingError,
    UnknownUserError,
    UserIdError,
)
from trl_sharelora.forget import forget_user, measure_influence
from trl_sharelora.new_users import add_users, fit_users
from trl_sharelora.sharelora import ShareLoraAdamW, get_router
from trl_sharelora.sharelora.store import UserStore, read_manifest
from trl_sharelora.users import Pseudonym


KINDS = ("resident", "ram", "mmap")
USERS = ["ann-a9f3", "bob-77c1", "cat-e0d2"]  # not to be found in any file by accident
BOB = 1


def train(directory, kind, share="B", users=None, adapter=None, optimizer=None, **overrides):
    rows = preference_rows(users=USERS, n=12)
    settings = dict(max_steps=12, save_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1)
    trainer = ShareLoraRewardTrainer(
        tiny_model(),
        ShareLoraRewardConfig(
            str(directory), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, **(settings | overrides)
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:6]),
        processing_class=tiny_tokenizer(),
        users=users,
        peft_config=ShareLoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj"],
            bank=kind,
            share=share,
            init_lora_weights=False,
            **(adapter or {}),
        ),
    )
    if optimizer is not None:
        trainer.optimizer = optimizer([p for p in trainer.model.parameters() if p.requires_grad])
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    for working_set in trainer.router.working_sets.values():
        working_set.store.close()  # this run is over


def load(directory, **kwargs):
    return PeftModel.from_pretrained(tiny_model(), directory, **kwargs).eval()


def scores(model, who, unseen="raise"):
    with torch.no_grad(), use_users(model, who, unseen):
        return model(**batch(rows=len(who))).logits.squeeze(-1)


def files(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def personal(directory, share):
    """A user's row of each module by name, from the tensors file or the bank: `(users, ...)`."""
    factor = {"B": "A", "A": "B", "none": "A"}.get(share, "C")
    tensors = load_file(directory / "adapter_model.safetensors")
    # copies: safetensors maps the file
    return {n: t.clone() for n, t in tensors.items() if f"sharelora_{factor}.weight" in n}


@pytest.mark.parametrize(("kind", "share"), [*((kind, "B") for kind in KINDS), *(("resident", s) for s in SHARES[1:])])
def test_nothing_of_a_forgotten_user_is_left_and_nobody_else_notices(kind, share, tmp_path):
    train(tmp_path, kind, share)
    folders = [tmp_path, *sorted(tmp_path.glob("checkpoint-*"))]
    assert len(folders) == 3
    others = ["ann-a9f3", "cat-e0d2", "cat-e0d2"]
    before = {folder: scores(load(folder), others) for folder in folders}
    common = {folder: scores(load(folder), ["nobody"] * 3, "common") for folder in folders}
    bytes_before = {path: path.read_bytes() for path in files(tmp_path)}
    rows_before = {folder: personal(folder, share) for folder in folders}
    states = {f: torch.load(f / "optimizer.pt", weights_only=True)["state"] for f in folders[1:]}

    report = forget_user(tmp_path, "bob-77c1")

    for path in files(tmp_path):
        assert b"bob-77c1" not in path.read_bytes(), path
    assert {path for path in bytes_before if not path.exists()} == set()
    assert report.adapters == folders and report.left == [] and report.influence is None
    changed = {
        path.relative_to(tmp_path).parts[-1] for path in files(tmp_path) if path.read_bytes() != bytes_before[path]
    }
    moments = {"optimizer.pt"} if kind == "resident" else set()
    (table,) = report.tables
    assert table == tmp_path / "users" / "eval-step-12.parquet"
    assert pd.read_parquet(table)["user_id"].tolist() == ["ann-a9f3", "cat-e0d2"]
    assert {name.split("-")[0] for name in changed} == {
        "users.json",
        "eval",
        *moments,
        "adapter_model.safetensors" if kind == "resident" else "rows",
    }
    for folder in folders:
        users = UserRegistry.load(folder)
        assert users.ids == ["ann-a9f3", None, "cat-e0d2"]
        model = load(folder)
        assert torch.equal(scores(model, others), before[folder])
        with pytest.raises(UnknownUserError, match=r"unknown user\(s\): 'bob-77c1'. This adapter knows 2 users"):
            scores(model, ["bob-77c1"] * 3)
        assert torch.equal(scores(model, ["bob-77c1"] * 3, "common"), common[folder])
        assert torch.equal(scores(model, torch.full((3,), BOB)), common[folder])  # his row is empty
        export_user(folder, "cat-e0d2", tmp_path / "export")
    if kind == "resident":
        for folder in folders:
            for name, tensor in personal(folder, share).items():
                old = rows_before[folder][name]
                assert old[BOB].any() and not tensor[BOB].any()
                assert torch.equal(tensor[[0, 2]], old[[0, 2]])
        for folder, old in states.items():
            cleared = 0
            for number, moments in torch.load(folder / "optimizer.pt", weights_only=True)["state"].items():
                for key, tensor in moments.items():
                    if moments["step"].shape == (3,):
                        assert not tensor[BOB].any() and torch.equal(tensor[[0, 2]], old[number][key][[0, 2]])
                        cleared += 1
                    else:
                        assert torch.equal(tensor, old[number][key])
            assert cleared == 3 * len(rows_before[folder])
    else:
        for folder in folders:
            store = UserStore(model_layout(model), kind, UserRegistry.load(folder).registry_id)
            store.load(folder / "bank", 3)
            assert not store.read([BOB]).any() and store.read([0]).any() and store.read([2]).any()


def model_layout(model):
    return get_router(model).working_sets["default"].layout


@pytest.mark.parametrize("kind", KINDS)
def test_life_goes_on_after_a_user_is_forgotten(kind, tmp_path):
    """Evaluated, trained on, saved again; when the same id comes back he is a new user."""
    train(tmp_path / "rm", kind, save_strategy="no")
    rows = Dataset.from_list(preference_rows(users=USERS, n=12))
    model = load(tmp_path / "rm")
    before = evaluate_users(model, rows, processing_class=tiny_tokenizer()).table.set_index("user_id")
    forget_user(tmp_path / "rm", "bob-77c1")
    model = load(tmp_path / "rm", is_trainable=True)
    after = evaluate_users(model, rows, processing_class=tiny_tokenizer(), unseen="common")
    assert after.unseen == 4 and set(after.table["user_id"]) == set(USERS)
    for user_id in ("ann-a9f3", "cat-e0d2"):
        assert after.table.set_index("user_id").loc[user_id].equals(before.loc[user_id])
    assert "ann-a9f3" in str(after)
    trainer = ShareLoraRewardTrainer(
        model.train(),
        ShareLoraRewardConfig(
            str(tmp_path / "again"), max_steps=3, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True
        ),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.save_model()
    assert UserRegistry.load(tmp_path / "again").ids == ["ann-a9f3", None, "cat-e0d2", "bob-77c1"]
    again = load(tmp_path / "again")
    zero = get_router(again)
    assert len(zero.users) == 4
    who = ["bob-77c1", "cat-e0d2"]
    assert torch.equal(scores(again, who), scores(trainer.model.eval(), who))


def test_unknown_users_and_torn_adapters_change_nothing(tmp_path):
    share_model().save_pretrained(tmp_path)

    def contents():
        return {path: path.read_bytes() for path in files(tmp_path)}

    before = contents()
    with pytest.raises(UnknownUserError, match=r"1 unknown user\(s\): 'eve'. This adapter knows 4 users"):
        forget_user(tmp_path, "eve")
    assert contents() == before
    with pytest.raises(UserIdError, match="No users.json"):
        forget_user(tmp_path / "nowhere", "ann")
    UserRegistry(["ann", "bob"]).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_users": 2}))
    torn = contents()
    with pytest.raises(AdapterMismatchError, match="has 4 rows for 2 users.*two different saves"):
        forget_user(tmp_path, "ann")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_users": 2, "share": "AB"}))
    with pytest.raises(AdapterMismatchError, match=r"has no users' rows \(sharelora_C\)"):
        forget_user(tmp_path, "ann")
    weights = tmp_path / "adapter_model.safetensors"
    os.truncate(weights, 100)
    with pytest.raises(AdapterMismatchError, match="is not a safetensors file"):
        forget_user(tmp_path, "ann")
    weights.unlink()
    with pytest.raises(AdapterMismatchError, match="No adapter_model.safetensors in"):
        forget_user(tmp_path, "ann")
    assert UserRegistry.load(tmp_path).ids == ["ann", "bob"] and len(torn) == len(contents()) + 1


@pytest.mark.parametrize("cut", [1, 400, 4000, -1])
def test_tensors_that_are_cut_off_are_found_before_anything_is_erased(cut, tmp_path):
    """The header of a torn file is whole: what it names is not there."""
    share_model().save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - cut)  # -1: a byte too many
    pd.DataFrame({"user_id": ["bob"]}).to_parquet(tmp_path / "users.parquet")
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(AdapterMismatchError, match="has [0-9]+ bytes, .* of [0-9]+: torn.*Nothing has been erased"):
        forget_user(tmp_path, "bob")
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


@pytest.mark.parametrize("kind", ["resident", "mmap"])
def test_cut_off_and_called_again(kind, tmp_path, monkeypatch):
    """The ids go last: whoever is still in a list can be forgotten again."""
    train(tmp_path, kind)
    real, calls = UserRegistry.save, []

    def save(self, directory):
        calls.append(directory)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, directory)

    with monkeypatch.context() as patch:
        patch.setattr(UserRegistry, "save", save)
        with pytest.raises(KeyboardInterrupt):
            forget_user(tmp_path, "bob-77c1")
    left = [path for path in files(tmp_path) if b"bob-77c1" in path.read_bytes()]
    assert "bob-77c1" not in set(pd.read_parquet(tmp_path / "users" / "eval-step-12.parquet")["user_id"])
    assert [path.name for path in left] == ["users.json"] * 2
    forget_user(tmp_path, "bob-77c1")
    assert not any(b"bob-77c1" in path.read_bytes() for path in files(tmp_path))
    with pytest.raises(UnknownUserError):
        forget_user(tmp_path, "bob-77c1")


def test_a_training_at_work_is_not_interfered_with_and_a_killed_ones_leftovers_go(tmp_path):
    train(tmp_path, "mmap")
    working_set = get_router(load(tmp_path)).working_sets["default"]
    store = UserStore(working_set.layout, "mmap", "r", tmp_path / "_working-bank" / "process-0")
    store.write([BOB], torch.ones(1, working_set.layout.record_bytes, dtype=torch.uint8))
    (left,) = (tmp_path / "_working-bank" / "process-0").glob("rows-*")
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(BankBusyError, match="is being written to"):
        forget_user(tmp_path, "bob-77c1")
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    store._folder._lock.close()  # as when it was killed: the lock is free, the file is there
    store._folder.remove.detach()
    assert left.exists()
    forget_user(tmp_path, "bob-77c1")
    assert not (tmp_path / "_working-bank").exists()


# -- every trace


def traces(directory, kind, row=BOB):
    """What was his in the files, as bytes: rows of all banks and heads, moments."""
    found = []
    for folder in [directory, *sorted(directory.glob("checkpoint-*"))]:
        tensors = load_file(folder / "adapter_model.safetensors")
        his = [t[row] for name, t in tensors.items() if t.ndim > 2 or name.endswith("moves.weight")]
        state = torch.load(folder / "optimizer.pt", weights_only=True)["state"] if folder != directory else {}
        his += [t[row] for m in state.values() if m["step"].shape == (3,) for k, t in m.items() if k != "step"]
        if kind != "resident":
            store = UserStore(model_layout(load(folder)), kind, UserRegistry.load(folder).registry_id)
            store.load(folder / "bank", 3)
            his.append(store.read([row])[0])
        found += [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in his if tensor.any()]
    return found


@pytest.mark.parametrize(
    ("kind", "adapter"), [("resident", {"personal_head": True}), ("resident", {"share": "none"}), ("mmap", {})]
)
def test_the_bytes_of_his_row_are_nowhere(kind, adapter, tmp_path):
    adapter = dict(adapter)
    train(tmp_path, kind, adapter.pop("share", "B"), adapter=adapter)
    his, hers = traces(tmp_path, kind), traces(tmp_path, kind, row=0)
    content = b"".join(path.read_bytes() for path in files(tmp_path))
    modules = 2 * 2  # q_proj and down_proj of two layers
    expected = 3 if kind == "mmap" else (modules + bool(adapter)) * (3 + 2 * 2)
    assert len(his) == len(hers) == expected and all(some in content for some in his + hers)
    forget_user(tmp_path, "bob-77c1")
    content = b"".join(path.read_bytes() for path in files(tmp_path))
    for some in his:
        assert some not in content and some[: len(some) // 2] not in content
    assert all(some in content for some in hers)


def test_a_personal_head_is_forgotten_too(tmp_path):
    train(tmp_path, "resident", adapter={"personal_head": True})
    name = "base_model.model.score.moves.weight"
    before = load_file(tmp_path / "adapter_model.safetensors")[name].clone()
    common = scores(load(tmp_path), ["nobody"] * 3, "common")
    forget_user(tmp_path, "bob-77c1")
    after = load_file(tmp_path / "adapter_model.safetensors")[name]
    assert before[BOB].any() and not after[BOB].any() and torch.equal(after[[0, 2]], before[[0, 2]])
    assert torch.equal(scores(load(tmp_path), torch.full((3,), BOB)), common)


def test_tables_of_all_kinds_lose_his_lines_and_nothing_else(tmp_path):
    share_model(users=["ann-a9f3", "bob-77c1", "12345"]).save_pretrained(tmp_path)
    ids = ["ann-a9f3", "bob-77c1", "cat", "bob-77c1"]
    frame = pd.DataFrame({"user_id": ids, "n": [1, 2, 3, 4], "accuracy": [0.1, np.nan, 0.3, 0.4]}, index=[5, 6, 7, 8])
    (tmp_path / "runs" / "a").mkdir(parents=True)
    frame.to_parquet(tmp_path / "users.parquet", index=False)
    frame.to_parquet(tmp_path / "runs" / "margins.parquet")  # with its index
    frame.astype({"user_id": "category"}).to_parquet(tmp_path / "runs" / "a" / "categories.parquet")
    frame[frame["user_id"] == "bob-77c1"].to_parquet(tmp_path / "runs" / "only-his.parquet", index=False)
    untouched = {"others.parquet": frame[frame["user_id"] == "cat"], "no-ids.parquet": frame[["n"]]}
    for name, other in untouched.items():
        other.to_parquet(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in untouched}
    os.chmod(tmp_path / "users.parquet", 0o640)
    report = forget_user(tmp_path, "bob-77c1")
    assert {str(path.relative_to(tmp_path)) for path in report.tables} == {
        "users.parquet",
        "runs/margins.parquet",
        "runs/a/categories.parquet",
        "runs/only-his.parquet",
    }
    assert os.stat(tmp_path / "users.parquet").st_mode & 0o777 == 0o640
    rest = frame[frame["user_id"] != "bob-77c1"]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "users.parquet"), rest.reset_index(drop=True))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "runs" / "margins.parquet"), rest)
    assert pd.read_parquet(tmp_path / "runs" / "a" / "categories.parquet")["user_id"].astype(str).tolist() == [
        "ann-a9f3",
        "cat",
    ]
    assert len(pd.read_parquet(tmp_path / "runs" / "only-his.parquet")) == 0
    assert {name: (tmp_path / name).read_bytes() for name in untouched} == before
    assert not any(b"bob-77c1" in path.read_bytes() for path in files(tmp_path))
    assert "lines in 4 table(s)" in str(report) and "training again without his" in str(report)
    pd.DataFrame({"user_id": [12345, 6]}).to_parquet(tmp_path / "numbers.parquet")
    assert forget_user(tmp_path, 12345).tables == [tmp_path / "numbers.parquet"]
    assert pd.read_parquet(tmp_path / "numbers.parquet")["user_id"].tolist() == [6]
    # scored as an unseen user, he is in a table and in no adapter
    report = forget_user(tmp_path, "cat")
    assert report.adapters == [] and tmp_path / "others.parquet" in report.tables
    with pytest.raises(UnknownUserError, match="'cat'"):
        forget_user(tmp_path, "cat")


SHORT_AND_LONG = ["ann", "robert", "12", 'a,"b"\nc', "josé", "user_id", "user1", "user10"]


def tables_as_text(kind):
    """What `fit-users --report_dir` or the demo writes of these users."""
    if kind == "fitted":
        model = influence_model(users=["somebody", "else"])
        rows = Dataset.from_list(preference_rows(users=SHORT_AND_LONG, n=12 * len(SHORT_AND_LONG)))  # n is 12
        return fit_users(model, rows, tiny_tokenizer()).table
    table = pd.DataFrame({"user_id": SHORT_AND_LONG, "n": 12, "accuracy": 0.5, "low": 0.1, "high": 1.0})
    return user_table(dict.fromkeys(SHORT_AND_LONG, 12), table, table, None)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["fitted", "demo"])
def test_csv_tables_of_this_package_lose_his_lines_and_nothing_else(kind, ending, tmp_path):
    share_model(users=SHORT_AND_LONG).save_pretrained(tmp_path)
    table = tables_as_text(kind)
    path = tmp_path / "report" / "table.csv"
    path.parent.mkdir()
    table.to_csv(path, index=False, lineterminator=ending)
    os.chmod(path, 0o640)
    for user_id in SHORT_AND_LONG:
        report = forget_user(tmp_path, user_id)
        assert (report.adapters, report.tables, report.left, report.unread) == ([tmp_path], [path], [], [])
        table = table[table["user_id"] != user_id]
        assert path.read_bytes().decode() == table.to_csv(index=False, lineterminator=ending)
    assert os.stat(path).st_mode & 0o777 == 0o640 and len(table) == 0
    # nobody knows them any more; who is in a table only is forgotten too
    pd.DataFrame({"user_id": ["ann", "zoe"], "n": [1, 2]}).to_csv(path, index=False)
    assert forget_user(tmp_path, "zoe").tables == [path]
    with pytest.raises(UnknownUserError):
        forget_user(tmp_path, "zoe")
    # what somebody wrote into it beside is searched as elsewhere
    share_model(users=["ann", "robert"]).save_pretrained(tmp_path)
    path.write_text("user_id,n,said by\nann,1,robert\n")
    assert forget_user(tmp_path, "robert").left == [path]


def test_a_short_id_is_found_as_a_whole_cell_of_a_foreign_table(tmp_path):
    share_model(users=["ann", "7", "eve", "bob", 'q"b']).save_pretrained(tmp_path)
    foreign = {
        "log.csv": "user_id,prompt,chosen,rejected\nann,a,b,c\neve,a,b,c\n",  # a log is nobody's but theirs who made it
        "labels.TSV": "labeller\ttext\n7\tjoanna\nann\tannual",
        "alone.csv": "ann",
        "semicolons.csv": "x;ann;7\n",
        "quoted.txt": '1,"q""b",2\n',
        "data.jsonl": '{"user_id": 7, "step": 1}\n',
        "numbers.json": '{"step": 7, "user_id": 77, "n": [7]}',
        "nobody.csv": "id,text\njoanna,annual\n77,anna ann\n",
        "torn.csv": "user_id,n\nann,1\n\udcff",
    }
    for name, text in foreign.items():
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(b"a,b\n" * (1 << 19) + b"1,ann"))
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/log.csv", "ann,1\n")
        archive.writestr("notes.txt", "7\n")
    before = {name: (tmp_path / name).read_bytes() for name in foreign}
    found = {
        user_id: {path.name for path in forget_user(tmp_path, user_id).left} for user_id in ("ann", "7", "bob", 'q"b')
    }
    of_ann = {"log.csv", "labels.TSV", "alone.csv", "semicolons.csv", "torn.csv", "log.csv.gz", "all.zip"}
    assert found == {
        "ann": of_ann,
        "7": {"labels.TSV", "semicolons.csv", "data.jsonl"},
        "bob": set(),
        'q"b': {"quoted.txt"},
    }
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == before


def test_what_is_called_by_his_name_is_left_and_said(tmp_path):
    """As `export_user` to a folder of his: tensors are not searched, and are his."""
    users = ["ann", "12", "bob-77c1", "eve"]
    share_model(users=users).save_pretrained(tmp_path)
    mine = {user_id: set() for user_id in users}
    for user_id, folder in (
        ("ann", "exports/ann"),
        ("12", "exports/12"),
        ("bob-77c1", "rm-bob-77c1"),
        ("12", "user-12"),
    ):
        mine[user_id] |= {
            path.relative_to(tmp_path) for path in files(export_user(tmp_path, user_id, tmp_path / folder))
        }
    assert {path.name for path in mine["bob-77c1"]} >= {"adapter_model.safetensors", "adapter_config.json"}
    for user_id, name in (
        ("ann", "rm-ann.pt"),
        ("ann", "ann_2.safetensors"),
        ("12", "12.npy"),
        ("bob-77c1", "x.bob-77c1"),
    ):
        (tmp_path / name).write_bytes(b"x")
        mine[user_id].add((tmp_path / name).relative_to(tmp_path))
    (tmp_path / "runs" / "ann").mkdir(parents=True)  # empty
    (tmp_path / "to-ann").symlink_to(tmp_path / "nowhere")
    mine["ann"] |= {(tmp_path / name).relative_to(tmp_path) for name in ("runs/ann", "to-ann")}
    for name in ("joanna.pt", "checkpoint-12/anna.pt", "users/eval-step-12.npy", "112.pt", "bob-77c12.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for user_id in users:
        report = forget_user(tmp_path, user_id)
        assert {path.relative_to(tmp_path) for path in report.left} == mine[user_id], user_id
        assert len(report.left) == len(mine[user_id])
        assert ("rm-ann.pt" in str(report) or "ann_2" in str(report)) == (user_id == "ann")


def test_a_table_that_cannot_be_read_stops_it_before_anything_is_written(tmp_path):
    share_model().save_pretrained(tmp_path)
    (tmp_path / "users.parquet").write_bytes(b"PAR1 torn")
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(DataError, match="users.parquet cannot be read .* not known whether he is in it"):
        forget_user(tmp_path, "bob")
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_what_it_does_not_know_and_names_him_is_said(tmp_path):
    share_model(users=["ann", "bob-77c1", "eve"]).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("call bob-77c1 back")
    (tmp_path / "short.json").write_text('{"users": {"eve": 1, "never": 2}}')
    (tmp_path / "empty.txt").write_text("")
    report = forget_user(tmp_path, "bob-77c1")
    assert report.left == [tmp_path / "notes.txt"]
    assert "His id still stands in 1 file(s), or in their paths, that are not changed here: notes.txt." in str(report)
    assert forget_user(tmp_path, "eve").left == [tmp_path / "short.json"]
    assert forget_user(tmp_path, "ann").left == []


def packed_copies(folder, text: str):
    """A text packed in every way that is looked into; in each of them its bytes are not to be found as they are."""
    # its halves come first, so that even the first time it is written as a reference to what was there before
    halves = [text[:6], text[2:]]
    line = "\n".join([*halves, *[text] * 50]).encode()
    with gzip.open(folder / "log.jsonl.gz", "wb") as file:
        file.write(b"x" * (2 << 20))  # beyond the first portion, across its end
        file.write(line)
    (folder / "log.bz2").write_bytes(bz2.compress(line))
    (folder / "log.xz").write_bytes(lzma.compress(line))
    for kind in ("zstd", "lz4"):
        with pa.output_stream(str(folder / f"log.{kind}"), compression=kind) as file:
            file.write(line)
    with zipfile.ZipFile(folder / "log.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("other.txt", "nothing")
        archive.writestr("log.txt", line)
    np.savez_compressed(folder / "who.npz", names=np.array([*halves, text] * 20))
    with tarfile.open(folder / "log.tar.gz", "w:gz") as archive:
        archive.add(folder / "log.bz2")  # packed twice, under another name it is the next line's
        info = tarfile.TarInfo("log.txt")
        info.size = len(line)
        archive.addfile(info, io.BytesIO(line))
    columns = {
        "labeller": pa.array([*halves, text] * 150).dictionary_encode(),
        "meta": pa.array([{"by": [*halves, text]}] * 450),
        "n": list(range(450)),
    }
    table = pa.table(columns)
    pq.write_table(table.select(["labeller", "n"]), folder / "a.parquet", compression="gzip", write_statistics=False)
    pq.write_table(table.select(["meta", "n"]), folder / "b.parquet", compression="gzip", write_statistics=False)
    feather.write_feather(table.select(["meta", "n"]), str(folder / "c.arrow"), compression="zstd")
    return sorted(path for path in files(folder) if path.parent == folder)


@pytest.mark.parametrize("kind", ["resident", "ram"])
def test_a_plain_adapter_made_pseudonymous_has_the_same_users_in_the_same_rows(kind, tmp_path):
    train(tmp_path, kind)
    before = scores(load(tmp_path), USERS)
    bytes_before = {path: path.read_bytes() for path in files(tmp_path) if path.name != "users.json"}
    for path in sorted(tmp_path.rglob("users.json")):
        UserRegistry.load(path, key=False).pseudonymised(KEY).save(path.parent)
    assert all(path.read_bytes() == content for path, content in bytes_before.items())
    assert not any(user_id.encode() in path.read_bytes() for path in tmp_path.rglob("users.json") for user_id in USERS)
    model = load(tmp_path)
    assert torch.equal(scores(model, torch.tensor([0, 1, 2])), before)
    model.peft_config["default"].users.unlock(KEY)
    assert torch.equal(scores(model, USERS), before)
    # the tables of evaluations still name users; whoever is forgotten leaves them too
    report = forget_user(tmp_path, "bob-77c1", key=KEY)
    assert len(report.tables) == 1 and report.left == []


def test_packed_files_are_looked_into(tmp_path):
    share_model(users=["ann", "bob-77c1", "eve-9d1c"]).save_pretrained(tmp_path)
    (tmp_path / "packed").mkdir()
    paths = packed_copies(tmp_path / "packed", "bob-77c1")
    assert len(paths) == 11
    hidden = [path for path in paths if b"bob-77c1" not in path.read_bytes()]
    assert hidden == paths  # the search of the bytes as they are would find none of them
    report = forget_user(tmp_path, "eve-9d1c")
    assert report.left == []
    # a bz2 inside of a tar inside of a gzip is a stream that was read, and a tar names what is in it
    assert report.unread == []
    report = forget_user(tmp_path, "bob-77c1")
    assert sorted(report.left) == paths and report.unread == []


def test_a_table_of_lists_of_users_is_not_torn_but_somebody_elses(tmp_path):
    share_model(users=["ann", "bob-77c1", "eve-9d1c"]).save_pretrained(tmp_path)
    groups = pa.table({"user_id": [["ann", "bob-77c1"], ["dan"]], "n": [1, 2]})
    pq.write_table(groups, tmp_path / "groups.parquet")
    pq.write_table(pa.table({"user_id": [{"id": "bob-77c1"}]}), tmp_path / "records.parquet")
    assert forget_user(tmp_path, "eve-9d1c").left == []
    report = forget_user(tmp_path, "bob-77c1")
    assert (report.left, report.tables) == ([tmp_path / "groups.parquet", tmp_path / "records.parquet"], [])
    assert pq.read_table(tmp_path / "groups.parquet").equals(groups)


def test_packed_files_that_cannot_be_looked_into_are_named(tmp_path):
    share_model(users=["ann", "bob-77c1"]).save_pretrained(tmp_path)
    line = b"bob-77c1\n" * 50
    (tmp_path / "old.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    (tmp_path / "torn.gz").write_bytes(gzip.compress(os.urandom(5000) + line)[:-40])
    (tmp_path / "twice.gz").write_bytes(gzip.compress(bz2.compress(line)))
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("log.gz", gzip.compress(line))
    content = bytearray((tmp_path / "in.zip").read_bytes())
    content[6] |= 1  # a password, says the flag
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "secret.zip").write_bytes(content)
    (tmp_path / "plain.txt.gz").write_bytes(gzip.compress(b"nothing of him"))
    report = forget_user(tmp_path, "bob-77c1")
    assert [path.name for path in report.unread] == ["in.zip", "old.7z", "secret.zip", "torn.gz", "twice.gz"]
    assert report.left == []
    assert (
        "Not looked into: 5 file(s) that are not understood here (packed, or of another optimizer), in which he may be: in.zip, "
        "old.7z, secret.zip, torn.gz, twice.gz." in str(report)
    )


@pytest.mark.parametrize("case", ["cut tensors", "cut settings", "no settings", "no tensors", "other version"])
def test_torn_confidence_sets_are_found_before_anything_is_erased(case, tmp_path):
    model = share_model(users=USERS)
    model.config.pad_token_id = tiny_tokenizer().pad_token_id
    model.save_pretrained(tmp_path)
    fit_confidence(
        model, Dataset.from_list(preference_rows(users=USERS, n=12)), tiny_tokenizer(), output_dir=str(tmp_path)
    )
    tensors, settings = (tmp_path / "confidence" / f"ellipsoid.{kind}" for kind in ("safetensors", "json"))
    whole = {path: path.read_bytes() for path in (tensors, settings)}
    if case == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif case == "cut settings":
        settings.write_bytes(settings.read_bytes()[:-10])
    elif case == "no settings":
        settings.unlink()
    elif case == "no tensors":
        tensors.unlink()
    else:
        settings.write_text(json.dumps({"set": {"ridge": 1.0}}))
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(
        AdapterMismatchError, match="The confidence sets in .* cannot be read .*Nothing has been erased"
    ):
        forget_user(tmp_path, "bob-77c1")
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    # put right, it goes; what a save that was cut off left there goes with it
    for path, content in whole.items():
        path.write_bytes(content)
    (tmp_path / "confidence" / "ellipsoid.0123.tmp").write_bytes(whole[tensors])
    assert forget_user(tmp_path, "bob-77c1").adapters == [tmp_path]
    assert tensors.read_bytes() != whole[tensors] and not list(tmp_path.rglob("*.tmp"))


def test_adapters_beside_it_and_what_a_save_that_was_cut_off_left_are_seen_to(tmp_path):
    model = share_model(bank="mmap", personal_head=False)
    model.add_adapter("second", share_config(share="AB"))
    model.save_pretrained(tmp_path)
    bank = tmp_path / "bank"
    get_router(model).working_sets["default"].store.write(
        [1], torch.ones(1, read_manifest(bank)["record_bytes"], dtype=torch.uint8)
    )
    get_router(model).working_sets["default"].store.save_segments(bank)  # and no manifest
    named = {segment["file"] for segment in read_manifest(bank)["segments"]}
    assert {path.name for path in bank.glob("rows-*")} > named
    report = forget_user(tmp_path, "bob")
    assert report.adapters == [tmp_path, tmp_path / "second"]
    assert {path.name for path in bank.glob("rows-*")} == named
    assert all(UserRegistry.load(folder).ids[1] is None for folder in report.adapters)
    assert not load_file(tmp_path / "second" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.q_proj.sharelora_C.weight"
    ][1].any()


# -- pseudonyms


KEY = b"0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("kind", ["resident", "ram"])
def test_a_pseudonymous_training_has_raw_ids_in_no_file_and_no_record(kind, tmp_path, caplog, monkeypatch, capsys):
    rows = preference_rows(users=USERS, n=12)
    stranger = Dataset.from_list([{**row, "user_id": "eve-9d1c"} for row in rows[:2]])

    def again(unseen):
        return ShareLoraRewardTrainer(
            load(tmp_path, is_trainable=True).train(),
            ShareLoraRewardConfig(str(tmp_path / "again"), unseen=unseen, bf16=False, use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=stranger,
            processing_class=tiny_tokenizer(),
        )

    for name in ("transformers", "datasets", "trl", "accelerate", "peft"):  # they keep their records to themselves
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "handlers", [*logger.handlers, caplog.handler])
        monkeypatch.setattr(logger, "level", logging.DEBUG)
        logger.manager._clear_cache()
    with caplog.at_level(logging.DEBUG):
        train(tmp_path, kind, users=UserRegistry(key=KEY))
        monkeypatch.setenv("SHARELORA_USER_KEY", KEY.decode())
        with pytest.raises(UnknownUserError) as raised:
            again("raise")
        again("common").evaluate()
        monkeypatch.delenv("SHARELORA_USER_KEY")
    logging.getLogger().manager._clear_cache()
    said = "".join(
        [
            *(record.getMessage() + str(record.args) for record in caplog.records),
            str(raised.value),
            *capsys.readouterr(),
        ]
    )
    tables = sorted(tmp_path.rglob("*.parquet"))
    assert len(tables) == 1 and {record.name.split(".")[0] for record in caplog.records} >= {
        "transformers",
        "datasets",
        "trl_sharelora",
    }
    registry = UserRegistry.load(tmp_path, key=KEY)
    for table in tables:
        assert pd.read_parquet(table)["user_id"].tolist() == registry.ids
    for user_id in [*USERS, "eve-9d1c"]:
        assert user_id not in said
        for path in files(tmp_path):
            assert user_id.encode() not in path.read_bytes() and user_id not in str(path)
    assert all(KEY not in path.read_bytes() for path in files(tmp_path))

    # loaded without the key, it is used by row; with it, by id
    model = load(tmp_path)
    by_row = scores(model, torch.tensor([0, 1, 2]))
    with pytest.raises(ConfigError, match="without the key"):
        scores(model, USERS)
    model.peft_config["default"].users.unlock(KEY)
    assert torch.equal(scores(model, USERS), by_row)
    add_users(model, ["fay-51aa"])
    model.save_pretrained(tmp_path / "more")
    assert UserRegistry.load(tmp_path / "more", key=KEY).index(["fay-51aa"]) == [3]
    export_user(model, "bob-77c1", tmp_path / "export")
    assert not any(b"fay-51aa" in p.read_bytes() or b"bob-77c1" in p.read_bytes() for p in files(tmp_path))


def test_a_pseudonymous_user_is_forgotten_by_id_with_the_key_and_by_pseudonym_without(tmp_path, monkeypatch):
    train(tmp_path, "resident", users=UserRegistry(key=KEY))
    bob, cat = UserRegistry(key=KEY).names(["bob-77c1", "cat-e0d2"])
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with pytest.raises(ConfigError, match="without the key"):
        forget_user(tmp_path, "bob-77c1")
    with pytest.raises(ConfigError, match="is not the one"):
        forget_user(tmp_path, "bob-77c1", key=KEY[::-1])
    with pytest.raises(UnknownUserError) as raised:
        forget_user(tmp_path, "eve-9d1c", key=KEY)
    assert "eve-9d1c" not in str(raised.value)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    report = forget_user(tmp_path, "bob-77c1", key=KEY)
    assert len(report.adapters) == 3 and len(report.tables) == 1 and report.left == []
    assert not any(bob.encode() in path.read_bytes() for path in files(tmp_path))
    assert bob not in set(pd.read_parquet(report.tables[0])["user_id"])
    assert UserRegistry.load(tmp_path, key=KEY).find(USERS) == [0, -1, 2]
    assert len(forget_user(tmp_path, Pseudonym(cat)).adapters) == 3
    monkeypatch.setenv("SHARELORA_USER_KEY", KEY.decode())
    forget_user(tmp_path, "ann-a9f3")
    assert UserRegistry.load(tmp_path).ids == [None] * 3


# -- what stays


def pulls_by_hand(model, rows, shared):
    """Per user the gradient of his summed loss with respect to some parameters, a comparison at a time without padding."""
    found = {}
    for row in rows:
        tokens = tokenize_preference(row, tiny_tokenizer())
        rewards = []
        for side in ("chosen_ids", "rejected_ids"):
            with use_users(model, [row["user_id"]]):
                rewards.append(model(input_ids=torch.tensor([tokens[side]])).logits.squeeze().double())
        loss = torch.log1p(torch.exp(rewards[1] - rewards[0]))
        gradient = torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, shared)])
        found[row["user_id"]] = found.get(row["user_id"], 0) + gradient
    return found


def influence_model(**overrides):
    model = share_model(**overrides).eval()
    model.config.pad_token_id = tiny_tokenizer().pad_token_id
    return model


def influence(model, rows, user_id="bob", **overrides):
    return measure_influence(model, Dataset.from_list(rows), user_id, tiny_tokenizer(), **overrides)


@pytest.mark.parametrize(
    ("share", "common", "overrides"),
    [("B", True, {}), ("B", False, {}), ("A", False, {}), ("AB", False, {}), ("B", False, {"bank": "ram"})],
)
def test_influence_is_what_a_slow_loop_finds(share, common, overrides):
    model = influence_model(share=share, train_common=common, **overrides)
    rows = preference_rows(users=["ann", "bob", "cat"], n=11)
    named = dict(model.named_parameters())
    factors = {"B": ["B"], "A": ["A"], "AB": ["A", "B"]}[share] + ["common"] * common
    own = {name: p for name, p in named.items() if any(f".sharelora_{f}." in name for f in factors)}
    head = {name: p for name, p in named.items() if "modules_to_save" in name}
    assert own and head
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, p in named.items() if p.requires_grad]
    result = influence(model, rows, batch_size=2)
    assert [name for name, p in named.items() if p.requires_grad] == trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in named.values())
    assert (result.comparisons, result.all_comparisons, result.users) == (4, 11, 3)
    assert result.parts["part"].tolist() == ["shared factors", "head", "all"]
    for line, shared in zip(result.parts.to_dict("records"), (own, head, own | head), strict=True):
        for parameter in shared.values():
            parameter.requires_grad_(True)
        pulls = pulls_by_hand(model, rows, list(shared.values()))
        norm = {user: pull.norm().item() for user, pull in pulls.items()}
        rest = pulls["ann"] + pulls["cat"]
        assert line["norm_share"] == pytest.approx(norm["bob"] / sum(norm.values()), rel=1e-3)
        assert line["per_comparison"] == pytest.approx((norm["bob"] / 4) / ((norm["ann"] + norm["cat"]) / 7), rel=1e-3)
        assert line["cosine"] == pytest.approx(torch.cosine_similarity(pulls["bob"], rest, dim=0).item(), abs=1e-3)


def test_who_says_the_same_as_another_pulls_as_he_does_and_who_says_it_often_pulls_more():
    model = influence_model()
    for module in model.modules():
        if hasattr(module, "bank"):
            module.bank("default").weight.data.zero_()  # all users alike
    said = preference_rows(users=["ann"], n=3)
    as_ann = [{**row, "user_id": "bob"} for row in said]
    alike = influence(model, said + as_ann).parts.iloc[-1]
    assert alike["norm_share"] == pytest.approx(0.5, abs=1e-4)
    assert alike["per_comparison"] == pytest.approx(1, abs=1e-4) and alike["cosine"] == pytest.approx(1, abs=1e-4)
    often = influence(model, said + 3 * as_ann).parts.iloc[-1]
    assert often["norm_share"] == pytest.approx(0.75, abs=1e-4) and often["per_comparison"] == pytest.approx(
        1, abs=1e-4
    )


def test_where_nothing_is_shared_nothing_has_learned_from_him():
    model = influence_model(share="none", personal_head=True, train_common=False)
    result = influence(model, preference_rows(users=["ann", "bob"], n=4))
    assert result.parts is None and "Nothing is shared" in str(result) and result.as_dict()["parts"] is None
    alone = influence(influence_model(), preference_rows(users=["bob"], n=2)).parts.iloc[-1]
    assert alone["norm_share"] == 1 and np.isnan(alone["cosine"]) and np.isnan(alone["per_comparison"])


def test_influence_is_measured_before_he_is_gone_and_what_cannot_be_measured_stops_it(tmp_path):
    train(tmp_path, "resident")
    tiny_model().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    rows = preference_rows(users=USERS, n=12)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = {path: path.read_bytes() for path in files(tmp_path)}
    strangers = Dataset.from_list([row for row in rows if row["user_id"] != "bob-77c1"])
    with pytest.raises(DataError, match="None of the 8 comparisons .* is of the user 'bob-77c1'"):
        forget_user(tmp_path, "bob-77c1", report_influence=strangers, device="cpu")
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    loaded = load(tmp_path)
    loaded.config.pad_token_id = tiny_tokenizer().pad_token_id
    expected = influence(loaded, rows, "bob-77c1")
    report = forget_user(tmp_path, "bob-77c1", report_influence=tmp_path / "train.jsonl", device="cpu", batch_size=3)
    pd.testing.assert_frame_equal(report.influence.parts, expected.parts, rtol=1e-4)
    assert "'bob-77c1' gave 4 of 12 comparisons (33.3%) of 3 users." in str(report)
    assert "First order only" in str(report) and json.dumps(report.influence.as_dict(), allow_nan=False)
    assert report.left == [tmp_path / "train.jsonl"]  # the data are not ours to change
    with pytest.raises(TypeError, match="batch_size came without report_influence"):
        forget_user(tmp_path, "ann-a9f3", batch_size=3)


def test_a_gradient_that_is_not_finite_is_named():
    model = influence_model()
    with torch.no_grad():
        next(module for module in model.modules() if hasattr(module, "bank")).bank("default").weight[2] = float("nan")
    with pytest.raises(NonFiniteError, match="of user 'cat'"):
        influence(model, preference_rows(users=["ann", "bob", "cat"], n=6))


# -- new users


def bank_of(model, rows):
    router = get_router(model)
    if router.working_sets:
        return [
            torch.cat([m.flatten() for m in w.moves(row).values()])
            for w in router.working_sets.values()
            for row in rows
        ]
    return [
        module.bank("default").weight.detach()[row]
        for module in model.modules()
        if hasattr(module, "bank")
        for row in rows
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", ["B", "AB"])
def test_new_users_get_rows_and_the_others_keep_theirs(kind, share, tmp_path):
    users = [f"user{number}" for number in range(4)]
    model = get_peft_model(tiny_model(), share_config(share=share, users=users, bank=kind)).train()
    router = get_router(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    banks = {id(m.bank("default").weight) for m in model.modules() if hasattr(m, "bank") and kind == "resident"}
    groups = [
        {
            "params": [p for _, p in named if id(p) in banks] + [w.weight for w in router.working_sets.values()],
            "rowwise": True,
        },
        {"params": [p for _, p in named if id(p) not in banks], "rowwise": False},
    ]
    optimizer = ShareLoraAdamW(groups, router, lr=1e-2)

    def step(who):
        optimizer.zero_grad()
        model(**batch(rows=len(who)), user_ids=who).logits.sum().backward()
        optimizer.step()

    for _ in range(2):  # B is zero at first, so that the users' rows have no gradient
        step(["user0", "user1", "user2"])
    before = [row.clone() for row in bank_of(model, range(4))]
    shared = {n: p.detach().clone() for n, p in named if id(p) not in banks}
    assert add_users(model, ["eve", "user2", "fay"]) == [4, 2, 5]
    assert add_users(model, []) == []
    assert all(torch.equal(one, other) for one, other in zip(bank_of(model, range(4)), before, strict=True))
    assert not any(row.any() for row in bank_of(model, [4, 5]))
    assert all(torch.equal(p, shared[n]) for n, p in named if n in shared)
    assert model.peft_config["default"].num_users == 6
    step(["eve", "user3", "eve"])
    assert all(row.any() for row in bank_of(model, [4])) and not any(row.any() for row in bank_of(model, [5]))
    assert all(
        torch.equal(one, other)
        for one, other in zip(bank_of(model, range(3)), bank_of_first(before, 4, 3), strict=True)
    )
    model.save_pretrained(tmp_path)
    who = ["fay", "eve", "user0", "user3"]
    assert torch.equal(scores(load(tmp_path), who), scores(model.eval(), who))
    if kind != "resident":
        assert read_manifest(tmp_path / "bank")["num_users"] == 6


def bank_of_first(rows, per_module, first):
    """Of rows listed module by module, those of the first users."""
    return [row for number, row in enumerate(rows) if number % per_module < first]


def test_unusable_ids_are_refused_and_nobody_is_added():
    model = share_model()
    with pytest.raises(UserIdError, match="blank"):
        add_users(model, ["eve", " "])
    with pytest.raises(UserIdError, match="One user id came"):
        add_users(model, "eve")
    assert len(get_router(model).users) == 4 and bank_of(model, [0])
    with pytest.raises(RoutingError, match="has no ShareLoRA adapter"):
        add_users(tiny_model(), ["eve"])


def test_a_second_adapter_gets_them_too(tmp_path):
    """It may have come with a registry of its own, equal to the first's."""
    model = share_model()
    model.add_adapter("second", share_config(share="AB"))
    add_users(model, ["eve"])
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        assert len(UserRegistry.load(folder)) == 5
        assert scores(load(folder), ["eve", "ann"]).isfinite().all()


def test_what_is_said_and_written_of_long_rows_and_in_evaluations_are_pseudonyms(tmp_path, caplog):
    rows = preference_rows(users=USERS, n=12)
    longest = [max(map(len, tokenize_preference(row, tiny_tokenizer()).values())) for row in rows]
    with caplog.at_level(logging.WARNING):
        train(tmp_path, "resident", users=UserRegistry(key=KEY), max_length=max(longest) - 1)
    users = UserRegistry.load(tmp_path, key=KEY)
    assert "Most affected: 'u-" in caplog.text
    model = load(tmp_path)
    model.peft_config["default"].users.unlock(KEY)
    model.config.pad_token_id = tiny_tokenizer().pad_token_id
    strangers = [{**row, "user_id": "eve-9d1c"} for row in rows[:2]]
    result = evaluate_users(
        model,
        Dataset.from_list(rows + strangers),
        tiny_tokenizer(),
        unseen="common",
        max_length=max(longest) - 1,
    )
    names = [*users.ids, *users.names(["eve-9d1c"])]
    assert result.table["user_id"].tolist() == names and set(result.rows["user_id"]) == set(names)
    for user_id in [*USERS, "eve-9d1c"]:
        assert user_id not in caplog.text and user_id not in str(result)


def test_moments_of_a_checkpoint_whose_registry_has_grown_are_erased(tmp_path):
    """Users added to a checkpoint have names and rows, and no moments yet."""
    train(tmp_path, "resident")
    folder = sorted(tmp_path.glob("checkpoint-*"))[-1]
    model = load(folder)
    add_users(model, ["eve-1", "fay-2"])
    model.save_pretrained(folder)
    forget_user(tmp_path, "bob-77c1")
    states = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
    own = [moments for moments in states if moments["step"].ndim == 1]
    assert own and all(not tensor[BOB].any() for moments in own for tensor in moments.values())
    assert all(moments["exp_avg"][0].any() for moments in own)


def test_a_torn_optimizer_is_found_before_anything_is_erased(tmp_path):
    train(tmp_path, "resident")
    folder = sorted(tmp_path.glob("checkpoint-*"))[-1]
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:1000])
    before = {file: file.read_bytes() for file in files(tmp_path)}
    with pytest.raises(AdapterMismatchError, match="optimizer.pt cannot be read .*Nothing has been erased"):
        forget_user(tmp_path, "bob-77c1")
    assert {file: file.read_bytes() for file in files(tmp_path)} == before


@pytest.mark.parametrize(
    ("name", "known"), [("AdamW", True), ("SGD", True), ("SGD without momentum", True), ("Adafactor", False)]
)
def test_moments_of_an_optimizer_of_ones_own_are_erased_or_said_to_be_left(name, known, tmp_path):
    makers = {"AdamW": torch.optim.AdamW, "Adafactor": torch.optim.Adafactor, "SGD": torch.optim.SGD}
    settings = {"momentum": 0.9} if name == "SGD" else {}
    train(tmp_path, "resident", optimizer=lambda parameters: makers[name.split()[0]](parameters, lr=1e-2, **settings))
    paths = sorted(tmp_path.glob("checkpoint-*/optimizer.pt"))
    states = [torch.load(path, weights_only=True)["state"] for path in paths]
    banks = {tuple(tensor.shape) for tensor in personal(tmp_path, "B").values()}
    report = forget_user(tmp_path, "bob-77c1")
    assert report.unread == ([] if known else paths) and len(paths) == 2
    assert ("optimizer.pt" in str(report)) == (not known)
    erased = 0
    for path, state in zip(paths, states, strict=True):
        after = torch.load(path, weights_only=True)["state"]
        for number, moments in state.items():
            for key, old in moments.items():
                if old is not None and tuple(old.shape) in banks:
                    assert old[BOB].any() and not after[number][key][BOB].any()
                    assert torch.equal(after[number][key][[0, 2]], old[[0, 2]])
                    erased += 1
                else:
                    assert old is None or torch.equal(after[number][key], old)
    modules = 2 * 2  # q_proj and down_proj of two layers
    assert erased == 2 * modules * {"AdamW": 2, "SGD": 1}.get(name, 0)


def test_a_bank_in_a_store_has_no_moments_in_the_optimizer(tmp_path):
    train(tmp_path, "ram")
    assert forget_user(tmp_path, "bob-77c1").unread == []


# -- ids that are for no message


def test_influence_shows_no_id_of_a_pseudonymous_model(monkeypatch):
    monkeypatch.delenv("SHARELORA_USER_KEY", raising=False)
    monkeypatch.delenv("SHARELORA_USER_KEY_FILE", raising=False)
    model = influence_model(users=UserRegistry(["ann", "bob"], key=KEY))
    rows = preference_rows(users=["ann", "bob"], n=4)
    for bad in ("ann.secret@example.com" * 20, 4915112345678.5):
        with pytest.raises(UserIdError, match="row [03] of column 'user_id'") as raised:
            influence(
                model,
                [*rows[:3], rows[3] | {"user_id": bad}]
                if isinstance(bad, str)
                else [row | {"user_id": bad} for row in rows],
                "ann",
            )
        assert "secret" not in str(raised.value) and "4915112345678" not in str(raised.value)
    assert influence(model, rows, "ann").comparisons == 2
