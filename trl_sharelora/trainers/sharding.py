"""Whose rows go to which process, and what a padded batch weighs.

Two modes (`user_sharding`). `"union"`: any sampler; every process keeps the users of all processes' batches, and their gradients are
averaged, as DDP does with the shared part. `"owner"`: each user belongs to one process, which gets all of his comparisons;
nothing of a user's own part ever travels.
"""

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler

from ..errors import AdapterMismatchError, ConfigError, UnsupportedError
from ..sharelora.bank import ResidentBank
from ..sharelora.head import Float32Linear


USER_SHARDING = ("union", "owner")


def balanced_owners(comparisons: np.ndarray, processes: int) -> np.ndarray:
    """The owner of each user, such that the processes have about as many comparisons each.

    The users with most comparisons are given away first, each to the process with the fewest so far; the same on all processes.

    Args:
        comparisons (`np.ndarray` of shape `(users,)`):
            How many each user has.
        processes (`int`):
            Number of processes.

    Raises:
        ConfigError: there are fewer users than processes.

    ```python
    >>> balanced_owners(np.array([5, 1, 4, 1, 1]), 2).tolist()
    [0, 1, 1, 0, 1]
    ```
    """
    if len(comparisons) < processes:
        raise ConfigError(
            f"user_sharding='owner' gives every user to one of {processes} processes, but there are only {len(comparisons)} users. Use "
            "user_sharding='union', or fewer processes."
        )
    owners = np.empty(len(comparisons), dtype=np.int64)
    loads = [(0, process) for process in range(processes)]
    for user in np.argsort(-comparisons, kind="stable").tolist():
        load, process = heapq.heappop(loads)
        owners[user] = process
        # a user without comparisons counts a little, so that those are spread as well
        heapq.heappush(loads, (load + max(int(comparisons[user]), 1), process))
    return owners


