"""`trl-sharelora compare`: the paper's variants and baselines on one data set, with the same budget and evaluation, in one table.

```bash
trl-sharelora compare --config examples/configs/compare_toy.yaml
```

Each method and seed has a folder of its own in `output_dir`; what is done there is not done again, so a run that was stopped goes on by
typing the same command. One process: on several GPUs start it once per GPU with different `--methods` and the same `output_dir`, then
once more with all of them for the table.
"""

import gc
import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import transformers
from transformers import TrainerCallback, set_seed
from trl import ModelConfig, RewardConfig, ScriptArguments, TrlParser, get_quantization_config

from ..comparison import RESULT_FILE, Run, as_markdown, compare_runs
from ..data import check_preference_rows, load_preferences
from ..errors import ConfigError, DataError, MethodError, UnsupportedError
from ..evaluation import evaluate_users
from ..trainers.methods import METHODS, method_named, train_method
from ..trainers.reward_config import ShareLoraRewardConfig
from .reward import ShareLoraRewardScriptArguments, get_sharelora_config, set_model_arguments


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# of the training arguments those that do not change a result
_INDIFFERENT = {
    "output_dir",
    "run_name",
    "logging_dir",
    "report_to",
    "disable_tqdm",
    "dataloader_num_workers",
    "project",
}
_INDIFFERENT |= {"per_device_eval_batch_size", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo"}


@dataclass
class CompareScriptArguments(ScriptArguments):
    """
    What to compare.

    Args:
        methods (`list[str]`, *optional*):
            Names of methods; by default all.
        seeds (`list[int]`, *optional*, defaults to `[42]`):
            One run of each method per seed. `{seed}` in `dataset_name` and `model_name_or_path` stands for it.
        learning_rates (`list[float]`, *optional*):
            Tried with each method on the first seed; the one with the best macro accuracy on the validation split is taken for the others.
            By default `learning_rate` for all.
        baseline (`str`, *optional*, defaults to `"lora-global"`):
            What gains are over.
        dataset_validation_split (`str`, *optional*):
            The split that chooses the best checkpoint and the learning rate. By default the test split, as the paper's numbers seem to have
            been chosen; the table then says so.
        evaluations (`int`, *optional*, defaults to `10`):
            How often each run is evaluated, at equal distances; the authors' logs have ten.
        init_users (`str`, *optional*, defaults to `"common"`):
            The reading of (SI), see [`ShareLoraConfig`].
        save_models (`bool`, *optional*, defaults to `True`):
            Keep the last model of each run.
        world (`str`, *optional*):
            `"tastes"`: instead of named data and base, make users whose true rewards lie in a space of three dimensions, their
            comparisons and a small base, anew for each seed.
        world_seed (`int`, *optional*):
            One world of this seed for all seeds, which then are those of training alone.
        world_users (`int`, *optional*, defaults to `24`), world_comparisons (`int`, *optional*, defaults to `100`):
            Size of that world; comparisons per user for training.
    """

    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Methods: {', '.join(METHODS)}; by default all."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [42],
        metadata={
            "help": "One run of each method per seed; {seed} in dataset_name and model_name_or_path stands for it."
        },
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Tried with each method on the first seed, chosen on validation. By default learning_rate for all."
        },
    )
    baseline: str = field(default="lora-global", metadata={"help": "The method that gains are over."})
    dataset_validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split that chooses the best checkpoint and the learning rate; by default the test split, and the table says so."
        },
    )
    evaluations: int = field(default=10, metadata={"help": "Evaluations of each run; the authors' logs have ten."})
    init_users: Literal["common", "independent"] = field(
        default="common",
        metadata={
            "help": "Reading of (SI): all A_i equal at step 0 ('common', the code) or drawn one by one ('independent', the text)."
        },
    )
    save_models: bool = field(default=True, metadata={"help": "Keep the last model of each run."})
    world: Literal["none", "tastes"] = field(
        default="none",
        metadata={
            "help": "'tastes': make users with known low-rank rewards, comparisons and a small base, anew for each seed."
        },
    )
    world_seed: int | None = field(
        default=None, metadata={"help": "One world of this seed for all seeds, instead of one for each."}
    )
    world_users: int = field(default=24, metadata={"help": "Users of that world."})
    world_comparisons: int = field(default=100, metadata={"help": "Their comparisons for training, each."})


