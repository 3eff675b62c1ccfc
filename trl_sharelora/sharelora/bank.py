"""The users' own parameters, as the layer sees them.

A module's bank is one small interface: `rows(route)` gives what the layer computes with, `move(row)` one user's D_u, `grow(n)`
adds users. Two kinds:

- [`ResidentBank`]: every user is an ordinary Parameter `(users, ...)` in a module of its own, so that PEFT saves it, TRL's
  reference copy finds it and DDP averages its gradient. For five to some thousand users.
- [`SlotBank`]: the rows rest in a store (memory or files) and the layer sees the *working set*: the users of the steps at hand, in
  a fixed number of slots, as plain tensors. Never Parameters: DDP would add the slots of different users. The cost of a step does
  not depend on the number of users.

[`WorkingSet`] is what all `SlotBank`s of an adapter share: one float32 matrix with a row per slot, all modules of a user side by side,
and beside it the gradients, moments and step counts. Users are paged in before a forward and written back when their slot is needed
for another, or at a checkpoint. A user with a pending gradient, or in an open route, stays.
"""

import functools
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CapacityError, RoutingError, UnsupportedError
from .routing import Route
from .sandwich import Rows
from .store import BANK_FOLDER, Layout, UserStore, moves_by_module, remove_unnamed


def runs_of(places: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbours taken together, so that they can be views: `[1, 2, 3, 7]` -> `[(1, 4), (7, 8)]`."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1][1] = place + 1
        else:
            runs.append([place, place + 1])
    return [(start, end) for start, end in runs]


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

    def rows(self, route: Route, common: torch.Tensor) -> Rows:
        """What the layer computes a batch with."""
        device = self.weight.device
        if not torch.compiler.is_compiling() and route.each is not None and route.inverse is not None:
            each = route.each if isinstance(route.each, slice) else route.each.to(device)
            return Rows(self.weight, common, each, route.inverse.to(device))
        # one entry per row: of a compiled graph, because it must not depend on the number of users
        index = route.user_index.to(device)
        if not route.has_unseen:
            return Rows(self.weight, common, index, None)
        seen = (index >= 0).to(self.weight.dtype).reshape(-1, *[1] * (self.weight.ndim - 1))
        return Rows(self.weight, common, index.clamp(min=0), None, seen)

    def move(self, row: int) -> torch.Tensor:
        """D_u of one user, `(*shape)`."""
        return self.weight[row].detach()

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


class SlotBank(nn.Module):
    """The moves D_u of the users in the working set, for one module; no Parameters.

    Args:
        shape (`tuple[int, ...]`):
            Shape of one user's move.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.working_set: WorkingSet | None = None
        self.number = -1  # which module of the working set's layout
        self.trainable = True

    def rows(self, route: Route, common: torch.Tensor) -> Rows:
        """What the layer computes a batch with.

        Raises:
            RoutingError: the route was opened before the bank was there.
        """
        working_set = self.working_set
        assert working_set is not None
        lease = route.leases.get(working_set.name)
        if lease is None:
            raise RoutingError(
                "A route was opened before this adapter's bank was there, or by another model. Open it with "
                "use_users(model, ids) on the model that is called."
            )
        if not torch.compiler.is_compiling():  # it looks at the host's arrays; the route pins the slots
            lease.renew()
        # unseen users read slot 0, which is always zero
        moves = working_set.module(self.number, self.trainable)
        if torch.compiler.is_compiling():
            return Rows(moves, common, lease.slot, None, None, lease, self.number)
        return Rows(moves, common, lease.neighbours or lease.each, lease.inverse, None, lease, self.number)

    def move(self, row: int) -> torch.Tensor:
        """D_u of one user, `(*shape)`; reads one record if he is not in the working set."""
        assert self.working_set is not None
        return self.working_set.moves(row)[self.working_set.layout.modules[self.number][0]]

    def grow(self, num_users: int) -> None:
        """Allow their rows; a user's record is made at his first step."""
        if self.working_set is not None:
            self.working_set.store.num_users = num_users

    def requires_grad_(self, requires_grad: bool = True) -> "SlotBank":
        self.trainable = requires_grad
        return self

    def extra_repr(self) -> str:
        kind = "" if self.working_set is None else f"{self.working_set.store.kind}, slots={self.working_set.slots}, "
        return f"{kind}move={self.shape}"


class Lease:
    """The slots of a route's rows, and the promise that they still hold what they held.

    Backward runs later than forward; if a slot was given to another user or stepped in between, its gradient would be silently
    wrong.
    """

    def __init__(self, working_set: "WorkingSet", each: np.ndarray, inverse: np.ndarray):
        self.working_set = working_set
        device = working_set.weight.device
        self.each = torch.from_numpy(each).to(device)  # (users,) the slots, each once; 0 for the unseen
        self.inverse = torch.from_numpy(inverse).to(device)  # (batch,) place in `each`
        self.slot = self.each[self.inverse]  # (batch,) int64
        ascending = len(each) > 0 and bool((np.diff(each) == 1).all())
        self.neighbours = slice(int(each[0]), int(each[-1]) + 1) if ascending else None
        self.slots = each[each > 0]  # on the host
        self.users = working_set.users_in(self.slots)
        self.versions = working_set.versions[self.slots]

    def renew(self) -> None:
        """A forward begins: an optimizer step since the last one, inside the same route, is no matter.

        Raises:
            RoutingError: a slot belongs to another user now, or this is the recomputation of a forward before a change.
        """
        versions = self.working_set.versions[self.slots]
        if not np.array_equal(versions, self.versions):
            if torch._C._current_graph_task_id() != -1 or self.working_set.users_in(self.slots) != self.users:
                self.check(self.versions)
            self.versions = versions

    def check(self, versions: np.ndarray) -> None:
        """Raises RoutingError if a slot was changed since it had this version."""
        if not np.array_equal(self.working_set.versions[self.slots], versions):
            raise RoutingError(
                "A row of the working set has changed between a forward and its backward: an optimizer step was taken, or the slot was "
                "given to another user. Do the backward before the step; for a backward outside of training mode keep "
                "`with use_users(model, ids):` open around it."
            )


class WorkingSet:
    """The users of the steps at hand, for all modules of one adapter.

    Args:
        name (`str`):
            Of the adapter.
        layout ([`Layout`]):
            Of a user's record.
        store ([`UserStore`]):
            Where the others rest.
        slots (`int`, *optional*):
            Fixed number of users at a time. By default as many as come; then tensors change their size, which is no matter
            but for torch.compile and CUDA graphs.
        device (`torch.device`, *optional*):
            Of the base.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        store: UserStore,
        slots: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.name = name
        self.layout = layout
        self.store = store
        # with user_sharding="owner": which users are this process's, and where to read the others from while evaluating
        self.owned: np.ndarray | None = None
        self.foreign: UserStore | None = None
        # the segments of all processes, from when they are gathered until the list is written
        self.gathered: list[dict[str, Any]] | None = None
        self.fixed = slots is not None
        self.slots = 0
        self.versions = np.zeros(1, dtype=np.int64)
        self._user_of: list[int] = [-1]
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # least recently used first
        self._free: list[int] = []
        self._pins: Counter[int] = Counter()
        self._held: set[int] = set()
        self._dirty: set[int] = set()
        self._lock = threading.RLock()
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: Future | None = None
        sizes = np.cumsum([0, *layout.sizes]).tolist()
        self.spans = list(zip(sizes[:-1], sizes[1:], strict=True))
        # slot 0 is nobody's and always zero, for unseen users; slots 1, 2, ... are users'
        self.weight = torch.zeros(1, layout.numel, device=device)
        self.gradient = torch.zeros_like(self.weight)
        self.exp_avg = torch.zeros_like(self.weight)
        self.exp_avg_sq = torch.zeros(1, layout.second_numel, device=device)
        self.step = torch.zeros(1)  # one count per user, on the host
        self._leaves: list[torch.Tensor] = []
        self._resize(1 if slots is None else slots)

    def __getstate__(self) -> Any:
        raise UnsupportedError(
            "A model with a bank of users in memory or in files was pickled; its rows are not in the model. Save it with save_pretrained."
        )

    def __deepcopy__(self, memo: dict) -> "WorkingSet":
        self.flush()
        copy = WorkingSet(
            self.name, self.layout, self.store.snapshot(), self.slots if self.fixed else None, self.weight.device
        )
        copy.owned = self.owned
        memo[id(self)] = copy
        return copy

    # -- the tensors ------------------------------------------------------------------------------------------------------

    def _resize(self, slots: int) -> None:
        """More slots; the users in them stay where they are."""
        more = slots - self.slots

        def grown(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])

        self._replace(grown)
        self.step = grown(self.step)
        self.versions = np.concatenate([self.versions, np.zeros(more, dtype=np.int64)])
        self._user_of += [-1] * more
        self._free += range(slots, self.slots, -1)
        self.slots = slots

    def _replace(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.weight.grad = None
        self.weight.data = change(self.weight.data)  # .data keeps the tensor that the optimizer holds
        before, self.gradient = self.gradient, change(self.gradient)
        if self.gradient is not before:
            before.zero_()  # what comes to it later is passed on
        self.weight.grad = self.gradient
        self.exp_avg, self.exp_avg_sq = change(self.exp_avg), change(self.exp_avg_sq)
        leaves: list[torch.Tensor] = []
        for (start, end), (_, shape) in zip(self.spans, self.layout.modules, strict=True):
            leaf = self.weight.detach()[:, start:end].unflatten(1, shape).requires_grad_()
            leaf.grad = self.gradient[:, start:end].unflatten(1, shape)
            leaf.register_post_accumulate_grad_hook(
                functools.partial(_pass_on_gradient, weakref.ref(self), len(leaves))
            )
            leaves.append(leaf)
        self._leaves = leaves  # at once: another thread may be in a forward

    def module(self, number: int, trainable: bool = True) -> torch.Tensor:
        """`(slots + 1, *shape)`: one module's moves, a view of all; its `.grad` is a view of the gradient."""
        leaf = self._leaves[number]
        return leaf if trainable else leaf.detach()

    def to(self, device: torch.device | str) -> "WorkingSet":
        """Move the working set beside the base."""
        if self.weight.device != torch.device(device):
            self._replace(lambda tensor: tensor.to(device))
        return self

    # -- who is in ------------------------------------------------------------------------------------------------------------

    def acquire(self, user_index: torch.Tensor) -> Lease:
        """Page in the users of a batch and pin them until [`release`].

        Raises:
            CapacityError: there are more users at once than slots.
        """
        on_host = user_index.cpu().numpy()
        users, inverse = np.unique(on_host, return_inverse=True)
        with self._lock:
            rows = users[users >= 0].tolist()
            self._page_in(rows)
            slots = np.array([self._slot_of[row] for row in rows], dtype=np.int64)
            self._pins.update(slots.tolist())
            each = np.concatenate([np.zeros(len(users) - len(rows), dtype=np.int64), slots])  # -1 sorts first
        return Lease(self, each, inverse.reshape(-1))

    def release(self, lease: Lease) -> None:
        """End an [`acquire`]."""
        with self._lock:
            for slot in lease.slots.tolist():
                self._pins[slot] -= 1
                if not self._pins[slot]:
                    del self._pins[slot]

    def hold(self, rows: Iterable[int]) -> None:
        """Keep these users in until [`let_go`]: they have data in the coming step."""
        with self._lock:
            rows = [row for row in rows if row >= 0]
            self._page_in(rows)
            self._held.update(self._slot_of[row] for row in rows)

    def hold_lease(self, lease: Lease) -> None:
        """[`hold`] the users of an open route, who are in already."""
        with self._lock:
            self._held.update(lease.slots.tolist())

    def zero_gradient(self) -> None:
        """What an optimizer's `zero_grad` does: pending gradients are zero again, and stay where the layers add to them."""
        with self._lock:
            self.gradient.zero_()
            self.weight.grad = self.gradient

    def let_go(self) -> None:
        """The step is done, or given up; pending gradients are zero again."""
        with self._lock:
            self.gradient[[0, *sorted(self._held)]] = 0
            self._held.clear()

    def _page_in(self, rows: Sequence[int]) -> None:
        missing = [row for row in dict.fromkeys(rows) if row not in self._slot_of]
        for row in rows:
            if row in self._slot_of:
                self._slot_of.move_to_end(row)
        if not missing:
            return
        wanted = {self._slot_of[row] for row in rows if row in self._slot_of}
        self._make_room(len(missing), wanted)
        records = self._records(missing)
        slots = [self._free.pop() for _ in missing]
        step, weight, exp_avg, exp_avg_sq = self.layout.split(records)
        at = torch.tensor(slots)
        self.step[at] = step
        on_device = at.to(self.weight.device)
        for target, source in ((self.weight.data, weight), (self.exp_avg, exp_avg), (self.exp_avg_sq, exp_avg_sq)):
            target[on_device] = source.to(target.device).to(target.dtype)
        self.gradient[on_device] = 0  # a backward in eval mode may have left one to the user before
        self.versions[slots] += 1
        for row, slot in zip(missing, slots, strict=True):
            self._slot_of[row] = slot
            self._user_of[slot] = row

    def _make_room(self, count: int, wanted: set[int]) -> None:
        short = count - len(self._free)
        if short <= 0:
            return
        idle = [
            slot for slot in self._slot_of.values() if not (slot in wanted or slot in self._held or self._pins[slot])
        ]
        if len(idle) < short:
            if self.fixed:
                busy = self.slots - len(self._free) - len(idle)
                raise CapacityError(
                    f"{count} more users are needed at once, but the working set has {self.slots} slots, {busy} of them in use. A "
                    "training step needs as many as its batches have users: per_device_train_batch_size x "
                    "gradient_accumulation_steps (x processes, unless user_sharding='owner'); an evaluation per_device_eval_batch_size. "
                    "Raise bank_slots, or leave it out."
                )
            self._resize(max(2 * self.slots, self.slots + short - len(idle)))
            return self._make_room(count, wanted)
        self._evict(idle[:short])

    def _evict(self, slots: list[int]) -> None:
        self._write_back([slot for slot in slots if slot in self._dirty])  # first: if the disk is full, they stay
        for slot in slots:
            del self._slot_of[self._user_of[slot]]
            self._user_of[slot] = -1
            self.versions[slot] += 1
            self._free.append(slot)

    def _write_back(self, slots: list[int]) -> None:
        if not slots:
            return
        records = torch.zeros(len(slots), self.layout.record_bytes, dtype=torch.uint8)
        step, weight, exp_avg, exp_avg_sq = self.layout.split(records)
        at = torch.tensor(slots)
        step.copy_(self.step[at])
        on_device = at.to(self.weight.device)
        for target, source in ((weight, self.weight.data), (exp_avg, self.exp_avg), (exp_avg_sq, self.exp_avg_sq)):
            target.copy_(source[on_device])
        self.store.write([self._user_of[slot] for slot in slots], records)
        self._dirty.difference_update(slots)

    # -- reading ahead ----------------------------------------------------------------------------------------------------------

    def prefetch(self, rows: Iterable[int]) -> None:
        """Start to read the users of the next window, on a thread of its own."""
        with self._lock:
            # a user without a record is zeros: nothing to read
            missing = [row for row in dict.fromkeys(rows) if row not in self._slot_of and row in self.store]
            self._ahead = None
            if missing:
                if self._reader is None:
                    self._reader = ThreadPoolExecutor(1, thread_name_prefix="sharelora-bank")
                self._ahead = self._reader.submit(self._read_ahead, missing)

    def _read_ahead(self, rows: list[int]) -> dict[int, torch.Tensor]:
        return dict(zip(rows, self.store.read(rows), strict=True))

    def _records(self, rows: list[int]) -> torch.Tensor:
        pending, self._ahead = self._ahead, None
        ahead = {} if pending is None else pending.result()  # a damaged record raises here
        if all(row in ahead for row in rows) and rows:
            return torch.stack([ahead[row] for row in rows])
        records = torch.zeros(len(rows), self.layout.record_bytes, dtype=torch.uint8)
        unread = []
        for number, row in enumerate(rows):
            if row in ahead:
                records[number] = ahead[row]
            else:
                unread.append(number)
        for number in unread:
            row = rows[number]
            records[number] = self._store_of(row).read([row])[0]
        return records

    def _store_of(self, row: int) -> UserStore:
        return self.store if self.foreign is None or self.owned is None or self.owned[row] else self.foreign

    # -- what the optimizer needs -----------------------------------------------------------------------------------------------

    def held(self) -> list[int]:
        """Slots of the users with data in the coming step."""
        return sorted(self._held)

    def mine(self, rows: Sequence[int]) -> list[int]:
        """Those of some rows that this process keeps."""
        return list(rows) if self.owned is None else [row for row in rows if self.owned[row]]

    def users_in(self, slots: Iterable[int]) -> list[int]:
        """Rows of the users in some slots, -1 for a free one."""
        return [self._user_of[slot] for slot in slots]

    def slots_of(self, rows: Sequence[int]) -> list[int]:
        """Slots of users that are in.

        Raises:
            RoutingError: one of them is not.
        """
        with self._lock:
            missing = [row for row in rows if row not in self._slot_of]
            if missing:
                raise RoutingError(
                    f"The users of rows {missing[:5]} had data in this step but are not in the working set: they were seen by another "
                    "process only. Before the first forward of a step call working_set.hold(rows) with the users of all processes, "
                    "as the trainers do."
                )
            return [self._slot_of[row] for row in rows]

    def stepped(self, slots: Sequence[int]) -> None:
        """Note that the optimizer has changed these slots; their gradients are zero again."""
        with self._lock:
            self._dirty.update(slots)
            self.versions[list(slots)] += 1

    # -- the whole bank ---------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write back every changed user of the working set; they stay in."""
        with self._lock:
            self._write_back(sorted(self._dirty))

    def forget_slots(self, rows: Iterable[int] | None = None) -> None:
        """Take users out without writing them back, as when the store was loaded anew; all of them by default."""
        with self._lock:
            self._ahead = None
            for row in list(self._slot_of) if rows is None else list(rows):
                slot = self._slot_of.pop(row, None)
                if slot is not None:
                    self._user_of[slot] = -1
                    self.versions[slot] += 1
                    self._dirty.discard(slot)
                    self._held.discard(slot)
                    self._free.append(slot)

    def moves(self, row: int) -> dict[str, torch.Tensor]:
        """D_u of one user by module, float32 on the bank's device; reads at most one record."""
        with self._lock:
            slot = self._slot_of.get(row)
            if slot is not None:
                weight = self.weight.detach()[slot].clone()
            else:
                weight = self.layout.split(self._store_of(row).read([row]))[1][0].float().to(self.weight.device)
        return moves_by_module(self.layout, weight)

    def save(self, directory: str | Path, num_users: int) -> None:
        """Save all users into `directory/bank`."""
        if self.gathered is not None:
            self.store.write_manifest(Path(directory) / BANK_FOLDER, self.gathered, num_users)
            remove_unnamed(Path(directory) / BANK_FOLDER, self.gathered)
            self.gathered = None
            return
        self.flush()
        self.store.save(Path(directory) / BANK_FOLDER, num_users)

    def own(self, mine: np.ndarray) -> None:
        """Keep only these users, `(users,)` bool; the others are another process's."""
        self.owned = mine
        self.store.keep_only(mine)
        self.forget_slots()

    def borrow(self, directory: str | Path, num_users: int) -> None:
        """Read the other processes' users from a folder, until [`give_back`]."""
        self.foreign = UserStore(self.layout, "mmap", self.store.registry_id)
        self.foreign.load(directory, num_users)

    def give_back(self) -> None:
        assert self.owned is not None and self.foreign is not None
        self.forget_slots([row for row in list(self._slot_of) if not self.owned[row]])
        self.foreign.close()
        self.foreign = None

    def load(self, directory: str | Path, num_users: int) -> None:
        """Take the users saved in `directory/bank`."""
        self.store.load(Path(directory) / BANK_FOLDER, num_users)
        if self.owned is not None:
            self.store.keep_only(self.owned)
        self.forget_slots()


def _pass_on_gradient(working_set: weakref.ref[WorkingSet], number: int, leaf: torch.Tensor) -> None:
    """Compiled code adds to the leaf of its forward; the Functions of sandwich.py look for the one there is now."""
    owner = working_set()
    if owner is not None and leaf.grad is not None and owner._leaves[number] is not leaf:
        now = owner._leaves[number].grad
        assert now is not None
        now[: len(leaf)] += leaf.grad.to(now.device)
        leaf.grad.zero_()
