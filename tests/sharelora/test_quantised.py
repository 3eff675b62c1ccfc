"""8-bit and 4-bit bases, on bitsandbytes' CPU kernels.

The 8-bit kernel rounds its input to whole numbers, so a difference of 1e-7 in one module can become one of 1e-2 behind the next.
Exact comparisons are therefore made module by module, and through the whole model where nothing 8-bit follows.
"""

import copy

import pytest
import torch
from helpers import keep_unpacked, save_tiny
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from trl_sharelora import export_user, use_users
from trl_sharelora.sharelora import ShareLoraAdamW, ShareLoraLayer, get_router
from trl_sharelora.sharelora.head import Float32Linear

from .reference import (
    SHARES,
    assert_close,
    batch,
    checkpointing,
    factors,
    gradients,
    plain_lora,
    reference_gradients,
    relative_error,
    rows_of,
    saved,
    share_model,
)


pytest.importorskip("bitsandbytes")

BITS = (8, 4)
WHO = torch.tensor([2, 0, 0, 2])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("base"))


def quantised(path, bits):
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )
    return keep_unpacked(
        AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, quantization_config=config, dtype=torch.float32
        )
    )


def rewards(model, inputs, who):
    return model(**inputs, user_ids=who).logits.squeeze(-1)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bits", BITS)
def test_invariant_1_a_quantised_module_is_plain_lora_per_user(path, bits, share):
    model = share_model(share=share, base=quantised(path, bits))
    plains = {user: plain_lora(model, user, share=share, base=quantised(path, bits)) for user in (0, 2)}
    generator = torch.Generator().manual_seed(0)
    layers = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, ShareLoraLayer):
            continue
        layers += 1
        assert type(layer.get_base_layer()).__name__ == ("Linear8bitLt" if bits == 8 else "Linear4bit")
        x = torch.randn(4, 5, layer.in_features, generator=generator)
        weights = torch.randn(4, 5, layer.out_features, generator=generator)
        with use_users(model, WHO):
            mixed = x.clone().requires_grad_()
            y = layer(mixed)
            (y * weights).sum().backward()
        for user, plain in plains.items():
            places = (WHO == user).nonzero().flatten()
            own = x[places].requires_grad_()
            out = plain.get_submodule(name)(own)
            (out * weights[places]).sum().backward()
            assert relative_error(y[places].detach(), out.detach()) <= 1e-5, name
            assert relative_error(mixed.grad[places], own.grad) <= 1e-5, name
    assert layers == 14
    expected = reference_gradients(share, model, plains, head=False)
    found = {n: g for n, g in gradients(model).items() if n in expected}
    assert_close(found, expected, share)


@pytest.mark.parametrize("bits", BITS)
def test_invariant_1_through_a_quantised_model(path, bits):
    """All checkpointing modes. In 8 bits only the last module is adapted, so that no rounding follows it."""
    last = dict(target_modules=["down_proj"], layers_to_transform=[1]) if bits == 8 else {}
    model = share_model(base=quantised(path, bits), **last)
    inputs, weights = batch(rows=4), torch.tensor([0.9, -1.3, 0.4, 1.7])
    plains = {user: plain_lora(model, user, base=quantised(path, bits), **last).train() for user in (0, 2)}
    expected = torch.zeros(4)
    for user, plain in plains.items():
        places = (WHO == user).nonzero().flatten()
        out = plain(**rows_of(inputs, places)).logits.squeeze(-1)
        (out * weights[places]).sum().backward()
        expected[places] = out.detach()
    for use_reentrant in (None, True, False):
        checkpointing(model, use_reentrant).zero_grad()
        found = rewards(model, inputs, WHO)
        (found * weights).sum().backward()
        assert relative_error(found.detach(), expected) <= 1e-5
        assert_close(gradients(model), reference_gradients("B", model, plains))


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_model_trains_saves_loads_and_exports(path, bits, tmp_path):
    base = prepare_model_for_kbit_training(
        quantised(path, bits), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = share_model(base=base, train_common=False).train()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert sum(isinstance(module, Float32Linear) for module in model.modules()) == 1
    banks = {id(m.bank("default").weight) for m in model.modules() if isinstance(m, ShareLoraLayer)}
    users = [p for p in trainable.values() if id(p) in banks]
    shared = [p for p in trainable.values() if id(p) not in banks]
    optimizer = ShareLoraAdamW(
        [{"params": users, "rowwise": True}, {"params": shared, "rowwise": False}], get_router(model), lr=1e-4
    )
    before = copy.deepcopy({name: tensor.detach() for name, tensor in model.state_dict().items()})
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        chosen, rejected = rewards(model, batch(rows=4), ["ann", "bob", "ann", "bob"]).chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = []
    for name, tensor in model.state_dict().items():
        if ".sharelora_A." in name:
            assert torch.equal(tensor[2:], before[name][2:]), name  # cat and dan had no data
            moved.append((tensor[:2] != before[name][:2]).flatten())
        elif ".sharelora_B." in name or "score.modules_to_save" in name:
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name
    # in bf16 it would be a third of them
    assert torch.cat(moved).float().mean() >= 0.99

    model.eval().save_pretrained(tmp_path / "rm")
    loaded = PeftModel.from_pretrained(quantised(path, bits), tmp_path / "rm").eval()
    who = ["dan", "ann", "bob", "cat"]
    with torch.no_grad():
        expected = rewards(model, batch(rows=4), who)
        assert torch.equal(rewards(loaded, batch(rows=4), who), expected)
        lora = PeftModel.from_pretrained(quantised(path, bits), export_user(tmp_path / "rm", "bob", tmp_path / "bob"))
        found = lora.eval()(**rows_of(batch(rows=4), slice(2, 3))).logits.squeeze()
    assert relative_error(found, expected[2]) <= (1e-5 if bits == 4 else 0.05)
    modules, _ = saved(model)
    for name, tensors in modules.items():
        down, up = factors("B", tensors, 1)
        own = lora.get_submodule(name)
        torch.testing.assert_close(
            own.lora_B["default"].weight @ own.lora_A["default"].weight, 1.5 * up @ down, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("bits", BITS)
def test_merging_into_a_quantised_base(path, bits):
    """8-bit weights hold a user well; 4-bit ones lose much of him when they are quantised again (so the docstring says)."""
    model = share_model(base=quantised(path, bits)).eval()
    inputs = batch(rows=4)
    with torch.no_grad():
        ann, bob = (rewards(model, inputs, [user] * 4) for user in ("ann", "bob"))
        merged = model.merge_and_unload(user="bob")(**inputs).logits.squeeze(-1)
    assert (merged - bob).norm() < (0.1 if bits == 8 else 1.0) * (ann - bob).norm()


def test_training_after_an_evaluation_still_has_its_gradient(path, monkeypatch):
    """Where there is AVX512-BF16, bitsandbytes repacks a 4-bit base at an evaluation for a kernel without a backward."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    config = BitsAndBytesConfig(load_in_4bit=True)
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, quantization_config=config)
    assert any(getattr(module, "support_avx512bf16_for_cpu", False) for module in base.modules())
    model = share_model(base=base, target_modules=["q_proj"])
    traces = []
    for _ in range(2):
        model.train().zero_grad()
        rewards(model, batch(rows=4), WHO).sum().backward()
        traces.append(gradients(model))
        with torch.no_grad():
            rewards(model.eval(), batch(rows=4), WHO)
    assert traces[0].keys() == traces[1].keys() and len(traces[0]) > 0
    for name, gradient in traces[0].items():
        assert torch.equal(traces[1][name], gradient), name
