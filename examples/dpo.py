# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-sharelora[quantization]"]
# ///
"""Train a policy for every user from a preference log, with DPO and without a reward model; ends with figures of the users.

On one GPU or a CPU:

    python examples/dpo.py --config examples/configs/dpo_toy.yaml

On four GPUs; the second form finds out by itself which arguments are accelerate's:

    accelerate launch --multi_gpu --num_processes 4 examples/dpo.py --config examples/configs/dpo_llama3_8b_8bit.yaml
    trl-sharelora dpo --config examples/configs/dpo_llama3_8b_8bit.yaml --multi_gpu --num_processes 4

Pessimism: `--rpo_alpha 0.005` adds RPO's SFT regulariser; `--reward_model_name_or_path reward_model --pessimism ellipsoid` keeps each
pair apart by the lower end of what the user's reward model says of their difference.
"""

from trl_sharelora.scripts.dpo import main, make_parser
from trl_sharelora.scripts.launch import parse_arguments


if __name__ == "__main__":
    main(*parse_arguments(make_parser()))
