"""How much users differ, learned from all of their comparisons together, and each user's own part under it.

Comparison `i` of user `u` has the margin `offset_i + x_i · z_u`, `x_i` `(k,)` the gradient of the reward difference along the user's own
parameters, and `P(chosen) = sigmoid(margin)` (Bradley-Terry). The users' parts are draws from one normal distribution whose covariance is not
known:

    z_u = mean + L y_u,        y_u ~ N(0, I),        covariance = L L'

[`learn_prior`] finds `L` by EM (Dempster, Laird and Rubin, 1977): given `L`, each user's posterior by Laplace's approximation (Rasmussen and
Williams, 2006, algorithms 3.1 and 3.2, in the users' n by n kernels); given these, `L L'` is the mean of `E[z z']` over users, posterior
variances included. Those variances are what a principal component analysis of fitted users leaves out: a user with thirty answers
has moved little, whatever his taste is.

None of this is from the paper, which shrinks no user; it is the classical remedy where each has few comparisons and many entries (Efron and
Morris, 1973; Robbins, 1956).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .errors import ConfigError, NonFiniteError


# Numbers of padded features at a time: 64 MB of float32.
CHUNK = 2**24
# EM moves slowly along directions in which the users' data say little of each; twice its step in the logarithm of the covariance takes half the
# passes (over-relaxed EM; Salakhutdinov and Roweis, 2003). On real votes 8 steps so reach what 15 plain ones do not. Where the data say much of each
# user a plain step is right and twice of it is too far: a step after which the evidence is lower is taken anew, plain.
RELAXATION = 2
NEWTON_STEPS = 20  # at most; 3 to 8 are usual


class Prior(NamedTuple):
    """What users are drawn from.

    Args:
        mean (`torch.Tensor` of shape `(k,)`):
            Their mean own part.
        root (`torch.Tensor` of shape `(k, m)`):
            A root of their covariance, `root root'`.
    """

    mean: torch.Tensor
    root: torch.Tensor


class Step(NamedTuple):
    """The state after some EM steps.

    Args:
        number (`int`):
            How many; at 0 the covariance is the isotropic one of the start.
        prior ([`Prior`]):
            As it was when the users were solved for.
        users (`torch.Tensor` of shape `(users, k)`):
            Posterior mode of each user's own part, the mean included; who has no comparison has the mean.
        evidence (`float`):
            Log marginal likelihood of all comparisons, by Laplace; the ridge on the mean is not in it.
    """

    number: int
    prior: Prior
    users: torch.Tensor
    evidence: float


class _Posterior(NamedTuple):
    weights: torch.Tensor  # (users, n): y = features' weights
    spread: torch.Tensor  # (users, n, n): covariance of y = I - features' spread features
    evidence: torch.Tensor  # (users,)


def _climbed(
    start: torch.Tensor,
    value: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    direction: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Newton's method for many users, each with a step halved where it does not help; where no half of it does he stays.

    Args:
        start (`(users, n)`): Where to begin, for whom zero is not better.
        value: Of a point: what is linear in it, `(users, n)`, and the objective `(users,)`.
        direction: Of a point and what is linear in it: the whole step.
    """
    point = start
    linear, now = value(point)
    if bool(start.any()):  # the mode under another prior may be far out under this one
        nothing, at_zero = value(torch.zeros_like(start))
        far = at_zero > now
        point, linear = torch.where(far[:, None], 0.0, point), torch.where(far[:, None], nothing, linear)
        now = torch.maximum(now, at_zero)
    for _ in range(NEWTON_STEPS):
        step = direction(point, linear)
        size = torch.ones_like(now)
        for _ in range(10):
            trial = point + size[:, None] * step
            moved, after = value(trial)
            worse = after < now - 1e-9 * now.abs()
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        else:
            trial, moved = (torch.where(worse[:, None], old, new) for old, new in ((point, trial), (linear, moved)))
            after = torch.where(worse, now, after)
        gain = float((after - now).max())
        point, linear, now = trial, moved, after
        if gain < 1e-4:  # of a log-likelihood
            break
    return point, linear, now