def make_parser(prog: str = "trl-sharelora compare") -> TrlParser:
    """The parser of this command: what to compare, and the arguments of `trl-sharelora reward`."""
    return TrlParser((CompareScriptArguments, ShareLoraRewardConfig, ModelConfig), prog=prog, allow_abbrev=False)


def main(argv: list[str] | None = None) -> int:
    """Parse, compare, print the table.

    Args:
        argv (`list[str]`, *optional*):
            Arguments; by default those of this process.
    """
    from .launch import parse_arguments

    compare(*parse_arguments(make_parser(), argv))
    return 0


def compare(
    script_args: CompareScriptArguments, training_args: ShareLoraRewardConfig, model_args: ModelConfig
) -> dict[str, Any]:
    """Run what has not been run yet, then write `comparison.json` and `table.md` and print the table.

    Args:
        script_args ([`CompareScriptArguments`]):
            What to compare.
        training_args ([`ShareLoraRewardConfig`]):
            Budget of every method.
        model_args ([`~trl.ModelConfig`]):
            Base and rank.

    Returns:
        `dict`: what `comparison.json` holds.

    Raises:
        MethodError: an unknown method, one user only, or a folder with results of other settings; before anything is trained.
        DataError: a split has users without training data (unless `unseen="common"`).
    """
    _check(script_args, training_args)
    if training_args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module=r"transformers\."
        )  # TRL's to heed, once per run
    output_dir = Path(training_args.output_dir)
    runs: dict[str, list[Run]] = {}
    rates = script_args.learning_rates or [training_args.learning_rate]
    own_world = script_args.world != "none" and script_args.world_seed is None
    worlds = own_world or "{seed}" in (script_args.dataset_name or "")
    pieces = {seed: _Data(script_args, model_args, training_args, seed, output_dir) for seed in script_args.seeds}
    chosen_on = script_args.dataset_validation_split or script_args.dataset_test_split
    if script_args.world != "none":
        chosen_on = "validation"
    for name in script_args.methods:
        first = script_args.seeds[0]
        tried = [
            _run(name, first, rate, rates, pieces[first], script_args, training_args, model_args) for rate in rates
        ]
        scores = [_best_of(run) for run in tried]
        best = scores.index(max(scores))
        if len(rates) > 1:
            shown = ", ".join(f"{rate:g}: {100 * score:.2f}" for rate, score in zip(rates, scores, strict=True))
            print(f"{name}: learning rate {rates[best]:g} of ({shown}) by {chosen_on}", flush=True)
        runs[name] = [tried[best]]
        for seed in script_args.seeds[1:]:
            runs[name].append(
                _run(name, seed, rates[best], rates, pieces[seed], script_args, training_args, model_args)
            )
    split = script_args.dataset_test_split
    result = {
        "title": f"{len(runs)} methods, {len(script_args.seeds)} seeds",
        "model": pieces[script_args.seeds[0]].model,
        "dataset": pieces[script_args.seeds[0]].name,
        "split": split,
        "chosen_on": chosen_on,
        "seeds": list(script_args.seeds),
        **compare_runs(runs, script_args.baseline, worlds),
    }
    note = f"Accuracy on {split!r} in percent, mean over users; checkpoints ('best') "
    note += f"and learning rates chosen on {chosen_on!r}" if len(rates) > 1 else f"chosen on {chosen_on!r}"
    if chosen_on != split:
        note += "; the reported split chose nothing."
    elif len(rates) > 1:
        note += ", which is the reported split: 'best' and 'last' are optimistic."
    else:
        note += ", which is the reported split: 'best' is optimistic."
    table = f"{note}\n\n{as_markdown(result)}\n"
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "comparison.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (output_dir / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nAlso in {output_dir / 'table.md'}; all numbers in {output_dir / 'comparison.json'}.")
    return result


