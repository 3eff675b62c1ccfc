"""The users' rows and their optimiser, against torch's AdamW on each user's row alone."""

import copy

import pytest
import torch
from torch import nn

from trl_sharelora import UserRegistry
from trl_sharelora.errors import ConfigError, NonFiniteError, RoutingError
from trl_sharelora.sharelora import ResidentBank, Route, Router, ShareLoraAdamW, get_router
from trl_sharelora.sharelora.sandwich import gather

from .reference import SHARES, batch, share_model


USERS = ["ann", "bob", "cat", "dan"]
SHAPE = (3, 5)
RATE = 1e-2


class Toy(nn.Module):
    """A bank and a shared factor with gradients that tests choose."""

    def __init__(self, users=USERS, seed=0):
        super().__init__()
        self.router = Router(UserRegistry(users))
        self.bank = ResidentBank(len(users), SHAPE)
        self.shared = nn.Parameter(torch.ones(4))
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.bank.weight.copy_(torch.randn(self.bank.weight.shape, generator=self.generator))

    def optimizer(self, decay=0.0, shared_decay=0.0, **kwargs):
        groups = [
            {"params": [self.bank.weight], "rowwise": True, "weight_decay": decay},
            {"params": [self.shared], "rowwise": False, "weight_decay": shared_decay},
        ]
        return ShareLoraAdamW(groups, self.router, **({"lr": RATE} | kwargs))

    def backward(self, rows):
        """Gradients of a step in which these users had data: of their rows, and of the shared factor."""
        gradient = torch.zeros_like(self.bank.weight)
        gradient[rows] = torch.randn((len(rows), *SHAPE), generator=self.generator)
        self.bank.weight.grad = gradient
        self.shared.grad = torch.randn(4, generator=self.generator)
        self.router.mark_visited(torch.tensor(rows))
        return gradient


VISITS = [[0, 1], [1], [0, 2], [1], [1, 2], [0]]  # dan never


# -- invariant 3: who had no data is bit-identical


@pytest.mark.parametrize("kernel", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_invariant_3_present_rows_are_torchs_adamw_and_absent_ones_do_not_move(kernel, decay):
    """With decay of the shared part and of the users, clipping and a schedule: each user as if he were alone."""
    toy = Toy()
    optimizer = toy.optimizer(decay=decay, shared_decay=0.3, **kernel)
    alone = [nn.Parameter(row.clone()) for row in toy.bank.weight.detach()]
    theirs = [torch.optim.AdamW([row], lr=RATE, weight_decay=decay, **kernel) for row in alone]
    shared = nn.Parameter(toy.shared.detach().clone())
    plain = torch.optim.AdamW([shared], lr=RATE, weight_decay=0.3, **kernel)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=len(VISITS))
    for rows in VISITS:
        before, state = toy.bank.weight.detach().clone(), copy.deepcopy(optimizer.state.get(toy.bank.weight, {}))
        toy.backward(rows)
        nn.utils.clip_grad_norm_(toy.parameters(), 0.5)
        for row in rows:
            alone[row].grad = toy.bank.weight.grad[row].clone()
            theirs[row].param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
            theirs[row].step()
        shared.grad = toy.shared.grad.clone()
        plain.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"]
        plain.step()
        optimizer.step()
        schedule.step()
        absent = [row for row in range(len(USERS)) if row not in rows]
        assert torch.equal(toy.bank.weight[absent], before[absent])
        for key, value in state.items():
            assert torch.equal(optimizer.state[toy.bank.weight][key][absent], value[absent]), key
        assert not torch.equal(toy.bank.weight[rows], before[rows])
    for row, parameter in enumerate(alone):
        torch.testing.assert_close(toy.bank.weight[row].detach(), parameter.detach(), rtol=1e-7, atol=1e-8)
    assert torch.equal(toy.bank.weight[3], alone[3])
    torch.testing.assert_close(toy.shared.detach(), shared.detach(), rtol=1e-7, atol=1e-8)


