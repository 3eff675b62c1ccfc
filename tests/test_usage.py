"""Does the model use the user: planted models that do, do not, or cannot be told; numbers against a slow loop."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers import preference_rows, save_tiny, tiny_model, tiny_tokenizer
from sharelora.reference import share_model
from transformers import AutoModelForSequenceClassification

from trl_sharelora import UserRegistry, cli, use_users
from trl_sharelora.data import tokenize_preference
from trl_sharelora.errors import ConfigError, DataError, NonFiniteError
from trl_sharelora.forget import measure_influence
from trl_sharelora.new_users import add_users
from trl_sharelora.scoring import load_reward_model
from trl_sharelora.scripts import launch, reward
from trl_sharelora.sharelora import get_router
from trl_sharelora.usage import UsageReport, usage_card, user_usage


USERS = [f"user{number}" for number in range(6)]
TOKENIZER = tiny_tokenizer()
ROOT = Path(__file__).parent.parent


def planted(n=60, users=USERS, **overrides):
    """A model whose users differ at random, and comparisons that each user decides as his parameters do."""
    model = share_model(users=users, **overrides).eval()
    model.config.pad_token_id = TOKENIZER.pad_token_id
    rows = preference_rows(users=users, n=n)
    for row in rows:
        if margin_of(model, row, row["user_id"]) < 0:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return model, rows


@torch.no_grad()
def rewards_of(model, row, user_id):
    """One text at a time, without padding."""
    ids = tokenize_preference(row, TOKENIZER)
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        with use_users(model, [user_id], unseen="common"):
            found.append(model(input_ids=torch.tensor([ids[side]])).logits.item())
    return found


def margin_of(model, row, user_id):
    chosen, rejected = rewards_of(model, row, user_id)
    return chosen - rejected


def usage(model, rows, **overrides):
    return user_usage(model, Dataset.from_list(rows), TOKENIZER, **({"flip_users": 0} | overrides))


def right(margin):
    return (np.sign(margin) + 1) / 2


# -- swapped


def test_a_model_that_is_its_users_loses_much_when_they_are_swapped():
    model, rows = planted()
    report = usage(model, rows)
    assert report.accuracy == 1 and (report.n_users, report.n, report.draws) == (6, 60, 5)
    assert report.drop == pytest.approx(1 - report.swapped) and report.drop > 0.2
    assert 0 < report.drop_low < report.drop < report.drop_high
    # his own decide all comparisons rightly, so what changes is lost
    assert report.changed == pytest.approx(report.drop)
    assert report.verdict.startswith("It uses the user: with another user's parameters accuracy falls by +")
    common = np.mean([right(margin_of(model, row, "nobody")) for row in rows])
    assert report.common == pytest.approx(common) and report.gain == pytest.approx(1 - common)
    # with 5 swaps of 6 users everybody gets every other once: the choice of partners is no matter
    table = report.table.set_index("user_id")
    for user_id in USERS:
        own = [row for row in rows if row["user_id"] == user_id]
        others = [right(margin_of(model, row, other)) for row in own for other in USERS if other != user_id]
        assert table.loc[user_id, "swapped"] == pytest.approx(np.mean(others))
        assert table.loc[user_id, "n"] == 10


def test_a_model_that_ignores_its_users_loses_nothing():
    model, rows = planted()
    for module in model.modules():
        if hasattr(module, "bank"):
            module.bank("default").weight.data.zero_()
    report = usage(model, rows)
    assert (report.drop, report.drop_low, report.drop_high, report.gain, report.changed) == (0, 0, 0, 0, 0)
    assert report.reward_share == report.margin_share == 0
    assert report.verdict.startswith("It does not use the user")
    assert report.accuracy == pytest.approx(np.mean([right(margin_of(model, row, "user0")) for row in rows[:]]))


def test_labels_that_have_nothing_to_do_with_the_users_tell_nothing():
    """The parameters differ, but serve nobody; of 8 such logs at most 2 may seem to."""
    model, _ = planted(n=6)
    seem = 0
    for seed in range(8):
        report = usage(model, preference_rows(users=USERS, n=48, seed=seed), draws=2)
        assert report.changed > 0.2 and report.drop_low <= report.drop <= report.drop_high
        seem += not report.drop_low <= 0 <= report.drop_high
    assert seem <= 2


def test_worse_than_anothers_is_said():
    model, rows = planted()
    for row in rows:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    report = usage(model, rows)
    assert report.accuracy == 0 and report.drop_high < 0
    assert "serve users better than their own" in report.verdict and "mixed up" in report.verdict


@pytest.mark.parametrize("bank", ["resident", "ram"])
def test_two_users_are_each_other_and_one_is_swapped_with_whom_the_model_knows(bank):
    model, rows = planted(bank=bank)
    two = [row for row in rows if row["user_id"] in ("user1", "user4")]
    report = usage(model, two, draws=3)
    assert report.draws == 1
    other = {"user1": "user4", "user4": "user1"}
    expected = [right(margin_of(model, row, other[row["user_id"]])) for row in two]
    assert report.swapped == pytest.approx(np.mean(expected))
    one = [row for row in rows if row["user_id"] == "user1"]
    report = usage(model, one, draws=10)
    assert (report.draws, report.n_users, report.variance_users) == (5, 1, 6)
    expected = [np.mean([right(margin_of(model, row, user)) for user in USERS if user != "user1"]) for row in one]
    assert report.swapped == pytest.approx(np.mean(expected))
    assert report.drop_low <= report.drop <= report.drop_high


def test_the_draw_is_seeded_and_the_model_is_left_as_it_came():
    model, rows = planted()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    first, again, other = (usage(model, rows, draws=2, seed=seed) for seed in (0, 0, 1))
    assert first.as_dict() == again.as_dict() and first.swapped != other.swapped
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_who_is_unseen_or_too_long_is_counted_and_left_out():
    model, rows = planted()
    strangers = [{**row, "user_id": "stranger"} for row in rows[:7]]
    longest = [max(map(len, tokenize_preference(row, TOKENIZER).values())) for row in rows]
    limit = sorted(longest)[-3] - 1
    report = usage(model, rows + strangers, max_length=limit)
    long = sum(length > limit for length in [*longest, *longest[:7]])
    assert (report.n, report.dropped) == (sum(length <= limit for length in longest), long)
    assert report.unseen == 67 - long - report.n
    assert "of unseen users left out" in str(report) and f"{long} too long" in str(report)


# -- spread


def test_the_shares_of_variance_are_what_a_slow_loop_finds():
    model, rows = planted(n=12)
    report = usage(model, rows)
    assert (report.variance_users, report.variance_comparisons) == (6, 12)
    cells = [
        {"user": user, "text": (place, side), "reward": reward, "pair": place}
        for user in USERS
        for place, row in enumerate(rows)
        for side, reward in enumerate(rewards_of(model, row, user))
    ]
    frame = pd.DataFrame(cells)
    within = frame.groupby("text")["reward"].var(ddof=0).mean()
    assert report.reward_share == pytest.approx(within / frame["reward"].var(ddof=0), rel=1e-4)
    chosen, rejected = (frame[frame["text"].map(lambda text, side=side: text[1] == side)] for side in (0, 1))
    margins = pd.DataFrame(
        {"pair": chosen["pair"].to_numpy(), "margin": chosen["reward"].to_numpy() - rejected["reward"].to_numpy()}
    )
    between = margins.groupby("pair")["margin"].var(ddof=0).mean()
    assert report.margin_share == pytest.approx(between / (margins["margin"] ** 2).mean(), rel=1e-4)
    # which answer is called chosen is no matter
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    assert usage(model, rows).margin_share == pytest.approx(report.margin_share, rel=1e-4)


def test_an_offset_per_user_is_variance_of_rewards_and_of_no_difference():
    model, rows = planted(n=12, personal_head=True)
    for module in model.modules():
        if hasattr(module, "bank"):
            module.bank("default").weight.data.zero_()
    head = next(module for module in model.modules() if hasattr(module, "moves") and hasattr(module.moves, "weight"))
    head.moves.weight.data.zero_()
    assert usage(model, rows).reward_share == 0
    # a feature that is the same for all texts would be an offset; one user's head twice as long scales his rewards
    head.moves.weight.data[0] = head.weight
    report = usage(model, rows)
    assert report.margin_share > 0 and report.changed == 0


# -- flipped


def fit_rows(steps, rate=0.1):
    """Gradient steps on the rows of the new users alone."""

    def fit(model, comparisons):
        add_users(model, list(dict.fromkeys(comparisons["user_id"])))
        banks = [module.bank("default").weight for module in model.modules() if hasattr(module, "bank")]
        optimizer = torch.optim.Adam(banks, lr=rate)
        texts = {
            side: [tokenize_preference(row, TOKENIZER)[f"{side}_ids"] for row in comparisons]
            for side in ("chosen", "rejected")
        }
        for _ in range(steps):
            margins = 0
            for sign, side in ((1, "chosen"), (-1, "rejected")):
                sequences = [torch.tensor(text) for text in texts[side]]
                input_ids = torch.nn.utils.rnn.pad_sequence(sequences, True, TOKENIZER.pad_token_id)
                with use_users(model, comparisons["user_id"][:]):
                    logits = model(input_ids=input_ids, attention_mask=(input_ids != 0).long()).logits
                margins = margins + sign * logits.squeeze(-1)
            optimizer.zero_grad()
            (-torch.nn.functional.logsigmoid(margins).sum()).backward()
            optimizer.step()

    return fit


def test_predictions_follow_the_labels_of_who_is_fitted_and_stay_where_nobody_is():
    model, rows = planted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = usage(model, rows, draws=1, flip_users=6, fit=fit_rows(20))
    assert report.flip_users == 6 and report.flips > 0.25 and report.flips_low > 0
    assert report.flips_low <= report.flips <= report.flips_high
    untouched = usage(model, rows, draws=1, flip_users=4, fit=fit_rows(0))
    assert (untouched.flips, untouched.flips_low, untouched.flips_high) == (0, 0, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(get_router(model).users) == 6


@pytest.mark.parametrize("bank", ["resident", "ram"])
def test_what_is_fitted_and_what_is_scored(bank):
    """The fit sees half of a user's comparisons twice, the second time turned round; the other half is scored."""
    model, rows = planted(n=42, bank=bank)
    for number, row in enumerate(rows):
        row["prompt"] = f"w{number} " + row["prompt"]  # each row is told by its prompt
    seen = []
    base = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def fit(copied, comparisons):
        seen.append(comparisons)
        assert copied is not model
        for name, parameter in copied.named_parameters():
            shared = "sharelora_" not in name and "modules_to_save" not in name
            assert (parameter.data_ptr() == base[name]) == shared, name
        add_users(copied, list(dict.fromkeys(comparisons["user_id"])))
        # a user's labels as they are: user0's parameters; turned: user1's
        if bank == "resident":
            for module in copied.modules():
                if hasattr(module, "bank"):
                    for row, user_id in enumerate(get_router(copied).users.ids):
                        if row >= 6:
                            source = 0 if user_id.endswith("as-they-are") else 1
                            module.bank("default").weight.data[row] = module.bank("default").weight.data[source]

    report = usage(model, rows, flip_users=3, fit=fit)
    (comparisons,) = seen
    assert len(comparisons) == 2 * 3 * 3  # of 7 each
    by_prompt = {row["prompt"]: row for row in rows}
    fitted, users = set(), set()
    for straight, turned in zip(comparisons.to_list()[::2], comparisons.to_list()[1::2], strict=True):
        original = by_prompt[straight["prompt"]]
        assert {k: straight[k] for k in ("chosen", "rejected")} == {k: original[k] for k in ("chosen", "rejected")}
        assert (turned["chosen"], turned["rejected"]) == (original["rejected"], original["chosen"])
        assert straight["user_id"].endswith("as-they-are") and turned["user_id"].endswith("turned")
        fitted.add(straight["prompt"])
        users.add(original["user_id"])
    assert len(users) == report.flip_users == 3 and len(get_router(model).users) == 6
    flips = []
    for user_id in users:
        rest = [row for row in rows if row["user_id"] == user_id and row["prompt"] not in fitted]
        assert len(rest) == 4
        sources = ("user0", "user1") if bank == "resident" else ("nobody", "nobody")
        flips.append(np.mean([np.ptp(np.sign([margin_of(model, row, who) for who in sources])) / 2 for row in rest]))
    assert report.flips == pytest.approx(np.mean(flips))


