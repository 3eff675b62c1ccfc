"""A user's reward as a callable, and its lower end: for RLOO, GRPO, PPO and best-of-n.

[`UserReward`] scores (prompt, completion, user) with a saved reward model. With `pessimism` it returns the lower end
of a confidence set in place of the estimate: Algorithm 1 of P-ShareLoRA (https://huggingface.co/papers/2503.19201),
(3.4) and (3.5), or one of the sets that measure what the data cover. The arithmetic of the sets is in pessimism.py;
scoring.py reads what they need off a model,
confidence.py fits and keeps them.
"""

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from .confidence import PARAMETERS, load_sets
from .data import tokenize_completion, tokenize_preference
from .errors import ConfigError, DataError, NonFiniteError, PessimismError, UnknownUserError, some_rows
from .pessimism import (
    EllipsoidSets,
    ball_norm,
    ball_radius,
    ensemble_estimate,
    ensemble_lower_bound,
    lower_bound,
)
from .scoring import SKETCH_SIZE, CountSketch, Scorer, check_known, default_device, load_reward_model, read_config
from .sharelora.config import ShareLoraConfig
from .sharelora.routing import UNSEEN, use_users
from .users import user_id_as_text


logger = logging.getLogger(__name__)

PESSIMISMS = (None, "ball", "ellipsoid", "ensemble")
FORMS = ("std", "worst", "variance")
BALLS = ("sample", "batch")


class RewardEstimate(NamedTuple):
    """What [`UserReward.score`] gives.

    Args:
        mean (`torch.Tensor` of shape `(n,)`):
            The reward, minus that of the references where there are some.
        std (`torch.Tensor` of shape `(n,)`):
            The width of the set in the direction of the row: a standard deviation (ellipsoid, ensemble) or radius
            times norm of the gradient (ball); for an ensemble of the form `"variance"`, the variance. Zero without
            pessimism. (For the form `"worst"` a call of the reward gives the least member, which no coefficient makes of this.)
    """

    mean: torch.Tensor
    std: torch.Tensor


