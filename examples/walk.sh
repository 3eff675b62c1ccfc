#!/usr/bin/env bash
# From a preference log to a policy for every user, in seven commands; a few minutes on a CPU, no network, no GPU.
#
#   bash examples/walk.sh                      on made-up users, with a small base model made on the spot
#   bash examples/walk.sh LOG BASE             on your own: rows {"user_id", "prompt", "chosen", "rejected", "split"} with the splits
#                                              train, validation and test, and a causal model, a path or an id of the hub
#
# The two configs and the tools' flags are variables: REWARD_CONFIG, RLOO_CONFIG (copy and change those of examples/configs/walk_*.yaml, their
# comments say what) and TOOL_FLAGS (empty takes an accelerator where there is one; default --use_cpu).
# Results go to $OUT (default walk_output); $STEPS (default 60) are the policy's optimizer steps.
set -euo pipefail
OUT=$(realpath -m "${OUT:-walk_output}")
if [ $# -gt 0 ]; then LOG=$(realpath "$1"); [ -e "$2" ] && BASE=$(realpath "$2") || BASE=$2; fi
cd "$(dirname "$0")/.."
REWARD_CONFIG=${REWARD_CONFIG:-examples/configs/walk_reward.yaml} RLOO_CONFIG=${RLOO_CONFIG:-examples/configs/walk_rloo.yaml}
TOOL_FLAGS=${TOOL_FLAGS---use_cpu}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false  # small models are fastest on one thread
export TRANSFORMERS_VERBOSITY=error HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
run() { echo; echo "== $1"; shift; echo "   $*"; "$@"; }
sharelora() { "$PYTHON" -W ignore -m trl_sharelora.cli "$@"; }

if [ $# -eq 0 ]; then
    run "1. a preference log of 12 users, and a base model" "$PYTHON" -W ignore examples/make_log.py "$OUT"
    LOG=$OUT/log.jsonl BASE=$OUT/base_model
fi

run "2. a reward model: one factor shared by all users, one of each user's own; and what it does not know" \
    sharelora reward --config "$REWARD_CONFIG" \
    --model_name_or_path "$BASE" --dataset_name "$LOG" --output_dir "$OUT/reward"

run "3. how far down to go: the coefficient that covers nine of ten held-out comparisons" \
    sharelora calibrate --model_name_or_path "$OUT/reward" --dataset_name "$LOG" --dataset_split validation \
    --coverage 0.9 --output_dir "$OUT/reward" $TOOL_FLAGS
COEFFICIENT=$("$PYTHON" -c "import json, sys; print(json.load(open(sys.argv[1]))['pessimism_coefficient'])" "$OUT/reward/calibration.json")

run "4. how well the reward model serves each user, on the test split; are its doubts where its errors are?" \
    sharelora eval --model_name_or_path "$OUT/reward" --dataset_name "$LOG" --dataset_split test --confidence ellipsoid $TOOL_FLAGS

run "5. a policy for every user, against the lower end of his reward" \
    sharelora rloo --config "$RLOO_CONFIG" --model_name_or_path "$BASE" --dataset_name "$LOG" \
    --reward_model_name_or_path "$OUT/reward" --pessimism_coefficient "$COEFFICIENT" --output_dir "$OUT/policy" \
    --max_steps "${STEPS:-60}"

USER_ID=$("$PYTHON" -c "import json, sys; print(json.loads(open(sys.argv[1]).readline())['user_id'])" "$LOG")
run "6. one user as an ordinary LoRA" \
    sharelora export --adapter "$OUT/policy" --user "$USER_ID" --output_dir "$OUT/one_user"

run "7. that user's policy in plain PEFT, without this package" "$PYTHON" -W ignore - "$BASE" "$OUT/one_user" "$LOG" <<'PY'
import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, log = sys.argv[1:]
prompt = json.loads(open(log).readline())["prompt"]
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
print("prompt: ", prompt.strip() if isinstance(prompt, str) else prompt)


def reply():
    torch.manual_seed(0)
    output = model.generate(**batch, max_new_tokens=48, do_sample=True)
    return tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


with model.disable_adapter():
    print("base:   ", reply())
print("his own:", reply())
PY
echo
echo "Everything is in $OUT."
