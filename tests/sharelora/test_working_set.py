"""The working set and its optimiser, against a resident bank, torch's AdamW and slow loops."""

import copy
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from helpers import tiny_model
from peft import get_peft_model
from torch import nn

from trl_sharelora import ShareLoraConfig, UserRegistry, use_users
from trl_sharelora.errors import (
    BankError,
    BankFullError,
    CapacityError,
    NonFiniteError,
    RoutingError,
    UnsupportedError,
)
from trl_sharelora.sharelora import Layout, Router, ShareLoraAdamW, ShareLoraLayer, UserStore, WorkingSet, get_router

from .reference import SHARES, batch, randomise, relative_error, share_config


USERS = [f"user{number}" for number in range(8)]
MODULES = (("one", (2, 3)), ("two", (4, 5)))
LAYOUT = Layout(MODULES)


def make_set(slots=None, layout=LAYOUT, kind="ram", users=8):
    store = UserStore(layout, kind, "r", num_users=users)
    return WorkingSet("default", layout, store, slots)


def fill(working_set, rows, value=None):
    """Give users weights: their row number + 1, or `value`."""
    layout = working_set.layout
    records = torch.zeros(len(rows), layout.record_bytes, dtype=torch.uint8)
    layout.split(records)[1].copy_(torch.tensor([float(row + 1 if value is None else value) for row in rows])[:, None])
    working_set.store.write(rows, records)


def models(share="B", seed=3, layers=("q_proj", "down_proj"), **store):
    """A resident model and one with a store, both with the same random tensors."""
    pair = []
    for bank in ({"bank": "resident"}, {"bank": "ram"} | store):
        config = share_config(share=share, users=list(USERS), target_modules=list(layers), **bank)
        pair.append(randomise(get_peft_model(tiny_model(), config), seed).train())
    resident, stored = pair
    shared = dict(resident.named_parameters())
    with torch.no_grad():
        for name, parameter in stored.named_parameters():
            parameter.copy_(shared[name])
    working_set = get_router(stored).working_sets["default"]
    rows = torch.stack(
        [torch.cat([b.weight.detach()[u].flatten() for b in banks(resident)]) for u in range(len(USERS))]
    )
    records = torch.zeros(len(USERS), working_set.layout.record_bytes, dtype=torch.uint8)
    working_set.layout.split(records)[1].copy_(rows)
    working_set.store.write(range(len(USERS)), records)
    return resident, stored


def banks(model):
    return [module.bank("default") for module in model.modules() if isinstance(module, ShareLoraLayer)]


def optimizer_of(model, **kwargs):
    router = get_router(model)
    named = dict(model.named_parameters())
    own = [
        p for n, p in named.items() if p.requires_grad and any(p is getattr(b, "weight", None) for b in banks(model))
    ]
    own += [working_set.weight for working_set in router.working_sets.values()]
    rest = [p for p in named.values() if p.requires_grad and not any(p is one for one in own)]
    groups = [{"params": own, "rowwise": True}, {"params": rest, "rowwise": False}]
    return ShareLoraAdamW(groups, router, **({"lr": 1e-2, "weight_decay": 0.1} | kwargs))


def user_row(model, row):
    """A user's moves of all modules in one tensor."""
    working_sets = get_router(model).working_sets
    if working_sets:
        return torch.cat([move.flatten() for move in working_sets["default"].moves(row).values()])
    return torch.cat([bank.move(row).flatten() for bank in banks(model)])


def assert_same_users(one, other):
    for row in range(len(USERS)):
        assert torch.equal(user_row(one, row), user_row(other, row)), row


def loss_of(model, who, seed=0):
    return model(**batch(rows=len(who), seed=seed), user_ids=who).logits.square().sum()


# -- who is in


