"""Users' own parts after the training: each shrunk as far as all users together say, and no further.

A training stops each user's part somewhere between the common model and his own thirty answers, by a rate and a decay that are the same for all
users and directions. [`shrink_users`] puts every user's part where it is most likely, given his comparisons and how much users differ in each
direction, which it learns from all of them (trl_sharelora/empirical_bayes.py). B, A_0, the head and the base stay as they were trained.

How users differ is learned from the reward linearised at the common model, D = 0: exact where the adapted layer feeds a linear head (share="B" or "A" on the
last layer), an approximation elsewhere. There the users' parts are solved for again, with the model linearised where they are. What is written is checked with the real
model on held-out comparisons, and stays only if it is better there by more than its standard error (held_out.py).
"""

import dataclasses
import functools
import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from .confidence import CONFIDENCE_FOLDER, _open
from .data import check_preference_rows
from .empirical_bayes import Comparisons, Prior, Step, Texts, learn_prior, mean_beside_texts
from .errors import ConfigError, DataError, NonFiniteError
from .held_out import HeldOut
from .new_users import MOST_NUMBERS, UserSpread, _gram, _Pairs, _Passes, _tokenised
from .splits import near_duplicates, plain_text
from .starts import from_lora
from .users import UserRegistry


logger = logging.getLogger(__name__)

# Standard deviations of a margin before the first answer, in log-odds, from "hardly any difference" to "everybody his own". The best were .25 on
# MT-bench's judges, who agree, 1 on UKPConvArg's and 4 on Polis' voters, who do not (docs/log.md). EM moves them where that is wrong.
SCALES = (0.25, 1.0, 4.0)
# Beside texts' own effects this is tried too: EM from far out goes more slowly past the states that hold for new texts.
MORE_SCALES = (8.0,)
# At most; on held-out comparisons the best were 3 to 6 (UKPConvArg) and 8 to 16 (Polis, where the last 8 add .2 points). So many steps without a gain end a scale.
STEPS, PATIENCE = 12, 2
# Directions of the gradients that are kept, the first number that holds ENOUGH of them; comparisons that they are found from. On Polis 64, 128, 256 and 512 gave
# 76.0, 77.7, 78.5 and 78.5; 512 hold 98 % there and 70 % on UKPConvArg, where 955 hold 95 % and gave 77.3 instead of 76.9.
DIRECTIONS, ENOUGH, SAMPLE = (256, 512, 1024), 0.95, 2048
# Handed to newcomers: of 8, 32 and 64 the last did best from 50 answers on (Polis), and a fit takes .02 s in 64, 1 s in 382.
SPREAD_DIRECTIONS = 64
# Of the moves, tried in turn where the real model does not gain half of what the linearised one promises.
FACTORS = (1.0, 0.5, 0.25, 0.125)
# Times the model is linearised anew at the users' moves at most, each while held-out comparisons gain: on the demo's small Llama from 81.9 % to 82.7 % (trained:
# 80.9 %). Not where its margins are the linear ones but for LINEAR of them.
ROUNDS, LINEAR = 3, 1e-3
# Where texts are new all candidates that the best one does not beat by its standard error are averaged: there it is chance which one is best, and their mean varies half as
# much over the texts that are held out (docs/log.md).
AS_GOOD = 1.0
# Where of the validation's texts (or prompts) so many are new and fewer than so many, folds of the training's are asked too: what thirty statements of Polis chose lost as
# often as it gained on others (docs/log.md).
NEW, FEW_TEXTS, FOLDS = 0.9, 200, 5
# Where texts are new and those of the training are compared this often on average, at most so many of them: the users' mean is fitted anew beside an effect of each text's own.
# Standard deviations in log-odds of that effect, the second being none to speak of, and of a margin by that mean: the first of both unless others are likelier by a standard error
# on the folds, which know hardly anything of what is left out. On Polis the common part gained .7 to 1.3 points with 1 and 1; on UKPConvArg, whose folds want no effects or a stronger mean,
# these cost up to a point (docs/log.md).
TEXT_EFFECTS, MEAN_SCALES, OFTEN, MOST_TEXTS = (1.0, 0.01), (1.0, 2.0, 4.0, 8.0), 4, 4096
# For that the directions that are looked at must say what the common model says: at least so much of the variance of its margins on held-out comparisons. What they cannot
# say is lost, also where the base was right: in worlds where it is, below .95 the refit lost as often as it gained, below .7 two points on average (docs/log.md).
SAYS = 0.95
# Ridges of that, in mean squared features: the least that no other beats by MORE_SAID.
RIDGES, MORE_SAID = tuple(10.0**power for power in range(-6, 2)), 0.01
MISSING = 1e-3  # of its length must be outside the directions that are looked at, for one direction more
# Standard deviations in log-odds: what is beyond is a mistake and has no square in float32.
SMALLEST, LARGEST = 1e-6, 1e6
SEARCHED = 20_000  # comparisons, of as many users, that some fifty candidates are compared on; more move the choice little and cost in proportion
CAPTURED = 0.8  # of the squared gradients; below it there is a warning
NO_VALIDATION = "No usable validation comparison is of a user with training comparisons. Nothing has been changed."
EVERY = 5  # without validation comparisons, each fifth of a user's own is held out


@dataclass
class ShrinkageResult:
    """What [`shrink_users`] found and wrote.

    Args:
        chosen (`str`):
            What did best on held-out comparisons and is in the model now: `"shrunk"` (if better by its standard error over users and items, on the folds too where
            there are some), `"trained"` (as it came) or `"common"` (all moves zero).
        scale (`float`), steps (`int`), mean (`bool`):
            Of the shrunk (where several are averaged, of the best of them): standard deviation of a margin at the start (log-odds), EM steps from there, and whether the
            users' mean was fitted anew.
        table (`pandas.DataFrame`):
            `state` (`common`, `trained`, `shrunk`), `accuracy` (mean over users) and `log_likelihood` (of a comparison, mean over users, at each
            state's best factor of the margins) on held-out comparisons.
        candidates (`pandas.DataFrame`):
            `scale`, `steps`, `mean`, `text_effects`, `accuracy`, `log_likelihood`, `evidence` of everything tried, by the linearised model, on the users
            drawn for it (all up to 20,000 comparisons) and on the folds too where there are some; `averaged`: whether the shrunk are the mean over it and others.
        spread ([`~trl_sharelora.new_users.UserSpread`]):
            How users differ: the prior for newcomers, `fit_users(..., spread=result.spread)`.
        captured (`float`):
            Share of the squared length of gradients in the directions that were looked at, on comparisons they were not found from.
        n (`int`), n_users (`int`), dropped (`int`), held_out (`int`):
            Comparisons and users fitted, comparisons left out because they are too long or cannot be tokenised, comparisons held out to choose.
        text_effects (`float`, *optional*), mean_scale (`float`, *optional*):
            Standard deviations, in log-odds, of the effect of each text's own that the mean was fitted beside, and of a margin by that mean before the first comparison;
            None where the common part was not fitted anew.
        averaged (`int`):
            Of how many of the candidates the shrunk are the mean: where texts are new, of all that the best one does not beat by a standard error.
        factor (`float`):
            Share of the moves under the first linearisation that was kept, below 1 where the model is far from linear in them.
        rounds (`int`):
            How often the model was linearised anew, at the users' moves, and they were solved for again; 0 where it is linear or nothing was gained.
    """

    chosen: str
    scale: float
    steps: int
    mean: bool
    table: pd.DataFrame
    candidates: pd.DataFrame = field(repr=False)
    spread: UserSpread
    captured: float
    n: int
    n_users: int
    dropped: int
    held_out: int
    text_effects: float | None = None
    mean_scale: float | None = None
    averaged: int = 1
    factor: float = 1.0
    rounds: int = 0

    def __str__(self) -> str:
        shown = self.table.to_string(index=False, float_format="{:.4f}".format)
        return (
            f"{self.n_users} users, {self.n} comparisons"
            + (f", {self.dropped} dropped" if self.dropped else "")
            + "; on "
            f"{self.held_out} held out:\n{shown}\nin the model now: {self.chosen} (of the shrunk: scale {self.scale:g}, {self.steps} steps, mean {'fitted' if self.mean else 'as it was'}"
            + (
                f" with scale {self.mean_scale:g} beside texts' own effects of {self.text_effects:g}"
                if self.text_effects
                else ""
            )
            + (f", averaged with {self.averaged - 1} others as good" if self.averaged > 1 else "")
            + (f", {self.factor:g} of the moves, for the model is not linear in them" if self.factor < 1 else "")
            + (f", linearised anew {self.rounds} times" if self.rounds else "")
            + "; "
            f"{100 * self.captured:.0f} % of the gradients looked at)"
        )


