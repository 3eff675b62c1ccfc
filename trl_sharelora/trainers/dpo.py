"""ShareLoraDPOTrainer: TRL's DPOTrainer with one policy per user, and pessimism as an option."""

import copy
import hashlib
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, extract_prompt

from ..data import check_preference_rows
from ..errors import ConfigError, DataError, UnsupportedError
from ..sharelora.config import ShareLoraConfig
from ..sharelora.routing import get_router, use_users
from ..users import UserRegistry
from .online import POLICY_CARD
from .preferences import MARGIN_COLUMN, PreferencePairsMixin, UserBatchCollator
from .user_arguments import UserArguments, default_output_dir, with_user_arguments
from .user_batches import column_of


logger = logging.getLogger(__name__)


@dataclass
class ShareLoraDPOConfig(UserArguments, DPOConfig):
    r"""
    Configuration of the [`ShareLoraDPOTrainer`].

    Everything of [`~trl.DPOConfig`] with its defaults, the fields of [`UserArguments`], and:

    Parameters:
        > Parameters that control the pessimism

        rpo_alpha (`float`, *optional*):
            Weight of the SFT regulariser of RPO (https://huggingface.co/papers/2405.16436), whose pessimism over rewards comes out
            as the DPO loss plus a multiple of the negative log-likelihood of the chosen reply. It is `loss_type=["sigmoid",
            "sft"]` with `loss_weights=[1.0, rpo_alpha]`: TRL's `sft` loss is the mean over tokens, so `rpo_alpha` is the paper's
            eta times beta for replies of one token, and weighs long replies less than the paper's sum does. Off by default; the
            paper's value could not be read, 0.005 is that of its authors' scripts for the sum.
    """

    rpo_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of RPO's SFT regulariser (2405.16436), its form of pessimism: sets loss_type=['sigmoid', 'sft'] and "
            "loss_weights=[1.0, rpo_alpha]. Off by default: plain DPO."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rpo_alpha is None:
            return
        if not (math.isfinite(self.rpo_alpha) and self.rpo_alpha >= 0):
            raise ConfigError(f"rpo_alpha={self.rpo_alpha!r}; a finite number of at least 0 is needed, or None.")
        if list(self.loss_type) not in (["sigmoid"], ["sigmoid", "sft"]):
            raise ConfigError(
                f"rpo_alpha={self.rpo_alpha} came with loss_type={self.loss_type!r}. RPO is the sigmoid loss with an SFT regulariser; leave "
                "loss_type out, or give the weights yourself: loss_type=['sigmoid', 'sft'], loss_weights=[1.0, ...]."
            )
        if self.loss_weights is not None and list(self.loss_weights) != [1.0, self.rpo_alpha]:
            raise ConfigError(
                f"rpo_alpha={self.rpo_alpha} came with loss_weights={self.loss_weights!r}, which it sets itself to [1.0, "
                f"{self.rpo_alpha}]. Give one of them."
            )
        self.loss_type: list[str] = ["sigmoid", "sft"]
        self.loss_weights: list[float] | None = [1.0, self.rpo_alpha]


