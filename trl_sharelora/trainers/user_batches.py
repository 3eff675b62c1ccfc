"""What every personalised trainer adds to its TRL parent: the user column, from the dataset to the metrics.

The ids travel as a tensor of rows beside the batch, never inside it: TRL's models and collators need not know of them, and
the route is open around a whole training step, backward included.
"""

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import TrainerCallback

from ..data import check_long_rows, check_preference_rows, check_row
from ..errors import (
    AdapterMismatchError,
    BankError,
    ConfigError,
    DataError,
    NonFiniteError,
    UnknownUserError,
    UnsupportedError,
)
from ..evaluation import per_user_table
from ..sharelora.bank import ResidentBank, WorkingSet, runs_of
from ..sharelora.config import ShareLoraConfig
from ..sharelora.optimizer import ShareLoraAdamW
from ..sharelora.routing import Route, get_router
from ..sharelora.store import BANK_FOLDER, WORKING_FOLDER, remove_unnamed
from ..users import UserRegistry
from .sharding import OwnerSampler, UserShards, balanced_owners, check_common_start, prepare_fsdp


logger = logging.getLogger(__name__)


class UserBatchCollator:
    """Keeps the users of a batch beside what another collator makes of it.

    Args:
        collator (`Callable`):
            Turns a list of examples into a batch; does not see the user.

    Returns of a call: the collator's batch and `user_index` `(examples,)`, one row of the bank per example.
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
        batch = self.collator([{k: v for k, v in example.items() if k != "user_index"} for example in examples])
        batch["user_index"] = user_index
        return batch


class _ForgetVisits(TrainerCallback):
    """A step that the gradient scaler skipped has no visitors to carry over."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.router.forget_visited()
        self.trainer._window_rows = []

    def on_train_begin(self, args, state, control, **kwargs):
        # a training that was interrupted may have left its visits, gradients and window behind
        self.on_optimizer_step(args, state, control)
        self.trainer._next_window = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        # neither accelerate nor the Trainer reaches the sampler after a resume inside an epoch
        if self.trainer._owner_sampler is not None:
            self.trainer._owner_sampler.set_epoch(int(state.epoch + 1e-6))


