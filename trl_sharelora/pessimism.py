"""Confidence sets around a reward and their lower ends: tensors in, tensors out.

A pessimistic policy is trained on the smallest reward that the user's comparisons still allow,
`mean - coefficient * width` ([`lower_bound`]). Three sets say what they allow:

- **ball**: the paper's (3.4), all updates within a Frobenius distance of the fitted one ([`ball_norm`],
  [`ball_radius`]).
  It knows the reward's gradient, not the data: with thin coverage it gave no protection where we measured it.
- **ellipsoid**: narrow where a user's comparisons looked, wide elsewhere ([`EllipsoidSets`]).
- **ensemble**: as wide as several fitted rewards disagree ([`ensemble_lower_bound`], [`bootstrap_heads`]).

[`conformal_coefficient`] chooses the coefficient from held-out comparisons.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .errors import ConfigError, NonFiniteError, PessimismError, some_rows


# Floats of a temporary in `ball_norm`: 256 MiB, so that long completions do not multiply the memory by the batch.
_CHUNK = 2**26
# Whitened information below this changes a squared width by less than float64's own rounding of the solve.
_NEGLIGIBLE = 1e-12
# Relative to the largest entry of the gradient at the trained head, where the refits start.
_HEAD_TOLERANCE = 1e-6


def lower_bound(mean: torch.Tensor, std: torch.Tensor, coefficient: float) -> torch.Tensor:
    """Lower end of a reward's interval, `mean - coefficient * std`.

    Args:
        mean (`torch.Tensor` of shape `(n,)`):
            Rewards.
        std (`torch.Tensor` of shape `(n,)`):
            Their widths, not negative, in the unit of the rewards once multiplied by `coefficient`.
        coefficient (`float`):
            How many widths to go down, at least 0. At 0 the result is `mean` itself, whatever `std` holds.

    Raises:
        ConfigError: `coefficient` is negative, infinite or NaN.
    """
    _check_coefficient(coefficient)
    return mean if coefficient == 0 else mean - coefficient * std


# -- the paper's ball


def ball_radius(zeta: float) -> float:
    """Radius `rho = sqrt(zeta)` of the paper's set.

    (3.4) of P-ShareLoRA (https://huggingface.co/papers/2503.19201) bounds the *square* of the norm by zeta, which is
    followed here; the proof of its Theorem 4.2 uses zeta itself as the radius (pass `zeta**2` for that reading).

    Args:
        zeta (`float`):
            Bound of (3.4), at least 0, in squared units of the update's entries. The paper gives no value.

    Raises:
        ConfigError: `zeta` is negative, infinite or NaN.
    """
    if not (math.isfinite(zeta) and zeta >= 0):
        raise ConfigError(
            f"zeta={zeta} came; (3.4) bounds a squared norm by it, so it is a finite number of at least 0."
        )
    return math.sqrt(zeta)


def ball_norm(
    inputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    weights: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Frobenius norm of the reward's gradient with respect to the update `dTheta`: the width of the paper's ball.

    P-ShareLoRA (https://huggingface.co/papers/2503.19201) defines the set

    `{dTheta : ||dTheta - dTheta_hat||_F² <= zeta}` (3.4)

    and maximises `min over the set of J(policy; r) - E_reference r` (3.5). With `G` the gradient of that difference at
    `dTheta_hat` and `rho = sqrt(zeta)` ([`ball_radius`]),

    `min over the ball = J(policy; r_hat) - E_reference r_hat - rho ||G||_F`

    at `dTheta_hat - rho G / ||G||_F`. This closed form is ours: of first order, exact for a reward linear in `dTheta`;
    by the envelope theorem the policy's gradient is the one at that point. With `dTheta` acting as `W0 x + dTheta x`,
    a layer's part of row i's gradient is `sum over t of gradients[i, t] inputs[i, t]^T`.

    The paper's penalty is the norm for all rows of a user together (`groups`). The mean of norms per row is at least
    as large (triangle inequality), hence more pessimistic, but gives each completion a width of its own.

    Args:
        inputs (`Sequence[torch.Tensor]` of shape `(rows, seq, in)`, one per layer):
            What went into each layer.
        gradients (`Sequence[torch.Tensor]` of shape `(rows, seq, out)`, one per layer):
            Gradient of each row's reward with respect to the layer's output, zero at padding.
        weights (`torch.Tensor` of shape `(rows,)`, *optional*):
            Factor of each row within its group, such as 1/n for the n rows of the policy and -1/m for the m of the
            reference. Without it, 1. Needs `groups`.
        groups (`torch.Tensor` of shape `(rows,)`, *optional*):
            Group of each row, from 0 on, such as the user's place in the batch.

    Returns:
        `torch.Tensor`: Norms over all layers in float32 or better, of shape `(rows,)`, or `(groups,)` with `groups`.

    Raises:
        PessimismError: Shapes that do not belong together.
        NonFiniteError: A gradient or an input is NaN or infinite.
    """
    if len(inputs) != len(gradients) or not inputs:
        raise PessimismError(
            f"Inputs of {len(inputs)} layers and gradients of {len(gradients)} came; one of each per adapted layer is needed, "
            "and at least one layer. Was a layer's output never used by the reward?"
        )
    rows = len(inputs[0])
    for place, (x, d) in enumerate(zip(inputs, gradients, strict=True)):
        if x.ndim != 3 or d.ndim != 3 or x.shape[:2] != d.shape[:2] or len(x) != rows:
            raise PessimismError(
                f"Layer {place} has inputs of shape {tuple(x.shape)} and gradients of shape {tuple(d.shape)}, where layer 0 has "
                f"{rows} rows; (rows, seq, in) and (rows, seq, out) with the same rows and seq are needed."
            )
    if groups is None and weights is not None:
        raise PessimismError("weights came without groups; the rows of one group are summed with them, so give both.")
    for name, values in (("weights", weights), ("groups", groups)):
        if values is not None and values.shape != (rows,):
            raise PessimismError(f"{name} of shape {tuple(values.shape)} came for {rows} rows; one per row is needed.")

    pairs = [(_at_least_float32(x), _at_least_float32(d)) for x, d in zip(inputs, gradients, strict=True)]
    if groups is None:
        total = torch.stack([_squared_norms(x, d) for x, d in pairs]).sum(0)
    else:
        if weights is not None:
            pairs = [(x, d * weights.to(d)[:, None, None]) for x, d in pairs]
        members = [(groups == group).nonzero().squeeze(1) for group in range(int(groups.max()) + 1 if rows else 0)]
        total = pairs[0][1].new_zeros(len(members))
        for x, d in pairs:
            # the steps of all rows of a group are one long sequence, because their gradients are added
            squares = [_squared_norms(x[own].flatten(0, 1)[None], d[own].flatten(0, 1)[None]) for own in members]
            total = total + torch.cat([total[:0], *squares])
    _check_finite(total, "gradients")
    return _safe_sqrt(total)


def _squared_norms(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """`||sum over t of d[i, t] x[i, t]^T||²` for each i: `x` `(n, seq, in)`, `d` `(n, seq, out)` -> `(n,)`."""
    x, d = x.to(torch.promote_types(x.dtype, d.dtype)), d.to(torch.promote_types(x.dtype, d.dtype))
    steps, size_in, size_out = x.shape[1], x.shape[2], d.shape[2]
    if (
        steps * (size_in + size_out) > size_in * size_out
    ):  # one matrix at a time: all at once would be n times the layer
        return torch.stack([(d[i].mT @ x[i]).square().sum() for i in range(len(x))]) if len(x) else x.new_zeros(0)
    chunk = max(1, _CHUNK // max(1, steps * steps))
    # <d_t x_t^T, d_u x_u^T> = (d_t . d_u) (x_t . x_u): two small Gram matrices instead of an (out, in) one
    return torch.cat(
        [((a @ a.mT) * (b @ b.mT)).sum((1, 2)) for a, b in zip(x.split(chunk), d.split(chunk), strict=True)]
    )


# -- the ellipsoid of the data


class EllipsoidSets:
    """Per user, the ellipsoid of rewards that his comparisons, and at a discount everybody's, leave open.

    For a reward linear in features phi, Zhu, Jordan and Jiao (https://huggingface.co/papers/2301.11270) bound the
    estimate's error in the norm of `Sigma_D + lambda I` and subtract `||(Sigma_D + lambda I)^(-1/2) (phi - v)||` times
    a radius. Here, with `z = phi(chosen) - phi(rejected)`,

    `Sigma_u = ridge * scale * I + pooled_discount * (sum over all users of z z^T) + (sum over u's own of z z^T)`

    `width = sqrt(phi^T Sigma_u^-1 phi)`

    and `reward - coefficient * width` is the smallest reward over the set

    `{theta : ||theta - theta_hat||_Sigma_u <= coefficient}`

    A sum stands where Zhu et al. have the mean, so the width already falls with the root of the number of comparisons
    as their radius does. Pooling over users at a discount, the unit of the ridge and the storage are ours.

    More comparisons never widen a set: information is only ever added. (A set built anew measures its `scale` anew;
    give [`EllipsoidBuilder`] the old one to compare the two.)

    Storage: one `(d, d)` Cholesky factor L of what all users have in common and, in coordinates `L^-1 phi`, the
    principal directions of each user's own information, at most `min(comparisons, d)` of them, in float32. The width
    comes from `||(I + V^T S V)^(-1/2) L^-1 phi||`, which cannot turn negative by rounding.

    Made by [`EllipsoidBuilder`], or from stored tensors by [`~EllipsoidSets.from_tensors`].

    Args:
        factor (`torch.Tensor` of shape `(d, d)`, float64):
            Lower Cholesky factor of the first two terms of `Sigma_u`.
        centre (`torch.Tensor` of shape `(d,)`):
            Mean feature of the training completions.
        directions (`torch.Tensor` of shape `(sum of m_u, d)`, float32):
            Orthonormal directions of the users' own whitened information, one user after the other.
        information (`torch.Tensor` of shape `(sum of m_u,)`, float64):
            How much there is along each of them.
        offsets (`torch.Tensor` of shape `(num_users + 1,)`, int64):
            Where each user's directions begin and end.
        ridge (`float`), pooled_discount (`float`), scale (`float`):
            As in [`EllipsoidBuilder`].

    Raises:
        PessimismError: Shapes that do not belong together.
        NonFiniteError: A value is NaN or infinite.
    """

    def __init__(
        self,
        factor: torch.Tensor,
        centre: torch.Tensor,
        directions: torch.Tensor,
        information: torch.Tensor,
        offsets: torch.Tensor,
        *,
        ridge: float,
        pooled_discount: float,
        scale: float,
    ):
        size = len(centre)
        sizes = offsets.diff()
        if (
            centre.shape != (size,)
            or factor.shape != (size, size)
            or directions.shape != (len(information), size)
            or offsets.ndim != 1
            or len(offsets) < 1
            or int(offsets[0]) != 0
            or int(offsets[-1]) != len(information)
            or bool((sizes < 0).any() | (sizes > size).any())
        ):
            raise PessimismError(
                f"A factor of shape {tuple(factor.shape)}, a centre of shape {tuple(centre.shape)}, directions of shape "
                f"{tuple(directions.shape)}, information of shape {tuple(information.shape)} and {len(offsets)} offsets do not "
                "belong together: the files are torn or of different adapters. Fit the sets again."
            )
        for name, values in (
            ("factor", factor),
            ("centre", centre),
            ("directions", directions),
            ("information", information),
        ):
            _check_finite(values, name)
        _check_settings(ridge, pooled_discount, scale)
        self.ridge, self.pooled_discount, self.scale = float(ridge), float(pooled_discount), float(scale)
        self.factor = factor.double()
        self.centre = centre.float()
        self.directions = directions.float()
        self.information = information.double()
        self.offsets = offsets.to("cpu", torch.int64)

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def feature_size(self) -> int:
        return len(self.centre)

    @property
    def device(self) -> torch.device:
        return self.factor.device

    def __repr__(self) -> str:
        return (
            f"EllipsoidSets(num_users={self.num_users}, feature_size={self.feature_size}, directions={len(self.directions)}, "
            f"ridge={self.ridge}, pooled_discount={self.pooled_discount}, scale={self.scale:.3g})"
        )

    def has(self, user_index: torch.Tensor) -> torch.Tensor:
        """Which of these users have information of their own: `(n,)` integers (-1: unseen) to `(n,)` bools."""
        index = self._check_index(user_index, len(user_index)).cpu()
        known = torch.cat([self.offsets.diff() > 0, torch.tensor([False])])  # -1 finds the last entry
        return known[index].to(user_index.device)

    def centred(self, features: torch.Tensor) -> torch.Tensor:
        """`features - centre`: the reference vector v of Zhu et al., for where no reference completion is given."""
        return features - self.centre.to(features.device)

    def width(self, features: torch.Tensor, user_index: torch.Tensor) -> torch.Tensor:
        """`sqrt(phi^T Sigma_u^-1 phi)`, each row with its own user's set.

        Args:
            features (`torch.Tensor` of shape `(n, d)`):
                Features, as differences to a reference's or [`~EllipsoidSets.centred`].
            user_index (`torch.Tensor` of shape `(n,)`):
                Row of each user; -1 for an unseen one, who has the users' common information only.

        Returns:
            `torch.Tensor` of shape `(n,)`: Widths, in float32 or the features' better type, on the features' device.

        Raises:
            PessimismError: Other shapes, or a row beyond the users of the sets.
            NonFiniteError: A feature is NaN or infinite.
        """
        phi = self._check_features(features, "features")
        index = self._check_index(user_index, len(features)).to(phi.device)
        white = self._whiten(phi)
        order = index.argsort(stable=True)
        users, counts = torch.unique_consecutive(index[order], return_counts=True)
        rows, parts = [], []
        # views of the users who are there, and no copies: a padded gather would copy up to d * d numbers per row
        for user, own in zip(users.tolist(), order.split(counts.tolist()), strict=True):
            directions, information = self._own(user)
            if len(directions):
                along = white[own].to(directions.dtype) @ directions.T
                shrink = (1 - (1 + information).rsqrt()).to(directions.dtype)
                rows.append(own)
                parts.append((along * shrink) @ directions)
        if rows:
            white = white.index_add(0, torch.cat(rows), -torch.cat(parts).to(white.dtype))
        width = _safe_sqrt(white.square().sum(1))
        return width.to(torch.promote_types(features.dtype, torch.float32)).to(features.device)

    def add_comparisons(self, user_index: torch.Tensor, differences: torch.Tensor) -> None:
        """Add to users' own information, in place; what all users have in common stays as it was fitted.

        Args:
            user_index (`torch.Tensor` of shape `(n,)`):
                Row of each user. A row beyond the present users makes the sets grow.
            differences (`torch.Tensor` of shape `(n, d)`):
                `phi(chosen) - phi(rejected)`.

        Raises:
            PessimismError: Other shapes, or a negative row.
            NonFiniteError: A difference is NaN or infinite.
        """
        differences = self._check_features(differences, "differences").detach()
        index = self._check_index(user_index, len(differences), lowest=0, growing=True).to(differences.device)
        if not len(index):
            return
        grown = max(self.num_users, int(index.max()) + 1)
        self.offsets = torch.cat([self.offsets, self.offsets[-1:].expand(grown - self.num_users)])
        white = self._whiten(differences)
        changed = {}
        for user in index.unique().tolist():
            directions, information = self._own(user)
            changed[user] = _principal(torch.cat([information.sqrt()[:, None] * directions, white[index == user]]))
        self._replace(changed)

    def remove(self, user_index: int) -> None:
        """Drop a user's own information, so that he is treated as an unseen user; his row stays.

        His share of what all users have in common stays too, as it does in the shared factor and in the head; only
        fitting again without him removes it.

        Raises:
            PessimismError: A row beyond the users of the sets.
        """
        self._check_index(torch.tensor([user_index]), 1, lowest=0)
        self._replace({user_index: (self.directions[:0], self.information[:0])})

    def to(self, device: torch.device | str) -> "EllipsoidSets":
        """Move to a device with float64, in place; returns itself."""
        for name in ("factor", "centre", "directions", "information"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """What to store, with [`~EllipsoidSets.settings`]; see [`~EllipsoidSets.from_tensors`]."""
        names = ("factor", "centre", "directions", "information", "offsets")
        return {name: getattr(self, name) for name in names}

    def settings(self) -> dict[str, float | int | str]:
        """The numbers beside [`~EllipsoidSets.tensors`], for a JSON file."""
        return {"ridge": self.ridge, "pooled_discount": self.pooled_discount, "scale": self.scale}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> "EllipsoidSets":
        """The sets that [`~EllipsoidSets.tensors`] and [`~EllipsoidSets.settings`] describe, bit by bit.

        Raises:
            PessimismError: A tensor or a setting is missing, unknown or of another shape.
            NonFiniteError: A value is NaN or infinite.
        """
        needed = {"factor", "centre", "directions", "information", "offsets"}, {"ridge", "pooled_discount", "scale"}
        if (set(tensors), set(settings)) != needed:
            raise PessimismError(
                f"Tensors {sorted(tensors)} and settings {sorted(settings)} came; an ellipsoid needs {sorted(needed[0])} and "
                f"{sorted(needed[1])}. The files are of another version or not of an ellipsoid: fit the sets again."
            )
        arguments: dict[str, Any] = {**tensors, **settings}
        return cls(**arguments)

    def _own(self, user: int) -> tuple[torch.Tensor, torch.Tensor]:
        start, end = self.offsets[user : user + 2].tolist() if user >= 0 else (0, 0)
        return self.directions[start:end], self.information[start:end]

    def _whiten(self, features: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.factor, features.mT, upper=False).mT

    def _replace(self, changed: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Put other directions in the places of some users, in one copy."""
        sizes = self.offsets.diff()
        directions, information, position = [], [], 0
        for user in sorted(changed):
            start, end = self.offsets[user : user + 2].tolist()
            directions += [self.directions[position:start], changed[user][0]]
            information += [self.information[position:start], changed[user][1]]
            sizes[user], position = len(changed[user][0]), end
        self.directions = torch.cat([*directions, self.directions[position:]])
        self.information = torch.cat([*information, self.information[position:]])
        self.offsets = _offsets(sizes)

    def _check_features(self, features: torch.Tensor, name: str) -> torch.Tensor:
        return _check_features(features, self.feature_size, name).to(self.device).double()

    def _check_index(self, user_index: torch.Tensor, n: int, lowest: int = -1, growing: bool = False) -> torch.Tensor:
        return _check_index(user_index, n, lowest, None if growing else self.num_users)


class EllipsoidBuilder:
    """Collects comparisons in one pass and makes [`EllipsoidSets`] of them.

    Memory: the differences of all comparisons in float32 and one float64 matrix `(d, d)`.

    The defaults are ours, measured on one toy design: 10 users, a linear reward (d = 100) with a shared factor of rank
    3, 60 arms of which 20 are common and 40 are compared .4 % as often, 24 seeds. Value lost against a user's best
    common arm by taking the arm of the largest lower bound, with 50 / 200 / 800 comparisons per user:

    | ridge 1, coefficient 1 | the same common arms for all | each user his own |
    |---|---|---|
    | no pessimism | 1.90 / 1.61 / .17 | 1.99 / 1.64 / .57 |
    | discount 0 | 1.24 / .43 / .02 | 1.14 / .40 / .01 |
    | discount .001 | 1.24 / .43 / .02 | 1.36 / .78 / .18 |
    | discount .01 | 1.20 / .45 / -.02 | 1.71 / 1.39 / .41 |
    | discount .1 | 1.21 / .66 / -.05 | 1.88 / 1.54 / .53 |
    | discount 1 | 1.38 / 1.01 / .08 | 1.93 / 1.64 / .57 |

    Pooling gained next to nothing where users had seen the same, and undid the protection where they had not (a
    coefficient of 10 made up for a discount of .01, not for one of .1). Ridges of .1 / 1 / 10 / 100 lost 1.15 / 1.24 /
    1.56 / 1.85 with 50 comparisons (same arms, discount 0, coefficient 1) and .39 / .43 / .97 / 1.37 with 200; with
    the best coefficient of .1 to 10 the first three came to 1.1 and .33 alike.

    Args:
        feature_size (`int`):
            Size d of the features.
        num_users (`int`):
            Number of users.
        ridge (`float`, *optional*, defaults to 1.0):
            Weight of the prior, in comparisons: `ridge * scale * I` is as much information as `ridge` average
            comparisons spread evenly over all directions. A 100 times larger one asks for about a 10 times larger
            coefficient.
        pooled_discount (`float`, *optional*, defaults to 0.0):
            Worth of a comparison of anybody to everybody, as a share of a user's own; 0 keeps users apart, and leaves
            the prior alone to unseen users. What counts is the discount times the number of users.
        scale (`float`, *optional*):
            Mean squared entry of a difference. Measured from the comparisons if not given, which makes `ridge`
            independent of the features' unit.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where the comparisons are collected; it must have float64.

    Raises:
        ConfigError: A size below 1, `ridge` or `scale` not above 0, or `pooled_discount` outside [0, 1].
    """

    def __init__(
        self,
        feature_size: int,
        num_users: int,
        ridge: float = 1.0,
        pooled_discount: float = 0.0,
        scale: float | None = None,
        device: torch.device | str = "cpu",
    ):
        if feature_size < 1 or num_users < 0:
            raise ConfigError(
                f"feature_size={feature_size} and num_users={num_users} came; at least 1 and 0 are needed."
            )
        _check_settings(ridge, pooled_discount, 1.0 if scale is None else scale)
        self.feature_size, self.num_users = feature_size, num_users
        self.ridge, self.pooled_discount, self.scale = ridge, pooled_discount, scale
        self._information = torch.zeros(feature_size, feature_size, dtype=torch.float64, device=device)
        self._sum = torch.zeros(feature_size, dtype=torch.float64, device=device)
        self._users: list[torch.Tensor] = []
        self._differences: list[torch.Tensor] = []

    def add(self, user_index: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Add comparisons.

        Args:
            user_index (`torch.Tensor` of shape `(n,)`):
                Row of each user.
            chosen (`torch.Tensor` of shape `(n, d)`), rejected (`torch.Tensor` of shape `(n, d)`):
                Features of both completions, computed with that user's parameters.

        Raises:
            PessimismError: Other shapes, or a row that is no user's.
            NonFiniteError: A feature is NaN or infinite.
        """
        chosen, rejected = (
            _check_features(side, self.feature_size, name).detach().to(self._sum.device).float()
            for side, name in ((chosen, "chosen features"), (rejected, "rejected features"))
        )
        if len(chosen) != len(rejected):
            raise PessimismError(
                f"{len(chosen)} chosen and {len(rejected)} rejected rows came; a comparison has one of each."
            )
        self._users.append(_check_index(user_index, len(chosen), 0, self.num_users).cpu())
        difference = chosen - rejected
        self._differences.append(difference)
        wide = difference.double()
        self._information.addmm_(wide.T, wide)
        self._sum += chosen.double().sum(0) + rejected.double().sum(0)

    def finish(self) -> EllipsoidSets:
        """The sets of all comparisons so far.

        Raises:
            PessimismError: No comparison came, or all differences are zero, so that nothing says how large features
            are.
        """
        size = self.feature_size
        users = torch.cat([torch.zeros(0, dtype=torch.int64), *self._users])
        scale = self.scale
        if scale is None:
            scale = float(self._information.trace()) / (max(1, len(users)) * size)
            if scale <= 0:
                raise PessimismError(
                    f"{len(users)} comparisons came, and all differences of features are zero: the scale of the features cannot "
                    "be told from them. Were chosen and rejected the same texts, or was nothing added? Otherwise give `scale`."
                )
        prior = self._information * self.pooled_discount
        prior.diagonal().add_(self.ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(prior)
        if failed:
            raise PessimismError(
                f"ridge={self.ridge} is too small against {len(users)} comparisons at pooled_discount={self.pooled_discount}: "
                "their common information cannot be factorised in float64. Give a larger ridge."
            )
        sets = EllipsoidSets(
            factor,
            self._sum / max(1, 2 * len(users)),
            self._sum.new_zeros(0, size),
            self._sum.new_zeros(0),
            torch.zeros(self.num_users + 1, dtype=torch.int64),
            ridge=self.ridge,
            pooled_discount=self.pooled_discount,
            scale=scale,
        )
        if len(users):
            # one user's whitened differences at a time: those of all, in float64, would be twice what is held
            order, differences = users.argsort(stable=True), torch.cat(self._differences)
            present, counts = torch.unique_consecutive(users[order], return_counts=True)
            own = zip(present.tolist(), order.split(counts.tolist()), strict=True)
            sets._replace(
                {
                    user: _principal(sets._whiten(differences[rows.to(differences.device)].double()))
                    for user, rows in own
                }
            )
        return sets


def _principal(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal `directions` and `information` with `rows^T rows = directions^T diag(information) directions`."""
    if len(rows) > rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R
    # 5 times faster than an SVD at (100, 2048). The Gram matrix blurs directions whose information is below 1e-16 of
    # the largest, but a direction counts in a width by its information: for nothing.
    axes = torch.linalg.eigh(rows @ rows.T).eigenvectors.T @ rows
    information = axes.square().sum(1)
    kept = information > _NEGLIGIBLE
    return (axes[kept] / information[kept].sqrt()[:, None]).float(), information[kept]


def _offsets(sizes: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])


# -- ensembles


def ensemble_estimate(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and spread of several rewards, as in UP-RLHF (https://huggingface.co/papers/2401.00243).

    Args:
        rewards (`torch.Tensor` of shape `(K, n)`):
            Rewards of K members, at least 2.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(n,)`: Mean and unbiased standard deviation (divided by K - 1),
        in float32 or better.

    Raises:
        PessimismError: Another shape, or a single member, which cannot disagree with anybody.
        NonFiniteError: A reward is NaN or infinite.
    """
    rewards = _check_members(rewards)
    return rewards.mean(0), _safe_sqrt(rewards.var(0))


def ensemble_lower_bound(rewards: torch.Tensor, coefficient: float, form: str = "std") -> torch.Tensor:
    """Lower end of an ensemble's rewards.

    - `"std"`: `mean - coefficient * std` with the unbiased standard deviation, the uncertainty of UP-RLHF
      (https://huggingface.co/papers/2401.00243), which moreover subtracts the uncertainty's running mean: a constant.
    - `"variance"`: `mean - coefficient * (1/K) sum of (r - mean)²`, uncertainty-weighted optimisation (UWO) of Coste
      et al. (https://huggingface.co/papers/2310.02743), with the population variance as in their equation. They use
      .5 for best-of-n and .1 for PPO. Unlike the other two it depends on the unit of the rewards.
    - `"worst"`: the smallest member, worst-case optimisation (WCO) of Coste et al.; any coefficient above 0 gives
      the same.

    Args:
        rewards (`torch.Tensor` of shape `(K, n)`):
            Rewards of K members, at least 2.
        coefficient (`float`):
            At least 0. At 0 the result is the mean exactly, in all forms.
        form (`str`, *optional*, defaults to `"std"`):
            The default keeps the unit of the rewards, as the other sets' widths do.

    Returns:
        `torch.Tensor` of shape `(n,)`: In float32 or better.

    Raises:
        ConfigError: An unknown form, or a coefficient that is negative, infinite or NaN.
        PessimismError: Another shape, or a single member.
        NonFiniteError: A reward is NaN or infinite.
    """
    _check_coefficient(coefficient)
    if form not in ("std", "variance", "worst"):
        raise ConfigError(f"form={form!r} came; an ensemble's lower end is 'std', 'variance' or 'worst'.")
    mean, std = ensemble_estimate(rewards)
    if form == "std":
        return lower_bound(mean, std, coefficient)
    members = _check_members(rewards)
    if form == "variance":
        return lower_bound(mean, members.var(0, correction=0), coefficient)
    # the mean of equal members may be rounded to below them
    return mean if coefficient == 0 else torch.minimum(members.amin(0), mean)


def bootstrap_heads(
    differences: torch.Tensor,
    head: torch.Tensor,
    members: int,
    ridge: float = 1.0,
    seed: int = 0,
    user_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Heads refitted on resampled comparisons: an ensemble for the price of one model's features.

    Member k minimises, with `w` how often a comparison was drawn (with replacement, as many as there are),

    `sum of w_i log(1 + exp(-z_i . theta)) + ridge * mean(z²) / 2 * ||theta - head||²`

    in float64 by L-BFGS. Ours: Coste et al. (https://huggingface.co/papers/2310.02743) train whole models from several
    seeds, which disagree more, and cost K times as much.

    Args:
        differences (`torch.Tensor` of shape `(n, d)`):
            `phi(chosen) - phi(rejected)`.
        head (`torch.Tensor` of shape `(d,)`):
            Trained head: where the fits start, and what the ridge pulls them to.
        members (`int`):
            Number K of heads, at least 2. Coste et al. found 4 to 5 enough.
        ridge (`float`, *optional*, defaults to 1.0):
            Pull towards `head`, above 0, in the unit of [`EllipsoidBuilder`]'s.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.
        user_index (`torch.Tensor` of shape `(n,)`, *optional*):
            Draw within each user's comparisons, so that every user keeps his share of the sample.

    Returns:
        `torch.Tensor` of shape `(K, d)`: The heads, in the head's dtype and on its device.

    Raises:
        ConfigError: Fewer than 2 members, or a ridge not above 0.
        PessimismError: Other shapes, no comparison, or a fit that did not converge.
        NonFiniteError: A difference or the head is NaN or infinite.
    """
    if members < 2:
        raise ConfigError(
            f"members={members} came; one head alone cannot disagree: at least 2 are needed, 5 are usual."
        )
    _check_settings(ridge, 0.0, 1.0)
    if head.ndim != 1:
        raise PessimismError(
            f"A head of shape {tuple(head.shape)} came; (d,) is needed, the one row of the score layer."
        )
    _check_finite(head, "head")
    z = _check_features(differences, len(head), "differences").detach().to(head.device).double()
    if not len(z):
        raise PessimismError(
            "No comparison came, so there is nothing to resample. Was the dataset empty after filtering?"
        )
    centre = head.detach().double()
    users = (
        torch.zeros(len(z), dtype=torch.int64)
        if user_index is None
        else _check_index(user_index, len(z), 0, None).cpu()
    )
    order = users.argsort(stable=True)
    counts = torch.unique_consecutive(users[order], return_counts=True)[1]
    start = (counts.cumsum(0) - counts).repeat_interleave(counts)
    size = counts.repeat_interleave(counts)
    generator = torch.Generator().manual_seed(seed)
    pull = ridge * float(z.square().mean())
    if pull == 0:  # no difference at all: nothing moves the head
        return head.detach().expand(members, -1).clone()
    # Features differ in size by orders of magnitude: without this a fit of 20,000 comparisons took 17 s, not 0.3 s. The
    # slope of a sigmoid is at most 1/4.
    curvature = z.T @ z / 4
    curvature.diagonal().add_(pull)
    factor, failed = torch.linalg.cholesky_ex(curvature)
    if failed:
        raise PessimismError(f"ridge={ridge} is too small against {len(z)} comparisons; give a larger one.")
    heads = []
    for _ in range(members):
        place = (torch.rand(len(z), generator=generator, dtype=torch.float64) * size).long().clamp(max=size - 1)
        drawn = torch.bincount(order[start + place], minlength=len(z)).to(z)
        heads.append(_refit(z, drawn, centre, pull, factor))
    return torch.stack(heads).to(head.dtype)


def _refit(
    z: torch.Tensor, drawn: torch.Tensor, centre: torch.Tensor, pull: float, factor: torch.Tensor
) -> torch.Tensor:
    """The minimum of [`bootstrap_heads`], in coordinates in which the curvature `factor factor^T` is one everywhere."""

    def theta() -> torch.Tensor:
        return centre + torch.linalg.solve_triangular(factor.T, moved[:, None], upper=True).squeeze(1)

    def gradient() -> torch.Tensor:
        at = theta()
        slope = pull * (at - centre) - (drawn * torch.sigmoid(-(z @ at))) @ z
        return torch.linalg.solve_triangular(factor, slope[:, None], upper=False).squeeze(1)

    def closure() -> torch.Tensor:
        moved.grad = gradient()
        at = theta()
        return drawn @ torch.nn.functional.softplus(-(z @ at)) + pull / 2 * (at - centre).square().sum()

    moved = torch.zeros_like(centre)
    tolerance = _HEAD_TOLERANCE * float(gradient().abs().max())
    if tolerance == 0:  # all differences drawn are zero: the head is the solution
        return centre
    optimizer = torch.optim.LBFGS(
        [moved],
        max_iter=1000,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    left = float(gradient().abs().max())
    # the line search ends a little early where rounding hides what is left to gain
    if not left <= 1000 * tolerance:
        raise PessimismError(
            f"Refitting a head did not converge: the largest entry of the gradient is {left:.2g}, and {tolerance:.2g} was wanted. "
            "The ridge is too small for these comparisons; give a larger one."
        )
    return theta()


# -- calibration


def conformal_coefficient(margins: torch.Tensor, widths: torch.Tensor, coverage: float) -> float:
    """The smallest coefficient at which held-out comparisons lie within the set as often as wanted. Ours.

    Comparison i is allowed by the set once `margin + coefficient * width >= 0`: some reward in it ranks the chosen
    completion first. That takes `c_i = max(0, -margin / width)`; the result is the `ceil((n + 1) coverage)`-th
    smallest `c_i`. By split conformal prediction a new comparison, exchangeable with these, is then allowed with
    probability `coverage` at least, over the draw of both. (Labels are noisy: a coverage above the share of right
    labels is paid with wide sets.)

    Args:
        margins (`torch.Tensor` of shape `(n,)`):
            Reward of `chosen` minus reward of `rejected`, on comparisons that neither the model nor the sets have
            seen.
        widths (`torch.Tensor` of shape `(n,)`):
            Width of the same difference, at least 0.
        coverage (`float`):
            Share of comparisons wanted, between 0 and 1.

    Returns:
        `float`: At least 0; 0 where the rewards alone already rank enough of them rightly.

    Raises:
        ConfigError: `coverage` is not between 0 and 1.
        PessimismError: Other shapes, too few comparisons for this coverage, or too many wrongly ranked ones of no
        width.
        NonFiniteError: A margin or a width is NaN or infinite.
    """
    if not 0 < coverage < 1:
        raise ConfigError(f"coverage={coverage} came; a share between 0 and 1, such as 0.9, is needed.")
    if margins.ndim != 1 or margins.shape != widths.shape:
        raise PessimismError(
            f"Margins of shape {tuple(margins.shape)} and widths of shape {tuple(widths.shape)} came; one of each per held-out "
            "comparison is needed."
        )
    margins, widths = margins.detach().cpu().double(), widths.detach().cpu().double()
    _check_finite(margins, "margins")
    _check_finite(widths, "widths")
    if (widths < 0).any():
        raise PessimismError(
            f"Negative widths came ({some_rows((widths < 0).nonzero().flatten().tolist())}); a width is a norm."
        )
    n = len(margins)
    rank = math.ceil((n + 1) * coverage - 1e-9)  # 10 * 0.9 is a little more than 9 in floating point
    if rank > n:
        raise PessimismError(
            f"{n} held-out comparisons are too few for coverage={coverage}: at least {math.ceil(coverage / (1 - coverage) - 1e-9)} "
            "are needed. Hold out more, or ask for less."
        )
    needed = torch.where(margins < 0, -margins / widths, 0.0)
    # rounded down, the quotient would leave its own row out
    short = needed.isfinite() & (margins + needed * widths < 0)
    needed = torch.where(short, torch.nextafter(needed, torch.tensor(math.inf, dtype=needed.dtype)), needed)
    coefficient = float(needed.sort().values[rank - 1])
    if not math.isfinite(coefficient):
        wrong = int(((margins < 0) & needed.isinf()).sum())
        raise PessimismError(
            f"{wrong} of {n} held-out comparisons are ranked wrongly with a width of 0, so no coefficient reaches "
            f"coverage={coverage}. Were chosen and rejected of the same features, or was the width not fitted? Ask for less, or "
            "drop rows whose completions are the same."
        )
    return coefficient


# -- checks


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _safe_sqrt(squares: torch.Tensor) -> torch.Tensor:
    """Square root whose gradient at 0 is 0, not NaN; rounding below 0 counts as 0."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def _check_coefficient(coefficient: float) -> None:
    if not (math.isfinite(coefficient) and coefficient >= 0):
        raise ConfigError(
            f"pessimism_coefficient={coefficient} came; a finite number of at least 0 is needed (0: the plain reward). A negative "
            "one would reward what is uncertain."
        )


def _check_settings(ridge: float, pooled_discount: float, scale: float) -> None:
    for name, value in (("ridge", ridge), ("scale", scale)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(
                f"{name}={value} came; a finite number above 0 is needed, or directions without data have no width."
            )
    if not 0 <= pooled_discount <= 1:
        raise ConfigError(
            f"pooled_discount={pooled_discount} came; a share between 0 (own comparisons only) and 1 is needed."
        )


def _check_finite(values: torch.Tensor, name: str) -> None:
    bad = ~values.detach().isfinite()
    if bad.any():
        rows = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"The {name} hold NaN or infinite values ({some_rows(rows)}). The model has diverged, or its dtype overflows: load it in "
            "float32 or bfloat16, or go back to an earlier checkpoint."
        )


def _check_features(features: torch.Tensor, size: int, name: str) -> torch.Tensor:
    if features.ndim != 2 or features.shape[1] != size:
        raise PessimismError(
            f"{name} of shape {tuple(features.shape)} came; (n, {size}) is needed, what goes into the score layer at the last token. "
            "Were the sets fitted with another model?"
        )
    _check_finite(features, name)
    return features


def _check_index(user_index: torch.Tensor, n: int, lowest: int, users: int | None) -> torch.Tensor:
    if user_index.shape != (n,) or user_index.is_floating_point() or user_index.dtype == torch.bool:
        raise PessimismError(
            f"A user_index of shape {tuple(user_index.shape)} and {user_index.dtype} came for {n} rows; one integer per row is needed."
        )
    bad = (user_index < lowest) | (user_index >= (torch.iinfo(torch.int64).max if users is None else users))
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise PessimismError(
            f"user_index {int(user_index[rows[0]])} came ({some_rows(rows)}); "
            + (f"the sets have {users} users. " if users is not None else "")
            + ("An unseen user is -1; " if lowest < 0 else "Rows count from 0; ")
            + "users added after the fit need `add_comparisons`, or a fit of their own."
        )
    return user_index.long()


def _check_members(rewards: torch.Tensor) -> torch.Tensor:
    if rewards.ndim != 2 or len(rewards) < 2:
        raise PessimismError(
            f"Rewards of shape {tuple(rewards.shape)} came; (K, n) of at least K = 2 members are needed: one alone cannot disagree."
        )
    _check_finite(rewards.T, "rewards")
    return _at_least_float32(rewards)
