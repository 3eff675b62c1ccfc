"""The optimiser that moves only the rows of users who had data.

Why not AdamW over the whole bank: its momentum keeps moving users who are not there (83 % of their own movement in 200 steps),
and its global step count gives a user met late, or rarely, a several times larger first step (docs/design.md).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from ..errors import ConfigError, NonFiniteError, RoutingError
from .bank import WorkingSet
from .norms import UserNorms
from .routing import Router


class ShareLoraAdamW(torch.optim.AdamW):
    """AdamW that treats each user's row as a parameter of its own.

    A group with `rowwise=True` holds the users' weights: banks' Parameters `(users, ...)`, or the working set `(slots, ...)` of a
    bank in a store. Of these only the rows of users who had data since the last step are touched, each with its own step count,
    so a user moves the same per visit however rare he is; all other rows, and their moments, stay bit-identical. Weight
    decay is decoupled and applied per visit; on a move D_u it shrinks towards the common model. All other groups are ordinary
    AdamW.

    Every row goes through torch's own AdamW kernel, so one user is exactly plain LoRA, and a user's row is the same bit by bit
    wherever it rests. The exception is `second_moment="row"`, which is ours: one second moment per row of rank.

    Args:
        params (iterable):
            Parameter groups.
        router ([`Router`]):
            Knows whose rows had data.
        working_sets (`Sequence[WorkingSet]`, *optional*):
            Of banks in a store; stepped with the first group with `rowwise=True`, which may be empty. (They may also stand in
            a group's `params`, but wrappers that swap the parameters of an optimiser, as FSDP's, do not know them.)
        norms ([`UserNorms`], *optional*):
            Keeps the moves of the users who were stepped within the constraint of (3.3), or shrinks them.
        **kwargs:
            Of [`torch.optim.AdamW`], except `amsgrad`.

    Raises:
        NonFiniteError: at `step`, when a gradient is NaN or infinite; nothing has been updated then.
        RoutingError: at `step`, when users' rows have gradients but nobody was seen in training.
    """

    def __init__(
        self,
        params: Any,
        router: Router,
        working_sets: Sequence[WorkingSet] = (),
        norms: UserNorms | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("amsgrad"):
            raise ConfigError("amsgrad=True came; the users' rows are stepped without it. Leave it out.")
        super().__init__(params, **kwargs)
        self.router = router
        self.working_sets = list(working_sets)
        self.norms = norms

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update the shared parameters and the rows of the users with data."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rows = self.router.take_visited()
        # with a gradient scaler in the kernel (fp16), infinite gradients are the scaler's to skip
        if getattr(self, "found_inf", None) is None:
            try:
                self._check_gradients(rows)
            except NonFiniteError:  # given up: the gradients must not be in the next step
                for pending in self.router.working_sets.values():
                    pending.let_go()
                raise

        # AdamW passes over parameters without a gradient: take the users' away, step the rest, then step their rows.
        users = [(parameter, parameter.grad, group) for parameter, group in self._all() if group.get("rowwise")]
        for parameter, _, _ in users:
            parameter.grad = None
        super().step()
        # the kernel takes 16 numbers at a time and rounds what is left over otherwise: where there is such a rest, another kernel
        # is taken, so that a row is the same wherever it rests
        in_blocks = all(size % 16 == 0 for parameter, _, _ in users for size in self._sizes(parameter))
        for parameter, gradient, group in users:
            parameter.grad = gradient
            if gradient is None or not rows:
                continue
            working_set = self._working_set(parameter)
            if working_set is None:
                self._step_resident(parameter, rows, group, in_blocks)
            else:
                self._step_slots(working_set, rows, group, in_blocks)
        found_inf = getattr(self, "found_inf", None)
        if self.norms is not None and (found_inf is None or not found_inf):
            # the shared factor has been stepped too: the bound is on what the users' rows mean now
            self.norms.after_step(rows, next(group["lr"] for group in self.param_groups if group.get("rowwise")))
        for working_set in self.router.working_sets.values():
            working_set.let_go()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero or drop all gradients; those of a working set are zeroed in place, where the layers add to them."""
        super().zero_grad(set_to_none)
        for working_set in self.router.working_sets.values():
            working_set.zero_gradient()

    def _all(self) -> list[tuple[torch.Tensor, dict]]:
        """Everything that is stepped, with its group."""
        found = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        known = {id(parameter) for parameter, _ in found}
        rowwise = next((group for group in self.param_groups if group.get("rowwise")), None)
        if rowwise is not None:
            found += [(w.weight, rowwise) for w in self.working_sets if id(w.weight) not in known]
        return found

    def _working_set(self, parameter: torch.Tensor) -> WorkingSet | None:
        return next((w for w in self.router.working_sets.values() if w.weight is parameter), None)

    def _sizes(self, parameter: torch.Tensor) -> list[int]:
        working_set = self._working_set(parameter)
        return [parameter.shape[1:].numel()] if working_set is None else working_set.layout.sizes

    def _step_resident(self, weight: torch.Tensor, rows: list[int], group: dict, in_blocks: bool) -> None:
        state = self.state[weight]
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
            state["step"] = torch.zeros(len(weight))  # one count per user, on the host
        elif len(state["step"]) < len(weight):  # the bank has grown
            for key, value in state.items():
                state[key] = torch.cat([value, value.new_zeros(len(weight) - len(value), *value.shape[1:])])
        state["step"] = state["step"].cpu()  # load_state_dict may have moved it
        assert weight.grad is not None
        tensors = [weight, weight.grad, state["exp_avg"], state["exp_avg_sq"]]
        _adamw_rows(tensors, state["step"], rows, group, in_blocks, self)

    def _step_slots(self, working_set: WorkingSet, rows: list[int], group: dict, in_blocks: bool) -> None:
        slots = sorted(working_set.slots_of(working_set.mine(rows)))
        if working_set.layout.second_moment == "row":
            _adamw_rows_of_rank(working_set, slots, group, self)
        else:
            tensors = [working_set.weight.data, working_set.gradient, working_set.exp_avg, working_set.exp_avg_sq]
            _adamw_rows(tensors, working_set.step, slots, group, in_blocks, self)
        working_set.stepped(slots)

    def _check_gradients(self, rows: list[int]) -> None:
        with_gradient = [(parameter, group) for parameter, group in self._all() if parameter.grad is not None]
        if not with_gradient:
            return
        # of a working set only the slots of this step: the others are zero, and may be many
        looked_at = [self._gradients_of_step(parameter, rows) for parameter, _ in with_gradient]
        norms = torch.stack([norm.float() for norm in _norms(looked_at)])
        if norms.isfinite().all():
            if not rows and any(
                group.get("rowwise") and norm > 0 for norm, (_, group) in zip(norms, with_gradient, strict=True)
            ):
                raise RoutingError(
                    "The users' rows have gradients, but no training forward was seen since the last step, so it is not known whose "
                    "rows to move. The model was in eval mode (call model.train()), or its base was compiled or not called "
                    "as a whole; then say who had data: get_router(model).mark_visited(user_index)."
                )
            return
        bad: set[str] = set()
        for parameter, group in with_gradient:
            if group.get("rowwise"):
                mine, gradients = self._rows_with_gradient(parameter, rows)
                bad.update(
                    str(self.router.users[row])
                    for row, own in zip(mine, gradients, strict=True)
                    if not own.isfinite().all()
                )
        raise NonFiniteError(
            "A gradient is NaN or infinite, so the step was not taken and no parameter has changed. Users with such a gradient "
            f"in their own rows: {', '.join(map(repr, sorted(bad)[:10])) or 'none (it is in the shared part)'}. Look at their "
            "comparisons of this step (a very long or broken text, a huge margin), or lower the learning rate; in fp16 "
            "use bf16 instead."
        )

    def _gradients_of_step(self, parameter: torch.Tensor, rows: list[int]) -> torch.Tensor:
        assert parameter.grad is not None
        if self._working_set(parameter) is None:
            return parameter.grad
        return self._rows_with_gradient(parameter, rows)[1] if rows else parameter.grad[1:]

    def _rows_with_gradient(self, parameter: torch.Tensor, rows: list[int]) -> tuple[list[int], torch.Tensor]:
        """The rows of this process and their gradients `(rows, ...)`."""
        assert parameter.grad is not None
        working_set = self._working_set(parameter)
        if working_set is None:
            return rows, parameter.grad[rows]
        mine = working_set.mine(rows)
        return mine, parameter.grad[working_set.slots_of(mine)]


