"""What user indexing costs a policy step, and pessimism a scoring pass: ratios of process CPU time in one process, interleaved.

    python benchmarks/policy_step.py            the table, about four minutes on one core
    python benchmarks/policy_step.py --rounds 3 --case score

- dpo, rloo, grpo: one optimizer step (for RLOO and GRPO with the rollout before it) against the same trainer of TRL with plain LoRA of
  the same rank on the same rows; 8 users, the same texts. Every completion has all of its tokens, so both do the same work.
- score: `UserReward(pessimism="ellipsoid")` against the plain reward on the same completions, with the sets of 1,000 users of 100
  comparisons each.
"""

import argparse
import time

import common  # first: it sets the number of threads
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from step_time import line, shown, verdict
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_sharelora import ShareLoraConfig
from trl_sharelora.pessimism import EllipsoidBuilder
from trl_sharelora.rewards import UserReward
from trl_sharelora.trainers.dpo import ShareLoraDPOConfig, ShareLoraDPOTrainer
from trl_sharelora.trainers.grpo import ShareLoraGRPOConfig, ShareLoraGRPOTrainer
from trl_sharelora.trainers.rloo import ShareLoraRLOOConfig, ShareLoraRLOOTrainer


ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": common.LINEARS}
CASES = ("dpo", "rloo", "grpo", "score")
TRAINERS = {
    "dpo": (ShareLoraDPOTrainer, ShareLoraDPOConfig, DPOTrainer, DPOConfig),
    "rloo": (ShareLoraRLOOTrainer, ShareLoraRLOOConfig, RLOOTrainer, RLOOConfig),
    "grpo": (ShareLoraGRPOTrainer, ShareLoraGRPOConfig, GRPOTrainer, GRPOConfig),
}


