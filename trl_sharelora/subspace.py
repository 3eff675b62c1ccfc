"""The column space that users' updates share, and what the paper's theorems say about it: tensors in, numbers out.

Notation of P-ShareLoRA (https://huggingface.co/papers/2503.19201, sections 3 and 4): user i's update is `dTheta_i` of shape
`(d1, d2)` with d1 the output side, whose column space is shared, and the aggregate of N users is
`[dTheta_1, ..., dTheta_N]` of shape `(d1, N d2)`. torch stores weights as (out, in), so `s * B A_i` of an adapter is
`dTheta_i` as it is.

The theorems hold up to constants c1, ..., c4 that the paper does not name. The functions here give their right-hand sides with
those constants at 1: slopes and orders can be compared with them, heights cannot.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from .errors import SubspaceError


# One user's update: (d1, d2), or the pair of its factors, up (d1, r) and down (r, d2).
Update: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Updates: TypeAlias = torch.Tensor | Iterable[Update]

# Columns that are collected before they are folded, at least: with few rows, folding at each user would add up its rounding.
_FOLD = 1024
# Of `16 sqrt(n) eps`: rounding the n-column (or row) side of a matrix moves its singular values by at most
# sqrt(n) eps sigma_1, and the factorisations by a small multiple of it.
_ROUNDING = 16
# Gaussian numbers of `rotation_null` at a time: 512 MiB.
_CHUNK = 2**26


# -- spectrum of the aggregate


@dataclass(frozen=True)
class Spectrum:
    """Singular values and left singular vectors of an aggregate `[dTheta_1, ..., dTheta_N]`; made by [`spectrum`].

    Args:
        singular_values (`torch.Tensor` of shape `(min(d1, N d2),)`):
            sigma_1 >= sigma_2 >= ..., in the unit of the updates' entries.
        basis (`torch.Tensor` of shape `(d1, m)`):
            Left singular vectors. `m = min(d1, N d2)` for updates given whole; for factors as many as they can span
            (r if they share one up, else `min(d1, N r)`): the directions beyond have sigma 0 and are arbitrary.
        n_users (`int`):
            N.
        tolerance (`float`):
            A direction counts as there if `sigma_j > tolerance * sigma_1`.
    """

    singular_values: torch.Tensor
    basis: torch.Tensor
    n_users: int
    tolerance: float

    @property
    def rank(self) -> int:
        """Numerical rank: how many `sigma_j > tolerance * sigma_1`; 0 if all updates are zero."""
        largest = self.singular_values[0]
        return int((self.singular_values > self.tolerance * largest).sum()) if largest > 0 else 0

    @property
    def effective_rank(self) -> float:
        """`(sum sigma_j²)² / sum sigma_j⁴`: k for k equal singular values, less where they differ; 0 without any."""
        scaled = self._scaled().square()
        return float(scaled.sum().square() / scaled.square().sum()) if self.rank else 0.0

    def explained(self, k: int) -> float:
        """Share of the squared Frobenius norm in the first k directions, 0 to 1.

        Raises:
            SubspaceError: k < 1, or all updates are zero.
        """
        _check_count("k", k)
        if not self.rank:
            raise SubspaceError(
                "All updates are zero, so no direction explains any of them. Is this an adapter before its training (B = 0)?"
            )
        squares = self._scaled().square()
        return min(1.0, float(squares[:k].sum() / squares.sum()))

    def nu(self, k: int) -> float:
        """`sigma_k² / N`, Definition 4.1: how strongly the users together use the k-th direction; larger is easier.

        Raises:
            SubspaceError: k < 1 or above the rank.
        """
        self._check_exists(k)
        return float(self.singular_values[k - 1].square()) / self.n_users

    def sigma_tail(self, k: int) -> float:
        """`sum over j > k of sigma_j²`, Definition 4.1: what no common basis of k directions can hold.

        Raises:
            SubspaceError: k < 1.
        """
        _check_count("k", k)
        return float(self.singular_values[k:].square().sum())

    def leading(self, k: int) -> torch.Tensor:
        """First k left singular vectors `(d1, k)`: B_diamond of (4.1) for the truth, B_hat for an estimate.

        Where [`tied`](k), the space of dimension k is not unique and these are the k that the SVD happened to put first.

        Raises:
            SubspaceError: k < 1 or above the rank.
        """
        self._check_exists(k)
        return self.basis[:, :k]

    def tied(self, k: int, rtol: float = 1e-6) -> bool:
        """Whether `sigma_k` and `sigma_(k+1)` agree within `rtol * sigma_k`, so that the leading k are not unique.

        Raises:
            SubspaceError: k < 1 or above the rank.
        """
        self._check_exists(k)
        values = self.singular_values
        return k < len(values) and float(values[k - 1] - values[k]) <= rtol * float(values[k - 1])

    def _scaled(self) -> torch.Tensor:
        """Relative to the largest, in float64, so that no square under- or overflows."""
        return self.singular_values.double() / self.singular_values[0].double()

    def _check_exists(self, k: int) -> None:
        _check_count("k", k)
        if k > self.rank:
            raise SubspaceError(
                f"k={k} came, but the aggregate of {self.n_users} users has rank {self.rank} (singular values above "
                f"{self.tolerance:.1e} of the largest), so there is no {k}-th direction. Choose k <= {self.rank}; a lower rank than "
                "the adapter's r means that training did not use the rest."
            )


class _Columns:
    """Columns of a matrix with few rows, one block after the other; holds at most `max(2 rows, rows + 1024)` of them.

    `C = [c_1, c_2, ...]` is folded to a square `L` with `L L^T = C C^T` by a QR of its transpose. Unlike a running Gram matrix
    `C C^T` this keeps all digits: there a singular value below 1e-8 of the largest is noise.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device):
        # transposed, as the QR wants it; untouched pages of an empty tensor cost no memory
        self.held = torch.empty(rows + max(rows, _FOLD), rows, dtype=dtype, device=device)
        self.n = 0

    def add(self, block: torch.Tensor) -> None:
        """`(rows, columns)`."""
        for part in block.mT.split(max(1, len(self.held) - self.held.shape[1])):
            if self.n + len(part) > len(self.held):
                self.fold()
            self.held[self.n : self.n + len(part)] = part
            self.n += len(part)

    def fold(self) -> torch.Tensor:
        """`L`, `(rows, at most rows)`, with `L L^T = C C^T`."""
        rows = self.held.shape[1]
        if self.n > rows:
            self.held[:rows] = torch.linalg.qr(self.held[: self.n], mode="r").R
            self.n = rows
        return self.held[: self.n].mT


