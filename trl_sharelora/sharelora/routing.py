"""Whose row is whose: one Router per model, read by all its layers.

The rows of a batch belong to users, and every adapted layer must know to whom. The route is held by one plain object per
model, not by a global (two models are often nested: a reward model is scored inside a policy's context), not by a
contextvar (backward runs on autograd's threads, which see none; torch.compile breaks on it) and not by a hook that ends
with the forward (gradient checkpointing recomputes later).

- A route is open for a *thread*: two threads may use one model for different users at the same time.
- A checkpointed block takes the route of its forward along and computes its recomputation with it, on whatever thread.
- A recomputation that was not taken along (a checkpointing of one's own) finds the one route that is open around the
  backward, or an error.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from ..errors import ConfigError, RoutingError, UnknownUserError
from ..users import UserRegistry


if TYPE_CHECKING:
    from .bank import Lease, WorkingSet

UNSEEN = ("raise", "common")
_NO_LEASES: Mapping[str, Any] = MappingProxyType({})


class Route(NamedTuple):
    """The users of the rows of a batch."""

    # (batch,) int64: row of the bank per row of the batch; -1 for an unseen user, computed with the common model (D = 0)
    user_index: torch.Tensor
    # known here so that no layer needs to look at the tensor (a GPU would have to wait)
    has_unseen: bool
    # per adapter with a bank in a store: the slots of its working set that hold these users; there while the route is open
    leases: "Mapping[str, Lease]" = _NO_LEASES
    # the users, each once and in order, and the place of each row's user among them; of an open route without unseen users
    each: torch.Tensor | slice | None = None
    inverse: torch.Tensor | None = None


class Router:
    """Holds the open route of a model, per thread, and notes which users had a training forward.

    Args:
        users (`UserRegistry`):
            The users of the model's adapters.
    """

    def __init__(self, users: UserRegistry):
        self.users = users
        # how many of them have a row in the banks; the registry grows first (ShareLoraModel.grow_users)
        self.rows = len(users)
        self._routes: dict[int, Route] = {}
        # Dynamo cannot trace a look-up by thread; compiled code reads the route that is the only one open.
        self._only: Route | None = None
        # who had a training forward since the last optimizer step: (users + 1,) bool, per device and number of users
        self._visited: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._entered: dict[int, list[Any]] = {}
        self._checkpointing: list[nn.Module] | None = None
        self._numbers = 0, False
        # per adapter whose bank is in a store
        self.working_sets: dict[str, WorkingSet] = {}
        # with user_sharding="owner" each process steps its own users only
        self.visits_are_local = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy (deepcopy, pickle) made inside `use_users` would keep that route open for ever.
        return {**self.__dict__, "_routes": {}, "_only": None, "_entered": {}}

    def resolve(self, user_ids: Any, unseen: str = "raise") -> Route:
        """The route of a batch.

        Args:
            user_ids (`list[str]`, `list[int]` or `torch.Tensor`):
                One user per row of the batch: text ids, or a tensor (or list of integers) of rows of the bank.
            unseen (`str`, *optional*, defaults to `"raise"`):
                What a user without a row gets: an error, or with `"common"` the common model (D = 0).

        Raises:
            UnknownUserError: an id or index is not in the registry.
            RoutingError: the ids are neither text nor whole numbers, or could be read as both.
        """
        if unseen not in UNSEEN:
            raise ConfigError(f"unseen={unseen!r} is unknown; one of {', '.join(map(repr, UNSEEN))} is needed.")
        if isinstance(user_ids, str | bytes | int) or not isinstance(user_ids, Iterable):
            raise RoutingError(f"{user_ids!r} came as the users of a batch; give a list with one id per row.")
        if isinstance(user_ids, torch.Tensor):
            index = user_ids
            if index.ndim != 1 or index.is_floating_point() or index.dtype is torch.bool:
                raise RoutingError(
                    f"A user index of shape {tuple(index.shape)} and type {index.dtype} came; one whole number per row, "
                    "shape (batch,), is needed."
                )
            index = index.long()
        else:
            user_ids = list(user_ids)
            if all(isinstance(user_id, str) for user_id in user_ids):
                rows = self.users.index(user_ids) if unseen == "raise" else self.users.find(user_ids)
            elif all(isinstance(user_id, int) and not isinstance(user_id, bool) for user_id in user_ids):
                if self._has_numbers():
                    raise RoutingError(
                        f"The whole numbers {user_ids[:5]} may be user ids or rows of the bank: some ids of this adapter are "
                        "numbers too. Give the ids as text, or the rows as a tensor."
                    )
                rows = user_ids
            else:
                kinds = sorted({type(user_id).__name__ for user_id in user_ids})
                raise RoutingError(f"User ids of type {', '.join(kinds)} came; give text ids, or rows as a tensor.")
            index = torch.tensor(rows, dtype=torch.long)
        low, high = index.aminmax() if len(index) else (index.new_zeros(()), index.new_zeros(()))
        if high >= len(self.users) or low < (0 if unseen == "raise" else -1):
            raise UnknownUserError(
                f"User indices from {int(low)} to {int(high)} came; this adapter has the rows 0 to {len(self.users) - 1}. Was "
                "the index made with another registry? (-1, an unseen user, needs unseen='common'.)"
            )
        if high >= self.rows:
            if unseen == "raise":
                raise UnknownUserError(
                    f"User {self.users[int(high)]!r} was added to the registry after the model was made and has no row yet. Call "
                    "model.base_model.grow_users()."
                )
            index = torch.where(index < self.rows, index, -1)
            return Route(index, has_unseen=True)
        return Route(index, bool(low < 0))

    def _has_numbers(self) -> bool:
        """Whether some ids look like row numbers; each id is looked at once."""
        looked_at, found = self._numbers
        if not found and looked_at < len(self.users):
            ids = (self.users[row] for row in range(looked_at, len(self.users)))
            found = any(user_id is not None and user_id.lstrip("-").isdecimal() for user_id in ids)
            self._numbers = len(self.users), found
        return found

    @contextmanager
    def use(self, route: Route) -> Iterator[Route]:
        """Open a route for this thread; routes nest. Its users are in the working sets while it is open."""
        thread = threading.get_ident()
        before = self._routes.get(thread)
        with ExitStack() as stack:
            if route.each is None and not route.has_unseen:
                each, inverse = route.user_index.unique(return_inverse=True)
                if len(each) and int(each[-1] - each[0]) == len(each) - 1:
                    each = slice(int(each[0]), int(each[-1]) + 1)
                route = route._replace(each=each, inverse=inverse)
            if self.working_sets and not route.leases:
                leases = {}
                for name, working_set in self.working_sets.items():
                    leases[name] = working_set.acquire(route.user_index)
                    stack.callback(working_set.release, leases[name])
                route = route._replace(leases=leases)
            self._open(thread, route)
            try:
                yield route
            finally:
                self._open(thread, before)

    def _open(self, thread: int, route: Route | None) -> None:
        if route is None:
            del self._routes[thread]
        else:
            self._routes[thread] = route
        routes = list(self._routes.values())  # a copy: other threads open and close theirs
        self._only = routes[0] if len(routes) == 1 else None

    def current(self) -> Route | None:
        """The route that is open where this is called, or None."""
        if torch.compiler.is_compiling():
            return self._only
        route = self._routes.get(threading.get_ident())
        if route is None and torch._C._current_graph_task_id() != -1:
            # a recomputation on a thread of autograd's own
            routes = list(self._routes.values())  # a copy: other threads open and close theirs
            if len(routes) > 1:
                raise RoutingError(
                    f"A backward recomputes a block while {len(routes)} threads hold routes of this model, so its users "
                    "cannot be told. Keep each forward and backward of a model with external activation checkpointing in "
                    "one thread at a time."
                )
            return routes[0] if routes else None
        return route

    # -- who had data ------------------------------------------------------------------------------------------------

    def mark_visited(self, user_index: torch.Tensor) -> None:
        """Note that these users have data in the coming optimizer step.

        Args:
            user_index (`torch.Tensor` of shape `(batch,)`):
                Rows of the bank; -1 is nobody.
        """
        rows = user_index.unique().tolist()
        if rows and not (rows[0] >= -1 and rows[-1] < len(self.users)):
            raise UnknownUserError(
                f"User indices from {rows[0]} to {rows[-1]} came; this adapter has the rows 0 to {len(self.users) - 1} (-1 is nobody)."
            )
        for working_set in self.working_sets.values():
            working_set.hold(rows)
        self._mark(user_index)

    def _mark(self, user_index: torch.Tensor) -> None:
        key = (user_index.device, len(self.users))
        visited = self._visited.get(key)
        if visited is None:  # setdefault: another thread may have been faster
            visited = self._visited.setdefault(key, torch.zeros(key[1] + 1, dtype=torch.bool, device=key[0]))
        visited[user_index] = True  # nobody (-1) is the last place: to look for him, a GPU would have to wait

    def take_visited(self) -> list[int]:
        """Rows of the users with data since the last call, on any rank, in order; forgets them."""
        noted, self._visited = list(self._visited.values()), {}
        spread = torch.distributed.is_available() and torch.distributed.is_initialized() and not self.visits_are_local
        if not noted and not spread:
            return []
        device = _collective_device() if spread else noted[0].device
        visited = torch.zeros(len(self.users), dtype=torch.uint8, device=device)
        for some in noted:
            visited[: len(some) - 1] |= some[:-1].to(device)
        if spread:
            # A rank without data still steps with the others: gradients are averaged over ranks, so the rows that move
            # must be the same on all of them.
            torch.distributed.all_reduce(visited, op=torch.distributed.ReduceOp.MAX)
        return visited.nonzero().flatten().tolist()

    def forget_visited(self) -> None:
        """Drop the notes, as after a step that the gradient scaler skipped."""
        self._visited = {}
        for working_set in self.working_sets.values():
            working_set.let_go()

    # -- around the base model's forward --------------------------------------------------------------------------------

    @torch.compiler.disable
    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the base model: takes `user_ids` out of its arguments and opens their route.

        A hook and not `BaseTuner.forward`, because the generic `PeftModel.forward` calls the base model directly. It is
        never compiled: notes of visits would be left out of the graph, and looking at the ids would break it.
        """
        entered = self._entered.setdefault(threading.get_ident(), [])
        entered.append(None)  # before anything can fail: the hook after the forward always runs
        if "user_ids" in kwargs:
            kwargs = dict(kwargs)
            user_ids = kwargs.pop("user_ids")
            if user_ids is not None:
                entered[-1] = self.use(self.resolve(user_ids))
                entered[-1].__enter__()
        self._take_route_into_checkpoints(module)
        route = self.current()
        if route is not None and module.training and torch.is_grad_enabled():
            self._mark(route.user_index)
            for lease in route.leases.values():
                lease.working_set.hold_lease(lease)
        return args, kwargs

    @torch.compiler.disable
    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the base model, called also when the forward failed."""
        entered = self._entered[threading.get_ident()]
        context = entered.pop()
        if not entered:
            del self._entered[threading.get_ident()]
        if context is not None:
            context.__exit__(None, None, None)

    def _take_route_into_checkpoints(self, model: nn.Module) -> None:
        # `_gradient_checkpointing_func` is what transformers sets on each block when checkpointing is switched on, and the
        # one thing of it that stayed the same from 4.56 to 5.23. It may be switched on at any time, so look each forward.
        if self._checkpointing is None:
            self._checkpointing = [
                module
                for module in model.modules()
                if hasattr(module, "gradient_checkpointing") or isinstance(module, CheckpointWrapper)
            ]
        for module in self._checkpointing:
            name = "checkpoint_fn" if isinstance(module, CheckpointWrapper) else "_gradient_checkpointing_func"
            function = getattr(module, name, None)
            # one of another router is of an adapter that was unloaded from this base
            ours = isinstance(function, _CheckpointWithRoute) and function.router is self
            if function is not None and not ours:
                setattr(module, name, _CheckpointWithRoute(function, self))


class _CheckpointWithRoute:
    """A checkpoint function whose block is recomputed with the route of its forward."""

    def __init__(self, checkpoint: Callable, router: Router):
        self.checkpoint = checkpoint
        self.router = router

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        route = self.router.current()
        if route is None:
            return self.checkpoint(function, *args, **kwargs)

        def with_route(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with self.router.use(route):
                return function(*inner_args, **inner_kwargs)

        return self.checkpoint(with_route, *args, **kwargs)


def _collective_device() -> torch.device:
    """Where a tensor must lie for the process group: gloo takes the CPU, nccl the rank's accelerator."""
    if torch.distributed.get_backend() == "gloo":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return (
        torch.device("cpu")
        if accelerator is None
        else torch.device(accelerator.type, torch.accelerator.current_device_index())
    )