def test_invariant_3_each_user_has_his_own_step_count():
    toy = Toy()
    optimizer = toy.optimizer()
    for rows in VISITS:
        toy.backward(rows)
        optimizer.step()
    assert optimizer.state[toy.bank.weight]["step"].tolist() == [3, 4, 2, 0]
    assert optimizer.state[toy.shared]["step"].item() == len(VISITS)


def test_invariant_3_decay_is_per_visit_and_towards_the_common_model():
    """With gradient zero a visit only shrinks: D_u (1 - lr * decay); the shared part is not the users' decay."""
    toy = Toy()
    optimizer = toy.optimizer(decay=0.5)
    before = toy.bank.weight.detach().clone()
    for rows in ([0], [0, 2], [0]):
        toy.bank.weight.grad = torch.zeros_like(toy.bank.weight)
        toy.router.mark_visited(torch.tensor(rows))
        optimizer.step()
    shrink = 1 - RATE * 0.5
    torch.testing.assert_close(toy.bank.weight[0].detach(), before[0] * shrink**3)
    torch.testing.assert_close(toy.bank.weight[2].detach(), before[2] * shrink)
    assert torch.equal(toy.bank.weight[[1, 3]], before[[1, 3]])
    assert torch.equal(toy.shared.detach(), torch.ones(4))


def test_invariant_3_a_growing_bank_keeps_rows_and_state():
    toy, twin = Toy(), Toy()
    optimizer, other = toy.optimizer(decay=0.1), twin.optimizer(decay=0.1)
    for rows in VISITS[:3]:
        toy.backward(rows)
        twin.backward(rows)
        optimizer.step()
        other.step()
    parameter = toy.bank.weight
    toy.backward([0, 1])  # an accumulated gradient survives too
    gradient, rows = toy.bank.weight.grad.clone(), toy.bank.weight.detach().clone()
    state = copy.deepcopy(optimizer.state[toy.bank.weight])
    toy.router.users.add(["eve", "fay"])
    toy.bank.grow(6)
    assert toy.bank.weight is parameter  # the optimiser and wrappers hold it
    assert torch.equal(toy.bank.weight[:4], rows) and toy.bank.weight[4:].abs().sum() == 0
    assert torch.equal(toy.bank.weight.grad[:4], gradient) and toy.bank.weight.grad[4:].abs().sum() == 0
    twin.backward([0, 1])
    optimizer.step()
    other.step()
    for key, value in state.items():
        assert torch.equal(optimizer.state[parameter][key][[2, 3]], value[[2, 3]]), key
        assert len(optimizer.state[parameter][key]) == 6
    # from here on the first four are as they would have been, and a new user is like a first one
    gradient = torch.zeros(6, *SHAPE)
    gradient[[1, 5]] = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    toy.bank.weight.grad, twin.bank.weight.grad = gradient, gradient[:4].clone()
    toy.router.mark_visited(torch.tensor([5, 1]))
    twin.router.mark_visited(torch.tensor([1]))
    optimizer.step()
    other.step()
    assert torch.equal(toy.bank.weight[:4], twin.bank.weight)
    fresh = nn.Parameter(torch.zeros(SHAPE))
    fresh.grad = gradient[5]
    torch.optim.AdamW([fresh], lr=RATE, weight_decay=0.1).step()
    torch.testing.assert_close(toy.bank.weight[5].detach(), fresh.detach(), rtol=1e-7, atol=1e-8)
    assert toy.bank.weight[4].abs().sum() == 0


@pytest.mark.parametrize("share", SHARES)
def test_invariant_3_in_a_model(share):
    """A real step: gradients through the layers, visits noted by the router; the bank grows in between."""
    users = UserRegistry(USERS)
    model = share_model(share=share, users=users).train()
    banks = [module.bank("default").weight for module in model.modules() if hasattr(module, "bank")]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is bank for bank in banks)]
    optimizer = ShareLoraAdamW(
        [{"params": banks, "rowwise": True, "weight_decay": 0.1}, {"params": others, "rowwise": False}],
        get_router(model),
        lr=RATE,
    )

    def step(ids):
        optimizer.zero_grad()
        model(**batch(rows=len(ids)), user_ids=ids).logits.sum().backward()
        optimizer.step()

    step(["ann", "bob", "cat", "ann"])  # everybody but dan has momentum now
    before = [bank.detach().clone() for bank in banks]
    state = [copy.deepcopy(optimizer.state[bank]) for bank in banks]
    step(["bob", "dan", "bob"])
    users.add(["eve"])
    model.base_model.grow_users()
    step(["eve", "dan"])
    for bank, old, held in zip(banks, before, state, strict=True):
        assert torch.equal(bank[[0, 2]], old[[0, 2]])
        assert (bank[[1, 3]] != old[[1, 3]]).flatten(1).any(1).all() and bank[4].abs().sum() > 0
        for key, value in held.items():
            assert torch.equal(optimizer.state[bank][key][[0, 2]], value[[0, 2]])


