"""`trl-sharelora subspace`: what the users of a saved adapter share, and whether one B for all of them is justified."""

import json
import math
import random
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from scipy.stats import binomtest

from ..demo.results import BLUE, DARK, GREY, plain_table
from ..errors import AdapterMismatchError, BankError, ConfigError, SubspaceError
from ..export import WEIGHTS_FILE
from ..sharelora.config import PERSONAL_FACTOR, ShareLoraConfig
from ..sharelora.layer import lora_factors
from ..sharelora.store import BANK_FOLDER, Layout, UserStore, moves_by_module, read_manifest
from ..subspace import (
    Spectrum,
    approximation_errors,
    personal_spectrum,
    principal_angles,
    rotation_null,
    spectrum,
)


# Users whose column spaces are their own are compared with chance, whose cost grows with the cube of users times rank;
# where all share one B, only r rows per user enter.
USERS_OWN, USERS_SHARED = 32, 1024
PAIRS = 100
# An observed share above all draws has a one-sided level of 1 % or 5 %; many columns scatter so little that 19 say as much.
DRAWS, FEW_DRAWS, MANY_COLUMNS = 99, 19, 512
# Of the way from unrelated users (0) to one common space (1). Ours: half of what could be gained is there. On the demo's 24
# made-up users (rank 8, all linear modules of two layers, one seed) separate adapters were 56 % of the way (50 % with independent
# starts), and with labels drawn at random 44 % (43 %): most of it is the base's doing. Hence --control.
CLEARLY = 0.5
# below, a sign test at 5 % cannot succeed: .5 to the fourth is .06
FEWEST_MODULES = 5
# Ours too: of the r directions, the share in effective use above which r may be too small, below which it is too large.
CROWDED, SPARSE = 0.75, 0.4
# Directions in the picture, in multiples of the rank.
SHOWN = 4
MOST_LINES = 12
WIDTH = 110


class SavedAdapter:
    """The users' factors of a saved ShareLoRA adapter, read a user at a time, without the base.

    Args:
        directory (`str` or `Path`):
            Where it was saved.

    Raises:
        ConfigError: there is no ShareLoRA adapter.
        AdapterMismatchError: a tensor is missing, or there are not as many rows as users.
        BankError: the bank is torn or of other users.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        if not (directory / "adapter_config.json").is_file():
            raise ConfigError(
                f"There is no adapter_config.json in {str(directory)!r}, so it is no adapter; give the output_dir of a training or one of "
                "its checkpoints."
            )
        self.config = ShareLoraConfig.from_pretrained(str(directory))
        path = directory / WEIGHTS_FILE
        if not path.is_file():
            raise AdapterMismatchError(
                f"No {WEIGHTS_FILE} in {directory}: the adapter's tensors are missing. Save it again."
            )
        self.file = safe_open(path, framework="pt")
        personal = PERSONAL_FACTOR[self.config.share]
        self.store: UserStore | None = None
        if self.config.bank in ("ram", "mmap"):
            manifest = read_manifest(directory / BANK_FOLDER)
            self.layout = Layout.from_json(manifest["layout"])
            # "mmap" whatever it was trained with: rows stay on the disk
            self.store = UserStore(self.layout, "mmap", self.config.users.registry_id)
            self.store.load(directory / BANK_FOLDER, len(self.config.users))
        self.shared: dict[str, dict[str, torch.Tensor]] = {}
        for key in self.file.keys():  # noqa: SIM118 (it is no dict)
            module, found, factor = key.removesuffix(".weight").rpartition(".sharelora_")
            if not found:
                continue
            factors = self.shared.setdefault(module, {})
            if factor != personal:
                factors[factor] = self.file.get_tensor(key)
            elif self.file.get_slice(key).get_shape()[0] != len(self.config.users):
                raise AdapterMismatchError(
                    f"{key} has {self.file.get_slice(key).get_shape()[0]} rows for {len(self.config.users)} users: the adapter's files "
                    "are of two different saves. Copy the whole directory again."
                )
        for module, factors in self.shared.items():
            missing = {"A", "B", "common"} - {personal} - set(factors)
            if missing:
                raise AdapterMismatchError(
                    f"{module} lacks {', '.join(sorted(missing))}; take the adapter's file from a backup."
                )
        if not self.shared:
            raise AdapterMismatchError(f"{path} holds no adapted module. Was it saved before the adapter was added?")

    def user_factors(self, module: str, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The user's update of a module as `(up, down)`, the scaling in `down`, so that a shared up is one tensor for all."""
        config, factors = self.config, self.shared[module]
        personal = PERSONAL_FACTOR[config.share]
        if self.store is None:
            move = self.file.get_slice(f"{module}.sharelora_{personal}.weight")[row]
        else:
            record = self.layout.split(self.store.read([row]))[1][0].float()
            move = moves_by_module(self.layout, record)[_short_name(module)]
        empty = factors["common"]  # stands for the factor that is personal, which is not read
        down, up = lora_factors(
            config.share, factors.get("A", empty), factors.get("B", empty), factors["common"], move
        )
        return up, config.scaling * down

    def start_of_up(self, module: str) -> torch.Tensor | None:
        """B_0, where all users' own ups started; None where the up is shared."""
        return {"A": self.shared[module]["common"], "none": self.shared[module].get("B")}.get(self.config.share)

    def close(self) -> None:
        """Let go of the bank's files."""
        if self.store is not None:
            self.store.close()


