"""ShareLoraRewardTrainer: TRL's RewardTrainer with one reward per user."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback
from trl import RewardTrainer

from ..errors import ConfigError
from ..sharelora.config import ShareLoraConfig
from ..starts import warm_start
from ..usage import UsageReport, usage_card
from ..users import UserRegistry
from .preferences import PreferencePairsMixin
from .reward_config import ShareLoraRewardConfig
from .user_arguments import default_output_dir


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


class _ForgetUsage(TrainerCallback):
    """What was measured is of the model that was, not of the one that comes out of another training."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.usage = None


class ShareLoraRewardTrainer(PreferencePairsMixin, RewardTrainer):
    """
    Trainer of a reward model in which every user has a part of his own.

    A drop-in for [`~trl.RewardTrainer`]: the same data with one more column that names the user, the same arguments, the
    same metric names. The loss is TRL's Bradley-Terry loss on mixed batches, that is (3.3) of P-ShareLoRA
    (https://huggingface.co/papers/2503.19201).

    It overrides of RewardTrainer: `__init__` (the users), `compute_loss` (the route, the rewards for exact metrics),
    `create_model_card` (whether the model uses its users, if `usage` was set), and those of [`PreferencePairsMixin`]: `_prepare_dataset`, `_set_signature_columns_if_needed`, `get_batch_samples`,
    `_get_train_sampler`, `training_step`, `_clip_grad_norm`, `log`, `create_optimizer`, `_load_from_checkpoint`,
    `_load_optimizer_and_scheduler`, `_load_best_model`, `save_model`, `evaluation_loop`.

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

    `usage` (a [`~trl_sharelora.usage.UsageReport`] or None) goes into the model card. Nothing measures it here; `trl-sharelora reward`
    does after the training. Another `train()` makes it None.

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
    _seams = {
        "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "create_model_card": ["model_name", "dataset_name", "tags"],
    }
    usage: UsageReport | None = None
    _task_type = "SEQ_CLS"
    _card_usage = _CARD_USAGE
    _metric_names = {"accuracy": "accuracy", "ties": "ties", "margin": "margin", "mean_reward": "mean_reward"}
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
            args = ShareLoraRewardConfig(default_output_dir(model, "Reward"))
        if not isinstance(args, ShareLoraRewardConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}; a ShareLoraRewardConfig is needed (same fields, and the users')."
            )
        peft_config = self._prepare_users(model, args, train_dataset, peft_config, users)
        super().__init__(model, args, data_collator, train_dataset, *rest, peft_config=peft_config, **kwargs)
        self._start_pairs()
        self.add_callback(_ForgetUsage(self))
        if args.warm_start is not None:
            warm_start(self.accelerator.unwrap_model(self.model), args.warm_start)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        user_index, weights = inputs.pop("user_index"), inputs.pop("weights", None)
        with self.router.use(self._tiled_route(user_index)):
            loss, outputs = super().compute_loss(
                self._weighed(model, weights, "logits"), inputs, True, num_items_in_batch
            )
        self._record_scores(user_index, outputs.logits.squeeze(-1), weights)
        return (loss, outputs) if return_outputs else loss

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.usage is not None and self.is_world_process_zero():
            path = Path(self.args.output_dir, "README.md")
            # before how it was trained; in a card without that, at the end
            first, heading, rest = path.read_text(encoding="utf-8").partition("\n## Training procedure")
            path.write_text(f"{first}\n{usage_card(self.usage)}{heading}{rest}", encoding="utf-8")