def spectrum(updates: Updates, *, dtype: torch.dtype = torch.float64) -> Spectrum:
    """Singular values and left singular vectors of the aggregate `[dTheta_1, ..., dTheta_N]`, a user at a time.

    Never holds the `N d2` columns: at most `max(2 d1, d1 + 1024)` columns of height d1, or of height r where all users have
    the same `up` (then the rank is r at most, and only the r-row downs differ). A pair of factors stands for r columns, not d2.

    Args:
        updates (`torch.Tensor` of shape `(users, d1, d2)`, or an iterable of updates `(d1, d2)` or pairs `(up, down)`):
            The users' updates; a pair `(d1, r)`, `(r, d2)` stands for `up @ down`, with any r of its own.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`):
            To compute in. float32 halves the memory and takes singular values below about 1e-5 of the largest for noise.

    Returns:
        [`Spectrum`]: its `tolerance` is `16 sqrt(min(d1, N d2)) eps`, eps of the coarser of `dtype` and updates given whole (a
        float32 product is itself only known to 1e-7; factors are exact).

    Raises:
        SubspaceError: no users, different shapes, or NaN or infinite entries.
    """
    _check_dtype(dtype)
    shape: tuple[int, int] | None = None
    shared: torch.Tensor | None = None  # the one up of all users so far
    columns: _Columns | None = None
    n_users, eps = 0, torch.finfo(dtype).eps
    for item in _each(updates):
        own = _shape(item, n_users)
        if shape is None:
            shape = own
            shared = item[0] if isinstance(item, tuple) else None
        elif own != shape:
            raise SubspaceError(
                f"User {n_users} has an update of shape {own}, the users before him {shape}; the aggregate puts updates of one "
                "layer side by side. Were two layers mixed?"
            )
        if columns is None:
            rows = shape[0] if shared is None else shared.shape[1]
            device = (item[0] if isinstance(item, tuple) else item).device
            columns = _Columns(rows, dtype, device)
        if shared is not None and not _same(item, shared):
            # from here on the users' ups differ: what was collected under the common one becomes columns as any other
            collected = shared.to(dtype) @ columns.fold()
            columns, shared = _Columns(shape[0], dtype, shared.device), None
            columns.add(collected)
        if isinstance(item, tuple):
            columns.add(item[1].to(dtype) if shared is not None else _short(item, dtype))
        else:
            columns.add(item.to(dtype))
            eps = max(eps, torch.finfo(item.dtype).eps)
        n_users += 1
    if shape is None or columns is None:
        raise SubspaceError("No users came; a spectrum needs the update of at least one.")
    up = None if shared is None else shared.to(dtype)
    most = min(shape[0], n_users * shape[1])
    tolerance = _ROUNDING * math.sqrt(most) * eps
    return _decomposed(up, columns.fold(), n_users, most, tolerance)


def spectrum_shared(
    up: torch.Tensor, gram_of_downs: torch.Tensor, n_users: int, dtype: torch.dtype = torch.float64
) -> Spectrum:
    """[`spectrum`] of `dTheta_i = up @ W_i` from `sum over i of W_i W_i^T` alone.

    A Gram matrix has lost half of the digits: singular values below about 1e-8 of the largest are noise in float64, and
    `tolerance` is the root of [`spectrum`]'s.

    Args:
        up (`torch.Tensor` of shape `(d1, r)`):
            The factor all users share.
        gram_of_downs (`torch.Tensor` of shape `(r, r)`):
            Sum over the users.
        n_users (`int`):
            How many.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`):
            To compute in.

    Returns:
        [`Spectrum`]: with `min(d1, r)` singular values, d2 being unknown.

    Raises:
        SubspaceError: shapes that do not belong together, no users, NaN or infinite entries, or a matrix that is not
            symmetric and positive semidefinite.
    """
    _check_dtype(dtype)
    _check_count("n_users", n_users)
    _check_matrix(up, "up")
    _check_matrix(gram_of_downs, "gram_of_downs")
    r = up.shape[1]
    if gram_of_downs.shape != (r, r):
        raise SubspaceError(
            f"gram_of_downs of shape {tuple(gram_of_downs.shape)} came for an up of shape {tuple(up.shape)}; ({r}, {r}) is needed, "
            "the sum of W_i W_i^T."
        )
    gram = gram_of_downs.to(dtype)
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    slack = math.sqrt(torch.finfo(gram_of_downs.dtype).eps) * float(gram.abs().max())
    if float((gram - gram.mT).abs().max()) > slack or float(values[0]) < -slack:
        raise SubspaceError(
            f"gram_of_downs is no Gram matrix: smallest eigenvalue {float(values[0]):.3g}, largest {float(values[-1]):.3g}, asymmetry "
            f"{float((gram - gram.mT).abs().max()):.3g}. Give the sum of W_i W_i^T over the users."
        )
    eps = max(torch.finfo(dtype).eps, torch.finfo(gram_of_downs.dtype).eps)
    most = min(up.shape)
    tolerance = math.sqrt(_ROUNDING * math.sqrt(most) * eps)
    return _decomposed(up.to(dtype), vectors * values.clamp_min(0).sqrt(), n_users, most, tolerance)