def test_the_least_recently_used_go_first_and_held_or_pinned_ones_never():
    working_set = make_set(slots=3)
    fill(working_set, range(8))

    def visit(*rows):
        working_set.release(working_set.acquire(torch.tensor(rows)))

    def inside():
        return sorted(working_set._slot_of)

    visit(0)
    visit(1, 2)
    visit(0)  # now 1 and 2 are older
    visit(3)
    assert inside() == [0, 2, 3]
    lease = working_set.acquire(torch.tensor([2, -1, 2]))  # the oldest, and pinned from now on
    visit(4)
    assert inside() == [2, 3, 4]
    working_set.hold([3])
    visit(5)
    visit(6)
    assert inside() == [2, 3, 6]
    with pytest.raises(
        CapacityError, match=r"2 more users are needed at once, but the working set has 3 slots, 2 of them in use"
    ):
        working_set.acquire(torch.tensor([0, 1]))
    assert inside() == [2, 3, 6]  # nobody was thrown out for nothing
    weight = working_set.weight[lease.slot]
    assert torch.equal(weight, torch.tensor([[3.0], [0.0], [3.0]]).expand_as(weight))  # nobody: the common model
    working_set.release(lease)
    working_set.let_go()
    visit(0, 1, 7)
    assert inside() == [0, 1, 7]
    for row in range(8):
        assert all((move == row + 1).all() for move in working_set.moves(row).values())


def test_rows_beyond_the_users_are_refused():
    working_set = make_set()
    for act in (
        lambda: working_set.acquire(torch.tensor([8])),
        lambda: working_set.hold([9]),
        lambda: working_set.moves(8),
    ):
        with pytest.raises(CapacityError, match=r"came; this adapter has the rows 0 to 7"):
            act()
    assert not working_set._slot_of


def test_a_full_disk_while_a_user_makes_room_keeps_him_in(monkeypatch):
    working_set = make_set(slots=1)
    working_set.hold([0])
    working_set.weight.data[working_set.slots_of([0])] = 7.0
    working_set.stepped(working_set.slots_of([0]))
    working_set.let_go()

    def full(rows, records):
        raise BankFullError("full")

    with monkeypatch.context() as patch:
        patch.setattr(working_set.store, "write", full)
        for act in (lambda: working_set.hold([1]), working_set.flush):
            with pytest.raises(BankFullError):
                act()
        assert all((move == 7).all() for move in working_set.moves(0).values())
    working_set.hold([1])
    assert all((move == 7).all() for move in working_set.moves(0).values())
    assert 0 in working_set.store


# -- gradients reach the right rows


@pytest.mark.parametrize("share", SHARES)
def test_new_users_while_a_graph_is_pending(share):
    """Slots are not fixed: they grow between a forward and its backward, and the gradients are those of a resident bank."""
    resident, stored = models(share)
    graphs, gradients = [], []
    for model in (resident, stored):
        optimizer = optimizer_of(model)
        first = loss_of(model, [USERS[1], USERS[0], USERS[1]])
        second = loss_of(model, USERS[2:8], seed=1)
        third = loss_of(model, [USERS[0], USERS[5]], seed=2)
        graphs.append((first, second, third))
        for loss in (second, first, third):
            loss.backward()
        if model is resident:
            each = [torch.cat([bank.weight.grad[row].flatten() for bank in banks(model)]) for row in range(8)]
            gradients.append(torch.stack(each))
        else:
            working_set = get_router(stored).working_sets["default"]
            assert working_set.slots >= 8
            gradients.append(working_set.gradient[working_set.slots_of(range(8))].clone())
        optimizer.step()
    assert torch.equal(*gradients) and gradients[0].any(1).all()
    for one, other in zip(*graphs, strict=True):
        assert torch.equal(one, other)
    assert_same_users(resident, stored)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loop_of_ones_own_trains_as_with_a_resident_bank(share, dtype):
    """With `optimizer.zero_grad()` and a route that stays open around steps; four slots, so that users come and go."""
    resident, stored = models(share, bank_slots=4, bank_dtype=dtype)
    for model in (resident, stored):
        optimizer = optimizer_of(model)
        for step in range(6):
            optimizer.zero_grad()
            who = [USERS[(3 * step + place) % 8] for place in (0, 1, 5)]
            with use_users(model, who):
                for again in range(2):
                    model(**batch(rows=3, seed=step)).logits.square().sum().backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=bool(again))
    start, _ = models(share)
    assert all(not torch.equal(user_row(resident, row), user_row(start, row)) for row in range(8))
    if dtype == "float32":
        assert_same_users(resident, stored)
    else:
        for row in range(8):
            assert relative_error(user_row(stored, row), user_row(resident, row)) < 0.012


