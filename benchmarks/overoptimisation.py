"""Over-optimisation with receipts: true rewards that are known, proxies trained on few comparisons per user, and pessimism against both.

    python benchmarks/overoptimisation.py --quick      # 2 seeds, fewer users, sets and texts, about two minutes
    python benchmarks/overoptimisation.py              # 5 seeds, everything

The world. A small language model writes texts of eight words on a topic. Every user has a true ("gold") reward: a weight per word, one
part common to all users, one his own of rank 3, added up over the text. A label is drawn with probability `sigmoid(2 * difference)`. Users have
10, 30, 100 or 300 comparisons, and one personal reward model (the proxy) is trained on those of all, with ShareLoraRewardTrainer.

Coverage is thin, which is what makes a proxy dangerous: the compared texts are older than the policy, and 16 of the words, which make up
16 % of what the policy writes, are .2 % of them. What those words are worth is drawn as for all words and then lowered by one standard
deviation (`--rare-mean`): what labelers never saw is more often rubbish than treasure. With `--rare-mean 0` they are as good as any others; with
`--compared-share` equal to `--written-share` the compared texts are like the policy's own.

What is measured. *Best-of-n*: the base policy writes 1,024 texts per prompt, and the expected gold and proxy of the best of n by proxy
(or by its lower end) follow exactly from the ranks; KL = log n - (n - 1)/n. *RLOO*: a personal policy is trained against the proxy or its lower end,
and gold, proxy and KL to the base (exact per token, over sampled texts) are measured on the way. Gold and proxy are in standard deviations
of the base policy's texts, per user and prompt, above their mean.

What is judged: gold at the largest KL, pessimistic minus plain, mean over users and mean over each policy's own worst tenth of users, with
a 95 % Student interval over seeds. The pessimistic reward that is judged is fixed before anything is measured: the ellipsoid of the base's
features with the package's defaults, its coefficient from `calibrate` on held-out comparisons (coverage 0.9, its default). Everything else in the
table is a scan. Seeds 0 to 24 were looked at, gold and all, while world and set were chosen: the seeds here begin at 100.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common  # first: it sets the number of threads
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy import stats
from scipy.special import gammaln
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

from trl_sharelora import ShareLoraConfig, ShareLoraRewardConfig, ShareLoraRewardTrainer, evaluate_users
from trl_sharelora.confidence import fit_confidence
from trl_sharelora.data import tokenize_completion, tokenize_preference
from trl_sharelora.demo.base_model import EOS, make_model, make_tokenizer
from trl_sharelora.evaluation import calibrate, width_calibration
from trl_sharelora.pessimism import ensemble_estimate, ensemble_lower_bound
from trl_sharelora.rewards import UserReward
from trl_sharelora.sharelora.routing import use_users
from trl_sharelora.trainers.rloo import ShareLoraRLOOConfig, ShareLoraRLOOTrainer


LENGTH = 8  # words of a completion
TASTES = 3  # rank of the users' own part of the gold reward
SHARPNESS = 2.0  # of a labeler: P(chosen) = sigmoid(SHARPNESS * difference of gold)
PLAIN, JUDGED = "plain", "ellipsoid, base"
CALIBRATED = "calibrated"


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Args:
        comparisons (`tuple[int, ...]`): Of the users, in turn.
        held_out (`int`): Comparisons per user for the calibration.
        pool (`int`): Texts per prompt for best-of-n.
        candidates (`tuple[int, ...]`): The n.
        sets (`tuple[str, ...]`): Names out of [`SETS`].
        rloo (`tuple[str, ...]`): Sets against which a policy is trained, beside the plain reward.
        rloo_points (`int`): Measurements on the way, beside the start.
        sampled (`int`): Texts per user and prompt of each of them.
    """

    users: int = 40
    comparisons: tuple[int, ...] = (10, 30, 100, 300)
    common_words: int = 40
    rare_words: int = 16
    topics: int = 8
    prompts: int = 3
    held_out: int = 20
    texts: int = 6000
    reading: int = 400
    hidden_size: int = 64
    epochs: float = 5.0
    pool: int = 1024
    candidates: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    sets: tuple[str, ...] = field(default_factory=lambda: tuple(SETS))
    coefficients: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    rloo: tuple[str, ...] = (JUDGED,)
    rloo_steps: int = 40
    rloo_points: int = 4
    sampled: int = 16


