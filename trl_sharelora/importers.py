"""Preference logs of others as standard rows `{"user_id", "prompt", "chosen", "rejected"}` and `meta`.

Each importer takes a local file or an id of the hub, says what it left out and why, and refuses a file of another schema
with the fields that came, those that were needed, and the importer that would fit. Ties hold no preference and are left
out; nothing is decided by a coin.

Where the schemas were seen:

- `summarize-from-feedback`: `openai/summarize_from_feedback`, config `comparisons`: `info` (`post`, `title`, `subreddit`,
  `article`), `summaries` (two records with `text`, `policy`), `choice`, `worker`, `extra.confidence`.
- `prism`: `HannahRoseKirk/prism-alignment`, `data/prism_datacard.md` of github.com/HannahKirk/prism-alignment (what
  `conversations.jsonl` and `utterances.jsonl` hold); the fields of `conversation_history` (`turn`, `role` "user" or "model",
  `content`, `model_name`, `score`, `if_chosen`, `within_turn_id`) and of utterances (`utterance_id`, `interaction_id`,
  `user_prompt`, `model_response`) in several public readers.
- `personalllm`: `data/gen_pref_interaction_database.py` of github.com/namkoong-lab/PersonalLLM (`person_id`, and for j = 1, 2, ...
  `prompt_j`, `response_j_a`, `response_j_b`, `chosen_j` "a" or "b"; a person with fewer has None).
- `multipref`: `allenai/multipref`: `text`, `completion_a`, `completion_b`, `normal_worker_annotations` and
  `expert_worker_annotations`, each a list of `evaluator`, `overall_pref` (and `helpful_pref`, `truthful_pref`, `harmless_pref`):
  "A-is-clearly-better", "A-is-slightly-better", "Tie", "B-is-...".
- `helpsteer2`: `nvidia/HelpSteer2`: `prompt`, `response` and five whole-numbered scores.
- `label-studio`: labelstud.io/guide/task_format and labelstud.io/templates/pairwise_comparison: tasks with `data` and
  `annotations` (`completed_by`, `was_cancelled`, `result`); a result of type "pairwise" has `value.selected`, "left" or "right".
- `trl`: the preference format of TRL with one more column; `csv`: the same in a table, every cell read as text.
"""

import difflib
import gzip
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .data import (
    _from_columns,
    check_output,
    check_preference_rows,
    json_records,
    load_preferences,
    not_written,
)
from .errors import ConfigError, DataError, UserIdError, some_rows
from .users import user_id_as_text


ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ASPECTS = ("overall", "helpful", "truthful", "harmless")
# What a chat template gets beside the messages: it changes the tokens, so it stays a column of its own.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# How files of rows that are written end.
ROW_FILES = (".jsonl", ".jsonl.gz", ".parquet")
# One outcome of a record: a row, or why there is none.
Outcome = dict[str, Any] | str


@dataclass(frozen=True)
class Columns:
    """Names of columns, where a file may have its own; one that is named must be there, and the format must take it.

    Args:
        user (`str`, *optional*):
            Who judged. By default `user_id`; in the formats `trl` and `csv`, the others have their own field.
        prompt (`str`, *optional*), chosen (`str`, *optional*), rejected (`str`, *optional*):
            By default those names. In Label Studio `prompt` is a field of `data`.
        left (`str`, *optional*), right (`str`, *optional*):
            In Label Studio, the fields of `data` with the two texts. By default the names in `toName` of the Pairwise tag, which are
            those of the fields in its template.
        aspect (`str`, *optional*, defaults to `"overall"`):
            In MultiPref, whose judgement: `"overall"`, `"helpful"`, `"truthful"` or `"harmless"`.
    """

    user: str = "user_id"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    left: str | None = None
    right: str | None = None
    aspect: str = "overall"


