"""The layer alone, against a slow loop over rows and tokens in float64."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers.pytorch_utils import Conv1D

from trl_sharelora import ShareLoraConfig, UserRegistry, use_users
from trl_sharelora.errors import RoutingError, UnsupportedError
from trl_sharelora.sharelora import Linear, Router

from .reference import SHARES, relative_error


USERS = ["ann", "bob", "cat"]
IN, OUT, R = 5, 7, 3


def make_base(kind):
    return Conv1D(OUT, IN) if kind is Conv1D else nn.Linear(IN, OUT)


def make_layer(share="B", base=None, seed=0, **config):
    users = UserRegistry(USERS)
    base = nn.Linear(IN, OUT) if base is None else base
    values = dict(r=R, lora_alpha=4.5, share=share, users=users, train_common=True, init_lora_weights=False)
    layer = Linear(base, "default", ShareLoraConfig(**(values | config)), Router(users))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layer


def slow(layer, x, who):
    """`W0 x + b + s * up (down x)` for each token of each row by itself, from the layer's tensors."""
    share = layer.share["default"]
    tensors = {
        factor: getattr(layer, f"sharelora_{factor}")["default"].weight
        for factor in ("A", "B", "C", "common")
        if "default" in getattr(layer, f"sharelora_{factor}")
    }
    base = layer.get_base_layer()
    W0 = base.weight.T if isinstance(base, Conv1D) else base.weight
    rows = []
    for row, user in zip(x, who, strict=True):
        tokens = []
        for token in row.reshape(-1, x.shape[-1]):
            if share == "none":
                h = (tensors["common"] + tensors["A"][user][:, : x.shape[-1]]) @ token
            elif share == "B":
                h = (tensors["common"] + tensors["A"][user]) @ token
            else:
                h = tensors["A"] @ token
            if share == "AB":
                h = (tensors["common"] + tensors["C"][user]) @ h
            elif share == "diagonal":
                h = (tensors["common"] + tensors["C"][user]) * h
            up = tensors["common"] + tensors["B"][user] if share == "A" else tensors["B"]
            up = up + tensors["A"][user][:, x.shape[-1] :].T if share == "none" else up
            tokens.append(W0 @ token + base.bias + layer.scaling["default"] * (up @ h))
        rows.append(torch.stack(tokens).reshape(*row.shape[:-1], OUT))
    return torch.stack(rows)


def gradients(layer, y, x, weights):
    tensors = [x, *(p for n, p in layer.named_parameters() if "base_layer" not in n)]
    return torch.autograd.grad((y * weights).sum(), tensors)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("shape", [(4, IN), (4, 6, IN), (4, 2, 3, IN)], ids=str)
