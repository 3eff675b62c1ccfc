"""What benchmarks/real_data.py compares: linear baselines on frozen features, and LoRA trained by TRL's and by our trainer.

Every method is a function of the training rows and a setting that returns the margin of any rows, so that all are judged in one place.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, PreTrainedModel, PrinterCallback
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer

from trl_sharelora import ShareLoraConfig, ShareLoraRewardConfig, ShareLoraRewardTrainer, evaluate_users, from_lora
from trl_sharelora.empirical_bayes import Comparisons, Prior, learn_prior
from trl_sharelora.shrinkage import ShrinkageResult, shrink_users


START = 0.05  # standard deviation of the offsets that a low-rank basis starts from
# Of the layer above the projection: how fast similarity falls with the angle, and its weight beside the numbers themselves. Of 1, 2, 3, 4, 6 and of weights
# from 20 to none beside them the best for the common head on other splits by text than those measured here (docs/log.md).
SHARPNESS, WEIGHT = 3.0, 36.5
LAYERS = ["projection", "mixing"]  # all linear ones, as PEFT's "all-linear" takes them
PRIOR_DIRECTIONS = 1024  # the most that shrink_users looks at
MAX_LENGTH = 256  # tokens of an answer, what the encoder was trained with; the rest is cut off


class Rows(NamedTuple):
    """Comparisons by number: `user`, `chosen`, `rejected` `(n,)` int64, the last two numbers of texts."""

    user: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def of(self, keep: np.ndarray) -> "Rows":
        return Rows(*(column[keep] for column in self))


Margins = Callable[[Rows], np.ndarray]


@torch.no_grad()
def encode(texts: list[str], path: Path, batch_size: int = 32) -> torch.Tensor:
    """`(texts, hidden + 1)`: the mean over tokens of the encoder's last layer and the log of the length, each entry about 1."""
    tokenizer, bert = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    tokens = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    order = sorted(range(len(texts)), key=lambda number: len(tokens[number]))  # little padding
    features = torch.empty(len(texts), bert.config.hidden_size + 1)
    for start in range(0, len(texts), batch_size):
        part = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [tokens[number] for number in part]}, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = nn.functional.normalize((bert(**batch).last_hidden_state * mask).sum(1), dim=1)
        features[part] = torch.cat([mean * bert.config.hidden_size**0.5, mask.sum(1).log() - 4], dim=1)
    return features


# -- linear baselines


def popularity(rows: Rows, n_texts: int) -> Margins:
    """The text that was chosen in more of its training comparisons, whoever judged; unknown texts are even."""
    wins, losses = (np.bincount(column, minlength=n_texts) for column in (rows.chosen, rows.rejected))
    score = (wins + 1) / (wins + losses + 2)
    return lambda new: score[new.chosen] - score[new.rejected]


