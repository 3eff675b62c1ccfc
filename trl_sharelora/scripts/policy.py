"""What the scripts that train a personalised policy (dpo, rloo, grpo, ppo) have in common: the reward, the base, the run."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl import ModelConfig

from .reward import (
    ShareLoraScriptArguments,
    get_sharelora_config,
    load_datasets,
    set_model_arguments,
    train_and_save,
)


if TYPE_CHECKING:
    from trl import DatasetMixtureConfig


@dataclass
class ShareLoraPolicyScriptArguments(ShareLoraScriptArguments):
    """
    The script arguments of a personalised policy: data, adapter and reward.

    `model_name_or_path` may also be a directory with a ShareLoRA policy, which is then trained further; a frozen copy of it is the
    reference.

    Args:
        reward_model_name_or_path (`list[str]`, *optional*):
            A personalised reward model, see [`~trl_sharelora.rewards.UserReward`]; for `pessimism="ensemble"` several.
        reward_funcs (`list[str]`, *optional*):
            More reward functions, each a dotted import path (`my_lib.rewards.brevity`); not for DPO.
        pessimism (`str`, *optional*, defaults to `"ellipsoid"`):
            Which confidence set the reward is the lower end of.
        pessimism_coefficient (`float`, *optional*, defaults to `1.0`):
            How many of its widths are taken off.
        pessimism_reference (`str`, *optional*):
            The column of reference completions, or `"sample"`: one completion per prompt by the model the policy starts from.
        pessimism_parameters, pessimism_form, pessimism_ball, pessimism_zeta (*optional*):
            `parameters`, `form`, `ball` and `zeta` of [`~trl_sharelora.rewards.UserReward`].
        reward_unseen (`str`, *optional*, defaults to `"raise"`):
            A user whom the reward model does not know.
        reward_batch_size (`int`, *optional*, defaults to `16`):
            Sequences per forward of the reward model.
        reward_max_length (`int`, *optional*):
            Longer texts lose tokens on the left before they are scored.
        reward_dtype (`str`, *optional*, defaults to `"float32"`):
            Of the reward model's base.
        reward_load_in_8bit (`bool`, *optional*, defaults to `False`), reward_load_in_4bit (`bool`, *optional*, defaults to `False`):
            Quantise the reward model's base.
    """

    reward_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={"help": "A personalised reward model (its output_dir or hub id); for pessimism 'ensemble' several."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "More reward functions, as dotted import paths (my_lib.rewards.brevity); not for DPO."},
    )
    pessimism: Literal["none", "ball", "ellipsoid", "ensemble"] = field(
        default="ellipsoid",
        metadata={
            "help": "The confidence set whose lower end is the reward: 'ellipsoid', wide where no comparisons are (the default: the one set "
            "that knows the data; what it gains is in docs/log.md); 'ball', the paper's; 'ensemble'; 'none', the plain reward."
        },
    )
    pessimism_coefficient: float = field(
        default=1.0,
        metadata={
            "help": "Widths taken off the reward. 1 is one standard deviation; `trl-sharelora calibrate` finds one."
        },
    )
    pessimism_reference: str | None = field(
        default=None,
        metadata={
            "help": "Whose completions' reward is taken off (the paper's mu_ref): a column of the data, or 'sample', drawn from the policy's "
            "start."
        },
    )
    pessimism_parameters: Literal["last_layer", "own_factor", "base"] | None = field(
        default=None, metadata={"help": "Features of the ellipsoid; by default those it was fitted with."}
    )
    pessimism_form: Literal["std", "worst", "variance"] = field(
        default="std",
        metadata={"help": "Of an ensemble: mean less standard deviations, the worst member, or variances."},
    )
    pessimism_ball: Literal["sample", "batch"] = field(
        default="sample",
        metadata={
            "help": "Of the ball: each row's own norm (an upper bound), or the paper's norm over a user's rows."
        },
    )
    pessimism_zeta: float | None = field(
        default=None,
        metadata={"help": "Of the ball, as printed in (3.4): the radius is its square root. 1 by default."},
    )
    reward_unseen: Literal["raise", "common"] = field(
        default="raise",
        metadata={"help": "A user whom the reward model does not know: an error, or the common model, counted."},
    )
    reward_batch_size: int = field(default=16, metadata={"help": "Sequences per forward of the reward model."})
    reward_max_length: int | None = field(
        default=None, metadata={"help": "Longer texts lose tokens on the left before they are scored."}
    )
    reward_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the reward model's base (float32, as TRL trains it)."}
    )
    reward_load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the reward model's base to 8 bits."})
    reward_load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the reward model's base to 4 bits."})


def make_reward(script_args: ShareLoraPolicyScriptArguments, training_args: Any, start: str | None = None) -> Any:
    """The personalised reward that the arguments describe; None if they name none.

    Args:
        script_args ([`ShareLoraPolicyScriptArguments`]):
            The `reward_*` and `pessimism*` fields.
        training_args ([`~transformers.TrainingArguments`]):
            Device and user column.
        start (`str`, *optional*):
            What the policy starts from, for `pessimism_reference="sample"`.

    Raises:
        PessimismError, ConfigError: see [`~trl_sharelora.rewards.UserReward`].
    """
    from transformers import BitsAndBytesConfig

    from ..rewards import SampledReferences, UserReward

    paths = script_args.reward_model_name_or_path
    if not paths:
        return None
    quantization_config = None
    if script_args.reward_load_in_8bit or script_args.reward_load_in_4bit:
        quantization_config = BitsAndBytesConfig(
            load_in_8bit=script_args.reward_load_in_8bit, load_in_4bit=script_args.reward_load_in_4bit
        )
    reference: Any = script_args.pessimism_reference
    if reference == "sample":
        reference = SampledReferences(
            start, max_new_tokens=getattr(training_args, "max_completion_length", None) or 256
        )
    return UserReward(
        paths[0] if len(paths) == 1 else paths,
        pessimism=None if script_args.pessimism == "none" else script_args.pessimism,
        pessimism_coefficient=script_args.pessimism_coefficient,
        reference=reference,
        parameters=script_args.pessimism_parameters,
        form=script_args.pessimism_form,
        ball=script_args.pessimism_ball,
        zeta=script_args.pessimism_zeta,
        model_init_kwargs={"dtype": script_args.reward_dtype},
        unseen=script_args.reward_unseen,
        batch_size=script_args.reward_batch_size,
        max_length=script_args.reward_max_length,
        user_column=training_args.user_column,
        quantization_config=quantization_config,
        device=training_args.device,
    )


def import_function(path: str) -> Callable:
    """A function by its dotted import path; the current folder is looked through too.

    Args:
        path (`str`):
            `"module.function"`.

    Raises:
        ConfigError: there is no such module or function.
    """
    import importlib
    import os
    import sys

    from ..errors import ConfigError

    module, _, name = path.rpartition(".")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--reward_funcs {path}: there is no such function ({error}). Give module.function, importable from {os.getcwd()}."
        ) from error
    finally:
        sys.path.pop(0)


def load_policy(training_args: Any, model_args: ModelConfig) -> tuple[Any, Any]:
    """The base's name, or the saved ShareLoRA policy to train further; and its tokenizer, None for TRL's choice.

    Args:
        training_args ([`~transformers.TrainingArguments`]):
            With `model_init_kwargs`; emptied for a saved policy, which is loaded here.
        model_args ([`~trl.ModelConfig`]):
            `model_name_or_path` and quantisation.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    from trl import get_quantization_config

    path = model_args.model_name_or_path
    if not Path(path, "adapter_config.json").is_file():
        return path, None
    kwargs = {name: value for name, value in training_args.model_init_kwargs.items() if name != "revision"}
    training_args.model_init_kwargs = None
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        kwargs |= {"quantization_config": quantization_config, "device_map": {"": training_args.device}}
    model = AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True, **kwargs)
    return model, AutoTokenizer.from_pretrained(path)


