"""One user as an ordinary LoRA: a process without this package computes the same rewards."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import tiny_causal, tiny_model
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sharelora.reference import SHARES, USERS, batch, randomise, relative_error, share_config, share_model

from trl_sharelora import export_user
from trl_sharelora.errors import AdapterMismatchError, ConfigError, UnknownUserError
from trl_sharelora.sharelora import ShareLoraAdamW, get_router


# float32 sums in another order: x (A' B') against (x A') B'
ROUNDING = 3e-6

CASES = {
    **{f"share_{share}": {"share": share} for share in SHARES},
    "rslora": {"use_rslora": True, "share": "AB"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "exclude_modules": {"exclude_modules": ["v_proj", "down_proj"]},
    "regex": {"target_modules": r".*layers\.0.*(q_proj|up_proj)"},
    "default_modules": {"target_modules": None},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [8, 40, 41]},
    "gpt2": {"arch": "gpt2"},
    "bert": {"arch": "bert", "share": "diagonal"},
    "bf16": {"bf16": True},
}

# the other process: transformers and peft, and not this package
PLAIN = """
import sys
import torch
from peft import PeftModel

sys.modules["trl_sharelora"] = None  # an import of it would fail
cases = torch.load(sys.argv[1], weights_only=False)
for case in cases:
    model = PeftModel.from_pretrained(case["base"], case["adapter"]).eval()
    for key, value in case["config"].items():
        assert getattr(model.peft_config["default"], key) == value, (case["name"], key)
    with torch.no_grad():
        case["found"] = model(**case["inputs"]).logits
    case["lora"] = sum("lora_A" in name for name, _ in model.named_parameters())
    del case["base"]
