"""The score head of a reward model: one for all users, or with `personal_head=True` one for each."""

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import RoutingError
from .bank import ResidentBank
from .routing import Router
from .sandwich import gather


# where a personal head's moves lie in a state dictionary, beside its weight
HEAD_MOVES = ".moves.weight"


class Float32Linear(nn.Linear):
    """A head that is computed in float32 whatever the base and the autocast.

    In bf16 two rewards of about 4 that differ by less than .03 are a tie, and small updates of the weight vanish.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            # the weight too: someone may have cast the whole model (Trainer's bf16_full_eval does)
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def keep_in_float32(head: nn.Module) -> None:
    """Make the linear parts of a trained head `Float32Linear`s, in place.

    Args:
        head (`nn.Module`):
            As PEFT trains it in full.
    """
    for module in head.modules():
        # exactly nn.Linear: a quantised head has its own arithmetic, and is refused by PEFT as a module to save
        if type(module) is nn.Linear:
            module.__class__ = Float32Linear
    head.float()


class PersonalHead(Float32Linear):
    """A head w_u = w_0 + d_u for each user; made of a `nn.Linear` in place.

    PEFT keeps a trained head as a copy inside its wrapper, so this is no ShareLoRA layer: it stands in that wrapper, with the users' moves
    d_u in a bank `moves` `(users, out, in)`. w_0 is a buffer, which nothing trains, unless the common start is trained too.
    """

    router: Router
    moves: ResidentBank

    @classmethod
    def make_of(cls, linear: nn.Linear, router: Router, train_common: bool) -> None:
        """Turn a linear head into a personal one.

        Args:
            linear (`nn.Linear`):
                With float32 weights `(out, in)`, which become w_0.
            router ([`Router`]):
                Of the model.
            train_common (`bool`):
                Whether w_0 is trained.
        """
        linear.__class__ = cls
        linear.router = router
        linear.moves = ResidentBank(len(router.users), tuple(linear.weight.shape)).to(linear.weight.device)
        if not train_common:
            weight = linear.weight.detach()
            del linear.weight
            linear.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features `(batch, ..., in)` -> rewards `(batch, ..., out)`, each row with its own user's head.

        Raises:
            RoutingError: no route is open, or it has another number of users than `x` has rows.
        """
        y = super().forward(x)
        route = self.router.current()
        if route is None or len(route.user_index) != len(x):
            came = "no user ids" if route is None else f"{len(route.user_index)} user ids"
            raise RoutingError(
                f"{came} came to the score head for {len(x)} rows. Open a route with `with use_users(model, ids):`, one id per row."
            )
        with torch.autocast(x.device.type, enabled=False):
            own = gather(self.moves.rows(route, self.moves.weight.new_zeros(())), torch.float32)  # (batch, out, in)
            moved = torch.bmm(x.float().reshape(len(x), -1, x.shape[-1]), own.mT)
        return y + moved.reshape(y.shape)

    @torch.no_grad()
    def of_user(self, row: int) -> nn.Linear:
        """One user's head as a plain linear module, in float32."""
        head = Float32Linear(self.in_features, self.out_features, self.bias is not None, device=self.weight.device)
        head.weight.copy_(self.weight + (self.moves.move(row) if row >= 0 else 0))
        if self.bias is not None:
            head.bias.copy_(self.bias)
        return head