def shrink_users(
    model_or_path: Any,
    comparisons: Dataset,
    processing_class: Any = None,
    *,
    validation: Dataset | None = None,
    scale: float | None = None,
    steps: int | None = None,
    mean: bool | None = None,
    text_effects: float | bool | None = None,
    user_column: str = "user_id",
    batch_size: int = 64,
    max_length: int | None = None,
    output_dir: str | os.PathLike | None = None,
    **loading: Any,
) -> ShrinkageResult:
    """Put every user's own part where it is most likely under the differences between users, learned from all of them by EM.

    A forward and backward pass over a sample of the comparisons, one over all, one over those held out and a few forwards of these, and where the model is not
    linear in the moves up to four passes more (of the fit; without `validation` up to three of all too); the rest is linear algebra on the host. Users without a usable comparison here keep their rows. Saved confidence sets are of the former parts, so they are removed
    from the directory, with a warning.

    Args:
        model_or_path ([`~peft.PeftModel`], `str` or `os.PathLike`):
            A trained ShareLoRA reward model, changed in place; or where it was saved: then it is saved again. The directory of a plain LoRA of a reward
            model will do too: in `output_dir` each user of `comparisons` gets a row beside it ([`~trl_sharelora.from_lora`]).
        comparisons ([`~datasets.Dataset`]):
            The training comparisons; see [`~trl_sharelora.data.check_preference_rows`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; by default the one saved with the adapter.
        validation ([`~datasets.Dataset`], *optional*):
            Comparisons of the same users that the training has not seen, by which scale and steps are chosen and the result is kept or not. By default
            each fifth comparison of each user is held out of the fit for the choice, and all are used after it; the model has been trained on them, so the
            state it came in looks better than it is and is not chosen. Where a user's comparisons share texts, only comparisons of other
            texts can tell, so give them. Validation of new texts asks whether tastes carry over to texts nobody has judged; where there are fewer than 200 of these (or
            of prompts, if these are new) five folds of the training's texts (prompts) are asked the like, in the linearised model, for the choice and for whether
            anything is changed. There the common model is the one trained on all of them, unless its part is fitted anew (`text_effects`). A prompt inside the texts
            is not seen as one.
        scale (`float`, *optional*):
            Standard deviation of a comparison's margin between users at the start, in log-odds; by default of .25, 1 and 4 (beside `text_effects` of 8 too) the one that
            does best. Where validation is of new texts all candidates that the best one does not beat by a standard error are averaged.
        steps (`int`, *optional*):
            EM steps; by default of 0 to 12 the number that does best. 0 is a ridge of the same strength for all users and directions.
        mean (`bool`, *optional*):
            Whether the users' common mean is fitted anew beside their differences; by default what does better at the best scale. (Where texts are new it costs up to two
            points without `text_effects`, where they are those of the training it gains as much.)
        text_effects (`float` or `bool`, *optional*):
            Fit the mean anew, from nothing, beside an effect of each text's own with this standard deviation, in log-odds
            ([`~trl_sharelora.empirical_bayes.mean_beside_texts`]): what the common model says of texts that were compared often is then not learned by heart. By default
            where validation is of new texts, those of the training (4,096 at most) stand in four comparisons each on average, and neither `mean` nor
            this is given: 1, or .01, which is none to speak of, where the folds (without them the validation comparisons) are likelier with it by a standard error. By default it
            is not fitted anew where the directions that are looked at say less than 95 % of what the common model says of held-out comparisons (what they cannot say
            would be lost; a value given here is warned of), nor where there are no folds and the validation comparisons are likelier with the common part as it came. Both are
            logged. Where validation is of new texts the folds say too, also for a value given here, how strong the mean is: a standard deviation of a margin of 1, or of 2, 4 or 8,
            by up to forty fits (20 s each with 4,096 texts); else it is 1. `False`: never.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        batch_size (`int`, *optional*, defaults to 64):
            Comparisons per forward; each is two sequences.
        max_length (`int`, *optional*):
            Comparisons with a longer text are dropped and counted; by default those beyond the model's positions are.
        output_dir (`str` or `os.PathLike`, *optional*):
            Where to save the model and its tokenizer, if not in `model_or_path`.
        **loading:
            See [`~trl_sharelora.scoring.load_reward_model`].

    Raises:
        DataError: there are no usable comparisons of at least two users, or a row is not one.
        UnknownUserError: a user is not in the model; see [`~trl_sharelora.new_users.fit_users`] for newcomers.
        ConfigError: `scale`, `steps` or `text_effects` is out of range, or `text_effects` cannot be had (`mean=False`, too many texts or too few comparisons); or a plain LoRA came without an `output_dir` of its own or without a tokenizer.
        MethodError: a plain LoRA cannot be copied exactly; see [`~trl_sharelora.from_lora`].
        NonFiniteError: a reward or gradient is NaN or infinite. In all cases nothing has been changed.

    Example:

    ```python
    trainer.train()
    result = shrink_users(trainer.model, train_dataset, tokenizer, validation=eval_dataset)
    fit_users(trainer.model, answers_of_newcomers, tokenizer, spread=result.spread)
    ```
    """
    if scale is not None and not _is_size(scale):
        raise ConfigError(
            f"scale={scale!r} came; a standard deviation from {SMALLEST:g} to {LARGEST:,.0f}, in log-odds, is needed."
        )
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise ConfigError(f"steps={steps!r} came; a whole number of at least 0 is needed.")
    if text_effects is not None and text_effects is not False:
        if not _is_size(text_effects):
            raise ConfigError(
                f"text_effects={text_effects!r} came; a standard deviation from {SMALLEST:g} to {LARGEST:,.0f}, in log-odds, False or None is needed."
            )
        if mean is False:
            raise ConfigError(
                f"mean=False and text_effects={text_effects!r} came; beside texts' own effects the mean is fitted anew. Leave one of them out."
            )
    if isinstance(model_or_path, str | os.PathLike) and _is_lora(model_or_path):
        if output_dir is None or Path(output_dir).resolve() == Path(model_or_path).resolve():
            raise ConfigError(
                f"{os.fspath(model_or_path)!r} holds a plain LoRA, which stays as it is; give output_dir=... for the adapter with a row per user."
            )
        check_preference_rows(comparisons, user_column, name="training")
        registry = UserRegistry.from_dataset(comparisons, user_column)
        if validation is not None:
            check_preference_rows(validation, user_column, name="validation")
            known = [number for number, row in enumerate(registry.find(validation[user_column][:])) if row >= 0]
            if not known:
                raise DataError(NO_VALIDATION)
            validation = validation.select(known)
        processing_class = _tokenizer(model_or_path, processing_class)
        model_or_path = from_lora(model_or_path, registry, processing_class=processing_class, **loading)
    scorer, path = _open(model_or_path, processing_class, batch_size, loading)
    directory = os.fspath(output_dir) if output_dir is not None else path
    if output_dir is None and directory is not None and not Path(directory).is_dir():
        raise ConfigError(f"{directory!r} is no directory here, so nothing can be saved in it; give output_dir=...")
    passes = _Passes(scorer)
    names: list[str] = []

    def read(dataset: Dataset, name: str) -> tuple[_Pairs, list[str], int]:
        check_preference_rows(dataset, user_column, name=name, users=scorer.users)
        dataset = dataset.with_format(None)
        ids = scorer.users.names(dataset[user_column][:])
        if name == "training":
            names.extend(dict.fromkeys(ids))
        scorer.users.index(ids)  # raises where one is unknown
        place = {user_id: number for number, user_id in enumerate(names)}
        kept, pairs, dropped = _tokenised(dataset, [place.get(one, len(place)) for one in ids], scorer, max_length)
        asked = dataset["prompt"][:] if "prompt" in dataset.column_names else [""] * len(dataset)
        return pairs, [plain_text(asked[row]) for row in kept], sum(dropped)

    pairs, prompts, dropped = read(comparisons, "training")
    held_prompts: list[str] = []
    some = pairs.user.unique()  # sorted; of whose comparisons none can be used, he keeps his row
    names = [names[user] for user in some.tolist()]
    pairs.user = torch.searchsorted(some, pairs.user)
    users = len(names)
    if users < 2:
        raise DataError(
            f"{len(pairs.user)} usable comparisons of {users} users came; what users have in common can be told from two users "
            "at least, better from twenty. Nothing has been changed."
        )
    own_validation = validation is not None
    if validation is not None:
        held, held_prompts, more_dropped = read(validation, "validation")
        there = held.user < users  # of users without a training comparison there is nothing to choose
        held, held_prompts = held.of(there), _where(there, held_prompts)
        if not len(held.user):
            raise DataError(NO_VALIDATION)
        dropped += more_dropped
        fitted_on = torch.ones(len(pairs.user), dtype=torch.bool)
    else:
        fitted_on = _kept_for_the_fit(pairs.user)
        held, held_prompts = pairs.of(~fitted_on), _where(~fitted_on, prompts)
        if not len(held.user):
            raise DataError(
                f"No user has {EVERY} comparisons, so none can be held out to choose by; give validation=. Nothing has been changed."
            )
    new_texts = own_validation and _new_texts(pairs, held)
    effect = _effects_of_texts(text_effects, new_texts and mean is None, pairs)
    basis, captured, of_common = _directions(passes, pairs)
    left_out = held if own_validation else ~fitted_on
    view = _looked_at(passes, pairs, users, left_out, basis)
    if not view.training.size:
        raise DataError(
            "No comparison depends on the users' own parts (B is zero, or the texts are all alike), so there is nothing to shrink. Was the model trained? "
            "Nothing has been changed."
        )
    if effect is not None:

        def wider() -> _View | None:
            if of_common is None:
                return None
            return _looked_at(passes, pairs, users, left_out, torch.cat([basis, of_common[None]]))

        view, effect = _sayable(view, wider, effect, text_effects is not None, new_texts)
    basis, training, held_out = view
    margins, features, (held_margins, held_features) = training.margins, training.features, held_out
    judge = _judge(held, held_prompts)
    folds = _folds(pairs, prompts, held, held_prompts) if new_texts else []
    if folds:
        logger.info(
            "The validation comparisons are of new texts, and few of these; scale and steps are chosen on %d folds of the training's texts too.",
            len(folds),
        )
    if effect is not None and new_texts:
        asked = [_Part(fitted, pairs.user[out], margins[out], features[out]) for fitted, out in folds]
        of_asked = _judge_of_folds(pairs, prompts, folds) if folds else judge
        asked = asked or [_Part(fitted_on, held.user, held_margins, held_features)]
        effects = TEXT_EFFECTS if text_effects is None else (effect,)
        effect, training.mean_scale = _likeliest_mean(training, asked, of_asked, effects)
        logger.info(
            "The common part is fitted anew with scale %g beside texts' own effects of %g, as %s say.",
            training.mean_scale,
            effect,
            "the folds" if folds else "the validation comparisons",
        )
    # candidates are compared on some of the users where there are many; what is chosen is fitted to all
    drawn = _drawn(pairs.user[fitted_on], held.user, users)
    in_sample, held_in_sample = drawn[pairs.user], drawn[held.user]
    folds = [(fitted, out & in_sample) for fitted, out in folds if bool((fitted & in_sample).any())]
    everybody, n_held = bool(in_sample.all() and held_in_sample.all()), int(held_in_sample.sum())
    parts = [
        _Part(
            fitted_on & in_sample,
            held.user[held_in_sample],
            held_margins[held_in_sample],
            held_features[held_in_sample],
        )
    ]
    parts += [_Part(fitted & in_sample, pairs.user[out], margins[out], features[out]) for fitted, out in folds]
    of_folds = torch.cat([torch.empty(0, dtype=torch.long), *(out.nonzero().flatten() for _, out in folds)])
    of_sample = _judge(held.of(held_in_sample), _where(held_in_sample, held_prompts), pairs, prompts, of_folds)

    def searched(effect: float | None) -> _Search:
        search = _Search(training, parts, of_sample, effect)
        for one in (*SCALES, *(MORE_SCALES if effect else ())) if scale is None else (scale,):
            search.climb(one, mean is not False and effect is None, steps)
        if mean is None and search.best is not None and effect is None:
            search.climb(search.best.scale, False, steps)
        return search

    search = searched(effect)
    searches, errors = [search], AS_GOOD if new_texts else None
    picked = search.picked(errors)
    if effect is not None and text_effects is None and not folds:
        # is it better than the common part as it came? Few texts cannot tell, nor folds: that was trained on their texts
        searches.append(searched(None))
        as_it_came = searches[1].picked(errors)
        if as_it_came is not None and (picked is None or as_it_came.log_likelihood > picked.log_likelihood):
            logger.info("Held-out comparisons are likelier with the common part as it came, so it stays.")
            search, picked, effect = searches[1], as_it_came, None
    best = search.best
    if best is None or search.step is None or picked is None:
        raise NonFiniteError(
            "The evidence is no number at any scale: margins or gradients are too large for it. Has the training diverged? Nothing has been changed."
        )
    some, along = picked.found, picked.along
    candidates = pd.DataFrame([row for one in searches for row in one.table(some)]).astype({"text_effects": float})
    fit, common = training.fitted(fitted_on, effect)
    solution = _Solution(search.step.users, [search.step.prior])
    if not everybody or len(some) > 1:
        solution = _solved(fit, training.size, effect, some) or solution
    solution = solution.beside(common.moved)

    rows = scorer.users.index(names)
    own = solution.users
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "common": lambda some: basis.new_zeros(len(some), passes.bank.entries),
        "trained": lambda some: passes.bank.read([rows[user] for user in some.tolist()]),
        "shrunk": lambda some: own[some].to(basis) @ basis,
    }
    found = {
        state: _margins(passes, held, ways[state])
        for state in ("common", "trained")
        if state != "trained" or own_validation
    }
    promised = (held_features * own[held.user]).sum(1).double()
    moves = _settled(
        passes, pairs.of(fitted_on), held, judge, basis, solution, promised, found["common"], common.beside
    )
    solution, found["shrunk"] = moves.solution, moves.margins
    own = solution.users
    judged = {state: judge.judged(margins) for state, margins in found.items()}
    table = pd.DataFrame(
        {
            "state": list(judged),
            "accuracy": [one.accuracy for one in judged.values()],
            "log_likelihood": [judge.mean(one.log_likelihood) for one in judged.values()],
        }
    )
    chosen = judge.best(judged, needs_more="shrunk")
    if folds:  # is it better than the common model there too, linearised? What it came with has been trained on them, so validation judges that alone
        before = max(("common", "trained"), key=lambda state: judge.mean(judged[state].log_likelihood))
        pooled = _judge(held, held_prompts, pairs, prompts, of_folds)
        # "common" is there the one fitted without the fold's texts, if it is fitted anew
        with_folds = {
            state: pooled.judged(torch.cat([found[state], (search.margins + moves.factor * moved)[n_held:]]))
            for state, moved in (("common", search.moved), ("shrunk", search.moved + along))
        }
        better = pooled.best(with_folds, needs_more="shrunk") == "shrunk"
        chosen = "shrunk" if better and (before == "common" or chosen == "shrunk") else before
    if not own_validation:
        logger.warning(
            "The held-out fifths were in the training, so the common part fits them too well, and what the model came with could not be judged and is "
            "replaced. Give validation= to be safe."
        )
        # they count too, now that nothing is chosen by them any more
        fit, common = training.fitted(torch.ones_like(fitted_on), effect)
        again = _solved(fit, training.size, effect, some)
        if again is not None:
            solution = again.beside(common.moved).scaled(moves.factor)
        for _ in range(moves.rounds if chosen == "shrunk" else 0):
            solution = _again(passes, pairs, solution, basis, moves.factor * common.beside)
        own = solution.users
    if chosen != "trained":
        for user, row in enumerate(rows):
            passes.bank.write(row, ways[chosen](torch.tensor([user]))[0])
        config = scorer.model.peft_config[scorer.model.active_adapter]
        if config.trained_users is not None and set(rows) >= set(range(config.trained_users, len(scorer.users))):
            config.trained_users = None  # all who came after the training have been fitted like the others
    if directory is not None:
        _save(scorer, directory, directory != path, chosen != "trained")
    averaged = len(solution.priors)
    # newcomers begin where the model is: what was refused of the mean is not handed on
    if chosen == "trained":
        solution = solution.beside(-moves.factor * common.moved)
    elif chosen == "common":
        solution = solution.centred()
    result = ShrinkageResult(
        chosen, best.scale, best.number, best.mean, table, candidates, _as_spread(solution, basis, users),
        captured, len(pairs.user), users, dropped, len(held.user), effect, None if effect is None else training.mean_scale, averaged, moves.factor, moves.rounds,
    )  # fmt: skip
    for line in str(result).splitlines():
        logger.info(line)
    return result


