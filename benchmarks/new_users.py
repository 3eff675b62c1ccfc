"""Users who arrive after the training: accuracy by number of answers, what a fit costs, and which pairs to ask.

    python benchmarks/new_users.py --quick      # one small seed, to see that everything runs; about two minutes
    python benchmarks/new_users.py              # 5 seeds; 12 newcomers each; up to an hour on two cores

A world of the demo (40 users with 100 comparisons each, tastes that differ in a space of two dimensions which no method is told, noisy
answers) trains a reward model with ShareLoraRewardTrainer, share="B"; `shrink_users` puts the users' parts right, and B and the head are trained once more with these still
(`--once`: without the two). Then newcomers come, whom no training has seen: same world, other
mixtures of taste, questions and pairs of their own. Accuracy is on held-out answers of theirs, each newcomer counts the same; intervals are 95 %
Student over seeds.

*Possible gain*, two readings: up to the best rule there is, which knows the true reward ("truth"; the noise of the answers allows no more), or up
to the trained users' own held-out accuracy, who gave 100 comparisons each and shaped B ("trained").

*Asking*: a newcomer has a pool of 200 pairs; every five answers he is fitted anew, and the next five are those of `next_comparisons` or random. For
the same accuracy as random answers: how many of the chosen ones are needed. Before each round the stopping rule says how far more answers would
go; beside it what came.

*Nothing to gain*: newcomers who answer as the common model would (drawn from its own probabilities), and newcomers who toss a coin; "auto" must
not make them worse than the common model.

*Cost*: CPU time of `fit_users` on 30 comparisons of one newcomer over that of `evaluate_users` on the same, the prior at hand; Llama of 4 layers of
256 and of 8 layers of 512 (--quick: one of 64, which says nothing), 64 tokens, the ratio's median; and seconds of `add_users` of 10,000 ids.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common  # first: it sets the number of threads
import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from scipy import stats
from transformers import set_seed

from trl_sharelora import (
    ShareLoraConfig,
    ShareLoraRewardConfig,
    ShareLoraRewardTrainer,
    add_users,
    evaluate_users,
    shrink_users,
)
from trl_sharelora.demo.generator import best_possible, make_log, make_users, preference_probability
from trl_sharelora.demo.tasks import make_world
from trl_sharelora.new_users import fit_users, next_comparisons, user_spread
from trl_sharelora.scoring import load_reward_model


AHEAD = (5, 10)  # answers, of what the stopping rule foresees
PARTS = ("curve", "asking", "nothing", "cost")
COLUMNS = ("user_id", "prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    users: int = 40
    comparisons: int = 100
    epochs: float = 6
    newcomers: int = 12
    test: int = 100
    answers: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    full: tuple[int, ...] = (50,)
    pool: int = 200
    asked: tuple[int, ...] = (5, 10, 15, 20, 25, 30, 35, 40)
    nothing: tuple[int, ...] = (5, 20, 50)
    repeats: int = 7


QUICK = Sizes(
    users=12,
    comparisons=40,
    epochs=3,
    newcomers=4,
    test=30,
    answers=(2, 10, 20),
    full=(10,),
    pool=30,
    asked=(5, 10),
    nothing=(10,),
    repeats=1,
)


def rows_of(rows: list[dict], *splits: str) -> Dataset:
    return Dataset.from_list([{name: row[name] for name in COLUMNS} for row in rows if row["split"] in splits])


def train(folder: Path, sizes: Sizes, seed: int, train_common: bool, once: bool) -> Path:
    """A world and a reward model trained on it; both stay in `folder` and are used again."""
    world = make_world(folder / "world", sizes.users, sizes.comparisons, seed)
    rows = [json.loads(line) for line in open(world / "log.jsonl", encoding="utf-8")]
    output = folder / f"model{'-common' if train_common else ''}{'-once' if once else ''}"
    if not (output / "seen.json").is_file():
        train_rows = rows_of(rows, "train")

        def trainer(model: Any, rate: float, shared: float, epochs: float, adapter: Any) -> ShareLoraRewardTrainer:
            args = ShareLoraRewardConfig(
                output_dir=str(output),
                learning_rate=rate,
                learning_rate_shared=shared,
                lr_scheduler_type="cosine",
                num_train_epochs=epochs,
                per_device_train_batch_size=32,
                seed=seed,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                eos_token="</s>",
                max_length=None,
            )
            return ShareLoraRewardTrainer(model=model, args=args, train_dataset=train_rows, peft_config=adapter)

        set_seed(seed)
        adapter = ShareLoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", share="B", train_common=train_common
        )
        trained = trainer(str(world / "base_model"), 1e-3, 5e-3, sizes.epochs, adapter)
        trained.train()
        if not once:
            # the users' parts where all users say they should be, then B and the head again with these still
            shrink_users(trained.model, train_rows, trained.processing_class, batch_size=64)
            trained = trainer(trained.model, 0.0, 2e-3, sizes.epochs / 2, None)
            trained.train()
        trained.save_model()
        seen = evaluate_users(trained.model, rows_of(rows, "test"), trained.processing_class, batch_size=64)
        (output / "seen.json").write_text(json.dumps({"accuracy": seen.macro}))
    return output


class Newcomers:
    """People of the same world whom the model has never met.

    Args:
        model (`str`): Directory of the reward model.
        sizes ([`Sizes`]): How many, and how many answers.
        seed (`int`): Of the people.
    """

    def __init__(self, model: Path, sizes: Sizes, seed: int):
        self.directory, self.sizes = str(model), sizes
        draw = np.random.default_rng(10_000 + seed)
        most = max(*sizes.answers, sizes.pool)
        people = make_users(sizes.newcomers, most, most, draw)
        people = [replace(one, user_id=f"new{number:02d}") for number, one in enumerate(people)]
        self.ids = [one.user_id for one in people]
        self.log = make_log(people, sizes.test, draw)
        self.answers = {
            user_id: [row for row in self.log if row["user_id"] == user_id and row["split"] == "train"]
            for user_id in self.ids
        }
        self.test = rows_of(self.log, "test")
        margins = np.array([row["true_margin"] for row in self.log if row["split"] == "test"])
        self.best = best_possible(margins)
        self.model, self.tokenizer = load_reward_model(self.directory, device="cpu")
        self.spread = user_spread(self.model)
        add_users(self.model, self.ids)

    def first(self, n: int) -> Dataset:
        return Dataset.from_list(
            [{name: row[name] for name in COLUMNS} for user_id in self.ids for row in self.answers[user_id][:n]]
        )

    def fit(self, rows: Dataset, method: str = "auto") -> Any:
        return fit_users(self.model, rows, self.tokenizer, method, spread=self.spread, refit=True, batch_size=32)

    def accuracy(self, test: Dataset | None = None) -> float:
        return evaluate_users(self.model, test or self.test, self.tokenizer, batch_size=64).macro


def curve(people: Newcomers, methods: list[str] | None = None) -> dict[str, dict[int, float]]:
    """Accuracy by method and number of answers."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    found["common"][0] = people.accuracy()
    for n in people.sizes.answers:
        rows = people.first(n)
        every = ("gauss-newton", "pca", "auto", *(["full"] if n in people.sizes.full else []))
        for method in [method for method in every if methods is None or method in methods]:
            people.fit(rows, method)
            found[method][n] = people.accuracy()
    return found