def _check(script_args: CompareScriptArguments, training_args: ShareLoraRewardConfig) -> None:
    for name in (*script_args.methods, script_args.baseline):
        method_named(name)
    for what in ("methods", "seeds"):
        values: list[Any] = getattr(script_args, what)
        if not values or len(set(values)) != len(values):
            raise MethodError(f"{what}={values}; one or more are needed, each once.")
    if script_args.evaluations < 1:
        raise ConfigError(f"evaluations={script_args.evaluations}; at least 1 is needed.")
    if training_args.world_size > 1:
        raise UnsupportedError(
            f"{training_args.world_size} processes were started; `compare` is one. Start it once per GPU with other --methods and the same "
            "output_dir (CUDA_VISIBLE_DEVICES=1 ...), then once more with all methods for the table."
        )
    if script_args.dataset_streaming:
        raise UnsupportedError(
            "dataset_streaming came; a comparison scores the same rows again and again. Leave it out."
        )


class _Data:
    """The data and the base of one seed."""

    def __init__(
        self,
        script_args: CompareScriptArguments,
        model_args: ModelConfig,
        training_args: ShareLoraRewardConfig,
        seed: int,
        output_dir: Path,
    ):
        validation = script_args.dataset_validation_split
        if script_args.world != "none":
            from ..demo.tasks import make_world

            of_world = seed if script_args.world_seed is None else script_args.world_seed
            where = output_dir / f"world-{of_world}"
            folder = make_world(where, script_args.world_users, script_args.world_comparisons, of_world)
            self.name, self.model, validation = str(folder / "log.jsonl"), str(folder / "base_model"), "validation"
        else:
            if not script_args.dataset_name or not model_args.model_name_or_path:
                raise ConfigError("No data or no base: give dataset_name and model_name_or_path, or world: tastes.")
            self.name = script_args.dataset_name.replace("{seed}", str(seed))
            self.model = model_args.model_name_or_path.replace("{seed}", str(seed))
        column = training_args.user_column
        self.train = load_preferences(self.name, split=script_args.dataset_train_split)
        self.test = load_preferences(self.name, split=script_args.dataset_test_split)
        self.validation = self.test if validation is None else load_preferences(self.name, split=validation)
        for split, rows in self.splits().items():
            check_preference_rows(rows, column, name=split)
        users = {split: set(rows[column][:]) for split, rows in self.splits().items()}
        if len(users["train"]) < 2:
            raise MethodError(
                f"{self.name} has {len(users['train'])} user(s) to train on; there is nothing to share and nothing to compare with one. "
                "Use TRL's RewardTrainer."
            )
        for split in ("validation", "test"):
            unseen, absent = users[split] - users["train"], users["train"] - users[split]
            if unseen and training_args.unseen == "raise":
                raise DataError(
                    f"{len(unseen)} users of the {split} split of {self.name} have no comparisons for training ({min(unseen)!r}, ...); "
                    "LoRA-local has no model for them. Leave them out, or set unseen: common to score them with the common model."
                )
            if absent:
                print(
                    f"{len(absent)} of {len(users['train'])} users have no comparisons in the {split} split (seed {seed}): they are "
                    "trained, and are not part of its means."
                )

    def splits(self) -> dict[str, "Dataset"]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def base_digest(self) -> str:
        """Of the base: its name on the hub; of a local one its configuration and the names and sizes of its weights."""
        folder = Path(self.model)
        if not folder.is_dir():
            return self.model
        digest = hashlib.sha256()
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
        config = folder / "config.json"
        digest.update(config.read_bytes() if config.is_file() else b"")
        return digest.hexdigest()[:16]

    def digest(self) -> str:
        """Of all rows, to tell whether a result is of these."""
        digest = hashlib.sha256()
        for split, rows in self.splits().items():
            digest.update(split.encode())
            for row in rows:
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
        return digest.hexdigest()[:16]


def _best_of(run: Run) -> float:
    """Macro accuracy of its best checkpoint on the choosing split; a warm-up's checkpoints are another method's."""
    last = max(entry["stage"] for entry in run.history)
    return max(entry["macro"] for entry in run.history if entry["stage"] == last)