@dataclass(frozen=True)
class _Users:
    """The updates of some users in one module, read anew at each pass."""

    adapter: SavedAdapter
    module: str
    rows: list[int]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for row in self.rows:
            yield self.adapter.user_factors(self.module, row)


@dataclass
class Module:
    """What was found in one adapted module; shares are of squared Frobenius norms.

    Args:
        whole ([`~trl_sharelora.subspace.Spectrum`]), personal ([`~trl_sharelora.subspace.Spectrum`]):
            Of the users' updates, and of those less their mean.
        common (`float`):
            Share of the mean over users.
        chance (`torch.Tensor` of shape `(draws, directions)`, *optional*):
            Explained shares of users with unrelated column spaces.
        overlap (`list[float]`):
            Mean squared cosine of the principal angles of pairs of users; r/d1 by chance.
        angles (`list[float]`):
            Per pair the median principal angle, in degrees.
        outside (`float`, *optional*):
            Share of the updates outside the column space of the B all users started from.
    """

    whole: Spectrum
    personal: Spectrum
    common: float
    chance: torch.Tensor | None = None
    overlap: list[float] = field(default_factory=list)
    overlap_by_chance: float = math.nan
    angles: list[float] = field(default_factory=list)
    outside: float | None = None

    @property
    def squares(self) -> float:
        """Squared norm of all updates."""
        return float(self.whole.singular_values.double().square().sum())


def examine(adapter: SavedAdapter, rows: list[int], k: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Module]:
    """Take every adapted module apart; those without any update (all zero) are left out.

    Raises:
        SubspaceError: nothing was trained.
    """
    found = {}
    own_spaces = adapter.config.share in ("A", "none")
    for number, name in enumerate(adapter.shared):
        users = _Users(adapter, name, rows)
        whole = spectrum(users, dtype=dtype)
        if not whole.rank:
            continue
        module = Module(whole, *personal_spectrum(users, whole))
        if own_spaces:
            _compare(module, users, k, seed + number)
        start = adapter.start_of_up(name)
        if start is not None and bool(start.any()):
            frame = spectrum([start])
            errors = approximation_errors(users, frame.leading(frame.rank))
            module.outside = float(errors.sum()) / module.squares
        found[_short_name(name)] = module
    if not found:
        raise SubspaceError(
            "The updates of all users are zero in every module: this adapter has not been trained (B starts at zero). Give the "
            "output_dir of a finished training."
        )
    return found


