"""ShareLoraRewardTrainer against TRL's own trainer, against brute force, and against bad input."""

import inspect
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig
from trl import RewardConfig, RewardTrainer

from tests.helpers import preference_rows, save_tiny, tiny_model, tiny_tokenizer
from trl_sharelora import (
    ShareLoraConfig,
    ShareLoraRewardConfig,
    ShareLoraRewardTrainer,
    UserRegistry,
    evaluate_users,
    use_users,
)
from trl_sharelora.errors import (
    AdapterMismatchError,
    ConfigError,
    DataError,
    NonFiniteError,
    UnknownUserError,
    UnsupportedError,
    UserIdError,
)
from trl_sharelora.trainers.preferences import PreferencePairsMixin, UserBatchCollator
from trl_sharelora.trainers.seams import check_seams
from trl_sharelora.trainers.user_batches import UserBatchesMixin
from trl_sharelora.usage import usage_card, user_usage


ADAPTER = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def arguments(directory, cls=ShareLoraRewardConfig, **overrides):
    settings = dict(
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        max_steps=4,
        bf16=False,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    return cls(str(directory), **(settings | overrides))


def make_trainer(
    directory, rows=None, model=None, users=None, adapter=None, eval_rows=None, quantization=None, **overrides
):
    rows = preference_rows() if rows is None else rows
    return ShareLoraRewardTrainer(
        tiny_model() if model is None else model,
        arguments(directory, **overrides),
        train_dataset=rows if not isinstance(rows, list) else Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows) if isinstance(eval_rows, list) else eval_rows,
        processing_class=tiny_tokenizer(),
        peft_config=ShareLoraConfig(**(ADAPTER if adapter is None else adapter)) if adapter != {} else None,
        users=users,
        quantization_config=quantization,
    )


def banks(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "sharelora_A" in n}


