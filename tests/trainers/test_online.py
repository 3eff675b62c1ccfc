"""RLOO and GRPO with a policy per user: against TRL's own trainers, against exported users, and against bad input."""

import inspect
import json
import logging
import math
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.helpers import WORDS, preference_rows, save_tiny, tiny_causal, tiny_model, tiny_tokenizer
from tests.trainers.test_banks import assert_same, moves, shared, without_times
from trl_sharelora import ShareLoraConfig, UserRegistry, export_user, use_users
from trl_sharelora.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    UnknownUserError,
    UnsupportedError,
    UserIdError,
)
from trl_sharelora.trainers.grpo import ShareLoraGRPOConfig, ShareLoraGRPOTrainer
from trl_sharelora.trainers.online import OnlinePolicyMixin
from trl_sharelora.trainers.ppo import ShareLoraPPOConfig, ShareLoraPPOTrainer
from trl_sharelora.trainers.rloo import ShareLoraRLOOConfig, ShareLoraRLOOTrainer
from trl_sharelora.trainers.seams import check_seams
from trl_sharelora.trainers.user_batches import UserBatchesMixin


ROOT = Path(__file__).parents[2]
ADAPTER = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
TRAINERS = {
    "rloo": (ShareLoraRLOOTrainer, ShareLoraRLOOConfig, RLOOTrainer, RLOOConfig),
    "grpo": (ShareLoraGRPOTrainer, ShareLoraGRPOConfig, GRPOTrainer, GRPOConfig),
}


def prompts_of(users=3, n=24, seed=0, **columns):
    rows = preference_rows(users=users, n=n, seed=seed)
    return Dataset.from_list([{"prompt": row["prompt"], "user_id": row["user_id"], **columns} for row in rows])


def wordy(completions, **columns):
    return [float(text.count("w1")) - 0.1 * len(text.split()) for text in completions]


class Recorder:
    """A reward function that keeps what it was asked: (user, prompt, completion, reward), call by call."""

    __name__ = "recorder"

    def __init__(self, reward=wordy):
        self.reward = reward
        self.calls = []

    def __call__(self, prompts, completions, user_id, **columns):
        rewards = self.reward(prompts=prompts, completions=completions, user_id=user_id, **columns)
        self.calls.append(list(zip(user_id, prompts, completions, rewards, strict=True)))
        return rewards


def arguments(directory, cls=ShareLoraRLOOConfig, **overrides):
    settings = dict(
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        num_generations=4,
        max_completion_length=8,
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
    directory, rows=None, reward=wordy, model=None, adapter=None, eval_rows=None, cls=None, others=None, **overrides
):
    cls = TRAINERS["rloo"][:2] if cls is None else cls
    return cls[0](
        tiny_causal() if model is None else model,
        reward,
        arguments(directory, cls[1], **overrides),
        train_dataset=prompts_of() if rows is None else rows,
        eval_dataset=eval_rows,
        processing_class=tiny_tokenizer(),
        peft_config=None if isinstance(model, PeftModel) else ShareLoraConfig(**(ADAPTER | (adapter or {}))),
        **(others or {}),
    )