def test_why_flips_were_not_measured_is_said():
    model, rows = planted(n=12)
    assert usage(model, rows).flips_missing == "not asked for"
    report = usage(model, rows, flip_users=2, fit=fit_rows(0))
    assert report.flips is None and report.flips_missing == "no user has 4 comparisons here"
    assert "flipped labels: not measured (no user has 4 comparisons here)" in str(report)
    with pytest.raises(ConfigError, match="did not add the users"):
        usage(model, planted()[1], flip_users=2, fit=lambda model, comparisons: None)


# -- a sample


def test_a_sample_is_of_whole_users_of_each_no_more_than_needed():
    model, rows = planted(n=6 * 30)
    for number, row in enumerate(rows):
        row["prompt"] = f"w{number % 90} w{number // 90} " + row["prompt"]
    strangers = [{**row, "user_id": "stranger"} for row in rows[:40]]
    report = usage(model, strangers + rows, draws=1, max_comparisons=40)
    # of 16 each: two users and a half
    assert (report.n, report.n_users, report.sample_of, report.unseen) == (40, 3, 180, 0)
    assert sorted(report.table["n"]) == [8, 16, 16]
    assert "3 users, 40 comparisons (drawn from 180), 1 swap(s)" in str(report)
    assert "40 held-out comparisons, drawn from 180; intervals" in usage_card(report)
    again, other = (usage(model, strangers + rows, draws=1, max_comparisons=40, seed=seed) for seed in (0, 1))
    assert again.as_dict() == report.as_dict() and other.as_dict() != report.as_dict()
    # few users: an equal share each
    assert usage(model, rows, draws=1, max_comparisons=150).table["n"].tolist() == [25] * 6
    whole = usage(model, rows, draws=1, max_comparisons=180)
    assert whole.as_dict() == usage(model, rows, draws=1).as_dict() and whole.sample_of is None
    with pytest.raises(ConfigError, match="max_comparisons=0 came"):
        usage(model, rows, max_comparisons=0)