def asking(people: Newcomers, seed: int) -> dict[str, list]:
    """Accuracy after so many chosen or random answers; and what the stopping rule foresaw before each round of chosen ones."""
    pools = {user_id: people.answers[user_id][: people.sizes.pool] for user_id in people.ids}
    found: dict[str, list] = {"foreseen": []}
    for way in ("chosen", "random"):
        draw = random.Random(seed)
        left = {user_id: draw.sample(range(people.sizes.pool), people.sizes.pool) for user_id in people.ids}
        told: dict[str, list[dict]] = {user_id: [] for user_id in people.ids}
        fit, found[way] = None, []
        for before, n in zip((0, *people.sizes.asked), people.sizes.asked, strict=False):
            if before == 0:  # nobody has answered yet: nobody has a row of his own
                for_prior, tokenizer = load_reward_model(people.directory, device="cpu")
                add_users(for_prior, people.ids)
            model = for_prior if before == 0 else people.model
            foreseen = []
            for user_id in people.ids:
                rows = left[user_id][: n - before]
                if way == "chosen":
                    pairs = [{name: pools[user_id][row][name] for name in COLUMNS[1:]} for row in left[user_id]]
                    asked = next_comparisons(
                        model,
                        user_id,
                        Dataset.from_list(pairs),
                        n - before,
                        tokenizer,
                        fit=fit,
                        spread=people.spread,
                        batch_size=32,
                    )
                    rows = [left[user_id][place] for place in asked.chosen]
                    foreseen.append(asked)
                left[user_id] = [row for row in left[user_id] if row not in set(rows)]
                told[user_id] += [{name: pools[user_id][row][name] for name in COLUMNS} for row in rows]
            fit = people.fit(Dataset.from_list([row for rows in told.values() for row in rows]))
            found[way].append(people.accuracy())
            if foreseen:
                points = [math.inf if one.answers_for_a_point is None else one.answers_for_a_point for one in foreseen]
                curves = [one.curve for one in foreseen if one.curve is not None]
                rises = [
                    statistics.fmean([float(np.interp(ahead, one["answers"], one["gain"])) for one in curves] or [0.0])
                    for ahead in AHEAD
                ]
                found["foreseen"].append([before, statistics.median(points), *rises])
    return found


