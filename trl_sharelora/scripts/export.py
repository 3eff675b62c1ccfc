"""`trl-sharelora export`: one user as a plain PEFT LoRA."""

from argparse import Namespace

from ..export import export_user


def export(args: Namespace) -> None:
    """Write the user `args.user` of the adapter in `args.adapter` to `args.output_dir`."""
    print(f"A plain LoRA, loadable without this package, in {export_user(args.adapter, args.user, args.output_dir)}")