class UserBatchesMixin:
    """Overrides of TRL's preference trainers that personalise them; goes before the TRL trainer in a class statement.

    `_prepare_dataset`, `_set_signature_columns_if_needed` (the user column), `get_batch_samples` (the users of a step),
    `training_step` (the route), `_clip_grad_norm` (one norm over shared part and users), `log` (exact metrics),
    `create_optimizer` (rows of users with data), `_load_from_checkpoint`, `_load_best_model` (same users, their records),
    `create_model_card` (how to use it). With `user_sharding="owner"` also `_get_train_sampler`, `save_model`, `evaluation_loop`;
    under FSDP also `_load_optimizer_and_scheduler`. Everything else is the parent's.
    """

    _tag_names: list[str]

    # -- before the parent's constructor ----------------------------------------------------------------------------------

    def _gather_users(self, model: Any, args: Any, train_dataset: Any, users: UserRegistry | None) -> UserRegistry:
        """The registry: given, of the loaded adapter, or built from the training data; checked rows first."""
        adapter = getattr(model, "peft_config", {}).get("default") if not isinstance(model, str) else None
        if isinstance(adapter, ShareLoraConfig):
            if users is not None and users != adapter.users:
                raise ConfigError(
                    f"The adapter has its own {len(adapter.users)} users and users={users!r} came too. Leave `users` out; new users "
                    "of the training data are added to the adapter's."
                )
            users = adapter.users
        self._users_grow = users is None and isinstance(train_dataset, IterableDataset)
        self._train_rows = train_dataset  # checked here; not again in _prepare_dataset
        if isinstance(train_dataset, IterableDataset):
            if self._users_grow:
                if args.dataloader_num_workers:
                    raise ConfigError(
                        f"A streamed dataset whose users grow as they appear came with dataloader_num_workers="
                        f"{args.dataloader_num_workers}; each worker would number them by itself. Give users=UserRegistry(...), or "
                        "use no workers."
                    )
                # one user is needed to build the adapter; the stream is opened again for training
                row = next(iter(train_dataset), None)
                if row is None:
                    raise DataError(
                        "The train dataset is an empty stream: it gives no row. Was it read to its end before?"
                    )
                check_row(row, 0, args.user_column)
                users = UserRegistry([row[args.user_column]])
        elif isinstance(train_dataset, Dataset):
            check_preference_rows(train_dataset, args.user_column, "train")
            known = 0 if users is None else len(users)
            users = UserRegistry() if users is None else users
            users.add(_column(train_dataset, args.user_column), where=f"column {args.user_column!r}")
            if known and len(users) > known:
                logger.info("%d users of the training data are new; %d were known.", len(users) - known, known)
        return users if users is not None else UserRegistry()

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
            check_preference_rows(dataset, column, dataset_name)
        user_ids = _column(dataset, column)
        user_index = self.users.find(user_ids)
        unseen = sorted({str(user_id) for user_id, row in zip(user_ids, user_index, strict=True) if row < 0})
        if unseen and args.unseen == "raise":
            raise UnknownUserError(
                f"In the {dataset_name} dataset: {self.users.unknown_message(unseen)} In the trainer: "
                'ShareLoraRewardConfig(unseen="common").'
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
        # `map` and not `add_column`, which leaves a dataset with selected rows in pieces of a row each
        dataset = dataset.map(
            lambda _, rows: {"user_index": [user_index[row] for row in rows]},
            with_indices=True,
            batched=True,
            desc=f"Finding the users of the {dataset_name} dataset",
        )

        # The parent tokenises and drops long rows in one go and says nothing; count them between the two.
        without_limit = copy.copy(args)
        without_limit.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, without_limit, dataset_name)
        if args.max_length is not None and check_long_rows(dataset, args.max_length, column, dataset_name):
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "user_index" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "user_index"]

    # -- after the parent's constructor -------------------------------------------------------------------------------------

    def _start_routing(self) -> None:
        self.router = get_router(self.model)
        self.data_collator = UserBatchCollator(self.data_collator)
        self.add_callback(_ForgetVisits(self))
        # per mode: (user_index, chosen reward, rejected reward) of each batch since the last log, of all ranks
        self._scores: dict[str, list[tuple[torch.Tensor, ...]]] = {"train": [], "eval": []}
        self._train_rows = None
        # TRL casts the trainable weights of a quantised base to bf16, in which small updates vanish (TRL's own reason for
        # its exception for DoRA, huggingface/trl#7268).
        if getattr(self.model, "is_loaded_in_8bit", False) or getattr(self.model, "is_loaded_in_4bit", False):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

        self._next_window: tuple[Any, ...] | None = None
        self._start_sharding()
        if self.is_fsdp_enabled:
            prepare_fsdp(self)

    def _start_sharding(self) -> None:
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        pairs = None
        if not isinstance(self.train_dataset, IterableDataset):
            pairs = (
                0 if self.args.dataloader_drop_last else len(self.train_dataset) % (self._train_batch_size * processes)
            )
        self._shards = UserShards(processes, process, last_pairs=pairs)
        self._owner_sampler: OwnerSampler | None = None
        if self.router.working_sets and self.accelerator.mixed_precision == "fp16":
            raise UnsupportedError(
                "fp16 came with a bank in a store, whose gradients the gradient scaler does not see. Use bf16=True, or "
                "ShareLoraConfig(bank='resident')."
            )
        self._window_rows: list[int] = []
        working_sets = list(self.router.working_sets.values())
        if working_sets and len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            raise UnsupportedError(
                "A base spread over several devices (device_map) came with a bank in a store, whose working set lies on one of them. "
                "Use one device per process, or ShareLoraConfig(bank='resident')."
            )
        for name, working_set in self.router.working_sets.items():
            working_set.to(self.args.device)
            part = f"process-{process}" if name == "default" else f"process-{process}-{name}"
            working_set.store.work_in(Path(self.args.output_dir, WORKING_FOLDER), part)
        if self.args.user_sharding == "union" or processes == 1:
            return
        if not working_sets or isinstance(self.train_dataset, IterableDataset):
            raise ConfigError(
                "user_sharding='owner' needs a bank in a store (ShareLoraConfig(bank='ram') or 'mmap') and a dataset with a length, so that "
                "each process can keep its own users and get their comparisons. Use user_sharding='union'."
            )
        if self.accelerator.split_batches:
            raise ConfigError(
                "user_sharding='owner' came with split_batches=True, which cuts each batch into pieces for the processes, whoever "
                "their users are. Leave split_batches out, or use user_sharding='union'."
            )
        comparisons = np.bincount(_column(self.train_dataset, "user_index"), minlength=len(self.users))
        self._shards = UserShards(processes, process, balanced_owners(comparisons, processes))
        self.router.visits_are_local = True
        for working_set in working_sets:
            working_set.own(self._shards.owners == process)

    # -- the window: all micro-batches of an optimizer step -----------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        if self._shards.owners is None:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        users, owners = _column(dataset, "user_index"), self._shards.owners
        sampler = OwnerSampler(users, owners, self._shards.processes, self._train_batch_size, seed)
        self._owner_sampler = sampler
        return sampler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        ahead, self._next_window = self._next_window, None
        if ahead is not None and ahead[0] is epoch_iterator:
            window = ahead[1]
        else:  # the first of an epoch
            window = self._fetch(epoch_iterator, num_batches, device)
        working_sets = list(self.router.working_sets.values())
        self._grow_users()
        # those of a window that ended without a step (of a stream) go on with the next
        rows = self._users_of(window[0])
        self._window_rows = sorted({*self._window_rows, *rows})
        for working_set in working_sets:
            working_set.hold(rows)
        # The next window is fetched now, so that its users are read while this one computes. A stream whose users grow is not
        # read ahead: it would number users who are never trained.
        if working_sets and window[0] and not self._users_grow:
            following = self._fetch(epoch_iterator, self.args.gradient_accumulation_steps, device)
            self._next_window = (epoch_iterator, following)
            rows = self._users_of(following[0])
            for working_set in working_sets:
                working_set.prefetch(rows)
        return window

    def _fetch(self, epoch_iterator, num_batches, device):
        """The parent's window; with several processes each batch also gets its `weights` `(pairs,)`."""
        if self._shards.processes == 1:
            return super().get_batch_samples(epoch_iterator, num_batches, device)

        def marked():
            for batch in epoch_iterator:
                # now: the state is that of the batch fetched last
                batch["weights"] = self._shards.real(batch["user_index"], self.accelerator.gradient_state).float()
                yield batch

        window = super().get_batch_samples(marked(), num_batches, device)
        counts = torch.tensor([batch["weights"].sum() for batch in window[0]], device=self.args.device)
        everywhere = self.accelerator.reduce(counts, "sum") if len(counts) else counts
        for batch, count in zip(window[0], everywhere, strict=True):
            # DDP averages over processes and TRL over the pairs of each: both would count padding
            batch["weights"] *= len(batch["weights"]) * self._shards.processes / count
            # a foreign pair is computed with the common model; its user's row is elsewhere
            batch["user_index"] = torch.where(batch["weights"] > 0, batch["user_index"], -1)
        return window

    def _users_of(self, batches: list[dict[str, Any]]) -> list[int]:
        """Rows of the users of a window; of all processes, unless each has its own users."""
        users = {row for batch in batches for row in batch["user_index"].tolist()} - {-1}
        if self._shards.processes > 1 and self._shards.owners is None:
            users = users.union(*gather_object([sorted(users)]))
        return sorted(users)

    def _average_users(self) -> None:
        """The gradients of the users' rows as DDP averages those of the shared part; once per optimizer step."""
        processes = self._shards.processes
        if processes == 1:
            return
        for working_set in self.router.working_sets.values():
            rows = working_set.slots_of(working_set.mine(self._window_rows))
            gradient = working_set.gradient[rows]
            if self._shards.owners is None:
                gradient = self.accelerator.reduce(gradient, "sum") if len(rows) else gradient
            working_set.gradient[rows] = gradient / processes

    def _clip_grad_norm(self, model):
        """One norm over the shared part and the users with data, wherever these rest, and on all processes the same."""
        self.accelerator.unscale_gradients()
        users, square = self._user_gradients()
        banks = {id(parameter) for parameter in users}
        shared = [p for p in model.parameters() if p.grad is not None and id(p) not in banks]
        if self._shards.owners is not None:
            # each process has other rows: with its own norm it would scale the shared part its own way
            square = self.accelerator.reduce(square, "sum")
        common = _whole(get_total_norm([parameter.grad for parameter in shared]))
        total = (common.double().square() + square.to(common.device)).sqrt().to(common.dtype)
        if not total.isfinite():
            return total  # scaling would make all gradients NaN; the optimizer then names whose they are
        plain = [parameter for parameter in shared if not isinstance(parameter.grad, DTensor)]
        clip_grads_with_norm_([*plain, *users], self.args.max_grad_norm, total)
        sharded = [parameter for parameter in shared if isinstance(parameter.grad, DTensor)]
        for mesh in {parameter.grad.device_mesh for parameter in sharded}:
            group = [parameter for parameter in sharded if parameter.grad.device_mesh == mesh]
            clip_grads_with_norm_(group, self.args.max_grad_norm, DTensor.from_local(total, mesh))
        return total

    def _user_gradients(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The Parameters and working sets with gradients of users, and the squared norm of those of this step.

        Row by row and module by module, added up in float64: the same number bit by bit wherever the rows rest.
        """
        tensors: list[torch.Tensor] = []
        norms: list[torch.Tensor] = []
        runs = runs_of(self._window_rows)
        for module in self.model.modules():
            if isinstance(module, ResidentBank) and module.weight.grad is not None:
                tensors.append(module.weight)
                norms += [vector_norm(module.weight.grad[start:end].flatten(1), dim=1) for start, end in runs]
        for working_set in self.router.working_sets.values():
            tensors.append(working_set.weight)
            for start, end in runs_of(working_set.held()):
                gradient = working_set.gradient[start:end]
                norms += [vector_norm(gradient[:, first:last], dim=1) for first, last in working_set.spans]
        square = torch.cat(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)
        return tensors, square.to(self.args.device)

    def _tiled_route(self, user_index: torch.Tensor) -> Route:
        """The route of a preference batch `[chosen; rejected]` of these users."""
        return self.router.resolve(user_index.repeat(2), unseen="common")

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._grow_users()
        # around forward and backward: an activation checkpointing that is not transformers' own recomputes in the backward
        with self.router.use(self._tiled_route(inputs["user_index"])):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._average_users()
        return loss

    def _grow_users(self) -> None:
        """Rows for users who have appeared in a stream."""
        if self._users_grow and len(self.users) > self.router.rows:
            if self.accelerator.num_processes > 1:
                raise UnsupportedError(
                    "Users that grow as they appear in a stream are tested on one process; several would number them differently. "
                    "Give users=UserRegistry(...)."
                )
            self.model.base_model.grow_users()

    @staticmethod
    def _weighed(model, weights: torch.Tensor | None):
        """The model as the parent's loss calls it; each pair's gradient is multiplied by its weight.

        The parent averages over the pairs of a batch. Weighing the gradient of the rewards gives each pair its share of the
        whole step, and padding none, without a loss of our own.
        """
        if weights is None or bool((weights == 1).all()):
            return model

        def weighed(**inputs):
            outputs = model(**inputs)
            if outputs.logits.requires_grad:
                outputs.logits.register_hook(lambda gradient: gradient * weights.repeat(2).unsqueeze(-1).to(gradient))
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
            exact = _pair_metrics(chosen, rejected)
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

    # -- optimiser and checkpoints ------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            args = self.args
            trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
            banks = {id(module.weight) for module in model.modules() if isinstance(module, ResidentBank)}
            decayed = set(self.get_decay_parameter_names(model))
            shared = {name: p for name, p in trainable.items() if id(p) not in banks}
            rate = {} if args.learning_rate_shared is None else {"lr": args.learning_rate_shared}
            # the users first: the learning rate that is logged is that of the first group
            working_sets = [
                self.router.working_sets[name]
                for name in self.model.active_adapters
                if name in self.router.working_sets
            ]
            groups = [
                {
                    "params": [p for p in trainable.values() if id(p) in banks],
                    "rowwise": True,
                    "weight_decay": args.user_weight_decay,
                },
                {
                    "params": [p for name, p in shared.items() if name in decayed],
                    "weight_decay": args.weight_decay,
                    **rate,
                },
                {"params": [p for name, p in shared.items() if name not in decayed], "weight_decay": 0.0, **rate},
            ]
            _, kwargs = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = ShareLoraAdamW(
                [{"rowwise": False, **group} for group in groups if group["params"] or group.get("rowwise")],
                self.router,
                working_sets,
                **kwargs,
            )
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved = UserRegistry.load(resume_from_checkpoint)
        if self._users_grow and saved.ids[: len(self.users)] == self.users.ids and None not in saved.ids:
            self.users.add(saved.ids)
            self.model.base_model.grow_users()
        if saved != self.users:
            changed = [row for row, (old, new) in enumerate(zip(saved, self.users, strict=False)) if old != new]
            what = f"row {changed[0]} is another user" if changed else f"{len(saved)} users against {len(self.users)}"
            raise AdapterMismatchError(
                f"The checkpoint {resume_from_checkpoint} was made with other users than the training data has now ({what}): "
                "every user would be given another's row. Resume with the same data, or start a new training from the "
                "adapter (PeftModel.from_pretrained(..., is_trainable=True)), to which new users are added."
            )
        self.users.registry_id = saved.registry_id
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.is_fsdp_enabled:
            check_common_start(self.model, resume_from_checkpoint)
        self._load_banks(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_fsdp_enabled:
            # torch's distributed checkpoints restore the learning rate of groups with parameters only
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def _load_best_model(self):
        super()._load_best_model()
        self._load_banks(self.state.best_model_checkpoint)

    def _load_banks(self, directory: str) -> None:
        for adapter_name in self.router.working_sets:
            self.model.base_model.load_bank(adapter_name, directory)

    def save_model(self, output_dir=None, _internal_call=False):
        if self._shards.owners is not None:
            for working_set in self.router.working_sets.values():
                directory = Path(output_dir or self.args.output_dir, BANK_FOLDER)
                working_set.gathered = self._gather_segments(working_set, directory)
        super().save_model(output_dir, _internal_call)

    def _gather_segments(self, working_set: WorkingSet, directory: Path) -> list[dict[str, Any]]:
        """Every process puts its users' records into one folder; the files of all of them."""
        working_set.flush()
        everywhere = gather_object(working_set.store.save_segments(directory))
        self.accelerator.wait_for_everyone()
        missing = [item["file"] for item in everywhere if not (directory / item["file"]).exists()]
        if missing:
            raise BankError(
                f"{directory} lacks {len(missing)} files of other processes ({missing[0]}, ...): the machines do not share this folder. "
                "user_sharding='owner' on several machines needs an output_dir that all of them see; else use 'union'."
            )
        return list({segment["file"]: segment for segment in everywhere}.values())

    def evaluation_loop(self, *args, **kwargs):
        if self._shards.owners is None:
            return super().evaluation_loop(*args, **kwargs)
        # any process may be given any user to evaluate: let all read the records of all
        working_sets = list(self.router.working_sets.values())
        for working_set in working_sets:
            directory = Path(self.args.output_dir, WORKING_FOLDER, "lent")
            segments = self._gather_segments(working_set, directory)
            if self.is_world_process_zero():
                working_set.store.write_manifest(directory, segments, len(self.users))
                remove_unnamed(directory, segments)
            self.accelerator.wait_for_everyone()
            working_set.borrow(directory, len(self.users))
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            for working_set in working_sets:
                working_set.give_back()

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir, "README.md")
            card = path.read_text(encoding="utf-8")
            usage = _CARD_USAGE.format(
                model=self.hub_model_id or Path(self.args.output_dir).name,
                users=len(self.users),
                column=self.args.user_column,
                share=self.model.peft_config["default"].share,
            )
            # the parent's quick start is a pipeline, which cannot say whose reward it wants
            card = re.sub(r"## Quick start\n.*?(?=\n## )", lambda _: usage, card, count=1, flags=re.DOTALL)
            path.write_text(card, encoding="utf-8")


