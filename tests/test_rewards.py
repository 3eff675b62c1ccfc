"""The reward callable: rewards, widths and references against slow loops, merged models and dense float64 algebra."""

import copy
import json
import logging
import math
import os
import shutil

import pytest
import torch
from datasets import Dataset
from helpers import MAX_POSITIONS, keep_unpacked, preference_rows, save_tiny, tiny_causal, tiny_model, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from trl_sharelora import ShareLoraConfig, UserRegistry, use_users
from trl_sharelora.confidence import add_comparisons, fit_confidence
from trl_sharelora.data import tokenize_preference
from trl_sharelora.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    PessimismError,
    UnknownUserError,
    UserIdError,
)
from trl_sharelora.evaluation import calibrate, evaluate_users
from trl_sharelora.forget import forget_user
from trl_sharelora.new_users import add_users
from trl_sharelora.rewards import SampledReferences, UserReward
from trl_sharelora.scoring import CountSketch, load_reward_model
from trl_sharelora.sharelora import ShareLoraLayer, get_router


USERS = ["ann", "bob", "cat"]
TARGETS = ["q_proj", "down_proj"]
TOKENIZER = tiny_tokenizer()


def moved(model, seed: int = 0):
    """`model` with every trainable parameter moved at random, so that users differ."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


def make(arch: str = "llama", seed: int = 0, base=None, **arguments):
    arguments = {"target_modules": TARGETS if arch == "llama" else None, "users": USERS, "r": 4} | arguments
    config = ShareLoraConfig(task_type="SEQ_CLS", **arguments)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return moved(get_peft_model(tiny_model(arch) if base is None else base, config), seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`base`, and the reward models `rm0`, `rm1` (another seed) on it."""
    folder = tmp_path_factory.mktemp("rewards")
    save_tiny("llama", folder / "base")
    for seed in (0, 1):
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float32)
        make(seed=seed, base=base).save_pretrained(folder / f"rm{seed}")
        TOKENIZER.save_pretrained(folder / f"rm{seed}")
    return folder


@pytest.fixture
def saved(folder, tmp_path):
    """A copy to write into."""
    return str(shutil.copytree(folder / "rm0", tmp_path / "rm"))


def layers_of(model):
    inner = model.base_model.model
    return [(name, module) for name, module in inner.named_modules() if isinstance(module, ShareLoraLayer)]


def requests(n: int = 20, users=USERS, seed: int = 1, conversational: bool = False) -> dict[str, list]:
    """What TRL calls a reward with; `better` is a column of reference completions."""
    rows = preference_rows(users, n, seed=seed, conversational=conversational)
    return {
        "prompts": [row["prompt"] for row in rows],
        "completions": [row["chosen"] for row in rows],
        "user_id": [row["user_id"] for row in rows],
        "better": [row["rejected"] for row in rows],
    }


def ids_of(prompt, completion) -> torch.Tensor:
    if isinstance(prompt, str):
        tokens = TOKENIZER(prompt + completion + "<eos>")["input_ids"]
    else:
        tokens = TOKENIZER.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)["input_ids"]
    return torch.tensor([tokens])


def one_by_one(model, asked, completions="completions", unseen="raise") -> torch.Tensor:
    """Rewards the slow way: one sequence per forward, without padding."""
    model.eval()
    found = []
    for prompt, completion, user_id in zip(asked["prompts"], asked[completions], asked["user_id"], strict=True):
        with torch.no_grad(), use_users(model, [user_id], unseen):
            found.append(model(input_ids=ids_of(prompt, completion)).logits.item())
    return torch.tensor(found)


def features_of(model, asked, completions="completions") -> torch.Tensor:
    """The hidden state of the last token, float64, one sequence per forward."""
    found = []
    model.eval()
    for prompt, completion, user_id in zip(asked["prompts"], asked[completions], asked["user_id"], strict=True):
        with torch.no_grad(), use_users(model, [user_id], "common"):
            hidden = model.base_model.model.model(input_ids=ids_of(prompt, completion)).last_hidden_state
            found.append(hidden[0, -1].double())
    return torch.stack(found)


def comparisons(n: int = 30, seed: int = 8, users=USERS) -> tuple[Dataset, dict[str, list], dict[str, list]]:
    """Training comparisons, and the same as `asked` for the functions above."""
    rows = preference_rows(users, n, seed=seed)
    asked = {name: [row[column] for row in rows] for name, column in (("prompts", "prompt"), ("user_id", "user_id"))}
    chosen, rejected = ({**asked, "completions": [row[side] for row in rows]} for side in ("chosen", "rejected"))
    return Dataset.from_list(rows), chosen, rejected


# -- the plain reward


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_the_plain_reward_is_the_models_row_by_row(arch, conversational):
    model = make(arch)
    asked = requests(21, conversational=conversational)
    reward = UserReward(model, processing_class=TOKENIZER, batch_size=4)
    found = reward(**asked, completion_ids=None, log_extra=None, trainer_state=object())
    assert type(found) is list and {type(value) for value in found} == {float}
    torch.testing.assert_close(torch.tensor(found), one_by_one(model, asked), rtol=1e-5, atol=1e-5)
    estimate = reward.score(asked["prompts"], asked["completions"], asked["user_id"])
    assert estimate.mean.tolist() == found and not estimate.std.any()
    assert estimate.mean.dtype == estimate.std.dtype == torch.float32
    # it can fail: with the users of others it is another
    others = {**asked, "user_id": asked["user_id"][1:] + asked["user_id"][:1]}
    assert not torch.allclose(torch.tensor(found), one_by_one(model, others), atol=1e-2)


def test_it_is_a_callable_and_no_module_with_a_name_and_another_user_column():
    asked = requests(6)
    reward = UserReward(make(), processing_class=TOKENIZER, user_column="labeler")
    assert not isinstance(reward, torch.nn.Module) and reward.__name__ == "user_reward"
    expected = UserReward(make(), processing_class=TOKENIZER)(**asked)
    assert reward(prompts=asked["prompts"], completions=asked["completions"], labeler=asked["user_id"]) == expected
    assert reward(prompts=[], completions=[], labeler=[]) == []
    assert len(reward.score([], [], []).mean) == 0


def test_tools_and_template_arguments_reach_the_chat_template():
    model, asked = make(), requests(4, conversational=True)
    reward = UserReward(model, processing_class=TOKENIZER)
    tools = [json.dumps([{"type": "function"}])] * 4
    found = reward(**asked, tools=tools, chat_template_kwargs=[{"shout": True}] * 4)
    for row in range(4):
        messages = asked["prompts"][row] + asked["completions"][row]
        tokens = TOKENIZER.apply_chat_template(
            messages, tools=[{"type": "function"}], shout=True, tokenize=True, return_dict=True
        )["input_ids"]
        with torch.no_grad(), use_users(model, [asked["user_id"][row]]):
            assert found[row] == pytest.approx(model(input_ids=torch.tensor([tokens])).logits.item(), abs=1e-5)


def test_the_model_is_scored_in_eval_mode_and_left_as_it_was():
    model = make(lora_dropout=0.5)
    asked = requests(8)
    expected = UserReward(model.eval(), processing_class=TOKENIZER)(**asked)
    model.train()
    model.base_model.model.score.eval()
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    for pessimism in (None, "ball"):
        reward = UserReward(model, pessimism, 0.0 if pessimism is None else 1.0, processing_class=TOKENIZER)
        estimate = reward.score(asked["prompts"], asked["completions"], asked["user_id"])
        torch.testing.assert_close(estimate.mean, torch.tensor(expected), rtol=1e-5, atol=1e-6)
        assert not estimate.mean.requires_grad and not estimate.std.requires_grad
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert [parameter.requires_grad for parameter in model.parameters()] == trained and any(trained)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert get_router(model).take_visited() == []


