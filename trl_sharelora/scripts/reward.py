"""Train a personalised reward model. Mirrors trl/scripts/reward.py (Apache-2.0, The HuggingFace Team); the differences are the
classes it fills in, local files of preference rows, and at the end the table per user and whether the model uses its users.

```bash
trl-sharelora reward --config reward.yaml
accelerate launch --multi_gpu --num_processes 4 -m trl_sharelora.scripts.reward --config reward.yaml
```
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl import ModelConfig, ScriptArguments


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import DatasetMixtureConfig

    from ..sharelora import ShareLoraConfig
    from ..trainers.reward import ShareLoraRewardTrainer
    from ..trainers.reward_config import ShareLoraRewardConfig


# Two, because each costs as much as scoring the comparisons; the interval of the drop is that of users, whatever the draws.
USAGE_DRAWS = 2


@dataclass
class ShareLoraScriptArguments(ScriptArguments):
    """
    TRL's script arguments and those of the ShareLoRA adapter that TRL's [`~trl.ModelConfig`] does not have.

    `dataset_name` may also be a local file of preference rows, see [`~trl_sharelora.data.load_preferences`].

    Args:
        share (`str`, *optional*, defaults to `"B"`):
            What all users share, see [`ShareLoraConfig`].
        train_common (`bool`, *optional*, defaults to `False`):
            Whether the users' common start keeps training, see [`ShareLoraConfig`].
    """

    share: Literal["B", "A", "AB", "diagonal", "none"] = field(
        default="B",
        metadata={
            "help": "What all users share: 'B', the up-projection (the paper's method); 'A', the down-projection (its "
            "ablation); 'AB', both, each user has an r x r core; 'diagonal', both, each user has r numbers; 'none', a LoRA each."
        },
    )
    train_common: bool = field(
        default=False, metadata={"help": "Keep training the common start A_0 beside the users' own moves."}
    )
    bank: Literal["auto", "resident", "ram", "mmap"] = field(
        default="auto",
        metadata={
            "help": "Where the users' own parameters live: 'resident', Parameters; 'ram' or 'mmap', one record per user in memory "
            "or in files, so that a step costs the same for a million users; 'auto', the first of them that fits."
        },
    )
    bank_slots: int | None = field(
        default=None,
        metadata={
            "help": "Users at a time beside the base, for 'ram' and 'mmap'; by default as many as a step needs."
        },
    )
    bank_dtype: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "Of weights and first moments in the records; float32 loses nothing, bfloat16 saves a third."
        },
    )
    bank_second_moment: Literal["full", "row"] = field(
        default="full",
        metadata={"help": "Adam's second moment in the records: per weight ('full') or per row of rank ('row')."},
    )
    bank_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the open file of 'mmap' while training; by default inside output_dir."},
    )


@dataclass
class ShareLoraRewardScriptArguments(ShareLoraScriptArguments):
    """
    The script arguments of a reward model.

    Args:
        method (`str`, *optional*):
            One of the paper's variants and baselines by name, see [`~trl_sharelora.trainers.methods.METHODS`]; it chooses the form of
            sharing and the stages.
        init_users (`str`, *optional*, defaults to `"common"`):
            Where users start, see [`ShareLoraConfig`].
        personal_head (`bool`, *optional*, defaults to `False`):
            A score head for each user, see [`ShareLoraConfig`].
        confidence (`str`, *optional*, defaults to `"none"`):
            Confidence sets to fit after the training, for pessimistic rewards, see [`~trl_sharelora.confidence.fit_confidence`].
        confidence_parameters (`str`, *optional*, defaults to `"last_layer"`):
            Features of the ellipsoids.
        usage_comparisons (`int`, *optional*, defaults to 512):
            Held-out comparisons on which is measured whether the model uses its users, see [`~trl_sharelora.usage.user_usage`]; 0 leaves
            it out. 512 are 32 users with 16 each; with two swaps that is as much as some 4,000 comparisons of an evaluation.
    """

    method: str | None = field(
        default=None,
        metadata={
            "help": "A variant or baseline of the paper by name: psharelora-si, psharelora-g, psharelora-wu, lora-global, lora-local, "
            "share-rep, share-a, kernel, svd. By default the adapter that the other arguments describe."
        },
    )
    init_users: Literal["common", "independent"] = field(
        default="common",
        metadata={
            "help": "Where users start: all at A_0 ('common', the authors' code), or each A_u a draw of its own ('independent', the text)."
        },
    )
    personal_head: bool = field(
        default=False, metadata={"help": "A score head for each user. Off, as in the authors' code."}
    )
    confidence_parameters: Literal["last_layer", "own_factor", "base"] = field(
        default="last_layer",
        metadata={
            "help": "Features of the ellipsoids: of the reward's last layer; of the user's own factor; or of the base's last layer, a forward "
            "more, which knows best what was never compared."
        },
    )
    confidence: Literal["none", "ellipsoid", "heads"] = field(
        default="none",
        metadata={
            "help": "Fit confidence sets to the training data afterwards, for pessimistic rewards: 'ellipsoid', or 'heads' (an ensemble of "
            "heads). One more pass, without gradients; off by default, as only a policy needs them."
        },
    )
    usage_comparisons: int = field(
        default=512,
        metadata={
            "help": "After the training, measure on so many held-out comparisons whether the model uses its users (swapped, spread, flipped), "
            "for the report and the model card; 0 leaves it out. Needs an evaluation set."
        },
    )


def get_sharelora_config(
    model_args: ModelConfig, script_args: ShareLoraScriptArguments, task_type: str = "SEQ_CLS"
) -> "ShareLoraConfig":
    """The adapter that the arguments describe.

    Args:
        model_args ([`~trl.ModelConfig`]):
            Its `lora_*` fields and `use_rslora`. `use_peft` and `lora_task_type` need not be set.
        script_args ([`ShareLoraScriptArguments`]):
            `share`, `train_common` and the `bank` fields.
        task_type (`str`, *optional*, defaults to `"SEQ_CLS"`):
            Of a reward model; a policy is `"CAUSAL_LM"`.

    Raises:
        UnsupportedError: for what a LoRA can be and this adapter cannot: `use_dora`, `lora_target_parameters`.
    """
    from ..errors import UnsupportedError
    from ..sharelora import ShareLoraConfig

    for name in ("use_dora", "lora_target_parameters"):
        if getattr(model_args, name):
            raise UnsupportedError(
                f"{name}={getattr(model_args, name)!r} is an option of plain LoRA that ShareLoRA does not have; leave it out."
            )
    return ShareLoraConfig(
        task_type=task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        share=script_args.share,
        train_common=script_args.train_common,
        bank=script_args.bank,
        bank_slots=script_args.bank_slots,
        bank_dtype=script_args.bank_dtype,
        bank_second_moment=script_args.bank_second_moment,
        bank_dir=script_args.bank_dir,
        **{name: getattr(script_args, name) for name in ("init_users", "personal_head") if hasattr(script_args, name)},
    )


def load_splits(
    script_args: ShareLoraScriptArguments, dataset_args: "DatasetMixtureConfig", splits: list[str]
) -> "list[Dataset | IterableDataset]":
    """The splits of what the arguments name: a mixture, a local file, or a dataset of the hub.

    Args:
        script_args ([`ShareLoraScriptArguments`]):
            `dataset_name`, `dataset_config`, `dataset_streaming`.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            `datasets`; goes first, as in TRL.
        splits (`list[str]`):
            Names of the splits. Asked for together, because TRL splits a mixture at random at each call.

    Raises:
        DataError: no dataset is named, or it has no such split.
    """
    from datasets import load_dataset
    from trl import get_dataset

    from ..data import load_preferences
    from ..errors import DataError

    if dataset_args.datasets:
        mixture = get_dataset(dataset_args)
        missing = [split for split in splits if split not in mixture]
        if missing:
            raise DataError(
                f"The mixture has the splits {sorted(mixture)}, not {missing[0]!r}; set test_split_size to get a test split."
            )
        return [mixture[split] for split in splits]
    if not script_args.dataset_name:
        raise DataError("No data: give --dataset_name FILE or an id of the hub, or `datasets:` in the YAML file.")
    if script_args.dataset_streaming or script_args.dataset_config:
        return [
            load_dataset(
                script_args.dataset_name,
                name=script_args.dataset_config,
                split=split,
                streaming=script_args.dataset_streaming,
            )
            for split in splits
        ]
    return [load_preferences(script_args.dataset_name, split=split) for split in splits]


def set_model_arguments(training_args: Any, model_args: ModelConfig) -> None:
    """Put what [`~trl.ModelConfig`] says of loading the base into `training_args.model_init_kwargs`.

    Args:
        training_args ([`~transformers.TrainingArguments`]):
            Of a TRL trainer.
        model_args ([`~trl.ModelConfig`]):
            Base model.

    Raises:
        ConfigError: no base is named.
    """
    from ..errors import ConfigError

    if not model_args.model_name_or_path:
        raise ConfigError("No base model: give --model_name_or_path, a path or an id of the hub.")
    model_init_kwargs: dict[str, Any] = dict(
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
    )
    if training_args.model_init_kwargs is not None:
        model_init_kwargs.update(training_args.model_init_kwargs)  # a dict by now; the command line gives it as JSON
    training_args.model_init_kwargs = model_init_kwargs


def load_datasets(
    script_args: ShareLoraScriptArguments, training_args: Any, dataset_args: "DatasetMixtureConfig"
) -> "tuple[Any, Any]":
    """The training split, and that for evaluation if there will be one.

    Args:
        script_args ([`ShareLoraScriptArguments`]):
            Names of the data and of its splits.
        training_args ([`~transformers.TrainingArguments`]):
            `eval_strategy` and `seed`.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            A mixture of datasets.
    """
    from accelerate.logging import get_logger
    from transformers import set_seed

    if dataset_args.datasets and script_args.dataset_name:
        get_logger(__name__).warning(
            "Both `datasets` and `dataset_name` are provided. The `datasets` argument will be used to load the dataset and "
            "`dataset_name` will be ignored."
        )
    evaluate = training_args.eval_strategy != "no"
    splits = [script_args.dataset_train_split] + [script_args.dataset_test_split] * evaluate
    # TRL splits a mixture with numpy's generator: without a seed no two runs have the same split, nor have two processes
    set_seed(training_args.seed)
    train_dataset, eval_dataset = [*load_splits(script_args, dataset_args, splits), None][:2]
    return train_dataset, eval_dataset


def train_and_save(
    trainer: Any, training_args: Any, dataset_name: str | None, report: Callable[[], None] | None = None
) -> None:
    """Train, save, and push where asked, as TRL's scripts do.

    Args:
        trainer ([`~transformers.Trainer`]):
            Ready to train.
        training_args ([`~transformers.TrainingArguments`]):
            Its arguments.
        dataset_name (`str`, *optional*):
            For the model card.
        report (`Callable`, *optional*):
            Called when the model is saved and before it is pushed: what it finds may go into the card.
    """
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("✅ Training completed.")
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    if report is not None:
        report()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")


def main(
    script_args: ShareLoraRewardScriptArguments,
    training_args: "ShareLoraRewardConfig",
    model_args: ModelConfig,
    dataset_args: "DatasetMixtureConfig",
) -> None:
    """Train, save, fit confidence sets where asked, show the users.

    Args:
        script_args ([`ShareLoraRewardScriptArguments`]):
            Data, adapter, confidence sets.
        training_args ([`ShareLoraRewardConfig`]):
            Training.
        model_args ([`~trl.ModelConfig`]):
            Base model, quantisation, LoRA.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            A mixture of datasets.
    """
    from trl import get_quantization_config

    from ..errors import ConfigError
    from ..trainers.reward import ShareLoraRewardTrainer

    if script_args.usage_comparisons < 0:
        raise ConfigError(
            f"usage_comparisons={script_args.usage_comparisons} came; a number of held-out comparisons is needed, or 0 to leave it out."
        )
    set_model_arguments(training_args, model_args)
    train_dataset, eval_dataset = load_datasets(script_args, training_args, dataset_args)
    if script_args.method is not None:
        train_by_name(
            script_args.method, script_args, training_args, model_args, dataset_args, train_dataset, eval_dataset
        )
        return

    # Initialize the reward trainer
    trainer = ShareLoraRewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_sharelora_config(model_args, script_args),
    )

    def report() -> None:
        if eval_dataset is not None:
            show_users(trainer)
        show_usage(trainer, eval_dataset, script_args, dataset_args)

    train_and_save(trainer, training_args, script_args.dataset_name, report)

    # Finish the trackers and destroy the process group
    trainer.end()
    # after it: the other processes need not wait for the pass of the first
    if script_args.confidence != "none":
        fit_confidence_of(trainer, script_args, train_dataset, model_args)


def train_by_name(
    name: str,
    script_args: ShareLoraRewardScriptArguments,
    training_args: "ShareLoraRewardConfig",
    model_args: ModelConfig,
    dataset_args: "DatasetMixtureConfig",
    train_dataset: Any,
    eval_dataset: Any,
) -> None:
    """Train one of the paper's variants or baselines, save it, show the users.

    Args:
        name (`str`):
            Of the method.
        script_args ([`ShareLoraRewardScriptArguments`]):
            Adapter, confidence sets.
        training_args ([`ShareLoraRewardConfig`]):
            Training, all stages together.
        model_args ([`~trl.ModelConfig`]):
            Base model, quantisation, LoRA.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            A mixture of datasets.
        train_dataset ([`~datasets.Dataset`]), eval_dataset ([`~datasets.Dataset`], *optional*):
            Preference rows.

    Raises:
        MethodError: an unknown method, or one that contradicts the other arguments.
    """
    from transformers import set_seed
    from trl import get_quantization_config

    from ..errors import MethodError
    from ..evaluation import evaluate_users
    from ..trainers.methods import method_named, train_method

    method = method_named(name)
    if script_args.share not in ("B", method.share) or script_args.train_common or script_args.personal_head:
        raise MethodError(
            f"share={script_args.share!r}, train_common={script_args.train_common}, personal_head={script_args.personal_head} came with "
            f"method={name!r}, which says all three itself. Leave them out, or leave out method."
        )
    if script_args.confidence != "none" and method.share is None:
        raise MethodError(f"--confidence came with method={name!r}, which has no users. Leave it out.")
    set_seed(training_args.seed)
    trainer = train_method(
        name,
        model_args.model_name_or_path,
        training_args,
        train_dataset,
        get_sharelora_config(model_args, script_args),
        resume_from_checkpoint=training_args.resume_from_checkpoint,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
    )
    trainer.accelerator.print(f"✅ Training of {name} completed.")
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")
    if method.share is not None:
        if eval_dataset is not None:
            show_users(trainer)
        show_usage(trainer, eval_dataset, script_args, dataset_args)
    elif eval_dataset is not None and trainer.is_world_process_zero():
        print(
            evaluate_users(
                trainer.accelerator.unwrap_model(trainer.model),
                eval_dataset,
                processing_class=trainer.processing_class,
                user_column=training_args.user_column,
                batch_size=training_args.per_device_eval_batch_size,
                max_length=training_args.max_length,
            )
        )
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
    if script_args.confidence != "none":
        fit_confidence_of(trainer, script_args, train_dataset, model_args)


def fit_confidence_of(
    trainer: "ShareLoraRewardTrainer",
    script_args: ShareLoraRewardScriptArguments,
    train_dataset: Any,
    model_args: ModelConfig,
) -> None:
    """Fit the confidence sets of a trained model to its training data, beside the saved adapter; on the main process.

    Args:
        trainer ([`ShareLoraRewardTrainer`]):
            After `save_model`.
        script_args ([`ShareLoraRewardScriptArguments`]):
            `confidence` and `confidence_parameters`.
        train_dataset ([`~datasets.Dataset`]):
            The comparisons it was trained on.
        model_args ([`~trl.ModelConfig`]):
            How its base was loaded.
    """
    from datasets import Dataset
    from trl import get_quantization_config

    from ..confidence import fit_confidence
    from ..errors import UnsupportedError

    if not isinstance(train_dataset, Dataset):
        raise UnsupportedError(
            "--confidence came with a stream. Fit the sets afterwards, to a file: trl-sharelora confidence --help."
        )
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    # sharded by FSDP or by owner, this process has only a part of the model or some users' rows
    partial = trainer.is_fsdp_enabled or (args.user_sharding == "owner" and args.world_size > 1)
    loading: dict[str, Any] = {}
    if partial:
        loading = {
            "quantization_config": get_quantization_config(model_args),
            "model_init_kwargs": {"dtype": model_args.dtype},
            "device": args.device,
        }
    fit_confidence(
        args.output_dir if partial else trainer.accelerator.unwrap_model(trainer.model),
        train_dataset,
        trainer.processing_class,
        kind=script_args.confidence,
        parameters=script_args.confidence_parameters if script_args.confidence == "ellipsoid" else "last_layer",
        user_column=args.user_column,
        batch_size=args.per_device_eval_batch_size,
        max_length=args.max_length,
        output_dir=args.output_dir,
        **loading,
    )
    print(
        f"Confidence sets ({script_args.confidence}) of {len(trainer.users)} users saved to {args.output_dir}/confidence."
    )


def show_users(trainer: "ShareLoraRewardTrainer") -> None:
    """Evaluate the final model and print how well it serves its users.

    Args:
        trainer ([`ShareLoraRewardTrainer`]):
            After training, with an evaluation set.
    """
    import pandas as pd

    from ..evaluation import PerUserResult

    metrics = trainer.evaluate()
    # on one process only; and if all rows are of unseen users there is no table
    if not trainer.is_world_process_zero() or "eval_users/accuracy_mean" not in metrics:
        return
    path = Path(trainer.args.output_dir, "users", f"eval-step-{trainer.state.global_step}.parquet")
    table = pd.read_parquet(path)
    # without the rows of unseen users, who have no line in the table
    result = PerUserResult.from_table(
        table, ece=metrics["eval_users/ece"], unseen=int(metrics["eval_users/unseen_rows"])
    )
    print(f"{result}\nThe whole table is in {path}")


def _test_split(script_args: ShareLoraScriptArguments, dataset_args: "DatasetMixtureConfig") -> Any:
    """The test split that the training did without; None if there is none."""
    from ..errors import ShareLoraError

    if dataset_args.datasets:  # a mixture is split at random, so another call's test rows may be training rows
        return None
    try:
        return load_splits(script_args, dataset_args, [script_args.dataset_test_split])[0]
    except (
        ShareLoraError,
        ValueError,
        OSError,
    ):  # datasets: an unknown split is a ValueError, a hub out of reach an OSError
        return None


def show_usage(
    trainer: "ShareLoraRewardTrainer",
    dataset: Any,
    script_args: ShareLoraRewardScriptArguments,
    dataset_args: "DatasetMixtureConfig",
) -> None:
    """Measure on the main process whether the final model uses its users, print it and put it into the model card.

    Args:
        trainer ([`ShareLoraRewardTrainer`]):
            After `save_model`.
        dataset ([`~datasets.Dataset`], *optional*):
            The evaluation split as it was loaded; where the training had none, the test split is looked for.
        script_args ([`ShareLoraRewardScriptArguments`]):
            `usage_comparisons`, at most so many of it, 0 leaves it out; names of the data and of its splits.
        dataset_args ([`~trl.DatasetMixtureConfig`]):
            A mixture of datasets.
    """
    import torch
    from datasets import Dataset

    from ..errors import ShareLoraError
    from ..usage import user_usage

    args, comparisons = trainer.args, script_args.usage_comparisons
    if not comparisons or not trainer.is_world_process_zero():
        return
    by_hand = f"trl-sharelora usage --model_name_or_path {args.output_dir} --dataset_name FILE"
    # this process has only a part of the model or some users' rows, and a second copy may not fit beside it
    if trainer.is_fsdp_enabled or (args.user_sharding == "owner" and args.world_size > 1):
        print(f"Whether it uses its users was not measured: the model is spread over processes. Later: {by_hand}")
        return
    if dataset is None:
        dataset = _test_split(script_args, dataset_args)
        if dataset is None:
            print(
                f"Whether it uses its users was not measured: no held-out split {script_args.dataset_test_split!r} was found. Later: {by_hand}"
            )
            return
    if not isinstance(dataset, Dataset):
        print(
            f"Whether it uses its users was not measured: the evaluation set is a stream. Later, on a file: {by_hand}"
        )
        return
    try:
        trainer.usage = user_usage(
            trainer.accelerator.unwrap_model(trainer.model),
            dataset,
            trainer.processing_class,
            user_column=args.user_column,
            batch_size=args.per_device_eval_batch_size,
            max_length=args.max_length,
            max_comparisons=comparisons,
            draws=USAGE_DRAWS,
            seed=args.seed,
        )
    except (ShareLoraError, torch.cuda.OutOfMemoryError) as error:
        # the model is trained and saved; one that knows a single user, say, has nobody to swap him with
        print(f"Whether it uses its users was not measured: {error}")
        return
    print(trainer.usage)
    trainer.create_model_card(model_name=(trainer.hub_model_id or Path(args.output_dir).name).split("/")[-1])


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    """The parser of this script, as a subparser or on its own."""
    from trl import DatasetMixtureConfig, TrlParser

    from ..trainers.reward_config import ShareLoraRewardConfig

    dataclass_types = (ShareLoraRewardScriptArguments, ShareLoraRewardConfig, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser(
            "reward", help="Train a personalised reward model", dataclass_types=dataclass_types
        )
    # An abbreviation would take arguments meant for `accelerate launch` (`--tpu`)
    return TrlParser(dataclass_types, prog=prog, allow_abbrev=False)


if __name__ == "__main__":
    from .launch import parse_arguments

    main(*parse_arguments(make_parser()))
