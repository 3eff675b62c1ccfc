"""PPO: its arithmetic by hand and in a slow float64 loop, its critic, and what it is for."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

import trl_sharelora  # noqa: F401  registers the adapter type for AutoPeftModelForCausalLM
from tests.helpers import save_tiny, tiny_causal
from tests.trainers.test_banks import assert_same, moves, shared
from tests.trainers.test_online import (
    CHECKPOINTING,
    Recorder,
    log_ratios,
    logits_of,
    make_trainer,
    overrides_of,
    own_rewards,
    prompts_of,
    scatter,
    train_opposite,
    wordy,
)
from trl_sharelora import ShareLoraConfig, export_user
from trl_sharelora.errors import ConfigError, NonFiniteError
from trl_sharelora.trainers.online import OnlinePolicyMixin
from trl_sharelora.trainers.ppo import (
    ShareLoraPPOConfig,
    ShareLoraPPOTrainer,
    clipped_value_loss,
    generalized_advantages,
    moments_of,
    token_rewards,
    whiten,
)
from trl_sharelora.trainers.seams import check_seams
from trl_sharelora.trainers.user_batches import UserBatchesMixin


PPO = (ShareLoraPPOTrainer, ShareLoraPPOConfig)


def make_ppo(directory, **overrides):
    return make_trainer(directory, cls=PPO, **(dict(num_iterations=1) | overrides))


def head_of(trainer):
    return trainer.model.get_base_model().value_head.modules_to_save["default"].weight


def rollout(trainer):
    """A generation batch, and the one before it is shuffled and split."""
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


# -- the arithmetic -------------------------------------------------------------------------------------------------------------


def test_rewards_of_tokens_by_hand():
    scores = torch.tensor([2.0, -1.0, 5.0])
    kl = torch.tensor([[0.5, 1.0, -2.0], [0.25, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    expected = torch.tensor([[-0.05, -0.1, 2.2], [-1.025, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(token_rewards(scores, kl, mask, 0.1), expected)


def test_advantages_by_hand():
    # gamma .5, lambda .5; row 0: deltas 1 + .5*2 - 4 = -2, 0 + .5*1 - 2 = -1.5, 3 - 1 = 2; A = -2 + .25*(-1), -1.5 + .25*2, 2
    rewards = torch.tensor([[1.0, 0.0, 3.0], [2.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    values = torch.tensor([[4.0, 2.0, 1.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-2.25, -1.0, 2.0], [1.5, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.75, 1.0, 3.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def random_case(rows=6, tokens=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, tokens, generator=generator)
    lengths = torch.tensor([7, 1, 0, 4, 6, 2])[:rows]
    return rewards, values, lengths, (torch.arange(tokens) < lengths.unsqueeze(1)).long()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_advantages_are_the_sums_of_the_paper(gamma, lam):
    """Equation 16: A_t = sum over l of (gamma lam)^l delta_{t+l}, over the tokens that are left."""
    rewards, values, lengths, mask = random_case()
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths.tolist()):
        r, v = rewards[row].double().tolist(), values[row].double().tolist()
        delta = [r[t] + (gamma * v[t + 1] if t + 1 < length else 0.0) - v[t] for t in range(length)]
        for t in range(7):
            slow = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) if t < length else 0.0
            assert advantages[row, t].item() == pytest.approx(slow, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(slow + v[t] if t < length else 0.0, abs=1e-5)
            if lam == gamma == 1.0:
                assert returns[row, t].item() == pytest.approx(sum(r[t:length]), abs=1e-5)


def test_whitening_by_hand_and_in_float64():
    values = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert moments_of(values, mask).tolist() == [3.0, 9.0, 41.0]
    # mean 3, variance (4 + 1 + 9) / 2 = 7
    expected = torch.tensor([[-2.0, -1.0, 0.0], [3.0, 0.0, 0.0]]) / math.sqrt(7)
    torch.testing.assert_close(whiten(values, mask, moments_of(values, mask)), expected)
    kept = (expected + 3.0) * mask
    torch.testing.assert_close(whiten(values, mask, moments_of(values, mask), shift_mean=False), kept)

    _, values, _, mask = random_case(seed=1)
    white = whiten(values, mask, moments_of(values, mask))
    inside = values[mask.bool()].double()
    slow = (inside - inside.mean()) / inside.std()
    torch.testing.assert_close(white[mask.bool()].double(), slow, atol=1e-5, rtol=1e-5)
    assert not white[mask == 0].any()
    # one token, or none at all, is finite
    for few in (torch.tensor([[1, 0]]), torch.tensor([[0, 0]])):
        assert whiten(torch.ones(1, 2), few, moments_of(torch.ones(1, 2), few)).isfinite().all()


def test_the_value_loss_by_hand():
    values, old = torch.tensor([1.0, 1.0, 1.0, 0.4]), torch.tensor([0.0, 0.0, 0.9, 0.5])
    returns = torch.tensor([2.0, 0.5, 2.0, 0.0])
    # kept within .2 of the old one: .2, .2, 1, .4; the larger of the two squared errors, halved
    expected = torch.tensor([0.5 * 1.8**2, 0.5 * 0.5**2, 0.5, 0.5 * 0.4**2])
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.2), expected)


# -- the critic -----------------------------------------------------------------------------------------------------------------


def fill_head(trainer, size=0.2):
    head = head_of(trainer)
    head.data.copy_(size * torch.randn(head.shape, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("iterations", [1, 2])
def test_values_are_those_before_each_token_under_each_users_own_policy(tmp_path, iterations):
    """Against hidden states of every user's exported LoRA, one row at a time, in pieces of another size."""
    trainer = make_ppo(
        tmp_path,
        rows=prompts_of(users=4),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_iterations=iterations,
        shuffle_dataset=False,
    )
    scatter(trainer)
    fill_head(trainer)
    batch = rollout(trainer)
    plain = {
        row: PeftModel.from_pretrained(tiny_causal(), export_user(trainer.model, user, tmp_path / user)).eval()
        for row, user in enumerate(trainer.users)
    }
    assert len(batch["user_index"].unique()) == 4
    for row, user in enumerate(batch["user_index"].tolist()):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion]).unsqueeze(0)
        with torch.no_grad():
            hidden = plain[user].get_base_model().model(input_ids=ids).last_hidden_state
        expected = (hidden @ head_of(trainer).detach().T)[0, len(prompt) - 1 : -1, 0]
        found = batch["old_values"][row]
        torch.testing.assert_close(found[: len(completion)], expected, atol=1e-4, rtol=1e-4)
        assert not found[len(completion) :].any()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_the_loss_sees_the_very_policies_and_values_of_the_rollout(tmp_path, checkpointing):
    settings = dict(per_device_train_batch_size=4, steps_per_generation=4, learning_rate=0.0, num_iterations=1)
    trainer = make_ppo(tmp_path, rows=prompts_of(users=4), **(CHECKPOINTING[checkpointing] | settings))
    scatter(trainer)
    fill_head(trainer)
    compare, differences = trainer._compute_loss, []

    def compared(model, inputs):
        measure = trainer._get_per_token_logps_and_entropies

        def measured(*args, **kwargs):
            result = measure(*args, **kwargs)
            moved = (trainer._values - inputs["old_values"]) * inputs["completion_mask"]
            differences.append(float(moved.detach().abs().max()))
            return result

        trainer._get_per_token_logps_and_entropies = measured
        try:
            return compare(model, inputs)
        finally:
            trainer._get_per_token_logps_and_entropies = measure

    trainer._compute_loss = compared
    assert log_ratios(trainer) == 0.0
    assert len(differences) == 4 and max(differences) <= 1e-6