def scatter(trainer, size=0.3):
    """Users who differ, as after a long training: random moves and a random shared factor."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    for working_set in trainer.router.working_sets.values():
        raise AssertionError(f"{working_set.name} is in a store; these users rest in Parameters")


def logits_of(model, users, seed=0):
    model.eval()
    ids = torch.randint(8, 90, (len(users), 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), use_users(model, users):
        return model(input_ids=ids).logits


# -- one user is plain LoRA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_invariant_4_one_user_has_the_completions_and_traces_of_trl_with_plain_lora(tmp_path, method):
    ours, our_config, theirs, their_config = TRAINERS[method]
    settings = dict(beta=0.05, steps_per_generation=2)
    results = []
    for cls, config, peft_config in (
        (ours, our_config, ShareLoraConfig(**ADAPTER)),
        (theirs, their_config, LoraConfig(task_type="CAUSAL_LM", **ADAPTER)),
    ):
        recorder = Recorder()
        # trained before the next is built: TRL seeds in its constructor
        trainer = cls(
            tiny_causal(),
            recorder,
            arguments(tmp_path, config, **settings),
            train_dataset=prompts_of(users=1),
            eval_dataset=prompts_of(users=1, n=5, seed=1),
            processing_class=tiny_tokenizer(),
            peft_config=peft_config,
        )
        trainer.train()
        results.append((recorder.calls, trainer.state.log_history, trainer.evaluate()))
    (calls, logs, metrics), (their_calls, their_logs, their_metrics) = results
    assert calls == their_calls and len(calls) == 2 + 3
    assert len(logs) == len(their_logs) == 6 and any(log.get("kl", 0) > 0 for log in logs)
    for mine, other in zip(logs, their_logs, strict=True):
        for key in ("loss", "grad_norm", "kl", "reward", "reward_std", "entropy", "learning_rate", "num_tokens"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
    for key in ("eval_loss", "eval_reward", "eval_kl", "eval_entropy"):
        assert metrics[key] == pytest.approx(their_metrics[key], rel=1e-4, abs=1e-6), key


# -- whose is whose -----------------------------------------------------------------------------------------------------------


def log_ratios(trainer, roll=0):
    """Log-probabilities in the loss minus those at the rollout, of each micro-batch; with `roll`, of other users' policies."""
    seen, losses = [], []
    measure, loss, generate = (
        trainer._get_per_token_logps_and_entropies,
        trainer._compute_loss,
        trainer._generate_and_score_completions,
    )

    def measured(*args, **kwargs):
        result = measure(*args, **kwargs)
        if kwargs.get("compute_entropy"):
            losses.append(result[0].detach())
        return result

    def compared(model, inputs):
        value = loss(model, inputs)
        logps, mask = losses.pop(), inputs["completion_mask"]
        if "old_logps" in inputs:
            seen.append((logps * mask).sum(1) - inputs["old_logps"])
        else:
            seen.append((logps - inputs["old_per_token_logps"]) * mask)
        return value

    def rolled(inputs):
        output = generate(inputs)
        return output | {"user_index": output["user_index"].roll(roll)}

    trainer._get_per_token_logps_and_entropies = measured
    trainer._compute_loss = compared
    trainer._generate_and_score_completions = rolled
    trainer.train()
    assert len(seen) == 4
    return max(float(ratio.abs().max()) for ratio in seen)


CHECKPOINTING = {
    "off": dict(gradient_checkpointing=False),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "non-reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
}


def test_the_loss_sees_the_very_policies_that_generated(tmp_path):
    """A generation batch of 16 rows in pieces of 4, shuffled in between; nothing is stepped before all four are in the loss."""
    weights = {}
    for name, settings in CHECKPOINTING.items():
        settings = settings | dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1)
        for roll in (0, 4) if name == "off" else (0,):
            trainer = make_trainer(tmp_path, rows=prompts_of(users=4), **settings)
            scatter(trainer)
            difference = log_ratios(trainer, roll)
            if roll:
                assert difference > 0.1  # the neighbour's policy is another one
            else:
                assert difference == 0.0
                weights[name] = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name in ("reentrant", "non-reentrant"):
        for key, tensor in weights["off"].items():
            assert torch.equal(tensor, weights[name][key]), (name, key)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_the_loss_of_grpo_sees_the_very_policies_that_generated(tmp_path, checkpointing):
    settings = CHECKPOINTING[checkpointing] | dict(
        per_device_train_batch_size=4,
        steps_per_generation=4,
        learning_rate=0.0,  # four steps on one generation batch
    )
    trainer = make_trainer(tmp_path, rows=prompts_of(users=4), cls=TRAINERS["grpo"][:2], **settings)
    scatter(trainer)
    assert log_ratios(trainer) == 0.0


def test_the_users_of_a_micro_batch_stay_for_its_backward_and_no_longer(tmp_path):
    """A checkpointing that is not transformers' own recomputes with the route that is open then."""
    trainer = make_trainer(tmp_path, rows=prompts_of(users=4), per_device_train_batch_size=4, steps_per_generation=4)
    scatter(trainer)
    losses, backwards = [], []
    loss = trainer._compute_loss

    def noted(model, inputs):
        losses.append(inputs["user_index"].tolist())
        return loss(model, inputs)

    trainer._compute_loss = noted
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: backwards.append(trainer.router.current().user_index.tolist()))
    trainer.train()
    assert backwards == losses and len({tuple(users) for users in losses}) > 1
    assert trainer.router.current() is None


