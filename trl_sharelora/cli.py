"""`trl-sharelora`: reward | eval | export | demo | env.

`reward` is a training command: its arguments are those of TRL's reward script (`--config reward.yaml` and so on), and what
that script does not know goes to `accelerate launch`. The others are ordinary tools. Each command imports what it needs when
it runs.
"""

import argparse
import importlib
import sys

from .errors import ShareLoraError


TRAINING_COMMANDS = {"reward": "train a personalised reward model (arguments: trl-sharelora reward -h)"}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. A training command's own arguments are parsed by its script."""
    parser = argparse.ArgumentParser(
        prog="trl-sharelora",
        description="Personalised reward models on TRL and PEFT: one LoRA factor shared by all users, one for each user.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, help_text in TRAINING_COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)

    evaluate = commands.add_parser(
        "eval",
        help="accuracy of a trained model for each user",
        description="Accuracy of a trained model for each user.",
    )
    evaluate.add_argument(
        "--model_name_or_path", required=True, metavar="DIR", help="the adapter's directory or hub id"
    )
    evaluate.add_argument("--dataset_name", required=True, metavar="FILE", help="preference rows: a file or a hub id")
    evaluate.add_argument("--dataset_split", metavar="NAME", help="take one split (in a file: by its column 'split')")
    evaluate.add_argument("--user_column", default="user_id", metavar="NAME", help="the column that names the user")
    evaluate.add_argument(
        "--unseen",
        choices=("raise", "common"),
        default="raise",
        help="a user the model does not know: an error (default), or the common model",
    )
    evaluate.add_argument("--output_dir", metavar="DIR", help="also write users.parquet and summary.json there")
    evaluate.add_argument("--batch_size", type=int, default=8, metavar="N", help="pairs at a time (default 8)")
    evaluate.add_argument(
        "--max_length", type=int, metavar="N", help="leave out pairs with more tokens, and say how many"
    )
    evaluate.add_argument("--load_in_8bit", action="store_true", help="quantise the base to 8 bits, as in training")
    evaluate.add_argument("--load_in_4bit", action="store_true", help="quantise the base to 4 bits, as in training")
    evaluate.add_argument("--use_cpu", action="store_true", help="do not use an accelerator")
    evaluate.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="float32",
        help="of the base (default float32, as TRL trains)",
    )

    export = commands.add_parser(
        "export",
        help="take one user away as a plain PEFT LoRA",
        description="Take one user away as a plain PEFT LoRA.",
    )
    export.add_argument("--adapter", required=True, metavar="DIR", help="the adapter's directory")
    export.add_argument("--user", required=True, metavar="ID", help="the user's id, as in the data")
    export.add_argument("--output_dir", required=True, metavar="DIR", help="where to write")

    commands.add_parser("demo", help="personalised against pooled, on users with different tastes", add_help=False)
    commands.add_parser("env", help="versions and devices, for a bug report")
    return parser


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
        elif args.command == "export":
            from .scripts.export import export

            export(args)
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
