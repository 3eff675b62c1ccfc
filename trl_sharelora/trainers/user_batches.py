"""What every personalised trainer adds to its TRL parent: the users of a step, their rows, their checkpoints.

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
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import TrainerCallback

from ..errors import (
    AdapterMismatchError,
    BankError,
    ConfigError,
    DataError,
    UnsupportedError,
)
from ..sharelora.bank import ResidentBank, WorkingSet, runs_of
from ..sharelora.config import ShareLoraConfig
from ..sharelora.model import VALUE_HEAD
from ..sharelora.norms import UserNorms
from ..sharelora.optimizer import ShareLoraAdamW
from ..sharelora.routing import get_router
from ..sharelora.store import BANK_FOLDER, WORKING_FOLDER, remove_unnamed
from ..users import UserRegistry
from .seams import check_seams
from .sharding import OwnerSampler, UserShards, balanced_owners, check_common_start, prepare_fsdp
from .user_arguments import refuse_data_parallel, refuse_fsdp


logger = logging.getLogger(__name__)


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
        if args.learning_rate:  # else the users' rows stay still
            self.trainer.model.peft_config["default"].trained_users = None

    def on_train_end(self, args, state, control, **kwargs):
        norms = getattr(_innermost(self.trainer.optimizer), "norms", None)
        if norms is not None:
            norms.at_end()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # neither accelerate nor the Trainer reaches the sampler after a resume inside an epoch
        if self.trainer._owner_sampler is not None:
            self.trainer._owner_sampler.set_epoch(int(state.epoch + 1e-6))


def _innermost(optimizer: Any) -> Any:
    """An optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class UserBatchesMixin:
    """Overrides of every personalised trainer, whatever its data; goes before the TRL trainer in a class statement.

    `get_batch_samples` (the users of a step), `training_step` (their average over processes), `_clip_grad_norm` (one norm over
    shared part and users), `create_optimizer` (rows of users with data), `_load_from_checkpoint`, `_load_best_model` (same
    users, their records), `create_model_card` (how to use it). With `user_sharding="owner"` also `_get_train_sampler`,
    `save_model`, `evaluation_loop`; under FSDP also `_load_optimizer_and_scheduler`. Everything else is the parent's.
    """

    _seams = {
        "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
        "training_step": ["model", "inputs", "num_items_in_batch"],
        "_clip_grad_norm": ["model"],
        "create_optimizer": ["model"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_load_best_model": [],
        "_get_train_sampler": ["train_dataset"],
        "save_model": ["output_dir", "_internal_call"],
    }
    _tag_names: list[str]
    # of the adapter: what PEFT must know to train and save what lies beside it
    _task_type: str
    # the kind of rows: how a data set, and one row of a stream, are checked before anything is trained on them
    _check_rows: Callable[[Dataset, str, str, UserRegistry | None], None]
    _check_row: Callable[..., None]
    _trains_critic = False
    # whether the next window's users are fetched while this one computes
    _reads_ahead = True
    # what the model card says under "Quick start"
    _card_usage: str

    # -- before the parent's constructor ----------------------------------------------------------------------------------

    def _prepare_users(
        self,
        model: Any,
        args: Any,
        train_dataset: Any,
        peft_config: Any,
        users: UserRegistry | None,
    ) -> ShareLoraConfig | None:
        """Everything that is checked and gathered before TRL builds the trainer; the adapter's config for it."""
        check_seams(type(self))
        refuse_data_parallel(args)
        if self._task_type == "CAUSAL_LM":
            refuse_fsdp(args)
        if train_dataset is None:
            raise DataError("`train_dataset` is required: rows with a column that names the user.")
        self._check_adapter(model, peft_config)
        if peft_config is not None and peft_config.users is not None:
            if users is not None and users != peft_config.users:
                raise ConfigError("`users` and `peft_config.users` name different users; give one of them.")
            users = peft_config.users
        self.users = self._gather_users(model, args, train_dataset, users)
        if peft_config is not None:
            peft_config = copy.deepcopy(peft_config)  # PEFT extends its modules_to_save in place
            if peft_config.personal_head and self._task_type != "SEQ_CLS":
                raise ConfigError(
                    f"personal_head=True came to {type(self).__name__}; only a reward model has a score head. Leave it out."
                )
            if peft_config.init_users == "independent" and self._users_grow:
                raise ConfigError(
                    "init_users='independent' came with a stream whose users appear one by one; those after the first would start at A_0 "
                    "instead of a draw of their own. Give users=UserRegistry(...), or init_users='common'."
                )
            peft_config.task_type = self._task_type  # for SEQ_CLS the head would else be neither trained nor saved
            peft_config.set_users(self.users)
        self._learned: dict[str, torch.Tensor] = {}
        if isinstance(model, PeftModel):
            if "ref" in model.peft_config:
                model.delete_adapter(
                    "ref"
                )  # of an earlier training; the reference of this one is the policy as it is now
            model.base_model.grow_users()
            # TRL casts the trainable weights of a quantised base to bf16; what an adapter has learned is put back afterwards
            self._learned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            if not self._learned:
                raise ConfigError(
                    "The adapter is frozen; load it with PeftModel.from_pretrained(..., is_trainable=True)."
                )
        return peft_config

    @classmethod
    def _check_adapter(cls, model: Any, peft_config: Any) -> None:
        config = peft_config
        if peft_config is None:
            config = None if isinstance(model, str) else getattr(model, "peft_config", {}).get("default")
            if not isinstance(config, ShareLoraConfig):
                raise ConfigError(
                    "Neither a ShareLoRA adapter on the model nor a peft_config came. Give peft_config=ShareLoraConfig(r=32, "
                    "lora_alpha=16), or a PeftModel with a ShareLoRA adapter named 'default'."
                )
        elif not isinstance(peft_config, ShareLoraConfig):
            raise ConfigError(
                f"peft_config is a {type(peft_config).__name__}; a ShareLoraConfig is needed here. For one model for everybody use "
                f"trl.{cls.__name__.removeprefix('ShareLora')}."
            )
        if str(config.task_type or cls._task_type).split(".")[-1] != cls._task_type:
            raise ConfigError(
                f"The adapter has task_type={config.task_type!r}; {cls.__name__} needs {cls._task_type!r} (or None). A reward model "
                "is 'SEQ_CLS', a policy 'CAUSAL_LM'."
            )

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
                self._check_row(row, 0, args.user_column)
                users = UserRegistry([row[args.user_column]])
        elif isinstance(train_dataset, Dataset):
            self._check_rows(train_dataset, args.user_column, "train", users)
            known = 0 if users is None else len(users)
            users = UserRegistry() if users is None else users
            users.add(column_of(train_dataset, args.user_column), where=f"column {args.user_column!r}")
            if known and len(users) > known:
                logger.info("%d users of the training data are new; %d were known.", len(users) - known, known)
        return users if users is not None else UserRegistry()

    # -- after the parent's constructor -------------------------------------------------------------------------------------

    def _start_routing(self) -> None:
        self.router = get_router(self.model)
        self.add_callback(_ForgetVisits(self))
        self._train_rows = None
        # TRL casts the trainable weights of a quantised base to bf16, in which small updates vanish (TRL's own reason for
        # its exception for DoRA, huggingface/trl#7268).
        if getattr(self.model, "is_loaded_in_8bit", False) or getattr(self.model, "is_loaded_in_4bit", False):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        for name, parameter in self.model.named_parameters():
            if name in self._learned:
                parameter.data.copy_(self._learned[name])
        self._learned = {}

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
        comparisons = np.bincount(column_of(self.train_dataset, "user_index"), minlength=len(self.users))
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
        users, owners = column_of(dataset, "user_index"), self._shards.owners
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
        if working_sets and window[0] and self._reads_ahead and not self._users_grow:
            following = self._fetch(epoch_iterator, self.args.gradient_accumulation_steps, device)
            self._next_window = (epoch_iterator, following)
            rows = self._users_of(following[0])
            for working_set in working_sets:
                working_set.prefetch(rows)
        return window

    def _fetch(self, epoch_iterator, num_batches, device):
        """The parent's window."""
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _rows_of(self, batch: Any) -> list[int]:
        """Rows of the bank of a batch's users; -1 is nobody."""
        return batch["user_index"].tolist()

    def _users_of(self, batches: list[Any]) -> list[int]:
        """Rows of the users of a window; of all processes, unless each has its own users."""
        users = {row for batch in batches for row in self._rows_of(batch)} - {-1}
        if self._shards.processes > 1 and self._shards.owners is None:
            users = users.union(*gather_object([sorted(users)]))
        return sorted(users)

    def _average_users(self) -> None:
        """The gradients of the users' rows as DDP averages those of the shared part; once per optimizer step."""
        processes = self._shards.processes
        if processes == 1:
            return
        for working_set in self._trained_sets():
            rows = working_set.slots_of(working_set.mine(self._window_rows))
            gradient = working_set.gradient[rows]
            if self._shards.owners is None:
                gradient = self.accelerator.reduce(gradient, "sum") if len(rows) else gradient
            working_set.gradient[rows] = gradient / processes

    def _trained_sets(self) -> list[WorkingSet]:
        """The working sets that are trained; that of TRL's reference adapter only lies beside them."""
        working_sets = self.router.working_sets
        return [working_sets[name] for name in self.model.active_adapters if name in working_sets]

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
        for working_set in self._trained_sets():
            tensors.append(working_set.weight)
            for start, end in runs_of(working_set.held()):
                gradient = working_set.gradient[start:end]
                norms += [vector_norm(gradient[:, first:last], dim=1) for first, last in working_set.spans]
        square = torch.cat(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)
        return tensors, square.to(self.args.device)

    def training_step(self, model, inputs, num_items_in_batch=None):
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

    # -- optimiser and checkpoints ------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            args = self.args
            if not self._trains_critic:
                for name, parameter in model.named_parameters():
                    if (
                        f"{VALUE_HEAD}." in name
                    ):  # of a PPO before this: without a loss, DDP would wait for its gradient
                        parameter.requires_grad_(False)
            trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
            banks = {id(module.weight) for module in model.modules() if isinstance(module, ResidentBank)}
            decayed = set(self.get_decay_parameter_names(model))
            shared = {name: p for name, p in trainable.items() if id(p) not in banks}
            rate = {} if args.learning_rate_shared is None else {"lr": args.learning_rate_shared}
            # the users first: the learning rate that is logged is that of the first group
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
            if args.user_norm_bound is not None or args.user_ridge:
                if self.is_fsdp_enabled:
                    raise UnsupportedError(
                        "user_norm_bound or user_ridge came with FSDP, which shards the shared factors they need whole. Use DDP, or "
                        "user_weight_decay."
                    )
                kwargs["norms"] = UserNorms(model, "default", args.user_norm_bound, args.user_ridge)
            self.optimizer = ShareLoraAdamW(
                [{"rowwise": False, **group} for group in groups if group["params"] or group.get("rowwise")],
                self.router,
                self._trained_sets(),
                **kwargs,
            )
        elif not isinstance(_innermost(self.optimizer), ShareLoraAdamW):
            name = type(_innermost(self.optimizer)).__name__
            if self._trained_sets():
                raise ConfigError(
                    f"An optimizer of type {name} came for bank={self.model.peft_config['default'].bank!r}, whose rows are no parameters: no "
                    "user's row would ever move. Leave it out, or take bank='resident'."
                )
            logger.warning(
                "An optimizer of type %s came. It takes a bank for one parameter, so that it moves users who have no data too, counts the "
                "steps of all together, and knows no user_norm_bound or user_ridge. Leave it out for the trainer's own.",
                name,
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
            # PEFT puts all adapters but `default` into folders of their own
            folder = Path(directory) if adapter_name == "default" else Path(directory, adapter_name)
            self.model.base_model.load_bank(adapter_name, str(folder))

    def save_model(self, output_dir=None, _internal_call=False):
        if self._shards.owners is not None:
            for working_set in self.router.working_sets.values():
                part = "" if working_set.name == "default" else working_set.name
                directory = Path(output_dir or self.args.output_dir, part, BANK_FOLDER)
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
            directory = Path(self.args.output_dir, WORKING_FOLDER, f"lent-{working_set.name}")
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
            usage = self._card_usage.format(
                model=self.hub_model_id or Path(self.args.output_dir).name,
                users=len(self.users),
                column=self.args.user_column,
                share=self.model.peft_config["default"].share,
            )
            # the parent's quick start is a pipeline, which cannot say whose reward it wants
            card = re.sub(r"## Quick start\n.*?(?=\n## )", lambda _: usage, card, count=1, flags=re.DOTALL)
            path.write_text(card, encoding="utf-8")


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """The norm of sharded gradients as a plain tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def column_of(dataset: Dataset, name: str) -> list[Any]:
    """A column as Python values, whatever the dataset's format."""
    return dataset.with_format(None)[name][:]
