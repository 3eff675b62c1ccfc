"""Time of one ShareLoRA training step against plain LoRA and against a loop over per-user PEFT adapters.

    python benchmarks/step_time.py            # 4 layers, width 512, all linears, r = 8; fp32 and bf16-autocast

All contestants run in one process, in random order within each round, on the same batches; a figure is the median over
rounds of the ratio of two times of the same round, with quartiles. Times are process CPU time on one thread, because other jobs
on a shared machine do not add to it. A step is what the trainers do: forward, TRL's loss and metrics, backward, clipping,
optimiser, zeroing.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from trl_sharelora import ShareLoraConfig, ShareLoraRewardConfig, ShareLoraRewardTrainer


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB = 1000


def base_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=VOCAB,
            num_labels=1,
            pad_token_id=0,
        )
    )


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


def comparisons(users: int, pairs: int, tokens: int, batches: int) -> Dataset:
    """Tokenised rows, all of one length; each batch of `pairs` rows holds `users` users."""
    generator = torch.Generator().manual_seed(0)

    def ids():
        return torch.randint(2, VOCAB, (tokens,), generator=generator).tolist()

    return Dataset.from_list(
        [{"user_id": f"u{i % users}", "chosen_ids": ids(), "rejected_ids": ids()} for i in range(batches * pairs)]
    )


class Contestant:
    """One way to train on a batch; `step` takes the CPU seconds of a whole training step."""

    def __init__(self, trainer, batches):
        self.trainer = trainer
        trainer.current_gradient_accumulation_steps = 1  # set by Trainer.train, whose step this is
        trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.batches = batches

    def step(self, number: int) -> float:
        trainer = self.trainer
        batch = dict(self.batches[number % len(self.batches)])
        start = time.process_time()
        self.forward_backward(batch)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        taken = time.process_time() - start
        trainer._metrics["train"].clear()
        getattr(trainer, "_scores", {"train": []})["train"].clear()
        return taken

    def forward_backward(self, batch: dict) -> None:
        self.trainer.training_step(self.trainer.model, batch)


class AdapterLoop(Contestant):
    """Per-user PEFT adapters: each user's rows in a forward and backward of their own."""

    def __init__(self, trainer, batches, user_index):
        super().__init__(trainer, batches)
        self.user_index = user_index

    def forward_backward(self, batch: dict) -> None:
        model = self.trainer.model
        users = self.user_index
        pairs = len(users)
        for user in users.unique().tolist():
            rows = (users == user).nonzero().flatten()
            rows = torch.cat([rows, rows + pairs])
            model.set_adapter(f"user{user}" if user else "default")
            with self.trainer.compute_loss_context_manager():
                part = {key: value[rows] for key, value in batch.items() if torch.is_tensor(value)}
                loss = self.trainer.compute_loss(model, part) * len(rows) / (2 * pairs)
            self.trainer.accelerator.backward(loss)


def bf16_slowness() -> float:
    """Time of a bf16 product as a backward has it, over that of a float32 one."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        gradient, weight = torch.ones(64, 1408, dtype=dtype), torch.ones(1408, 512, dtype=dtype)
        gradient @ weight
        start = time.process_time()
        for _ in range(3):
            gradient @ weight
        seconds.append(time.process_time() - start)
    return seconds[1] / seconds[0]


def measure(users: int, pairs: int, tokens: int, bf16: bool, rounds: int, loop: bool) -> dict:
    data = comparisons(users, pairs, tokens, batches=4)
    common = dict(
        per_device_train_batch_size=pairs,
        bf16=bf16,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        max_length=None,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    lora = dict(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=LINEARS)
    with tempfile.TemporaryDirectory() as directory:
        ours = ShareLoraRewardTrainer(
            base_model(),
            ShareLoraRewardConfig(directory, **common),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=ShareLoraConfig(**lora),
        )
        plain = RewardTrainer(
            base_model(),
            RewardConfig(directory, **common),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=LoraConfig(**lora),
        )
        with_users = [
            ours.data_collator([ours.train_dataset[i] for i in range(start, start + pairs)])
            for start in range(0, len(data), pairs)
        ]
        without = [{k: v for k, v in batch.items() if k != "user_index"} for batch in with_users]
        contestants = {"sharelora": Contestant(ours, with_users), "lora": Contestant(plain, without)}
        if loop:
            model = get_peft_model(base_model(), LoraConfig(**lora))
            for user in range(1, users):
                model.add_adapter(f"user{user}", LoraConfig(**lora))
            many = RewardTrainer(
                model, RewardConfig(directory, **common), train_dataset=data, processing_class=tokenizer()
            )
            # every adapter's parameters belong to the optimiser, whichever is active now
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.requires_grad_(True)
            contestants["loop"] = AdapterLoop(many, without, with_users[0]["user_index"])

        times: dict[str, list[float]] = {name: [] for name in contestants}
        for round_number in range(rounds + 2):  # two to warm up
            order = list(contestants)
            random.Random(round_number).shuffle(order)
            for name in order:
                taken = contestants[name].step(round_number)
                if round_number >= 2:
                    times[name].append(taken)
    result = {
        "users": users,
        "pairs": pairs,
        "tokens": tokens,
        "precision": "bf16" if bf16 else "fp32",
        "rounds": rounds,
    }
    for other in contestants:
        if other != "sharelora":
            ratios = [ours_s / other_s for ours_s, other_s in zip(times["sharelora"], times[other], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            result[f"sharelora/{other}"] = [round(value, 3) for value in (middle, low, high)]
    result["lora_ms"] = round(1000 * statistics.median(times["lora"]), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per case (default 15)")
    parser.add_argument("--out", help="append the results to this JSONL file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    slowness = bf16_slowness()
    slow = slowness > 5
    cases = [
        dict(users=8, pairs=8, tokens=64, bf16=False, loop=False),
        dict(users=8, pairs=8, tokens=8 if slow else 64, bf16=True, loop=False),
        dict(users=32, pairs=32, tokens=32, bf16=not slow, loop=True),
        dict(users=32, pairs=32, tokens=16, bf16=not slow, loop=True),
    ]
    if slow:
        print(
            f"A bf16 product is {slowness:.0f}x slower than a float32 one on this processor (no bf16 instructions): the bf16 case "
            "has 8 tokens a row instead of 64, the loop cases are in float32."
        )
    print("ratio: median [quartiles] of CPU time, one thread, interleaved rounds in one process")
    for case in cases:
        result = measure(rounds=args.rounds, **case)
        print(
            f"{result['precision']}, {result['users']} users, {result['pairs']} pairs of {result['tokens']} tokens "
            f"(plain LoRA {result['lora_ms']} ms):"
        )
        for key, value in result.items():
            if "/" in key:
                print(f"  {key:<16} {value[0]:.3f} [{value[1]:.3f} {value[2]:.3f}]")
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
