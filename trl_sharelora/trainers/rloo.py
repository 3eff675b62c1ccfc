"""ShareLoraRLOOTrainer: TRL's RLOOTrainer with one policy per user."""

from dataclasses import dataclass

from trl import RLOOConfig, RLOOTrainer

from .online import OnlinePolicyMixin
from .user_arguments import UserArguments


@dataclass
class ShareLoraRLOOConfig(UserArguments, RLOOConfig):
    r"""
    Configuration of the [`ShareLoraRLOOTrainer`].

    Everything of [`~trl.RLOOConfig`] with its defaults, and the fields of [`UserArguments`].
    """


class ShareLoraRLOOTrainer(OnlinePolicyMixin, RLOOTrainer):
    """
    REINFORCE leave-one-out for a policy in which every user has a part of his own; the recommended policy trainer here.

    A drop-in for [`~trl.RLOOTrainer`]: prompts with one more column that names the user, any reward functions, among them
    [`UserReward`], the pessimistic reward of each user. It is the last step of Algorithm 1 of P-ShareLoRA
    (https://huggingface.co/papers/2503.19201), a policy per user against the worst reward of his confidence set, with RLOO
    (https://huggingface.co/papers/2402.14740) in place of the exact maximum; the paper has no experiment of it.

    It overrides of RLOOTrainer: those of [`OnlinePolicyMixin`]: `__init__`, `_generate_and_score_completions`,
    `_get_per_token_logps_and_entropies`, `_calculate_rewards`, `_compute_loss`, `training_step`, `log`, `get_batch_samples`,
    `_clip_grad_norm`, `create_optimizer`, `_load_from_checkpoint`, `_load_optimizer_and_scheduler`,
    `_load_best_model`, `_get_train_sampler`, `save_model`, `evaluation_loop`, `create_model_card`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in RLOOTrainer. A PeftModel must have a ShareLoRA adapter; its users keep their rows, new ones are added, and a
            frozen copy of it, users and all, is the reference.
        reward_funcs (`Callable`, `str`, [`~transformers.PreTrainedModel`] or a list of these):
            As in RLOOTrainer. A personal reward model comes as a [`UserReward`].
        args ([`ShareLoraRLOOConfig`], *optional*):
            Configuration; a plain [`~trl.RLOOConfig`] gets the defaults of [`UserArguments`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prompts, text or messages, with the column `args.user_column`.
        eval_dataset (*optional*):
            As in RLOOTrainer, with the column too.
        peft_config ([`ShareLoraConfig`], *optional*):
            The adapter; needed unless `model` has one.
        users ([`UserRegistry`], *optional*):
            The users. By default those of the training data, in order of appearance; a streamed dataset needs them.
        **kwargs:
            Everything else of RLOOTrainer.

    Raises:
        DataError, UserIdError, UnknownUserError, ConfigError, UnsupportedError: before anything is trained.
        NonFiniteError: a reward is NaN or infinite; names the users.

    Metrics, beside TRL's: `users/seen`, `users/reward_mean` (mean over users of their mean reward), `users/reward_worst_tenth`,
    `users/unseen_rows`, `users/unscored_rows` (completions to which no reward function applies; TRL gives them advantage 0). A
    table of all users is written to `output_dir/users/` at every evaluation.

    Example:

    ```python
    trainer = ShareLoraRLOOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=UserReward("rm", pessimism="ellipsoid"),
        args=ShareLoraRLOOConfig(output_dir="policy"),
        train_dataset=prompts,
        peft_config=ShareLoraConfig(r=32, lora_alpha=16),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "rloo", "sharelora"]
    _config = ShareLoraRLOOConfig