def train_policy(
    trainer_class: type,
    script_args: ShareLoraPolicyScriptArguments,
    training_args: Any,
    model_args: ModelConfig,
    dataset_args: "DatasetMixtureConfig",
) -> None:
    """Train a policy, save it, evaluate it where asked.

    Args:
        trainer_class (`type`):
            One of this package's policy trainers.
        script_args ([`ShareLoraPolicyScriptArguments`]):
            Data, adapter, reward.
        training_args ([`~transformers.TrainingArguments`]):
            The trainer's config.
        model_args ([`~trl.ModelConfig`]):
            Base model, quantisation, LoRA.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            A mixture of datasets.

    Raises:
        ConfigError: no reward is named for a trainer that needs one.
    """
    from trl import get_quantization_config

    from ..errors import ConfigError
    from ..trainers.dpo import ShareLoraDPOTrainer

    set_model_arguments(training_args, model_args)
    train_dataset, eval_dataset = load_datasets(script_args, training_args, dataset_args)
    reward = make_reward(script_args, training_args, model_args.model_name_or_path)
    if trainer_class is ShareLoraDPOTrainer:
        if script_args.reward_funcs:
            raise ConfigError("--reward_funcs came; DPO has no rewards. For margins give --reward_model_name_or_path.")
        rewards: dict[str, Any] = {"reward": reward}
    else:
        functions = [import_function(path) for path in script_args.reward_funcs or ()]
        functions = [*([reward] if reward is not None else []), *functions]
        if not functions:
            raise ConfigError(
                "No reward: give --reward_model_name_or_path DIR, a personalised reward model, or --reward_funcs module.function."
            )
        rewards = {"reward_funcs": functions}
    model, tokenizer = load_policy(training_args, model_args)
    fresh = isinstance(model, str)
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args) if fresh else None,
        peft_config=get_sharelora_config(model_args, script_args, "CAUSAL_LM") if fresh else None,
        **rewards,
    )
    train_and_save(trainer, training_args, script_args.dataset_name)
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            show_users(trainer, metrics)
    trainer.end()


