"""Shrink and Expand around a base, against the plain form and a loop in float64: values, gradients, and what is in place."""

import contextlib

import pytest
import torch
from helpers import tiny_model
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from trl_sharelora import ShareLoraConfig, use_users
from trl_sharelora.sharelora import ResidentBank, get_router
from trl_sharelora.sharelora.sandwich import project

from .reference import SHARES, batch, randomise, relative_error, share_config
from .test_layer import slow


USERS = [f"user{number}" for number in range(5)]
IN, OUT, R = 6, 7, 3
WHO = [2, 0, 2, 4]
STORES = ("resident", "ram")


class Wrapped(nn.Module):
    """One module, so that a store is connected as in a whole model."""

    def __init__(self, base):
        super().__init__()
        self.linear = base

    def forward(self, x):
        return self.linear(x)


# with nothing shared both factors are the row's own, and the plain form is what is computed
SANDWICHED = SHARES[:4]


def make_model(share="B", base=None, bank="resident", seed=0, **config):
    base = nn.Linear(IN, OUT, bias=False) if base is None else base
    values = dict(r=R, lora_alpha=4.5, train_common=True, target_modules=["linear"], users=list(USERS))
    model = get_peft_model(Wrapped(base), ShareLoraConfig(share=share, bank=bank, **(values | config)))
    generator = torch.Generator().manual_seed(seed)
    layer = model.base_model.model.linear
    shapes = {"B": (R, IN), "A": (OUT, R), "AB": (R, R), "diagonal": (R,), "none": (R, IN + layer.out_features)}
    rows = 0.5 * torch.randn(len(USERS), *shapes[share], generator=generator)
    with torch.no_grad():
        for _, parameter in sorted(layer.named_parameters()):
            if parameter.is_floating_point() and parameter is not getattr(layer.bank("default"), "weight", None):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    if bank == "resident":
        layer.bank("default").weight.data.copy_(rows)
    else:
        working_set = layer.bank("default").working_set
        records = torch.zeros(len(USERS), working_set.layout.record_bytes, dtype=torch.uint8)
        working_set.layout.split(records)[1].copy_(rows.flatten(1))
        working_set.store.write(range(len(USERS)), records)
    return model.train(), layer


def zero(model, layer):
    model.zero_grad()
    working_set = getattr(layer.bank("default"), "working_set", None)
    if working_set is not None:
        working_set.zero_gradient()


def users_gradient(layer):
    """Gradient of the users' moves `(users, ...)`; of a store the rows that are in, the others are zero."""
    bank = layer.bank("default")
    if isinstance(bank, ResidentBank):
        return bank.weight.grad.clone()
    working_set = bank.working_set
    gradient = torch.zeros(len(USERS), *bank.shape)
    for row, slot in working_set._slot_of.items():
        gradient[row] = working_set.gradient[slot].reshape(bank.shape)
    return gradient


def all_gradients(layer, x):
    shared = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None and "base_layer" not in n}
    if isinstance(layer.bank("default"), ResidentBank):
        own = [n for n, p in layer.named_parameters() if p is layer.bank("default").weight]
        shared = {n: g for n, g in shared.items() if n not in own}
    return {**shared, "users": users_gradient(layer), **({} if x.grad is None else {"x": x.grad.clone()})}


def plain(layer, x, route):
    """The plain form: the base's output, then gather, bmm and add."""
    return layer.reference("default", x, layer.base_layer(x), route)


def compare(model, layer, x, limit=1e-6, weights=None, context=contextlib.nullcontext, who=WHO):
    """The sandwich and the plain form on the same input: outputs and all gradients."""
    results = []
    for call in (lambda x, route: layer(x), lambda x, route: plain(layer, x, route)):
        zero(model, layer)
        own = x.detach().clone().requires_grad_(x.requires_grad)
        torch.manual_seed(5)
        with use_users(model, torch.tensor(who)) as route, context():
            y = call(own, route)
            if weights is None:
                weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
            (y.float() * weights).sum().backward()
        results.append((y.detach(), all_gradients(layer, own)))
    (y, found), (expected_y, expected) = results
    assert y.dtype == expected_y.dtype and relative_error(y, expected_y) <= limit
    assert found.keys() == expected.keys() and len(found) >= 3
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype and found[name].shape == gradient.shape
        assert gradient.any() and relative_error(found[name], gradient) <= limit, name
    return y, found


