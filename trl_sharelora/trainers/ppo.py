"""ShareLoraPPOTrainer: PPO with a critic and GAE, on TRL's GRPOTrainer, with one policy and one value per user.

TRL removed its own PPOTrainer in 1.13 (huggingface/trl#7020). GRPOTrainer generates, scores, clips token by token and takes
advantages of shape (batch, tokens) from subclasses; what PPO adds is a value head, the estimate of advantages, and the value loss.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import set_additional_trainable_modules
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..errors import ConfigError, NonFiniteError
from ..sharelora.model import VALUE_HEAD, make_value_head
from .online import OnlinePolicyMixin
from .user_arguments import UserArguments


# the losses of GRPOTrainer that are means over tokens, which is what PPO clips
TOKEN_LOSSES = ("dapo", "bnpo")


# -- tensors in, tensors out --------------------------------------------------------------------------------------------------


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Reward of each token: the KL penalty everywhere, the score at the last token (https://huggingface.co/papers/1909.08593, eq. 2).

    Args:
        scores (`torch.Tensor` of shape `(rows,)`):
            Reward of each completion.
        kl (`torch.Tensor` of shape `(rows, tokens)`):
            Log-probability minus that of the reference, per token.
        mask (`torch.Tensor` of shape `(rows, tokens)`):
            Ones in the completions; they begin at the first token and have no holes.
        kl_coef (`float`):
            Weight of the penalty.

    Returns:
        `torch.Tensor` of shape `(rows, tokens)`: zero outside the completions; a completion without tokens has none.
    """
    mask = mask.to(scores.dtype)
    last = mask - torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return (last * scores.unsqueeze(1) - kl_coef * kl) * mask


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns (GAE, https://huggingface.co/papers/1506.02438, eqs. 11 and 16).

    `delta_t = r_t + gamma V(s_{t+1}) - V(s_t)`, `A_t = delta_t + gamma lam A_{t+1}`, the return is `A_t + V(s_t)`; after the last
    token of a completion there is nothing.

    Args:
        rewards (`torch.Tensor` of shape `(rows, tokens)`):
            Reward of each token.
        values (`torch.Tensor` of shape `(rows, tokens)`):
            Value before each token.
        mask (`torch.Tensor` of shape `(rows, tokens)`):
            Ones in the completions.
        gamma (`float`):
            Discount.
        lam (`float`):
            Weight of longer estimates: 0 one step, 1 the whole rest.

    Returns:
        Two `torch.Tensor` of shape `(rows, tokens)`, zero outside the completions.
    """
    mask = mask.to(rewards.dtype)
    rewards, values = rewards * mask, values * mask
    advantage = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(advantage)
    advantages = []
    for token in reversed(range(rewards.shape[1])):
        delta = rewards[:, token] + gamma * following - values[:, token]
        advantage = (delta + gamma * lam * advantage) * mask[:, token]
        following = values[:, token]
        advantages.append(advantage)
    stacked = torch.stack(advantages[::-1], dim=1)
    return stacked, stacked + values


def whiten(values: torch.Tensor, mask: torch.Tensor, moments: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Values with mean 0 and variance 1 where the mask is.

    Args:
        values (`torch.Tensor` of shape `(rows, tokens)`):
            What to whiten.
        mask (`torch.Tensor` of shape `(rows, tokens)`):
            Where it counts; the rest becomes 0.
        moments (`torch.Tensor` of shape `(3,)`):
            Sum of the mask, of the values and of their squares under it, over all processes ([`moments_of`]).
        shift_mean (`bool`, *optional*, defaults to `True`):
            Whether the mean becomes 0, or stays.
    """
    count, total, squares = moments.double()
    mean = total / count.clamp(min=1)
    # unbiased, as in TRL's masked_whiten
    variance = (squares - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return ((whitened if shift_mean else whitened + mean) * mask).to(values.dtype)


def moments_of(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the mask, of the values and of their squares under it, in float64: `(3,)`."""
    mask, values = mask.double(), values.double() * mask
    return torch.stack([mask.sum(), values.sum(), values.square().sum()])


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> torch.Tensor:
    """Half the larger squared error of the value and of the value kept near the old one, as in the authors' PPO code.

    Args:
        values (`torch.Tensor` of shape `(rows, tokens)`):
            Values now.
        old_values (`torch.Tensor` of shape `(rows, tokens)`):
            Values when the completions were sampled.
        returns (`torch.Tensor` of shape `(rows, tokens)`):
            What they should be.
        cliprange (`float`):
            How far a value may move before moving on no longer counts.
    """
    near = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


# -- configuration ------------------------------------------------------------------------------------------------------------


@dataclass
class ShareLoraPPOConfig(UserArguments, GRPOConfig):
    r"""
    Configuration of the [`ShareLoraPPOTrainer`].

    Everything of [`~trl.GRPOConfig`], the fields of [`UserArguments`], and what follows. The paper has PPO in its Algorithm 2 and
    no hyperparameters; the defaults are those of TRL's last PPOConfig (1.12) unless said otherwise.

    Parameters:
        > Parameters that control PPO

        kl_coef (`float`, *optional*, defaults to `0.05`):
            Weight of the KL penalty in the reward.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount: a completion is short and its score comes at the end.
        lam (`float`, *optional*, defaults to `0.95`):
            GAE's lambda; also that of Coste et al. (https://huggingface.co/papers/2310.02743).
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            Clip range of the value loss.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whiten the advantages over all tokens of a generation batch, of all processes.
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            Whiten the rewards of the tokens before, but for their mean.
        missing_eos_penalty (`float`, *optional*):
            Taken off the score of a completion that did not end; none by default.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `num_iterations`: Defaults to `4`, PPO's epochs over a generation batch (also Coste et al.).
    > - `num_generations`: Defaults to `2`, GRPOTrainer's least; PPO needs no groups.
    > - `scale_rewards`: Defaults to `"none"`; PPO's advantages come from its critic.
    > The `epsilon` of GRPOConfig is PPO's clip range (0.2), and `beta`, a KL term in the loss, must stay 0.
    """

    kl_coef: float = field(
        default=0.05, metadata={"help": "Weight of the KL penalty in the reward (TRL's last PPOConfig)."}
    )
    gamma: float = field(
        default=1.0, metadata={"help": "Discount; the score comes at the end of a short completion (TRL's PPOConfig)."}
    )
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda (TRL's PPOConfig; Coste et al., 2310.02743)."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss (TRL's PPOConfig)."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value loss (TRL's PPOConfig)."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Whiten the advantages over a generation batch (as TRL's PPOTrainer did)."}
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Whiten the tokens' rewards but for their mean (TRL's PPOConfig: off)."}
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Taken off the score of a completion that did not end (TRL's PPOConfig: none)."},
    )
    num_iterations: int = field(
        default=4, metadata={"help": "PPO's epochs over a generation batch (TRL's PPOConfig; Coste et al.)."}
    )
    num_generations: int | None = field(
        default=2, metadata={"help": "Completions per prompt; 2 is GRPOTrainer's least, PPO needs no groups."}
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "PPO's advantages come from its critic, not from groups.", "choices": ["none"]},
    )

    def __post_init__(self):
        super().__post_init__()
        for name, low, high in (
            ("kl_coef", 0, math.inf),
            ("gamma", 0, 1),
            ("lam", 0, 1),
            ("vf_coef", 0, math.inf),
            ("cliprange_value", 0, math.inf),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ConfigError(f"{name}={value!r}; a finite number from {low} to {high} is needed.")
        if self.beta != 0.0:
            raise ConfigError(f"beta={self.beta} came; in PPO the KL penalty is part of the reward. Use kl_coef.")
        if self.loss_type not in TOKEN_LOSSES or self.importance_sampling_level != "token":
            raise ConfigError(
                f"loss_type={self.loss_type!r} with importance_sampling_level={self.importance_sampling_level!r} came; PPO clips token by "
                f"token: one of {', '.join(map(repr, TOKEN_LOSSES))} with 'token' is needed."
            )


# -- the trainer --------------------------------------------------------------------------------------------------------------


class ShareLoraPPOTrainer(OnlinePolicyMixin, GRPOTrainer):
    """
    PPO with a critic for a policy in which every user has a part of his own.

    Step (d) of Algorithm 2 of P-ShareLoRA (https://huggingface.co/papers/2503.19201): PPO-Clip with GAE for every user, here with
    all users in mixed batches. The paper has no experiment of it. Data and rewards are as in [`ShareLoraRLOOTrainer`], which is
    simpler, learns faster and is recommended.

    The value of a state is a linear map of the policy's last hidden state, so it is the user's own as the policy is. The head
    (`value_head`, float32, zero at the start) is trained and saved with the adapter; an exported user goes without it.

    It overrides of GRPOTrainer: `__init__` (the users, the value head), `_get_per_token_logps_and_entropies` (keeps the values),
    `_calculate_rewards` (keeps the scores), `_generate_and_score_completions` (advantages and returns), `_compute_loss` (the value
    loss), and those of [`OnlinePolicyMixin`]: `training_step`, `log`, `get_batch_samples`, `_clip_grad_norm`, `create_optimizer`,
    `_load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_best_model`, `_get_train_sampler`, `save_model`,
    `evaluation_loop`, `create_model_card`.

    Args:
        model, reward_funcs, train_dataset, eval_dataset, peft_config, users, *rest, **kwargs:
            As in [`ShareLoraRLOOTrainer`]. A PeftModel without a value head gets one.
        args ([`ShareLoraPPOConfig`], *optional*):
            Configuration.

    Raises:
        DataError, UserIdError, UnknownUserError, ConfigError, UnsupportedError: before anything is trained.
        NonFiniteError: a reward is NaN or infinite, or no reward function applies to a completion; names the users.

    Metrics, beside TRL's and those of [`ShareLoraRLOOTrainer`]: `objective/kl` (per completion), `objective/scores`,
    `objective/rlhf_reward` (scores less the penalty), `value/mean`, `value/explained_variance`, `value/loss`,
    `value/clip_fraction`.
    """

    _tag_names = ["trl", "grpo", "ppo", "sharelora"]
    _name = "PPO"
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}
    _config = ShareLoraPPOConfig
    _trains_critic = True

    def __init__(self, *args: Any, **kwargs: Any):
        # values of the forwards in progress, and of the last ones
        self._open_values: list[torch.Tensor] | None = None
        self._values: Any = None
        super().__init__(*args, **kwargs)
        policy = self.model.get_base_model()
        # inside the forward, so that DDP and FSDP know of the head; not while generating
        policy.base_model.register_forward_hook(self._keep_values)

    def _prepare_online(self, model, reward_funcs, args, *others):
        if not isinstance(args, ShareLoraPPOConfig):
            raise ConfigError(f"args is a {type(args).__name__}; a ShareLoraPPOConfig is needed.")
        functions, peft_config = super()._prepare_online(model, reward_funcs, args, *others)
        if peft_config is not None:
            peft_config.modules_to_save = list(dict.fromkeys([*(peft_config.modules_to_save or ()), VALUE_HEAD]))
        else:
            add_value_head(model)
            keep_reference(model)
        return functions, peft_config

    def _keep_values(self, backbone: Any, args: Any, output: Any) -> None:
        if self._open_values is not None:
            policy = self.accelerator.unwrap_model(self.model).get_base_model()
            self._open_values.append(policy.get_submodule(VALUE_HEAD)(output.last_hidden_state).squeeze(-1))

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        self._open_values = []
        try:
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            values = torch.cat(self._open_values)  # (rows, prompt + completion)
        finally:
            self._open_values = None
        tokens = result[0].shape[1]
        # the value of a state is that before its token, where the token is predicted
        self._values = values[:, -tokens - 1 : -1]
        return result

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        start = self.accelerator.process_index * len(prompts)
        self._scores = self._weighted(rewards[start : start + len(prompts)])  # (rows,)
        missing = self._scores.isnan()
        if missing.any():
            places = missing.nonzero().flatten().tolist()
            users = sorted(set(self.users.names(inputs[place][self.args.user_column] for place in places)))
            raise NonFiniteError(
                f"No reward function applies to {int(missing.sum())} completions (users {', '.join(map(repr, users[:10]))}); PPO's "
                "critic cannot leave one out. Give a reward function that applies to all, or use ShareLoraRLOOTrainer."
            )
        return rewards

    def _generate_and_score_completions(self, inputs):
        self._values = None
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.router.use(self._route(output["user_index"])),
        ):
            if self._values is None:  # TRL leaves the old log-probabilities out where they equal the new ones
                output["old_per_token_logps"] = self._log_probs_of(output)
            values = self._values.float() * mask
            policy = self.accelerator.unwrap_model(self.model)
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                reference = self._log_probs_of(output)
        kl = (output["old_per_token_logps"] - reference) * mask
        scores = self._scores
        if self.args.missing_eos_penalty is not None:
            last = output["completion_ids"].gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)
            ended = torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device))
            scores = scores - self.args.missing_eos_penalty * ~ended
        rewards = token_rewards(scores, kl, mask, self.args.kl_coef)
        if self.args.whiten_rewards:
            rewards = self._whitened(rewards, mask, shift_mean=False)
        advantages, returns = generalized_advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        self._log_rollout(scores, kl, values, returns, mask)
        # TRL has logged the advantages of GRPO's groups, which are not used here
        logged = self.accelerator.gather((advantages * mask).sum(1) / mask.sum(1).clamp(min=1)).tolist()
        for _ in logged:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(logged)
        if self.args.whiten_advantages:
            advantages = self._whitened(advantages, mask)
        self._values = None
        return output | {"advantages": advantages, "returns": returns, "old_values": values}

    def _log_probs_of(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities `(rows, tokens)` of a generation batch, in pieces as TRL computes them."""
        training = self.model.training
        size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        return self._get_per_token_logps_and_entropies(
            self.model, input_ids, mask, batch["completion_ids"].shape[1], size
        )[0]

    def _whitened(self, values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        return whiten(values, mask, self.accelerator.reduce(moments_of(values, mask), "sum"), shift_mean)

    def _log_rollout(self, scores, kl, values, returns, mask) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        per_row = torch.stack([kl.sum(1), scores, scores - self.args.kl_coef * kl.sum(1)], dim=1)
        for name, mean in zip(
            ("objective/kl", "objective/scores", "objective/rlhf_reward"),
            self.accelerator.gather(per_row).mean(0).tolist(),
            strict=True,
        ):
            metrics[name].append(mean)
        count, total, squares = self.accelerator.reduce(moments_of(returns, mask), "sum").tolist()
        sums = torch.stack([(values * mask).sum(), ((returns - values).square() * mask).sum()]).double()
        value_sum, errors = self.accelerator.reduce(sums, "sum").tolist()
        metrics["value/mean"].append(value_sum / max(count, 1))
        spread = squares - total**2 / max(count, 1)
        metrics["value/explained_variance"].append(1 - errors / spread if spread > 0 else 0.0)

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        mask, values = inputs["completion_mask"], self._values
        self._values = None  # with it goes its graph
        per_token = (
            clipped_value_loss(values, inputs["old_values"], inputs["returns"], self.args.cliprange_value) * mask
        )
        mode = "train" if self.model.training else "eval"
        # as the policy loss of the same name: GRPOTrainer scales for gradient accumulation by itself
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        tokens = mask.sum().clamp(min=1)
        if self.loss_type == "dapo":
            normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            normalizer = normalizer * (steps / self.args.steps_per_generation if mode == "train" else 1)
        else:
            normalizer = tokens * steps
        moved = ((values - inputs["old_values"]).abs() > self.args.cliprange_value) * mask
        local = torch.stack([per_token.sum() / tokens, moved.sum() / tokens]).detach().unsqueeze(0)
        value_loss, clipped = self.accelerator.gather(local).mean(0).tolist()
        self._metrics[mode]["value/loss"].append(value_loss)
        self._metrics[mode]["value/clip_fraction"].append(clipped)
        return loss + self.args.vf_coef * per_token.sum() / normalizer


def add_value_head(model: PeftModel) -> None:
    """Give a policy's adapter a value head, trained and saved with it; one that has it already is left as it is.

    Args:
        model ([`~peft.PeftModel`]):
            A policy with a ShareLoRA adapter named `default`.
    """
    config = model.peft_config["default"]
    if VALUE_HEAD in (config.modules_to_save or ()):
        return
    base = model.get_base_model()
    make_value_head(base)
    only = copy.copy(config)  # what else is saved is wrapped already
    only.modules_to_save, only.trainable_token_indices = [VALUE_HEAD], None
    set_additional_trainable_modules(base, only, BaseTuner.get_model_config(base), "default")
    config.modules_to_save = [*(config.modules_to_save or ()), VALUE_HEAD]


def keep_reference(model: PeftModel) -> None:
    """Put a frozen copy of a policy's adapter beside it, users and all: the reference of the KL penalty.

    GRPOTrainer makes one only where its own KL term is on (`beta` other than 0).

    Args:
        model ([`~peft.PeftModel`]):
            A policy with a ShareLoRA adapter named `default` and none named `ref`.
    """
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
