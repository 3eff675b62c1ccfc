"""The programs behind `trl-sharelora`. Training scripts also run as `python -m trl_sharelora.scripts.<name>`.

They mirror TRL's (`trl/scripts/`) file for file: `make_parser()` and `main(...)`, heavy imports inside.
"""