def spy(layer):
    """Where the base's output and its gradient of x lie: data pointers, noted at the base itself."""
    seen = {}
    real = layer.base_layer.forward

    def forward(x):
        seen["x"] = x.data_ptr()
        if x.requires_grad:
            x.register_hook(lambda dx: seen.update(dx=dx.data_ptr()))
        y = real(x)
        seen["y"] = y.data_ptr()
        return y

    layer.base_layer.forward = forward
    return seen


# -- values and gradients


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bank", STORES)
@pytest.mark.parametrize("kind", ["linear", "bias", "conv1d"])
@pytest.mark.parametrize("shape", [(4, IN), (4, 5, IN), (4, 2, 3, IN)], ids=str)
def test_the_sandwich_is_the_plain_form(share, bank, kind, shape):
    base = {"linear": nn.Linear(IN, OUT, bias=False), "bias": nn.Linear(IN, OUT), "conv1d": Conv1D(OUT, IN)}[kind]
    model, layer = make_model(share, base, bank)
    compare(model, layer, torch.randn(shape, requires_grad=True))
    compare(model, layer, torch.randn(shape))  # x needs no gradient, as behind frozen embeddings
    if kind == "conv1d":
        return  # it takes no other strides itself
    strided = torch.randn(shape[0], *shape[:0:-1]).permute(0, *range(len(shape) - 1, 0, -1))
    assert not strided.is_contiguous() or len(shape) == 2
    compare(model, layer, strided.requires_grad_())


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bank", STORES)
def test_the_sandwich_is_a_loop_in_float64(share, bank):
    """`slow` takes each token by itself."""
    model, layer = make_model(share, nn.Linear(IN, OUT), bank)
    x = torch.randn(4, 5, IN, requires_grad=True)
    weights = torch.randn(4, 5, OUT)
    with use_users(model, torch.tensor(WHO)):
        y = layer(x)
        (y * weights).sum().backward()
    found = all_gradients(layer, x)
    resident, exact = make_model(share, nn.Linear(IN, OUT))
    exact.double()
    wide = x.detach().double().requires_grad_()
    expected_y = slow(exact, wide, WHO)
    (expected_y * weights.double()).sum().backward()
    expected = all_gradients(exact, wide)
    assert relative_error(y, expected_y) <= 1e-6 and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= 1e-6, name


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bank", STORES)
def test_dropout_gives_the_adapter_an_input_of_its_own(share, bank):
    """Also where the adapter is the only one that needs x's gradient."""
    model, layer = make_model(share, bank=bank, lora_dropout=0.4)
    y, _ = compare(model, layer, torch.randn(4, 5, IN, requires_grad=True))
    model.eval()
    still, _ = compare(model, layer, torch.randn(4, 5, IN, requires_grad=True))
    assert not torch.equal(y, still)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bank", STORES)
def test_a_frozen_bank_and_frozen_factors_get_no_gradient(share, bank):
    model, layer = make_model(share, bank=bank, train_common=False)
    layer.bank("default").requires_grad_(False)
    x = torch.randn(4, 5, IN, requires_grad=True)
    results = []
    for call in (lambda route: layer(x), lambda route: plain(layer, x, route)):
        zero(model, layer)
        x.grad = None
        with use_users(model, torch.tensor(WHO)) as route:
            y = call(route)
            y.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": x.grad.clone()} | gradients)
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert relative_error(tensor, results[1][name]) <= 1e-6, name
    if bank == "ram":
        assert not layer.bank("default").working_set.gradient.any()


# -- in place where it is claimed, and nowhere else