def _compare(module: Module, users: _Users, k: int, seed: int) -> None:
    """The users' own column spaces, with each other and with chance."""
    frames: dict[int, torch.Tensor] = {}
    values = []
    for row, update in zip(users.rows, users, strict=True):
        own = spectrum([update])
        values.append(own.singular_values[: update[0].shape[1]])
        if own.rank:  # a user without comparisons has no space
            frames[row] = own.leading(own.rank)
    singular_values = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    d1 = len(module.whole.basis)
    draws = FEW_DRAWS if min(d1, singular_values.numel()) > MANY_COLUMNS else DRAWS
    # beyond k for the picture
    module.chance = rotation_null(singular_values, d1, SHOWN * max(k, users.adapter.config.r), draws, seed)
    pairs = list(combinations(sorted(frames), 2))
    if len(pairs) > PAIRS:
        pairs = random.Random(seed).sample(pairs, PAIRS)
    for one, other in pairs:
        angles = principal_angles(frames[one], frames[other])
        module.overlap.append(float(angles.cos().square().mean()))
        module.angles.append(math.degrees(float(angles.median())))
    # of a space of a dimensions and an unrelated one of b, in the coordinates of the smaller: max(a, b) / d1
    larger = [max(frames[one].shape[1], frames[other].shape[1]) for one, other in pairs]
    module.overlap_by_chance = sum(larger) / len(larger) / d1 if larger else math.nan


def explained_in_all(modules: list[Module], k: int, part: str = "whole") -> list[float]:
    """Explained share by rank, 1 to k, of all modules together: each with a space of its own, weighted by its squared norm."""
    total, sums = 0.0, torch.zeros(k, dtype=torch.float64)
    for module in modules:
        squares = getattr(module, part).singular_values.double().square()
        total += float(squares.sum())
        reached = squares[:k].cumsum(0)
        sums[: len(reached)] += reached
        sums[len(reached) :] += reached[-1]
    return (sums / total).clamp(max=1).tolist() if total else [math.nan] * k


def chance_in_all(modules: list[Module]) -> torch.Tensor | None:
    """`(draws, directions)` as `explained_in_all`, for unrelated users."""
    drawn = [(module.chance, module.squares) for module in modules if module.chance is not None]
    if not drawn:
        return None
    draws = min(len(chance) for chance, _ in drawn)
    total = sum(squares for _, squares in drawn)
    return torch.stack([chance[:draws] * (squares / total) for chance, squares in drawn]).sum(0)


