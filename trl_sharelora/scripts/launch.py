"""Starting a training script through `accelerate launch`, with TRL's rule for who gets which argument.

What the script's own parser does not know, on the command line or in the YAML file, goes to `accelerate launch`. Two
mistakes that the rule invites are caught here: an argument that neither of the two knows, and a run on another number of
processes than was asked for.
"""

import argparse
import difflib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedError


# Tells the script how many processes `trl-sharelora` asked accelerate for.
ASKED_PROCESSES = "SHARELORA_NUM_PROCESSES"


def parse_arguments(parser: Any, argv: list[str] | None = None) -> tuple[Any, ...]:
    """The dataclasses of a training script's arguments, with the checks that belong to its start.

    Args:
        parser ([`~trl.TrlParser`]):
            The script's parser; its second dataclass holds the training arguments.
        argv (`list[str]`, *optional*):
            By default those of this process.

    Raises:
        ConfigError: nobody knows one of the arguments, or another number of processes was started than asked for.
    """
    from accelerate.commands.launch import launch_command_parser

    *arguments, from_config, from_argv = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    # `accelerate launch` has taken its own from the command line before this; from the YAML file they have not been taken out
    if from_argv:
        raise ConfigError(
            f"This script does not know {' '.join(from_argv)}{_similar(from_argv[0], _options(parser))}. Arguments for `accelerate "
            "launch` go before the script (`accelerate launch --num_processes 2 -m ...`), or use `trl-sharelora`, which sorts them."
        )
    check_known(from_config, parser, launch_command_parser())
    check_processes(arguments[1].world_size, from_config)
    return tuple(arguments)