def _decomposed(up: torch.Tensor | None, core: torch.Tensor, n_users: int, most: int, tolerance: float) -> Spectrum:
    """Of `core @ core^T`, or of `(up core) (up core)^T`; `most` singular values, zeros beyond those that were computed."""
    frame = None
    if up is not None:
        frame, triangle = torch.linalg.qr(up)
        core = triangle @ core
    basis, values, _ = torch.linalg.svd(core, full_matrices=False)
    basis, values = basis[:, :most], values[:most]
    values = torch.cat([values, values.new_zeros(most - len(values))])
    return Spectrum(values, basis if frame is None else frame @ basis, n_users, tolerance)


def personal_spectrum(updates: Updates, whole: Spectrum) -> tuple[Spectrum, float]:
    """What is each user's own: spectrum of `dTheta_i - mean over users`, and the share of the squared norm that is common.

    `sum_i ||dTheta_i||² = N ||mean||² + sum_i ||dTheta_i - mean||²`, so with the aggregate's spectrum `whole` the two
    spectra and the share split what the users' updates are. (Ours; the paper's aggregate includes the mean.)

    Works in the coordinates of `whole.basis`, which contains every update; d1 does not enter. From a Gram matrix in
    float64: a personal part below about 1e-8 of the whole is noise.

    Args:
        updates:
            As for [`spectrum`]; the same ones that `whole` was made from, a second time.
        whole ([`Spectrum`]):
            Of the updates.

    Returns:
        `tuple`: [`Spectrum`] of the personal parts, and `N ||mean||² / sum_i ||dTheta_i||²`, 0 to 1 (NaN if all are zero).

    Raises:
        SubspaceError: other updates than `whole` was made from.
    """
    basis = whole.basis.double()
    gram = basis.new_zeros(basis.shape[1], basis.shape[1])
    total: torch.Tensor | None = None
    n_users = 0
    for item in _each(updates):
        if _shape(item, n_users)[0] != len(basis):
            raise SubspaceError(
                f"User {n_users} has an update of shape {_shape(item, n_users)}, the spectrum is of updates with {len(basis)} rows; "
                "give the updates it was made from."
            )
        if isinstance(item, tuple):
            up = basis.mT @ item[0].double()
            update = up @ item[1].double()
            short = up @ (item[1].double() @ item[1].double().mT) @ up.mT
        else:
            update = basis.mT @ item.double()
            short = update @ update.mT
        gram += short
        total = update if total is None else total + update
        n_users += 1
    squares = float(whole.singular_values.double().square().sum())
    if n_users != whole.n_users or total is None or abs(float(gram.trace()) - squares) > 1e-3 * squares:
        raise SubspaceError(
            f"{n_users} updates with a squared norm of {float(gram.trace()):.6g} within the spectrum's basis came; the spectrum is of "
            f"{whole.n_users} with {squares:.6g}. Give the updates it was made from (an iterator can be read only once)."
        )
    mean = total / n_users
    common = mean @ mean.mT * n_users
    values, vectors = torch.linalg.eigh(gram - common)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # rounding is relative to the whole, of which the personal part may be a small rest
    noise = math.sqrt(_ROUNDING * math.sqrt(len(values)) * torch.finfo(torch.float64).eps)
    largest = math.sqrt(float(values[0]))
    tolerance = min(1.0, noise * float(whole.singular_values[0]) / largest) if largest else 1.0
    personal = Spectrum(values.sqrt(), basis @ vectors, n_users, tolerance)
    return personal, float(common.trace() / gram.trace()) if squares else math.nan


def best_rank_k(updates: Updates, k: int) -> torch.Tensor:
    """Best approximation of the aggregate with rank k, `Theta_diamond` of (4.1): `U_k U_k^T dTheta_i`.

    Args:
        updates:
            As for [`spectrum`]; held as a whole here.
        k (`int`):
            Rank.

    Returns:
        `torch.Tensor` of shape `(users, d1, d2)`, float64.

    Raises:
        SubspaceError: k < 1 or above the rank, or updates [`spectrum`] refuses.
    """
    whole = [
        item[0].double() @ item[1].double() if isinstance(item, tuple) else item.double() for item in _each(updates)
    ]
    basis = spectrum(whole).leading(k)
    return basis @ (basis.mT @ torch.stack(whole))


def approximation_errors(updates: Updates, basis: torch.Tensor) -> torch.Tensor:
    """`b_i = ||dTheta_i - B B^T dTheta_i||_F²`, what a common basis cannot hold of each user (section 4, below (4.1)).

    With B the leading k of the same updates they add up to `sigma_tail(k)`.

    Args:
        updates:
            As for [`spectrum`], a user at a time.
        basis (`torch.Tensor` of shape `(d1, k)`):
            Orthonormal B.

    Returns:
        `torch.Tensor` of shape `(users,)`, float64.

    Raises:
        SubspaceError: the basis is not orthonormal or has another d1.
    """
    basis = _check_basis(basis, "basis")
    errors = []
    for number, item in enumerate(_each(updates)):
        if _shape(item, number)[0] != len(basis):
            raise SubspaceError(
                f"User {number} has an update of shape {_shape(item, number)} and the basis {len(basis)} rows; both are of d1."
            )
        block = _short(item, torch.float64) if isinstance(item, tuple) else item.double()
        errors.append((block - basis @ (basis.mT @ block)).square().sum())
    if not errors:
        raise SubspaceError("No users came; errors need the update of at least one.")
    return torch.stack(errors)


# -- two subspaces


