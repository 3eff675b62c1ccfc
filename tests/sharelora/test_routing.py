"""Whose row is whose: mixed batches against one plain LoRA model per user, and every way to name the users wrongly."""

import copy
import functools
import threading

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, tiny_model
from peft import get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trl_sharelora import ShareLoraConfig, UserRegistry, use_users
from trl_sharelora.errors import ConfigError, RoutingError, UnknownUserError, UserIdError
from trl_sharelora.sharelora import get_router

from .reference import (
    SHARES,
    USERS,
    assert_close,
    batch,
    checkpointing,
    gradients,
    plain_lora,
    reference_gradients,
    relative_error,
    rows_of,
    share_model,
)


# users of six rows, mixed, and the weights of their rewards in the loss
WHO = torch.tensor([2, 0, 1, 0, 2, 0])
WEIGHTS = torch.tensor([0.9, -1.3, 0.4, 1.7, -0.6, 0.8])


def rewards(model, inputs, who=None):
    kwargs = {} if who is None else {"user_ids": who}
    return model(**inputs, **kwargs).logits.squeeze(-1)


def references(model, inputs, who, weights=WEIGHTS, arch="llama", share="B", plains=None):
    """Rewards of the rows by plain LoRA models of their users, and these models with their gradients added."""
    plains = {} if plains is None else plains
    found = torch.zeros(len(who))
    for user in who.unique().tolist():
        if user not in plains:
            plains[user] = plain_lora(model, user, arch, share).train()
        places = (who == user).nonzero().flatten()
        out = rewards(plains[user], rows_of(inputs, places))
        (out * weights[places]).sum().backward()
        found[places] = out.detach()
    return found, plains