@dataclass
class Imported:
    """Standard rows and what is not among them.

    Args:
        rows (`list[dict]`):
            `user_id`, `prompt` (where there is one), `chosen`, `rejected`, `meta`; `margin`, `split`, `tools` and
            `chat_template_kwargs` where the source has them.
        left_out (`dict[str, int]`):
            Number of comparisons left out by reason.
        format (`str`), source (`str`):
            Where they come from.
        notes (`list[str]`, *optional*):
            What was decided on the way and may not be what was meant.
    """

    rows: list[dict[str, Any]]
    left_out: dict[str, int]
    format: str
    source: str
    notes: list[str] = field(default_factory=list)

    @property
    def dataset(self) -> Dataset:
        return _dataset(self.rows, f"imported ({self.source})")

    def save(self, path: str | os.PathLike) -> None:
        """Write the rows; the same rows always give the same bytes.

        Args:
            path (`str` or `os.PathLike`):
                Ends in `.jsonl`, `.jsonl.gz` or `.parquet`.

        Raises:
            DataError: Another ending, or it cannot be written, see [`~trl_sharelora.data.check_output`].
        """
        write_rows(self.rows, path)

    def __str__(self) -> str:
        users = Counter(row["user_id"] for row in self.rows)
        lines = [f"{len(self.rows):,} comparisons of {len(users):,} users from {self.source} ({self.format})"]
        lines += [f"left out: {number:,} {reason}" for reason, number in self.left_out.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _dataset(rows: Sequence[Mapping[str, Any]], name: str) -> Dataset:
    """Rows with the columns of all of them: `Dataset.from_list` would take those of the first."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _from_columns({column: [row.get(column) for row in rows] for column in names}, Path(name))


def write_rows(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Write rows as JSON lines or Parquet, see [`Imported.save`]."""
    path = Path(path)
    check_output(path, ROW_FILES)
    try:
        if path.suffix == ".parquet":
            # Parquet has no records without fields, as `meta` is where the source says nothing besides
            bare = {name for row in rows for name, value in row.items() if value == {}}
            bare -= {name for row in rows for name in bare if row.get(name)}
            told = [{name: value for name, value in row.items() if name not in bare} for row in rows]
            _dataset(told, str(path)).to_parquet(str(path))
            return
        lines = (json.dumps(row, ensure_ascii=False, default=_as_json) + "\n" for row in rows)
        data = "".join(lines).encode("utf-8", "surrogatepass")
        # no file name and no time in gzip's header
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except (OSError, pa.ArrowException) as error:
        raise not_written(path, error) from error


def _as_json(value: Any) -> str:
    """What a table holds and JSON does not."""
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    raise DataError(
        f"The rows hold a {type(value).__name__} ({str(value)[:40]!r}), which JSON cannot hold. Write .parquet, or drop that column from "
        "the source."
    )


class _Mismatch(Exception):
    """A record that is not of the schema: what is wrong with it."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def _standard(user: Any, prompt: Any, replies: Sequence[Any], meta: dict[str, Any], **more: Any) -> Outcome:
    """A standard row, or why these texts make none. `prompt` is None where there is none; the chosen reply comes first."""
    chosen, rejected = replies
    if _is_blank(chosen) or _is_blank(rejected):
        return "with an empty reply"
    if prompt is not None and _is_blank(prompt):
        return "with an empty prompt"
    if chosen == rejected:
        return "with equal replies"
    row = {"user_id": user} | ({} if prompt is None else {"prompt": prompt})
    return row | {"chosen": chosen, "rejected": rejected} | more | {"meta": meta}


def _trl(rows: Sequence[dict], columns: Columns) -> Iterator[tuple[int, Outcome]]:
    has_prompt = any(row.get(columns.prompt) is not None for row in rows)
    kept = [name for name in ("margin", *TEMPLATE_COLUMNS) if any(row.get(name) is not None for row in rows)]
    named = {columns.user, columns.prompt, columns.chosen, columns.rejected}
    named |= {"margin", *TEMPLATE_COLUMNS, "split", "meta"}
    for number, row in enumerate(rows):
        user = row[columns.user]
        if _is_blank(user):
            yield number, "without a user"
            continue
        more = {name: None if row.get(name) == "" else row.get(name) for name in kept}  # a blank cell of a table
        if "chat_template_kwargs" in more:
            more["chat_template_kwargs"] = _template_arguments(more["chat_template_kwargs"], number)
        own = row.get("meta")
        meta = dict(own) if isinstance(own, dict) else {} if own is None else {"meta": own}
        besides = {name: value for name, value in row.items() if name not in named}
        twice = [name for name in besides if name in meta and meta[name] != besides[name]]
        if twice:
            raise _Mismatch(
                f"record {number}: {', '.join(twice)} are both columns and fields of `meta`, where the columns would go, and differ; "
                "rename one of each"
            )
        prompt = (row.get(columns.prompt) or "") if has_prompt else None
        yield number, _standard(user, prompt, (row[columns.chosen], row[columns.rejected]), meta | besides, **more)


def _template_arguments(value: Any, number: int) -> dict[str, Any]:
    """`chat_template_kwargs` of a row; the cell of a table is JSON text. TRL unpacks it in every row, so none is an empty one."""
    came = value
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError:
            pass
    if value is not None and not isinstance(value, dict):
        raise _Mismatch(f"record {number}: `chat_template_kwargs` is {came!r}, where a record is needed")
    return value or {}


def _summarize(rows: Sequence[dict], columns: Columns) -> Iterator[tuple[int, Outcome]]:
    for number, row in enumerate(rows):
        info, summaries = row["info"], row["summaries"]
        if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
            raise _Mismatch(f"record {number}: `info` must be a record and `summaries` two of them")
        if not all(isinstance(found, dict) and isinstance(found.get("text", 0), str | None) for found in summaries):
            raise _Mismatch(f"record {number}: a summary has no `text`, or it is no text")
        if not isinstance(row.get("extra"), dict | None):
            raise _Mismatch(f"record {number}: `extra` is {row['extra']!r}, not a record")
        if isinstance(row["choice"], bool) or row["choice"] not in (0, 1):
            raise _Mismatch(f"record {number}: `choice` is {row['choice']!r}, not 0 or 1")
        if not info.get("post"):
            yield number, "of news articles (another task)"
            continue
        if not isinstance(info.get("title"), str) or not isinstance(info.get("subreddit"), str):
            raise _Mismatch(f"record {number}: `info` has a post and no title or subreddit")
        chosen, rejected = summaries[row["choice"]], summaries[1 - row["choice"]]
        meta = {
            "confidence": (row.get("extra") or {}).get("confidence"),
            "batch": row.get("batch"),
            "policy_chosen": chosen.get("policy"),
            "policy_rejected": rejected.get("policy"),
        }
        # the text of the paper's code: prompt + reply, with the space that belongs to the reply
        prompt = f"SUBREDDIT: r/{info['subreddit']}\nTITLE: {info['title']}\nPOST: {info['post']}\nTL;DR:"
        texts = [" " + summary["text"] if summary["text"] else "" for summary in (chosen, rejected)]
        yield number, _standard(row["worker"], prompt, texts, meta)


def _of_turn(
    user: Any, context: list[dict[str, str]], replies: Sequence[dict[str, Any]], meta: dict[str, Any]
) -> Iterator[Outcome]:
    """The rows of one turn of a PRISM conversation: the chosen reply against each of the others."""
    chosen = [reply for reply in replies if reply.get("if_chosen") is True]
    if len(replies) < 2:
        yield "turns with one reply"
        return
    if len(chosen) != 1:
        yield "turns without a single chosen reply"
        return
    for reply in replies:
        if reply is chosen[0]:
            continue
        if reply.get("score") is not None and reply["score"] == chosen[0].get("score"):
            yield "ties (both replies have the same score)"
            continue
        texts = [side["content"] for side in (chosen[0], reply)]
        outcome = _standard(
            user,
            context,
            texts,
            meta
            | {
                "score_chosen": chosen[0].get("score"),
                "score_rejected": reply.get("score"),
                "model_chosen": chosen[0].get("model_name"),
                "model_rejected": reply.get("model_name"),
            },
        )
        if isinstance(outcome, dict):
            for side in ("chosen", "rejected"):
                outcome[side] = [{"role": "assistant", "content": outcome[side]}]
        yield outcome


def _prism(rows: Sequence[dict], columns: Columns) -> Iterator[tuple[int, Outcome]]:
    for number, row in _conversations_of(rows) if "user_prompt" in rows[0] else enumerate(rows):
        history = row["conversation_history"]
        if not isinstance(history, list) or not all(map(_is_entry, history)):
            raise _Mismatch(
                f"record {number}: `conversation_history` must be a list of entries with `turn`, `role` (user or model) and `content`; a "
                "turn is a number, a content text"
            )
        turns: dict[Any, list[dict]] = defaultdict(list)
        for entry in history:
            turns[entry["turn"]].append(entry)
        context: list[dict[str, str]] = []
        for turn in sorted(turns):
            asked = [entry["content"] for entry in turns[turn] if entry["role"] == "user"]
            replies = [entry for entry in turns[turn] if entry["role"] == "model"]
            if len(asked) != 1 or _is_blank(asked[0]):
                yield number, "turns without one prompt (and what follows them)"
                break
            context = [*context, {"role": "user", "content": asked[0]}]
            meta = {"conversation_id": row["conversation_id"], "turn": turn}
            for outcome in _of_turn(row["user_id"], context, replies, meta):
                yield number, outcome
            chosen = [entry for entry in replies if entry.get("if_chosen") is True]
            if len(chosen) != 1 or _is_blank(chosen[0]["content"]):
                break  # what follows answers a reply that is not known
            context = [*context, {"role": "assistant", "content": chosen[0]["content"]}]


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("role") in ("user", "model")
        and isinstance(entry.get("content", 0), str | None)
        and _is_number(entry.get("turn"))
    )


def _conversations_of(rows: Iterable[dict]) -> list[tuple[int, dict]]:
    """PRISM's utterances (a row for each reply) as its conversations, each with the number of its first row."""
    conversations: dict[Any, tuple[int, dict]] = {}
    for number, row in enumerate(rows):
        # ids of conversations may be counted anew for each user
        ids = {"user_id": row["user_id"], "conversation_id": row["conversation_id"]}
        start = (number, ids | {"conversation_history": []})
        history = conversations.setdefault(tuple(ids.values()), start)[1]["conversation_history"]
        asked = {"turn": row["turn"], "role": "user", "content": row["user_prompt"]}
        if asked not in history:
            history.append(asked)
        reply = {key: row.get(key) for key in ("turn", "score", "if_chosen", "model_name")}
        history.append(reply | {"role": "model", "content": row["model_response"]})
    return list(conversations.values())


def _personalllm(rows: Sequence[dict], columns: Columns) -> Iterator[tuple[int, Outcome]]:
    fields = {name for row in rows for name in row}
    numbers = sorted(int(found[1]) for name in fields if (found := re.fullmatch(r"prompt_(\d+)", name)))
    for number, row in enumerate(rows):
        for j in numbers:
            values = [row.get(name) for name in (f"prompt_{j}", f"response_{j}_a", f"response_{j}_b", f"chosen_{j}")]
            if all(value is None for value in values):
                continue  # a person with fewer interactions
            prompt, first, second, choice = values
            if choice not in ("a", "b"):
                raise _Mismatch(f"record {number}: `chosen_{j}` is {choice!r}, not 'a' or 'b'")
            texts = (first, second) if choice == "a" else (second, first)
            yield number, _standard(row["person_id"], prompt or "", texts, {"interaction": j})


def _multipref(rows: Sequence[dict], columns: Columns) -> Iterator[tuple[int, Outcome]]:
    if columns.aspect not in ASPECTS:
        raise ConfigError(f"aspect={columns.aspect!r} came; one of {', '.join(ASPECTS)} is needed.")
    for number, row in enumerate(rows):
        for kind in ("normal", "expert"):
            for annotation in row.get(f"{kind}_worker_annotations") or []:
                if not isinstance(annotation, dict) or "evaluator" not in annotation:
                    raise _Mismatch(f"record {number}: an annotation has no `evaluator`")
                judgement = annotation.get(f"{columns.aspect}_pref")
                found = re.fullmatch(r"([AB])-is-(clearly|slightly)-better", str(judgement))
                if not found:
                    yield (
                        number,
                        f"{'ties' if judgement == 'Tie' else 'without a judgement'} ({columns.aspect}_pref)",
                    )
                    continue
                texts = (row["completion_a"], row["completion_b"])
                meta = {
                    "kind": kind,
                    "strength": found[2],
                    "comparison_id": row.get("comparison_id"),
                    "prompt_id": row.get("prompt_id"),
                }
                ordered = texts if found[1] == "A" else texts[::-1]
                yield number, _standard(annotation["evaluator"], row["text"] or "", ordered, meta)


def _helpsteer2(rows: Sequence[dict], columns: Columns) -> Iterator[tuple[int, Outcome]]:
    answers: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        scores = [row[name] for name in ATTRIBUTES]
        if not all(map(_is_number, scores)):
            raise _Mismatch(f"record {number}: the scores are {scores}, not finite numbers")
        answers[row["prompt"]].append(number)
    for prompt, numbers in answers.items():
        if len(numbers) == 1:
            yield numbers[0], "prompts with one reply"
        for pair in combinations(numbers, 2):
            for name in ATTRIBUTES:
                worse, better = sorted(pair, key=lambda number: rows[number][name])
                meta = {f"score_{side}": rows[n][name] for side, n in (("chosen", better), ("rejected", worse))}
                if meta["score_chosen"] == meta["score_rejected"]:
                    yield pair[0], f"ties in {name}"
                    continue
                texts = (rows[better]["response"], rows[worse]["response"])
                yield pair[0], _standard(name, prompt or "", texts, meta)


def _label_studio(rows: Sequence[dict], columns: Columns) -> Iterator[tuple[int, Outcome]]:
    for number, task in enumerate(rows):
        data = task["data"]
        if not isinstance(data, dict) or not isinstance(task["annotations"], list):
            raise _Mismatch(f"record {number}: `data` must be a record and `annotations` a list")
        for annotation in task["annotations"]:
            found = (annotation.get("result") or []) if isinstance(annotation, dict) else None
            if not isinstance(found, list) or not all(isinstance(result, dict) for result in found):
                raise _Mismatch(
                    f"record {number}: an annotation must be a record whose `result` is a list of records; {str(annotation)[:80]} came. Export "
                    "JSON (not JSON-MIN, and not ids of annotations alone)"
                )
            if annotation.get("was_cancelled"):
                yield number, "skipped by the annotator"
                continue
            results = [result for result in found if result.get("type") == "pairwise"]
            if not results:
                yield number, "annotations without a pairwise result"
            user = annotation.get("completed_by")
            user = user.get("id") if isinstance(user, dict) else user  # some exports write the whole account
            for result in results:
                selected = (result.get("value") or {}).get("selected")
                if selected not in ("left", "right"):
                    yield number, "annotations with neither side selected"
                    continue
                named = [name.strip() for name in str(result.get("to_name", "")).split(",")]
                left, right = columns.left or named[0], columns.right or named[-1]
                absent = [name for name in (left, right) if name not in data]
                if absent:
                    raise _Mismatch(
                        f"record {number}: `data` has the fields {sorted(data)} and not {absent}; name those of the two texts (--left, --right)"
                    )
                sides = (data[left], data[right]) if selected == "left" else (data[right], data[left])
                prompt = data.get(columns.prompt)
                meta = {"task": str(task.get("id")), "annotation": str(annotation.get("id"))}
                yield number, "without a user" if _is_blank(user) else _standard(user, prompt, sides, meta)


@dataclass(frozen=True)
class Format:
    """One schema.

    Args:
        convert (`Callable`):
            Records and [`Columns`] to outcomes `(record number, row or reason)`.
        needs (`tuple[tuple[str, ...], ...]`):
            Fields of every record; several sets where the schema has several forms.
        hub (`dict`):
            What [`~datasets.load_dataset`] takes for the hub's own copy.
        what (`str`):
            For the help.
        takes (`tuple[str, ...]`):
            The fields of [`Columns`] that have an effect.
    """

    convert: Callable[[Sequence[dict], Columns], Iterator[tuple[int, Outcome]]]
    needs: tuple[tuple[str, ...], ...]
    what: str
    hub: dict[str, str] = field(default_factory=dict)
    takes: tuple[str, ...] = ()


OF_A_ROW = ("user", "prompt", "chosen", "rejected")
FORMATS: dict[str, Format] = {
    "trl": Format(
        _trl, (("{user}", "{chosen}", "{rejected}"),), "TRL's preference format with a user column", takes=OF_A_ROW
    ),
    "csv": Format(_trl, (("{user}", "{chosen}", "{rejected}"),), "a table, every cell read as text", takes=OF_A_ROW),
    "summarize-from-feedback": Format(
        _summarize,
        (("info", "summaries", "choice", "worker"),),
        "openai/summarize_from_feedback, comparisons",
        # the main branch is a loading script, which `datasets` no longer runs; the hub keeps its output on this one
        {"path": "openai/summarize_from_feedback", "revision": "refs/convert/parquet", "data_dir": "comparisons"},
    ),
    "prism": Format(
        _prism,
        (
            ("user_id", "conversation_id", "conversation_history"),
            ("user_id", "conversation_id", "turn", "user_prompt", "model_response", "score", "if_chosen"),
        ),
        "PRISM, conversations or utterances",
        {"path": "HannahRoseKirk/prism-alignment", "name": "conversations"},
    ),
    "personalllm": Format(
        _personalllm,
        (("person_id", "prompt_1", "response_1_a", "response_1_b", "chosen_1"),),
        "PersonalLLM's interaction database",
        {"path": "namkoong-lab/PersonalLLM_InteractionDatabase"},
    ),
    "multipref": Format(
        _multipref,
        (("text", "completion_a", "completion_b", "normal_worker_annotations", "expert_worker_annotations"),),
        "MultiPref, each annotation by its evaluator",
        {"path": "allenai/multipref", "name": "default"},
        takes=("aspect",),
    ),
    "helpsteer2": Format(
        _helpsteer2,
        (("prompt", "response", *ATTRIBUTES),),
        "HelpSteer2, its five attributes as users",
        {"path": "nvidia/HelpSteer2"},
    ),
    "label-studio": Format(
        _label_studio,
        (("data", "annotations"),),
        "Label Studio's JSON export with a Pairwise tag",
        takes=("prompt", "left", "right"),
    ),
}


def import_preferences(
    source: str | os.PathLike | None, format: str, columns: Columns | None = None, split: str | None = None
) -> Imported:
    """Make standard preference rows of a log in another schema.

    Args:
        source (`str` or `os.PathLike`, *optional*):
            A file (`.json`, `.jsonl`, `.csv`, each also `.gz`, `.parquet`), a folder of data files or of `save_to_disk`, or an id of
            the hub; by default the hub's own copy of the format.
        format (`str`):
            A key of `FORMATS`.
        columns ([`Columns`], *optional*):
            Names of columns, where the file has its own.
        split (`str`, *optional*):
            Take one split only; otherwise all are taken. A column `split` names them, unless the source names none.

    Returns:
        [`Imported`]: Rows, and what was left out.

    Raises:
        DataError: It cannot be read, is of another schema, or nothing is left.
        UserIdError: A user id is not usable, or is a number in one record and the same as text in another.
        ConfigError: There is no such format, it has no copy on the hub, or it does not take a column that is named.
    """
    if format not in FORMATS:
        raise ConfigError(f"There is no importer {format!r}; there are {', '.join(FORMATS)}.")
    columns = columns or Columns()
    schema = FORMATS[format]
    if source is None and not schema.hub:
        raise ConfigError(f"Say which file to import: {format!r} is a format, not a dataset of the hub.")
    _check_options(format, columns)
    name = str(source) if source is not None else schema.hub["path"]
    parts = _read(name, schema, format)
    if split is not None:
        if split not in parts:
            raise DataError(f"{name!r} has the splits {sorted(map(str, parts))}; {split!r} is none of them.")
        parts = {split: parts[split]}
    labels = {part: name if part is None else f"{name} [{part}]" for part in parts}
    for part, records in parts.items():
        _check_schema(records, labels[part], format, columns)
    _check_named(parts, name, format, columns)
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    # of each id, whether it came as text, and where: 7 and "7" may be two users
    kinds: dict[str, tuple[bool, str]] = {}
    for part, records in parts.items():
        label = labels[part]
        bad_ids: dict[str, list[int]] = {}
        try:
            for number, outcome in _outcomes(schema, records, columns):
                if isinstance(outcome, str):
                    left_out[outcome] += 1
                    continue
                user = outcome["user_id"]
                if isinstance(user, list | tuple | dict):
                    kind = "a record" if isinstance(user, dict) else f"a list of {len(user)}"
                    problem = (
                        f"Their user is {kind}, where one id is needed. Judged by several: make a row of each; a record: name the "
                        "field with the id, as a column of its own."
                    )
                    bad_ids.setdefault(problem, []).append(number)
                    continue
                try:
                    outcome["user_id"] = user_id_as_text(user)
                except UserIdError as error:
                    bad_ids.setdefault(str(error), []).append(number)
                    continue
                here = (isinstance(user, str), f"record {number} of {label!r}")
                before = kinds.setdefault(outcome["user_id"], here)
                if before[0] != here[0]:
                    told = [f"that of {at} is {'text' if is_text else 'a number'}" for is_text, at in (here, before)]
                    raise UserIdError(
                        f"Two ids read the same: {' and '.join(told)}. They would become one user. Write all ids as text; those of two users "
                        "must differ in it."
                    )
                _check_texts(outcome, number, label)
                rows.append(outcome | ({} if part is None else {"split": part}))
        except _Mismatch as mismatch:
            raise DataError(_of_another_schema(records, label, format, columns, str(mismatch))) from mismatch.__cause__
        if bad_ids:
            numbers = sorted(number for found in bad_ids.values() for number in found)
            raise UserIdError(f"{label!r}: {some_rows(numbers)} have ids that cannot be used. {next(iter(bad_ids))}")
    if not rows:
        raise DataError(
            f"Nothing is left of {name!r} ({format}): {dict(left_out) or 'there is no comparison in it'}. Is it another part of the dataset?"
        )
    notes = [*_without_prompts(rows, parts, format, columns), *_numbered_splits(parts), *_settle_meta(rows)]
    imported = Imported(rows, dict(left_out), format, name, notes)
    check_preference_rows(imported.dataset.remove_columns("meta"), name=f"imported ({name})")
    return imported


def _outcomes(schema: Format, records: Sequence[dict], columns: Columns) -> Iterator[tuple[int, Outcome]]:
    """What the schema makes of the records. A record that it stumbles over is named, as one that it refuses."""
    foreign = (KeyError, TypeError, AttributeError)
    try:
        yield from schema.convert(records, columns)
    except foreign as error:
        culprit = "some records together"
        for number, record in enumerate(records):
            try:
                list(schema.convert([record], columns))
            except foreign:
                culprit = f"record {number}"
                break
            except _Mismatch:  # it would have been told first
                continue
        raise _Mismatch(f"{culprit}: a field is absent or of another type; {type(error).__name__}: {error}") from error


def _check_texts(row: Mapping[str, Any], number: int, label: str) -> None:
    """Here the number of the source's record is known; [`check_preference_rows`] knows only that of the row."""
    for column in ("prompt", "chosen", "rejected"):
        if column in row and not isinstance(row[column], str | list):
            raise _Mismatch(
                f"record {number}: `{column}` is {repr(row[column])[:80]} of type {type(row[column]).__name__}, where text or a list of messages is needed"
            )
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{label!r}: record {number} is not valid Unicode (it holds half of a surrogate pair), so it could not be stored. A text was "
            "probably cut within an emoji or decoded with the wrong codec; read its source as UTF-8 again, or drop the record."
        ) from None


