"""The step on bases of real shape with random weights: Llama-3 8B, GPT-J 6B; `step_time.py --shape` comes here.

Time of a step against plain PEFT LoRA, peak memory of it, and the shrink as bmm against a Triton kernel. It needs a GPU for the
large shapes; `--shape tiny --device cpu` runs the same code on a CPU in seconds, and its figures mean nothing.
"""

import itertools
import statistics
import time
from typing import Any

import common
import torch
from common import Contestant
from peft import LoraConfig
from torch import nn
from transformers import GPTJConfig, GPTJForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from trl_sharelora import ShareLoraConfig, ShareLoraRewardConfig, ShareLoraRewardTrainer, UserRegistry
from trl_sharelora.sharelora.sandwich import Rows, gather


GPTJ_LINEARS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "model": LlamaForSequenceClassification,
        "config": lambda: LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            rope_theta=500000.0,
            num_labels=1,
            pad_token_id=0,
        ),
        "linears": common.LINEARS,
        "batches": [(8, 512), (32, 128)],
    },
    "gptj-6b": {
        "model": GPTJForSequenceClassification,
        "config": lambda: GPTJConfig(
            n_embd=4096, n_layer=28, n_head=16, rotary_dim=64, vocab_size=50400, num_labels=1, pad_token_id=0
        ),
        "linears": GPTJ_LINEARS,
        "batches": [(8, 512), (32, 128)],
    },
    "tiny": {
        "model": LlamaForSequenceClassification,
        "config": lambda: LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=common.VOCAB,
            num_labels=1,
            pad_token_id=0,
        ),
        "linears": common.LINEARS,
        "batches": [(4, 16)],
    },
}


def random_base(shape: str, device: str, quantize: str) -> nn.Module:
    """A base with random weights, made on the device; its linear modules are quantised one by one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = SHAPES[shape]["model"](SHAPES[shape]["config"]())
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    if quantize != "none":
        quantise_linears(model, quantize, device)
    return model


def quantise_linears(model: nn.Module, quantize: str, device: str) -> None:
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear or name in ("score", "lm_head"):
                continue
            bias = linear.bias is not None
            sizes = linear.in_features, linear.out_features
            new: Any
            if quantize == "8bit":
                new = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=6.0)
                new.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            if bias:
                new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
            setattr(parent, name, new.to(device))
    # what transformers notes when it quantises, and PEFT asks for
    setattr(model, f"is_loaded_in_{quantize}", True)
    model.is_quantized = True
    model.quantization_method = "bitsandbytes"


class NoTrainerChecks:
    """Trainer wants to know how a quantised model was made; ours was made by hand."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self):
        self.quantised = getattr(self.model, "is_quantized", False)
        self.model.is_quantized = False
        return self.model

    def __exit__(self, *error):
        return None


def trainers(shape: str, device: str, quantize: str, folder: str, pairs: int, tokens: int, users: int, r: int):
    """The contestants, each with a base of its own, one after the other: two 8B bases are 32 GB."""
    target = {"r": r, "lora_alpha": 2 * r, "target_modules": SHAPES[shape]["linears"]}
    data = common.comparisons(users, pairs, tokens, batches=2)
    arguments = common.training_arguments(folder, pairs, True, use_cpu=device == "cpu")
    for name in ("resident", "mmap", "lora"):
        with NoTrainerChecks(random_base(shape, device, quantize)) as base:
            if name == "lora":
                yield (
                    name,
                    RewardTrainer(
                        base,
                        RewardConfig(**arguments),
                        train_dataset=data,
                        processing_class=common.tokenizer(),
                        peft_config=LoraConfig(task_type="SEQ_CLS", **target),
                    ),
                )
            else:
                yield (
                    name,
                    ShareLoraRewardTrainer(
                        base,
                        ShareLoraRewardConfig(**arguments | {"output_dir": f"{folder}/{name}"}),
                        train_dataset=data,
                        processing_class=common.tokenizer(),
                        peft_config=ShareLoraConfig(bank=name, **target),
                        users=UserRegistry(f"user{number:07d}" for number in range(users)),
                    ),
                )


def on_device(batches: list[dict[str, Any]], device: str, with_users: bool) -> list[dict[str, Any]]:
    return [
        {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items() if with_users or k != "user_index"}
        for batch in batches
    ]


