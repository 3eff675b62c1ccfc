# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-sharelora[quantization]"]
# ///
"""Train a policy for every user against the lower end of his own reward, with GRPO; ends with a table of the users.

The reward model comes from `trl-sharelora reward --confidence ellipsoid`. On one GPU or a CPU:

    python examples/grpo.py --config examples/configs/grpo_toy.yaml

On four GPUs; the second form finds out by itself which arguments are accelerate's:

    accelerate launch --multi_gpu --num_processes 4 examples/grpo.py --config examples/configs/grpo_llama3_8b_8bit.yaml
    trl-sharelora grpo --config examples/configs/grpo_llama3_8b_8bit.yaml --multi_gpu --num_processes 4

The data are prompts of users, {"user_id": "ann", "prompt": "..."}; the preference log itself will do.
"""

from trl_sharelora.scripts.grpo import main, make_parser
from trl_sharelora.scripts.launch import parse_arguments


if __name__ == "__main__":
    main(*parse_arguments(make_parser()))
