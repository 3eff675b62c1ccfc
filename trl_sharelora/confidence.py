"""What the comparisons have told about a reward model: confidence sets, fitted in one pass and kept beside the adapter.

The sets themselves are in pessimism.py; here is what connects them with a model and with files.
"""

import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .data import check_preference_rows, tokenize_preference
from .errors import ConfigError, DataError, NonFiniteError, PessimismError, UnsupportedError, some_rows
from .pessimism import (
    EllipsoidBuilder,
    EllipsoidSets,
    bootstrap_heads,
)
from .scoring import SKETCH_SIZE, CountSketch, Scorer, check_known, load_reward_model


logger = logging.getLogger(__name__)

PARAMETERS = ("last_layer", "own_factor", "base")
# Of the base's features, which are the same for all users: what one user compared tells of all. Calibrated, .03 and .1 did alike and
# better than 0 on six seeds (docs/log.md).
BASE_DISCOUNT = 0.03
KINDS = ("ellipsoid", "heads")
CONFIDENCE_FOLDER = "confidence"
VERSION = 1


def fit_confidence(
    model_or_path: PeftModel | str | os.PathLike,
    dataset: Dataset,
    processing_class: Any = None,
    kind: str = "ellipsoid",
    *,
    user_column: str = "user_id",
    batch_size: int = 16,
    max_length: int | None = None,
    ridge: float | None = None,
    pooled_discount: float | None = None,
    members: int = 5,
    seed: int = 0,
    parameters: str = "last_layer",
    save: bool = True,
    output_dir: str | os.PathLike | None = None,
    **loading: Any,
) -> EllipsoidSets | torch.Tensor:
    """What the training comparisons have told about the reward: one pass over them, kept beside the adapter.

    Run it after training, with the data of the training (`trl-sharelora reward --confidence ellipsoid` does). The
    features are those of the model as it is now: after more training, run it again.

    Args:
        model_or_path ([`~peft.PeftModel`], `str` or `os.PathLike`):
            A ShareLoRA reward model, or where it was saved.
        dataset ([`~datasets.Dataset`]):
            The comparisons it was trained on; see [`~trl_sharelora.data.check_preference_rows`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; by default the one saved with the adapter.
        kind (`str`, *optional*, defaults to `"ellipsoid"`):
            `"ellipsoid"`, or `"heads"`: an ensemble of score heads, each fitted to a bootstrap sample of the
            comparisons.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        batch_size (`int`, *optional*, defaults to 16):
            Sequences per forward.
        max_length (`int`, *optional*):
            Comparisons with a longer text are left out and counted in the log, as in training.
        ridge (`float`, *optional*), pooled_discount (`float`, *optional*):
            Of the ellipsoids (and the ridge of the heads), see [`~trl_sharelora.pessimism.EllipsoidBuilder`]; by
            default its own, and a discount of 0.03 for `parameters="base"` (measured, docs/log.md).
        members (`int`, *optional*, defaults to 5):
            Number of heads; https://huggingface.co/papers/2310.02743 finds 4 to 5 enough.
        seed (`int`, *optional*, defaults to 0):
            Of the bootstrap samples.
        parameters (`str`, *optional*, defaults to `"last_layer"`):
            Features of the ellipsoids, see [`UserReward`].
        save (`bool`, *optional*, defaults to `True`):
            Write the sets into `confidence/` of the adapter's directory. A model in memory needs `output_dir` for that
            and is not saved without.
        output_dir (`str` or `os.PathLike`, *optional*):
            The adapter's directory, if it is not `model_or_path`.
        **loading:
            See [`load_reward_model`].

    Returns:
        [`~trl_sharelora.pessimism.EllipsoidSets`], or `torch.Tensor` `(members, d)` for heads.

    Raises:
        ConfigError, DataError, UserIdError, UnknownUserError: Before any forward.
        NonFiniteError: A feature is NaN or infinite; names the users.
    """
    check_known("kind", kind, KINDS)
    check_known("parameters", parameters, PARAMETERS)
    scorer, path = _open(model_or_path, processing_class, batch_size, loading)
    directory = os.fspath(output_dir) if output_dir is not None else path
    if save and path is not None and directory is not None and not Path(directory).is_dir():
        raise ConfigError(
            f"{directory!r} is no directory here, so nothing can be saved in it; give output_dir=... or save=False."
        )
    if kind == "heads" and parameters != "last_layer":
        raise ConfigError(f"Heads stand on the last layer; parameters={parameters!r} is for kind='ellipsoid'.")
    settings: dict[str, Any] = {"parameters": parameters, "sketch_size": SKETCH_SIZE, "sketch_seed": 0}
    chosen_options = {"ridge": ridge, "pooled_discount": pooled_discount}
    if parameters == "base" and pooled_discount is None:
        chosen_options["pooled_discount"] = BASE_DISCOUNT
    options: dict[str, Any] = {name: value for name, value in chosen_options.items() if value is not None}
    # index (n,), chosen (n, d), rejected (n, d) of some comparisons at a time
    pieces = _features_of(scorer, dataset, user_column, max_length, parameters, CountSketch())
    sets: EllipsoidSets | torch.Tensor
    if kind == "ellipsoid":
        size = SKETCH_SIZE if parameters == "own_factor" else scorer.head().in_features
        builder = EllipsoidBuilder(size, len(scorer.users), **options)
        for index, chosen, rejected in pieces:
            builder.add(index, chosen, rejected)
        sets = builder.finish()
    else:
        found = [(index, chosen - rejected) for index, chosen, rejected in pieces]
        users, differences = (torch.cat(part) for part in zip(*found, strict=True))
        options.pop("pooled_discount", None)
        if scorer.config.personal_head:
            raise UnsupportedError(
                "An ensemble of score heads came with personal_head=True, where each user has a head of his own. Use kind='ellipsoid'."
            )
        head = scorer.head().weight.detach().float().squeeze(0).cpu()
        sets = bootstrap_heads(differences, head, members=members, seed=seed, user_index=users, **options)
        settings |= {"members": members, "seed": seed}
    if save and directory is not None:
        _save_sets(directory, kind, sets, settings, scorer)
    return sets


