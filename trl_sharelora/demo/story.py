"""How the demo talks: numbered stages with their times, and libraries that keep quiet meanwhile."""

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator


class Story:
    """Tells what is being done: numbered stages, and how long each took."""

    def __init__(self) -> None:
        self.stages = 0

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[None]:
        self.stages += 1
        print(f"\n{self.stages}. {title}", flush=True)
        start = time.monotonic()
        yield
        self.say(f"({time.monotonic() - start:.1f} s)")

    def say(self, text: str) -> None:
        print(f"   {text}", flush=True)


@contextlib.contextmanager
def quiet(made_up: bool) -> Iterator[None]:
    """Keep the libraries' progress bars and known warnings out of the story, and put everything back afterwards.

    Args:
        made_up (`bool`):
            Nothing outside this machine is needed: no hub is asked, and one thread computes (with tiny matrices a second one
            costs more than it brings).
    """
    import datasets
    import huggingface_hub.constants as hub
    import torch
    from transformers.utils import logging as transformers_logging

    logs = [logging.getLogger(name) for name in ("matplotlib.font_manager", "trl_sharelora.evaluation")]
    levels, verbosity = [log.level for log in logs], transformers_logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    threads, offline = torch.get_num_threads(), hub.HF_HUB_OFFLINE
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if not made_up:
        environment["CUDA_VISIBLE_DEVICES"] = "0"  # one process cannot use several (TRL refuses nn.DataParallel)
    added = {name: value for name, value in environment.items() if name not in os.environ}
    try:
        os.environ.update(added)
        for log in logs:
            log.setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
        if made_up:
            hub.HF_HUB_OFFLINE = True
            torch.set_num_threads(1)
        with warnings.catch_warnings():
            # TRL and PEFT still use transformers' old name of activation checkpointing; nothing a reader here could change
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # an id in a script the font lacks
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars[1]:
            transformers_logging.enable_progress_bar()
        if not bars[0]:
            datasets.enable_progress_bars()
        hub.HF_HUB_OFFLINE = offline
        torch.set_num_threads(threads)
