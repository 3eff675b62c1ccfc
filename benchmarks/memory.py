"""Peak memory of one layer's forward and backward: ShareLoRA's layer against plain PEFT LoRA of the same rank.

    python benchmarks/memory.py                   # 4096 x 4096, r = 16, 16 users, batch 16 x 128 tokens
    python benchmarks/memory.py --device cuda

Counted is what the forward and the backward allocate: the layer's input (as the layer before makes it), what is kept for the
backward, the output until it is used, both of their gradients and those of the factors. Weights are there before and not counted. On a CPU the
allocations and releases of torch's profiler are added up in order; on a GPU it is torch.cuda.max_memory_allocated.

    autocast   bf16 base and activations, float32 factors, autocast: what PEFT and TRL do by default
    bf16       everything of plain LoRA in bf16; ShareLoRA's factors stay float32, as always
    fp32       everything in float32
"""

import argparse
import os
import sys

import common  # first: it sets the number of threads
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_sharelora import ShareLoraConfig
from trl_sharelora.sharelora.routing import get_router


PRECISIONS = {"autocast": 0.60, "bf16": 0.90, "fp32": 0.90}  # and the ratio that is asked for


class OneLayer(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype, device: str):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False, dtype=dtype, device=device)

    def forward(self, x):
        return self.layer(x)


def peak_bytes(work, device: str) -> int:
    """Most memory that `work` holds at a time, beyond what is there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # the profiler announces its start and stop there
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


def measure(precision: str, device: str, width: int, r: int, users: int, batch: int, tokens: int, bank: str) -> dict:
    """Peak of both layers, MB, and their ratio."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    target = {"r": r, "lora_alpha": 2 * r, "target_modules": ["layer"]}
    names = [f"user{number}" for number in range(users)]
    ours = get_peft_model(OneLayer(width, dtype, device), ShareLoraConfig(users=names, bank=bank, **target))
    plain = get_peft_model(
        OneLayer(width, dtype, device), LoraConfig(**target), autocast_adapter_dtype=precision == "autocast"
    )
    before = torch.randn(batch, tokens, width, dtype=dtype, device=device)
    after = torch.randn_like(before)
    user_index = torch.arange(batch, device=device) % users
    router = get_router(ours)

    def step(model):
        model.zero_grad()
        x = before.clone().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "autocast"):
            loss = (model(x) * after).sum()  # a next layer that keeps nothing and gives a gradient of its own
        loss.backward()

    def forward_backward(model):
        if model is plain:
            return step(model)
        with router.use(router.resolve(user_index)):
            step(model)

    peaks = {}
    for name, model in (("sharelora", ours), ("lora", plain)):
        model.train()
        forward_backward(model)  # tables of the libraries are made once
        model.zero_grad()
        peaks[name] = peak_bytes(lambda model=model: forward_backward(model), device)
    megabytes = {f"{name}_mb": round(peak / 2**20, 1) for name, peak in peaks.items()}
    return {
        "case": f"one {width} x {width} layer, r {r}, {users} users, {batch} x {tokens} tokens, {precision}, {bank} bank",
        "against": "plain PEFT LoRA, peak memory",
        "asked": PRECISIONS[precision],
        "median": round(peaks["sharelora"] / peaks["lora"], 4),
        **megabytes,
    }


def measure_all(device: str = "cpu", banks: tuple[str, ...] = ("resident",), **sizes: int) -> list[dict]:
    sizes = {"width": 4096, "r": 16, "users": 16, "batch": 16, "tokens": 128, **sizes}
    return [measure(precision, device, bank=bank, **sizes) for precision in PRECISIONS for bank in banks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name, default in {"width": 4096, "r": 16, "users": 16, "batch": 16, "tokens": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", help="append the results to this JSONL file")
    args = parser.parse_args()
    common.quiet()
    torch.set_num_threads(1)
    print(common.machine())
    if args.device == "cuda" and not torch.cuda.is_available():
        print("NOT MEASURED: --device cuda was asked for and torch sees no CUDA device here.")
        return
    sizes = {name: getattr(args, name) for name in ("width", "r", "users", "batch", "tokens")}
    for line in measure_all(args.device, ("resident", "ram"), **sizes):
        kept = "pass" if line["median"] <= line["asked"] else "miss"
        print(
            f"{line['case']}: {line['sharelora_mb']} MiB against {line['lora_mb']} MiB, ratio {line['median']:.3f}, "
            f"asked <= {line['asked']:.2f}: {kept}"
        )
        common.append(args.out, line)


if __name__ == "__main__":
    main()