# -- after a training


def written_log(directory, users=USERS):
    """A base and a log with a split, in which half of the users like what the others reject; the rows."""
    rows = preference_rows(users=users, n=80)
    for number, row in enumerate(rows):
        answers = sorted((row["chosen"], row["rejected"]), key=lambda text: (len(text.split()), text))
        row["chosen"], row["rejected"] = answers[:: 1 if users.index(row["user_id"]) % 2 else -1]
        row["split"] = "test" if number >= 40 else "train"
    save_tiny("llama", directory / "base")
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def train(directory, *more, evaluate=True):
    """`trl-sharelora reward` itself, with its report."""
    arguments = {
        "model_name_or_path": str(directory / "base"),
        "dataset_name": str(directory / "log.jsonl"),
        "output_dir": str(directory / "rm"),
        "per_device_train_batch_size": "8",
        "per_device_eval_batch_size": "4",
        "num_train_epochs": "6",
        "learning_rate": "1e-2",
        "eval_strategy": "epoch" if evaluate else "no",
        "save_strategy": "no",
        "bf16": "false",
        "report_to": "none",
        "disable_tqdm": "true",
        "seed": "5",
    }
    argv = [item for name, value in arguments.items() for item in (f"--{name}", value)]
    reward.main(*launch.parse_arguments(reward.make_parser(), [*argv, "--use_cpu", *more]))