def policy(layers: int = 4, hidden: int = 512) -> LlamaForCausalLM:
    """The benchmarks' model as a causal one."""
    torch.manual_seed(0)
    config = common.base_model(1, 64).config.to_dict() | {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64 or 1,
        "num_key_value_heads": hidden // 64 or 1,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**config))


def tokenizer():
    """The benchmarks' tokenizer, for text: the others' rows are token ids."""
    made = common.tokenizer()
    made.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return made


def words(count: int, generator: torch.Generator) -> str:
    return " ".join(f"w{number}" for number in torch.randint(2, common.VOCAB, (count,), generator=generator).tolist())


def rows_of(users: int, count: int, tokens: int, **columns: bool) -> Dataset:
    """Rows whose prompt and replies have `tokens` words each."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        row = {"user_id": f"user{number % users:04d}", "prompt": words(tokens, generator) + " "}
        if columns.get("pairs"):
            row |= {"chosen": words(tokens, generator), "rejected": words(tokens, generator)}
        rows.append(row)
    return Dataset.from_list(rows)


class Online(common.Contestant):
    """An optimizer step of a trainer that generates, rollout included; its batches are lists of rows."""

    def __init__(self, trainer, batches):
        super().__init__(trainer, ())
        self.iterator = batches

    def __call__(self) -> float:
        taken = super().__call__()
        getattr(self.trainer, "_rewards", {"train": []})["train"].clear()
        return taken


def reward(completions: list[str], **_) -> list[float]:
    return [float(completion.count("1")) for completion in completions]


def step(method: str, users: int, rows: int, tokens: int, rounds: int, banks: tuple[str, ...] = ("resident", "mmap")):
    """A step of a policy trainer against TRL's with plain LoRA.

    Args:
        method (`str`):
            `"dpo"`, `"rloo"` or `"grpo"`.
        users (`int`), rows (`int`), tokens (`int`):
            Users in a batch; its pairs or completions; words of a prompt and of a reply.
    """
    ours, our_config, theirs, their_config = TRAINERS[method]
    online = method != "dpo"
    generations = 4
    more = {}
    if online:
        more = {"num_generations": generations, "max_completion_length": tokens, "beta": 0.05}
        more["generation_kwargs"] = {"min_new_tokens": tokens}
        more |= {"steps_per_generation": 1, "shuffle_dataset": False}
    data = rows_of(users, 8 * rows, tokens, pairs=not online)
    arguments = {"reward_funcs": reward} if online else {}

    def batches(trainer, with_users: bool):
        if online:
            prompts = [data[number] for number in range(rows // generations)]
            return common.endless([[row for row in prompts for _ in range(generations)]])
        return common.endless(common.batches_of(trainer, rows))

    with common.disk_folder() as folder:
        contestants = {}
        for bank in banks:
            args = common.training_arguments(f"{folder}/{bank}", rows, False, **more)
            if online:
                args.pop("max_length")
            trainer = ours(
                policy(),
                args=our_config(**args),
                train_dataset=data,
                processing_class=tokenizer(),
                peft_config=ShareLoraConfig(**ADAPTER, bank=bank),
                **arguments,
            )
            contestants[bank] = (Online if online else common.Contestant)(trainer, batches(trainer, True))
        args = common.training_arguments(f"{folder}/plain", rows, False, **more)
        if online:
            args.pop("max_length")
        plain = theirs(
            policy(),
            args=their_config(**args),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **ADAPTER),
            **arguments,
        )
        contestants["lora"] = (Online if online else common.Contestant)(plain, batches(plain, False))
        times = common.race(contestants, rounds)
    what = "completions" if online else "pairs"
    case = f"{method}, fp32, {users} users, {rows} {what} x {tokens}+{tokens} tokens"
    return [line(f"{case}, {bank}", "TRL step, plain LoRA", 1.05, times, bank, "lora") for bank in banks]


def score(rounds: int, users: int = 1000, comparisons: int = 100, rows: int = 64, tokens: int = 64, **shape: int):
    """Pessimistic scoring against plain scoring of the same completions."""
    torch.manual_seed(0)
    base = common.base_model(**shape)
    config = ShareLoraConfig(task_type="SEQ_CLS", users=[f"user{number:04d}" for number in range(users)], **ADAPTER)
    model = get_peft_model(base, config)
    size = base.config.hidden_size
    builder = EllipsoidBuilder(size, users)
    generator = torch.Generator().manual_seed(0)
    for user in range(users):
        chosen, rejected = torch.randn(2, comparisons, size, generator=generator)
        builder.add(torch.full((comparisons,), user), chosen, rejected)
    sets = builder.finish()
    made = tokenizer()
    rewards = {
        "plain": UserReward(model, processing_class=made, batch_size=rows),
        "ellipsoid": UserReward(model, "ellipsoid", processing_class=made, sets=sets, batch_size=rows),
    }
    texts = {
        "prompts": [words(tokens, generator) + " " for _ in range(rows)],
        "completions": [words(tokens, generator) for _ in range(rows)],
        "user_id": [f"user{number:04d}" for number in torch.randint(users, (rows,), generator=generator).tolist()],
    }

    def timed(function):
        def run() -> float:
            start = time.process_time()
            function(**texts)
            return time.process_time() - start

        return run

    times = common.race({name: timed(function) for name, function in rewards.items()}, rounds)
    case = f"{rows} completions of {2 * tokens} tokens, {size} features, {users} users x {comparisons} comparisons"
    return [line(case, "plain reward", 1.05, times, "ellipsoid", "plain")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per case (default 15)")
    parser.add_argument("--out", help="append the results to this JSONL file")
    args = parser.parse_args()
    common.quiet()
    print(common.machine())
    print(
        "\n| against | case | asked | measured: median [quartiles] | medians, this / other | |\n|---|---|---|---|---|---|"
    )
    results = []
    for case in args.case:
        if case == "score":
            lines = score(args.rounds)
        elif case == "dpo":
            lines = step(case, users=8, rows=8, tokens=32, rounds=args.rounds)
        else:
            lines = step(case, users=8, rows=32, tokens=16, rounds=args.rounds)
        for row in lines:
            print(shown(row), flush=True)
            common.append(args.out, row)
        results += lines
    missed = [row for row in results if verdict(row) == "miss"]
    print(f"\n{len(results) - len(missed)} of {len(results)} within what was asked.")


if __name__ == "__main__":
    main()