def needed(asked: tuple[int, ...], chosen: list[float], wanted: float) -> float:
    """Answers until a curve first reaches an accuracy, on straight lines; infinite if it does not."""
    for number, accuracy in enumerate(chosen):
        if accuracy >= wanted:
            if number == 0:
                return float(asked[0])
            share = (wanted - chosen[number - 1]) / (accuracy - chosen[number - 1])
            return asked[number - 1] + share * (asked[number] - asked[number - 1])
    return math.inf


def nothing_to_gain(people: Newcomers, seed: int) -> dict[tuple[str, int], float]:
    """Accuracy after the fit minus that of the common model, of newcomers who are not other than it."""
    model, tokenizer = load_reward_model(people.directory, device="cpu")
    add_users(model, ["nobody"])
    draw = np.random.default_rng(seed)
    rows = [row for row in people.log if row["user_id"] in people.ids]
    unknown = Dataset.from_list([{name: row[name] for name in COLUMNS} | {"user_id": "nobody"} for row in rows])
    margins = evaluate_users(model, unknown, tokenizer, batch_size=64).rows["margin"].to_numpy()
    found = {}
    for kind in ("as the common model", "coin"):
        probability = preference_probability(margins) if kind != "coin" else np.full(len(rows), 0.5)
        kept = draw.random(len(rows)) < probability
        answered = [
            row if keep else {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            for row, keep in zip(rows, kept.tolist(), strict=True)
        ]
        test = rows_of(answered, "test")
        common_accuracy = evaluate_users(
            model,
            test.map(lambda row: {"user_id": "common of " + row["user_id"]}),
            tokenizer,
            unseen="common",
            batch_size=64,
        ).macro
        for n in people.sizes.nothing:
            first = [
                row
                for user_id in people.ids
                for row in [one for one in answered if one["user_id"] == user_id and one["split"] == "train"][:n]
            ]
            people.fit(rows_of(first, "train"))
            found[kind, n] = people.accuracy(test) - common_accuracy
    return found


def model_with_users(layers: int, hidden: int) -> Any:
    """40 users on all linear modules."""
    users = [f"user{number}" for number in range(40)]
    config = ShareLoraConfig(task_type="SEQ_CLS", r=8, target_modules=common.LINEARS, users=users, bank="resident")
    return get_peft_model(common.base_model(layers, hidden), config)


def adding(repeats: int) -> float:
    """CPU seconds of adding 10,000 users, the median."""
    times = []
    for _ in range(repeats):
        model = model_with_users(2, 64)
        start = time.process_time()
        add_users(model, [f"new{number}" for number in range(10_000)])
        times.append(time.process_time() - start)
    return statistics.median(times)


def costs(
    repeats: int, layers: int, hidden: int, methods: tuple[str, ...] = ("gauss-newton", "pca", "auto")
) -> dict[str, float]:
    """CPU time of a fit to 30 comparisons over that of scoring them."""
    model, tokenizer = model_with_users(layers, hidden), common.tokenizer()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as after a training: B and the users' moves are small and not zero
        for module in model.modules():
            if hasattr(module, "sharelora_common"):
                module.sharelora_B["default"].weight.normal_(0, 0.02, generator=generator)
                module.bank("default").weight.normal_(0, 0.02, generator=generator)
    draw = random.Random(0)
    rows = Dataset.from_list(
        [
            {
                "user_id": "new",
                **{
                    side: [draw.randrange(2, common.VOCAB) for _ in range(64)]
                    for side in ("chosen_ids", "rejected_ids")
                },
            }
            for _ in range(30)
        ]
    )
    spread = user_spread(model)
    add_users(model, ["new"])
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats + 1):
        for what in ("score", *methods):
            start = time.process_time()
            if what == "score":
                evaluate_users(model, rows, tokenizer)
            else:
                fit_users(model, rows, tokenizer, what, spread=spread, refit=True)
            times[what].append(time.process_time() - start)
    return {
        what: statistics.median(one / score for one, score in zip(times[what][1:], times["score"][1:], strict=True))
        for what in methods
    }


