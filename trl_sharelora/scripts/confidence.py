"""`trl-sharelora confidence` and `calibrate`: the confidence sets of a saved reward model, and how far down to go in them."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from ..confidence import fit_confidence
from ..data import load_preferences
from ..evaluation import calibrate as calibrate_reward


def loading_arguments(args: Namespace) -> dict[str, Any]:
    """How to load the reward model, for [`~trl_sharelora.scoring.load_reward_model`].

    Args:
        args (`argparse.Namespace`):
            `dtype`, `load_in_8bit`, `load_in_4bit`, `use_cpu`.
    """
    from trl import ModelConfig, get_quantization_config

    model_args = ModelConfig(dtype=args.dtype, load_in_8bit=args.load_in_8bit, load_in_4bit=args.load_in_4bit)
    return {
        "quantization_config": get_quantization_config(model_args),
        "model_init_kwargs": {"dtype": args.dtype},
        "device": "cpu" if args.use_cpu else None,
    }


def confidence(args: Namespace) -> None:
    """Fit confidence sets to the training comparisons and write them into the adapter's directory.

    Args:
        args (`argparse.Namespace`):
            The arguments of `trl-sharelora confidence`.
    """
    dataset = load_preferences(args.dataset_name, split=args.dataset_split)
    sets = fit_confidence(
        args.model_name_or_path,
        dataset,
        kind=args.kind,
        user_column=args.user_column,
        batch_size=args.batch_size,
        max_length=args.max_length,
        pooled_discount=args.pooled_discount,
        parameters=args.parameters,
        **loading_arguments(args),
    )
    what = f"an ensemble of {len(sets)} heads" if isinstance(sets, torch.Tensor) else repr(sets)
    print(f"{what}, from {len(dataset)} comparisons\nWritten into {Path(args.model_name_or_path, 'confidence')}")


def calibrate(args: Namespace) -> None:
    """Print the pessimism coefficient for a wanted coverage; with `args.output_dir`, write it to a file.

    Args:
        args (`argparse.Namespace`):
            The arguments of `trl-sharelora calibrate`.
    """
    dataset = load_preferences(args.dataset_name, split=args.dataset_split)
    result = calibrate_reward(
        args.model_name_or_path,
        dataset,
        args.coverage,
        args.pessimism,
        user_column=args.user_column,
        batch_size=args.batch_size,
        max_length=args.max_length,
        **loading_arguments(args),
    )
    print(result)
    if args.output_dir:
        path = Path(args.output_dir, "calibration.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "pessimism_coefficient": result.coefficient,
            "pessimism": args.pessimism,
            "wanted_coverage": args.coverage,
            "coverage": result.coverage,
            "comparisons": result.n,
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"Written to {path}")