@pytest.mark.parametrize("share", SANDWICHED)
@pytest.mark.parametrize("kind", ["linear", "bias", "conv1d"])
@pytest.mark.parametrize("bank", STORES)
def test_the_output_and_dx_are_the_bases_own(share, kind, bank):
    base = {"linear": nn.Linear(IN, OUT, bias=False), "bias": nn.Linear(IN, OUT), "conv1d": Conv1D(OUT, IN)}[kind]
    model, layer = make_model(share, base, bank)
    seen = spy(layer)
    x = torch.randn(4, 5, IN)
    leaf = x.clone().requires_grad_()
    inner = leaf * 1.0
    inner.register_hook(lambda dx: seen.update(outer=dx.data_ptr()))
    with use_users(model, torch.tensor(WHO)):
        y = layer(inner)
        assert y.data_ptr() == seen["y"] and seen["x"] == inner.data_ptr()
        y.square().sum().backward()
    assert seen["outer"] == seen["dx"]
    with torch.no_grad(), use_users(model, torch.tensor(WHO)):
        assert torch.allclose(layer(x), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", SANDWICHED)
@pytest.mark.parametrize("bank", STORES)
def test_autocast_with_float32_activations_falls_back_where_types_differ(share, bank):
    """y is bf16 and takes the update in place; the base's dx is float32 and the adapter's is not."""
    model, layer = make_model(share, bank=bank)
    seen = spy(layer)
    leaf = torch.randn(4, 5, IN, requires_grad=True)
    inner = leaf * 1.0
    inner.register_hook(lambda dx: seen.update(outer=dx.data_ptr()))
    with use_users(model, torch.tensor(WHO)), torch.autocast("cpu", torch.bfloat16):
        y = layer(inner)
    assert y.dtype == torch.bfloat16 and y.data_ptr() == seen["y"]
    y.float().square().sum().backward()
    assert seen["outer"] != seen["dx"] and leaf.grad.dtype == torch.float32
    x = torch.randn(4, 5, IN, requires_grad=True)
    # 8 bits of mantissa, and the two forms round at different places
    _, gradients = compare(model, layer, x, 0.015, context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("share", SHARES)
def test_a_float32_base_under_bf16_input_and_a_bf16_base(share):
    model, layer = make_model(share, nn.Linear(IN, OUT).bfloat16())
    compare(model, layer, torch.randn(4, 5, IN, dtype=torch.bfloat16, requires_grad=True), 0.015)


@pytest.mark.parametrize("hook", ["forward", "backward", "backward_pre"])
def test_hooks_on_the_base_see_the_base_alone(hook):
    """What a hook keeps must not be written into."""
    model, layer = make_model()
    kept = []
    register = {
        "forward": lambda: layer.base_layer.register_forward_hook(lambda module, args, y: kept.append(y)),
        "backward": lambda: layer.base_layer.register_full_backward_hook(lambda module, dx, dy: kept.extend(dx)),
        "backward_pre": lambda: layer.base_layer.register_full_backward_pre_hook(lambda module, dy: kept.extend(dy)),
    }[hook]
    x = torch.randn(4, 5, IN, requires_grad=True)
    weights = torch.randn(4, 5, OUT)
    compare(model, layer, x, weights=weights)
    handle = register()
    zero(model, layer)
    with use_users(model, torch.tensor(WHO)):
        (layer(x) * weights).sum().backward()
    handle.remove()
    expected = {
        "forward": layer.base_layer(x.detach()),
        "backward": weights @ layer.base_layer.weight,
        "backward_pre": weights,
    }[hook]
    torch.testing.assert_close(kept[0].detach(), expected.detach())


class Remembering(nn.Linear):
    """A base of one's own that needs its output again in the backward."""

    def forward(self, x):
        return super().forward(x).tanh()


class Cached(nn.Linear):
    """A base that hands out a tensor that it keeps."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bank", STORES)
def test_an_unknown_base_is_not_written_into(share, bank):
    model, layer = make_model(share, Remembering(IN, OUT), bank)
    compare(model, layer, torch.randn(4, 5, IN, requires_grad=True))
    model, layer = make_model(share, Cached(IN, OUT), bank)
    x = torch.randn(4, 5, IN)
    with use_users(model, torch.tensor(WHO)):
        layer(x)
    assert torch.equal(layer.base_layer.kept, nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bank", STORES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(share, bank, mode):
    for base in (nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False)):
        model, layer = make_model(share, base, bank)
        model.eval()
        x = torch.randn(4, 5, IN)
        before = x.clone()
        with use_users(model, torch.tensor(WHO)):
            expected = layer(x).detach()
            with mode():
                assert torch.equal(layer(x), expected)
        assert torch.equal(x, before)


# -- more than one use


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bank", STORES)
def test_one_layer_twice_in_a_graph(share, bank):
    """The same input twice, and one's output in the other's input."""
    model, layer = make_model(share, nn.Linear(IN, IN), bank) if share != "A" else (None, None)
    if model is None:  # an (out, r) factor of a square module
        model = get_peft_model(
            Wrapped(nn.Linear(IN, IN)),
            ShareLoraConfig(
                r=R, share="A", bank=bank, users=list(USERS), target_modules=["linear"], init_lora_weights=False
            ),
        ).train()
        layer = model.base_model.model.linear
    results = []
    x = torch.randn(4, 5, IN)
    for call in (lambda x, route: layer(x), lambda x, route: plain(layer, x, route)):
        zero(model, layer)
        own = x.clone().requires_grad_()
        with use_users(model, torch.tensor(WHO)) as route:
            y = call(own, route) + 2 * call(own, route) + call(call(own, route), route).sin()
            y.square().sum().backward()
        results.append((y.detach(), all_gradients(layer, own)))
    (y, found), (expected_y, expected) = results
    assert relative_error(y, expected_y) <= 1e-6
    for name, gradient in expected.items():
        if gradient.any():
            assert relative_error(found[name], gradient) <= 1e-6, name


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bank", STORES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_both_checkpointing_modes(share, bank, use_reentrant):
    """The block is computed again in the backward, with its own users."""
    model, layer = make_model(share, bank=bank)
    x = torch.randn(4, 5, IN, requires_grad=True)
    results = []
    for checkpointed in (False, True):
        zero(model, layer)
        x.grad = None
        with use_users(model, torch.tensor(WHO)):
            y = checkpoint(layer, x, use_reentrant=use_reentrant) if checkpointed else layer(x)
            y.square().sum().backward()
        results.append({"y": y.detach(), **all_gradients(layer, x)})
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize("share", SHARES)
def test_micro_batches_are_summed_in_float32(share):
    """bf16 compute: sixteen micro-batches in the working set are the sum of each one's gradient, in float32."""
    model, layer = make_model(share, nn.Linear(IN, OUT).bfloat16(), bank="ram")
    inputs = [torch.randn(4, 5, IN, dtype=torch.bfloat16) for _ in range(16)]
    total = torch.zeros_like(users_gradient(layer))
    for together in (False, True):
        zero(model, layer)
        for x in inputs:
            if not together:
                zero(model, layer)
            with use_users(model, torch.tensor(WHO)):
                layer(x).float().square().sum().backward()
            if not together:
                total += users_gradient(layer)
    found = users_gradient(layer)
    assert found.dtype == torch.float32 and found.any()
    assert relative_error(found, total) <= 1e-6  # in bf16 it would be 1e-3


def test_a_tensor_hook_and_a_retained_graph_see_right_gradients():
    """dx is written in place once per backward, never twice."""
    model, layer = make_model()
    x = torch.randn(4, 5, IN, requires_grad=True)
    with use_users(model, torch.tensor(WHO)):
        y = layer(x)
        loss = y.square().sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        copied = first.clone()
        (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, copied) and torch.equal(first, second)


# -- quantised bases


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bank", STORES)
def test_quantised_bases(share, bits, bank):
    bnb = pytest.importorskip("bitsandbytes")
    wide, out = 64, 32
    weight = torch.randn(out, wide, generator=torch.Generator().manual_seed(1)) / 8
    if bits == 8:
        base = bnb.nn.Linear8bitLt(wide, out, bias=False, has_fp16_weights=False)
        base.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        base = bnb.nn.Linear4bit(wide, out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        base.support_avx512bf16_for_cpu = False
    base = base.to("cpu")
    base.requires_grad_(False)
    config = ShareLoraConfig(
        r=R,
        share=share,
        bank=bank,
        users=list(USERS),
        target_modules=["linear"],
        init_lora_weights=False,
        train_common=True,
    )
    model = get_peft_model(Wrapped(base), config).train()
    layer = model.base_model.model.linear
    if bits == 4:
        layer.base_layer.support_avx512bf16_for_cpu = False
    compare(model, layer, torch.randn(4, 5, wide, requires_grad=True), 2e-6)
    if share != "B":
        return
    seen = spy(layer)
    with use_users(model, torch.tensor(WHO)):
        assert layer(torch.randn(4, 5, wide, requires_grad=True)).data_ptr() == seen["y"]


# -- compiled


@pytest.mark.parametrize("share", SHARES)
def test_one_graph_for_all_users_of_a_store(share):
    """No graph break, and no other graph when the ids change; also while people come and go in the slots."""
    model, layer = make_model(share, nn.Linear(IN, OUT), bank="ram", bank_slots=3)
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    x = torch.randn(3, 4, IN)
    for who in ([0, 1, 0], [2, 2, 2], [4, 3, 1], [1, 2, 0]):
        with use_users(model, torch.tensor(who)):
            torch.testing.assert_close(compiled(x), layer(x))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("share", SHARES)
def test_compiled_training_steps_are_eager_ones(share):
    """Forward and backward through aot_autograd: gradients reach the working set's rows."""
    model, layer = make_model(share, nn.Linear(IN, OUT), bank="ram", bank_slots=5)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for who in ([0, 1, 0], [4, 3, 1], [2, 2, 2]):
        results = []
        data = torch.randn(3, 4, IN)
        for call in (layer, compiled):
            x = data.clone().requires_grad_()
            zero(model, layer)
            with use_users(model, torch.tensor(who)):
                y = call(x)
                y.square().sum().backward()
            results.append({"y": y.detach(), **all_gradients(layer, x)})
        assert results[0].keys() == results[1].keys()
        for name, tensor in results[0].items():
            assert tensor.any() and relative_error(results[1][name], tensor) <= 1e-6, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("share", SHARES)
def test_compiled_code_whose_working_set_grows_before_the_backward(share):
    """Without fixed slots: it adds to the tensor of before, whose gradients must arrive all the same, once."""
    model, layer = make_model(share, nn.Linear(IN, OUT), bank="ram")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    data, gradients = torch.randn(2, 2, 4, IN), []
    for call in (layer, compiled):
        layer.bank("default").working_set.forget_slots()
        zero(model, layer)
        with use_users(model, torch.tensor([0, 1])):
            call(data[0]).square().sum().backward()  # what is there already
            loss = call(data[1]).square().sum()
            if call is compiled:
                layer.bank("default").working_set._resize(20)
                layer.bank("default").working_set._resize(40)
            loss.backward()
        gradients.append(users_gradient(layer))
    assert gradients[0][[0, 1]].any() and not gradients[0][2:].any()
    assert relative_error(gradients[1], gradients[0]) <= 1e-6


# -- a whole model


@pytest.mark.parametrize("bank", STORES)
def test_a_model_in_bf16_autocast_with_both_checkpointing_modes(bank):
    """As the trainers run it: float32 weights, bf16 autocast, several modules, right padding."""
    results = []
    for use_reentrant in (None, True, False):
        model = get_peft_model(tiny_model(), share_config(users=list(USERS), bank=bank)).train()
        randomise(model)
        if use_reentrant is not None:
            model.enable_input_require_grads()
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(rows=4), user_ids=[USERS[u] for u in WHO]).logits.square().sum()
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for name, working_set in get_router(model).working_sets.items():
            gradients[name] = working_set.gradient[working_set.slots_of([0, 2, 4])]
        results.append((loss.detach(), gradients))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0]) and gradients.keys() == results[0][1].keys()
        for name, gradient in results[0][1].items():
            assert torch.equal(gradients[name], gradient), name
            assert gradient.dtype == torch.float32


@pytest.mark.parametrize("users", [1, 2, 16, 17])
@pytest.mark.parametrize("tokens", [1, 3])
def test_every_way_to_project_is_a_loop_over_rows(users, tokens):
    """A token per row of few users goes through one product with everybody's factors; more of either through others."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(users, 4, 6, generator=generator)
    inverse = torch.arange(users).repeat(2)[torch.randperm(2 * users, generator=generator)]
    x = torch.randn(2 * users, tokens, 6, generator=generator)
    expected = torch.stack([0.5 * row @ own[user].mT for row, user in zip(x, inverse, strict=True)])
    torch.testing.assert_close(project(x, own, inverse, 0.5, torch.float32), expected)
    torch.testing.assert_close(project(x[:, 0], own, inverse, 0.5, torch.float32)[:, 0], expected[:, 0])
