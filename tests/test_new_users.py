"""Users who arrive after the training, against slow loops, scipy in float64 and numerical integration."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import MAX_POSITIONS, preference_rows, save_tiny, tiny_model, tiny_tokenizer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy import integrate, optimize, special, stats
from transformers import AutoModelForSequenceClassification

from trl_sharelora import (
    ShareLoraConfig,
    ShareLoraRewardConfig,
    ShareLoraRewardTrainer,
    evaluate_users,
    export_user,
    use_users,
)
from trl_sharelora import new_users as new_users_module
from trl_sharelora.cli import main
from trl_sharelora.confidence import fit_confidence, load_sets
from trl_sharelora.data import tokenize_preference
from trl_sharelora.errors import ConfigError, DataError, NonFiniteError, UnknownUserError, UserIdError
from trl_sharelora.new_users import (
    HYPOTHESES,
    METHODS,
    _crossing,
    _Evidence,
    _Fit,
    _fold_masks,
    _greedy,
    _held_out,
    _information,
    _logistic,
    _Pairs,
    _Passes,
    _posteriors,
    _UserMoves,
    add_users,
    fit_users,
    next_comparisons,
    user_spread,
)
from trl_sharelora.scoring import Scorer, load_reward_model
from trl_sharelora.sharelora.bank import ResidentBank
from trl_sharelora.sharelora.routing import get_router
from trl_sharelora.users import UserRegistry


USERS = [f"user{number}" for number in range(8)]
FORMS = [("B", False), ("A", False), ("AB", False), ("diagonal", False), ("none", False), ("none", True), ("B", True)]
TARGETS = ["q_proj", "down_proj"]
TOKENIZER = tiny_tokenizer()


def reward_model(share="B", bank="resident", personal_head=False, seed=0, directory=None, base=None, **config):
    """A tiny reward model whose users have random moves along three directions and a little beside."""
    torch.manual_seed(seed)
    config = ShareLoraConfig(
        task_type="SEQ_CLS",
        r=2,
        target_modules=TARGETS,
        share=share,
        users=USERS,
        bank=bank,
        personal_head=personal_head,
        init_lora_weights=False,
        **config,
    )
    model = get_peft_model(tiny_model() if base is None else base, config).eval()
    moves = _UserMoves(model)
    generator = torch.Generator().manual_seed(seed + 1)
    directions = torch.randn(3, moves.entries, generator=generator)
    for row in range(len(USERS)):
        size = torch.randn(3, generator=generator) * torch.tensor([0.1, 0.05, 0.03])
        moves.write(
            row, 0.02 * directions[0] + size @ directions + 0.003 * torch.randn(moves.entries, generator=generator)
        )
    return model


def pairs_of(rows, users):
    tokens = [tokenize_preference(row, TOKENIZER) for row in rows]
    return _Pairs([one["chosen_ids"] for one in tokens], [one["rejected_ids"] for one in tokens], torch.tensor(users))


def answers(users=("new0", "new1"), n=24, seed=5):
    return Dataset.from_list(preference_rows(list(users), n, seed=seed))


def everything(model, leave_out=()):
    """All numbers of a model: shared tensors, and rows and moments of the users who are not left out."""
    router = get_router(model)
    found = {}
    rows = [row for row, user in enumerate(router.users) if user not in leave_out]
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        own = ".sharelora_A.default.weight" in name and tensor.ndim == 3 or ".moves.weight" in name
        found[name] = (tensor[rows] if own else tensor).detach().clone()
    for name, working_set in router.working_sets.items():
        working_set.flush()
        found[f"records {name}"] = working_set.store.read(rows).clone()
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def margins_of(model, rows, user_ids):
    """By the public way: a route, a forward per row."""
    found = []
    with torch.no_grad():
        for row, user_id in zip(rows, user_ids, strict=True):
            tokens = tokenize_preference(row, TOKENIZER)
            with use_users(model, [user_id]):
                chosen, rejected = (
                    model(input_ids=torch.tensor([tokens[side]])).logits[0, 0]
                    for side in ("chosen_ids", "rejected_ids")
                )
            found.append(float(chosen - rejected))
    return torch.tensor(found, dtype=torch.float64)


# -- new rows


@pytest.mark.parametrize(
    ("bank", "config"), [("resident", {}), ("ram", {}), ("resident", {"share": "none", "personal_head": True})]
)
def test_users_are_added_at_a_cost_in_proportion_to_their_number(bank, config):
    def seconds(count):
        times = []
        for _ in range(3):
            model = reward_model(bank=bank, **config)
            start = time.process_time()
            add_users(model, [f"new{number}" for number in range(count)])
            times.append(time.process_time() - start)
        return min(times), model

    few, _ = seconds(1000)
    many, model = seconds(10_000)
    assert many < 15 * few  # a cost that grows with the square would be 100 times as high
    before = reward_model(bank=bank, **config)
    assert len(get_router(model).users) == 10_008
    assert torch.equal(_UserMoves(model).read(range(8)), _UserMoves(before).read(range(8)))
    assert not _UserMoves(model).read([8, 5000, 10_007]).any()
    rows = preference_rows(["x"], 2)
    with torch.no_grad():
        expected = [
            float(v)
            for v in _Passes(Scorer(before, TOKENIZER, 4)).margins(
                pairs_of(rows, [0, 0]), torch.zeros(1, _UserMoves(before).entries)
            )
        ]
    assert margins_of(model, rows, ["new9999", "new0"]).tolist() == pytest.approx(expected, abs=1e-5)


# -- passes


@pytest.mark.parametrize(("share", "personal_head"), FORMS)
@pytest.mark.parametrize("users", [[0, 1, 2, 3, 1, 1, 0], [3] * 7], ids=["different", "alike"])
def test_one_pass_gives_what_a_loop_of_autograd_gives(share, personal_head, users):
    """Also where all are at the same move, which is computed with merged weights, and for texts of different lengths: padding is left out."""
    model = reward_model(share, personal_head=personal_head)
    rows = preference_rows(USERS, 7)
    passes = _Passes(Scorer(model, TOKENIZER, 4))
    moves = passes.bank.read([0, 1, 2, 3] if len(set(users)) > 1 else [3] * 4)
    margins, gradients = passes.linearise(pairs_of(rows, users), moves, None)
    expected = margins_of(model, rows, [USERS[user] for user in users])
    torch.testing.assert_close(margins, expected, rtol=1e-4, atol=1e-5)
    banks = [bank.weight for bank in passes.bank.banks]
    for number, (row, user) in enumerate(zip(rows, users, strict=True)):
        model.zero_grad()
        tokens = tokenize_preference(row, TOKENIZER)
        for side, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
            with use_users(model, [USERS[user]]):
                (sign * model(input_ids=torch.tensor([tokens[side]])).logits.sum()).backward()
        by_loop = torch.cat([weight.grad[user].flatten() for weight in banks])
        torch.testing.assert_close(gradients[number], by_loop, rtol=1e-3, atol=1e-5)
    basis = torch.randn(3, passes.bank.entries)
    _, along = passes.linearise(pairs_of(rows, users), moves, basis)
    torch.testing.assert_close(along.float(), gradients @ basis.T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(passes.margins(pairs_of(rows, users), moves), margins, rtol=1e-4, atol=1e-5)
    assert passes.passes == 3 and not any("rows" in bank.__dict__ for bank in passes.bank.banks)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("bank", ["ram", "mmap"])
def test_a_pass_is_the_same_over_a_store(bank):
    rows, users = preference_rows(USERS, 6), [0, 1, 2, 0, 1, 2]
    found = []
    for kind in ("resident", bank):
        passes = _Passes(Scorer(reward_model(bank=kind), TOKENIZER, 4))
        found.append(passes.linearise(pairs_of(rows, users), passes.bank.read([0, 3, 5]), None))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


# -- the prior


def test_the_spread_is_the_singular_value_decomposition_of_the_stacked_moves():
    model = reward_model()
    moves = _UserMoves(model).read(range(8)).double()
    spread = user_spread(model, k=3)
    u, s, v = torch.linalg.svd(moves - moves.mean(0), full_matrices=False)
    torch.testing.assert_close(spread.scales.double(), s[:3] / math.sqrt(7), rtol=1e-4, atol=0)
    torch.testing.assert_close(spread.mean.double(), moves.mean(0), rtol=1e-5, atol=1e-6)
    assert (spread.directions.double() @ v[:3].T).abs().diag().tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert spread.explained == pytest.approx(float((s[:3] ** 2).sum() / (s**2).sum()), abs=1e-5)
    torch.testing.assert_close(spread.directions @ spread.directions.T, torch.eye(3), rtol=0, atol=1e-5)
    assert user_spread(model).explained >= 0.9 and len(user_spread(model).scales) == 4  # the fewest


def test_the_noise_of_the_training_is_taken_off_the_spread_of_many_users():
    """Two directions in which users differ, and as much noise in each of 384 entries: the sample's variances are too large by it."""
    model = reward_model()
    users = [f"more{number}" for number in range(32)]
    add_users(model, users)
    bank = _UserMoves(model)
    draw = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(bank.entries, 2, generator=draw)).Q.T
    tastes = torch.randn(32, 2, generator=draw)
    tastes = torch.linalg.svd(tastes - tastes.mean(0), full_matrices=False).U * math.sqrt(
        31
    )  # variance 1, uncorrelated
    noise = 0.25 * torch.randn(32, bank.entries, generator=draw)
    for row, move in zip(
        get_router(model).users.index(users), tastes * torch.tensor([2.0, 1.5]) @ directions + noise, strict=True
    ):
        bank.write(row, move)
    spread = user_spread(model, users)
    per_direction = 0.25**2 * bank.entries / 31  # all the noise's variance over the sample's 31 directions
    assert spread.scales[:2].tolist() == pytest.approx([2.0, 1.5], rel=0.1)
    raw = torch.linalg.svdvals((bank.read(get_router(model).users.index(users)) - spread.mean).double()) / math.sqrt(
        31
    )
    assert raw[:2].square().tolist() == pytest.approx([4 + per_direction, 2.25 + per_direction], rel=0.15)
    assert per_direction > 0.7 and spread.scales[2:].square().max() < 0.9 * per_direction
    assert (spread.directions[:2] @ directions.T).abs().diag().min() > 0.75