def test_a_saved_model_scores_as_in_memory_with_the_tokenizer_found_beside_it(folder):
    asked = requests(9)
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1), folder / "rm0"
    )
    expected = UserReward(model, processing_class=TOKENIZER)(**asked)
    assert UserReward(folder / "rm0", device="cpu")(**asked) == expected
    assert UserReward(str(folder / "rm1"))(**asked) != expected


# -- nothing subtracted, bit by bit


@pytest.mark.parametrize("pessimism", ["ball", "ellipsoid", "heads"])
@pytest.mark.parametrize("reference", [None, "better"])
def test_coefficient_0_is_the_plain_reward_bit_by_bit(pessimism, reference):
    model = make()
    dataset, *_ = comparisons()
    asked = requests()
    plain = UserReward(model, reference=reference, processing_class=TOKENIZER)(**asked)
    sets = None
    if pessimism != "ball":
        sets = fit_confidence(model, dataset, TOKENIZER, kind=pessimism)
    kind = "ensemble" if pessimism == "heads" else pessimism
    arguments = {"reference": reference, "processing_class": TOKENIZER, "sets": sets}
    assert UserReward(model, kind, 0.0, **arguments)(**asked) == plain
    values = {c: UserReward(model, kind, c, **arguments)(**asked) for c in (0.5, 1.0)}
    for plainly, half, whole in zip(plain, values[0.5], values[1.0], strict=True):
        assert whole < half < plainly
        assert whole - half == pytest.approx(half - plainly, abs=1e-4)


# -- the ellipsoid


def dense_widths(z, own, phi, user_index, ridge=0.5, discount=0.1) -> torch.Tensor:
    """sqrt(phi' Sigma_u^-1 phi) with one dense float64 inverse per row."""
    scale = z.square().mean()
    widths = []
    for row, user in zip(phi, user_index, strict=True):
        mine = z[[index for index, u in enumerate(own) if u == user]]
        sigma = ridge * scale * torch.eye(len(row), dtype=torch.float64) + discount * z.T @ z + mine.T @ mine
        widths.append((row @ torch.linalg.inv(sigma) @ row).sqrt())
    return torch.stack(widths).float()


@pytest.mark.parametrize("reference", [None, "better"])
def test_the_ellipsoids_width_is_that_of_a_dense_inverse(reference):
    model = make()
    dataset, chosen, rejected = comparisons()
    asked = requests(12, [*USERS, "zoe"])
    sets = fit_confidence(model, dataset, TOKENIZER, batch_size=4, ridge=0.5, pooled_discount=0.1)
    reward = UserReward(
        model, "ellipsoid", 0.7, reference, sets=sets, processing_class=TOKENIZER, unseen="common", batch_size=5
    )
    arguments = {"better": asked["better"]} if reference else {}
    estimate = reward.score(asked["prompts"], asked["completions"], asked["user_id"], **arguments)
    of_chosen, of_rejected = features_of(model, chosen), features_of(model, rejected)
    centre = torch.cat([of_chosen, of_rejected]).mean(0)
    away = features_of(model, asked, reference) if reference else centre
    phi = features_of(model, asked) - away
    expected = dense_widths(of_chosen - of_rejected, chosen["user_id"], phi, asked["user_id"])
    torch.testing.assert_close(estimate.std, expected, rtol=1e-4, atol=1e-5)
    mean = one_by_one(model, asked, unseen="common")
    if reference:
        mean = mean - one_by_one(model, asked, reference, unseen="common")
    torch.testing.assert_close(estimate.mean, mean, rtol=1e-4, atol=1e-5)
    value = torch.tensor(reward(**asked))
    torch.testing.assert_close(value, estimate.mean - 0.7 * estimate.std, rtol=1e-5, atol=1e-5)
    # who is unknown is known less
    known = {**asked, "user_id": ["ann"] * 12}
    unknown = {**asked, "user_id": ["zoe"] * 12}
    phi = features_of(model, known) - centre
    pooled = sets.width(phi, torch.full((12,), -1))
    assert (sets.width(phi, torch.zeros(12, dtype=torch.long)) < pooled).all()
    assert reward.score(**{k: unknown[k] for k in ("prompts", "completions", "user_id", "better")}).std.min() > 0


def test_a_model_that_pools_first_has_features_too():
    model = make("bert")
    dataset, *_ = comparisons()
    sets = fit_confidence(model, dataset, TOKENIZER)
    asked = requests(6)
    estimate = UserReward(model, "ellipsoid", sets=sets, processing_class=TOKENIZER).score(
        asked["prompts"], asked["completions"], asked["user_id"]
    )
    torch.testing.assert_close(estimate.mean, one_by_one(model, asked), rtol=1e-5, atol=1e-5)
    # the pooled hidden state of the first token
    found = []
    for prompt, completion, user_id in zip(asked["prompts"], asked["completions"], asked["user_id"], strict=True):
        with torch.no_grad(), use_users(model, [user_id]):
            found.append(model.base_model.model.bert(input_ids=ids_of(prompt, completion)).pooler_output[0])
    phi = sets.centred(torch.stack(found))
    torch.testing.assert_close(estimate.std, sets.width(phi, torch.tensor([0, 1, 2] * 2)), rtol=1e-4, atol=1e-5)


def test_a_reward_read_elsewhere_has_no_last_layer_features():
    model = make()
    dataset, *_ = comparisons(6)
    inner = model.base_model.model
    inner.register_forward_hook(
        lambda module, args, output: output.__class__(logits=output.logits + output.logits.roll(1, 0) / 2)
    )
    with pytest.raises(PessimismError, match="does not read its reward off the last token.*parameters='own_factor'"):
        fit_confidence(model, dataset, TOKENIZER)


def test_sets_are_saved_with_the_adapter_and_loaded_as_they_were(saved):
    dataset, *_ = comparisons()
    asked = requests()
    sets = fit_confidence(saved, dataset, max_length=40)
    model, tokenizer = load_reward_model(saved)
    in_memory = UserReward(model, "ellipsoid", sets=sets, processing_class=tokenizer)(**asked)
    assert UserReward(saved, "ellipsoid")(**asked) == in_memory
    settings = json.loads(open(f"{saved}/confidence/ellipsoid.json").read())
    assert settings["registry_id"] == model.peft_config["default"].users.registry_id and settings["num_users"] == 3
    heads = fit_confidence(saved, dataset, kind="heads", members=3)
    in_memory = UserReward(model, "ensemble", sets=heads, processing_class=tokenizer)(**asked)
    assert UserReward(saved, "ensemble")(**asked) == in_memory != UserReward(saved)(**asked)


def test_new_comparisons_of_a_user_narrow_his_set_alone_and_new_users_get_one(saved):
    dataset, *_ = comparisons()
    more, *_ = comparisons(8, seed=9, users=["bob"])
    asked = requests(12)
    arguments = [asked["prompts"], asked["completions"], asked["user_id"]]
    fit_confidence(saved, dataset)
    before = UserReward(saved, "ellipsoid").score(*arguments)
    add_comparisons(saved, more)
    after = UserReward(saved, "ellipsoid").score(*arguments)
    his = torch.tensor([user_id == "bob" for user_id in asked["user_id"]])
    assert (after.std[his] < before.std[his]).all() and torch.equal(after.mean, before.mean)
    torch.testing.assert_close(after.std[~his], before.std[~his], rtol=1e-6, atol=0)
    # a user added later has the pooled information, then his own
    model, tokenizer = load_reward_model(saved)
    add_users(model, ["eve"])
    sets = fit_confidence(saved, dataset, save=False)
    eve = [asked["prompts"], asked["completions"], ["eve"] * 12]
    pooled = UserReward(model, "ellipsoid", sets=sets, processing_class=tokenizer).score(*eve)
    unseen = UserReward(saved, "ellipsoid", unseen="common", sets=copy.deepcopy(sets)).score(
        asked["prompts"], asked["completions"], ["nobody"] * 12
    )
    torch.testing.assert_close(pooled.std, unseen.std, rtol=1e-5, atol=1e-6)
    hers, *_ = comparisons(8, seed=10, users=["eve"])
    add_comparisons(model, hers, tokenizer, sets=sets)
    own = UserReward(model, "ellipsoid", sets=sets, processing_class=tokenizer).score(*eve)
    assert (own.std < pooled.std).all()


