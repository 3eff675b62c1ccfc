"""ShareLoraDPOTrainer against TRL's own trainer, against DPO by hand, and against bad input."""

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
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from tests.helpers import preference_rows, save_tiny, tiny_causal, tiny_model, tiny_tokenizer
from tests.trainers.test_banks import assert_same, moves, without_times
from trl_sharelora import ShareLoraConfig, UserRegistry, export_user, use_users
from trl_sharelora.errors import ConfigError, DataError, UnknownUserError, UnsupportedError, UserIdError
from trl_sharelora.sharelora.store import read_manifest, read_row
from trl_sharelora.trainers.dpo import ShareLoraDPOConfig, ShareLoraDPOTrainer, sequence_log_probs
from trl_sharelora.trainers.preferences import PreferencePairsMixin
from trl_sharelora.trainers.seams import check_seams
from trl_sharelora.trainers.user_batches import UserBatchesMixin


ROOT = Path(__file__).parents[2]
ADAPTER = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
BETA = 0.3  # three times TRL's, so that margins of a few steps are seen in the loss


def arguments(directory, cls=ShareLoraDPOConfig, **overrides):
    settings = dict(
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        beta=BETA,
        max_steps=4,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    return cls(str(directory), **(settings | overrides))


def as_dataset(rows):
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def make_trainer(
    directory, rows=None, model=None, adapter=None, eval_rows=None, users=None, reward=None, quantization=None, **more
):
    """A trainer of a fresh adapter, or of the one `model` has (`adapter={}`)."""
    return ShareLoraDPOTrainer(
        tiny_causal() if model is None else model,
        args=arguments(directory, **more),
        train_dataset=as_dataset(preference_rows() if rows is None else rows),
        eval_dataset=as_dataset(eval_rows),
        processing_class=tiny_tokenizer(),
        peft_config=None if adapter == {} else ShareLoraConfig(**(ADAPTER | (adapter or {}))),
        users=users,
        reward=reward,
        quantization_config=quantization,
    )


def plain_trainer(directory, rows, eval_rows=None, **overrides):
    return DPOTrainer(
        tiny_causal(),
        args=arguments(directory, DPOConfig, **overrides),
        train_dataset=as_dataset(rows),
        eval_dataset=as_dataset(eval_rows),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **ADAPTER),
    )


def logs_of(trainer, key="loss"):
    return [log[key] for log in trainer.state.log_history if key in log]


def trainable(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def spread(trainer, seed=0):
    """Different random moves for each user, in a resident bank; B is random with `init_lora_weights=False`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainer.model.named_parameters():
        if "sharelora_A.default" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainer


def spread_trainer(directory, rows=None, **more):
    return spread(make_trainer(directory, rows, adapter={"init_lora_weights": False}, **more))


# -- by hand: one plain-LoRA model in float64 per user --------------------------------------------------------------------------


def plain_model_of(trainer, user: int) -> PeftModel:
    """The user's policy as an ordinary LoRA in float64; its base is the reference."""
    model = get_peft_model(tiny_causal().double(), LoraConfig(task_type="CAUSAL_LM", **ADAPTER)).double()
    state = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            ours = name.replace("lora_A", "sharelora_A")
            common = state[ours.replace("sharelora_A", "sharelora_common")]
            parameter.data.copy_(common.detach().double() + state[ours][user].detach().double())
        elif "lora_B" in name:
            parameter.data.copy_(state[name.replace("lora_B", "sharelora_B")].detach())
    return model


def token_log_probs(model, prompt_ids, reply_ids) -> torch.Tensor:
    """`(reply tokens,)`, from the logits of one unpadded sequence."""
    ids = torch.tensor([prompt_ids + reply_ids])
    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
    return log_probs.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :, 0]


def log_ratio(model, row, which) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = token_log_probs(model, row["prompt_ids"], row[which]).sum()
    return token_log_probs(model, row["prompt_ids"], row[which]).sum() - reference


def differences_by_hand(trainer, rows) -> torch.Tensor:
    """`(rows,)` log-ratio differences, each of its user's own float64 model."""
    models = [plain_model_of(trainer, user) for user in range(len(trainer.users))]
    with torch.no_grad():
        return torch.stack(
            [
                log_ratio(models[row["user_index"]], row, "chosen_ids")
                - log_ratio(models[row["user_index"]], row, "rejected_ids")
                for row in rows
            ]
        )


# -- one user is plain LoRA -----------------------------------------------------------------------------------------------------

