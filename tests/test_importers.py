"""Importers: small files in the schemas of their sources, row by row by hand; other schemas are refused with the way out."""

import gzip
import json
from datetime import datetime
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from trl_sharelora import cli, importers
from trl_sharelora.data import check_output, check_preference_rows, load_preferences
from trl_sharelora.errors import ConfigError, DataError, UserIdError
from trl_sharelora.importers import FORMATS, Columns, import_preferences, write_rows


def saved(tmp_path, records, name="log.json"):
    path = tmp_path / name
    text = json.dumps(records) if name.endswith("json") else "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


def short(imported) -> list[tuple]:
    """(user, prompt, chosen, rejected) of each row."""
    return [(row["user_id"], row.get("prompt"), row["chosen"], row["rejected"]) for row in imported.rows]


# -- the schemas


def tldr(choice=0, worker="w1", **info):
    info = {
        "id": "t3_1",
        "post": "I lost it.",
        "title": "Lost",
        "subreddit": "help",
        "site": None,
        "article": None,
    } | info
    return {
        "info": info,
        "summaries": [{"text": "one", "policy": "sup4", "note": "ok"}, {"text": "two", "policy": "ref", "note": None}],
        "choice": choice,
        "worker": worker,
        "batch": "batch3.json",
        "split": "train",
        "extra": {"confidence": 7},
    }


def reply(content, chosen, score, within, turn=0):
    return {
        "turn": turn,
        "role": "model",
        "content": content,
        "model_name": f"m{within}",
        "model_provider": "x",
        "score": score,
        "if_chosen": chosen,
        "within_turn_id": within,
    }


def asked(content, turn=0):
    return {"turn": turn, "role": "user", "content": content, "score": None, "if_chosen": None}


def prism(*history, user="user7"):
    return {
        "conversation_id": "c1",
        "user_id": user,
        "conversation_type": "unguided",
        "opening_prompt": "hi",
        "conversation_turns": 2,
        "conversation_history": list(history),
        "performance_attributes": {"values": 3},
    }


CONVERSATION = prism(
    asked("hi"),
    reply("hello", True, 90, 0),
    reply("what", False, 20, 1),
    reply("yes?", False, 90, 2),
    reply("go away", False, 1, 3),
    asked("and now?", 1),
    reply("bye", False, 30, 0, 1),
    reply("more", True, 60, 1, 1),
)
MULTIPREF = {
    "comparison_id": "9",
    "prompt_id": "p4",
    "text": "Name a tree.",
    "completion_a": "Oak.",
    "completion_b": "Elm?",
    "model_a": "x",
    "model_b": "y",
    "source": "s",
    "category": "c",
    "normal_worker_annotations": [
        {"evaluator": "n1", "overall_pref": "A-is-clearly-better", "helpful_pref": "Tie", "time_spent": 9},
        {"evaluator": "n2", "overall_pref": "Tie", "helpful_pref": "B-is-slightly-better"},
    ],
    "expert_worker_annotations": [{"evaluator": "e1", "overall_pref": "B-is-slightly-better", "helpful_pref": None}],
}
PERSON = {
    "person_id": 3,
    "person_weight": [0.1, 0.9],
    "prompt_1": "q1",
    "response_1_a": "a1",
    "response_1_b": "b1",
    "chosen_1": "b",
    "prompt_2": "q2",
    "response_2_a": "a2",
    "response_2_b": "b2",
    "chosen_2": "a",
    "length": 2.0,
}
SCORES = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}
TASK = {
    "id": 11,
    "data": {"prompt": "Which?", "text1": "left one", "text2": "right one"},
    "annotations": [
        {
            "id": 501,
            "completed_by": 7,
            "was_cancelled": False,
            "result": [
                {
                    "id": "x",
                    "from_name": "pw",
                    "to_name": "text1,text2",
                    "type": "pairwise",
                    "value": {"selected": "left"},
                }
            ],
        },
        {
            "id": 502,
            "completed_by": {"id": 8, "email": "who@example.com", "first_name": ""},
            "was_cancelled": False,
            "result": [
                {"from_name": "why", "to_name": "text1", "type": "textarea", "value": {"text": ["clearer"]}},
                {"from_name": "pw", "to_name": "text1,text2", "type": "pairwise", "value": {"selected": "right"}},
            ],
        },
        {"id": 503, "completed_by": 9, "was_cancelled": True, "result": []},
        {"id": 504, "completed_by": 9, "was_cancelled": False, "result": []},
    ],
    "predictions": [],
}
SAMPLES = {
    "trl": [{"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b"}],
    "summarize-from-feedback": [tldr()],
    "prism": [CONVERSATION],
    "personalllm": [PERSON],
    "multipref": [MULTIPREF],
    "helpsteer2": [
        {"prompt": "p", "response": "r1", **SCORES},
        {"prompt": "p", "response": "r2", **SCORES, "verbosity": 0},
    ],
    "label-studio": [TASK],
}


