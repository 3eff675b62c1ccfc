"""Every file of accelerate_configs/, with as many real processes as it says (on a CPU, over gloo)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from safetensors.torch import load_file, save_file
from transformers.training_args import ParallelMode
from trl import TrlParser

from trl_sharelora import ShareLoraConfig, ShareLoraRewardConfig, cli
from trl_sharelora.errors import UnsupportedError
from trl_sharelora.scripts import launch
from trl_sharelora.trainers import user_arguments


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "accelerate_configs"
TRAINED = {"cpu": 1, "single_gpu": 1, "multi_gpu": 2, "fsdp2": 2}  # processes
REFUSED = {"zero2": "DeepSpeed", "zero3": "DeepSpeed"}  # in 2 processes; what the message names
STEPS = 3

WORKER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.test_accelerate_configs import work
work(Path({out!r}))
"""


# -- in the processes that are started --------------------------------------------------------------------------------


def shard_on_a_cpu() -> None:
    """Let accelerate turn FSDP on over gloo; it does for accelerators only, and on a CPU stays with DDP without a word."""
    from accelerate import state
    from accelerate.utils import DistributedType

    parent = state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        parent(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = init


def work(out: Path) -> None:
    """Train and leave behind what the test looks at, or leave the refusal behind."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    result = {"ranks": ranks}
    shard_on_a_cpu()
    try:
        args = ShareLoraRewardConfig(
            str(out),
            per_device_train_batch_size=4 // ranks,
            learning_rate=1e-3,
            max_steps=STEPS,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        # here, because a process that is refused before need not import them (a second each)
        from datasets import Dataset
        from torch.distributed.tensor import DTensor

        from tests.helpers import preference_rows, tiny_model, tiny_tokenizer
        from trl_sharelora import ShareLoraRewardTrainer

        trainer = ShareLoraRewardTrainer(
            tiny_model(),
            args,
            train_dataset=Dataset.from_list(preference_rows(users=5, n=24)),
            processing_class=tiny_tokenizer(),
            peft_config=ShareLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], bank="ram"),
        )
        trainer.train()
    except UnsupportedError as error:
        result["refused"] = str(error)
        result["constructed"] = "trainer" in locals()
    else:
        result["processes"] = trainer.accelerator.num_processes
        result["kind"] = str(trainer.accelerator.distributed_type)
        result["losses"] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        shared = {
            name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().contiguous()
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }
        save_file(shared, out / f"rank{rank}.safetensors")
    (out / f"rank{rank}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# -- in the test ------------------------------------------------------------------------------------------------------


def start(name: str, processes: int, out: Path) -> list[dict]:
    """Start the workers with the environment that `accelerate launch` would give them; what each rank left behind."""
    script = out / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), out=str(out)))
    arguments = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0"]
    arguments += [] if processes == 1 else ["--num_processes", str(processes)]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*arguments, str(script)]))
    assert args.num_processes == processes
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
    elif args.use_fsdp or args.multi_gpu:
        environment = prepare_multi_gpu_env(args)
    else:
        _, environment = prepare_simple_launcher_cmd_env(args)
    # accelerate's launchers start one process without a GPU, so several are started by torch's
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(several if processes > 1 else []), str(script)],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in out.glob("rank*.json")) == [f"rank{rank}.json" for rank in range(processes)]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_in_as_many_processes_as_it_says(name, tmp_path):
    processes = TRAINED[name]
    ranks = start(name, processes, tmp_path)
    for result in ranks:
        assert result["ranks"] == result["processes"] == processes, result
        kind = "FSDP" if name == "fsdp2" else "NO" if processes == 1 else "MULTI_CPU"
        assert result["kind"] == f"DistributedType.{kind}", result
        assert len(result["losses"]) == STEPS and all(map(math.isfinite, result["losses"]))
    shared = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(processes)]
    assert any("sharelora_B" in key and value.any() for key, value in shared[0].items())  # B starts at zero
    assert any("score" in key for key in shared[0])
    for other in shared[1:]:
        assert shared[0].keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in shared[0].items())


@pytest.mark.distributed
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name_in_every_process(name, tmp_path):
    for result in start(name, 2, tmp_path):
        assert result["ranks"] == 2
        assert REFUSED[name] in result["refused"] and not result["constructed"], result
        if name.startswith("zero"):
            assert f"ZeRO stage {name[-1]}" in result["refused"]
            assert "multi_gpu" in result["refused"] and "load_in_4bit" in result["refused"]


def test_every_file_is_tested_and_its_fields_are_accelerates():
    assert {path.stem for path in CONFIGS.iterdir()} == {*TRAINED, *REFUSED} == set(launch.shipped_configs())
    known = {action.dest for action in launch_command_parser()._actions}
    for path in CONFIGS.glob("*.yaml"):
        # accelerate refuses a top-level field it does not know, but not one of these
        fields = yaml.safe_load(path.read_text())
        nested = {key for part in ("fsdp_config", "deepspeed_config") for key in fields.get(part, {})}
        assert nested <= known, path.name


def test_the_shipped_files_are_found_in_a_wheel_and_in_a_checkout(monkeypatch, tmp_path):
    assert launch.shipped_configs()["multi_gpu"] == CONFIGS / "multi_gpu.yaml"
    installed = tmp_path / "trl_sharelora"
    for folder in (installed / "scripts", installed / "accelerate_configs"):
        folder.mkdir(parents=True)
    (installed / "accelerate_configs" / "multi_gpu.yaml").touch()
    monkeypatch.setattr(launch, "__file__", str(installed / "scripts" / "launch.py"))
    assert launch.shipped_configs() == {"multi_gpu": installed / "accelerate_configs" / "multi_gpu.yaml"}


@pytest.mark.parametrize("deepspeed", ["zero3.json", {"zero_optimization": {"stage": 2}}])
def test_deepspeed_as_an_argument_is_refused_before_it_is_imported(deepspeed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # whether or not it is installed: importing it fails
    with pytest.raises(UnsupportedError, match=r"DeepSpeed was asked for \(deepspeed=") as caught:
        ShareLoraRewardConfig(str(tmp_path), deepspeed=deepspeed, use_cpu=True)
    assert "shard the users' rows" in str(caught.value) and "multi_gpu.yaml" in str(caught.value)
    with pytest.raises(UnsupportedError, match="'ds.json'"):
        TrlParser(ShareLoraRewardConfig).parse_args_and_config(
            ["--output_dir", str(tmp_path), "--deepspeed", "ds.json"]
        )


@pytest.mark.parametrize("value", ["true", "True", "1", "yes"])
def test_deepspeed_in_the_environment_is_refused(value, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", value)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json")
    with pytest.raises(UnsupportedError, match="ACCELERATE_USE_DEEPSPEED in the environment, ZeRO stage 3, ds.json"):
        ShareLoraRewardConfig(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    ShareLoraRewardConfig(str(tmp_path), use_cpu=True)


@pytest.mark.parametrize("asked", [["--accelerate_config", "zero3"], ["--use_deepspeed"]])
def test_the_command_refuses_deepspeed_before_accelerate_looks_for_it(asked, monkeypatch, capsys):
    def never(args):
        raise AssertionError("launched")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", never)
    assert cli.main(["reward", "--output_dir", "out", "--use_cpu", *asked]) == 2
    assert "UnsupportedError: DeepSpeed was asked for" in capsys.readouterr().err


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    args = ShareLoraRewardConfig(str(tmp_path), use_cpu=True)
    user_arguments.refuse_data_parallel(args)
    monkeypatch.setattr(args, "_n_gpu", 2, raising=False)
    assert args.parallel_mode == ParallelMode.NOT_DISTRIBUTED
    with pytest.raises(UnsupportedError, match=r"2 GPUs are visible to one process.*nn\.DataParallel.*multi_gpu"):
        user_arguments.refuse_data_parallel(args)
    # one process per GPU
    monkeypatch.setattr(ShareLoraRewardConfig, "parallel_mode", ParallelMode.DISTRIBUTED)
    user_arguments.refuse_data_parallel(args)
