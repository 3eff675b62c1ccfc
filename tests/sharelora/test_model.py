"""What a PEFT model does, done with ShareLoRA: wrap, save, load, switch, copy, merge, generate."""

import copy
import json

import pytest
import torch
from helpers import ARCHITECTURES, save_tiny, tiny_causal, tiny_model
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from trl_sharelora import ShareLoraConfig, UserRegistry, use_users
from trl_sharelora.errors import AdapterMismatchError, ConfigError, RoutingError, UnknownUserError, UnsupportedError
from trl_sharelora.sharelora import ShareLoraAdamW, ShareLoraLayer, get_router
from trl_sharelora.sharelora.head import Float32Linear

from .reference import (
    SHARES,
    TARGETS,
    USERS,
    batch,
    frozen_copy,
    plain_lora,
    randomise,
    relative_error,
    rows_of,
    share_config,
    share_model,
)


WHO = ["cat", "ann", "bob", "ann", "cat", "dan"]


@torch.no_grad()
def rewards(model, inputs=None, who=WHO, **kwargs):
    return model(**(batch() if inputs is None else inputs), user_ids=who, **kwargs).logits


def causal(base=None, **overrides):
    base = tiny_causal() if base is None else base
    values = dict(task_type="CAUSAL_LM", train_common=False)
    return randomise(get_peft_model(base, share_config(**(values | overrides)))).eval()


def share_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ShareLoraLayer)}


# -- wrapping


def test_print_trainable_parameters_by_hand(capsys):
    model = get_peft_model(
        tiny_model(), ShareLoraConfig(task_type="SEQ_CLS", r=4, users=USERS, target_modules=["q_proj", "v_proj"])
    )
    # 2 layers; q: 32 -> 32, v: 32 -> 16 (2 of 4 heads); moves of 4 users, B, and the head
    own = 2 * 2 * 4 * (4 * 32)
    trainable = own + 2 * (32 * 4 + 16 * 4) + 32
    frozen = 2 * 2 * (4 * 32)  # A_0
    assert model.get_nb_trainable_parameters()[0] == trainable
    base = sum(p.numel() for p in tiny_model().parameters())
    total = base + trainable + frozen
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,} || all params: {total:,} ||")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_default_target_modules_are_pefts(arch):
    model = get_peft_model(tiny_model(arch), ShareLoraConfig(task_type="SEQ_CLS", users=USERS))
    expected = set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[arch])
    assert {name.rpartition(".")[2] for name in share_layers(model)} == expected
    assert rewards(model).shape == (6, 1)


def test_which_modules():
    def names(**values):
        model = get_peft_model(tiny_model(), ShareLoraConfig(task_type="SEQ_CLS", users=USERS, **values))
        return sorted(name.removeprefix("base_model.model.model.") for name in share_layers(model))

    q, v = "layers.{}.self_attn.q_proj", "layers.{}.self_attn.v_proj"
    assert names(layers_to_transform=1, target_modules=["q_proj"]) == [q.format(1)]
    assert names(layers_to_transform=[0], layers_pattern="layers") == [q.format(0), v.format(0)]
    assert names(exclude_modules=["v_proj"]) == [q.format(0), q.format(1)]
    assert names(exclude_modules=r".*layers\.0.*") == [q.format(1), v.format(1)]
    assert names(target_modules=r".*\.1\..*\.v_proj") == [v.format(1)]
    assert len(names(target_modules="all-linear")) == 14


def test_layer_of_another_kind_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="Embedding is targeted. Name only linear modules in target_modules"):
        get_peft_model(
            tiny_model(), ShareLoraConfig(task_type="SEQ_CLS", users=USERS, target_modules=["embed_tokens"])
        )
    convolution = nn.Sequential(nn.Conv2d(3, 4, 2))
    with pytest.raises(UnsupportedError, match="Conv2d is targeted"):
        get_peft_model(convolution, ShareLoraConfig(users=USERS, target_modules=["0"]))


def test_fan_in_fan_out_is_found_for_conv1d():
    model = share_model("gpt2")
    for name, layer in share_layers(model).items():
        assert layer.fan_in_fan_out, name
        delta = layer.get_delta_weight("default", 1)
        assert delta.shape == layer.get_base_layer().weight.shape == (layer.in_features, layer.out_features)


