"""Forget a user of a saved adapter: his row becomes zeros, where it lies, and his id leaves the list of users.

Everybody else keeps his row and stays bit-identical. The bytes go first and the id last, so what was cut off is done again by
calling once more. The shared factors have learned from him too, as from everybody; that cannot be taken back without training anew.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from .confidence import forget_in_confidence
from .errors import AdapterMismatchError, UnknownUserError
from .export import HEAD_MOVES, WEIGHTS_FILE
from .sharelora.config import PERSONAL_FACTOR, ShareLoraConfig
from .sharelora.store import BANK_FOLDER, clear_working_folders, erase_row
from .users import USERS_FILE, UserRegistry


OPTIMIZER_FILE = "optimizer.pt"


def forget_user(model_dir: str | os.PathLike, user_id: str) -> Path:
    """Forget one user of a saved adapter and of the checkpoints beside it; reads and writes no other user's row.

    Args:
        model_dir (`str` or `os.PathLike`):
            The directory of a saved adapter, or the `output_dir` of a training: its `checkpoint-*` are seen to as well. Copies
            elsewhere (exports, backups, the Hub) are not.
        user_id (`str`):
            Whom.

    Returns:
        `Path`: `model_dir`.

    Raises:
        UnknownUserError: nobody there has this id; nothing is written.
        AdapterMismatchError: the adapter's tensors are missing, or there are not as many rows as users; nothing is written.
        BankError: the bank is torn.
        BankBusyError: a training is writing into `model_dir`; nothing is written.

    Example:

    ```python
    forget_user("rm", "ann")
    ```
    """
    model_dir = Path(model_dir)
    folders = [model_dir, *sorted(model_dir.glob("checkpoint-*"))]
    folders += [folder / "ref" for folder in folders]  # the reference of a policy that was trained further
    registries = {folder: UserRegistry.load(folder) for folder in folders if (folder / USERS_FILE).is_file()}
    if not registries:
        registries = {model_dir: UserRegistry.load(model_dir)}  # says what is missing
    # a call that was cut off may have done with some of the folders
    rows = {folder: registry.find([user_id])[0] for folder, registry in registries.items()}
    known = [folder for folder, row in rows.items() if row >= 0]
    if not known:
        raise UnknownUserError(next(iter(registries.values())).unknown_message([str(user_id)]))
    configs = {folder: ShareLoraConfig.from_pretrained(str(folder)) for folder in known}
    tensors = {
        folder: _bank_tensors(folder, configs[folder])
        for folder in known
        if configs[folder].bank not in ("ram", "mmap")
    }
    clear_working_folders(model_dir / "_working-bank")  # what a killed run has left there
    for folder in known:
        if folder in tensors:
            _erase_resident(folder / WEIGHTS_FILE, tensors[folder], rows[folder])
        else:
            erase_row(folder / BANK_FOLDER, rows[folder])
        _erase_moments(folder / OPTIMIZER_FILE, rows[folder], len(registries[folder]))
        forget_in_confidence(folder, rows[folder])
    for folder in known:
        registries[folder].registry_id  # noqa: B018  made from the ids, if an older file has none: before one is gone
        registries[folder].forget(user_id)
        registries[folder].save(folder)
    return model_dir


def _bank_tensors(folder: Path, config: ShareLoraConfig) -> list[tuple[int, int]]:
    """Where the banks of a resident adapter lie in its file: start and bytes of a row of each."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterMismatchError(
            f"No {WEIGHTS_FILE} in {folder}: the adapter's tensors are missing, or not in safetensors. Save it again with "
            "save_pretrained."
        )
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if length <= path.stat().st_size else b"")
        except ValueError as error:
            raise AdapterMismatchError(
                f"{path} is not a safetensors file ({error}): torn. Take it from a backup."
            ) from None
    found = []
    for name, tensor in header.items():
        own_head = config.personal_head and name.endswith(HEAD_MOVES)
        if own_head or name.endswith(f".sharelora_{PERSONAL_FACTOR[config.share]}.weight"):
            users, (start, end) = tensor["shape"][0], tensor["data_offsets"]
            if users != len(config.users):
                raise AdapterMismatchError(
                    f"{name} in {path} has {users} rows for {len(config.users)} users: the adapter's files are of two different saves. "
                    "Copy the whole directory again."
                )
            found.append((8 + length + start, (end - start) // users))
    if not found:
        raise AdapterMismatchError(
            f"{path} has no users' rows (sharelora_{PERSONAL_FACTOR[config.share]}) although {folder / 'adapter_config.json'} says "
            f"share={config.share!r}, bank={config.bank!r}. The files are of two different saves: copy the whole directory again."
        )
    return found


def _erase_resident(path: Path, tensors: list[tuple[int, int]], row: int) -> None:
    with open(path, "r+b") as file:
        for start, size in tensors:
            file.seek(start + row * size)
            file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())


def _erase_moments(path: Path, row: int, users: int) -> None:
    """The user's moments in a checkpoint of a resident bank. A file of its own, and of the size of the bank: written anew."""
    if not path.is_file():
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    erased = False
    for moments in state["state"].values():
        step: Any = moments.get("step")
        # only the users' rows have a step count each
        if isinstance(step, torch.Tensor) and step.shape == (users,):
            for tensor in moments.values():
                tensor[row] = 0
            erased = True
    if erased:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