CHECKPOINTING = {
    "off": dict(gradient_checkpointing=False),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "not reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
}
VARIANTS = {
    **CHECKPOINTING,
    "forward_kl": dict(f_divergence_type="forward_kl", max_steps=3),
    "js_divergence": dict(f_divergence_type="js_divergence", max_steps=3),
    "alpha_divergence": dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7, max_steps=3),
    "ld_alpha": dict(ld_alpha=0.3, max_steps=3),
    "wpo": dict(use_weighting=True, max_steps=3),
    "rpo": dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], max_steps=3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_user_has_the_traces_of_trl_with_plain_lora(tmp_path, variant):
    data = Dataset.from_list(preference_rows(users=1, n=16))
    settings = dict(max_steps=6) | VARIANTS[variant]
    ours = make_trainer(tmp_path / "ours", data, eval_rows=data, **settings)
    plain = plain_trainer(tmp_path / "plain", data, eval_rows=data, **settings)
    ours.train()
    plain.train()
    keys = [
        *("loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/margins"),
        *("logps/chosen", "logps/rejected", "logits/chosen", "entropy", "mean_token_accuracy", "num_tokens"),
    ]
    pairs = list(zip(ours.state.log_history, plain.state.log_history, strict=True))[:-1]
    assert len(pairs) == settings["max_steps"]
    for mine, theirs in pairs:
        for key in keys:
            assert mine[key] == pytest.approx(theirs[key], rel=2e-5, abs=2e-6), key
        # where TRL counts a tie as wrong, it is half right here
        assert mine["rewards/accuracies"] == pytest.approx(theirs["rewards/accuracies"] + mine["rewards/ties"] / 8)
    assert abs(pairs[-1][0]["rewards/margins"]) > 1e-3 and pairs[0][0]["rewards/ties"] == 4
    a, b = ours.evaluate(), plain.evaluate()
    for key in [f"eval_{key}" for key in keys if key not in ("grad_norm", "learning_rate")] + [
        "eval_rewards/accuracies"
    ]:
        assert a[key] == pytest.approx(b[key], rel=2e-5, abs=2e-6), key


@pytest.mark.parametrize("variant", CHECKPOINTING)
def test_one_step_equals_dpo_in_float64_on_one_lora_model_per_user(tmp_path, variant):
    rows = preference_rows(users=3, n=4)
    trainer = spread_trainer(tmp_path, rows, **CHECKPOINTING[variant])
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.training_step(trainer.model, batch)

    state = dict(trainer.model.named_parameters())
    shared_gradient: dict[str, torch.Tensor] = {}
    total, compared = 0.0, 0
    for user in range(3):
        model = plain_model_of(trainer, user)
        by_hand = 0.0
        for row in trainer.train_dataset:
            if row["user_id"] == f"user{user}":
                difference = log_ratio(model, row, "chosen_ids") - log_ratio(model, row, "rejected_ids")
                by_hand = by_hand - logsigmoid(BETA * difference) / 4
        by_hand.backward()
        total += by_hand.item()
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                ours = state[name.replace("lora_A", "sharelora_A")].grad[user].double()
                assert torch.linalg.norm(ours - parameter.grad) <= 2e-5 * torch.linalg.norm(parameter.grad), name
                compared += 1
            elif "lora_B" in name:
                key = name.replace("lora_B", "sharelora_B")
                shared_gradient[key] = shared_gradient.get(key, 0) + parameter.grad
    assert compared == 18 and len(shared_gradient) == 6
    for name, gradient in shared_gradient.items():
        assert torch.linalg.norm(state[name].grad.double() - gradient) <= 2e-5 * torch.linalg.norm(gradient), name
    assert loss.item() == pytest.approx(total, rel=1e-5)


# -- every loss -----------------------------------------------------------------------------------------------------------------

LOSSES = {
    **{
        name: dict(loss_type=[name])
        for name in (
            *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero"),
            *("apo_down", "discopop", "sft", "sigmoid_norm"),
        )
    },
    "robust": dict(loss_type=["robust"], label_smoothing=0.1),
    "exo_pair": dict(loss_type=["exo_pair"], label_smoothing=1e-3),
    "sigmoid, bco_pair and sft": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_trl_trains_all_that_is_trainable_of_the_visited_users(tmp_path, loss):
    """Two of three users are in the data: the third one's rows stay where they were."""
    trainer = make_trainer(
        tmp_path,
        preference_rows(users=2, n=8),
        adapter={"init_lora_weights": False},
        users=UserRegistry(["user0", "nobody", "user1"]),
        max_steps=2,
        **LOSSES[loss],
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert all(math.isfinite(value) for value in logs_of(trainer)) and len(logs_of(trainer)) == 2
    for name, parameter in trainer.model.named_parameters():
        if "sharelora_A.default" in name:
            changed = [not torch.equal(parameter[row], before[name][row]) for row in range(3)]
            assert changed == [True, False, True], name
        else:
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_ld_alpha_weighs_what_the_longer_reply_has_more():
    mask = torch.tensor(
        [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]]
    )  # two pairs: lengths 2 and 1, 1 and 3
    log_probs = torch.tensor([[0.0, -1, -2, 0], [0, -3, 0, 0], [0, -4, 0, 0], [-5, -6, -7, 0]])
    assert sequence_log_probs(log_probs, mask).tolist() == [-3, -3, -4, -18]
    assert sequence_log_probs(log_probs, mask, 0.5).tolist() == [-2, -3, -4, -11.5]
    # prompt tuning puts its own tokens before
    longer = torch.cat([torch.full((4, 2), -9.0), log_probs], dim=1)
    assert sequence_log_probs(longer, mask, 0.5).tolist() == [-2, -3, -4, -11.5]


# -- the reference --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A trained adapter of three users, saved, for each kind of bank."""
    directories = {}
    for kind in ("resident", "ram", "mmap"):
        directories[kind] = tmp_path_factory.mktemp(kind)
        trainer = make_trainer(
            directories[kind], adapter={"init_lora_weights": False, "bank": kind}, learning_rate=5e-2, max_steps=6
        )
        trainer.train()
        trainer.save_model()
    return directories


def ready(directory) -> PeftModel:
    return PeftModel.from_pretrained(tiny_causal(), directory, is_trainable=True)


def of_adapter(model, adapter_name, row) -> dict[str, torch.Tensor]:
    """Copies of one user's moves in an adapter, whatever the bank."""
    working_sets = model.base_model.router.working_sets
    if working_sets:
        return {name: move.clone() for name, move in working_sets[adapter_name].moves(row).items()}
    return {
        name: parameter.detach()[row].clone()
        for name, parameter in model.named_parameters()
        if f"sharelora_A.{adapter_name}." in name
    }


@pytest.mark.parametrize("kind", ["resident", "ram", "mmap"])
def test_a_ready_policy_is_its_own_reference_users_and_all(tmp_path, adapters, kind):
    rows = preference_rows(users=["user0", "user1", "user2", "new"], n=24)
    trainer = make_trainer(
        tmp_path, rows, model=ready(adapters[kind]), adapter={}, save_strategy="steps", save_steps=4
    )
    assert trainer.users.ids == ["user0", "user1", "user2", "new"]
    before = [of_adapter(trainer.model, "ref", row) for row in range(4)]
    start = [of_adapter(trainer.model, "default", row) for row in range(4)]
    for row in range(4):
        assert len(before[row]) == 6
        for mine, theirs in zip(before[row].values(), start[row].values(), strict=True):
            assert torch.equal(mine, theirs) and mine.any() == (row < 3)
    others = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".ref." in name}
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["loss"] == pytest.approx(math.log(2)) and first["rewards/ties"] == 4
    assert trainer.state.log_history[3]["rewards/margins"] != 0
    for name, tensor in others.items():
        assert torch.equal(dict(trainer.model.named_parameters())[name], tensor), name
    for row in range(4):
        after = of_adapter(trainer.model, "ref", row)
        assert all(torch.equal(after[name], move) for name, move in before[row].items())
        moved = of_adapter(trainer.model, "default", row)
        assert not any(torch.equal(moved[name], move) for name, move in start[row].items())

    checkpoint = tmp_path / "checkpoint-4"
    assert (checkpoint / "ref" / "adapter_model.safetensors").exists()
    if kind != "resident":
        assert (
            read_manifest(checkpoint / "bank")["num_users"] == read_manifest(checkpoint / "ref/bank")["num_users"] == 4
        )
        for row in range(3):
            saved, default = read_row(checkpoint / "ref" / "bank", row), read_row(checkpoint / "bank", row)
            for name, move in before[row].items():
                assert torch.equal(saved[name], move) and not torch.equal(default[name], move)