def test_the_report_of_a_training_and_its_model_card_say_what_was_measured(tmp_path, capsys):
    held_out = [row for row in written_log(tmp_path) if row["split"] == "test"]
    train(tmp_path)
    printed = capsys.readouterr().out
    # again, of the model as it was saved
    model, tokenizer = load_reward_model(tmp_path / "rm", device="cpu")
    report = user_usage(model, Dataset.from_list(held_out), tokenizer, batch_size=4, draws=2, seed=5)
    assert report.flips is not None and report.changed > 0 and report.n == 40
    assert str(report) in printed
    card = (tmp_path / "rm" / "README.md").read_text()
    assert card.count(usage_card(report)) == 1 and card.count("## Does it use the user?") == 1
    for value in (report.accuracy, report.swapped, report.common, report.changed, report.flips):
        assert f"| {value:.1%}" in card
    assert card.index("## Quick start") < card.index("## Does it use the user?") < card.index("## Training procedure")
    assert card.startswith("---\n") and not any(user_id in card for user_id in USERS)
    # PEFT rewrites the card with each save, and keeps what is in it
    model.save_pretrained(tmp_path / "rm")
    assert usage_card(report) in (tmp_path / "rm" / "README.md").read_text()


def test_a_sample_is_measured_after_a_training_and_nothing_where_it_was_not_asked_for(tmp_path, capsys):
    written_log(tmp_path)
    train(tmp_path, "--usage_comparisons", "20", "--method", "psharelora-si")
    card = (tmp_path / "rm" / "README.md").read_text()
    assert "3 users, 20 comparisons (drawn from 40), 2 swap(s)" in capsys.readouterr().out
    assert "20 held-out comparisons, drawn from 40; intervals" in card
    (tmp_path / "off").mkdir()
    written_log(tmp_path / "off")
    train(tmp_path / "off", "--max_steps", "1", "--usage_comparisons", "0")
    assert "Does it use" not in (tmp_path / "off" / "rm" / "README.md").read_text()
    assert "its users" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="usage_comparisons=-1 came"):
        train(tmp_path, "--usage_comparisons", "-1")


