"""What the personalised trainers that generate (RLOO, GRPO, PPO) have in common: whose prompt is whose, at every forward."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from trl.trainer.utils import get_callable_name, is_async_callable

from ..data import check_prompt_row, check_prompt_rows
from ..errors import ConfigError, NonFiniteError, UnknownUserError, UnsupportedError, UserIdError
from ..sharelora.config import ShareLoraConfig, ShareLoraType
from ..sharelora.routing import Route
from ..users import UserRegistry
from .user_arguments import default_output_dir, with_user_arguments
from .user_batches import UserBatchesMixin, column_of


POLICY_CARD = """## Quick start

A personalised policy: {users} users share what they have in common, and each has a part of his own (`share="{share}"`). Every
prompt needs the user who asks (column `{column}` of the training data).

```python
import trl_sharelora  # registers the adapter type; without it PEFT raises KeyError: 'SHARELORA'
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = AutoPeftModelForCausalLM.from_pretrained("{model}")
batch = tokenizer(["The capital of France is"], return_tensors="pt")
output = model.generate(**batch, user_ids=[model.peft_config["default"].users[0]], max_new_tokens=20)
```

`trl_sharelora.export_user(path, user_id, output_dir)` writes one user as an ordinary LoRA that needs only PEFT. The user
ids are in `users.json`; do not publish it if they are personal data.
"""


class CheckedReward:
    """A reward function whose NaN and infinite rewards are errors that name the users.

    TRL takes NaN for "this function does not apply" (what `None` says) and leaves such a completion out without a word.

    Args:
        function (`Callable`):
            A reward function as TRL calls it: `prompts`, `completions`, the columns of the dataset and more by keyword; returns a
            list of rewards, `None` where it does not apply.
        user_column (`str`):
            The column that names the user.
        names (`Callable`):
            What may be shown of user ids ([`~UserRegistry.names`]).

    Raises:
        NonFiniteError: when called, for a reward that is NaN or infinite.
    """

    def __init__(self, function: Callable, user_column: str, names: Callable[[Iterable[Any]], list[str]]):
        self.function = function
        self.user_column = user_column
        self.names = names
        self.__name__ = get_callable_name(function)

    def __call__(self, **kwargs: Any) -> list[float | None]:
        rewards = self.function(**kwargs)
        bad = [place for place, reward in enumerate(rewards) if reward is not None and not math.isfinite(reward)]
        if bad:
            _raise_not_finite(self.__name__, bad, kwargs[self.user_column], self.names)
        return rewards


def _raise_not_finite(
    name: str, places: Sequence[int], user_ids: Sequence[Any], names: Callable[[Iterable[Any]], list[str]]
) -> None:
    users = sorted(set(names(user_ids[place] for place in places)))
    raise NonFiniteError(
        f"The reward function {name!r} gave {len(places)} reward(s) that are NaN or infinite (places {list(places[:10])} of the "
        f"generation batch, users {', '.join(map(repr, users[:10]))}); stopped before anything was updated. Look at the reward model "
        "for these users; a function that does not apply to a completion returns None."
    )


class _AlignRollouts(TrainerCallback):
    """TRL counts its steps from 0 after a resume, while the prompts go on where they were.

    Unless the checkpoint lay at the end of a generation batch, it would then train on one batch and be handed another one's prompts for
    the rest of the run, and with them other users.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        self.trainer._buffered_inputs = None  # of another training


