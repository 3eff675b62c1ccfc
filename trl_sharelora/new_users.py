"""Users who arrive after the training: rows for them, a fit to their first answers, and which pair to ask next.

B, the head, A_0 and all other users stay as they are. A newcomer's own part has thousands of entries and he gives ten answers, so the
prior matters more than the solver: how the trained users differ from each other (the principal directions of their moves,
[`user_spread`]) is where a new one is looked for,

    D_new = a mean + sum over k of y_k sigma_k d_k,        y_k ~ N(0, tau^2)

and the answers are Bradley-Terry comparisons. `a` is 1 where the mean of the trained users is the better start and 0 where the common model
(D = 0) is; tau = 0 is no move at all. Which of these the answers speak for is weighed by their evidence (Laplace), and held-out folds of the
newcomer's own answers then take back what does not hold: with no answers, or with answers that tell nothing, he gets the common model. Before
the first answer the common model has nine tenths of the weight: who is served well by it must not be moved by chance.

Everything is read off one kind of pass ([`_Passes`]): each comparison in a slot of its own of the user-indexed layer, so one forward and
backward gives all margins and all per-comparison gradients, of many newcomers together.
"""

import copy
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.autograd.function import once_differentiable

from .confidence import CONFIDENCE_FOLDER, _open, _save_sets, add_comparisons, load_sets
from .data import check_preference_rows, tokenize_preference
from .errors import ConfigError, NonFiniteError, PessimismError, UserIdError, some_rows
from .pessimism import EllipsoidSets
from .scoring import SKETCH_SIZE, Scorer, check_known
from .sharelora.bank import ResidentBank, SlotBank, WorkingSet
from .sharelora.config import ShareLoraConfig
from .sharelora.head import PersonalHead
from .sharelora.optimizer import ShareLoraAdamW
from .sharelora.routing import Router, get_router
from .sharelora.sandwich import Rows
from .users import UserRegistry


logger = logging.getLogger(__name__)

METHODS = ("auto", "gauss-newton", "pca", "full")
# Of the directions kept: at least this share of the users' spread, in at least 4 and at most 32 of them.
EXPLAINED, FEWEST_DIRECTIONS, MOST_DIRECTIONS = 0.9, 4, 32
# A trained user's move is his taste and what his few comparisons left open. The latter is about the same in all of very many directions, so
# it adds as much to each eigenvalue, and where tastes differ in fewer than half as many directions as there are users the median eigenvalue
# is that. Taken off from 16 users on: with fewer the median may be a taste. (Two seeds of the demo's world, 40 newcomers each, two of 39
# directions are tastes: accuracy +.003 at 20 answers, +.006 at 50.)
NOISE_FROM = 16
# Users whose moves are looked at, and numbers of theirs at a time (1 GiB): the spread of more users is not known better.
MOST_USERS, MOST_NUMBERS = 1024, 2**28
# What the evidence weighs, (a, tau, weight before the first answer): the common model, the users' mean, and around either of them a spread
# half and once that of the trained users. The weight of the common model is what decides whom the answers may harm. Difference of accuracy to
# it, demo's world, of 5 x 48 newcomers with tastes of their own at 5 and 10 answers, and of 120 who answer as the common model would at 5, 10,
# 20 and 50 (expected under their own probabilities; standard error .001):
#   .75: +.082, +.123   -.005, -.003, -.002, -.000
#   .9:  +.074, +.116   -.001, -.001, -.001, -.000
# All alike, 1/8 and with tau = 2 too, linearised model, fewer seeds: +.073, +.106 (.064, .101 with .75) and -.025, -.021, -.011, -.003. At 20
# answers .9 costs half a point (linearised: +.136 and +.131), at 50 nothing (+.154 and +.153). So .75: half a point at most for those who are
# the common model after all, and from .7 to .8 points for everybody else.
COMMON_WEIGHT = 0.75
HYPOTHESES = (
    (0.0, 0.0, COMMON_WEIGHT),
    *((a, tau, (1 - COMMON_WEIGHT) / 5) for a, tau in ((0.0, 0.5), (0.0, 1.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0))),
)
FOLDS = 5
# Shrinkage that the held-out folds choose from. Before they are asked, mostly the whole fit: the evidence has shrunk it already.
SHRINKAGES, SHRINKAGE_PRIOR = (0.0, 0.25, 0.5, 0.75, 1.0), (0.025, 0.025, 0.025, 0.025, 0.9)
# Each shrinkage is judged at the temperature that suits it best: which answer is the better one, not how sure the model is of it. (At
# temperature 1 an overfitted bank, whose margins are too large, had right fits shrunk: .807 instead of .837 at 20 answers of 20 newcomers of the demo's
# world.)
TEMPERATURES = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
# "auto" goes from the linearised problem to the real one where there are enough answers to leave the neighbourhood of the common model: in
# the demo's world the two are alike at 10 answers (.793, .798) and a point apart from 20 on (.831, .838), for seven times the passes.
PCA_FROM = 16
# Of L-BFGS; it starts at the solution of the linearised problem, in coordinates in which that is a sphere.
MOST_PASSES = 6
# Of "full": an entry can move by the sum of the rates, .015 at most, and the moves of trained users are smaller on average.
FULL_STEPS, FULL_RATE = 30, 1e-3