def test_sets_that_are_missing_torn_or_of_another_adapter_are_refused(saved, folder):
    with pytest.raises(PessimismError, match=r"never fitted.*fit_confidence\(.*--confidence ellipsoid"):
        UserReward(saved, "ellipsoid")
    with pytest.raises(PessimismError, match="never fitted.*fit_confidence.*kind='heads'"):
        UserReward(saved, "ensemble")
    with pytest.raises(PessimismError, match="model in memory came without its ellipsoids.*sets="):
        UserReward(make(), "ellipsoid", processing_class=TOKENIZER)
    dataset, *_ = comparisons()
    sets = fit_confidence(saved, dataset)
    with pytest.raises(PessimismError, match="parameters='last_layer', and 'own_factor' is asked for"):
        UserReward(saved, "ellipsoid", parameters="own_factor")
    settings, tensors = (open(f"{saved}/confidence/ellipsoid.{kind}", "rb").read() for kind in ("json", "safetensors"))

    def write(kind, content):
        with open(f"{saved}/confidence/ellipsoid.{kind}", "wb") as file:
            file.write(content)

    for broken in (tensors[:-7], b"", tensors.replace(json.loads(settings)["token"].encode(), b"0" * 32)):
        write("safetensors", broken)
        with pytest.raises(PessimismError, match="torn, or of two different saves"):
            UserReward(saved, "ellipsoid")
    write("safetensors", tensors)
    for change in ({"registry_id": "other"}, {"num_users": 4}):
        write("json", json.dumps(json.loads(settings) | change).encode())
        with pytest.raises(PessimismError, match="another list of users"):
            UserReward(saved, "ellipsoid")
    write("json", settings)
    UserReward(saved, "ellipsoid")
    # trained on: another head
    shutil.copytree(f"{saved}/confidence", folder / "rm1" / "confidence")
    with pytest.raises(PessimismError, match="other weights.*trained on since"):
        UserReward(folder / "rm1", "ellipsoid")
    shutil.rmtree(folder / "rm1" / "confidence")
    with pytest.raises(PessimismError, match="32 features and 3 users, the model has 32 and 2"):
        UserReward(make(users=USERS[:2]), "ellipsoid", sets=sets, processing_class=TOKENIZER)
    with pytest.raises(PessimismError, match="sets is a Tensor"):
        UserReward(make(), "ellipsoid", sets=torch.zeros(2, 32), processing_class=TOKENIZER)
    with pytest.raises(PessimismError, match=r"Heads of shape \(1, 32\)"):
        UserReward(make(), "ensemble", sets=torch.zeros(1, 32), processing_class=TOKENIZER)


# -- the user's own factor


def test_a_count_sketch_keeps_inner_products_and_is_linear():
    sketch = CountSketch(64, seed=3)
    columns = sketch(iter([torch.eye(500)]))
    # each entry goes to one place, with a sign
    assert ((columns != 0).sum(1) == 1).all() and set(columns[columns != 0].tolist()) == {1.0, -1.0}
    counts = (columns != 0).sum(0)
    assert counts.min() > 0 and counts.max() < 25 and abs(int(columns.sum())) < 90
    x, y = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sketch(iter([x[None]]))[0], x @ columns)
    torch.testing.assert_close(sketch(iter([x[None, :123], x[None, 123:]]))[0], x @ columns)
    products = [
        float(CountSketch(64, seed)(iter([x[None]]))[0] @ CountSketch(64, seed)(iter([y[None]]))[0])
        for seed in range(400)
    ]
    spread = float(x.norm() * y.norm()) / 8
    assert sum(products) / 400 == pytest.approx(float(x @ y), abs=4 * spread / 20)
    assert torch.tensor(products).std() < 1.6 * spread


@pytest.mark.parametrize("share", ["B", "A", "AB", "diagonal"])
def test_features_of_the_own_factor_are_autograds_gradient_of_the_bank(share):
    model = make(share=share)
    asked = requests(6)
    scorer = UserReward(model, processing_class=TOKENIZER, batch_size=4).scorer
    sequences = [ids_of(*row)[0].tolist() for row in zip(asked["prompts"], asked["completions"], strict=True)]
    index = torch.tensor([0, 1, 2] * 2)
    rewards, features = scorer.rewards_and_features(sequences, index, "own_factor", CountSketch())
    torch.testing.assert_close(rewards, one_by_one(model, asked), rtol=1e-5, atol=1e-5)
    banks = [layer.bank("default").weight for layer in scorer.layers]
    for row, sequence in enumerate(sequences):
        with use_users(model, index[row : row + 1]):
            reward = model(input_ids=torch.tensor([sequence])).logits.squeeze()
            gradients = torch.autograd.grad(reward, banks)
        own = [gradient[index[row]].flatten()[None] for gradient in gradients]
        expected = CountSketch()(iter(own))[0]
        assert (features[row] - expected).norm() < 1e-5 * expected.norm()


def test_an_ellipsoid_of_the_own_factor_is_fitted_saved_and_used(saved):
    dataset, chosen, _ = comparisons()
    asked = requests(6)
    sets = fit_confidence(saved, dataset, parameters="own_factor")
    assert sets.feature_size == 1024
    reward = UserReward(saved, "ellipsoid", parameters="own_factor")
    found = reward.score(asked["prompts"], asked["completions"], asked["user_id"])
    torch.testing.assert_close(found.mean, torch.tensor(UserReward(saved)(**asked)), rtol=1e-5, atol=1e-6)
    scorer = reward.scorer
    sequences = [ids_of(*row)[0].tolist() for row in zip(asked["prompts"], asked["completions"], strict=True)]
    index = torch.tensor([0, 1, 2] * 2)
    _, features = scorer.rewards_and_features(sequences, index, "own_factor", CountSketch())
    torch.testing.assert_close(found.std, sets.width(sets.centred(features), index), rtol=1e-4, atol=1e-6)
    # known completions are known better
    seen = reward.score(chosen["prompts"], chosen["completions"], chosen["user_id"])
    assert seen.std.mean() < found.std.mean()


# -- the ball


def explicit_gradients(model, asked, completions="completions") -> list[torch.Tensor]:
    """Per row the gradient with respect to the adapted weights of the user's merged model, all in one vector."""
    found = []
    for prompt, completion, user_id in zip(asked["prompts"], asked[completions], asked["user_id"], strict=True):
        plain = copy.deepcopy(model).merge_and_unload(user=user_id).eval()
        weights = [p.requires_grad_() for name, p in plain.named_parameters() if any(t in name for t in TARGETS)]
        assert len(weights) == 4
        reward = plain(input_ids=ids_of(prompt, completion)).logits.squeeze()
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(reward, weights)]))
    return found


