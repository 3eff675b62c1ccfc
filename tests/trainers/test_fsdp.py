"""FSDP2 over two gloo processes: the base and the shared factors sharded, the users' rows beside it, like one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.test_accelerate_configs import shard_on_a_cpu
from tests.trainers import test_ranks
from trl_sharelora.errors import AdapterMismatchError, UnsupportedError
from trl_sharelora.trainers.sharding import check_common_start, prepare_fsdp


ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "ACCELERATE_MIXED_PRECISION": "no",
}
CASES = [("ram", True), ("mmap", False), ("mmap", None)]  # with (reentrant) checkpointing or without


def worker(out: Path) -> None:
    shard_on_a_cpu()
    for bank, reentrant in CASES:
        settings = dict(save_strategy="steps", save_steps=2) if reentrant is None else {}
        case = out / f"{bank}-{reentrant}"
        trainer = test_ranks.make_trainer(case, bank, 2, reentrant, **settings)
        assert trainer.is_fsdp_enabled
        trainer.train()
        assert any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
        test_ranks.finish(trainer, case)
    again = test_ranks.make_trainer(out / "resumed", bank, 2, reentrant, **settings)
    again.train(resume_from_checkpoint=str(case / "checkpoint-2"))
    test_ranks.finish(again, out / "resumed")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_invariant_1_fsdp2_equals_one_process(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(test_ranks.ROOT)!r})\n"
        f"from tests.trainers.test_fsdp import worker\nworker(Path({str(tmp_path)!r}))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=600, check=False, env=os.environ | ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-5000:]
    for bank, reentrant in CASES:
        test_ranks.union_case(tmp_path, 1, bank, reentrant)
        test_ranks.assert_alike(tmp_path / f"{bank}-{reentrant}", tmp_path / f"union-1-{bank}-{reentrant}")
    straight, _ = test_ranks.result(tmp_path / "mmap-None")
    resumed, _ = test_ranks.result(tmp_path / "resumed")
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


class Plugin:
    fsdp_version, activation_checkpointing, cpu_ram_efficient_loading = 2, False, False
    state_dict_type = "StateDictType.FULL_STATE_DICT"


@pytest.mark.parametrize(
    "came, message",
    [
        (dict(fsdp_version=1), "FSDP1"),
        (dict(activation_checkpointing=True), "fsdp_activation_checkpointing"),
        (dict(state_dict_type="StateDictType.SHARDED_STATE_DICT"), "FULL_STATE_DICT"),
        (dict(cpu_ram_efficient_loading=True), "fsdp_cpu_ram_efficient_loading"),
        (None, "bank='resident'"),
    ],
)
def test_what_of_fsdp_cannot_be_used_is_refused_by_name(tmp_path, came, message, monkeypatch):
    trainer = test_ranks.make_trainer(tmp_path, "resident" if came is None else "ram", 1)
    plugin = Plugin()
    for name, value in (came or {}).items():
        setattr(plugin, name, value)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(UnsupportedError, match=message):
        prepare_fsdp(trainer)


def test_another_common_start_is_noticed(tmp_path):
    trainer = test_ranks.make_trainer(tmp_path, "ram", 1)
    trainer.save_model()
    check_common_start(trainer.model, tmp_path)
    common = next(parameter for name, parameter in trainer.model.named_parameters() if "sharelora_common" in name)
    nn.init.zeros_(common)
    with pytest.raises(AdapterMismatchError, match="another seed or base"):
        check_common_start(trainer.model, tmp_path)