def test_a_gradient_of_an_evaluation_is_nobodys():
    """A backward in eval mode leaves a gradient in a slot that is nobody's in the next step."""
    resident, stored = models(bank_slots=2)
    for model in (resident, stored):
        optimizer = optimizer_of(model)
        loss_of(model.eval(), [USERS[6], USERS[7]]).backward()
        if model is resident:
            optimizer.zero_grad()
        else:
            for parameter in model.parameters():
                parameter.grad = None
        loss_of(model.train(), [USERS[0], USERS[1]]).backward()
        optimizer.step()
    assert_same_users(resident, stored)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_was_refused_leaves_nothing_behind(bad):
    resident, stored = models(bank_slots=2)
    optimizer = optimizer_of(stored)
    loss_of(stored, [USERS[0], USERS[1]]).backward()
    working_set = get_router(stored).working_sets["default"]
    working_set.gradient[working_set.slots_of([1]), 3] = bad
    with pytest.raises(NonFiniteError, match="in their own rows: 'user1'"):
        optimizer.step()
    assert_same_users(resident, stored)
    optimizer.zero_grad()
    reference = optimizer_of(resident)
    for model, its in ((stored, optimizer), (resident, reference)):
        loss_of(model, [USERS[1], USERS[2]]).backward()  # two slots: the ones of before must be free
        its.step()
    assert_same_users(resident, stored)


# -- what is not as it was


def only_users(model):
    """An optimiser of the rows alone: of a shared Parameter that was stepped torch itself complains."""
    working_set = get_router(model).working_sets["default"]
    return ShareLoraAdamW([{"params": [working_set.weight], "rowwise": True}], get_router(model), lr=1e-2)


def test_a_step_between_a_forward_and_its_backward_raises():
    _, stored = models()
    optimizer = only_users(stored)
    who = [USERS[0], USERS[1]]
    with use_users(stored, who):
        early = stored(**batch(rows=2)).logits.sum()
        stored(**batch(rows=2, seed=1)).logits.sum().backward()
        optimizer.step()
        stored(**batch(rows=2, seed=1)).logits.sum().backward()  # a new forward is fine
        with pytest.raises(
            RoutingError, match="changed between a forward and its backward: an optimizer step was taken"
        ):
            early.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_step_before_a_recomputation_raises(use_reentrant):
    _, stored = models()
    stored.enable_input_require_grads()
    stored.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    optimizer = only_users(stored)
    early = loss_of(stored, [USERS[0], USERS[1]])
    loss_of(stored, [USERS[0], USERS[1]], seed=1).backward()
    optimizer.step()
    with pytest.raises(RoutingError, match="changed between a forward and its backward"):
        early.backward()


def test_a_slot_that_was_given_away_before_the_backward_raises():
    """In eval mode nobody is held for a step."""
    _, stored = models(bank_slots=2)
    loss = loss_of(stored.eval(), [USERS[0], USERS[1]])
    loss_of(stored, [USERS[2]])
    with pytest.raises(RoutingError, match="the slot was given to another user.*use_users"):
        loss.backward()
    with use_users(stored, [USERS[0], USERS[1]]):  # the remedy
        loss = stored(**batch(rows=2)).logits.sum()
        with pytest.raises(CapacityError):
            loss_of(stored, [USERS[2]])
        loss.backward()


def test_a_route_that_was_opened_before_the_bank_was_there():
    _, stored = models()
    working_sets = get_router(stored).working_sets
    working_set = working_sets.pop("default")
    with use_users(stored, [USERS[0]]):
        working_sets["default"] = working_set
        with pytest.raises(RoutingError, match="opened before this adapter's bank was there"):
            stored(**batch(rows=1))


def test_users_of_another_process_only():
    """Steps of one's own with several processes must name everybody's users first."""
    working_set = make_set()
    working_set.hold([0])
    with pytest.raises(RoutingError, match=r"rows \[3\] had data in this step but are not in.*working_set.hold"):
        working_set.slots_of([0, 3])


# -- threads and reading ahead


def test_two_threads_score_as_one():
    _, stored = models(bank_slots=4)
    stored.eval()
    asked = [[USERS[(number * 3 + place) % 8] for place in (0, 1)] for number in range(16)]
    with torch.no_grad():
        expected = [stored(**batch(rows=2, seed=n), user_ids=who).logits for n, who in enumerate(asked)]
    found, errors = {}, []

    def score(part):
        try:
            for _ in range(3):
                for number in range(part, 16, 2):
                    with torch.no_grad(), use_users(stored, asked[number]):
                        found[number] = stored(**batch(rows=2, seed=number)).logits
                    assert torch.equal(found[number], expected[number])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=score, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 16