def _option(name: str) -> str:
    """The option of the command for a field of [`Columns`]."""
    return f"--{name}_column" if name in OF_A_ROW else f"--{name}"


def _named(columns: Columns) -> dict[str, str]:
    """The fields of [`Columns`] that are not as they are by default."""
    return {name: value for name, value in vars(columns).items() if value != getattr(Columns(), name)}


def _check_options(format: str, columns: Columns) -> None:
    takes = FORMATS[format].takes
    for name, value in _named(columns).items():
        if name not in takes:
            raise ConfigError(
                f"{_option(name)} {value!r} would have no effect: of the options that name columns, the format {format!r} takes "
                f"{', '.join(map(_option, takes)) or 'none of them'}; its other fields have fixed names. Leave it out."
            )


def _fields(record: Mapping[str, Any], format: str) -> Mapping[str, Any]:
    """Where the columns are that can be named."""
    if format != "label-studio":
        return record
    return record["data"] if isinstance(record["data"], dict) else {}


def _check_named(parts: Mapping[Any, Sequence[dict]], name: str, format: str, columns: Columns) -> None:
    """A column that was named and is in no record is a slip: its texts would be gone without a word."""
    records = [_fields(record, format) for found in parts.values() for record in found]
    there = dict.fromkeys(key for record in records for key, value in record.items() if value is not None)
    for option, column in _named(columns).items():
        if option != "aspect" and column not in there:
            raise DataError(
                f"{name!r}: no record has a value in {column!r} ({_option(option)}). The columns with values are {', '.join(there)}."
                + _did_you_mean(column, there)
            )


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    by_lower_case = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
    return f" Did you mean {by_lower_case[near[0]]!r}?" if near else ""