# -- invariant 1: a mixed batch equals separate plain-LoRA models with tied B


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_invariant_1_a_mixed_batch_is_plain_lora_per_user(arch, share):
    model, inputs = share_model(arch, share), batch()
    expected, plains = references(model, inputs, WHO, arch=arch, share=share)
    with torch.no_grad():
        exchanged = rewards(model, inputs, (WHO + 1) % 4)
    # a wrong user would be seen
    assert (exchanged - expected).abs().min() > 1e-3 * expected.abs().mean()
    assert relative_error(exchanged, expected) > 0.02
    for use_reentrant in (None, True, False):
        checkpointing(model, use_reentrant).zero_grad()
        with use_users(model, WHO):
            found = rewards(model, inputs)
        (found * WEIGHTS).sum().backward()  # outside of the route, where a training loop has it
        assert relative_error(found.detach(), expected) <= 1e-5
        assert_close(gradients(model), reference_gradients(share, model, plains), share)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_invariant_1_accumulated_micro_batches_add_up(use_reentrant):
    model = checkpointing(share_model(), use_reentrant)
    plains = {}
    for seed, who in ((0, WHO), (1, torch.tensor([1, 1, 0, 1, 0, 1]))):
        references(model, batch(seed=seed), who, plains=plains)
        (rewards(model, batch(seed=seed), who) * WEIGHTS).sum().backward()
    assert_close(gradients(model), reference_gradients("B", model, plains))


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_invariant_1_two_forwards_before_one_backward(use_reentrant):
    """A recomputation must take the users of its own forward, not those of the forward that came last."""
    model = checkpointing(share_model(), use_reentrant)
    first, second = batch(seed=0), batch(seed=1)
    others = torch.tensor([3, 1, 3, 3, 1, 1])
    plains = {}
    references(model, first, WHO, plains=plains)
    references(model, second, others, plains=plains)
    loss = (rewards(model, first, WHO) * WEIGHTS).sum()
    loss = loss + (rewards(model, second, others) * WEIGHTS).sum()
    loss.backward()
    assert_close(gradients(model), reference_gradients("B", model, plains))


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_invariant_1_backward_on_another_thread(use_reentrant):
    model, inputs = checkpointing(share_model(), use_reentrant), batch()
    _, plains = references(model, inputs, WHO)
    loss = (rewards(model, inputs, WHO) * WEIGHTS).sum()
    in_thread(loss.backward)
    assert_close(gradients(model), reference_gradients("B", model, plains))


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_invariant_1_two_nested_models_have_a_router_each(use_reentrant):
    """A reward model is scored inside a policy's context, and trains there."""
    outer, inner = share_model(), share_model(base=tiny_model(seed=1), users=["x", "y", "z"])
    for model in (outer, inner):
        checkpointing(model, use_reentrant)
    inputs = batch()
    theirs = torch.tensor([0, 0, 2, 1, 1, 2])
    _, plains = references(outer, inputs, WHO)
    inner_plains = {user: plain_lora(inner, user, base=tiny_model(seed=1)).train() for user in range(3)}
    references(inner, inputs, theirs, plains=inner_plains)
    with use_users(outer, WHO):
        loss = (rewards(outer, inputs) * WEIGHTS).sum()
        with use_users(inner, theirs):
            loss = loss + (rewards(inner, inputs) * WEIGHTS).sum()
            loss.backward()
    assert_close(gradients(outer), reference_gradients("B", outer, plains))
    assert_close(gradients(inner), reference_gradients("B", inner, inner_plains))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_invariant_1_under_torchs_checkpoint_wrapper(use_reentrant):
    """What FSDP's activation checkpointing uses; transformers' hook does not see it."""
    model, inputs = share_model(), batch()
    _, plains = references(model, inputs, WHO)
    model = with_checkpoint_wrapper(model, use_reentrant)
    with use_users(model, WHO):
        (rewards(model, inputs) * WEIGHTS).sum().backward()
    assert_close(unwrapped(gradients(model)), reference_gradients("B", share_model(), plains))
    # the same with a backward on a thread of its own, which has no route: the open one is found
    model.zero_grad()
    with use_users(model, WHO):
        in_thread((rewards(model, inputs) * WEIGHTS).sum().backward)
    assert_close(unwrapped(gradients(model)), reference_gradients("B", share_model(), plains))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_invariant_1_torchs_checkpoint_wrapper_takes_the_route_along(use_reentrant):
    """Also when the backward runs inside a route of other users, of the same length."""
    model, inputs = share_model(), batch()
    _, plains = references(model, inputs, WHO)
    model = with_checkpoint_wrapper(model, use_reentrant)
    with use_users(model, WHO):
        loss = (rewards(model, inputs) * WEIGHTS).sum()
    with use_users(model, WHO.flip(0)):
        loss.backward()
    assert_close(unwrapped(gradients(model)), reference_gradients("B", share_model(), plains))


def with_own_checkpointing(model):
    """A checkpointing that neither transformers nor torch's wrapper knows of."""
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return model.train()


def test_an_unknown_checkpointing_without_an_open_route_raises():
    model, inputs = with_own_checkpointing(share_model()), batch()
    with use_users(model, WHO):
        loss = rewards(model, inputs).sum()
    with pytest.raises(RoutingError, match="keep `use_users` open around the backward too"):
        loss.backward()


def test_a_recomputation_between_two_open_routes_raises():
    """A backward thread cannot tell whose route to take when two other threads hold one."""
    model, inputs = with_own_checkpointing(share_model()), batch()
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with use_users(model, [3, 3, 3, 3, 3, 3]):
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(10)
    with use_users(model, WHO):
        loss = rewards(model, inputs).sum()
        with pytest.raises(RoutingError, match="2 threads hold routes of this model"):
            in_thread(loss.backward)
    leave.set()
    holder.join()


def with_checkpoint_wrapper(model, use_reentrant):
    kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    model.enable_input_require_grads()
    model.config.use_cache = False  # a recomputation would append to the cache again
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, kind),
        check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
    )
    assert sum(isinstance(module, CheckpointWrapper) for module in model.modules()) == 2
    return model.train()


def unwrapped(named):
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in named.items()}


