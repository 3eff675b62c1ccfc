"""The command line: what costs what, who gets which argument, what is refused."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from helpers import preference_rows, save_tiny
from trl import ModelConfig

from trl_sharelora import cli
from trl_sharelora.errors import ConfigError, DataError, MethodError, UnsupportedError
from trl_sharelora.scripts import launch, reward


ROOT = Path(__file__).parent.parent
RUN_SCRIPT = "trl_sharelora.scripts.reward"


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` is asked to do, instead of doing it: (accelerate's arguments, number asked for)."""
    calls = []
    monkeypatch.setattr(
        "accelerate.commands.launch.launch_command",
        lambda args: calls.append((args, os.environ.get(launch.ASKED_PROCESSES))),
    )
    return calls


@pytest.fixture
def minimal(tmp_path):
    return ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_dir", str(tmp_path), "--use_cpu"]


def write_yaml(path: Path, **values) -> str:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


# -- help, version, env ----------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    # torch and peft come with the package itself, which registers the PEFT method
    code = (
        "import sys\nfrom trl_sharelora.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print('heavy:', sorted({'trl', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "heavy: []"
    for command in ("reward", "eval", "export", "subspace", "compare", "demo", "env"):
        assert f"\n    {command} " in run.stdout


def test_without_a_command_there_is_help(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: trl-sharelora")


def test_version(capsys):
    from trl_sharelora import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_of_the_training_command_lists_our_arguments_and_trls(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["reward", "-h"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: trl-sharelora reward")
    for name in ("--share", "--train_common", "--user_column", "--learning_rate_shared", "--lora_r", "--max_length"):
        assert f"  {name} " in out


def test_env_names_versions_and_no_secrets(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    lines = dict(line[2:].split(": ", 1) for line in out.splitlines() if line.startswith("- "))
    import peft
    import torch
    import trl

    assert (lines["torch"], lines["trl"], lines["peft"]) == (torch.__version__, trl.__version__, peft.__version__)
    assert lines["python"] == sys.version.split()[0]
    assert lines["PEFT method"] == "SHARELORA registered"
    assert "devices" in lines
    assert "hf_secret" not in out and str(Path.home()) not in out


# -- who gets which argument -----------------------------------------------------------------------------------------


def test_what_the_script_does_not_know_goes_to_accelerate(launched, minimal):
    argv = ["--lora_r", "4", "--num_processes", "2", *minimal, "--share", "AB", "--mixed_precision=bf16"]
    assert cli.main(["reward", *argv]) == 0
    [(args, asked)] = launched
    assert (args.num_processes, args.mixed_precision) == (2, "bf16")
    assert args.module and args.training_script == RUN_SCRIPT
    assert args.training_script_args == ["--lora_r", "4", *minimal, "--share", "AB"]
    assert asked == "2"
    assert launch.ASKED_PROCESSES not in os.environ


def test_a_yaml_file_is_split_in_the_same_way(launched, minimal, tmp_path, monkeypatch):
    monkeypatch.setenv("SHARELORA_TEST_VARIABLE", "before")
    config = write_yaml(
        tmp_path / "reward.yaml",
        share="diagonal",
        num_processes=3,
        multi_gpu=True,
        dynamo_use_dynamic=False,
        env={"SHARELORA_TEST_VARIABLE": 7},
    )
    assert cli.main(["reward", "--config", config, *minimal]) == 0
    [(args, asked)] = launched
    assert (args.num_processes, args.multi_gpu, args.dynamo_use_dynamic) == (3, True, False)
    # the script reads the file itself
    assert args.training_script_args == ["--config", config, *minimal]
    assert asked == "3"
    assert os.environ["SHARELORA_TEST_VARIABLE"] == "7"


def test_the_command_line_goes_before_the_yaml_file(launched, minimal, tmp_path):
    config = write_yaml(tmp_path / "reward.yaml", num_processes=3)
    assert cli.main(["reward", "--config", config, *minimal, "--num_processes", "1"]) == 0
    [(args, asked)] = launched
    assert (args.num_processes, asked) == (1, "1")


def test_accelerate_config_by_name_and_by_path(launched, minimal, tmp_path):
    assert cli.main(["reward", *minimal, "--accelerate_config", "multi_gpu"]) == 0
    own = write_yaml(
        tmp_path / "own.yaml",
        compute_environment="LOCAL_MACHINE",
        distributed_type="MULTI_GPU",
        num_processes=2,
        use_cpu=False,
    )
    assert cli.main(["reward", f"--accelerate_config={own}", *minimal]) == 0
    assert cli.main(["reward", *minimal, "--accelerate_config", "single_gpu"]) == 0
    by_name, by_path, not_distributed = launched
    assert Path(by_name[0].config_file).name == "multi_gpu.yaml" and Path(by_name[0].config_file).is_file()
    assert by_name[1] == "8"
    assert (by_path[0].config_file, by_path[1]) == (own, "2")
    assert by_path[0].training_script_args == minimal
    # TRL's single_gpu.yaml says num_processes: 8 and starts one
    assert not_distributed[1] is None


def test_an_unknown_accelerate_config_names_those_there_are(launched, minimal, capsys):
    assert cli.main(["reward", *minimal, "--accelerate_config", "zero9"]) == 2
    error = capsys.readouterr().err
    assert "ConfigError: --accelerate_config zero9: there is no such file" in error
    assert "it ships cpu, fsdp2, multi_gpu, single_gpu, zero2, zero3." in error
    assert launched == []


@pytest.mark.parametrize("where", ["command line", "yaml"])
def test_an_argument_that_nobody_knows_is_refused(launched, minimal, tmp_path, capsys, where):
    if where == "yaml":
        argv = ["--config", write_yaml(tmp_path / "reward.yaml", lerning_rate=1e-4), *minimal]
    else:
        argv = [*minimal, "--lerning_rate", "1e-4"]
    assert cli.main(["reward", *argv]) == 2
    error = capsys.readouterr().err
    assert "Neither this script nor `accelerate launch` knows --lerning_rate (did you mean --learning_rate?)." in error
    assert launched == []


def test_a_value_without_an_argument_is_refused(launched, minimal, capsys):
    assert cli.main(["reward", "reward.yaml", *minimal]) == 2
    assert "'reward.yaml' is not the value of any argument; a YAML file is named with --config FILE." in (
        capsys.readouterr().err
    )
    assert launched == []


def test_an_abbreviation_is_not_guessed(launched, minimal, capsys):
    assert cli.main(["reward", *minimal, "--learning_rate_sh", "1e-4"]) == 2
    assert "--learning_rate_sh (did you mean --learning_rate_shared?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "part", "rest"),
    [
        (["--a", "1", "--b", "2"], [], ["--a", "1", "--b", "2"]),
        (["--a", "1", "--b", "2"], ["--a", "1", "--b", "2"], []),
        (["--seed", "2", "--n", "2", "--x"], ["--n", "2"], ["--seed", "2", "--x"]),
    ],
)
def test_without(argv, part, rest):
    assert launch.without(argv, part) == rest


def test_flags_from_config():
    args = ["--multi_gpu", "True", "--cpu", "False", "--num_processes", "2"]
    assert launch.flags_from_config(args, launch_command_parser()) == ["--multi_gpu", "--num_processes", "2"]


# -- the number of processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "leftover", "started", "asked"),
    [
        ({}, [], 1, None),
        ({launch.ASKED_PROCESSES: "2"}, [], 2, None),
        ({launch.ASKED_PROCESSES: "2"}, [], 1, "2 processes were asked for, 1 started"),
        ({"WORLD_SIZE": "2"}, [], 2, None),
        ({"WORLD_SIZE": "4"}, [], 1, "4 processes were asked for, 1 started"),
        ({}, ["--mixed_precision", "no", "--num_processes", "4"], 1, "4 processes were asked for, 1 started"),
        # trl-sharelora has already decided between command line and YAML
        ({launch.ASKED_PROCESSES: "1"}, ["--num_processes", "4"], 1, None),
        ({"ACCELERATE_USE_CPU": "True"}, [], 1, None),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, [], 1, "more than 1 processes were asked for"),
        # a cluster may set the address for a run on one GPU
        ({"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "10.0.0.1"}, [], 1, None),
    ],
)
def test_processes_asked_for_and_started(monkeypatch, environment, leftover, started, asked):
    for name in (launch.ASKED_PROCESSES, "WORLD_SIZE", "ACCELERATE_USE_CPU", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if asked is None:
        launch.check_processes(started, leftover)
    else:
        with pytest.raises(ConfigError, match=asked) as error:
            launch.check_processes(started, leftover)
        assert "torchrun --nproc_per_node" in str(error.value)


@pytest.mark.distributed
def test_accelerate_that_starts_one_process_instead_of_two_is_caught(minimal):
    """`accelerate launch --cpu --num_processes 2` starts one; typed by hand, so nobody told the script."""
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "MASTER_ADDR")}
    run = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
        + ["-m", RUN_SCRIPT, *minimal],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "ConfigError: more than 1 processes were asked for, 1 started." in run.stderr


# -- the script's start ----------------------------------------------------------------------------------------------


def test_the_script_refuses_arguments_of_accelerate(minimal):
    with pytest.raises(ConfigError, match="This script does not know --num_processes 2.*go before the script"):
        launch.parse_arguments(reward.make_parser(), [*minimal, "--num_processes", "2"])


def test_the_script_refuses_unknown_keys_of_the_yaml_file(minimal, tmp_path):
    config = write_yaml(tmp_path / "reward.yaml", lora_rank=4)
    with pytest.raises(ConfigError, match="knows --lora_rank"):
        launch.parse_arguments(reward.make_parser(), ["--config", config, *minimal])


def test_the_scripts_dataclasses(minimal):
    script_args, training_args, model_args, dataset_args = launch.parse_arguments(
        reward.make_parser(), [*minimal, "--share", "A", "--user_column", "worker", "--lora_r", "4", "--load_in_8bit"]
    )
    assert (script_args.share, script_args.train_common, script_args.dataset_name) == ("A", False, "d.jsonl")
    assert training_args.user_column == "worker"
    assert model_args.load_in_8bit and model_args.lora_r == 4
    assert dataset_args.datasets == []


def test_the_parser_as_a_subparser():
    from trl import TrlParser

    parser = TrlParser()
    assert reward.make_parser(parser.add_subparsers(parser_class=TrlParser)).prog.endswith(" reward")


# -- arguments to adapter and data -----------------------------------------------------------------------------------


def test_the_adapter_that_the_arguments_describe():
    model_args = ModelConfig(
        lora_r=32, lora_alpha=16, lora_dropout=0.1, lora_target_modules=["q_proj", "v_proj"], use_rslora=True
    )
    config = reward.get_sharelora_config(
        model_args, reward.ShareLoraScriptArguments(share="diagonal", train_common=True)
    )
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 16, 0.1)
    assert config.target_modules == {"q_proj", "v_proj"} and config.use_rslora
    assert (config.share, config.train_common) == ("diagonal", True)
    # TRL's default for lora_task_type is CAUSAL_LM, with which the head would be neither trained nor saved
    assert config.task_type == "SEQ_CLS"


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_target_parameters": ["experts.weight"]}])
def test_what_only_plain_lora_has_is_refused_by_name(option):
    with pytest.raises(UnsupportedError, match=f"{next(iter(option))}=.* leave it out"):
        reward.get_sharelora_config(ModelConfig(**option), reward.ShareLoraScriptArguments())


def test_no_dataset_is_refused(tmp_path):
    arguments = reward.make_parser().parse_args_and_config(
        ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--use_cpu"]
    )
    with pytest.raises(DataError, match="No data: give --dataset_name FILE"):
        reward.main(*arguments)


def test_no_model_is_refused(tmp_path):
    arguments = reward.make_parser().parse_args_and_config(
        ["--dataset_name", "d.jsonl", "--output_dir", str(tmp_path), "--use_cpu"]
    )
    with pytest.raises(ConfigError, match="No base model: give --model_name_or_path"):
        reward.main(*arguments)


def test_a_mixture_of_datasets_goes_first_and_is_split_once(tmp_path):
    from datasets import Dataset
    from helpers import preference_rows
    from trl import DatasetMixtureConfig
    from trl.scripts.utils import DatasetConfig

    path = tmp_path / "rows.parquet"
    rows = preference_rows(2, 20)
    Dataset.from_list(rows).to_parquet(path)
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig("parquet", data_files=str(path))], test_split_size=0.5)
    script_args = reward.ShareLoraScriptArguments(dataset_name="not read")
    train, test = reward.load_splits(script_args, mixture, ["train", "test"])
    # no row on both sides, none lost
    assert sorted([*train["chosen"], *test["chosen"]]) == sorted(row["chosen"] for row in rows)
    mixture.test_split_size = None
    [train] = reward.load_splits(script_args, mixture, ["train"])
    assert len(train) == 20
    with pytest.raises(DataError, match="The mixture has the splits \\['train'\\], not 'test'; set test_split_size"):
        reward.load_splits(script_args, mixture, ["train", "test"])