def _without_prompts(
    rows: Sequence[dict], parts: Mapping[Any, Sequence[dict]], format: str, columns: Columns
) -> Iterator[str]:
    """Where no row has a prompt, the columns that may hold them under another name."""
    if "prompt" not in FORMATS[format].takes or any("prompt" in row for row in rows):
        return
    used = {columns.user, columns.chosen, columns.rejected, *TEMPLATE_COLUMNS, "split", "meta"}
    replies = {str(row[side]) for row in rows for side in ("chosen", "rejected")}
    values: dict[str, list[Any]] = defaultdict(list)
    for records in parts.values():
        for record in records:
            for name, value in _fields(record, format).items():
                if name not in used and not _is_blank(value):
                    values[name].append(value)
    texts = [
        f"{name} ({_option('prompt')} {name})"
        for name, found in values.items()
        if all(isinstance(value, str | list) for value in found) and not all(str(value) in replies for value in found)
    ]
    if texts:
        yield f"without prompts: there is no {columns.prompt!r}. If they are in one of these columns, name it: {', '.join(texts)}"


def _numbered_splits(parts: Mapping[Any, Sequence[dict]]) -> Iterator[str]:
    own = [(record.get("split"), part) for part, records in parts.items() for record in records]
    if any(_is_number(value) and str(value) == part for value, part in own):
        yield f"`split` is of numbers; written as text ({', '.join(map(repr, parts))})"