def verdict(
    config: ShareLoraConfig, k: int, examined: dict[str, Module], control: dict[str, Module] | None = None
) -> dict[str, Any]:
    """Is sharing one B justified for this log? `answer` (yes, no, not clear, cannot be told), `why`, `evidence`.

    A run with a shared B has an aggregate of rank r by construction, so its spectrum cannot justify the sharing; nor can a spectrum
    of estimates stand for the true updates, which are unknown. What can be compared with chance are the column spaces of users
    who were fitted apart: with the same singular values and unrelated column spaces, how much would k directions explain?
    And, as gradients that pass through one base are alike whatever the labels say, with `control`, the same for labels at random.
    """
    r, modules = config.r, list(examined.values())
    explained = explained_in_all(modules, k)[k - 1]
    total = sum(module.squares for module in modules)
    common = sum(module.common * module.squares for module in modules) / total
    evidence = [
        f"{_percent(common)} of the updates' squared norm is the same for all users (their mean), {_percent(1 - common)} is personal."
    ]
    chance = chance_in_all(modules)
    if chance is None:
        used, own = (
            sum(getattr(module, part).effective_rank * module.squares for module in modules) / total
            for part in ("whole", "personal")
        )
        evidence.append(
            f"Of the r={r} directions of B the users' updates effectively use {used:.1f}, what is personal in them {own:.1f} (weighted mean "
            "over modules)."
        )
        if used > CROWDED * r:
            evidence.append(
                f"They are nearly evenly used (above {CROWDED:g} r), so r may be too small: see whether a larger one does better."
            )
        elif used < SPARSE * r:
            evidence.append(f"That is few (below {SPARSE:g} r); a smaller r would hold nearly the same.")
        return {
            "answer": "cannot be told",
            "why": "B was shared by construction, so the updates span r directions whatever the users are like. Train "
            "--method lora-local on the log and run this on it.",
            "evidence": evidence,
        }
    level = chance[:, k - 1]
    low, high = _interval(level)
    middle = float(level.mean())
    evidence.append(
        f"The first k={k} directions explain {_percent(explained)} of all users' updates; unrelated users of the same strengths would show "
        f"{_percent(middle)} ({_percent(low)} to {_percent(high)} in {len(level)} draws)."
    )
    overlap = [(sum(m.overlap) / len(m.overlap), m.overlap_by_chance) for m in modules if m.overlap]
    if overlap:
        mean, by_chance = (sum(column) / len(overlap) for column in zip(*overlap, strict=True))
        evidence.append(
            f"Two users' own column spaces overlap by {_percent(mean)} (mean squared cosine of their principal angles; by chance {_percent(by_chance)})."
        )
    if config.share == "A":
        evidence.append(
            "The users shared A; fitted with nothing shared (--method lora-local) they are more independent witnesses."
        )
    outside = [module.outside * module.squares for module in modules if module.outside is not None]
    if outside:
        evidence.append(
            f"{_percent(sum(outside) / total)} of the updates lie outside the column space of the B that all users started from."
        )
        answer = "cannot be told"
        why = (
            "All users started from one B that is not zero (a warm start, or --train_common), so their column spaces agree from the start. "
            "Train --method lora-local from scratch and run this on it."
        )
    elif middle > 1 - 1e-3:
        answer = "not clear"
        why = (
            f"k={k} directions would explain nearly everything of unrelated users too, so nothing can be seen. Choose a smaller --k, or take "
            "more users."
        )
    elif explained <= high:
        answer = "no"
        why = (
            "The users' column spaces are no closer to each other than chance makes them, so one B of rank k cannot hold them better than any "
            "other. (Or each has too few comparisons for his own adapter to show what they share.)"
        )
    else:
        way = (explained - middle) / (1 - middle)
        evidence.append(
            f"That is {_percent(way)} of the way from unrelated users to one space of k dimensions for all (from {CLEARLY:.0%} on: yes)."
        )
        answer = "yes" if way >= CLEARLY else "not clear"
        why = {
            "yes": "One B of rank k holds most of what separate adapters learned. (All were trained through the same base, which by itself "
            "draws column spaces together: this says that B can be shared, not that tastes agree.)",
            "not clear": "The users' column spaces are closer than chance, but one B of rank k would lose much of what they learned apart. "
            "Compare held-out accuracy of both, or try a larger k.",
        }[answer]
    if control is not None:
        both = list(examined)
        above = sum(examined[name].whole.explained(k) > control[name].whole.explained(k) for name in both)
        at_random = explained_in_all(list(control.values()), k)[k - 1]
        evidence.append(
            f"With labels at random (--control) k={k} directions explain {_percent(at_random)}; this log is above that in {above} of {len(both)} "
            "modules."
        )
        # a sign test: would a fair coin fall so often on one side? Of fewer modules it could not tell.
        if answer == "yes" and explained > at_random and len(both) < FEWEST_MODULES:
            evidence.append(
                f"{len(both)} modules are too few to tell that from chance ({FEWEST_MODULES} are needed); adapt more of them in both runs."
            )
        elif answer == "yes" and (
            explained <= at_random or binomtest(above, len(both), alternative="greater").pvalue > 0.05
        ):
            answer = "not clear"
            why = (
                "Users' column spaces are close, but labels drawn at random bring them as close: it is the base that draws them together, not "
                "what these users said."
            )
    return {"answer": answer, "why": why, "evidence": evidence}