def test_each_prompt_is_answered_by_its_users_own_policy(tmp_path):
    """Greedy answers of a mixed batch against each user's exported LoRA, one prompt at a time."""
    recorder = Recorder()
    rows = [{"prompt": row["prompt"], "user_id": f"user{u}"} for row in prompts_of(n=3) for u in range(4)]
    trainer = make_trainer(
        tmp_path,
        rows=Dataset.from_list(rows),
        reward=recorder,
        num_generations=2,
        per_device_train_batch_size=24,
        generation_kwargs={"do_sample": False},
        max_steps=1,
        learning_rate=0.0,
    )
    scatter(trainer)
    trainer.train()
    (call,) = recorder.calls
    assert len({user for user, *_ in call}) == 4
    tokenizer = tiny_tokenizer()
    policies = {
        user: PeftModel.from_pretrained(tiny_causal(), export_user(trainer.model, user, tmp_path / user)).eval()
        for user in trainer.users
    }
    answers = {}
    for user, prompt, completion, _ in call:
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            output = policies[user].generate(**batch, max_new_tokens=8, do_sample=False)
        alone = tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert completion == alone, user
        answers.setdefault(prompt, set()).add(alone)
    assert all(len(different) > 1 for different in answers.values())


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_the_baseline_of_a_completion_is_of_its_own_user(tmp_path, method):
    """All users ask the same two things, so groups by the text of the prompt alone would mix them."""
    recorder = Recorder()
    rows = [{"prompt": prompt, "user_id": f"user{u}"} for prompt in ("w1 w2 ", "w3 ") for u in range(4)]
    settings = {"scale_rewards": "none"} if method == "grpo" else {}
    trainer = make_trainer(
        tmp_path,
        rows=Dataset.from_list(rows),
        reward=recorder,
        cls=TRAINERS[method][:2],
        per_device_train_batch_size=32,
        max_steps=1,
        beta=0.0,
        **settings,
    )
    trainer.train()
    (call,) = recorder.calls
    groups = {}
    for user, prompt, _, reward in call:
        groups.setdefault((user, prompt), []).append(reward)
    assert len(groups) == 8 and all(len(rewards) == 4 for rewards in groups.values())
    expected = []
    for user, prompt, _, reward in call:
        total = sum(groups[user, prompt])
        expected.append(reward - (total - reward) / 3 if method == "rloo" else reward - total / 4)
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, expected)) > 0.5


# -- what it is for -----------------------------------------------------------------------------------------------------------


def share_of_even(text):
    numbers = [int(word[1:]) for word in text.split() if word in WORDS]
    return sum(number % 2 == 0 for number in numbers) / len(numbers) if numbers else 0.5


def opposite_tastes(completions, user_id, **columns):
    """user0 wants even words, user1 odd ones; a random answer gets one half from both."""
    shares = [share_of_even(text) for text in completions]
    return [share if user == "user0" else 1 - share for share, user in zip(shares, user_id, strict=True)]


