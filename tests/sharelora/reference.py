"""The independent computation: one plain peft LoRA model per user, with the shared factor tied by copying it.

Nothing here uses the layer's own arithmetic. A user's factors are put together from the saved tensors, `peft.LoraConfig` computes
with them, and the gradients of the share forms follow from plain LoRA's by the chain rule.
"""

import copy

import torch
from helpers import tiny_model
from peft import LoraConfig, get_peft_model

from trl_sharelora import ShareLoraConfig


SHARES = ("B", "A", "AB", "diagonal", "none")
USERS = ["ann", "bob", "cat", "dan"]
R, ALPHA = 4, 6
SCALING = ALPHA / R
# every linear module of the family
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gptj": ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
}


def share_config(arch="llama", share="B", users=None, **overrides):
    values = dict(task_type="SEQ_CLS", r=R, lora_alpha=ALPHA, target_modules=TARGETS[arch], train_common=True)
    return ShareLoraConfig(share=share, users=USERS if users is None else users, **(values | overrides))


def randomise(model, seed=3):
    """Fill the adapter's tensors at random, the same ones for the same seed, and shake the head, so that all of them matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sharelora_" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            elif "modules_to_save" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def share_model(arch="llama", share="B", base=None, **overrides):
    """A sequence classifier with an adapter of four users on all its linear modules, all tensors random."""
    base = tiny_model(arch) if base is None else base
    return randomise(get_peft_model(base, share_config(arch, share, **overrides)))


def batch(rows=6, length=7, seed=0):
    """Random tokens `(rows, length)` with ragged right padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(8, 98, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def rows_of(inputs, places):
    return {key: value[places] for key, value in inputs.items()}


def saved(model, adapter="default"):
    """The adapter's tensors by module: {module: {"A", "B", "C", "common"}}, and the head's weight."""
    modules, head = {}, None
    for name, parameter in model.named_parameters():
        if f".{adapter}." not in name:
            continue
        if ".sharelora_" in name:
            module, _, factor = name.removesuffix(f".{adapter}.weight").rpartition(".sharelora_")
            modules.setdefault(module, {})[factor] = parameter
        elif name.endswith(f"modules_to_save.{adapter}.weight"):
            head = parameter
    return modules, head


def factors(share, tensors, user):
    """A user's plain LoRA, down `(r, in)` and up `(out, r)`; A_u = A_0 + D_u."""
    if share == "B":
        return tensors["common"] + tensors["A"][user], tensors["B"]
    if share == "A":
        return tensors["A"], tensors["common"] + tensors["B"][user]
    if share == "AB":
        return (tensors["common"] + tensors["C"][user]) @ tensors["A"], tensors["B"]
    if share == "none":
        width = tensors["common"].shape[1]
        return tensors["common"] + tensors["A"][user][:, :width], tensors["B"] + tensors["A"][user][:, width:].T
    return torch.diag(tensors["common"] + tensors["C"][user]) @ tensors["A"], tensors["B"]


def plain_lora(model, user, arch="llama", share="B", base=None, adapter="default", **overrides):
    """A `peft.LoraConfig` model of one user, his factors and the head copied into it."""
    base = tiny_model(arch) if base is None else base
    values = dict(task_type="SEQ_CLS", r=R, lora_alpha=ALPHA, target_modules=TARGETS[arch])
    plain = get_peft_model(base, LoraConfig(**(values | overrides)))
    modules, head = saved(model, adapter)
    own = dict(plain.named_parameters())
    with torch.no_grad():
        for module, tensors in modules.items():
            down, up = factors(share, tensors, user)
            own[f"{module}.lora_A.default.weight"].copy_(down)
            own[f"{module}.lora_B.default.weight"].copy_(up)
        if head is not None:
            target = next(p for n, p in own.items() if "modules_to_save.default" in n and n.endswith("weight"))
            target.data = head.detach().clone()
            bias = {n: p for n, p in model.named_parameters() if n.endswith(f"modules_to_save.{adapter}.bias")}
            for name, parameter in bias.items():
                own[name.replace(f".{adapter}.", ".default.")].data = parameter.detach().clone()
    return plain


def reference_gradients(share, model, plains, head=True):
    """`(gradients of the adapter's tensors and the head)` of the plain models `{user: model}`, by the chain rule.

    With `W = up @ down`, plain LoRA gives `dup` and `ddown`. For `share="AB"`, `down = C_u A`: `dC_u = ddown A'`,
    `dA = sum over users of C_u' ddown`. The diagonal is the same with a diagonal C_u.
    """
    modules, _ = saved(model)
    gradients = {}
    for module, tensors in modules.items():
        grads = {factor: torch.zeros_like(tensor) for factor, tensor in tensors.items()}
        for user, plain in plains.items():
            own = dict(plain.named_parameters())
            ddown, dup = own[f"{module}.lora_A.default.weight"].grad, own[f"{module}.lora_B.default.weight"].grad
            if share == "B":
                grads["A"][user] = ddown
                grads["common"] += ddown
                grads["B"] += dup
            elif share == "none":
                grads["A"][user] = torch.cat([ddown, dup.T], dim=1)
                grads["common"] += ddown
                grads["B"] += dup
            elif share == "A":
                grads["A"] += ddown
                grads["B"][user] = dup
                grads["common"] += dup
            else:
                A = tensors["A"].detach()
                core = (tensors["common"] + tensors["C"][user]).detach()
                dcore = ddown @ A.T if share == "AB" else (ddown * A).sum(1)
                grads["C"][user] = dcore
                grads["common"] += dcore
                grads["A"] += (core if share == "AB" else torch.diag(core)).T @ ddown
                grads["B"] += dup
        for factor, gradient in grads.items():
            gradients[f"{module}.sharelora_{factor}.default.weight"] = gradient
    for name in [name for name, _ in model.named_parameters() if head and "modules_to_save.default" in name]:
        gradients[name] = sum(dict(plain.named_parameters())[name].grad for plain in plains.values())
    return gradients


def relative_error(found, expected):
    """Norm of the difference over the norm of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_close(found, expected, share="B", limit=1e-5):
    """Gradients `{name: tensor}` of all modules together: per user the own factor, then the shared ones, then the head."""
    assert found.keys() == expected.keys()
    personal = {"B": "A", "A": "B", "none": "A"}.get(share, "C")
    groups = {}
    for name, tensor in expected.items():
        factor = name.rpartition(".sharelora_")[2].split(".")[0] if ".sharelora_" in name else name
        pairs = {factor: (found[name], tensor)}
        if factor == personal:
            pairs = {f"{factor} of user {u}": (found[name][u], row) for u, row in enumerate(tensor)}
        for group, (one, other) in pairs.items():
            ones, others = groups.setdefault(group, ([], []))
            ones.append(one.flatten())
            others.append(other.flatten())
    for group, (ones, others) in groups.items():
        one, other = torch.cat(ones), torch.cat(others)
        if other.norm() == 0:
            assert one.norm() == 0, group
        else:
            assert relative_error(one, other) <= limit, group


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def frozen_copy(model):
    """All tensors as they are now, to tell later what moved."""
    return copy.deepcopy({name: tensor.detach() for name, tensor in model.state_dict().items()})


def checkpointing(model, use_reentrant):
    """transformers' activation checkpointing in one of its modes, or none for `use_reentrant=None`."""
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    return model.train()