def test_a_training_without_evaluation_measures_on_the_test_split_or_says_that_there_is_none(tmp_path, capsys):
    """TRL's default is eval_strategy="no"."""
    written_log(tmp_path)
    train(tmp_path, "--max_steps", "1", evaluate=False)
    assert "6 users, 40 comparisons, 2 swap(s)" in capsys.readouterr().out
    assert "## Does it use the user?" in (tmp_path / "rm" / "README.md").read_text()
    log = tmp_path / "log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"test"' not in line))
    train(tmp_path, "--max_steps", "1", "--output_dir", str(tmp_path / "other"), evaluate=False)
    assert (
        "was not measured: no held-out split 'test' was found. Later: trl-sharelora usage" in capsys.readouterr().out
    )
    assert "Does it use" not in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["union", "owner"])
def test_of_several_processes_the_first_measures_what_it_has_the_whole_of(tmp_path, sharding):
    written_log(tmp_path)
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from pathlib import Path\nfrom tests.test_usage import train\n"
        f"train(Path({str(tmp_path)!r}), '--user_sharding', {sharding!r}, '--bank', 'ram')\n"
    )
    (tmp_path / "run.py").write_text(script)
    arguments = ["--standalone", "--nproc_per_node", "2", str(tmp_path / "run.py")]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    card = (tmp_path / "rm" / "README.md").read_text() if (tmp_path / "rm" / "README.md").is_file() else ""
    measured = done.stdout.count("6 users, 40 comparisons, 2 swap(s)"), card.count("## Does it use the user?")
    assert measured == ((1, 1) if sharding == "union" else (0, 0))
    spread = "was not measured: the model is spread over processes. Later: trl-sharelora usage --model_name_or_path"
    assert done.stdout.count(spread) == (sharding == "owner")