def test_a_local_file_and_a_stream(tmp_path):
    from datasets import IterableDataset
    from trl import DatasetMixtureConfig

    path = tmp_path / "rows.jsonl"
    path.write_text('{"user_id": "007", "chosen": "a", "rejected": "b"}\n', encoding="utf-8")
    script_args = reward.ShareLoraScriptArguments(dataset_name=str(path))
    [rows] = reward.load_splits(script_args, DatasetMixtureConfig(), ["train"])
    assert rows["user_id"][:] == ["007"]
    folder = reward.ShareLoraScriptArguments(dataset_name=str(tmp_path), dataset_streaming=True)
    [stream] = reward.load_splits(folder, DatasetMixtureConfig(), ["train"])
    assert isinstance(stream, IterableDataset) and next(iter(stream))["chosen"] == "a"


def test_tools_answer_unusable_input_in_one_line(tmp_path, capsys):
    missing = tmp_path / "missing.jsonl"
    argv = ["eval", "--model_name_or_path", str(tmp_path), "--dataset_name", str(missing)]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trl-sharelora: DataError: There is no file '{missing}'") and error.count("\n") == 1


def test_eval_of_a_directory_without_an_adapter(tmp_path, capsys):
    argv = [
        "eval",
        "--model_name_or_path",
        str(tmp_path),
        "--dataset_name",
        str(ROOT / "examples" / "data" / "toy_preferences.jsonl"),
    ]
    assert cli.main(argv) == 2
    assert (
        f"ConfigError: There is no adapter_config.json in '{tmp_path}', so it is no adapter;"
        in capsys.readouterr().err
    )
    argv[2] = str(tmp_path / "missing")
    assert cli.main(argv) == 2
    assert f"ConfigError: No adapter with its tokenizer can be read from '{argv[2]}'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "export"])