class UserReward:
    """The reward of each row's own user, or its lower end, as a function that RLOO and GRPO call.

    A plain callable and no `nn.Module`: TRL gives modules text only, and the users would be lost. Text is made and
    tokenised as it was in training: prompt and completion, closed by the end token (also where the completion was cut
    off at its maximal length), or the chat template of prompt and completion. An empty completion is scored as the
    prompt and the end token, and is counted.

    | `pessimism` | set | width of a row | reward |
    |---|---|---|---|
    | None | the estimate alone | 0 | `r` |
    | `"ball"` | all models within `rho` of the estimate, (3.4) | `rho ‖dr/dΔΘ‖_F` | `r - c width` |
    | `"ellipsoid"` | those that the data cannot tell from it | `sqrt(phi' Sigma_u^-1 phi)` | `r - c width` |
    | `"ensemble"` | a few trained models or heads | their spread | see `form` |

    The ball is the paper's, a first-order solution of the inner minimum in (3.5) (exact where the reward is linear in
    the update). It does not know what the data cover. The ellipsoid does (https://huggingface.co/papers/2301.11270):
    wide where this user, and with `pooled_discount` the others, compared nothing alike. The ensemble is that of
    https://huggingface.co/papers/2310.02743.

    Args:
        model_or_path ([`~peft.PeftModel`], `str`, `os.PathLike` or a list of paths):
            A ShareLoRA reward model, or where one was saved. For `"ensemble"` a list of saved models of the same base
            and users (trained with different seeds; all lie on one base), or one model for which
            `fit_confidence(kind="heads")` was run.
        pessimism (`str`, *optional*):
            One of the table.
        pessimism_coefficient (`float`, *optional*, defaults to 1.0):
            c of the table. 0 gives the plain reward exactly and computes no width. 1 takes one standard deviation;
            [`~trl_sharelora.evaluation.calibrate`] finds the one that covers a wanted share of held-out comparisons.
        reference (`str` or `Callable`, *optional*):
            E_ref of (3.5): what a completion is compared with. The column that holds a reference completion (or a list
            of them) per prompt; or a function `(prompts, user_ids) -> list`, one list of completions per prompt.
            Reward and width then are of the difference from their mean. Without it the ellipsoid is centred on the
            mean training feature.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; by default the one saved with the adapter.
        sets ([`~trl_sharelora.pessimism.EllipsoidSets`] or `torch.Tensor` of shape `(members, d)`, *optional*):
            What [`fit_confidence`] returned, for a model in memory. By default they are read from
            `<adapter>/confidence`.
        form (`str`, *optional*, defaults to `"std"`):
            Of an ensemble: mean minus c standard deviations, `"worst"` the least member, `"variance"` mean minus c
            variances.
        parameters (`str`, *optional*):
            Features of the ellipsoid, by default those it was fitted with. `"last_layer"`: the input of the score head.
            `"own_factor"`: the reward's gradient with respect to the user's own factor, reduced by a [`CountSketch`] (a backward
            more, and blind to what the shared parts do not know). `"base"` (ours): the input of the head in the base, without the
            adapter; a forward more. Reward training shapes the last layer after the comparisons, so that what was never compared
            looks like what was; the base keeps them apart (docs/log.md).
        zeta (`float`, *optional*):
            Of the ball, as printed in (3.4): `‖ΔΘ - ΔΘ̂‖_F² <= zeta`, so `rho = sqrt(zeta)`. Without it `rho = 1`, and
            the coefficient is the radius. (The proof of Theorem 4.2 uses zeta itself as the radius.)
        ball (`str`, *optional*, defaults to `"sample"`):
            Each row by its own norm: an upper bound that does not depend on the other rows, so no reward exceeds the
            mean. `"batch"` is the closed form of (3.5), `rho ‖G‖_F` for each user, G the mean gradient of his rows in
            this call minus that of his references. Each of his rows carries its share `rho <G, g_i> / ‖G‖`, the reward
            at the worst point of the ball; the shares average to the norm and a single one may be negative. (The norm
            itself would be the same for all rows of a user and so cancel against the baseline of RLOO and GRPO.) Two
            forwards and backwards. [`~UserReward.score`] always takes `"sample"`.
        batch_size (`int`, *optional*, defaults to 16):
            Sequences per forward.
        max_length (`int`, *optional*):
            Longer texts lose tokens on the left (the reward is read at the end), and are counted. Without it a text
            longer than the model has positions is an error.
        unseen (`str`, *optional*, defaults to `"raise"`):
            Users whom the adapter does not know: an error, or with `"common"` the common model (D = 0) and the
            ellipsoid of what is pooled over users (`pooled_discount` of [`fit_confidence`]); they are counted.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        quantization_config, model_init_kwargs, device:
            See [`load_reward_model`].

    Raises:
        PessimismError: There is no set (run [`fit_confidence`]), or it is of another adapter; references do not fit.
        ConfigError: A setting is unknown, or `model_or_path` is no ShareLoRA reward model.

    Metrics, where TRL gives `log_metric`: `user_reward/mean`, `user_reward/penalty` (how much lower the returned
    rewards are on average), `user_reward/unseen_share` (of rows), `user_reward/unfitted_share` (rows of users of whom the ellipsoids know no comparison), `user_reward/empty_completions` and
    `user_reward/truncated` (rows).

    Example:

    ```python
    reward = UserReward("rm", pessimism="ellipsoid", pessimism_coefficient=1.0)
    trainer = RLOOTrainer("Qwen/Qwen3-0.6B", reward_funcs=reward, train_dataset=prompts_with_user_id)
    ```
    """

    def __init__(
        self,
        model_or_path: PeftModel | str | os.PathLike | Sequence[str | os.PathLike],
        pessimism: str | None = None,
        pessimism_coefficient: float = 1.0,
        reference: str | Callable[[list, list[str]], list] | None = None,
        *,
        processing_class: Any = None,
        sets: EllipsoidSets | torch.Tensor | None = None,
        form: str = "std",
        parameters: str | None = None,
        zeta: float | None = None,
        ball: str = "sample",
        batch_size: int = 16,
        max_length: int | None = None,
        unseen: str = "raise",
        user_column: str = "user_id",
        quantization_config: Any = None,
        model_init_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
    ):
        self.__name__ = "user_reward"  # TRL's name of its metrics
        for name, value, known in (
            ("pessimism", pessimism, PESSIMISMS),
            ("form", form, FORMS),
            ("parameters", parameters, (None, *PARAMETERS)),
            ("ball", ball, BALLS),
            ("unseen", unseen, UNSEEN),
        ):
            check_known(name, value, known)
        lower_bound(torch.zeros(1), torch.zeros(1), pessimism_coefficient)  # refuses what is no coefficient
        if zeta is not None and pessimism != "ball":
            raise ConfigError(f"zeta={zeta} is the size of the ball; it needs pessimism='ball', not {pessimism!r}.")
        if reference is not None and not isinstance(reference, str) and not callable(reference):
            raise PessimismError(
                f"reference={reference!r} came; the name of a column, or a function (prompts, user_ids) -> completions, is needed."
            )
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise ConfigError(f"max_length={max_length!r} came; a whole number of at least 1, or None, is needed.")
        if pessimism == "ball" and reference is None:
            logger.warning(
                "pessimism='ball' came without a reference; (3.5) of the paper subtracts the reward of the reference policy. Give "
                "reference=..., a column of completions or a function that samples them (SampledReferences)."
            )
        self.pessimism = pessimism
        self.pessimism_coefficient = pessimism_coefficient
        self.reference = reference
        self.form = form
        self.radius = 1.0 if zeta is None else ball_radius(zeta)
        self.ball = ball
        self.max_length = max_length
        self.unseen = unseen
        self.user_column = user_column
        self._warned: set[str] = set()
        loading = {
            "quantization_config": quantization_config,
            "model_init_kwargs": model_init_kwargs,
            "device": device,
        }

        self.members: list[str] = []
        self.sets: Any = sets
        self.parameters = parameters or "last_layer"
        path: str | None = None
        if isinstance(model_or_path, list | tuple):
            model, processing_class, self.members = _load_members(model_or_path, pessimism, processing_class, loading)
        elif isinstance(model_or_path, str | os.PathLike):
            path = os.fspath(model_or_path)
            model, processing_class = load_reward_model(path, processing_class, **loading)
        else:
            model = model_or_path
        self.scorer = Scorer(model, processing_class, batch_size)
        self.sketch: CountSketch | None = None
        if pessimism in ("ellipsoid", "ensemble") and not self.members:
            kind = "ellipsoid" if pessimism == "ellipsoid" else "heads"
            settings: dict[str, Any] = {
                "parameters": parameters or "last_layer",
                "sketch_size": SKETCH_SIZE,
                "sketch_seed": 0,
            }
            if self.sets is None:
                self.sets, settings = load_sets(path, kind, self.scorer)
            parameters = parameters or settings["parameters"]
            if kind == "ellipsoid" and settings["parameters"] != parameters:
                raise PessimismError(
                    f"The ellipsoids of {path!r} are of parameters={settings['parameters']!r}, and {parameters!r} is asked for. Give "
                    f"parameters={settings['parameters']!r}, or fit them again: fit_confidence({path!r}, train_dataset, "
                    f"parameters={parameters!r})."
                )
            self.parameters = parameters
            self._check_sets(kind)
            self.sets = self.sets.to(self.scorer.device)
            if parameters == "own_factor":
                self.sketch = CountSketch(settings["sketch_size"], settings["sketch_seed"])

    def _check_sets(self, kind: str) -> None:
        """Sets and model fit each other."""
        if kind == "heads":
            size = self.scorer.head().in_features
            if (
                not isinstance(self.sets, torch.Tensor)
                or self.sets.ndim != 2
                or self.sets.shape[1] != size
                or len(self.sets) < 2
            ):
                shape = tuple(self.sets.shape) if isinstance(self.sets, torch.Tensor) else type(self.sets).__name__
                raise PessimismError(
                    f"Heads of shape {shape} came; (members, {size}) with 2 or more members is needed."
                )
            return
        if not isinstance(self.sets, EllipsoidSets):
            raise PessimismError(f"sets is a {type(self.sets).__name__}; what fit_confidence returned is needed.")
        size = SKETCH_SIZE if self.parameters == "own_factor" else self.scorer.head().in_features
        if self.sets.feature_size != size or self.sets.num_users > len(self.scorer.users):
            raise PessimismError(
                f"The ellipsoids are of {self.sets.feature_size} features and {self.sets.num_users} users, the model has {size} and "
                f"{len(self.scorer.users)}: they are of another model, or of other parameters. Run fit_confidence for this one."
            )

    # -- rows

    def __call__(
        self,
        prompts: list | None = None,
        completions: list | None = None,
        completion_ids: list | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable | None = None,
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards, as TRL's RLOO and GRPO trainers ask for them.

        Args:
            prompts (`list`):
                Text, or lists of messages; one per completion.
            completions (`list`):
                Of the same form.
            completion_ids, log_extra, trainer_state:
                What TRL passes as well; not read.
            log_metric (`Callable`, *optional*):
                TRL's way to log a number.
            **columns:
                Columns of the dataset, one entry per completion: `user_id` (or what `user_column` says), the
                references', `tools` and `chat_template_kwargs` for the chat template.

        Returns:
            `list[float]`: `lower_bound(mean, width, pessimism_coefficient)` per row.

        Raises:
            DataError, UserIdError, UnknownUserError: The rows cannot be scored.
            PessimismError: The references do not fit.
            NonFiniteError: A reward or a width is NaN or infinite; names the users.
        """
        rows = self._rows(prompts, completions, columns)
        if not rows.sequences:
            return []
        mean, value = self._estimate(rows, self.ball, self._lower_end)
        if log_metric is not None:
            log_metric("user_reward/mean", float(mean.mean()))
            log_metric("user_reward/penalty", float((mean - value).mean()))
            log_metric("user_reward/unseen_share", float((rows.user_index < 0).float().mean()))
            if isinstance(self.sets, EllipsoidSets):
                log_metric("user_reward/unfitted_share", float((~self._fitted(rows.user_index)).float().mean()))
            log_metric("user_reward/empty_completions", float(rows.empty))
            log_metric("user_reward/truncated", float(rows.truncated))
        return value.tolist()

    def _fitted(self, user_index: torch.Tensor) -> torch.Tensor:
        """Which rows are of users whose own comparisons the ellipsoids know, `(rows,)`."""
        known = torch.where(user_index < self.sets.num_users, user_index, -1)
        fitted = torch.zeros(len(known), dtype=torch.bool)
        fitted[known >= 0] = self.sets.has(known[known >= 0].to(self.sets.device)).cpu()
        return fitted

    def score(self, prompts: list, completions: list, user_id: list | None = None, **columns: Any) -> RewardEstimate:
        """Reward and width of each row, float32 on the CPU and without gradient: for best-of-n and reports.

        Args:
            prompts (`list`), completions (`list`):
                As in a call.
            user_id (`list`):
                One user per row.
            **columns:
                As in a call.
        """
        if user_id is not None:
            columns[self.user_column] = user_id
        rows = self._rows(prompts, completions, columns)
        if not rows.sequences:
            return RewardEstimate(torch.zeros(0), torch.zeros(0))
        return RewardEstimate(*self._estimate(rows, "sample", self._width))

    def compare(self, pairs: Sequence[dict[str, list[int]]], user_ids: Sequence[str | int]) -> RewardEstimate:
        """Reward of `chosen` minus reward of `rejected`, and the width of this difference.

        Args:
            pairs (`list[dict]`):
                With `chosen_ids` and `rejected_ids`, see [`~trl_sharelora.data.tokenize_preference`].
            user_ids (`list[str]`):
                One user per pair.
        """
        return RewardEstimate(*self._estimate(self._pairs(pairs, user_ids), "sample", self._width))

    def _pairs(self, pairs: Sequence[dict[str, list[int]]], user_ids: Sequence[str | int]) -> "_Rows":
        """Each pair as its chosen text with the rejected one as the reference."""
        ids, index = self._users(user_ids)
        chosen, _ = self._fit([list(pair["chosen_ids"]) for pair in pairs])
        rejected, _ = self._fit([list(pair["rejected_ids"]) for pair in pairs])
        return _Rows(chosen, ids, index, [[sequence] for sequence in rejected], 0, 0)

    def margins(
        self, prompts: list, chosen: list, rejected: list, user_ids: Sequence[str | int], **columns: list
    ) -> torch.Tensor:
        """Lower end of what the reward of `chosen` is above that of `rejected`: `mean - c width` of the difference, `(rows,)`.

        Args:
            prompts (`list`), chosen (`list`), rejected (`list`):
                Text, or lists of messages.
            user_ids (`list[str]`):
                One user per row.
            **columns:
                `tools` and `chat_template_kwargs` for the chat template, one entry per row.
        """
        rows = zip(prompts, chosen, rejected, *columns.values(), strict=True)
        names = ("prompt", "chosen", "rejected", *columns)
        tokenizer = self.scorer.processing_class
        pairs = [tokenize_preference(dict(zip(names, row, strict=True)), tokenizer) for row in rows]
        return self._estimate(self._pairs(pairs, user_ids), "sample", self._lower_end)[1]

    def _rows(self, prompts: Any, completions: Any, columns: dict[str, Any]) -> "_Rows":
        """What came, checked and tokenised."""
        if self.user_column not in columns:
            came = ", ".join(map(repr, columns)) or "none"
            raise DataError(
                f"The rows came without {self.user_column!r}, so nobody knows whose reward to give; the columns that came are: {came}. Keep "
                "the user's column in the prompt dataset and name it with user_column=... . (Trainers whose remove_unused_columns is "
                "True drop it.)"
            )
        user_ids = columns[self.user_column]
        sizes = {"prompts": prompts, "completions": completions, self.user_column: user_ids}
        for name, values in sizes.items():
            if not isinstance(values, list | tuple):
                raise DataError(
                    f"`{name}` is a {type(values).__name__}; a list with one entry per completion is needed."
                )
        if len({len(values) for values in sizes.values()}) > 1:
            counts = ", ".join(f"{len(values)} {name}" for name, values in sizes.items())
            raise DataError(
                f"{counts} came; one of each per completion is needed (a prompt is repeated for its completions)."
            )
        ids, index = self._users(user_ids)
        for name, values in (("prompt", prompts), ("completion", completions)):
            bad = [row for row, value in enumerate(values) if not _is_text(value)]
            if bad:
                raise DataError(
                    f"A {name} is neither text nor a list of messages: {some_rows(bad)} ({values[bad[0]]!r}). Messages are "
                    '{"role": "user", "content": "..."}.'
                )
        mixed = [row for row, prompt in enumerate(prompts) if type(prompt) is not type(completions[row])]
        if mixed:
            raise DataError(f"Prompt and completion are not of one form (text, or messages): {some_rows(mixed)}.")
        nothing = [row for row, (p, c) in enumerate(zip(prompts, completions, strict=True)) if not p and _is_empty(c)]
        if nothing:
            raise DataError(f"Prompt and completion are both empty: {some_rows(nothing)}. There is nothing to score.")
        empty = sum(map(_is_empty, completions))
        if empty:
            self._warn_once(
                "empty",
                f"{empty} of {len(completions)} completions are empty; they are scored as the prompt and the end token.",
            )
        arguments = _template_arguments(columns, len(prompts))
        sequences, truncated = self._fit(
            [self._tokens(*row) for row in zip(prompts, completions, arguments, strict=True)]
        )
        references = None
        if self.reference is not None:
            references = [
                self._fit([self._tokens(prompt, completion, some) for completion in several])[0]
                for prompt, some, several in zip(
                    prompts,
                    arguments,
                    # another model's users may be others: the ids as they came
                    self._references(list(prompts), list(map(user_id_as_text, user_ids)), columns),
                    strict=True,
                )
            ]
        return _Rows(sequences, ids, index, references, empty, truncated)

    def _users(self, user_ids: Sequence[Any]) -> tuple[list[str], torch.Tensor]:
        users = self.scorer.users
        ids = users.names(user_ids)  # they end in messages
        index = torch.tensor(users.find(ids), dtype=torch.long)
        unknown = list(dict.fromkeys(ids[row] for row in (index < 0).nonzero().flatten().tolist()))
        if unknown:
            if self.unseen == "raise":
                raise UnknownUserError(users.unknown_message(unknown))
            self._warn_once(
                "unseen", f"{len(unknown)} users whom the adapter does not know are scored with the common model."
            )
        return ids, index

    def _tokens(self, prompt: Any, completion: Any, template_arguments: dict[str, Any]) -> list[int]:
        return tokenize_completion(prompt, completion, self.scorer.processing_class, template_arguments)

    def _fit(self, sequences: list[list[int]]) -> tuple[list[list[int]], int]:
        """Sequences within `max_length`, and how many were cut."""
        positions = self.scorer.positions
        limit = self.max_length
        longest = max(map(len, sequences), default=0)
        if positions is not None and min(longest, longest if limit is None else limit) > positions:
            long = [row for row, sequence in enumerate(sequences) if len(sequence) > positions]
            raise DataError(
                f"{len(long)} of {len(sequences)} texts have more tokens than the reward model has positions ({positions}), the longest "
                f"{longest}: {some_rows(long)}. Give max_length={positions} (or less) to have them cut on the left and counted, or let the "
                "policy write less (max_completion_length)."
            )
        if limit is None:
            return sequences, 0
        truncated = sum(len(sequence) > limit for sequence in sequences)
        if truncated:
            self._warn_once(
                "truncated",
                f"{truncated} of {len(sequences)} texts are longer than max_length={limit} and are cut on the left.",
            )
        return [sequence[-limit:] for sequence in sequences], truncated

    def _references(self, prompts: list, ids: list[str], columns: dict[str, Any]) -> list[list]:
        """Per prompt a list of reference completions."""
        if isinstance(self.reference, str):
            source = f"The column {self.reference!r}"
            if self.reference not in columns:
                came = ", ".join(map(repr, columns)) or "none"
                raise PessimismError(
                    f"reference={self.reference!r} names no column; those that came are: {came}. Name the one with the reference "
                    "completions, or give a function (prompts, user_ids) -> completions. (TRL keeps 'prompt', 'completion' and "
                    "'completion_ids' to itself: call the column something else.)"
                )
            found = columns[self.reference]
        else:
            source = "reference(prompts, user_ids)"
            assert callable(self.reference)
            found = self.reference(prompts, ids)
        if not isinstance(found, list | tuple) or len(found) != len(prompts):
            count = len(found) if isinstance(found, list | tuple) else type(found).__name__
            raise PessimismError(
                f"{source} gave {count} for {len(prompts)} prompts; one completion or list of completions each is needed."
            )
        several = [[entry] if _is_text(entry) and entry != [] else entry for entry in found]
        if not isinstance(self.reference, str):
            several = list(found)
        form = [type(prompt) for prompt in prompts]
        bad = [
            row
            for row, entries in enumerate(several)
            if not isinstance(entries, list | tuple)
            or not entries
            or not all(_is_text(entry) and type(entry) is form[row] for entry in entries)
        ]
        if bad:
            raise PessimismError(
                f"{source} gave something else than completions of the prompts' form: {some_rows(bad)} ({found[bad[0]]!r}). Needed are text for "
                "text and a list of messages for a list of messages; a column holds one completion or a list of them per row, a function "
                "returns a list of them per prompt; none may be empty lists."
            )
        return [list(entries) for entries in several]

    def _warn_once(self, kind: str, message: str) -> None:
        # of a training's every step only the first; the metrics have the rest
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)

    # -- estimates

    def _estimate(
        self, rows: "_Rows", ball: str, end: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and what `end` makes of `(mean, width, members)`, on the CPU and finite."""
        scorer, needs_width = self.scorer, end != self._lower_end or self.pessimism_coefficient != 0
        sequences, index, places = rows.distinct()
        members: torch.Tensor | None = None
        width: torch.Tensor | None = None
        if self.members:
            found = []
            for name in self.members:
                scorer.model.set_adapter(name, inference_mode=True)
                found.append(rows.differences(scorer.rewards(sequences, index)[places]))
                self._check_finite(rows, found[-1])
            members = torch.stack(found)
            mean, width = ensemble_estimate(members)
        elif self.pessimism is None or not needs_width:
            # also with coefficient 0: the same forwards, so the same rewards bit by bit
            mean = rows.differences(scorer.rewards(sequences, index)[places])
        elif self.pessimism == "ball":
            mean, width = self._ball(rows, ball)
        else:
            parameters = self.parameters if self.pessimism == "ellipsoid" else "last_layer"
            rewards, features = (
                values[places] for values in scorer.rewards_and_features(sequences, index, parameters, self.sketch)
            )
            mean = rows.differences(rewards)
            self._check_finite(rows, rewards)
            self._check_finite(rows, features)
            if self.pessimism == "ellipsoid":
                features = rows.differences(features) if rows.references is not None else self.sets.centred(features)
                known = torch.where(rows.user_index < self.sets.num_users, rows.user_index, -1).to(features.device)
                width = self.sets.width(features, known).float()
            else:
                # around the trained head, whose reward is the mean: refits differ from it by what the labels' chance does
                spread = rows.differences(features) @ (self.sets - self.sets.mean(0)).to(features).mT  # (n, members)
                members = mean + spread.mT
                width = ensemble_estimate(members)[1]
        if width is None:
            width = torch.zeros_like(mean)
        value = end(mean, width, members)
        self._check_finite(rows, mean)
        self._check_finite(rows, value)
        return mean.float().cpu(), value.float().cpu()

    def _width(self, mean: torch.Tensor, width: torch.Tensor, members: torch.Tensor | None) -> torch.Tensor:
        return width if members is None or self.form != "variance" else members.var(0, correction=0)

    def _lower_end(self, mean: torch.Tensor, width: torch.Tensor, members: torch.Tensor | None) -> torch.Tensor:
        if members is None or self.pessimism_coefficient == 0:
            return lower_bound(mean, width, self.pessimism_coefficient)
        return ensemble_lower_bound(members, self.pessimism_coefficient, self.form)

    def _ball(self, rows: "_Rows", ball: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and widths `rho ‖gradient‖_F`, `(n,)` each."""
        scorer, sequences, index = self.scorer, rows.all_sequences(), rows.all_index()
        weights, owner = rows.weights(), rows.owner()
        total = len(sequences)
        rewards = torch.empty(total, device=scorer.device)
        with scorer.scoring():
            if ball == "sample":
                width = torch.empty(len(rows.sequences), device=scorer.device)
                for part in rows.whole_rows(scorer.batch_size):
                    reward, inputs, gradients = scorer.gradients([sequences[place] for place in part], index[part])
                    self._check_finite(rows, reward, part)
                    rewards[part] = reward
                    if rows.references is None:
                        width[part] = ball_norm(inputs, gradients)
                    else:
                        each, groups = owner[part].unique(return_inverse=True)
                        here = weights[part].to(scorer.device), groups.to(scorer.device)
                        width[each] = ball_norm(inputs, gradients, *here)
                return rows.differences(rewards), self.radius * width
            shares = torch.empty(total, device=scorer.device)
            for user_id in dict.fromkeys(rows.ids):
                places = [place for place in range(total) if rows.ids[owner[place]] == user_id]
                batches = [
                    [places[at] for at in part] for part in scorer.batches([sequences[place] for place in places])
                ]

                def pieces(batches: list[list[int]] = batches) -> Iterator[tuple]:
                    for part in batches:
                        yield part, *scorer.gradients([sequences[place] for place in part], index[part])

                # a second forward and backward only where the first do not fit into memory at once
                again = list(pieces()) if len(batches) == 1 else None
                sums: list[torch.Tensor] | None = None  # n G, (out, in) per layer
                for part, reward, inputs, gradients in again or pieces():
                    self._check_finite(rows, reward, part)
                    rewards[part] = reward
                    weight = weights[part].to(scorer.device)
                    products = [
                        torch.einsum("b,bso,bsi->oi", weight, gradient.float(), x.float())
                        for x, gradient in zip(inputs, gradients, strict=True)
                    ]
                    sums = products if sums is None else [a + b for a, b in zip(sums, products, strict=True)]
                assert sums is not None
                norm = torch.stack([part.square().sum() for part in sums]).sum().sqrt()
                for part, _, inputs, gradients in again or pieces():
                    along = [
                        torch.einsum("bso,oi,bsi->b", gradient.float(), direction, x.float())
                        for x, gradient, direction in zip(inputs, gradients, sums, strict=True)
                    ]
                    shares[part] = torch.stack(along).sum(0) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return rows.differences(rewards), self.radius * rows.differences(shares)

    def _check_finite(self, rows: "_Rows", values: torch.Tensor, places: list[int] | None = None) -> None:
        """`values` `(n, ...)` of the rows, of all sequences, or of those at `places`, are finite."""
        bad = (~values.isfinite().reshape(len(values), -1).all(1)).nonzero().flatten().cpu()
        if not len(bad):
            return
        owner = rows.owner() if places is None else rows.owner()[places]
        bad_rows = owner[bad].unique().tolist()
        users = self.scorer.users.names(dict.fromkeys(rows.ids[row] for row in bad_rows))
        named = ", ".join(map(repr, users[:5])) + ", ..." * (len(users) > 5)
        raise NonFiniteError(
            f"The reward, its features or its width is NaN or infinite in {len(bad_rows)} of {len(rows.ids)} rows: user(s) {named}, "
            f"{some_rows(bad_rows)}. The training of these users (or of all, if all are named) has diverged, or the base's dtype "
            "overflows: load it in float32 or bfloat16, or go back to an earlier checkpoint."
        )


class SampledReferences:
    """Completions of the reference policy, for [`UserReward`]: the E_ref of (3.5), estimated by sampling.

    Each prompt of a user is completed once per call, however many completions are compared with it.

    Args:
        policy ([`~transformers.PreTrainedModel`], `str` or `os.PathLike`):
            A causal model, or where one was saved: what the policy starts from. A personal policy (a ShareLoRA adapter) completes
            each prompt as its user.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; by default the one saved with it.
        num (`int`, *optional*, defaults to 1):
            Completions per prompt: more of them cost more and make E_ref less noisy.
        **generation:
            Of `generate`: `max_new_tokens` (by default 256, as TRL's `max_completion_length`), `temperature`, ....
    """

    def __init__(self, policy: Any, processing_class: Any = None, num: int = 1, **generation: Any):
        if num < 1:
            raise ConfigError(f"num={num} came; at least one completion per prompt is needed.")
        if isinstance(policy, str | os.PathLike):
            path = os.fspath(policy)
            processing_class = processing_class or AutoTokenizer.from_pretrained(path)
            adapter = Path(path, "adapter_config.json").is_file()
            kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
            policy = kind.from_pretrained(path, dtype="float32", device_map={"": default_device()})
        self.policy = policy.eval()
        self.processing_class = copy.copy(processing_class)
        self.processing_class.padding_side = "left"
        self.num = num
        self.generation = {"max_new_tokens": 256, "do_sample": True} | generation

    def __call__(self, prompts: list, user_ids: list[str]) -> list[list]:
        """`num` completions for each prompt, in its form."""
        tokenizer = self.processing_class
        asked = [(user_id, json.dumps(prompt)) for prompt, user_id in zip(prompts, user_ids, strict=True)]
        distinct = dict(zip(asked, prompts, strict=True))
        messages = isinstance(prompts[0], list)
        texts = list(distinct.values())
        if messages:
            texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in texts]
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=not messages)
        batch = batch.to(self.policy.device)
        users = [user_id for user_id, _ in distinct]
        personal = isinstance(getattr(self.policy, "active_peft_config", None), ShareLoraConfig)
        with torch.no_grad(), use_users(self.policy, users) if personal else nullcontext():
            output = self.policy.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_return_sequences=self.num,
                pad_token_id=tokenizer.pad_token_id,
                **self.generation,
            )
        found = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] if messages else text for text in found]
        of_key = {key: completions[n * self.num : (n + 1) * self.num] for n, key in enumerate(distinct)}
        return [of_key[key] for key in asked]


class _Rows(NamedTuple):
    """Rows to score; the references of all rows lie behind them, in order."""

    sequences: list[list[int]]
    ids: list[str]
    user_index: torch.Tensor  # (n,) row of the bank, -1 for an unseen user
    references: list[list[list[int]]] | None  # (n, k_i) sequences
    empty: int
    truncated: int

    def counts(self) -> list[int]:
        return [0] * len(self.sequences) if self.references is None else list(map(len, self.references))

    def all_sequences(self) -> list[list[int]]:
        return self.sequences + [sequence for several in self.references or [] for sequence in several]

    def owner(self) -> torch.Tensor:
        """`(n + references,)` the row that each belongs to."""
        own = torch.arange(len(self.sequences))
        return torch.cat([own, own.repeat_interleave(torch.tensor(self.counts()))])

    def all_index(self) -> torch.Tensor:
        return self.user_index[self.owner()]

    def distinct(self) -> tuple[list[list[int]], torch.Tensor, list[int]]:
        """Sequences, users, and the place of each sequence among them: a prompt's generations mostly share their references."""
        index = self.all_index().tolist()
        found: dict[tuple[tuple[int, ...], int], int] = {}
        places = [
            found.setdefault((tuple(sequence), user), len(found))
            for sequence, user in zip(self.all_sequences(), index, strict=True)
        ]
        return [list(sequence) for sequence, _ in found], torch.tensor([user for _, user in found]), places

    def weights(self) -> torch.Tensor:
        """`(n + references,)`: one for a row, -1/k for each of its k references."""
        references = [-1 / count for count in self.counts() for _ in range(count)]
        return torch.tensor([1.0] * len(self.sequences) + references)

    def differences(self, values: torch.Tensor) -> torch.Tensor:
        """`(n + references, ...)` -> `(n, ...)`: a row's value minus the mean of its references'."""
        n = len(self.sequences)
        if self.references is None:
            return values
        owner = self.owner()[n:].to(values.device)
        counts = torch.tensor(self.counts(), device=values.device).reshape(-1, *[1] * (values.ndim - 1))
        return values[:n] - values.new_zeros(values[:n].shape).index_add_(0, owner, values[n:]) / counts

    def whole_rows(self, batch_size: int) -> Iterator[list[int]]:
        """Places in batches that hold a row and its references together; a row with more of them makes a batch of its own."""
        counts, n = self.counts(), len(self.sequences)
        starts = [n + sum(counts[:row]) for row in range(n)]
        batch: list[int] = []
        for row in sorted(range(n), key=lambda row: len(self.sequences[row]), reverse=True):
            places = [row, *range(starts[row], starts[row] + counts[row])]
            if batch and len(batch) + len(places) > batch_size:
                yield batch
                batch = []
            batch = batch + places
        if batch:
            yield batch


def _is_text(value: Any) -> bool:
    """Text, or a list of messages (an empty one too)."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("role"), str) for part in value)
    )


def _is_empty(completion: Any) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message.get("content") or message.get("tool_calls") for message in completion)


def _template_arguments(columns: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """What the chat template is given for each row, as in training."""
    tools = columns.get("tools") or [None] * n
    others = columns.get("chat_template_kwargs") or [None] * n
    return [
        {"tools": json.loads(tool) if isinstance(tool, str) else tool, **(other or {})}
        for tool, other in zip(tools, others, strict=True)
    ]


def _load_members(
    paths: Sequence[str | os.PathLike], pessimism: str | None, processing_class: Any, loading: dict[str, Any]
) -> tuple[PeftModel, Any, list[str]]:
    """Several saved models as adapters on one base."""
    folders = [os.fspath(path) for path in paths]
    if pessimism != "ensemble" or len(folders) < 2:
        raise PessimismError(
            f"{len(folders)} models came with pessimism={pessimism!r}; an ensemble (pessimism='ensemble') has 2 or more, everything else "
            "one. Train the same model with several seeds."
        )
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        same_base = config.base_model_name_or_path == configs[0].base_model_name_or_path
        if not same_base or config.users != configs[0].users:
            raise PessimismError(
                f"{folder!r} (base {config.base_model_name_or_path!r}, {len(config.users)} users) does not fit {folders[0]!r} (base "
                f"{configs[0].base_model_name_or_path!r}, {len(configs[0].users)} users): the members of an ensemble lie on one "
                "base and have the same users in the same order. Train them on the same data, with different seeds only."
            )
    model, processing_class = load_reward_model(folders[0], processing_class, **loading)
    names = [model.active_adapter]
    for number, folder in enumerate(folders[1:], start=1):
        names.append(f"member{number}")
        model.load_adapter(folder, adapter_name=names[-1], torch_device=str(model.device))
    return model, processing_class, names
