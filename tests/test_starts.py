"""A warm start is the plain LoRA exactly, for every user and every form of sharing; what does not fit is refused."""

import json

import pytest
import torch
from helpers import save_tiny, tiny_causal, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from trl_sharelora import ShareLoraConfig, use_users
from trl_sharelora.errors import ConfigError, MethodError
from trl_sharelora.starts import from_lora, warm_start


USERS = ["ann", "bob", "cat"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
INPUTS = {"input_ids": torch.arange(10, 28).reshape(3, 6), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
FORMS = [
    dict(share="B"),
    dict(share="A"),
    dict(share="AB"),
    dict(share="diagonal"),
    dict(share="none"),
    dict(share="none", personal_head=True),
    dict(share="B", bank="ram"),
]


def plain(folder, base=None, **config):
    """A LoRA with random factors, saved; the model."""
    values = dict(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=TARGETS)
    model = get_peft_model(tiny_model() if base is None else base, LoraConfig(**(values | config)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


def share(base=None, **config):
    values = dict(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=TARGETS, users=list(USERS))
    return get_peft_model(tiny_model() if base is None else base, ShareLoraConfig(**(values | config)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_user_starts_as_the_lora(form, tmp_path):
    expected = plain(tmp_path)(**INPUTS).logits
    model = share(**form)
    warm_start(model, tmp_path)
    with torch.no_grad():
        for who in (USERS, ["cat"] * 3, ["eve"] * 3):
            with use_users(model.eval(), who, unseen="common"):
                torch.testing.assert_close(model(**INPUTS).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_lora_becomes_an_adapter_with_a_row_per_user(causal, tmp_path):
    """From its directory alone, base and all; and saved and loaded again."""
    path = save_tiny("llama", tmp_path / "base", causal=causal)
    base = (tiny_causal if causal else tiny_model)()
    base.name_or_path = path
    expected = plain(tmp_path / "lora", base, task_type="CAUSAL_LM" if causal else "SEQ_CLS", use_rslora=True, lora_dropout=0.1)(**INPUTS).logits  # fmt: skip
    model = from_lora(tmp_path / "lora", USERS, share="AB", device="cpu")
    config = model.peft_config["default"]
    assert list(config.users) == USERS and config.share == "AB" and not model.training
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (4, 6, True, 0.1)
    model.save_pretrained(tmp_path / "saved")
    again = from_lora(tmp_path / "lora", USERS, base=(tiny_causal if causal else tiny_model)(), check_base=False)
    with torch.no_grad():
        for one in (model, again):
            with use_users(one, USERS):
                torch.testing.assert_close(one(**INPUTS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "saved" / "users.json").is_file()


def test_the_revision_of_the_base_stays(tmp_path, monkeypatch):
    path = save_tiny("llama", tmp_path / "base")
    base = tiny_model()
    base.name_or_path = path
    plain(tmp_path / "lora", base, revision="abc123")
    asked = []
    real = AutoModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(
        AutoModelForSequenceClassification,
        "from_pretrained",
        lambda *args, **kwargs: (asked.append(kwargs["revision"]), real(*args, **{**kwargs, "revision": "main"}))[1],
    )
    model = from_lora(tmp_path / "lora", USERS, device="cpu")
    assert asked == ["abc123"] and model.peft_config["default"].revision == "abc123"


def test_what_is_no_lora_or_has_no_base_is_refused(tmp_path):
    with pytest.raises(MethodError, match="is not the directory of a saved LoRA"):
        from_lora(tmp_path, USERS)
    share().save_pretrained(tmp_path / "ours")
    with pytest.raises(MethodError, match="a plain LoRA .LoraConfig. is needed"):
        from_lora(tmp_path / "ours", USERS)
    base = tiny_model()
    plain(tmp_path / "dora", use_dora=True)
    plain(tmp_path / "other", target_modules=["q_proj"], modules_to_save=["norm"])
    for name, message in (("dora", "use_dora"), ("other", "norm")):
        if name == "other":
            config = json.loads((tmp_path / name / "adapter_config.json").read_text())
            (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score"]}))
        with pytest.raises(MethodError, match=message):
            from_lora(tmp_path / name, USERS, base=base)
        assert not [key for key, _ in base.named_parameters() if "sharelora" in key or "modules_to_save" in key]
    plain(tmp_path / "lora", task_type="FEATURE_EXTRACTION", modules_to_save=["score"])
    with pytest.raises(ConfigError, match="task_type='FEATURE_EXTRACTION' .* give base=model"):
        from_lora(tmp_path / "lora", USERS)


def test_a_policy_needs_no_head(tmp_path):
    base = tiny_causal()
    expected = plain(tmp_path, base, task_type="CAUSAL_LM")(**INPUTS).logits
    model = share(tiny_causal(), task_type="CAUSAL_LM")
    warm_start(model, tmp_path)
    with use_users(model.eval(), USERS), torch.no_grad():
        torch.testing.assert_close(model(**INPUTS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "form", "message"),
    [
        (
            dict(r=2, lora_alpha=3),
            {},
            "has rank 2 and scaling 1.5, the adapter rank 4 and scaling 1.5.*Use r=2, lora_alpha=3",
        ),
        (dict(lora_alpha=8), {}, "rank 4 and scaling 2, the adapter rank 4 and scaling 1.5"),
        (dict(target_modules=["q_proj"]), {}, "4 modules of this adapter are not in it .*down_proj"),
        (dict(target_modules=[*TARGETS, "k_proj"]), {}, "2 of its modules are not adapted here .*k_proj"),
        (dict(use_dora=True), {}, "has use_dora, which ShareLoRA does not have"),
        (dict(bias="all"), {}, "has bias='all'"),
        (
            dict(init_lora_weights="pissa"),
            {},
            "init_lora_weights='pissa', for which PEFT changes the base's weights too",
        ),
        ({}, dict(modules_to_save=["norm"]), r"norm.weight is trained in full here and in the LoRA in .* not in it"),
        (dict(modules_to_save=["norm"]), {}, "brings base_model.model.*norm.weight, .*which has no place here"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_copied(lora, form, message, tmp_path):
    plain(tmp_path, **lora)
    model = share(**form)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MethodError, match=message):
        warm_start(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_base_is_refused_by_name_and_by_shape(tmp_path):
    plain(tmp_path, tiny_model(hidden_size=64))
    with pytest.raises(MethodError, match="q_proj: the LoRA in .* has factors of shapes .*It is of another base"):
        warm_start(share(), tmp_path)
    plain(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "meta/Llama"}))
    model = share()
    model.peft_config["default"].base_model_name_or_path = "org/Other"
    with pytest.raises(MethodError, match="was trained on 'meta/Llama', this model is 'org/Other'.*check_base=False"):
        warm_start(model, tmp_path)
    warm_start(model, tmp_path, check_base=False)
    model = share()
    model.peft_config["default"].base_model_name_or_path = "/local/copy/Llama"
    warm_start(model, tmp_path)


def test_damaged_missing_and_foreign_files(tmp_path):
    with pytest.raises(MethodError, match="is not the directory of a saved LoRA"):
        warm_start(share(), tmp_path)
    plain(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    state = load_file(weights)
    key = next(key for key in state if "lora_A" in key)
    save_file({**state, key: state[key] * float("nan")}, weights)
    with pytest.raises(MethodError, match="NaN or infinite numbers"):
        warm_start(share(), tmp_path)
    save_file({name: tensor for name, tensor in state.items() if "score" not in name}, weights)
    with pytest.raises(
        MethodError, match="score.weight is trained in full here.*A reward model's head must come along"
    ):
        warm_start(share(), tmp_path)
    share().save_pretrained(tmp_path / "share")
    with pytest.raises(MethodError, match="holds a ShareLoraConfig; a plain LoRA .* export_user"):
        warm_start(share(), tmp_path / "share")
    with pytest.raises(MethodError, match="has no ShareLoRA adapter"):
        warm_start(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    "form", [dict(), dict(bank="ram"), dict(init_users="independent"), dict(personal_head=True)], ids=str
)
def test_users_who_have_moved_are_not_overwritten(form, tmp_path):
    plain(tmp_path)
    model = share(**form)
    if form.get("bank") == "ram":
        from trl_sharelora.sharelora import get_router

        working_set = get_router(model).working_sets["default"]
        working_set.acquire(torch.tensor([1]))
        working_set.weight.data[working_set.slots_of([1])] = 1.0
        working_set.stepped(working_set.slots_of([1]))
    elif form.get("personal_head"):
        next(p for n, p in model.named_parameters() if "moves" in n).data[1] = 1.0
    elif not form:
        next(p for n, p in model.named_parameters() if "sharelora_A" in n).data[1] = 1.0
    with pytest.raises(MethodError, match="Users of this adapter have moves of their own already"):
        warm_start(model, tmp_path)