class ShareLoraDPOTrainer(PreferencePairsMixin, DPOTrainer):
    """
    Trainer of a policy in which every user has a part of his own, from preferences and without a reward model.

    A drop-in for [`~trl.DPOTrainer`]: the same data with one more column that names the user, the same arguments and losses, the
    same metric names. The loss is TRL's on mixed batches; both log-probabilities of a pair are its user's.

    Pessimism comes in two forms. `args.rpo_alpha` is RPO's SFT regulariser (https://huggingface.co/papers/2405.16436).
    `reward=UserReward(...)` keeps each pair apart by a margin, the lower end of what his reward model says of the difference:
    the loss is `-log sigmoid(beta * (log-ratio difference) - margin)` as in DPO with an offset (ODPO,
    https://huggingface.co/papers/2402.10571, eq. 3), whose offset is a function of a reward difference. That this difference is the
    lower end of the user's confidence set, and 0 where the set reaches below 0, is ours.

    It overrides of DPOTrainer: `__init__` (the users), `_precompute_ref_logps` (the user column), `compute_ref_log_probs` (the
    route), `_compute_loss` (the route, margins, the rewards for exact metrics), `_prepare_dataset` (counts what TRL drops), and
    those of [`PreferencePairsMixin`]: `_set_signature_columns_if_needed`, `get_batch_samples`, `_get_train_sampler`,
    `training_step`, `_clip_grad_norm`, `log`, `create_optimizer`, `_load_from_checkpoint`, `_load_optimizer_and_scheduler`,
    `_load_best_model`, `save_model`, `evaluation_loop`, `create_model_card`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in DPOTrainer. A PeftModel must have a ShareLoRA adapter; its users keep their rows, new ones are added, and a
            frozen copy of it, users and all, is the reference.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            As in DPOTrainer.
        args ([`ShareLoraDPOConfig`], *optional*):
            Configuration; a plain [`~trl.DPOConfig`] gets the defaults of [`UserArguments`].
        data_collator (*optional*):
            As in DPOTrainer; does not see the users.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference rows, standard or conversational, with the column `args.user_column`.
        peft_config ([`ShareLoraConfig`], *optional*):
            The adapter; needed unless `model` has one.
        users ([`UserRegistry`], *optional*):
            The users. By default those of the training data, in order of appearance.
        reward ([`UserReward`], *optional*):
            Scores both replies of each pair once, before the training, for the margins.
        *rest, **kwargs:
            Everything else of DPOTrainer, `eval_dataset`, `processing_class`, `quantization_config`, ....

    Raises:
        DataError, UserIdError, UnknownUserError, ConfigError, UnsupportedError: before anything is trained.

    Metrics, beside TRL's (`rewards/accuracies` exact, ties half): `rewards/ties` (pairs), `users/seen`, `users/unseen_rows`,
    `users/accuracy_mean`, `users/accuracy_worst_tenth`, `users/ece`, and the table of all users in `output_dir/users/`.
    """

    data_collator: Any
    precompute_ref_logps: bool
    _precompute_model_hash: str | None
    _tag_names = ["trl", "dpo", "sharelora"]
    _task_type = "CAUSAL_LM"
    _card_usage = POLICY_CARD
    _seams = {
        "_precompute_ref_logps": ["dataset", "name", "batch_size"],
        "compute_ref_log_probs": ["model", "inputs"],
        "_compute_loss": ["model", "inputs", "return_outputs"],
    }
    _metric_names = {
        "accuracy": "rewards/accuracies",
        "ties": "rewards/ties",
        "margin": "rewards/margins",
        "chosen": "rewards/chosen",
        "rejected": "rewards/rejected",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: ShareLoraDPOConfig | DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        peft_config: ShareLoraConfig | None = None,
        users: UserRegistry | None = None,
        reward: Any = None,
        **kwargs: Any,
    ):
        args = with_user_arguments(args or ShareLoraDPOConfig(default_output_dir(model, "DPO")))
        self.reward = reward
        # "sft" has no reference, so no margin either
        if reward is not None and (
            not {"sigmoid"} <= set(args.loss_type) <= {"sigmoid", "sft"} or args.f_divergence_type != "reverse_kl"
        ):
            raise ConfigError(
                f"reward=... came with loss_type={args.loss_type!r} and f_divergence_type={args.f_divergence_type!r}. A margin is an "
                "offset of the sigmoid loss with the reverse KL (ODPO); leave these out, or leave `reward` out."
            )
        peft_config = self._prepare_users(model, args, train_dataset, peft_config, users)
        super().__init__(
            model, ref_model, args, data_collator, train_dataset, *rest, peft_config=peft_config, **kwargs
        )
        if self._is_vision_dataset:
            raise UnsupportedError(
                "A dataset with images came; personal policies are made and tested for text. Take the column out."
            )
        self._start_pairs()

    # -- the dataset ------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if self.reward is not None:
            if isinstance(dataset, IterableDataset):
                raise UnsupportedError(
                    "reward=... came with a stream, whose pairs cannot be scored beforehand. Use a dataset with a length."
                )
            check_preference_rows(dataset, args.user_column, dataset_name, self.users)
            dataset = self._with_margins(dataset, args.user_column, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _tokenised(self, dataset, processing_class, args, dataset_name):
        """TRL's tokenised rows. It drops those whose prompt leaves no room for a reply and says nothing; count them."""
        without_limit = copy.copy(args)
        without_limit.max_length = None
        dataset = super(PreferencePairsMixin, self)._prepare_dataset(
            dataset, processing_class, without_limit, dataset_name
        )
        if args.max_length is None:
            return dataset
        prompts = np.array([len(ids) for ids in column_of(dataset, "prompt_ids")])
        pairs = zip(column_of(dataset, "chosen_ids"), column_of(dataset, "rejected_ids"), strict=True)
        full = prompts >= args.max_length
        cut = (prompts + [max(map(len, pair)) for pair in pairs] > args.max_length) & ~full
        if cut.any():
            logger.warning(
                "%d of the %d rows of the %s dataset are longer than max_length=%d tokens; TRL cuts them (truncation_mode=%r).",
                *(cut.sum(), len(dataset), dataset_name, args.max_length, args.truncation_mode),
            )
        if not full.any() or args.truncation_mode != "keep_start":
            return dataset
        rows = pd.DataFrame({"user": list(map(str, column_of(dataset, args.user_column))), "full": full})
        lost = rows.groupby("user", sort=False)["full"].mean()
        message = (
            f"{full.sum()} of the {len(dataset)} rows of the {dataset_name} dataset have prompts of max_length={args.max_length} tokens "
            f"or more and are left out; {(lost > 0).sum()} users lose rows, {(lost == 1).sum()} all of theirs"
        )
        if (lost == 1).any():
            named = ", ".join(map(repr, lost.index[lost == 1][:5]))
            raise DataError(f"{message}: {named}. Raise max_length, shorten the prompts, or leave these users out.")
        logger.warning("%s.", message)
        return dataset.select(np.flatnonzero(~full))

    def _with_margins(self, dataset: Any, user_column: str, name: str) -> Dataset:
        """Preference rows with the reward margin that each pair is to keep."""
        pairs = dataset if "prompt" in dataset.column_names else dataset.map(extract_prompt)
        template = [name for name in ("tools", "chat_template_kwargs") if name in pairs.column_names]
        margins = self.reward.margins(
            *(column_of(pairs, column) for column in ("prompt", "chosen", "rejected", user_column)),
            **{name: column_of(pairs, name) for name in template},
        )  # (rows,)
        logger.info(
            "Reward margins of the %s dataset: mean %.3f; %d of %d pairs have a lower end below 0 and get none.",
            *(name, margins.clamp(min=0).mean().item(), (margins < 0).sum().item(), len(margins)),
        )
        margins = margins.clamp(min=0).tolist()
        return dataset.map(
            lambda _, rows: {MARGIN_COLUMN: [margins[row] for row in rows]}, with_indices=True, batched=True
        )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if MARGIN_COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, MARGIN_COLUMN]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        # called by the parent's constructor, and by `evaluate` afterwards
        if not isinstance(self.data_collator, UserBatchCollator):
            self.data_collator = UserBatchCollator(self.data_collator)
        working_sets = get_router(self.model).working_sets
        for working_set in working_sets.values():
            working_set.to(self.args.device)
        shards = getattr(self, "_shards", None)  # none yet in the parent's constructor
        if "ref" in working_sets and shards is not None and shards.owners is not None:
            raise UnsupportedError(
                f"Reference log-probs of the {name} dataset are to be precomputed, but with user_sharding='owner' each process has by "
                "now the reference of its own users only. Give the dataset as eval_dataset when the trainer is made, or leave "
                "precompute_ref_log_probs out."
            )
        # TRL keeps the result beside the dataset under a hash of the rows and the model's tensors. It depends on more: the users'
        # records where they are in a store, what the collator cuts, what LD-DPO weighs.
        tensors = self._precompute_model_hash
        everything = hashlib.sha256(
            repr((tensors, self.args.max_length, self.args.truncation_mode, self.ld_alpha)).encode()
        )
        if "ref" in working_sets and isinstance(dataset, Dataset):
            for row in sorted({*column_of(dataset, "user_index")} - {-1}):
                everything.update(working_sets["ref"].store.read([row]).numpy().tobytes())
        self._precompute_model_hash = everything.hexdigest()
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = tensors

    # -- a step -----------------------------------------------------------------------------------------------------------

    def compute_ref_log_probs(self, model, inputs):
        # not `self.router`: the parent's constructor may precompute
        with use_users(self.model, inputs["user_index"].repeat(2), unseen="common"):
            return super().compute_ref_log_probs(model, _without_ours(inputs))

    def _compute_loss(self, model, inputs, return_outputs):
        user_index, weights = inputs["user_index"], inputs.get("weights")
        if self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        batch = _without_ours(inputs) | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=True))
        if MARGIN_COLUMN in inputs:
            # beta * (difference - margin / beta): a shift of the reference is the offset of ODPO, eq. 3
            batch["ref_chosen_logps"] = reference[0] + inputs[MARGIN_COLUMN] / self.beta
        weighed = self._weighed(model, weights, "log_probs")
        seen: list[torch.Tensor] = []

        def watched(**kwargs):
            outputs = weighed(**kwargs)
            if outputs.get("log_probs") is not None:
                seen.append(outputs.log_probs.detach())  # (2 * pairs, seq - 1)
            return outputs

        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            with self.router.use(self._tiled_route(user_index)):
                result = super()._compute_loss(watched, batch, return_outputs)
        finally:
            self.precompute_ref_logps = before
        log_probs = sequence_log_probs(seen[0], inputs["completion_mask"][:, 1:], self.ld_alpha)
        self._record_scores(user_index, self.beta * (log_probs - torch.cat(reference)), weights)
        return result


