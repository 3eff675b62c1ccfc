"""Training with the users' rows in Parameters, in memory and in files: the same bit by bit, and through checkpoints."""

import copy
import gc
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file

from tests.helpers import preference_rows, tiny_model, tiny_tokenizer
from trl_sharelora import (
    ShareLoraConfig,
    ShareLoraRewardConfig,
    ShareLoraRewardTrainer,
    evaluate_users,
    export_user,
    use_users,
)
from trl_sharelora.errors import CapacityError, ConfigError, UnsupportedError
from trl_sharelora.sharelora.store import read_manifest, read_row


KINDS = ("resident", "ram", "mmap")
USERS = 5


def make_trainer(directory, bank, share="B", adapter=None, rows=None, **overrides):
    settings = dict(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        user_weight_decay=0.1,
        max_steps=6,
        max_grad_norm=0.5,
        bf16=False,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    rows = preference_rows(users=USERS, n=25) if rows is None else rows
    config = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], bank=bank, share=share)
    return ShareLoraRewardTrainer(
        tiny_model(),
        ShareLoraRewardConfig(str(directory), **(settings | overrides)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=ShareLoraConfig(**(config | (adapter or {}))),
    )


def shared(model):
    personal = set(resident_banks(model))
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and n not in personal}


def resident_banks(model):
    share = model.peft_config["default"].share
    factor = {"B": "A", "A": "B"}.get(share, "C")
    return [name for name, _ in model.named_parameters() if f"sharelora_{factor}.default.weight" in name]


def moves(model, row):
    """One user's D_u by module, whatever the kind."""
    working_sets = model.base_model.router.working_sets
    if working_sets:
        return working_sets["default"].moves(row)
    named = dict(model.named_parameters())
    names = resident_banks(model)
    return {n.removeprefix("base_model.model.").rpartition(".sharelora_")[0]: named[n].detach()[row] for n in names}


def moments(trainer, row):
    """(step count, first moments, second moments) of one user."""
    model = trainer.model
    working_sets = model.base_model.router.working_sets
    if working_sets:
        working_set = working_sets["default"]
        working_set.flush()
        step, _, first, second = working_set.layout.split(working_set.store.read([row]))
        return int(step[0]), first[0], second[0]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    named = dict(model.named_parameters())
    states = [optimizer.state[named[name]] for name in resident_banks(model)]
    if not states[0]:
        return 0, torch.zeros(()), torch.zeros(())
    return (
        int(states[0]["step"][row]),
        torch.cat([state["exp_avg"][row].flatten() for state in states]),
        torch.cat([state["exp_avg_sq"][row].flatten() for state in states]),
    )


def assert_same(one, other, users=USERS):
    """Two trainers, bit by bit."""
    first, second = shared(one.model), shared(other.model)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for row in range(users):
        mine, theirs = moves(one.model, row), moves(other.model, row)
        assert mine.keys() == theirs.keys()
        for name, move in mine.items():
            assert torch.equal(move, theirs[name]), (row, name)
        for a, b in zip(moments(one, row), moments(other, row), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), row


def without_times(history):
    slow = ("runtime", "per_second", "flos")
    return [{k: v for k, v in entry.items() if not any(word in k for word in slow)} for entry in history]


@pytest.mark.parametrize("share", ["B", "A", "AB", "diagonal"])
@pytest.mark.parametrize("slots", [None, 4])
def test_all_kinds_of_bank_train_alike_bit_by_bit(tmp_path, share, slots):
    """Four slots for five users: somebody is paged out and in again at almost every step."""
    trainers = {}
    for kind in KINDS:
        adapter = {} if kind == "resident" else {"bank_slots": slots}
        trainers[kind] = make_trainer(tmp_path / kind, kind, share, adapter, eval_strategy="steps", eval_steps=3)
        trainers[kind].train()
    resident = trainers["resident"]
    assert sum(float(move.abs().sum()) for row in range(USERS) for move in moves(resident.model, row).values()) > 0
    for kind in ("ram", "mmap"):
        assert_same(resident, trainers[kind])
        assert without_times(trainers[kind].state.log_history) == without_times(resident.state.log_history)
        if slots:
            assert trainers[kind].router.working_sets["default"].slots == slots