def get_router(model: nn.Module) -> Router:
    """The router of a model with ShareLoRA layers.

    Raises:
        RoutingError: the model has none.
    """
    for module in model.modules():
        router = getattr(module, "router", None)
        if isinstance(router, Router):
            return router
    raise RoutingError(
        f"{type(model).__name__} has no ShareLoRA adapter, so its rows cannot be given to users. Wrap it with "
        "get_peft_model(model, ShareLoraConfig(...)) or load an adapter first."
    )


@contextmanager
def use_users(model: nn.Module, user_ids: Any, unseen: str = "raise") -> Iterator[Route]:
    """Compute the rows of the batches inside this block with these users' parameters.

    Hold it around forward *and* backward when the model is trained with an activation checkpointing that is not
    transformers' own.

    Args:
        model (`torch.nn.Module`):
            A model with ShareLoRA layers, wrapped or not.
        user_ids (`list[str]` or `torch.Tensor`):
            One user per row of the batch: text ids, or a `(batch,)` tensor of rows of the bank.
        unseen (`str`, *optional*, defaults to `"raise"`):
            `"common"` computes users that are not in the registry with the common model (D = 0) instead of raising.

    Raises:
        UnknownUserError: a user is not in the registry.
        RoutingError: the model has no ShareLoRA layers, or the ids cannot be read.

    Example:

    ```python
    with use_users(model, ["ann", "bob"]):
        rewards = model(**batch_of_two_rows).logits
    ```
    """
    router = get_router(model)
    with router.use(router.resolve(user_ids, unseen)) as route:
        yield route
