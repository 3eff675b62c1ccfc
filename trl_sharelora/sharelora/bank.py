"""The users' own parameters, and the optimiser that moves only those of users who had data.

The bank of a module is one small interface: `forward(route)` gives the moves D_u of the batch's rows, `grow(n)` adds users.
Here every user is resident: an ordinary Parameter `(users, ...)` in a module of its own, so that PEFT saves it, TRL's
reference copy finds it and DDP averages its gradient.

Why not AdamW over the whole Parameter: its momentum keeps moving users who are not there (83 % of their own movement in
200 steps), and its global step count gives a user met late, or rarely, a several times larger first step (docs/design.md).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from ..errors import ConfigError, NonFiniteError, RoutingError
from .routing import Route, Router


class ResidentBank(nn.Module):
    """The moves D_u of all users for one module, in memory.

    Args:
        num_users (`int`):
            Number of users.
        shape (`tuple[int, ...]`):
            Shape of one user's move: `(r, in)` for `share="B"`, `(out, r)` for `"A"`, `(r, r)` for `"AB"`, `(r,)` for
            `"diagonal"`.
    """

    def __init__(self, num_users: int, shape: tuple[int, ...]):
        super().__init__()
        # D_u = 0: every user starts as the common model
        self.weight = nn.Parameter(torch.zeros(num_users, *shape))  # (users, *shape)

    def forward(self, route: Route) -> torch.Tensor:
        """The moves of a batch's users, `(batch, *shape)`; zero where the user is unseen."""
        index = route.user_index.to(self.weight.device)
        if not route.has_unseen:
            return self.weight.index_select(0, index)
        seen = (index >= 0).to(self.weight.dtype).reshape(-1, *[1] * (self.weight.ndim - 1))
        return self.weight.index_select(0, index.clamp(min=0)) * seen

    def grow(self, num_users: int) -> None:
        """Add users with D_u = 0; the rows of the others stay bit-identical."""
        missing = num_users - len(self.weight)
        if missing > 0:
            rows = self.weight.new_zeros(missing, *self.weight.shape[1:])
            # .data keeps the Parameter that optimizers and wrappers hold
            gradient, self.weight.grad = self.weight.grad, None
            self.weight.data = torch.cat([self.weight.data, rows])
            if gradient is not None:
                self.weight.grad = torch.cat([gradient, torch.zeros_like(rows)])

    def extra_repr(self) -> str:
        return f"users={len(self.weight)}, move={tuple(self.weight.shape[1:])}"


class ShareLoraAdamW(torch.optim.AdamW):
    """AdamW that treats each user's row as a parameter of its own.

    A group with `rowwise=True` holds banks' weights `(users, ...)`. Of these only the rows of users who had data since the
    last step are touched, each with its own step count, so a user moves the same per visit however rare he is; all
    other rows, and their moments, stay bit-identical. Weight decay is decoupled and applied per visit; on a move D_u
    it shrinks towards the common model. All other groups are ordinary AdamW.

    Every row goes through torch's own AdamW kernel, so one user is exactly plain LoRA.

    Args:
        params (iterable):
            Parameter groups.
        router ([`Router`]):
            Knows whose rows had data.
        **kwargs:
            Of [`torch.optim.AdamW`], except `amsgrad`.

    Raises:
        NonFiniteError: at `step`, when a gradient is NaN or infinite; nothing has been updated then.
        RoutingError: at `step`, when users' rows have gradients but nobody was seen in training.
    """

    def __init__(self, params: Any, router: Router, **kwargs: Any):
        if kwargs.get("amsgrad"):
            raise ConfigError("amsgrad=True came; the users' rows are stepped without it. Leave it out.")
        super().__init__(params, **kwargs)
        self.router = router

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
            self._check_gradients(rows)

        # AdamW passes over parameters without a gradient: take the banks' away, step the rest, then step their rows.
        banks = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            if group.get("rowwise")
            for parameter in group["params"]
        ]
        for parameter, _, _ in banks:
            parameter.grad = None
        super().step()
        for parameter, gradient, group in banks:
            parameter.grad = gradient
            if gradient is not None and rows:
                self._step_rows(parameter, gradient, group, rows)
        return loss

    def _step_rows(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict, rows: list[int]) -> None:
        state = self.state[weight]
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
            state["step"] = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)  # one count per user
        elif len(state["step"]) < len(weight):  # the bank has grown
            for key, value in state.items():
                state[key] = torch.cat([value, value.new_zeros(len(weight) - len(value), *value.shape[1:])])
        beta1, beta2 = group["betas"]
        # views: the kernel writes through them into the bank and the state
        adamw(
            [weight[row] for row in rows],
            [gradient[row] for row in rows],
            [state["exp_avg"][row] for row in rows],
            [state["exp_avg_sq"][row] for row in rows],
            [],
            [state["step"][row] for row in rows],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _check_gradients(self, rows: list[int]) -> None:
        with_gradient = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not with_gradient:
            return
        norms = torch.stack(
            [norm.float() for norm in torch._foreach_norm([parameter.grad for parameter, _ in with_gradient])]
        )
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
        bad = sorted(
            {
                self.router.users[row]
                for parameter, group in with_gradient
                if group.get("rowwise")
                for row in rows
                if not parameter.grad[row].isfinite().all()
            }
        )
        raise NonFiniteError(
            "A gradient is NaN or infinite, so the step was not taken and no parameter has changed. Users with such a gradient "
            f"in their own rows: {', '.join(map(repr, bad[:10])) or 'none (it is in the shared part)'}. Look at their "
            "comparisons of this step (a very long or broken text, a huge margin), or lower the learning rate; in fp16 "
            "use bf16 instead."
        )