def steps(shape: str, device: str, quantize: str, pairs: int, tokens: int, users: int, r: int, rounds: int) -> list:
    """Step time and peak memory against plain LoRA."""

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    with common.disk_folder() as folder:
        contestants, peaks, batches = {}, {}, None
        for name, trainer in trainers(shape, device, quantize, folder, pairs, tokens, users, r):
            batches = batches or common.batches_of(trainer, pairs)  # the first is ours, with users
            contestants[name] = Contestant(trainer, itertools.cycle(on_device(batches, device, name != "lora")), clock)
            contestants[name]()
            if device == "cuda":
                # of a step, beyond the weights and moments that are there; the two bases are not counted
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                there = torch.cuda.memory_allocated()
                contestants[name]()
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() - there
        times = common.race(contestants, rounds)
    lines = []
    for name in ("resident", "mmap"):
        result = {
            "case": f"{shape}, {quantize if quantize != 'none' else 'bf16'} base, {device}, {users} users, {pairs} pairs x "
            f"{tokens} tokens, r {r}, {name}",
            "against": "TRL step, plain LoRA",
            "asked": 0.97,
            "rounds": rounds,
            **common.ratio(times, name, "lora"),
            "this_ms": round(1000 * statistics.median(times[name]), 1),
            "other_ms": round(1000 * statistics.median(times["lora"]), 1),
        }
        if peaks:
            result |= {"step_mb": round(peaks[name] / 1e6), "lora_step_mb": round(peaks["lora"] / 1e6)}
        lines.append(result)
    return lines


def shrinks(width: int, device: str, rounds: int) -> list[dict]:
    """The shrink's forward: gather + bmm, as the package has it, against the Triton kernel."""
    import triton_shrink

    lines = []
    for r, (batch, tokens) in itertools.product((16, 32), ((16, 128), (16, 512), (64, 128), (64, 512))):
        x = torch.randn(batch, tokens, width, dtype=torch.bfloat16, device=device)
        moves = torch.randn(batch, r, width, device=device) / width**0.5
        start = torch.randn(r, width, device=device) / width**0.5
        slot = torch.arange(batch, device=device)
        rows = Rows(moves, start, slot, None, None)

        def plain(x=x, rows=rows):
            return torch.bmm(x, gather(rows, x.dtype).mT).mul_(2.0)

        def kernel(x=x, moves=moves, start=start, slot=slot):
            return triton_shrink.shrink(x, moves, start, slot, 2.0)

        error = float((plain().float() - kernel().float()).abs().max() / plain().float().abs().max())
        assert error < 0.02, f"the kernel differs from bmm by {error:.3f}"

        def seconds(work) -> float:
            torch.cuda.synchronize()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(20):
                work()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 20e3

        times = common.race(
            {"bmm": lambda p=plain: seconds(p), "triton": lambda k=kernel: seconds(k)}, max(rounds, 15)
        )
        lines.append(
            {
                "case": f"width {width}, {batch} rows x {tokens} tokens, r {r}: Triton shrink {1e6 * statistics.median(times['triton']):.1f} us, "
                f"gather + bmm {1e6 * statistics.median(times['bmm']):.1f} us",
                "against": "gather + bmm",
                "asked": None,
                "error": error,
                **common.ratio(times, "triton", "bmm"),
            }
        )
    return lines


def run(shape: str, device: str, quantize: str, rounds: int, out: str | None) -> None:
    """Measure a shape and say what could not be measured."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        print(
            f"NOT MEASURED: {shape} ({quantize}): --device cuda was asked for and torch sees no CUDA device here. Not measured are "
            "the step against plain LoRA, its peak memory, and bmm against the Triton shrink. The same code runs with --shape tiny "
            "--device cpu."
        )
        return
    for pairs, tokens in SHAPES[shape]["batches"]:
        for row in steps(shape, device, quantize, pairs, tokens, users=pairs, r=8, rounds=rounds):
            print(
                f"{row['case']}: step / plain LoRA's {row['median']:.3f} [{row['low']:.3f} {row['high']:.3f}], {row['this_ms']} / "
                f"{row['other_ms']} ms"
                + (f", memory of a step {row['step_mb']} / {row['lora_step_mb']} MB" if "step_mb" in row else ""),
                flush=True,
            )
            common.append(out, row)
    if device == "cpu":
        print(
            "NOT MEASURED on a CPU: peak memory of the step (benchmarks/memory.py has one layer's), the Triton shrink."
        )
        return
    try:
        import triton_shrink  # noqa: F401
    except ImportError as error:
        print(f"NOT MEASURED: bmm against the Triton shrink; triton cannot be imported ({error}).")
        return
    config = SHAPES[shape]["config"]()
    for row in shrinks(config.hidden_size, device, rounds):
        print(f"{row['case']}; ratio {row['median']:.3f} [{row['low']:.3f} {row['high']:.3f}]", flush=True)
        common.append(out, row)