def test_a_model_of_one_user_is_saved_and_the_report_says_why_it_has_no_more(tmp_path, capsys):
    written_log(tmp_path, users=["ann"])
    train(tmp_path, "--max_steps", "1")
    printed = capsys.readouterr().out
    assert "Whether it uses its users was not measured: The model knows one user, so there is nobody" in printed
    assert (tmp_path / "rm" / "adapter_model.safetensors").is_file()
    assert "Does it use" not in (tmp_path / "rm" / "README.md").read_text()


# -- words


def test_what_is_printed_and_what_goes_into_a_card():
    model, rows = planted()
    report = usage(model, rows, flip_users=2, fit=fit_rows(0))
    text, card = str(report), usage_card(report)
    assert f"accuracy  own parameters 1.000  another user's {report.swapped:.3f}" in text
    assert "fitted to them, 0.0% (95 % 0.0% to 0.0%) of the other comparisons of 2 users turn round" in text
    assert card.startswith("## Does it use the user?\n\nIt uses the user")
    assert f"| with another user's parameters | {report.swapped:.1%} (5 swaps) |" in card
    assert (
        "| held-out comparisons that turn round when a user's labels do | 0.0% (95 % 0.0% to 0.0%) of 2 users |"
        in card
    )
    values = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert values["drop"] == report.drop and values["verdict"] == report.verdict and "table" not in values
    assert isinstance(report, UsageReport) and not any(user_id in card for user_id in USERS)


def test_pseudonyms_are_shown():
    users = UserRegistry(USERS, key=b"k" * 32)
    model = share_model(users=users).eval()
    model.config.pad_token_id = TOKENIZER.pad_token_id
    report = usage(model, preference_rows(users=USERS, n=12))
    assert report.table["user_id"].tolist() == users.ids and all(name.startswith("u-") for name in users.ids)


# -- bad input


def test_what_cannot_be_measured_is_refused():
    model, rows = planted(n=12)
    with pytest.raises(DataError, match="None of the 12 comparisons is of a user whom the model knows .6 users."):
        usage(model, [{**row, "user_id": "stranger"} for row in rows])
    for name, value in (
        ("draws", 0),
        ("draws", 1.5),
        ("sample_users", 1),
        ("flip_users", -1),
        ("sample_comparisons", 0),
    ):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            usage(model, rows, **{name: value})
    with pytest.raises(ConfigError, match="came as the reward model"):
        usage(tiny_model(), rows)
    alone, _ = planted(n=4, users=["ann"])
    with pytest.raises(DataError, match="knows one user, so there is nobody to swap him with"):
        usage(alone, preference_rows(users=["ann"], n=4))
    with torch.no_grad():
        next(module for module in model.modules() if hasattr(module, "bank")).bank("default").weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="'user3'"):
        usage(model, rows)


# -- the command