def test_the_loss_of_a_micro_batch_in_float64(tmp_path):
    """Clipped policy loss plus value loss, token by token, of a policy that has moved since the rollout."""
    trainer = make_ppo(tmp_path, loss_type="bnpo", vf_coef=0.3, cliprange_value=0.05, epsilon=0.1, kl_coef=0.2)
    scatter(trainer)
    fill_head(trainer)
    batch = rollout(trainer)
    with torch.no_grad():
        trainer.current_gradient_accumulation_steps = 1
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.03)
        seen = {}
        measure = trainer._get_per_token_logps_and_entropies

        def measured(*args, **kwargs):
            result = measure(*args, **kwargs)
            seen["logps"], seen["values"] = result[0].double(), trainer._values.double()
            return result

        trainer._get_per_token_logps_and_entropies = measured
        trainer.model.eval()  # an evaluation's loss is not divided for accumulation
        loss = trainer._compute_loss(trainer.model, batch).item()
    policy = value = count = clipped = 0.0
    for row in range(len(batch["user_index"])):
        for t in range(batch["completion_mask"].shape[1]):
            if not batch["completion_mask"][row, t]:
                continue
            count += 1
            ratio = math.exp(seen["logps"][row, t] - batch["old_per_token_logps"][row, t].double())
            advantage = batch["advantages"][row, t].item()
            policy -= min(ratio * advantage, min(max(ratio, 0.9), 1.1) * advantage)
            now, before, target = (x[row, t].item() for x in (seen["values"], batch["old_values"], batch["returns"]))
            near = before + min(max(now - before, -0.05), 0.05)
            value += 0.5 * max((now - target) ** 2, (near - target) ** 2)
            clipped += abs(now - before) > 0.05
    assert loss == pytest.approx(policy / count + 0.3 * value / count, rel=1e-5)
    metrics = trainer._metrics["eval"]
    assert metrics["value/loss"] == [pytest.approx(value / count, rel=1e-5)]
    assert metrics["value/clip_fraction"] == [pytest.approx(clipped / count, rel=1e-5)] and clipped > 0