def trainable(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


# -- invariant 4: one user is plain LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_invariant_4_one_user_has_the_loss_trace_of_trl_with_plain_lora(tmp_path, gradient_checkpointing):
    data = Dataset.from_list(preference_rows(users=1, margin=True))
    common = dict(max_steps=12, gradient_checkpointing=gradient_checkpointing, center_rewards_coefficient=0.01)
    ours = ShareLoraRewardTrainer(
        tiny_model(),
        arguments(tmp_path, **common),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
        peft_config=ShareLoraConfig(**ADAPTER),
    )
    plain = RewardTrainer(
        tiny_model(),
        arguments(tmp_path, RewardConfig, **common),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(task_type="SEQ_CLS", **ADAPTER),
    )
    ours.train()
    plain.train()
    pairs = list(zip(ours.state.log_history, plain.state.log_history, strict=True))
    assert len(pairs) == 13
    for mine, theirs in pairs:
        for key in ("loss", "grad_norm", "learning_rate", "accuracy", "margin", "mean_reward", "num_tokens"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key
    a, b = ours.evaluate(), plain.evaluate()
    for key in ("eval_loss", "eval_margin", "eval_mean_reward", "eval_min_reward", "eval_max_reward"):
        assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key


def test_one_step_equals_bradley_terry_in_float64_on_one_lora_model_per_user(tmp_path):
    """The gradient of a whole training step of mixed users, against one float64 plain-LoRA model per user."""
    rows = preference_rows(users=3, n=4, margin=True)
    trainer = make_trainer(tmp_path, rows, adapter=ADAPTER | {"init_lora_weights": False})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "sharelora_A" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.training_step(trainer.model, batch)

    state = dict(trainer.model.named_parameters())
    shared_gradient: dict[str, torch.Tensor] = {}
    for user in range(3):
        model = get_peft_model(tiny_model().double(), LoraConfig(task_type="SEQ_CLS", **ADAPTER)).double()
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                ours = name.replace("lora_A", "sharelora_A")
                common = state[ours.replace("sharelora_A", "sharelora_common")]
                parameter.data.copy_(common.detach().double() + state[ours][user].detach().double())
            elif "lora_B" in name:
                parameter.data.copy_(state[name.replace("lora_B", "sharelora_B")].detach())
            elif "modules_to_save" in name:
                parameter.data.copy_(state[name].detach())
        loss = 0.0
        for row in trainer.train_dataset:
            if row["user_id"] == f"user{user}":
                chosen, rejected = (
                    model(input_ids=torch.tensor([row[key]])).logits.squeeze()
                    for key in ("chosen_ids", "rejected_ids")
                )
                loss = loss - torch.nn.functional.logsigmoid(chosen - rejected - row["margin"]) / 4
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            if "lora_A" in name:
                ours = state[name.replace("lora_A", "sharelora_A")].grad[user].double()
                assert torch.linalg.norm(ours - parameter.grad) <= 1e-5 * torch.linalg.norm(parameter.grad), name
            else:
                key = name.replace("lora_B", "sharelora_B")
                shared_gradient[key] = shared_gradient.get(key, 0) + parameter.grad
    assert len(shared_gradient) == 7
    for name, gradient in shared_gradient.items():
        assert torch.linalg.norm(state[name].grad.double() - gradient) <= 1e-5 * torch.linalg.norm(gradient), name


# -- invariant 3, through the trainer -----------------------------------------------------------------------------------------


def test_invariant_3_absent_users_are_bit_identical_after_training(tmp_path):
    """First all users train, then only one: the rows and moments of the others must not move by a bit."""
    everyone = preference_rows(users=3, n=12)
    model_dir = tmp_path / "first"
    first = make_trainer(model_dir, everyone, user_weight_decay=0.1, weight_decay=0.1)
    first.train()
    only_one = [row for row in everyone if row["user_id"] == "user1"]
    second = make_trainer(
        tmp_path, only_one, model=first.model, adapter={}, user_weight_decay=0.1, weight_decay=0.1, max_steps=6
    )
    before = banks(second)
    second.train()
    for name, table in banks(second).items():
        assert torch.equal(table[[0, 2]], before[name][[0, 2]]), name
        assert not torch.equal(table[1], before[name][1]), name
        state = second.optimizer.state[dict(second.model.named_parameters())[name]]
        assert state["step"].tolist() == [0, 6, 0]
        assert not state["exp_avg"][[0, 2]].any() and not state["exp_avg_sq"][[0, 2]].any()


def test_every_trainable_parameter_moves_and_every_other_stays(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_opposite_tastes_on_the_same_pairs_are_told_apart_where_one_model_cannot(tmp_path):
    """Two users give opposite answers to every pair: a pooled model is at chance, a personal one is not."""
    rows = preference_rows(users=["ann"], n=24)
    rows += [row | {"user_id": "bob", "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    settings = dict(max_steps=60, per_device_train_batch_size=16)
    trainer = make_trainer(tmp_path, rows, **settings)
    trainer.train()
    data = Dataset.from_list(rows)
    result = evaluate_users(trainer.model, data, tiny_tokenizer())
    assert result.table["accuracy"].min() > 0.9

    pooled = RewardTrainer(
        tiny_model(),
        arguments(tmp_path, RewardConfig, **settings),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(task_type="SEQ_CLS", **ADAPTER),
    )
    pooled.train()
    assert evaluate_users(pooled.model, data, tiny_tokenizer()).micro == pytest.approx(0.5)


# -- invariant 5: resume is a straight run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 8])
def test_invariant_5_resumed_equals_straight_bit_by_bit(tmp_path, bits):
    path = save_tiny("llama", tmp_path / "model")

    def run(directory, resume=None):
        trainer = make_trainer(
            directory,
            model=path,
            quantization=BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else None,
            adapter=ADAPTER | {"lora_dropout": 0.1},
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            bf16=bits == 8,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "straight" / "checkpoint-3"))
    expected, got = trainable(straight), trainable(resumed)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert json.loads((tmp_path / "straight/checkpoint-3/users.json").read_text())["users"] == [
        "user0",
        "user1",
        "user2",
    ]


def test_resume_with_other_users_is_refused_before_any_row_is_given_away(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    other = preference_rows(users=["zoe", "user1", "user2"])
    trainer = make_trainer(tmp_path / "other", other)
    with pytest.raises(AdapterMismatchError, match="row 0 is another user.*given another's row"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_saved_model_loads_as_peft_and_as_a_new_start_with_more_users(tmp_path):
    first = make_trainer(tmp_path / "first")
    first.train()
    first.save_model()
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path / "first")
    with pytest.raises(ConfigError, match="frozen.*is_trainable=True"):
        make_trainer(tmp_path, model=frozen, adapter={})
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "first", is_trainable=True)
    batch = {"input_ids": torch.randint(8, 90, (3, 9))}
    ids = ["user2", "user0", "user1"]
    first.model.eval(), loaded.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch, user_ids=ids).logits, first.model(**batch, user_ids=ids).logits)

    second = make_trainer(tmp_path, preference_rows(users=["user1", "new"]), model=loaded, adapter={})
    assert second.users.ids == ["user0", "user1", "user2", "new"]
    for name, table in banks(second).items():
        assert torch.equal(table[:3], banks(first)[name]) and not table[3].any()
    second.train()
    assert all(table[3].any() for table in banks(second).values())


# -- metrics ---------------------------------------------------------------------------------------------------------------------


def test_metrics_are_exact_on_uneven_batches_and_the_table_is_written(tmp_path):
    """9 rows in batches of 4: the mean of batch means would weigh the last row four times."""
    eval_rows = preference_rows(users=2, n=9, seed=5)
    trainer = make_trainer(tmp_path, eval_rows=eval_rows)
    trainer.train()
    metrics = trainer.evaluate()

    margins, rewards = [], []
    trainer.model.eval()
    for row in trainer.eval_dataset:
        with torch.no_grad(), use_users(trainer.model, [row["user_id"]]):
            chosen, rejected = (
                trainer.model(input_ids=torch.tensor([row[key]])).logits.item()
                for key in ("chosen_ids", "rejected_ids")
            )
        margins.append(chosen - rejected)
        rewards += [chosen, rejected]
    right = [margin > 0 for margin in margins]
    assert metrics["eval_accuracy"] == pytest.approx(sum(right) / 9)
    assert metrics["eval_margin"] == pytest.approx(sum(margins) / 9, rel=1e-4)
    assert metrics["eval_mean_reward"] == pytest.approx(sum(rewards) / 18, rel=1e-4)
    assert metrics["eval_ties"] == 0 and metrics["eval_users/seen"] == 2 and metrics["eval_users/unseen_rows"] == 0

    table = pd.read_parquet(tmp_path / "users" / "eval-step-4.parquet")
    shares = [sum(right[0::2]) / 5, sum(right[1::2]) / 4]
    assert table["user_id"].tolist() == ["user0", "user1"] and table["n"].tolist() == [5, 4]
    assert table["accuracy"].tolist() == pytest.approx(shares)
    assert metrics["eval_users/accuracy_mean"] == pytest.approx(sum(shares) / 2)
    assert metrics["eval_users/accuracy_worst_tenth"] == pytest.approx(min(shares))


def test_ties_count_half_and_are_reported(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows=preference_rows(users=2, n=6))
    trainer.model.base_model.model.score.modules_to_save["default"].weight.data.zero_()  # every reward is 0
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 0.5 and metrics["eval_ties"] == 6
    assert metrics["eval_users/accuracy_mean"] == 0.5


def test_several_evaluation_sets_keep_their_own_metrics_and_tables(tmp_path):
    sets = {name: Dataset.from_list(preference_rows(users=2, n=n, seed=n)) for name, n in (("a", 3), ("b", 5))}
    trainer = make_trainer(tmp_path, eval_rows=sets)
    metrics = trainer.evaluate()
    for name, n in (("a", 3), ("b", 5)):
        alone = evaluate_users(trainer.model, sets[name], tiny_tokenizer())
        assert metrics[f"eval_{name}_accuracy"] == pytest.approx(alone.micro)
        assert pd.read_parquet(tmp_path / "users" / f"eval_{name}-step-0.parquet")["n"].sum() == n


def test_training_accuracy_is_over_all_rows_since_the_last_log(tmp_path):
    """Accumulation of 2 and a log every 2 steps: 16 rows, whatever the batches were."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, logging_steps=2, max_steps=2, learning_rate=0.0)
    trainer.train()
    result = evaluate_users(trainer.model, Dataset.from_list(preference_rows()), tiny_tokenizer())
    log = trainer.state.log_history[0]
    assert (log["accuracy"] * 16) % 0.5 == 0 and log["users/seen"] == 3
    # at a learning rate of zero the 16 rows are a sample of the 24
    assert abs(log["accuracy"] * 16 - result.micro * 24) <= 8


def test_unseen_users_raise_or_are_scored_with_the_common_model_and_counted(tmp_path, caplog):
    eval_rows = preference_rows(users=["user0", "stranger"], n=6)
    with pytest.raises(UnknownUserError, match="'stranger'.*misspelt.*unseen=\"common\""):
        make_trainer(tmp_path, eval_rows=eval_rows)
    with caplog.at_level(logging.WARNING, "trl_sharelora"):
        trainer = make_trainer(tmp_path, eval_rows=eval_rows, unseen="common")
    assert "3 of the 6 rows of the eval dataset belong to 1 users without training data" in caplog.text
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_users/unseen_rows"] == 3 and metrics["eval_users/seen"] == 1
    assert pd.read_parquet(tmp_path / "users" / "eval-step-4.parquet")["user_id"].tolist() == ["user0"]
    result = evaluate_users(trainer.model, Dataset.from_list(eval_rows), tiny_tokenizer(), unseen="common")
    assert metrics["eval_accuracy"] == pytest.approx(result.micro) and result.unseen == 3


# -- data of every kind ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_every_format_of_trl_trains(tmp_path, conversational, prompt):
    rows = preference_rows(conversational=conversational, prompt=prompt, margin=True)
    trainer = make_trainer(
        tmp_path,
        [{"worker" if k == "user_id" else k: v for k, v in r.items()} for r in rows],
        user_column="worker",
        eval_rows=[r | {"worker": r["user_id"]} for r in rows],
    )
    plain = RewardTrainer(
        tiny_model(),
        arguments(tmp_path, RewardConfig),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(task_type="SEQ_CLS", **ADAPTER),
    )
    for key in ("chosen_ids", "rejected_ids", "margin"):
        assert trainer.train_dataset[key][:] == plain.train_dataset[key][:]
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def test_users_of_a_stream_are_added_as_they_appear(tmp_path):
    rows = preference_rows(users=["ann"], n=8) + preference_rows(users=["bob", "cat"], n=8, seed=1)
    trainer = make_trainer(tmp_path, stream(rows), max_steps=4)
    assert trainer.users.ids == ["ann"]
    trainer.train()
    assert trainer.users.ids == ["ann", "bob", "cat"]
    tables = banks(trainer)
    assert all(table.shape[0] == 3 and all(row.any() for row in table) for table in tables.values())
    state = trainer.optimizer.state[dict(trainer.model.named_parameters())[next(iter(tables))]]
    assert state["step"].tolist() == [2, 2, 2]
    trainer.save_model()
    assert UserRegistry.load(tmp_path).ids == ["ann", "bob", "cat"]


def test_a_growing_stream_resumes_where_it_was(tmp_path):
    rows = preference_rows(users=["ann"], n=8) + preference_rows(users=["bob", "cat"], n=8, seed=1)
    straight = make_trainer(tmp_path, stream(rows), max_steps=4, save_strategy="steps", save_steps=3)
    straight.train()
    resumed = make_trainer(tmp_path / "again", stream(rows), max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.users == straight.users
    expected, got = trainable(straight), trainable(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_stream_with_given_users_takes_nobody_else(tmp_path):
    rows = preference_rows(users=["ann", "bob"], n=16)
    trainer = make_trainer(tmp_path, stream(rows), users=UserRegistry(["bob", "ann", "cat"]))
    trainer.train()
    assert trainer.users.ids == ["bob", "ann", "cat"]
    with pytest.raises(UnknownUserError, match="'ann'"):
        make_trainer(tmp_path, stream(rows), users=UserRegistry(["bob"])).train()


def test_a_growing_stream_refuses_workers_and_names_a_bad_row(tmp_path):
    with pytest.raises(ConfigError, match="dataloader_num_workers=2.*number them by itself"):
        make_trainer(tmp_path, stream(preference_rows()), dataloader_num_workers=2)
    rows = preference_rows(n=8)
    rows[5]["chosen"] = None
    with pytest.raises(DataError, match="row 5"):
        make_trainer(tmp_path, stream(rows)).train()


def test_users_of_the_config_are_taken_and_new_ones_follow(tmp_path):
    rows = preference_rows(users=["ann", "bob"])
    assert make_trainer(tmp_path, rows, adapter=ADAPTER | {"users": ["zoe", "bob"]}).users.ids == ["zoe", "bob", "ann"]
    with pytest.raises(ConfigError, match="`users` and `peft_config.users`"):
        make_trainer(tmp_path, rows, adapter=ADAPTER | {"users": ["zoe"]}, users=UserRegistry(["ann"]))


# -- 8-bit and 4-bit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bf16", [True, False])
def test_quantised_base_keeps_everything_trained_in_float32_and_all_of_it_moves(tmp_path, bits, bf16):
    """At the default learning rate. (TRL casts to bf16, where a third of A's entries ever moves.)"""
    path = save_tiny("llama", tmp_path / "model")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    trainer = make_trainer(
        tmp_path, model=path, quantization=config, learning_rate=1e-4, bf16=bf16, num_train_epochs=8, max_steps=-1
    )
    assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {torch.float32}
    before = trainable(trainer)
    trainer.train()
    after = trainable(trainer)
    for name, start in before.items():
        if "sharelora_A" in name:
            moved = torch.cat([(after[name][user] != start[user]).flatten() for user in range(3)]).float().mean()
            assert moved >= 0.99, (name, moved)
        else:
            assert (after[name] != start).float().mean() >= 0.99, name

    trainer.save_model()
    loaded = PeftModel.from_pretrained(_quantised(path, config), tmp_path).eval()
    trainer.model.eval()
    batch = {"input_ids": torch.randint(8, 90, (2, 9))}
    # the trainer's model goes on computing under its autocast
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = trainer.model(**batch, user_ids=["user0", "user2"]).logits
        torch.testing.assert_close(loaded(**batch, user_ids=["user0", "user2"]).logits, expected, rtol=1e-6, atol=1e-6)


def _quantised(path, config):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, quantization_config=config)
    model.config.pad_token_id = tiny_tokenizer().pad_token_id
    return model


def test_what_an_adapter_has_learned_survives_a_new_trainer_on_a_quantised_base(tmp_path):
    """TRL would round it to bf16."""
    path = save_tiny("llama", tmp_path / "model")
    config = BitsAndBytesConfig(load_in_8bit=True)
    make = dict(quantization=config, bf16=True)
    first = make_trainer(tmp_path, model=path, **make)
    first.train()
    first.save_model()
    loaded = PeftModel.from_pretrained(_quantised(path, config), tmp_path, is_trainable=True)
    second = make_trainer(tmp_path / "second", model=loaded, adapter={}, bf16=True)
    expected, got = trainable(first), trainable(second)
    assert expected and all(torch.equal(expected[name], got[name]) for name in expected)


# -- bad input -------------------------------------------------------------------------------------------------------------------


def spoiled(change, row=5):
    rows = preference_rows(margin=True)
    change(rows[row])
    return rows


BAD_ROWS = {
    "no chosen": (lambda rows: [{k: v for k, v in r.items() if k != "chosen"} for r in rows], DataError, "chosen"),
    "misspelt user column": (
        lambda rows: [{("user-id" if k == "user_id" else k): v for k, v in r.items()} for r in rows],
        DataError,
        "'user_id'.*user-id",
    ),
    "None text": (lambda rows: [*rows[:5], rows[5] | {"rejected": None}, *rows[6:]], DataError, "row 5"),
    "blank id": (lambda rows: [*rows[:5], rows[5] | {"user_id": " "}, *rows[6:]], UserIdError, "blank.*row 5"),
    "no id": (lambda rows: [*rows[:5], rows[5] | {"user_id": None}, *rows[6:]], UserIdError, "missing.*row 5"),
    "float ids": (lambda rows: [r | {"user_id": 7.0} for r in rows], UserIdError, "float.*dtype=str"),
    "bool ids": (lambda rows: [r | {"user_id": True} for r in rows], UserIdError, "bool"),
    "NaN margin": (lambda rows: [*rows[:5], rows[5] | {"margin": math.nan}, *rows[6:]], DataError, "margin.*row 5"),
    "Inf margin": (lambda rows: [*rows[:5], rows[5] | {"margin": math.inf}, *rows[6:]], DataError, "margin.*row 5"),
    "same": (lambda rows: [*rows[:5], rows[5] | {"rejected": rows[5]["chosen"]}, *rows[6:]], DataError, "same.*row 5"),
    "twins": (
        lambda rows: [r | {"user_id": ["Jos\u00e9", "Jose\u0301"][i % 2]} for i, r in enumerate(rows)],
        UserIdError,
        "normalisation",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named_before_anything_is_trained_or_written(tmp_path, case):
    change, error, message = BAD_ROWS[case]
    with pytest.raises(error, match=f"(?s){message}"):
        make_trainer(tmp_path / "out", change(preference_rows(margin=True)))
    assert not (tmp_path / "out").exists()


def test_empty_dataset(tmp_path):
    empty = Dataset.from_list(preference_rows()).select([])
    with pytest.raises(DataError, match="(?i)empty|no rows"):
        make_trainer(tmp_path, empty)


def test_integer_ids_are_taken_as_text_once(tmp_path):
    rows = [row | {"user_id": int(row["user_id"][-1])} for row in preference_rows()]
    assert make_trainer(tmp_path, rows).users.ids == ["0", "1", "2"]


def test_long_rows_are_dropped_and_counted_per_user_and_losing_a_user_is_an_error(tmp_path, caplog):
    rows = preference_rows(users=2, n=12)
    rows[4]["chosen"] = " ".join(["w1"] * 60)
    with caplog.at_level(logging.INFO, "trl_sharelora"):
        trainer = make_trainer(tmp_path, rows, max_length=30)
    assert len(trainer.train_dataset) == 11 and "user0" in caplog.text and "1 of 6" in caplog.text
    for row in rows:
        if row["user_id"] == "user1":
            row["rejected"] = " ".join(["w2"] * 60)
    with pytest.raises(DataError, match="All rows of 1 of 2 users.*'user1' .6 rows"):
        make_trainer(tmp_path, rows, max_length=30)


def test_configuration_values(tmp_path):
    for overrides, message in (
        ({"unseen": "guess"}, "unseen='guess'.*'raise', 'common'"),
        ({"user_weight_decay": -1.0}, "user_weight_decay=-1.0"),
        ({"learning_rate_shared": math.nan}, "learning_rate_shared=nan"),
        ({"user_column": ""}, "user_column=''"),
        ({"optim": "adafactor"}, "optim=.*adafactor.*move users who have no data"),
    ):
        with pytest.raises(ConfigError, match=message):
            arguments(tmp_path, **overrides)
    with pytest.raises(ConfigError, match="a ShareLoraRewardConfig is needed"):
        ShareLoraRewardTrainer(
            tiny_model(), arguments(tmp_path, RewardConfig), train_dataset=Dataset.from_list(preference_rows())
        )
    data = Dataset.from_list(preference_rows())
    for peft_config, message in (
        (None, "Neither a ShareLoRA adapter.*peft_config=ShareLoraConfig"),
        (LoraConfig(), "peft_config is a LoraConfig.*trl.RewardTrainer"),
        (ShareLoraConfig(task_type="CAUSAL_LM"), "task_type='CAUSAL_LM'"),
    ):
        with pytest.raises(ConfigError, match=message):
            ShareLoraRewardTrainer(tiny_model(), arguments(tmp_path), train_dataset=data, peft_config=peft_config)


def test_padding_free_collators_are_refused_by_name():
    from transformers import DataCollatorWithFlattening

    with pytest.raises(UnsupportedError, match="DataCollatorWithFlattening.*padding-free"):
        UserBatchCollator(DataCollatorWithFlattening())


def test_a_nan_row_stops_the_run_names_its_user_and_reaches_nobody(tmp_path):
    trainer = make_trainer(tmp_path)
    name = next(iter(banks(trainer)))
    dict(trainer.model.named_parameters())[name].data[1] = math.nan
    before = trainable(trainer)
    with pytest.raises(NonFiniteError, match="users 'user1'.*before anything was updated"):
        trainer.train()
    after = trainable(trainer)
    assert all(torch.equal(before[key].nan_to_num(7.0), after[key].nan_to_num(7.0)) for key in before)


# -- the seams -------------------------------------------------------------------------------------------------------------------


def test_overrides_are_those_the_docstrings_name_and_fit_their_parents():
    """An override that TRL renames or reshapes would silently never be called."""
    inherited = set(dir(RewardTrainer))
    named = set()
    for cls in (UserBatchesMixin, PreferencePairsMixin, ShareLoraRewardTrainer):
        methods = {name for name, value in vars(cls).items() if inspect.isfunction(value)} & inherited
        assert methods and all(f"`{name}`" in cls.__doc__ for name in methods)
        assert all(f"`{name}`" in ShareLoraRewardTrainer.__doc__ for name in methods)
        unchecked = methods - set(cls._seams) - {"__init__", "evaluation_loop", "create_model_card"}
        assert not unchecked, unchecked
        named |= methods
    assert len(named) == 16
    check_seams(ShareLoraRewardTrainer)


def test_another_trl_is_refused_with_a_clear_message(tmp_path, monkeypatch):
    def log(self, logs):
        """Of a TRL to come."""

    monkeypatch.setattr(RewardTrainer, "log", log)
    with pytest.raises(
        UnsupportedError, match=r"overrides log\(logs, start_time\) of TRL .*RewardTrainer.log takes \(logs\)"
    ):
        make_trainer(tmp_path)
    monkeypatch.undo()
    monkeypatch.delattr(RewardTrainer, "_prepare_dataset")
    with pytest.raises(UnsupportedError, match="_prepare_dataset.*but it is not there"):
        check_seams(ShareLoraRewardTrainer)


def test_learning_rates_and_decay_reach_their_parts(tmp_path):
    trainer = make_trainer(
        tmp_path, learning_rate=3e-3, learning_rate_shared=1e-4, user_weight_decay=0.2, weight_decay=0.01
    )
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"], group["rowwise"])
    assert set(found) == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    for name, values in found.items():
        assert values == ((3e-3, 0.2, True) if "sharelora_A" in name else (1e-4, 0.01, False)), name


def test_an_optimizer_of_ones_own_is_taken_with_a_word_where_it_can_train_users(tmp_path, caplog):
    trainer = make_trainer(tmp_path, max_steps=2)
    before = {name: bank.clone() for name, bank in banks(trainer).items()}
    trainer.optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-2)
    trainer.train()
    (record,) = [record for record in caplog.records if "AdamW" in record.getMessage()]
    assert record.levelname == "WARNING" and "users who have no data" in record.getMessage()
    assert any(not torch.equal(bank, before[name]) for name, bank in banks(trainer).items())
    # rows in a store are no parameters: it would train what is shared, and no user
    trainer = make_trainer(tmp_path, adapter=ADAPTER | {"bank": "ram"})
    trainer.optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(ConfigError, match="optimizer of type SGD came for bank='ram'.*no user's row would ever move"):
        trainer.train()
    # ours is ours however often it is trained on
    caplog.clear()
    for kind in ("resident", "ram"):
        trainer = make_trainer(tmp_path, adapter=ADAPTER | {"bank": kind}, max_steps=1)
        trainer.train()
        trainer.train()
    assert not [record for record in caplog.records if "optimizer" in record.getMessage().lower()]


def test_what_is_shared_is_trained_on_with_the_users_parts_still(tmp_path):
    """After shrink_users: a second trainer on the same model, `learning_rate` 0."""
    first = make_trainer(tmp_path, learning_rate_shared=1e-2)
    first.train()
    before = trainable(first)
    users = banks(first)
    assert any(bool(bank.any()) for bank in users.values())
    second = make_trainer(
        tmp_path, model=first.model, adapter={}, learning_rate=0.0, learning_rate_shared=1e-2, user_weight_decay=0.1
    )
    second.train()
    assert users.keys() == banks(second).keys()
    for name, after in trainable(second).items():
        assert torch.equal(after, before[name]) == (name in users), name


def test_bf16_autocast_trains_near_float32_and_keeps_float32_weights(tmp_path):
    traces = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, bf16=bf16, max_steps=6, learning_rate=1e-3)
        trainer.train()
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        traces.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert traces[0] == pytest.approx(traces[1], rel=0.05)


def test_model_card_says_how_to_use_it(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "pipeline(" not in card and "import trl_sharelora" in card and "3 users share" in card
    assert "sharelora" in card and "2503.19201" in card
    assert "user0" not in card and "Does it use the user?" not in card


def test_what_was_measured_of_another_model_is_not_in_the_card(tmp_path):
    rows = preference_rows(n=24, seed=1)
    trainer = make_trainer(tmp_path, eval_rows=rows, max_steps=2)
    trainer.train()
    trainer.usage = user_usage(trainer.model, Dataset.from_list(rows), tiny_tokenizer(), draws=1, flip_users=0)
    trainer.create_model_card(model_name="rm")
    card = (tmp_path / "README.md").read_text()
    assert usage_card(trainer.usage) in card and "## Training procedure" in card
    trainer.train()
    trainer.create_model_card(model_name="rm")
    assert trainer.usage is None and "Does it use the user?" not in (tmp_path / "README.md").read_text()


TWO_RANKS = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.trainers.test_reward import two_rank_case
for reentrant in (False, True):
    two_rank_case(Path({out!r}), reentrant, ranks=2)
"""


def two_rank_case(out: Path, reentrant: bool, ranks: int) -> None:
    """8 users, disjoint between the ranks of a step, clipping, accumulation, an evaluation that does not divide by two."""
    out = out / f"{ranks}-{reentrant}"
    trainer = make_trainer(
        out,
        preference_rows(users=8, n=32),
        eval_rows=preference_rows(users=8, n=7, seed=1),
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=1e-3,  # at 1e-2 Adam makes 8e-6 of a rounding difference in a gradient near zero
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert trainer.accelerator.num_processes == ranks
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_file(trainable(trainer), out / "weights.safetensors")
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        (out / "metrics.json").write_text(json.dumps({"losses": losses, "metrics": metrics}))


@pytest.mark.distributed
def test_invariant_1_two_ranks_equal_one_process(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(root=str(Path(__file__).parents[2]), out=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for reentrant in (False, True):
        two_rank_case(tmp_path, reentrant, ranks=1)
        (one, log_one), (two, log_two) = (
            (load_file(out / "weights.safetensors"), json.loads((out / "metrics.json").read_text()))
            for out in (tmp_path / f"{ranks}-{reentrant}" for ranks in (1, 2))
        )
        assert all((one[name] - two[name]).abs().max() <= 1e-6 for name in one)
        assert log_two["losses"] == pytest.approx(log_one["losses"], abs=1e-6)
        for key in ("eval_accuracy", "eval_ties", "eval_margin", "eval_users/accuracy_mean", "eval_users/seen"):
            assert log_two["metrics"][key] == pytest.approx(log_one["metrics"][key], abs=1e-6), (key, reentrant)
