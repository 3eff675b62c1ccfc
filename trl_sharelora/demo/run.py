"""`trl-sharelora demo`: plain LoRA on the pooled log against ShareLoRA, on users made up here or on one's own data.

Both reward models are trained by their trainers as a user would train them, from a model on disk, on the same rows in the same
order, with the same budget, rank and seed; everything printed is measured on the test rows.
"""

import argparse
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sharelora.config import SHARE_FORMS
from .story import Story, quiet
from .tasks import FULL, QUICK, Budget, Task, made_up_task, own_task


if TYPE_CHECKING:
    from trl import RewardTrainer

    from ..evaluation import PerUserResult


def make_parser() -> argparse.ArgumentParser:
    """The parser of `trl-sharelora demo`."""
    parser = argparse.ArgumentParser(
        prog="trl-sharelora demo",
        description="Train one reward model for everybody (plain LoRA on the pooled log) and one with a part of each user's own "
        "(ShareLoRA), and show how well each user is served. Without arguments on users made up here: no network, no GPU, a few "
        "minutes.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), metavar="DIR", help="where to write")
    parser.add_argument("--seed", type=int, default=0, help="of users, texts and training (default 0)")
    parser.add_argument(
        "--quick", action="store_true", help="a smaller made-up world: seconds, and figures that mean little"
    )
    parser.add_argument(
        "--share",
        choices=SHARE_FORMS,
        default="B",
        help="which factor all users of ShareLoRA share (default B, the paper's method)",
    )
    own = parser.add_argument_group("on your own data")
    own.add_argument(
        "--dataset",
        metavar="FILE",
        help="preference rows (.jsonl, .json, .csv, .parquet) with chosen, rejected, a user column and, if you like, prompt and "
        "split (train, test); without split a fifth of each user's comparisons is kept for the test",
    )
    own.add_argument("--model", metavar="PATH", help="the base model, a directory with model and tokenizer")
    own.add_argument("--user_column", metavar="NAME", help="the column that names the user (default user_id)")
    own.add_argument("--learning_rate", type=float, help="for both methods (default 1e-4, that of TRL's RewardConfig)")
    own.add_argument("--epochs", type=float, help="for both methods (default 3)")
    own.add_argument("--batch_size", type=int, help="pairs in a batch, for both methods (default 8)")
    return parser


OWN_DEFAULTS = {"user_column": "user_id", "learning_rate": 1e-4, "epochs": 3.0, "batch_size": 8}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; ends with a message where they do not go together."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.dataset is None) != (args.model is None):
        given, missing = ("--dataset", "--model") if args.model is None else ("--model", "--dataset")
        parser.error(
            f"{given} was given without {missing}: on your own data both are needed (on made-up users neither)"
        )
    ignored = [f"--{name}" for name in OWN_DEFAULTS if getattr(args, name) is not None and not args.dataset]
    ignored += ["--quick"] if args.quick and args.dataset else []
    if ignored:
        parser.error(
            f"{', '.join(ignored)} would have no effect {'with' if args.dataset else 'without'} --dataset; leave it out"
        )
    for name, value in OWN_DEFAULTS.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv (`list[str]`, *optional*):
            Arguments; by default those of this process.

    Returns:
        `int`: exit status, 0.
    """
    args = parse(argv)
    start = time.monotonic()
    print("One reward model for everybody, or one with a part of each user's own?")
    if args.dataset:
        print("On your data.")
    elif args.quick:
        print("On users made up here. With --quick they tell too little for the figures to mean anything.")
    else:
        print("On users made up here: one CPU core, no network, about two minutes.")
    with quiet(made_up=args.dataset is None):
        args.output_dir.mkdir(parents=True, exist_ok=True)
        story = Story()
        if args.dataset:
            task = own_task(story, args)
        else:
            task = made_up_task(story, args.output_dir, QUICK if args.quick else FULL, args.share, args.seed)
        compare(story, task, args.output_dir)
    print(f"\n{time.monotonic() - start:.0f} s in all.")
    return 0


def compare(story: Story, task: Task, output_dir: Path) -> None:
    """Train both, evaluate both on the test rows, save everything and show the result."""
    from ..export import export_user
    from .results import draw_picture, print_table, summary_table, user_table

    with story.stage("Plain LoRA on the pooled log (trl.RewardTrainer, peft.LoraConfig)"):
        _, pooled = train_pooled(story, task, output_dir / "pooled_lora")
    with story.stage("ShareLoRA on the same log (ShareLoraRewardTrainer, ShareLoraConfig)"):
        trainer, personal = train_sharelora(story, task, output_dir / "sharelora")
        for line in what_is_the_same(task.budget, trainer.state.global_step):
            story.say(line)

    comparisons = Counter(map(str, task.train[task.user_column]))
    table = user_table(comparisons, pooled.table, personal.table, task.truth)
    summary = summary_table(table)
    with story.stage("Saving the table, the picture and one user as an ordinary LoRA"):
        table.to_csv(output_dir / "users.csv", index=False)
        summary.to_csv(output_dir / "summary.csv", index=False)
        draw_picture(table, summary, output_dir / "users.png")
        taken = trainer.users[max(range(len(trainer.users)), key=lambda row: comparisons[trainer.users[row]])]
        export_user(trainer.model, taken, output_dir / "one_user")

    print(
        "\nAccuracy on test comparisons, in percent. Means: each user counts the same, ± is a 95 % interval over users."
    )
    if task.truth is not None:
        print(
            "Best possible: always siding with the user's true taste; the noise of his answers allows no more on average."
        )
    print()
    print_table(table, summary)
    better, worse = int((table["gain"] > 0).sum()), int((table["gain"] < 0).sum())
    print(f"\nShareLoRA is more accurate for {better} of {len(table)} users, less for {worse}.")
    where_it_lies(task, output_dir, taken)


def what_is_the_same(budget: Budget, steps: int) -> list[str]:
    """In words, for the reader who wonders whether the comparison is fair."""
    lines = [
        f"The same for both: rows and their order, base model, first values of the head, rank {budget.r}, alpha "
        f"{budget.lora_alpha},",
        f"modules ({budget.target_modules or 'those PEFT adapts by default'}), learning rate {budget.learning_rate:g}, "
        f"{steps} steps of {budget.batch_size} pairs, seed {budget.seed}.",
    ]
    if budget.learning_rate_users != budget.learning_rate:
        lines.append(f"Only ShareLoRA has parts of the users' own; they learn at {budget.learning_rate_users:g}.")
    return lines


def train_pooled(story: Story, task: Task, directory: Path) -> tuple["RewardTrainer", "PerUserResult"]:
    """One reward model for everybody: TRL's trainer, PEFT's LoRA."""
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    budget = task.budget
    adapter = LoraConfig(
        task_type="SEQ_CLS", r=budget.r, lora_alpha=budget.lora_alpha, target_modules=budget.target_modules
    )
    return _train(story, task, RewardTrainer, RewardConfig(**_arguments(task, directory)), adapter)


def train_sharelora(story: Story, task: Task, directory: Path) -> tuple[Any, "PerUserResult"]:
    """A reward model with a part of each user's own."""
    from ..sharelora import ShareLoraConfig
    from ..trainers.reward import ShareLoraRewardTrainer
    from ..trainers.reward_config import ShareLoraRewardConfig

    budget = task.budget
    adapter = ShareLoraConfig(
        r=budget.r,
        lora_alpha=budget.lora_alpha,
        target_modules=budget.target_modules,
        share=budget.share,
        train_common=True,  # what all want is learned from all, so a user with few comparisons starts from it
    )
    rates = {"learning_rate": budget.learning_rate_users, "learning_rate_shared": budget.learning_rate}
    args = ShareLoraRewardConfig(**(_arguments(task, directory) | rates), user_column=task.user_column)
    return _train(story, task, ShareLoraRewardTrainer, args, adapter)


def _arguments(task: Task, directory: Path) -> dict[str, Any]:
    """Training arguments, the same for both trainers."""
    from transformers import AutoTokenizer

    budget = task.budget
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    arguments: dict[str, Any] = {
        "output_dir": str(directory),
        "learning_rate": budget.learning_rate,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": budget.epochs,
        "per_device_train_batch_size": budget.batch_size,
        "max_length": budget.max_length,
        "seed": budget.seed,
        "use_cpu": budget.on_cpu,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": task.truth is not None,  # a bar where it may take long
        # encoders have no end-of-sequence token, TRL needs one
        "eos_token": tokenizer.eos_token or tokenizer.sep_token,
    }
    if budget.on_cpu:
        arguments |= {"bf16": False, "gradient_checkpointing": False}  # both cost time there
    return arguments


def _train(story: Story, task: Task, trainer_class: Any, args: Any, adapter: Any) -> tuple[Any, "PerUserResult"]:
    from transformers import PrinterCallback, ProgressCallback, set_seed

    from ..evaluation import evaluate_users

    set_seed(args.seed)  # the head is drawn when the model is loaded: the same for both
    trainer = trainer_class(model=task.model, args=args, train_dataset=task.train, peft_config=adapter)
    # no dictionaries of metrics in the story
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(type("Bar", (ProgressCallback,), {"on_log": lambda *args, **kwargs: None}))
    trainer.train()
    trainer.save_model()
    story.say(f"{trainer.model.get_nb_trainable_parameters()[0]:,} weights trained; saved to {args.output_dir}")
    result = evaluate_users(
        trainer.model,
        task.test,
        processing_class=trainer.processing_class,
        user_column=task.user_column,
        unseen="common",
        batch_size=2 * args.per_device_train_batch_size,
        max_length=args.max_length,
    )
    if result.unseen:
        story.say(f"{result.unseen} test rows are of users without training rows: scored with the common model.")
    if result.dropped:
        story.say(f"{result.dropped} test rows have more than {args.max_length} tokens and are left out.")
    return trainer, result


def where_it_lies(task: Task, output_dir: Path, taken: str) -> None:
    """Say what has been written, and what to type next."""
    files = {
        "users.png": "the picture",
        "users.csv": "the table of users; summary.csv has the means",
        "log.jsonl": "the comparisons, with their split"
        + ("" if task.truth is None else " and true margin; truth.jsonl: tastes"),
        "base_model": "the language model that both started from",
        "pooled_lora": "one reward model for everybody, a PEFT LoRA",
        "sharelora": "the personal reward models of all users, one adapter",
        "one_user": f"{taken!r} alone, as a plain PEFT LoRA that loads without this package",
    }
    print("\nWhere everything lies:")
    for name, what in files.items():
        if (output_dir / name).exists():
            print(f"   {str(output_dir / name):<28} {what}")
    adapter, log = shlex.quote(str(output_dir / "sharelora")), shlex.quote(str(output_dir / "log.jsonl"))
    column = "" if task.user_column == "user_id" else f" --user_column {shlex.quote(task.user_column)}"
    print("\nNext:")
    print(f"   trl-sharelora eval --model_name_or_path {adapter} --dataset_name {log} --dataset_split test{column}")
    print(
        f"   trl-sharelora shrink-users --model_name_or_path {adapter} --dataset_name {log} --dataset_split train{column}"
    )
    print(f"   trl-sharelora export --adapter {adapter} --user {shlex.quote(taken)} --output_dir my_adapter")
    if task.truth is not None:
        print("   trl-sharelora demo --dataset YOUR_ROWS.jsonl --model PATH_TO_YOUR_MODEL")