@torch.inference_mode(False)  # a bank that grew in it could not be trained
def add_users(model: Any, user_ids: Iterable[str | int]) -> list[int]:
    """The rows of users, new ones among them; a new user starts as the common model (D = 0) and can be scored and trained at once.

    All other rows stay bit-identical. In a store (`bank="ram"`, `"mmap"`) a new user costs nothing until his first step; a resident
    bank is copied once per call. Until a trainer of this package trains him he is no part of [`user_spread`].

    Args:
        model ([`~peft.PeftModel`]):
            With a ShareLoRA adapter. All its ShareLoRA adapters get the users.
        user_ids (`Iterable[str | int]`):
            Ids, known ones too.

    Raises:
        UserIdError: an id is not usable; nobody is added then.
        RoutingError: the model has no ShareLoRA adapter.
        ConfigError: no model came, or no list of ids.

    Example:

    ```python
    add_users(model, ["eve"])
    evaluate_users(model, rows_of_eve, processing_class=tokenizer)
    ```
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{type(model).__name__} came as the model; a PeftModel with a ShareLoRA adapter is needed. Load a saved one first "
            "(PeftModel.from_pretrained), or use `trl-sharelora add-users`."
        )
    if not isinstance(user_ids, Iterable):
        raise ConfigError(f"{user_ids!r} came as the users; a list of ids is needed, for one user too: [user_id].")
    router = get_router(model)
    before = len(router.users)
    rows = router.users.add(user_ids)
    model.base_model.grow_users()
    for config in model.peft_config.values():
        if isinstance(config, ShareLoraConfig):
            config.set_users(
                router.users
            )  # an additional adapter may have come with a registry of its own, equal until now
            if config.trained_users is None and len(router.users) > before:
                config.trained_users = before
    return rows


# -- how the trained users differ


@dataclass
class UserSpread:
    """How the moves of trained users are spread: the prior of a newcomer's. Made by [`user_spread`].

    Args:
        mean (`torch.Tensor` of shape `(entries,)`):
            Their mean move, all modules (and the personal score head) side by side.
        directions (`torch.Tensor` of shape `(k, entries)`):
            Orthonormal principal directions d_k.
        scales (`torch.Tensor` of shape `(k,)`):
            Standard deviation sigma_k of the users along each.
        explained (`float`):
            Share of the users' variance, less the noise, in these directions.
        n_users (`int`):
            Users looked at.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    scales: torch.Tensor
    explained: float
    n_users: int

    @property
    def basis(self) -> torch.Tensor:
        """`(1 + k, entries)`: the mean and `sigma_k d_k`, what the coordinates `(a, y)` of a newcomer multiply."""
        return torch.cat([self.mean[None], self.scales[:, None] * self.directions])

    def save(self, path: str | os.PathLike) -> Path:
        """Write it as a safetensors file; it holds no user's row."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).contiguous().cpu() for name in ("mean", "directions", "scales")}
        save_file(tensors, target, metadata={"explained": repr(self.explained), "n_users": str(self.n_users)})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike) -> "UserSpread":
        """Read what [`save`] wrote.

        Raises:
            ConfigError: there is no such file, or it is torn or something else.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in ("mean", "directions", "scales")}
            return cls(**tensors, explained=float(metadata["explained"]), n_users=int(metadata["n_users"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{os.fspath(path)!r} cannot be read as a spread of users ({type(error).__name__}); give the file that UserSpread.save or "
                "`trl-sharelora shrink-users --spread_file` wrote."
            ) from None

    def _check_fits(self, entries: int) -> None:
        if len(self.mean) != entries:
            raise ConfigError(
                f"The spread that came is of {len(self.mean)} numbers per user, this adapter has {entries}: it was made from another one. Take that of "
                "this adapter, or leave it out."
            )

    def __repr__(self) -> str:
        return f"UserSpread(k={len(self.scales)}, explained={self.explained:.3f}, n_users={self.n_users})"


def user_spread(
    model: Any,
    user_ids: Iterable[str | int] | None = None,
    *,
    comparisons: dict[str, int] | None = None,
    k: int | None = None,
) -> UserSpread:
    """The principal directions of trained users' moves, over all modules jointly.

    With weights `w_u` that sum to 1: `mean = sum w_u D_u`, covariance `sum w_u (D_u - mean)(D_u - mean)' / (1 - sum w_u^2)`, by the
    eigenvectors of the users' Gram matrix. Of 16 users or more what the training's noise adds to every direction, the median eigenvalue, is
    taken off (the spiked covariance model; Johnstone, 2001, "On the distribution of the largest eigenvalue in principal components
    analysis").

    Args:
        model ([`~peft.PeftModel`]):
            With a ShareLoRA adapter.
        user_ids (`Iterable[str | int]`, *optional*):
            Whose; by default all of the training who have moved (1,024 of them, drawn by a fixed seed, if there are more), without those
            who were added and fitted after it: fits to few answers are nearer to the common model than people are.
        comparisons (`dict[str, int]`, *optional*):
            How many comparisons each was trained on; a user weighs by it. By default all weigh the same.
        k (`int`, *optional*):
            Number of directions, if there are as many. By default as many as hold 90 % of the variance, from 4 to 32.

    Raises:
        UnknownUserError: a user is not in the registry.
        ConfigError: `k` is no whole number of at least 1, or fewer than three users have moved: then there is no spread.
        NonFiniteError: a move is NaN or infinite; names the users.
    """
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ConfigError(f"k={k!r} came; a whole number of directions, at least 1, is needed.")
    bank = _UserMoves(model)
    users = get_router(model).users
    rows = _some(bank.trained(), bank.entries) if user_ids is None else users.index(user_ids)
    moves = bank.read(rows)
    keep = moves.any(1)
    rows, moves = [row for row, kept in zip(rows, keep.tolist(), strict=True) if kept], moves[keep]
    if len(rows) < 3:
        raise ConfigError(
            f"Of the users of the training (or those named) {len(rows)} have a move of their own, and the spread of at least 3 is needed. Train it "
            "first, or fit newcomers with method='gauss-newton' or 'full', which do without."
        )
    bad = [str(users[row]) for row, fine in zip(rows, moves.isfinite().all(1).tolist(), strict=True) if not fine]
    if bad:
        raise NonFiniteError(
            f"The rows of {len(bad)} users are NaN or infinite: {', '.join(map(repr, bad[:5]))}. Their training has diverged; go back to an "
            "earlier checkpoint, or name the other users."
        )
    weights = torch.ones(len(rows), dtype=torch.float64)
    if comparisons is not None:
        counts = dict(zip(users.names(comparisons), comparisons.values(), strict=True))
        weights = torch.tensor([float(counts.get(str(users[row]), 0)) for row in rows], dtype=torch.float64)
        if not bool((weights > 0).sum() >= 3 and (weights >= 0).all() and weights.isfinite().all()):
            raise ConfigError(
                "comparisons gives fewer than 3 of the users with moves a number above 0; give the number of training comparisons by user id."
            )
    weights = (weights / weights.sum()).to(moves.device)
    mean = (weights.to(moves.dtype) @ moves).contiguous()
    centred = (moves - mean) * weights.sqrt().to(moves.dtype)[:, None]
    gram = _gram(centred) / (1 - weights.square().sum())
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rank = int((values > 1e-10 * values[0]).sum()) if bool(values[0] > 0) else 0
    if not rank:
        raise ConfigError("All users have the same move, so there is no spread to look for newcomers in.")
    counted = int((weights > 0).sum())
    if counted >= NOISE_FROM:
        # of as many eigenvalues as the users' differences can have, those that are zero too: where tastes are few and nothing was left open,
        # the median of the others would be a taste
        values = (values - values[: counted - 1].median()).clamp(min=0)
        rank = min(rank, max(1, int((values > 0).sum())))
    share = values.cumsum(0) / values.sum()
    wanted = int((share < EXPLAINED).sum()) + 1
    kept = min(rank, max(FEWEST_DIRECTIONS, min(MOST_DIRECTIONS, wanted)) if k is None else k)
    directions = vectors[:, :kept].T.to(moves.dtype) @ centred
    directions = directions / directions.norm(dim=1, keepdim=True)
    return UserSpread(mean, directions, values[:kept].sqrt().to(moves.dtype), float(share[kept - 1]), len(rows))


def _some(rows: list[int], entries: int) -> list[int]:
    """All rows, or as many as fit into the memory, drawn by a fixed seed."""
    limit = max(64, min(MOST_USERS, MOST_NUMBERS // max(entries, 1)))
    return rows if len(rows) <= limit else sorted(np.random.default_rng(0).permutation(rows)[:limit].tolist())


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """`rows rows'` in float64, some columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in rows.split(max(1, 2**24 // len(rows)), dim=1):
        wide = part.double()
        total += wide @ wide.T
    return total


class _UserMoves:
    """The users' own parameters of the active adapter, as one long vector per user, wherever they rest."""

    def __init__(self, model: Any):
        config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
        if not isinstance(config, ShareLoraConfig):
            raise ConfigError(
                f"{type(model).__name__} has no active ShareLoRA adapter; give a PeftModel with one (a reward model that was trained with "
                "ShareLoraRewardTrainer)."
            )
        adapter = model.active_adapter
        router = get_router(model)
        self.users = router.users
        self.trained_users = config.trained_users
        self.working_set: WorkingSet | None = router.working_sets.get(adapter)
        layers = [m for m in model.modules() if hasattr(m, "sharelora_common") and adapter in m.sharelora_common]
        self.banks: list[ResidentBank | SlotBank] = [layer.bank(adapter) for layer in layers]
        if self.working_set is not None:
            self.banks.sort(key=lambda bank: bank.number if isinstance(bank, SlotBank) else -1)
        if config.personal_head:
            self.banks += [module.moves for module in model.modules() if isinstance(module, PersonalHead)]
        if not self.banks:
            raise ConfigError(
                f"{type(model).__name__} says that it has an adapter, but no ShareLoRA layer is in it (merge_and_unload takes them out, in place). "
                "Load it anew."
            )
        self.shapes = [
            tuple(bank.shape if isinstance(bank, SlotBank) else bank.weight.shape[1:]) for bank in self.banks
        ]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.entries = sum(self.sizes)

    def moved(self) -> list[int]:
        """Rows of the users whose move may be other than zero."""
        if self.working_set is not None:
            self.working_set.flush()
            return [row for row in self.working_set.store.rows() if self.users[row] is not None]
        moved = [bank.weight.detach().flatten(1).any(1) for bank in self.banks if isinstance(bank, ResidentBank)]
        return torch.stack(moved).any(0).nonzero().flatten().tolist()

    def trained(self) -> list[int]:
        """Those of [`moved`] who are of the training and were not only fitted after it."""
        return [row for row in self.moved() if self.trained_users is None or row < self.trained_users]

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """`(len(rows), entries)` float32."""
        if self.working_set is not None:
            parts = [torch.cat([move.flatten() for move in self.working_set.moves(row).values()]) for row in rows]
            return torch.stack(parts) if parts else self.working_set.weight.new_zeros(0, self.entries)
        at = torch.tensor(list(rows), dtype=torch.long)
        residents = [bank.weight.detach() for bank in self.banks if isinstance(bank, ResidentBank)]
        return torch.cat([weight[at.to(weight.device)].flatten(1).float() for weight in residents], 1)

    @torch.no_grad()
    def write(self, row: int, move: torch.Tensor) -> None:
        """One user's move `(entries,)`; in a store his moments are zero and his step count is 0 after it, as of a new user."""
        working_set = self.working_set
        if working_set is None:
            for bank, shape, part in zip(self.banks, self.shapes, move.split(self.sizes), strict=True):
                assert isinstance(bank, ResidentBank)
                bank.weight.data[row] = part.reshape(shape).to(bank.weight)
            return
        lease = working_set.acquire(torch.tensor([row]))
        try:
            slot = int(lease.slots[0])
            working_set.weight.data[slot] = move.to(working_set.weight)
            for other in (working_set.gradient, working_set.exp_avg, working_set.exp_avg_sq, working_set.step):
                other[slot] = 0
            working_set.stepped([slot])
        finally:
            working_set.release(lease)

    def split(self, moves: torch.Tensor) -> list[torch.Tensor]:
        """`(slots, entries)` -> per bank a tensor of its own, `(slots, *shape)`."""
        return [
            part.unflatten(1, shape).clone()
            for part, shape in zip(moves.split(self.sizes, dim=1), self.shapes, strict=True)
        ]

    @contextmanager
    def given(self, moves: Sequence[torch.Tensor], inverse: torch.Tensor) -> Iterator[None]:
        """The layers compute row i of a batch with `moves[..][inverse[i]]` instead of the bank's; no bank is written."""
        slots = slice(0, len(moves[0]))

        def rows_of(own: torch.Tensor) -> Any:
            return lambda route, common: Rows(own, common, slots, inverse)

        try:
            for bank, own in zip(self.banks, moves, strict=True):
                bank.__dict__["rows"] = rows_of(own)
            yield
        finally:
            for bank in self.banks:
                bank.__dict__.pop("rows", None)


# -- passes over comparisons


def _product(tokens: torch.Tensor, weight: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """`tokens @ weight`, of which only the rows `told` are not zero."""
    if 4 * len(told) > 3 * len(tokens):
        return tokens @ weight
    return tokens.new_zeros(len(tokens), weight.shape[1]).index_copy_(0, told, tokens[told] @ weight)


def _told(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient `(batch, ..., out)` by tokens, `(tokens, out)`, and which of them have any.

    Those that have none are the padding, and in the uppermost layer all but the last token, at which the reward is read: a fifth of the backward's
    products of a model of four layers.
    """
    tokens = gradient.reshape(-1, gradient.shape[-1])
    return tokens, torch.linalg.vector_norm(tokens, dim=1).ne(0).nonzero().flatten()  # NaN is a gradient too


class _Frozen(torch.autograd.Function):
    """A frozen linear module whose backward leaves out the tokens that have no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        tokens, told = _told(dy)
        return _product(tokens, ctx.saved_tensors[0], told).reshape(*dy.shape[:-1], -1), None, None


class _Alike(torch.autograd.Function):
    """A layer of `share="B"` where all slots hold the same D: one product with `W + s B (A_0 + D)`, and in the backward a gradient of each slot.

    Most of what the adapter costs is passes over the tokens, which this saves.
    """

    @staticmethod
    def forward(ctx, x, own, common, B, weight, bias, inverse, scaling):
        ctx.save_for_backward(x, own, common, B, weight, inverse)
        ctx.scaling = scaling
        return F.linear(x, torch.addmm(weight, B, own[0] + common, alpha=scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, own, common, B, weight, inverse = ctx.saved_tensors
        tokens, told = _told(dy)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _product(tokens, torch.addmm(weight, B, own[0] + common, alpha=ctx.scaling), told).reshape(x.shape)
        dh = _product(tokens, B, told).reshape(len(x), -1, B.shape[1])
        of_rows = torch.bmm(dh.mT, x.reshape(len(x), -1, x.shape[-1])).mul_(ctx.scaling)
        return dx, of_rows.new_zeros(own.shape).index_add_(0, inverse, of_rows), *[None] * 6


@contextmanager
def _quick(scorer: Scorer, alike: bool) -> Iterator[None]:
    """Linear modules as [`_Frozen`] ones and, where all slots are `alike`, layers as [`_Alike`] ones; what is not plain stays as it is."""
    adapter = scorer.adapter

    def frozen(module: nn.Linear) -> Any:
        return lambda x: _Frozen.apply(x, module.weight, module.bias)

    def merged(layer: Any, base: nn.Linear) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = layer.bank(adapter).rows(None, layer.start(adapter))
            if len(x) != len(rows.inverse):
                return type(layer).forward(layer, x)
            B = layer.sharelora_B[adapter].weight
            return _Alike.apply(
                x, rows.moves, rows.common, B, base.weight, base.bias, rows.inverse, layer.scaling[adapter]
            )

        return forward

    plain = [m for m in scorer.model.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]
    forwards: dict[nn.Module, Any] = {module: frozen(module) for module in plain}
    for layer in scorer.layers if alike and scorer.config.share == "B" else ():
        base = layer.base_layer
        # in a narrower type the sum would be rounded to the weight's digits
        if base in forwards and base.weight.dtype == torch.float32 and layer.active_adapters == [adapter]:
            if not (layer.merged or layer.disable_adapters):
                forwards[layer] = merged(layer, base)
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


@dataclass
class _Pairs:
    """Tokenised comparisons of newcomers."""

    chosen: list[list[int]]
    rejected: list[list[int]]
    user: torch.Tensor  # (n,) int64: place of the newcomer

    def of(self, keep: torch.Tensor) -> "_Pairs":
        """Those where `keep` `(n,)` is True."""
        places = keep.nonzero().flatten().tolist()
        return _Pairs([self.chosen[i] for i in places], [self.rejected[i] for i in places], self.user[keep])


class _Passes:
    """One model and forwards and backwards of comparisons at moves that are given."""

    def __init__(self, scorer: Scorer):
        if any(layer.disable_adapters for layer in scorer.layers):
            raise ConfigError(
                "The adapter is disabled (within `with model.disable_adapter()`, or after disable_adapter_layers()), so no reward depends on a user. "
                "Do this where it is enabled: leave the block."
            )
        self.scorer = scorer
        self.bank = _UserMoves(scorer.model)
        self.passes = 0

    def _batches(self, pairs: _Pairs) -> Iterator[torch.Tensor]:
        longest = [max(len(one), len(other)) for one, other in zip(pairs.chosen, pairs.rejected, strict=True)]
        order = sorted(range(len(longest)), key=longest.__getitem__, reverse=True)
        for start in range(0, len(order), self.scorer.batch_size):
            yield torch.tensor(order[start : start + self.scorer.batch_size])

    def _margins(self, pairs: _Pairs, some: torch.Tensor) -> torch.Tensor:
        sequences = [side[place] for side in (pairs.chosen, pairs.rejected) for place in some.tolist()]
        rewards, _ = self.scorer.forward(sequences, torch.full((len(sequences),), -1))
        chosen, rejected = rewards.chunk(2)
        return chosen - rejected

    @torch.inference_mode(False)  # its tensors could not be differentiated, nor what it allocates written outside it
    def linearise(
        self, pairs: _Pairs, moves: torch.Tensor, basis: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Margins `(n,)` and their gradients along `basis`, `(n, k)`, float64 on the host; without one all entries, `(n, entries)`.

        `moves` `(users, entries)`: at which moves, per newcomer.
        """
        self.passes += 1
        size = self.bank.entries if basis is None else len(basis)
        margins = torch.empty(len(pairs.chosen), dtype=torch.float64)
        gradients = torch.empty(len(margins), size, dtype=torch.float64 if basis is not None else torch.float32)
        parts = None if basis is None else basis.split(self.bank.sizes, dim=1)
        device = self.scorer.device
        alike = bool((moves == moves[0]).all())
        with self.scorer.scoring(), _quick(self.scorer, alike), torch.enable_grad():
            for some in self._batches(pairs):
                slots = torch.arange(len(some), device=device).repeat(2)
                leaves = [leaf.requires_grad_() for leaf in self.bank.split(moves[pairs.user[some].to(moves.device)])]
                with self.bank.given(leaves, slots):
                    found = self._margins(pairs, some)
                    own = torch.autograd.grad(found.sum(), leaves, allow_unused=True, materialize_grads=True)
                margins[some] = found.detach().double().cpu()
                flat = [gradient.flatten(1) for gradient in own]
                if parts is None:
                    gradients[some] = torch.cat(flat, 1).cpu()
                else:
                    along = sum(gradient @ part.T for gradient, part in zip(flat, parts, strict=True))
                    gradients[some] = along.double().cpu()
        return margins, gradients

    @torch.inference_mode(False)
    @torch.no_grad()
    def margins(self, pairs: _Pairs, moves: torch.Tensor) -> torch.Tensor:
        """`(n,)` float64 at these moves."""
        self.passes += 1
        margins = torch.empty(len(pairs.chosen), dtype=torch.float64)
        with self.scorer.scoring():
            for some in self._batches(pairs):
                own, slots = pairs.user[some].unique(return_inverse=True)
                with self.bank.given(self.bank.split(moves[own.to(moves.device)]), slots.repeat(2).to(moves.device)):
                    margins[some] = self._margins(pairs, some).double().cpu()
        return margins

    @torch.inference_mode(False)
    def descend(
        self,
        pairs: _Pairs,
        moves: torch.Tensor,
        centre: torch.Tensor,
        variance: torch.Tensor,
        steps: int = FULL_STEPS,
        rate: float = FULL_RATE,
    ) -> torch.Tensor:
        """All entries of the newcomers' moves by the row-wise optimiser, with a ridge `|D - centre|^2 / (2 variance)`, variance `(users,)`.

        A step is one pass over all comparisons; the rate goes down to zero on a half cosine.
        """
        self.passes += steps
        device = self.scorer.device
        users = pairs.user.unique()
        leaves = [nn.Parameter(part) for part in self.bank.split(moves)]
        router = Router(UserRegistry(str(number) for number in range(len(moves))))
        group = {"params": leaves, "rowwise": True}
        optimizer = ShareLoraAdamW([group], router, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        centres = self.bank.split(centre.expand(len(moves), -1))
        with self.scorer.scoring(), torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                for some in self._batches(pairs):
                    with self.bank.given(leaves, pairs.user[some].repeat(2).to(device)):
                        F.softplus(-self._margins(pairs, some)).sum().backward()
                for leaf, middle in zip(leaves, centres, strict=True):
                    if leaf.grad is not None:
                        leaf.grad += (leaf.detach() - middle) / variance.view(-1, *[1] * (leaf.ndim - 1))
                router.mark_visited(users)
                optimizer.step()
                schedule.step()
        return torch.cat([leaf.detach().flatten(1) for leaf in leaves], 1)


# -- the small logistic problem


class _Newton(NamedTuple):
    """Solutions of several problems: coordinates `(b, k)`, log evidence `(b,)`, covariances `(b, k, k)`."""

    y: torch.Tensor
    evidence: torch.Tensor
    covariance: torch.Tensor


def _logistic(
    features: torch.Tensor, offsets: torch.Tensor, tau: torch.Tensor, weights: torch.Tensor | None = None
) -> _Newton:
    """Posterior modes of `P(chosen) = sigmoid(offset + features y)`, `y ~ N(0, tau^2)`, for several offsets, taus and weights at once.

    Newton's method with step halving in `y / tau`, so that tau = 0 is an ordinary case; evidence by Laplace's approximation.

    Args:
        features (`torch.Tensor` of shape `(n, k)` or `(b, n, k)`), offsets (`(b, n)`), tau (`(b,)`), weights (`(b, n)`, *optional*): float64.
    """
    problems, k = len(offsets), features.shape[-1]
    x = tau[:, None, None] * features  # (b, n, k)
    weights = torch.ones_like(offsets) if weights is None else weights
    v = features.new_zeros(problems, k)

    def value(v: torch.Tensor) -> torch.Tensor:
        margins = offsets + (x @ v[:, :, None]).squeeze(2)
        return (weights * F.softplus(-margins)).sum(1) + v.square().sum(1) / 2

    def curvature(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wrong = torch.sigmoid(-offsets - (x @ v[:, :, None]).squeeze(2))
        gradient = v - (x.mT @ (weights * wrong)[:, :, None]).squeeze(2)
        curved = weights * wrong * (1 - wrong)
        return gradient, torch.eye(k, dtype=x.dtype) + x.mT @ (curved[:, :, None] * x)

    now = value(v)
    for _ in range(50):
        gradient, hessian = curvature(v)
        step = torch.linalg.solve(hessian, gradient)
        size = torch.ones(problems, dtype=x.dtype)
        for _ in range(30):
            trial = v - size[:, None] * step
            after = value(trial)
            worse = after > now + 1e-12 * now.abs()
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        v, now = trial, after
        if float(step.abs().max() if step.numel() else 0.0) < 1e-10:
            break
    _, hessian = curvature(v)
    evidence = -now - torch.linalg.slogdet(hessian)[1] / 2
    return _Newton(tau[:, None] * v, evidence, tau.square()[:, None, None] * torch.linalg.inv(hessian))


_Hypothesis = tuple[float, float, float]  # a, tau, weight before the first answer


class _Posterior(NamedTuple):
    """A newcomer in the coordinates `(a, y)` of the linearised model, all hypotheses weighed."""

    mean: torch.Tensor  # (1 + k,)
    # (1 + k, 1 + k), of hypotheses that were alike before the answers: it says what to ask, and who is the common model after all loses
    # nothing by being asked what would tell
    covariance: torch.Tensor
    weights: torch.Tensor  # (hypotheses,)


def _posteriors(
    constants: torch.Tensor,
    gradients: torch.Tensor,
    masks: torch.Tensor,
    hypotheses: Sequence[_Hypothesis],
    common: torch.Tensor | None = None,
) -> list[_Posterior]:
    """One posterior for each mask of the comparisons.

    Args:
        constants (`(n,)`), gradients (`(n, 1 + k)`): margin = constant + gradient . (a, y).
        masks (`(m, n)`): Which comparisons count, 0 or 1.
        common (`(n,)`, *optional*): Margins of the common model, where they are known: far from it the constants, its margins by the
            linearised model, are not what it says.
    """
    count = len(hypotheses)
    a, tau, prior = torch.tensor(hypotheses, dtype=torch.float64).T
    offsets = constants + a[:, None] * gradients[:, 0]
    if common is not None:
        offsets[(a == 0) & (tau == 0)] = common
    found = _logistic(
        gradients[:, 1:], offsets.repeat(len(masks), 1), tau.repeat(len(masks)), masks.repeat_interleave(count, 0)
    )
    result = []
    for number in range(len(masks)):
        own = slice(number * count, (number + 1) * count)
        weights, alike = (found.evidence[own] + prior.log()).softmax(0), found.evidence[own].softmax(0)
        means = torch.cat([a[:, None], found.y[own]], 1)
        apart = means - alike @ means
        covariance = torch.einsum("h,hi,hj->ij", alike, apart, apart)
        covariance[1:, 1:] += torch.einsum("h,hij->ij", alike, found.covariance[own])
        result.append(_Posterior(weights @ means, covariance, weights))
    return result


@dataclass
class _Evidence:
    """What held-out folds of a newcomer's own answers say of a fit against the common model."""

    shrinkage: float = 1.0
    gain: float = math.nan
    gain_se: float = math.nan
    accuracy_common: float = math.nan
    accuracy_fitted: float = math.nan


def _fold_masks(pair: torch.Tensor) -> torch.Tensor:
    """`(folds, n)`: 1 where a comparison is held out; the pairs, numbered from 0, in turns, so that their order does not matter much.

    By pairs: of a pair that stands on both sides nothing would be held out.
    """
    folds = min(FOLDS, int(pair.max()) + 1)
    return (pair % folds == torch.arange(folds)[:, None]).double()


def _held_out(common: torch.Tensor, moved: torch.Tensor) -> _Evidence:
    """From margins `(n,)` of the common model and what a fit without them adds, `(n,)`."""
    shrinkages, temperatures = (torch.tensor(some, dtype=torch.float64) for some in (SHRINKAGES, TEMPERATURES))
    margins = common + shrinkages[:, None] * moved
    likelihoods = F.logsigmoid(temperatures[:, None, None] * margins)  # (temperatures, shrinkages, n)
    best = likelihoods.sum(2).argmax(0)
    by_shrinkage = likelihoods[best, torch.arange(len(shrinkages))]
    log_weights = by_shrinkage.sum(1) + torch.tensor(SHRINKAGE_PRIOR, dtype=torch.float64).log()
    shrinkage = float(log_weights.softmax(0) @ shrinkages)
    gains = by_shrinkage[-1] - by_shrinkage[0]
    n = len(common)
    return _Evidence(
        shrinkage,
        float(gains.mean()),
        float(gains.std() / math.sqrt(n)) if n > 1 else math.nan,
        float((common.sign() + 1).mean() / 2),
        float(((common + moved).sign() + 1).mean() / 2),
    )


class _LBFGS:
    """L-BFGS for many small problems at once that share the passes; each with memory and step size of its own.

    The inverse Hessian that the memory improves on is Gauss-Newton's at the present point, which every pass gives for free. Nobody's
    solution depends on who else is there.
    """

    def __init__(self, start: torch.Tensor):
        self.x = start.clone()  # (users, k), the best so far
        self.trial = start.clone()
        self.f = torch.full((len(start),), math.inf, dtype=start.dtype)
        self.g = torch.zeros_like(start)
        self.memory: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in start]
        self.size = torch.ones(len(start), dtype=start.dtype)
        self.step = torch.zeros_like(start)
        self.active = torch.ones(len(start), dtype=torch.bool)

    def tell(self, values: torch.Tensor, gradients: torch.Tensor, hessians: torch.Tensor) -> list[int]:
        """Takes the objective `(users,)`, its gradient `(users, k)` and about its Hessian `(users, k, k)` at `trial`, of those who are
        active; then there are new trials.

        Returns the users whose trial was taken.
        """
        taken = []
        for user in self.active.nonzero().flatten().tolist():
            f, g = values[user], gradients[user]
            slope = float(self.g[user] @ self.step[user])
            if not bool(f <= self.f[user] + 1e-4 * self.size[user] * slope):  # also where it is NaN
                self.size[user] /= 4
            else:
                taken.append(user)
                if bool(self.f[user].isfinite()):
                    s, change = self.trial[user] - self.x[user], g - self.g[user]
                    if float(s @ change) > 1e-12:
                        self.memory[user].append((s, change))
                self.x[user], self.f[user], self.g[user] = self.trial[user], f, g
                self.size[user] = 1.0
                self.step[user] = -self._times_inverse_hessian(user, g, hessians[user])
                # in whitened coordinates: a hundredth of a standard deviation
                if float(self.step[user].norm()) < 1e-2 or len(self.memory[user]) > 20:
                    self.active[user] = False
            self.trial[user] = self.x[user] + self.size[user] * self.step[user]
        return taken

    def _times_inverse_hessian(self, user: int, g: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        q, alphas = g.clone(), []
        for s, change in reversed(self.memory[user]):
            alphas.append(float(s @ q) / float(s @ change))
            q = q - alphas[-1] * change
        q = torch.linalg.solve(hessian, q)
        for (s, change), alpha in zip(self.memory[user], reversed(alphas), strict=True):
            q = q + (alpha - float(change @ q) / float(s @ change)) * s
        return q


# -- fitting


@dataclass
class FitUsersResult:
    """Newcomers and what their answers told; printing it gives a readable table.

    Args:
        table ([`~pandas.DataFrame`]):
            A line per newcomer: `user_id`, `n` (different answers, which are what is used), `dropped` (too long, or the tokenizer cannot tell
            the two sides apart or fails), `duplicates` (rows that repeat an answer), `contradictions` (pairs he answered both ways), `method`,
            `shrinkage` (1: the whole fit, 0: the common model), `mean_weight` (how far the users' mean, instead of the common model, was the
            start, 0 to 1), and what held-out folds of his own answers say: `gain` (log-likelihood per comparison above the common model's,
            nats; before the shrinkage, each at its best temperature) with its standard error `gain_se`, `accuracy_common`, `accuracy_fitted`.
            NaN where there are answers to fewer than two pairs.
        spread ([`UserSpread`], *optional*):
            The prior; None where the trained users have no spread.
        posteriors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            By user id, mean `(1 + k,)` and covariance `(1 + k, 1 + k)` in the coordinates of `spread.basis`: for [`next_comparisons`].
        passes (`int`):
            Passes over comparisons, forward and backward.
        n_users (`int`), n (`int`), dropped (`int`):
            In all.
    """

    table: pd.DataFrame
    spread: UserSpread | None
    posteriors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    passes: int
    n_users: int
    n: int
    dropped: int

    def __str__(self) -> str:
        table = self.table
        lines = [
            f"{self.n_users} newcomers, {self.n} comparisons"
            + (f", {self.dropped} dropped" if self.dropped else "")
            + (f", {int(table['duplicates'].sum())} repeats" if int(table["duplicates"].sum()) else "")
            + f"; {self.passes} passes; prior: "
            + ("none, the trained users have no spread" if self.spread is None else repr(self.spread))
        ]
        if int(table["contradictions"].sum()):
            lines.append(
                f"{int(table['contradictions'].sum())} pairs were answered both ways, by {int((table['contradictions'] > 0).sum())} users; "
                "both answers count."
            )
        known = table[table["gain"].notna()]
        if len(known):
            lines.append(
                f"held-out folds of their own answers: accuracy {known['accuracy_common'].mean():.3f} of the common model, "
                f"{known['accuracy_fitted'].mean():.3f} fitted; log-likelihood {known['gain'].mean():+.4f} a comparison"
            )
        shown = table.assign(user_id=table["user_id"].map(repr))
        rest = len(shown) - 12
        formats = dict.fromkeys(
            ("shrinkage", "mean_weight", "gain", "gain_se", "accuracy_common", "accuracy_fitted"), "{:.3f}".format
        )
        lines.append(shown.head(12).to_string(index=False, formatters=formats))
        return "\n".join(lines) + (f"\n... and {rest} more" if rest > 0 else "")


@torch.inference_mode(False)  # a model that is loaded in it cannot be differentiated
def fit_users(
    model_or_path: Any,
    comparisons: Dataset,
    processing_class: Any = None,
    method: str = "auto",
    *,
    user_column: str = "user_id",
    refit: bool = False,
    spread: UserSpread | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    sets: EllipsoidSets | None = None,
    output_dir: str | os.PathLike | None = None,
    **loading: Any,
) -> FitUsersResult:
    """Give newcomers a model of their own from their first answers, in a few passes over these and without training.

    B, the head, A_0 and the rows and moments of all other users stay bit-identical. Newcomers whom the model does not know are added; many
    of them go through the same passes, and nobody's fit depends on who else is there.

    Args:
        model_or_path ([`~peft.PeftModel`], `str` or `os.PathLike`):
            A trained ShareLoRA reward model, changed in place; or where it was saved: then it is saved again.
        comparisons ([`~datasets.Dataset`]):
            All comparisons of the newcomers, and of nobody else; see [`~trl_sharelora.data.check_preference_rows`]. A row that repeats an
            answer (same user, same tokens on the same side) counts once; both of two opposite answers count.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; by default the one saved with the adapter.
        method (`str`, *optional*, defaults to `"auto"`):
            `"gauss-newton"`: one pass gives all margins and gradients at the users' mean, then the linearised problem is solved exactly; the
            prior is the trained users' spread, or, where there is none, all entries alike with a variance that the evidence chooses.
            `"pca"`: the same prior, the model as it is, by L-BFGS from there. `"full"`: all entries by the row-wise optimiser with a ridge
            towards the users' mean. These three take the prior at its word. `"auto"` is the first below 16 answers and the second from there,
            and weighs prior and fit by the evidence (see above): with it nobody is made worse than the common model but by chance.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        refit (`bool`, *optional*, defaults to `False`):
            Fit users anew who have a move of their own already; it is replaced.
        spread ([`UserSpread`], *optional*):
            The prior; by default [`user_spread`] of the others of the training. Keep it where newcomers come often.
        batch_size (`int`, *optional*, defaults to 16):
            Comparisons per forward; each is two sequences.
        max_length (`int`, *optional*):
            Comparisons with a longer text are dropped and counted; by default those beyond the model's positions are.
        sets ([`~trl_sharelora.pessimism.EllipsoidSets`], *optional*):
            The confidence sets (of the last layer) of a model in memory: the newcomers' comparisons are added, as for everybody. By default
            those saved in the adapter's directory, which are saved again.
        output_dir (`str` or `os.PathLike`, *optional*):
            The adapter's directory, if it is not `model_or_path`: the confidence sets there get the newcomers. The model is saved there too.
        **loading:
            See [`~trl_sharelora.scoring.load_reward_model`].

    Raises:
        UserIdError: a user has a move of his own already, without `refit`; or an id is not usable.
        DataError: there are no comparisons, or a row is not one.
        ConfigError: `"pca"` without trained users, a setting that is unknown, or the spread of another adapter.
        NonFiniteError: a reward or a trained user's row is NaN or infinite.
        PessimismError: the saved confidence sets do not fit the model. In all cases nothing has been changed. (Where the features of confidence
            sets cannot be read newcomers may have got a row, as by [`add_users`].)

    Example:

    ```python
    result = fit_users(model, first_answers, tokenizer)  # result.table has a line per newcomer
    ```
    """
    check_known("method", method, METHODS)
    scorer, path = _open(model_or_path, processing_class, batch_size, loading)
    directory = os.fspath(output_dir) if output_dir is not None else path
    check_preference_rows(comparisons, user_column, name="newcomers'", users=scorer.users)
    comparisons = comparisons.with_format(None)
    ids = scorer.users.names(comparisons[user_column][:])
    newcomers = list(dict.fromkeys(ids))
    place = {user_id: number for number, user_id in enumerate(newcomers)}
    passes = _Passes(scorer)
    rows = scorer.users.find(newcomers)
    known = [row for row in rows if row >= 0]
    moved = set(np.array(known)[passes.bank.read(known).any(1).cpu().numpy()].tolist()) if known else set()
    if moved and not refit:
        there = [user_id for user_id, row in zip(newcomers, rows, strict=True) if row in moved]
        raise UserIdError(
            f"{len(there)} of {len(newcomers)} newcomers have a model of their own already: {', '.join(map(repr, there[:5]))}. Is an id used "
            "twice? To replace what they have by a fit to these comparisons, which must then be all of theirs, say refit=True; nothing "
            "has been changed."
        )
    if spread is None:
        others = [row for row in passes.bank.trained() if row not in moved]
        if len(others) >= 3 or method == "pca":
            spread = user_spread(scorer.model, [str(scorer.users[row]) for row in _some(others, passes.bank.entries)])

    if spread is not None:
        spread._check_fits(passes.bank.entries)
    kept_rows, pairs, dropped = _tokenised(comparisons, [place[user_id] for user_id in ids], scorer, max_length)
    fit = _Fit(passes, pairs, len(newcomers), spread, newcomers)
    fit.run(method)

    repeated = sum(fit.duplicates)
    if repeated:
        logger.warning(
            f"{repeated} of {len(comparisons)} comparisons repeat an answer of the same user and count once with it; they are of "
            f"{sum(one > 0 for one in fit.duplicates)} users."
        )
        kept_rows = [row for row, new in zip(kept_rows, fit.new.tolist(), strict=True) if new]

    settings: dict[str, Any] = {"parameters": "last_layer", "sketch_size": SKETCH_SIZE, "sketch_seed": 0}
    saved = directory is not None and Path(directory, CONFIDENCE_FOLDER, "ellipsoid.json").is_file()
    if sets is None and saved:  # before anything is changed: they may not fit
        sets, settings = load_sets(directory, "ellipsoid", scorer)
    parameters = settings["parameters"]

    if sets is not None and parameters != "own_factor" and sets.feature_size != scorer.head().in_features:
        raise PessimismError(
            f"The ellipsoids that came are of {sets.feature_size} features, the model's score head sees {scorer.head().in_features}: they are of "
            "another model or of other parameters. Run fit_confidence for this one. Nothing has been changed."
        )

    add_users(scorer.model, newcomers)
    bank = _UserMoves(scorer.model)
    rows = scorer.users.index(newcomers)
    # who has been refitted to nothing keeps what he had
    rewritten = [place for place, user_id in enumerate(newcomers) if user_id not in fit.without_answers]
    before = bank.read([rows[place] for place in rewritten])
    changed = copy.copy(sets)  # its methods put new tensors in the places of the former
    try:
        for number in rewritten:
            bank.write(rows[number], fit.moves[number])
        if sets is not None and changed is not None and kept_rows:
            for number in rewritten:
                if rows[number] in moved and rows[number] < sets.num_users:
                    changed.remove(rows[number])  # what is counted again below
            add_comparisons(
                scorer.model,
                comparisons.select(kept_rows),
                scorer.processing_class,
                sets=changed,
                user_column=user_column,
                batch_size=batch_size,
                parameters=parameters,
            )
    except BaseException:
        # the features cannot be read, or Ctrl-C: fitted but without a set he would be refused the next time
        for number, move in zip(rewritten, before, strict=True):
            bank.write(rows[number], move)
        raise
    result = fit.result(dropped)
    if sets is not None and changed is not None:
        sets.directions, sets.information, sets.offsets = changed.directions, changed.information, changed.offsets
    if directory is not None:
        scorer.model.save_pretrained(directory)
        # last: sets of fewer users than the model has can be used, of more they cannot
        if sets is not None and saved and kept_rows:
            _save_sets(directory, "ellipsoid", sets, settings, scorer)
    for line in str(result).splitlines()[:2]:
        logger.info(line)
    return result


def _tokenised(
    dataset: Dataset, users: list[int], scorer: Scorer, max_length: int | None
) -> tuple[list[int], _Pairs, list[int]]:
    """The rows that can be used, their tokens, and how many of each user cannot."""
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ConfigError(f"max_length={max_length!r} came; a whole number of at least 1, or None, is needed.")
    limit = min((n for n in (max_length, scorer.positions) if n is not None), default=None)
    pairs, kept = _Pairs([], [], torch.empty(0, dtype=torch.long)), []
    dropped = [0] * (max(users, default=-1) + 1)
    for number, row in enumerate(dataset):
        try:
            found = tokenize_preference(row, scorer.processing_class)
            chosen, rejected = found["chosen_ids"], found["rejected_ids"]
        except Exception as error:  # a chat template or tokenizer may raise anything
            logger.warning("Comparison %d cannot be tokenised (%s) and is dropped.", number, type(error).__name__)
            chosen = rejected = []
        if not chosen or not rejected or chosen == rejected or (limit and max(len(chosen), len(rejected)) > limit):
            dropped[users[number]] += 1
            continue
        kept.append(number)
        pairs.chosen.append(chosen)
        pairs.rejected.append(rejected)
    pairs.user = torch.tensor([users[number] for number in kept], dtype=torch.long)
    if sum(dropped):
        logger.warning(
            f"{sum(dropped)} of {len(dataset)} comparisons are dropped: longer than {limit} tokens, or not to be tokenised or told apart "
            f"by this tokenizer; they are of {sum(one > 0 for one in dropped)} users."
        )
    return kept, pairs, dropped


def _answers(pairs: _Pairs, users: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which comparisons do not repeat an earlier answer of their user, `(n,)` bool, and which of his pairs each is about, `(n,)` from 0."""
    seen = set()
    numbers: list[dict[frozenset[Any], int]] = [{} for _ in range(users)]
    new, about = [], []
    for chosen, rejected, user in zip(pairs.chosen, pairs.rejected, pairs.user.tolist(), strict=True):
        sides = tuple(chosen), tuple(rejected)
        new.append((user, sides) not in seen)
        seen.add((user, sides))
        about.append(numbers[user].setdefault(frozenset(sides), len(numbers[user])))
    return torch.tensor(new, dtype=torch.bool), torch.tensor(about, dtype=torch.long)


class _Fit:
    """Newcomers being fitted: coordinates, moves, evidence. No bank is written."""

    def __init__(self, passes: _Passes, pairs: _Pairs, users: int, spread: UserSpread | None, names: list[str]):
        # a repeated answer tells nothing new; counted as one more it would make chance look sure
        self.new, pair = _answers(pairs, users)
        self.duplicates = torch.bincount(pairs.user[~self.new], minlength=users).tolist()
        pairs, self.pair = pairs.of(self.new), pair[self.new]
        self.passes, self.pairs, self.users, self.spread, self.names = passes, pairs, users, spread, names
        self.own = [(pairs.user == user).nonzero().flatten() for user in range(users)]
        self.without_answers = {names[user] for user in range(users) if not len(self.own[user])}
        device = passes.scorer.device
        self.basis = None if spread is None else spread.basis.to(device)
        self.moves = torch.zeros(users, passes.bank.entries, device=device)
        self.method = ["common"] * users
        self.evidence = [_Evidence(shrinkage=0.0) for _ in range(users)]
        self.mean_weight = [0.0] * users
        self.posteriors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if self.basis is not None:
            prior = _prior(len(self.basis))
            self.posteriors = dict.fromkeys(range(users), prior)

    def run(self, method: str) -> None:
        asked = [user for user in range(self.users) if len(self.own[user])]
        if not asked:
            return
        if self.basis is None:
            self._isotropic(asked, weigh=method == "auto")
            if method == "full":
                self._full(asked)
            return
        if method == "full":
            self.moves[asked] = self.basis[0]
            self._full(asked)
            return
        hypotheses = HYPOTHESES if method == "auto" else ((1.0, 1.0, 1.0),)
        centre = torch.zeros(self.users, len(self.basis), dtype=torch.float64)
        if method != "auto":
            centre[:, 0] = 1.0
        margins, gradients = self._linearise(centre, self.pairs)
        common = margins if method == "auto" else None  # at D = 0
        theta, constants = centre.clone(), margins - self._along(gradients, centre)
        for user in asked:
            posterior = _posteriors(
                constants[self.own[user]], gradients[self.own[user]], self._ones(user), hypotheses
            )[0]
            theta[user] = posterior.mean
            self._note(user, posterior, hypotheses, "gauss-newton")
        further = [user for user in asked if method == "pca" or (method == "auto" and len(self.own[user]) >= PCA_FROM)]
        if further:
            theta, margins, gradients = self._lbfgs(further, theta, margins, gradients, constants, hypotheses, centre)
            at = centre.clone()  # where each was linearised last: those who did not go further, at the centre
            at[further] = theta[further]
            constants = margins - self._along(gradients, at)
            for user in further:
                own = self.own[user]
                at_zero = None if common is None else common[own]
                posterior = _posteriors(constants[own], gradients[own], self._ones(user), hypotheses, at_zero)[0]
                if method == "auto":
                    theta[user] = posterior.mean
                self._note(user, posterior, hypotheses, "pca")
        if common is not None:
            for user in asked:
                # of one pair nothing is held out, and the mean has weighed the common model already
                if self._hold_out(user, constants, gradients, common, hypotheses):
                    theta[user] *= self.evidence[user].shrinkage
                self.posteriors[user] = theta[user].clone(), self.posteriors[user][1]
        else:
            for user in asked:
                self.evidence[user].shrinkage = 1.0
        self.moves[asked] = theta[asked].to(self.basis) @ self.basis

    # -- parts

    def _ones(self, user: int) -> torch.Tensor:
        return torch.ones(1, len(self.own[user]), dtype=torch.float64)

    def _folds(self, user: int) -> torch.Tensor | None:
        """`(folds, n)` masks of his comparisons; None where they are about fewer than two pairs."""
        pair = self.pair[self.own[user]]
        return _fold_masks(pair) if int(pair.max()) else None

    def _along(self, gradients: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        return (gradients * theta[self.pairs.user]).sum(1)

    def _linearise(self, theta: torch.Tensor, pairs: _Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.basis is not None
        margins, gradients = self.passes.linearise(pairs, theta.to(self.basis) @ self.basis, self.basis)
        self._check(margins, gradients, pairs)
        return margins, gradients

    def _check(self, margins: torch.Tensor, gradients: torch.Tensor, pairs: _Pairs) -> None:
        bad = ~(margins.isfinite() & gradients.isfinite().all(1))
        if bool(bad.any()):
            users = [self.names[user] for user in pairs.user[bad].unique().tolist()]
            raise NonFiniteError(
                f"The rewards of {int(bad.sum())} comparisons are NaN or infinite, or their gradients: user(s) {', '.join(map(repr, users[:5]))}, "
                f"{some_rows(bad.nonzero().flatten().tolist())} of those used. The model has diverged, or the base's dtype overflows (load it in "
                "float32 or bfloat16). Nothing has been changed."
            )

    def _note(self, user: int, posterior: _Posterior, hypotheses: Sequence[_Hypothesis], method: str) -> None:
        self.method[user] = method
        self.posteriors[user] = posterior.mean, posterior.covariance
        self.mean_weight[user] = float(posterior.mean[0])
        self.evidence[user].shrinkage = 1.0 - float(
            sum(w for w, (a, tau, _) in zip(posterior.weights, hypotheses, strict=True) if not a and not tau)
        )

    def _hold_out(
        self,
        user: int,
        constants: torch.Tensor,
        gradients: torch.Tensor,
        common: torch.Tensor,
        hypotheses: Sequence[_Hypothesis],
    ) -> bool:
        """Notes what his folds say; False where there are none."""
        own, held = self.own[user], self._folds(user)
        if held is None:
            return False
        fits = _posteriors(constants[own], gradients[own], 1 - held, hypotheses, common[own])
        fitted = sum(mask * (constants[own] + gradients[own] @ fit.mean) for mask, fit in zip(held, fits, strict=True))
        self.evidence[user] = _held_out(common[own], fitted - common[own])
        return True

    def _lbfgs(
        self,
        users: list[int],
        theta: torch.Tensor,
        margins: torch.Tensor,
        gradients: torch.Tensor,
        constants: torch.Tensor,
        hypotheses: Sequence[_Hypothesis],
        centre: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maximise the real likelihood times `N(y; 0, tau^2)`, a and tau as the evidence has them on average.

        Returns coordinates, and margins and gradients there.
        """
        theta, margins, gradients = theta.clone(), margins.clone(), gradients.clone()
        a, tau, roots = {}, {}, {}
        k = theta.shape[1] - 1
        for user in users:
            own = self.own[user]
            # if he moves at all: the common model needs no linearising
            moving = [one for one in hypotheses if one[0] or one[1]]
            weights = _posteriors(constants[own], gradients[own], self._ones(user), moving)[0].weights
            starts, taus, _ = torch.tensor(moving, dtype=torch.float64).T
            a[user] = float(weights @ starts)
            tau[user] = max(math.sqrt(float(weights @ taus.square())), 1e-3)
            found = _logistic(
                gradients[own, 1:],
                (constants[own] + a[user] * gradients[own, 0])[None],
                torch.tensor([tau[user]], dtype=torch.float64),
            )
            theta[user] = torch.cat([torch.tensor([a[user]], dtype=torch.float64), found.y[0]])
            roots[user] = torch.linalg.cholesky(found.covariance[0])  # y = y_0 + root w: a sphere, if it were linear
        start = theta.clone()
        solver = _LBFGS(torch.zeros(len(users), k, dtype=torch.float64))
        for _ in range(MOST_PASSES):
            active = {users[number] for number in solver.active.nonzero().flatten().tolist()}
            if not active:
                break
            trial = start.clone()
            for number, user in enumerate(users):
                trial[user, 1:] += roots[user] @ solver.trial[number]
            keep = torch.tensor([user in active for user in self.pairs.user.tolist()])
            some = self.pairs.of(keep)
            found_margins, found_gradients = self._linearise(trial, some)
            values = torch.full((len(users),), math.nan, dtype=torch.float64)
            slopes = torch.zeros(len(users), k, dtype=torch.float64)
            curvatures = torch.eye(k, dtype=torch.float64).repeat(len(users), 1, 1)
            for number, user in enumerate(users):
                if user in active:
                    own = some.user == user
                    y, wrong = trial[user, 1:] / tau[user] ** 2, torch.sigmoid(-found_margins[own])
                    values[number] = F.softplus(-found_margins[own]).sum() + trial[user, 1:] @ y / 2
                    slopes[number] = roots[user].T @ (y - found_gradients[own, 1:].T @ wrong)
                    along = found_gradients[own, 1:] @ roots[user]
                    curvatures[number] = roots[user].T @ roots[user] / tau[user] ** 2
                    curvatures[number] += along.T @ ((wrong * (1 - wrong))[:, None] * along)
            for number in solver.tell(values, slopes, curvatures):
                user = users[number]
                theta[user] = trial[user]
                margins[self.own[user]] = found_margins[some.user == user]
                gradients[self.own[user]] = found_gradients[some.user == user]
        return theta, margins, gradients

    def _isotropic(self, users: list[int], weigh: bool) -> None:
        """No spread: all entries alike, so a move is a sum of the comparisons' own gradients; how large, the evidence says."""
        entries = self.passes.bank.entries
        groups: list[list[int]] = [[]]
        for user in users:
            if groups[-1] and sum(len(self.own[one]) for one in [*groups[-1], user]) * entries > MOST_NUMBERS:
                groups.append([])
            groups[-1].append(user)
        for group in groups:
            keep = torch.isin(self.pairs.user, torch.tensor(group))
            some = self.pairs.of(keep)
            margins, gradients = self.passes.linearise(some, torch.zeros_like(self.moves), None)
            self._check(margins, gradients, some)
            for user in group:
                own = some.user == user
                rows = gradients[own]
                values, vectors = torch.linalg.eigh(_gram(rows))
                size = float(values.clamp(min=0).mean())
                if not size > 0:
                    continue  # no answer tells anything
                roots = values.clamp(min=1e-12 * float(values.max())).sqrt()
                features = torch.cat([torch.zeros(int(own.sum()), 1, dtype=torch.float64), vectors * roots], 1)
                # margins a prior standard deviation of about 0.3 to 3 apart
                hypotheses = [(0.0, one / math.sqrt(size), (1 - COMMON_WEIGHT) / 3) for one in (0.3, 1.0, 3.0)]
                hypotheses = [(0.0, 0.0, COMMON_WEIGHT), *hypotheses] if weigh else hypotheses
                posterior = _posteriors(margins[own], features, self._ones(user), hypotheses)[0]
                self.mean_weight[user] = 0.0
                self.method[user] = "gauss-newton"
                self.evidence[user].shrinkage = 1.0 - float(posterior.weights[0] if weigh else 0.0)
                held = self._folds(user) if weigh else None
                if held is not None:
                    fits = _posteriors(margins[own], features, 1 - held, hypotheses)
                    moved = sum(mask * (features @ fit.mean) for mask, fit in zip(held, fits, strict=True))
                    self.evidence[user] = _held_out(margins[own], moved)
                scale = 1.0 if held is None else self.evidence[user].shrinkage
                alpha = vectors @ (posterior.mean[1:] / roots) * scale
                self.moves[user] = (alpha.to(rows) @ rows).to(self.moves)

    def _full(self, users: list[int]) -> None:
        start = self.moves
        if self.spread is None:
            centre, variance = torch.zeros_like(start[0]), start.square().mean(1).clamp(min=1e-8)
        else:
            centre = self.spread.mean.to(start)
            total = self.spread.scales.square().sum() / self.spread.explained
            variance = (total / len(centre)).to(start).expand(len(start))
        try:
            self.moves = self.passes.descend(self.pairs, start, centre, variance)
            diverged = not bool(self.moves.isfinite().all())
        except NonFiniteError:  # its users are places in this fit
            diverged = True
        if diverged:
            margins = self.passes.margins(self.pairs, start)
            self._check(margins, margins[:, None], self.pairs)
            raise NonFiniteError("The fit has diverged (method='full'). Nothing has been changed; use method='pca'.")
        for user in users:
            self.method[user] = "full"
            self.mean_weight[user] = 0.0 if self.spread is None else 1.0
            self.evidence[user].shrinkage = 1.0
            if self.basis is not None:
                self.posteriors[user] = _projected(self.moves[user], self.basis)

    def result(self, dropped: list[int]) -> FitUsersResult:
        table = pd.DataFrame(
            {
                "user_id": self.names,
                "n": [len(own) for own in self.own],
                "dropped": dropped,
                "duplicates": self.duplicates,
                # of an answer to a pair and the opposite one
                "contradictions": [len(own) - len(self.pair[own].unique()) for own in self.own],
                "method": self.method,
                "shrinkage": [one.shrinkage for one in self.evidence],
                "mean_weight": self.mean_weight,
                "gain": [one.gain for one in self.evidence],
                "gain_se": [one.gain_se for one in self.evidence],
                "accuracy_common": [one.accuracy_common for one in self.evidence],
                "accuracy_fitted": [one.accuracy_fitted for one in self.evidence],
            }
        )
        named = {self.names[user]: posterior for user, posterior in self.posteriors.items()}
        return FitUsersResult(
            table, self.spread, named, self.passes.passes, self.users, len(self.pairs.chosen), sum(dropped)
        )


def _prior(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of `(a, y)` before the first answer, all hypotheses alike."""
    a, tau, _ = torch.tensor(HYPOTHESES, dtype=torch.float64).T
    mean = torch.zeros(size, dtype=torch.float64)
    mean[0] = a.mean()
    diagonal = tau.square().mean().repeat(size)
    diagonal[0] = a.var(correction=0)
    return mean, diagonal.diag()


def _projected(move: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A move in the coordinates of the basis, and the prior's covariance: nothing is known of his answers."""
    found = torch.linalg.lstsq(basis.double().cpu().T, move.double().cpu()[:, None], driver="gelsd").solution.squeeze(
        1
    )
    return found, _prior(len(basis))[1]


# -- which pair to ask next


@dataclass
class NextComparisons:
    """Which pairs to ask a user next; made by [`next_comparisons`].

    Args:
        chosen (`list[int]`):
            Rows of the candidates, in the order to ask them.
        information (`float`):
            What these answers are expected to tell, nats.
        random (`list[int]`), random_information (`float`):
            As many rows drawn at random, and what these are expected to tell: the baseline.
        table ([`~pandas.DataFrame`]):
            A line per different candidate: `row`, `margin` (reward of its `chosen` minus that of `rejected`, as expected now), `std` (its
            posterior standard deviation), `information` (nats, if asked first).
        answers_for_a_point (`float`, *optional*):
            So many more answers (to chosen pairs) are expected to raise accuracy on the candidates by one point; None if 50 do not. The
            stopping rule: stop asking when this is more than a point is worth.
        answers_low (`float`, *optional*), answers_high (`float`, *optional*):
            The same where accuracy rises faster than in 90 % of the simulated users, and slower than in 90 % of them (None: not by 50).
        curve ([`~pandas.DataFrame`], *optional*):
            `answers`, `gain` (expected rise of accuracy, 0 to 1), `low`, `high` (10 % and 90 % of the simulated users).
        note (`str`):
            What was decided about candidates that cannot be asked.
    """

    chosen: list[int]
    information: float
    random: list[int]
    random_information: float
    table: pd.DataFrame
    answers_for_a_point: float | None = None
    answers_low: float | None = None
    answers_high: float | None = None
    curve: pd.DataFrame | None = field(default=None, repr=False)
    note: str = ""

    def __str__(self) -> str:
        lines = [self.note] if self.note else []
        if self.chosen:
            lines.append(
                f"ask rows {', '.join(map(str, self.chosen))}: {self.information:.3f} nats expected, "
                f"{self.random_information:.3f} of as many at random"
            )
            if self.answers_for_a_point is None:
                lines.append(
                    "50 more answers are not expected to raise accuracy by a point: enough is known, or these pairs do not tell."
                )
            else:
                low, high = (
                    "more than 50" if one is None else str(math.ceil(one))
                    for one in (self.answers_low, self.answers_high)
                )
                lines.append(
                    f"about {math.ceil(self.answers_for_a_point)} more answers for +1 point (80 % of users: {low} to {high})"
                )
        return "\n".join(lines)


ANSWERS_AHEAD = (1, 2, 5, 10, 20, 50)
SIMULATED_USERS = 32  # the standard error of an expected gain is then a sixth of the users' standard deviation
# of a standard normal: E f = sum of weight * f(node); 32 nodes are exact to 1e-8 for a sigmoid of margins up to 10 wide
_NODES, _NODE_WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(32))
_NODE_WEIGHTS = _NODE_WEIGHTS / _NODE_WEIGHTS.sum()
_NOTHING = 1e-9  # nats: below it an answer is known beforehand


def next_comparisons(
    model: Any,
    user: str | int,
    candidates: Dataset,
    k: int = 10,
    processing_class: Any = None,
    *,
    fit: FitUsersResult | None = None,
    spread: UserSpread | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    seed: int = 0,
) -> NextComparisons:
    """The pairs whose answers are expected to tell most about a user, one after the other.

    Under the user's posterior `N(mean, C)` in the coordinates of the spread (Laplace) the margin of a pair is `N(m, v)`, `v = g' C g`. Its
    answer tells `H(E p) - E H(p)` nats about him, with `p = sigmoid(margin)` and H the entropy of a coin (Houlsby et al., 2011, "Bayesian
    active learning for classification and preference learning", eq. 2). After each pick C is updated by the Fisher information that its
    answer is expected to bring, `C <- C - w C g g' C / (1 + w v)`, `w = E p (1 - p)`: a pair like one that is picked already tells less.

    How far more answers would go is simulated in the same linearised model: users drawn from the posterior answer the picked pairs, are
    fitted, and are judged on all candidates. It is as right as the posterior is, and no bound. (`benchmarks/new_users.py`: of ten more answers
    foreseen and come, from none +.103 and +.127, from ten +.029 and +.051, from fifteen +.013 and +.009. The first five answers bring less
    than foreseen, +.040 for +.086: [`fit_users`] does not leave the common model on so few, and the next five make up for it.)

    Args:
        model ([`~peft.PeftModel`]):
            A ShareLoRA reward model that knows the user ([`add_users`], [`fit_users`]).
        user (`str` or `int`):
            Whose answers.
        candidates ([`~datasets.Dataset`]):
            Pairs `chosen`, `rejected` and mostly `prompt`, as preference rows; which of the two is called chosen does not matter.
        k (`int`, *optional*, defaults to 10):
            How many; fewer if there are not as many that tell anything.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        fit ([`FitUsersResult`], *optional*):
            What his answers so far told. Without it all that is known is the prior, around his present row.
        spread ([`UserSpread`], *optional*):
            Without a fit: the prior; by default [`user_spread`] of the model.
        batch_size (`int`, *optional*, defaults to 16), max_length (`int`, *optional*):
            As in [`fit_users`].
        seed (`int`, *optional*, defaults to 0):
            Of the random baseline and the simulated users.

    Raises:
        UnknownUserError: the model does not know the user.
        DataError: there are no candidates, or a row is not a pair.
        ConfigError: `k` is no whole number of at least 1, the trained users have no spread or had none when `fit` was made, `fit` is not of
            this user, or one of the two is of another adapter.
        NonFiniteError: a reward is NaN or infinite.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"k={k!r} came; a whole number of pairs to ask, at least 1, is needed.")
    scorer = Scorer(model, processing_class, batch_size)
    user_id = scorer.users.names([user])[0]
    row = scorer.users.index([user_id])[0]
    if fit is not None and fit.spread is None:
        raise ConfigError(
            "fit was made without a spread: fewer than 3 trained users had moves of their own, so it holds no posterior and nobody can say what an "
            "answer would tell. Ask pairs at random, or train the adapter on 3 users or more and fit again."
        )
    spread = fit.spread if fit is not None else spread
    if fit is not None and user_id not in fit.posteriors:
        raise ConfigError(
            f"fit holds no posterior of {user_id!r}; give the result of the fit_users call that fitted him."
        )
    passes = _Passes(scorer)
    spread = user_spread(model) if spread is None else spread
    spread._check_fits(passes.bank.entries)
    basis = spread.basis.to(scorer.device)
    if fit is not None:
        mean, covariance = fit.posteriors[user_id]
    else:
        mean, covariance = _projected(passes.bank.read([row])[0], basis)

    pairs, places, note = _candidates(candidates, scorer, max_length)
    nothing = pd.DataFrame({"row": [], "margin": [], "std": [], "information": []})
    if not places:
        return NextComparisons([], 0.0, [], 0.0, nothing, note=f"There is nothing to ask: {note}")
    margins, gradients = passes.linearise(pairs, passes.bank.read([row]).to(basis), basis)
    if not bool(margins.isfinite().all() and gradients.isfinite().all()):
        raise NonFiniteError(
            f"The rewards of candidates are NaN or infinite for {user_id!r}; his training has diverged, or the base's dtype overflows."
        )
    variances = ((gradients @ covariance) * gradients).sum(1).clamp(min=0)
    first = _information(margins, variances)
    order, told = _greedy(margins, gradients, covariance, min(max(k, ANSWERS_AHEAD[-1]), len(places)))
    picked = [number for number, nats in zip(order, told, strict=True) if nats > _NOTHING]
    draw = np.random.default_rng(seed)
    drawn = draw.permutation(len(places))[: min(k, len(picked))].tolist()
    table = pd.DataFrame({"row": places, "margin": margins, "std": variances.sqrt(), "information": first})
    result = NextComparisons(
        [places[number] for number in picked[:k]],
        float(sum(told[: min(k, len(picked))])),
        [places[number] for number in drawn],
        float(sum(_greedy(margins, gradients, covariance, len(drawn), drawn)[1])),
        table,
        note=note,
    )
    if not picked:
        result.note = (
            f"There is nothing to ask: the model is sure of the answer to all {len(places)} candidates. {note}".strip()
        )
        return result
    _look_ahead(result, margins, gradients, covariance, picked, seed)
    return result


def _candidates(dataset: Any, scorer: Scorer, max_length: int | None) -> tuple[_Pairs, list[int], str]:
    """Different pairs that can be asked, their rows, and what was left out in words."""
    column = "user_id"
    if isinstance(dataset, Dataset):
        dataset = dataset.with_format(None)
        same = [number for number, row in enumerate(dataset) if row.get("chosen", 0) == row.get("rejected", 1)]
        askable = [number for number in range(len(dataset)) if number not in set(same)]
        if same and not askable:
            empty = _Pairs([], [], torch.empty(0, dtype=torch.long))
            return empty, [], f"in all {len(same)} candidates the two sides are equal."
        dataset = dataset.select(askable)
        if column in dataset.column_names:
            dataset = dataset.remove_columns(column)
        check_preference_rows(dataset.add_column(column, ["nobody"] * len(dataset)), column, name="candidates")
    else:
        same, askable = [], []
        check_preference_rows(dataset, column, name="candidates", users=scorer.users)
    kept, pairs, dropped = _tokenised(dataset, [0] * len(dataset), scorer, max_length)
    seen: set[Any] = set()
    keep = []
    for chosen, rejected in zip(pairs.chosen, pairs.rejected, strict=True):
        pair = frozenset((tuple(chosen), tuple(rejected)))
        keep.append(pair not in seen)
        seen.add(pair)
    left_out = [
        f"{count} {what}"
        for count, what in (
            (len(same), "with equal sides"),
            (sum(dropped), "too long or not to be told apart by the tokenizer"),
            (len(keep) - sum(keep), "the same as another"),
        )
        if count
    ]
    note = f"left out: {', '.join(left_out)}." if left_out else ""
    places = [askable[number] for number, one in zip(kept, keep, strict=True) if one]
    return pairs.of(torch.tensor(keep, dtype=torch.bool)), places, note


def _moments(margins: torch.Tensor, variances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`E p`, `E H(p)` and `E p (1 - p)` of `p = sigmoid(N(margin, variance))`."""
    drawn = margins[:, None] + variances.clamp(min=0).sqrt()[:, None] * _NODES
    p = torch.sigmoid(drawn)
    entropy = p * F.softplus(-drawn) + (1 - p) * F.softplus(drawn)
    return p @ _NODE_WEIGHTS, entropy @ _NODE_WEIGHTS, (p * (1 - p)) @ _NODE_WEIGHTS


def _information(margins: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """What the answers are expected to tell, nats `(n,)`."""
    p, entropy, _ = _moments(margins, variances)
    return (-torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p) - entropy).clamp(min=0)


def _greedy(
    margins: torch.Tensor,
    gradients: torch.Tensor,
    covariance: torch.Tensor,
    count: int,
    order: Sequence[int] | None = None,
) -> tuple[list[int], list[float]]:
    """Pick the most telling pair, count on its answer, go on; or count on those of `order`. Also what each tells then."""
    covariance = covariance.clone()
    picked: list[int] = []
    told: list[float] = []
    for step in range(count):
        variances = ((gradients @ covariance) * gradients).sum(1)
        information = _information(margins, variances)
        if order is None:
            left = information.clone()
            left[picked] = -1.0
            number = int(left.argmax())
        else:
            number = order[step]
        picked.append(number)
        told.append(float(information[number]))
        along = covariance @ gradients[number]
        weight = _moments(margins[number : number + 1], variances[number : number + 1])[2][0]
        covariance -= weight * torch.outer(along, along) / (1 + weight * variances[number])
    return picked, told


def _look_ahead(
    result: NextComparisons,
    margins: torch.Tensor,
    gradients: torch.Tensor,
    covariance: torch.Tensor,
    picked: list[int],
    seed: int,
) -> None:
    """Simulate users from the posterior who answer the picked pairs, and note how accuracy on all candidates rises."""
    values, vectors = torch.linalg.eigh(covariance)
    features = gradients @ (vectors * values.clamp(min=0).sqrt())  # of a standard normal
    generator = torch.Generator().manual_seed(seed)
    users = torch.randn(SIMULATED_USERS, features.shape[1], dtype=torch.float64, generator=generator)
    true = margins + users @ features.T  # (users, n)
    answers = torch.where(
        torch.rand(true.shape, dtype=torch.float64, generator=generator) < torch.sigmoid(true), 1.0, -1.0
    )

    def accuracy(expected: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(expected.sign() * true).mean(1)

    before = accuracy(margins.expand_as(true))
    ahead = [0, *sorted({min(count, len(picked)) for count in ANSWERS_AHEAD})]
    gains = [torch.zeros(SIMULATED_USERS, dtype=torch.float64)]
    for count in ahead[1:]:
        asked = picked[:count]
        signs = answers[:, asked].double()
        found = _logistic(
            signs[:, :, None] * features[asked],
            signs * margins[asked],
            torch.ones(SIMULATED_USERS, dtype=torch.float64),
        )
        gains.append(accuracy(margins + found.y @ features.T) - before)
    all_gains = torch.stack(gains)  # (counts, users)
    low, high = all_gains.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=1)
    mean = all_gains.mean(1)
    result.curve = pd.DataFrame({"answers": ahead, "gain": mean, "low": low, "high": high})
    result.answers_for_a_point = _crossing(ahead, mean.tolist())
    result.answers_low, result.answers_high = _crossing(ahead, high.tolist()), _crossing(ahead, low.tolist())


def _crossing(answers: Sequence[int], gains: Sequence[float], wanted: float = 0.01) -> float | None:
    """Where a curve first reaches `wanted`, between its points on a straight line."""
    for number in range(1, len(answers)):
        if gains[number] >= wanted:
            start, end = gains[number - 1], gains[number]
            share = (wanted - start) / (end - start) if end > start else 1.0
            return answers[number - 1] + share * (answers[number] - answers[number - 1])
    return None