@pytest.mark.parametrize("users", [15, 16, 40])
def test_tastes_without_noise_are_not_taken_for_noise(users):
    """Moves of rank three, as of `shrink_users` with few directions or of a personal part of a few numbers: the other directions are all zero."""
    model = reward_model()
    ids = [f"more{number}" for number in range(users)]
    add_users(model, ids)
    bank = _UserMoves(model)
    draw = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(bank.entries, 3, generator=draw)).Q.T
    tastes = torch.randn(users, 3, generator=draw) * torch.tensor([1.0, 0.9, 0.8])
    for row, move in zip(get_router(model).users.index(ids), tastes @ directions, strict=True):
        bank.write(row, move)
    expected = torch.linalg.svdvals(tastes - tastes.mean(0)) / math.sqrt(users - 1)
    spread = user_spread(model, ids)
    torch.testing.assert_close(spread.scales, expected, rtol=1e-4, atol=0)
    # also where others are named whose comparisons are none
    more = user_spread(model, [*ids, *USERS], comparisons=dict.fromkeys(ids, 3))
    torch.testing.assert_close(more.scales, expected, rtol=1e-3, atol=0)


def test_users_weigh_by_their_comparisons_and_who_has_not_moved_does_not_count():
    model = reward_model()
    moves = _UserMoves(model).read(range(8)).double().numpy()
    counts = [1, 5, 3, 2, 10, 4, 7, 1]
    spread = user_spread(model, comparisons=dict(zip(USERS, counts, strict=True)), k=3)
    # frequency weights of numpy would divide by the sum minus one; these are weights of importance
    covariance = np.cov(moves.T, aweights=counts)
    expected = np.sqrt(np.linalg.eigvalsh(covariance)[::-1][:3])
    assert spread.scales.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    add_users(model, ["new"])
    assert user_spread(model).n_users == 8 == user_spread(model, [*USERS, "new"]).n_users
    for wrong in ({"k": 0}, {"k": True}, {"comparisons": {"user0": 3}}, {"user_ids": USERS[:2]}):
        with pytest.raises(ConfigError):
            user_spread(model, **wrong)
    with pytest.raises(UnknownUserError):
        user_spread(model, ["nobody"])
    _UserMoves(model).write(2, torch.full((_UserMoves(model).entries,), math.nan))
    with pytest.raises(NonFiniteError, match="'user2'"):
        user_spread(model)