def train_opposite(directory, cls, peft_config, seed, **overrides):
    draw = random.Random(seed)
    rows = [{"prompt": " ".join(draw.choices(WORDS, k=3)) + " ", "user_id": f"user{i % 2}"} for i in range(200)]
    settings = dict(max_steps=60, learning_rate=2e-2, max_completion_length=4, lr_scheduler_type="constant")
    trainer = cls[0](
        tiny_causal(seed=seed),
        opposite_tastes,
        arguments(directory, cls[1], **(settings | dict(logging_steps=60, seed=seed) | overrides)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config(
            r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
        ),
    )
    trainer.train()
    return trainer


def own_rewards(model, personal=True):
    """Mean reward of 256 sampled answers to prompts that were never trained on, for either user."""
    model.eval()
    draw = random.Random(100)
    texts = [" ".join(draw.choices(WORDS, k=3)) for _ in range(256)]
    tokenizer = tiny_tokenizer()
    batch = tokenizer(texts, return_tensors="pt", return_token_type_ids=False)
    found = {}
    for user in ("user0", "user1"):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            whose = {"user_ids": [user] * len(texts)} if personal else {}
            output = model.generate(
                **batch, **whose, max_new_tokens=4, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id
            )
        answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found[user] = sum(opposite_tastes(answers, [user] * len(texts))) / len(texts)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_users_of_opposite_tastes_each_get_their_own(tmp_path, seed):
    settings = dict(beta=0.0, per_device_train_batch_size=32, num_generations=8)
    trainer = train_opposite(tmp_path, TRAINERS["rloo"][:2], ShareLoraConfig, seed, **settings)
    after = own_rewards(trainer.model)
    with trainer.model.disable_adapter():
        before = own_rewards(trainer.model)
    assert max(before.values()) < 0.6
    assert min(after.values()) >= 0.85, after


def test_one_policy_for_both_cannot(tmp_path):
    def plain(**settings):
        return LoraConfig(task_type="CAUSAL_LM", **settings)

    settings = dict(beta=0.0, per_device_train_batch_size=32, num_generations=8)
    trainer = train_opposite(tmp_path, TRAINERS["rloo"][2:], plain, 0, **settings)
    assert min(own_rewards(trainer.model, personal=False).values()) <= 0.6


# -- banks, references, checkpoints -------------------------------------------------------------------------------------------


def untimed(trainer):
    return [{k: v for k, v in log.items() if k != "step_time"} for log in without_times(trainer.state.log_history)]


def test_all_kinds_of_bank_train_alike_bit_by_bit(tmp_path):
    trainers = {}
    for kind in ("resident", "ram", "mmap"):
        adapter = {"bank": kind} | ({} if kind == "resident" else {"bank_slots": 5})
        trainers[kind] = make_trainer(
            tmp_path / kind, rows=prompts_of(users=7), adapter=adapter, steps_per_generation=2, max_grad_norm=0.5
        )
        trainers[kind].train()
    resident = trainers["resident"]
    assert (
        sum(bool(moves(resident.model, row)[name].any()) for row in range(7) for name in moves(resident.model, 0)) > 6
    )
    for kind in ("ram", "mmap"):
        assert_same(resident, trainers[kind], users=7)
        assert untimed(trainers[kind]) == untimed(resident)


@pytest.mark.parametrize("kind", ["resident", "mmap"])
def test_a_policy_goes_on_from_its_users_who_are_its_reference(tmp_path, kind):
    """All users train; then one alone, kept near what all of them were: the others must not move by a bit."""
    first = make_trainer(tmp_path / "a", adapter={"bank": kind}, user_weight_decay=0.1)
    first.train()
    users = ["user0", "user1", "user2"]
    before = [{name: move.clone() for name, move in moves(first.model, row).items()} for row in range(3)]
    old = logits_of(first.model, users)
    only = Dataset.from_list([row for row in prompts_of() if row["user_id"] == "user1"])
    second = make_trainer(
        tmp_path / "b", rows=only, model=first.model, beta=0.5, user_weight_decay=0.1, per_device_train_batch_size=4
    )
    assert torch.equal(logits_of(second.model, users), old)
    second.model.train()
    second.train()
    kl = [log["kl"] for log in second.state.log_history if "kl" in log]
    assert kl[0] == 0.0 and kl[-1] != 0.0
    for row, then in enumerate(before):
        now = moves(second.model, row)
        for name, move in then.items():
            assert torch.equal(now[name], move) == (row != 1), (row, name)
    assert not torch.equal(logits_of(second.model, users), old)
    # the copy is frozen, users and all
    second.model.set_adapter("ref")
    assert torch.equal(logits_of(second.model, users), old)
    # and makes room for that of the next training in the same process
    second.model.set_adapter("default")
    now = logits_of(second.model, users)
    third = make_trainer(tmp_path / "c", model=second.model, max_steps=1)
    third.train()
    assert third.state.log_history[0]["kl"] == 0.0
    third.model.set_adapter("ref")
    assert torch.equal(logits_of(third.model, users), now)


@pytest.mark.parametrize("kind", ["resident", "mmap"])
def test_invariant_5_resumed_equals_straight_bit_by_bit_and_users_export(tmp_path, kind):
    def run(directory, resume=None):
        trainer = make_trainer(
            directory,
            adapter={"bank": kind},
            steps_per_generation=2,  # a checkpoint after two steps is at the end of a generation batch
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint-2"))
    assert_same(straight, resumed, users=3)
    saved = tmp_path / "resumed" / "checkpoint-4"
    expected = logits_of(resumed.model, ["user2"] * 3)
    alone = PeftModel.from_pretrained(tiny_causal(), export_user(str(saved), "user2", tmp_path / "user2")).eval()
    ids = torch.randint(8, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(alone(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits_of(resumed.model, ["user0"] * 3))
    card = (tmp_path / "resumed" / "README.md").read_text()
    assert "3 users share" in card and "pipeline(" not in card and "user0" not in card


def test_an_8_bit_base_trains_float32_users(tmp_path):
    trainer = make_trainer(
        tmp_path,
        model=save_tiny("llama", tmp_path / "model", causal=True),
        others={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        per_device_train_batch_size=24,  # all users in both steps: in the first B = 0 and nobody moves
        num_generations=2,
        max_steps=2,
    )
    assert trainer.model.is_loaded_in_8bit
    before = shared(trainer.model)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    after = shared(trainer.model)
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(any(move.any() for move in moves(trainer.model, row).values()) for row in range(3))


# -- several processes ----------------------------------------------------------------------------------------------------------


def same_completions(trainer):
    """Completions drawn from the prompt and the place within its group, the same however rows are dealt to processes."""

    def drawn(prompt_ids, *others):
        completions = []
        for place, ids in enumerate(prompt_ids):
            draw = random.Random(f"{ids} {place % 2}")
            completions.append([draw.randrange(8, 98) for _ in range(draw.randint(2, 7))] + [1])
        return (completions, None) if isinstance(trainer, GRPOTrainer) else completions

    trainer._generate_single_turn = drawn


RANKED = [("rloo", "resident"), ("rloo", "mmap"), ("ppo", "mmap")]


def ranks_case(out, method, kind, ranks):
    out = Path(out, f"{ranks}-{method}-{kind}")
    if method == "ppo":
        cls, settings = (ShareLoraPPOTrainer, ShareLoraPPOConfig), dict(kl_coef=0.1, num_iterations=1)
    else:
        cls, settings = TRAINERS[method][:2], dict(beta=0.1)
    trainer = make_trainer(
        out,
        rows=prompts_of(users=7, n=32),
        eval_rows=prompts_of(users=7, n=7, seed=1),
        adapter={"bank": kind},
        cls=cls,
        num_generations=2,
        per_device_train_batch_size=8 // ranks,
        per_device_eval_batch_size=8 // ranks,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        adam_epsilon=1e-4,  # else Adam makes whole steps of the rounding of gradients near zero
        max_grad_norm=0.5,
        **settings,
    )
    assert trainer.accelerator.num_processes == ranks
    same_completions(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    tensors = shared(trainer.model)
    for row in range(7):
        tensors |= {f"{row} {name}": move.clone() for name, move in moves(trainer.model, row).items()}
    save_file(tensors, out / f"rank-{trainer.accelerator.process_index}.safetensors")
    if trainer.is_world_process_zero():
        keys = ("reward", "kl", "grad_norm", "objective/kl", "objective/rlhf_reward", "value/explained_variance")
        logs = [{key: log[key] for key in keys if key in log} for log in trainer.state.log_history if "loss" in log]
        (out / "metrics.json").write_text(json.dumps({"logs": logs, "metrics": metrics}))


RANKS = """
import sys
sys.path.insert(0, {root!r})
import torch
from tests.trainers.test_online import RANKED, ranks_case
for method, kind in RANKED:
    ranks_case({out!r}, method, kind, ranks=2)
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_invariant_1_two_ranks_equal_one_process(tmp_path):
    """14 rows of evaluation in batches of 8: the last one is filled up with repeats, which must not count."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(ROOT), out=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    for method in ("rloo", "ppo"):
        ranks_case(tmp_path, method, "resident", 1)
        alone = tmp_path / f"1-{method}-resident"
        one, log_one = load_file(alone / "rank-0.safetensors"), json.loads((alone / "metrics.json").read_text())
        table_one = pd.read_parquet(alone / "users" / "eval-step-4.parquet")
        assert table_one["n"].tolist() == [2] * 7
        assert all(any(t.any() for name, t in one.items() if name.startswith(f"{row} ")) for row in range(7))
        for folder in (tmp_path / f"2-{name}-{kind}" for name, kind in RANKED if name == method):
            first, second = (load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1))
            assert first.keys() == second.keys() == one.keys()
            for name, tensor in first.items():
                assert torch.equal(tensor, second[name]), name
                assert (tensor - one[name]).abs().max() <= 1e-6, name
            log_two = json.loads((folder / "metrics.json").read_text())
            assert len(log_two["logs"]) == 4
            for mine, other in zip(log_two["logs"], log_one["logs"], strict=True):
                assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
            for key in ("eval_users/seen", "eval_users/reward_mean", "eval_users/reward_worst_tenth"):
                assert log_two["metrics"][key] == pytest.approx(log_one["metrics"][key], abs=1e-6), key
            pd.testing.assert_frame_equal(pd.read_parquet(folder / "users" / "eval-step-4.parquet"), table_one)


# -- metrics ----------------------------------------------------------------------------------------------------------------------


def table_by_hand(calls):
    rewards = {}
    for call in calls:
        for user, _, _, reward in call:
            rewards.setdefault(user, []).append(reward)
    return {user: (len(all_of), sum(all_of) / len(all_of)) for user, all_of in rewards.items()}


@pytest.mark.parametrize("n", [10, 7])
def test_an_evaluation_counts_every_completion_once(tmp_path, n):
    """40 rows fill their batches of 8 although 10 prompts do not; 28 rows leave a short one."""
    recorder = Recorder()
    trainer = make_trainer(tmp_path, reward=recorder, eval_rows=prompts_of(n=n, seed=4), max_steps=1)
    metrics = trainer.evaluate()
    expected = table_by_hand(recorder.calls)
    assert sum(count for count, _ in expected.values()) == 4 * n
    table = pd.read_parquet(tmp_path / "users" / "eval-step-0.parquet").set_index("user_id")
    assert table["n"].to_dict() == {user: count for user, (count, _) in expected.items()}
    assert table["reward_mean"].to_dict() == pytest.approx({user: mean for user, (_, mean) in expected.items()})
    means = [mean for _, mean in expected.values()]
    assert metrics["eval_users/seen"] == 3 and metrics["eval_users/unseen_rows"] == 0
    assert metrics["eval_users/reward_mean"] == pytest.approx(sum(means) / 3)
    assert metrics["eval_users/reward_worst_tenth"] == pytest.approx(min(means))


def test_the_metrics_of_a_training_are_of_its_generation_batches(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, reward=recorder)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == len(recorder.calls) == 4
    for log, call in zip(logs, recorder.calls, strict=True):
        means = [mean for _, mean in table_by_hand([call]).values()]
        assert log["users/seen"] == len(means) and log["users/unscored_rows"] == 0
        assert log["users/reward_mean"] == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_unseen_users_of_an_evaluation_get_the_common_policy_or_stop_the_run(tmp_path):
    rows = Dataset.from_list(
        [{"prompt": "w1 w2 ", "user_id": user} for user in ("user0", "zoe")]
        + [{"prompt": "w5 w6 w7 ", "user_id": "zoe"}]
    )
    with pytest.raises(UnknownUserError, match="the eval dataset.*'zoe'.*unseen='common'"):
        make_trainer(tmp_path, eval_rows=rows)
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, eval_rows=rows, reward=recorder, unseen="common", generation_kwargs={"do_sample": False}
    )
    scatter(trainer)
    metrics = trainer.evaluate()
    assert metrics["eval_users/unseen_rows"] == 8 and metrics["eval_users/seen"] == 1
    assert pd.read_parquet(tmp_path / "users" / "eval-step-0.parquet")["user_id"].tolist() == ["user0"]
    # D = 0: the same model with everybody's moves taken out
    for name, parameter in trainer.model.named_parameters():
        if "sharelora_A" in name:
            parameter.data.zero_()
    tokenizer = tiny_tokenizer()
    for user, prompt, completion, _ in (row for call in recorder.calls for row in call):
        if user == "zoe":
            batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            with torch.no_grad():
                output = trainer.model.generate(**batch, user_ids=["user0"], max_new_tokens=8, do_sample=False)
            assert completion == tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_several_evaluation_sets_keep_their_own_tables(tmp_path):
    sets = {"a": prompts_of(n=2, seed=1), "b": prompts_of(users=1, n=3, seed=2)}
    trainer = make_trainer(tmp_path, eval_rows=sets)
    metrics = trainer.evaluate()
    assert pd.read_parquet(tmp_path / "users" / "eval_a-step-0.parquet")["n"].tolist() == [4, 4]
    assert pd.read_parquet(tmp_path / "users" / "eval_b-step-0.parquet")["n"].tolist() == [12]
    assert metrics["eval_a_users/seen"] == 2 and metrics["eval_b_users/seen"] == 1


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_a_group_of_equal_rewards_teaches_nothing(tmp_path, method):
    trainer = make_trainer(
        tmp_path, reward=lambda completions, **columns: [2.5] * len(completions), cls=TRAINERS[method][:2], beta=0.0
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for log in (log for log in trainer.state.log_history if "reward" in log):
        assert log["frac_reward_zero_std"] == 1.0 and log["loss"] == 0.0 and log["grad_norm"] == 0.0
    assert set(trainer._logs["advantages"]) == {0.0}
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


# -- bad input ------------------------------------------------------------------------------------------------------------------


def giving(bad, user):
    def scoring(completions, user_id, **columns):
        return [bad if whose == user else 1.0 for whose in user_id]

    return scoring


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_stops_the_run_and_names_its_user(tmp_path, bad):
    trainer = make_trainer(tmp_path, reward=[wordy, giving(bad, "user1")], per_device_train_batch_size=24)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"'scoring' gave .*users 'user1'\).*before anything was updated"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_an_async_reward_is_watched_too(tmp_path):
    async def later(completions, user_id, **columns):
        return [math.inf if user == "user2" else 0.5 for user in user_id]

    trainer = make_trainer(tmp_path, reward=later, per_device_train_batch_size=24)
    with pytest.raises(NonFiniteError, match=r"'later' gave .*users 'user2'\)"):
        trainer.train()


def test_a_reward_model_that_gives_nan_stops_the_run(tmp_path):
    judge = tiny_model()
    judge.score.weight.data.fill_(math.nan)
    trainer = make_trainer(tmp_path, reward=judge, others={"reward_processing_classes": tiny_tokenizer()})
    with pytest.raises(NonFiniteError, match="NaN or infinite.*users 'user"):
        trainer.train()


def test_a_reward_function_that_does_not_apply_says_none(tmp_path):
    trainer = make_trainer(tmp_path, reward=giving(None, "user1"), per_device_train_batch_size=24, num_generations=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["users/unscored_rows"] > 0 and log["users/seen"] == 2 and log["reward"] == 1.0 for log in logs)


def rows_without(column):
    return prompts_of().remove_columns([column])


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        (dict(rows=rows_without("user_id")), DataError, "user_id"),
        (dict(rows=rows_without("prompt")), DataError, "prompt"),
        (dict(eval_rows=rows_without("user_id")), DataError, "eval.*user_id"),
        (dict(rows=prompts_of(image="a picture")), UnsupportedError, "images"),
        (dict(use_vllm=True), UnsupportedError, "use_vllm=True.*one set of weights"),
        (dict(use_transformers_continuous_batching=True), UnsupportedError, "continuous batching reorders"),
        (dict(others={"tools": [len]}), UnsupportedError, "tools came"),
        (dict(others={"rollout_func": len}), UnsupportedError, "rollout_func came"),
        (dict(others={"environment_factory": dict}), UnsupportedError, "environment_factory came"),
        (dict(user_sharding="owner"), UnsupportedError, "user_sharding='owner'.*'union'"),
        (dict(adapter={"task_type": "SEQ_CLS"}), ConfigError, "task_type='SEQ_CLS'.*'CAUSAL_LM'"),
        (dict(rows=prompts_of().to_iterable_dataset()), ConfigError, "streamed dataset of prompts.*UserRegistry"),
        (dict(unseen="guess"), ConfigError, "unseen='guess'"),
    ],
)
def test_what_cannot_work_is_refused_by_name_before_anything_is_trained(tmp_path, case, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, cls=TRAINERS["grpo"][:2], **case)


def test_a_personal_reward_model_is_told_to_come_as_a_user_reward(tmp_path):
    config = ShareLoraConfig(r=4, task_type="SEQ_CLS", users=["user0", "user1", "user2"])
    judge = get_peft_model(tiny_model(), config)
    judge.save_pretrained(tmp_path / "rm")
    for reward in (judge, str(tmp_path / "rm"), [wordy, judge]):
        with pytest.raises(ConfigError, match="its? .*users|UserReward"):
            make_trainer(tmp_path, reward=reward)


def test_a_stream_of_prompts_trains_users_who_are_named(tmp_path):
    rows = prompts_of().to_iterable_dataset()
    trainer = make_trainer(tmp_path, rows=rows, others={"users": UserRegistry(["user0", "user1", "user2"])})
    trainer.train()
    assert all(any(move.any() for move in moves(trainer.model, row).values()) for row in range(3))
    late = make_trainer(tmp_path, rows=rows, others={"users": UserRegistry(["user0", "user1"])})
    with pytest.raises(UnknownUserError, match="user2"):
        late.train()


def test_trls_own_config_gets_the_defaults_for_users(tmp_path):
    trainer = make_trainer(tmp_path, cls=(ShareLoraRLOOTrainer, RLOOConfig), max_steps=1)
    trainer.train()
    assert trainer.args.user_column == "user_id" and trainer.args.unseen == "raise"
    assert trainer.users.ids == ["user0", "user1", "user2"]


def test_no_message_of_a_pseudonymous_policy_has_an_id(tmp_path, caplog, capsys):
    names = ["ann-77c1", "bob-77c1", "cat-77c1"]
    users = UserRegistry(names, key=b"k" * 32)
    rows = prompts_of(users=names)
    said = []
    with caplog.at_level(logging.DEBUG):
        trainer = make_trainer(tmp_path, rows=rows, others={"users": users}, max_steps=1)
        for error, user_id in ((UnknownUserError, "eve-77c1"), (UserIdError, "eve-77c1" * 50)):
            with pytest.raises(error) as raised:
                trainer._find([names[0], user_id], "raise", "the eval dataset")
            assert "In the eval dataset: " in str(raised.value)
            said.append(str(raised.value))
        assert trainer._find([names[2], "eve-77c1"], "common", "the eval dataset") == [2, -1]
        trainer.train()
        with pytest.raises(UnknownUserError, match="In the eval dataset") as raised:
            make_trainer(tmp_path, rows=rows, eval_rows=prompts_of(users=["eve-77c1"]), others={"users": users})
        said.append(str(raised.value))
    said += [caplog.text, *capsys.readouterr()]
    assert users.names(["eve-77c1"])[0] in said[0] and said[2] and "77c1" not in "".join(said)
    assert not any(b"77c1" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


# -- the seams ------------------------------------------------------------------------------------------------------------------


def overrides_of(cls, parent):
    return {name for name, value in vars(cls).items() if inspect.isfunction(value)} & set(dir(parent))


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_overrides_are_those_the_docstrings_name_and_fit_their_parents(method):
    """An override that TRL renames or reshapes would silently never be called."""
    ours, _, theirs, _ = TRAINERS[method]
    named = set()
    assert not overrides_of(ours, theirs)
    for cls in (UserBatchesMixin, OnlinePolicyMixin):
        methods = overrides_of(cls, theirs)
        assert methods and all(f"`{name}`" in cls.__doc__ for name in methods), cls
        assert all(f"`{name}`" in ours.__doc__ for name in methods)
        unchecked = methods - set(cls._seams) - {"__init__", "evaluation_loop", "create_model_card"}
        assert not unchecked, unchecked
        named |= methods
    assert len(named) == 17
    check_seams(ours)


def test_another_trl_is_refused_with_a_clear_message(tmp_path, monkeypatch):
    def log(self, logs):
        """Of a TRL to come."""

    monkeypatch.setattr(RLOOTrainer, "log", log)
    with pytest.raises(
        UnsupportedError, match=r"overrides log\(logs, start_time\) of TRL .*RLOOTrainer.log takes \(logs\)"
    ):
        make_trainer(tmp_path)
    monkeypatch.undo()
    monkeypatch.delattr(RLOOTrainer, "_generate_and_score_completions")
    with pytest.raises(UnsupportedError, match="_generate_and_score_completions.*but it is not there"):
        check_seams(ShareLoraRLOOTrainer)


def test_a_subclass_of_ones_own_is_not_taken_for_another_trl():
    class Mine(ShareLoraRLOOTrainer):
        def log(self, logs, *args, **kwargs):
            return super().log(logs, *args, **kwargs)

    check_seams(Mine)


@pytest.mark.parametrize("kind", ["resident", "ram"])
def test_resuming_inside_a_generation_batch_goes_on_with_its_prompts_and_users(tmp_path, kind):
    """TRL's step count starts anew, the prompts do not: unaligned, the window would be of other users than the rollouts."""
    cls = TRAINERS["grpo"][:2]
    rows = prompts_of(users=12, n=24)
    settings = dict(
        cls=cls, rows=rows, adapter={"bank": kind}, num_iterations=2, max_steps=7, save_strategy="steps", save_steps=3
    )
    make_trainer(tmp_path, **settings).train()
    resumed = make_trainer(tmp_path, **settings)
    windows, trained = [], []
    get_batch_samples, compute_loss = resumed.get_batch_samples, resumed._compute_loss

    def watched_window(*args):
        result = get_batch_samples(*args)
        windows.append(set(resumed._window_rows))
        return result

    def watched_loss(model, inputs):
        trained.append(set(inputs["user_index"].tolist()))
        return compute_loss(model, inputs)

    resumed.get_batch_samples, resumed._compute_loss = watched_window, watched_loss
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(trained) == 4 and resumed._step == 7
    assert all(users <= window for users, window in zip(trained, windows, strict=True))


def test_a_policy_with_a_critic_goes_on_without_training_it(tmp_path):
    first = make_trainer(
        tmp_path / "ppo", cls=(ShareLoraPPOTrainer, ShareLoraPPOConfig), max_steps=1, num_iterations=1
    )
    first.train()
    second = make_trainer(tmp_path / "rloo", model=first.model, max_steps=1)
    before = {name: p.clone() for name, p in second.model.named_parameters() if "value_head" in name}
    second.train()
    assert before and all(torch.equal(before[name], dict(second.model.named_parameters())[name]) for name in before)
    stepped = {id(p) for group in second.optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in stepped for name, p in second.model.named_parameters() if "value_head" in name)