def _is_size(value: Any) -> bool:
    """Whether it can be a standard deviation in log-odds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and SMALLEST <= value <= LARGEST


def _effects_of_texts(asked: float | bool | None, fitting: bool, pairs: _Pairs) -> float | None:
    """The standard deviation of texts' own effects; `fitting`: whether there are to be any if none is asked for."""
    n, texts = len(pairs.user), len({tuple(text) for side in (pairs.chosen, pairs.rejected) for text in side})
    possible = texts <= min(n, MOST_TEXTS)
    if asked and not possible:
        raise ConfigError(
            f"text_effects={asked!r} came with {n:,} comparisons of {texts:,} texts; for effects of their own there must be no more texts than comparisons, and {MOST_TEXTS:,} "
            "at most. Leave it out. Nothing has been changed."
        )
    if asked:
        return float(asked)
    return TEXT_EFFECTS[0] if asked is None and fitting and possible and 2 * n >= OFTEN * texts else None


def _sayable(
    view: "_View", wider: Callable[[], "_View | None"], effect: float, asked: bool, new_texts: bool
) -> tuple["_View", float | None]:
    """Whether the common part can be fitted anew with the directions that are looked at, or with one more: the view that is to be used, and the texts' effects or None.

    `asked`: whether the refit was, so that it is made in any case; `new_texts`: whether what is held out is of new texts, else it cannot tell.
    """
    if view.training.texts is None:
        raise NonFiniteError(
            "The rewards of some texts, or their gradients, are so large that their differences overflow. Has the training diverged? Nothing has been changed."
        )
    said = view.training.learn(view.held_out)
    more = wider() if said < SAYS else None
    if more is not None:
        now = more.training.learn(more.held_out)
        if now >= SAYS or (asked and now > said + MORE_SAID):
            view, said = more, now
    what = "what the users' parts cannot say of the common model"
    if said < SAYS and not asked:
        logger.info(
            "The directions that are looked at say %.0f %% of the common model's margins on held-out comparisons; the common part stays as it came, for %s would be lost.",
            100 * max(said, 0),
            what,
        )
        return view, None
    if said < SAYS:
        logger.warning(
            "The directions that are looked at say %.0f %% of the common model's margins on held-out comparisons; %s is lost, as text_effects=%g asks for a common part "
            "fitted anew.",
            100 * max(said, 0),
            what,
            effect,
        )
    elif not new_texts:
        logger.warning(
            "The common part is fitted anew, as text_effects=%g asks, and no comparisons of new texts are held out that could tell whether %s is lost. Give such "
            "validation to be safe.",
            effect,
            what,
        )
    return view, effect