def in_thread(function, *args):
    """Run in another Python thread; what it raises is raised here."""
    raised = []

    def run():
        try:
            function(*args)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def test_invariant_1_threads_use_one_model_for_different_users_at_once():
    model = share_model().eval()
    inputs = batch(rows=2, length=4)
    whose = [torch.tensor(pair) for pair in ([0, 1], [2, 3], [3, 0], [1, 1])]
    with torch.no_grad():
        expected = [rewards(model, inputs, who) for who in whose]
    start = threading.Barrier(len(whose))
    wrong = []

    def score(number):
        start.wait(10)
        with torch.no_grad():
            for turn in range(25):
                if turn % 2:
                    found = rewards(model, inputs, whose[number])
                else:
                    with use_users(model, whose[number]):
                        found = rewards(model, inputs)
                if not torch.equal(found, expected[number]):
                    wrong.append((number, turn))

    run_together(score, len(whose))
    assert not wrong
    router = get_router(model)
    assert router.current() is None and not router._routes and not router._entered


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_invariant_1_threads_train_one_model_at_once(use_reentrant):
    """Gradients of two threads add up; with checkpointing each recomputes with its own users."""
    model = checkpointing(share_model(), use_reentrant)
    whose = [WHO, torch.tensor([3, 1, 3, 3, 1, 1])]
    plains = {}
    for number, who in enumerate(whose):
        references(model, batch(seed=number), who, plains=plains)
    expected = reference_gradients("B", model, plains)
    for _ in range(3):
        model.zero_grad()
        start = threading.Barrier(2)

        def step(number, start=start):
            start.wait(10)
            (rewards(model, batch(seed=number), whose[number]) * WEIGHTS).sum().backward()

        run_together(step, 2)
        assert_close(gradients(model), expected)
        assert get_router(model).take_visited() == [0, 1, 2, 3]


def run_together(function, count):
    raised = []

    def run(number):
        try:
            function(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised, raised


def test_rows_permute_with_their_users():
    model, inputs = share_model().eval(), batch()
    order = torch.tensor([5, 3, 0, 4, 1, 2])
    with torch.no_grad():
        straight, shuffled = rewards(model, inputs, WHO), rewards(model, rows_of(inputs, order), WHO[order])
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-5, atol=1e-6)


# -- invariant 2: a row is computed with its own user's parameters or not at all


def test_invariant_2_no_ids():
    model, inputs = share_model(), batch()
    for call in (lambda: model(**inputs), lambda: model(**inputs, user_ids=None)):
        with pytest.raises(RoutingError, match=r"A batch of 6 row\(s\) came without user ids. Open a route"):
            call()
    with use_users(model, WHO):
        rewards(model, inputs)
    with pytest.raises(RoutingError, match="without user ids"):  # a closed route is gone
        model(**inputs)


def test_invariant_2_a_single_user_is_not_guessed_either():
    model = share_model(users=["ann"])
    with pytest.raises(RoutingError, match="without user ids"):
        model(**batch())


@pytest.mark.parametrize("count", [1, 3, 5, 12])
def test_invariant_2_wrong_count(count):
    model = share_model()
    with pytest.raises(
        RoutingError, match=f"{count} user ids came for 6 rows. A preference batch has two rows per pair"
    ):
        rewards(model, batch(), ["ann"] * count)
    with pytest.raises(RoutingError, match="0 user ids came for 6 rows"):
        rewards(model, batch(), [])


def test_invariant_2_packed_rows():
    """Padding-free batches put all tokens into one row, and some modules flatten tokens before a linear layer."""
    model = share_model().eval()
    inputs = batch(rows=4, length=6)
    packed = {
        "input_ids": inputs["input_ids"].reshape(1, -1),
        "position_ids": torch.arange(6).repeat(4).reshape(1, -1),
    }
    with pytest.raises(RoutingError, match="4 user ids came for 1 rows.*Packed or padding-free batches"):
        rewards(model, packed, ["ann", "bob", "cat", "dan"])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    hidden = torch.randn(4, 6, 32)
    with use_users(model, ["ann", "bob", "cat", "dan"]):
        assert layer(hidden).shape == (4, 6, 64)
        with pytest.raises(RoutingError, match=r"4 user ids came for 24 rows.*\(mixtures of experts\)"):
            layer(hidden.reshape(-1, 32))