def test_newcomers_who_were_only_fitted_are_no_prior_for_the_next_ones(tmp_path):
    """Fits to a few answers stay near the common model: as part of the prior they would pull everybody after them there."""
    model = reward_model()
    before = user_spread(model)
    add_users(model, ["added"])
    for number in range(2):
        found = fit_users(model, answers([f"new{number}", "added"], n=6, seed=number), TOKENIZER, refit=True)
        assert found.spread.n_users == 8
    torch.testing.assert_close(found.spread.scales, before.scales)
    assert user_spread(model).n_users == 8 and user_spread(model, [*USERS, "new0"]).n_users == 9
    assert model.peft_config["default"].trained_users == 8
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert user_spread(loaded).n_users == 8
    assert fit_users(loaded, answers(["later"]), TOKENIZER).spread.n_users == 8
    add_users(loaded, USERS)  # nobody new
    assert add_users(reward_model(), USERS) == list(range(8)) and loaded.peft_config["default"].trained_users == 8


@pytest.mark.parametrize(("rate", "trained"), [(1e-3, None), (0.0, 8)])
def test_after_a_training_of_their_rows_all_users_are_the_prior(rate, trained, tmp_path):
    model = reward_model()
    fit_users(model, answers(), TOKENIZER)
    arguments = ShareLoraRewardConfig(
        output_dir=str(tmp_path), max_steps=1, learning_rate=rate, learning_rate_shared=1e-3, use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list(preference_rows([*USERS, "new0", "new1"], 20))
    trainer = ShareLoraRewardTrainer(model=model, args=arguments, train_dataset=rows, processing_class=TOKENIZER)
    assert model.peft_config["default"].trained_users == 8
    trainer.train()
    assert model.peft_config["default"].trained_users == trained
    assert user_spread(model).n_users == (10 if trained is None else 8)


# -- the small problem


def test_the_logistic_problem_against_scipy_and_its_evidence_against_integration():
    draw = np.random.default_rng(0)
    features, offsets = draw.normal(size=(9, 3)), draw.normal(size=9)
    for tau in (0.3, 1.0, 3.0):

        def objective(y, tau=tau):
            return np.logaddexp(0, -(offsets + features @ y)).sum() + (y**2).sum() / tau**2 / 2

        expected = optimize.minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-9})
        found = _logistic(
            torch.tensor(features), torch.tensor(offsets)[None], torch.tensor([tau], dtype=torch.float64)
        )
        assert found.y[0].tolist() == pytest.approx(expected.x.tolist(), abs=1e-6)
        wrong = special.expit(-(offsets + features @ expected.x))
        hessian = features.T * (wrong * (1 - wrong)) @ features + np.eye(3) / tau**2
        assert np.allclose(found.covariance[0].numpy(), np.linalg.inv(hessian), atol=1e-7)
    one = features[:, :1]
    exact, _ = integrate.quad(
        lambda y: special.expit(offsets + one[:, 0] * y).prod() * stats.norm.pdf(y), -12, 12, epsabs=1e-14
    )
    found = _logistic(torch.tensor(one), torch.tensor(offsets)[None], torch.ones(1, dtype=torch.float64))
    assert float(found.evidence) == pytest.approx(math.log(exact), abs=0.1)  # Laplace
    nothing = _logistic(torch.tensor(one), torch.tensor(offsets)[None], torch.zeros(1, dtype=torch.float64))
    assert float(nothing.evidence) == pytest.approx(float(np.log(special.expit(offsets)).sum()))
    assert float(nothing.y) == 0 and float(nothing.covariance) == 0