def _settle_meta(rows: Sequence[dict]) -> Iterator[str]:
    """Fields of `meta` whose values no column can hold together become text; the rows would be refused for what nobody asked about."""
    for name in dict.fromkeys(name for row in rows for name in row["meta"]):
        try:
            pa.array([row["meta"].get(name) for row in rows])
        except (pa.ArrowException, OverflowError):
            for row in rows:
                value = row["meta"].get(name)
                if value is not None and not isinstance(value, str):
                    row["meta"][name] = json.dumps(value, ensure_ascii=False, default=str)
            yield f"`meta` holds {name} as text, because its values are of several types or too large"


def _needed(format: str, columns: Columns) -> list[list[str]]:
    names = {"user": columns.user, "chosen": columns.chosen, "rejected": columns.rejected}
    return [[name.format(**names) for name in needs] for needs in FORMATS[format].needs]


def _check_schema(records: Sequence[dict], name: str, format: str, columns: Columns) -> None:
    if not records:
        raise DataError(f"{name!r} is empty: 0 records. Look at the name of the split and at how it was made.")
    fields = set(records[0])
    if not any(set(needs) <= fields for needs in _needed(format, columns)):
        raise DataError(_of_another_schema(records, name, format, columns))
    needs = next(needs for needs in _needed(format, columns) if set(needs) <= fields)
    # of a JSON file, some records may lack a field; those of a table have it and may be None
    lacking = [number for number, row in enumerate(records) if not set(needs) <= set(row)]
    if lacking:
        raise DataError(
            f"{name!r} ({format}): {some_rows(lacking)} lack some of the fields {', '.join(needs)}; the first has {sorted(records[lacking[0]])}. Is it "
            "put together from several files?"
        )


