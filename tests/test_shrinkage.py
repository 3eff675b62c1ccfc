"""Users' own parts after shrinkage, against a world whose tastes are known and a slow calculation without the package's passes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers import preference_rows, save_tiny, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from scipy import optimize, special
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from trl_sharelora import (
    ShareLoraConfig,
    add_users,
    evaluate_users,
    fit_users,
    from_lora,
    shrink_users,
    shrinkage,
    use_users,
)
from trl_sharelora.cli import main
from trl_sharelora.confidence import fit_confidence
from trl_sharelora.empirical_bayes import Comparisons, Prior, Texts, learn_prior, mean_beside_texts
from trl_sharelora.errors import ConfigError, DataError, NonFiniteError, UnknownUserError
from trl_sharelora.held_out import SHARPNESSES as HELD_OUT_SHARPNESSES
from trl_sharelora.new_users import UserSpread, _Pairs, _UserMoves
from trl_sharelora.scoring import load_reward_model
from trl_sharelora.sharelora.routing import get_router
from trl_sharelora.shrinkage import _drawn, _folds, _new_texts, _Solution


TOKENIZER = tiny_tokenizer()
SIZE, TEXTS, USERS = 6, 120, [f"user{number}" for number in range(30)]


class LinearReward(PreTrainedModel):
    """A text's number in, a linear function of its features out."""

    config_class = BertConfig

    def __init__(self, config, features):
        super().__init__(config)
        self.features, size = features, features.shape[1]
        self.frozen = torch.zeros(len(features))
        self.projection = nn.Linear(size, size, bias=False)
        self.classifier = nn.Linear(size, 1, bias=False)
        nn.init.eye_(self.projection.weight)
        nn.init.normal_(self.classifier.weight, std=0.3)

    def forward(self, input_ids, **kwargs):
        rewards = self.classifier(self.projection(self.features[input_ids[:, 0]]))
        return SequenceClassifierOutput(logits=rewards + self.frozen[input_ids[:, 0]][:, None])


def linear_model(seed=0, bank="resident", size=SIZE):
    torch.manual_seed(seed)
    features = torch.randn(TEXTS, size)
    base = LinearReward(BertConfig(hidden_size=SIZE, num_labels=1), features)
    config = ShareLoraConfig(
        r=2, target_modules=["projection"], users=USERS, init_lora_weights=False, bank=bank, task_type="SEQ_CLS"
    )
    model = get_peft_model(base, config).eval()
    bank_of = _UserMoves(model)
    for row in range(len(USERS)):
        bank_of.write(row, torch.zeros(bank_of.entries))
    return model


def scores(model):
    """Of all texts, by the common model."""
    with torch.no_grad(), use_users(model, ["nobody in particular"] * TEXTS, unseen="common"):
        return model(input_ids=torch.arange(TEXTS)[:, None]).logits[:, 0].double().numpy()


def world(model, spread, n, seed=1, users=USERS, texts=range(TEXTS), whims=0.0):
    """Answers of users whose weights on the features are the model's and, in the first feature, their own; `whims`: of each user about each text, in no feature."""
    draw, people = np.random.default_rng(seed), np.random.default_rng(7)
    common = scores(model)
    features = model.get_base_model().features.numpy()
    rows = []
    for user_id, taste in zip(users, people.standard_normal(len(users)) * spread, strict=True):
        whim = whims * people.standard_normal(TEXTS) if whims else np.zeros(TEXTS)
        for _ in range(n):
            one, other = (int(text) for text in draw.choice(texts, 2, replace=False))
            margin = (
                common[one] - common[other] + taste * (features[one, 0] - features[other, 0]) + whim[one] - whim[other]
            )
            if draw.random() > special.expit(margin):
                one, other = other, one
            rows.append({"user_id": user_id, "chosen_ids": [one], "rejected_ids": [other]})
    return Dataset.from_list(rows)


def accuracy(model, rows):
    return evaluate_users(model, rows, TOKENIZER, batch_size=64).macro