def interval(values: list[float]) -> str:
    """Mean and 95 % Student interval over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ±{half:.3f}"


def accuracy_at(result: dict[str, Any], answers: int, sizes: Sizes) -> float:
    """Of the newcomers who were asked chosen pairs."""
    return result["asking"]["chosen"][sizes.asked.index(answers)] if answers else result["curve"]["common"][0]


def verdict(value: float, limit: float, at_most: bool = True) -> str:
    reached = value <= limit if at_most else value >= limit
    return f"{value:.2f} ({'at most' if at_most else 'at least'} {limit:g}: {'reached' if reached else 'MISSED'})"


def report_curve(results: list[dict[str, Any]], sizes: Sizes) -> None:
    curves = [one["curve"] for one in results]
    base = [one["common"][0] for one in curves]
    print(f"\naccuracy, {len(results)} seeds, {sizes.newcomers} newcomers each, 95 % over seeds")
    print(f"  common model {interval(base)}; truth {interval([one['best'] for one in results])}; ", end="")
    print(f"trained users {interval([one['seen'] for one in results])}")
    for n in sizes.answers:
        parts = [
            f"{method} {interval([one[method][n] for one in curves])}"
            for method in curves[0]
            if n in curves[0][method]
        ]
        print(f"  {n:>4} answers  " + "   ".join(parts))
    for name, top in (("truth", "best"), ("trained", "seen")):
        for n, wanted in ((10, 0.5), (50, 0.8)):
            if n in curves[0].get("auto", {}):
                shares = [
                    (one["curve"]["auto"][n] - one["curve"]["common"][0]) / (one[top] - one["curve"]["common"][0])
                    for one in results
                ]
                print(
                    f"  auto, share of the gain up to {name} by {n}: {verdict(statistics.fmean(shares), wanted, at_most=False)}"
                )


def report_asking(results: list[dict[str, Any]], sizes: Sizes) -> None:
    print("\nasking: answers needed for the accuracy of random ones")
    for way in ("chosen", "random"):
        print(
            f"  {way}: "
            + ", ".join(
                f"{n}: {statistics.fmean(one['asking'][way][place] for one in results):.3f}"
                for place, n in enumerate(sizes.asked)
            )
        )
    means = {
        way: [statistics.fmean(one["asking"][way][place] for one in results) for place in range(len(sizes.asked))]
        for way in ("chosen", "random")
    }
    ratios = []
    for place, n in enumerate(sizes.asked):
        if n >= 10:
            ratio = needed(sizes.asked, means["chosen"], means["random"][place]) / needed(
                sizes.asked, means["random"], means["random"][place]
            )
            each = [
                needed(sizes.asked, one["asking"]["chosen"], one["asking"]["random"][place]) / n for one in results
            ]
            ratios.append(ratio)
            print(
                f"  the accuracy of {n} random answers: {ratio:.2f} of as many (single seeds {', '.join(f'{one:.2f}' for one in sorted(each))})"
            )
    print(f"  on average {verdict(statistics.fmean(ratios), 0.7)}")
    print("\nthe stopping rule: rise of accuracy foreseen before a round of chosen pairs, and what happened")
    for place, (before, *_) in enumerate(results[0]["asking"]["foreseen"]):
        parts = []
        for number, ahead in enumerate(AHEAD):
            if before + ahead in sizes.asked:
                said = [one["asking"]["foreseen"][place][2 + number] for one in results]
                came = [accuracy_at(one, before + ahead, sizes) - accuracy_at(one, before, sizes) for one in results]
                parts.append(f"{ahead} more {interval(said)}, came {interval(came)}")
        point = statistics.median(one["asking"]["foreseen"][place][1] for one in results)
        print(f"  after {before}: " + "; ".join(parts) + f"; a point more needs about {point:.1f} (median)")


def report_nothing(results: list[dict[str, Any]]) -> None:
    print("\nnothing to gain: accuracy of auto minus the common model's")
    for key in results[0]["nothing"]:
        print(f"  {key[0]}, {key[1]} answers: {interval([one['nothing'][key] for one in results])}")


def report_cost(quick: bool, repeats: int) -> None:
    cost = costs(repeats, *((1, 64) if quick else (4, 256)))
    print("\ncost of a fit to 30 comparisons, in units of scoring them once")
    print(
        f"  gauss-newton {verdict(cost['gauss-newton'], 2)}; pca {verdict(cost['pca'], 15)}; auto {cost['auto']:.2f}"
    )
    if not quick:
        print(f"  gauss-newton, 8 layers of 512: {verdict(costs(3, 8, 512, ('gauss-newton',))['gauss-newton'], 2)}")
    print(f"  10,000 users are added in {verdict(adding(3), 1)} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small seed, to see that everything runs")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--first_seed", type=int, default=0, metavar="N")
    parser.add_argument("--train_common", action="store_true", help="the reward model also trains A_0")
    parser.add_argument(
        "--once", action="store_true", help="one training, without shrink_users and the second one of B"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; what is there is kept"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=("gauss-newton", "pca", "auto", "full"), help="of the curve; by default all"
    )
    parser.add_argument(
        "--output_dir",
        default="new_users_runs",
        metavar="DIR",
        help="worlds, models and figures of each seed, used again",
    )
    args = parser.parse_args()
    common.quiet()
    sizes = QUICK if args.quick else Sizes()
    print(common.machine())
    results = []
    for seed in range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds)):
        name = f"{'quick' if args.quick else 'seed'}{seed}{'-common' if args.train_common else ''}{'-once' if args.once else ''}"
        folder = Path(args.output_dir, name)
        kept = folder / "result.json"
        found = json.loads(kept.read_text()) if kept.is_file() else {}
        start = time.time()
        people = None
        for part in [part for part in args.parts if part not in found and part != "cost"]:
            if people is None:
                model = train(folder, sizes, seed, args.train_common, args.once)
                people = Newcomers(model, sizes, seed)
                found |= {"best": people.best, "seen": json.loads((model / "seen.json").read_text())["accuracy"]}
            if part == "curve":
                found[part] = {method: list(by_n.items()) for method, by_n in curve(people, args.methods).items()}
            elif part == "asking":
                found[part] = asking(people, seed)
            else:
                found[part] = [[*key, gain] for key, gain in nothing_to_gain(people, seed).items()]
            kept.write_text(json.dumps(found))
            print(f"seed {seed}, {part}: {time.time() - start:.0f} s, {people.spread}", flush=True)
        found["curve"] = {
            method: {int(n): accuracy for n, accuracy in by_n} for method, by_n in found.get("curve", {}).items()
        }
        found["nothing"] = {(kind, n): gain for kind, n, gain in found.get("nothing", [])}
        results.append(found)
    if "curve" in args.parts:
        report_curve(results, sizes)
    if "asking" in args.parts:
        report_asking(results, sizes)
    if "nothing" in args.parts:
        report_nothing(results)
    if "cost" in args.parts:
        report_cost(args.quick, sizes.repeats)


if __name__ == "__main__":
    main()
