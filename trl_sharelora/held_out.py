"""Which of several states of a model did better on held-out comparisons, and whether by more than chance.

Comparisons are not independent: a user gives many, a text stands in many, and what a model gains on new texts it may gain on a few of them for all users
at once. So the standard error of a gain is over users and over items. None of this is from the paper.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


# A state is judged at the factor of its margins that suits it best: which answer is the better one, not how sure the model is of it. Margins are too large where a
# training has overfitted, and too small where a strong ridge shrank the head: there anything that makes them larger would seem to gain.
SHARPNESSES = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0)


class Judged(NamedTuple):
    """A state of the model on held-out comparisons.

    Args:
        accuracy (`float`): Mean over users; a tie is half right.
        log_likelihood (`torch.Tensor` of shape `(n,)`): Of each comparison, at the factor of the margins that suits all of them best.
    """

    accuracy: float
    log_likelihood: torch.Tensor


class HeldOut:
    """Comparisons that nothing was fitted on.

    Args:
        user (`torch.Tensor` of shape `(n,)`):
            int64, whose each is.
        chosen, rejected (`Sequence[Hashable]`):
            Their texts; what is equal is one text.
        prompts (`Sequence[Hashable]`):
            Their prompts, alike where there are none.
    """

    def __init__(
        self, user: torch.Tensor, chosen: Sequence[Hashable], rejected: Sequence[Hashable], prompts: Sequence[Hashable]
    ):
        self.user = user.unique(return_inverse=True)[1]
        n = torch.bincount(self.user).double()
        self.weights = 1 / (len(n) * n[self.user])  # in a mean over users
        text, prompt = {}, {}  # type: dict[Hashable, int], dict[Hashable, int]
        self.chosen, self.rejected = (
            torch.tensor([text.setdefault(one, len(text)) for one in side]) for side in (chosen, rejected)
        )
        self.prompt = torch.tensor([prompt.setdefault(one, len(prompt)) for one in prompts])

    def mean(self, values: torch.Tensor) -> float:
        """Over users of their means of `values` `(n,)`."""
        return float((self.weights * values).sum())

    def judged(self, margins: torch.Tensor) -> Judged:
        """Of margins `(n,)`, chosen less rejected, in log-odds."""
        likelihoods = [F.logsigmoid(one * margins) for one in SHARPNESSES]
        return Judged(self.mean((margins.sign() + 1) / 2), max(likelihoods, key=self.mean))

    def error(self, gain: torch.Tensor) -> float:
        """Standard error of the mean over users of `gain` `(n,)`, with users and items as what was drawn; infinite with one user, one pair of texts or fewer than four texts.

        The variances over users and over items add up, less that of single comparisons, which both hold (Cameron, Gelbach and Miller, 2011). Over items it is the largest of
        three: over texts, where comparisons are dependent that share one (Aronow, Samii and Assenova, 2015: sums over texts less those over pairs of texts, which they hold twice;
        unbiased where all pairs of few texts are asked for, too large where few are); over pairs of texts, for one text may stand in all of them; over prompts, if there are several.
        """
        parts = self.weights * (gain - self.mean(gain))

        def sums(*kinds: torch.Tensor) -> torch.Tensor:
            size = int(max(kind.max() for kind in kinds)) + 1
            found = torch.zeros(size, dtype=parts.dtype)
            for kind in kinds:
                found.index_add_(0, kind, parts)
            return found.square()

        def over(kind: torch.Tensor) -> float:
            squares = sums(kind)
            return float(squares.sum()) * len(squares) / (len(squares) - 1) if len(squares) > 1 else math.inf

        low, high = torch.minimum(self.chosen, self.rejected), torch.maximum(self.chosen, self.rejected)
        pairs = (low * (int(high.max()) + 1) + high).unique(return_inverse=True)[1]
        by_text = sums(self.chosen, self.rejected)
        texts = len(by_text)
        if texts < 4:
            return math.inf
        # centring at the mean of few texts takes away more than it does of few independent numbers
        few = texts * (texts - 1) / ((texts - 2) * (texts - 3))
        items = [few * float(by_text.sum() - sums(pairs).sum()), over(pairs)]
        if int(self.prompt.max()):
            items.append(over(self.prompt))
        return math.sqrt(over(self.user) + max(items) - min(float(parts.square().sum()), over(self.user)))

    def best(self, found: Mapping[str, Judged], needs_more: str) -> str:
        """The state with the highest likelihood; `needs_more` only if it gains its standard error (the rule of Breiman et al., 1984): of fifty candidates
        one looks better by chance where nothing can be gained."""
        best = max((one for one in found if one != needs_more), key=lambda one: self.mean(found[one].log_likelihood))
        gain = found[needs_more].log_likelihood - found[best].log_likelihood
        return needs_more if self.mean(gain) > self.error(gain) else best
