"""benchmarks/real_data.py on a small made-up file in the true schema: its splits leak nothing, its baselines are what they say, its page says what was
measured."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import WORDS, tiny_tokenizer
from scipy import optimize, special, stats
from transformers import BertConfig, BertModel


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAME = "made_up"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def ways():
    """The benchmark's modules, importable as they are where the script is run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import real_data
        import real_data_report

        yield real_data, real_data_report
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random BERT with its tokenizer, as the encoder's package has one in its `model` folder."""
    folder = tmp_path_factory.mktemp("encoder") / "model"
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def statements(n):
    draw = np.random.default_rng(3)
    return [" ".join(draw.permutation(WORDS)[:6]) for _ in range(n)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Votes of 16 users on 40 statements, split by (user, statement) and paired; and judgements of pairs of one prompt each."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    texts, lines = statements(40), []
    for user in range(16):
        agreed = draw.random(40) < 0.5
        parts = draw.choice(3, 40, p=(0.6, 0.15, 0.25))
        for part, split in enumerate(SPLITS):
            pairs = [(a, b) for a in range(40) for b in range(40) if agreed[a] and not agreed[b] and parts[a] == parts[b] == part]  # fmt: skip
            for place in draw.permutation(len(pairs))[: (30, 8, 12)[part]]:
                chosen, rejected = pairs[place]
                meta = {"chosen_score": 1.0, "rejected_score": -1.0}
                lines.append({"user_id": f"u{user}", "prompt": "p", "chosen": texts[chosen], "rejected": texts[rejected], "split": split, "meta": meta})  # fmt: skip
    with gzip.open(folder / f"{NAME}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    judged = []
    for user in range(8):
        for number in range(40):
            one, other = texts[number], texts[(number + 1) % 40]
            if draw.random() < 0.5:
                one, other = other, one
            split = SPLITS[int(np.searchsorted((0.6, 0.75), number / 40, side="right"))]
            judged.append({"user_id": f"u{user}", "prompt": f"prompt {number % 10} {texts[number % 10]}", "chosen": one, "rejected": other, "split": split, "meta": {"pair": number}})  # fmt: skip
    with gzip.open(folder / "judged.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in judged)
    return folder


def sides(rows):
    """All (user, text, side) of some rows."""
    return {(u, t, s) for s in ("chosen", "rejected") for u, t in zip(rows.user.tolist(), getattr(rows, s).tolist())}  # noqa: B905


def test_votes_are_split_before_they_are_paired(ways, data, encoder):
    file = ways[0].File(data / f"{NAME}.jsonl.gz", encoder)
    assert file.votes
    before = sides(file.rows)
    for seed in (0, 1, 2):
        parts = file.seen(seed)
        votes = {name: sides(rows) for name, rows in parts.items()}
        assert all(found <= before for found in votes.values())  # nobody is said to have voted otherwise
        known = [{(user, text) for user, text, _ in found} for found in votes.values()]
        assert not (known[0] & known[1] or known[0] & known[2] or known[1] & known[2])
        assert all(len(rows.user) for rows in parts.values())
        shares = np.array([len(found) for found in known]) / sum(map(len, known))
        np.testing.assert_allclose(shares, (0.6, 0.15, 0.25), atol=0.1)
    one, again, other = (file.seen(seed)["train"] for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert sides(one) != sides(other)


def test_new_items_are_in_no_other_part(ways, data, encoder):
    votes, judged = (ways[0].File(data / f"{name}.jsonl.gz", encoder) for name in (NAME, "judged"))
    assert not judged.votes
    for seed in (0, 1):
        texts = [{text for _, text, _ in sides(rows)} for rows in votes.new_items(seed).values()]
        assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2]) and all(texts)
    keys = list(
        zip(judged.rows.chosen.tolist(), judged.rows.rejected.tolist(), judged.rows.user.tolist(), strict=True)
    )
    prompt = dict(zip(keys, judged.columns["prompt"], strict=True))
    parts = [{prompt[key] for key in zip(rows.chosen.tolist(), rows.rejected.tolist(), rows.user.tolist(), strict=True)} for rows in judged.new_items(0).values()]  # fmt: skip
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    for seed in (1, 2):  # pairs, the same for all users, whichever side was chosen
        pairs = [{frozenset(pair) for pair in zip(rows.chosen.tolist(), rows.rejected.tolist(), strict=True)} for rows in judged.seen(seed).values()]  # fmt: skip
        assert not (pairs[0] & pairs[1] or pairs[0] & pairs[2] or pairs[1] & pairs[2])


def test_the_linear_baselines_are_optima(ways):
    methods = ways[0].ways
    draw = np.random.default_rng(1)
    features = torch.tensor(draw.standard_normal((12, 3)), dtype=torch.float32)
    rows = methods.Rows(draw.integers(0, 4, 60), *draw.integers(0, 12, (2, 60)))
    d = (features[rows.chosen] - features[rows.rejected]).double().numpy()

    def fit(d, offset, ridge):
        return optimize.minimize(
            lambda w: -special.log_expit(offset + d @ w).sum() + ridge * w @ w / 2, np.zeros(3), options={"gtol": 1e-9}
        ).x

    common = methods.common_head(rows, features, 2.0)
    np.testing.assert_allclose(common, fit(d, 0, 2.0), atol=1e-5)
    own = methods.own_offset(rows, features, 4, common, 0.7)
    for user in range(4):
        mine = rows.user == user
        np.testing.assert_allclose(own[user], fit(d[mine], d[mine] @ common.numpy(), 0.7**-2), atol=1e-3)
    offsets = methods.own_offset(rows, features, 4, common, methods.START)
    head, basis, weights = methods.low_rank(rows, features, offsets, common, 2, 0.5, 2.0)

    def loss(flat):
        w, b, u = flat[:3], flat[3:9].reshape(2, 3), flat[9:].reshape(4, 2)
        margins = d @ w + (d @ b.T * u[rows.user]).sum(1)
        return -special.log_expit(margins).sum() + w @ w + 0.25 * ((b**2).sum() + (u**2).sum())

    flat = np.concatenate([head.numpy(), basis.numpy().ravel(), weights.numpy().ravel()])
    assert optimize.minimize(loss, flat).fun == pytest.approx(loss(flat), abs=0.01)  # nothing better nearby
    # the same weights again, as of newcomers on this basis
    again = methods.weights_on_basis(rows, features, 4, head, basis, 0.5)
    np.testing.assert_allclose(again, weights @ basis, atol=0.02)
    margins = methods.popularity(methods.Rows(np.zeros(2, int), np.array([0, 0]), np.array([1, 2])), 4)
    new = methods.Rows(np.zeros(3, int), np.array([0, 1, 3]), np.array([1, 2, 3]))
    np.testing.assert_allclose(margins(new), [3 / 4 - 1 / 3, 0, 0])


def test_the_whole_script(ways, data, encoder, tmp_path, monkeypatch, capsys):
    """Every method and view on the small file; the page's figures against a calculation of their own."""
    real_data, report = ways
    monkeypatch.setattr(real_data.importlib.resources, "files", lambda name: encoder.parent)
    monkeypatch.setattr(real_data, "ANSWERS", (0, 2, 5))
    monkeypatch.setattr(real_data, "TRIALS", dict(real_data.TRIALS))  # --quick shortens it
    out = tmp_path / "out"
    command = ["real_data.py", NAME, "--quick", "--data-dir", str(data), "--output-dir", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert real_data.main() == 0
    out = out / "quick"
    found = {path.name: json.loads(path.read_text()) for path in out.glob(f"{NAME}-*.json")}
    assert set(found) == {f"{NAME}-{view}-{seed}.json" for view in real_data.VIEWS for seed in (0, 1)}
    one, two = (found[f"{NAME}-seen-{seed}.json"]["methods"] for seed in (0, 1))
    assert list(one) == list(real_data.TRIALS)
    assert one["common LoRA"]["settings"] == two["common LoRA"]["settings"]  # chosen on the first seed
    view = report.View([found[f"{NAME}-seen-{seed}.json"] for seed in (0, 1)])
    by_hand = [{user: right / n for user, (right, n) in of["ShareLoRA AB"]["test"].items()} for of in (one, two)]
    assert view.accuracy("ShareLoRA AB") == pytest.approx(np.mean([np.mean(list(of.values())) for of in by_hand]))
    heads = [{user: right / n for user, (right, n) in of["common head"]["test"].items()} for of in (one, two)]
    difference = view.difference("ShareLoRA AB", "common head")
    own = [100 * np.mean([a[u] - b[u] for a, b in zip(by_hand, heads, strict=True) if u in a]) for u in {*by_hand[0], *by_hand[1]}]  # fmt: skip
    low, high = stats.t.interval(0.95, len(own) - 1, np.mean(own), stats.sem(own))
    assert difference.users == pytest.approx((low, high))
    for (
        name
    ) in view.shared:  # chosen is what is shrunk, or what validation on the first seed says is better beyond doubt
        shrunk = one[real_data.SHRUNK]["validation_counts"]
        gains = [(right - shrunk[user][0]) / n for user, (right, n) in one[name]["validation_counts"].items()]
        clear = name != real_data.SHRUNK and np.mean(gains) > stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
        assert not clear or view.chosen != real_data.SHRUNK
        assert view.chosen != name or clear or name == real_data.SHRUNK
    assert report.PRIOR == real_data.PRIOR and report.SHRUNK == real_data.SHRUNK
    assert report.PRIOR in view.methods and report.PRIOR not in view.baselines
    assert set(report.METHODS) == set(real_data.TRIALS)
    page = (out / "results.md").read_text(encoding="utf-8")
    assert (
        f"| {NAME} | seen |" in page
        and "start common LoRA" in page
        and "made_up: 4 newcomers, 2 draws of them" in page
    )
    assert (out / "images" / "results_gains.png").stat().st_size > 5000
    assert "Not measured" not in page
    view.methods.remove("LoRA per user")
    said = report._missing([view], newcomers=["another"])
    assert f"long:** LoRA per user on {NAME} (seen); users who were not in the training of {NAME}." in said
    answers = found[f"{NAME}-new_users-0.json"]["by_answers"]
    assert set(answers["ShareLoRA, newcomers by the learned prior"]) == {"2", "5"} and set(answers["common head"]) == {"0", "2", "5"}  # fmt: skip
    capsys.readouterr()
    assert real_data.main() == 0  # nothing is measured twice
    assert "seed" not in capsys.readouterr().out
    # nor elsewhere, from the archive beside the page
    archive, elsewhere = out / "results_figures.jsonl.gz", tmp_path / "elsewhere"
    command = [*command[:-1], str(elsewhere), "--reuse", str(archive)]
    monkeypatch.setattr(sys, "argv", command)
    assert real_data.main() == 0
    assert "seed" not in capsys.readouterr().out
    assert (elsewhere / "quick" / "results.md").read_text(encoding="utf-8") == page
    assert (elsewhere / "quick" / archive.name).read_bytes() == archive.read_bytes()
    # what there is already is not overwritten
    kept = elsewhere / "quick" / f"{NAME}-seen-0.json"
    kept.write_text(json.dumps(found[kept.name] | {"commits": ["here"]}))
    real_data.unpack(archive, kept.parent)
    assert json.loads(kept.read_text())["commits"] == ["here"]
    # a method that some seeds lack is compared on the others and is no baseline
    del found[f"{NAME}-seen-1.json"]["methods"]["common head + own ridge"]
    partly = report.View([found[f"{NAME}-seen-{seed}.json"] for seed in (0, 1)])
    assert partly.partly == {"common head + own ridge": 1} and "common head + own ridge" not in partly.baselines
    assert "common head + own ridge (1 of 2 seeds)" in report.table(partly)
    one_seed = report.View([found[f"{NAME}-seen-0.json"]])
    asked = ("ShareLoRA AB", "common head + own ridge")
    assert partly.difference(*asked).users == one_seed.difference(*asked).users
    assert partly.difference("ShareLoRA AB", "common head") == view.difference("ShareLoRA AB", "common head")
    del found[f"{NAME}-seen-0.json"]["methods"]["LoRA per user"]
    apart = report.View([found[f"{NAME}-seen-{seed}.json"] for seed in (0, 1)])
    assert str(apart.difference("LoRA per user", "common head + own ridge")) == ""  # no seed has both
    lacking = [json.loads(json.dumps(found[f"{NAME}-seen-{seed}.json"])) for seed in (0, 1)]
    del lacking[1]["methods"][view.chosen]
    assert report.View(lacking).chosen != view.chosen  # not what some seeds lack
    newcomers = [found[f"{NAME}-new_users-{seed}.json"] for seed in (0, 1)]
    asked = ("ShareLoRA, newcomers by the learned prior", "5", "common LoRA", "5")
    both = [report.newcomer_gains(some, *asked) for some in (newcomers, newcomers[:1])]
    del newcomers[1]["by_answers"]["common LoRA"]
    assert report.newcomer_gains(newcomers, *asked) == both[1] != both[0]
    assert report.newcomer_gains(newcomers, "absent", *asked[1:]) is None
    assert report.answers_given(newcomers, data / f"{NAME}.jsonl.gz")[5] == 1.0
    # a rival of one draw is none: it may have been the easier one
    easier = json.loads(json.dumps(newcomers[0]))
    easier["by_answers"]["easy"] = {
        "5": {user: [total, total] for user, (_, total) in easier["by_answers"]["common head"]["5"].items()}
    }
    tables = [report.newcomer_table([one, newcomers[0]], {}) for one in (easier, newcomers[0])]
    assert tables[0].splitlines()[-1] == tables[1].splitlines()[-1]
    # an archive that is none, or torn: nothing of it is taken
    whole = archive.read_bytes()
    for wrong in (whole[: len(whole) // 2], real_data.gzip.compress(b"[1]\n"), b"text"):
        archive.write_bytes(wrong)
        torn = tmp_path / "torn"
        monkeypatch.setattr(sys, "argv", [*command[:-3], str(torn), *command[-2:]])
        assert real_data.main() == 2 and "is not what a run leaves" in capsys.readouterr().out
        assert not list(torn.glob("**/*.json"))


def test_more_splits_where_each_says_little(ways, tmp_path):
    real_data, _ = ways
    args = real_data.argparse.Namespace(views=["seen", "new_items"], seeds=None, output_dir=tmp_path)
    seeds = [(view, seed) for _, view, seed, _ in real_data.runs(args, ("polis_bowling_green",))]
    assert seeds == [("seen", seed) for seed in range(5)] + [("new_items", seed) for seed in range(10)]
    args.seeds = 2
    assert len(list(real_data.runs(args, ("polis_bowling_green",)))) == 4


def test_without_the_files_it_says_so(ways, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["real_data.py", "--data-dir", str(tmp_path)])
    assert ways[0].main() == 2
    assert "Nothing was measured" in capsys.readouterr().out