def _laplace(kernel: torch.Tensor, offsets: torch.Tensor, mask: torch.Tensor, start: torch.Tensor) -> _Posterior:
    """Modes of `sum log sigmoid(offset + f) - f' K^-1 f / 2` for many users.

    Args:
        kernel (`(users, n, n)`), offsets (`(users, n)`), mask (`(users, n)`, 0 where there is no comparison), start (`(users, n)`, the first weights):
            float64.
    """
    eye = torch.eye(offsets.shape[1], dtype=kernel.dtype, device=kernel.device)

    def value(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        f = (kernel @ weights[..., None]).squeeze(2)
        return f, (mask * F.logsigmoid(offsets + f)).sum(1) - (weights * f).sum(1) / 2

    def curved(f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradient = mask * torch.sigmoid(-offsets - f)
        root = (gradient * torch.sigmoid(offsets + f)).sqrt()
        return gradient, root, torch.linalg.cholesky(eye + root[:, :, None] * kernel * root[:, None, :])

    def direction(weights: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        gradient, root, factor = curved(f)
        b = root.square() * f + gradient
        inner = root * (kernel @ b[..., None]).squeeze(2)
        return b - root * torch.cholesky_solve(inner[..., None], factor).squeeze(2) - weights

    weights, f, now = _climbed(start, value, direction)
    _, root, factor = curved(f)
    spread = root[:, :, None] * torch.cholesky_inverse(factor) * root[:, None, :]
    return _Posterior(weights, spread, now - factor.diagonal(dim1=1, dim2=2).log().sum(1))


def _laplace_of_many(
    x: torch.Tensor, offsets: torch.Tensor, mask: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for users with more comparisons `n` than entries `m`, in the entries: weights `(users, n)`, modes `(users, m)`, covariances, evidence.

    Args:
        x (`(users, n, m)`, float32), offsets, mask, start (`(users, n)`, float64).
    """
    exact = x.double()
    eye = torch.eye(x.shape[2], dtype=exact.dtype, device=x.device)

    def value(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        margins = offsets + (exact @ y[..., None]).squeeze(2)
        return margins, (mask * F.logsigmoid(margins)).sum(1) - y.square().sum(1) / 2

    def curved(margins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = mask * torch.sigmoid(-margins)
        # nearly all of the time goes here, and what it is for needs no more than float32
        weighted = (gradient * torch.sigmoid(margins)).float()[..., None] * x
        return gradient, torch.linalg.cholesky(eye + (x.mT @ weighted).double())

    def direction(y: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
        gradient, factor = curved(margins)
        return torch.cholesky_solve((exact.mT @ gradient[..., None]) - y[..., None], factor).squeeze(2)

    y, margins, now = _climbed((exact.mT @ start[..., None]).squeeze(2), value, direction)
    gradient, factor = curved(margins)
    return gradient, y, torch.cholesky_inverse(factor), now - factor.diagonal(dim1=1, dim2=2).log().sum(1)


class Texts(NamedTuple):
    """The texts of comparisons.

    Args:
        chosen (`torch.Tensor` of shape `(n,)`), rejected (`torch.Tensor` of shape `(n,)`):
            int64, numbers of texts.
        features (`torch.Tensor` of shape `(texts, k)`):
            float32; those of a comparison are the chosen text's less the rejected one's.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    features: torch.Tensor

    def of(self, keep: torch.Tensor) -> "Texts":
        """Of the comparisons `keep`; the texts keep their numbers."""
        return Texts(self.chosen[keep], self.rejected[keep], self.features)


class Comparisons:
    """Comparisons of many users, some users at a time padded to the same number; all on the host.

    Args:
        features (`torch.Tensor` of shape `(n, k)`):
            float32, the gradient of each margin along the user's own part.
        offsets (`torch.Tensor` of shape `(n,)`):
            Margins with none, in log-odds.
        user (`torch.Tensor` of shape `(n,)`):
            int64, from 0.
        n_users (`int`):
            Users, those without a comparison too.

    Raises:
        ConfigError: shapes that do not fit each other, or no comparisons.
        NonFiniteError: NaN or infinite features or offsets.
    """

    def __init__(self, features: torch.Tensor, offsets: torch.Tensor, user: torch.Tensor, n_users: int):
        n = len(features)
        if not n or features.dim() != 2 or offsets.shape != (n,) or user.shape != (n,):
            raise ConfigError(
                f"features {tuple(features.shape)}, offsets {tuple(offsets.shape)} and users {tuple(user.shape)} came; (n, k), (n,) and (n,) "
                "with n of at least 1 are needed."
            )
        if int(user.min()) < 0 or int(user.max()) >= n_users:
            raise ConfigError(
                f"users {int(user.min())} to {int(user.max())} came; numbers from 0 to {n_users - 1} are needed."
            )
        bad = ~(features.isfinite().all(1) & offsets.isfinite())
        if bool(bad.any()):
            raise NonFiniteError(
                f"{int(bad.sum())} of {n} comparisons have NaN or infinite margins or gradients, the first is number {int(bad.nonzero()[0])}."
            )
        self.features, self.offsets, self.user, self.n_users = features.float(), offsets.double(), user, n_users
        # how far each comparison pulls at the last mode: the next one, under another prior, is near it
        self.pull = torch.zeros(n, dtype=torch.float64)
        counts = torch.bincount(user, minlength=n_users)
        order = torch.argsort(user, stable=True)
        starts = counts.cumsum(0) - counts
        self.chunks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # users, rows (users, n), mask
        by_size = [one for one in counts.argsort().tolist() if counts[one]]
        while by_size:
            size, kept = 0, 0
            for number, one in enumerate(by_size, 1):  # the largest of a chunk is its last
                size = number * int(counts[one]) * max(features.shape[1], int(counts[one]))
                if kept and (size > CHUNK or counts[one] > 1.5 * counts[by_size[0]] + 8):
                    break
                kept = number
            some, by_size = torch.tensor(by_size[:kept]), by_size[kept:]
            places = torch.arange(int(counts[some].max()))
            mask = places < counts[some][:, None]
            self.chunks.append((some, order[(starts[some][:, None] + places).clamp(max=n - 1)], mask.double()))

    def solve(self, prior: Prior, moments: bool = True) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """Posterior modes of `y` `(users, m)`, the mean over users of `E[y y']` `(m, m)` if asked, and the log evidence."""
        m = prior.root.shape[1]
        y = torch.zeros(self.n_users, m)
        second = torch.zeros(m, m, dtype=torch.float64) if moments else None
        offsets = self.offsets + self.features.mv(prior.mean.float()).double()
        evidence, seen = 0.0, 0
        for some, rows, mask in self.chunks:
            x = (self.features[rows.flatten()] @ prior.root.float()).unflatten(0, rows.shape) * mask[..., None].float()
            seen += len(some)
            given, start = mask.bool(), mask * self.pull[rows]
            if x.shape[1] > m:
                pull, modes, covariances, evidences = _laplace_of_many(x, offsets[rows], mask, start)
                self.pull[rows[given]] = pull[given]
                y[some] = modes.float()
                evidence += float(evidences.sum())
                if second is not None:
                    second += covariances.sum(0) - len(some) * torch.eye(m, dtype=torch.float64)
                continue
            wide = x.double() if x.numel() < CHUNK // 8 else x
            found = _laplace((wide @ wide.mT).double(), offsets[rows], mask, start)
            self.pull[rows[given]] = found.weights[given]
            y[some] = (x.mT @ found.weights.float()[..., None]).squeeze(2)
            evidence += float(found.evidence.sum())
            if second is not None:
                inner = found.spread.float() @ x
                second -= (x.flatten(0, 1).T @ inner.flatten(0, 1)).double()
        if second is not None:
            second += seen * torch.eye(m, dtype=torch.float64)
            for part in y.split(max(1, CHUNK // m)):
                second += (part.T @ part).double()
            second /= seen
        return y, second, evidence

    def refit_mean(self, mean: torch.Tensor, own: torch.Tensor, ridge: float, steps: int = 2) -> torch.Tensor:
        """The mean `(k,)` that fits all comparisons best beside the users' own parts `(users, k)`, under `ridge |mean|^2 / 2`."""
        offsets = self.offsets + torch.cat(
            [
                (part * own[user]).sum(1).double()
                for part, user in zip(self.features.split(2**15), self.user.split(2**15), strict=True)
            ]
        )
        mean, k = mean.double(), self.features.shape[1]

        def value(mean: torch.Tensor) -> float:
            margins = offsets + self.features.mv(mean.float()).double()
            return float(F.logsigmoid(margins).sum() - ridge / 2 * mean.square().sum())

        now = value(mean)
        for _ in range(steps):
            wrong = torch.sigmoid(-offsets - self.features.mv(mean.float()).double())
            gradient = self.features.T.mv(wrong.float()).double() - ridge * mean
            curvature = (wrong * (1 - wrong)).sqrt().float()
            hessian = ridge * torch.eye(k, dtype=torch.float64)
            for part, weight in zip(self.features.split(CHUNK // k), curvature.split(CHUNK // k), strict=True):
                weighted = part * weight[:, None]
                hessian += (weighted.T @ weighted).double()
            step = torch.linalg.solve(hessian, gradient)
            for _ in range(10):
                if (after := value(mean + step)) >= now:
                    mean, now = mean + step, after
                    break
                step = step / 2
        return mean.float()


class Common(NamedTuple):
    """What all users think of texts.

    Args:
        mean (`torch.Tensor` of shape `(k,)`):
            What their features say; it holds for new texts too.
        effects (`torch.Tensor` of shape `(texts,)`):
            float64, log-odds: what each text has beside it, for reasons that no feature tells.
    """

    mean: torch.Tensor
    effects: torch.Tensor


def mean_beside_texts(texts: Texts, offsets: torch.Tensor, tau: float, scale: float) -> Common:
    """The mean that suits all comparisons best where each text may be liked for reasons of its own.

    Where few texts are compared often it is known well how much each of them is liked, and a head without such effects bends its few hundred numbers until they say
    so: it learns these texts by heart and is a poorer guide to new ones. With an effect of each text's own the mean has to say what texts have in common (random item
    effects beside features of the items: Janssen, Schepers and Peres, 2004; De Boeck, 2008). None of this is from the paper.

    Comparison `i` has the margin `offset_i + f[chosen_i] - f[rejected_i]`, `f = features · mean + effects`, `mean ~ N(0, tau^2)`, `effects ~ N(0, scale^2)`; the mode, by
    Newton's method in the texts' kernel.

    Args:
        texts ([`Texts`]):
            Of the comparisons; what is added to the features of all texts makes no difference. The matrices are of texts with texts.
        offsets (`torch.Tensor` of shape `(n,)`):
            Margins with none, in log-odds.
        tau (`float`), scale (`float`):
            Standard deviations of an entry of the mean and, in log-odds, of a text's effect; above 0, their squares finite.

    Raises:
        ConfigError: `tau` or `scale` is out of range.
        NonFiniteError: NaN or infinite features or offsets.

    Example:

    ```python
    mean, effects = mean_beside_texts(Texts(chosen, rejected, features), margins, tau=0.1, scale=1.0)
    ```
    """
    for name, one in (("tau", tau), ("scale", scale)):
        if not 0 < one < 1e100:
            raise ConfigError(f"{name}={one!r} came; a finite standard deviation above 0 is needed.")
    chosen, rejected, features = texts
    bad = ~features.isfinite().all(1), ~offsets.isfinite()
    if bool(bad[0].any() or bad[1].any()):
        raise NonFiniteError(
            f"{int(bad[0].sum())} of {len(features)} texts have NaN or infinite features, {int(bad[1].sum())} of {len(offsets)} comparisons such margins."
        )
    n, wide = len(features), (features - features.mean(0)).double()
    eye = torch.eye(n, dtype=torch.float64)
    kernel = tau**2 * wide @ wide.T + scale**2 * eye
    offsets = offsets.double()

    def value(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        f = (kernel @ weights[0])[None]
        likelihood = F.logsigmoid(offsets + f[0, chosen] - f[0, rejected]).sum()
        return f, (likelihood - weights[0] @ f[0] / 2)[None]

    def direction(weights: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        wrong = torch.sigmoid(-offsets - f[0, chosen] + f[0, rejected])
        curvature = wrong * (1 - wrong)
        gradient = torch.zeros(n, dtype=torch.float64).index_add_(0, chosen, wrong).index_add_(0, rejected, -wrong)
        hessian = torch.zeros(n * n, dtype=torch.float64)  # of the likelihood in f, with a minus: a Laplacian
        for one, other in ((chosen, rejected), (rejected, chosen)):
            hessian.index_add_(0, one * n + other, -curvature).index_add_(0, one * n + one, curvature)
        hessian = hessian.view(n, n)
        return (torch.linalg.solve(eye + hessian @ kernel, hessian @ f[0] + gradient) - weights[0])[None]

    weights, _, _ = _climbed(torch.zeros(1, n, dtype=torch.float64), value, direction)
    return Common((tau**2 * wide.T @ weights[0]).float(), scale**2 * weights[0])


def learn_prior(comparisons: Comparisons, tau: float, steps: int, *, mean: bool = True) -> Iterator[Step]:
    """The users' distribution by EM; yields the state at the start and after each step.

    The start is isotropic: each entry of each user's part has the standard deviation `tau`. Few steps keep it nearly so (a ridge per user),
    many let the data say which directions users differ in: the number of steps is a regulariser and is best chosen, with `tau`, on comparisons
    that were held out.

    Args:
        comparisons ([`Comparisons`]):
            Of all users.
        tau (`float`):
            The first standard deviation of an entry, above 0.
        steps (`int`):
            EM steps, 0 for none.
        mean (`bool`, *optional*, defaults to `True`):
            Fit the users' mean along with it, under a ridge `|mean|^2 / (2 tau^2)`; without, it is 0.

    Raises:
        ConfigError: `tau` or `steps` is out of range.

    Example:

    ```python
    *_, last = learn_prior(Comparisons(features, offsets, user, n_users), tau=0.1, steps=8)
    ```
    """
    if not tau > 0 or tau == float("inf"):
        raise ConfigError(f"tau={tau!r} came; a finite standard deviation above 0 is needed.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ConfigError(f"steps={steps!r} came; a whole number of at least 0 is needed.")
    k = comparisons.features.shape[1]
    prior = Prior(torch.zeros(k), tau * torch.eye(k))
    y, second, evidence = comparisons.solve(prior, moments=steps > 0)
    for number in range(steps + 1):
        own = y @ prior.root.T
        yield Step(number, prior, prior.mean + own, evidence)
        if number == steps:
            return
        assert second is not None
        middle = comparisons.refit_mean(prior.mean, own, ridge=tau**-2) if mean else prior.mean
        for rate in (RELAXATION, 1):
            after = Prior(middle, _moved(prior.root, second, rate))
            found = comparisons.solve(after, moments=number + 1 < steps)
            if found[2] >= evidence:
                break
        prior, (y, second, evidence) = after, found


def _moved(root: torch.Tensor, second: torch.Tensor, rate: int) -> torch.Tensor:
    """The root of the next covariance, `L S^rate L'`; with rate 1 that of plain EM."""
    moved = root.double() @ torch.linalg.matrix_power(second, rate) @ root.double().T
    values, vectors = torch.linalg.eigh(moved)
    kept = values > 1e-7 * values[-1]
    return (vectors[:, kept] * values[kept].sqrt()).flip(1).float()