def test_what_was_read_ahead_is_what_is_used(monkeypatch):
    working_set = make_set(slots=3, kind="mmap")
    fill(working_set, range(6))
    readers, real = [], working_set.store.read

    def read(rows):
        readers.append((threading.current_thread() is threading.main_thread(), list(rows)))
        return real(rows)

    monkeypatch.setattr(working_set.store, "read", read)
    working_set.hold([0])
    working_set.prefetch([1, 0, 7, 2, 1])  # 0 is in, 7 has no record
    working_set.let_go()
    working_set.hold([1, 2])
    assert readers == [(True, [0]), (False, [1, 2])]
    for row in (1, 2):
        assert all((move == row + 1).all() for move in working_set.moves(row).values())
    working_set.let_go()
    working_set.prefetch([3])
    working_set.hold([3, 4])  # the window became another one
    assert readers[2:] == [(False, [3]), (True, [4])]
    for row in (3, 4):
        assert all((move == row + 1).all() for move in working_set.moves(row).values())


def test_what_was_read_ahead_is_not_used_when_it_is_old():
    """A user comes in, is stepped and goes out again after his record was read: the next time he is read anew."""
    working_set = make_set(slots=1)
    fill(working_set, range(3))
    working_set.prefetch([1])
    working_set.hold([1])
    working_set.weight.data[working_set.slots_of([1])] = 50.0
    working_set.stepped(working_set.slots_of([1]))
    working_set.let_go()
    working_set.hold([2])
    working_set.let_go()
    working_set.hold([1])
    assert (working_set.weight[working_set.slots_of([1])] == 50).all()
    working_set.let_go()
    working_set.prefetch([0])
    fill(working_set, [0], value=9)
    working_set.forget_slots()  # as after a load
    working_set.hold([0])
    assert (working_set.weight[working_set.slots_of([0])] == 9).all()


def test_an_error_while_reading_ahead_is_seen_once():
    working_set = make_set()
    fill(working_set, range(3))
    real = working_set.store.read

    def read(rows):
        raise BankError("damaged")

    working_set.store.read = read
    working_set.prefetch([0])
    with pytest.raises(BankError, match="damaged"):
        working_set.hold([0])
    working_set.store.read = real
    working_set.hold([0])
    assert (working_set.weight[working_set.slots_of([0])] == 1).all()


# -- copies, types, places


@pytest.mark.parametrize("bank", ["ram", "mmap"])
def test_a_copy_is_a_model_of_its_own(bank):
    resident, stored = models(bank=bank, bank_slots=3)
    who = [USERS[0], USERS[1]]
    step = optimizer_of(stored)
    loss_of(stored, who).backward()
    step.step()
    copied = copy.deepcopy(stored)
    before = [user_row(stored, row).clone() for row in range(8)]
    assert_same_users(stored, copied)
    step = optimizer_of(copied)
    for other in (who, USERS[4:6]):
        loss_of(copied, other).backward()
        step.step()
        step.zero_grad()
    assert all(torch.equal(user_row(stored, row), before[row]) for row in range(8))
    changed = [row for row in range(8) if not torch.equal(user_row(copied, row), before[row])]
    assert changed == [0, 1, 4, 5]


