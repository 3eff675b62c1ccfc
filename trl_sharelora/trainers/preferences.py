"""What the personalised trainers on preference pairs (reward model, DPO) have in common: the user column, the metrics."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset

from ..data import check_long_rows, check_preference_rows, check_row
from ..errors import NonFiniteError, UnknownUserError, UnsupportedError
from ..evaluation import per_user_table
from ..sharelora.routing import Route
from ..users import UserRegistry
from .user_batches import UserBatchesMixin, column_of


logger = logging.getLogger(__name__)


# the margin between the rewards of a pair that the policy is to keep (ShareLoraDPOTrainer)
MARGIN_COLUMN = "reward_margin"


class UserBatchCollator:
    """Keeps the users of a batch, and margins where there are, beside what another collator makes of it.

    Args:
        collator (`Callable`):
            Turns a list of examples into a batch; does not see the user.

    Returns of a call: the collator's batch, `user_index` `(examples,)`, one row of the bank per example, and if the examples have
    one, `reward_margin` `(examples,)`.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        if getattr(collator, "padding_free", False) or getattr(collator, "return_position_ids", False):
            raise UnsupportedError(
                f"{type(collator).__name__} makes padding-free (packed) batches. Their rows are not samples, so they cannot be "
                "given to users; use a collator that pads."
            )
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        user_index = torch.tensor([example["user_index"] for example in examples], dtype=torch.long)
        beside = ("user_index", MARGIN_COLUMN)
        batch = self.collator([{k: v for k, v in example.items() if k not in beside} for example in examples])
        batch["user_index"] = user_index
        if MARGIN_COLUMN in examples[0]:
            batch[MARGIN_COLUMN] = torch.tensor([example[MARGIN_COLUMN] for example in examples])
        return batch