def _where(keep: torch.Tensor, items: list[str]) -> list[str]:
    return [items[place] for place in keep.nonzero().flatten().tolist()]


def _drawn(user: torch.Tensor, held: torch.Tensor, users: int) -> torch.Tensor:
    """`(users,)` bool: all users, or as many drawn of them as have [`SEARCHED`] comparisons, a hundred at least; first those of whom some are held out."""
    counts = torch.bincount(user, minlength=users).clamp(max=SEARCHED // 100)
    order = torch.from_numpy(np.random.default_rng(0).permutation(users))
    asked = torch.bincount(held, minlength=users)[order] > 0
    order = torch.cat([order[asked], order[~asked]])
    some = torch.zeros(users, dtype=torch.bool)
    some[order[counts[order].cumsum(0) - counts[order] < SEARCHED]] = True
    return some


def _judge(
    held: _Pairs, prompts: list[str], more: _Pairs | None = None, more_prompts: Sequence[str] = (), places: Any = ()
) -> HeldOut:
    """Of the comparisons `held` and those of `more` at `places`."""
    user, chosen, rejected = held.user, list(map(tuple, held.chosen)), list(map(tuple, held.rejected))
    if more is not None and len(places):
        user = torch.cat([user, more.user[places]])
        chosen += [tuple(more.chosen[place]) for place in places.tolist()]
        rejected += [tuple(more.rejected[place]) for place in places.tolist()]
        prompts = prompts + [more_prompts[place] for place in places.tolist()]
    return HeldOut(user, chosen, rejected, prompts)


def _judge_of_folds(pairs: _Pairs, prompts: list[str], folds: list[tuple[torch.Tensor, torch.Tensor]]) -> HeldOut:
    """Of what the folds leave out, in their order."""
    nothing = pairs.of(torch.zeros(len(pairs.user), dtype=torch.bool))
    return _judge(nothing, [], pairs, prompts, torch.cat([out.nonzero().flatten() for _, out in folds]))


def _new_texts(pairs: _Pairs, held: _Pairs) -> bool:
    """Whether nearly all texts that are held out are none of the training's."""
    known = {tuple(text) for side in (pairs.chosen, pairs.rejected) for text in side}
    new = sum(tuple(text) not in known for side in (held.chosen, held.rejected) for text in side)
    return new >= NEW * 2 * len(held.user)


def _folds(
    pairs: _Pairs, prompts: list[str], held: _Pairs, held_prompts: list[str]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where validation, which is of new texts, holds few, the like asked of the training: what is fitted on and what left out, each `(n,)` bool.

    What is dealt to the folds are prompts, if validation's are new, near-duplicates together (as in [`~trl_sharelora.splits.split_by_item`]: the two sides of a debate are one
    item), else texts; comparisons with a text in and one out of a fold are neither. What is left out is so of the users' parts alone: the common model, B and head know it.
    """
    sides = [list(map(tuple, side)) for side in (pairs.chosen, pairs.rejected)]
    asked = {*prompts, ""}  # where a column of them is missing they are empty
    several = len(asked) > FOLDS and sum(one not in asked for one in held_prompts) >= NEW * len(held_prompts)
    grouped = near_duplicates(prompts) if several else []
    several = several and len(set(grouped)) >= FOLDS  # else no fold could be without one of them, and texts are dealt
    units: list[Any] = [grouped, grouped] if several else sides
    of_held = set(held_prompts) if several else {tuple(text) for side in (held.chosen, held.rejected) for text in side}
    number = {one: place for place, one in enumerate(dict.fromkeys([*units[0], *units[1]]))}
    if len(of_held) >= FEW_TEXTS or len(number) < FOLDS:
        return []
    fold = torch.from_numpy(np.random.default_rng(0).permutation(len(number)) % FOLDS)
    of_chosen, of_rejected = (fold[[number[one] for one in side]] for side in units)
    found = []
    for one in range(FOLDS):
        fitted, left_out = (of_chosen != one) & (of_rejected != one), (of_chosen == one) & (of_rejected == one)
        if bool(fitted.any() and left_out.any()):
            found.append((fitted, left_out))
    return found


class _Linear(NamedTuple):
    """Comparisons in the model linearised at the common one: margins `(n,)` and features `(n, k)`."""

    margins: torch.Tensor
    features: torch.Tensor


class _CommonPart(NamedTuple):
    """What the common part is changed by: `(k,)`, and what texts' own effects add to the fitted margins `(n,)`."""

    moved: torch.Tensor
    beside: torch.Tensor


@dataclass
class _Training:
    """The training comparisons in the model linearised at the common one: margins `(n,)`, features `(n, k)`, users `(n,)` and their number, texts if
    these are fewer than comparisons."""

    margins: torch.Tensor
    features: torch.Tensor
    user: torch.Tensor
    n_users: int
    texts: Texts | None
    learned: torch.Tensor | None = None
    mean_scale: float = MEAN_SCALES[0]  # of the common part fitted anew, as the users' scale

    @functools.cached_property
    def size(self) -> float:
        """Root mean square length of the features."""
        return float(self.features.square().sum(1).mean().sqrt())

    def learn(self, held_out: _Linear) -> float:
        """What of the common model's margins the features can say, into `learned` `(k,)`: by least squares, with the least ridge that no other beats. Returns its share of
        the squared margins that are held out; below 0 it says worse than nothing. Where these are of the texts that it is learned on, the share says too much."""
        gram = (self.features.T @ self.features).double()
        if not bool(gram.isfinite().all()):
            raise NonFiniteError(
                "The gradients of the rewards are too large: their squares overflow. Has the training diverged? Nothing has been changed."
            )
        values, vectors = torch.linalg.eigh(gram)
        along = vectors.T @ (self.features.T.double() @ self.margins)
        total = float(held_out.margins.square().sum()) or 1.0
        found = []
        mean_square = float(gram.diagonal().mean()) or 1.0
        for ridge in RIDGES:  # of what no comparison tells nothing is said
            learned = vectors @ (along / (values.clamp(min=0) + ridge * mean_square))
            left = held_out.margins - held_out.features.double() @ learned
            found.append((1 - float(left.square().sum()) / total, learned))
        most = max(said for said, _ in found)
        said, self.learned = next(one for one in found if one[0] >= most - MORE_SAID)
        return said

    def common(self, keep: torch.Tensor, effect: float | None) -> _CommonPart:
        """As it is, or fitted anew, from nothing, beside texts' effects of that standard deviation, to the comparisons `keep` `(n,)`."""
        if effect is None:
            return _CommonPart(self.features.new_zeros(self.features.shape[1]), torch.zeros(int(keep.sum())).double())
        assert self.texts is not None and self.learned is not None
        texts = self.texts.of(keep)
        left = self.margins[keep] - self.features[keep].double() @ self.learned
        found = mean_beside_texts(texts, left, self.mean_scale / self.size, effect)
        moved = (found.mean.double() - self.learned).float()
        return _CommonPart(moved, found.effects[texts.chosen] - found.effects[texts.rejected])

    def fitted(self, keep: torch.Tensor, effect: float | None) -> tuple[Comparisons, _CommonPart]:
        """The comparisons `keep` for the users' own parts, beside that common part."""
        common, features = self.common(keep, effect), self.features[keep]
        offsets = self.margins[keep] + features.mv(common.moved).double() + common.beside
        return Comparisons(features, offsets, self.user[keep], self.n_users), common


class _Part(NamedTuple):
    """Which training comparisons are fitted, `(n,)` bool, and comparisons that are held out of it, linearised: whose, margins `(n,)` and features `(n, k)`."""

    fitted: torch.Tensor
    user: torch.Tensor
    margins: torch.Tensor
    features: torch.Tensor

    def with_moves(self, users: torch.Tensor) -> torch.Tensor:
        """Margins with the users' parts `(users, k)`."""
        return self.margins + (self.features * users[self.user]).sum(1).double()


class _View(NamedTuple):
    """What is looked at: the directions `(k, entries)`, and along them the training comparisons and those held out."""

    basis: torch.Tensor
    training: _Training
    held_out: _Linear


def _likeliest_mean(
    training: _Training, parts: list[_Part], judge: HeldOut, effects: Sequence[float]
) -> tuple[float, float]:
    """Of the texts' effects and strengths of its own those with which the common part fitted anew does best, by itself, on what is held out of all parts; the first ones
    unless those are likelier by a standard error."""
    found: dict[tuple[float, float], torch.Tensor] = {}
    for effect in effects:
        before = -math.inf
        for scale in MEAN_SCALES:  # from the strongest ridge on, until less of it helps no more
            tried = dataclasses.replace(training, mean_scale=scale)
            moved = [part.features.mv(tried.common(part.fitted, effect).moved).double() for part in parts]
            likelihoods = judge.judged(torch.cat([part.margins for part in parts]) + torch.cat(moved)).log_likelihood
            if judge.mean(likelihoods) <= before and (effect, MEAN_SCALES[0]) in found:
                break
            before, found[effect, scale] = judge.mean(likelihoods), likelihoods
    first, best = next(iter(found)), max(found, key=lambda one: judge.mean(found[one]))
    gain = found[best] - found[first]
    return best if judge.mean(gain) > judge.error(gain) else first


class _Found(NamedTuple):
    scale: float
    mean: bool  # fitted, by EM or anew beside texts' effects
    number: int  # of EM steps
    along: torch.Tensor  # (n,) what the moves add to the margins of all that is held out
    log_likelihoods: torch.Tensor  # (n,) with them
    log_likelihood: float
    accuracy: float
    evidence: float


class _Picked(NamedTuple):
    found: list[_Found]
    along: torch.Tensor  # (n,) their mean
    log_likelihood: float


class _Search:
    """Scales, EM steps and whether the mean is fitted, by the linearised model's likelihood of held-out comparisons.

    Args:
        training ([`_Training`]): What is fitted.
        parts (`list[_Part]`): Of it each by itself; the first part's fit is what stays.
        judge ([`HeldOut`]): Of all that is held out, part by part.
        effect (`float`, *optional*): Of the texts' own effects that the common part is fitted anew beside; else it stays.
    """

    def __init__(self, training: _Training, parts: list[_Part], judge: HeldOut, effect: float | None) -> None:
        self.parts, self.judge, self.size, self.effect = parts, judge, training.size, effect
        fitted = [training.fitted(part.fitted, effect) for part in parts]
        self.fits = [fit for fit, _ in fitted]
        self.margins = torch.cat([part.margins for part in parts])  # as the model came
        self.moved = torch.cat(
            [part.features.mv(common.moved).double() for part, (_, common) in zip(parts, fitted, strict=True)]
        )
        self.found: list[_Found] = []
        self.best: _Found | None = None
        self.step: Step | None = None  # the best one's, of the first part

    def climb(self, scale: float, mean: bool, steps: int | None) -> None:
        """From one scale, until [`PATIENCE`] steps in a row gain nothing; with `steps` only the state after so many counts."""
        tau, most = scale / self.size, STEPS if steps is None else steps
        first, *others = (_steps(fit, tau, most, mean) for fit in self.fits)
        states = zip(first, *map(_lasting, others), strict=False)
        peak, since = -math.inf, 0
        for state in states if steps is None else deque(states, maxlen=1):
            along = torch.cat(
                [
                    part.with_moves(step.users) - part.margins if step else torch.zeros_like(part.margins)
                    for part, step in zip(self.parts, state, strict=True)
                ]
            )
            accuracy, likelihoods = self.judge.judged(self.margins + self.moved + along)
            likelihood, step = self.judge.mean(likelihoods), state[0]
            fitted = mean or self.effect is not None
            self.found.append(
                _Found(scale, fitted, step.number, along, likelihoods, likelihood, accuracy, step.evidence)
            )
            if self.best is None or likelihood > self.best.log_likelihood:
                self.best, self.step = self.found[-1], step
            peak, since = (likelihood, 0) if likelihood > peak else (peak, since + 1)
            if since == PATIENCE:
                return

    def picked(self, errors: float | None) -> _Picked | None:
        """The best one, or the mean of all that it does not beat by so many standard errors; None where there is none."""
        if self.best is None:
            return None
        found = [self.best] if errors is None else self.as_good(errors)
        along = torch.stack([one.along for one in found]).mean(0)
        judged = self.judge.judged(self.margins + self.moved + along)
        return _Picked(found, along, self.judge.mean(judged.log_likelihood))

    def table(self, averaged: list[_Found]) -> list[dict[str, float | None]]:
        """All that was tried."""
        fields = ("accuracy", "log_likelihood", "evidence")
        return [
            {
                "scale": one.scale,
                "steps": one.number,
                "mean": one.mean,
                "text_effects": self.effect,
                **{name: getattr(one, name) for name in fields},
                "averaged": len(averaged) > 1 and any(one is other for other in averaged),
            }
            for one in self.found
        ]

    def as_good(self, errors: float) -> list[_Found]:
        """Those that the best one does not beat by more than so many standard errors."""
        assert self.best is not None
        gains = [self.best.log_likelihoods - one.log_likelihoods for one in self.found]
        return [
            one
            for one, gain in zip(self.found, gains, strict=True)
            if self.judge.mean(gain) <= errors * self.judge.error(gain)
        ]


class _Solution(NamedTuple):
    """The users' parts `(users, k)`, and what they are the mean over: the modes under each of these priors."""

    users: torch.Tensor
    priors: list[Prior]

    def scaled(self, factor: float) -> "_Solution":
        return _Solution(
            factor * self.users, [Prior(factor * prior.mean, factor * prior.root) for prior in self.priors]
        )

    def centred(self) -> "_Solution":
        """As far from the common model, with no mean of their own."""
        return self._replace(priors=[prior._replace(mean=torch.zeros_like(prior.mean)) for prior in self.priors])

    def beside(self, moved: torch.Tensor) -> "_Solution":
        """On a common part that has moved, `(k,)`."""
        return _Solution(self.users + moved, [prior._replace(mean=prior.mean + moved) for prior in self.priors])


class _Moves(NamedTuple):
    solution: _Solution
    margins: torch.Tensor  # (n,) the real model's, of what is held out
    factor: float
    rounds: int


def _settled(
    passes: _Passes,
    fitted: _Pairs,
    held: _Pairs,
    judge: HeldOut,
    basis: torch.Tensor,
    solution: _Solution,
    along: torch.Tensor,
    common: torch.Tensor,
    beside: torch.Tensor,
) -> _Moves:
    """The users' parts in the real model: halved as long as it does not follow the linear one, then solved for again as long as held-out comparisons gain.

    `along` `(n,)`: what all of the moves add to the margins `common` `(n,)` of what is held out in the linearised model; `beside`: see [`_again`].
    """

    def real(own: torch.Tensor) -> torch.Tensor:
        return _margins(passes, held, lambda some: own[some].to(basis) @ basis)

    def gain(margins: torch.Tensor) -> float:
        return judge.mean(judge.judged(margins).log_likelihood) - nothing

    nothing = judge.mean(judge.judged(common).log_likelihood)
    best: _Moves | None = None
    for factor in FACTORS:
        scaled = solution.scaled(factor)
        margins = real(scaled.users)
        if not bool(margins.isfinite().all()):
            continue
        promise = common + factor * along
        curved = not torch.allclose(margins, promise, rtol=LINEAR, atol=LINEAR)
        if best is None or gain(margins) > gain(best.margins):
            best = _Moves(scaled, margins, factor, 0)
        promised = gain(promise)
        if not curved or promised <= 0 or gain(margins) >= promised / 2:
            break  # as far as the linearised model holds
    if best is None:
        raise NonFiniteError(
            "The rewards at the users' moves are NaN or infinite, at an eighth of the moves too. Does the base's dtype overflow? (Load it in "
            "float32 or bfloat16.) Nothing has been changed."
        )
    while curved and best.rounds < ROUNDS:
        again = _again(passes, fitted, best.solution, basis, best.factor * beside)
        margins = real(again.users)
        if not gain(margins) > gain(best.margins):
            break
        best = best._replace(solution=again, margins=margins, rounds=best.rounds + 1)
    return best


def _is_lora(path: str | os.PathLike) -> bool:
    try:
        return json.loads(Path(path, "adapter_config.json").read_bytes())["peft_type"] == "LORA"
    except (OSError, ValueError, KeyError, TypeError):
        return False  # whoever reads it says what is wrong


def _tokenizer(path: str | os.PathLike, processing_class: Any) -> Any:
    if processing_class is not None:
        return processing_class
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No tokenizer can be read from {os.fspath(path)!r} ({str(error).splitlines()[0]}); give processing_class=tokenizer, or save it there."
        ) from error


