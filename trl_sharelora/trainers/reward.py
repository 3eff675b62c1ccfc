"""ShareLoraRewardTrainer: TRL's RewardTrainer with one reward per user."""

import copy
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from trl import RewardTrainer

from ..errors import ConfigError, DataError
from ..sharelora.config import ShareLoraConfig
from ..users import UserRegistry
from .reward_config import ShareLoraRewardConfig, refuse_data_parallel
from .user_batches import UserBatchesMixin


class ShareLoraRewardTrainer(UserBatchesMixin, RewardTrainer):
    """
    Trainer of a reward model in which every user has a part of his own.

    A drop-in for [`~trl.RewardTrainer`]: the same data with one more column that names the user, the same arguments, the
    same metric names. The loss is TRL's Bradley-Terry loss on mixed batches, that is (3.3) of P-ShareLoRA
    (https://huggingface.co/papers/2503.19201).

    It overrides of RewardTrainer: `__init__` (the users), `compute_loss` (the route, the rewards for exact metrics), and
    those of [`UserBatchesMixin`]: `_prepare_dataset`, `_set_signature_columns_if_needed`, `get_batch_samples`,
    `_get_train_sampler`, `training_step`, `_clip_grad_norm`, `log`, `create_optimizer`, `_load_from_checkpoint`,
    `_load_optimizer_and_scheduler`, `_load_best_model`, `save_model`, `evaluation_loop`, `create_model_card`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in RewardTrainer. A PeftModel must have a ShareLoRA adapter; its users keep their rows, new ones are added.
        args ([`ShareLoraRewardConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference rows, standard or conversational, with the column `args.user_column`.
        peft_config ([`ShareLoraConfig`], *optional*):
            The adapter; needed unless `model` has one. It is copied, and given the task type and the users.
        users ([`UserRegistry`], *optional*):
            The users. By default those of the training data, in order of appearance; of a streamed dataset they are added
            as they appear, or are all given here.
        *rest, **kwargs:
            Everything else of RewardTrainer, `eval_dataset`, `processing_class`, `quantization_config`, ....

    Raises:
        DataError, UserIdError, UnknownUserError, ConfigError, UnsupportedError: before anything is trained.

    Metrics, beside TRL's (`accuracy` exact, ties half): `ties` (pairs), `users/seen`, `users/unseen_rows`,
    `users/accuracy_mean`, `users/accuracy_worst_tenth`, `users/ece`. The table of all users is written to
    `output_dir/users/` at every evaluation.

    Example:

    ```python
    trainer = ShareLoraRewardTrainer(
        model="Qwen/Qwen3-0.6B",
        args=ShareLoraRewardConfig(output_dir="rm", user_column="user_id"),
        train_dataset=train,
        eval_dataset=test,
        peft_config=ShareLoraConfig(r=32, lora_alpha=16),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "reward-trainer", "sharelora"]
    _paper = {
        "title": "A Shared Low-Rank Adaptation Approach to Personalized RLHF",
        "id": "2503.19201",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: ShareLoraRewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        peft_config: ShareLoraConfig | None = None,
        users: UserRegistry | None = None,
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ShareLoraRewardConfig(f"{name.split('/')[-1]}-Reward")
        if not isinstance(args, ShareLoraRewardConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}; a ShareLoraRewardConfig is needed (same fields, and the users')."
            )
        refuse_data_parallel(args)
        if train_dataset is None:
            raise DataError("`train_dataset` is required: preference rows with a column that names the user.")
        self._check_adapter(model, peft_config)
        if peft_config is not None and peft_config.users is not None:
            if users is not None and users != peft_config.users:
                raise ConfigError("`users` and `peft_config.users` name different users; give one of them.")
            users = peft_config.users
        self.users = self._gather_users(model, args, train_dataset, users)
        if peft_config is not None:
            peft_config = copy.deepcopy(peft_config)  # PEFT extends its modules_to_save in place
            peft_config.task_type = "SEQ_CLS"  # without it the head would be neither trained nor saved
            peft_config.set_users(self.users)
        learned = {}
        if isinstance(model, PeftModel):
            model.base_model.grow_users()
            # TRL casts the trainable weights of a quantised base to bf16; what an adapter has learned is put back below
            learned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            if not learned:
                raise ConfigError(
                    "The adapter is frozen; load it with PeftModel.from_pretrained(..., is_trainable=True)."
                )
        super().__init__(model, args, data_collator, train_dataset, *rest, peft_config=peft_config, **kwargs)
        self._start_routing()
        for name, parameter in self.model.named_parameters():
            if name in learned:
                parameter.data.copy_(learned[name])

    @staticmethod
    def _check_adapter(model: Any, peft_config: Any) -> None:
        if peft_config is None:
            adapter = None if isinstance(model, str) else getattr(model, "peft_config", {}).get("default")
            if not isinstance(adapter, ShareLoraConfig):
                raise ConfigError(
                    "Neither a ShareLoRA adapter on the model nor a peft_config came. Give peft_config=ShareLoraConfig(r=32, "
                    "lora_alpha=16), or a PeftModel with a ShareLoRA adapter named 'default'."
                )
        elif not isinstance(peft_config, ShareLoraConfig):
            raise ConfigError(
                f"peft_config is a {type(peft_config).__name__}; a ShareLoraConfig is needed here. For one reward for everybody use "
                "trl.RewardTrainer."
            )
        elif str(peft_config.task_type or "SEQ_CLS").split(".")[-1] != "SEQ_CLS":
            raise ConfigError(
                f"peft_config.task_type={peft_config.task_type!r}; a reward model needs 'SEQ_CLS' (or None)."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        user_index, weights = inputs.pop("user_index"), inputs.pop("weights", None)
        with self.router.use(self._tiled_route(user_index)):
            loss, outputs = super().compute_loss(self._weighed(model, weights), inputs, True, num_items_in_batch)
        self._record_scores(user_index, outputs.logits.squeeze(-1), weights)
        return (loss, outputs) if return_outputs else loss
