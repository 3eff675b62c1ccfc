"""The examples, run as written: only the model and the data are replaced, by small local ones of the same kind.

Each configuration goes through `accelerate launch` in processes of its own, then the model is evaluated and a user exported
with the command line.
"""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from helpers import preference_rows, save_tiny
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from trl_sharelora import ShareLoraConfig, cli
from trl_sharelora.data import check_preference_rows, load_preferences


ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "configs"
USERS = ["ann", "bob", "007"]


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> Path:
    """24 rows of three users, a third of them for the test."""
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    rows = preference_rows(USERS, 24)
    for number, row in enumerate(rows):
        row["split"] = "test" if number >= 16 else "train"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_config(way: str, config: str, arch: str, preferences: Path, directory: Path, capfd) -> str:
    """Train two steps of a configuration and return what was printed."""
    base = save_tiny(arch, directory / "base")
    argv = ["--config", str(CONFIGS / config), "--model_name_or_path", base, "--dataset_name", str(preferences)]
    argv += ["--output_dir", str(directory / "model"), "--max_steps", "2", "--use_cpu", "--disable_tqdm", "True"]
    if way == "trl-sharelora":
        # starts `accelerate launch` itself
        status = cli.main(["reward", "--cpu", *argv])
    else:
        script = ["-m", "trl_sharelora.scripts.reward"] if way == "-m" else [str(ROOT / "examples" / "reward.py")]
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
        status = subprocess.run([*launch, *script, *argv]).returncode
    printed = "".join(capfd.readouterr())
    assert status == 0, printed[-4000:]
    return printed


def load(directory: Path, quantised: bool):
    quantization_config = BitsAndBytesConfig(load_in_8bit=True) if quantised else None
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        directory, num_labels=1, quantization_config=quantization_config
    )
    return model.eval(), AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def reward_of(model, tokenizer, text: str, **kwargs) -> float:
    """Reward of one text on its own: no padding, no batch."""
    return model(**tokenizer(text + tokenizer.eos_token, return_tensors="pt"), **kwargs).logits.item()


@pytest.mark.parametrize(
    ("way", "config", "arch"),
    [
        ("trl-sharelora", "reward_toy.yaml", "qwen3"),
        ("-m", "reward_gptj_6b_8bit.yaml", "gptj"),
        ("examples/reward.py", "reward_llama3_8b_8bit.yaml", "llama"),
    ],
)
def test_config_trains_evaluates_and_exports(way, config, arch, preferences, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = yaml.safe_load((CONFIGS / config).read_text(encoding="utf-8"))
    quantised = settings.get("load_in_8bit", False)

    printed = run_config(way, config, arch, preferences, tmp_path, capfd)
    assert "Training completed" in printed
    # bitsandbytes says this when its 8-bit kernel meets an input that is not float16, as on a CPU
    assert ("MatMul8bitLt" in printed) == quantised
    assert "3 users, 8 rows, 0 ties" in printed
    saved = tmp_path / "model"
    adapter = ShareLoraConfig.from_pretrained(saved)
    assert (adapter.peft_type, adapter.users.ids) == ("SHARELORA", USERS)
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (
        settings["lora_r"],
        settings["lora_alpha"],
        settings["lora_dropout"],
    )
    if quantised:
        assert adapter.target_modules == set(settings["lora_target_modules"])

    # evaluate: the same accuracies as from rewards computed one text at a time
    evaluated = tmp_path / "evaluated"
    argv = ["eval", "--model_name_or_path", str(saved), "--dataset_name", str(preferences), "--dataset_split", "test"]
    argv += ["--output_dir", str(evaluated), "--use_cpu"] + ["--load_in_8bit"] * quantised
    assert cli.main(argv) == 0
    assert "3 users, 8 rows" in capfd.readouterr().out
    model, tokenizer = load(saved, quantised)
    right: dict[str, list[bool]] = {user: [] for user in USERS}
    test_rows = load_preferences(preferences, split="test")
    for row in test_rows:
        chosen, rejected = (
            reward_of(model, tokenizer, row["prompt"] + row[side], user_ids=[row["user_id"]])
            for side in ("chosen", "rejected")
        )
        right[row["user_id"]].append(chosen > rejected)
    table = pd.read_parquet(evaluated / "users.parquet").set_index("user_id")
    assert {user: table.loc[user, "correct"] for user in USERS} == {user: sum(right[user]) for user in USERS}
    summary = json.loads((evaluated / "summary.json").read_text(encoding="utf-8"))
    assert summary["macro"] == pytest.approx(sum(sum(r) / len(r) for r in right.values()) / 3)

    # export: plain PEFT gives the same rewards
    exported = tmp_path / "exported"
    argv = ["export", "--adapter", str(saved), "--user", "007", "--output_dir", str(exported)]
    assert cli.main(argv) == 0
    assert type(PeftConfig.from_pretrained(exported)) is LoraConfig
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base",
        num_labels=1,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True) if quantised else None,
    )
    plain = PeftModel.from_pretrained(base, exported).eval()
    texts = [row["prompt"] + row["chosen"] for row in test_rows]
    rewards = [reward_of(plain, tokenizer, text) for text in texts]
    assert rewards == pytest.approx(
        [reward_of(model, tokenizer, text, user_ids=["007"]) for text in texts], rel=1e-5, abs=1e-5
    )
    assert max(rewards) - min(rewards) > 1e-3


def test_eval_of_users_without_training_data(preferences, tmp_path, capsys):
    """An unseen user is an error, or with --unseen common counted."""
    from datasets import Dataset

    from trl_sharelora import ShareLoraRewardConfig, ShareLoraRewardTrainer

    rows = preference_rows(["ann", "bob"], 8)
    trainer = ShareLoraRewardTrainer(
        model=save_tiny("llama", tmp_path / "base"),
        args=ShareLoraRewardConfig(output_dir=str(tmp_path / "model"), use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        peft_config=ShareLoraConfig(r=2),
    )
    trainer.save_model()
    argv = ["eval", "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(preferences), "--use_cpu"]
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert "UnknownUserError: 1 unknown user(s): '007'." in capsys.readouterr().err
    assert cli.main([*argv, "--unseen", "common"]) == 0
    assert "3 users, 24 rows, 0 ties, 8 rows of unseen users (common model)" in capsys.readouterr().out


def test_the_paper_configs_carry_the_papers_values_and_say_where_each_value_is_from():
    for name in ("reward_gptj_6b_8bit", "reward_llama3_8b_8bit"):
        text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        # appendix D.2
        assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] == 128
        assert (config["lora_r"], config["lora_alpha"], float(config["learning_rate"])) == (32, 16, 5e-5)
        assert (config["num_train_epochs"], config["max_length"], config["share"]) == (3, 2048, "B")
        assert config["lr_scheduler_type"] == "linear"
        # every key has its source, on its line or on the lines above it
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if line and line[0] not in "# ":
                source = line if ":" in line and line.split(":", 1)[1].strip() else "".join(lines[number - 2 : number])
                assert any(tag in source for tag in ("[paper]", "[code]", "[ours]")), line


def test_the_toy_data_are_sound():
    config = yaml.safe_load((CONFIGS / "reward_toy.yaml").read_text(encoding="utf-8"))
    for split in ("train", "test"):
        rows = load_preferences(ROOT / config["dataset_name"], split=split)
        check_preference_rows(rows, config["user_column"], split)
        assert len(set(rows["user_id"])) == 6