def _of_another_schema(
    records: Sequence[dict], name: str, format: str, columns: Columns, problem: str | None = None
) -> str:
    fields = set(records[0])
    needed = " or ".join(", ".join(needs) for needs in _needed(format, columns))
    fitting = [
        other
        for other in FORMATS
        if other not in (format, "csv") and any(set(needs) <= fields for needs in _needed(other, columns))
    ]
    if problem:
        hint = "Mend the record at its source, or leave it out."
    elif fitting:
        hint = f"The importer {' or '.join(map(repr, fitting))} fits these fields."
    elif format in ("trl", "csv"):
        absent = [needed for needed in _needed(format, columns)[0] if needed not in fields]
        hint = "Name the columns it has: --user_column, --chosen_column, --rejected_column." + "".join(
            _did_you_mean(needed, fields) for needed in absent
        )
    else:
        hint = "No importer fits these fields; rename them to user_id, prompt, chosen, rejected and take 'trl'."
    lacking: list[list[str]] = [sorted(set(needs) - fields) for needs in _needed(format, columns)]
    missing = min(lacking, key=len)
    what = problem or f"{', '.join(missing)} missing"
    return f"{name!r} is not of the schema {format!r} ({what}). Its fields are {', '.join(sorted(fields))}; needed: {needed}. {hint}"