class OwnerSampler(Sampler[int]):
    """Places of the dataset in such an order that process r of accelerate's sharding gets its own users' pairs.

    accelerate gives batch k to process k % processes. A process whose pairs are used up gets pairs of others, which are seen to be
    foreign and weigh nothing.

    Args:
        user_index (`Sequence[int]`):
            The user of each place of the dataset.
        owners (`np.ndarray` of shape `(users,)`):
            The process of each user.
        processes (`int`):
            Number of processes.
        batch_size (`int`):
            Pairs per process and micro-batch.
        seed (`int`):
            Of the order, with the epoch.
    """

    def __init__(self, user_index: Sequence[int], owners: np.ndarray, processes: int, batch_size: int, seed: int):
        owner = owners[np.asarray(user_index)]
        if processes > 1 and len(np.unique(owner)) == 1:
            raise ConfigError(
                f"All comparisons belong to users of one of {processes} processes, so the others would have nothing to do. Use "
                "user_sharding='union', or one process."
            )
        self.places = [np.flatnonzero(owner == process) for process in range(processes)]
        self.foreign = [
            int(np.flatnonzero(owner != process)[0]) if processes > 1 else -1 for process in range(processes)
        ]
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.rounds = max(-(-len(places) // batch_size) for places in self.places)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rounds * self.batch_size * len(self.places)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        orders = [generator.permutation(places).tolist() for places in self.places]
        for start in range(0, self.rounds * self.batch_size, self.batch_size):
            for process, order in enumerate(orders):
                batch = order[start : start + self.batch_size]
                yield from batch + [self.foreign[process]] * (self.batch_size - len(batch))


class UserShards:
    """What one process needs to know of the others.

    Args:
        processes (`int`):
            Number of processes.
        process (`int`):
            This one.
        owners (`np.ndarray` of shape `(users,)`, *optional*):
            The process of each user, for `user_sharding="owner"`.
        last_pairs (`int`, *optional*):
            Pairs of the last micro-batch of an epoch in all processes, 0 if it is full; None if only accelerate knows (a stream).
            After a resume inside an epoch accelerate does not know it.
    """

    def __init__(self, processes: int, process: int, owners: np.ndarray | None = None, last_pairs: int | None = None):
        self.processes = processes
        self.process = process
        self.owners = owners
        self.last_pairs = last_pairs

    @property
    def mine(self) -> np.ndarray | None:
        """Which users are this process's own, `(users,)` bool; None if all processes have all."""
        return None if self.owners is None else self.owners == self.process

    def real(self, user_index: torch.Tensor, gradient_state: Any) -> torch.Tensor:
        """Which pairs of a batch that was just fetched are no padding, `(pairs,)` bool.

        Args:
            user_index (`torch.Tensor` of shape `(pairs,)`):
                Their users.
            gradient_state ([`~accelerate.state.GradientState`]):
                Knows whether this is the last batch of the epoch and how many pairs it has in all processes. accelerate fills the
                last batches up with pairs from the beginning.
        """
        mine = self.mine
        if mine is not None:
            return torch.from_numpy(mine).to(user_index.device)[user_index]
        place = self.process * len(user_index) + torch.arange(len(user_index), device=user_index.device)
        remainder = gradient_state.remainder if self.last_pairs is None else self.last_pairs
        remainder = remainder if gradient_state.end_of_dataloader else -1
        return place < remainder if remainder > 0 else torch.ones_like(place, dtype=torch.bool)


def prepare_fsdp(trainer: Any) -> None:
    """Let FSDP2 shard the base and the shared factors, and keep the users' rows and the rewards out of it.

    Called after the trainer's constructor and before accelerate wraps the model.

    Raises:
        UnsupportedError: naming what of FSDP cannot be used.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    refused = {
        "FSDP1 (fsdp_version: 1), which flattens trained and frozen parameters together": plugin.fsdp_version != 2,
        "bank='resident': FSDP would shard the users' rows, and none would ever move": any(
            isinstance(module, ResidentBank) for module in trainer.model.modules()
        ),
        "fsdp_activation_checkpointing: the saved adapter would lack its factors; use gradient_checkpointing=True": (
            plugin.activation_checkpointing
        ),
        "fsdp_state_dict_type other than FULL_STATE_DICT: the adapter would not be saved": (
            "FULL_STATE_DICT" not in str(plugin.state_dict_type)
        ),
        "fsdp_cpu_ram_efficient_loading: it takes every tensor for sharded": plugin.cpu_ram_efficient_loading,
        "share='none', which is not tested with FSDP": trainer.model.peft_config["default"].share == "none",
        "an 8-bit or 4-bit base, which is not tested with FSDP": (
            getattr(trainer.model, "is_loaded_in_8bit", False) or getattr(trainer.model, "is_loaded_in_4bit", False)
        ),
    }
    for what, came in refused.items():
        if came:
            raise UnsupportedError(
                f"FSDP came with {what}. FSDP2 is supported for the base with ShareLoraConfig(bank='ram') or 'mmap' and the settings of "
                "accelerate_configs/fsdp2.yaml; otherwise use multi_gpu.yaml (DDP)."
            )
    # accelerate's own policy would reduce gradients in bf16 and cast the rewards to it, where two that differ by less than .03
    # are a tie
    low = {"bf16": torch.bfloat16}.get(trainer.accelerator.mixed_precision)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for module in trainer.model.modules():
        if isinstance(module, Float32Linear):  # a unit of its own, without casts
            fully_shard(module, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def check_common_start(model: nn.Module, checkpoint: str | Path) -> None:
    """Compare the frozen common start with a checkpoint's: FSDP's files leave frozen parameters out.

    Raises:
        AdapterMismatchError: they differ; every user would be computed from another A_0.
    """
    present = dict(model.named_parameters())
    with safe_open(Path(checkpoint, SAFETENSORS_WEIGHTS_NAME), "pt") as file:
        for key in file.keys():  # noqa: SIM118  not a mapping
            if ".sharelora_common" not in key:
                continue
            parameter = present[key.replace(".weight", ".default.weight")]
            here = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if not torch.equal(here.detach().cpu().float(), file.get_tensor(key).float()):
                raise AdapterMismatchError(
                    f"{key} is another one in {checkpoint} than here, and FSDP does not load frozen parameters: the run was started with "
                    "another seed or base. Resume with the same ones, or without FSDP."
                )