def test_the_reference_of_a_ready_policy_is_that_of_each_user_by_hand(tmp_path, adapters):
    trainer = make_trainer(tmp_path, model=ready(adapters["mmap"]), adapter={})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    loaded = PeftModel.from_pretrained(tiny_causal(), adapters["resident"]).eval()
    seen = set()
    for place in range(6):
        row = trainer.train_dataset[place]
        with torch.no_grad(), use_users(loaded, [row["user_id"]]):
            expected = token_log_probs(loaded, row["prompt_ids"], row["chosen_ids"]).sum()
            other = token_log_probs(loaded, row["prompt_ids"], row["rejected_ids"]).sum()
        torch.testing.assert_close(chosen[place], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rejected[place], other, rtol=1e-5, atol=1e-5)
        seen.add(row["user_id"])
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["fresh", "resident", "mmap"])
def test_a_precomputed_reference_trains_alike(tmp_path, adapters, kind):
    trainers, others = [], []
    for precompute in (False, True):
        model, adapter = (None, None) if kind == "fresh" else (ready(adapters[kind]), {})
        trainer = make_trainer(
            tmp_path / f"{precompute}",
            preference_rows(n=18),
            model=model,
            adapter=adapter,
            eval_rows=preference_rows(n=5, seed=1),
            precompute_ref_log_probs=precompute,
            precompute_ref_batch_size=4,
            learning_rate=1e-3,
            adam_epsilon=1e-4,  # another padding, another rounding, of which Adam would else make whole steps
        )
        trainer.train()
        trainer.evaluate()
        # rows of another dataset are precomputed on the way
        others.append(trainer.evaluate(as_dataset(preference_rows(n=3, seed=2)))["eval_loss"])
        trainers.append(trainer)
    assert others[0] == pytest.approx(others[1], rel=1e-5)
    one, other = trainers
    assert "ref_chosen_logps" in other.train_dataset.column_names
    for row in range(3):
        for mine, theirs in zip(moves(one.model, row).values(), moves(other.model, row).values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    for mine, theirs in zip(*(without_times(t.state.log_history)[:5] for t in trainers), strict=True):
        # whether there is a tie depends on rounding
        assert mine.keys() == theirs.keys()
        same = [key for key in mine if not any(word in key for word in ("accura", "ties", "ece"))]
        assert {k: mine[k] for k in same} == pytest.approx({k: theirs[k] for k in same}, rel=1e-5, abs=5e-6)


def test_a_cached_reference_is_never_that_of_other_users_or_other_lengths(tmp_path, adapters):
    """TRL keeps precomputed log-probs in the dataset's cache under a hash of the model's tensors."""
    data = Dataset.from_list(preference_rows(n=8))
    data.save_to_disk(tmp_path / "data")
    data = Dataset.load_from_disk(tmp_path / "data")
    cases = {}
    for name, more in (("first", {}), ("short", {"max_length": 8}), ("ld", {"ld_alpha": 0.5}), ("again", {})):
        trainer = make_trainer(
            tmp_path / name, data, model=ready(adapters["mmap"]), adapter={}, precompute_ref_log_probs=True, **more
        )
        cases[name] = trainer.train_dataset["ref_chosen_logps"][:]
        fresh = trainer.compute_ref_log_probs(
            trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(len(cases[name]))])
        )
        assert cases[name] == pytest.approx(fresh[0].tolist(), rel=1e-5, abs=1e-5), name
    assert cases["first"] == cases["again"] and cases["first"] != cases["ld"]
    # the same shared part, other moves
    model = ready(adapters["mmap"])
    working_set = model.base_model.router.working_sets["default"]
    working_set.hold([0])
    working_set.weight.data[working_set.slots_of([0])] *= 2
    working_set.stepped(working_set.slots_of([0]))
    working_set.let_go()
    trainer = make_trainer(tmp_path / "doubled", data, model=model, adapter={}, precompute_ref_log_probs=True)
    got = torch.tensor(trainer.train_dataset["ref_chosen_logps"][:])
    owners = torch.tensor(trainer.train_dataset["user_index"][:])
    changed = (got - torch.tensor(cases["first"])).abs() > 1e-3
    assert changed.tolist() == (owners == 0).tolist()