def _read(name: str, schema: Format, format: str) -> dict[Any, list[dict]]:
    """Records by split; a single part is called None."""
    path = Path(name)
    suffix = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower().removesuffix(".gz")
    if suffix in (".json", ".jsonl") and not path.is_dir():
        if not path.is_file():
            raise DataError(f"There is no file {str(path)!r} (looked for in {Path.cwd()}).")
        return _by_split(json_records(path))
    if suffix in (".csv", ".parquet") and not path.is_dir():
        return _by_split(list(load_preferences(path).with_format(None)))
    if format in ("csv", "label-studio"):
        kind = "CSV" if format == "csv" else "JSON"
        raise DataError(f"The importer {format!r} takes a {kind} file; {name!r} is none (looked for in {Path.cwd()}).")
    saved = path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            loaded = load_from_disk(str(path))
        else:
            loaded = load_dataset(
                **(schema.hub if name == schema.hub.get("path") and not path.is_dir() else {"path": name})
            )
    except Exception as error:  # `datasets` raises a dozen kinds, from the network's to pyarrow's
        raise DataError(
            f"{name!r} cannot be read: {type(error).__name__}: {error} A file or folder that exists, or an id of the hub, is needed. Without "
            "a network, download it elsewhere and give the copy."
        ) from error
    if isinstance(loaded, DatasetDict) and len(loaded) > 1:
        return {str(part): list(rows.with_format(None)) for part, rows in loaded.items()}
    only, rows = next(iter(loaded.items())) if isinstance(loaded, DatasetDict) else (None, loaded)
    parts = _by_split(list(rows.with_format(None)))
    # "train" is also what `datasets` calls files that say nothing, and what rows without a split are
    return {str(only): parts[None]} if None in parts and only not in (None, "train") else parts


def _by_split(records: list[dict]) -> dict[Any, list[dict]]:
    """The parts that a column `split` names, by text or number; MultiPref and others without it are one part."""
    splits = [record.get("split") for record in records]
    # pandas writes a blank cell among numbers as NaN
    names = [None if _is_blank(split) or split != split else split for split in splits]
    named = sum(name is not None for name in names)
    if not named:
        return {None: records}
    if named < len(names):
        raise DataError(
            f"{len(names) - named} of {len(names)} records have no value in 'split', the others have. Rows of the test would become rows to train "
            "on: fill it in everywhere, or drop the field."
        )
    bad = [number for number, name in enumerate(names) if not isinstance(name, str) and not _is_number(name)]
    if bad:
        raise DataError(
            f"'split' is {names[bad[0]]!r} of type {type(names[bad[0]]).__name__}, where text or a number is needed: {some_rows(bad)}. Write the names "
            "of the splits, such as train and test."
        )
    parts: dict[Any, list[dict]] = defaultdict(list)
    for name, record in zip(names, records, strict=True):
        parts[str(name)].append(record)
    return dict(parts)
