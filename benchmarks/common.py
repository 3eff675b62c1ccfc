"""What the benchmarks share: a tiny reward model, a timed training step, ratios with quartiles, the machine in words."""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import itertools
import json
import logging
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import trl_sharelora


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB = 1000
WARM_UP = 2  # rounds that are not counted


def quiet() -> None:
    """No bars and no notes of the libraries between the figures."""
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    for name in ("trl", "accelerate", "trl_sharelora", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def machine() -> str:
    """Processor, memory, load and versions, in two lines."""
    processor, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":")[1].strip()
            elif line.startswith("flags"):
                flags = ", AVX512-BF16" if "avx512_bf16" in line else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    modules = {"torch": torch, "transformers": transformers, "peft": peft, "trl": trl, "accelerate": accelerate}
    versions = ", ".join(f"{name} {module.__version__}" for name, module in modules.items())
    return (
        f"machine: {processor}{flags}, {os.cpu_count()} cores, {memory:.0f} GiB, {gpu}; load {load}\n"
        f"versions: Python {platform.python_version()}, {versions}, trl_sharelora {trl_sharelora.__version__}"
    )


def disk_folder(near: str | None = None) -> tempfile.TemporaryDirectory:
    """A temporary folder on a real disk: files in a tmpfs would be memory. TMPDIR is taken if it is one, else /var/tmp."""
    for folder in (near, tempfile.gettempdir(), "/var/tmp", str(Path.cwd())):
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK) and file_system(folder) != "tmpfs":
            return tempfile.TemporaryDirectory(dir=folder, prefix="sharelora-bench-")
    return tempfile.TemporaryDirectory(prefix="sharelora-bench-")


def file_system(folder: str) -> str:
    """The type of the file system a folder lies on, "" where the system does not say."""
    folder, found = os.path.realpath(folder), ("", "")
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, kind, *_ = line.split()
            inside = os.path.commonpath([mount, folder]) == mount
            if inside and len(mount) >= len(found[0]):
                found = mount, kind
    return found[1]


def resident_mb() -> float:
    """Resident memory of this process (VmRSS), MB; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def base_model(layers: int = 4, hidden: int = 512, **more: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64 or 1,
        "num_key_value_heads": hidden // 64 or 1,
        "vocab_size": VOCAB,
        "num_labels": 1,
        "pad_token_id": 0,
    }
    return LlamaForSequenceClassification(LlamaConfig(**(config | more)))


def tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


def comparisons(users: int, pairs: int, tokens: int, batches: int, name: str = "user{:07d}") -> Dataset:
    """Tokenised rows, all of one length; each batch of `pairs` rows holds the first `users` users."""
    generator = torch.Generator().manual_seed(0)

    def ids():
        return torch.randint(2, VOCAB, (tokens,), generator=generator).tolist()

    rows = range(batches * pairs)
    return Dataset.from_list(
        [{"user_id": name.format(i % users), "chosen_ids": ids(), "rejected_ids": ids()} for i in rows]
    )


def training_arguments(folder: str, pairs: int, bf16: bool, **more: Any) -> dict[str, Any]:
    """What all trainers of a comparison are told."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": pairs,
        "bf16": bf16,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "max_length": None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


def batches_of(trainer, pairs: int) -> list[dict[str, Any]]:
    """The batches of a trainer's dataset, in order."""
    data = trainer.train_dataset
    return [
        trainer.data_collator([data[i] for i in range(start, start + pairs)]) for start in range(0, len(data), pairs)
    ]


class Contestant:
    """One way to train; a call takes one optimizer step, as `Trainer._run_epoch` does, and returns its seconds.

    That is: the batches of the window from `get_batch_samples` (where the users of this window are held and those of the next are
    read ahead), per batch forward, TRL's loss and metrics and backward, then clipping, optimizer and zeroing.

    Args:
        trainer ([`~trl.RewardTrainer`]):
            Not started.
        batches (`Iterable[dict]`):
            Endless, or enough.
        clock (`Callable`, *optional*):
            Process CPU time by default.
    """

    def __init__(self, trainer, batches: Iterable[dict[str, Any]], clock: Callable[[], float] = time.process_time):
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(num_training_steps=1_000_000)
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model.train()
        self.iterator = (dict(batch) for batch in batches)
        self.clock = clock

    def __call__(self) -> float:
        trainer = self.trainer
        start = self.clock()
        window, items = trainer.get_batch_samples(
            self.iterator, trainer.args.gradient_accumulation_steps, trainer.args.device
        )
        trainer.current_gradient_accumulation_steps = len(window)
        for number, batch in enumerate(window):
            trainer.accelerator.gradient_state._set_sync_gradients(number == len(window) - 1)
            self.forward_backward(batch, items)
        trainer._clip_grad_norm(trainer.model)
        trainer.optimizer.step()
        trainer._window_rows = []  # what the callback of ours does
        trainer.model.zero_grad()
        self.wait()
        taken = self.clock() - start
        trainer._metrics["train"].clear()
        getattr(trainer, "_scores", {"train": []})["train"].clear()
        return taken

    def forward_backward(self, batch: dict[str, Any], items: Any) -> None:
        self.trainer.training_step(self.trainer.model, batch, items)

    def wait(self) -> None:
        """Wait for what is read ahead, so that its CPU time counts here and not in another contestant's step."""
        router = getattr(self.trainer, "router", None)
        for working_set in router.working_sets.values() if router else ():
            if working_set._ahead is not None:
                working_set._ahead.result()


def endless(batches: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return itertools.cycle(batches)


def with_users(batches: list[dict[str, Any]], rows: Iterator[list[int]]) -> Iterator[dict[str, Any]]:
    """The same texts again and again, each time of the next users."""
    for batch, users in zip(itertools.cycle(batches), rows, strict=False):
        yield {**batch, "user_index": torch.tensor(users)}


def race(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant in each round; in each round all of them run once, in random order."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + WARM_UP):
        order = list(contestants)
        random.Random(number).shuffle(order)
        for name in order:
            taken = contestants[name]()
            if number >= WARM_UP:
                times[name].append(taken)
    return times


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> dict[str, float]:
    """Median and quartiles of the ratios of the same rounds."""
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    low, middle, high = quartiles(ratios)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


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


def append(path: str | None, line: dict[str, Any]) -> None:
    """Add a result to a JSONL file."""
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