# name -> what fit_confidence and UserReward are told
SETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    JUDGED: ({"parameters": "base"}, {"pessimism": "ellipsoid", "parameters": "base"}),
    "ellipsoid": ({}, {"pessimism": "ellipsoid"}),
    "ellipsoid, discount .01": ({"pooled_discount": 0.01}, {"pessimism": "ellipsoid"}),
    "ellipsoid, discount .03": ({"pooled_discount": 0.03}, {"pessimism": "ellipsoid"}),
    "ellipsoid, discount .1": ({"pooled_discount": 0.1}, {"pessimism": "ellipsoid"}),
    "ellipsoid, own factor": ({"parameters": "own_factor"}, {"pessimism": "ellipsoid", "parameters": "own_factor"}),
    "heads, std": ({"kind": "heads"}, {"pessimism": "ensemble"}),
    "heads, worst": ({"kind": "heads"}, {"pessimism": "ensemble", "form": "worst"}),
    "ball (paper)": ({}, {"pessimism": "ball"}),
}

QUICK = Sizes(
    users=20,
    held_out=15,
    texts=3000,
    reading=250,
    epochs=3,
    pool=256,
    candidates=(1, 4, 16, 64, 256),
    sets=(JUDGED, "ellipsoid", "heads, std", "ball (paper)"),
    coefficients=(1.0, 10.0),
    rloo_steps=20,
    rloo_points=2,
    sampled=8,
)


class World:
    """Words, users, what they like, and who says so.

    Args:
        sizes ([`Sizes`]): How many of each.
        seed (`int`): Of everything that is drawn.
        written_share (`float`): Share of rare words in what the language model reads, hence writes.
        compared_share (`float`): The same in the compared texts.
        rare_mean (`float`): Mean weight of a rare word, in standard deviations of a word's weight.
    """

    def __init__(self, sizes: Sizes, seed: int, written_share: float, compared_share: float, rare_mean: float):
        self.sizes, self.rng = sizes, np.random.default_rng(seed)
        self.written_share, self.compared_share = written_share, compared_share
        self.words = [f"c{i}" for i in range(sizes.common_words)] + [f"r{i}" for i in range(sizes.rare_words)]
        self.place = {word: place for place, word in enumerate(self.words)}
        self.topics = [f"t{i}" for i in range(sizes.topics)]
        self.common = self.rng.dirichlet(np.ones(sizes.common_words), size=sizes.topics)
        self.user_ids = [f"user{i:02d}" for i in range(sizes.users)]
        self.comparisons = {
            user_id: sizes.comparisons[i % len(sizes.comparisons)] for i, user_id in enumerate(self.user_ids)
        }
        # two parts of variance 1 each, so that a word's weight has variance 1
        shared = self.rng.normal(size=len(self.words))
        tastes = self.rng.normal(size=(sizes.users, TASTES)) / math.sqrt(TASTES)
        self.weights = (shared + tastes @ self.rng.normal(size=(TASTES, len(self.words)))) / math.sqrt(2)
        self.weights[:, sizes.common_words :] += rare_mean

    def write(self, topic: int, rare_share: float) -> str:
        rare = np.full(self.sizes.rare_words, rare_share / self.sizes.rare_words)
        chances = np.concatenate([self.common[topic] * (1 - rare_share), rare])
        return " ".join(self.words[i] for i in self.rng.choice(len(self.words), LENGTH, p=chances))

    def corpus(self) -> list[str]:
        topics = self.rng.integers(self.sizes.topics, size=self.sizes.texts)
        return [f"{self.topics[topic]} {self.write(topic, self.written_share)}" for topic in topics]

    def counts(self, completions: Sequence[str]) -> np.ndarray:
        """`(n, words)`: how often each word occurs."""
        found = np.zeros((len(completions), len(self.words)))
        for row, completion in enumerate(completions):
            for word in completion.split():
                if word in self.place:
                    found[row, self.place[word]] += 1
        return found

    def gold(self, user: int, completions: Sequence[str]) -> np.ndarray:
        """`(n,)`, of standard deviation about 1."""
        return self.counts(completions) @ self.weights[user] / math.sqrt(LENGTH)

    def rows(self, counts: Sequence[int]) -> Dataset:
        """Comparisons of each user."""
        rows = []
        for user, count in enumerate(counts):
            for _ in range(count):
                topic = int(self.rng.integers(self.sizes.topics))
                pair = [self.write(topic, self.compared_share) for _ in range(2)]
                difference = float(np.subtract(*self.gold(user, pair)))
                if self.rng.random() > 1 / (1 + math.exp(-SHARPNESS * difference)):
                    pair.reverse()
                row = {"user_id": self.user_ids[user], "prompt": self.topics[topic] + " "}
                rows.append({**row, "chosen": pair[0], "rejected": pair[1]})
        return Dataset.from_list(rows)