def test_forward_and_gradients_in_float64(share, kind, shape):
    layer = make_layer(share, make_base(kind)).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    who = [2, 0, 2, 1]
    expected = slow(layer, x, who)
    weights = torch.randn_like(expected)
    with use_users(layer, torch.tensor(who)):
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(gradients(layer, found, x, weights), gradients(layer, expected, x, weights), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share", SHARES)
def test_float32_is_within_1e_5_of_float64(share):
    layer = make_layer(share)
    x = torch.randn(4, 6, IN, requires_grad=True)
    who = [2, 0, 2, 1]
    with use_users(layer, torch.tensor(who)):
        found = layer(x)
    weights = torch.randn_like(found)
    low = gradients(layer, found, x, weights)
    layer.double()
    x = x.detach().double().requires_grad_()
    expected = slow(layer, x, who)
    assert relative_error(found, expected) <= 1e-5
    for one, other in zip(low, gradients(layer, expected, x, weights.double()), strict=True):
        assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("share", SHARES)
def test_bf16_keeps_factors_and_gradients_in_float32(share, autocast):
    """With a bf16 base, and with a float32 one under autocast."""
    layer = make_layer(share)
    if not autocast:
        layer.base_layer.bfloat16()
    x = torch.randn(4, 6, IN, dtype=torch.float32 if autocast else torch.bfloat16, requires_grad=True)
    who = [2, 0, 2, 1]
    with use_users(layer, torch.tensor(who)), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    weights = torch.randn_like(found)
    low = gradients(layer, found, x, weights)
    assert all(gradient.dtype == torch.float32 for gradient in low[1:])
    layer.double()
    x = x.detach().double().requires_grad_()
    expected = slow(layer, x, who)
    assert relative_error(found, expected) < 0.01  # 8 bits of mantissa
    for one, other in zip(low, gradients(layer, expected, x, weights.double()), strict=True):
        assert relative_error(one, other) < 0.02


def test_no_user_leaks_into_another():
    """A NaN in one user's row of the bank, or in his input, stays in his rows of the output and of the gradient."""
    layer = make_layer()
    x = torch.randn(4, 6, IN)
    with torch.no_grad():
        layer.bank("default").weight[2, 0, 0] = float("nan")
    with use_users(layer, ["ann", "cat", "bob", "cat"]):
        y = layer(x)
    assert y[[0, 2]].isfinite().all() and y[[1, 3]].isnan().all()
    layer = make_layer()
    x[1, 2, 3] = float("nan")
    with use_users(layer, ["ann", "cat", "bob", "cat"]):
        layer(x).sum().backward()
    gradient = layer.bank("default").weight.grad
    assert gradient[:2].isfinite().all() and gradient[2].isnan().any()


@pytest.mark.parametrize("share", SHARES)
def test_dropout_is_of_the_adapters_input_and_only_while_training(share):
    layer = make_layer(share, lora_dropout=0.5)
    x = torch.randn(3, 4, IN)
    who = [0, 2, 1]
    layer.eval()
    with use_users(layer, torch.tensor(who)):
        still = layer(x)
        torch.testing.assert_close(still, slow(layer, x, who))
        layer.train()
        torch.manual_seed(7)
        dropped = layer(x)
        torch.manual_seed(7)
        mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    assert not torch.allclose(dropped, still)
    base = layer.base_layer
    torch.testing.assert_close(dropped, base(x) + slow(layer, x * mask, who) - base(x * mask))


def test_scaling_and_rslora():
    assert make_layer().scaling == {"default": 1.5}
    assert make_layer(use_rslora=True).scaling["default"] == pytest.approx(4.5 / 3**0.5)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_delta_weight_is_what_the_layer_adds(share, kind):
    layer = make_layer(share, make_base(kind), use_rslora=True).double()
    x = torch.eye(IN, dtype=torch.float64).unsqueeze(0)  # one row of IN unit tokens
    for user in range(3):
        with use_users(layer, torch.tensor([user])):
            added = (layer(x) - layer.base_layer(x)).squeeze(0)  # (in, out)
        delta = layer.get_delta_weight("default", user)
        torch.testing.assert_close(delta if kind is Conv1D else delta.T, added, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share", SHARES)
def test_merge_and_unmerge_in_float64_lose_nothing(share):
    layer = make_layer(share).double()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    before = layer.base_layer.weight.clone()
    expected = slow(layer, x, [1, 1])
    with use_users(layer, ["bob"]):
        layer.merge(safe_merge=True)
    assert layer.merged
    with use_users(layer, ["bob", "bob"]):
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(layer.base_layer.weight.data, before, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merging_needs_one_user():
    layer = make_layer()
    with pytest.raises(
        RoutingError, match='Only one user can be merged.*0 are named.*merge_and_unload\\(user="ann"\\)'
    ):
        layer.merge()
    with use_users(layer, ["ann", "bob"]), pytest.raises(RoutingError, match="2 are named"):
        layer.merge()
    with use_users(layer, ["eve"], unseen="common"), pytest.raises(RoutingError, match="Only one user can be merged"):
        layer.merge()
    with use_users(layer, ["ann"]):
        layer.merge()
    for nobody_or_other in ([], ["bob"]):
        with (
            use_users(layer, nobody_or_other),
            pytest.raises(RoutingError, match="'ann' is merged into the base alre"),
        ):
            layer.merge()


def test_merged_with_rows_of_others_raises():
    layer = make_layer()
    x = torch.randn(3, 2, IN)
    with use_users(layer, ["bob"]):
        layer.merge()
    with use_users(layer, ["bob", "ann", "cat"]):
        with pytest.raises(RoutingError, match=r"'bob' is merged into the base, but 2 row\(s\) belong to other users"):
            layer(x)
    with use_users(layer, ["bob", "eve", "bob"], unseen="common"):
        with pytest.raises(RoutingError, match=r"but 1 row\(s\) belong to other users. Unmerge first"):
            layer(x)
    with pytest.raises(RoutingError, match="without user ids"):
        layer(x)


def test_safe_merge_refuses_a_broken_user_and_leaves_the_base():
    layer = make_layer()
    with torch.no_grad():
        layer.bank("default").weight[0, 0, 0] = float("inf")
    before = layer.base_layer.weight.clone()
    with use_users(layer, ["ann"]), pytest.raises(ValueError, match="NaN or Inf in the merged weights"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


@pytest.mark.parametrize("share", SHARES)
def test_disabled_is_the_base_and_needs_no_route(share):
    layer = make_layer(share)
    x = torch.randn(2, 3, IN)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    with use_users(layer, ["ann"]):
        layer.merge()
    layer.enable_adapters(False)  # unmerges
    torch.testing.assert_close(layer(x), make_layer(share).base_layer(x))
    assert not layer.merged


def test_a_layer_without_an_active_adapter_is_its_base_and_needs_no_route():
    """Another adapter may have other target modules, and the last one may be deleted."""
    layer = make_layer()
    x = torch.randn(2, 3, IN)
    layer.set_adapter("elsewhere")
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.set_adapter("default")
    layer.delete_adapter("default")
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not [name for name, _ in layer.named_parameters() if "sharelora" in name]


@pytest.mark.parametrize(("share", "shape"), [("B", (R, IN)), ("A", (OUT, R)), ("AB", (R, R)), ("diagonal", (R,))])
def test_what_is_personal_and_how_it_starts(share, shape):
    """D_u = 0, and the common model starts as LoRA does: B zero, A uniform within 1 / sqrt(in)."""
    layer = Linear(
        nn.Linear(IN, OUT), "default", ShareLoraConfig(r=R, share=share, users=USERS), Router(UserRegistry(USERS))
    )
    weight = layer.bank("default").weight
    assert weight.shape == (3, *shape) and weight.abs().sum() == 0
    x = torch.randn(2, 4, IN)
    with use_users(layer, ["ann", "cat"]):
        assert torch.equal(layer(x), layer.base_layer(x))
    A = layer.sharelora_common["default"].weight if share == "B" else layer.sharelora_A["default"].weight
    assert 0 < A.abs().max() <= 1 / IN**0.5
    common = layer.sharelora_common["default"].weight
    if share == "AB":
        assert torch.equal(common, torch.eye(R))
    elif share == "diagonal":
        assert torch.equal(common, torch.ones(R))
    assert common.requires_grad is False and weight.requires_grad


def test_the_same_seed_draws_the_same_a_as_peft():
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as LoraLinear

    base = nn.Linear(IN, OUT)
    torch.manual_seed(3)
    plain = LoraLinear(base, "default", LoraConfig(r=R), r=R)
    torch.manual_seed(3)
    layer = Linear(base, "default", ShareLoraConfig(r=R, users=USERS), Router(UserRegistry(USERS)))
    assert torch.equal(layer.sharelora_common["default"].weight, plain.lora_A["default"].weight)


@pytest.mark.parametrize(
    "module", [nn.Embedding(9, 4), nn.Conv2d(3, 4, 2), nn.LayerNorm(4)], ids=lambda m: type(m).__name__
)
def test_other_modules_are_refused_by_name(module):
    # with the attributes by which peft reads the size of a linear module, so that only the type is amiss
    module.in_features = module.out_features = 4
    with pytest.raises(UnsupportedError, match=f"{type(module).__name__} is targeted. Name only linear modules"):
        Linear(module, "default", ShareLoraConfig(users=USERS), Router(UserRegistry(USERS)))


@pytest.mark.parametrize("share", SHARES)
def test_compiles_to_one_graph_that_serves_all_users(share):
    layer = make_layer(share)
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    x = torch.randn(2, 4, IN)
    for who in ([0, 1], [2, 2], [1, 0]):
        with use_users(layer, torch.tensor(who)):
            torch.testing.assert_close(compiled(x), slow(layer, x, who))
    assert graphs.frame_count == 1
    with use_users(layer, ["ann", "eve"], unseen="common"):  # a second graph: it masks the unseen rows
        torch.testing.assert_close(compiled(x), layer(x))
    assert graphs.frame_count == 2
    with pytest.raises(Exception, match="RoutingError"):
        compiled(x)


def test_the_printed_layer_names_its_parts():
    text = repr(make_layer(lora_dropout=0.1))
    assert text.startswith("sharelora.Linear(")
    assert "ResidentBank(users=3, move=(3, 5))" in text and "AdapterDropout(p=0.1)" in text
