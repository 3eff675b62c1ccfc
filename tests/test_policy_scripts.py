"""The policy commands and their example configurations, run as written: only models and data are replaced by small local ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from helpers import preference_rows, save_tiny
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sharelora import ShareLoraConfig, cli
from trl_sharelora.errors import ConfigError, PessimismError
from trl_sharelora.scripts import dpo, grpo, policy, ppo, reward, rloo
from trl_sharelora.scripts.launch import parse_arguments


ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "configs"
USERS = ["ann", "bob", "007"]
SCRIPTS = {"dpo": dpo, "rloo": rloo, "grpo": grpo, "ppo": ppo}
QUICK = ["--max_steps", "1", "--use_cpu", "--disable_tqdm", "True", "--report_to", "none"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    """A preference log, a small base and, by the command line's own script, a reward model with its ellipsoids."""
    folder = tmp_path_factory.mktemp("made")
    rows = preference_rows(USERS, 24)
    for number, row in enumerate(rows):
        row["split"] = "test" if number >= 16 else "train"
    log = folder / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = save_tiny("llama", folder / "base", causal=True)
    paths = {"log": str(log), "base": base, "reward": str(folder / "reward"), "bare": str(folder / "bare")}
    for name in ("reward", "bare"):
        argv = ["--config", str(CONFIGS / "reward_toy.yaml"), "--model_name_or_path", base, "--dataset_name", str(log)]
        argv += ["--output_dir", paths[name], "--eval_strategy", "no", "--learning_rate", "0.01", *QUICK]
        argv += ["--confidence", "ellipsoid"] if name == "reward" else []
        reward.main(*parse_arguments(reward.make_parser(), argv))
    return paths


def arguments(
    command: str, made: dict[str, str], output_dir: Path, config: str | None = None, *more: str
) -> list[str]:
    argv = ["--config", str(CONFIGS / (config or f"{command}_toy.yaml")), "--model_name_or_path", made["base"]]
    argv += ["--dataset_name", made["log"], "--output_dir", str(output_dir), *QUICK]
    if command != "dpo":
        argv += ["--reward_model_name_or_path", made["reward"], "--max_completion_length", "4"]
    return [*argv, *more]


