"""ShareLoraConfig: a PEFT config that also carries the users."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download, snapshot_download
from peft import PeftConfig

from ..errors import ConfigError
from ..users import USERS_FILE, UserRegistry
from .store import BANK_FOLDER, DTYPES


class ShareLoraType(StrEnum):
    """The name of this method in PEFT's mappings.

    `peft.PeftType` is a closed enum and PEFT has no plugin entry point (huggingface/peft#2273). A member of a str-enum
    of our own hashes and compares like the plain string, so the `"SHARELORA"` read from a JSON file finds it.
    """

    SHARELORA = "SHARELORA"


# what the users share -> the factor that is each user's own
# ("none": the bank of A holds the moves of both factors, side by side)
PERSONAL_FACTOR = {"B": "A", "A": "B", "AB": "C", "diagonal": "C", "none": "A"}
SHARE_FORMS = tuple(PERSONAL_FACTOR)
BANKS = ("auto", "resident", "ram", "mmap")
USER_STARTS = ("common", "independent")


@dataclass
class ShareLoraConfig(PeftConfig):
    """
    Configuration of [`ShareLoraModel`]: LoRA with one factor for everybody and one for each user.

    With the default `share="B"` a row of user u is computed as `W0 x + s * B (A_u x)`: the up-projection B is shared by all
    users, the down-projection A_u is the user's own (P-ShareLoRA, https://huggingface.co/papers/2503.19201, section 3
    and Algorithm 2). A_u is held as `A_0 + D_u`: the common start A_0 and the user's own move D_u, zero for a new user.

    Args:
        r (`int`, *optional*, defaults to `8`):
            Rank. 8 is LoRA's own default; the paper trains with 32.
        lora_alpha (`float`, *optional*, defaults to `8`):
            Numerator of the scaling `s = lora_alpha / r`; the paper uses 16 with rank 32.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout on the input of the adapter while training. TRL's `disable_dropout` leaves it alone.
        target_modules (`list[str]` or `str`, *optional*):
            Linear modules to adapt, as in [`~peft.LoraConfig`]. By default those PEFT adapts for the model's family
            (query and value projections for most).
        share (`str`, *optional*, defaults to `"B"`):
            What the users share. `"B"`: the up-projection, each user has an A_u (r, in), the paper's method. `"A"`: the
            down-projection, each user has a B_u (out, r), the paper's ablation. `"AB"`: both, each user has a core C_u
            (r, r). `"diagonal"`: both, each user has a diagonal (r,). These two are called 'kernel' and 'svd' in the
            authors' code; they are not in the paper and are what makes very many users affordable. `"none"`: nothing, each
            user has an A_u and a B_u, a LoRA of his own (the paper's LoRA-Local, all of them in one batch).
        train_common (`bool`, *optional*, defaults to `False`):
            Keep training the common start (A_0) beside the users' own moves. Off, as in the paper, where each A_u is
            trained by its own user only. On, what all users have in common is learned from all of their data, and a user
            with few comparisons stays close to it.
        init_users (`str`, *optional*, defaults to `"common"`):
            Where users start. `"common"`: all at A_0, D_u = 0 (the authors' code: all A_i equal at step 0). `"independent"`: each A_u
            a draw of its own (the paper's text), so that D_u = draw - A_0; an unseen user still gets A_0. For `share="B"` and
            `"none"`, whose B is zero at the start, so the model starts as its base in both cases.
        personal_head (`bool`, *optional*, defaults to `False`):
            For reward models: each user has a score head of his own, w_0 + d_u, and w_0 is trained only with `train_common`. Off:
            one trained head for all users, as in the authors' code. On, with `share="none"`, nothing at all is shared.
        users (`UserRegistry` or `list[str]`, *optional*):
            The users in row order. The trainers fill it in from the training data. Stored beside the adapter as
            `users.json`.
        num_users (`int`, *optional*):
            Their number; follows from `users`, and is what `adapter_config.json` keeps.
        trained_users (`int`, *optional*):
            How many of the first rows are of the training. [`~trl_sharelora.add_users`] notes it when users come after it, and the trainers set
            it back to None, which is all: those who were only fitted since are not what the next newcomer is expected to be like.
        bank (`str`, *optional*, defaults to `"auto"`):
            Where the users' own parameters live. `"resident"`: all users in memory as ordinary Parameters. `"ram"`,
            `"mmap"`: one record per user in memory or in files, and only the users of the steps at hand beside the base; the cost
            of a step does not depend on the number of users. `"auto"` takes the first of them that fits (weights, gradients
            and moments in 2 GiB; records in a quarter of the machine's memory).
        bank_slots (`int`, *optional*):
            Users at a time beside the base, for `"ram"` and `"mmap"`. By default as many as a step needs.
        bank_dtype (`str`, *optional*, defaults to `"float32"`):
            Of weights and first moments in the records: `"float32"`, or `"bfloat16"`, a third less space (docs/performance.md
            has what it costs). A step is always computed in float32.
        bank_second_moment (`str`, *optional*, defaults to `"full"`):
            `"full"`: Adam's second moment per weight. `"row"`: one per row of rank, almost a third less space.
        bank_dir (`str`, *optional*):
            Folder for the open file of `"mmap"` while training; removed at the end. The trainers take `output_dir`, elsewhere it is
            a temporary folder.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Scale by `lora_alpha / sqrt(r)` (https://huggingface.co/papers/2312.03732).
        init_lora_weights (`bool`, *optional*, defaults to `True`):
            Start as LoRA does: A_0 uniform within 1/sqrt(in), B zero, so the model starts as its base. The authors' code
            draws A on another scale by storing it transposed; this is the ordinary one. `False` draws B at random
            too, so that the adapter does something from the start (for tests).
        fan_in_fan_out (`bool`, *optional*, defaults to `False`):
            The base stores its weight as (in, out). Found by itself for GPT-2's `Conv1D`.
        exclude_modules (`list[str]` or `str`, *optional*):
            Modules not to adapt, as in [`~peft.LoraConfig`].
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the layers to adapt.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of layers, if it is not a usual one.
        modules_to_save (`list[str]`, *optional*):
            Modules trained in full, shared by all users and saved with the adapter. PEFT adds the head for
            `task_type="SEQ_CLS"`.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embedding is trained, shared by all users.

    Raises:
        ConfigError: for a value out of its range, naming it.
    """

    r: int = field(default=8, metadata={"help": "Rank. 8 is LoRA's own default; the paper trains with 32."})
    lora_alpha: float = field(
        default=8, metadata={"help": "Scaling is lora_alpha / r. The paper uses 16 with rank 32."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input while training."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Linear modules to adapt; by default those PEFT adapts for the model's family."},
    )
    share: Literal["B", "A", "AB", "diagonal", "none"] = field(
        default="B",
        metadata={
            "help": "What all users share: 'B' (the paper), 'A' (its ablation), 'AB' (personal core), 'diagonal', 'none' (a LoRA each)."
        },
    )
    train_common: bool = field(
        default=False,
        metadata={"help": "Keep training the common start A_0 beside the users' own moves. Off, as in the paper."},
    )
    init_users: Literal["common", "independent"] = field(
        default="common",
        metadata={
            "help": "Where users start: 'common', all at A_0 (the authors' code), or 'independent', each A_u a draw of its own (the "
            "paper's text)."
        },
    )
    personal_head: bool = field(
        default=False,
        metadata={"help": "Each user has a score head of his own. Off, one for all, as in the authors' code."},
    )
    users: Any = field(default=None, metadata={"help": "The users in row order; the trainers fill it in."})
    num_users: int | None = field(default=None, metadata={"help": "Number of users; follows from `users`."})
    trained_users: int | None = field(
        default=None,
        metadata={"help": "How many of the first rows are of the training; by default all. add_users notes it."},
    )
    bank: Literal["auto", "resident", "ram", "mmap"] = field(
        default="auto",
        metadata={
            "help": "Where the users' own parameters live: 'resident' (Parameters), 'ram', 'mmap' (records; a step costs the same for a "
            "million users), 'auto' the first that fits."
        },
    )
    bank_slots: int | None = field(
        default=None, metadata={"help": "Users at a time beside the base; by default as many as a step needs."}
    )
    bank_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of weights and first moments in the records. float32 loses nothing."}
    )
    bank_second_moment: Literal["full", "row"] = field(
        default="full", metadata={"help": "Adam's second moment per weight ('full') or per row of rank ('row')."}
    )
    bank_dir: str | None = field(default=None, metadata={"help": "Folder for the open file of bank='mmap'."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    init_lora_weights: bool = field(
        default=True, metadata={"help": "Start as LoRA does (B zero). False draws B at random, for tests."}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "The base stores its weight as (in, out)."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules not to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full, shared by all users, saved with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embedding is trained, shared by all users."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ShareLoraType.SHARELORA
        # of a model, not of the configuration: what saves its bank, and the folder of the bank that it shall load
        self.save_bank: Callable[[str], None] | None = None
        self.bank_source: str | None = None
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.share not in SHARE_FORMS:
            raise ConfigError(
                f"share={self.share!r} is unknown; one of {', '.join(map(repr, SHARE_FORMS))} is needed."
            )
        # bool is an int in Python; a rank of True is a mistake
        if isinstance(self.r, bool) or not isinstance(self.r, int) or not 0 < self.r <= 65536:
            raise ConfigError(f"r={self.r!r}; the rank is a whole number of at least 1 (the paper uses 32).")
        if not _is_number(self.lora_alpha) or not self.lora_alpha > 0:
            raise ConfigError(
                f"lora_alpha={self.lora_alpha!r}; a finite number above 0 is needed (the paper uses 16)."
            )
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout!r}; a probability in [0, 1) is needed.")
        for name, known in (
            ("bank", BANKS),
            ("bank_dtype", tuple(DTYPES)),
            ("bank_second_moment", ("full", "row")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is unknown; one of {', '.join(map(repr, known))} is needed."
                )
        if self.bank_slots is not None and (isinstance(self.bank_slots, bool) or not self.bank_slots >= 1):
            raise ConfigError(f"bank_slots={self.bank_slots!r}; a whole number of at least 1 is needed, or None.")
        if self.bank == "resident" and (self.bank_dtype, self.bank_second_moment, self.bank_slots) != (
            "float32",
            "full",
            None,
        ):
            raise ConfigError(
                "bank_dtype, bank_second_moment and bank_slots are for bank='ram' and 'mmap'; a resident bank is float32 Parameters. Leave "
                "them out, or choose a store."
            )
        if self.share == "none" and self.bank_second_moment == "row":
            raise ConfigError(
                "bank_second_moment='row' came with share='none': a row of rank would share one second moment between A and B, whose gradients "
                "are of different sizes. Use 'full'."
            )
        if self.trained_users is not None and (type(self.trained_users) is not int or self.trained_users < 0):
            raise ConfigError(
                f"trained_users={self.trained_users!r}; a number of rows, at least 0, or None is needed. Leave it out: add_users notes it."
            )
        if self.init_users not in USER_STARTS:
            raise ConfigError(
                f"init_users={self.init_users!r} is unknown; one of {', '.join(map(repr, USER_STARTS))} is needed."
            )
        if self.init_users == "independent" and self.share not in ("B", "none"):
            raise ConfigError(
                f"init_users='independent' came with share={self.share!r}. Only an A_u can be drawn at random and leave the model as its base "
                "is, because B is zero then: use share='B' or 'none', or init_users='common'."
            )
        for name, wanted in (("init_users", self.init_users == "independent"), ("personal_head", self.personal_head)):
            if wanted and self.bank in ("ram", "mmap"):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} came with bank={self.bank!r}; it is made for resident banks. Use bank='resident' (up to "
                    "some hundred users), or leave it out."
                )
        if self.personal_head and not str(self.task_type or "SEQ_CLS").endswith("SEQ_CLS"):
            raise ConfigError(
                f"personal_head=True came with task_type={self.task_type!r}; only a reward model has a score head. Leave it out."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern is set without layers_to_transform; give the layers, or leave both out.")
        self.set_users(self.users)

    def set_users(self, users: "UserRegistry | list[str] | None") -> None:
        """Give the config its users; `num_users` follows."""
        if users is not None:
            self.users = users if isinstance(users, UserRegistry) else UserRegistry(users)
            self.num_users = len(self.users)

    def __deepcopy__(self, memo: dict) -> "ShareLoraConfig":
        copied = copy.copy(self)
        copied.save_bank = None  # it would save the other model's bank
        for item in fields(self):
            setattr(copied, item.name, copy.deepcopy(getattr(self, item.name), memo))
        return copied

    @property
    def scaling(self) -> float:
        """The factor s of `s * B (A_u x)`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_dict(self) -> dict:
        """The fields as JSON-able values, without the users: they may be a million and have a file of their own."""
        values = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("users", "bank_dir")
        }
        if self.users is not None:
            values["num_users"] = len(self.users)
        return values

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write `adapter_config.json` and, beside it, `users.json` and the records of a bank in a store."""
        super().save_pretrained(save_directory, **kwargs)
        if self.users is not None:
            self.users.save(save_directory)
            # PEFT gives this method, and no other of ours, the directory an adapter is saved into
            if self.save_bank is not None:
                self.save_bank(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """Read `adapter_config.json` and `users.json` from a directory or the Hub.

        Raises:
            UserIdError: `users.json` is missing or torn.
            ConfigError: it names another number of users than the config, or the adapter is not a ShareLoRA one.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, cls):
            raise ConfigError(
                f"The adapter in {pretrained_model_name_or_path} has a {type(config).__name__}; one with a {cls.__name__} is needed."
            )
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        in_store = config.bank in ("ram", "mmap")
        if directory.is_dir():
            users = UserRegistry.load(directory)
            config.bank_source = str(directory) if in_store else None
        else:
            hub_kwargs, *_ = cls._split_kwargs(kwargs)
            if in_store:
                files = f"{subfolder}/{BANK_FOLDER}/*" if subfolder else f"{BANK_FOLDER}/*"
                snapshot = snapshot_download(pretrained_model_name_or_path, allow_patterns=files, **hub_kwargs)
                config.bank_source = str(Path(snapshot, subfolder or ""))
            users = UserRegistry.load(
                hf_hub_download(pretrained_model_name_or_path, USERS_FILE, subfolder=subfolder, **hub_kwargs)
            )
        if config.num_users != len(users):
            raise ConfigError(
                f"{USERS_FILE} names {len(users)} users, adapter_config.json {config.num_users}: the files are of two "
                "different saves. Copy the whole directory again."
            )
        config.set_users(users)
        return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