class PreferencePairsMixin(UserBatchesMixin):
    """Overrides of the personalised trainers on preference pairs; goes before the TRL trainer in a class statement.

    `_prepare_dataset`, `_set_signature_columns_if_needed` (the user column), `training_step` (the route, around forward and
    backward), `log` (exact metrics), and those of [`UserBatchesMixin`].
    """

    _seams = {
        "_prepare_dataset": ["dataset", "processing_class", "args", "dataset_name"],
        "_set_signature_columns_if_needed": [],
        "training_step": ["model", "inputs", "num_items_in_batch"],
        "log": ["logs", "start_time"],
    }
    # TRL's names of the exact metrics that `_pair_metrics` computes; those it does not log are left out
    _metric_names: dict[str, str]
    _check_rows = staticmethod(check_preference_rows)
    _check_row = staticmethod(check_row)

    # -- the dataset --------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        column = args.user_column
        if isinstance(dataset, IterableDataset):
            dataset = dataset.map(
                _StreamedUsers(
                    self.users, column, args.unseen, self._users_grow and dataset is self._train_rows, dataset_name
                ),
                with_indices=True,
            )
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

        if dataset is not self._train_rows:
            check_preference_rows(dataset, column, dataset_name, self.users)
        user_ids = column_of(dataset, column)
        user_index = self.users.find(user_ids)
        unseen = sorted(set(self.users.names(i for i, row in zip(user_ids, user_index, strict=True) if row < 0)))
        if unseen and args.unseen == "raise":
            raise UnknownUserError(
                f"In the {dataset_name} dataset: {self.users.unknown_message(unseen)} In the trainer: "
                f'{type(args).__name__}(unseen="common").'
            )
        if unseen:
            logger.warning(
                "%d of the %d rows of the %s dataset belong to %d users without training data; they are scored with the "
                "common model (unseen='common').",
                sum(row < 0 for row in user_index),
                len(user_index),
                dataset_name,
                len(unseen),
            )
        columns: dict[str, list[Any]] = {"user_index": user_index}
        if self.users.pseudonymous:  # nothing that follows sees an id
            columns[column] = self.users.names(user_ids)
        # `map` and not `add_column`, which leaves a dataset with selected rows in pieces of a row each
        dataset = dataset.map(
            lambda _, rows: {name: [values[row] for row in rows] for name, values in columns.items()},
            with_indices=True,
            batched=True,
            desc=f"Finding the users of the {dataset_name} dataset",
        )
        return self._tokenised(dataset, processing_class, args, dataset_name)

    def _tokenised(self, dataset, processing_class, args, dataset_name):
        """The parent's rows. It tokenises and drops long ones in one go and says nothing: count them between the two."""
        without_limit = copy.copy(args)
        without_limit.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, without_limit, dataset_name)
        if args.max_length is not None and check_long_rows(dataset, args.max_length, args.user_column, dataset_name):
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "user_index" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "user_index"]

    # -- a step --------------------------------------------------------------------------------------------------------------

    def _start_pairs(self) -> None:
        """After the parent's constructor."""
        if not isinstance(self.data_collator, UserBatchCollator):
            self.data_collator = UserBatchCollator(self.data_collator)
        # per mode: (user_index, chosen reward, rejected reward) of each batch since the last log, of all ranks
        self._scores: dict[str, list[tuple[torch.Tensor, ...]]] = {"train": [], "eval": []}
        self._start_routing()

    def _fetch(self, epoch_iterator, num_batches, device):
        """The parent's window; with several processes each batch also gets its `weights` `(pairs,)`."""
        if self._shards.processes == 1:
            return super()._fetch(epoch_iterator, num_batches, device)

        def marked():
            for batch in epoch_iterator:
                # now: the state is that of the batch fetched last
                batch["weights"] = self._shards.real(batch["user_index"], self.accelerator.gradient_state).float()
                yield batch

        window = super()._fetch(marked(), num_batches, device)
        counts = torch.tensor([batch["weights"].sum() for batch in window[0]], device=self.args.device)
        everywhere = self.accelerator.reduce(counts, "sum") if len(counts) else counts
        for batch, count in zip(window[0], everywhere, strict=True):
            # DDP averages over processes and TRL over the pairs of each: both would count padding
            batch["weights"] *= len(batch["weights"]) * self._shards.processes / count
            # a foreign pair is computed with the common model; its user's row is elsewhere
            batch["user_index"] = torch.where(batch["weights"] > 0, batch["user_index"], -1)
        return window

    def _tiled_route(self, user_index: torch.Tensor) -> Route:
        """The route of a preference batch `[chosen; rejected]` of these users."""
        return self.router.resolve(user_index.repeat(2), unseen="common")

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._grow_users()
        # around forward and backward: an activation checkpointing that is not transformers' own recomputes in the backward
        with self.router.use(self._tiled_route(inputs["user_index"])):
            return super().training_step(model, inputs, num_items_in_batch)

    @staticmethod
    def _weighed(model, weights: torch.Tensor | None, name: str):
        """The model as the parent's loss calls it; each pair's gradient is multiplied by its weight.

        The parent averages over the pairs of a batch. Weighing the gradient of what the model gives (its output `name`) gives
        each pair its share of the whole step, and padding none, without a loss of our own.
        """
        if weights is None or bool((weights == 1).all()):
            return model

        def weighed(**inputs):
            outputs = model(**inputs)
            if outputs[name].requires_grad:
                outputs[name].register_hook(lambda gradient: gradient * weights.repeat(2).unsqueeze(-1).to(gradient))
            return outputs

        return weighed

    # -- metrics ------------------------------------------------------------------------------------------------------------

    def _record_scores(
        self, user_index: torch.Tensor, rewards: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        """Keep the rewards of a batch for exact metrics.

        Args:
            user_index (`torch.Tensor` of shape `(pairs,)`):
                Users of the pairs of this rank.
            rewards (`torch.Tensor` of shape `(2 * pairs,)`):
                Rewards of `[chosen; rejected]`.
            weights (`torch.Tensor` of shape `(pairs,)`, *optional*):
                Zero for padding.

        Raises:
            NonFiniteError: a reward is NaN or infinite.
        """
        chosen, rejected = rewards.detach().float().chunk(2)
        finite = chosen.isfinite() & rejected.isfinite()
        if not finite.all():
            rows = (~finite).nonzero().flatten().tolist()
            users = sorted({str(self.users[i]) if i >= 0 else "(unseen)" for i in user_index[~finite].tolist()})
            raise NonFiniteError(
                f"The reward of {len(rows)} pair(s) of this batch is NaN or infinite (places {rows[:10]} of the batch, users "
                f"{', '.join(map(repr, users[:10]))}); stopped before anything was updated. Look at these users' comparisons "
                "and, if the model was loaded, at their rows of the adapter; or lower the learning rate."
            )
        mode = "train" if self.model.training else "eval"
        if mode == "train" and self.args.logging_strategy == "no":
            return  # nobody would ever take them: 10 MB per 1,000 steps of 8 pairs
        gathered: Any = (user_index, chosen, rejected)
        if mode == "eval":
            gathered = self.accelerator.gather_for_metrics(gathered)
        elif weights is not None:
            # not `gather_for_metrics`: it would cut a batch that is computed after the last of the epoch was fetched
            *gathered, weights = self.accelerator.gather((*gathered, weights))
            gathered = [tensor[weights > 0] for tensor in gathered]
        self._scores[mode].append(tuple(tensor.cpu() for tensor in gathered))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._scores[mode]:
            user_index, chosen, rejected = (torch.cat(parts) for parts in zip(*self._scores[mode], strict=True))
            self._scores[mode].clear()
            exact = {
                self._metric_names[name]: value
                for name, value in _pair_metrics(chosen, rejected).items()
                if name in self._metric_names
            }
            exact["users/seen"] = len(user_index.unique())
            if mode == "eval":
                # keys are "<prefix>_runtime", the prefix "eval" or, of several datasets, "eval_<name>"
                prefix = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), "eval")
                exact |= self._per_user_metrics(prefix, user_index, chosen, rejected)
                if prefix != "eval":
                    logs.update({f"{prefix}_{key}": value for key, value in exact.items()})
            # the parent averages over batches, which is wrong when they differ in size
            self._metrics[mode].update({key: [value] for key, value in exact.items()})
        super().log(logs, start_time)

    def _per_user_metrics(self, prefix, user_index, chosen, rejected) -> dict[str, float]:
        """Summaries over users; the table itself goes to `output_dir/users/`."""
        # an unseen user has no row, so he is counted but has no line of his own
        unseen = user_index < 0
        metrics: dict[str, float] = {"users/unseen_rows": int(unseen.sum())}
        if unseen.all():
            return metrics
        seen = ~unseen
        result = per_user_table(
            [self.users[row] for row in user_index[seen].tolist()], chosen[seen].numpy(), rejected[seen].numpy()
        )
        if self.is_world_process_zero():
            path = Path(self.args.output_dir, "users", f"{prefix}-step-{self.state.global_step}.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            result.to_parquet(path)
        metrics["users/seen"] = len(result.table)
        metrics["users/accuracy_mean"] = result.macro
        metrics["users/accuracy_worst_tenth"] = result.worst_tenth
        metrics["users/ece"] = result.ece
        return metrics


class _StreamedUsers:
    """Adds `user_index` to the rows of a stream; a class because `datasets` pickles what it maps with."""

    def __init__(self, users: UserRegistry, column: str, unseen: str, grow: bool, name: str):
        self.users, self.column, self.unseen, self.grow, self.name = users, column, unseen, grow, name
        self.first_row: dict[str, Any] | None = None  # the others must have its format

    def __call__(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        check_row(row, number, self.column, first_row=self.first_row, name=self.name, users=self.users)
        self.first_row = self.first_row or row
        if self.grow:
            index = self.users.add([row[self.column]], where=f"the stream (row {number})")[0]
        else:
            index = (self.users.index if self.unseen == "raise" else self.users.find)([row[self.column]])[0]
        return {"user_index": index}


def _pair_metrics(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, float]:
    """TRL's means over pairs, exact over all of them; a tie is half right, and counted.

    `min_reward` and `max_reward` stay TRL's: means over batches of the batch's extremes.

    Args:
        chosen (`torch.Tensor` of shape `(pairs,)`):
            Rewards of the preferred replies.
        rejected (`torch.Tensor` of shape `(pairs,)`):
            Rewards of the others.
    """
    rewards = torch.cat([chosen, rejected]).double()
    ties = (chosen == rejected).sum().item()
    return {
        "accuracy": ((chosen > rejected).sum().item() + ties / 2) / len(chosen),
        "ties": ties,
        "margin": (chosen.double() - rejected.double()).mean().item(),
        "mean_reward": rewards.mean().item(),
        "chosen": chosen.double().mean().item(),
        "rejected": rejected.double().mean().item(),
    }