def test_invariant_3_accumulated_visits_are_one_step():
    toy = Toy()
    optimizer = toy.optimizer()
    first = toy.backward([0])
    second = toy.backward([2])
    toy.bank.weight.grad = first + second
    optimizer.step()
    assert optimizer.state[toy.bank.weight]["step"].tolist() == [1, 0, 1, 0]


def test_invariant_3_a_nan_gradient_names_the_user_and_moves_nothing():
    toy = Toy()
    optimizer = toy.optimizer(decay=0.1, shared_decay=0.1)
    for rows in VISITS[:3]:
        toy.backward(rows)
        optimizer.step()
    for bad in (float("nan"), float("inf")):
        toy.backward([0, 1, 2])
        toy.bank.weight.grad[1, 2, 2] = bad
        before, state = copy.deepcopy(toy.state_dict()), copy.deepcopy(optimizer.state_dict())
        with pytest.raises(NonFiniteError, match="no parameter has changed.*in their own rows: 'bob'. Look at their"):
            optimizer.step()
        for key, value in before.items():
            assert torch.equal(toy.state_dict()[key], value)
        for number, held in state["state"].items():
            for key, value in held.items():
                assert torch.equal(optimizer.state_dict()["state"][number][key], value)
    toy.backward([0])
    toy.shared.grad[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"in their own rows: none \(it is in the shared part\)"):
        optimizer.step()
    # the next good step goes on, without the visitors of the failed one
    before = toy.bank.weight.detach().clone()
    toy.backward([3])
    optimizer.step()
    assert torch.equal(toy.bank.weight[:3], before[:3]) and not torch.equal(toy.bank.weight[3], before[3])


def test_invariant_3_a_saved_state_goes_on_bit_identically():
    toy = Toy()
    optimizer = toy.optimizer(decay=0.1)
    for rows in VISITS[:3]:
        toy.backward(rows)
        optimizer.step()
    twin = copy.deepcopy(toy)
    twin.generator = torch.Generator()
    twin.generator.set_state(toy.generator.get_state())
    other = twin.optimizer(decay=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for rows in VISITS[3:]:
        for one, its_optimizer in ((toy, optimizer), (twin, other)):
            one.backward(rows)
            its_optimizer.step()
    for key, value in toy.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value)
    for one, another in zip(
        optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True
    ):
        for key in one:
            assert torch.equal(one[key], another[key])