def _norms(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Their norms; of gradients sharded by FSDP those of the whole, for which all processes come here."""
    norms: list[torch.Tensor] = [torch.empty(0)] * len(gradients)
    plain = [number for number, gradient in enumerate(gradients) if not isinstance(gradient, DTensor)]
    for number, norm in zip(plain, torch._foreach_norm([gradients[number] for number in plain]), strict=True):
        norms[number] = norm
    for number, gradient in enumerate(gradients):
        if isinstance(gradient, DTensor):
            norms[number] = torch.linalg.vector_norm(gradient).full_tensor()
    return norms


def _adamw_rows(
    tensors: list[torch.Tensor],
    step: torch.Tensor,
    rows: list[int],
    group: dict,
    in_blocks: bool,
    optimizer: ShareLoraAdamW,
) -> None:
    """torch's AdamW, in place, on some rows of `tensors`: weight, gradient and moments `(rows, ...)`; `step` `(rows,)` on the host."""
    weight, gradient, exp_avg, exp_avg_sq = tensors
    counts = step.tolist()
    # neighbours with the same step count go through the kernel together
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row and counts[runs[-1][0]] == counts[row]:
            runs[-1][1] = row + 1
        else:
            runs.append([row, row + 1])
    beta1, beta2 = group["betas"]
    found_inf = getattr(optimizer, "found_inf", None)
    as_told = in_blocks or weight.device.type != "cpu" or found_inf is not None
    # views: the kernel writes through them
    adamw(
        [weight[start:end] for start, end in runs],
        [gradient[start:end] for start, end in runs],
        [exp_avg[start:end] for start, end in runs],
        [exp_avg_sq[start:end] for start, end in runs],
        [],
        [torch.tensor(counts[start], device=weight.device) for start, _ in runs],
        foreach=group["foreach"] if as_told else False,
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=group["fused"] if as_told else False,
        grad_scale=getattr(optimizer, "grad_scale", None),
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    if found_inf is None or not found_inf:
        step[rows] += 1


def _adamw_rows_of_rank(working_set: WorkingSet, slots: list[int], group: dict, optimizer: ShareLoraAdamW) -> None:
    """AdamW with one second moment per row of rank: the mean of the squared gradients of that row."""
    # a gradient scaler's (fp16), which torch's kernel heeds by itself
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if found_inf is not None and found_inf:
        return
    at = torch.tensor(slots, device=working_set.weight.device)
    beta1, beta2 = group["betas"]
    working_set.step[slots] += 1
    step = working_set.step[slots].to(working_set.weight.device).unsqueeze(1).double()
    gradient = working_set.gradient[at]
    gradient = gradient if grad_scale is None else gradient / grad_scale.to(gradient.device)
    gradient = -gradient if group["maximize"] else gradient
    weight = working_set.weight.data[at].mul_(1 - group["lr"] * group["weight_decay"])
    first = working_set.exp_avg[at].lerp_(gradient, 1 - beta1)
    second = working_set.exp_avg_sq[at]
    layout, place = working_set.layout, 0
    size = group["lr"] / (1 - beta1**step)
    correction = (1 - beta2**step).sqrt()
    for (start, end), (_, shape) in zip(working_set.spans, layout.modules, strict=True):
        rank = shape[layout.rank_axis]
        others = [axis + 1 for axis in range(len(shape)) if axis != layout.rank_axis]
        squares = gradient[:, start:end].unflatten(1, shape).square()
        means = squares.mean(others) if others else squares
        part = second[:, place : place + rank].mul_(beta2).add_(means, alpha=1 - beta2)
        denominator = (part.sqrt() / correction).float() + group["eps"]
        denominator = denominator.reshape(-1, *[rank if axis == layout.rank_axis else 1 for axis in range(len(shape))])
        moved = first[:, start:end].unflatten(1, shape) / denominator
        weight[:, start:end] -= size.float() * moved.flatten(1)
        place += rank
    working_set.weight.data[at] = weight
    working_set.exp_avg[at] = first
    working_set.exp_avg_sq[at] = second