def add_comparisons(
    model_or_path: PeftModel | str | os.PathLike,
    dataset: Dataset,
    processing_class: Any = None,
    *,
    sets: EllipsoidSets | None = None,
    user_column: str = "user_id",
    batch_size: int = 16,
    max_length: int | None = None,
    parameters: str = "last_layer",
    output_dir: str | os.PathLike | None = None,
    **loading: Any,
) -> EllipsoidSets:
    """Count new comparisons of some users, without a pass over the others'; a user's ellipsoid never widens by it.

    The model stays as it is. Users who were added after [`fit_confidence`] get their first. Nothing remembers which comparisons were
    counted: the same ones again would be counted twice.

    Args:
        model_or_path ([`~peft.PeftModel`], `str` or `os.PathLike`):
            As in [`fit_confidence`]; a saved one's ellipsoids are saved again.
        dataset ([`~datasets.Dataset`]):
            The new comparisons only.
        sets ([`~trl_sharelora.pessimism.EllipsoidSets`], *optional*):
            Of a model in memory; changed in place. By default those saved with the adapter.
        parameters (`str`, *optional*, defaults to `"last_layer"`):
            What `sets` are of; saved ones know.
        processing_class, user_column, batch_size, max_length, output_dir, **loading:
            As in [`fit_confidence`].

    Raises:
        PessimismError: There are no ellipsoids, or those of another adapter.
    """
    scorer, path = _open(model_or_path, processing_class, batch_size, loading)
    directory = os.fspath(output_dir) if output_dir is not None else path
    settings: dict[str, Any] = {"parameters": parameters, "sketch_size": SKETCH_SIZE, "sketch_seed": 0}
    if sets is None:
        sets, settings = load_sets(directory, "ellipsoid", scorer)
    assert sets is not None
    sketch = CountSketch(settings["sketch_size"], settings["sketch_seed"])
    for index, chosen, rejected in _features_of(
        scorer, dataset, user_column, max_length, settings["parameters"], sketch
    ):
        sets.add_comparisons(index, chosen - rejected)
    if directory is not None:
        _save_sets(directory, "ellipsoid", sets, settings, scorer)
    return sets