def test_invariant_3_a_rare_user_moves_as_far_per_visit_as_a_frequent_one():
    """Gradients from N(1, 1), users visited every 1, 10 and 100 steps, met after 300 steps of others.

    AdamW over the whole bank moves the rare one several times further, and most of that while he is away.
    """
    every, start, steps, width = [1, 10, 100], 300, 900, 200
    router = Router(UserRegistry([str(number) for number in every] + ["first"]))
    rowwise, dense = nn.Parameter(torch.zeros(4, width)), nn.Parameter(torch.zeros(4, width))
    optimizer = ShareLoraAdamW([{"params": [rowwise], "rowwise": True, "weight_decay": 0.0}], router, lr=1.0)
    ordinary = torch.optim.AdamW([dense], lr=1.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    visits = torch.zeros(3)
    for step in range(steps):
        rows = [3] + [row for row, period in enumerate(every) if step >= start and step % period == 0]
        gradient = torch.zeros(4, width)
        gradient[rows] = 1 + torch.randn(len(rows), width, generator=generator)
        rowwise.grad, dense.grad = gradient, gradient.clone()
        router.mark_visited(torch.tensor(rows))
        optimizer.step()
        ordinary.step()
        visits += torch.tensor([float(row in rows) for row in range(3)])
    # distance in units of the learning rate; the gradient is mostly of one sign, so it adds up
    per_visit = -rowwise.detach()[:3].mean(1) / visits
    torch.testing.assert_close(per_visit, torch.full((3,), 0.72), rtol=0.2, atol=0)
    per_visit = -dense.detach()[:3].mean(1) / visits
    assert per_visit[2] > 4 * per_visit[0]


# -- misuse


def test_a_step_without_known_visitors_raises_instead_of_leaving_users_behind():
    """In eval mode no visit is noted; silently only the shared part would train."""
    model = share_model().eval()
    banks = [module.bank("default").weight for module in model.modules() if hasattr(module, "bank")]
    optimizer = ShareLoraAdamW([{"params": banks, "rowwise": True}], get_router(model), lr=RATE)
    before = [bank.detach().clone() for bank in banks]
    model(**batch(rows=2), user_ids=["ann", "bob"]).logits.sum().backward()
    with pytest.raises(RoutingError, match=r"no training forward was seen.*in eval mode \(call model.train\(\)\)"):
        optimizer.step()
    assert all(torch.equal(bank, old) for bank, old in zip(banks, before, strict=True))
    get_router(model).mark_visited(torch.tensor([0, 1]))
    optimizer.step()
    assert not any(torch.equal(bank[:2], old[:2]) for bank, old in zip(banks, before, strict=True))


def test_amsgrad_is_refused():
    with pytest.raises(ConfigError, match="amsgrad=True came"):
        Toy().optimizer(amsgrad=True)


def test_a_gradient_scaler_in_the_kernel_skips_a_step_with_inf():
    """fp16 with the fused kernel: scaled gradients come in, and an inf among them is no error but a smaller scale."""
    toy, twin = Toy(), Toy()
    optimizer, other = toy.optimizer(fused=True), twin.optimizer(fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # makes the scale
    for one in (toy, twin):
        one.backward([0, 1])
    toy.bank.weight.grad *= 4
    toy.shared.grad *= 4
    scaler.step(optimizer)
    scaler.update()
    other.step()
    torch.testing.assert_close(toy.bank.weight, twin.bank.weight, rtol=1e-7, atol=1e-8)
    before, state = copy.deepcopy(toy.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    toy.backward([1, 2])
    toy.bank.weight.grad[2, 0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    for key, value in before.items():
        assert torch.equal(toy.state_dict()[key], value)
    for number, held in state.items():
        for key, value in held.items():
            assert torch.equal(optimizer.state_dict()["state"][number][key], value), key
    assert toy.router.take_visited() == []


def test_a_closure_is_called():
    toy = Toy()
    optimizer = toy.optimizer()

    def closure():
        toy.backward([1])
        return torch.tensor(3.5)

    assert optimizer.step(closure) == 3.5
    assert optimizer.state[toy.bank.weight]["step"].tolist() == [0, 1, 0, 0]


# -- the bank


def test_a_bank_gives_the_rows_of_a_route_and_zero_for_the_unseen():
    bank, common = Toy().bank, torch.zeros(())
    index = torch.tensor([2, 0, 2])
    rows = bank.rows(Route(index, has_unseen=False), common)
    assert torch.equal(gather(rows, torch.float32), bank.weight[index])
    moves = gather(bank.rows(Route(torch.tensor([-1, 3, -1]), has_unseen=True), common), torch.float32)
    assert torch.equal(moves[1], bank.weight[3]) and moves[[0, 2]].abs().sum() == 0
    moves.sum().backward()
    assert bank.weight.grad[3].eq(1).all() and bank.weight.grad[:3].abs().sum() == 0


def test_growing_to_fewer_users_changes_nothing():
    bank = Toy().bank
    before = bank.weight.detach().clone()
    bank.grow(2)
    assert torch.equal(bank.weight, before)
