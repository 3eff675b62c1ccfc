"""A user leaves a saved adapter, and users come to a model: one row is touched, all others stay bit by bit what they were."""

import json
import os

import pytest
import torch
from datasets import Dataset
from helpers import preference_rows, tiny_model, tiny_tokenizer
from peft import PeftModel, get_peft_model
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
from trl_sharelora.errors import AdapterMismatchError, BankBusyError, RoutingError, UnknownUserError, UserIdError
from trl_sharelora.forget import forget_user
from trl_sharelora.new_users import add_users
from trl_sharelora.sharelora import ShareLoraAdamW, get_router
from trl_sharelora.sharelora.store import UserStore, read_manifest


KINDS = ("resident", "ram", "mmap")
USERS = ["ann-a9f3", "bob-77c1", "cat-e0d2"]  # not to be found in any file by accident
BOB = 1


def train(directory, kind, share="B", **overrides):
    rows = preference_rows(users=USERS, n=12)
    settings = dict(max_steps=12, save_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1)
    trainer = ShareLoraRewardTrainer(
        tiny_model(),
        ShareLoraRewardConfig(
            str(directory), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, **(settings | overrides)
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=ShareLoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], bank=kind, share=share, init_lora_weights=False
        ),
    )
    trainer.train()
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

    assert forget_user(tmp_path, "bob-77c1") == tmp_path

    for path in files(tmp_path):
        assert b"bob-77c1" not in path.read_bytes(), path
    assert {path for path in bytes_before if not path.exists()} == set()
    changed = {
        path.relative_to(tmp_path).parts[-1] for path in files(tmp_path) if path.read_bytes() != bytes_before[path]
    }
    moments = {"optimizer.pt"} if kind == "resident" else set()
    assert {name.split("-")[0] for name in changed} == {
        "users.json",
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