@pytest.mark.parametrize("bank", ["resident", "ram"])
def test_a_ridge_is_the_optimum_of_each_user(bank):
    """Without EM steps: the parts are those of a logistic regression of each user, by scipy on the model's own gradients."""
    model = linear_model(bank=bank)
    train, held = world(model, 2.0, 12), world(model, 2.0, 12, seed=2)
    moves = _UserMoves(model)
    result = shrink_users(model, train, TOKENIZER, validation=held, scale=1.5, steps=0)
    assert result.chosen == "shrunk" and result.steps == 0 and result.n == 360 and result.held_out == 360
    assert result.factor == 1  # the model is linear in the moves
    # the reward is classifier (x + s B A_u x): the gradient with respect to A_u is s (classifier B)' x'
    layer = model.get_base_model().projection
    features = model.get_base_model().features
    way = layer.scaling["default"] * (model.get_base_model().classifier.weight @ layer.sharelora_B["default"].weight)
    rows = train.with_format(None)
    differences = [features[row["chosen_ids"][0]] - features[row["rejected_ids"][0]] for row in rows]
    gradients = torch.stack([torch.outer(way[0], d).flatten() for d in differences]).detach().double().numpy()
    tau = 1.5 / np.sqrt((gradients**2).sum(1).mean())
    fresh = linear_model(bank=bank)
    at_zero = scores(fresh)
    offsets = np.array([at_zero[row["chosen_ids"][0]] - at_zero[row["rejected_ids"][0]] for row in rows])
    for user in (0, 17):
        own = np.array([row["user_id"] == USERS[user] for row in rows])

        def loss(z, own=own):
            return -special.log_expit(offsets[own] + gradients[own] @ z).sum() + z @ z / 2 / tau**2

        found = optimize.minimize(loss, np.zeros(gradients.shape[1]), method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(moves.read([user])[0], found.x, atol=2e-3)


@pytest.mark.parametrize(("tiers", "kept"), [((2, 4, 5), 5), ((2, 4, 8), 6), ((6, 8), 6), ((2, 3), 3)])
def test_as_many_directions_are_looked_at_as_hold_nearly_all_of_the_gradients(monkeypatch, caplog, tiers, kept):
    """The features are six of one size, so k directions hold about k sixths: against the eigenvalues of the features' own differences."""
    monkeypatch.setattr(shrinkage, "DIRECTIONS", tiers)
    model = linear_model()
    train, held = world(model, 2.0, 20), world(model, 2.0, 12, seed=2)
    result = shrink_users(model, train, TOKENIZER, validation=held, scale=1.0, steps=0)
    features = model.get_base_model().features
    differences = (
        features[[row[0] for row in train["chosen_ids"]]] - features[[row[0] for row in train["rejected_ids"]]]
    )
    values = torch.linalg.eigvalsh(differences.T @ differences).flip(0)
    assert result.captured == pytest.approx(
        float(values[:kept].sum() / values.sum()), abs=0.08
    )  # of 75 differences that were not looked at
    assert len(result.spread.directions) == kept
    assert ("are lost" in caplog.text or "is lost" in caplog.text) == (kept < 5)


def test_it_finds_what_users_differ_in_and_helps_newcomers():
    model = linear_model()
    train, held, test = (world(model, 3.0, n, seed) for n, seed in ((12, 1), (8, 2), (30, 3)))
    common = accuracy(model, test)
    ridge = shrink_users(model, train, TOKENIZER, validation=held, steps=0)
    with_ridge = accuracy(model, test)
    result = shrink_users(model, train, TOKENIZER, validation=held)
    assert result.chosen == "shrunk" and result.steps > 0
    assert accuracy(model, test) > with_ridge + 0.01 > common + 0.05
    assert list(result.table["state"]) == ["common", "trained", "shrunk"]
    trained = result.table.set_index("state")["accuracy"]["trained"]  # what the ridge left
    assert trained == pytest.approx(ridge.table.set_index("state")["accuracy"]["shrunk"])
    best = result.candidates["log_likelihood"].idxmax()
    assert result.candidates.loc[best, ["scale", "steps", "mean"]].tolist() == [
        result.scale,
        result.steps,
        result.mean,
    ]
    assert set(result.candidates["mean"]) == {True, False}
    # the first feature is what they differ in: in A of shape (r, in) its column
    column = result.spread.directions[0].reshape(2, SIZE).square().sum(0)
    assert float(column[0] / column.sum()) > 0.9
    assert "in the model now: shrunk" in str(result)
    newcomers = [f"new{number}" for number in range(20)]
    answers, later = (world(model, 3.0, n, seed, newcomers) for n, seed in ((10, 4), (40, 5)))
    add_users(model, newcomers)
    before = accuracy(model, later)
    fit_users(model, answers, TOKENIZER, spread=result.spread)
    assert accuracy(model, later) > before + 0.05


NEW_TEXTS = {"texts": range(TEXTS - 8, TEXTS)}


@pytest.mark.parametrize("searched", [20_000, 300])
def test_where_few_texts_are_new_folds_of_the_others_are_asked_too(searched, monkeypatch, caplog):
    """Eight texts tell little, whoever judges them: they choose a quarter of the spread there is, with a hundred others it is right."""
    monkeypatch.setattr(shrinkage, "SEARCHED", searched)
    train = {"texts": range(TEXTS - 8)}
    with caplog.at_level("INFO", logger="trl_sharelora"):
        model = linear_model()
        held, test = world(model, 3.0, 3, 2, **NEW_TEXTS), world(model, 3.0, 40, 3)
        rows = world(model, 3.0, 30, **train)
        result = shrink_users(model, rows, TOKENIZER, validation=held)
        assert "5 folds of the training's texts" in caplog.text
        before = accuracy(linear_model(), test)
        assert result.chosen == "shrunk" and accuracy(model, test) > before + 0.05
        assert result.held_out == len(held)
        caplog.clear()
        shrink_users(model, world(model, 3.0, 30), TOKENIZER, validation=held)  # known texts
        assert "folds" not in caplog.text
    monkeypatch.setattr(shrinkage, "_folds", lambda *given: [])
    alone = linear_model()
    shrink_users(alone, rows, TOKENIZER, validation=held)
    assert accuracy(model, test) > accuracy(alone, test)


def test_a_fold_without_a_state_counts_as_unmoved_and_one_that_ends_keeps_its_last(monkeypatch):
    real, calls = shrinkage._steps, []

    def failing(*given):
        """Of the model and its five folds, in turn: the second of them has no state, the later ones three."""
        calls.append(given)
        states = list(real(*given))
        return iter({1: states, 2: []}.get(len(calls) % 6, states[:3]))

    monkeypatch.setattr(shrinkage, "_steps", failing)
    model = linear_model()
    held = world(model, 3.0, 3, 2, **NEW_TEXTS)
    result = shrink_users(model, world(model, 3.0, 30, texts=range(TEXTS - 8)), TOKENIZER, validation=held, steps=5)
    assert result.steps == 5 and result.chosen == "shrunk"


def test_of_many_users_some_choose_and_all_are_fitted(monkeypatch):
    model = linear_model()
    train, held = world(model, 3.0, 20), world(model, 3.0, 10, 2)
    everybody = shrink_users(linear_model(), train, TOKENIZER, validation=held)
    monkeypatch.setattr(shrinkage, "SEARCHED", 200)
    monkeypatch.setattr(shrinkage, "_drawn", lambda user, of_held, users: torch.arange(users) < 10)
    result = shrink_users(model, train, TOKENIZER, validation=held)
    assert result.n == 600 and result.held_out == 300
    assert not result.candidates["log_likelihood"].isin(everybody.candidates["log_likelihood"]).any()
    monkeypatch.undo()
    again = linear_model()
    chosen = {"scale": result.scale, "steps": result.steps, "mean": result.mean}
    whole = shrink_users(again, train, TOKENIZER, validation=held, **chosen)
    torch.testing.assert_close(
        _UserMoves(model).read(range(30)), _UserMoves(again).read(range(30)), atol=1e-5, rtol=1e-4
    )
    pd.testing.assert_frame_equal(result.table, whole.table, atol=1e-5)


def test_who_chooses_has_something_held_out_and_is_not_alone(monkeypatch):
    user = torch.arange(1000).repeat_interleave(50)
    everybody = torch.arange(1000)
    assert bool(_drawn(user[:15_000], everybody, 1000).all())
    assert int(_drawn(user, everybody, 1000).sum()) == 400
    few = torch.tensor([3, 500, 999])
    assert bool(_drawn(user, few, 1000)[few].all())
    heavy = torch.cat([user, torch.full((50_000,), 7)])  # one user with as many comparisons as all others
    assert int(_drawn(heavy, torch.tensor([7]), 1000).sum()) > 100


def test_whims_about_texts_are_no_gain_on_new_ones():
    """Users who differ in each text by itself and in no feature are left as they were where texts are new, whatever eight of these say."""
    chosen = set()
    model = linear_model()
    train = world(model, 0.0, 30, texts=range(TEXTS - 8), whims=3.0)
    held = world(model, 0.0, 6, 2, whims=3.0, **NEW_TEXTS)
    moves = _UserMoves(model)
    of_new = [world(model, 0.0, n, seed, whims=3.0, **NEW_TEXTS) for n, seed in ((20, 4), (20, 5))]
    shrink_users(
        model, of_new[0], TOKENIZER, validation=of_new[1]
    )  # what of the whims about these eight can be said in features
    far = moves.read(range(30)).clone()
    assert bool(far.any())
    for share in (0.0, 0.03):
        for row in range(30):
            moves.write(row, share * far[row])
        before = moves.read(range(30)).clone()
        result = shrink_users(model, train, TOKENIZER, validation=held)
        likelihoods = result.table.set_index("state")["log_likelihood"]
        assert likelihoods.idxmax() == "shrunk"  # the folds know better
        assert result.chosen == ("trained" if likelihoods["trained"] > likelihoods["common"] else "common")
        chosen.add(result.chosen)
        if result.chosen == "trained":
            assert torch.equal(moves.read(range(30)), before)
    assert chosen == {"common", "trained"}


def test_folds_share_no_text_or_prompt():
    def pairs(texts):
        return _Pairs([[one] for one, _ in texts], [[other] for _, other in texts], torch.arange(len(texts)) % 3)

    draw = np.random.default_rng(0)
    train, held = (
        pairs([draw.choice(some, 2, replace=False) for _ in range(n)]) for some, n in ((50, 400), (range(50, 60), 30))
    )
    none = [""] * 400
    for fitted, left_out in _folds(train, none, held, none[:30]):
        texts_of = [
            {one[0] for side in (some.chosen, some.rejected) for one in side}
            for some in (train.of(fitted), train.of(left_out))
        ]
        assert texts_of[0] and texts_of[1] and not texts_of[0] & texts_of[1]
    assert len(_folds(train, none, held, none[:30])) == 5
    prompts = [f"p{number % 7}" for number in range(400)]
    folds = _folds(train, prompts, held, ["new"] * 30)
    assert len(folds) == 5
    for fitted, left_out in folds:
        assert bool((fitted ^ left_out).all())  # a comparison has one prompt
        kept = [{prompts[place] for place in some.nonzero().flatten().tolist()} for some in (fitted, left_out)]
        assert not kept[0] & kept[1]
    # the two sides of a debate are one item
    sides = [
        f"Should one {'eat' if number % 2 else 'eat '} what is number {number // 2 % 6}, and why{'?' * (number % 2)}"
        for number in range(400)
    ]
    for fitted, left_out in _folds(train, sides, held, ["new"] * 30):
        kept = [{place // 2 % 6 for place in some.nonzero().flatten().tolist()} for some in (fitted, left_out)]
        assert not kept[0] & kept[1] and len(kept[0] | kept[1]) == 6
    # of one debate only: texts are dealt
    one_debate = [
        f"Should one eat what is number {number % 8}, and if one should not, why not?" for number in range(400)
    ]
    assert len(set(one_debate)) == 8
    for fitted, left_out in _folds(train, one_debate, held, ["new"] * 30):
        texts = [
            {one[0] for side in (part.chosen, part.rejected) for one in side}
            for part in map(train.of, (fitted, left_out))
        ]
        assert not texts[0] & texts[1]
    assert len(_folds(train, one_debate, held, ["new"] * 30)) == 5
    # known texts, or many new ones: validation is asked alone
    assert _new_texts(train, held) and not _new_texts(train, train)
    many = pairs([(1000 + 2 * number, 1001 + 2 * number) for number in range(100)])
    assert _folds(train, none, many, none[:100]) == []


def test_at_the_common_model_each_text_is_looked_at_once():
    """Margins and gradients from each text alone are those of the comparisons; where texts are more than comparisons these are looked at."""
    model = linear_model()
    scorer = shrinkage._open(model, TOKENIZER, 64, {})[0]
    passes = shrinkage._Passes(scorer)
    for n, once in ((20, True), (1, False)):
        rows = world(model, 3.0, n)
        pairs = shrinkage._tokenised(rows, scorer.users.index(rows["user_id"]), scorer, None)[1]
        margins, features, texts = shrinkage._linearised(passes, pairs, None)
        alike = _Pairs(pairs.chosen, pairs.rejected, torch.zeros_like(pairs.user))
        expected = passes.linearise(alike, torch.zeros(1, passes.bank.entries), None)
        torch.testing.assert_close(margins, expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(features, expected[1].float(), atol=1e-5, rtol=1e-4)
        assert (texts is not None) == once
    pairs.chosen, pairs.rejected = [[1]] * 30, [[2]] * 30
    _, features, texts = shrinkage._linearised(passes, pairs, None)
    assert len(texts.features) == 2 and torch.equal(
        texts.features[texts.chosen] - texts.features[texts.rejected], features
    )


def by_heart(seed=0, n=40, known=0.0):
    """A model whose head has learned by heart how much sixty texts are liked, some of which no feature tells; comparisons of these, of 16 and of 44 other texts.

    `known`: standard deviation of what the base knows of texts, rightly, and no user's part can say.
    """
    model = linear_model(size=60)
    base, draw = model.get_base_model(), np.random.default_rng(seed)
    features = base.features.double().numpy()
    liked = features @ draw.standard_normal(60) * 0.25 + 2 * draw.standard_normal(TEXTS)
    frozen = known * draw.standard_normal(TEXTS) if known else np.zeros(TEXTS)
    liked += frozen
    tastes = 2 * np.random.default_rng(7).standard_normal(len(USERS))

    def rows(texts, each):
        found = []
        for user_id, taste in zip(USERS, tastes, strict=True):
            for _ in range(each):
                one, other = (int(text) for text in draw.choice(texts, 2, replace=False))
                margin = liked[one] - liked[other] + taste * (features[one, 0] - features[other, 0])
                if draw.random() > special.expit(margin):
                    one, other = other, one
                found.append({"user_id": user_id, "chosen_ids": [one], "rejected_ids": [other]})
        return Dataset.from_list(found)

    train, held, test = rows(range(60), n), rows(range(60, 76), 10), rows(range(76, TEXTS), 40)
    chosen, rejected = (torch.tensor([ids[0] for ids in train[f"{side}_ids"]]) for side in ("chosen", "rejected"))
    rewards = torch.tensor(frozen)
    head = mean_beside_texts(
        Texts(chosen, rejected, base.features), rewards[chosen] - rewards[rejected], tau=1.0, scale=1e-3
    ).mean
    base.classifier.weight.data = head[None].clone()
    base.frozen = rewards.float()
    return model, train, held, test


def test_where_texts_are_new_what_was_learned_by_heart_is_fitted_anew():
    gains = []
    for seed in range(3):
        model, train, held, test = by_heart(seed)
        result = shrink_users(model, train, TOKENIZER, validation=held)
        effects = result.text_effects
        assert effects in shrinkage.TEXT_EFFECTS and result.mean_scale in shrinkage.MEAN_SCALES and result.mean
        assert f"mean fitted with scale {result.mean_scale:g} beside texts' own effects of {effects:g}" in str(result)
        assert set(result.candidates["text_effects"]) == {effects} and 8.0 in set(result.candidates["scale"])
        as_it_came = by_heart(seed)[0]
        other = shrink_users(as_it_came, train, TOKENIZER, validation=held, text_effects=False)
        assert other.text_effects is None is other.mean_scale and other.candidates["text_effects"].isna().all()
        gains.append(accuracy(model, test) - accuracy(as_it_came, test))
        assert bool(result.spread.mean.any())  # newcomers begin at the mean that was fitted
    assert np.mean(gains) > 0.02
    # known texts, or texts that were hardly compared twice: the common part is left as it came
    few = train.select(range(0, len(train), 20))
    for rows, held_out in ((train, train.select(range(0, len(train), 3))), (few, held)):
        model = by_heart()[0]
        assert shrink_users(model, rows, TOKENIZER, validation=held_out, steps=0, scale=1.0).text_effects is None
    with pytest.raises(ConfigError, match="30 comparisons of 39 texts"):
        fewer = train.select(range(0, len(train), 40))
        shrink_users(by_heart()[0], fewer, TOKENIZER, validation=held, text_effects=1.0)


@pytest.mark.parametrize(
    ("whims", "liked", "size", "expected"), [(2.0, 0.2, 12, (1.0, 1.0)), (0.0, 0.3, 60, (0.01, 8.0))]
)
def test_folds_say_how_strong_the_common_part_is_and_whether_texts_are_liked_for_reasons_of_their_own(
    monkeypatch, whims, liked, size, expected
):
    """Against the fit of every setting to every fold; and it is what the world was made of."""
    draw = torch.Generator().manual_seed(0)
    texts, weight = torch.randn(200, size, generator=draw), torch.randn(size, generator=draw)
    rewards = (liked * texts @ weight + whims * torch.randn(200, generator=draw)).double()
    one, other = torch.randint(0, 200, (2, 6000), generator=draw)
    one, other = one[one != other], other[one != other]
    won = torch.rand(len(one), generator=draw).double() < torch.sigmoid(rewards[one] - rewards[other])
    chosen, rejected = torch.where(won, one, other), torch.where(won, other, one)
    user, features = torch.arange(len(one)) % 40, texts[chosen] - texts[rejected]
    came = torch.randn(size, generator=draw)  # of no use, and none of it is left in the refit
    training = shrinkage._Training(
        features.mv(came).double(), features, user, 40, Texts(chosen, rejected, texts), came.double()
    )
    pairs = _Pairs(chosen[:, None].tolist(), rejected[:, None].tolist(), user)
    none = [""] * len(one)
    folds = _folds(pairs, none, _Pairs([[500]], [[501]], torch.zeros(1, dtype=torch.long)), none[:1])
    parts = [shrinkage._Part(fitted, user[out], training.margins[out], features[out]) for fitted, out in folds]
    judge = shrinkage._judge_of_folds(pairs, none, folds)
    found = shrinkage._likeliest_mean(training, parts, judge, shrinkage.TEXT_EFFECTS)
    assert found == expected and training.mean_scale == 1.0
    likelihoods, each = {}, {}
    length = float(features.square().sum(1).mean().sqrt())
    for setting in [(e, s) for e in shrinkage.TEXT_EFFECTS for s in shrinkage.MEAN_SCALES]:
        margins = []
        for fitted, out in folds:
            of_fold = Texts(chosen[fitted], rejected[fitted], texts)
            mean = mean_beside_texts(of_fold, torch.zeros(int(fitted.sum())), setting[1] / length, setting[0]).mean
            margins.append(features[out].mv(mean).double())
        margins, users = torch.cat(margins), torch.cat([user[out] for _, out in folds])
        at = [torch.nn.functional.logsigmoid(sharp * margins) for sharp in HELD_OUT_SHARPNESSES]
        of_users = [[float(one[users == person].mean()) for person in range(40)] for one in at]
        likelihoods[setting] = max(np.mean(one) for one in of_users)
        each[setting] = at[int(np.argmax([np.mean(one) for one in of_users]))]
    reached = []
    for one in shrinkage.TEXT_EFFECTS:  # from the first scale on as long as the next one is likelier
        of_scales = [likelihoods[one, scale] for scale in shrinkage.MEAN_SCALES]
        falls = [n for n in range(1, len(of_scales)) if of_scales[n] <= of_scales[n - 1]]
        reached += [(one, scale) for scale in shrinkage.MEAN_SCALES[: min(falls, default=len(of_scales))]]
    assert found == max(reached, key=likelihoods.get)
    # another setting than the first only by a standard error
    gain = each[found] - each[1.0, 1.0]
    assert found == (1.0, 1.0) or judge.mean(gain) > judge.error(gain)
    endless = [part._replace(margins=torch.full_like(part.margins, -torch.inf)) for part in parts]
    assert shrinkage._likeliest_mean(training, endless, judge, shrinkage.TEXT_EFFECTS) == (1.0, 1.0)
    monkeypatch.setattr(shrinkage.HeldOut, "error", lambda self, gain: self.mean(gain) + 1e-9)
    assert shrinkage._likeliest_mean(training, parts, judge, shrinkage.TEXT_EFFECTS) == (1.0, 1.0)


def test_where_many_texts_are_new_they_say_whether_the_common_part_stays(monkeypatch, caplog):
    """A head that knows the truth is better than one fitted to sixty texts; twenty held-out texts would not be asked."""
    truth = torch.tensor(np.random.default_rng(0).standard_normal(60) * 0.25).float()[None]

    def shrunk(**arguments):
        model, train, held, test = by_heart()
        model.get_base_model().classifier.weight.data = truth.clone()
        result = shrink_users(model, train, TOKENIZER, validation=held, **arguments)
        return result, model, accuracy(model, test)

    monkeypatch.setattr(shrinkage, "FEW_TEXTS", 10)
    with caplog.at_level("INFO", logger="trl_sharelora"):
        result, model, right = shrunk()
    assert result.text_effects is None and "likelier with the common part as it came, so it stays" in caplog.text
    # what is then used has been searched for by itself, and is what comes without texts' effects
    without, other, right_without = shrunk(text_effects=False)
    assert result.chosen == without.chosen == "shrunk" and right == right_without > shrunk(text_effects=1.0)[2]
    assert torch.equal(_UserMoves(model).read(range(30)), _UserMoves(other).read(range(30)))
    tried = result.candidates
    assert set(tried["text_effects"].dropna()) == {1.0} and tried.loc[tried["averaged"], "text_effects"].isna().all()
    pd.testing.assert_frame_equal(
        tried[tried["text_effects"].isna()].reset_index(drop=True), without.candidates, check_dtype=False
    )
    best = tried[(tried["scale"] == result.scale) & (tried["steps"] == result.steps) & (tried["mean"] == result.mean)]
    assert best["averaged"].any() and result.averaged == tried["averaged"].sum()


@pytest.mark.parametrize(
    ("factor", "arguments"), [(1.0, {"text_effects": 1.0}), (0.5, {"text_effects": 1.0}), (1.0, {"mean": True})]
)
@pytest.mark.parametrize("chosen", ["common", "trained"])
def test_what_is_refused_is_not_handed_to_newcomers(monkeypatch, factor, arguments, chosen):
    """Where validation refuses what is shrunk newcomers get how users differ, and no mean that the model does not have."""
    model, train, held, _ = by_heart()
    moves = _UserMoves(model)
    moves.write(0, torch.full((moves.entries,), 0.01))

    def refused(passes, fitted, held, judge, basis, solution, along, common, beside):
        return shrinkage._Moves(solution.scaled(factor), torch.zeros_like(common), factor, 0)

    monkeypatch.setattr(shrinkage, "_settled", refused)
    monkeypatch.setattr(shrinkage.HeldOut, "best", lambda self, found, needs_more: chosen)
    monkeypatch.setattr(shrinkage, "_folds", lambda *arguments: [])
    result = shrink_users(model, train, TOKENIZER, validation=held, steps=1, scale=8.0, **arguments)
    assert result.chosen == chosen and float(result.spread.scales[0]) > 0
    size = float(result.spread.mean.abs().max()) / float(result.spread.scales[0])
    if chosen == "trained" and "mean" in arguments:  # beside what the users have, which is no refit of the common part
        assert size > 0.01
    else:
        assert size < 1e-4


def test_what_the_features_say_of_the_common_model():
    """With as many features as texts least squares says all of the fitted margins and worse than nothing of others; a ridge that says more of these is taken."""
    draw = torch.Generator().manual_seed(0)
    texts = torch.randn(400, 90, generator=draw)
    weight = torch.randn(90, generator=draw)
    for noise, least in ((0.0, True), (0.5, True), (9.0, False)):
        rewards = (texts @ weight).double() + noise * torch.randn(400, generator=draw).double()
        chosen, rejected = (torch.randint(0, 100, (2000,), generator=draw) for _ in "ab")
        new, other = (torch.randint(100, 400, (500,), generator=draw) for _ in "ab")
        training = shrinkage._Training(
            rewards[chosen] - rewards[rejected], texts[chosen] - texts[rejected], None, 1, None
        )
        held_out = shrinkage._Linear(rewards[new] - rewards[other], texts[new] - texts[other])
        said = training.learn(held_out)
        x, y = training.features.double(), training.margins
        gram = x.T @ x
        found = {}
        for ridge in shrinkage.RIDGES:
            found[ridge] = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(90), x.T @ y)
        left = {r: 1 - float((held_out.margins - held_out.features.double() @ w).square().sum() / held_out.margins.square().sum()) for r, w in found.items()}  # fmt: skip
        taken = min(ridge for ridge, one in left.items() if one >= max(left.values()) - shrinkage.MORE_SAID)
        assert said == pytest.approx(left[taken], abs=1e-4)
        torch.testing.assert_close(training.learned, found[taken], atol=1e-3, rtol=1e-3)
        if noise == 0.5:  # of ridges that say nearly the same the least
            assert said < max(left.values()) - 1e-4
        assert (taken == min(shrinkage.RIDGES)) == least and (said > 0.95 if least else left[1e-6] < said - 0.1)
    training.features = training.features * 1e20
    with pytest.raises(NonFiniteError, match="their squares overflow"):
        training.learn(held_out)


def test_without_new_texts_held_out_it_says_that_nothing_can_tell_what_a_refit_loses(caplog):
    model, train, _, _ = by_heart(n=20)
    with caplog.at_level("WARNING", logger="trl_sharelora"):
        shrink_users(model, train, TOKENIZER, text_effects=1.0, steps=0, scale=1.0)
    assert "no comparisons of new texts are held out that could tell whether" in caplog.text


def test_no_direction_is_missing_where_all_are_looked_at():
    for size, known in ((6, 0.0), (6, 2.0)):
        model = linear_model(size=size)
        model.get_base_model().frozen = known * torch.randn(TEXTS, generator=torch.Generator().manual_seed(0))
        scorer = shrinkage._open(model, TOKENIZER, 64, {})[0]
        rows = world(model, 3.0, 20)
        pairs = shrinkage._tokenised(rows, scorer.users.index(rows["user_id"]), scorer, None)[1]
        basis, _, missing = shrinkage._directions(shrinkage._Passes(scorer), pairs)
        assert missing is None and len(basis) == size  # one direction of A for each feature


def test_a_common_part_that_users_parts_cannot_say_is_not_fitted_anew(caplog):
    """The base knows something of texts that no user's part can say: a refit would lose it, and is made only if it is asked for."""
    came, train, held, test = by_heart(known=2.0)
    before = accuracy(came, test)
    with caplog.at_level("INFO", logger="trl_sharelora"):
        default = shrink_users(came, train, TOKENIZER, validation=held)
    assert (
        default.text_effects is None
        and "the common part stays as it came, for what the users' parts cannot say" in caplog.text
    )
    model = by_heart(known=2.0)[0]
    other = shrink_users(model, train, TOKENIZER, validation=held, text_effects=False)
    assert torch.equal(_UserMoves(came).read(range(30)), _UserMoves(model).read(range(30)))
    pd.testing.assert_frame_equal(default.candidates, other.candidates)
    assert accuracy(model, test) > before - 0.01
    with caplog.at_level("WARNING", logger="trl_sharelora"):
        asked = shrink_users(by_heart(known=2.0)[0], train, TOKENIZER, validation=held, text_effects=1.0)
    assert asked.text_effects == 1.0 and "is lost, as text_effects=1 asks" in caplog.text


def test_one_direction_more_where_the_others_do_not_say_what_the_common_model_says(monkeypatch):
    """With 40 of 60 directions the common model is not in their span; with the one that is missing it is."""
    monkeypatch.setattr(shrinkage, "DIRECTIONS", (40,))
    looked = []
    real = shrinkage._looked_at

    def looked_at(passes, pairs, users, held, basis):
        view = real(passes, pairs, users, held, basis)
        looked.append((basis, view.training.learn(view.held_out)))
        return view

    monkeypatch.setattr(shrinkage, "_looked_at", looked_at)
    model, train, held, _ = by_heart()
    assert shrink_users(model, train, TOKENIZER, validation=held, steps=0, scale=1.0).text_effects is not None
    (few, said), (one_more, now_said) = looked
    assert len(few) == 40 and len(one_more) == 41 and said < shrinkage.SAYS < now_said
    torch.testing.assert_close(one_more @ one_more.T, torch.eye(41), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [1.0, 2e-3])
def test_what_a_basis_lacks_of_a_vector_is_orthogonal_to_it(share):
    draw = torch.Generator().manual_seed(0)
    whole = torch.linalg.qr(torch.randn(500, 65, generator=draw))[0].T.contiguous()
    basis, other = whole[:64], whole[64]
    inside = torch.randn(64, generator=draw) @ basis
    found = shrinkage._outside(inside / inside.norm() + share * other, basis)
    # once would leave a thousandth of it along the basis, for what is taken away is five hundred times as long
    assert float((basis @ found).norm()) < 1e-6 and float(found @ other) == pytest.approx(1, abs=1e-5)
    assert shrinkage._outside(inside + 1e-4 * inside.norm() * other, basis) is None
    assert shrinkage._outside(torch.full((500,), 1e38), basis) is None


@pytest.mark.parametrize(
    ("asked", "said", "taken"),
    [(1.0, (0.5, 0.6), 41), (1.0, (0.5, 0.505), 40), (1.0, (0.94, 0.95), 41), (None, (0.5, 0.6), 40)],
)
def test_one_direction_more_counts_where_it_says_clearly_more_and_a_refit_is_asked_for(
    monkeypatch, asked, said, taken
):
    monkeypatch.setattr(shrinkage, "DIRECTIONS", (40,))
    real, settled, answers, seen = shrinkage._Training.learn, shrinkage._settled, iter(said), []
    monkeypatch.setattr(shrinkage._Training, "learn", lambda self, held: (real(self, held), next(answers))[1])
    monkeypatch.setattr(shrinkage, "_settled", lambda *given: (seen.append(len(given[4])), settled(*given))[1])
    model, train, held, _ = by_heart(n=20)
    result = shrink_users(model, train, TOKENIZER, validation=held, steps=0, scale=1.0, text_effects=asked)
    assert seen == [taken] and result.text_effects == asked and next(answers, None) is None


def test_searches_are_compared_by_what_each_would_write(monkeypatch):
    """That is the mean of all that is as good, and not the best by itself."""
    monkeypatch.setattr(shrinkage, "FEW_TEXTS", 10)
    real = shrinkage._Search.picked
    _, train, held, _ = by_heart(n=20)
    for better in (None, 1.0):

        def picked(self, errors, better=better):
            found = real(self, errors)
            best = self.best.log_likelihood
            return found._replace(log_likelihood=best + (0.1 if self.effect == better else -0.1))

        monkeypatch.setattr(shrinkage._Search, "picked", picked)
        result = shrink_users(by_heart(n=20)[0], train, TOKENIZER, validation=held, steps=1)
        assert result.text_effects == better


def test_of_moves_that_were_halved_half_is_written_without_validation_too(monkeypatch):
    monkeypatch.setattr(shrinkage.HeldOut, "best", lambda self, found, needs_more: "shrunk")
    written = {}
    for factor in (1.0, 0.5):
        monkeypatch.setattr(
            shrinkage,
            "_settled",
            lambda passes, fitted, held, judge, basis, solution, along, common, beside, factor=factor: (
                shrinkage._Moves(solution.scaled(factor), torch.zeros_like(common), factor, 0)
            ),
        )
        model = linear_model()
        result = shrink_users(model, world(model, 3.0, 12), TOKENIZER, scale=1.0, steps=1)
        written[factor] = _UserMoves(model).read(range(30)), result.spread.scales
    for whole, half in zip(written[1.0], written[0.5], strict=True):
        assert bool(whole.any())
        torch.testing.assert_close(half, whole / 2)


def test_folds_are_asked_about_what_is_written_where_moves_are_halved(monkeypatch):
    """With half of the moves beside texts' effects half of the common part's refit is written, and the folds are asked about that."""
    model, train, held, _ = by_heart(n=20)
    made, asked = [], []
    real, judged = shrinkage._Search.__init__, shrinkage.HeldOut.judged

    def init(self, training, parts, judge, effect):
        real(self, training, parts, judge, effect)
        made.append((self, training, parts))

    def halved(passes, fitted, held, judge, basis, solution, along, common, beside):
        half = solution.scaled(0.5)
        return shrinkage._Moves(half, common + 0.5 * along, 0.5, 0)

    monkeypatch.setattr(shrinkage._Search, "__init__", init)
    monkeypatch.setattr(shrinkage, "_settled", halved)
    monkeypatch.setattr(
        shrinkage.HeldOut, "judged", lambda self, margins: asked.append(margins) or judged(self, margins)
    )
    shrink_users(model, train, TOKENIZER, validation=held, scale=4.0, steps=1, text_effects=1.0)
    (_, training, parts), n = made[0], len(held)
    common, shrunk = (margins[n:] for margins in asked[-2:])
    expected = []
    for part in parts[1:]:
        fit, anew = training.fitted(part.fitted, 1.0)
        *_, step = learn_prior(fit, 4.0 / training.size, 1, mean=False)
        expected.append(
            torch.stack(
                [
                    part.margins + 0.5 * (part.features @ anew.moved).double(),
                    part.margins + 0.5 * (part.features * (anew.moved + step.users[part.user])).sum(1).double(),
                ]
            )
        )
    torch.testing.assert_close(torch.stack([common, shrunk]), torch.cat(expected, 1), atol=1e-4, rtol=1e-4)


def test_where_em_ends_before_what_was_asked_its_last_state_counts(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    fit = Comparisons(torch.randn(60, 4, generator=draw), torch.zeros(60), torch.arange(60) % 5, 5)
    states = list(learn_prior(fit, 1.0, 2, mean=False))
    found = [shrinkage._Found(1.0, True, number, *[None] * 5) for number in (0, 2, 5, 7)]
    monkeypatch.setattr(shrinkage, "_steps", lambda fit, tau, steps, mean: iter([] if mean else states))
    solution = shrinkage._solved(fit, 1.0, 1.0, found)
    torch.testing.assert_close(solution.users, (states[0].users + 3 * states[2].users) / 4)
    assert len(solution.priors) == 4
    assert shrinkage._solved(fit, 1.0, None, found) is None


def test_which_comparisons_are_no_number():
    model, train, held, _ = by_heart(n=4)
    texts = [{ids[0] for ids in train[f"{side}_ids"]} for side in ("chosen", "rejected")]
    bad = min(texts[0] | texts[1])
    model.get_base_model().features[bad] = float("nan")
    n = sum(bad in (row["chosen_ids"][0], row["rejected_ids"][0]) for row in train)
    with pytest.raises(NonFiniteError, match=f"of {n} of {len(train)} comparisons"):
        shrink_users(model, train, TOKENIZER, validation=held)


def test_where_texts_are_new_what_is_as_good_is_averaged(monkeypatch):
    """Rows are the mean of those of three candidates, each written by itself; the prior for newcomers is of the mean covariance."""
    three = [(1.0, 0), (1.0, 2), (4.0, 1)]
    monkeypatch.setattr(
        shrinkage._Search,
        "as_good",
        lambda self, errors: [one for one in self.found if (one.scale, one.number) in three],
    )
    model, train, held, _ = by_heart(n=30)
    result = shrink_users(model, train, TOKENIZER, validation=held, text_effects=1.0)
    assert result.averaged == 3 and result.chosen == "shrunk" and "averaged with 2 others as good" in str(result)
    rows, covariances = [], []
    for scale, steps in three:
        alone = by_heart(n=30)[0]
        found = shrink_users(alone, train, TOKENIZER, validation=held, scale=scale, steps=steps, text_effects=1.0)
        assert found.chosen == "shrunk"
        rows.append(_UserMoves(alone).read(range(30)))
        covariances.append((found.spread.directions.T * found.spread.scales.square()) @ found.spread.directions)
    torch.testing.assert_close(_UserMoves(model).read(range(30)), torch.stack(rows).mean(0), atol=1e-4, rtol=1e-3)
    covariance = (result.spread.directions.T * result.spread.scales.square()) @ result.spread.directions
    torch.testing.assert_close(covariance, torch.stack(covariances).mean(0), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("people", [USERS, [*USERS, "new"], [*USERS, "new", "another"]])
def test_newcomers_who_are_shrunk_with_the_others_are_of_the_training(people):
    model = linear_model()
    add_users(model, ["new", "another"])
    train, held = (world(model, 3.0, n, seed, people) for n, seed in ((12, 1), (8, 2)))
    assert shrink_users(model, train, TOKENIZER, validation=held, steps=0).chosen == "shrunk"
    assert model.peft_config["default"].trained_users == (None if "another" in people else len(USERS))


def test_users_who_are_alike_are_left_alike():
    model = linear_model()
    train, held, test = (world(model, 0.0, n, seed) for n, seed in ((15, 1), (10, 2), (60, 3)))
    before = accuracy(model, test)
    shrink_users(model, train, TOKENIZER, validation=held)
    assert accuracy(model, test) > before - 0.01


def test_without_validation_each_fifth_is_held_out_and_used_after_it():
    model = linear_model()
    train = world(model, 2.0, 20)
    result = shrink_users(model, train, TOKENIZER)
    assert result.held_out == 30 * 4 and result.n == 600 and list(result.table["state"]) == ["common", "shrunk"]
    # used after it: what is written is the fit to all of them
    again = linear_model()
    shrink_users(
        again,
        train,
        TOKENIZER,
        validation=world(again, 2.0, 10, 2),
        scale=result.scale,
        steps=result.steps,
        mean=result.mean,
    )
    torch.testing.assert_close(
        _UserMoves(model).read(range(30)), _UserMoves(again).read(range(30)), atol=1e-5, rtol=1e-4
    )


def test_what_did_better_before_stays():
    model = linear_model()
    moves = _UserMoves(model)
    train, held = world(model, 3.0, 30), world(model, 3.0, 60, 2)
    shrink_users(model, train, TOKENIZER, validation=held)
    kept = moves.read(range(30)).clone()
    few = train.select(range(0, len(train), 15))  # two of each user: a fit to these cannot be better
    result = shrink_users(model, few, TOKENIZER, validation=held)
    assert result.chosen == "trained"
    assert torch.equal(moves.read(range(30)), kept)


def test_everything_else_and_everybody_else_stays(tmp_path):
    torch.manual_seed(0)
    config = ShareLoraConfig(
        task_type="SEQ_CLS",
        r=2,
        target_modules=["q_proj", "down_proj"],
        users=["a", "b", "c"],
        init_lora_weights=False,
    )
    model = get_peft_model(tiny_model(), config).eval()
    rows = Dataset.from_list(preference_rows(["a", "b"], 40, seed=1))
    moves = _UserMoves(model)
    for row in range(3):
        moves.write(row, torch.randn(moves.entries, generator=torch.Generator().manual_seed(row)))
    c = get_router(model).users.index(["c"])
    before = {name: value.clone() for name, value in model.state_dict().items() if "sharelora_A" not in name}
    of_c = moves.read(c).clone()
    result = shrink_users(model, rows, TOKENIZER, output_dir=tmp_path)
    assert result.n_users == 2
    assert torch.equal(moves.read(c), of_c)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert moves.read([0, 1]).isfinite().all()


def test_a_user_without_a_usable_comparison_keeps_his_row():
    model = linear_model()
    moves = _UserMoves(model)
    moves.write(29, torch.full((moves.entries,), 0.01))
    rows = [row for row in world(model, 2.0, 12) if row["user_id"] != "user29"]
    useless = [{"user_id": "user29", "chosen_ids": [1] * 5, "rejected_ids": [2]}] * 3
    result = shrink_users(model, Dataset.from_list(rows + useless), TOKENIZER, max_length=4)
    assert result.n_users == 29 and result.dropped == 3
    assert torch.equal(moves.read([29])[0], torch.full((moves.entries,), 0.01))


def test_the_command_and_the_prior_it_hands_on(tmp_path, capsys):
    base = save_tiny("llama", tmp_path / "base")
    torch.manual_seed(0)
    config = ShareLoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["q_proj"], users=["a", "b", "c"], init_lora_weights=False
    )
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), config)
    folder = tmp_path / "rm"
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    fit_confidence(str(folder), Dataset.from_list(preference_rows(["a", "b", "c"], 30)), device="cpu")
    rows = [
        {**row, "split": split}
        for split, seed in (("train", 1), ("validation", 2))
        for row in preference_rows(["a", "b", "c"], 45, seed=seed)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    Dataset.from_list(preference_rows(["new"], 6, seed=3)).to_json(tmp_path / "new.jsonl")
    here = ["--model_name_or_path", str(folder), "--use_cpu", "--dataset_name"]
    spread = str(tmp_path / "spread.safetensors")
    shrink = ["shrink-users", *here, str(tmp_path / "rows.jsonl"), "--dataset_split", "train", "--spread_file", spread]
    assert main([*shrink, "--validation_split", "validation", "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "3 users, 45 comparisons" in said and "on 45 held out" in said and "trained" in said
    load_reward_model(str(tmp_path / "out"), device="cpu")  # with its tokenizer
    assert (folder / "confidence").is_dir()  # nothing was written there
    assert main([*shrink, "--scale", "1", "--steps", "0", "--text_effects", "none"]) == 0
    assert not (folder / "confidence").exists()  # they were of other parts
    assert main(["fit-users", *here, str(tmp_path / "new.jsonl"), "--spread_file", spread]) == 0
    one, other = UserSpread.load(spread), UserSpread.load(UserSpread.load(spread).save(tmp_path / "again.safetensors"))
    assert torch.equal(one.directions, other.directions) and one.n_users == other.n_users == 3
    assert one.explained == other.explained
    assert main([*shrink, "--scale", "-1"]) == 2 and "scale=-1.0" in capsys.readouterr().err
    assert main([*shrink, "--text_effects", "-1"]) == 2 and "text_effects=-1.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*shrink, "--text_effects", "much"])
    assert "'much' came; a number or 'none' is needed" in capsys.readouterr().err
    Path(spread).write_bytes(b"torn")
    assert main(["fit-users", *here, str(tmp_path / "new.jsonl"), "--refit", "--spread_file", spread]) == 2
    assert "cannot be read as a spread" in capsys.readouterr().err


def test_a_plain_lora_gets_a_row_per_user(tmp_path, capsys):
    """TRL's adapter for all in, ours with a row per user out, without any training: who disagrees is told apart; the LoRA's folder stays."""
    base, lora, out = save_tiny("llama", tmp_path / "base"), tmp_path / "lora", tmp_path / "out"
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), config).save_pretrained(
        lora
    )
    TOKENIZER.save_pretrained(lora)
    before = {path.name: path.read_bytes() for path in lora.iterdir()}
    rows = [
        {**row, **({} if user < "e" else {"chosen": row["rejected"], "rejected": row["chosen"]}), "user_id": user, "split": split}
        for split, n in (("train", 30), ("validation", 15))
        for user in "abcdefgh"
        for row in preference_rows(["x"], n, seed=1)
    ]  # fmt: skip
    rows += [{**rows[0], "user_id": "i", "split": "validation"}]  # of whom nothing was learned
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    command = ["shrink-users", "--model_name_or_path", str(lora), "--use_cpu", "--dataset_name", str(tmp_path / "rows.jsonl")]  # fmt: skip
    command += ["--dataset_split", "train", "--validation_split", "validation"]
    assert (
        main(command) == 2 and "holds a plain LoRA, which stays as it is; give output_dir" in capsys.readouterr().err
    )
    assert main([*command, "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        "on 120 held out" in said
        and "in the model now: shrunk" in said
        and "0.125 of the moves, for the model is not linear in them" in said
    )
    assert {path.name: path.read_bytes() for path in lora.iterdir()} == before
    train = Dataset.from_list([row for row in rows if row["split"] == "train"])
    model, tokenizer = load_reward_model(str(out), device="cpu")
    common = from_lora(lora, list("abcdefgh"), device="cpu")
    assert accuracy(common, train) == 0.5 and accuracy(model, train) > 0.7
    with torch.no_grad(), use_users(model, ["nobody"] * 2, unseen="common"), use_users(common, ["a"] * 2):
        ids = torch.arange(10, 22).reshape(2, 6)
        torch.testing.assert_close(model(input_ids=ids).logits, common(input_ids=ids).logits)


def test_without_a_tokenizer_or_with_a_torn_config_it_says_so(tmp_path):
    base, lora = save_tiny("llama", tmp_path / "base"), tmp_path / "lora"
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), config).save_pretrained(
        lora
    )
    rows = Dataset.from_list(preference_rows(["a", "b"], 20))
    with pytest.raises(ConfigError, match="No tokenizer can be read from .*give processing_class=tokenizer"):
        shrink_users(lora, rows, output_dir=tmp_path / "out")
    with pytest.raises(DataError, match="No usable validation comparison is of a user"):
        strangers = Dataset.from_list(preference_rows(["z"], 8))
        shrink_users(lora, rows, TOKENIZER, validation=strangers, output_dir=tmp_path / "out")
    (lora / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="No ShareLoRA adapter can be read from .*lora"):
        shrink_users(lora, rows, TOKENIZER, output_dir=tmp_path / "out")


def tanh_model():
    """The linear model with a tanh between the layer and the head."""
    model = linear_model()
    layer = model.get_base_model().projection
    layer.register_forward_hook(lambda module, inputs, output: 2 * torch.tanh(output / 2))
    return model


def test_where_the_model_is_not_linear_each_user_ends_at_the_mode_of_the_real_one(monkeypatch):
    """Gauss-Newton steps against scipy on the real model's likelihood and the same prior, all entries free."""
    model = tanh_model()
    train, held = world(model, 3.0, 40), world(model, 3.0, 20, seed=2)
    scorer = shrinkage._open(model, TOKENIZER, 64, {})[0]
    passes = shrinkage._Passes(scorer)
    pairs = shrinkage._tokenised(train, scorer.users.index(train["user_id"]), scorer, None)[1]
    basis, prior = torch.eye(12), Prior(torch.zeros(12), 0.3 * torch.eye(12))
    beside = torch.zeros(len(pairs.user), dtype=torch.float64)
    solution = _Solution(torch.zeros(30, 12), [prior])
    for _ in range(12):
        solution = shrinkage._again(passes, pairs, solution, basis, beside)
    own = solution.users
    # under two priors it is the mean of two modes; what stands beside is in the margins and of no user's part
    other = Prior(torch.zeros(12), 0.1 * torch.eye(12))
    of_two, of_other = (shrinkage._again(passes, pairs, solution._replace(priors=priors), basis, beside) for priors in ([prior, other], [other]))  # fmt: skip
    of_one = shrinkage._again(passes, pairs, solution, basis, beside)
    torch.testing.assert_close(of_two.users, (of_one.users + of_other.users) / 2, atol=1e-5, rtol=1e-4)
    assert float(shrinkage._again(passes, pairs, solution, basis, beside + 50).users.norm()) < 1e-3
    mine = pairs.of(pairs.user == 4)
    mine.user = torch.zeros_like(mine.user)

    def loss(z):
        margins = passes.margins(mine, torch.tensor(z, dtype=torch.float32)[None])
        return float(-torch.nn.functional.logsigmoid(margins).sum()) + z @ z / 2 / 0.3**2

    best = optimize.minimize(loss, own[4].numpy(), method="Nelder-Mead", options={"maxiter": 3000, "fatol": 1e-7, "xatol": 1e-4})  # fmt: skip
    assert loss(own[4].numpy()) < best.fun + 1e-3 and np.abs(own[4].numpy()).max() > 0.05
    model = tanh_model()
    train, held = world(model, 1.5, 40), world(model, 1.5, 20, seed=2)
    result = shrink_users(model, train, TOKENIZER, validation=held)
    monkeypatch.setattr(shrinkage, "ROUNDS", 0)
    once = shrink_users(tanh_model(), train, TOKENIZER, validation=held)
    assert result.rounds >= 1 and once.rounds == 0 and result.chosen == once.chosen == "shrunk"
    gains = [one.table.set_index("state")["log_likelihood"]["shrunk"] for one in (once, result)]
    assert gains[1] > gains[0]


def test_on_a_linear_model_moves_are_not_halved_however_little_they_gain():
    model = linear_model()
    train, held = world(model, 0.0, 12), world(model, 0.0, 12, seed=22)
    result = shrink_users(model, train, TOKENIZER, validation=held, scale=4.0, steps=0)
    assert result.factor == 1 and result.rounds == 0 and result.chosen != "shrunk"


def test_moves_that_overflow_are_halved(monkeypatch):
    model = linear_model()
    train, held = world(model, 2.0, 12), world(model, 2.0, 12, seed=2)
    real, calls = shrinkage._margins, []

    def overflowing(passes, pairs, moves):
        calls.append(moves)
        found = real(passes, pairs, moves)
        return found * float("nan") if len(calls) == 3 else found  # common, trained, then all of the moves

    monkeypatch.setattr(shrinkage, "_margins", overflowing)
    result = shrink_users(model, train, TOKENIZER, validation=held)
    assert result.factor == 0.5 and result.chosen == "shrunk"
    monkeypatch.setattr(shrinkage, "_margins", lambda passes, pairs, moves: real(passes, pairs, moves) * float("nan"))
    with pytest.raises(NonFiniteError, match="at an eighth of the moves too"):
        shrink_users(model, train, TOKENIZER, validation=held)


def test_a_spread_of_another_adapter_is_refused():
    model = linear_model()
    other = UserSpread(torch.zeros(5), torch.eye(5)[:2], torch.ones(2), 1.0, 9)
    with pytest.raises(ConfigError, match="5 numbers per user, this adapter has 12"):
        fit_users(model, world(model, 1.0, 3, users=["eve"]), TOKENIZER, spread=other)
    assert get_router(model).users.find(["eve"]) == [-1]


def test_bad_input():
    model = linear_model()
    train = world(model, 1.0, 6)
    before = _UserMoves(model).read(range(30)).clone()
    for arguments, error, message in (
        ({"scale": 0.0}, ConfigError, "scale=0.0"),
        ({"steps": -1}, ConfigError, "steps=-1"),
        ({"text_effects": 0}, ConfigError, "text_effects=0 came; a standard deviation from 1e-06"),
        ({"text_effects": 10**400}, ConfigError, "1e-06 to 1,000,000, in log-odds"),
        ({"scale": 1e-50}, ConfigError, "1e-06 to 1,000,000"),
        ({"scale": float("inf")}, ConfigError, "1e-06 to 1,000,000, in log-odds"),
        ({"text_effects": True}, ConfigError, "text_effects=True came"),
        ({"text_effects": 1.0, "mean": False}, ConfigError, "mean=False and text_effects=1.0"),
        ({"validation": world(model, 1.0, 2, users=["nobody"])}, UnknownUserError, "nobody"),
    ):
        with pytest.raises(error, match=message):
            shrink_users(model, train, TOKENIZER, **arguments)
    with pytest.raises(UnknownUserError, match="stranger"):
        shrink_users(model, world(model, 1.0, 6, users=["stranger", "user0"]), TOKENIZER)
    with pytest.raises(DataError, match="of 1 users"):
        shrink_users(model, world(model, 1.0, 6, users=["user0"]), TOKENIZER)
    with pytest.raises(DataError, match="none can be held out"):
        shrink_users(model, world(model, 1.0, 3), TOKENIZER)
    with pytest.raises(DataError, match="No usable validation"):
        shrink_users(
            model,
            world(model, 1.0, 6, users=["user0", "user1"]),
            TOKENIZER,
            validation=world(model, 1.0, 6, users=["user2"]),
        )
    assert torch.equal(_UserMoves(model).read(range(30)), before)
    with torch.no_grad():
        model.get_base_model().projection.sharelora_B["default"].weight.zero_()
    with pytest.raises(DataError, match="depends on the users"):
        shrink_users(model, train, TOKENIZER)
    with torch.no_grad():
        model.get_base_model().classifier.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        shrink_users(model, train, TOKENIZER)
    assert torch.equal(_UserMoves(model).read(range(30)), before)
