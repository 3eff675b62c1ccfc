"""A score head for each user, and starts drawn for each: against plain heads and against LoRA's own draw."""

import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model

from trl_sharelora import add_users, export_user, use_users
from trl_sharelora.errors import ConfigError, RoutingError
from trl_sharelora.sharelora import ShareLoraLayer
from trl_sharelora.sharelora.head import PersonalHead, keep_in_float32

from .reference import TARGETS, USERS, R, batch, plain_lora, randomise, share_config, share_model


WHO = ["ann", "cat", "cat", "bob", "ann", "dan"]


def head_of(model):
    return next(module for module in model.modules() if isinstance(module, PersonalHead))


def personal(share="none", **config):
    return share_model(share=share, personal_head=True, **config)


def rewards(model, inputs, who=WHO):
    with use_users(model, who), torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("share", ["B", "none"])
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_each_row_has_its_own_users_head(share, arch):
    """One plain peft LoRA model per user, his factors and his head copied into it."""
    model = share_model(arch, share, personal_head=True)
    inputs, head = batch(), head_of(model)
    expected = torch.zeros(6, 1)
    for row, user in enumerate(WHO):
        plain = plain_lora(model, USERS.index(user), arch, share)
        with torch.no_grad():
            target = next(p for n, p in plain.named_parameters() if n.endswith("modules_to_save.default.weight"))
            target.copy_(head.weight + head.moves.weight[USERS.index(user)])
            expected[row] = plain.eval()(**{key: value[row : row + 1] for key, value in inputs.items()}).logits
    torch.testing.assert_close(rewards(model, inputs), expected, rtol=1e-5, atol=1e-6)


def test_only_the_users_own_heads_are_trained_unless_the_common_start_is():
    for train_common in (False, True):
        model = personal(train_common=train_common)
        head = head_of(model)
        names = {n.rpartition("modules_to_save.default.")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert ("weight" in names) is train_common and "moves.weight" in names
        with model.disable_adapter():  # PEFT makes all of a head trainable again
            pass
        with use_users(model, WHO):
            model.train()(**batch()).logits.sum().backward()
        assert head.moves.weight.grad[USERS.index("bob")].any()
        assert (head.weight.grad is not None and head.weight.grad.any().item()) is train_common


def test_gradients_stay_with_their_users():
    model = personal()
    with use_users(model, ["ann"] * 6):
        model.train()(**batch()).logits.sum().backward()
    gradient = head_of(model).moves.weight.grad
    assert gradient[0].any() and not gradient[1:].any()


def test_a_route_is_needed():
    head = head_of(personal())
    with pytest.raises(RoutingError, match="no user ids came to the score head for 3 rows"):
        head(torch.zeros(3, 32))


def test_save_load_export_merge_and_grow(tmp_path):
    model, inputs = personal(), batch()
    expected = rewards(model, inputs)
    model.save_pretrained(tmp_path / "rm")
    loaded = PeftModel.from_pretrained(
        tiny_model(seed=5), tmp_path / "rm"
    )  # another base: rewards differ, heads do not
    assert torch.equal(head_of(loaded).weight, head_of(model).weight)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "rm")
    assert torch.equal(rewards(loaded, inputs), expected)
    for source in (loaded, tmp_path / "rm"):
        export_user(source, "cat", tmp_path / "cat")
        plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "cat").eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(**inputs).logits[1:3], expected[1:3], rtol=1e-5, atol=1e-6)
    add_users(loaded, ["eve"])
    common = rewards(loaded, inputs, ["eve"] * 6)
    with use_users(loaded, torch.full((6,), -1), unseen="common"), torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, common, rtol=1e-6, atol=1e-7)
    assert torch.equal(rewards(loaded, inputs), expected)
    merged = loaded.merge_and_unload(user="cat")
    assert not any(isinstance(module, PersonalHead | ShareLoraLayer) for module in merged.modules())
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(**inputs).logits[1:3], expected[1:3], rtol=1e-5, atol=1e-5)


def test_independent_starts_are_draws_on_loras_scale():
    """`init_users="independent"`: the model is its base, all A_u differ, and are spread as LoRA draws A."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), share_config(init_users="independent"))
    inputs = batch()
    with torch.no_grad():
        expected = tiny_model().eval()(**inputs).logits
    assert torch.equal(rewards(model, inputs), expected)
    plain = get_peft_model(tiny_model(), LoraConfig(r=R, target_modules=TARGETS["llama"], task_type="SEQ_CLS"))
    for name, layer in model.named_modules():
        if isinstance(layer, ShareLoraLayer):
            own = layer.sharelora_common["default"].weight + layer.bank("default").weight
            limit = layer.in_features**-0.5
            assert float(own.detach().abs().max()) <= limit + 1e-6
            spread = dict(plain.named_parameters())[f"{name}.lora_A.default.weight"].std()
            for one in range(len(USERS)):
                assert float(own[one].std()) == pytest.approx(float(spread), rel=0.25)
                assert not any(torch.allclose(own[one], own[other]) for other in range(one))
    together = get_peft_model(tiny_model(), share_config())
    layer = next(m for m in together.modules() if isinstance(m, ShareLoraLayer))
    assert not layer.bank("default").weight.any()  # the authors' code: all equal


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="init_users='independent' came with share='A'"):
        share_config(share="A", init_users="independent")
    with pytest.raises(ConfigError, match="init_users='random' is unknown"):
        share_config(init_users="random")
    with pytest.raises(ConfigError, match="personal_head=True came with bank='mmap'"):
        share_config(personal_head=True, bank="mmap")
    with pytest.raises(ConfigError, match="only a reward model has a score head"):
        share_config(personal_head=True, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="'row' came with share='none'"):
        share_config(share="none", bank="ram", bank_second_moment="row")
    with pytest.raises(ConfigError, match="task_type=None for a LlamaForSequenceClassification, of which no head"):
        get_peft_model(tiny_model(), share_config(task_type=None, personal_head=True))
    # other modules trained in full stay everybody's
    model = get_peft_model(tiny_model(), share_config(personal_head=True, modules_to_save=["norm", "embed_tokens"]))
    assert sum(isinstance(module, PersonalHead) for module in model.modules()) == 1
    head = torch.nn.Embedding(3, 2)
    keep_in_float32(head)
    model = share_model()
    with pytest.raises(ConfigError, match=r"score head \(Embedding\) has no plain linear module"):
        model.base_model._make_personal(head, "default")
    randomise(model)


def test_users_who_were_added_to_the_registry_alone_are_saved_as_the_common_model(tmp_path):
    model, inputs = personal(), batch()
    expected = rewards(model, inputs)
    model.peft_config["default"].users.add(["eve"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(rewards(loaded, inputs), expected) and len(head_of(loaded).moves.weight) == 5
    assert not head_of(loaded).moves.weight[4].any()