@pytest.mark.parametrize("gradient_checkpointing_kwargs", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_all_kinds_of_bank_train_alike_under_checkpointing(tmp_path, gradient_checkpointing_kwargs):
    trainers = [
        make_trainer(
            tmp_path / kind,
            kind,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs,
        )
        for kind in KINDS
    ]
    for trainer in trainers:
        trainer.train()
    assert_same(trainers[0], trainers[1])
    assert_same(trainers[0], trainers[2])


@pytest.mark.parametrize("kind", ["ram", "mmap"])
def test_invariant_5_a_resumed_bank_goes_on_bit_by_bit(tmp_path, kind):
    settings = dict(lr_scheduler_type="constant", save_strategy="steps", save_steps=2, save_total_limit=1)
    straight = make_trainer(tmp_path / "straight", kind, max_steps=8, **settings)
    straight.train()
    first = make_trainer(tmp_path / "run", kind, max_steps=4, **settings)
    first.train()
    del first
    gc.collect()  # the folder it worked in is its own until it is gone
    again = make_trainer(tmp_path / "run", kind, max_steps=8, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert_same(straight, again)


@pytest.mark.parametrize("kind", ["ram", "mmap"])
def test_a_checkpoint_holds_what_changed_and_links_the_rest(tmp_path, kind):
    rows = preference_rows(users=1, n=4)
    later = [{**row, "user_id": f"later{i}"} for i, row in enumerate(rows)]
    trainer = make_trainer(
        tmp_path,
        kind,
        rows=rows + later,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    banks = [tmp_path / f"checkpoint-{step}" / "bank" for step in (4, 8)]
    first, second = (read_manifest(bank)["segments"] for bank in banks)
    assert [item["records"] for item in first] == [1]
    assert [item["records"] for item in second] == [1, 4]
    name = first[0]["file"]
    assert (banks[0] / name).samefile(banks[1] / name)
    assert load_file(banks[1] / second[1]["file"])["rows"].tolist() == [1, 2, 3, 4]
    for row in range(5):
        for module, move in read_row(banks[1], row).items():
            assert torch.equal(move, moves(trainer.model, row)[module]) and move.abs().sum() > 0


@pytest.mark.parametrize("kind", ["ram", "mmap"])
def test_invariant_5_saved_loaded_exported_and_evaluated_like_a_resident_bank(tmp_path, kind):
    resident, trainer = (make_trainer(tmp_path / name, name) for name in ("resident", kind))
    for one in (resident, trainer):
        one.train()
        one.save_model()
    saved = tmp_path / kind
    assert not any("sharelora_A" in name for name in load_file(saved / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny_model(), saved).eval()
    assert loaded.peft_config["default"].bank == kind
    batch = {"input_ids": torch.randint(8, 90, (4, 9))}
    who = ["user4", "user0", "user3", "user0"]
    with torch.no_grad():
        expected = resident.model.eval()(**batch, user_ids=who).logits
        assert torch.equal(loaded(**batch, user_ids=who).logits, expected)
        copied = copy.deepcopy(loaded)
        assert torch.equal(copied(**batch, user_ids=who).logits, expected)
        copied.save_pretrained(tmp_path / "copy")
        again = PeftModel.from_pretrained(tiny_model(), tmp_path / "copy").eval()
        assert torch.equal(again(**batch, user_ids=who).logits, expected)
        with use_users(loaded, ["user1", "nobody", "user2", "nobody"], unseen="common"):
            mixed = loaded(**batch).logits
        with use_users(resident.model, ["user1", "nobody", "user2", "nobody"], unseen="common"):
            assert torch.equal(mixed, resident.model(**batch).logits)
    for source in (saved, loaded):
        one = load_file(export_user(source, "user3", tmp_path / "one") / "adapter_model.safetensors")
        plain = load_file(export_user(tmp_path / "resident", "user3", tmp_path / "two") / "adapter_model.safetensors")
        assert one.keys() == plain.keys() and all(torch.equal(one[name], plain[name]) for name in one)
    rows = Dataset.from_list(preference_rows(users=USERS, n=25))
    tables = [
        evaluate_users(model, rows, processing_class=tiny_tokenizer()).table for model in (loaded, resident.model)
    ]
    assert tables[0].equals(tables[1])
    merged = loaded.merge_and_unload(user="user3")(**batch).logits
    torch.testing.assert_close(merged[2], expected[2])


def test_what_a_loaded_bank_has_learned_goes_on_training(tmp_path):
    trainer = make_trainer(tmp_path / "a", "mmap", lr_scheduler_type="constant")
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "a", is_trainable=True)
    rows = preference_rows(users=USERS, n=25) + preference_rows(users=USERS + 1, n=6)[-1:]
    before = {row: moves(loaded, row) for row in range(USERS)}
    again = ShareLoraRewardTrainer(
        loaded,
        ShareLoraRewardConfig(str(tmp_path / "b"), max_steps=2, bf16=False, use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    assert len(again.users) == USERS + 1
    for row, modules in before.items():
        for name, move in modules.items():
            assert torch.equal(moves(again.model, row)[name], move)
    again.train()
    again.save_model()
    assert read_manifest(tmp_path / "b" / "bank")["num_users"] == USERS + 1


def test_the_best_model_is_loaded_with_its_users(tmp_path):
    trainer = make_trainer(
        tmp_path,
        "mmap",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=0.5,  # so large that the first evaluation is the best
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    for row in range(USERS):
        for name, move in read_row(best / "bank", row).items():
            assert torch.equal(moves(trainer.model, row)[name], move)


def test_more_users_in_a_window_than_slots_raises_and_says_how_many(tmp_path):
    trainer = make_trainer(tmp_path, "ram", adapter={"bank_slots": 2})
    with pytest.raises(CapacityError, match=r"the working set has 2 slots.*Raise bank_slots"):
        trainer.train()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_pair_is_in_the_metrics_of_its_step(tmp_path, accumulation):
    """Batches are fetched before they are computed, up to the last of the epoch, which is short."""
    seen = []
    for kind in KINDS:
        trainer = make_trainer(
            tmp_path / kind,
            kind,
            rows=preference_rows(users=3, n=17),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=accumulation,
            max_steps=-1,
            num_train_epochs=1,
        )
        recorded = []
        record = trainer._record_scores

        def counted(user_index, rewards, weights=None, record=record, recorded=recorded, trainer=trainer):
            record(user_index, rewards, weights)
            recorded.append(len(trainer._scores["train"][-1][0]))

        trainer._record_scores = counted
        trainer.train()
        seen.append(recorded)
    assert seen == [[8, 8, 1]] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_whose_users_grow_trains_in_every_kind(tmp_path, kind):
    rows = Dataset.from_list(preference_rows(users=4, n=24)).to_iterable_dataset()
    trainer = ShareLoraRewardTrainer(
        tiny_model(),
        ShareLoraRewardConfig(
            str(tmp_path), max_steps=4, per_device_train_batch_size=3, bf16=False, use_cpu=True, report_to="none"
        ),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=ShareLoraConfig(r=4, bank=kind),
    )
    trainer.train()
    assert trainer.users.ids == ["user0", "user1", "user2", "user3"]
    for row in range(4):
        assert sum(float(move.abs().sum()) for move in moves(trainer.model, row).values()) > 0


def test_an_interrupted_training_leaves_nothing_for_the_next(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "ram")
    working_set = trainer.router.working_sets["default"]
    clip = trainer._clip_grad_norm
    monkeypatch.setattr(trainer, "_clip_grad_norm", lambda model: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert working_set.held()
    monkeypatch.setattr(trainer, "_clip_grad_norm", clip)
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert not working_set.held() and working_set.gradient.abs().sum() == 0 and trainer._window_rows == []
    assert trainer.router.take_visited() == []


def test_owners_need_a_store(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "resident", user_sharding="owner")  # one process: nothing to shard
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(ConfigError, match="needs a bank in a store"):
        trainer._start_sharding()


def test_a_base_on_several_devices_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, "ram")
    monkeypatch.setattr(trainer.model.base_model.model, "hf_device_map", {"a": 0, "b": 1}, raising=False)
    with pytest.raises(UnsupportedError, match="several devices"):
        trainer._start_sharding()


def test_the_working_folder_is_gone_at_the_end(tmp_path):
    trainer = make_trainer(tmp_path, "mmap", adapter={"bank_slots": 4})
    trainer.train()
    working = tmp_path / "_working-bank" / "process-0"
    assert len(list(working.glob("rows-*.safetensors"))) == 1
    trainer.save_model()
    trainer.router.working_sets["default"].store.close()
    assert not working.exists()
    assert len(list((tmp_path / "bank").glob("rows-*.safetensors"))) == 1
