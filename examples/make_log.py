"""Make a small preference log and a small base model, for trying the other commands without a network: examples/walk.sh does.

    python examples/make_log.py OUTPUT_DIR

writes OUTPUT_DIR/log.jsonl, rows {"user_id", "prompt", "chosen", "rejected", "split"} of 12 made-up users (splits train, validation,
test), and OUTPUT_DIR/base_model, a Llama of two layers that has read texts of that kind. They come from the generator of
`trl-sharelora demo`; all users like a reply polite and safe, each leans to a taste of his own, and answers are noisy.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from trl_sharelora.demo.base_model import build_base_model
from trl_sharelora.demo.generator import make_corpus, make_log, make_users


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    rows = make_log(make_users(args.users, 20, 200, rng), 40, rng)
    of_test = 0
    with open(args.output_dir / "log.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            if row["split"] == "test":
                of_test += 1
                row["split"] = "validation" if of_test % 2 else "test"
            file.write(json.dumps({name: value for name, value in row.items() if name != "true_margin"}) + "\n")
    texts = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    built = build_base_model(args.output_dir / "base_model", make_corpus(4000, rng), texts, steps=150, seed=args.seed)
    print(
        f"{len(rows)} comparisons of {args.users} users, and a base model of {built['parameters']:,} weights, in {args.output_dir}"
    )


if __name__ == "__main__":
    main()
