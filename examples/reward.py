# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-sharelora[quantization]"]
# ///
"""Train a personalised reward model from a preference log; ends with a table of the users.

On one GPU or a CPU:

    python examples/reward.py --config examples/configs/reward_toy.yaml

On four GPUs; the second form finds out by itself which arguments are accelerate's:

    accelerate launch --multi_gpu --num_processes 4 examples/reward.py --config examples/configs/reward_llama3_8b_8bit.yaml
    trl-sharelora reward --config examples/configs/reward_llama3_8b_8bit.yaml --multi_gpu --num_processes 4

Without a checkout, with uv:

    uv run examples/reward.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name preferences.jsonl --output_dir reward_model

A line of `preferences.jsonl` is {"user_id": "ann", "prompt": "...", "chosen": "...", "rejected": "..."}. The same from Python is in
the README.
"""

from trl_sharelora.scripts.launch import parse_arguments
from trl_sharelora.scripts.reward import main, make_parser


if __name__ == "__main__":
    main(*parse_arguments(make_parser()))