def _without_ours(inputs: dict[str, Any]) -> dict[str, Any]:
    """What TRL knows of a batch; it hands all of it on to the model."""
    return {name: value for name, value in inputs.items() if name not in ("user_index", "weights", MARGIN_COLUMN)}


def sequence_log_probs(log_probs: torch.Tensor, mask: torch.Tensor, ld_alpha: float | None = None) -> torch.Tensor:
    """Log-probability of each completion, with LD-DPO's weight of what the longer one has more, as TRL computes it.

    Args:
        log_probs (`torch.Tensor` of shape `(2 * pairs, seq)`):
            Per token, `[chosen; rejected]`; zero outside the completions.
        mask (`torch.Tensor` of shape `(2 * pairs, seq)`):
            Ones in the completions.
        ld_alpha (`float`, *optional*):
            Weight of the tokens beyond the length both have (https://huggingface.co/papers/2409.06411).
    """
    log_probs = log_probs[:, -mask.shape[1] :]
    if ld_alpha is None:
        return log_probs.sum(dim=1)
    position, length = mask.cumsum(dim=1), mask.sum(dim=1)
    both = torch.minimum(*length.chunk(2)).repeat(2).unsqueeze(1)
    # two sums, as TRL adds: where the policy is the reference, the difference is exactly zero
    common = (log_probs * ((position > 0) & (position <= both))).sum(dim=1)
    return common + ld_alpha * (log_probs * (position > both)).sum(dim=1)