# -- each by hand


def test_summaries_by_the_worker_who_chose(tmp_path):
    records = [
        tldr(),
        tldr(1, "w2"),
        tldr(post=None, article="News.", title=None),
        {**tldr(), "summaries": [{"text": "", "policy": "a"}, {"text": "two", "policy": "b"}]},
        {**tldr(), "summaries": [{"text": "same", "policy": "a"}, {"text": "same", "policy": "b"}]},
    ]
    imported = import_preferences(saved(tmp_path, records), "summarize-from-feedback")
    prompt = "SUBREDDIT: r/help\nTITLE: Lost\nPOST: I lost it.\nTL;DR:"
    assert short(imported) == [("w1", prompt, " one", " two"), ("w2", prompt, " two", " one")]
    assert imported.rows[1]["meta"] == {
        "confidence": 7,
        "batch": "batch3.json",
        "policy_chosen": "ref",
        "policy_rejected": "sup4",
    }
    assert imported.left_out == {
        "of news articles (another task)": 1,
        "with an empty reply": 1,
        "with equal replies": 1,
    }


def test_prism_gives_one_pair_per_rejected_reply_in_its_context(tmp_path):
    imported = import_preferences(saved(tmp_path, [CONVERSATION], "c.jsonl"), "prism")
    first = [{"role": "user", "content": "hi"}]
    then = [*first, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and now?"}]

    def said(text):
        return [{"role": "assistant", "content": text}]

    assert short(imported) == [
        ("user7", first, said("hello"), said("what")),
        ("user7", first, said("hello"), said("go away")),
        ("user7", then, said("more"), said("bye")),
    ]
    assert imported.left_out == {"ties (both replies have the same score)": 1}
    assert imported.rows[2]["meta"] == {
        "conversation_id": "c1",
        "turn": 1,
        "score_chosen": 60,
        "score_rejected": 30,
        "model_chosen": "m1",
        "model_rejected": "m0",
    }


def test_prism_utterances_say_the_same_as_conversations(tmp_path):
    prompts = {0: "hi", 1: "and now?"}
    utterances = [
        {
            "utterance_id": f"ut{number}",
            "interaction_id": f"int{entry['turn']}",
            "conversation_id": "c1",
            "user_id": "user7",
            "turn": entry["turn"],
            "within_turn_id": entry["within_turn_id"],
            "user_prompt": prompts[entry["turn"]],
            "model_response": entry["content"],
            "model_name": entry["model_name"],
            "score": entry["score"],
            "if_chosen": entry["if_chosen"],
        }
        for number, entry in enumerate(CONVERSATION["conversation_history"])
        if entry["role"] == "model"
    ]
    conversations = import_preferences(saved(tmp_path, [CONVERSATION]), "prism")
    # also in another order
    for given in (utterances, utterances[::-1]):
        imported = import_preferences(saved(tmp_path, given, "u.jsonl"), "prism")
        assert sorted(map(str, imported.rows)) == sorted(map(str, conversations.rows))
        assert imported.left_out == conversations.left_out


def test_what_prism_cannot_say_is_left_out(tmp_path):
    records = [
        prism(asked("a"), reply("one", True, 5, 0)),
        prism(
            asked("b"), reply("one", False, 5, 0), reply("two", False, 4, 1), asked("c", 1), reply("x", True, 1, 0, 1)
        ),
        prism(asked(""), reply("one", True, 5, 0), reply("two", False, 4, 1)),
        prism(asked("d"), reply("same", True, 5, 0), reply("same", False, 4, 1)),
        prism(asked("e"), reply("good", True, 5, 0), reply("", False, 4, 1)),
        CONVERSATION,
    ]
    imported = import_preferences(saved(tmp_path, records), "prism")
    assert len(imported.rows) == 3
    assert imported.left_out == {
        "turns with one reply": 1,
        "turns without a single chosen reply": 1,
        "turns without one prompt (and what follows them)": 1,
        "with equal replies": 1,
        "with an empty reply": 1,
        "ties (both replies have the same score)": 1,
    }


def test_persons_of_personalllm(tmp_path):
    fewer = {**PERSON, "person_id": 4} | dict.fromkeys(("prompt_2", "response_2_a", "response_2_b", "chosen_2"))
    more = {**PERSON, "person_id": 0, "prompt_10": "q10", "response_10_a": "a", "response_10_b": "b", "chosen_10": "a"}
    imported = import_preferences(saved(tmp_path, [PERSON, fewer, more]), "personalllm")
    assert short(imported) == [
        ("3", "q1", "b1", "a1"),
        ("3", "q2", "a2", "b2"),
        ("4", "q1", "b1", "a1"),
        ("0", "q1", "b1", "a1"),
        ("0", "q2", "a2", "b2"),
        ("0", "q10", "a", "b"),
    ]
    assert [row["meta"]["interaction"] for row in imported.rows] == [1, 2, 1, 1, 2, 10] and imported.left_out == {}
    with pytest.raises(DataError, match="`chosen_1` is 'c', not 'a' or 'b'"):
        import_preferences(saved(tmp_path, [{**PERSON, "chosen_1": "c"}]), "personalllm")


def test_annotators_of_multipref(tmp_path):
    path = saved(tmp_path, [MULTIPREF])
    imported = import_preferences(path, "multipref")
    assert short(imported) == [("n1", "Name a tree.", "Oak.", "Elm?"), ("e1", "Name a tree.", "Elm?", "Oak.")]
    assert imported.rows[1]["meta"] == {
        "kind": "expert",
        "strength": "slightly",
        "comparison_id": "9",
        "prompt_id": "p4",
    }
    assert imported.left_out == {"ties (overall_pref)": 1}
    helpful = import_preferences(path, "multipref", Columns(aspect="helpful"))
    assert short(helpful) == [("n2", "Name a tree.", "Elm?", "Oak.")]
    assert helpful.left_out == {"ties (helpful_pref)": 1, "without a judgement (helpful_pref)": 1}
    with pytest.raises(ConfigError, match="aspect='nice'"):
        import_preferences(path, "multipref", Columns(aspect="nice"))


def test_attributes_of_helpsteer2_as_users(tmp_path):
    other = dict(zip(SCORES, (2, 4, 0, 3, 2), strict=True))
    records = [
        {"prompt": "p", "response": "good", **SCORES},
        {"prompt": "lonely", "response": "x", **SCORES},
        {"prompt": "p", "response": "odd", **other},
    ]
    imported = import_preferences(saved(tmp_path, records), "helpsteer2")
    assert short(imported) == [
        ("helpfulness", "p", "good", "odd"),
        ("coherence", "p", "good", "odd"),
        ("complexity", "p", "odd", "good"),
    ]
    assert imported.rows[2]["meta"] == {"score_chosen": 3, "score_rejected": 1}
    assert imported.left_out == {"prompts with one reply": 1, "ties in correctness": 1, "ties in verbosity": 1}


def test_label_studios_pairwise_tag(tmp_path):
    imported = import_preferences(saved(tmp_path, [TASK]), "label-studio")
    assert short(imported) == [("7", "Which?", "left one", "right one"), ("8", "Which?", "right one", "left one")]
    assert imported.rows[0]["meta"] == {"task": "11", "annotation": "501"}
    assert imported.left_out == {"skipped by the annotator": 1, "annotations without a pairwise result": 1}
    assert "example.com" not in str(imported.rows)
    renamed = {**TASK, "data": {"q": "Which?", "one": "left one", "two": "right one"}}
    with pytest.raises(DataError, match=r"not \['text1', 'text2'\].*--left, --right"):
        import_preferences(saved(tmp_path, [renamed]), "label-studio")
    named = import_preferences(
        saved(tmp_path, [renamed]), "label-studio", Columns(left="one", right="two", prompt="q")
    )
    assert short(named) == short(imported)
    none = {
        **TASK,
        "annotations": [{**TASK["annotations"][0], "result": [{"type": "pairwise", "value": {"selected": "none"}}]}],
    }
    both = import_preferences(saved(tmp_path, [TASK, none]), "label-studio")
    assert both.left_out["annotations with neither side selected"] == 1


def test_trls_format_with_any_user_column(tmp_path):
    records = [
        {"worker": 1, "prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5, "source": "x"},
        {"worker": None, "prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.0, "source": "x"},
        {"worker": 2, "prompt": "p", "chosen": "a", "rejected": "a", "margin": 1.0, "source": "x"},
        {"worker": 2, "prompt": " ", "chosen": "a", "rejected": "b", "margin": 1.0, "source": "x"},
    ]
    imported = import_preferences(saved(tmp_path, records), "trl", Columns(user="worker"))
    assert imported.rows == [
        {"user_id": "1", "prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5, "meta": {"source": "x"}}
    ]
    assert imported.left_out == {"without a user": 1, "with equal replies": 1, "with an empty prompt": 1}
    talk = [{"user_id": "u"} | {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}]
    rows = import_preferences(saved(tmp_path, talk), "trl").rows
    assert rows == [{**talk[0], "meta": {}}]


def test_a_table_keeps_its_ids_as_they_are_written(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(
        'who,question,good,bad\n007,p,"a, b",c\n7,p,x,y\n1e5,p,x,y\nNA,p,1,2\n12345678901234567890,p,x,y\n'
    )
    columns = Columns(user="who", prompt="question", chosen="good", rejected="bad")
    imported = import_preferences(path, "csv", columns)
    assert [row["user_id"] for row in imported.rows] == ["007", "7", "1e5", "NA", "12345678901234567890"]
    assert imported.rows[0]["chosen"] == "a, b" and imported.rows[3]["rejected"] == "2"
    with pytest.raises(DataError, match="takes a CSV file"):
        import_preferences("some/dataset", "csv")


# -- where they come from


@pytest.mark.parametrize("format", SAMPLES)
def test_files_folders_and_saved_datasets_give_the_same(tmp_path, format):
    records = SAMPLES[format]
    expected = import_preferences(saved(tmp_path, records), format)
    assert expected.rows
    sources = [
        saved(tmp_path, records, "a.jsonl"),
        saved(tmp_path, records, "b.jsonl.gz"),
        saved(tmp_path, records, "c.json.gz"),
    ]
    if format != "label-studio":  # whose results are of different types, which a table cannot hold
        table = Dataset.from_list(records)
        table.to_parquet(str(tmp_path / "folder" / "train-00000.parquet"))
        table.save_to_disk(str(tmp_path / "disk"))
        sources += [tmp_path / "folder" / "train-00000.parquet", tmp_path / "folder", tmp_path / "disk"]
    for source in sources:
        imported = import_preferences(source, format)
        # what a person lacks is None in a table and absent in JSON; both give the same rows
        assert imported.rows == expected.rows and imported.left_out == expected.left_out
        check_preference_rows(imported.dataset)


def test_splits_are_kept_where_there_are_several(tmp_path):
    both = [{**record, "split": split} for record in SAMPLES["trl"] for split in ("train", "valid1")]
    imported = import_preferences(saved(tmp_path, both), "trl")
    assert [row["split"] for row in imported.rows] == ["train", "valid1"]
    one = import_preferences(saved(tmp_path, both), "trl", split="valid1")
    assert [row["split"] for row in one.rows] == ["valid1"]
    with pytest.raises(DataError, match=r"\['train', 'valid1'\]; 'test' is none"):
        import_preferences(saved(tmp_path, both), "trl", split="test")
    table = Dataset.from_list(SAMPLES["trl"])
    DatasetDict({"a": table, "b": table}).save_to_disk(str(tmp_path / "disk"))
    assert [row["split"] for row in import_preferences(tmp_path / "disk", "trl").rows] == ["a", "b"]


# -- what is refused


@pytest.mark.parametrize("given", SAMPLES)
@pytest.mark.parametrize("asked_for", SAMPLES)
def test_another_schema_is_refused_with_the_importer_that_fits(tmp_path, given, asked_for):
    path = saved(tmp_path, SAMPLES[given])
    if given == asked_for:
        assert import_preferences(path, asked_for).rows
        return
    with pytest.raises(DataError, match=f"The importer .*{given!r}.* fits these fields") as raised:
        import_preferences(path, asked_for)
    message = str(raised.value)
    assert f"is not of the schema {asked_for!r}" in message
    # what came and what was needed
    assert all(field in message for field in SAMPLES[given][0])
    assert all(name in message for name in FORMATS[asked_for].needs[0] if "{" not in name)


def test_a_schema_nobody_knows(tmp_path):
    path = saved(tmp_path, [{"instruction": "p", "output": "a"}])
    with pytest.raises(
        DataError, match="chosen, rejected, user_id missing.*Its fields are instruction, output.*--user_column"
    ):
        import_preferences(path, "trl")
    with pytest.raises(DataError, match="No importer fits"):
        import_preferences(path, "prism")


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        ("summarize-from-feedback", {**tldr(), "choice": 2}, "`choice` is 2"),
        ("summarize-from-feedback", {**tldr(), "choice": True}, "`choice` is True"),
        ("summarize-from-feedback", {**tldr(), "summaries": [{"text": "one"}]}, "`summaries` two of them"),
        ("summarize-from-feedback", {**tldr(), "summaries": [{"note": "x"}] * 2}, "no `text`"),
        ("summarize-from-feedback", tldr(title=None), "no title or subreddit"),
        ("prism", {**CONVERSATION, "conversation_history": [{"role": "assistant", "content": "x"}]}, "`turn`, `role`"),
        ("prism", {**CONVERSATION, "conversation_history": None}, "`conversation_history` must be a list"),
        ("multipref", {**MULTIPREF, "normal_worker_annotations": [{"overall_pref": "Tie"}]}, "no `evaluator`"),
        ("helpsteer2", {"prompt": "p", "response": "r", **SCORES, "coherence": None}, "scores are"),
        ("label-studio", {**TASK, "data": "text"}, "`data` must be a record"),
    ],
)
def test_a_record_that_breaks_its_schema_is_named(tmp_path, format, record, message):
    with pytest.raises(DataError, match=f"record 1: .*{message}") as raised:
        import_preferences(saved(tmp_path, [SAMPLES[format][0], record]), format)
    assert f"is not of the schema {format!r}" in str(raised.value)


def test_records_that_lack_fields_are_named(tmp_path):
    with pytest.raises(DataError, match="row 1 lack some of the fields user_id, chosen, rejected"):
        import_preferences(saved(tmp_path, [*SAMPLES["trl"], {"user_id": "u", "chosen": "a"}]), "trl")


def test_unusable_ids_are_named(tmp_path):
    rows = [{"user_id": user, "chosen": "a", "rejected": "b"} for user in ("u", 1.5, "v", True)]
    with pytest.raises(UserIdError, match="rows 1, 3 have ids that cannot be used. A user id is 1.5"):
        import_preferences(saved(tmp_path, rows), "trl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "is empty: 0 records"),
        ("a.json", b"[]", "is empty: 0 records"),
        ("a.json", b'[{"a": 1},', "is not JSON at line 1"),
        ("a.jsonl", b'{"a": 1}\n{"a": ', "is not JSON at line 2"),
        ("a.jsonl", b"[1, 2]", "rows 0, 1 are not"),
        ("a.json", b"\xff\xfe{", "cannot be read as UTF-8"),
        ("a.json.gz", b"no gzip", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        import_preferences(tmp_path / name, "label-studio")


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="There is no file"):
        import_preferences(tmp_path / "absent.json", "trl")
    with pytest.raises(DataError, match="cannot be read.*download it elsewhere"):
        import_preferences(None, "multipref")  # tests have no network
    with pytest.raises(ConfigError, match="Say which file"):
        import_preferences(None, "label-studio")
    with pytest.raises(ConfigError, match="no importer 'argilla'"):
        import_preferences("x.json", "argilla")


def test_nothing_left(tmp_path):
    with pytest.raises(DataError, match="Nothing is left .*'ties in helpfulness': 1"):
        import_preferences(saved(tmp_path, [SAMPLES["helpsteer2"][0]] * 2), "helpsteer2")


# -- what is written


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_what_is_written_is_what_the_package_loads(tmp_path, name):
    imported = import_preferences(saved(tmp_path, [CONVERSATION]), "prism")
    imported.save(tmp_path / "sub" / name)
    first = (tmp_path / "sub" / name).read_bytes()
    imported.save(tmp_path / "sub" / name)
    assert (tmp_path / "sub" / name).read_bytes() == first
    assert load_preferences(tmp_path / "sub" / name).with_format(None)[:] == imported.dataset[:]
    with pytest.raises(DataError, match="does not end in"):
        write_rows(imported.rows, tmp_path / "rows.csv")


def test_the_command(tmp_path, capsys):
    source, out = str(saved(tmp_path, [MULTIPREF])), str(tmp_path / "out.jsonl")
    assert cli.main(["data", "import", "--format", "multipref", source, out]) == 0
    printed = capsys.readouterr().out
    assert "2 comparisons of 2 users" in printed and "left out: 1 ties (overall_pref)" in printed
    assert len(load_preferences(out)) == 2
    assert cli.main(["data", "import", "--format", "multipref", "--aspect", "helpful", source, out]) == 0
    assert load_preferences(out)["user_id"][:] == ["n2"]
    assert cli.main(["data", "import", "--format", "prism", source, out]) == 2
    assert "The importer 'multipref' fits these fields" in capsys.readouterr().err
    table = tmp_path / "log.csv"
    table.write_text("who,chosen,rejected\n01,a,b\n")
    assert cli.main(["data", "import", "--format", "csv", "--user_column", "who", str(table), out]) == 0
    assert load_preferences(out)["user_id"][:] == ["01"]
    with pytest.raises(SystemExit):
        cli.main(["data", "import", "--format", "argilla", source, out])


def test_records_of_which_some_name_no_split_are_not_all_training():
    with pytest.raises(DataError, match="1 of 3 records have no value in 'split', the others have"):
        importers._by_split([{"split": "train"}, {"split": "test"}, {"split": None}])


def test_columns_are_those_of_all_rows(tmp_path):
    """A first row without a prompt does not take everybody's away."""
    rows = [
        {"user_id": "a", "chosen": "x", "rejected": "y"},
        {"user_id": "b", "prompt": "p", "chosen": "x", "rejected": "y"},
    ]
    importers.write_rows(rows, tmp_path / "rows.parquet")
    assert Dataset.from_parquet(str(tmp_path / "rows.parquet"))["prompt"][:] == [None, "p"]


def test_a_column_of_lists_of_users_is_called_what_it_is(tmp_path):
    texts = {"prompt": ["p", "p"], "chosen": ["c", "d"], "rejected": ["r", "r"]}
    Dataset.from_dict({"user_id": [["ann", "bob"], ["cat"]], **texts}).to_parquet(tmp_path / "lists.parquet")
    Dataset.from_dict({"user_id": [{"id": "ann"}, {"id": "bob"}], **texts}).to_parquet(tmp_path / "records.parquet")
    with pytest.raises(
        UserIdError, match="rows 0, 1 have ids .* Their user is a list of 2, where one id is needed.*row of each"
    ):
        import_preferences(tmp_path / "lists.parquet", "trl")
    with pytest.raises(UserIdError, match="rows 0, 1 have ids .* Their user is a record, where one id is needed"):
        import_preferences(tmp_path / "records.parquet", "trl")


# -- nothing goes without a word


def row(**more):
    return {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b"} | more


def test_a_named_column_that_is_in_no_record_is_refused(tmp_path):
    texts = [{"user_id": "u", "question": "p", "chosen": "a", "rejected": "b"}]
    path = saved(tmp_path, texts, "texts.json")
    for format, source in (("trl", path), ("label-studio", saved(tmp_path, [asked_otherwise()], "ls.json"))):
        with pytest.raises(DataError, match=r"'qestion' \(--prompt_column\).*question.*Did you mean 'question'\?"):
            import_preferences(source, format, Columns(prompt="qestion"))
    with pytest.raises(DataError, match=r"'lft' \(--left\).*Did you mean 'left'\?"):
        import_preferences(tmp_path / "ls.json", "label-studio", Columns(left="lft"))
    # a column of blanks is no column of prompts
    with pytest.raises(DataError, match=r"no record has a value in 'q' \(--prompt_column\)"):
        import_preferences(saved(tmp_path, [row(q=None)]), "trl", Columns(prompt="q"))
    with pytest.raises(DataError, match="usr_id missing.*Did you mean 'user_id'?"):
        import_preferences(path, "trl", Columns(user="usr_id"))
    assert short(import_preferences(path, "trl", Columns(prompt="question"))) == [("u", "p", "a", "b")]
    # the column may be in some records and some splits only
    some = [row(q="?", split="train"), row(q="!", split="test"), row(split="test")]
    imported = import_preferences(saved(tmp_path, some), "trl", Columns(prompt="q"))
    assert [found["prompt"] for found in imported.rows] == ["?", "!"]
    assert imported.left_out == {"with an empty prompt": 1}


def asked_otherwise():
    """A task of Label Studio whose prompt is in `question`."""
    annotation = {
        **TASK["annotations"][0],
        "result": [{**TASK["annotations"][0]["result"][0], "to_name": "left,right"}],
    }
    return {**TASK, "data": {"question": "Which?", "left": "one", "right": "two"}, "annotations": [annotation]}


@pytest.mark.parametrize(
    ("format", "columns", "option"),
    [
        (
            "label-studio",
            Columns(user="annotator"),
            "--user_column 'annotator'.*takes --prompt_column, --left, --right",
        ),
        ("prism", Columns(prompt="question"), "--prompt_column 'question'.*takes none of them"),
        ("trl", Columns(left="a"), "--left 'a'"),
        ("trl", Columns(aspect="helpful"), "--aspect 'helpful'"),
        ("multipref", Columns(chosen="a"), "--chosen_column 'a'.*takes --aspect"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, format, columns, option):
    with pytest.raises(ConfigError, match=option):
        import_preferences(saved(tmp_path, SAMPLES[format]), format, columns)


def test_the_report_names_where_prompts_may_be(tmp_path):
    talk = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    texts = {"user_id": "u", "question": "p", "mine": "b", "chosen": "a", "rejected": "b", "n": 1, "split": "train"}
    for format, records in (("trl", [texts]), ("label-studio", [asked_otherwise()])):
        imported = import_preferences(saved(tmp_path, records), format)
        assert "prompt" not in imported.rows[0]
        assert "note: without prompts" in str(imported) and "question (--prompt_column question)" in str(imported)
    # nothing to name: other kinds, a reply under another name, prompts that are there
    assert "note" not in str(import_preferences(saved(tmp_path, [{"user_id": "u", **talk}]), "trl"))
    assert "note" not in str(import_preferences(saved(tmp_path, [row(question="p")]), "trl"))


def test_what_else_a_row_says_is_kept(tmp_path):
    tools = [{"type": "function", "function": {"name": "now"}}]
    records = [
        row(meta={"src": "x"}, tools=tools, chat_template_kwargs={"thinking": True}, position="left", at=1, margin=2),
        row(tools=None, chat_template_kwargs=None, position="right", at=2, margin=1),
        row(meta=None, chat_template_kwargs='{"thinking": false}', position="left", at=3, margin=1),
        row(meta="by hand", position="left", at=4, margin=1),
    ]
    imported = import_preferences(saved(tmp_path, records), "trl")
    assert [found["meta"] for found in imported.rows] == [
        {"src": "x", "position": "left", "at": 1},
        {"position": "right", "at": 2},
        {"position": "left", "at": 3},
        {"meta": "by hand", "position": "left", "at": 4},
    ]
    assert [found["tools"] for found in imported.rows] == [tools, None, None, None]
    # TRL unpacks it as it is: None would stop the training
    assert [found["chat_template_kwargs"] for found in imported.rows] == [
        {"thinking": True},
        {},
        {"thinking": False},
        {},
    ]
    # what was imported comes out the same
    imported.save(tmp_path / "again.jsonl")
    assert import_preferences(tmp_path / "again.jsonl", "trl").rows == imported.rows
    for bad, message in (
        ({"chat_template_kwargs": 5}, "`chat_template_kwargs` is 5"),
        ({"chat_template_kwargs": "x"}, "'x'"),
    ):
        with pytest.raises(DataError, match=f"record 1: .*{message}.* a record is needed"):
            import_preferences(saved(tmp_path, [row(), row(**bad)]), "trl")
    with pytest.raises(DataError, match="record 0: .*at.* both.*`meta`"):
        import_preferences(saved(tmp_path, [row(at=1, meta={"at": 2})]), "trl")


def test_what_is_kept_can_be_written(tmp_path):
    """In `meta` may be what a column cannot hold (two types), what JSON cannot (a time) or nothing at all."""
    mixed = import_preferences(saved(tmp_path, [row(note=1), row(note="x", chosen="c"), row(note=None)]), "trl")
    assert [found["meta"]["note"] for found in mixed.rows] == ["1", "x", None]
    assert "note: `meta` holds note as text, because its values are of several types" in str(mixed)
    at = datetime(2024, 5, 1, 12, 30)
    Dataset.from_list([row(at=at)]).to_parquet(str(tmp_path / "times.parquet"))
    Dataset.from_list([row(at=b"\xff")]).to_parquet(str(tmp_path / "bytes.parquet"))
    bare = import_preferences(saved(tmp_path, [row()]), "trl")
    times = import_preferences(tmp_path / "times.parquet", "trl")
    for name in ("out.jsonl", "out.parquet"):
        for imported in (mixed, times, bare):
            imported.save(tmp_path / name)
            assert load_preferences(tmp_path / name)["chosen"][:] == [found["chosen"] for found in imported.rows]
    times.save(tmp_path / "out.jsonl")
    assert load_preferences(tmp_path / "out.jsonl")["meta"][0] == {"at": "2024-05-01T12:30:00"}
    with pytest.raises(DataError, match="a bytes.*JSON cannot hold.*parquet"):
        import_preferences(tmp_path / "bytes.parquet", "trl").save(tmp_path / "out.jsonl")


def test_the_split_is_kept_whenever_it_is_there(tmp_path):
    def imported(*splits, split=None):
        return import_preferences(saved(tmp_path, [row(split=name) for name in splits]), "trl", split=split)

    def splits_of(imported):
        return [found.get("split") for found in imported.rows]

    # one split alone too: without the column the file would be all training
    assert splits_of(imported("test", "test")) == ["test", "test"]
    assert splits_of(imported("train", "test", split="test")) == ["test"]
    numbers = imported(0, 1, 1)
    assert splits_of(numbers) == ["0", "1", "1"] and "note: `split` is of numbers; written as text" in str(numbers)
    assert splits_of(imported(0, 1, 1, split="1")) == ["1", "1"]
    assert "note" not in str(imported("train", "test"))
    assert splits_of(imported(None, None)) == [None, None]
    for missing in (None, "", " ", float("nan")):
        with pytest.raises(DataError, match="1 of 3 records have no value in 'split'"):
            imported(0, 1, missing)
    with pytest.raises(DataError, match="'split' is True.* rows 0, 1"):
        imported(True, False)
    table = Dataset.from_list(SAMPLES["trl"])
    DatasetDict({"test": table}).save_to_disk(str(tmp_path / "disk"))
    assert splits_of(import_preferences(tmp_path / "disk", "trl")) == ["test"]


def test_one_id_of_two_types_is_not_two_users_made_one(tmp_path):
    with pytest.raises(UserIdError, match="record 2 .*is text.*record 0 .*a number"):
        import_preferences(saved(tmp_path, [row(user_id=7), row(user_id="u"), row(user_id="7")]), "trl")
    persons = [PERSON, {**PERSON, "person_id": "3"}]
    with pytest.raises(UserIdError, match="record 1 .*is text.*record 0 .*a number"):
        import_preferences(saved(tmp_path, persons), "personalllm")
    parts = [row(user_id=7, split="train"), row(user_id="7", split="test")]
    with pytest.raises(UserIdError, match=r"record 0 of .*\[test\].* is text.*record 0 of .*\[train\].*a number"):
        import_preferences(saved(tmp_path, parts), "trl")
    assert [
        found["user_id"] for found in import_preferences(saved(tmp_path, [row(user_id=7), row()]), "trl").rows
    ] == ["7", "u"]


def test_prism_utterances_of_two_users_with_one_conversation_id(tmp_path):
    def said(user, text, chosen):
        return {"user_id": user, "conversation_id": 1, "turn": 0, "user_prompt": f"hi from {user}"} | {
            "model_response": text,
            "score": 9 * chosen,
            "if_chosen": chosen,
        }

    utterances = [said("A", "a", True), said("B", "b", True), said("A", "c", False), said("B", "d", False)]
    imported = import_preferences(saved(tmp_path, utterances), "prism")
    assert [(user, chosen[0]["content"], rejected[0]["content"]) for user, _, chosen, rejected in short(imported)] == [
        ("A", "a", "c"),
        ("B", "b", "d"),
    ]
    # the number is that of the file's record
    with pytest.raises(DataError, match="record 2: .*`turn`"):
        import_preferences(saved(tmp_path, [*utterances[::2], {**utterances[1], "turn": "0"}]), "prism")


# -- what no schema foresaw


def annotated(**more):
    return {**TASK, "annotations": [{**TASK["annotations"][0], **more}]}


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        ("trl", row(prompt=5), "`prompt` is 5 of type int"),
        ("label-studio", {**TASK, "data": {"prompt": "p", "text1": 5, "text2": "b"}}, "`chosen` is 5 of type int"),
        ("label-studio", {**TASK, "annotations": [12]}, "an annotation .*12"),
        ("label-studio", annotated(result={"type": "pairwise"}), "an annotation .*`result`"),
        ("label-studio", annotated(result=["x"]), "an annotation .*`result`"),
        # found by trying, not by name
        ("label-studio", annotated(result=[{"type": "pairwise", "value": "left"}]), "AttributeError"),
        ("summarize-from-feedback", {**tldr(), "choice": 1.0}, "TypeError"),
        ("helpsteer2", {"prompt": ["p"], "response": "r", **SCORES}, "TypeError"),
        ("prism", prism(asked("hi"), {"turn": 0, "role": "model"}), "`content`"),
        ("prism", prism(asked("hi"), asked("x", "1")), "`turn`"),
        ("prism", prism(asked("hi"), asked("x", float("nan"))), "`turn`"),
        ("prism", prism(asked("hi"), reply(5, True, 1, 0), reply("b", False, 0, 1)), "`content`"),
        ("summarize-from-feedback", {**tldr(), "extra": "x"}, "`extra`"),
        ("summarize-from-feedback", {**tldr(), "summaries": [{"text": 1}, {"text": "b"}]}, "`text`"),
        ("multipref", {**MULTIPREF, "text": 5}, "`prompt` is 5"),
        ("multipref", {**MULTIPREF, "expert_worker_annotations": 5}, "TypeError"),
        ("personalllm", {**PERSON, "prompt_1": float("nan")}, "`prompt` is nan"),
        ("helpsteer2", {"prompt": "p", "response": "r", **SCORES, "helpfulness": float("nan")}, "not finite numbers"),
        ("helpsteer2", {"prompt": "p", "response": "r", **SCORES, "verbosity": float("inf")}, "not finite numbers"),
    ],
)
def test_a_record_of_other_types_is_named(tmp_path, capsys, format, record, message):
    source = saved(tmp_path, [SAMPLES[format][0], record])
    with pytest.raises(DataError, match=f"(?s)record 1: .*{message}") as raised:
        import_preferences(source, format)
    assert f"is not of the schema {format!r}" in str(raised.value)
    assert cli.main(["data", "import", "--format", format, str(source), str(tmp_path / "out.jsonl")]) == 2
    assert "DataError" in capsys.readouterr().err


def test_rows_of_two_forms_are_refused(tmp_path):
    talk = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    with pytest.raises(DataError, match=r"imported \(.*'chosen' mixes types \(2 str, 1 list; list at row 1\)"):
        import_preferences(saved(tmp_path, [row(), row(**talk), row()]), "trl")


def test_half_of_a_surrogate_pair_is_no_text(tmp_path):
    for bad in (row(chosen="bad \ud800"), row(note="\ud800")):
        with pytest.raises(DataError, match="record 1 .*not valid Unicode"):
            import_preferences(saved(tmp_path, [row(), bad]), "trl")


# -- where it is written


def try_output(path):
    check_output(path, importers.ROW_FILES)


def test_an_output_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path / "file" / "out.jsonl", tmp_path / "folder.jsonl", Path("/proc/none/out.jsonl")):
        for write in (try_output, lambda path: write_rows([row()], path)):
            with pytest.raises(DataError, match="cannot be written: .*Error"):
                write(path)
    try_output(tmp_path / "new" / "out.jsonl")
    assert list((tmp_path / "new").iterdir()) == []
    kept = tmp_path / "kept.jsonl"
    kept.write_text("what is there")
    try_output(kept)
    assert kept.read_text() == "what is there"
    with pytest.raises(DataError, match="does not end in"):
        try_output(tmp_path / "out.txt")
