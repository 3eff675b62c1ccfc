"""The seams between this package's trainers and TRL's: checked when a trainer is made, not found out by a silent drift.

TRL promises its trainers' constructors and configs, not the methods a subclass overrides. An override whose parent was renamed
would never be called, and one whose parent was reshaped would fail somewhere in a training.
"""

import inspect
from importlib.metadata import version

from ..errors import UnsupportedError


def check_seams(trainer: type) -> None:
    """Compare the methods that a trainer overrides with those its TRL parent has.

    Args:
        trainer (`type`):
            A trainer class. Each of its classes may have `_seams`: name of an overridden method -> names of the parent's
            parameters, without `self`; `*args` where the parent takes any.

    Raises:
        UnsupportedError: TRL's method is not there or takes other parameters; names the method, both lists and the versions.
    """
    ours = [cls for cls in trainer.__mro__ if cls.__module__.startswith(__package__)]
    # a user's own subclass comes before them, TRL's trainer after
    parents = trainer.__mro__[trainer.__mro__.index(ours[-1]) + 1 :]
    for owner in ours:
        for name, expected in vars(owner).get("_seams", {}).items():
            parent = next((cls for cls in parents if name in vars(cls)), None)
            found = None
            if parent is not None:
                parameters = list(inspect.signature(vars(parent)[name]).parameters.values())[1:]
                found = [parameter.name for parameter in parameters]
                if {parameter.kind for parameter in parameters} == {
                    inspect.Parameter.VAR_POSITIONAL,
                    inspect.Parameter.VAR_KEYWORD,
                }:
                    continue  # it takes anything and hands it on
            # Trainer calls the dataset of its sampler `train_dataset`, RLOO and GRPO call it `dataset`
            if found != expected and not (name == "_get_train_sampler" and found == ["dataset"]):
                there = (
                    "it is not there"
                    if parent is None or found is None
                    else f"{parent.__name__}.{name} takes ({', '.join(found)})"
                )
                raise UnsupportedError(
                    f"{trainer.__name__} overrides {name}({', '.join(expected)}) of TRL {version('trl')}, but {there}. This release "
                    "of trl_sharelora is tested with the versions in constraints/tested.txt; install one of those (pip install "
                    f"'trl==1.16.0'), or a newer trl_sharelora."
                )