def orthonormal(factor: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of the column space of a factor, by QR: column j lies in the span of the factor's first j.

    Args:
        factor (`torch.Tensor` of shape `(d1, k)`):
            Of full column rank.

    Returns:
        `torch.Tensor` of shape `(d1, k)`, float64.

    Raises:
        SubspaceError: its columns are linearly dependent, or an entry is NaN or infinite.
    """
    _check_matrix(factor, "factor")
    d1, k = factor.shape
    q, triangle = torch.linalg.qr(factor.double())
    values = torch.linalg.svdvals(triangle)
    tolerance = _ROUNDING * math.sqrt(min(d1, k)) * torch.finfo(torch.float64).eps
    rank = int((values > tolerance * values[0]).sum())
    if rank < k:
        raise SubspaceError(
            f"A factor of shape {(d1, k)} has rank {rank}, so its {k} columns span no space of {k} dimensions. An untrained factor "
            "is zero; take the leading directions of its spectrum instead."
        )
    return q


def principal_angles(basis_a: torch.Tensor, basis_b: torch.Tensor) -> torch.Tensor:
    """Principal angles between two column spaces, smallest first.

    From sines where a cosine is near 1 (and has lost the digits of a small angle), as Björck and Golub (1973) and Knyazev and
    Argentati (2002) do.

    Args:
        basis_a (`torch.Tensor` of shape `(d1, k_a)`), basis_b (`torch.Tensor` of shape `(d1, k_b)`):
            Spanning sets of full column rank; made orthonormal here.

    Returns:
        `torch.Tensor` of shape `(min(k_a, k_b),)`, float64, radians in [0, pi/2].

    Raises:
        SubspaceError: different d1, or linearly dependent columns.
    """
    a, b = orthonormal(basis_a), orthonormal(basis_b)
    if len(a) != len(b):
        raise SubspaceError(f"Bases with {len(a)} and {len(b)} rows came; subspaces of one space have the same d1.")
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    inner = a.mT @ b  # (larger k, smaller k)
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    # of the smaller space's part outside the larger, smallest angle first
    sines = torch.linalg.svdvals(b - a @ inner).clamp(max=1)[: b.shape[1]].flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def distance(basis_a: torch.Tensor, basis_b: torch.Tensor) -> float:
    """Distance of two subspaces of the same dimension k, Definition A.1: 0 if equal, sqrt(k) if orthogonal.

    `dist = (1/sqrt 2) ||B1 B1^T - B2 B2^T||_F = ||B1^T B2_perp||_F`, the root of the sum of squared sines of the principal angles.

    Args:
        basis_a (`torch.Tensor` of shape `(d1, k)`), basis_b (`torch.Tensor` of shape `(d1, k)`):
            Orthonormal bases ([`orthonormal`] or [`Spectrum.leading`] makes them).

    Raises:
        SubspaceError: different shapes, or a basis that is not orthonormal.
    """
    a, b = _check_basis(basis_a, "basis_a"), _check_basis(basis_b, "basis_b")
    if a.shape != b.shape:
        raise SubspaceError(
            f"Bases of shape {tuple(a.shape)} and {tuple(b.shape)} came; the distance of Definition A.1 is of two subspaces of the "
            "same dimension k in one space. principal_angles compares different ones."
        )
    # (I - P_a) B_b instead of k - ||B_a^T B_b||²: the difference of nearly equal numbers loses small distances
    return float(torch.linalg.norm(b - a @ (a.mT @ b)))


def davis_kahan_bound(estimate: Updates, truth: Updates, k: int) -> tuple[float, float]:
    """Both sides of Lemmas 5 and 8: `dist(B_hat, B_diamond)² <= ||dTheta_hat - dTheta*||_F² / sigma_k²`.

    sigma_k is of the truth. The right-hand side bounds the left with constant 1 if the estimate has rank k at most (as
    a fit in the ShareLoRA class has), whatever the truth's tail; with constant 4 if only the truth has (then the estimate's
    own best rank-k approximation is as far from it again). If neither has, no constant does: with `sigma_(k+1)` close to
    `sigma_k` the smallest error may turn the leading k. (Constants are ours; the lemmas are stated up to theirs.)

    Args:
        estimate, truth (`torch.Tensor` of shape `(users, d1, d2)`, or sequences as for [`spectrum`]):
            Updates of the same users in the same order.
        k (`int`):
            Dimension of the shared space.

    Returns:
        `tuple[float, float]`: left and right-hand side.

    Raises:
        SubspaceError: different users or shapes, or k above the rank of one of them.
    """
    pair = []
    for updates in (estimate, truth):
        whole = [
            item[0].double() @ item[1].double() if isinstance(item, tuple) else item.double()
            for item in _each(updates)
        ]
        pair.append((spectrum(whole), torch.stack(whole)))
    (found, guess), (true, values) = pair
    if guess.shape != values.shape:
        raise SubspaceError(
            f"Estimates of shape {tuple(guess.shape)} and truths of {tuple(values.shape)} came; the same users and layer are needed."
        )
    left = distance(found.leading(k), true.leading(k)) ** 2
    return left, float((guess - values).square().sum() / true.singular_values[k - 1].square())


# -- are the users' spaces one space?


def rotation_null(singular_values: torch.Tensor, d1: int, k: int, draws: int = 99, seed: int = 0) -> torch.Tensor:
    """Explained shares that users with *unrelated* column spaces would show: what sharing has to beat.

    Any N users' updates explain something together (with N r <= k, everything). Here each user keeps the singular
    values of his own update and gets column space at random, independent and uniform, `draws` times. His row space does not enter:
    the aggregate's left side depends on `sum_i U_i S_i² U_i^T` only. (Ours, a Monte Carlo test; the paper has none.)

    Args:
        singular_values (`torch.Tensor` of shape `(users, r)`):
            Of each user's own update, zeros where he has fewer.
        d1 (`int`):
            Dimension of the output side.
        k (`int`):
            Largest number of directions to report.
        draws (`int`, *optional*, defaults to `99`):
            How often. An observed share above all 99 has a one-sided level of 1 %.
        seed (`int`, *optional*, defaults to `0`):
            Of the draws, made on the CPU, so they are the same on every device.

    Returns:
        `torch.Tensor` of shape `(draws, k)`, float64: share of the squared norm in the first 1, ..., k directions.

    Raises:
        SubspaceError: r > d1, all zeros, negative or non-finite values, or a count below 1.
    """
    for name, value in (("d1", d1), ("k", k), ("draws", draws)):
        _check_count(name, value)
    _check_matrix(singular_values, "singular_values")
    values = singular_values.double().cpu()
    n_users, r = values.shape
    total = values.square().sum()
    if r > d1 or bool((values < 0).any()) or total == 0:
        raise SubspaceError(
            f"Singular values of shape {(n_users, r)} between {float(values.min()):.3g} and {float(values.max()):.3g} came for d1={d1}; "
            "at most d1 per user, none negative and not all zero are needed."
        )
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _CHUNK // (d1 * r))
    shares = values.new_zeros(draws, k)
    for draw in range(draws):
        blocks = []
        for part in values.split(at_once):
            # the Q of a Gaussian matrix spans a uniformly distributed space; its signs do not matter to U S² U^T
            frames = torch.linalg.qr(torch.randn(len(part), d1, r, generator=generator, dtype=torch.float64)).Q
            blocks.append((frames * part[:, None, :]).permute(1, 0, 2).reshape(d1, -1))
        columns = torch.cat(blocks, 1)
        gram = columns @ columns.mT if d1 < columns.shape[1] else columns.mT @ columns
        squares = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
        squares = torch.cat([squares, squares.new_zeros(max(0, k - len(squares)))])
        shares[draw] = (squares[:k].cumsum(0) / total).clamp(max=1)
    return shares


# -- the theorems


Kind: TypeAlias = Literal["sharelora", "lora", "full"]


def parameter_count(k: int, d1: int, d2: int, n_users: int, kind: Kind = "sharelora") -> int:
    """Parameters of a class: `k (d1 + N d2)` shared, `N k (d1 + d2)` for a LoRA per user, `N d1 d2` in full (section 4).

    Raises:
        SubspaceError: a count below 1, or an unknown kind.
    """
    for name, value in (("k", k), ("d1", d1), ("d2", d2), ("n_users", n_users)):
        _check_count(name, value)
    counts = {"sharelora": k * (d1 + n_users * d2), "lora": n_users * k * (d1 + d2), "full": n_users * d1 * d2}
    return counts[_known(kind, counts)]


def log_bracketing(
    k: int, d1: int, d2: int, n_users: int, n_comparisons: int, delta: float = 0.05, kind: Kind = "sharelora"
) -> float:
    """`log(N_G(1/(N Np)) / delta)` up to a constant: parameters of the class times `log(N Np / delta)`.

    Proposition 1 for the ShareLoRA class, and the comparison below it for LoRA per user and full fine-tuning.

    Args:
        k, d1, d2, n_users (`int`):
            As for [`parameter_count`].
        n_comparisons (`int`):
            Np, comparisons per user.
        delta (`float`, *optional*, defaults to `0.05`):
            Probability that the bound may fail; a choice of ours.
        kind (`str`, *optional*, defaults to `"sharelora"`):
            `"sharelora"`, `"lora"` or `"full"`.

    Raises:
        SubspaceError: a count below 1, delta outside (0, 1), or an unknown kind.
    """
    _check_count("n_comparisons", n_comparisons)
    _check_delta(delta)
    return parameter_count(k, d1, d2, n_users, kind) * math.log(n_users * n_comparisons / delta)


def theorem_4_1(
    *, log_bracketing: float, n_users: int, n_comparisons: int, nu: float, sigma_tail: float = 0.0
) -> float:
    """Right-hand side of Theorem 4.1 without c1, for `dist(B_hat, B_diamond)`.

    `sqrt( L / (N Np nu) + (1/nu) sqrt(Sigma_tail / N) )`

    Args:
        log_bracketing (`float`):
            L, from [`log_bracketing`].
        n_users, n_comparisons (`int`):
            N, and Np per user.
        nu (`float`), sigma_tail (`float`, *optional*, defaults to `0.0`):
            Of the true updates, [`Spectrum.nu`] and [`Spectrum.sigma_tail`]. The second term is 0 if an exact common basis exists.

    Raises:
        SubspaceError: a count below 1, nu not positive, or a negative term.
    """
    return math.sqrt(_estimation(log_bracketing, n_users, n_comparisons, nu) + _tail(n_users, nu, sigma_tail))


def theorem_4_2(
    *,
    log_bracketing: float,
    n_users: int,
    n_comparisons: int,
    nu: float,
    sigma_tail: float = 0.0,
    k: int,
    d2: int,
    b_i: float = 0.0,
    delta: float = 0.05,
) -> float:
    """Right-hand side of Theorem 4.2 without c2, for one user's value gap `J(pi_tar; r*_i) - J(pi_hat_i; r*_i)`.

    `sqrt( L/(N Np nu) + (k d2 + log(N/delta))/Np + (1/nu) sqrt(Sigma_tail/N) + b_i )`

    Args:
        log_bracketing, n_users, n_comparisons, nu, sigma_tail:
            As for [`theorem_4_1`].
        k, d2 (`int`):
            Rank, and input side.
        b_i (`float`, *optional*, defaults to `0.0`):
            What the common basis cannot hold of this user ([`approximation_errors`]).
        delta (`float`, *optional*, defaults to `0.05`):
            Probability that the bound may fail.

    Raises:
        SubspaceError: as [`theorem_4_1`].
    """
    _check_terms(b_i=b_i)
    own = _own(k, d2, n_users, n_comparisons, delta)
    return math.sqrt(
        _estimation(log_bracketing, n_users, n_comparisons, nu) + own + _tail(n_users, nu, sigma_tail) + b_i
    )


def corollary_4_1(
    *,
    log_bracketing: float,
    n_users: int,
    n_comparisons: int,
    nu: float,
    sigma_tail: float = 0.0,
    k: int,
    d2: int,
    delta: float = 0.05,
) -> float:
    """Right-hand side of Corollary 4.1 without c3, for the mean value gap over users: Theorem 4.2 without b_i.

    `sqrt( L/(N Np nu) + (k d2 + log(N/delta))/Np + (1/nu) sqrt(Sigma_tail/N) )`, arguments as for [`theorem_4_2`].
    """
    return theorem_4_2(
        log_bracketing=log_bracketing,
        n_users=n_users,
        n_comparisons=n_comparisons,
        nu=nu,
        sigma_tail=sigma_tail,
        k=k,
        d2=d2,
        delta=delta,
    )


def corollary_b_1(*, log_bracketing: float, n_users: int, n_comparisons: int, sigma_tail: float = 0.0) -> float:
    """Right-hand side of Corollary B.1 without c4 (training from scratch): `sqrt( log N_G'/(N Np) + sqrt(Sigma_tail/N) )`.

    The corollary prints "log N"; read here as the log bracketing number, as in the statements it follows from. (Read as the number of users, the
    bound would vanish for one user.) Stated for `N >= mu² Sigma_tail` with a mu the caller has to know; not checked.
    """
    _check_count("n_users", n_users)
    _check_count("n_comparisons", n_comparisons)
    return math.sqrt(log_bracketing / (n_users * n_comparisons) + _tail(n_users, 1.0, sigma_tail))


def samples_needed(
    k: int,
    d1: int,
    d2: int,
    n_users: int,
    epsilon: float,
    delta: float = 0.05,
    kind: Literal["sharelora", "full", "park"] = "sharelora",
) -> float:
    """Comparisons per user that Remark 3 asks for, up to a constant.

    full `(d1 d2 / eps) log(N/delta)`; P-ShareLoRA `((d1 k + N d2 k) / (N eps)) log(N/delta)`; Park et al.
    (https://huggingface.co/papers/2405.00254) `((d1 k + N k) / (N eps)) log(N/delta)`.

    The remark's 1/eps is the authors' convention: the bounds of the theorems are square roots, so that a value gap of `gap` needs
    `1/gap²`. Pass `epsilon=gap**2` for that reading.

    Args:
        k, d1, d2, n_users (`int`):
            As for [`parameter_count`].
        epsilon (`float`):
            Of the remark's accuracy `1 - eps - (Sigma_tail/N)^(1/4)`.
        delta (`float`, *optional*, defaults to `0.05`):
            Probability of failure.
        kind (`str`, *optional*, defaults to `"sharelora"`):
            `"sharelora"`, `"full"` or `"park"`.

    Raises:
        SubspaceError: a count below 1, epsilon not positive, delta outside (0, 1), or an unknown kind.
    """
    for name, value in (("k", k), ("d1", d1), ("d2", d2), ("n_users", n_users)):
        _check_count(name, value)
    _check_delta(delta)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise SubspaceError(f"epsilon={epsilon} came; an accuracy above 0 is needed.")
    counts = {
        "full": float(d1 * d2),
        "sharelora": (d1 * k + n_users * d2 * k) / n_users,
        "park": (d1 * k + n_users * k) / n_users,
    }
    return counts[_known(kind, counts)] / epsilon * math.log(n_users / delta)


def zeta(
    *,
    log_bracketing: float,
    n_users: int,
    n_comparisons: int,
    nu: float,
    sigma_tail: float = 0.0,
    k: int,
    d2: int,
    errors: torch.Tensor | Sequence[float] | float = 0.0,
    lipschitz: float = 1.0,
    delta: float = 0.05,
    constant: float = 1.0,
) -> float:
    """zeta of (B.1), the size of the paper's confidence set (3.4), with its unnamed c3 as `constant`.

    `sqrt( c3/(2 L1²) ( min_i b_i + L/(N Np nu) + (1/nu) sqrt(Sigma_tail/N) + (k d2 + log(N/delta))/Np ) )`

    As printed, (3.4) bounds the *squared* norm by zeta, so the ball's radius is `sqrt(zeta)`
    ([`~trl_sharelora.pessimism.ball_radius`]); the proof of Theorem 4.2 uses zeta itself as the radius. And (B.1) takes the minimum
    of the b_i over the users, where a guarantee for every user would need each one's own, or the largest: give
    `errors=[b_i]` of one user, or their maximum, for that reading.

    Args:
        log_bracketing, n_users, n_comparisons, nu, sigma_tail, k, d2, delta:
            As for [`theorem_4_2`].
        errors (`torch.Tensor` or `Sequence[float]`, *optional*, defaults to `0.0`):
            b_i of the users ([`approximation_errors`]); their minimum is taken, as printed.
        lipschitz (`float`, *optional*, defaults to `1.0`):
            L1 of Assumption 1, the largest norm of the reward's gradient with respect to the update.
        constant (`float`, *optional*, defaults to `1.0`):
            c3; the paper gives no value.

    Raises:
        SubspaceError: as [`theorem_4_1`], or L1 or the constant is not positive.
    """
    smallest = float(torch.as_tensor(errors, dtype=torch.float64).min())
    _check_terms(errors=smallest)
    if not (lipschitz > 0 and constant > 0 and math.isfinite(lipschitz) and math.isfinite(constant)):
        raise SubspaceError(f"lipschitz={lipschitz} and constant={constant} came; both are finite and above 0.")
    inner = (
        smallest
        + _estimation(log_bracketing, n_users, n_comparisons, nu)
        + _tail(n_users, nu, sigma_tail)
        + _own(k, d2, n_users, n_comparisons, delta)
    )
    return math.sqrt(constant / (2 * lipschitz**2) * inner)


def reward_difference_error(estimated: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """In-sample mean squared error of reward differences, left-hand side of Theorem B.3.

    Args:
        estimated (`torch.Tensor` of shape `(..., n)`), true (`torch.Tensor` of shape `(..., n)`):
            `r(tau_0) - r(tau_1)` of the same n comparisons, such as `(users, Np)`.

    Returns:
        `torch.Tensor` of shape `(...)`, float64.

    Raises:
        SubspaceError: different shapes, no comparisons, or NaN or infinite entries.
    """
    if estimated.shape != true.shape or estimated.ndim == 0 or estimated.shape[-1] == 0:
        raise SubspaceError(
            f"Differences of shape {tuple(estimated.shape)} and {tuple(true.shape)} came; one per comparison is needed, the same "
            "comparisons in both."
        )
    error = (estimated.double() - true.double()).square().mean(-1)
    if not bool(error.isfinite().all()):
        raise SubspaceError("A reward difference is NaN or infinite.")
    return error


def uniform_concentration(in_sample_sq_diffs: torch.Tensor, expected: float) -> float:
    """`D_hat / D` of Assumption 2, which asks for 0.9 to 1.1 once there are enough comparisons.

    D is the expected squared gap between two parameters' reward differences, D_hat its mean over the comparisons at hand. The
    assumption is uniform over all pairs of parameters; this is the ratio of one.

    Args:
        in_sample_sq_diffs (`torch.Tensor` of shape `(n,)`):
            `((r_1(tau_0) - r_1(tau_1)) - (r_2(tau_0) - r_2(tau_1)))²` of each comparison.
        expected (`float`):
            D. For `r = <Theta, phi>` with `phi ~ N(0, I)` it is `2 ||Theta_1 - Theta_2||_F²`.

    Raises:
        SubspaceError: no comparisons, a negative or non-finite value, or an expectation that is not positive.
    """
    values = in_sample_sq_diffs.double()
    if values.numel() == 0 or not bool((values.isfinite() & (values >= 0)).all()) or not 0 < expected < math.inf:
        raise SubspaceError(
            f"{values.numel()} squared gaps and an expectation of {expected} came; at least one gap, finite and not negative, and a finite "
            "expectation above 0 are needed (two equal parameters have no gap to compare)."
        )
    return float(values.mean() / expected)


def concentrability(
    target: torch.Tensor,
    reference: torch.Tensor,
    *,
    features: torch.Tensor | None = None,
    truth: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
    comparisons: torch.Tensor | None = None,
) -> float:
    """Concentrability coefficient C_r of Definition A.3 for finitely many arms: how badly the data cover the target.

    `C_r = max(0, sup over r of E_{0~target, 1~reference}[g(0) - g(1)] / sqrt(E[(g(0) - g(1))²]))` with `g = r* - r`, the lower
    expectation over the pairs that were compared.

    Either over given rewards (`truth` and `candidates`), or over all linear ones (`features`): with `g = phi w` the ratio does not
    change with the length of w, so the supremum over a ball around the truth is that over all w,
    `sqrt(c^T M^+ c)` with `c = E_target phi - E_reference phi` and `M = E[z z^T]` of the compared pairs' `z`; infinite if c has a part
    that no comparison sees. (The closed form is ours.)

    Args:
        target (`torch.Tensor` of shape `(arms,)`), reference (`torch.Tensor` of shape `(arms,)`):
            Probabilities under pi_tar and mu_ref.
        features (`torch.Tensor` of shape `(arms, d)`, *optional*):
            Of the linear class.
        truth (`torch.Tensor` of shape `(arms,)`, *optional*), candidates (`torch.Tensor` of shape `(m, arms)`, *optional*):
            True rewards, and those the supremum runs over.
        comparisons (`torch.Tensor` of shape `(arms, arms)`, *optional*):
            Probability that arm a was compared with arm b. By default both are drawn from `reference`.

    Returns:
        `float`: at least 0; `inf` if a candidate differs where no comparison looks.

    Raises:
        SubspaceError: neither or both of `features` and `candidates`, other shapes, or numbers that are no probabilities.
    """
    target, reference = target.double(), reference.double()
    n = len(target) if target.ndim else 0
    pairs = torch.outer(reference, reference) if comparisons is None else comparisons.double()
    for name, values, shape in (
        ("target", target, (n,)),
        ("reference", reference, (n,)),
        ("comparisons", pairs, (n, n)),
    ):
        if n == 0 or values.shape != shape or bool((values < 0).any()) or abs(float(values.sum()) - 1) > 1e-6:
            raise SubspaceError(
                f"{name} of shape {tuple(values.shape)} with sum {float(values.sum()):.6g} came; probabilities of shape {shape} that add "
                "up to 1 are needed."
            )
    # E (g_a - g_b)² = g^T (diag(row sums + column sums) - pairs - pairs^T) g
    information = torch.diag(pairs.sum(0) + pairs.sum(1)) - pairs - pairs.mT
    aim = target - reference
    if (features is None) == (candidates is None) or (candidates is None) != (truth is None):
        raise SubspaceError(
            "Give features for all linear rewards, or truth and candidates for given ones; one of the two."
        )
    if features is not None:
        if features.ndim != 2 or len(features) != n:
            raise SubspaceError(f"features of shape {tuple(features.shape)} came for {n} arms; (arms, d) is needed.")
        phi = features.double()
        c = phi.mT @ aim
        values, vectors = torch.linalg.eigh(phi.mT @ information @ phi)
        seen = values > _ROUNDING * len(values) * torch.finfo(torch.float64).eps * values[-1].clamp_min(0)
        parts = vectors.mT @ c
        # sqrt: an eigenvalue of rounding size belongs to a direction whose part of c is known to its root only
        if float(parts[~seen].norm() if bool((~seen).any()) else 0.0) > 1e-7 * float(phi.norm()):
            return math.inf
        return math.sqrt(float((parts[seen].square() / values[seen]).sum()))
    assert candidates is not None and truth is not None
    if candidates.ndim != 2 or candidates.shape[1] != n or truth.shape != (n,):
        raise SubspaceError(
            f"candidates of shape {tuple(candidates.shape)} and truth of {tuple(truth.shape)} came for {n} arms; (m, arms) and (arms,) are "
            "needed."
        )
    gaps = truth.double() - candidates.double()  # (m, arms)
    above = gaps @ aim
    # over pairs, not by the quadratic form: a gap that no comparison sees must come out as exactly 0
    below = ((gaps[:, :, None] - gaps[:, None, :]).square() * pairs).sum((1, 2)).sqrt()
    scale = gaps.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny)
    seen = below > 1e-12 * scale
    if bool((above[~seen] > 1e-12 * scale[~seen]).any()):
        return math.inf
    return max(0.0, float((above[seen] / below[seen]).max())) if bool(seen.any()) else 0.0


def _estimation(log_bracketing: float, n_users: int, n_comparisons: int, nu: float) -> float:
    _check_count("n_users", n_users)
    _check_count("n_comparisons", n_comparisons)
    _check_terms(log_bracketing=log_bracketing)
    if not (math.isfinite(nu) and nu > 0):
        raise SubspaceError(f"nu={nu} came; Definition 4.1 asks for sigma_k²/N above 0. Is k above the rank?")
    return log_bracketing / (n_users * n_comparisons * nu)


def _tail(n_users: int, nu: float, sigma_tail: float) -> float:
    _check_terms(sigma_tail=sigma_tail)
    return math.sqrt(sigma_tail / n_users) / nu


def _own(k: int, d2: int, n_users: int, n_comparisons: int, delta: float) -> float:
    _check_count("k", k)
    _check_count("d2", d2)
    _check_delta(delta)
    return (k * d2 + math.log(n_users / delta)) / n_comparisons


# -- checks


def _each(updates: Updates) -> Iterator[Update]:
    if isinstance(updates, torch.Tensor) and updates.ndim != 3:
        raise SubspaceError(
            f"Updates of shape {tuple(updates.shape)} came; (users, d1, d2) is needed. One user's matrix: give it in a list."
        )
    for item in updates:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, tuple | list) and len(item) == 2:
            yield item[0], item[1]
        else:
            raise SubspaceError(
                f"A {type(item).__name__} came for a user; a matrix (d1, d2) or a pair (up, down) is needed."
            )


def _shape(item: Update, number: int) -> tuple[int, int]:
    """(d1, d2), checked."""
    factors = item if isinstance(item, tuple) else (item,)
    if not all(isinstance(factor, torch.Tensor) and factor.is_floating_point() for factor in factors):
        raise SubspaceError(
            f"User {number} has a {type(item).__name__}; a floating-point matrix (d1, d2), or a pair of them, up (d1, r) and down (r, d2), "
            "is needed."
        )
    if any(factor.ndim != 2 or 0 in factor.shape for factor in factors) or (
        len(factors) == 2 and factors[0].shape[1] != factors[1].shape[0]
    ):
        raise SubspaceError(
            f"User {number} has factors of shape {', '.join(str(tuple(factor.shape)) for factor in factors)}; (d1, d2), or (d1, r) and "
            "(r, d2), is needed, none of them empty."
        )
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise SubspaceError(f"The update of user {number} has NaN or infinite entries; its training has diverged.")
    return factors[0].shape[0], factors[-1].shape[1]


def _same(item: Update, shared: torch.Tensor) -> bool:
    return isinstance(item, tuple) and (item[0] is shared or torch.equal(item[0], shared))


def _short(pair: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """`(d1, min(r, d2))` with the same Gram matrix as `up @ down`."""
    up, down = pair[0].to(dtype), pair[1].to(dtype)
    return up @ (torch.linalg.qr(down.mT, mode="r").R.mT if down.shape[0] < down.shape[1] else down)


def _check_matrix(matrix: torch.Tensor, name: str) -> None:
    if matrix.ndim != 2 or 0 in matrix.shape or not bool(matrix.isfinite().all()):
        raise SubspaceError(
            f"{name} of shape {tuple(matrix.shape)} came; a matrix with finite entries, not empty, is needed."
        )


def _check_basis(basis: torch.Tensor, name: str) -> torch.Tensor:
    """The basis in float64."""
    _check_matrix(basis, name)
    wide = basis.double()
    off = float((wide.mT @ wide - torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)).abs().max())
    if off > math.sqrt(torch.finfo(basis.dtype).eps):
        raise SubspaceError(
            f"{name} of shape {tuple(basis.shape)} is not orthonormal: B^T B is {off:.2g} off the identity. A trained factor is not; "
            "pass it through orthonormal() first."
        )
    return wide


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise SubspaceError(
            f"dtype={dtype} came; decompositions are made in torch.float64, or torch.float32 to save memory."
        )


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SubspaceError(f"{name}={value!r} came; a whole number of at least 1 is needed.")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise SubspaceError(f"delta={delta} came; a probability strictly between 0 and 1 is needed.")


def _check_terms(**terms: float) -> None:
    for name, value in terms.items():
        if not (math.isfinite(value) and value >= 0):
            raise SubspaceError(f"{name}={value} came; a finite number of at least 0 is needed.")


def _known(kind: str, kinds: Iterable[str]) -> str:
    names = list(kinds)
    if kind not in names:
        raise SubspaceError(f"kind={kind!r} came; it is one of {', '.join(map(repr, names))}.")
    return kind