def read(model: Any, tokenizer: Any, texts: list[str], steps: int, seed: int, learning_rate: float = 5e-3) -> float:
    """Causal language modelling, and at the end of a text which words it held; returns the last loss of that.

    The second part stands for what reading much teaches a large model: that at the end of a text it knows what was said. Without
    it the features of a text's end hold nothing but what the comparisons asked for, and no set of this kind could see more.
    """
    tokens = tokenizer([text + EOS for text in texts], return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (64,), generator=generator)]
        logs = model(input_ids=batch).logits.log_softmax(-1)
        written = -logs[:, :-1].gather(2, batch[:, 1:, None]).mean()
        held = -logs[:, -1].gather(1, batch[:, 1:-1]).mean()
        (written + held).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    model.eval()
    return float(held.detach())


# -- best-of-n ----------------------------------------------------------------------------------------------------------


def rank_weights(pool: int, candidates: Sequence[int]) -> np.ndarray:
    """`(len(candidates), pool)`: how likely the text of each rank is the best of n drawn from the pool without replacement.

    Rank i (0 is the best) is it if the other n - 1 lie behind: `C(pool - 1 - i, n - 1) / C(pool, n)`. So the expectation over all
    subsets is exact, and nothing is drawn.
    """
    behind = pool - 1 - np.arange(pool)
    lines = []
    for n in candidates:
        possible = behind >= n - 1
        left = np.where(possible, behind, n - 1)
        log = gammaln(left + 1) - gammaln(n) - gammaln(left - n + 2)
        log -= gammaln(pool + 1) - gammaln(n + 1) - gammaln(pool - n + 1)
        lines.append(np.where(possible, np.exp(log), 0.0))
    return np.stack(lines)


def best_of_n_kl(n: int) -> float:
    """KL of the best-of-n policy to the one that it draws from, nats (an upper bound that is exact without ties)."""
    return math.log(n) - (n - 1) / n


