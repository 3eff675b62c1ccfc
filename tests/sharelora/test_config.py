"""ShareLoraConfig: its bounds, its two files, and what TRL does to it."""

import functools
import json
from types import SimpleNamespace

import pytest
from helpers import tiny_model
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from trl.trainer.utils import disable_dropout_in_model

from trl_sharelora import ShareLoraConfig, UserRegistry
from trl_sharelora.errors import ConfigError, UserIdError
from trl_sharelora.sharelora import ShareLoraType
from trl_sharelora.sharelora.layer import AdapterDropout

from .reference import USERS, batch, share_model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r=0; the rank is a whole number of at least 1"),
        ({"r": -4}, "r=-4; the rank"),
        ({"r": 8.0}, "r=8.0; the rank"),
        ({"r": True}, "r=True; the rank"),
        ({"r": "8"}, "r='8'; the rank"),
        ({"r": 10**6}, "r=1000000; the rank"),
        ({"lora_alpha": 0}, "lora_alpha=0; a finite number above 0 is needed"),
        ({"lora_alpha": -1.0}, "lora_alpha=-1.0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan; a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"lora_alpha": True}, "lora_alpha=True"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0; a probability in \[0, 1\) is needed"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"lora_dropout": float("nan")}, "lora_dropout=nan"),
        ({"lora_dropout": None}, "lora_dropout=None"),
        ({"share": "C"}, "share='C' is unknown; one of 'B', 'A', 'AB', 'diagonal', 'none' is needed"),
        ({"share": "b"}, "share='b' is unknown"),
        ({"trained_users": -1}, "trained_users=-1; a number of rows, at least 0, or None is needed"),
        ({"trained_users": True}, "trained_users=True"),
        ({"trained_users": "8"}, "trained_users='8'"),
        ({"layers_pattern": "layers"}, "layers_pattern is set without layers_to_transform"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        ShareLoraConfig(**values)


def test_scaling():
    assert ShareLoraConfig(r=32, lora_alpha=16).scaling == 0.5
    assert ShareLoraConfig(r=4, lora_alpha=16, use_rslora=True).scaling == 8.0


def test_it_is_a_method_of_pefts():
    config = ShareLoraConfig()
    assert isinstance(config, PeftConfig)
    assert config.peft_type is ShareLoraType.SHARELORA
    assert config.peft_type == "SHARELORA" and hash(config.peft_type) == hash("SHARELORA")
    assert not config.is_prompt_learning


@pytest.mark.parametrize("users", [None, [], UserRegistry()])
def test_a_model_needs_users(users):
    with pytest.raises(ConfigError, match=r'has no users.*give them: ShareLoraConfig\(users=\["ann", "bob"\]\)'):
        get_peft_model(tiny_model(), ShareLoraConfig(task_type="SEQ_CLS", users=users))


def test_users_are_checked_where_they_are_given():
    with pytest.raises(UserIdError, match="blank"):
        ShareLoraConfig(users=["ann", " "])
    with pytest.raises(UserIdError, match="occurs twice"):
        ShareLoraConfig(users=["ann", "ann"])
    assert ShareLoraConfig(users=[7, "ann"]).users == UserRegistry(["7", "ann"])


def test_a_registry_is_kept_not_copied():
    """It grows with the data; the config, the router and the trainer hold the same one."""
    users = UserRegistry(["ann"])
    config = ShareLoraConfig(users=users)
    users.add(["bob"])
    assert config.users is users and config.to_dict()["num_users"] == 2


# -- the two files


def save(tmp_path, **values):
    ShareLoraConfig(**({"users": USERS, "target_modules": ["q_proj"]} | values)).save_pretrained(str(tmp_path))
    return json.loads((tmp_path / "adapter_config.json").read_text())


def test_round_trip(tmp_path):
    values = dict(
        r=5,
        lora_alpha=7.5,
        lora_dropout=0.25,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["x"],
        share="AB",
        train_common=True,
        use_rslora=True,
        layers_to_transform=[0, 3],
        layers_pattern="layers",
        modules_to_save=["score"],
        trainable_token_indices=[1, 2],
        task_type="SEQ_CLS",
        base_model_name_or_path="some/model",
        trained_users=3,
    )
    save(tmp_path, **values)
    loaded = ShareLoraConfig.from_pretrained(str(tmp_path))
    for name, value in values.items():
        expected = set(value) if name in ("target_modules", "exclude_modules") else value
        assert getattr(loaded, name) == expected, name
    assert loaded.users == UserRegistry(USERS) and loaded.num_users == 4
    assert loaded.peft_type == "SHARELORA"


def test_a_config_saved_before_the_trained_users_were_counted_loads(tmp_path):
    content = save(tmp_path)
    assert content.pop("trained_users") is None
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    assert ShareLoraConfig.from_pretrained(str(tmp_path)).trained_users is None


def test_the_json_holds_no_user_id(tmp_path):
    content = save(tmp_path, users=["ann.miller@example.org", "bob"])
    assert "users" not in content and content["num_users"] == 2
    assert "ann.miller" not in (tmp_path / "adapter_config.json").read_text()
    assert json.loads((tmp_path / "users.json").read_text())["users"] == ["ann.miller@example.org", "bob"]


def test_pefts_own_loader_gives_this_class(tmp_path):
    save(tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert type(config) is ShareLoraConfig and config.r == 8
    # PEFT reads one file only; a model cannot be made from that by mistake
    assert config.users is None and config.num_users == 4
    with pytest.raises(ConfigError, match="when read with ShareLoraConfig.from_pretrained"):
        PeftModel.from_pretrained(tiny_model(), str(tmp_path), config=config)


@pytest.mark.parametrize("damage", ["missing", "torn", "other_users", "not_text", "twice"])
def test_a_bad_users_file(tmp_path, damage):
    save(tmp_path)
    file = tmp_path / "users.json"
    message, error = {
        "missing": ("No users.json in .*its rows belong to nobody. Copy the file", UserIdError),
        "torn": ("is not a list of users.*torn or edited. Take it from a backup", UserIdError),
        "other_users": ("names 2 users, adapter_config.json 4: the files are of two different saves", ConfigError),
        "not_text": ("holds ids that are not text", UserIdError),
        "twice": ("occurs twice", UserIdError),
    }[damage]
    if damage == "missing":
        file.unlink()
    elif damage == "torn":
        file.write_text(file.read_text()[:-9])
    elif damage == "other_users":
        UserRegistry(["ann", "bob"]).save(tmp_path)
    else:
        file.write_text(json.dumps({"users": [1, 2, 3, 4] if damage == "not_text" else ["ann", "bob", "cat", "ann"]}))
    with pytest.raises(error, match=message):
        ShareLoraConfig.from_pretrained(str(tmp_path))
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(tiny_model(), str(tmp_path))


def test_another_methods_adapter_is_named(tmp_path):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="has a LoraConfig; one with a ShareLoraConfig is needed"):
        ShareLoraConfig.from_pretrained(str(tmp_path))


def test_a_subfolder(tmp_path):
    (tmp_path / "step-3").mkdir()
    save(tmp_path / "step-3")
    assert ShareLoraConfig.from_pretrained(str(tmp_path), subfolder="step-3").users.ids == USERS


def test_from_the_hub(tmp_path, monkeypatch):
    """Both files are fetched, with the caller's revision; the hub is replaced by a directory."""
    (tmp_path / "remote").mkdir()
    save(tmp_path / "remote")
    asked = []

    @functools.wraps(hf_hub_download)  # PEFT reads its signature
    def download(repo, file, **kwargs):
        asked.append((repo, file, kwargs.get("revision")))
        return str(tmp_path / "remote" / file)

    monkeypatch.setattr("peft.config.hf_hub_download", download)
    monkeypatch.setattr("trl_sharelora.sharelora.config.hf_hub_download", download)
    loaded = ShareLoraConfig.from_pretrained("someone/adapter", revision="abc")
    assert loaded.users.ids == USERS
    assert asked == [("someone/adapter", name, "abc") for name in ("adapter_config.json", "users.json")]


# -- TRL's disable_dropout


def test_dropout_survives_trls_disable_dropout_and_works_while_training_only():
    model = share_model(lora_dropout=0.5)
    disable_dropout_in_model(model)
    rates = [module.p for module in model.modules() if isinstance(module, AdapterDropout)]
    assert rates == [0.5] * 14  # 7 linear modules in 2 layers
    inputs, who = batch(), [0, 1, 2, 3, 0, 1]
    model.eval()
    still = model(**inputs, user_ids=who).logits
    assert still.equal(model(**inputs, user_ids=who).logits)
    model.train()
    first, second = model(**inputs, user_ids=who).logits, model(**inputs, user_ids=who).logits
    assert not first.equal(second) and not first.equal(still)
    model.eval()
    assert model(**inputs, user_ids=who).logits.equal(still)


def test_fields_have_help_for_the_command_line():
    fields = ShareLoraConfig.__dataclass_fields__
    own = [
        SimpleNamespace(name=name, help=fields[name].metadata.get("help")) for name in ShareLoraConfig.__annotations__
    ]
    assert [item.name for item in own if not item.help] == []
