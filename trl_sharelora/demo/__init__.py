"""The demo: does a reward model with a part of each user's own serve users better than one for everybody?

`generator` makes users with known tastes and their preference log, `base_model` a small language model, `run` trains both reward
models and tells the story, `results` makes the table and the picture. `trl-sharelora demo` runs it, also on one's own data.
"""

from .run import main


__all__ = ["main"]