def test_advantages_of_a_rollout_by_hand(tmp_path):
    """Scores, penalty against the base, GAE and whitening of a real rollout, from its own log-probabilities."""
    recorder = Recorder()
    trainer = make_ppo(tmp_path, reward=recorder, kl_coef=0.3, lam=0.8, gamma=0.9, missing_eos_penalty=0.5)
    scatter(trainer)
    fill_head(trainer)
    batch = rollout(trainer)
    (call,) = recorder.calls
    advantages = []
    with torch.no_grad(), trainer.model.disable_adapter():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        logits = trainer.model.get_base_model()(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
    penalties = []
    for row, (_, _, _, reward) in enumerate(call):
        n, start = int(batch["completion_mask"][row].sum()), batch["prompt_ids"].shape[1]
        tokens = batch["completion_ids"][row, :n]
        reference = [logits[row, start + t - 1, tokens[t]].item() for t in range(n)]
        kl = [batch["old_per_token_logps"][row, t].item() - reference[t] for t in range(n)]
        rewards = [-0.3 * x for x in kl]
        score = reward - (0.0 if tokens[-1] == 1 else 0.5)
        rewards[-1] += score
        penalties.append((sum(kl), score))
        values = [*batch["old_values"][row, :n].tolist(), 0.0]
        after = 0.0
        found = []
        for t in reversed(range(n)):
            after = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.72 * after
            found.insert(0, after)
        for t in range(n):
            assert batch["returns"][row, t].item() == pytest.approx(found[t] + values[t], rel=1e-4, abs=1e-4)
        advantages.append(found)
    everything = torch.tensor([x for found in advantages for x in found], dtype=torch.float64)
    for row, found in enumerate(advantages):
        white = (torch.tensor(found, dtype=torch.float64) - everything.mean()) / everything.std()
        torch.testing.assert_close(batch["advantages"][row, : len(found)].double(), white, rtol=1e-3, atol=1e-4)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    kl, score = (sum(part) / len(part) for part in zip(*penalties, strict=True))
    assert metrics["objective/kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["objective/scores"] == pytest.approx(score, rel=1e-5)
    assert metrics["objective/rlhf_reward"] == pytest.approx(score - 0.3 * kl, rel=1e-4, abs=1e-4)
    returns = torch.cat([batch["returns"][r, : len(f)] for r, f in enumerate(advantages)]).double()
    values = torch.cat([batch["old_values"][r, : len(f)] for r, f in enumerate(advantages)]).double()
    explained = 1 - (returns - values).square().mean() / returns.var(unbiased=False)
    assert metrics["value/explained_variance"] == pytest.approx(explained.item(), rel=1e-4)
    assert metrics["value/mean"] == pytest.approx(values.mean().item(), rel=1e-4)


@pytest.mark.parametrize("penalty", [None, 2.0])
def test_a_completion_that_did_not_end_pays(tmp_path, penalty):
    """Two of eight completions end: the mean score falls by three quarters of the penalty."""
    trainer = make_ppo(
        tmp_path, reward=lambda completions, **columns: [1.0] * len(completions), missing_eos_penalty=penalty
    )
    texts = [[20, 30, 1] if place in (2, 5) else [20, 30, 40, 50] for place in range(8)]
    trainer._generate_single_turn = lambda *args: (texts, None)
    rollout(trainer)
    expected = 1.0 if penalty is None else 1.0 - 0.75 * penalty
    assert trainer._metrics["train"]["objective/scores"] == [pytest.approx(expected)]


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    """The same rollout as one micro-batch of 16 and as four of 4, of unequal numbers of tokens.

    Once the four are the half of a generation batch of eight, whose other half has as many tokens.
    """
    gradients, batches = [], None
    for size, pieces, steps in ((16, 1, 1), (4, 4, 4), (4, 4, 8)):
        trainer = make_ppo(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=pieces,
            steps_per_generation=steps,
            loss_type="dapo",
            vf_coef=0.5,
        )
        scatter(trainer)
        fill_head(trainer)
        if batches is None:
            texts = [[20 + place] * (1 + place % 7) for place in range(16)]
            trainer._generate_single_turn = lambda *args, texts=texts: (texts, None)
            batches = rollout(trainer)
            lengths = batches["completion_mask"].sum(1)
            assert len({int(part.sum()) for part in lengths.split(4)}) > 1
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = pieces
        for start in range(0, 16, size):
            piece = {k: v[start : start + size] if v.ndim else v for k, v in batches.items()}
            piece["num_items_in_batch"] = batches["num_items_in_batch"] * steps // pieces
            trainer._prepare_inputs = lambda inputs, piece=piece: piece
            trainer.training_step(trainer.model, piece, None)
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    one, *others = gradients
    assert any("value_head" in name for name in one)
    for other in others:
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            assert gradient.any() and (gradient - other[name]).abs().max() <= 1e-6 * max(1.0, gradient.abs().max()), (
                name
            )


# -- the head: made, trained, saved -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resident", "mmap"])
def test_the_value_head_goes_with_the_adapter_and_not_with_a_user(tmp_path, kind):
    def run(directory, resume=None):
        trainer = make_ppo(
            directory,
            model=path,
            adapter={"bank": kind},
            num_iterations=2,
            save_strategy="steps",
            save_steps=2,
        )
        assert resume or not head_of(trainer).any()  # all values 0 at first
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    path = save_tiny("llama", tmp_path / "model", causal=True)
    trainer = run(tmp_path / "a")
    assert head_of(trainer).any() and head_of(trainer).dtype == torch.float32
    resumed = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
    assert_same(trainer, resumed, users=3)

    saved = tmp_path / "a" / "checkpoint-4"
    loaded = AutoPeftModelForCausalLM.from_pretrained(saved, is_trainable=True)
    head = loaded.get_base_model().value_head.modules_to_save["default"].weight
    assert torch.equal(head, head_of(trainer)) and head.requires_grad
    users = ["user0", "user1", "user2"]
    assert torch.equal(logits_of(loaded, users), logits_of(trainer.model, users))
    exported = export_user(saved, "user1", tmp_path / "one")
    assert not [name for name in load_file(exported / "adapter_model.safetensors") if "value_head" in name]
    plain = PeftModel.from_pretrained(tiny_causal(), exported).eval()
    ids = torch.randint(8, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = logits_of(trainer.model, ["user1"] * 3)
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)

    # PPO again, from what was loaded: the critic goes on where it was
    again = make_ppo(tmp_path / "c", model=loaded, max_steps=1)
    assert torch.equal(head_of(again), head_of(trainer))
    before = copy.deepcopy(head_of(again))
    again.train()
    assert not torch.equal(head_of(again), before)
    assert again.state.log_history[0]["objective/kl"] == 0.0  # its reference are these users, whom it has not left yet


@pytest.mark.parametrize("kind", ["resident", "mmap"])
def test_a_policy_without_a_critic_gets_one(tmp_path, kind):
    first = make_trainer(tmp_path / "a", adapter={"bank": kind})
    first.train()
    users = ["user0", "user1", "user2"]
    old = logits_of(first.model, users)
    second = make_ppo(tmp_path / "b", model=first.model)
    assert torch.equal(logits_of(second.model, users), old)
    second.train()
    logs = [log for log in second.state.log_history if "objective/kl" in log]
    assert logs[0]["objective/kl"] == 0.0 and logs[-1]["objective/kl"] != 0.0
    assert head_of(second).any() and head_of(second).requires_grad
    second.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_causal(), tmp_path / "saved")
    assert torch.equal(loaded.get_base_model().value_head.modules_to_save["default"].weight, head_of(second))
    assert torch.equal(logits_of(loaded, users), logits_of(second.model, users))
    # a third training, in the same process: its reference are the users as they are now, not those of the second
    third = make_ppo(tmp_path / "c", model=second.model, max_steps=1)
    assert not [name for name, p in third.model.named_parameters() if ".ref." in name and p.requires_grad]
    now = logits_of(third.model, users)
    third.train()
    assert third.state.log_history[0]["objective/kl"] == 0.0
    third.model.set_adapter("ref")
    assert torch.equal(logits_of(third.model, users), now)


def test_the_reference_of_a_new_adapter_is_the_base(tmp_path):
    """B = 0: a new policy is the base, so the first penalty is nothing; later it is something."""
    trainer = make_ppo(tmp_path, kl_coef=0.1)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    assert logs[0]["objective/kl"] == 0.0 and logs[-1]["objective/kl"] != 0.0
    assert logs[0]["objective/rlhf_reward"] == logs[0]["objective/scores"] == pytest.approx(logs[0]["reward"])
    assert all(math.isfinite(log["value/explained_variance"]) for log in logs)


def test_an_8_bit_base_has_a_float32_critic(tmp_path):
    trainer = make_ppo(
        tmp_path,
        model=save_tiny("llama", tmp_path / "model", causal=True),
        others={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        per_device_train_batch_size=24,
        num_generations=2,
        max_steps=2,
    )
    assert trainer.model.is_loaded_in_8bit
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert head_of(trainer).any()
    assert all(any(move.any() for move in moves(trainer.model, row).values()) for row in range(3))


def test_banks_in_a_store_train_the_same_policies_and_critic(tmp_path):
    trainers = [make_ppo(tmp_path / kind, adapter={"bank": kind}, num_iterations=2) for kind in ("resident", "mmap")]
    for trainer in trainers:
        torch.manual_seed(3)
        trainer.train()
    assert_same(*trainers, users=3)
    assert any("value_head" in name for name in shared(trainers[0].model))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_users_of_opposite_tastes_each_get_their_own(tmp_path, seed):
    settings = dict(kl_coef=0.0, lam=1.0, num_iterations=1, per_device_train_batch_size=64)
    trainer = train_opposite(tmp_path, PPO, ShareLoraConfig, seed, **settings)
    after = own_rewards(trainer.model)
    assert min(after.values()) >= 0.75, after


def test_an_evaluation_scores_and_values_without_training(tmp_path):
    trainer = make_ppo(tmp_path, eval_rows=prompts_of(n=5, seed=1))
    scatter(trainer)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.evaluate()
    assert metrics["eval_users/seen"] == 3 and math.isfinite(metrics["eval_loss"])
    assert metrics["eval_objective/scores"] == pytest.approx(metrics["eval_reward"], rel=1e-5)
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


# -- bad input ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(beta=0.1), "beta=0.1 came.*kl_coef"),
        (dict(loss_type="grpo"), "loss_type='grpo'.*'dapo', 'bnpo'"),
        (dict(importance_sampling_level="sequence"), "importance_sampling_level='sequence'"),
        (dict(lam=1.5), "lam=1.5; a finite number from 0 to 1"),
        (dict(gamma=-0.1), "gamma=-0.1"),
        (dict(kl_coef=math.nan), "kl_coef=nan"),
        (dict(vf_coef=math.inf), "vf_coef=inf"),
        (dict(cliprange_value=-1.0), "cliprange_value=-1.0"),
    ],
)
def test_configuration_values(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        ShareLoraPPOConfig(str(tmp_path), bf16=False, use_cpu=True, **overrides)


def test_the_config_of_another_trainer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="args is a GRPOConfig; a ShareLoraPPOConfig is needed"):
        make_trainer(tmp_path, cls=(ShareLoraPPOTrainer, GRPOConfig))