def test_invariant_2_unknown_id():
    model = share_model()
    with pytest.raises(
        UnknownUserError, match=r"1 unknown user\(s\): 'eve'. This adapter knows 4 users \('ann', 'bob'"
    ):
        rewards(model, batch(rows=2), ["ann", "eve"])


@pytest.mark.parametrize("index", [[0, 4], [-1, 0], [-5, 0], [2**40, 0]])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_invariant_2_index_out_of_range(index, as_tensor):
    model = share_model()
    index = torch.tensor(index) if as_tensor else index
    with pytest.raises(UnknownUserError, match="this adapter has the rows 0 to 3. Was the index made with another"):
        rewards(model, batch(rows=2), index)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([True, False]), r"shape \(2,\) and type torch.bool came; one whole number per row"),
        (torch.tensor([0.0, 1.0]), r"shape \(2,\) and type torch.float32 came"),
        (torch.tensor([[0], [1]]), r"shape \(2, 1\) and type torch.int64 came"),
        (torch.tensor(0), r"shape \(\) and type torch.int64 came"),
        ([True, False], "User ids of type bool came; give text ids, or rows as a tensor"),
        ([0.0, 1.0], "User ids of type float came"),
        ([None, "ann"], "User ids of type NoneType, str came"),
        (["ann", 1], "User ids of type int, str came"),
        (np.array([0, 1]), "User ids of type int64 came"),
        ("ann", "'ann' came as the users of a batch; give a list with one id per row"),
        (b"an", "b'an' came as the users of a batch"),
        (1, "1 came as the users of a batch"),
    ],
)
def test_invariant_2_ids_that_are_neither_text_nor_rows(index, message):
    model = share_model()
    with pytest.raises(RoutingError, match=message):
        rewards(model, batch(rows=2), index)


def test_invariant_2_nothing_is_open_after_an_error():
    model, inputs = share_model().eval(), batch()
    for wrong in (["eve"] * 6, ["ann"] * 5, 3.5):
        with pytest.raises((UnknownUserError, RoutingError)):
            rewards(model, inputs, wrong)
    with pytest.raises(RoutingError, match="None came as the users of a batch"), use_users(model, None):
        pass
    router = get_router(model)
    assert router.current() is None and not router._entered
    with pytest.raises(RoutingError, match="without user ids"):
        model(**inputs)


@pytest.mark.parametrize("users", [["7", "0"], [7, 0], ["-1", "ann"]])
def test_invariant_2_ints_are_refused_where_ids_are_numbers(users):
    model, inputs = share_model(users=users).eval(), batch(rows=2)
    with pytest.raises(RoutingError, match=r"The whole numbers \[0, 1\] may be user ids or rows of the bank"):
        rewards(model, inputs, [0, 1])
    # both unambiguous ways agree
    ids = [str(user) for user in users]
    assert torch.equal(rewards(model, inputs, ids), rewards(model, inputs, torch.tensor([0, 1])))


def test_ids_may_be_text_ints_or_tensors():
    model, inputs = share_model().eval(), batch(rows=3)
    expected = rewards(model, inputs, ["cat", "ann", "dan"])
    ways = [
        [2, 0, 3],
        (2, 0, 3),
        torch.tensor([2, 0, 3]),
        torch.tensor([2, 0, 3], dtype=torch.uint8),
        ("cat", "ann", "dan"),
        np.array(["cat", "ann", "dan"]),
    ]
    for way in ways:
        assert torch.equal(rewards(model, inputs, way), expected)


