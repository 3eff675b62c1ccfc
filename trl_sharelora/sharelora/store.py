"""Where the users' rows rest: one record per user, all modules of a user side by side, in memory or in files.

A record is a user's whole life: his moves D_u of all modules, their first and second moments, and his own step count. One
record is one read, one write, one copy to the device.

Files ("segments") are written once and then never changed, except to forget a user:

    rows-000003-9f2c61aa.safetensors     records (n, bytes of a record) uint8, rows (n,) int64, crc32 (n,) uint32
    bank.json                            the list of segments in order, the layout, whose users they are; written last

A later segment overrules an earlier one, so a checkpoint is *one new segment with the users who changed* and hard links to the
earlier ones: a million users are not copied to save eight. While training, users who changed since the last checkpoint live in
memory (`ram`) or in one open segment (`mmap`), which a crash simply leaves behind. When less than half of the records are
still in force, what is in force of the emptiest segments moves into the new one; when there are 64 segments, the smallest do.
A record has a checksum, and so has a segment's list of rows (in its safetensors metadata): nobody gets another's row.

Why not one sparse file with a fixed place per user: it could only be copied to be kept, it turns into terabytes when it is
copied, archived or uploaded by a tool that does not know of holes, and a full disk under a memory map is a SIGBUS instead of an error.
Files are read with `pread`, so they add nothing to the resident memory.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import BankBusyError, BankError, BankFullError, CapacityError


BANK_FOLDER = "bank"
WORKING_FOLDER = "_working-bank"  # of the trainers, in output_dir; what starts with _ is not pushed to the hub
MANIFEST = "bank.json"
VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HEADER = 4096  # of a segment: room for the safetensors header, filled in when the segment is closed
_SEGMENT_NAME = re.compile(r"rows-\d+-[0-9a-f]+\.safetensors")
_STEP = 16  # bytes at the start of a record: the step count as float32, the rest is zero (keeps what follows aligned)
_IN_RAM_AT_ONCE = 4096  # records that are allocated together
_MOST_SEGMENTS = 64  # each is an open file and a link per checkpoint; above it the smallest become one


@dataclass(frozen=True)
class Layout:
    """What a record holds, in order.

    Args:
        modules (`tuple`):
            `(name, shape)` of each adapted module's move.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of weights and first moments at rest: `"float32"` or `"bfloat16"`.
        second_moment (`str`, *optional*, defaults to `"full"`):
            `"full"`: one per weight; `"row"`: one per row of rank (mean of the squares), float32.
        rank_axis (`int`, *optional*, defaults to `0`):
            Which axis of a move is the rank.
    """

    modules: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: str = "float32"
    second_moment: str = "full"
    rank_axis: int = 0

    @property
    def sizes(self) -> list[int]:
        return [int(np.prod(shape)) for _, shape in self.modules]

    @property
    def numel(self) -> int:
        """Weights of a user."""
        return sum(self.sizes)

    @property
    def second_numel(self) -> int:
        """Second moments of a user."""
        return self.numel if self.second_moment == "full" else sum(shape[self.rank_axis] for _, shape in self.modules)

    @property
    def record_bytes(self) -> int:
        width = DTYPES[self.dtype].itemsize
        return _STEP + 2 * _padded(self.numel * width) + _padded(self.second_numel * 4)

    def split(self, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views into records `(n, record_bytes)` uint8: step `(n,)`, weight, first and second moment `(n, numel)`."""
        dtype, width = DTYPES[self.dtype], DTYPES[self.dtype].itemsize
        first = _STEP
        second = first + _padded(self.numel * width)
        third = second + _padded(self.numel * width)
        return (
            records[:, :4].view(torch.float32)[:, 0],
            records[:, first : first + self.numel * width].view(dtype),
            records[:, second : second + self.numel * width].view(dtype),
            records[:, third : third + self.second_numel * 4].view(torch.float32),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "modules": [[name, list(shape)] for name, shape in self.modules],
            "dtype": self.dtype,
            "second_moment": self.second_moment,
            "rank_axis": self.rank_axis,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Layout":
        modules = tuple((str(name), tuple(int(size) for size in shape)) for name, shape in values["modules"])
        layout = cls(modules, values["dtype"], values["second_moment"], int(values["rank_axis"]))
        if layout.dtype not in DTYPES or layout.second_moment not in ("full", "row"):
            raise ValueError(f"dtype {layout.dtype!r}, second_moment {layout.second_moment!r}")
        return layout


def _padded(size: int) -> int:
    return -(-size // 16) * 16


class _Segment:
    """A closed file of records; `path` may move (hard links), the open file stays."""

    def __init__(self, path: Path, record_bytes: int):
        self.path = path
        try:
            self.file = open(path, "rb")  # noqa: SIM115  closed with the store
            weakref.finalize(self, self.file.close)  # which may be forgotten
        except FileNotFoundError:
            raise BankError(
                f"{path} is missing, but {MANIFEST} names it: users' rows are lost. Copy the whole folder again, or resume from "
                "another checkpoint."
            ) from None
        self.file_bytes = os.fstat(self.file.fileno()).st_size
        try:
            (length,) = np.frombuffer(self.file.read(8), "<u8")
            header = json.loads(self.file.read(int(length)) if length <= self.file_bytes else b"")
            count, size = map(int, header["records"]["shape"])
            if size != record_bytes:
                raise ValueError(f"records of {size} bytes")
            ends = np.cumsum([0, count * size, 8 * count, 4 * count]).tolist()
            for name, offsets in zip(("records", "rows", "crc32"), zip(ends[:-1], ends[1:], strict=True), strict=True):
                if tuple(header[name]["data_offsets"]) != offsets:
                    raise ValueError(f"its header places {name} wrongly")
            self.start = 8 + int(length)
            if self.file_bytes != self.start + ends[-1]:
                raise ValueError(f"{self.file_bytes} bytes instead of {self.start + ends[-1]}")
            rows = os.pread(self.file.fileno(), 8 * count, self.start + ends[1])
            if zlib.crc32(rows) != int(header["__metadata__"].get("rows_crc32", zlib.crc32(rows))):
                raise ValueError("the list of its rows is damaged")
            self.rows = np.frombuffer(rows, "<i8").copy()
            self.crc_at = self.start + ends[2]
            self.crc32 = np.frombuffer(os.pread(self.file.fileno(), 4 * count, self.crc_at), "<u4").copy()
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self.file.close()
            raise BankError(
                f"{path} is not a whole file of users' rows of this adapter: {error}; records of {record_bytes} bytes were expected. "
                "The file is truncated, damaged or of another adapter: copy it again, or resume from another checkpoint."
            ) from None
        self.record_bytes = record_bytes
        self.verified = np.zeros(count, dtype=bool)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, place: int, out: torch.Tensor) -> None:
        """One record into `out` (record_bytes,) uint8, checked the first time."""
        _pread(self.file.fileno(), out, self.start + place * self.record_bytes, self.path)
        if not self.verified[place]:
            if zlib.crc32(out.numpy().data) != self.crc32[place]:
                raise BankError(
                    f"The record of row {int(self.rows[place])} in {self.path} is damaged (its checksum differs). Copy the file again, "
                    "or resume from another checkpoint."
                )
            self.verified[place] = True

    def erase(self, place: int) -> None:
        """Overwrite a record with zeros, in the file and so in every folder that links to it."""
        with open(self.path, "r+b") as file:
            os.pwrite(file.fileno(), bytes(self.record_bytes), self.start + place * self.record_bytes)
            crc = zlib.crc32(bytes(self.record_bytes))
            os.pwrite(file.fileno(), np.array([crc], "<u4").tobytes(), self.crc_at + 4 * place)
            os.fsync(file.fileno())
        self.crc32[place] = crc

    def close(self) -> None:
        self.file.close()


class _OpenSegment:
    """A file that records are being written to."""

    def __init__(self, path: Path, record_bytes: int):
        self.path = path
        self.record_bytes = record_bytes
        self.rows: list[int] = []
        self.places: dict[int, int] = {}
        with _disk(path):
            self.file = open(path, "x+b")  # noqa: SIM115
            weakref.finalize(self, self.file.close)
            try:
                os.posix_fallocate(self.file.fileno(), 0, _HEADER)
            except OSError:
                self.abandon()
                raise

    def write(self, rows: Sequence[int], records: torch.Tensor) -> None:
        """Write records; the room for new ones is taken first, so a full disk overwrites nothing."""
        fd, end = self.file.fileno(), len(self.rows)
        new = list(dict.fromkeys(row for row in rows if row not in self.places))
        places = {row: end + number for number, row in enumerate(new)}
        with _disk(self.path):
            if new:
                try:
                    os.posix_fallocate(fd, _HEADER + end * self.record_bytes, len(new) * self.record_bytes)
                    for row, record in zip(rows, records.numpy(), strict=True):
                        if row in places:
                            _pwrite(fd, record, _HEADER + places[row] * self.record_bytes)
                except OSError:
                    os.ftruncate(fd, _HEADER + end * self.record_bytes)
                    raise
                self.places.update(places)  # only now: a row that could not be written must not be found
                self.rows += new
            for row, record in zip(rows, records.numpy(), strict=True):
                if row not in places:
                    _pwrite(fd, record, _HEADER + self.places[row] * self.record_bytes)

    def read(self, place: int, out: torch.Tensor) -> None:
        _pread(self.file.fileno(), out, _HEADER + place * self.record_bytes, self.path)

    def close(self) -> None:
        """Finish the file: rows, checksums, the safetensors header; on disk when this returns."""
        fd, count = self.file.fileno(), len(self.rows)
        record = torch.empty(self.record_bytes, dtype=torch.uint8)
        checksums = np.empty(count, "<u4")
        for place in range(count):
            self.read(place, record)
            checksums[place] = zlib.crc32(record.numpy().data)
        size = count * self.record_bytes
        rows = np.array(self.rows, "<i8").tobytes()
        header = {
            "__metadata__": {"format": "sharelora-bank", "version": str(VERSION), "rows_crc32": str(zlib.crc32(rows))},
            "records": {"dtype": "U8", "shape": [count, self.record_bytes], "data_offsets": [0, size]},
            "rows": {"dtype": "I64", "shape": [count], "data_offsets": [size, size + 8 * count]},
            "crc32": {"dtype": "U32", "shape": [count], "data_offsets": [size + 8 * count, size + 12 * count]},
        }
        text = json.dumps(header).encode().ljust(_HEADER - 8)
        with _disk(self.path):
            tail = rows + checksums.tobytes()
            _pwrite(fd, np.frombuffer(tail, np.uint8), _HEADER + size)
            os.ftruncate(fd, _HEADER + size + len(tail))
            _pwrite(fd, np.frombuffer(np.array([len(text)], "<u8").tobytes() + text, np.uint8), 0)
            os.fsync(fd)
        self.file.close()

    def abandon(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


class UserStore:
    """The records of all users of an adapter; users who never had data have none and read as zeros (D_u = 0).

    Nothing is drawn at random for a new user, so he is the same whatever the order, the rank or the restart.

    Args:
        layout ([`Layout`]):
            Of a record.
        kind (`str`):
            `"ram"` keeps changed records in memory, `"mmap"` in a file.
        registry_id (`str`):
            Of the users the rows belong to.
        folder (`Path`, *optional*):
            Where the open file lies while training (`"mmap"`); by default a temporary folder. It is locked, and removed at
            the end: what shall stay is saved.
        num_users (`int`, *optional*):
            Users of the adapter, `load` and `grow` set it too: a row beyond them is refused.

    Raises:
        BankBusyError: another process has the folder.
    """

    def __init__(
        self,
        layout: Layout,
        kind: str,
        registry_id: str,
        folder: str | os.PathLike | None = None,
        num_users: int | None = None,
    ):
        self.layout = layout
        self.kind = kind
        self.registry_id = registry_id
        self.num_users = num_users
        self.segments: list[_Segment] = []
        # per row, grown as rows come: which segment holds it (-1 none, -2 changed since the last save) and where in it
        self._where = np.empty((0, 2), dtype=np.int32)
        self._open: _OpenSegment | None = None
        self._last = 0  # number of the last file
        self._folder: _WorkingFolder | None = None
        self._given_folder = self._wanted_folder = folder
        self._memory = _Memory(layout.record_bytes) if kind == "ram" else None
        self._lock = threading.RLock()  # rows are read ahead on a thread of their own

    # -- reading and writing ----------------------------------------------------------------------------------------------

    def __contains__(self, row: int) -> bool:
        return 0 <= row < len(self._where) and bool(self._where[row, 0] != -1)

    def _check_rows(self, rows: Sequence[int]) -> None:
        wrong = [row for row in rows if row < 0 or (self.num_users is not None and row >= self.num_users)]
        if wrong:
            raise CapacityError(
                f"Rows {wrong[:5]} came; this adapter has the rows 0 to {'...' if self.num_users is None else self.num_users - 1}. (-1, an "
                "unseen user, has no record.) Was the index made with another registry? Users who were added to the registry get their "
                "rows with model.base_model.grow_users()."
            )

    def rows(self) -> list[int]:
        """Rows of the users who have a record."""
        return np.flatnonzero(self._where[:, 0] != -1).tolist()

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """Records `(len(rows), record_bytes)` uint8; zeros for users without one.

        Raises:
            BankError: a record is damaged.
            CapacityError: there is no such row.
        """
        self._check_rows(rows)
        out = torch.zeros(len(rows), self.layout.record_bytes, dtype=torch.uint8)
        for row, record in zip(rows, out, strict=True):
            with self._lock:
                self._read(row, record)
        return out

    def _read(self, row: int, out: torch.Tensor) -> None:
        if row not in self:
            return
        if self._memory is not None and row in self._memory.places:
            self._memory.read(self._memory.places[row], out)
            return
        segment, place = self._where[row].tolist()
        if segment == -2:
            assert self._open is not None
            self._open.read(place, out)
        else:
            self.segments[segment].read(place, out)

    def write(self, rows: Sequence[int], records: torch.Tensor) -> None:
        """Keep these records `(len(rows), record_bytes)`.

        Raises:
            BankFullError: the disk is full; the store is as it was.
            CapacityError: there is no such row.
        """
        if not len(rows):
            return
        self._check_rows(rows)
        with self._lock:
            self._reach(max(rows))
            if self._memory is not None:
                self._memory.write(rows, records)
                places = self._memory.places
            else:
                if self._open is None:
                    self._open = self._new_segment(self._own_folder())
                self._open.write(rows, records)
                places = self._open.places
            for row in rows:
                self._where[row] = -2, places[row]

    def _reach(self, row: int) -> None:
        missing = row + 1 - len(self._where)
        if missing > 0:
            missing = max(missing, min(len(self._where), 1 << 20))  # grown in steps, not by one
            self._where = np.concatenate([self._where, np.full((missing, 2), -1, dtype=np.int32)])

    def _new_segment(self, folder: Path) -> _OpenSegment:
        # never one that was there before: another process may still have that file, and the higher number is in force
        self._last += 1
        # the random part: a run that went on from an older checkpoint writes the same numbers again
        name = f"rows-{self._last:06d}-{secrets.token_hex(4)}.safetensors"
        return _OpenSegment(folder / name, self.layout.record_bytes)

    def work_in(self, folder: str | os.PathLike, part: str) -> None:
        """Where the open file shall lie: a part, of this process alone, of the folder that was given, else of this one."""
        self._wanted_folder = Path(self._given_folder or folder, part)

    def _own_folder(self) -> Path:
        if self._folder is None:
            self._folder = _WorkingFolder(self._wanted_folder)
        return self._folder.path

    # -- saving -----------------------------------------------------------------------------------------------------------

    def save_segments(self, directory: str | os.PathLike, stays: bool = True) -> list[dict[str, Any]]:
        """Close what is open and put all segments into `directory`, by hard links where the file system allows.

        Returns what [`write_manifest`] needs of them.

        Args:
            directory (`str` or `os.PathLike`):
                Where to.
            stays (`bool`, *optional*, defaults to `True`):
                Whether it may be linked from at the next save.

        Raises:
            BankFullError: the disk is full; what was saved before is untouched.
        """
        directory = Path(directory)
        with self._lock, _disk(directory):
            directory.mkdir(parents=True, exist_ok=True)
            return self._save_segments(directory, stays)

    def _save_segments(self, directory: Path, stays: bool) -> list[dict[str, Any]]:
        self._gather_scattered()
        changed = np.flatnonzero(self._where[:, 0] == -2).tolist()
        if changed:
            if self._memory is not None:
                file = self._new_segment(directory)
                try:
                    for start in range(0, len(changed), 64):
                        some = changed[start : start + 64]
                        file.write(some, torch.stack([self._memory.record(row) for row in some]))
                    file.close()
                except BaseException:
                    file.abandon()
                    raise
            else:
                assert self._open is not None
                file, self._open = self._open, None
                try:
                    file.close()
                except BaseException:
                    self._open = file
                    raise
            segment = _Segment(file.path, self.layout.record_bytes)
            segment.verified[:] = True
            in_force = (
                self._where[segment.rows, 0] == -2
            )  # not those that `keep_only` took out since they were written
            self._where[segment.rows[in_force], 0] = len(self.segments)
            self._where[segment.rows[in_force], 1] = np.flatnonzero(in_force)
            self.segments.append(segment)
        for segment in self.segments:
            target = directory / segment.path.name
            if not target.exists() or not os.path.samefile(target, segment.path):
                _link(segment.path, target)
            if stays and (self._folder is None or segment.path.parent != self._folder.path):
                segment.path = target  # of the checkpoints it lies in, the newest stays longest
        return [
            {"file": segment.path.name, "records": len(segment), "bytes": segment.file_bytes}
            for segment in self.segments
        ]

    def _gather_scattered(self) -> None:
        """Move what is in force of mostly outdated or too many segments into the open one; drop those with nothing in force."""
        if not self.segments:
            return
        in_force = np.bincount(self._where[self._where[:, 0] >= 0, 0], minlength=len(self.segments))
        sizes = np.array([len(segment) for segment in self.segments])
        gone = np.array(
            [not segment.path.exists() for segment in self.segments]
        )  # the checkpoint it lay in was deleted
        if 2 * in_force.sum() < sizes.sum():
            gone |= 2 * in_force < sizes
        if len(sizes) >= _MOST_SEGMENTS:
            gone[np.argsort(in_force, kind="stable")[: _MOST_SEGMENTS // 2]] = True
        for number in np.flatnonzero(gone):
            rows = np.flatnonzero(self._where[:, 0] == number).tolist()
            for start in range(0, len(rows), 64):
                self.write(rows[start : start + 64], self.read(rows[start : start + 64]))
        in_force = np.bincount(self._where[self._where[:, 0] >= 0, 0], minlength=len(self.segments))
        kept = np.flatnonzero(in_force)
        renumbered = np.full(len(self.segments) + 2, -1, dtype=np.int32)
        renumbered[kept] = np.arange(len(kept))
        renumbered[-2] = -2
        for number in np.flatnonzero(in_force == 0):
            self._drop(self.segments[number])
        self._where[:, 0] = renumbered[self._where[:, 0]]
        self.segments = [self.segments[number] for number in kept]

    def _drop(self, segment: _Segment) -> None:
        segment.close()
        if self._folder is not None and segment.path.parent == self._folder.path:
            segment.path.unlink(missing_ok=True)

    def write_manifest(self, directory: str | os.PathLike, segments: list[dict[str, Any]], num_users: int) -> None:
        """Write `bank.json`, whole or not at all; a folder without it is no bank.

        Raises:
            BankFullError: the disk is full; the `bank.json` before is untouched.
            CapacityError: there are records beyond `num_users`.
        """
        beyond = num_users + np.flatnonzero(self._where[num_users:, 0] != -1)
        if len(beyond):
            raise CapacityError(
                f"Row {beyond[0]} has a record, but the adapter has {num_users} users: as it is, {directory} could not be loaded. The bank "
                "was stepped with another registry; save it with the one it was trained with."
            )
        content = {
            "format": "sharelora-bank",
            "version": VERSION,
            "registry_id": self.registry_id,
            "num_users": num_users,
            "record_bytes": self.layout.record_bytes,
            "layout": self.layout.to_json(),
            # in the order in which they overrule each other, also where they come from several processes
            "segments": sorted(segments, key=lambda segment: _number(segment["file"])),
        }
        path = Path(directory) / MANIFEST
        temporary = path.with_suffix(".json.tmp")
        with _disk(path):
            try:
                with open(temporary, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                _sync_folder(path.parent)  # the segments' names before the list that names them
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def save(self, directory: str | os.PathLike, num_users: int) -> None:
        """[`save_segments`] and [`write_manifest`]; files of earlier saves into the same folder are removed at the end."""
        segments = self.save_segments(directory)
        self.write_manifest(directory, segments, num_users)
        remove_unnamed(directory, segments)

    # -- loading ------------------------------------------------------------------------------------------------------------

    def load(self, directory: str | os.PathLike, num_users: int) -> None:
        """Take the users of a saved bank in place of those here; nothing is copied for `"mmap"`.

        Args:
            directory (`str` or `os.PathLike`):
                The folder with `bank.json`.
            num_users (`int`):
                Users of the adapter it shall serve.

        Raises:
            BankError: it is torn, of another version, layout or registry, or has more users.
        """
        directory = Path(directory)
        content = read_manifest(directory)
        layout = Layout.from_json(content["layout"])
        if layout != self.layout:
            raise BankError(
                f"{directory / MANIFEST} holds other rows than this adapter has: {_difference(layout, self.layout)}"
            )
        if content["registry_id"] != self.registry_id or content["num_users"] > num_users:
            raise BankError(
                f"{directory / MANIFEST} belongs to other users: registry {content['registry_id'][:12]} with {content['num_users']} "
                f"users, this adapter has registry {self.registry_id[:12]} with {num_users}. Every user would get another's row. "
                "Copy users.json and bank/ from the same save."
            )
        segments = [_Segment(directory / item["file"], self.layout.record_bytes) for item in content["segments"]]
        for segment, item in zip(segments, content["segments"], strict=True):
            if len(segment) != item["records"] or not ((segment.rows >= 0) & (segment.rows < num_users)).all():
                raise BankError(
                    f"{segment.path} has {len(segment)} records up to row {int(segment.rows.max(initial=-1))}; {MANIFEST} names "
                    f"{item['records']} records of {num_users} users. The files are of two different saves: copy the whole folder again."
                )
        where = np.full((num_users, 2), -1, dtype=np.int32)
        for number, segment in enumerate(segments):
            where[segment.rows, 0] = number
            where[segment.rows, 1] = np.arange(len(segment))
        rows = np.flatnonzero(where[:, 0] != -1).tolist()
        if self.kind == "ram":  # all checksums before anything here is given up
            record = torch.empty(self.layout.record_bytes, dtype=torch.uint8)
            for row in rows:
                segments[where[row, 0]].read(int(where[row, 1]), record)
        with self._lock:
            for segment in self.segments:
                self._drop(segment)
            if self._open is not None:
                self._open.abandon()
                self._open = None
            self._where, self.segments, self.num_users = where, segments, num_users
            self._last = max([self._last, *(_number(segment.path.name) for segment in segments)])
            if self.kind == "ram":
                self._memory = _Memory(self.layout.record_bytes)
                for row in rows:
                    segments[where[row, 0]].read(int(where[row, 1]), self._memory.add(row))

    def keep_only(self, mine: np.ndarray) -> None:
        """Forget the records of rows that another process owns: `mine` is `(users,)` bool."""
        with self._lock:
            others = np.ones(len(self._where), dtype=bool)  # it is longer than there are users where it grew in steps
            others[: len(mine)] = ~mine[: len(others)]
            self._where[others] = -1

    def snapshot(self) -> "UserStore":
        """A store of its own with the same users as now; closed segments are read by both."""
        other = UserStore(self.layout, self.kind, self.registry_id, num_users=self.num_users)
        if self.kind == "ram":
            rows = self.rows()
            for start in range(0, len(rows), 64):
                other.write(rows[start : start + 64], self.read(rows[start : start + 64]))
            return other
        folder = other._own_folder()
        segments = self.save_segments(folder, stays=False)
        other.write_manifest(folder, segments, len(self._where))
        other.load(folder, len(self._where))
        other.num_users = self.num_users
        return other

    def close(self) -> None:
        """Let go of all files; rows that were not saved are gone."""
        for segment in self.segments:
            self._drop(segment)
        if self._open is not None:
            self._open.abandon()
        self.segments, self._open = [], None
        if self._memory is not None:
            self._memory = _Memory(self.layout.record_bytes)
        self._where = self._where[:0]
        if self._folder is not None:
            self._folder.remove()
            self._folder = None


class _Memory:
    """Records in memory."""

    def __init__(self, record_bytes: int):
        self.record_bytes = record_bytes
        self.places: dict[int, int] = {}
        self._blocks: list[torch.Tensor] = []

    def add(self, row: int) -> torch.Tensor:
        place = self.places.setdefault(row, len(self.places))
        block, inside = divmod(place, _IN_RAM_AT_ONCE)
        if block == len(self._blocks):
            # zeros come from the system untouched: memory is used when a record is written
            self._blocks.append(torch.zeros(_IN_RAM_AT_ONCE, self.record_bytes, dtype=torch.uint8))
        return self._blocks[block][inside]

    def record(self, row: int) -> torch.Tensor:
        block, inside = divmod(self.places[row], _IN_RAM_AT_ONCE)
        return self._blocks[block][inside]

    def write(self, rows: Sequence[int], records: torch.Tensor) -> None:
        for row, record in zip(rows, records, strict=True):
            self.add(row).copy_(record)

    def read(self, place: int, out: torch.Tensor) -> None:
        block, inside = divmod(place, _IN_RAM_AT_ONCE)
        out.copy_(self._blocks[block][inside])


class _WorkingFolder:
    """A folder that one process writes into; removed at the end."""

    def __init__(self, path: str | os.PathLike | None):
        import fcntl

        self.path = Path(tempfile.mkdtemp(prefix="sharelora-bank-")) if path is None else Path(path)
        try:
            while True:
                with _disk(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                    self._lock = open(self.path / "lock", "a+")  # noqa: SIM115  held as long as the folder is
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # who had it before may have removed it between our two calls: a lock that nobody else can find
                if _same_file(self._lock, self.path / "lock"):
                    break
                self._lock.close()
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            whose = (
                "an earlier model of this process" if owner == str(os.getpid()) else f"another process (pid {owner})"
            )
            raise BankBusyError(
                f"{self.path} is being written to by {whose}: two would overwrite each other's users. Wait for it, end it (or delete "
                "the object), or give this run another output_dir (bank_dir)."
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        for left in self.path.glob("rows-*"):  # of a run that was killed; its checkpoints have their own links
            left.unlink()
        self.remove = weakref.finalize(self, _remove_folder, self.path, self._lock, os.getpid())


def _remove_folder(path: Path, lock: Any, pid: int) -> None:
    import fcntl

    if os.getpid() == pid:  # not in a forked worker
        shutil.rmtree(path, ignore_errors=True)
        if path.parent.name == WORKING_FOLDER:
            with contextlib.suppress(OSError):  # other processes may still be in there
                path.parent.rmdir()
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough where a forked worker still has it open
    lock.close()


def _same_file(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _number(name: str) -> int:
    return int(name.split("-")[1])


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """The checked content of `bank.json`.

    Raises:
        BankError: it is missing, torn or of another version.
    """
    path = Path(directory) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != "sharelora-bank" or not isinstance(content["version"], int):
            raise ValueError("not a bank")
        if content["version"] != VERSION:
            raise BankError(
                f"{path} was written as version {content['version']} of the format; this version of trl_sharelora reads version {VERSION}. "
                "Read it with the trl_sharelora that wrote it, and save it again."
            )
        layout = Layout.from_json(content["layout"])
        if content["record_bytes"] != layout.record_bytes:
            raise ValueError(f"records of {content['record_bytes']} bytes for a layout of {layout.record_bytes}")
        if not isinstance(content["registry_id"], str) or not isinstance(content["num_users"], int):
            raise ValueError(f"registry {content['registry_id']!r} of {content['num_users']!r} users")
        for item in content["segments"]:
            # a plain name: another could point anywhere
            if not _SEGMENT_NAME.fullmatch(item["file"]) or not isinstance(item["records"], int):
                raise ValueError(f"a file {item['file']!r} with {item['records']!r} records")
    except FileNotFoundError:
        raise BankError(
            f"There is no {path}: the users' rows are missing, or their save was cut off ({MANIFEST} is written last). Copy the whole "
            "folder again, or take another checkpoint."
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, IndexError, UnicodeDecodeError, AttributeError) as error:
        raise BankError(
            f"{path} is not the list of a bank's files ({error!r}): torn or edited. Take it from a backup."
        ) from None
    except ValueError as error:
        if isinstance(error, BankError):
            raise
        raise BankError(
            f"{path} is not the list of a bank's files ({error}): torn or edited. Take it from a backup."
        ) from None
    return content


def remove_unnamed(directory: str | os.PathLike, segments: Iterable[dict[str, Any]]) -> None:
    """Remove segments of earlier saves that the manifest does not name."""
    named = {segment["file"] for segment in segments}
    for path in Path(directory).glob("rows-*.safetensors"):
        if path.name not in named:
            path.unlink()


def clear_working_folders(directory: str | os.PathLike) -> None:
    """Remove what killed runs have left in the folders they worked in.

    Raises:
        BankBusyError: a run is still at work in one of them; nothing is removed.
    """
    folders = [_WorkingFolder(lock.parent) for lock in sorted(Path(directory).glob("*/lock"))]
    for folder in folders:
        folder.remove()
    if Path(directory).is_dir():  # also what the processes lent each other
        shutil.rmtree(directory)


def erase_row(directory: str | os.PathLike, row: int) -> int:
    """Overwrite every record of a row in a saved bank with zeros, outdated ones too; how many there were."""
    content = read_manifest(directory)
    erased = 0
    for item in content["segments"]:
        segment = _Segment(Path(directory) / item["file"], content["record_bytes"])
        for place in np.flatnonzero(segment.rows == row).tolist():
            segment.erase(place)
            erased += 1
        segment.close()
    return erased


def read_row(directory: str | os.PathLike, row: int) -> dict[str, torch.Tensor]:
    """One user's moves by module from a saved bank, float32; reads one record."""
    content = read_manifest(directory)
    layout = Layout.from_json(content["layout"])
    record = torch.zeros(1, layout.record_bytes, dtype=torch.uint8)
    for item in reversed(content["segments"]):
        segment = _Segment(Path(directory) / item["file"], content["record_bytes"])
        places = np.flatnonzero(segment.rows == row)
        if len(places):
            segment.read(int(places[-1]), record[0])
        segment.close()
        if len(places):
            break
    return moves_by_module(layout, layout.split(record)[1][0].float())


def moves_by_module(layout: Layout, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A user's weights `(numel,)` as `{module: move}`."""
    parts = weight.split(layout.sizes)
    return {name: part.reshape(shape) for (name, shape), part in zip(layout.modules, parts, strict=True)}


class _disk:
    """Turns the system's 'disk full' into a typed error that says what to do."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            try:
                free = f"{shutil.disk_usage(self.path.parent).free / 2**20:.0f} MiB free"
            except OSError:
                free = "free space unknown"
            raise BankFullError(
                f"{self.path} cannot be written: {error.strerror} ({free}). The rows on disk are as they were and the changed ones are "
                "still in memory. Free some space (old checkpoints: save_total_limit) and go on, or give a bank_dir on "
                "another disk."
            ) from error


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none; whole or not there."""
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
        try:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as copied:
                os.fsync(copied.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    os.replace(temporary, target)


def _pread(fd: int, out: torch.Tensor, offset: int, path: Path) -> None:
    view = out.numpy().data
    while view.nbytes:
        count = os.preadv(fd, [view], offset)
        if not count:
            raise BankError(
                f"{path} ends before the record at byte {offset}: it was truncated while in use. Resume from a checkpoint."
            )
        view, offset = view[count:], offset + count


def _pwrite(fd: int, data: np.ndarray, offset: int) -> None:
    view = data.data
    while view.nbytes:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _difference(found: Layout, expected: Layout) -> str:
    for name in ("dtype", "second_moment", "rank_axis"):
        if getattr(found, name) != getattr(expected, name):
            return (
                f"{name} is {getattr(found, name)!r} in the file and {getattr(expected, name)!r} here. Give the config the file's "
                "value, or take the right file."
            )
    here, there = dict(expected.modules), dict(found.modules)
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            return (
                f"{name} has a move of shape {there.get(name, 'none')} in the file and {here.get(name, 'none')} here. r, share or "
                "target_modules differ: load it onto the model it was made for."
            )
    return "the modules come in another order. Load it onto the model it was made for."