def _open(
    model_or_path: Any, processing_class: Any, batch_size: int, loading: dict[str, Any]
) -> tuple[Scorer, str | None]:
    path = None
    if isinstance(model_or_path, str | os.PathLike):
        path = os.fspath(model_or_path)
        model_or_path, processing_class = load_reward_model(path, processing_class, **loading)
    return Scorer(model_or_path, processing_class, batch_size), path


def _features_of(
    scorer: Scorer, dataset: Dataset, user_column: str, max_length: int | None, parameters: str, sketch: CountSketch
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`(user_index, features of chosen, features of rejected)` on the CPU, some batches of the dataset at a time."""
    check_preference_rows(dataset, user_column, name="confidence", users=scorer.users)
    dataset = dataset.with_format(None)
    ids = scorer.users.names(dataset[user_column][:])
    all_index = torch.tensor(scorer.users.index(ids))
    step = 32 * scorer.batch_size  # enough to put rows of a length together
    dropped = 0
    for start in range(0, len(dataset), step):
        rows = dataset.select(range(start, min(start + step, len(dataset))))
        pairs = [tokenize_preference(row, scorer.processing_class) for row in rows]
        longest = [max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]
        kept = [row for row, length in enumerate(longest) if max_length is None or length <= max_length]
        dropped += len(pairs) - len(kept)
        if scorer.positions is not None and any(longest[row] > scorer.positions for row in kept):
            long = [start + row for row in kept if longest[row] > scorer.positions]
            raise DataError(
                f"Comparisons have more tokens than the model has positions ({scorer.positions}): {some_rows(long)}. Give max_length, as in "
                "training, to leave them out."
            )
        if not kept:
            continue
        index = all_index[start:][kept]
        sequences = [pairs[row][side] for side in ("chosen_ids", "rejected_ids") for row in kept]
        _, features = scorer.rewards_and_features(sequences, index.repeat(2), parameters, sketch)
        features = features.cpu()
        bad = (~features.isfinite().all(1)).reshape(2, -1).any(0)
        if bool(bad.any()):
            users = list(dict.fromkeys(ids[start + kept[row]] for row in bad.nonzero().flatten().tolist()))
            raise NonFiniteError(
                f"The features of {int(bad.sum())} comparisons are NaN or infinite: user(s) {', '.join(map(repr, users[:5]))}. Their "
                "training has diverged, or the base's dtype overflows; go back to an earlier checkpoint."
            )
        yield index, features[: len(kept)], features[len(kept) :]
    if dropped:
        logger.warning(
            f"{dropped} of {len(dataset)} comparisons are longer than max_length={max_length} and are left out."
        )
    if dropped == len(dataset):
        raise DataError(f"All {len(dataset)} comparisons are longer than max_length={max_length} tokens; raise it.")


def _save_sets(directory: str, kind: str, sets: Any, settings: dict[str, Any], scorer: Scorer) -> None:
    tensors = {"heads": sets} if kind == "heads" else sets.tensors()
    tensors = {f"set.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = {
        **settings,
        "version": VERSION,
        "registry_id": scorer.users.registry_id,
        "num_users": len(scorer.users),
        "model": scorer.fingerprint(),
        "set": {} if kind == "heads" else sets.settings(),
    }
    folder = Path(directory, CONFIDENCE_FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    _write_sets(folder, kind, tensors, content)


def _write_sets(folder: Path, kind: str, tensors: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
    """Tensors, then the settings, each whole or not at all; a token in both says that they belong together."""
    if os.environ.get("RANK", "0") != "0":
        return  # every process of a launched script gets here with the same sets
    token = uuid.uuid4().hex
    temporary = folder / f"{kind}.{token}.tmp"
    save_file(tensors, temporary, metadata={"token": token})
    os.replace(temporary, folder / f"{kind}.safetensors")
    temporary = folder / f"{kind}.{token}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({**content, "token": token}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / f"{kind}.json")


def forget_in_confidence(directory: str | os.PathLike, row: int) -> bool:
    """Drop a user's own comparisons from the saved ellipsoids of an adapter; the other users' stay as they are.

    Args:
        directory (`str` or `os.PathLike`):
            Of the adapter.
        row (`int`):
            The user's row of the bank.

    Returns:
        `bool`: whether there were ellipsoids.
    """
    folder = Path(directory, CONFIDENCE_FOLDER)
    if not (folder / "ellipsoid.json").is_file():
        return False
    content = json.loads((folder / "ellipsoid.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "ellipsoid.safetensors")
    inner = {name.removeprefix("set."): tensor for name, tensor in tensors.items() if name.startswith("set.")}
    sets = EllipsoidSets.from_tensors(inner, content["set"])
    if row < sets.num_users:
        sets.remove(row)
        changed = {f"set.{name}": tensor.contiguous() for name, tensor in sets.tensors().items()}
        _write_sets(folder, "ellipsoid", tensors | changed, content)
    return True


def load_sets(directory: str | None, kind: str, scorer: Scorer) -> tuple[Any, dict[str, Any]]:
    """The sets of an adapter and their settings.

    Raises:
        PessimismError: never fitted, torn, of another registry or of other weights.
    """
    remedy = (
        f"Fit them to the training comparisons: fit_confidence({repr(directory) if directory else 'model'}, train_dataset, "
        f"kind={kind!r}), or train with "
        f"`trl-sharelora reward --confidence {kind}`."
    )
    what = "ellipsoids" if kind == "ellipsoid" else "ensemble of heads"
    if directory is None:
        raise PessimismError(f"A model in memory came without its {what}. {remedy} Give what it returns as sets=... .")
    folder = Path(directory, CONFIDENCE_FOLDER)
    if not Path(directory).is_dir():
        folder = _from_hub(directory, kind) or folder
    if not (folder / f"{kind}.json").is_file():
        raise PessimismError(
            f"There are no {what} in {str(folder)!r}: they were never fitted for this adapter. {remedy}"
        )
    try:
        settings = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        with safe_open(folder / f"{kind}.safetensors", "pt") as file:
            token = (file.metadata() or {}).get("token")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if settings["version"] != VERSION or token != settings["token"]:
            raise ValueError(f"version {settings['version']}, tokens {token!r} and {settings['token']!r}")
        registry_id, num_users = settings["registry_id"], settings["num_users"]
        inner = {name.removeprefix("set."): tensor for name, tensor in tensors.items() if name.startswith("set.")}
        sets = inner["heads"] if kind == "heads" else EllipsoidSets.from_tensors(inner, settings["set"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PessimismError(
            f"The {what} in {str(folder)!r} are torn, or of two different saves ({error!r}). {remedy}"
        ) from error
    if registry_id != scorer.users.registry_id or num_users > len(scorer.users):
        raise PessimismError(
            f"The {what} in {str(folder)!r} are of another list of users ({num_users} users; the adapter has {len(scorer.users)}), so their "
            f"rows would be of the wrong users. {remedy}"
        )
    if settings["model"] != scorer.fingerprint():
        raise PessimismError(
            f"The {what} in {str(folder)!r} were fitted to other weights: the adapter was trained on since, and its features are others "
            f"now. {remedy}"
        )
    return sets, settings


def _from_hub(repo_id: str, kind: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=f"{CONFIDENCE_FOLDER}/{kind}.*"), CONFIDENCE_FOLDER)
    except (OSError, ValueError):
        return None