def test_ids_in_another_normalisation_are_reported():
    model = share_model(users=["Jos\u00e9", "ann"])
    with pytest.raises(UserIdError, match="differ only by Unicode normalisation"):
        rewards(model, batch(rows=1), ["Jose\u0301"])


# -- unseen users


@pytest.mark.parametrize("share", SHARES)
def test_invariant_2_an_unseen_user_is_a_user_who_has_not_moved(share):
    """unseen="common" is D = 0: bit-identical to a user whose rows are zero, and to the common factors in plain LoRA."""
    model, inputs = share_model(share=share).eval(), batch(rows=3)
    modules = [module for module in model.modules() if hasattr(module, "bank")]
    with torch.no_grad():
        for module in modules:
            module.bank("default").weight[3] = 0
        not_moved = rewards(model, inputs, ["dan", "ann", "dan"])
        with use_users(model, ["eve", "ann", "mallory"], unseen="common") as route:
            common = rewards(model, inputs)
        assert route.user_index.tolist() == [-1, 0, -1]
        assert torch.equal(common, not_moved)
        with use_users(model, torch.tensor([-1, 0, -1]), unseen="common"):
            assert torch.equal(rewards(model, inputs), not_moved)
    plain = plain_lora(model, 3, share=share).eval()
    assert relative_error(common[[0, 2]], rewards(plain, rows_of(inputs, torch.tensor([0, 2]))).detach()) <= 1e-5


def test_an_unseen_user_moves_nobody():
    model, inputs = share_model().train(), batch(rows=3)
    with use_users(model, ["eve", "bob", "eve"], unseen="common"):
        rewards(model, inputs).sum().backward()
    assert get_router(model).take_visited() == [1]
    for module in model.modules():
        if hasattr(module, "bank"):
            gradient = module.bank("default").weight.grad
            assert gradient[[0, 2, 3]].abs().sum() == 0 and gradient[1].abs().sum() > 0


def test_a_user_of_the_registry_without_a_row_is_unseen_until_the_bank_grows():
    """The registry grows first, for instance when a stream is read ahead of training."""
    users = UserRegistry(USERS)
    model, inputs = share_model(users=users).eval(), batch(rows=2)
    users.add(["eve"])
    for ids in (["ann", "eve"], torch.tensor([0, 4])):
        with pytest.raises(
            UnknownUserError, match=r"'eve' was added to the registry after.*model.base_model.grow_users\(\)"
        ):
            rewards(model, inputs, ids)
        with use_users(model, ids, unseen="common") as route:
            assert route.user_index.tolist() == [0, -1] and route.has_unseen
            common = rewards(model, inputs)
    with pytest.raises(UnknownUserError, match="this adapter has the rows 0 to 4"):
        rewards(model, inputs, torch.tensor([0, 5]))
    model.base_model.grow_users()
    assert torch.equal(rewards(model, inputs, ["ann", "eve"]), common)


def test_unknown_value_of_unseen():
    with pytest.raises(ConfigError, match="unseen='Common' is unknown; one of 'raise', 'common' is needed"):
        with use_users(share_model(), ["ann"], unseen="Common"):
            pass


def test_a_model_without_an_adapter_has_no_router():
    with pytest.raises(RoutingError, match="LlamaForSequenceClassification has no ShareLoRA adapter"):
        with use_users(tiny_model(), ["ann"]):
            pass


# -- the router itself


def test_routes_nest_and_close_in_order():
    model = share_model()
    router = get_router(model)
    with use_users(model, ["ann"]) as outer:
        with pytest.raises(KeyError), use_users(model, ["bob", "cat"]) as inner:
            assert router.current() is inner
            raise KeyError
        assert router.current() is outer
        with use_users(model, ["dan"]):
            pass
        assert router.current() is outer
    assert router.current() is None


def test_a_route_is_open_for_its_thread_only():
    model = share_model()
    router = get_router(model)
    seen = []
    with use_users(model, ["ann"]):
        in_thread(lambda: seen.append(router.current()))
    assert seen == [None]


