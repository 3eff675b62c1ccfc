"""`trl-sharelora eval`: accuracy of a saved reward model for each user."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config

from ..data import load_preferences
from ..errors import ConfigError
from ..evaluation import evaluate_users
from ..rewards import UserReward
from .confidence import loading_arguments


def load_reward_model(model_args: ModelConfig, device: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """A saved adapter on its base, and its tokenizer.

    Args:
        model_args ([`~trl.ModelConfig`]):
            `model_name_or_path`, the adapter's directory or hub id; `dtype` and quantisation of the base.
        device (`str`):
            Where to put it.

    Raises:
        ConfigError: the directory holds no adapter, or there is none by this name.
    """
    path = Path(model_args.model_name_or_path)
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"There is no adapter_config.json in {str(path)!r}, so it is no adapter; give the output_dir of a training (or one of its "
            "checkpoints, or an exported user)."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No adapter with its tokenizer can be read from {model_args.model_name_or_path!r}, neither as a directory (looked for in {Path.cwd()}) nor from "
            f"the hub: {str(error).splitlines()[0]}"
        ) from error
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path,
        num_labels=1,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(model_args),
        device_map={"": device},
    )
    # as the trainer did: a decoder's reward is read at the last token that is not padding
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def evaluate(args: Namespace) -> None:
    """Print accuracy per user and its summaries; with `args.output_dir`, write them to files.

    Args:
        args (`argparse.Namespace`):
            The arguments of `trl-sharelora eval`.
    """
    # before the base model is loaded, which may take minutes
    dataset = load_preferences(args.dataset_name, split=args.dataset_split)
    device = (
        "cpu" if args.use_cpu or not torch.accelerator.is_available() else str(torch.accelerator.current_accelerator())
    )
    model_args = ModelConfig(
        model_name_or_path=args.model_name_or_path,
        dtype=args.dtype,
        load_in_8bit=args.load_in_8bit,
        load_in_4bit=args.load_in_4bit,
    )
    reward = None
    if args.confidence == "none":
        model, tokenizer = load_reward_model(model_args, device)
    else:
        loading = {"unseen": args.unseen, "batch_size": args.batch_size, **loading_arguments(args)}
        reward = UserReward(args.model_name_or_path, args.confidence, **loading)
        model, tokenizer = reward.scorer.model, reward.scorer.processing_class
    result = evaluate_users(
        model,
        dataset,
        processing_class=tokenizer,
        user_column=args.user_column,
        unseen=args.unseen,
        batch_size=args.batch_size,
        max_length=args.max_length,
        confidence=reward,
    )
    print(result)
    if args.output_dir:
        table = result.to_parquet(Path(args.output_dir, "users.parquet"))
        summary = Path(args.output_dir, "summary.json")
        summary.write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"The whole table is in {table}, the summary in {summary}")