def test_a_completion_that_no_reward_function_scores_stops_the_run(tmp_path):
    def sometimes(completions, user_id, **columns):
        return [None if user == "user2" else 1.0 for user in user_id]

    trainer = make_ppo(tmp_path, reward=sometimes, per_device_train_batch_size=24, num_generations=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"No reward function applies to \d+ completions \(users 'user2'\)"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    # where another function applies to all, one that does not apply everywhere is fine
    make_ppo(tmp_path, reward=[sometimes, wordy], max_steps=1).train()


def test_overrides_are_those_the_docstring_names_and_fit_their_parents():
    for cls in (UserBatchesMixin, OnlinePolicyMixin, ShareLoraPPOTrainer):
        methods = overrides_of(cls, GRPOTrainer)
        assert methods and all(f"`{name}`" in ShareLoraPPOTrainer.__doc__ for name in methods), cls
    # what PPO overrides once more is checked with the mixin's seams
    again = overrides_of(ShareLoraPPOTrainer, GRPOTrainer) - {"__init__"}
    assert again <= set(OnlinePolicyMixin._seams) and len(again) == 4
    check_seams(ShareLoraPPOTrainer)


def test_masked_truncated_completions_are_left_out(tmp_path):
    """TRL masks a completion that was cut off: no tokens, no reward, nothing that is not finite."""
    trainer = make_ppo(tmp_path, mask_truncated_completions=True, missing_eos_penalty=1.0, max_completion_length=3)
    batch = rollout(trainer)
    empty = batch["completion_mask"].sum(1) == 0
    assert empty.any()
    for name in ("advantages", "returns", "old_values"):
        assert batch[name].isfinite().all() and not batch[name][empty].any()
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_dataset_of_one_user_trains(tmp_path):
    rows = Dataset.from_list([{"prompt": "w1 w2 ", "user_id": "ann"}] * 8)
    trainer = make_ppo(tmp_path, rows=rows, max_steps=2)
    trainer.train()
    assert any(move.any() for move in moves(trainer.model, 0).values())