# -- switching


def test_disable_adapter_is_the_base_and_needs_no_users():
    model, inputs = share_model().eval(), batch()
    expected = tiny_model().eval()(**inputs).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs, user_ids=WHO).logits, expected)
    assert not torch.allclose(rewards(model), expected)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("train_common", [True, False])
def test_a_frozen_common_start_stays_frozen(share, train_common):
    """PEFT switches gradients on again whenever adapters are disabled or set."""
    model = share_model(share=share, train_common=train_common)
    # with nothing shared, what both factors start from
    frozen = (".sharelora_common.", ".sharelora_B.") if share == "none" else (".sharelora_common.",)

    def check():
        for name, parameter in model.named_parameters():
            if ".sharelora_" in name:
                assert parameter.requires_grad is (train_common or not any(part in name for part in frozen)), name

    check()
    with model.disable_adapter():
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".sharelora_" in n)
    check()
    model.set_adapter("default")
    check()
    model.base_model.enable_adapter_layers()
    check()
    before = frozen_copy(model)
    optimizer = ShareLoraAdamW([p for p in model.parameters() if p.requires_grad], get_router(model), lr=0.1)
    model.train()(**batch(), user_ids=WHO).logits.sum().backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        if any(part in name for part in frozen):
            assert torch.equal(tensor, before[name]) is not train_common, name


def test_add_set_and_delete_adapters():
    model, inputs = share_model().eval(), batch()
    first = rewards(model)
    model.add_adapter("other", share_config(share="A", r=2, target_modules=["o_proj"]))
    assert torch.equal(rewards(model), first)  # not active yet
    # an adapter that is only added is not trained
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.set_adapter("other")
    randomise(model, seed=9)
    second = rewards(model)
    assert not torch.allclose(first, second)
    names = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and ".sharelora_" in n}
    assert names == {"other"}
    model.delete_adapter("default")
    assert torch.equal(rewards(model), second)
    assert not any(".default." in n for n, _ in model.named_parameters() if "sharelora" in n)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, tiny_model().eval()(**inputs).logits)


def test_a_reference_adapter_copied_by_names_as_trl_does():
    """TRL makes a reference of the start by copying parameters with `.default.` in their name (DPOTrainer)."""
    model = share_model(share="AB").eval()
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    default = rewards(model)
    model.set_adapter("ref")
    assert torch.equal(rewards(model), default)


def test_adapters_of_one_model_have_the_same_users():
    model = share_model().eval()
    before = rewards(model)
    for users in (["ann", "bob"], ["bob", "ann", "cat", "dan"]):
        with pytest.raises(ConfigError, match=f"has {len(users)} users, the model's other adapters have 4, or in ano"):
            model.add_adapter("other", share_config(users=users))
    assert list(model.peft_config) == ["default"]  # as if nothing had been tried
    assert torch.equal(rewards(model), before)
    with pytest.raises(ConfigError, match="has no users"):
        model.add_adapter("other", ShareLoraConfig(task_type="SEQ_CLS"))


# -- saving and loading (invariant 5)


def assert_same_tensors(one, other):
    first = {n: t for n, t in one.state_dict().items() if "sharelora" in n or "modules_to_save" in n}
    second = {n: t for n, t in other.state_dict().items() if "sharelora" in n or "modules_to_save" in n}
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(second[name], tensor), name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("share", SHARES)
def test_invariant_5_save_and_load(tmp_path, share, low_cpu_mem_usage):
    model = share_model(share=share, use_rslora=True).eval()
    model.save_pretrained(tmp_path)
    # the head of the base is another one, so it must come from the adapter
    base = tiny_model()
    nn.init.normal_(base.score.weight)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_same_tensors(model, loaded)
    assert loaded.peft_config["default"].users.ids == USERS
    # bits; where memory is not laid out alike (assigned tensors), a kernel may round the last one otherwise
    torch.testing.assert_close(rewards(loaded), rewards(model), rtol=0, atol=1e-6 if low_cpu_mem_usage else 0)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_invariant_5_save_and_load_on_a_bf16_base(tmp_path, low_cpu_mem_usage):
    model = share_model(base=tiny_model().bfloat16()).eval()
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(tiny_model().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_same_tensors(model, loaded)
    assert rewards(loaded).dtype == torch.float32
    assert torch.equal(rewards(loaded), rewards(model))


def test_invariant_5_load_for_training_goes_on(tmp_path):
    model = share_model(train_common=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert_same_tensors(model, loaded)
    one, other = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded))
    assert one == other
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_invariant_5_auto_classes(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    model = share_model(base=type(tiny_model()).from_pretrained(base, num_labels=1)).eval()
    model.save_pretrained(tmp_path / "rm")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1).eval()
    assert torch.equal(rewards(loaded), rewards(model))
    base = save_tiny("llama", tmp_path / "lm", causal=True)
    policy = causal(type(tiny_causal()).from_pretrained(base))
    policy.save_pretrained(tmp_path / "policy")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    assert torch.equal(rewards(loaded), rewards(policy))