def run(command: str, argv: list[str]) -> None:
    module = SCRIPTS[command]
    module.main(*parse_arguments(module.make_parser(), argv))


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("dpo", "dpo_toy.yaml"),
        ("dpo", "dpo_llama3_8b_8bit.yaml"),
        ("rloo", "rloo_llama3_8b_8bit.yaml"),
        ("grpo", "grpo_toy.yaml"),
        ("ppo", "ppo_toy.yaml"),
        ("ppo", "ppo_llama3_8b_8bit.yaml"),
    ],
)
def test_config_trains_saves_and_exports(command, config, made, tmp_path):
    settings = yaml.safe_load((CONFIGS / config).read_text(encoding="utf-8"))
    more = ["--gradient_accumulation_steps", "1"] + ["--per_device_train_batch_size", "4"] * (command != "dpo")
    run(command, arguments(command, made, tmp_path / "policy", config, *more))
    adapter = ShareLoraConfig.from_pretrained(tmp_path / "policy")
    assert (adapter.task_type, adapter.users.ids) == ("CAUSAL_LM", USERS)
    assert (adapter.r, adapter.lora_alpha) == (settings["lora_r"], settings["lora_alpha"])

    argv = ["export", "--adapter", str(tmp_path / "policy"), "--user", "007", "--output_dir", str(tmp_path / "one")]
    assert cli.main(argv) == 0
    assert type(PeftConfig.from_pretrained(tmp_path / "one")) is LoraConfig
    base = AutoModelForCausalLM.from_pretrained(made["base"])
    plain = PeftModel.from_pretrained(base, tmp_path / "one").eval()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    batch = AutoTokenizer.from_pretrained(made["base"])("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = model(**batch, user_ids=["007"]).logits, plain(**batch).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_command_starts_the_script_evaluates_and_prints_the_users(made, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    more = ["--eval_strategy", "steps", "--per_device_eval_batch_size", "4", "--num_generations_eval", "1", "--cpu"]
    assert cli.main(["rloo", *arguments("rloo", made, tmp_path, None, *more)]) == 0
    printed = capfd.readouterr().out
    assert "Training completed" in printed and "reward_worst_tenth" in printed and "'007'" in printed
    (table,) = (tmp_path / "users").glob("eval-step-1.parquet")
    assert pd.read_parquet(table)["n"].sum() == 8


def test_the_example_script_runs(made, tmp_path):
    argv = arguments("dpo", made, tmp_path, None, "--eval_strategy", "steps")
    code = subprocess.run([sys.executable, str(ROOT / "examples" / "dpo.py"), *argv], capture_output=True, text=True)
    assert code.returncode == 0, code.stderr[-3000:]
    assert "accuracy_mean" in code.stdout


def test_a_set_that_was_never_fitted_is_no_silent_plain_reward(made, tmp_path):
    argv = arguments("rloo", made, tmp_path)
    argv[argv.index(made["reward"])] = made["bare"]
    with pytest.raises(PessimismError, match="never fitted.*--confidence ellipsoid"):
        run("rloo", argv)
    assert not (tmp_path / "adapter_config.json").exists()
    run("rloo", [*argv, "--pessimism", "none"])  # asked for by name it is
    assert (tmp_path / "adapter_config.json").exists()


def test_a_saved_policy_is_trained_further_and_is_its_own_reference(made, tmp_path):
    run("dpo", arguments("dpo", made, tmp_path / "first", None, "--learning_rate", "0.01"))
    argv = arguments("rloo", made, tmp_path / "second", None, "--logging_steps", "1", "--learning_rate", "0.01")
    argv[argv.index(made["base"])] = str(tmp_path / "first")
    run("rloo", argv)
    state = (
        json.loads((tmp_path / "second" / "trainer_state.json").read_text())
        if (tmp_path / "second" / "trainer_state.json").exists()
        else None
    )
    assert state is None or state["log_history"][0]["kl"] == 0.0
    assert ShareLoraConfig.from_pretrained(tmp_path / "second").users.ids == USERS
    assert (tmp_path / "second" / "ref" / "adapter_config.json").is_file()


def test_what_cannot_work_is_refused(made, tmp_path):
    argv = arguments("rloo", made, tmp_path)
    place = argv.index("--reward_model_name_or_path")
    with pytest.raises(ConfigError, match="No reward: give --reward_model_name_or_path"):
        parser = rloo.make_parser()
        config = tmp_path / "no_reward.yaml"
        settings = yaml.safe_load((CONFIGS / "rloo_toy.yaml").read_text(encoding="utf-8"))
        settings.pop("reward_model_name_or_path")
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        bare = argv[:place] + argv[place + 2 :]
        bare[bare.index("--config") + 1] = str(config)
        rloo.main(*parse_arguments(parser, bare))
    with pytest.raises(ConfigError, match="reward_funcs came; DPO has no rewards"):
        run("dpo", [*arguments("dpo", made, tmp_path), "--reward_funcs", "helpers.WORDS"])
    with pytest.raises(ConfigError, match="there is no such function"):
        policy.import_function("helpers.no_such_function")
    assert policy.import_function("helpers.tiny_tokenizer").__name__ == "tiny_tokenizer"


def test_confidence_and_calibrate(made, tmp_path, capsys):
    common = ["--dataset_name", made["log"], "--use_cpu"]
    bare = ["--model_name_or_path", made["bare"]]
    assert cli.main(["calibrate", *bare, *common, "--dataset_split", "test"]) == 2
    assert "never fitted" in capsys.readouterr().err
    for kind in ("ellipsoid", "heads"):
        assert cli.main(["confidence", *bare, *common, "--dataset_split", "train", "--kind", kind]) == 0
        assert (Path(made["bare"]) / "confidence" / f"{kind}.json").is_file()
    argv = ["calibrate", *bare, *common, "--dataset_split", "test", "--coverage", "0.7", "--output_dir", str(tmp_path)]
    assert cli.main(argv) == 0
    content = json.loads((tmp_path / "calibration.json").read_text())
    assert content["coverage"] >= 0.7 and content["pessimism_coefficient"] >= 0 and content["comparisons"] == 8
    assert cli.main(["eval", *bare, *common, "--dataset_split", "test", "--confidence", "ellipsoid"]) == 0
    assert "from the narrowest to the widest quarter" in capsys.readouterr().out


def test_the_walk_goes_from_a_log_to_an_exported_user(made, tmp_path):
    rows = [json.loads(line) for line in Path(made["log"]).read_text(encoding="utf-8").splitlines()]
    log = tmp_path / "log.jsonl"
    for number, row in enumerate(rows):
        row["split"] = ("train", "validation", "test")[number // 3 % 3]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    environment = os.environ | {"OUT": str(tmp_path / "out"), "STEPS": "1", "PYTHON": sys.executable}
    walk = subprocess.run(
        ["bash", str(ROOT / "examples" / "walk.sh"), str(log), made["base"]],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert walk.returncode == 0, walk.stdout[-2000:] + walk.stderr[-3000:]
    assert walk.stdout.rstrip().endswith(f"Everything is in {tmp_path / 'out'}.")
    assert walk.stdout.count("\n== ") == 6 and "his own:" in walk.stdout and "reward_worst_tenth" in walk.stdout
    assert type(PeftConfig.from_pretrained(tmp_path / "out" / "one_user")) is LoraConfig