def _portions(passes: _Passes, pairs: _Pairs) -> Iterator[tuple[torch.Tensor, torch.Tensor, _Pairs]]:
    """Some users at a time, as all their moves may not fit into the memory: they, which comparisons are theirs, and these with the users' places."""
    for some in pairs.user.unique().split(max(1, min(256, MOST_NUMBERS // 4 // passes.bank.entries))):
        own = torch.isin(pairs.user, some)
        part = pairs.of(own)
        part.user = torch.searchsorted(some, part.user)
        yield some, own, part


def _margins(passes: _Passes, pairs: _Pairs, moves: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Of the real model."""
    margins = torch.empty(len(pairs.user), dtype=torch.float64)
    for some, own, part in _portions(passes, pairs):
        margins[own] = passes.margins(part, moves(some).to(passes.scorer.device))
    return margins


def _again(
    passes: _Passes, pairs: _Pairs, solution: _Solution, basis: torch.Tensor, beside: torch.Tensor
) -> _Solution:
    """Every user's part under the priors and the model linearised at the parts he has: a step of Gauss and Newton.

    `beside` `(n,)`: what is in the margins and of no user's part, the texts' own effects.
    """
    own = solution.users
    offsets = torch.empty(len(pairs.user), dtype=torch.float64)
    features = torch.empty(len(pairs.user), len(basis))
    for some, mine, part in _portions(passes, pairs):
        margins, gradients = passes.linearise(part, own[some].to(basis) @ basis, basis)
        features[mine] = gradients.float()
        offsets[mine] = margins + beside[mine] - (gradients * own[some][part.user].double()).sum(1)
    if not bool(offsets.isfinite().all() and features.isfinite().all()):
        return solution
    problem, users = Comparisons(features, offsets, pairs.user, len(own)), torch.zeros_like(own)
    for prior in solution.priors:
        y, _, _ = problem.solve(prior, moments=False)
        users += (prior.mean + y @ prior.root.T) / len(solution.priors)
    return solution._replace(users=users)


def _save(scorer: Any, directory: str, elsewhere: bool, changed: bool) -> None:
    scorer.model.save_pretrained(directory)
    if elsewhere:
        scorer.processing_class.save_pretrained(directory)
    confidence = Path(directory, CONFIDENCE_FOLDER)
    if changed and confidence.is_dir():
        # features depend on the users' parts: sets of other ones would be wrong and nothing would show it
        shutil.rmtree(confidence)
        logger.warning(
            "The confidence sets in %s were of the users' former parts and are removed; run fit_confidence (trl-sharelora confidence) again.",
            confidence,
        )


def _steps(fit: Comparisons, tau: float, steps: int, mean: bool) -> Iterator[Step]:
    """EM until the evidence is no number any more or falls: what came before it stands."""
    before = -math.inf
    states = learn_prior(fit, tau, steps, mean=mean)
    while True:
        try:
            step = next(states)
        except StopIteration:
            return
        except torch.linalg.LinAlgError:
            logger.warning("EM stopped: a covariance is singular or no number.")
            return
        if not math.isfinite(step.evidence) or step.evidence < before - 1e-3 * abs(before):
            logger.warning(
                "EM stopped after %d steps: the evidence fell from %.1f to %.1f.",
                step.number - 1,
                before,
                step.evidence,
            )
            return
        before = step.evidence
        yield step


def _solved(fit: Comparisons, size: float, effect: float | None, some: list[_Found]) -> _Solution | None:
    """The mean of the users' parts after some numbers of EM steps from some scales; where EM ends before one of them its last state; None where it has none."""
    asked: dict[tuple[float, bool], list[int]] = {}
    for one in some:
        asked.setdefault((one.scale, one.mean and effect is None), []).append(one.number)
    users = torch.zeros(fit.n_users, fit.features.shape[1])
    priors: list[Prior] = []
    for (scale, mean), numbers in asked.items():
        last = None
        for step in _steps(fit, scale / size, max(numbers), mean):
            last = step
            if step.number in numbers:
                users, priors = users + step.users, [*priors, step.prior]
        beyond = [number for number in numbers if last is not None and number > last.number]
        if last is not None and beyond:
            users, priors = users + len(beyond) * last.users, [*priors, *[last.prior] * len(beyond)]
    return _Solution(users / len(priors), priors) if priors else None


def _lasting(states: Iterator[Step]) -> Iterator[Step | None]:
    """The last one again and again after the end; None where there is none."""
    last = None
    for last in states:
        yield last
    while True:
        yield last


def _directions(passes: _Passes, pairs: _Pairs) -> tuple[torch.Tensor, float, torch.Tensor | None]:
    """`(k, entries)`, orthonormal: the directions in which the comparisons' gradients at D = 0 are large; their share of the squared length of
    gradients that they were not found from; and `(entries,)`, orthogonal to them, the one that is missing to say what the common model says, if one is."""
    n, entries = len(pairs.user), passes.bank.entries
    sample = torch.from_numpy(np.random.default_rng(0).permutation(n)[: max(64, min(SAMPLE, MOST_NUMBERS // entries))])
    keep = torch.zeros(n, dtype=torch.bool)
    keep[sample] = True
    margins, gradients, _ = _linearised(passes, pairs.of(keep), None)
    unseen = (
        torch.arange(len(gradients)) % 8 == 7
        if len(gradients) >= 64
        else torch.zeros(len(gradients), dtype=torch.bool)
    )
    used = gradients[~unseen]
    values, vectors = torch.linalg.eigh(_gram(used))
    large = values > 1e-6 * values[-1].clamp(min=1e-30)
    if not bool(values[-1] > 0):
        large[-1] = True
    values, vectors = values[large].flip(0), vectors[:, large].flip(1)
    total = float(gradients[unseen].square().sum())
    for directions in DIRECTIONS:
        basis = torch.linalg.qr((vectors[:, :directions].T.float() @ used).T)[0].T.contiguous()
        captured = float((gradients[unseen] @ basis.T).square().sum()) / total if total else 1.0
        if captured >= ENOUGH or directions >= vectors.shape[1]:
            break
    if captured < CAPTURED:
        logger.warning(
            "The %d directions that are looked at hold %.0f %% of the comparisons' gradients; what users differ in beside them is lost.",
            len(basis),
            100 * captured,
        )
    device = passes.scorer.device
    # what reproduces the common model's margins on these comparisons, less what the others hold of it
    weights = vectors @ (vectors.T @ margins[~unseen].to(vectors) / values.clamp(min=1e-30))
    found = _outside(weights.float() @ used, basis) if len(basis) < vectors.shape[1] else None
    return basis.to(device), captured, None if found is None else found.to(device)


def _outside(vector: torch.Tensor, basis: torch.Tensor) -> torch.Tensor | None:
    """The direction of what an orthonormal basis `(k, entries)` lacks of a vector `(entries,)`; None where that is rounding."""
    whole = float(vector.norm())
    for _ in range(2):  # twice is enough (Kahan): what is left may be small
        vector = vector - basis.T @ (basis @ vector)
    length = float(vector.norm())
    return vector / length if MISSING * whole < length < math.inf else None


def _looked_at(passes: _Passes, pairs: _Pairs, users: int, held: _Pairs | torch.Tensor, basis: torch.Tensor) -> _View:
    """The training comparisons and those held out, which are some of the training's `(n,)` bool or others, along the basis."""
    margins, features, texts = _linearised(passes, pairs, basis)
    if isinstance(held, torch.Tensor):
        held_out = _Linear(margins[held], features[held])
    else:
        held_out = _Linear(*_linearised(passes, held, basis)[:2])
    return _View(basis, _Training(margins, features, pairs.user, users, texts), held_out)


def _linearised(
    passes: _Passes, pairs: _Pairs, basis: torch.Tensor | None, once: bool = True
) -> tuple[torch.Tensor, torch.Tensor, Texts | None]:
    """Margins `(n,)` and gradients along the basis `(n, k)` at the common model; and the texts, if these are fewer than comparisons.

    At the common model nobody differs, so it is enough to look `once` at each text.
    """
    number: dict[tuple[int, ...], int] = {}
    chosen, rejected = (
        torch.tensor([number.setdefault(tuple(text), len(number)) for text in side])
        for side in (pairs.chosen, pairs.rejected)
    )
    once = once and len(number) <= len(pairs.user)
    looked_at = pairs
    if once:  # each text against the shortest
        texts = [list(text) for text in number]
        looked_at = _Pairs(texts, [min(texts, key=len)] * len(texts), torch.empty(0))
    alike = _Pairs(looked_at.chosen, looked_at.rejected, torch.zeros(len(looked_at.chosen), dtype=torch.long))
    zero = torch.zeros(1, passes.bank.entries, device=passes.scorer.device)
    margins, gradients = passes.linearise(alike, zero, basis)
    if once:
        of_texts, margins = gradients.float(), margins[chosen] - margins[rejected]
        gradients = of_texts[chosen] - of_texts[rejected]
    bad = ~(margins.isfinite() & gradients.isfinite().all(1))
    if bool(bad.any()):
        if once:  # the text that all are set against may be the one that is bad: which comparisons are?
            return _linearised(passes, pairs, basis, once=False)
        raise NonFiniteError(
            f"The rewards of {int(bad.sum())} of {len(bad)} comparisons, or their gradients, are NaN or infinite. The model has diverged, or the "
            "base's dtype overflows (load it in float32 or bfloat16). Nothing has been changed."
        )
    return margins, gradients.float(), Texts(chosen, rejected, of_texts) if once else None


def _kept_for_the_fit(user: torch.Tensor) -> torch.Tensor:
    """`(n,)` bool: all but each fifth comparison of each user."""
    seen: dict[int, int] = {}
    kept = []
    for one in user.tolist():
        seen[one] = seen.get(one, 0) + 1
        kept.append(seen[one] % EVERY != 0)
    return torch.tensor(kept, dtype=torch.bool)


def _as_spread(solution: _Solution, basis: torch.Tensor, users: int) -> UserSpread:
    roots = [prior.root.double() for prior in solution.priors]
    covariance = torch.stack([root @ root.T for root in roots]).mean(0)
    values, vectors = torch.linalg.eigh(covariance)
    scales, vectors = values.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    explained = scales.square().cumsum(0) / scales.square().sum()
    kept = torch.arange(len(scales)) < min(SPREAD_DIRECTIONS, int((scales > 1e-3 * scales[0]).sum()))
    mean = torch.stack([prior.mean for prior in solution.priors]).mean(0)
    return UserSpread(
        mean.to(basis) @ basis,
        vectors[:, kept].T.float().to(basis) @ basis,
        scales[kept].float().to(basis),
        float(explained[kept][-1]),
        users,
    )