def _run(
    name: str,
    seed: int,
    rate: float,
    rates: Sequence[float],
    data: _Data,
    script_args: CompareScriptArguments,
    training_args: ShareLoraRewardConfig,
    model_args: ModelConfig,
) -> Run:
    """One method, one seed, one learning rate: from its folder, or made now."""
    folder = Path(training_args.output_dir, name, *([f"lr-{rate:g}"] if len(rates) > 1 else []), f"seed-{seed}")
    own: dict[str, Any] = {"output_dir": str(folder), "seed": seed, "learning_rate": rate}
    own |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False}
    own["model_init_kwargs"] = dict(training_args.model_init_kwargs or {})
    args = replace(training_args, **own)
    settings = _settings(args, script_args, model_args, data)
    if (folder / RESULT_FILE).is_file():
        run = Run.load(folder)
        changed = sorted(key for key in {*settings, *run.settings} if settings.get(key) != run.settings.get(key))
        if changed:
            raise MethodError(
                f"{folder} holds a result of other settings ({', '.join(changed[:5])}{', ...' * (len(changed) > 5)} changed). Give another "
                "output_dir, or remove that folder to have it made again."
            )
        print(f"{name}, seed {seed}: there already ({folder})", flush=True)
        return run
    set_model_arguments(args, replace(model_args, model_name_or_path=data.model))
    peft_config = get_sharelora_config(
        model_args,
        ShareLoraRewardScriptArguments(init_users=script_args.init_users if name == "psharelora-si" else "common"),
    )
    scores = _Scores(data, args, script_args.evaluations)
    set_seed(seed)  # the head is drawn when the base is loaded: the same for all methods
    trainer = train_method(
        name,
        data.model,
        args,
        data.train,
        peft_config,
        callbacks=[scores],
        quantization_config=get_quantization_config(model_args),
    )
    run = Run(name, seed, settings, scores.history, scores.margins())
    if script_args.save_models:
        trainer.save_model()
    run.save(folder)
    last = scores.history[-1]
    print(f"{name}, seed {seed}, lr {rate:g}: {100 * last['macro']:.2f} at the end on the choosing split", flush=True)
    del trainer
    gc.collect()
    return run


def _settings(
    args: ShareLoraRewardConfig, script_args: CompareScriptArguments, model_args: ModelConfig, data: _Data
) -> dict[str, Any]:
    """What a result depends on, as JSON would give it back."""
    names = {item.name for item in fields(ShareLoraRewardConfig) if item.init} - _INDIFFERENT
    everything = args.to_dict()
    values = {name: everything[name] for name in sorted(names) if name in everything}
    loading = {name: value for name, value in vars(model_args).items() if name != "model_name_or_path"}
    chosen = {
        "evaluations": script_args.evaluations,
        "init_users": script_args.init_users,
        "base": data.base_digest(),
        "data": data.digest(),
    }
    return json.loads(json.dumps({**values, **loading, **chosen}, default=str))


class _Scores(TrainerCallback):
    """Scores the choosing split at equal distances of the whole training, both stages, and the reported one whenever it is the best yet."""

    def __init__(self, data: _Data, args: RewardConfig, evaluations: int):
        self.data, self.args, self.evaluations = data, args, evaluations
        self.history: list[dict[str, float]] = []
        self.best: Any = None
        self.last: Any = None
        self.done = self.begun = 0.0
        self.stage = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = self.done  # a second stage is what is left
        self.stage += 1

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        before = self.done
        self.done = self.begun + (1 - self.begun) * state.global_step / state.max_steps
        if int(self.done * self.evaluations + 1e-6) > int(before * self.evaluations + 1e-6):
            self.score(model, processing_class)

    def score(self, model: Any, processing_class: Any) -> None:
        def on(rows: Any) -> Any:
            return evaluate_users(
                model,
                rows,
                processing_class=processing_class,
                user_column=self.args.user_column,
                unseen=self.args.unseen,
                batch_size=self.args.per_device_eval_batch_size,
                max_length=self.args.max_length,
            )

        found = on(self.data.validation)
        # of this stage: the checkpoints of a warm-up are those of LoRA-global
        best = max((entry["macro"] for entry in self.history if entry["stage"] == self.stage), default=-1.0)
        self.history.append(
            {"done": round(self.done, 4), "stage": self.stage, "macro": found.macro, "micro": found.micro}
        )
        at_end = self.done > 1 - 1e-6
        if found.macro > best or at_end:
            reported = found if self.data.test is self.data.validation else on(self.data.test)
            if found.macro > best:
                self.best = reported.rows
            if at_end:
                self.last = reported.rows

    def margins(self) -> Any:
        """`row`, `user_id`, `best`, `last` of every reported comparison."""
        return self.best.rename(columns={"margin": "best"}).assign(last=self.last["margin"].to_numpy())


if __name__ == "__main__":
    raise SystemExit(main())
