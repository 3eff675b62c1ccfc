"""ShareLoraGRPOTrainer: TRL's GRPOTrainer with one policy per user."""

from dataclasses import dataclass

from trl import GRPOConfig, GRPOTrainer

from .online import OnlinePolicyMixin
from .user_arguments import UserArguments


@dataclass
class ShareLoraGRPOConfig(UserArguments, GRPOConfig):
    r"""
    Configuration of the [`ShareLoraGRPOTrainer`].

    Everything of [`~trl.GRPOConfig`] with its defaults, and the fields of [`UserArguments`].
    """


class ShareLoraGRPOTrainer(OnlinePolicyMixin, GRPOTrainer):
    """
    GRPO for a policy in which every user has a part of his own.

    A drop-in for [`~trl.GRPOTrainer`] (https://huggingface.co/papers/2402.03300): prompts with one more column that names the
    user, any reward functions, among them [`UserReward`], the pessimistic reward of each user. Rewards are compared within the
    completions of one prompt, hence of one user.

    It overrides of GRPOTrainer: those of [`OnlinePolicyMixin`]: `__init__`, `_generate_and_score_completions`,
    `_get_per_token_logps_and_entropies`, `_calculate_rewards`, `_compute_loss`, `training_step`, `log`, `get_batch_samples`,
    `_clip_grad_norm`, `create_optimizer`, `_load_from_checkpoint`, `_load_optimizer_and_scheduler`,
    `_load_best_model`, `_get_train_sampler`, `save_model`, `evaluation_loop`, `create_model_card`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in GRPOTrainer. A PeftModel must have a ShareLoRA adapter; its users keep their rows, new ones are added, and a
            frozen copy of it, users and all, is the reference.
        reward_funcs (`Callable`, `str`, [`~transformers.PreTrainedModel`] or a list of these):
            As in GRPOTrainer. A personal reward model comes as a [`UserReward`].
        args ([`ShareLoraGRPOConfig`], *optional*):
            Configuration; a plain [`~trl.GRPOConfig`] gets the defaults of [`UserArguments`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Prompts, text or messages, with the column `args.user_column`.
        eval_dataset (*optional*):
            As in GRPOTrainer, with the column too.
        peft_config ([`ShareLoraConfig`], *optional*):
            The adapter; needed unless `model` has one.
        users ([`UserRegistry`], *optional*):
            The users. By default those of the training data, in order of appearance; a streamed dataset needs them.
        **kwargs:
            Everything else of GRPOTrainer.

    Raises:
        DataError, UserIdError, UnknownUserError, ConfigError, UnsupportedError: before anything is trained.
        NonFiniteError: a reward is NaN or infinite; names the users.

    Metrics, beside TRL's: `users/seen`, `users/reward_mean` (mean over users of their mean reward), `users/reward_worst_tenth`,
    `users/unseen_rows`, `users/unscored_rows` (completions to which no reward function applies; TRL gives them advantage 0). A
    table of all users is written to `output_dir/users/` at every evaluation.
    """

    _tag_names = ["trl", "grpo", "sharelora"]
    _config = ShareLoraGRPOConfig