def test_newtons_method_holds_where_the_answers_are_separable():
    features = torch.tensor([[30.0], [20.0], [50.0]], dtype=torch.float64)
    found = _logistic(
        features, torch.full((1, 3), -40.0, dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    )
    expected = optimize.minimize_scalar(
        lambda y: np.logaddexp(0, 40 - features[:, 0].numpy() * y).sum() + y**2 / 8,
        bounds=(0, 10),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert float(found.y) == pytest.approx(expected.x, abs=1e-5)


def test_hypotheses_are_weighed_by_their_evidence():
    gradients = torch.tensor([[1.0, 0.5], [2.0, -0.3], [0.5, 1.0]], dtype=torch.float64)
    constants = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    masks = torch.tensor([[1.0, 1, 1], [0, 1, 1]], dtype=torch.float64)
    hypotheses = ((0.0, 0.0, 0.8), (1.0, 0.0, 0.2))
    weights = torch.tensor([0.8, 0.2], dtype=torch.float64)
    common, left_out = _posteriors(constants, gradients, masks, hypotheses)
    evidence = torch.stack([torch.sigmoid(constants).prod(), torch.sigmoid(constants + gradients[:, 0]).prod()])
    likelihoods = weights * evidence
    assert common.weights.tolist() == pytest.approx((likelihoods / likelihoods.sum()).tolist())
    assert common.mean.tolist() == pytest.approx([float(common.weights[1]), 0.0])
    alike = evidence / evidence.sum()
    assert float(common.covariance[0, 0]) == pytest.approx(float(alike.prod()))  # of a coin, were they alike before
    likelihoods = weights * torch.stack(
        [torch.sigmoid(constants[1:]).prod(), torch.sigmoid((constants + gradients[:, 0])[1:]).prod()]
    )
    assert left_out.weights.tolist() == pytest.approx((likelihoods / likelihoods.sum()).tolist())
    # the common model's own margins, where they are known
    own = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    likelihoods = weights * torch.stack([torch.sigmoid(own).prod(), evidence[1]])
    known = _posteriors(constants, gradients, masks, hypotheses, own)[0]
    assert known.weights.tolist() == pytest.approx((likelihoods / likelihoods.sum()).tolist())
    assert sum(weight for *_, weight in HYPOTHESES) == pytest.approx(1) and HYPOTHESES[0][:2] == (0, 0)


def test_held_out_answers_take_back_what_does_not_hold_and_leave_what_does():
    pairs = torch.arange(7)
    assert _fold_masks(pairs).sum(0).tolist() == [1] * 7 and _fold_masks(pairs).sum(1).tolist() == [2, 2, 1, 1, 1]
    # both answers to a pair are held out together
    assert _fold_masks(torch.tensor([0, 1, 0, 2])).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(60, generator=draw, dtype=torch.float64).abs()  # right each time
    harmful = _held_out(common, -3 * common)
    assert (
        harmful.shrinkage < 0.1 and harmful.gain < 0 and harmful.accuracy_common == 1 and harmful.accuracy_fitted == 0
    )
    helpful = _held_out(-common, 3 * common)
    assert helpful.shrinkage > 0.9 and helpful.gain > 0 and helpful.accuracy_fitted == 1
    assert _held_out(common[:1], common[:1]).shrinkage == pytest.approx(0.95, abs=0.03)  # a single answer says little
    assert isinstance(helpful, _Evidence) and math.isnan(_Evidence().gain)


# -- fits


def test_pca_is_the_mode_of_the_real_posterior():
    model = reward_model()
    rows = preference_rows(["new"], 16, seed=3)
    spread = user_spread(model, k=4)
    spread.scales *= 0.2  # this random model is not convex far away from the mean
    passes = _Passes(Scorer(model, TOKENIZER, 16))
    pairs = pairs_of(rows, [0] * 16)
    fit = _Fit(passes, pairs, 1, spread, ["new"])
    fit.run("pca")
    passed = passes.passes

    def objective(y):
        move = torch.tensor([1.0, *y]).float() @ spread.basis
        margins = passes.margins(pairs, move[None]).numpy()
        return np.logaddexp(0, -margins).sum() + (y**2).sum() / 2

    expected = optimize.minimize(objective, np.zeros(4), method="L-BFGS-B", options={"eps": 1e-2})
    found = torch.linalg.lstsq(spread.basis.T, (fit.moves[0] - spread.mean)[:, None]).solution[1:, 0].double().numpy()
    assert objective(found) <= expected.fun + 5e-3 and np.abs(found - expected.x).max() < 0.15
    assert objective(found) < objective(np.zeros(4)) - 0.03 and passed <= 7


@pytest.mark.parametrize(
    ("method", "share", "personal_head"),
    [(method, "B", False) for method in METHODS]
    + [("auto", "A", False), ("auto", "AB", False), ("auto", "none", True)],
)
def test_every_method_follows_answers_that_the_prior_allows(method, share, personal_head):
    """A newcomer who is in truth one of the users, away from the mean, and answers without noise."""
    model = reward_model(share, personal_head=personal_head)
    moves = _UserMoves(model).read(range(8))
    truth = USERS[int((moves - moves.mean(0)).norm(dim=1).argmax())]
    rows = preference_rows(["new"], 104, seed=9)
    margins = margins_of(model, rows, [truth] * 104)
    for row, margin in zip(rows, margins.tolist(), strict=True):
        if margin < 0:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    train, test = rows[:24], rows[24:]
    add_users(model, ["nobody"])
    common = float((margins_of(model, test, ["nobody"] * 80) > 0).double().mean())
    result = fit_users(model, Dataset.from_list(train), TOKENIZER, method)
    fitted = float((margins_of(model, test, ["new"] * 80) > 0).double().mean())
    assert method == "full" or fitted >= common - 0.05
    found = margins_of(model, train, ["new"] * 24)
    assert (
        np.logaddexp(0, -found.numpy()).mean()
        < np.logaddexp(0, -margins_of(model, train, ["nobody"] * 24).numpy()).mean()
    )
    assert result.table["n"].tolist() == [24] and 0 < result.table["shrinkage"][0] <= 1


@pytest.mark.parametrize("bank", ["resident", "ram", "mmap"])
@pytest.mark.parametrize("method", METHODS)
def test_everything_else_stays_bit_identical_and_the_fit_is_saved_and_exported(method, bank, tmp_path):
    model = reward_model(bank=bank)
    trained = _UserMoves(model)
    for working_set in get_router(model).working_sets.values():  # moments, as after a training
        lease = working_set.acquire(torch.arange(8))
        working_set.exp_avg[lease.slots] = 0.5
        working_set.step[lease.slots] = 7
        working_set.stepped(lease.slots.tolist())
        working_set.release(lease)
    before = everything(model)
    mode, trainable = model.training, {name for name, p in model.named_parameters() if p.requires_grad}
    result = fit_users(model, answers(), TOKENIZER, method)
    assert_same(everything(model, leave_out=("new0", "new1")), before)
    assert model.training == mode and {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert trained.read([8, 9]).any(1).all()
    assert result.n_users == 2 and result.n == 24 and list(result.table["user_id"]) == ["new0", "new1"]
    model.save_pretrained(tmp_path / "rm")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "rm").eval()
    rows = preference_rows(["new0", "new1", "user3"], 6)
    expected = margins_of(model, rows, [row["user_id"] for row in rows])
    assert torch.equal(margins_of(loaded, rows, [row["user_id"] for row in rows]), expected)
    export_user(tmp_path / "rm", "new0", tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "plain").eval()
    tokens = tokenize_preference(rows[0], TOKENIZER)
    with torch.no_grad():
        chosen, rejected = (
            plain(input_ids=torch.tensor([tokens[s]])).logits[0, 0] for s in ("chosen_ids", "rejected_ids")
        )
    assert float(chosen - rejected) == pytest.approx(float(expected[0]), abs=1e-5)


@pytest.mark.parametrize("several", [True, False], ids=["spread", "no spread"])
@pytest.mark.parametrize("method", ["auto", "full"])
def test_nobodys_fit_depends_on_who_else_is_there(method, several):
    spread = user_spread(reward_model()) if several else None
    found = []
    for users in (["new0"], ["new0", "new1", "new2"]):
        rows = [row for row in preference_rows(["new0", "new1", "new2"], 60) if row["user_id"] in users]
        model = reward_model()
        if not several:
            model.peft_config["default"].trained_users = 2  # too few for a spread
        result = fit_users(model, Dataset.from_list(rows), TOKENIZER, method, spread=spread)
        found.append((_UserMoves(model).read(get_router(model).users.index(["new0"])), result.table.iloc[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-5)
    assert found[0][1]["shrinkage"] == pytest.approx(found[1][1]["shrinkage"], abs=1e-4)


def test_users_without_a_spread_are_fitted_with_all_entries_alike():
    """Against the explicit problem in all entries: a sum of gradients is the best move, and its size is the evidence's."""
    torch.manual_seed(0)
    config = ShareLoraConfig(task_type="SEQ_CLS", r=2, target_modules=TARGETS, users=["only"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config).eval()
    rows = preference_rows(["new"], 6)
    passes = _Passes(Scorer(model, TOKENIZER, 4))
    fit = _Fit(passes, pairs_of(rows, [0] * 6), 1, None, ["new"])
    fit.run("gauss-newton")
    margins, gradients = passes.linearise(pairs_of(rows, [0] * 6), torch.zeros(1, passes.bank.entries), None)
    projected = gradients.T @ torch.linalg.lstsq(gradients.T, fit.moves.T).solution
    torch.testing.assert_close(projected.T, fit.moves, rtol=1e-2, atol=1e-4)
    assert bool((gradients @ fit.moves[0] > 0).double().mean() > 0.5)
    result = fit_users(model, Dataset.from_list(rows), TOKENIZER)
    assert result.spread is None and result.table["method"].tolist() == ["gauss-newton"] and "no spread" in str(result)
    with pytest.raises(ConfigError, match="fit was made without a spread"):
        next_comparisons(model, "new", Dataset.from_list(rows), 3, TOKENIZER, fit=result)
    with pytest.raises(ConfigError, match="at least 3 is needed"):
        fit_users(model, answers(["other"]), TOKENIZER, "pca")
    assert "other" not in get_router(model).users


# -- what came


def test_who_has_a_model_already_is_refused_and_refitted_on_demand():
    model = reward_model()
    before = everything(model)
    with pytest.raises(UserIdError, match="1 of 2 newcomers have a model of their own already: 'user3'"):
        fit_users(model, answers(["user3", "new0"]), TOKENIZER)
    assert_same(everything(model), before)
    result = fit_users(model, answers(["user3", "new0"]), TOKENIZER, refit=True)
    assert result.spread.n_users == 7  # not a prior for himself
    after = everything(model, leave_out=("user3", "new0"))
    expected = everything(reward_model(), leave_out=("user3",))
    assert_same(after, expected)
    add_users(model, ["added"])  # the common model so far: nothing to be replaced
    assert fit_users(model, answers(["added"]), TOKENIZER).n_users == 1


def test_answers_that_cannot_be_used_are_counted_per_user_and_contradictions_count_twice():
    rows = preference_rows(["new0", "new1", "new2"], 30)
    long = " ".join(["w1"] * (MAX_POSITIONS + 5))
    rows[0]["chosen"] = long
    rows[4] |= {"chosen": "zzz", "rejected": "yyy"}  # both are <unk> to this tokenizer
    for number in range(2, 30, 3):
        rows[number]["chosen"] = long
    rows.append(dict(rows[3], chosen=rows[3]["rejected"], rejected=rows[3]["chosen"]))
    model = reward_model()
    result = fit_users(model, Dataset.from_list(rows), TOKENIZER)
    table = result.table.set_index("user_id")
    assert table["dropped"].to_dict() == {"new0": 1, "new1": 1, "new2": 10}
    assert table["n"].to_dict() == {"new0": 10, "new1": 9, "new2": 0}
    assert table["contradictions"].to_dict() == {"new0": 1, "new1": 0, "new2": 0}
    assert table["method"]["new2"] == "common" and table["shrinkage"]["new2"] == 0
    assert "answered both ways, by 1 users" in str(result) and "12 dropped" in str(result)
    assert not _UserMoves(model).read(get_router(model).users.index(["new2"])).any()
    shorter = fit_users(reward_model(), Dataset.from_list(rows), TOKENIZER, max_length=8)
    assert shorter.dropped > 12


@pytest.mark.parametrize(("method", "several"), [("auto", True), ("full", True), ("auto", False)])
def test_an_answer_that_is_repeated_counts_once(method, several, caplog):
    """Six answers that come three times are six, in the fit, in the folds and for how far the fit goes (eighteen would be refined further)."""
    rows, found = preference_rows(["new"], 6, seed=4), []
    rows[5] |= {"prompt": rows[0]["prompt"], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    for more in ([], [*rows[:5], *rows[:5], *rows[:3]]):
        model = reward_model()
        if not several:
            for row in range(8):
                _UserMoves(model).write(row, torch.zeros(_UserMoves(model).entries))
        result = fit_users(model, Dataset.from_list(rows + more), TOKENIZER, method)
        found.append((result.table, _UserMoves(model).read(get_router(model).users.index(["new"])), result.n))
    (once, move, n), (often, other, m) = found
    assert once["duplicates"].tolist() == [0] and often["duplicates"].tolist() == [13] and n == m == 6
    assert "13 of 19 comparisons repeat an answer of the same user" in caplog.text
    assert once.drop(columns="duplicates").equals(often.drop(columns="duplicates"))
    assert once["contradictions"].tolist() == [1] and torch.equal(move, other)


def test_of_a_single_pair_nothing_is_held_out_however_often_it_is_answered():
    rows = preference_rows(["new"], 1)
    both = [rows[0], dict(rows[0], chosen=rows[0]["rejected"], rejected=rows[0]["chosen"])]
    for given in (rows * 9, both * 4):
        table = fit_users(reward_model(), Dataset.from_list(given), TOKENIZER).table
        assert table["gain"].isna().all() and 0 < table["shrinkage"][0] < 1


def test_the_confidence_set_counts_a_repeated_answer_once():
    rows, widths = preference_rows(["new"], 5), []
    for given in (rows, rows * 4):
        model = reward_model()
        sets = fit_confidence(model, Dataset.from_list(preference_rows(USERS, 40)), TOKENIZER, save=False)
        fit_users(model, Dataset.from_list(given), TOKENIZER, sets=sets)
        features = torch.randn(4, sets.feature_size, generator=torch.Generator().manual_seed(0))
        widths.append(sets.width(features, torch.tensor([8] * 4)))
    torch.testing.assert_close(*widths)


def test_opposite_answers_alone_pull_the_margin_to_zero():
    rows = preference_rows(["new"], 1)
    rows.append(dict(rows[0], chosen=rows[0]["rejected"], rejected=rows[0]["chosen"]))
    model = reward_model()
    spread = user_spread(model)
    mean = _Passes(Scorer(model, TOKENIZER, 4)).margins(pairs_of(rows, [0, 0]), spread.mean[None])
    result = fit_users(model, Dataset.from_list(rows), TOKENIZER, "pca", spread=spread)
    assert result.table["contradictions"].tolist() == [1]
    fitted = margins_of(model, rows, ["new"] * 2)
    assert float(fitted[0]) == pytest.approx(-float(fitted[1]), abs=1e-5)
    assert float(fitted[0].abs()) < float(mean[0].abs())  # one learns that he does not care


def test_one_answer_is_enough_and_none_is_an_error():
    model = reward_model()
    result = fit_users(model, answers(["new"], n=1), TOKENIZER)
    assert (
        result.table["n"].tolist() == [1]
        and result.table["gain"].isna().all()
        and 0 < result.table["shrinkage"][0] < 1
    )
    before = len(get_router(model).users)
    empty = answers(["x"], n=1).select([])
    with pytest.raises(DataError, match="It is empty: 0 rows"):
        fit_users(model, empty, TOKENIZER)
    with pytest.raises(ConfigError, match="method='best' is unknown"):
        fit_users(model, answers(), TOKENIZER, "best")
    with pytest.raises(DataError, match="There is no column 'who'"):
        fit_users(model, answers(), TOKENIZER, user_column="who")
    assert len(get_router(model).users) == before


def test_settings_that_cannot_be_used_add_nobody():
    model = reward_model()
    for wrong in (0, -1, True, "9", 2.0):
        with pytest.raises(ConfigError, match=f"max_length={wrong!r} came; a whole number of at least 1, or None"):
            fit_users(model, answers(), TOKENIZER, max_length=wrong)
        with pytest.raises(ConfigError, match="max_length="):
            next_comparisons(model, "user0", answers(), 3, TOKENIZER, max_length=wrong)
    for users in (5, None):
        with pytest.raises(ConfigError, match=f"{users!r} came as the users; a list of ids is needed"):
            add_users(model, users)
    for nothing in (None, "rm", {"default": model}):
        with pytest.raises(ConfigError, match=f"{type(nothing).__name__} came as the model; a PeftModel"):
            add_users(nothing, ["new0"])
    assert len(get_router(model).users) == 8


def test_the_spread_or_fit_of_another_adapter_is_named():
    model, other = reward_model(), reward_model("A")
    spread, fit = user_spread(other), fit_users(other, answers(["user0"]), TOKENIZER, refit=True)
    for wrong in ({"spread": spread}, {"fit": fit}):
        with pytest.raises(ConfigError, match="it was made from another one"):
            next_comparisons(model, "user0", answers(), 3, TOKENIZER, **wrong)
    with pytest.raises(ConfigError, match="it was made from another one"):
        fit_users(model, answers(), TOKENIZER, spread=spread)


def test_a_diverged_model_changes_nobody():
    model = reward_model()
    with torch.no_grad():
        model.base_model.model.model.norm.weight[3] = math.nan
    with pytest.raises(NonFiniteError, match=r"user\(s\) 'new0', 'new1'"):
        fit_users(model, answers(), TOKENIZER)
    assert "new0" not in get_router(model).users
    with pytest.raises(NonFiniteError, match="rewards of candidates"):
        next_comparisons(model, "user0", answers(), 3, TOKENIZER, spread=user_spread(reward_model()))


@pytest.mark.parametrize("several", [True, False], ids=["spread", "no spread"])
def test_a_model_that_diverged_is_told_from_a_fit_that_did(several):
    """The users by their ids, and not by their places among the newcomers."""
    model = reward_model()
    if not several:
        _UserMoves(model).write(0, torch.zeros(_UserMoves(model).entries))
        model.peft_config["default"].trained_users = 1
    add_users(model, ["0", "1"])
    spread = user_spread(model, USERS[1:]) if several else None
    with torch.no_grad():
        model.base_model.model.model.norm.weight[3] = math.nan
    with pytest.raises(NonFiniteError, match=r"user\(s\) 'yan', 'zoe'.*The model has diverged") as error:
        fit_users(model, answers(["yan", "zoe"]), TOKENIZER, "full", spread=spread)
    assert "learning rate" not in str(error.value) and "yan" not in get_router(model).users
    model = reward_model()
    with pytest.raises(NonFiniteError, match=r"The fit has diverged \(method='full'\)"):
        fit_users(
            model, answers(["yan"]), TOKENIZER, "full", spread=replace(user_spread(model), scales=torch.zeros(4))
        )


@pytest.mark.parametrize(("method", "bank"), [("auto", "resident"), ("full", "resident"), ("auto", "ram")])
def test_within_inference_mode_all_is_as_outside_and_can_be_trained_after(method, bank):
    found = []
    for mode in (True, False):
        model = reward_model(bank=bank)
        with torch.inference_mode(mode):
            fit = fit_users(model, answers(), TOKENIZER, method)
            asked = next_comparisons(model, "new0", answers(), 3, TOKENIZER, fit=fit)
            prior = next_comparisons(model, "user0", answers(), 3, TOKENIZER)
            own = _Passes(Scorer(model, TOKENIZER, 4)).margins(pairs_of(answers(), [0] * 24), fit.spread.mean[None])
        found.append((_UserMoves(model).read([8, 9]), asked.chosen, prior.chosen, own.tolist()))
        assert not any(
            bank.weight.is_inference() for bank in _UserMoves(model).banks if isinstance(bank, ResidentBank)
        )
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_a_saved_model_is_fitted_within_inference_mode(tmp_path):
    folder = saved_model(tmp_path)
    with torch.inference_mode():
        fit_users(folder, answers(), device="cpu")
    assert UserRegistry.load(folder).ids == [*USERS, "new0", "new1"]


def test_a_disabled_adapter_has_nobody_to_fit():
    model = reward_model()
    before = everything(model)
    with model.disable_adapter():
        with pytest.raises(ConfigError, match="is disabled.*leave the block"):
            fit_users(model, answers(), TOKENIZER)
        with pytest.raises(ConfigError, match="is disabled"):
            next_comparisons(model, "user0", answers(), 3, TOKENIZER)
    assert_same(everything(model), before)


def saved_model(folder, **config):
    """With its tokenizer and confidence sets of the trained users."""
    base = save_tiny("llama", folder / "base")
    model = reward_model(base=AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), **config)
    model.save_pretrained(folder / "rm")
    TOKENIZER.save_pretrained(folder / "rm")
    fit_confidence(str(folder / "rm"), Dataset.from_list(preference_rows(USERS, 40)), device="cpu")
    return folder / "rm"


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("add_comparisons", KeyboardInterrupt()),
        ("save_pretrained", OSError(28, "No space left on device")),
        ("_save_sets", KeyboardInterrupt()),
    ],
)
def test_a_save_that_is_cut_off_leaves_confidence_sets_that_can_be_used(where, error, tmp_path, monkeypatch):
    """The sets name the number of users, and with more of them than the model has they would be nobody's."""
    folder = saved_model(tmp_path)

    def cut_off(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel if where == "save_pretrained" else new_users_module, where, cut_off)
        with pytest.raises(type(error)):
            fit_users(folder, answers(), device="cpu")
    scorer = Scorer(*load_reward_model(folder, device="cpu"), 4)
    assert bool(load_sets(str(folder), "ellipsoid", scorer)[0].has(torch.arange(8)).all())
    there = where == "_save_sets"  # the model was saved before
    assert UserRegistry.load(folder).ids == [*USERS, *(["new0", "new1"] if there else [])]
    fit_users(folder, answers(), device="cpu", refit=there)
    scorer = Scorer(*load_reward_model(folder, device="cpu"), 4)
    assert bool(load_sets(str(folder), "ellipsoid", scorer)[0].has(torch.arange(10)).all())


@pytest.mark.parametrize("personal_head", [False, True])
def test_features_that_cannot_be_read_change_nobody_and_no_set(personal_head, monkeypatch):
    model = reward_model("none" if personal_head else "B", personal_head=personal_head)
    sets = fit_confidence(model, Dataset.from_list(preference_rows(USERS, 40)), TOKENIZER, save=False)
    fit_users(model, answers(["new"]), TOKENIZER, sets=sets)
    before, own = everything(model), {name: tensor.clone() for name, tensor in sets.tensors().items()}

    def cut_off(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(new_users_module, "add_comparisons", cut_off)
        with pytest.raises(KeyboardInterrupt):
            fit_users(model, answers(["new", "other"], seed=6), TOKENIZER, sets=sets, refit=True)
    assert_same(everything(model, leave_out=("other",)), before)
    assert not _UserMoves(model).read(get_router(model).users.index(["other"])).any()
    assert all(torch.equal(tensor, own[name]) for name, tensor in sets.tensors().items())
    fit_users(model, answers(["new", "other"], seed=6), TOKENIZER, sets=sets, refit=True)
    assert bool(sets.has(torch.tensor([8, 9])).all())


def test_the_newcomer_gets_the_confidence_set_that_everybody_has(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    del base
    model = reward_model()
    training = Dataset.from_list(preference_rows(USERS, 40))
    sets = fit_confidence(model, training, TOKENIZER, save=False)
    fit_users(model, answers(["new"]), TOKENIZER, sets=sets)
    index = torch.tensor([8])
    assert bool(sets.has(index).all()) and sets.num_users == 9
    features = torch.randn(1, sets.feature_size)
    assert float(sets.width(features, index)) < float(sets.width(features, torch.tensor([-1])))
    once = sets.offsets.clone()
    fit_users(model, answers(["new"]), TOKENIZER, sets=sets, refit=True)  # instead of the first, not on top
    assert torch.equal(sets.offsets, once)


# -- which pair next


def test_information_against_integration():
    for margin, variance in ((0.3, 0.5), (-2.0, 4.0), (0.0, 0.0), (3.0, 0.1)):

        def expect(function, margin=margin, variance=variance):
            if variance == 0:
                return function(margin)
            normal = stats.norm(margin, math.sqrt(variance))
            return integrate.quad(lambda m: function(m) * normal.pdf(m), *normal.ppf([1e-12, 1 - 1e-12]))[0]

        def entropy(p):
            return float(special.entr(p) + special.entr(1 - p))

        exact = entropy(expect(special.expit)) - expect(lambda m: entropy(special.expit(m)))
        found = float(
            _information(torch.tensor([margin], dtype=torch.float64), torch.tensor([variance], dtype=torch.float64))
        )
        assert found == pytest.approx(exact, abs=1e-6)


def test_a_pair_like_one_that_is_picked_already_tells_less():
    gradients = torch.tensor([[3.0, 0.0], [2.9, 0.0], [0.0, 2.5]], dtype=torch.float64)
    margins, covariance = torch.zeros(3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    order, told = _greedy(margins, gradients, covariance, 3)
    assert order == [0, 2, 1]  # by its own information alone the second would come second
    alone = _information(margins, gradients.square().sum(1))
    assert told[:2] == pytest.approx([float(alone[0]), float(alone[2])], abs=1e-9) and told[2] < float(alone[1])
    assert torch.equal(covariance, torch.eye(2, dtype=torch.float64))
    assert _greedy(margins, gradients, covariance, 2, [1, 0])[0] == [1, 0]
    assert _crossing([0, 1, 5], [0.0, 0.005, 0.025]) == pytest.approx(2.0) and _crossing([0, 5], [0.0, 0.0]) is None


def test_the_pairs_to_ask_tell_more_than_random_ones_and_the_end_is_foreseen():
    model = reward_model()
    add_users(model, ["new"])
    candidates = Dataset.from_list(
        [{k: v for k, v in row.items() if k != "user_id"} for row in preference_rows(1, 60)]
    )
    result = next_comparisons(model, "new", candidates, 5, TOKENIZER)
    assert len(result.chosen) == len(set(result.chosen)) == 5 == len(result.random)
    assert result.information > result.random_information > 0
    assert result.chosen[0] == int(result.table["row"][int(result.table["information"].argmax())])
    assert result.curve["gain"].iloc[-1] >= 0 and "nats expected" in str(result)
    soon = replace(result, answers_for_a_point=0.3, answers_low=0.1, answers_high=None)
    assert "about 1 more answers for +1 point (80 % of users: 1 to more than 50)" in str(soon)
    rows = [dict(candidates[row], user_id="new") for row in result.chosen]
    fit = fit_users(model, Dataset.from_list(rows), TOKENIZER)
    after = next_comparisons(model, "new", candidates, 5, TOKENIZER, fit=fit)
    asked = after.table.set_index("row").loc[result.chosen, "information"].mean()
    assert asked < result.table.set_index("row").loc[result.chosen, "information"].mean()
    again = next_comparisons(model, "new", candidates, 5, TOKENIZER, fit=fit)
    assert again.chosen == after.chosen and again.random == after.random


def test_candidates_that_cannot_be_asked():
    model = reward_model()
    rows = preference_rows(1, 4)
    equal = [dict(row, rejected=row["chosen"]) for row in rows]
    result = next_comparisons(model, "user0", Dataset.from_list(equal), 3, TOKENIZER)
    assert result.chosen == [] and "in all 4 candidates the two sides are equal" in str(result)
    turned = dict(rows[0], chosen=rows[0]["rejected"], rejected=rows[0]["chosen"])
    result = next_comparisons(model, "user0", Dataset.from_list([equal[1], rows[0], turned, rows[0]]), 3, TOKENIZER)
    assert result.chosen == [1] and "1 with equal sides, 2 the same as another" in result.note
    with pytest.raises(UnknownUserError, match="'nobody'"):
        next_comparisons(model, "nobody", Dataset.from_list(rows), 3, TOKENIZER)
    with pytest.raises(ConfigError, match="k=0 came"):
        next_comparisons(model, "user0", Dataset.from_list(rows), 0, TOKENIZER)
    with pytest.raises(DataError, match="It is empty"):
        next_comparisons(model, "user0", Dataset.from_list(rows).select([]), 3, TOKENIZER)
    with pytest.raises(ConfigError, match="no posterior of 'user0'"):
        next_comparisons(
            model, "user0", Dataset.from_list(rows), 3, TOKENIZER, fit=fit_users(model, answers(), TOKENIZER)
        )


# -- from the command line


def test_the_commands_change_a_saved_adapter(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base")
    model = reward_model(base=AutoModelForSequenceClassification.from_pretrained(base, num_labels=1))
    folder = tmp_path / "rm"
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    fit_confidence(str(folder), Dataset.from_list(preference_rows(USERS, 40)), device="cpu")
    (tmp_path / "ids.txt").write_text(
        "late\n\nuser1\n", encoding="utf-8-sig"
    )  # the mark of Windows' editors is no letter
    here = ["--model_name_or_path", str(folder), "--use_cpu"]
    assert main(["add-users", *here, "--users", "new0", "--users_file", str(tmp_path / "ids.txt")]) == 0
    assert "2 new users, 1 known already" in capsys.readouterr().out
    assert UserRegistry.load(folder).ids == [*USERS, "new0", "late"]
    rows = answers(["new0", "new1"])
    rows.to_json(tmp_path / "rows.jsonl")
    fit = ["fit-users", *here, "--dataset_name", str(tmp_path / "rows.jsonl")]
    assert main([*fit, "--report_dir", str(tmp_path / "report")]) == 0
    assert "2 newcomers, 24 comparisons" in capsys.readouterr().out
    assert (tmp_path / "report" / "new_users.csv").is_file()
    assert load_file(folder / "confidence" / "ellipsoid.safetensors")["set.offsets"].shape == (12,)
    loaded = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), folder)
    assert _UserMoves(loaded).read([8, 10]).any(1).all() and not _UserMoves(loaded).read([9]).any()
    assert evaluate_users(loaded, rows, TOKENIZER).n_users == 2
    assert main(fit) == 2 and "UserIdError" in capsys.readouterr().err
    assert main([*fit, "--refit"]) == 0
    assert main(["add-users", *here]) == 2 and main(["add-users", *here, "--users_file", "nowhere"]) == 2
    (tmp_path / "ids.txt").write_text("fay-51aa\nnewbie-9d1c \n\n\tdan-77c1\n")
    capsys.readouterr()
    assert main(["add-users", *here, "--users_file", str(tmp_path / "ids.txt")]) == 2
    said = capsys.readouterr().err
    assert "lines 2, 4 of" in said and "blanks" in said and "newbie" not in said and "dan-77c1" not in said
    assert len(UserRegistry.load(folder)) == 11
    assert main(["fit-users", "--model_name_or_path", "nowhere", "--dataset_name", str(tmp_path / "rows.jsonl")]) == 2


def test_a_user_with_few_answers_is_fitted_alike_beside_one_with_many():
    """The second is refined further, from where the first is not."""
    spread = user_spread(reward_model())
    rows = preference_rows(["new0", "new1"], 64, seed=3)
    few = [row for row in rows if row["user_id"] == "new0"][:8]
    found = []
    for more in ([], [row for row in rows if row["user_id"] == "new1"][:24]):
        model = reward_model()
        result = fit_users(model, Dataset.from_list(few + more), TOKENIZER, spread=spread)
        found.append((_UserMoves(model).read(get_router(model).users.index(["new0"])), result.table.iloc[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-5)
    assert found[0][1]["shrinkage"] == pytest.approx(found[1][1]["shrinkage"], abs=1e-4)


def test_a_refit_without_a_usable_answer_leaves_the_user_as_he_is():
    model = reward_model()
    row = get_router(model).users.index(["user3"])
    before = _UserMoves(model).read(row)
    assert before.any()
    fit_users(model, answers(["user3"]), TOKENIZER, refit=True, max_length=1)
    assert torch.equal(_UserMoves(model).read(row), before)


def test_a_merged_model_has_nobody_to_fit():
    model = reward_model()
    model.merge_and_unload(user="user3")
    with pytest.raises(ConfigError, match="no ShareLoRA layer is in it .merge_and_unload takes them out"):
        user_spread(model)
