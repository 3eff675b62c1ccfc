"""The norm constraint of (3.3), against the effective weights formed whole."""

import pytest
import torch
from helpers import tiny_model
from peft import get_peft_model

from trl_sharelora import use_users
from trl_sharelora.errors import ConfigError
from trl_sharelora.sharelora import ShareLoraAdamW, ShareLoraLayer, get_router
from trl_sharelora.sharelora.norms import UserNorms

from .reference import SHARES, USERS, batch, share_config, share_model


WHO = ["ann", "cat", "cat", "bob", "ann", "cat"]


def moves(model, row):
    """What a user's own move adds to the weights, all modules in one vector: his delta minus that of a user who has not moved."""
    parts = []
    for layer in model.modules():
        if isinstance(layer, ShareLoraLayer):
            own = layer.get_delta_weight("default", row)
            bank = layer.bank("default")
            kept, bank.weight.data = bank.weight.data, torch.zeros_like(bank.weight.data)
            parts.append((own - layer.get_delta_weight("default", row)).flatten())
            bank.weight.data = kept
    return torch.cat(parts).double()


@pytest.mark.parametrize("share", SHARES)
def test_norms_are_those_of_the_whole_matrices(share):
    model = share_model(share=share)
    expected = torch.stack([moves(model, row).norm() for row in range(len(USERS))]).float()
    assert expected.min() > 0.1
    torch.testing.assert_close(UserNorms(model).norms([0, 1, 2, 3]), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("share", SHARES)
def test_projection_scales_back_whoever_is_beyond_the_bound_and_nobody_else(share):
    model = share_model(share=share)
    norms = UserNorms(model).norms([0, 1, 2, 3])
    bound = float(norms.sort().values[1:3].mean())
    before = [moves(model, row) for row in range(len(USERS))]
    banks = [m.bank("default").weight for m in model.modules() if isinstance(m, ShareLoraLayer)]
    rows_before = [bank.detach().clone() for bank in banks]
    UserNorms(model, bound=bound).after_step([0, 1, 2], 0.1)
    for row in range(len(USERS)):
        after = moves(model, row)
        if norms[row] > bound and row < 3:
            assert float(after.norm()) == pytest.approx(bound, rel=1e-4)
            if share != "none":  # there the direction turns a little, as both factors shrink
                torch.testing.assert_close(after, before[row] * bound / norms[row], rtol=1e-3, atol=1e-5)
        else:
            for bank, old in zip(banks, rows_before, strict=True):
                assert torch.equal(bank[row], old[row])
    assert (norms[:3] > bound).any() and (norms[:3] <= bound).any()


@pytest.mark.parametrize("share", SHARES[:4])
def test_the_ridge_is_the_minimum_of_its_own_objective(share):
    """The implicit step minimises 1/2 ||D - D_before||^2 + lr ridge / 2 ||M(D)||^2: its gradient there, by autograd, is zero."""
    model = share_model(share=share)
    layers = [m for m in model.modules() if isinstance(m, ShareLoraLayer)]
    before = [layer.bank("default").weight.detach().double().clone() for layer in layers]
    UserNorms(model, ridge=3.0).after_step([0, 2], 0.5)
    for layer, old in zip(layers, before, strict=True):
        bank = layer.bank("default").weight
        assert torch.equal(bank[[1, 3]].double(), old[[1, 3]])
        own = bank.detach()[[0, 2]].double().requires_grad_()
        A, B = (getattr(layer, f"sharelora_{name}")["default"].weight.detach().double() for name in "AB")
        made = {
            "B": lambda d, A, B: B @ d,
            "A": lambda d, A, B: d @ A,
            "AB": lambda d, A, B: B @ d @ A,
            "diagonal": lambda d, A, B: B @ torch.diag_embed(d) @ A,
        }[share](own, A, B)
        objective = (own - old[[0, 2]]).square().sum() / 2
        objective = objective + 0.5 * 3.0 / 2 * (layer.scaling["default"] * made).square().sum()
        (gradient,) = torch.autograd.grad(objective, own)
        assert float(gradient.abs().max()) < 1e-6 < float((own - old[[0, 2]]).abs().max())


@pytest.mark.parametrize("share", ["B", "AB"])
def test_steps_are_the_same_wherever_the_rows_rest(share):
    """A resident bank and a store, with bound and ridge."""
    results = []
    for bank in ("resident", "ram"):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), share_config(share=share, bank=bank, init_lora_weights=False))
        norms = UserNorms(model, bound=0.4, ridge=0.5)
        router = get_router(model)
        users = [
            m.bank("default").weight for m in model.modules() if bank == "resident" and isinstance(m, ShareLoraLayer)
        ]
        own = {id(weight) for weight in users}
        shared = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        optimizer = ShareLoraAdamW(
            [{"params": users, "rowwise": True}, {"params": shared}],
            router,
            list(router.working_sets.values()),
            norms,
            lr=0.05,
        )
        for step in range(4):
            model.train()
            with use_users(model, WHO):
                model(**batch(seed=step)).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with use_users(model, USERS), torch.no_grad():
            results.append(model.eval()(**batch(rows=4)).logits)
        if bank == "resident":
            reached = norms.norms([0, 1, 2, 3])
            assert float(reached.max()) == pytest.approx(0.4, rel=1e-4) and reached[3] == 0
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_ridge_on_two_factors_is_refused():
    with pytest.raises(ConfigError, match="user_ridge=0.1 came with share='none'.*user_norm_bound"):
        UserNorms(share_model(share="none"), ridge=0.1)