def test_tools_name_the_arguments_they_need(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command])
    assert end.value.code == 2
    assert "the following arguments are required" in capsys.readouterr().err


def test_the_parser_of_the_tools():
    args = cli.make_parser().parse_args(["eval", "--model_name_or_path", "a", "--dataset_name", "b"])
    assert isinstance(args, argparse.Namespace)
    assert (args.unseen, args.user_column, args.dtype) == ("raise", "user_id", "float32")


# -- methods by name ------------------------------------------------------------------------------------------------------


def run_reward(tmp_path, *more):
    """The script itself, on a tiny base and three users."""
    base = save_tiny("llama", tmp_path / "base")
    rows = [{**row, "split": "test" if number > 20 else "train"} for number, row in enumerate(preference_rows(3, 27))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "--model_name_or_path",
        base,
        "--dataset_name",
        str(tmp_path / "log.jsonl"),
        "--use_cpu",
        "--bf16",
        "false",
    ]
    argv += ["--output_dir", str(tmp_path / "rm"), "--lora_target_modules", "q_proj", "v_proj", "--report_to", "none"]
    argv += [
        "--per_device_train_batch_size",
        "7",
        "--eval_strategy",
        "epoch",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
    ]
    reward.main(*launch.parse_arguments(reward.make_parser(), [*argv, *more]))
    return tmp_path / "rm"