@pytest.mark.parametrize("reference", [None, "better"])
def test_the_balls_width_is_the_norm_of_the_explicit_gradient(reference):
    model, asked = make(), requests(7)
    reward = UserReward(model, "ball", 1.0, reference, zeta=0.25, processing_class=TOKENIZER, batch_size=4)
    arguments = {"better": asked["better"]} if reference else {}
    estimate = reward.score(asked["prompts"], asked["completions"], asked["user_id"], **arguments)
    gradients = explicit_gradients(model, asked)
    mean = one_by_one(model, asked)
    if reference:
        gradients = [a - b for a, b in zip(gradients, explicit_gradients(model, asked, reference), strict=True)]
        mean = mean - one_by_one(model, asked, reference)
    # rho = sqrt(zeta) = 0.5
    expected = torch.stack([0.5 * gradient.norm() for gradient in gradients])
    torch.testing.assert_close(estimate.std, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(estimate.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(reward(**asked)), mean - expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("reference", [None, "better"])
def test_the_batchs_ball_is_the_papers_closed_form(reference, batch_size):
    model, asked = make(), requests(8)
    reward = UserReward(model, "ball", 0.1, reference, ball="batch", processing_class=TOKENIZER, batch_size=batch_size)
    penalty = one_by_one(model, asked)
    gradients = explicit_gradients(model, asked)
    if reference:
        penalty = penalty - one_by_one(model, asked, reference)
        gradients = [a - b for a, b in zip(gradients, explicit_gradients(model, asked, reference), strict=True)]
    penalty = (penalty - torch.tensor(reward(**asked))) / 0.1
    for user_id in USERS:
        rows = [row for row, other in enumerate(asked["user_id"]) if other == user_id]
        whole = torch.stack([gradients[row] for row in rows]).mean(0)
        assert float(penalty[rows].mean()) == pytest.approx(float(whole.norm()), rel=1e-3)
        for row in rows:
            assert float(penalty[row]) == pytest.approx(
                float(gradients[row] @ whole / whole.norm()), rel=1e-2, abs=1e-2
            )
    # at most the mean of the norms of the rows
    assert penalty.mean() <= torch.stack([gradient.norm() for gradient in gradients]).mean() + 1e-4


def test_the_batchs_ball_lowers_the_reward_as_much_as_moving_to_its_worst_point():
    model = make()
    asked = requests(4, ["ann"])
    gradients = torch.stack(explicit_gradients(model, asked)).mean(0)
    reward = UserReward(model, "ball", 1e-3, ball="batch", processing_class=TOKENIZER)
    fall = torch.tensor(UserReward(model, processing_class=TOKENIZER)(**asked)) - torch.tensor(reward(**asked))
    worst = copy.deepcopy(model).merge_and_unload(user="ann").double().eval()
    weights = [parameter for name, parameter in worst.named_parameters() if any(t in name for t in TARGETS)]

    def mean_reward() -> float:
        tokens = [ids_of(*row) for row in zip(asked["prompts"], asked["completions"], strict=True)]
        with torch.no_grad():
            return sum(float(worst(input_ids=row).logits) for row in tokens) / len(tokens)

    before = mean_reward()
    step = (-1e-3 * gradients / gradients.norm()).double().split([weight.numel() for weight in weights])
    with torch.no_grad():
        for weight, part in zip(weights, step, strict=True):
            weight += part.reshape(weight.shape)
    assert before - mean_reward() == pytest.approx(float(fall.mean()), rel=0.02)


# -- ensembles


def test_two_seeds_on_one_base_are_the_two_models(folder):
    asked = requests(10)
    apart = torch.stack([torch.tensor(UserReward(folder / f"rm{seed}")(**asked)) for seed in (0, 1)])
    values = {
        form: torch.tensor(UserReward([folder / "rm0", folder / "rm1"], "ensemble", 0.5, form=form)(**asked))
        for form in ("std", "worst", "variance")
    }
    std = (apart[0] - apart[1]).abs() / math.sqrt(2)
    torch.testing.assert_close(values["std"], apart.mean(0) - 0.5 * std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values["worst"], apart.min(0).values, rtol=1e-5, atol=1e-6)
    variance = (apart[0] - apart[1]).square() / 4
    torch.testing.assert_close(values["variance"], apart.mean(0) - 0.5 * variance, rtol=1e-4, atol=1e-5)
    reward = UserReward([folder / "rm0", folder / "rm1"], "ensemble", 0.0, "better")
    assert len([m for m in reward.scorer.model.modules() if type(m).__name__ == "LlamaModel"]) == 1
    references = requests(10) | {"completions": asked["better"]}
    differences = apart - torch.stack(
        [torch.tensor(UserReward(folder / f"rm{seed}")(**references)) for seed in (0, 1)]
    )
    torch.testing.assert_close(torch.tensor(reward(**asked)), differences.mean(0), rtol=1e-4, atol=1e-5)
    found = reward.score(asked["prompts"], asked["completions"], asked["user_id"], better=asked["better"])
    torch.testing.assert_close(found.std, differences.std(0), rtol=1e-4, atol=1e-5)


def test_heads_spread_around_the_trained_head(saved):
    dataset, *_ = comparisons()
    asked = requests(8)
    heads = fit_confidence(saved, dataset, kind="heads", members=4, ridge=0.5, seed=1)
    assert heads.shape == (4, 32) and not torch.equal(heads[0], heads[1])
    model, _ = load_reward_model(saved)
    phi = features_of(model, asked).float()
    members = (heads - heads.mean(0)) @ phi.T + one_by_one(model, asked)
    for form, expected in (("std", members.mean(0) - members.std(0)), ("worst", members.min(0).values)):
        found = torch.tensor(UserReward(saved, "ensemble", form=form)(**asked))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_members_of_an_ensemble_must_fit_each_other(folder, tmp_path):
    with pytest.raises(PessimismError, match="1 models came with pessimism='ensemble'.*2 or more"):
        UserReward([folder / "rm0"], "ensemble")
    with pytest.raises(PessimismError, match="2 models came with pessimism='ball'"):
        UserReward([folder / "rm0", folder / "rm1"], "ball")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    make(base=base, users=["ann", "zoe"]).save_pretrained(tmp_path / "others")
    with pytest.raises(PessimismError, match="have the same users in the same order"):
        UserReward([folder / "rm0", tmp_path / "others"], "ensemble")


# -- references


def test_a_reference_shared_by_the_generations_of_a_prompt_is_scored_once():
    model, asked = make(), requests(6)
    generations = {name: [value for value in values for _ in range(4)] for name, values in asked.items()}
    generations["completions"] = [f"w{number}" for number in range(24)]
    counts = []
    model.register_forward_pre_hook(lambda m, args, kwargs: counts.append(len(kwargs["input_ids"])), with_kwargs=True)
    reward = UserReward(model, reference="better", processing_class=TOKENIZER)
    found = reward(**generations)
    assert sum(counts) == 24 + 6
    expected = one_by_one(model, generations) - one_by_one(model, generations, "better")
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


def test_references_are_averaged_and_may_be_drawn_by_a_function(caplog):
    model, asked = make(), requests(6)
    answers = [["w1 w2", "w3"], ["w4"], ["w5 w6 w7", "w8", "w9"], ["w1"], ["w2", "w2"], ["w3"]]
    called = []

    def reference(prompts, user_ids):
        called.append((prompts, user_ids))
        return answers

    mean = one_by_one(model, asked)
    for row, several in enumerate(answers):
        one = {"prompts": [asked["prompts"][row]] * len(several), "completions": several}
        mean[row] -= one_by_one(model, one | {"user_id": [asked["user_id"][row]] * len(several)}).mean()
    gradients = explicit_gradients(model, asked)
    for row, several in enumerate(answers):
        one = {"prompts": [asked["prompts"][row]] * len(several), "completions": several}
        one |= {"user_id": [asked["user_id"][row]] * len(several)}
        gradients[row] = gradients[row] - torch.stack(explicit_gradients(model, one)).mean(0)
    norms = torch.stack([gradient.norm() for gradient in gradients])
    for pessimism in (None, "ball"):
        reward = UserReward(model, pessimism, reference=reference, processing_class=TOKENIZER, batch_size=2)
        by_column = UserReward(model, pessimism, reference="drafts", processing_class=TOKENIZER, batch_size=2)
        expected = mean if pessimism is None else mean - norms
        torch.testing.assert_close(torch.tensor(reward(**asked)), expected, rtol=1e-4, atol=1e-4)
        assert called[-1] == (asked["prompts"], asked["user_id"])
        assert by_column(**asked, drafts=answers) == reward(**asked)


def test_conversational_references_are_messages_or_lists_of_them():
    model, asked = make(), requests(4, conversational=True)
    reward = UserReward(model, reference="better", processing_class=TOKENIZER)
    expected = one_by_one(model, asked) - one_by_one(model, asked, "better")
    torch.testing.assert_close(torch.tensor(reward(**asked)), expected, rtol=1e-4, atol=1e-5)
    assert reward(**{**asked, "better": [[answer] for answer in asked["better"]]}) == reward(**asked)


def test_references_of_another_length_or_form_are_refused():
    model, asked = make(), requests(4)
    reward = UserReward(model, reference="better", processing_class=TOKENIZER)
    with pytest.raises(PessimismError, match="reference='better' names no column; those that came are: 'user_id'"):
        reward(**{name: asked[name] for name in ("prompts", "completions", "user_id")})
    for bad in (
        [None] * 4,
        [[]] * 4,
        [[1]] * 4,
        [[{"role": "assistant", "content": "w1"}]] * 4,
        ["w1", 2, "w1", "w1"],
    ):
        with pytest.raises(PessimismError, match="something else than completions of the prompts' form: rows? [01]"):
            reward(**{**asked, "better": bad})
    for bad, gave in ((["w1"] * 3, "3"), ("w1", "str")):
        with pytest.raises(PessimismError, match=f"column 'better' gave {gave} for 4 prompts"):
            reward(**{**asked, "better": bad})
    for bad in (["w1"] * 4, [["w1"]] * 3):
        reward = UserReward(model, reference=lambda prompts, ids, bad=bad: bad, processing_class=TOKENIZER)
        with pytest.raises(PessimismError, match=r"reference\(prompts, user_ids\) gave"):
            reward(**asked)
    with pytest.raises(PessimismError, match="reference=3 came"):
        UserReward(model, reference=3, processing_class=TOKENIZER)


# -- other bases and banks


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_is_scored(folder, bits):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    if bits == 4:
        config.bnb_4bit_compute_dtype = torch.float32
    asked = requests(6)
    dataset, *_ = comparisons(12)
    sets = fit_confidence(folder / "rm0", dataset, save=False, quantization_config=config)
    for pessimism in (None, "ball", "ellipsoid"):
        reward = UserReward(
            folder / "rm0",
            pessimism,
            quantization_config=config,
            batch_size=1,
            sets=sets if pessimism == "ellipsoid" else None,
        )
        keep_unpacked(reward.scorer.model)
        kinds = {type(module).__name__ for module in reward.scorer.model.modules()}
        assert ("Linear8bitLt" if bits == 8 else "Linear4bit") in kinds
        found = reward.score(asked["prompts"], asked["completions"], asked["user_id"])
        expected = one_by_one(reward.scorer.model, asked)
        torch.testing.assert_close(found.mean, expected, rtol=2e-2, atol=2e-2)
        assert (found.std > 0).all() == (pessimism is not None)
        plain = UserReward(folder / "rm0")(**asked)
        assert found.mean.tolist() != plain


@pytest.mark.parametrize("bank", ["ram", "mmap"])
def test_users_in_a_store_are_scored_and_get_no_gradient(bank, folder, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    resident, stored = make(), make(base=base, bank=bank, bank_dir=str(tmp_path))
    shared = dict(resident.named_parameters())
    with torch.no_grad():
        for name, parameter in stored.named_parameters():
            parameter.copy_(shared[name])
    working_set = get_router(stored).working_sets["default"]
    banks = {name: layer.bank("default").weight.detach() for name, layer in layers_of(resident)}
    records = torch.zeros(len(USERS), working_set.layout.record_bytes, dtype=torch.uint8)
    moves = torch.cat([banks[name].flatten(1) for name, _ in working_set.layout.modules], 1)
    working_set.layout.split(records)[1].copy_(moves)
    working_set.store.write(range(len(USERS)), records)
    dataset, *_ = comparisons(12)
    asked = requests(7)
    sets = fit_confidence(resident, dataset, TOKENIZER)
    of_store = fit_confidence(stored, dataset, TOKENIZER)
    torch.testing.assert_close(sets.directions, of_store.directions, rtol=1e-3, atol=1e-4)
    for pessimism in (None, "ball", "ellipsoid"):
        settings = {"processing_class": TOKENIZER, "batch_size": 3}
        found, expected = (
            UserReward(model, pessimism, sets=some if pessimism == "ellipsoid" else None, **settings)(**asked)
            for model, some in ((stored, of_store), (resident, sets))
        )
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not working_set.gradient.any()
    assert all(layer.bank("default").trainable for _, layer in layers_of(stored))
    # and from a directory, once and as an ensemble of two equals
    stored.save_pretrained(tmp_path / "rm")
    TOKENIZER.save_pretrained(tmp_path / "rm")
    plain = UserReward(resident, processing_class=TOKENIZER)(**asked)
    assert UserReward(tmp_path / "rm")(**asked) == pytest.approx(plain, abs=1e-5)
    both = UserReward([tmp_path / "rm", tmp_path / "rm"], "ensemble")
    estimate = both.score(asked["prompts"], asked["completions"], asked["user_id"])
    assert estimate.mean.tolist() == pytest.approx(plain, abs=1e-5) and estimate.std.abs().max() < 1e-5


# -- bad input


def test_what_is_no_reward_model_of_ours_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="no adapter_config.json in .*a whole model"):
        UserReward(folder / "base")
    with pytest.raises(ConfigError, match="No ShareLoRA adapter can be read from .*nowhere"):
        UserReward(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no adapter_config.json in .*\(no adapter\)"):
        UserReward(tmp_path / "empty")
    get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="has a LoraConfig"):
        UserReward(tmp_path / "lora")
    policy = get_peft_model(tiny_causal(), ShareLoraConfig(task_type="CAUSAL_LM", users=USERS))
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(ConfigError, match="task_type='CAUSAL_LM', so it is no reward model"):
        UserReward(tmp_path / "policy")
    with pytest.raises(ConfigError, match="task_type='CAUSAL_LM', so it is no reward model"):
        UserReward(policy, processing_class=TOKENIZER)
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification came as the reward model"):
        UserReward(tiny_model(), processing_class=TOKENIZER)
    with pytest.raises(ConfigError, match="a model with a LoraConfig came"):
        UserReward(get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS")), processing_class=TOKENIZER)
    with pytest.raises(ConfigError, match="without its tokenizer"):
        UserReward(make())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pessimism": "bal"}, "pessimism='bal' is unknown; one of None, 'ball'"),
        ({"form": "mean"}, "form='mean' is unknown"),
        ({"parameters": "all"}, "parameters='all' is unknown"),
        ({"ball": "user"}, "ball='user' is unknown"),
        ({"unseen": "mean"}, "unseen='mean' is unknown"),
        ({"pessimism_coefficient": -1.0}, "pessimism_coefficient=-1.0 came"),
        ({"pessimism_coefficient": float("nan")}, "pessimism_coefficient=nan came"),
        ({"zeta": 1.0}, "zeta=1.0 is the size of the ball; it needs pessimism='ball'"),
        ({"zeta": -1.0, "pessimism": "ball"}, "zeta=-1.0 came"),
        ({"max_length": 0}, "max_length=0 came"),
        ({"batch_size": 0}, "batch_size=0 came"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        UserReward(make(), **({"processing_class": TOKENIZER} | settings))


def test_rows_that_cannot_be_scored_are_refused():
    asked = requests(4)
    reward = UserReward(make(), processing_class=TOKENIZER)
    without = {name: asked[name] for name in ("prompts", "completions", "better")}
    with pytest.raises(DataError, match="without 'user_id'.*columns that came are: 'better'.*user_column"):
        reward(**without)
    with pytest.raises(DataError, match="without 'user_id'"):
        reward.score(asked["prompts"], asked["completions"])
    with pytest.raises(DataError, match="4 prompts, 4 completions, 3 user_id came"):
        reward(**without, user_id=asked["user_id"][:3])
    with pytest.raises(DataError, match="`user_id` is a str"):
        reward(**without, user_id="ann")
    with pytest.raises(DataError, match="`completions` is a NoneType"):
        reward(prompts=asked["prompts"], user_id=asked["user_id"])
    with pytest.raises(UserIdError, match="missing"):
        reward(**without, user_id=["ann", None, "bob", "cat"])
    with pytest.raises(UserIdError, match="1.0"):
        reward(**without, user_id=["ann", 1.0, "bob", "cat"])
    with pytest.raises(UnknownUserError, match="2 unknown user.s.: 'yan', 'zoe'|2 unknown user.s.: 'zoe', 'yan'"):
        reward(**without, user_id=["ann", "zoe", "yan", "zoe"])
    with pytest.raises(DataError, match=r"A completion is neither text nor a list of messages: row 2 \(None\)"):
        reward(prompts=asked["prompts"], completions=["w1", "w1", None, "w1"], user_id=asked["user_id"])
    with pytest.raises(DataError, match="not of one form .*: row 1"):
        reward(
            prompts=asked["prompts"],
            completions=["w1", [{"role": "assistant", "content": "w1"}], "w1", "w1"],
            user_id=asked["user_id"],
        )
    with pytest.raises(DataError, match="both empty: row 0"):
        reward(prompts=["", "w1", "w1", "w1"], completions=["", "w1", "w1", "w1"], user_id=asked["user_id"])


def test_what_is_unusual_is_scored_counted_and_logged(caplog):
    model = make()
    asked = requests(6, [*USERS, "zoe", "yan", "xia"])
    asked["completions"][1] = ""
    asked["completions"][2] = "w1 " * 200
    logged = {}
    reward = UserReward(model, processing_class=TOKENIZER, unseen="common", max_length=20)
    with caplog.at_level(logging.WARNING, "trl_sharelora"):
        found = reward(**asked, log_metric=logged.__setitem__)
        reward(**asked)
    assert logged == {
        "user_reward/mean": pytest.approx(sum(found) / 6, abs=1e-5),
        "user_reward/penalty": 0.0,
        "user_reward/unseen_share": 0.5,
        "user_reward/empty_completions": 1.0,
        "user_reward/truncated": 1.0,
    }
    said = [record.getMessage().split()[0] for record in caplog.records if record.name == "trl_sharelora.rewards"]
    assert said == ["3", "1", "1"]  # once each
    kept = {**asked, "completions": list(asked["completions"])}
    expected = one_by_one(model, {name: value[:2] + value[3:] for name, value in kept.items()}, unseen="common")
    torch.testing.assert_close(torch.tensor(found[:2] + found[3:]), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), use_users(model, ["cat"]):
        cut = model(input_ids=ids_of(asked["prompts"][2], asked["completions"][2])[:, -20:]).logits.item()
    assert found[2] == pytest.approx(cut, abs=1e-5)
    # the common model is D = 0
    common = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in common.named_parameters():
            if "sharelora_A" in name:
                parameter.zero_()
    alone = {name: value[3:] for name, value in asked.items()} | {"user_id": ["ann"] * 3}
    assert found[3:] == pytest.approx(one_by_one(common, alone).tolist(), abs=1e-5)


def test_an_empty_conversation_completion_is_the_prompt():
    model = make()
    asked = requests(3, conversational=True)
    asked["completions"] = [[], [{"role": "assistant", "content": ""}], asked["completions"][2]]
    logged = {}
    found = UserReward(model, processing_class=TOKENIZER)(**asked, log_metric=logged.__setitem__)
    assert logged["user_reward/empty_completions"] == 2.0
    torch.testing.assert_close(torch.tensor(found), one_by_one(model, asked), rtol=1e-5, atol=1e-5)


def test_texts_beyond_the_models_positions_are_refused():
    asked = requests(4)
    asked["completions"][3] = "w1 " * MAX_POSITIONS
    for settings in ({}, {"max_length": MAX_POSITIONS + 5}):
        reward = UserReward(make("gpt2"), processing_class=TOKENIZER, **settings)
        with pytest.raises(DataError, match=rf"1 of 4 texts .* positions \({MAX_POSITIONS}\).*row 3.*max_length"):
            reward(**asked)
    reward = UserReward(make("gpt2"), processing_class=TOKENIZER, max_length=MAX_POSITIONS)
    assert all(map(math.isfinite, reward(**asked)))
    dataset = Dataset.from_list([*preference_rows(USERS, 3), preference_rows(["ann"], 1)[0] | {"chosen": "w1 " * 200}])
    with pytest.raises(DataError, match="more tokens than the model has positions.*row 3"):
        fit_confidence(make("gpt2"), dataset, TOKENIZER)


@pytest.mark.parametrize("pessimism", [None, "ball", "ellipsoid", "ensemble"])
def test_a_ruined_user_is_named(pessimism, saved):
    dataset, *_ = comparisons(12)
    sets = None
    if pessimism in ("ellipsoid", "ensemble"):
        sets = fit_confidence(saved, dataset, kind="heads" if pessimism == "ensemble" else "ellipsoid", save=False)
    model, tokenizer = load_reward_model(saved)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sharelora_A" in name:
                parameter[1] = float("nan")
    reward = UserReward(model, pessimism, sets=sets, processing_class=tokenizer)
    with pytest.raises(NonFiniteError, match=r"2 of 6 rows: user\(s\) 'bob', rows 1, 4\."):
        reward(**requests(6))
    with pytest.raises(NonFiniteError, match=r"user\(s\) 'bob'"):
        fit_confidence(model, dataset, tokenizer)


def test_fit_confidence_refuses_what_it_cannot_use(saved, caplog):
    dataset, *_ = comparisons(12)
    with pytest.raises(ConfigError, match="kind='ball' is unknown"):
        fit_confidence(saved, dataset, kind="ball")
    with pytest.raises(ConfigError, match="Heads stand on the last layer"):
        fit_confidence(saved, dataset, kind="heads", parameters="own_factor")
    with pytest.raises(UnknownUserError, match="'zoe'"):
        fit_confidence(saved, Dataset.from_list(preference_rows(["zoe"], 3)))
    with pytest.raises(DataError, match="The confidence dataset cannot be used"):
        fit_confidence(saved, dataset.remove_columns("chosen"))
    with pytest.raises(DataError, match="All 12 comparisons are longer than max_length=2"):
        fit_confidence(saved, dataset, max_length=2)
    with caplog.at_level(logging.WARNING, "trl_sharelora"):
        fit_confidence(saved, dataset, max_length=9, save=False)
    assert "of 12 comparisons are longer than max_length=9 and are left out" in caplog.text
    assert not shutil.os.path.exists(f"{saved}/confidence")


# -- calibration with a model


def test_evaluation_tells_whether_widths_go_with_errors():
    model = make()
    dataset, *_ = comparisons(60)
    sets = fit_confidence(model, dataset, TOKENIZER)
    held, chosen, rejected = comparisons(40, seed=11)
    result = evaluate_users(model, held, TOKENIZER, confidence=sets, batch_size=8)
    margins = one_by_one(model, chosen) - one_by_one(model, rejected)
    index = torch.tensor([USERS.index(user_id) for user_id in chosen["user_id"]])
    widths = sets.width(features_of(model, chosen) - features_of(model, rejected), index)
    order = widths.argsort()
    table = result.calibration
    for quarter in range(4):
        rows = order[10 * quarter : 10 * quarter + 10]
        assert table["n"][quarter] == 10 and table["mean_std"][quarter] == pytest.approx(
            float(widths[rows].mean()), rel=1e-3
        )
        assert table["accuracy"][quarter] == pytest.approx(float((margins[rows] > 0).float().mean()))
    assert result.calibration_gap == pytest.approx(table["accuracy"][0] - table["accuracy"][3])
    assert result.calibration_gap_low <= result.calibration_gap <= result.calibration_gap_high
    assert set(result.calibration_users["user_id"]) == set(USERS)
    assert "narrowest to the widest quarter" in str(result) and "calibration" not in result.as_dict()
    plain = evaluate_users(model, held, TOKENIZER)
    assert plain.table.equals(result.table) and plain.calibration is None and plain.calibration_gap is None
    reward = UserReward(model, "ball", processing_class=TOKENIZER)
    assert evaluate_users(model, held, TOKENIZER, confidence=reward).calibration["mean_std"].is_monotonic_increasing
    with pytest.raises(ConfigError, match="confidence='ellipsoid' came; a UserReward with a pessimism"):
        evaluate_users(model, held, TOKENIZER, confidence="ellipsoid")
    with pytest.raises(ConfigError, match="a UserReward with a pessimism"):
        evaluate_users(model, held, TOKENIZER, confidence=UserReward(model, processing_class=TOKENIZER))


def test_calibrate_finds_the_smallest_coefficient_that_covers(saved):
    dataset, *_ = comparisons(60)
    held, chosen, rejected = comparisons(49, seed=11)
    fit_confidence(saved, dataset)
    found = calibrate(saved, held, coverage=0.9)
    reward = UserReward(saved, "ellipsoid")
    model = reward.scorer.model
    margins = one_by_one(model, chosen) - one_by_one(model, rejected)
    index = torch.tensor([USERS.index(user_id) for user_id in chosen["user_id"]])
    widths = reward.sets.width(features_of(model, chosen) - features_of(model, rejected), index)
    needed = (-margins / widths).clamp(min=0).sort().values
    assert found.coefficient == pytest.approx(float(needed[44]), rel=1e-3)  # the 45th of 49: ceil(50 * 0.9)
    assert found.coverage == pytest.approx(45 / 49) and found.n == 49
    assert found.table["n"].sum() == 49 and (found.table["low"] < found.table["coverage"]).all()
    assert (found.table["n"] * found.table["coverage"]).sum() == pytest.approx(45)
    assert found.curve["coverage"].is_monotonic_increasing
    assert found.curve["coverage"][0] == pytest.approx(float((margins >= 0).float().mean()))
    assert found.curve["coverage"][10] == found.coverage and found.curve["coefficient"][10] == pytest.approx(
        found.coefficient
    )
    assert "covers 0.918 of 49 comparisons" in str(found) and "'ann'" in str(found)
    assert calibrate(reward, held, coverage=0.9).coefficient == found.coefficient
    assert calibrate(model, held, 0.5, "ball", processing_class=TOKENIZER).coverage >= 0.5
    with pytest.raises(ConfigError, match="batch_size came beside a UserReward"):
        calibrate(reward, held, batch_size=3)
    with pytest.raises(ConfigError, match="without pessimism has no width"):
        calibrate(UserReward(saved), held)
    with pytest.raises(PessimismError, match="too few"):
        calibrate(reward, held.select(range(5)))


# -- inside TRL


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_trls_own_trainers_take_it(kind, saved, tmp_path):
    trl = pytest.importorskip("trl")
    config, trainer_class = {
        "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
    }[kind]
    dataset, *_ = comparisons()
    fit_confidence(saved, dataset)
    reward = UserReward(saved, "ellipsoid", 0.5, "drafts")
    rows = preference_rows(USERS, 8, seed=3)
    prompts = Dataset.from_list(
        [{"prompt": row["prompt"], "user_id": row["user_id"], "drafts": row["chosen"]} for row in rows]
    )
    trainer = trainer_class(
        tiny_causal(),
        reward_funcs=reward,
        args=config(
            str(tmp_path / "out"),
            num_generations=2,
            per_device_train_batch_size=4,
            max_completion_length=6,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=prompts,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "user_reward/penalty" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["user_reward/penalty"] > 0 and entry["user_reward/unseen_share"] == 0
        value = entry["user_reward/mean"] - entry["user_reward/penalty"]
        assert entry["rewards/user_reward/mean"] == pytest.approx(value, abs=1e-4)
        assert {"user_reward/empty_completions", "user_reward/truncated"} <= set(entry)


def test_margins_are_lower_ends_of_differences(saved):
    data, chosen, rejected = comparisons()
    fit_confidence(saved, data)
    for pessimism, coefficient in ((None, 1.0), ("ellipsoid", 0.0), ("ellipsoid", 2.0)):
        reward = UserReward(saved, pessimism, coefficient)
        plain = [UserReward(saved).score(**side).mean for side in (chosen, rejected)]
        width = torch.zeros(len(data))
        if pessimism and coefficient:
            width = (
                UserReward(saved, pessimism)
                .compare([tokenize_preference(row, reward.scorer.processing_class) for row in data], chosen["user_id"])
                .std
            )
            assert (width > 0).all()
        margins = reward.margins(data["prompt"], data["chosen"], data["rejected"], data["user_id"])
        torch.testing.assert_close(margins, plain[0] - plain[1] - coefficient * width, rtol=1e-4, atol=1e-4)


def test_forgetting_a_user_takes_his_comparisons_out_of_the_saved_ellipsoids(saved):
    data, chosen, _ = comparisons()
    fit_confidence(saved, data)
    before = UserReward(saved, "ellipsoid")
    widths = before.score(**chosen).std
    gone = data["user_id"][0]
    row = before.scorer.users.index([gone])[0]
    assert before.sets.has(torch.tensor([row])).all()
    forget_user(saved, gone)
    after = UserReward(saved, "ellipsoid", unseen="common")
    assert not after.sets.has(torch.tensor([row])).any()
    others = [place for place, user in enumerate(chosen["user_id"]) if user != gone]
    torch.testing.assert_close(after.score(**chosen).std[others], widths[others])


def test_margins_read_tools_and_template_arguments_too(saved):
    rows = preference_rows(USERS, 6, conversational=True)
    data = Dataset.from_list([row | {"chat_template_kwargs": {"shout": True}} for row in rows])
    reward = UserReward(saved)
    columns = [data["prompt"], data["chosen"], data["rejected"], data["user_id"]]
    pairs = [tokenize_preference(row, reward.scorer.processing_class) for row in data]
    expected = reward.compare(pairs, data["user_id"]).mean
    margins = reward.margins(*columns, chat_template_kwargs=data["chat_template_kwargs"])
    assert torch.equal(margins, expected)
    assert not torch.allclose(reward.margins(*columns), expected)


@pytest.mark.parametrize("parameters", ["last_layer", "own_factor"])
def test_sets_of_other_weights_are_refused_and_those_of_a_forgotten_user_are_not(saved, parameters):
    data, *_ = comparisons()
    fit_confidence(saved, data, parameters=parameters)
    assert UserReward(saved, "ellipsoid").parameters == parameters
    forget_user(saved, data["user_id"][0])
    UserReward(saved, "ellipsoid")
    path = os.path.join(saved, "adapter_model.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "sharelora_B" in name)
    save_file(tensors | {name: tensors[name] * (1 + 1e-6)}, path, metadata={"format": "pt"})
    with pytest.raises(PessimismError, match="fitted to other weights"):
        UserReward(saved, "ellipsoid")


def test_users_without_comparisons_of_their_own_are_counted(saved):
    data, *_ = comparisons(users=["ann", "bob"])
    fit_confidence(saved, data)
    logged = {}
    asked = requests(9)
    UserReward(saved, "ellipsoid")(**asked, log_metric=logged.__setitem__)
    assert logged["user_reward/unfitted_share"] == pytest.approx(1 / 3) and logged["user_reward/unseen_share"] == 0


def test_calibration_leaves_long_comparisons_out_and_finds_no_coefficient_for_the_worst_member(saved, folder, caplog):
    data, *_ = comparisons(40)
    fit_confidence(saved, data)
    result = calibrate(saved, data, 0.5, max_length=12)
    assert 0 < result.n < 40
    members = [folder / "rm0", folder / "rm1"]
    with pytest.raises(ConfigError, match="whatever the coefficient"):
        calibrate(UserReward(members, "ensemble", form="worst"), data, 0.5)


@pytest.mark.parametrize("conversational", [False, True])
def test_references_are_sampled_once_per_prompt_and_user(saved, conversational):
    asked = requests(4, conversational=conversational)
    double = {name: [value for value in values for _ in range(2)] for name, values in asked.items()}
    policy = tiny_causal()
    torch.manual_seed(0)
    sampled = SampledReferences(policy, TOKENIZER, num=3, max_new_tokens=4)
    found = sampled(double["prompts"], double["user_id"])
    assert [len(references) for references in found] == [3] * 8 and found[::2] == found[1::2]
    assert all(
        isinstance(reference, list if conversational else str) for references in found for reference in references
    )
    # the reward is that of the mean of these very completions taken off
    reward = UserReward(saved, reference=lambda prompts, user_ids: found)
    plain = UserReward(saved)
    expected = [
        plain.score([prompt], [completion], [user]).mean.item()
        - plain.score([prompt] * 3, references, [user] * 3).mean.mean().item()
        for prompt, completion, user, references in zip(
            double["prompts"], double["completions"], double["user_id"], found, strict=True
        )
    ]
    assert reward(**double) == pytest.approx(expected, abs=1e-4)


def test_references_of_a_personal_policy_are_each_users_own(tmp_path):
    config = ShareLoraConfig(task_type="CAUSAL_LM", users=USERS, r=4, target_modules=TARGETS)
    policy = moved(get_peft_model(tiny_causal(), config), 0)
    sampled = SampledReferences(policy, TOKENIZER, max_new_tokens=6, do_sample=False)
    prompts = ["w1 w2"] * 3
    found = sampled(prompts, USERS)
    with use_users(policy, ["bob"]), torch.no_grad():
        batch = TOKENIZER(prompts[:1], return_tensors="pt")
        output = policy.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=TOKENIZER.pad_token_id,
        )
    assert found[1] == TOKENIZER.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found[0] != found[1] or found[1] != found[2]


def test_the_ellipsoid_of_the_base_knows_features_without_the_adapter_and_pools(saved):
    data, chosen, rejected = comparisons()
    fit_confidence(saved, data, parameters="base")
    reward = UserReward(saved, "ellipsoid")
    assert (reward.parameters, reward.sets.pooled_discount) == ("base", 0.03)
    trainable = {name: p.requires_grad for name, p in reward.scorer.model.named_parameters()}
    asked = requests(9)
    found = reward.score(asked["prompts"], asked["completions"], asked["user_id"])
    torch.testing.assert_close(
        found.mean, UserReward(saved).score(asked["prompts"], asked["completions"], asked["user_id"]).mean
    )
    assert {name: p.requires_grad for name, p in reward.scorer.model.named_parameters()} == trainable

    base = AutoModelForSequenceClassification.from_pretrained(
        reward.scorer.config.base_model_name_or_path, num_labels=1, dtype=torch.float32
    )

    def last(prompt, completion):
        with torch.no_grad():
            return base.model(input_ids=ids_of(prompt, completion).reshape(1, -1)).last_hidden_state[0, -1]

    sides = [
        torch.stack([last(*row) for row in zip(side["prompts"], side["completions"], strict=True)])
        for side in (chosen, rejected)
    ]
    users = reward.scorer.users.index(chosen["user_id"])
    z, phi = (
        sides[0] - sides[1],
        torch.stack([last(*row) for row in zip(asked["prompts"], asked["completions"], strict=True)]),
    )
    own = [z[torch.tensor(users) == user] for user in range(3)]
    phi = phi - torch.cat(sides).mean(0)
    scale = z.double().square().mean()
    pooled = scale * torch.eye(z.shape[1], dtype=torch.float64) + 0.03 * z.double().mT @ z.double()
    for place, user in enumerate(reward.scorer.users.index(asked["user_id"])):
        sigma = pooled + own[user].double().mT @ own[user].double()
        width = (phi[place].double() @ sigma.inverse() @ phi[place].double()).sqrt()
        assert found.std[place].item() == pytest.approx(width.item(), rel=1e-3)


# -- pseudonyms


def test_no_message_and_no_record_of_a_pseudonymous_reward_has_an_id(caplog):
    """Neither of a user who is known, nor of one who is not, nor of what can be no id."""
    users = UserRegistry([f"{name}-77c1" for name in USERS], key=b"k" * 32)
    model = make(users=users).eval()
    model.config.pad_token_id = TOKENIZER.pad_token_id
    asked = requests(6, users=[f"{name}-77c1" for name in USERS])
    seen = []

    def reference(prompts, user_ids):
        seen.append(user_ids)
        return [["w1"] for _ in prompts]

    reward = UserReward(model, processing_class=TOKENIZER, reference=reference, pessimism="ball")
    assert reward(**asked) and seen == [asked["user_id"]]  # the caller's own function is given the caller's ids
    said = []
    for error, changed in (
        (UnknownUserError, {"user_id": ["eve-77c1"] * 6}),
        (UserIdError, {"user_id": ["eve-77c1" * 50] * 6}),
        (UserIdError, {"user_id": [77.125] * 6}),
    ):
        with pytest.raises(error) as raised:
            reward(**asked | changed)
        said.append(str(raised.value))
    with caplog.at_level(logging.DEBUG):
        UserReward(model, processing_class=TOKENIZER, unseen="common")(**asked | {"user_id": ["eve-77c1"] * 6})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError) as raised:
        UserReward(model, processing_class=TOKENIZER)(**asked)
    said.append(str(raised.value))
    assert users.names(["eve-77c1"])[0] in said[0] and users[0] in said[-1]
    assert "77c1" not in caplog.text and not any("77c1" in text or "77.125" in text for text in said)