def subspace(args: Namespace) -> dict[str, Any]:
    """Print spectra and verdict of a saved adapter; with `args.output_dir`, write `spectrum.json` and a picture.

    Args:
        args (`argparse.Namespace`):
            The arguments of `trl-sharelora subspace`.

    Returns:
        `dict`: What `spectrum.json` holds.

    Raises:
        SubspaceError: one user only, k above the rank of a module, or an untrained adapter.
        ConfigError: no ShareLoRA adapter, or an argument out of its range.
    """
    adapter = SavedAdapter(args.adapter)
    try:
        config = adapter.config
        rows = _some_users(config, args.users, args.seed)
        if args.k is not None and args.k < 1:
            raise ConfigError(f"--k {args.k} came; a rank of at least 1 is needed.")
        k = config.r if args.k is None else args.k
        modules = examine(adapter, rows, k, getattr(torch, args.dtype), args.seed)
        for name, module in modules.items():
            if args.k is not None and k > module.whole.rank:
                raise SubspaceError(
                    f"--k {k} came, but the updates of {len(rows)} users in {name} have rank {module.whole.rank}. Choose k <= "
                    f"{min(m.whole.rank for m in modules.values())}, the smallest rank of a module."
                )
        control = None if args.control is None else _examine_control(args, config, rows, k, set(modules))
        found = verdict(config, k, modules, control)
        report = _report(args, config, rows, k, modules, found, untrained=len(adapter.shared) - len(modules))
    except BankError as error:
        raise BankError(f"{args.adapter}: {error}") from error
    finally:
        adapter.close()
    _print(report)
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spectrum.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(f"\nAll numbers are in {folder / 'spectrum.json'}", end="")
        try:
            draw_picture(report, folder / "spectrum.png")
            print(f", a picture in {folder / 'spectrum.png'}")
        except ImportError:
            print("; for a picture install matplotlib: pip install 'trl-sharelora[report]'")
    return report


def _examine_control(
    args: Namespace, config: ShareLoraConfig, rows: list[int], k: int, names: set[str]
) -> dict[str, Module]:
    adapter = SavedAdapter(args.control)
    try:
        other = adapter.config
        if (other.share, other.r, other.scaling) != (config.share, config.r, config.scaling):
            raise ConfigError(
                f"--control has share={other.share!r}, r={other.r}, scaling {other.scaling:g}; the run has {config.share!r}, {config.r}, "
                f"{config.scaling:g}. Train it in the same way, with chosen and rejected changed at random."
            )
        # the same users, wherever their rows are
        same = sorted(other.users.index([config.users[row] for row in rows]))
        found = examine(adapter, same, k, getattr(torch, args.dtype), args.seed)
        if set(found) != names:
            other_names = sorted(set(found) ^ names)
            raise ConfigError(
                f"--control and the run do not have the same trained modules ({len(other_names)} are in one of them only: {other_names[0]}, "
                "...). Train it in the same way, with chosen and rejected changed at random."
            )
        return found
    finally:
        adapter.close()


def _some_users(config: ShareLoraConfig, wanted: int | None, seed: int) -> list[int]:
    # a forgotten user's row is nobody's
    rows = [row for row, user_id in enumerate(config.users) if user_id is not None]
    if len(rows) < 2:
        raise SubspaceError(
            f"The adapter has {len(rows)} user, who shares with nobody; a common subspace is one of several users. Give an adapter of "
            "two or more."
        )
    if wanted is not None and wanted < 2:
        raise ConfigError(f"--users {wanted} came; at least 2 users are needed to see what they share.")
    most = wanted or (USERS_OWN if config.share in ("A", "none") else USERS_SHARED)
    return sorted(random.Random(seed).sample(rows, most)) if most < len(rows) else rows


def _report(
    args: Namespace,
    config: ShareLoraConfig,
    rows: list[int],
    k: int,
    modules: dict[str, Module],
    answer: dict[str, Any],
    untrained: int,
) -> dict[str, Any]:
    """Everything that was found, as JSON."""
    found = list(modules.values())
    longest = max(module.whole.rank for module in found)
    chance = chance_in_all(found)
    total = sum(module.squares for module in found)
    return {
        "adapter": str(args.adapter),
        "share": config.share,
        "r": config.r,
        "k": k,
        "dtype": args.dtype,
        "seed": args.seed,
        "num_users": len(config.users),
        "users": len(rows),
        "modules_without_update": untrained,
        "verdict": answer,
        "all": {
            "explained": explained_in_all(found, longest),
            "explained_personal": explained_in_all(found, longest, "personal") if total else [],
            "common": sum(module.common * module.squares for module in found) / total,
            "chance": _chance(chance),
        },
        "modules": {name: _module_report(module, k) for name, module in modules.items()},
    }