def launch(module: str, parser: Any, argv: list[str]) -> int:
    """Run a training script with `accelerate launch`.

    Args:
        module (`str`):
            The script, as `python -m` takes it.
        parser ([`~trl.TrlParser`]):
            Its parser.
        argv (`list[str]`):
            Arguments for the script and for `accelerate launch`, mixed.

    Returns:
        `int`: exit status of the run. What went wrong has been printed by the run itself.

    Raises:
        ConfigError: the arguments contradict each other, or nobody knows one of them.
        UnsupportedError: they ask for DeepSpeed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment

    # `-h` ends here. The second list is an ordered part of `argv`, the first is what the YAML file held beside it.
    *_, from_config, from_argv = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    launch_parser = launch_command_parser()
    check_known(from_config + from_argv, parser, launch_parser)
    launch_args = accelerate_arguments(flags_from_config(from_config, launch_parser) + from_argv)
    args = launch_parser.parse_args([*launch_args, "--module", module, *without(argv, from_argv)])
    if args.training_script != module:
        # accelerate would run it
        raise ConfigError(
            f"{args.training_script!r} is not the value of any argument; a YAML file is named with --config FILE."
        )
    refuse_deepspeed_launch(args.use_deepspeed, args.config_file)
    asked = asked_processes(args.num_processes, args.config_file)
    try:
        with patch_environment(**({ASKED_PROCESSES: asked} if asked else {})):
            launch_command(args)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def without(argv: list[str], part: list[str]) -> list[str]:
    """`argv` less an ordered part of it.

    ```python
    >>> without(["--r", "8", "--num_processes", "2", "--seed", "2"], ["--num_processes", "2"])
    ['--r', '8', '--seed', '2']
    ```
    """
    rest = list(part)
    kept = []
    for item in argv:
        if rest and item == rest[0]:
            rest.pop(0)
        else:
            kept.append(item)
    return kept


def accelerate_arguments(args: list[str]) -> list[str]:
    """Replace `--accelerate_config PATH|NAME` by accelerate's own `--config_file PATH`.

    Args:
        args (`list[str]`):
            Arguments for `accelerate launch`. A NAME is one of the configurations that this package ships (`multi_gpu`, ...).

    Raises:
        ConfigError: there is neither a file nor a shipped configuration of that name.
    """
    parser = argparse.ArgumentParser(prog="trl-sharelora", add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    known, rest = parser.parse_known_args(args)
    if known.accelerate_config is None:
        return rest
    path = Path(known.accelerate_config)
    if not path.is_file():
        shipped = shipped_configs()
        if known.accelerate_config not in shipped:
            raise ConfigError(
                f"--accelerate_config {known.accelerate_config}: there is no such file (looked for in {Path.cwd()}), and trl_sharelora "
                f"ships no configuration of that name; it ships {', '.join(sorted(shipped))}."
            )
        path = shipped[known.accelerate_config]
    return ["--config_file", str(path), *rest]


def shipped_configs() -> dict[str, Path]:
    """The accelerate configurations that come with this package, by name.

    In a wheel they lie inside the package, in a checkout beside it.
    """
    package = Path(__file__).parents[1]
    folders = (package / "accelerate_configs", package.parent / "accelerate_configs")
    folder = next((folder for folder in folders if (folder / "multi_gpu.yaml").is_file()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def check_known(args: list[str], *parsers: argparse.ArgumentParser) -> None:
    """Refuse arguments that no parser knows.

    Args:
        args (`list[str]`):
            What the script's own parser left over.
        parsers (`argparse.ArgumentParser`):
            The parser that left it, and that of `accelerate launch`.

    Raises:
        ConfigError: naming all of them, with the most similar argument that there is.
    """
    known = {"--accelerate_config"}.union(*(_options(parser) for parser in parsers))
    names = [item.split("=")[0] for item in args if item.startswith("--")]
    unknown = [name for name in names if name not in known and name.replace("-", "_") not in known]
    if unknown:
        raise ConfigError(
            f"Neither this script nor `accelerate launch` knows {', '.join(name + _similar(name, known) for name in unknown)}. Look "
            "at the spelling on the command line and in the YAML file; `-h` lists what the script takes."
        )


def _similar(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), [*known, "--config"], n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def flags_from_config(args: list[str], launch_parser: argparse.ArgumentParser) -> list[str]:
    """Arguments for `accelerate launch` that stood in a YAML file, `["--multi_gpu", "True"]`, as a command line has them.

    A flag takes no value there: accelerate would read the `True` as the script to run.
    """
    flags = {option for option, action in _options(launch_parser).items() if action.nargs == 0}
    result = []
    for name, value in zip(args[::2], args[1::2], strict=True):
        if name not in flags:
            result += [name, value]
        elif value == "True":
            result.append(name)
    return result


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    # argparse has no public list of a parser's options; TRL's own parser reads `_actions` too
    return {option: action for action in parser._actions for option in action.option_strings}


def refuse_deepspeed_launch(use_deepspeed: bool, config_file: str | None) -> None:
    """Refuse `accelerate launch` with DeepSpeed before it starts anything, or complains that DeepSpeed is not installed.

    Args:
        use_deepspeed (`bool`):
            From the command line or the training script's YAML file.
        config_file (`str`, *optional*):
            accelerate's own configuration.

    Raises:
        UnsupportedError: one of the two asks for DeepSpeed.
    """
    from ..trainers.user_arguments import deepspeed_message

    if use_deepspeed:
        raise UnsupportedError(deepspeed_message("--use_deepspeed"))
    if config_file is None:
        return
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(config_file)
    if str(config.distributed_type).endswith("DEEPSPEED"):
        raise UnsupportedError(deepspeed_message(f"distributed_type: DEEPSPEED in {config_file}"))


def asked_processes(num_processes: int | None, config_file: str | None) -> int | None:
    """How many processes somebody asked accelerate for; None if nobody did.

    Args:
        num_processes (`int`, *optional*):
            From the command line or the training script's YAML file.
        config_file (`str`, *optional*):
            accelerate's own configuration. Its number counts unless it says that the run is not distributed: TRL's
            `single_gpu.yaml` carries `num_processes: 8` and means one.
    """
    if num_processes is not None or config_file is None:
        return num_processes
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(config_file)
    return None if str(config.distributed_type).endswith("NO") else config.num_processes


def check_processes(started: int, leftover: list[str]) -> None:
    """Refuse to train on another number of processes than was asked for.

    `accelerate launch --cpu --num_processes 2` starts one process and says nothing, so does `--num_processes 2` on a machine
    with one GPU, and a `num_processes` in the YAML file is unknown to an `accelerate launch` that was typed by hand. Half the
    batch size asked for, or a fraction of the speed, would go unnoticed.

    Args:
        started (`int`):
            Processes of this run (`training_args.world_size`).
        leftover (`list[str]`):
            What the script's parser left over of its YAML file.

    Raises:
        ConfigError: the numbers differ.
    """
    in_yaml = dict(zip(leftover[::2], leftover[1::2], strict=True)).get("--num_processes")
    asked = os.environ.get(ASKED_PROCESSES) or os.environ.get("WORLD_SIZE") or in_yaml
    if (
        asked is None
        and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        and "MASTER_ADDR" in os.environ
    ):
        # accelerate's launcher of one process leaves an address behind if it was asked for several
        asked = "more than 1"
    if asked is not None and asked != str(started):
        raise ConfigError(
            f"{asked} processes were asked for, {started} started. `accelerate launch` starts one process on a CPU (without MPI) or "
            "with one visible GPU, whatever --num_processes says. On a CPU start them with `torchrun --nproc_per_node 2 -m "
            "trl_sharelora.scripts.reward --use_cpu ...`; on GPUs look at CUDA_VISIBLE_DEVICES; or ask for as many as "
            "there are (--num_processes, and num_processes in the YAML file)."
        )