def show_users(trainer: Any, metrics: dict[str, float]) -> None:
    """Print how well the final policy serves its users.

    Args:
        trainer ([`~transformers.Trainer`]):
            After training.
        metrics (`dict[str, float]`):
            What `evaluate` returned.
    """
    import pandas as pd

    path = Path(trainer.args.output_dir, "users", f"eval-step-{trainer.state.global_step}.parquet")
    for name, value in sorted(metrics.items()):
        if name.startswith("eval_users/"):
            print(f"{name.removeprefix('eval_users/'):24s} {value:.4g}")
    if path.is_file():
        table = pd.read_parquet(path)
        # repr: an id may hold a line break or a terminal's control characters
        table["user_id"] = table["user_id"].map(repr)
        print(table.head(12).to_string(index=False, float_format="{:.3f}".format))
        print(f"The whole table ({len(table)} users) is in {path}")


def make_policy_parser(
    name: str, config: type, subparsers: argparse._SubParsersAction | None = None, prog: str | None = None
) -> Any:
    """The parser of a policy script, as a subparser or on its own.

    Args:
        name (`str`):
            The command.
        config (`type`):
            The trainer's config.
        subparsers, prog:
            As in TRL's scripts.
    """
    from trl import DatasetMixtureConfig, TrlParser

    dataclass_types = (ShareLoraPolicyScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser(
            name, help=f"Train a personalised policy with {name.upper()}", dataclass_types=dataclass_types
        )
    # An abbreviation would take arguments meant for `accelerate launch` (`--tpu`)
    return TrlParser(dataclass_types, prog=prog, allow_abbrev=False)