assert not any(name.startswith("trl_sharelora.") for name in sys.modules)
torch.save(cases, sys.argv[1])
"""


def make(arch="llama", bf16=False, **config):
    """A model as a training leaves it: all its tensors random, those of the tokens too."""
    base = tiny_model(arch).bfloat16() if bf16 else tiny_model(arch)
    model = share_model(arch, base=base, **config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return model


def test_invariant_5_plain_peft_computes_the_same(tmp_path):
    """All cases, exported from the model and from its directory, read by plain PEFT in one other process."""
    cases = []
    for name, values in CASES.items():
        model = make(**values)
        model.save_pretrained(tmp_path / name / "all")
        row = 2
        with torch.no_grad():
            expected = model(**batch(), user_ids=[row] * 6).logits
            others = model(**batch(), user_ids=[row - 1] * 6).logits
        assert relative_error(others, expected) > 0.01  # another user would be noticed
        for source, given in (("model", model), ("directory", tmp_path / name / "all")):
            adapter = tmp_path / name / source
            assert export_user(given, USERS[row], adapter) == adapter
            arch = values.get("arch", "llama")
            base = tiny_model(arch).bfloat16() if values.get("bf16") else tiny_model(arch)
            r = model.peft_config["default"].r
            plain = {"r": r, "lora_alpha": r, "peft_type": "LORA", "rank_pattern": {}, "alpha_pattern": {}}
            plain |= {"use_rslora": False, "layers_to_transform": None, "inference_mode": True}
            cases.append(
                {
                    "name": f"{name}-{source}",
                    "adapter": str(adapter),
                    "base": base,
                    "inputs": batch(),
                    "config": plain,
                    "expected": expected,
                }
            )
    torch.save(cases, tmp_path / "cases.pt")
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "cases.pt")], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr[-3000:]
    errors = {}
    for case in torch.load(tmp_path / "cases.pt", weights_only=False):
        assert case["lora"] > 0, case["name"]
        # a bf16 base rounds what is added to it
        limit = 0.03 if case["name"].startswith("bf16") else ROUNDING
        error = relative_error(case["found"].float(), case["expected"])
        if not error <= limit:
            errors[case["name"]] = error
    assert not errors


def test_from_the_model_and_from_its_directory_are_the_same_files(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "all")
    one, other = export_user(model, "bob", tmp_path / "one"), export_user(tmp_path / "all", "bob", tmp_path / "other")
    assert sorted(path.name for path in one.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("share", SHARES)
def test_invariant_5_the_factors_are_the_users_bit_by_bit(tmp_path, share):
    """A and B of one user by hand; the scaling is in B, and the rank of all modules is r."""
    model = make(share=share, use_rslora=True)
    tensors = load_file(export_user(model, "cat", tmp_path) / "adapter_model.safetensors")
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "bank")}
    assert len(tensors) == 2 * len(layers) + 1 == 29
    assert torch.equal(
        tensors["base_model.model.score.weight"],
        model.get_parameter("base_model.model.score.modules_to_save.default.weight"),
    )
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            assert A.dtype == B.dtype == torch.float32 and A.is_contiguous() and B.is_contiguous()
            assert A.shape == (4, layer.in_features) and B.shape == (layer.out_features, 4)
            common, own = layer.sharelora_common["default"].weight, layer.bank("default").weight[2]
            up = common + own if share == "A" else layer.sharelora_B["default"].weight
            up = up + own[:, layer.in_features :].T if share == "none" else up
            assert torch.equal(B, 3.0 * up)  # lora_alpha / sqrt(r) = 6 / 2
            if share == "B":
                assert torch.equal(A, common + own)
            elif share == "none":
                assert torch.equal(A, common + own[:, : layer.in_features])
            elif share == "A":
                assert torch.equal(A, layer.sharelora_A["default"].weight)
            elif share == "AB":
                torch.testing.assert_close(A, (common + own) @ layer.sharelora_A["default"].weight)
            else:
                torch.testing.assert_close(A, torch.diag(common + own) @ layer.sharelora_A["default"].weight)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and not config["use_rslora"]
    assert sorted(config["target_modules"]) == sorted(share_config().target_modules)
    assert config["modules_to_save"] == ["classifier", "score"]


def test_no_user_id_leaves(tmp_path):
    model = make(users=["ann.miller@example.org", "bob", "cat", "dan"])
    export_user(model, "ann.miller@example.org", tmp_path)
    assert not any(b"miller" in path.read_bytes() or b"bob" in path.read_bytes() for path in tmp_path.iterdir())


def test_an_exported_user_merges_and_trains_on(tmp_path):
    model = make()
    with torch.no_grad():
        expected = model(**batch(), user_ids=["dan"] * 6).logits
    export_user(model, "dan", tmp_path)
    merged = PeftModel.from_pretrained(tiny_model(), tmp_path).merge_and_unload().eval()
    with torch.no_grad():
        assert relative_error(merged(**batch()).logits, expected) <= 1e-5
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert sum(p.requires_grad for n, p in again.named_parameters() if "lora_" in n) == 28


def test_the_base_is_named_for_pefts_auto_classes(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = make()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    with torch.no_grad():
        expected = model(**batch(), user_ids=["ann"] * 6).logits
    export_user(model, "ann", tmp_path / "ann")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "ann", num_labels=1).eval()
    with torch.no_grad():
        assert relative_error(loaded(**batch()).logits, expected) <= ROUNDING


def test_a_policy_is_exported_too(tmp_path):
    config = share_config(task_type="CAUSAL_LM", share="A")
    model = randomise(get_peft_model(tiny_causal(), config)).eval()
    inputs = {"input_ids": batch()["input_ids"][:2], "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    plain = PeftModel.from_pretrained(tiny_causal(), export_user(model, "bob", tmp_path)).eval()
    with torch.no_grad():
        expected = model(**inputs, user_ids=["bob", "bob"]).logits
        assert relative_error(plain(**inputs).logits, expected) <= ROUNDING
    answers = model.generate(**inputs, user_ids=["bob", "bob"], max_new_tokens=5, do_sample=False)
    assert plain.generate(**inputs, max_new_tokens=5, do_sample=False).tolist() == answers.tolist()


def test_a_grown_user_and_the_active_of_two_adapters(tmp_path):
    model = make()
    model.peft_config["default"].users.add(["eve"])
    model.base_model.grow_users()
    with torch.no_grad():
        expected = model(**batch(), user_ids=["eve"] * 6).logits
        plain = PeftModel.from_pretrained(tiny_model(), export_user(model, "eve", tmp_path / "eve")).eval()
        assert relative_error(plain(**batch()).logits, expected) <= ROUNDING
    model.add_adapter("other", share_config(share="AB", users=model.peft_config["default"].users))
    model.set_adapter("other")
    randomise(model, seed=8).eval()
    with torch.no_grad():
        expected = model(**batch(), user_ids=["ann"] * 6).logits
        plain = PeftModel.from_pretrained(tiny_model(), export_user(model, "ann", tmp_path / "ann")).eval()
        assert relative_error(plain(**batch()).logits, expected) <= ROUNDING


def test_training_in_between_is_seen(tmp_path):
    model = make()
    optimizer = ShareLoraAdamW([p for p in model.parameters() if p.requires_grad], get_router(model), lr=0.1)
    before = load_file(export_user(model, "ann", tmp_path / "before") / "adapter_model.safetensors")
    model.train()(**batch(), user_ids=["ann"] * 6).logits.sum().backward()
    optimizer.step()
    after = load_file(export_user(model, "ann", tmp_path / "after") / "adapter_model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)


# -- what cannot be exported


@pytest.mark.parametrize("source", ["model", "directory"])
def test_an_unknown_user_writes_nothing(tmp_path, source):
    model = make()
    model.save_pretrained(tmp_path / "all")
    given = model if source == "model" else tmp_path / "all"
    with pytest.raises(UnknownUserError, match=r"1 unknown user\(s\): 'eve'. This adapter knows 4 users"):
        export_user(given, "eve", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_incomplete_directory_names_what_lacks(tmp_path):
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj"
    del tensors[f"{name}.sharelora_B.weight"], tensors[f"{name}.sharelora_common.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        AdapterMismatchError, match=f"{name} lacks sharelora_B, sharelora_common; the adapter's file is incomp"
    ):
        export_user(tmp_path, "ann", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterMismatchError, match=f"No adapter_model.safetensors in {tmp_path}"):
        export_user(tmp_path, "ann", tmp_path / "out")


def test_rows_that_do_not_fit_the_users(tmp_path):
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.sharelora_A.weight"
    tensors[name] = tensors[name][:3].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for user in ("ann", "dan"):
        with pytest.raises(AdapterMismatchError, match=r"layers.1.mlp.up_proj.sharelora_A has 3 rows for 4 users"):
            export_user(tmp_path, user, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_sharelora_adapter(tmp_path):
    plain = get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="has no active ShareLoRA adapter; give a PeftModel with one, or its directory"
    ):
        export_user(plain, "ann", tmp_path / "out")
    with pytest.raises(ConfigError, match="has no active ShareLoRA adapter"):
        export_user(tiny_model(), "ann", tmp_path / "out")
    with pytest.raises(ConfigError, match="has a LoraConfig; one with a ShareLoraConfig is needed"):
        export_user(tmp_path, "ann", tmp_path / "out")
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        export_user(tmp_path / "nowhere", "ann", tmp_path / "out")
    assert not (tmp_path / "out").exists()
