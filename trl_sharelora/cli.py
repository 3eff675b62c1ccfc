"""`trl-sharelora`: reward | dpo | rloo | grpo | ppo | confidence | calibrate | eval | usage | export | forget | add-users |
fit-users | shrink-users | subspace | compare | demo | env.

The first five are training commands: their arguments are those of TRL's scripts (`--config reward.yaml` and so on), and what a
script does not know goes to `accelerate launch`. The others are ordinary tools. Each command imports what it needs when it runs.
"""

import argparse
import importlib
import sys

from .errors import ShareLoraError


TRAINING_COMMANDS = {
    "reward": "train a personalised reward model (arguments: trl-sharelora reward -h)",
    "dpo": "train a personalised policy from preferences",
    "rloo": "train a personalised policy against a reward model; the recommended one",
    "grpo": "the same with GRPO",
    "ppo": "the same with PPO, a critic and GAE",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. A training command's own arguments are parsed by its script."""
    parser = argparse.ArgumentParser(
        prog="trl-sharelora",
        description="Personalised reward models and policies on TRL and PEFT: one LoRA factor shared by all users, one of each user's "
        "own.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, help_text in TRAINING_COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)

    confidence = commands.add_parser(
        "confidence",
        help="fit the confidence sets of a reward model to its training data",
        description="Fit the confidence sets of a reward model to its training data; written into its directory.",
    )
    _add_model_and_data(confidence)
    confidence.add_argument(
        "--kind",
        choices=("ellipsoid", "heads"),
        default="ellipsoid",
        help="ellipsoid: wide where no comparisons are (default); heads: an ensemble of score heads",
    )
    confidence.add_argument(
        "--parameters",
        choices=("last_layer", "own_factor", "base"),
        default="last_layer",
        help="features of the ellipsoids: of the reward's last layer (default); of the user's own factor; of the base's last layer, a "
        "forward more, which knows best what was never compared",
    )
    confidence.add_argument(
        "--pooled_discount",
        type=float,
        metavar="X",
        help="how much a comparison of another user counts for a user's ellipsoid (default: see EllipsoidBuilder)",
    )

    calibrate = commands.add_parser(
        "calibrate",
        help="the pessimism coefficient that covers a wanted share of held-out comparisons",
        description="The pessimism coefficient that covers a wanted share of held-out comparisons.",
    )
    _add_model_and_data(calibrate)
    calibrate.add_argument("--coverage", type=float, default=0.9, metavar="X", help="wanted share (default 0.9)")
    calibrate.add_argument(
        "--pessimism",
        choices=("ellipsoid", "ensemble", "ball"),
        default="ellipsoid",
        help="the set (default ellipsoid)",
    )

    calibrate.add_argument("--output_dir", metavar="DIR", help="also write calibration.json there")

    evaluate = commands.add_parser(
        "eval",
        help="accuracy of a trained model for each user",
        description="Accuracy of a trained model for each user.",
    )
    _add_model_and_data(evaluate)
    evaluate.add_argument(
        "--unseen",
        choices=("raise", "common"),
        default="raise",
        help="a user the model does not know: an error (default), or the common model",
    )
    evaluate.add_argument("--output_dir", metavar="DIR", help="also write users.parquet and summary.json there")
    evaluate.add_argument(
        "--confidence",
        choices=("none", "ellipsoid", "ensemble", "ball"),
        default="none",
        help="also tell whether wider confidence sets mean more errors",
    )

    export = commands.add_parser(
        "export",
        help="take one user away as a plain PEFT LoRA",
        description="Take one user away as a plain PEFT LoRA.",
    )
    export.add_argument("--adapter", required=True, metavar="DIR", help="the adapter's directory")
    export.add_argument("--user", required=True, metavar="ID", help="the user's id, as in the data")
    export.add_argument("--output_dir", required=True, metavar="DIR", help="where to write")

    add_users = commands.add_parser(
        "add-users",
        help="give rows to new users: they start as the common model",
        description="Give rows to new users of a saved reward model; they start as the common model, nobody else changes.",
    )
    _add_model(add_users)
    add_users.add_argument("--users", nargs="+", metavar="ID", help="their ids")
    add_users.add_argument("--users_file", metavar="FILE", help="a file with an id per line")

    fit_users = commands.add_parser(
        "fit-users",
        help="fit new users to their first answers, without training",
        description="Fit new users of a saved reward model to their first answers, in a few passes over these; the shared factor, the head and "
        "all other users stay as they are. The adapter is saved again, its confidence sets get the new users.",
    )
    _add_model_and_data(fit_users)
    fit_users.add_argument(
        "--method",
        choices=("auto", "gauss-newton", "pca", "full"),
        default="auto",
        help="auto (default) chooses by the number of answers, and shrinks to the common model by what held-out answers say",
    )
    fit_users.add_argument("--refit", action="store_true", help="replace what users have who were trained or fitted")
    fit_users.add_argument(
        "--spread_file",
        metavar="FILE",
        help="the prior that shrink-users wrote (default: the spread of the trained users)",
    )
    fit_users.add_argument("--report_dir", metavar="DIR", help="also write new_users.csv there")

    shrink_users = commands.add_parser(
        "shrink-users",
        help="put every user's part where his and everybody's comparisons say it should be",
        description="After a training: learn from all comparisons how much users differ in each direction, and put every user's own part where it is "
        "most likely under that. Only the users' own parts change, and only if held-out comparisons say it is better. The directory of a plain LoRA for all "
        "users will do too: in --output_dir each user of the data gets a row beside it.",
    )
    _add_model_and_data(shrink_users)
    shrink_users.add_argument(
        "--validation_split",
        metavar="NAME",
        help="of the same file: choose by these comparisons (default: a fifth of each user's is held out)",
    )
    shrink_users.add_argument(
        "--scale",
        type=float,
        metavar="X",
        help="standard deviation of a margin between users at the start, in log-odds (default: the best of .25, 1, 4; beside text effects of 8 too; "
        "where validation is of new texts the mean of all that are as good)",
    )
    shrink_users.add_argument("--steps", type=int, metavar="N", help="EM steps (default: the best of 0 to 12)")
    shrink_users.add_argument(
        "--text_effects",
        type=_number_or_none,
        metavar="X",
        help="fit the common part anew beside an effect of each text's own with this standard deviation, in log-odds; 'none': never (default, where validation is of "
        "new texts and those of the training are compared often: 1, which gained a point on real votes, or .01, as folds of the training's texts say; not where that would lose what "
        "the base knew)",
    )
    shrink_users.add_argument(
        "--spread_file", metavar="FILE", help="write the prior for newcomers there, for fit-users"
    )
    shrink_users.add_argument(
        "--output_dir", metavar="DIR", help="save the adapter there (default: where it was; needed for a plain LoRA)"
    )

    usage = commands.add_parser(
        "usage",
        help="does a reward model use the user?",
        description="Does a reward model use the user? Accuracy when users are swapped, variance of rewards between users, comparisons that "
        "turn round when a user's labels do. Give comparisons that it was not trained on.",
    )
    _add_model_and_data(usage)
    usage.add_argument("--draws", type=int, default=5, metavar="N", help="how often users are swapped (default 5)")
    usage.add_argument(
        "--flip_users",
        type=int,
        default=8,
        metavar="N",
        help="fit so many users again to turned labels (default 8; 0 leaves it out)",
    )
    usage.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn at random (default 0)")
    usage.add_argument("--output_dir", metavar="DIR", help="also write usage.json, usage.md and usage.parquet there")

    forget = commands.add_parser(
        "forget",
        help="erase a user from an adapter, its checkpoints and its tables",
        description="Erase a user's row, moments, id and lines in tables from an adapter's directory and its checkpoints. What the shared "
        "factors have learned from him stays; --report_influence measures how much they lean on him, before he is gone.",
    )
    forget.add_argument(
        "--adapter", required=True, metavar="DIR", help="the adapter's directory, or the output_dir of a training"
    )
    forget.add_argument("--user", metavar="ID", help="the user's id, as in the data")
    forget.add_argument(
        "--pseudonym", metavar="NAME", help="instead of --user, in a pseudonymous adapter whose key is not at hand"
    )
    forget.add_argument(
        "--user_key_file",
        metavar="FILE",
        help="the key of a pseudonymous adapter (default: SHARELORA_USER_KEY_FILE or SHARELORA_USER_KEY of the environment)",
    )
    forget.add_argument(
        "--report_influence",
        "--report-influence",
        metavar="FILE",
        help="the comparisons of the training, a file or a hub id: measure first how much the shared part leans on him",
    )
    forget.add_argument("--influence_output", metavar="FILE", help="also write what was measured there, as JSON")
    _add_rows(forget)
    _add_loading(forget)

    subspace = commands.add_parser(
        "subspace",
        help="what users' updates share: is one B for all of them justified?",
        description="Spectra of the users' updates in a saved adapter, what is common and what is personal, and whether sharing one B is "
        "justified for its log (to be told from a run of lora-local, in which nothing is shared). Needs no base model.",
    )
    subspace.add_argument("adapter", metavar="RUN", help="the adapter's directory")
    subspace.add_argument(
        "--k", type=int, metavar="K", help="number of shared directions to judge (default: the rank r)"
    )
    subspace.add_argument(
        "--control",
        metavar="RUN",
        help="an adapter trained in the same way with labels drawn at random: what the base alone makes the users share",
    )
    subspace.add_argument(
        "--users", type=int, metavar="N", help="at most so many users, at random (default 32, or 1024 if B is shared)"
    )
    subspace.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn at random (default 0)")
    subspace.add_argument(
        "--dtype", choices=("float64", "float32"), default="float64", help="of the decompositions (default float64)"
    )
    subspace.add_argument("--output_dir", metavar="DIR", help="also write spectrum.json and spectrum.png there")

    commands.add_parser(
        "compare",
        help="the paper's variants and baselines on one data set, in one table (arguments: trl-sharelora compare -h)",
        add_help=False,
    )
    commands.add_parser(
        "data",
        help="check a preference log, import one of another schema, split one (arguments: trl-sharelora data -h)",
        add_help=False,
    )
    commands.add_parser("demo", help="personalised against pooled, on users with different tastes", add_help=False)
    commands.add_parser("env", help="versions and devices, for a bug report")
    return parser


def _number_or_none(text: str) -> float | bool:
    """An argument's number; "none" is False, as leaving the argument out is None."""
    try:
        return False if text == "none" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} came; a number or 'none' is needed") from error


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """The arguments of every tool that takes a reward model and preference rows."""
    _add_model(parser)
    parser.add_argument("--dataset_name", required=True, metavar="FILE", help="preference rows: a file or a hub id")
    parser.add_argument("--dataset_split", metavar="NAME", help="take one split (in a file: by its column 'split')")
    _add_rows(parser)


def _add_rows(parser: argparse.ArgumentParser) -> None:
    """How preference rows are read."""
    parser.add_argument("--user_column", default="user_id", metavar="NAME", help="the column that names the user")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="pairs at a time (default 8)")
    parser.add_argument(
        "--max_length", type=int, metavar="N", help="leave out pairs with more tokens, and say how many"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments of every tool that loads a reward model."""
    parser.add_argument("--model_name_or_path", required=True, metavar="DIR", help="the adapter's directory or hub id")
    _add_loading(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded."""
    parser.add_argument("--load_in_8bit", action="store_true", help="quantise the base to 8 bits, as in training")
    parser.add_argument("--load_in_4bit", action="store_true", help="quantise the base to 4 bits, as in training")
    parser.add_argument("--use_cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="float32",
        help="of the base (default float32, as TRL trains)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (`list[str]`, *optional*):
            Command and arguments; by default those of this process.

    Returns:
        `int`: exit status. 2 stands for input that cannot be used.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    try:
        if argv and argv[0] in TRAINING_COMMANDS:
            return _train(argv[0], argv[1:])
        if argv and argv[0] == "compare":
            from .scripts.compare import main as compare

            return compare(argv[1:])
        if argv and argv[0] == "data":
            from .scripts.data import add_arguments, data

            tools = argparse.ArgumentParser(prog="trl-sharelora data", allow_abbrev=False)
            add_arguments(tools)
            return data(tools.parse_args(argv[1:]))
        if argv and argv[0] == "demo":
            from .demo import main as demo

            return demo(argv[1:])
        args = parser.parse_args(argv)
        if args.version:
            from . import __version__

            print(__version__)
        elif args.command == "eval":
            from .scripts.evaluate import evaluate

            evaluate(args)
        elif args.command in ("confidence", "calibrate"):
            from .scripts import confidence

            getattr(confidence, args.command)(args)
        elif args.command == "export":
            from .scripts.export import export

            export(args)
        elif args.command in ("add-users", "fit-users", "shrink-users"):
            from .scripts import new_users

            getattr(new_users, args.command.replace("-", "_"))(args)
        elif args.command == "usage":
            from .scripts.usage import usage

            usage(args)
        elif args.command == "forget":
            from .scripts.forget import forget

            forget(args)
        elif args.command == "subspace":
            from .scripts.subspace import subspace

            subspace(args)
        elif args.command == "env":
            from .scripts.env import print_environment

            print_environment()
        else:
            parser.print_help()
    except ShareLoraError as error:
        print(f"trl-sharelora: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _train(name: str, argv: list[str]) -> int:
    from .scripts.launch import launch

    module = f"{__package__}.scripts.{name}"
    return launch(module, importlib.import_module(module).make_parser(prog=f"trl-sharelora {name}"), argv)


if __name__ == "__main__":
    raise SystemExit(main())