def common_head(rows: Rows, features: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weights `(d,)` of logistic regression on differences of features with a ridge, by Newton's method.

    In the texts, of which there are fewer than comparisons: a Hessian is features' L features, L the texts' weighted graph Laplacian.
    """
    features = features.double()
    n, (chosen, rejected) = len(features), (torch.from_numpy(column) for column in rows[1:])
    weights = torch.zeros(features.shape[1], dtype=torch.float64)
    for _ in range(30):
        scores = features @ weights
        wrong = torch.sigmoid(scores[rejected] - scores[chosen])
        gradient = torch.zeros(n, dtype=torch.float64).index_add_(0, chosen, wrong).index_add_(0, rejected, -wrong)
        curvature = wrong * (1 - wrong)
        laplacian = torch.zeros(n * n, dtype=torch.float64)
        for one, other in ((chosen, rejected), (rejected, chosen)):
            laplacian.index_add_(0, one * n + other, -curvature).index_add_(0, one * n + one, curvature)
        hessian = features.T @ (laplacian.view(n, n) @ features)
        hessian.diagonal().add_(ridge)
        step = torch.linalg.solve(hessian, features.T @ gradient - ridge * weights)
        weights += step
        if step.norm() < 1e-6 * weights.norm():
            break
    return weights


def linear_margins(common: torch.Tensor, own: torch.Tensor | None, features: torch.Tensor) -> Margins:
    def margins(rows: Rows) -> np.ndarray:
        d = features[rows.chosen] - features[rows.rejected]
        found = d.double() @ common
        return (found if own is None else found + (d * own[rows.user]).sum(1).double()).numpy()

    return margins


def own_offset(rows: Rows, features: torch.Tensor, n_users: int, common: torch.Tensor, tau: float) -> torch.Tensor:
    """Each user's own weights `(users, d)` beside the common ones, under a ridge `1 / tau^2`: the exact optimum."""
    d = features[rows.chosen] - features[rows.rejected]
    prior = Prior(torch.zeros(d.shape[1]), tau * torch.eye(d.shape[1]))
    problem = Comparisons(d, d.double() @ common, torch.from_numpy(rows.user), n_users)
    return problem.solve(prior, moments=False)[0] * tau


def low_rank(
    rows: Rows,
    features: torch.Tensor,
    offsets: torch.Tensor,
    common: torch.Tensor,
    r: int,
    ridge: float,
    common_ridge: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Common weights, a basis of `r` heads and the users' weights on them (the form of LoRe), jointly by L-BFGS.

    `ridge / 2` times the squares of the users' weights and of the basis, `common_ridge / 2` of the common head. It starts at the singular
    vectors of `offsets` `(users, d)`, the users' own ridge offsets: from random ones it needs five times the passes and ends in worse optima.
    """
    user, chosen, rejected = (torch.from_numpy(column) for column in rows)
    left, size, right = torch.linalg.svd(offsets, full_matrices=False)
    basis, weights = right[:r] * size[:r, None].sqrt(), left[:, :r] * size[:r].sqrt()
    balance = (basis.square().sum() / weights.square().sum().clamp(min=1e-12)).clamp(min=1e-12) ** 0.25
    leaves = [common.float().clone(), (basis / balance).contiguous(), (weights * balance).contiguous()]
    for leaf in leaves:
        leaf.requires_grad_()
    head, basis, weights = leaves
    # the loss is of the order of 1e4; where the basis goes to zero nothing is left to improve, and a line search there only overflows
    optimizer = torch.optim.LBFGS(
        leaves, max_iter=80, history_size=10, tolerance_grad=1e-2, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores, along = features @ head, features @ basis.T
        margins = scores[chosen] - scores[rejected] + ((along[chosen] - along[rejected]) * weights[user]).sum(1)
        total = nn.functional.softplus(-margins).sum() + common_ridge / 2 * head.square().sum()
        total = total + ridge / 2 * (weights.square().sum() + basis.square().sum())
        total.backward()
        return total

    optimizer.step(loss)
    head, basis, weights = (leaf.detach() for leaf in leaves)
    return head.double(), basis, weights


def learned_prior(
    rows: Rows, validation: Rows, features: torch.Tensor, n_users: int, common: torch.Tensor, settings: dict[str, Any]
) -> torch.Tensor:
    """Each user's own weights `(users, d)` under the prior that all users teach, in the first [`PRIOR_DIRECTIONS`] features: [`shrink_users`] without any
    LoRA. Writes the number of EM steps with the best validation likelihood into `settings` if they are not there."""
    d, held = (
        features[part.chosen, :PRIOR_DIRECTIONS] - features[part.rejected, :PRIOR_DIRECTIONS]
        for part in (rows, validation)
    )
    offsets, held_offsets = (
        torch.from_numpy(linear_margins(common, None, features)(part)) for part in (rows, validation)
    )
    problem = Comparisons(d, offsets, torch.from_numpy(rows.user), n_users)
    user = torch.from_numpy(validation.user)
    best, own = -float("inf"), torch.zeros(n_users, d.shape[1])
    for step in learn_prior(
        problem, settings["scale"] / float(d.square().sum(1).mean().sqrt()), settings.get("steps", 12)
    ):
        likelihood = float(nn.functional.logsigmoid(held_offsets + (held * step.users[user]).sum(1)).mean())
        if step.number == settings.get("steps") or "steps" not in settings and likelihood > best:
            best, own, number = likelihood, step.users, step.number
    settings["steps"] = number
    return nn.functional.pad(own, (0, features.shape[1] - own.shape[1]))


def weights_on_basis(
    rows: Rows, features: torch.Tensor, n_users: int, head: torch.Tensor, basis: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Newcomers' weights on a basis that is there, the exact optimum; as own weights `(users, d)`."""
    d = features[rows.chosen] - features[rows.rejected]
    problem = Comparisons(d @ basis.T, d.double() @ head, torch.from_numpy(rows.user), n_users)
    prior = Prior(torch.zeros(len(basis)), ridge**-0.5 * torch.eye(len(basis)))
    return problem.solve(prior, moments=False)[0] * ridge**-0.5 @ basis


# -- LoRA


class Similarities(nn.Module):
    """A frozen layer: how similar a text is to each of a file's texts, `exp(SHARPNESS (cosine - 1))`, whitened, so that the features' products are the
    similarities themselves (Nystroem's approximation of a Gaussian kernel; Williams and Seeger, 2001).

    Args:
        features (`torch.Tensor` of shape `(texts, d)`): See [`encode`]; the last column, the length, is no direction and is left out.
    """

    def __init__(self, features: torch.Tensor):
        super().__init__()
        self.centres = nn.functional.normalize(features[:, :-1], dim=1)  # not buffers: they are data
        values, vectors = torch.linalg.eigh(torch.exp(SHARPNESS * (self.centres @ self.centres.T - 1)).double())
        whitened = (vectors * values.clamp(min=0.01).rsqrt()) @ vectors.T
        self.whitening = (WEIGHT * whitened).float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        cosine = nn.functional.normalize(hidden[:, :-1], dim=1) @ self.centres.T
        return torch.cat([hidden, torch.exp(SHARPNESS * (cosine - 1)) @ self.whitening], dim=1)


def turned(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same features `(texts, k)` in the directions that they span, the longest first, for linear methods; and the directions `(k, d)`."""
    left, size, directions = torch.linalg.svd(features, full_matrices=False)
    return left * size, directions


class TextReward(PreTrainedModel):
    """Two linear layers, both the identity at the start, a text's frozen features below, [`Similarities`] between them and a linear head above.

    Its input is one "token" per text, the text's number: what lies below is frozen, so it need not run again.
    """

    config_class = BertConfig

    def __init__(self, config: BertConfig, features: torch.Tensor, similarities: Similarities, head: torch.Tensor):
        super().__init__(config)
        size = features.shape[1]
        self.features, self.similarities = features, similarities
        self.projection = nn.Linear(size, size, bias=False)
        self.classifier = nn.Linear(len(head), 1, bias=False)
        self.mixing = nn.Linear(len(head), len(head), bias=False)
        for layer in (self.projection, self.mixing):
            nn.init.eye_(layer.weight)
        self.classifier.weight.data = head.float()[None].clone()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        hidden = self.projection(self.features[input_ids[:, 0]])
        return SequenceClassifierOutput(logits=self.classifier(self.mixing(self.similarities(hidden))))


class Trained:
    """LoRA and ShareLoRA on one file's features, by the ordinary trainers.

    Args:
        encoder_path (`Path`): Of the encoder, for its tokenizer and config.
        features (`torch.Tensor` of shape `(texts, d)`): See [`encode`].
        similarities ([`Similarities`]): To these texts.
        users (`list[str]`): Their ids, in the order of the rows' numbers.
        prompts (`list[str]`): Of the texts, for standard errors.
    """

    def __init__(
        self,
        encoder_path: Path,
        features: torch.Tensor,
        similarities: Similarities,
        users: list[str],
        prompts: list[str],
    ):
        self.tokenizer = AutoTokenizer.from_pretrained(encoder_path)
        self.config = BertConfig.from_pretrained(encoder_path, num_labels=1)
        self.features, self.similarities, self.users, self.prompts = features, similarities, users, prompts

    def dataset(self, rows: Rows) -> datasets.Dataset:
        columns = {f"{side}_ids": [[text] for text in getattr(rows, side).tolist()] for side in ("chosen", "rejected")}
        prompts = [self.prompts[text] for text in rows.chosen]
        return datasets.Dataset.from_dict(
            {"user_id": [self.users[user] for user in rows.user], "prompt": prompts, **columns}
        )

    def base(self, head: torch.Tensor) -> TextReward:
        return TextReward(self.config, self.features, self.similarities, head)

    def train(self, settings: dict[str, Any], rows: Rows, seed: int, head: torch.Tensor) -> PreTrainedModel:
        """A model trained with TRL's RewardTrainer, or with ours where the settings have a `share`."""
        torch.manual_seed(seed)
        adapter = {"r": settings.get("r", 8), "lora_alpha": settings.get("r", 8), "target_modules": LAYERS}
        # a small file needs small batches and more epochs: mtbench_human has 23 steps of 64 in one
        small = len(rows.user) < 5000
        with tempfile.TemporaryDirectory() as folder:
            arguments: dict[str, Any] = dict(
                output_dir=folder,
                seed=seed,
                num_train_epochs=settings["epochs"] * (2 if small else 1),
                learning_rate=settings["learning_rate"],
                per_device_train_batch_size=64 if small else 512,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            together: dict[str, Any] = dict(
                model=self.base(head),
                train_dataset=self.dataset(rows),
                processing_class=self.tokenizer,
            )
            if "share" not in settings:
                trainer = RewardTrainer(
                    args=RewardConfig(**arguments), peft_config=LoraConfig(task_type="SEQ_CLS", **adapter), **together
                )
            else:
                of_adapter, of_training = (
                    {name: settings[name] for name in names if name in settings}
                    for names in (
                        ("share", "train_common", "personal_head"),
                        ("learning_rate_shared", "user_weight_decay"),
                    )
                )
                trainer = ShareLoraRewardTrainer(
                    args=ShareLoraRewardConfig(**arguments, **of_training),
                    peft_config=ShareLoraConfig(**adapter, **of_adapter),
                    **together,
                )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer.model

    def as_sharelora(self, lora: PreTrainedModel) -> PreTrainedModel:
        """The common LoRA as the start of all users: the same model, with a row for each of them."""
        head = torch.zeros(self.features.shape[1] + len(self.features))  # the LoRA brings its own
        with tempfile.TemporaryDirectory() as folder:
            lora.save_pretrained(folder, save_embedding_layers=False)  # there are none to look for
            return from_lora(folder, self.users, base=self.base(head), check_base=False)

    def margins(self, model: PreTrainedModel) -> Margins:
        def margins(rows: Rows) -> np.ndarray:
            if not len(rows.user):
                return np.empty(0)
            found = evaluate_users(
                model, self.dataset(rows), processing_class=self.tokenizer, batch_size=512, unseen="common"
            )
            return found.rows["margin"].to_numpy()

        return margins

    def shrink(
        self, model: PreTrainedModel, rows: Rows, validation: Rows, settings: dict[str, Any]
    ) -> ShrinkageResult:
        known = np.isin(validation.user, rows.user)
        return shrink_users(
            model,
            self.dataset(rows),
            self.tokenizer,
            validation=self.dataset(validation.of(known)),
            **{name: settings.get(name) for name in ("scale", "steps", "mean", "text_effects")},
            batch_size=512,
        )