def test_the_saved_directory_names_users_in_one_file_only(tmp_path):
    model = share_model(users=["ann.miller@example.org", "bob", "cat", "dan"])
    model.save_pretrained(tmp_path)
    with_name = [path.name for path in tmp_path.iterdir() if b"ann.miller" in path.read_bytes()]
    assert with_name == ["users.json"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_users"] == 4


def test_grown_users_are_saved_and_loaded(tmp_path):
    users = UserRegistry(["ann", "bob"])
    model = share_model(users=users).eval()
    before = rewards(model, who=[0, 1, 0, 1, 0, 1])
    users.add(["cat"])
    model.base_model.grow_users()
    assert torch.equal(rewards(model, who=[0, 1, 0, 1, 0, 1]), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert loaded.peft_config["default"].num_users == 3
    assert torch.equal(rewards(loaded, who=["cat"] * 6), rewards(model, who=["cat"] * 6))


@pytest.mark.parametrize("share", SHARES)
def test_users_without_a_row_are_saved_with_a_move_of_zero(tmp_path, share):
    """A registry may be ahead of the banks; what is saved must be whole all the same."""
    users = UserRegistry(["ann", "bob"])
    model = share_model(share=share, users=users).eval()
    users.add(["cat", "dan"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert loaded.peft_config["default"].users.ids == USERS
    with use_users(model, WHO, unseen="common"), torch.no_grad():
        assert torch.equal(rewards(loaded), model(**batch()).logits)
    for layer in share_layers(loaded).values():
        assert layer.bank("default").weight[2:].abs().sum() == 0


def test_another_adapter_from_a_directory(tmp_path):
    share_model(base=tiny_model(seed=0)).save_pretrained(tmp_path)
    model = get_peft_model(tiny_model(), share_config())
    model.load_adapter(str(tmp_path), "second")
    model.set_adapter("second")
    assert torch.equal(rewards(model.eval()), rewards(share_model().eval()))
    share_model(users=["x", "y"]).save_pretrained(tmp_path / "strangers")
    with pytest.raises(ConfigError, match="has 2 users, the model's other adapters have 4"):
        model.load_adapter(str(tmp_path / "strangers"), "third")
    assert torch.equal(rewards(model.eval()), rewards(share_model().eval()))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            {"hidden_size": 64},
            r"q_proj.sharelora_A.default.weight: \(4, 4, 32\) in the file, \(4, 4, 64\) in the model",
        ),
        ({"num_hidden_layers": 1}, r"layers.1.self_attn.q_proj.sharelora_A.weight: the model has no such tensor"),
        ({"num_hidden_layers": 3}, r"layers.2.self_attn.q_proj.sharelora_A.default.weight: missing in the file"),
        ({"num_labels": 2}, r"score.modules_to_save.default.weight: \(1, 32\) in the file, \(2, 32\) in the model"),
    ],
    ids=str,
)
def test_an_adapter_of_another_base_is_refused(tmp_path, base, message, low_cpu_mem_usage):
    share_model(target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match=message) as raised:
        PeftModel.from_pretrained(tiny_model(**base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert "with r=4, share='B', 4 users. Load it onto that base" in str(raised.value)


@pytest.mark.parametrize("damage", ["r", "share", "rows", "missing", "nan", "inf", "head"])
def test_a_damaged_adapter_names_its_tensors(tmp_path, damage):
    share_model(target_modules=["q_proj"]).save_pretrained(tmp_path)
    config_file, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = json.loads(config_file.read_text()), load_file(weights)
    name = "base_model.model.model.layers.1.self_attn.q_proj.sharelora_{}.weight"
    if damage == "r":
        config["r"] = 8
        message = r"sharelora_A.default.weight: \(4, 4, 32\) in the file, \(4, 8, 32\) in the model"
    elif damage == "share":
        config["share"] = "diagonal"
        message = r"sharelora_C.default.weight: missing in the file"
    elif damage == "rows":
        tensors[name.format("A")] = tensors[name.format("A")][:3]
        message = (
            r"1 tensor\(s\) differ:\n.*layers.1.*sharelora_A.default.weight: \(3, 4, 32\) in the file, \(4, 4, 32\)"
        )
    elif damage == "missing":
        del tensors[name.format("B")], tensors[name.format("common")]
        message = r"2 tensor\(s\) differ:\n.*layers.1.self_attn.q_proj.sharelora_B.default.weight: missing in the file"
    elif damage == "head":
        tensors["base_model.model.score.weight"][0, 3] = float("nan")
        message = r"score.modules_to_save.default.weight: NaN or Inf in the file"
    else:
        tensors[name.format("A")][2, 1, 5] = float(damage)
        message = r"1 tensor\(s\) differ:\n.*layers.1.*sharelora_A.default.weight: NaN or Inf in the file"
    config_file.write_text(json.dumps(config))
    save_file(tensors, weights)
    for low_cpu_mem_usage in (False, True):
        with pytest.raises(AdapterMismatchError, match=message):
            PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_many_mismatches_are_counted_not_listed(tmp_path):
    share_model().save_pretrained(tmp_path)  # 14 modules of three tensors, and the head
    with pytest.raises(AdapterMismatchError, match=r"43 tensor\(s\) differ:(\n.*){8}\n  ... and 35 more"):
        PeftModel.from_pretrained(tiny_model(hidden_size=64, intermediate_size=96), tmp_path)


# -- modules of all users


def test_modules_to_save_are_trained_in_full_and_saved(tmp_path):
    model = share_model(target_modules=["q_proj"], modules_to_save=["up_proj"])
    trainable = [n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert sorted(name.split(".modules_to_save")[0].rpartition(".")[2] for name in trainable) == [
        "score",
        "up_proj",
        "up_proj",
    ]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert_same_tensors(model, loaded)
    assert torch.equal(rewards(loaded), rewards(model.eval()))


def test_trained_tokens_are_shared_by_all_users(tmp_path):
    model = share_model(target_modules=["q_proj"], trainable_token_indices=[8, 9, 50])
    delta = [(n, p) for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    assert [p.shape for _, p in delta] == [(3, 32)] and delta[0][1].requires_grad
    with torch.no_grad():
        delta[0][1].add_(0.5)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(rewards(loaded), rewards(model))
    # by hand: the rows of the embedding are moved for everybody
    base = tiny_model()
    with torch.no_grad():
        base.get_input_embeddings().weight[[8, 9, 50]] += 0.5
    without = share_model(base=base, target_modules=["q_proj"]).eval()
    inputs = {"input_ids": torch.tensor([[8, 50, 20, 9]] * 2), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    expected = rewards(without, inputs, ["ann", "dan"])
    torch.testing.assert_close(rewards(model, inputs, ["ann", "dan"]), expected, rtol=1e-5, atol=1e-6)


# -- precision


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_a_bf16_base_has_a_float32_adapter_and_head(arch):
    model = share_model(arch, base=tiny_model(arch).bfloat16())
    dtypes = {
        kind: {p.dtype for n, p in model.named_parameters() if kind in n}
        for kind in ("sharelora_", "modules_to_save", "base_layer")
    }
    assert dtypes == {
        "sharelora_": {torch.float32},
        "modules_to_save": {torch.float32},
        "base_layer": {torch.bfloat16},
    }
    logits = model(**batch(), user_ids=WHO).logits
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_the_head_makes_no_ties_under_autocast():
    """Rewards of about 8 that float32 tells apart are equal in bf16, whose numbers are there 1/16 apart."""
    model = share_model().eval()
    head = next(module for module in model.modules() if isinstance(module, Float32Linear))
    hidden = torch.ones(20, 32, dtype=torch.bfloat16)
    hidden[:, 0] += torch.arange(20) * 2**-7  # exact in bf16
    with torch.no_grad():
        head.weight.fill_(0.25)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = head(hidden), nn.functional.linear(hidden, head.weight)
    assert found.dtype == torch.float32 and len(found.unique()) == 20
    assert plain.dtype == torch.bfloat16 and len(plain.unique()) < 20
    torch.testing.assert_close(found, hidden.double().sum(1, keepdim=True).float() / 4, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(**batch(), user_ids=WHO).logits.dtype == torch.float32
    # the base's own head is not touched
    assert all(type(m) is nn.Linear for n, m in model.named_modules() if n.endswith("original_module"))


def test_a_model_cast_as_a_whole_still_computes_its_head_in_float32():
    """Trainer's bf16_full_eval casts everything."""
    model = share_model().eval()
    expected = rewards(model)
    found = rewards(model.bfloat16())
    assert found.dtype == torch.float32 and relative_error(found, expected) < 0.1


def test_a_causal_head_is_left_alone():
    model = causal(modules_to_save=["lm_head"])
    assert not any(isinstance(module, Float32Linear) for module in model.modules())


# -- merging


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("share", SHARES)
def test_merging_one_user_is_his_forward(arch, share):
    model, inputs = share_model(arch, share).eval(), batch(rows=3)
    for user in ("bob", 3):
        expected = rewards(model, inputs, [user] * 3)
        merged = copy.deepcopy(model).merge_and_unload(user=user, safe_merge=True)
        assert type(merged) is type(tiny_model(arch))
        with torch.no_grad():
            assert relative_error(merged(**inputs).logits, expected) <= 1e-5
        assert not share_layers(merged)


def test_merging_several_users_needs_a_name():
    model = share_model()
    with pytest.raises(RoutingError, match=r'has 4 users.*Say whose: merge_and_unload\(user="ann"\)'):
        model.merge_and_unload()
    with pytest.raises(UnknownUserError, match=r"1 unknown user\(s\): 'eve'"):
        model.merge_and_unload(user="eve")
    for user in (4, -1, 1.0):
        with pytest.raises(UnknownUserError, match=rf"user={user!r}; an id \(text\) or a row from 0 to 3 is needed"):
            model.merge_and_unload(user=user)
    assert len(share_layers(model)) == 14  # still whole
    single = share_model(users=["ann"]).eval()
    expected = rewards(single, who=["ann"] * 6)
    with torch.no_grad():
        assert relative_error(single.merge_and_unload()(**batch()).logits, expected) <= 1e-5


def test_merge_adapter_and_unmerge():
    model = share_model().eval()
    expected = rewards(model)
    bobs = rewards(model, who=["bob"] * 6)
    with pytest.raises(RoutingError, match="Only one user can be merged"):
        model.merge_adapter()
    with use_users(model, ["bob"]):
        model.merge_adapter()
    assert relative_error(rewards(model, who=["bob"] * 6), bobs) <= 1e-5
    with pytest.raises(RoutingError, match=r"'bob' is merged into the base, but 5 row\(s\) belong to other users"):
        rewards(model)
    # bob's weights must not leave as ann's
    with pytest.raises(RoutingError, match="User 'bob' is merged into the base already. Unmerge first"):
        model.merge_and_unload(user="ann")
    model.unmerge_adapter()
    assert relative_error(rewards(model), expected) <= 1e-5


def test_merging_a_bf16_base_keeps_its_type():
    model = share_model(base=tiny_model().bfloat16()).eval()
    expected = rewards(model, who=["cat"] * 6)
    merged = model.merge_and_unload(user="cat")
    assert {p.dtype for n, p in merged.named_parameters() if n != "score.weight"} == {torch.bfloat16}
    with torch.no_grad():
        assert relative_error(merged(**batch()).logits, expected) < 0.05


@pytest.mark.parametrize("merge", [True, False])
def test_nothing_is_left_behind_after_unloading(merge):
    model = share_model()
    base = model.merge_and_unload(user="ann") if merge else model.unload()
    assert not base._forward_pre_hooks and not base._forward_hooks
    assert not share_layers(base) and not hasattr(base, "peft_config")
    base(**batch())
    if not merge:
        for name, tensor in tiny_model().state_dict().items():
            assert name == "score.weight" or torch.equal(base.state_dict()[name], tensor), name
    again = share_model(base=base, users=["x", "y"])
    assert len(base._forward_pre_hooks) == 1
    assert rewards(again, who=["x", "y"] * 3).shape == (6, 1)


# -- generating


def prompts(rows=4, length=5):
    """Prompts of one length: greedy decoding must not depend on padding here."""
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(8, 98, (rows, length), generator=generator)}


def generate(model, inputs, who=None, **kwargs):
    inputs = inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    given = {} if who is None else {"user_ids": who}
    return model.generate(**inputs, **given, max_new_tokens=6, eos_token_id=-1, **({"do_sample": False} | kwargs))


GENERATORS = ["cat", "ann", "dan", "ann"]


@pytest.mark.parametrize("arch", ["llama", "gptj", "gpt2"])
def test_greedy_generation_of_mixed_users_is_that_of_each_alone(arch):
    model = causal(tiny_causal(arch), arch=arch)
    inputs = prompts()
    together = generate(model, inputs, GENERATORS)
    for row, user in enumerate(GENERATORS):
        alone = generate(model, rows_of(inputs, slice(row, row + 1)), [user])
        assert together[row].tolist() == alone[0].tolist()
    plain = plain_lora(model, 0, arch, base=tiny_causal(arch), task_type="CAUSAL_LM").eval()
    assert generate(plain, rows_of(inputs, slice(1, 2)))[0].tolist() == together[1].tolist()
    # the users do differ, and an open route is enough
    assert generate(model, inputs, ["bob"] * 4).tolist() != together.tolist()
    with use_users(model, GENERATORS):
        assert generate(model, inputs).tolist() == together.tolist()


def test_beams_and_returned_sequences_multiply_the_users():
    model = causal()
    inputs = prompts()
    beams = generate(model, inputs, GENERATORS, num_beams=3, num_return_sequences=2)
    assert beams.shape == (8, 11)
    for row, user in enumerate(GENERATORS):
        alone = generate(model, rows_of(inputs, slice(row, row + 1)), [user], num_beams=3, num_return_sequences=2)
        assert beams[2 * row : 2 * row + 2].tolist() == alone.tolist()
    with use_users(model, GENERATORS):
        assert generate(model, inputs, num_beams=3, num_return_sequences=2).tolist() == beams.tolist()
    # samples: with next to no temperature each is the greedy answer of its own user
    greedy = generate(model, inputs, GENERATORS)
    samples = generate(model, inputs, GENERATORS, do_sample=True, temperature=1e-4, num_return_sequences=3)
    assert samples.tolist() == greedy.repeat_interleave(3, dim=0).tolist()
    config = copy.deepcopy(model.generation_config)
    config.num_beams = 3
    assert generate(model, inputs, GENERATORS, generation_config=config).shape == (4, 11)


def test_generation_without_or_with_wrong_users_raises():
    model = causal()
    with pytest.raises(RoutingError, match=r"A batch of 4 row\(s\) came without user ids"):
        generate(model, prompts())
    with pytest.raises(RoutingError, match="3 user ids came for 4 rows"):
        generate(model, prompts(), ["ann"] * 3)
    with pytest.raises(UnknownUserError, match=r"1 unknown user\(s\): 'eve'"):
        generate(model, prompts(), ["eve"] * 4)
    common = generate(model, prompts(), ["eve"] * 4, unseen="common")
    plain = tiny_causal()
    with model.disable_adapter():
        assert generate(model, prompts()).tolist() == generate(plain, prompts()).tolist()
    assert common.shape == (4, 11)


def test_generating_inside_another_models_context():
    policy, judge = causal(), share_model(users=["x", "y"]).eval()
    with use_users(policy, GENERATORS):
        answers = generate(policy, prompts())
        scores = rewards(judge, {"input_ids": answers}, ["x", "y", "y", "x"])
    assert generate(policy, prompts(), GENERATORS).tolist() == answers.tolist()
    assert torch.equal(rewards(judge, {"input_ids": answers}, ["x", "y", "y", "x"]), scores)


# -- other ways to hold a model


def test_a_whole_model_is_pickled_and_read_back(tmp_path):
    model = share_model().eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(rewards(loaded), rewards(model))
    assert get_router(loaded) is not get_router(model)
    with pytest.raises(RoutingError, match="without user ids"):
        loaded(**batch())


def test_a_copy_is_trained_by_itself():
    model = share_model().train()
    twin = copy.deepcopy(model)
    assert len({id(layer.router) for layer in share_layers(twin).values()}) == 1
    optimizer = ShareLoraAdamW(
        [{"params": [p for p in twin.parameters() if p.requires_grad]}], get_router(twin), lr=0.1
    )
    before = rewards(model.eval())
    twin(**batch(), user_ids=WHO).logits.sum().backward()
    optimizer.step()
    assert torch.equal(rewards(model), before)
    assert not torch.equal(rewards(twin.eval()), before)
    assert get_router(model).take_visited() == []


def test_layers_injected_into_a_model():
    base = inject_adapter_in_model(share_config(task_type=None), tiny_model())
    randomise(base).eval()
    expected = share_model(task_type=None).eval()
    assert torch.equal(rewards(base), rewards(expected))
    with use_users(base, WHO), torch.no_grad():
        assert torch.equal(base(**batch()).logits, rewards(expected))


def test_a_model_without_a_task_takes_user_ids():
    """The generic PeftModel calls the base directly."""
    model = share_model(task_type=None).eval()
    assert type(model) is PeftModel
    with use_users(model, WHO), torch.no_grad():
        assert torch.equal(model(**batch()).logits, rewards(model))


class Towers(nn.Module):
    """No transformers model at all: two linear modules on a vector per row."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 1)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_any_torch_model():
    torch.manual_seed(0)
    model = randomise(get_peft_model(Towers(), ShareLoraConfig(users=USERS, r=2, target_modules=["up", "down"])))
    x = torch.randn(4, 6)
    together = model(x, user_ids=["bob", "dan", "bob", "ann"])
    for row, user in enumerate(["bob", "dan", "bob", "ann"]):
        torch.testing.assert_close(model(x[row : row + 1], user_ids=[user])[0], together[row])


def test_an_encoder_decoder_model():
    config = T5Config(
        vocab_size=98,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(config)
    model = randomise(
        get_peft_model(base, ShareLoraConfig(task_type="SEQ_2_SEQ_LM", users=USERS, target_modules=["q", "v"]))
    ).eval()
    inputs = prompts() | {"attention_mask": torch.ones(4, 5, dtype=torch.long)}
    labels = torch.randint(1, 98, (4, 3))
    together = rewards(model, inputs | {"labels": labels}, GENERATORS)
    answers = model.generate(**inputs, user_ids=GENERATORS, max_new_tokens=4)
    for row, user in enumerate(GENERATORS):
        one = rows_of(inputs | {"labels": labels}, slice(row, row + 1))
        torch.testing.assert_close(rewards(model, one, [user])[0], together[row], rtol=1e-5, atol=5e-6)
        alone = model.generate(**rows_of(inputs, slice(row, row + 1)), user_ids=[user], max_new_tokens=4)
        assert alone[0].tolist() == answers[row].tolist()


def test_two_steps_of_training_through_torch_compile():
    """Visits are noted outside of the graph; else users' rows would silently stay."""
    torch._dynamo.reset()
    base = tiny_model(num_hidden_layers=1)
    model = share_model(base=base, target_modules=TARGETS["llama"][:1]).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    for one, forward in ((model, compiled), (twin, twin)):
        banks = [layer.bank("default").weight for layer in share_layers(one).values()]
        optimizer = ShareLoraAdamW([{"params": banks, "rowwise": True}], get_router(one), lr=0.1)
        for ids in (["ann", "bob"], ["bob", "cat"]):
            optimizer.zero_grad()
            forward(**batch(rows=2), user_ids=ids).logits.sum().backward()
            optimizer.step()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert optimizer.state[banks[0]]["step"].tolist() == [1, 2, 1, 0]