def test_pickling_is_refused_by_name():
    with pytest.raises(
        UnsupportedError, match="was pickled; its rows are not in the model. Save it with save_pretrained"
    ):
        pickle.dumps(make_set())
    _, stored = models()
    with pytest.raises(UnsupportedError, match="was pickled"):
        pickle.dumps(stored)


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")]
)
def test_casting_a_model_leaves_the_users_in_float32(cast):
    _, stored = models()
    working_set = get_router(stored).working_sets["default"]
    before = [user_row(stored, row).clone() for row in range(8)]
    cast(stored)
    tensors = [
        working_set.weight,
        working_set.gradient,
        working_set.exp_avg,
        working_set.exp_avg_sq,
        *working_set._leaves,
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(torch.equal(user_row(stored, row), old) for row, old in enumerate(before))
    cast(stored.get_base_model().model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_the_working_set_moves_beside_the_base():
    """With gradients pending; the optimiser's tensor stays the same object."""
    resident, stored = models(bank_slots=3)
    device = torch.accelerator.current_accelerator()
    working_set = get_router(stored).working_sets["default"]
    working_set.hold([0, 1])
    working_set.gradient[1:] = 3.0
    parameter, before = working_set.weight, working_set.gradient.clone()
    stored.to(device)
    assert working_set.weight is parameter and parameter.device.type == device.type
    assert torch.equal(working_set.gradient.cpu(), before) and parameter.grad is working_set.gradient
    working_set.let_go()
    assert_same_users(resident, stored.cpu())


# -- who must not move


@pytest.mark.parametrize("share", SHARES)
def test_unseen_users_are_the_common_model_and_learn_nothing(share):
    resident, stored = models(share)
    who = [USERS[0], "nobody", USERS[3], "stranger"]
    losses = []
    for model in (resident, stored):
        optimizer = optimizer_of(model)
        with use_users(model, who, unseen="common"):
            loss = model(**batch(rows=4)).logits.square().sum()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    working_set = get_router(stored).working_sets["default"]
    assert torch.equal(*losses)
    assert not working_set.weight[0].any() and not working_set.gradient.any() and not working_set.exp_avg[0].any()
    assert_same_users(resident, stored)
    assert len(working_set.store.rows()) == 8


def test_disabled_it_is_the_base():
    _, stored = models()
    inputs = batch(rows=2)
    working_set = get_router(stored).working_sets["default"]
    with stored.disable_adapter():
        found = stored.eval()(**inputs).logits
    head = stored.base_model.model.score.modules_to_save["default"]
    base = tiny_model().eval()
    assert torch.equal(found, base(**inputs).logits) and head is not None
    with use_users(stored, [USERS[0], USERS[1]]):
        assert not torch.equal(stored(**inputs).logits, found)
    assert working_set.trainable if hasattr(working_set, "trainable") else True


def test_a_frozen_bank_gets_no_gradient():
    resident, stored = models()
    for model in (resident, stored):
        for bank in banks(model):
            bank.requires_grad_(False)
        loss_of(model, USERS[:3]).backward()
    working_set = get_router(stored).working_sets["default"]
    assert not working_set.gradient.any()
    ours, theirs = dict(stored.named_parameters()), dict(resident.named_parameters())
    for name, parameter in ours.items():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, theirs[name].grad), name
    assert sum(p.grad is not None for p in ours.values()) > 3


@pytest.mark.parametrize("slots", [None, 3])
def test_two_adapters_with_stores_at_once(slots):
    """One batch is routed once for both; each has its own rows, and only the active one's are stepped."""
    pair = []
    for bank in ("resident", "ram"):
        config = {"users": list(USERS), "bank": bank, "bank_slots": slots if bank == "ram" else None}
        model = get_peft_model(tiny_model(), share_config(share="B", target_modules=["q_proj"], **config))
        model.add_adapter("second", share_config(share="AB", target_modules=["q_proj", "v_proj"], **config))
        model.set_adapter("second")
        router = get_router(model)
        assert set(router.working_sets) == (set() if bank == "resident" else {"default", "second"})
        seeds = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "sharelora_" in name and parameter.ndim == 2:
                    parameter.copy_(0.15 * torch.randn(parameter.shape, generator=seeds))
        layers = [m for m in model.modules() if isinstance(m, ShareLoraLayer) and "second" in m.share]
        own = [router.working_sets["second"].weight] if bank == "ram" else [m.bank("second").weight for m in layers]
        optimizer = ShareLoraAdamW([{"params": own, "rowwise": True, "weight_decay": 0.0}], router, lr=1e-2)
        model.train()
        losses = []
        for step in range(4):
            loss = loss_of(model, [USERS[step], USERS[step + 2]], seed=step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        model.set_adapter("default")
        losses.append(loss_of(model.eval(), USERS[:2]).detach())
        pair.append((model, losses, [[m.bank("second").move(row).clone() for m in layers] for row in range(8)]))
    (_, losses, rows), (stored, other_losses, other_rows) = pair
    assert all(torch.equal(one, other) for one, other in zip(losses, other_losses, strict=True))
    for one, other in zip(rows, other_rows, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    assert any(x.any() for row in rows for x in row)
    assert get_router(stored).working_sets["default"].store.rows() == []


# -- the optimiser


def drive(layout, schedule, slots, kind, **kwargs):
    """Random gradients for some users at each step; the working set's optimiser against `reference(row, gradients)`."""
    router = Router(UserRegistry(USERS))
    working_set = make_set(slots, layout, kind)
    router.working_sets["default"] = working_set
    optimizer = ShareLoraAdamW([{"params": [working_set.weight], "rowwise": True}], router, **kwargs)
    generator = torch.Generator().manual_seed(0)
    given = {row: [] for row in range(8)}
    for rows in schedule:
        working_set.hold(rows)
        gradient = torch.randn(len(rows), layout.numel, generator=generator)
        working_set.gradient[working_set.slots_of(rows)] += gradient
        router.mark_visited(torch.tensor(rows))
        for row, own in zip(rows, gradient, strict=True):
            given[row].append(own)
        optimizer.step()
        assert not working_set.gradient.any()
    working_set.flush()
    return working_set, given


SCHEDULE = [[0, 1], [1], [0, 5, 6], [1], [7, 0], [6, 5], [2, 3], [0]]


@pytest.mark.parametrize("modules", [MODULES, (("a", (4, 8)), ("b", (16,))), (("a", (3, 7)), ("b", (1, 1)))], ids=str)
@pytest.mark.parametrize(("slots", "kind"), [(None, "ram"), (3, "ram"), (3, "mmap")])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_each_user_is_torchs_adamw_by_himself_and_bit_equal_to_a_resident_row(modules, slots, kind, decay):
    """Sizes that are and are not multiples of 16, users with different step counts, paged out in between."""
    layout = Layout(modules)
    working_set, given = drive(layout, SCHEDULE, slots, kind, lr=1e-2, weight_decay=decay)
    router = Router(UserRegistry(USERS))
    resident = [nn.Parameter(torch.zeros(8, *shape)) for _, shape in modules]
    optimizer = ShareLoraAdamW([{"params": resident, "rowwise": True}], router, lr=1e-2, weight_decay=decay)
    taken = dict.fromkeys(range(8), 0)
    for rows in SCHEDULE:
        for parameter in resident:
            parameter.grad = torch.zeros_like(parameter)
        for row in rows:
            parts = given[row][taken[row]].split(layout.sizes)
            taken[row] += 1
            for parameter, part, (_, shape) in zip(resident, parts, modules, strict=True):
                parameter.grad[row] = part.reshape(shape)
        router.mark_visited(torch.tensor(rows))
        optimizer.step()
    for row in range(8):
        step, weight, first, second = (part[0] for part in layout.split(working_set.store.read([row])))
        assert int(step) == len(given[row])
        state = [optimizer.state[parameter] for parameter in resident]
        for found, expected in (
            (weight, [parameter.detach()[row] for parameter in resident]),
            (first, [one["exp_avg"][row] for one in state]),
            (second, [one["exp_avg_sq"][row] for one in state]),
        ):
            assert torch.equal(found, torch.cat([part.flatten() for part in expected]))
        alone = nn.Parameter(torch.zeros(layout.numel))
        torchs = torch.optim.AdamW([alone], lr=1e-2, weight_decay=decay)
        for gradient in given[row]:
            alone.grad = gradient.clone()
            torchs.step()
        torch.testing.assert_close(weight, alone.detach(), rtol=1e-6, atol=1e-8)


def slow_row_adamw(gradients, modules, rank_axis, lr, decay, start=None, betas=(0.9, 0.999), eps=1e-8):
    """One user in float64, number by number: one second moment per row of rank."""
    result, means = [], []
    place = 0
    for _, shape in modules:
        size = math.prod(shape)
        owner = np.indices(shape)[rank_axis].flatten()
        weight, first = np.zeros(size), np.zeros(size)
        second = np.zeros(shape[rank_axis])
        for step, gradient in enumerate(gradients, 1):
            own = gradient[place : place + size].double().numpy()
            for rank in range(shape[rank_axis]):
                inside = [own[i] ** 2 for i in range(size) if owner[i] == rank]
                second[rank] = betas[1] * second[rank] + (1 - betas[1]) * sum(inside) / len(inside)
            for i in range(size):
                weight[i] *= 1 - lr * decay
                first[i] = betas[0] * first[i] + (1 - betas[0]) * own[i]
                unbiased = first[i] / (1 - betas[0] ** step)
                weight[i] -= lr * unbiased / (math.sqrt(second[owner[i]] / (1 - betas[1] ** step)) + eps)
        result.append(weight)
        means.append(second)
        place += size
    return np.concatenate(result), np.concatenate(means)


@pytest.mark.parametrize(
    ("modules", "rank_axis"),
    [
        ((("a", (2, 5)), ("b", (2, 3))), 0),  # share="B"
        ((("a", (5, 2)), ("b", (3, 2))), 1),  # "A"
        ((("a", (2, 2)), ("b", (2, 2))), 0),  # "AB"
        ((("a", (2,)), ("b", (2,))), 0),  # "diagonal"
    ],
    ids=SHARES[:4],
)
@pytest.mark.parametrize("slots", [None, 3])
def test_one_second_moment_per_row_of_rank_is_the_slow_loop(modules, rank_axis, slots):
    layout = Layout(modules, second_moment="row", rank_axis=rank_axis)
    working_set, given = drive(layout, SCHEDULE, slots, "mmap", lr=1e-2, weight_decay=0.3)
    for row in range(8):
        step, weight, _, second = (part[0] for part in layout.split(working_set.store.read([row])))
        expected, means = slow_row_adamw(given[row], modules, rank_axis, 1e-2, 0.3)
        assert int(step) == len(given[row])
        np.testing.assert_allclose(weight.numpy(), expected, rtol=2e-6, atol=1e-8)
        np.testing.assert_allclose(second.numpy(), means, rtol=2e-6, atol=0)


def test_a_gradient_scaler_in_the_kernel_also_heeds_row_wise_moments():
    """fp16 with the fused kernel: scaled gradients come in, and an inf among them is no step."""
    layout = Layout(MODULES, second_moment="row")
    sets = []
    for scaled in (False, True):
        router = Router(UserRegistry(USERS))
        working_set = make_set(layout=layout)
        router.working_sets["default"] = working_set
        optimizer = ShareLoraAdamW([{"params": [working_set.weight], "rowwise": True}], router, lr=1e-2, fused=True)
        for bad in (False, True, False):
            router.mark_visited(torch.tensor([2]))
            working_set.gradient[working_set.slots_of([2])] = torch.linspace(-1, 1, layout.numel)
            if scaled:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(bad))
                working_set.gradient[working_set.slots_of([2])] *= float("inf") if bad else 4
            elif bad:
                router.forget_visited()
            optimizer.step()
        sets.append(working_set)
    for name, move in sets[0].moves(2).items():
        assert torch.equal(move, sets[1].moves(2)[name]) and move.any()
    assert [int(one.step[one.slots_of([2])]) for one in sets] == [2, 2]


def test_bfloat16_records_round_what_rests_and_not_what_is_in():
    """As long as a user is in, he is float32; a page out and in again rounds weight and first moment, never the second."""
    layout = Layout(MODULES, dtype="bfloat16")
    exact = Layout(MODULES)
    stays, given = drive(layout, [[0, 1]] * 3, None, "ram", lr=1e-2)
    full, _ = drive(exact, [[0, 1]] * 3, None, "ram", lr=1e-2)
    for row in (0, 1):
        slot, same = stays.slots_of([row]), full.slots_of([row])
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(stays, name)[slot], getattr(full, name)[same])
        step, weight, first, second = layout.split(stays.store.read([row]))
        assert torch.equal(weight, full.weight.detach()[same].bfloat16())  # to the nearest
        assert torch.equal(first, full.exp_avg[same].bfloat16())
        assert torch.equal(second, full.exp_avg_sq[same]) and step.item() == 3
    stays.forget_slots()
    stays.hold([0])
    slot = stays.slots_of([0])
    assert torch.equal(stays.weight.detach()[slot].bfloat16().float(), stays.weight.detach()[slot])
    once = stays.store.read([0])
    stays._write_back(slot)
    assert torch.equal(stays.store.read([0]), once)  # rounding twice is rounding once


def test_a_config_of_a_store_reaches_the_records():
    config = ShareLoraConfig(
        r=4,
        users=USERS,
        bank="ram",
        bank_dtype="bfloat16",
        bank_second_moment="row",
        share="A",
        target_modules=["q_proj"],
    )
    layout = get_router(get_peft_model(tiny_model(), config)).working_sets["default"].layout
    assert (layout.dtype, layout.second_moment, layout.rank_axis) == ("bfloat16", "row", 1)
    assert [shape for _, shape in layout.modules] == [(32, 4)] * 2 and layout.second_numel == 8