@pytest.mark.parametrize("kind", ["resident", "mmap"])
def test_resumed_equals_straight_bit_by_bit_and_the_reference_is_the_first(tmp_path, adapters, kind):
    """From the adapter that training began with, or from a trained one: the reference is that of the checkpoint."""
    rows = preference_rows(users=["user0", "user1", "user2", "new"], n=16)
    settings = dict(lr_scheduler_type="constant", save_strategy="steps", save_steps=3, max_steps=6)
    checkpoint = tmp_path / "straight" / "checkpoint-3"

    def run(directory, source, resume=None):
        trainer = make_trainer(directory, rows, model=ready(source), adapter={}, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight", adapters[kind])
    for source in (adapters[kind], checkpoint):
        resumed = run(tmp_path / "resumed" / source.name, source, str(checkpoint))
        assert_same(straight, resumed, users=4)
        for key in ("loss", "rewards/margins"):
            assert logs_of(resumed, key)[-3:] == logs_of(straight, key)[-3:]
        for row in range(4):
            mine, theirs = (of_adapter(trainer.model, "ref", row) for trainer in (straight, resumed))
            assert all(torch.equal(move, theirs[name]) for name, move in mine.items())


def test_a_reference_model_of_its_own(tmp_path, adapters):
    """The base as the reference of a ready policy: the margins are not zero, and there is no copy of the adapter."""
    trainer = ShareLoraDPOTrainer(
        ready(adapters["mmap"]),
        tiny_causal(),
        arguments(tmp_path, max_steps=1),
        train_dataset=as_dataset(preference_rows()),
        processing_class=tiny_tokenizer(),
    )
    assert list(trainer.model.peft_config) == ["default"]
    chosen, _ = trainer.compute_ref_log_probs(
        trainer.ref_model, trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    )
    base = tiny_causal().eval()
    for place in range(4):
        row = trainer.train_dataset[place]
        with torch.no_grad():
            expected = token_log_probs(base, row["prompt_ids"], row["chosen_ids"]).sum()
        torch.testing.assert_close(chosen[place], expected, rtol=1e-5, atol=1e-5)
    trainer.train()
    assert abs(logs_of(trainer, "rewards/margins")[0]) > 1e-3


# -- data -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_every_format_of_trl_trains(tmp_path, conversational, prompt):
    rows = preference_rows(conversational=conversational, prompt=prompt)
    named = [{"worker" if k == "user_id" else k: v for k, v in row.items()} for row in rows]
    trainer = make_trainer(tmp_path / "ours", named, user_column="worker", eval_rows=named[:5], max_steps=2)
    plain = plain_trainer(tmp_path / "plain", rows)
    for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert trainer.train_dataset[key][:] == plain.train_dataset[key][:]
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("given", [True, False])
def test_a_stream_trains_like_a_dataset(tmp_path, given):
    rows = preference_rows(users=["ann", "bob"], n=16)
    users = ["bob", "ann", "cat"] if given else ["ann", "bob"]
    one = make_trainer(tmp_path / "a", stream(rows), users=UserRegistry(users) if given else None)
    one.train()
    assert one.users.ids == users
    other = make_trainer(
        tmp_path / "b", rows, users=UserRegistry(users), train_sampling_strategy="sequential", max_steps=4
    )
    other.train()
    for user in ("ann", "bob"):
        row = users.index(user)
        for mine, theirs in zip(moves(one.model, row).values(), moves(other.model, row).values(), strict=True):
            assert torch.equal(mine, theirs) and mine.any()
    if given:
        with pytest.raises(UnknownUserError, match="'ann'"):
            make_trainer(tmp_path / "c", stream(rows), users=UserRegistry(["bob"])).train()
        with pytest.raises(ValueError, match="not supported with IterableDataset"):
            make_trainer(tmp_path / "d", stream(rows), users=UserRegistry(users), precompute_ref_log_probs=True)


def test_rows_without_room_for_a_reply_are_counted_and_a_user_who_loses_all_raises(tmp_path, caplog):
    rows = preference_rows(users=2, n=12)
    rows[4]["prompt"] = " ".join(["w1"] * 20) + " "  # fills max_length
    rows[7]["prompt"] = " ".join(["w1"] * 19) + " "  # leaves one token of the replies
    with caplog.at_level(logging.WARNING, "trl_sharelora"):
        trainer = make_trainer(tmp_path, rows, max_length=20, max_steps=3)
    assert "1 of the 12 rows of the train dataset have prompts of max_length=20 tokens or more" in caplog.text
    assert "1 users lose rows, 0 all of theirs" in caplog.text
    assert "1 of the 12 rows of the train dataset are longer than max_length=20 tokens; TRL cuts them" in caplog.text
    plain = plain_trainer(tmp_path / "plain", rows, max_length=20)
    assert trainer.train_dataset["prompt_ids"][:] == plain.train_dataset["prompt_ids"][:]
    assert trainer.train_dataset["user_index"][:] == [0, 1] * 2 + [1, 0, 1, 0, 1, 0, 1]
    trainer.train()
    for row in rows[1::2]:
        row["prompt"] = " ".join(["w2"] * 30) + " "
    with pytest.raises(DataError, match="1 all of theirs: 'user1'. Raise max_length"):
        make_trainer(tmp_path, rows, max_length=20)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trl_sharelora"):
        assert len(make_trainer(tmp_path, rows, max_length=None).train_dataset) == 12
    assert "max_length" not in caplog.text


# -- metrics --------------------------------------------------------------------------------------------------------------------


def test_metrics_are_exact_on_uneven_batches_and_the_table_is_written(tmp_path):
    """9 rows in batches of 4: the mean of batch means would weigh the last row four times."""
    trainer = spread_trainer(tmp_path, eval_rows=preference_rows(users=2, n=9, seed=5))
    trainer.train()
    metrics = trainer.evaluate()
    margins = BETA * differences_by_hand(trainer, trainer.eval_dataset)
    right = (margins > 0).double()
    assert 0 < right.mean() < 1
    assert metrics["eval_rewards/accuracies"] == pytest.approx(right.mean().item())
    assert metrics["eval_rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-4)
    chosen, rejected = metrics["eval_rewards/chosen"], metrics["eval_rewards/rejected"]
    assert chosen - rejected == pytest.approx(metrics["eval_rewards/margins"], rel=1e-5)
    assert metrics["eval_rewards/ties"] == 0 and metrics["eval_users/seen"] == 2
    table = pd.read_parquet(tmp_path / "users" / "eval-step-4.parquet")
    shares = [right[0::2].mean().item(), right[1::2].mean().item()]
    assert table["user_id"].tolist() == ["user0", "user1"] and table["n"].tolist() == [5, 4]
    assert table["accuracy"].tolist() == pytest.approx(shares)
    assert metrics["eval_users/accuracy_mean"] == pytest.approx(sum(shares) / 2)
    assert metrics["eval_users/accuracy_worst_tenth"] == pytest.approx(min(shares))


def test_ties_count_half_and_unseen_users_raise_or_get_the_common_model(tmp_path, caplog):
    eval_rows = preference_rows(users=["user0", "stranger"], n=6)
    with pytest.raises(UnknownUserError, match="'stranger'.*unseen=\"common\""):
        make_trainer(tmp_path, eval_rows=eval_rows)
    with caplog.at_level(logging.WARNING, "trl_sharelora"):
        trainer = make_trainer(tmp_path, eval_rows=eval_rows, unseen="common", adapter={"init_lora_weights": False})
    assert "3 of the 6 rows of the eval dataset belong to 1 users without training data" in caplog.text
    metrics = trainer.evaluate()  # all users have D = 0
    assert metrics["eval_users/unseen_rows"] == 3 and metrics["eval_users/seen"] == 1
    spread(trainer)
    rows = list(trainer.eval_dataset)
    assert [row["user_index"] for row in rows] == [0, -1] * 3
    with_moves = trainer.evaluate()
    # the strangers' part of the mean has not changed
    own = BETA * differences_by_hand(trainer, [row for row in rows if row["user_index"] == 0])
    for parameter in trainer.model.parameters():
        if parameter.dim() == 3:
            parameter.data.zero_()
    everyone = BETA * differences_by_hand(trainer, [row | {"user_index": 0} for row in rows])
    assert metrics["eval_rewards/margins"] == pytest.approx(everyone.mean().item(), rel=1e-4)
    expected = (own.sum() + everyone[1::2].sum()).item() / 6
    assert with_moves["eval_rewards/margins"] == pytest.approx(expected, rel=1e-4)
    assert abs(with_moves["eval_rewards/margins"] - metrics["eval_rewards/margins"]) > 1e-3

    trainer = make_trainer(tmp_path, eval_rows=preference_rows(users=2, n=6))  # B = 0: policy and reference agree
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/accuracies"] == 0.5 and metrics["eval_rewards/ties"] == 6
    assert metrics["eval_users/accuracy_mean"] == 0.5


def test_several_evaluation_sets_keep_their_own_metrics_and_tables(tmp_path):
    sets = {name: Dataset.from_list(preference_rows(users=2, n=n, seed=n)) for name, n in (("a", 3), ("b", 5))}
    trainer = spread_trainer(tmp_path, eval_rows=sets)
    metrics = trainer.evaluate()
    for name, n in (("a", 3), ("b", 5)):
        margins = BETA * differences_by_hand(trainer, trainer.eval_dataset[name])
        assert metrics[f"eval_{name}_rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-4)
        assert pd.read_parquet(tmp_path / "users" / f"eval_{name}-step-0.parquet")["n"].sum() == n


# -- pessimism ------------------------------------------------------------------------------------------------------------------


def test_rpo_is_dpo_and_the_likelihood_of_the_chosen_by_hand(tmp_path):
    config = arguments(tmp_path, rpo_alpha=0.3)
    assert config.loss_type == ["sigmoid", "sft"] and config.loss_weights == [1.0, 0.3]
    trainer = spread_trainer(tmp_path, preference_rows(n=6), per_device_train_batch_size=6, rpo_alpha=0.3, max_steps=1)
    rows = list(trainer.train_dataset)
    dpo = -logsigmoid(BETA * differences_by_hand(trainer, rows)).mean()
    with torch.no_grad():
        tokens = [
            token_log_probs(plain_model_of(trainer, row["user_index"]), row["prompt_ids"], row["chosen_ids"])
            for row in rows
        ]
    trainer.train()
    expected = (dpo - 0.3 * torch.cat(tokens).mean()).item()
    assert logs_of(trainer)[0] == pytest.approx(expected, rel=1e-5) and abs(expected - dpo) > 0.1


def test_rpo_refuses_what_it_is_not(tmp_path):
    assert arguments(tmp_path, loss_type=["sigmoid", "sft"], rpo_alpha=0.3).loss_weights == [1.0, 0.3]
    assert arguments(tmp_path).loss_type == ["sigmoid"]
    for overrides, message in (
        (dict(rpo_alpha=-0.1), "rpo_alpha=-0.1"),
        (dict(rpo_alpha=math.nan), "rpo_alpha=nan"),
        (dict(rpo_alpha=0.3, loss_type=["ipo"]), r"rpo_alpha=0.3 came with loss_type=\['ipo'\]"),
        (
            dict(rpo_alpha=0.3, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
            r"rpo_alpha=0.3 came with loss_weights=\[1.0, 0.5\]",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            arguments(tmp_path, **overrides)


class WordCount:
    """A reward of .25 per word, another one for the first user, of whom nothing is sure."""

    def margins(self, prompts, chosen, rejected, user_id) -> torch.Tensor:
        """`(rows,)`"""
        assert all(isinstance(prompt, str) for prompt in prompts)
        more = [len(a.split()) - len(b.split()) for a, b in zip(chosen, rejected, strict=True)]
        return torch.tensor([-1.0 if u == "user0" else 0.25 * m for m, u in zip(more, user_id, strict=True)])


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_a_margin_is_an_offset_by_hand_and_not_in_the_metrics(tmp_path, caplog, precompute, prompt):
    rows = preference_rows(n=6)
    margins = WordCount().margins(*([row[key] for row in rows] for key in ("prompt", "chosen", "rejected", "user_id")))
    assert (margins > 0).sum() >= 2 and (margins < 0).sum() >= 2
    with caplog.at_level(logging.INFO, "trl_sharelora"):
        trainer = spread_trainer(
            tmp_path,
            preference_rows(n=6, prompt=prompt),
            eval_rows=preference_rows(n=6, prompt=prompt),
            reward=WordCount(),
            precompute_ref_log_probs=precompute,
            per_device_train_batch_size=6,
            per_device_eval_batch_size=6,
            max_steps=1,
        )
    assert f"{(margins < 0).sum()} of 6 pairs have a lower end below 0" in caplog.text
    assert trainer.train_dataset["reward_margin"][:] == margins.clamp(min=0).tolist()
    differences = differences_by_hand(trainer, trainer.train_dataset)
    expected = -logsigmoid(BETA * differences - margins.clamp(min=0)).mean().item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected + logsigmoid(BETA * differences).mean().item()) > 0.01
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected, rel=1e-5)
    for prefix, entry in (("eval_", metrics), ("", log)):
        mean = BETA * differences.mean().item()
        assert entry[f"{prefix}rewards/margins"] == pytest.approx(mean, rel=1e-4)
        assert entry[f"{prefix}rewards/accuracies"] == pytest.approx((differences > 0).double().mean().item())
        difference = entry[f"{prefix}rewards/chosen"] - entry[f"{prefix}rewards/rejected"]
        assert difference == pytest.approx(mean, rel=1e-4)


def test_a_margin_is_refused_where_it_is_no_offset(tmp_path):
    for overrides in (
        dict(loss_type=["ipo"]),
        dict(loss_type=["sigmoid", "hinge"], loss_weights=[1.0, 1.0]),
        dict(f_divergence_type="js_divergence"),
    ):
        with pytest.raises(ConfigError, match="A margin is an offset of the sigmoid loss with the reverse KL"):
            make_trainer(tmp_path, reward=WordCount(), **overrides)
    with pytest.raises(UnsupportedError, match="a stream, whose pairs cannot be scored beforehand"):
        make_trainer(tmp_path, stream(preference_rows()), reward=WordCount())
    # together with RPO: the likelihood knows no margin
    make_trainer(tmp_path, reward=WordCount(), rpo_alpha=0.1, max_steps=1).train()


# -- 8-bit, export --------------------------------------------------------------------------------------------------------------


def test_quantised_base_keeps_everything_trained_in_float32_and_all_of_it_moves(tmp_path):
    """At the default learning rate. (TRL casts to bf16, where small updates vanish.)"""
    path = save_tiny("llama", tmp_path / "model", causal=True)
    config = BitsAndBytesConfig(load_in_8bit=True)
    trainer = make_trainer(
        tmp_path,
        model=path,
        quantization=config,
        adapter={"init_lora_weights": False},
        learning_rate=1e-5,
        max_steps=6,
    )
    assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {torch.float32}
    before = trainable(trainer)
    trainer.train()
    for name, start in before.items():
        assert (dict(trainer.model.named_parameters())[name] != start).float().mean() >= 0.99, name
    trainer.save_model()

    base = type(tiny_causal()).from_pretrained(path, quantization_config=config)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    for precompute in (False, True):  # the reference is neither rounded to bf16
        again = make_trainer(
            tmp_path / "again", model=loaded, adapter={}, precompute_ref_log_probs=precompute, max_steps=1
        )
        again.train()
        assert logs_of(again, "rewards/chosen")[0] == pytest.approx(0, abs=0 if not precompute else 1e-5)
        again.model.delete_adapter("ref")


def test_an_exported_user_is_an_ordinary_lora_policy(tmp_path):
    trainer = spread_trainer(tmp_path)
    trainer.train()
    trainer.model.eval()
    batch = {"input_ids": torch.randint(8, 90, (2, 9), generator=torch.Generator().manual_seed(0))}
    logits = []
    for user in ("user1", "user2"):
        export_user(trainer.model, user, tmp_path / user)
        plain = PeftModel.from_pretrained(tiny_causal(), tmp_path / user).eval()
        with torch.no_grad():
            expected = trainer.model(**batch, user_ids=[user] * 2).logits
            logits.append(plain(**batch).logits)
        torch.testing.assert_close(logits[-1], expected, rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[1]).abs().max() > 0.1


# -- several processes ----------------------------------------------------------------------------------------------------------

RANK_CASES = {
    "fresh-mmap": dict(gradient_checkpointing=True),
    "ready-resident": dict(precompute_ref_log_probs=True),
    "ready-mmap": dict(save_strategy="steps", save_steps=2),
}


def rank_trainer(out: Path, name: str, ranks: int, **overrides):
    """7 users; 20 pairs in batches of 6, so that the last one is short and does not divide by two."""
    start, bank = name.split("-")
    settings = dict(
        per_device_train_batch_size=6 // ranks,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        num_train_epochs=2,
        max_steps=-1,
        learning_rate=1e-3,
        adam_epsilon=1e-4,  # else Adam makes whole steps of the rounding of gradients near zero
        user_weight_decay=0.1,
    )
    trainer = make_trainer(
        out / f"{ranks}-{name}",
        Dataset.load_from_disk(out / "pairs"),  # precomputed log-probs go into its cache, which all processes must see
        model=ready(out / bank) if start == "ready" else None,
        adapter={} if start == "ready" else {"bank": bank},
        eval_rows=Dataset.load_from_disk(out / "others"),
        **(settings | RANK_CASES.get(name, {}) | overrides),
    )
    assert trainer.accelerator.num_processes == ranks
    return trainer


def rank_worker(out: Path, ranks: int) -> None:
    for name in RANK_CASES:
        trainer = rank_trainer(out, name, ranks)
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model()
        if trainer.is_world_process_zero():
            found = {"norms": logs_of(trainer, "grad_norm"), "margins": logs_of(trainer, "rewards/margins")}
            (out / f"{ranks}-{name}" / "found.json").write_text(json.dumps(found | {"metrics": metrics}))
    if ranks == 1:
        return
    # each process has its own users, of the policy and of the reference
    trainer = rank_trainer(out, "ready-ram", ranks, user_sharding="owner", learning_rate=0.0)
    trainer.train()
    # nothing is learned at a learning rate of zero: policy and reference agree about everybody
    assert max(map(abs, logs_of(trainer, "rewards/margins"))) < 1e-5
    metrics = trainer.evaluate()
    assert abs(metrics["eval_rewards/chosen"]) < 1e-5 and metrics["eval_users/seen"] == 7
    trainer.precompute_ref_logps = True
    with pytest.raises(UnsupportedError, match="the reference of its own users only"):
        trainer.evaluate(Dataset.load_from_disk(out / "others").select(range(5)))
    torch.distributed.destroy_process_group()


def saved_tensors(out: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(out / "adapter_model.safetensors")
    if (out / "bank").exists():
        tensors |= {f"{n}-{row}": move for row in range(7) for n, move in read_row(out / "bank", row).items()}
    return tensors


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path):
    as_dataset(preference_rows(users=7, n=20)).save_to_disk(tmp_path / "pairs")
    as_dataset(preference_rows(users=7, n=9, seed=1)).save_to_disk(tmp_path / "others")
    for kind in ("resident", "ram", "mmap"):
        first = make_trainer(
            tmp_path / kind,
            preference_rows(users=7, n=14),
            adapter={"bank": kind, "init_lora_weights": False},
            per_device_train_batch_size=7,
            max_steps=2,
        )
        first.train()
        first.save_model()
    script = tmp_path / "two_ranks.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from tests.trainers.test_dpo import rank_worker\nrank_worker(Path({str(tmp_path)!r}), 2)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    rank_worker(tmp_path, 1)
    for name in RANK_CASES:
        (one, log), (two, log_two) = (
            (saved_tensors(out), json.loads((out / "found.json").read_text()))
            for out in (tmp_path / f"{ranks}-{name}" for ranks in (1, 2))
        )
        assert one.keys() == two.keys()
        assert max((one[key] - two[key]).abs().max() for key in one) <= 1e-6, name
        assert log_two["norms"] == pytest.approx(log["norms"], rel=1e-5, abs=2e-6), name
        assert log_two["margins"] == pytest.approx(log["margins"], abs=2e-6), name
        for key in ("rewards/accuracies", "rewards/ties", "rewards/margins", "users/accuracy_mean", "users/seen"):
            assert log_two["metrics"][f"eval_{key}"] == pytest.approx(log["metrics"][f"eval_{key}"], abs=2e-6), key
    assert read_manifest(tmp_path / "2-ready-mmap" / "checkpoint-2" / "ref" / "bank")["num_users"] == 7


# -- the seams, bad input -------------------------------------------------------------------------------------------------------


def test_overrides_are_those_the_docstring_names_and_fit_their_parents():
    """An override that TRL renames or reshapes would silently never be called."""
    inherited = set(dir(DPOTrainer))
    for cls in (UserBatchesMixin, PreferencePairsMixin, ShareLoraDPOTrainer):
        methods = {name for name, value in vars(cls).items() if inspect.isfunction(value)} & inherited
        assert methods
        assert all(f"`{name}`" in ShareLoraDPOTrainer.__doc__ for name in methods), methods
        checked = {name for base in ShareLoraDPOTrainer.__mro__ for name in vars(base).get("_seams", {})}
        assert methods <= checked | {"__init__", "evaluation_loop", "create_model_card"}
    check_seams(ShareLoraDPOTrainer)


def test_another_trl_is_refused_with_a_clear_message(tmp_path, monkeypatch):
    def compute_ref_log_probs(self, inputs):
        """Of a TRL to come."""

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", compute_ref_log_probs)
    with pytest.raises(
        UnsupportedError,
        match=r"overrides compute_ref_log_probs\(model, inputs\) of TRL .*compute_ref_log_probs takes \(inputs\)",
    ):
        make_trainer(tmp_path)
    monkeypatch.undo()
    monkeypatch.delattr(DPOTrainer, "_precompute_ref_logps")
    with pytest.raises(UnsupportedError, match="_precompute_ref_logps.*but it is not there"):
        check_seams(ShareLoraDPOTrainer)


def test_trls_own_config_is_enough_and_the_card_says_how_to_use_the_policy(tmp_path):
    path = save_tiny("llama", tmp_path / "tiny", causal=True)
    data = as_dataset(preference_rows(n=4))
    args = DPOConfig(str(tmp_path / "out"), max_steps=1, bf16=False, use_cpu=True, report_to="none")
    trainer = ShareLoraDPOTrainer(path, args=args, train_dataset=data, peft_config=ShareLoraConfig(**ADAPTER))
    assert (args.user_column, args.unseen, args.user_sharding) == ("user_id", "raise", "union")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline(" not in card and "import trl_sharelora" in card and "3 users" in card and "user0" not in card


def test_bad_input_is_named_before_anything_is_trained(tmp_path, adapters):
    rows = preference_rows()
    for change, error, message in (
        (lambda r: {("user-id" if k == "user_id" else k): v for k, v in r.items()}, DataError, "'user_id'.*user-id"),
        (lambda r: {k: v for k, v in r.items() if k != "chosen"}, DataError, "chosen"),
        (lambda r: r | {"user_id": 7.0}, UserIdError, "float.*dtype=str"),
        (lambda r: r | {"rejected": r["chosen"]}, DataError, "same"),
    ):
        with pytest.raises(error, match=f"(?s){message}"):
            make_trainer(tmp_path / "out", [change(row) for row in rows])
    with pytest.raises(DataError, match="`train_dataset` is required"):
        ShareLoraDPOTrainer(tiny_causal(), args=arguments(tmp_path), peft_config=ShareLoraConfig(**ADAPTER))
    for peft_config, message in (
        (None, "Neither a ShareLoRA adapter.*peft_config=ShareLoraConfig"),
        (LoraConfig(), "peft_config is a LoraConfig.*trl.DPOTrainer"),
        (ShareLoraConfig(task_type="SEQ_CLS"), "task_type='SEQ_CLS'.*needs 'CAUSAL_LM'"),
    ):
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            ShareLoraDPOTrainer(
                tiny_causal(), args=arguments(tmp_path), train_dataset=as_dataset(rows), peft_config=peft_config
            )
    reward_model = get_peft_model(
        tiny_model(), ShareLoraConfig(task_type="SEQ_CLS", users=["user0", "user1", "user2"], **ADAPTER)
    )
    with pytest.raises(ConfigError, match="needs 'CAUSAL_LM'"):
        make_trainer(tmp_path, model=reward_model, adapter={})
    with pytest.raises(ConfigError, match="frozen.*is_trainable=True"):
        make_trainer(tmp_path, model=PeftModel.from_pretrained(tiny_causal(), adapters["resident"]), adapter={})
    with pytest.raises(ConfigError, match="unseen='guess'"):
        arguments(tmp_path, unseen="guess")


@pytest.mark.parametrize("kind", ["resident", "mmap"])
def test_a_second_training_of_the_same_policy_has_the_policy_as_it_is_for_its_reference(tmp_path, adapters, kind):
    first = make_trainer(tmp_path / "first", model=ready(adapters[kind]), adapter={}, max_steps=2)
    first.train()
    second = make_trainer(tmp_path / "second", model=first.model, adapter={}, max_steps=1)
    second.train()
    assert second.state.log_history[0]["rewards/margins"] == 0.0