@pytest.mark.parametrize(
    ("method", "share"), [("psharelora-wu", "B"), ("lora-local", "none"), ("lora-global", None), ("share-a", "A")]
)
def test_a_method_by_name(tmp_path, capsys, method, share):
    out = run_reward(tmp_path, "--method", method)
    assert "3 users, 6 rows" in capsys.readouterr().out
    config = json.loads((out / "adapter_config.json").read_text())
    assert config.get("share") == share and config["peft_type"] == ("LORA" if share is None else "SHARELORA")
    assert (out / "warm-up" / "adapter_config.json").is_file() is (method in ("psharelora-wu", "share-a"))


def test_the_method_says_the_form(tmp_path):
    with pytest.raises(MethodError, match="method='psharelora-we' is unknown .did you mean 'psharelora-wu'"):
        run_reward(tmp_path, "--method", "psharelora-we")
    with pytest.raises(MethodError, match="share='AB'.*came with method='lora-local', which says all three itself"):
        run_reward(tmp_path, "--method", "lora-local", "--share", "AB")
    with pytest.raises(MethodError, match="--confidence came with method='lora-global', which has no users"):
        run_reward(tmp_path, "--method", "lora-global", "--confidence", "ellipsoid")


def test_the_form_of_the_arguments_without_a_method(tmp_path):
    out = run_reward(tmp_path, "--share", "none", "--personal_head", "--max_steps", "1")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["share"], config["personal_head"], config["init_users"]) == ("none", True, "common")
    out = run_reward(tmp_path, "--init_users", "independent", "--max_steps", "1")
    assert json.loads((out / "adapter_config.json").read_text())["init_users"] == "independent"