def _module_report(module: Module, k: int) -> dict[str, Any]:
    whole, personal = module.whole, module.personal
    rank = whole.rank
    return {
        "d1": len(whole.basis),
        "rank": rank,
        "effective_rank": whole.effective_rank,
        "singular_values": whole.singular_values[:rank].tolist(),
        "explained": [whole.explained(j) for j in range(1, rank + 1)],
        # beyond the rank there is no k-th direction to be tied
        "tied_at_k": k <= rank and whole.tied(k),
        "common": module.common,
        "personal": {
            "rank": personal.rank,
            "effective_rank": personal.effective_rank,
            "singular_values": personal.singular_values[: personal.rank].tolist(),
            "explained": [personal.explained(j) for j in range(1, personal.rank + 1)],
        },
        "chance": _chance(module.chance),
        "overlap": None
        if not module.overlap
        else {
            "pairs": len(module.overlap),
            "mean": sum(module.overlap) / len(module.overlap),
            "by_chance": module.overlap_by_chance,
            "median_angle_degrees": sorted(module.angles)[len(module.angles) // 2],
        },
        "outside_start": module.outside,
    }


def _chance(draws: torch.Tensor | None) -> dict[str, Any] | None:
    if draws is None:
        return None
    ends = [_interval(column) for column in draws.T]
    return {
        "draws": len(draws),
        "mean": draws.mean(0).tolist(),
        "low": [low for low, _ in ends],
        "high": [high for _, high in ends],
    }


def _interval(draws: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest draw: chance stays below the largest of 99 with 99 %, of 19 with 95 %."""
    return float(draws.min()), float(draws.max())


def _short_name(module: str) -> str:
    return module.removeprefix("base_model.model.")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "-"


def _print(report: dict[str, Any]) -> None:
    k = report["k"]
    some = (
        f"{report['users']} of {report['num_users']}"
        if report["users"] < report["num_users"]
        else str(report["users"])
    )
    print(f"Updates of {some} users, share={report['share']!r}, r={report['r']}, in {len(report['modules'])} modules")
    if report["modules_without_update"]:
        print(f"({report['modules_without_update']} more modules have no update: they were not trained)")
    headings = ["\nmodule", "\nrank", "effective\nrank", f"explained\nby k={k}", "of the\npersonal part", "\ncommon"]
    own = report["all"]["chance"] is not None
    if own:
        headings += ["explained\nby chance", "overlap\nof pairs", "median\nangle"]

    def at_k(shares: list[float]) -> str:
        return _percent(shares[min(k, len(shares)) - 1]) if shares else "-"

    lines = []
    for name, module in report["modules"].items():
        line = [
            name if len(name) <= 44 else "..." + name[-41:],
            str(module["rank"]),
            f"{module['effective_rank']:.1f}",
            at_k(module["explained"]) + (" tie" if module["tied_at_k"] else ""),
            at_k(module["personal"]["explained"]),
            _percent(module["common"]),
        ]
        if own:
            overlap = module["overlap"] or {"mean": math.nan, "median_angle_degrees": math.nan}
            angle = overlap["median_angle_degrees"]
            line += [at_k(module["chance"]["mean"]), _percent(overlap["mean"])]
            line += [f"{angle:.0f}°" if math.isfinite(angle) else "-"]
        lines.append(line)
    if len(lines) > MOST_LINES:
        left = len(lines) - MOST_LINES
        lines = [
            *lines[: MOST_LINES // 2],
            [f"... {left} more", *[""] * (len(headings) - 1)],
            *lines[-MOST_LINES // 2 :],
        ]
    everything = report["all"]
    last = ["all modules", "", "", at_k(everything["explained"]), at_k(everything["explained_personal"])]
    last += [_percent(everything["common"])] + ([at_k(everything["chance"]["mean"]), "", ""] if own else [])
    print(plain_table(headings, lines, [last], 1))
    ties = [name for name, module in report["modules"].items() if module["tied_at_k"]]
    if ties:
        print(
            f"tie: directions k={k} and k+1 are equally strong in {len(ties)} module(s), so which k directions come first there is arbitrary"
        )
    answer = report["verdict"]
    print(f"\nIs sharing one B justified for this log? {answer['answer'].upper()}")
    print(textwrap.fill(answer["why"], WIDTH))
    for line in answer["evidence"]:
        print(textwrap.fill(f"- {line}", WIDTH, subsequent_indent="  "))
    print("(The users' true updates are unknown: these are spectra of estimates.)")


def draw_picture(report: dict[str, Any], path: Path) -> None:
    """One PNG: explained share by number of directions, and per module what is common and what is personal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # a Figure of its own, so that nobody's pyplot state or backend is touched
    figure = Figure(figsize=(10, 4.6), dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_spectra(left, report)
    _draw_modules(right, report)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    answer = f"Is sharing one B justified for this log? {report['verdict']['answer'].capitalize()}"
    figure.text(0.02, 0.965, answer, va="top", fontsize=13, fontweight="bold", color=DARK)
    subtitle = f"{report['users']} users, {len(report['modules'])} modules, share={report['share']!r}, r={report['r']}"
    figure.text(0.02, 0.895, subtitle, va="top", fontsize=9.5, color="#5f6368")
    figure.tight_layout(rect=(0, 0, 1, 0.87))
    figure.savefig(path)


def _draw_spectra(axes: Any, report: dict[str, Any]) -> None:
    everything, chance = report["all"], report["all"]["chance"]

    def line(shares: list[float], **style: Any) -> None:
        axes.plot(range(len(shares) + 1), [0, *(100 * share for share in shares)], **style)

    for number, module in enumerate(report["modules"].values()):
        line(module["explained"], color=BLUE, alpha=0.18, linewidth=0.8, label=None if number else "a module")
    line(everything["explained"], color=BLUE, linewidth=2.2, label="all users' updates")
    if any(share == share for share in everything["explained_personal"]):
        line(everything["explained_personal"], color=DARK, linewidth=1.5, linestyle="--", label="less their mean")
    if chance is not None:
        places = range(1, len(chance["mean"]) + 1)
        ends = [[100 * share for share in chance[end]] for end in ("low", "high")]
        axes.fill_between(places, *ends, color=GREY, alpha=0.5, linewidth=0)
        line(chance["mean"], color=GREY, linewidth=1.8, label="unrelated users")
    axes.axvline(report["k"], color="#dadce0", linewidth=1, zorder=0)
    axes.text(report["k"], 101, f"k={report['k']}", ha="center", va="bottom", fontsize=8.5, color="#5f6368")
    axes.set_xlim(0, min(len(everything["explained"]), SHOWN * max(report["k"], report["r"])))
    axes.set_ylim(0, 100.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e8eaed", linewidth=1)
    axes.set_xlabel("directions of the output space", fontsize=9)
    axes.set_ylabel("explained, % of squared norm", fontsize=9)
    axes.legend(loc="lower right", frameon=False, fontsize=9)


def _draw_modules(axes: Any, report: dict[str, Any]) -> None:
    modules = report["modules"]
    common = [100 * module["common"] for module in modules.values()]
    places = list(range(len(common)))
    axes.barh(places, common, color=GREY, height=0.8, label="common to all users")
    axes.barh(
        places, [100 - share for share in common], left=common, color=BLUE, alpha=0.75, height=0.8, label="personal"
    )
    if len(places) <= 16:
        axes.set_yticks(places, [name if len(name) <= 26 else "..." + name[-23:] for name in modules], fontsize=7.5)
        axes.tick_params(axis="y", length=0)
    else:
        axes.set_ylabel("module, in the model's order", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of squared norm", fontsize=9)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, frameon=False, fontsize=9)