class _StreamedUsers:
    """Adds `user_index` to the rows of a stream; a class because `datasets` pickles what it maps with."""

    def __init__(self, users: UserRegistry, column: str, unseen: str, grow: bool, name: str):
        self.users, self.column, self.unseen, self.grow, self.name = users, column, unseen, grow, name
        self.first_row: dict[str, Any] | None = None  # the others must have its format

    def __call__(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        check_row(row, number, self.column, first_row=self.first_row, name=self.name)
        self.first_row = self.first_row or row
        if self.grow:
            index = self.users.add([row[self.column]], where=f"the stream (row {number})")[0]
        else:
            index = (self.users.index if self.unseen == "raise" else self.users.find)([row[self.column]])[0]
        return {"user_index": index}


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """The norm of sharded gradients as a plain tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _column(dataset: Dataset, name: str) -> list[Any]:
    """A column as Python values, whatever the dataset's format."""
    return dataset.with_format(None)[name][:]


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
    }


_CARD_USAGE = """## Quick start

A personalised reward model: {users} users share what they have in common, and each has a part of his own
(`share="{share}"`). Every row needs the user whose reward is wanted (column `{column}` of the training data).

```python
import trl_sharelora  # registers the adapter type; without it PEFT raises KeyError: 'SHARELORA'
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = AutoPeftModelForSequenceClassification.from_pretrained("{model}", num_labels=1)
batch = tokenizer(["The capital of France is Paris."], return_tensors="pt")
reward = model(**batch, user_ids=[model.peft_config["default"].users[0]]).logits
```

`trl_sharelora.export_user(path, user_id, output_dir)` writes one user as an ordinary LoRA that needs only PEFT. The user
ids are in `users.json`; do not publish it if they are personal data.
"""