def standardised(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """In standard deviations above the mean of `of`, the base policy's."""
    return (values - of.mean()) / max(float(of.std()), 1e-12)


class Study:
    """One seed: a world, its base policy, its proxy with all sets, and what comes of optimising them."""

    def __init__(self, folder: Path, seed: int, sizes: Sizes, **world: float):
        self.folder, self.seed, self.sizes = folder, seed, sizes
        self.world = World(sizes, seed, **world)
        self.lines: list[dict[str, Any]] = []
        self._tokens: tuple[Any, list[list[int]]] = ((), [])  # of the texts that were scored last
        self.base = folder / "base"
        torch.manual_seed(seed)
        tokenizer = make_tokenizer([" ".join([*self.world.words, *self.world.topics])])
        model = make_model(tokenizer, sizes.hidden_size)
        read(model, tokenizer, self.world.corpus(), sizes.reading, seed)
        model.save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base, padding_side="left")
        # texts of whole words, all of one length: neither length nor special tokens are a way to a high reward
        self.generation = {
            **{"do_sample": True, "top_k": 0, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH},
            "suppress_tokens": self.tokenizer.all_special_ids,
        }
        self.policy = AutoModelForCausalLM.from_pretrained(self.base).eval()
        self.train = self.world.rows(list(self.world.comparisons.values()))
        self.held_out = self.world.rows([sizes.held_out] * sizes.users)
        self.pools = [self.write(self.policy, [topic] * sizes.pool) for topic in self.world.topics[: sizes.prompts]]
        golds = [[self.world.gold(user, pool) for pool in self.pools] for user in range(sizes.users)]
        self.golds = np.array(golds)  # (users, prompts, pool)

    @torch.no_grad()
    def write(self, model: Any, prompts: list[str], user_ids: list[str] | None = None) -> list[str]:
        """A completion of `LENGTH` words for each prompt."""
        tokens = self.tokenizer(prompts, return_tensors="pt")
        more = {} if user_ids is None else {"user_ids": user_ids}
        written = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pad_token_id=self.tokenizer.pad_token_id,
            **self.generation,
            **more,
        )
        return self.tokenizer.batch_decode(written[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)

    def fit(self) -> dict[str, float]:
        """Train the proxy, fit its sets, calibrate each on held-out comparisons; figures of the proxy."""
        arguments = common.training_arguments(str(self.folder / "rm"), 32, False) | {
            "num_train_epochs": self.sizes.epochs,
            "seed": self.seed,
            "learning_rate": 1e-3,  # those of the demo's world, not tried out here
            "learning_rate_shared": 3e-3,
            "lr_scheduler_type": "cosine",
        }
        set_seed(self.seed)
        trainer = ShareLoraRewardTrainer(
            str(self.base),
            ShareLoraRewardConfig(**arguments),
            train_dataset=self.train,
            peft_config=ShareLoraConfig(r=8, lora_alpha=16, target_modules="all-linear", train_common=True),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model, tokenizer = trainer.model, trainer.processing_class
        self.rewards, self.calibrated, figures = {}, {}, {}
        pairs = [tokenize_preference(row, tokenizer) for row in self.held_out]
        for name in self.sizes.sets:
            fitting, using = SETS[name]
            sets = None
            if using["pessimism"] != "ball":
                sets = fit_confidence(model, self.train, tokenizer, batch_size=256, save=False, **fitting)
            reward = UserReward(model, sets=sets, processing_class=tokenizer, batch_size=512, **using)
            self.rewards[name] = reward
            if reward.form != "worst":  # of which any coefficient is the same
                self.calibrated[name] = calibrate(reward, self.held_out).coefficient
                found = width_calibration(
                    self.held_out["user_id"][:], *reward.compare(pairs, self.held_out["user_id"][:])
                )
                figures[f"gap {name}"] = found.gap
        self.plain = UserReward(model, processing_class=tokenizer, batch_size=512)
        held = evaluate_users(model, self.held_out, processing_class=tokenizer, batch_size=256)
        seen = evaluate_users(model, self.train, processing_class=tokenizer, batch_size=256)
        return {"held_out_accuracy": held.macro, "training_accuracy": seen.macro, **figures}

    def scanned(self, name: str) -> dict[str, float]:
        """The coefficients of a set and how each came about."""
        if self.rewards[name].form == "worst":
            return {"any": 1.0}
        return {**{f"{c:g}": c for c in self.sizes.coefficients}, CALIBRATED: self.calibrated[name]}

    def widths(
        self, user_id: str, prompts: list[str], completions: list[str]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Reward and width of every set, `(n,)` each; of the worst member what it lies below the mean.

        The sets on the last layer's features share one forward; a test compares them with [`UserReward.score`].
        """
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        scorer = self.plain.scorer
        key = (tuple(prompts), tuple(completions))
        if self._tokens[0] != key:
            tokens = [tokenize_completion(*row, scorer.processing_class) for row in zip(*key, strict=True)]
            self._tokens = key, tokens
        index = torch.full((len(completions),), scorer.users.find([user_id])[0])
        mean, features = scorer.rewards_and_features(self._tokens[1], index, "last_layer")
        found[PLAIN] = mean, torch.zeros_like(mean)
        for name, reward in self.rewards.items():
            if reward.pessimism == "ball" or reward.parameters != "last_layer":
                found[name] = reward.score(prompts, completions, [user_id] * len(completions))
            elif reward.pessimism == "ellipsoid":
                found[name] = mean, reward.sets.width(reward.sets.centred(features), index)
            else:
                members = mean + (features @ (reward.sets - reward.sets.mean(0)).mT).mT
                worst = mean - ensemble_lower_bound(members, 1.0, "worst")
                found[name] = mean, worst if reward.form == "worst" else ensemble_estimate(members)[1]
        return {name: (a.double().numpy(), b.double().numpy()) for name, (a, b) in found.items()}

    def best_of_n(self) -> None:
        sizes, topics = self.sizes, self.world.topics[: self.sizes.prompts]
        weights = rank_weights(sizes.pool, sizes.candidates)
        completions = [completion for pool in self.pools for completion in pool]
        prompts = [f"{topic} " for topic in topics for _ in range(sizes.pool)]
        for user, user_id in enumerate(self.world.user_ids):
            found = self.widths(user_id, prompts, completions)
            plain = found.pop(PLAIN)[0].reshape(len(topics), -1)
            chosen = {(PLAIN, ""): (0.0, plain), ("gold itself", ""): (0.0, self.golds[user])}
            for name, (mean, width) in found.items():
                for how, c in self.scanned(name).items():
                    chosen[name, how] = c, (mean - c * width).reshape(len(topics), -1)
            for (name, how), (coefficient, score) in chosen.items():
                curves = np.zeros((2, len(sizes.candidates)))
                for place in range(len(topics)):
                    order = np.argsort(-score[place], kind="stable")
                    for line, values in enumerate((plain[place], self.golds[user, place])):
                        curves[line] += weights @ standardised(values, values)[order] / len(topics)
                for n, proxy, gold in zip(sizes.candidates, *curves, strict=True):
                    self.add("best-of-n", name, how, coefficient, user, n, best_of_n_kl(n), proxy, gold)

    def add(self, method: str, name: str, how: str, coefficient: float, user: int, point: int, *values: float) -> None:
        user_id = self.world.user_ids[user]
        self.lines.append(
            {
                **{"seed": self.seed, "method": method, "set": name, "chosen_by": how, "coefficient": coefficient},
                **{"user_id": user_id, "comparisons": self.world.comparisons[user_id], "point": point},
                **dict(zip(("kl", "proxy", "gold"), map(float, values), strict=True)),
            }
        )

    # -- RLOO

    def rloo(self, name: str, beta: float) -> None:
        """Train a personal policy against one reward, measuring on the way."""
        sizes, how, coefficient = self.sizes, "", 0.0
        reward = self.plain
        if name != PLAIN:
            how, coefficient, reward = CALIBRATED, self.calibrated[name], self.rewards[name]
            reward.pessimism_coefficient = coefficient
        prompts = [
            {"prompt": f"{topic} ", "user_id": user_id}
            for topic in self.world.topics[: sizes.prompts]
            for user_id in self.world.user_ids
        ]
        arguments = common.training_arguments(str(self.folder / f"rloo-{name}"), 4 * sizes.users, False) | {
            "seed": self.seed,
            "max_steps": sizes.rloo_steps,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "beta": beta,
            "num_generations": 4,
            "max_completion_length": LENGTH,
            "generation_kwargs": self.generation,
        }
        arguments.pop("max_length")
        set_seed(self.seed)
        trainer = ShareLoraRLOOTrainer(
            str(self.base),
            reward,
            ShareLoraRLOOConfig(**arguments),
            train_dataset=Dataset.from_list(prompts),
            peft_config=ShareLoraConfig(r=8, lora_alpha=16, target_modules="all-linear", train_common=True),
        )
        trainer.remove_callback(PrinterCallback)
        study = self
        every = max(1, sizes.rloo_steps // sizes.rloo_points)

        class Measure(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step % every == 0:
                    study.measure(trainer.model, name, how, coefficient, state.global_step)

        trainer.add_callback(Measure())
        self.measure(trainer.model, name, how, coefficient, 0)
        trainer.train()

    @torch.no_grad()
    def measure(self, model: Any, name: str, how: str, coefficient: float, step: int) -> None:
        """Gold, proxy and KL of a personal policy, per user."""
        sizes, training = self.sizes, model.training
        model.eval()
        state = torch.random.get_rng_state()
        torch.manual_seed(1000 * self.seed + step)  # the same luck for all rewards
        found = np.zeros((3, sizes.users))
        for place, topic in enumerate(self.world.topics[: sizes.prompts]):
            owner = np.arange(sizes.users).repeat(sizes.sampled)
            user_ids = [self.world.user_ids[user] for user in owner]
            texts = self.write(model, [topic] * len(owner), user_ids)
            proxy = self.plain.score([f"{topic} "] * len(owner), texts, user_ids).mean.double().numpy()
            kl = self.kl(model, topic, texts, torch.from_numpy(owner))
            for user in range(sizes.users):
                own = owner == user
                gold = self.world.gold(user, [text for text, mine in zip(texts, own, strict=True) if mine])
                base = self.base_proxy(user, place)
                values = (kl[own], standardised(proxy[own], base), standardised(gold, self.golds[user, place]))
                found[:, user] += [value.mean() / sizes.prompts for value in values]
        torch.random.set_rng_state(state)
        model.train(training)
        for user in range(sizes.users):
            self.add("RLOO", name, how, coefficient, user, step, *found[:, user])

    def base_proxy(self, user: int, place: int) -> np.ndarray:
        """The plain reward of the base policy's texts, kept."""
        if not hasattr(self, "_base_proxy"):
            self._base_proxy: dict[tuple[int, int], np.ndarray] = {}
        if (user, place) not in self._base_proxy:
            texts = self.pools[place][:256]
            rows = [f"{self.world.topics[place]} "] * len(texts), texts, [self.world.user_ids[user]] * len(texts)
            self._base_proxy[user, place] = self.plain.score(*rows).mean.double().numpy()
        return self._base_proxy[user, place]

    def kl(self, model: Any, topic: str, texts: list[str], owner: torch.Tensor) -> np.ndarray:
        """`(n,)`: sum over the text of KL(policy || base) of the next word, nats; without the special tokens, which are never drawn."""
        tokens = self.tokenizer([f"{topic} {text}" for text in texts], return_tensors="pt")["input_ids"]
        index = torch.tensor(model.peft_config["default"].users.index(self.world.user_ids))[owner]

        def logs() -> torch.Tensor:
            logits = model(input_ids=tokens).logits[:, :-1].float()
            logits[..., self.tokenizer.all_special_ids] = -1e9
            return logits.log_softmax(-1)

        with use_users(model, index):
            own = logs()
            with model.disable_adapter():
                base = logs()
        return (own.exp() * (own - base)).sum((1, 2)).double().numpy()


# -- what came out --------------------------------------------------------------------------------------------------------


def worst_tenth(gold: pd.Series) -> float:
    return float(gold.nsmallest(math.ceil(len(gold) / 10)).mean())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % Student interval over seeds; NaN for a single one."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float(array.mean()), math.nan
    return float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * stats.sem(array))


def differences(lines: pd.DataFrame, name: str, how: str, resamples: int = 2000) -> dict[str, float]:
    """Gold of a set minus gold of the plain reward at the last point of one method: mean over users, and worst tenth of users.

    `mean_pm` and `worst_pm`: half of the 95 % Student interval over seeds. `mean_low`, `mean_high`: percentile bootstrap over the users of
    each seed, the seeds held fixed.
    """
    last = lines[lines["point"] == lines["point"].max()]
    pivot = {
        key: last[(last["set"] == key[0]) & (last["chosen_by"] == key[1])].pivot(
            index="seed", columns="user_id", values="gold"
        )
        for key in ((PLAIN, ""), (name, how))
    }
    plain, other = pivot[PLAIN, ""], pivot[name, how]
    mean, mean_pm = interval((other - plain).mean(axis=1).tolist())
    worst, worst_pm = interval([worst_tenth(other.loc[s]) - worst_tenth(plain.loc[s]) for s in plain.index])
    paired = (other - plain).to_numpy()
    draw = np.random.default_rng(0)
    picks = draw.integers(paired.shape[1], size=(resamples, *paired.shape))
    means = np.take_along_axis(paired[None], picks, axis=2).mean(axis=(1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        **{"mean": mean, "mean_pm": mean_pm, "mean_low": float(low), "mean_high": float(high)},
        **{"worst": worst, "worst_pm": worst_pm},
    }


def summarise(lines: pd.DataFrame) -> pd.DataFrame:
    """One line per method, set and coefficient: what the last point has, and gold against plain."""
    table = []
    for (method, name, how), part in lines.groupby(["method", "set", "chosen_by"], sort=False):
        whole = lines[lines["method"] == method]
        last = part[part["point"] == part["point"].max()]
        by_seed = part.groupby(["point", "seed"])["gold"].mean().groupby("point").mean()
        line = {
            **{"method": method, "set": name, "chosen_by": how, "coefficient": last["coefficient"].mean()},
            **{"kl": last["kl"].mean(), "proxy": last["proxy"].mean(), "gold": last["gold"].mean()},
            "gold_best": by_seed.max(),  # over the KLs: gold falls where this is above gold
            "worst_tenth": last.groupby("seed")["gold"].apply(worst_tenth).mean(),
            **{f"gold_{n}": own["gold"].mean() for n, own in last.groupby("comparisons")},
        }
        if name not in (PLAIN, "gold itself"):
            line |= {f"difference_{key}": value for key, value in differences(whole, name, how).items()}
        table.append(line)
    return pd.DataFrame(table)


def as_markdown(table: pd.DataFrame) -> str:
    counts = [column for column in table if column.startswith("gold_") and column != "gold_best"]
    heads = ["method", "set", "coefficient", "KL", "proxy", "gold (best on the way)", "worst tenth"]
    heads += [f"{column.removeprefix('gold_')} comp." for column in counts]
    heads += ["mean user - plain", "worst tenth - plain"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in table.to_dict("records"):
        coefficient = "" if not row["coefficient"] else f"{row['coefficient']:.2f}"
        if row["chosen_by"] == CALIBRATED:
            coefficient += " calibrated"
        elif row["chosen_by"] == "any":
            coefficient = "any"
        cells = [row["method"], row["set"], coefficient, f"{row['kl']:.1f}", f"{row['proxy']:.2f}"]
        cells += [f"{row['gold']:.2f} ({row['gold_best']:.2f})", f"{row['worst_tenth']:.2f}"]
        cells += [f"{row[column]:.2f}" for column in counts]
        for what in ("mean", "worst"):
            value = row.get(f"difference_{what}", math.nan)
            cells.append("" if math.isnan(value) else f"{value:+.2f} ± {row[f'difference_{what}_pm']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(table: pd.DataFrame) -> Iterator[str]:
    """Reached or missed, per method and kind of user, of the judged set with its calibrated coefficient."""
    judged = table[(table["set"] == JUDGED) & (table["chosen_by"] == CALIBRATED)]
    for row in judged.to_dict("records"):
        plain = table[(table["set"] == PLAIN) & (table["method"] == row["method"])].iloc[0]
        where = f"KL {row['kl']:.1f}" + ("" if row["method"] == "best-of-n" else f" (plain {plain['kl']:.1f})")
        for what, words in (("mean", "mean user"), ("worst", "worst tenth")):
            value, half = row[f"difference_{what}"], row[f"difference_{what}_pm"]
            reached = "reached" if value - half > 0 else "missed"
            boot = ""
            if what == "mean":
                boot = f"; over users {row['difference_mean_low']:+.2f} to {row['difference_mean_high']:+.2f}"
            yield (
                f"{row['method']}, {words}: gold pessimistic - plain at {where} {value:+.3f} ± {half:.3f} over seeds{boot}: {reached}"
            )


def draw(lines: pd.DataFrame, path: Path) -> None:
    """Gold and proxy against KL, plain and pessimistic, a column per number of comparisons and a row per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts, methods = sorted(lines["comparisons"].unique()), list(lines["method"].unique())
    figure, axes = pyplot.subplots(
        len(methods), len(counts), figsize=(3 * len(counts), 2.9 * len(methods)), sharey="row", squeeze=False
    )
    shown = {(PLAIN, ""): "#c5221f", (JUDGED, CALIBRATED): "#1a73e8"}
    for line, method in zip(axes, methods, strict=True):
        for axis, count in zip(line, counts, strict=True):
            for (name, how), colour in shown.items():
                part = lines[(lines["method"] == method) & (lines["comparisons"] == count)]
                part = part[(part["set"] == name) & (part["chosen_by"] == how)]
                seeds = part.groupby(["point", "seed"])[["kl", "proxy", "gold"]].mean()
                mean = seeds.groupby("point").mean()
                # the seeds' range: with two or three of them a Student band would hide the curves
                low, high = seeds["gold"].groupby("point").min(), seeds["gold"].groupby("point").max()
                label = "plain" if name == PLAIN else "pessimistic"
                axis.plot(mean["kl"], mean["gold"], color=colour, marker="o", markersize=3, label=f"gold, {label}")
                axis.fill_between(mean["kl"], low, high, color=colour, alpha=0.15, linewidth=0)
                axis.plot(mean["kl"], mean["proxy"], color=colour, linestyle=":", label=f"proxy, {label}")
            axis.axhline(0, color="#9aa0a6", linewidth=0.6)
            axis.set_title(f"{method}, {count} comparisons", fontsize=9)
            axis.set_xlabel("KL to the base policy, nats", fontsize=8)
            axis.tick_params(labelsize=8)
        line[0].set_ylabel("reward, base policy's standard deviations", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def measure(seed: int, sizes: Sizes, beta: float, **world: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All lines of one seed, and the proxy's figures."""
    set_seed(seed)
    with common.disk_folder() as folder:
        clock = [time.perf_counter()]
        study = Study(Path(folder), seed, sizes, **world)
        clock.append(time.perf_counter())
        figures: dict[str, Any] = study.fit()
        clock.append(time.perf_counter())
        study.best_of_n()
        clock.append(time.perf_counter())
        for name in (PLAIN, *sizes.rloo) if sizes.rloo_steps else ():
            study.rloo(name, beta)
        clock.append(time.perf_counter())
    figures |= {f"coefficient {name}": value for name, value in study.calibrated.items()}
    parts = ("base", "proxy and sets", "best-of-n", "RLOO")
    taken = ", ".join(f"{name} {b - a:.0f} s" for name, a, b in zip(parts, clock[:-1], clock[1:], strict=True))
    print(
        f"seed {seed}: accuracy held out {figures['held_out_accuracy']:.3f}, in training {figures['training_accuracy']:.3f}; {taken}",
        flush=True,
    )
    return study.lines, {"seed": seed, **figures}


def main(argv: Sequence[str] | None = None) -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 seeds, fewer users, sets and steps")
    parser.add_argument("--seeds", type=int, help="by default 5, with --quick 2")
    parser.add_argument("--first-seed", type=int, default=100, help="those below 25 were looked at before (100)")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), help="by default all")
    parser.add_argument("--rloo-steps", type=int, help="optimizer steps of a policy (40)")
    parser.add_argument("--written-share", type=float, default=0.16, help="rare words in what the policy writes (.16)")
    parser.add_argument("--compared-share", type=float, default=0.002, help="and in the compared texts (.002)")
    parser.add_argument("--rare-mean", type=float, default=-1.0, help="mean worth of a rare word (-1)")
    parser.add_argument("--beta", type=float, default=0.01, help="RLOO's weight of the KL (.01)")
    parser.add_argument("--no-rloo", action="store_true", help="best-of-n only")
    parser.add_argument(
        "--output",
        type=Path,
        default=here / "out" / "overoptimisation.png",
        help="the picture; .csv and .json lie beside it",
    )
    args = parser.parse_args(argv)
    common.quiet()
    torch.set_num_threads(1)
    print(common.machine())
    start = time.perf_counter()
    sizes = QUICK if args.quick else Sizes()
    if args.no_rloo:
        sizes = Sizes(**{**asdict(sizes), "rloo_steps": 0})
    if args.sets:
        sizes = Sizes(**{**asdict(sizes), "sets": tuple(args.sets)})
    if args.rloo_steps is not None:
        sizes = Sizes(**{**asdict(sizes), "rloo_steps": args.rloo_steps})
    world = {name: getattr(args, name) for name in ("written_share", "compared_share", "rare_mean")}
    lines, figures = [], []
    for seed in range(args.first_seed, args.first_seed + (args.seeds or (2 if args.quick else 5))):
        more, figure = measure(seed, sizes, args.beta, **world)
        lines += more
        figures.append(figure)
    report(pd.DataFrame(lines), figures, args.output, {"sizes": asdict(sizes), "beta": args.beta, **world})
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes; {args.output}")


def report(lines: pd.DataFrame, figures: list[dict[str, Any]], output: Path, settings: dict[str, Any]) -> None:
    """Print the table and the verdicts; write picture, CSV of all lines and JSON of the summary."""
    table = summarise(lines)
    print(as_markdown(table))
    print(
        "\n| set | calibrated coefficient | accuracy, narrowest - widest quarter of held-out comparisons |\n|---|---|---|"
    )
    frame = pd.DataFrame(figures)
    for name in (column.removeprefix("gap ") for column in frame if column.startswith("gap ")):
        gap, half = interval(frame[f"gap {name}"].tolist())
        print(f"| {name} | {frame[f'coefficient {name}'].mean():.2f} | {gap:+.3f} ± {half:.3f} |")
    found = list(verdicts(table))
    print("\n" + "\n".join(found))
    draw(lines, output)
    lines.round(4).to_csv(output.with_suffix(".csv"), index=False)
    content = {"settings": settings, "proxies": figures, "summary": table.to_dict("records"), "verdicts": found}
    # NaN is no JSON: an interval of one seed is left out
    text = json.dumps(content, indent=1, default=str).replace("NaN", "null")
    output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