def test_ids_in_the_call_go_before_the_open_route():
    model, inputs = share_model().eval(), batch(rows=2)
    expected = rewards(model, inputs, ["cat", "dan"])
    with use_users(model, ["ann", "bob"]):
        assert torch.equal(rewards(model, inputs, ["cat", "dan"]), expected)
        assert not torch.equal(rewards(model, inputs), expected)


def test_the_router_knows_its_users_also_when_some_are_added_later():
    users = UserRegistry(["ann"])
    model = get_peft_model(tiny_model(), ShareLoraConfig(task_type="SEQ_CLS", users=users))
    users.add(["bob"])
    model.base_model.grow_users()
    assert rewards(model, batch(rows=2), ["bob", "ann"]).shape == (2,)


def test_a_copy_does_not_keep_an_open_route():
    model, inputs = share_model().eval(), batch()
    with use_users(model, WHO):
        twin = copy.deepcopy(model)
    with pytest.raises(RoutingError, match="without user ids"):
        twin(**inputs)
    assert torch.equal(rewards(twin, inputs, WHO), rewards(model, inputs, WHO))
    assert get_router(twin) is not get_router(model)
    with use_users(twin, WHO), pytest.raises(RoutingError, match="without user ids"):
        model(**inputs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_copy_checkpoints_with_its_own_router(use_reentrant):
    model, inputs = checkpointing(share_model(), use_reentrant), batch()
    _, plains = references(model, inputs, WHO)
    rewards(model, inputs, WHO)  # the checkpoint functions are wrapped now
    twin = copy.deepcopy(model)
    (rewards(twin, inputs, WHO) * WEIGHTS).sum().backward()
    assert_close(gradients(twin), reference_gradients("B", model, plains))
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_base_that_was_unloaded_and_wrapped_again_checkpoints_with_the_new_router(use_reentrant):
    first, inputs = checkpointing(share_model(users=["x", "y", "z"]), use_reentrant), batch()
    rewards(first, inputs, [0, 1, 2, 0, 1, 2])
    base = first.unload()
    second = checkpointing(share_model(base=base), use_reentrant)
    _, plains = references(second, inputs, WHO)
    (rewards(second, inputs, WHO) * WEIGHTS).sum().backward()
    assert_close(gradients(second), reference_gradients("B", second, plains))


def test_checkpointing_may_be_switched_at_any_time():
    model, inputs = share_model().train(), batch()
    _, plains = references(model, inputs, WHO)
    expected = reference_gradients("B", model, plains)
    base = model.base_model.model
    for switch in (
        lambda: checkpointing(model, True),
        base.activation_checkpointing_disable,
        lambda: checkpointing(model, False),
        base.activation_checkpointing_disable,
    ):
        switch()
        model.zero_grad()
        (rewards(model, inputs, WHO) * WEIGHTS).sum().backward()
        assert_close(gradients(model), expected)


def test_only_training_forwards_are_visits():
    model, inputs = share_model(), batch(rows=2)
    router = get_router(model)
    model.eval()
    rewards(model, inputs, ["ann", "bob"])
    model.train()
    with torch.no_grad():
        rewards(model, inputs, ["ann", "bob"])
    assert router.take_visited() == []
    rewards(model, inputs, ["cat", "ann"])
    rewards(model, inputs, ["cat", "cat"])
    assert router.take_visited() == [0, 2]
    assert router.take_visited() == []
    rewards(model, inputs, ["cat", "cat"])
    router.forget_visited()
    assert router.take_visited() == []


def test_marking_somebody_who_is_not_there_raises():
    router = get_router(share_model())
    for index in ([0, 4], [-3]):
        with pytest.raises(UnknownUserError, match="has the rows 0 to 3"):
            router.mark_visited(torch.tensor(index))
    router.mark_visited(torch.tensor([-1, 2]))
    assert router.take_visited() == [2]