def save_planted(directory):
    """A saved reward model whose users differ, and comparisons as they decide them; its tokenizer beside it."""
    base = AutoModelForSequenceClassification.from_pretrained(save_tiny("llama", directory / "base"), num_labels=1)
    base.config.pad_token_id = TOKENIZER.pad_token_id
    model = share_model(users=USERS, base=base).eval()
    rows = preference_rows(users=USERS, n=24)
    for row in rows:
        if margin_of(model, row, row["user_id"]) < 0:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    model.save_pretrained(directory / "rm")
    TOKENIZER.save_pretrained(directory / "rm")
    (directory / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return model, rows


def test_the_command_prints_and_writes_what_was_measured(tmp_path, capsys):
    model, rows = save_planted(tmp_path)
    arguments = [
        "--model_name_or_path",
        str(tmp_path / "rm"),
        "--dataset_name",
        str(tmp_path / "test.jsonl"),
        "--use_cpu",
    ]
    out = tmp_path / "out"
    settings = ["--draws", "2", "--flip_users", "0", "--seed", "3", "--output_dir", str(out)]
    assert cli.main(["usage", *arguments, *settings]) == 0
    printed = capsys.readouterr().out
    report = usage(model, rows, draws=2, seed=3, batch_size=8)
    assert str(report) in printed
    assert json.loads((out / "usage.json").read_text()) == pytest.approx(report.as_dict())
    assert (out / "usage.md").read_text() == usage_card(report)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "usage.parquet"), report.table)
    assert cli.main(["usage", *arguments, "--draws", "0"]) == 2
    assert "ConfigError: draws=0 came" in capsys.readouterr().err


def test_the_command_forgets_a_user(tmp_path, capsys):
    model, rows = save_planted(tmp_path)
    arguments = ["forget", "--adapter", str(tmp_path / "rm")]
    assert (
        cli.main([*arguments, "--user", "user2", "--report_influence", str(tmp_path / "none.jsonl"), "--use_cpu"]) == 2
    )
    assert cli.main(arguments) == 2 and cli.main([*arguments, "--user", "user2", "--pseudonym", "u-1"]) == 2
    assert "give --user ID, or --pseudonym NAME" in capsys.readouterr().err
    assert None not in UserRegistry.load(tmp_path / "rm").ids
    measured = [
        "--report-influence",
        str(tmp_path / "test.jsonl"),
        "--influence_output",
        str(tmp_path / "influence.json"),
    ]
    assert cli.main([*arguments, "--user", "user2", *measured, "--use_cpu"]) == 0
    printed = capsys.readouterr().out
    expected = measure_influence(model, Dataset.from_list(rows), "user2", TOKENIZER)
    assert str(expected) in printed and "Erased: row, moments, own comparisons and id in 1 saved adapter(s)" in printed
    content = json.loads((tmp_path / "influence.json").read_text())
    assert content["comparisons"] == 4 and content["parts"][-1]["norm_share"] == pytest.approx(
        expected.parts["norm_share"].iloc[-1], rel=1e-4
    )
    assert UserRegistry.load(tmp_path / "rm").ids[2] is None
    assert cli.main([*arguments, "--user", "user2"]) == 2
    assert "UnknownUserError: 1 unknown user(s): 'user2'" in capsys.readouterr().err


def test_the_command_forgets_a_pseudonymous_user(tmp_path):
    users = UserRegistry(["ann", "bob", "cat"], key=b"k" * 32)
    share_model(users=users).save_pretrained(tmp_path)
    (tmp_path / "user.key").write_bytes(b"k" * 32)
    assert cli.main(["forget", "--adapter", str(tmp_path), "--user", "bob"]) == 2
    key = ["--user_key_file", str(tmp_path / "user.key")]
    assert cli.main(["forget", "--adapter", str(tmp_path), "--user", "bob", *key]) == 0
    assert cli.main(["forget", "--adapter", str(tmp_path), "--pseudonym", str(users[2])]) == 0
    assert UserRegistry.load(tmp_path).ids == [users[0], None, None]


def test_users_are_fitted_with_the_packages_own_method_unless_another_is_given():
    model, rows = planted(n=48)
    report = usage(model, rows, draws=1, flip_users=3)
    assert report.flips_missing is None and 0 <= report.flips_low <= report.flips <= report.flips_high <= 1
    assert len(get_router(model).users) == 6