class OnlinePolicyMixin(UserBatchesMixin):
    """Overrides of the personalised trainers that generate; goes before RLOOTrainer or GRPOTrainer in a class statement.

    `__init__` (the users), `_generate_and_score_completions` (the users of a generation batch), `_get_per_token_logps_and_entropies` (those of its
    pieces), `_calculate_rewards` (finite rewards, and who got them), `_compute_loss` (the users of a micro-batch),
    `training_step` (their route stays open for the backward), `log` (metrics over users), and those of [`UserBatchesMixin`].

    The completions of a prompt are all of its user, so the baselines that TRL computes within a group are per user.
    """

    _seams = {
        "_generate_and_score_completions": ["inputs"],
        "_get_per_token_logps_and_entropies": [
            *("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"),
            *("compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask"),
            *(
                "spatial_shapes",
                "num_tiles",
                "image_sizes",
                "token_type_ids",
                "mm_token_type_ids",
                "image_position_ids",
            ),
        ],
        "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
        "_compute_loss": ["model", "inputs"],
        "training_step": ["model", "inputs", "num_items_in_batch"],
        "log": ["logs", "start_time"],
    }
    # the trainer's own config; its name is TRL's `_name`
    _config: Callable[[str], Any]
    _name: str
    _task_type = "CAUSAL_LM"
    _card_usage = POLICY_CARD
    _check_rows = staticmethod(check_prompt_rows)
    _check_row = staticmethod(check_prompt_row)
    # generating takes so much longer than reading rows that there is nothing to win
    _reads_ahead = False

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *rest: Any,
        peft_config: ShareLoraConfig | None = None,
        users: UserRegistry | None = None,
        **kwargs: Any,
    ):
        args = with_user_arguments(args or self._config(default_output_dir(model, self._name)))
        reward_funcs, peft_config = self._prepare_online(
            model, reward_funcs, args, train_dataset, eval_dataset, peft_config, users, kwargs
        )
        given = (model, reward_funcs, args, train_dataset, eval_dataset, *rest)
        super().__init__(*given, **kwargs | {"peft_config": peft_config})
        # per mode: (user_index, reward) of each generation batch since the last log, of all ranks
        self._rewards: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"train": [], "eval": []}
        self.add_callback(_AlignRollouts(self))
        self._start_routing()

    # -- before the parent's constructor ----------------------------------------------------------------------------------

    def _prepare_online(
        self,
        model: Any,
        reward_funcs: Any,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        peft_config: Any,
        users: Any,
        others: dict[str, Any],
    ) -> tuple[list[Any], ShareLoraConfig | None]:
        """The reward functions and the adapter's config for the parent; everything that cannot work is refused here."""
        for name, why in {
            "use_vllm": "vLLM generates with one set of weights, into which TRL merges the adapter; there is one per user",
            "use_transformers_continuous_batching": "continuous batching reorders rows inside a forward, so they cannot be "
            "given to their users",
        }.items():
            if getattr(args, name):
                raise UnsupportedError(f"{name}=True came and is not supported: {why}. Leave it out.")
        for name in ("tools", "environment_factory", "rollout_func"):
            if others.get(name):
                raise UnsupportedError(
                    f"{name} came and is not supported: it generates again for some rows of a batch only, whose users TRL does not "
                    "hand on. Leave it out."
                )
        if args.user_sharding != "union":
            raise UnsupportedError(
                f"user_sharding={args.user_sharding!r} came; TRL deals the prompts of a generation batch to the processes by itself. Use "
                "user_sharding='union'."
            )
        if (
            isinstance(train_dataset, IterableDataset)
            and users is None
            and getattr(peft_config, "users", None) is None
        ):
            if not isinstance(model, PeftModel):
                raise ConfigError(
                    "A streamed dataset of prompts came without users. Name them, in the order of their rows: "
                    "users=UserRegistry([...])."
                )
        for dataset in (train_dataset, eval_dataset):
            columns = getattr(dataset, "column_names", None) or []
            if isinstance(columns, list) and {"image", "images"} & set(columns):
                raise UnsupportedError(
                    "A dataset with images came; personal policies are made and tested for text. Take the column out."
                )
        config = self._prepare_users(model, args, train_dataset, peft_config, users)
        named = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        for name, dataset in named.items():
            if isinstance(dataset, Dataset):
                check_prompt_rows(dataset, args.user_column, name, self.users)
                self._find(column_of(dataset, args.user_column), args.unseen, f"the {name} dataset")
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        return [self._checked(function, args.user_column, self.users.names) for function in functions], config

    @staticmethod
    def _checked(function: Any, user_column: str, names: Callable[[Iterable[Any]], list[str]]) -> Any:
        personal = isinstance(function, PeftModel) and isinstance(function.active_peft_config, ShareLoraConfig)
        if isinstance(function, str) and Path(function, "adapter_config.json").is_file():
            personal = PeftConfig.from_pretrained(function).peft_type == ShareLoraType.SHARELORA
        if personal:
            raise ConfigError(
                "A personal reward model came as a reward function; TRL would give it texts and not their users. Wrap it: "
                'UserReward(model_or_path, pessimism="ellipsoid").'
            )
        if isinstance(function, str | nn.Module) or is_async_callable(function):
            return function
        return CheckedReward(function, user_column, names)

    # -- whose is whose ---------------------------------------------------------------------------------------------------

    def _find(self, user_ids: list[Any], unseen: str, where: str) -> list[int]:
        """Rows of the bank, -1 for a user without one if `unseen` allows it."""
        try:
            names = self.users.names(user_ids)
        except UserIdError as error:
            raise UserIdError(f"In {where}: {error}") from None
        rows = self.users.find(names)
        unknown = sorted({name for name, row in zip(names, rows, strict=True) if row < 0})
        if unknown and unseen == "raise":
            raise UnknownUserError(
                f"In {where}: {self.users.unknown_message(unknown)} In the trainer: unseen='common'."
            )
        return rows

    def _rows_of(self, batch: Any) -> list[int]:
        for place, row in enumerate(batch):
            if self.args.user_column not in row:
                check_prompt_row(row, place, self.args.user_column, users=self.users)
        # training prompts are all of known users
        unseen = "raise" if self.model.training else self.args.unseen
        return self._find([row[self.args.user_column] for row in batch], unseen, "a generation batch")

    def _route(self, user_index: torch.Tensor) -> Route:
        return self.router.resolve(user_index, unseen="common")

    def _open_users(self) -> torch.Tensor:
        route = self.router.current()
        assert route is not None  # the callers below opened it
        return route.user_index

    def _generate_and_score_completions(self, inputs):
        user_index = torch.tensor(self._rows_of(inputs), device=self.accelerator.device)
        with self.router.use(self._route(user_index)):
            output = super()._generate_and_score_completions(inputs)
        # shuffled and split with the rest of the batch, as every tensor of its length is
        output["user_index"] = user_index
        return output

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        user_index = self._open_users()
        start = 0

        def piece(**inputs):
            nonlocal start
            if len(inputs["input_ids"]) == len(user_index):
                return model(**inputs)
            rows = user_index[start : start + len(inputs["input_ids"])]
            start += len(rows)
            with self.router.use(self._route(rows)):
                return model(**inputs)

        return super()._get_per_token_logps_and_entropies(piece, *args, **kwargs)

    def _compute_loss(self, model, inputs):
        with ExitStack() as here:
            # in training it stays open for the backward, which may recompute
            stack = self._step_routes if self.model.training else here
            stack.enter_context(self.router.use(self._route(inputs["user_index"])))
            return super()._compute_loss(model, inputs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with ExitStack() as self._step_routes:
            return super().training_step(model, inputs, num_items_in_batch)

    # -- rewards and metrics ----------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )  # (all rows, functions)
        start = self.accelerator.process_index * len(prompts)
        mine = rewards[start : start + len(prompts)]
        user_ids = [row[self.args.user_column] for row in inputs]
        for name, function, column in zip(self.reward_func_names, self.reward_funcs, mine.T, strict=True):
            # an async function says "does not apply" with a NaN too, a model cannot
            bad = ~column.isfinite() if isinstance(function, nn.Module) else column.isinf()
            if bad.any():
                _raise_not_finite(name, bad.nonzero().flatten().tolist(), user_ids, self.users.names)
        self._record_rewards(self._open_users(), mine)
        return rewards

    def _weighted(self, rewards: torch.Tensor) -> torch.Tensor:
        """The reward of each completion, as TRL adds its functions up; NaN where none applies.

        Args:
            rewards (`torch.Tensor` of shape `(rows, functions)`):
                Of each function; NaN where it does not apply.
        """
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return torch.where(rewards.isnan().all(dim=1), torch.nan, total)

    def _record_rewards(self, user_index: torch.Tensor, rewards: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        rows = self._rows_without_repeats()
        gathered = self.accelerator.gather((user_index, self._weighted(rewards)))
        self._rewards[mode].append(tuple(tensor[:rows].cpu() for tensor in gathered))

    def _rows_without_repeats(self) -> int | None:
        """How many completions of a batch of all processes count; the last one of an evaluation may be filled up. None is all.

        Not `gather_for_metrics`: it takes the length of the dataset, which has prompts and not completions, for that of the loader.
        """
        state = self.accelerator.gradient_state
        if self.model.training or not state.end_of_dataloader or state.remainder < 0:
            return None
        loader = state.active_dataloader
        return len(loader.dataset) * self.num_generations_eval % loader.total_batch_size or None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if self._rewards[mode]:
            user_index, rewards = (torch.cat(parts) for parts in zip(*self._rewards[mode], strict=True))
            self._rewards[mode].clear()
            prefix = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), None)
            metrics = self._per_user_metrics(user_index, rewards, prefix)
            if prefix not in (None, "eval"):
                logs.update({f"{prefix}_{key}": value for key, value in metrics.items()})
            self._metrics[mode].update({key: [value] for key, value in metrics.items()})
        super().log(logs, start_time)

    def _per_user_metrics(
        self, user_index: torch.Tensor, rewards: torch.Tensor, prefix: str | None
    ) -> dict[str, float]:
        """Summaries over users; the table of an evaluation goes to `output_dir/users/`."""
        scored = ~rewards.isnan()
        metrics: dict[str, float] = {
            "users/unseen_rows": int((user_index < 0).sum()),
            "users/unscored_rows": int((~scored).sum()),
        }
        rows = scored & (user_index >= 0)
        if not rows.any():
            return metrics
        frame = pd.DataFrame({"user_index": user_index[rows].numpy(), "reward": rewards[rows].double().numpy()})
        table = frame.groupby("user_index")["reward"].agg(n="size", reward_mean="mean", reward_std="std").reset_index()
        table.insert(0, "user_id", [self.users[row] for row in table.pop("user_index")])
        if prefix is not None and self.is_world_process_zero():
            path = Path(self.args.output_dir, "users", f"{prefix}-step-{self.state.global_step}.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(path, index=False)
        metrics["users/seen"] = len(table)
        metrics["users/reward_mean"] = float(table["reward_mean"].mean())
        metrics["users/reward_worst_tenth"] = float(table["reward_mean"].nsmallest(math.ceil(len(table) / 10)).mean())
        return metrics
