"""Each benchmark's smallest case runs and prints what it promises; no time is judged here."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def step_time():
    """The module, imported as its script sees it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import common
        import step_time

        common.quiet()
        # a smaller model than the table's
        whole = common.base_model
        common.base_model = lambda layers=1, hidden=64, **more: whole(layers, hidden, **more)
        yield step_time
        common.base_model = whole
    finally:
        sys.path.remove(str(BENCHMARKS))


def check(lines: list[dict], number: int) -> None:
    assert len(lines) == number
    for line in lines:
        assert {"case", "against", "asked", "median"} <= set(line)
        assert line["low"] <= line["median"] <= line["high"]


def test_step_against_lora_and_the_adapter_loop(step_time):
    lines = step_time.against_lora(2, 2, 4, False, rounds=2, loop=True)
    check(lines, 3)
    assert [line["asked"] for line in lines] == [0.97, 0.97, 0.42]
    row = step_time.shown(lines[0])
    assert row.count("|") == 7 and row.endswith(("pass |", "miss |"))


def test_step_with_many_users(step_time):
    check(step_time.many_users(False, rounds=2, many=(1000,), pairs=8, tokens=4), 2)


def test_step_with_users_never_seen(step_time, monkeypatch):
    read = []
    monkeypatch.setattr(
        "trl_sharelora.sharelora.bank.WorkingSet.prefetch", lambda self, rows: read.append(sorted(rows))
    )
    check(step_time.newcomers(False, rounds=2, users=1000, pairs=8, tokens=4), 2)
    assert [1, 126, 251, 376, 501, 626, 751, 876] in read and [2, 127, 252, 377, 502, 627, 752, 877] in read


def test_users_of_a_step(step_time):
    new = step_time.new_users(1000)
    seen = [row for _ in range(100) for row in next(new)]
    assert len(set(seen)) == len(seen) == 800 and max(seen) < 1000
    assert next(step_time.same_users(1000))[-1] == 999


def test_memory(step_time):
    import memory

    lines = memory.measure_all(width=64, r=4, users=2, batch=2, tokens=8)
    assert [line["asked"] for line in lines] == [0.60, 0.90, 0.90]
    assert all(line["sharelora_mb"] >= 0 and line["median"] > 0 for line in lines)


def test_peak_is_the_most_at_a_time(step_time):
    import memory

    def work():
        first = torch.zeros(1000)
        del first
        torch.zeros(2000)

    assert memory.peak_bytes(work, "cpu") == 8000


@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
def test_shapes(step_time, quantize, capsys):
    import shapes

    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    shapes.run("tiny", "cpu", quantize, 2, None)
    printed = capsys.readouterr().out
    assert printed.count("step / plain LoRA's") == 2 and "NOT MEASURED" in printed


def test_shape_without_a_gpu_says_what_is_not_measured(step_time, capsys, monkeypatch):
    import shapes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shapes.run("llama3-8b", "cuda", "8bit", 2, None)
    printed = capsys.readouterr().out
    assert printed.startswith("NOT MEASURED: llama3-8b (8bit)") and "Triton" in printed


def test_soak(tmp_path, step_time, capsys):
    import soak

    result = soak.soak(steps=12, users=200, visits="zipf", save_steps=6, block=2)
    printed = capsys.readouterr().out
    assert "CPU time:" in printed and "resident memory:" in printed
    assert [save["step"] for save in result["saves"]] == [6, 12]
    assert len(result["blocks_ms"]) == 6
    # a save writes the users who changed since the last one
    assert 0 < result["saves"][1]["written"] < result["saves"][1]["whole"]


def test_slope(step_time):
    import soak

    change, half = soak.slope([float(block) for block in range(10)])
    assert change == pytest.approx(10) and half == pytest.approx(0, abs=1e-6)


def test_precision(step_time, capsys):
    import precision

    lines = precision.compare(1, 1, users=2, most=8, test_rows=4, texts=50, reading=1)
    assert [(line["bank_dtype"], line["bank_second_moment"]) for line in lines] == precision.FORMS
    assert lines[0]["difference"] == 0


def test_a_script_prints_the_table_and_keeps_it(tmp_path):
    """As `make bench` calls it."""
    command = [sys.executable, BENCHMARKS / "memory.py", "--width", "32", "--batch", "2", "--tokens", "4"]
    done = subprocess.run([*command, "--out", tmp_path / "out.jsonl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("machine: ") and "versions: Python" in done.stdout
    assert done.stdout.count("ratio") == 6
    assert len([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]) == 6


# -- over-optimisation


@pytest.fixture(scope="module")
def overoptimisation(step_time):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import overoptimisation

        yield overoptimisation
    finally:
        sys.path.remove(str(BENCHMARKS))


def small(overoptimisation, **more):
    sizes = {
        **{
            "users": 4,
            "comparisons": (4, 8),
            "common_words": 6,
            "rare_words": 2,
            "topics": 2,
            "prompts": 1,
            "held_out": 4,
        },
        **{"texts": 50, "reading": 5, "hidden_size": 16, "epochs": 1, "pool": 16, "candidates": (1, 4, 16)},
        **{"coefficients": (1.0,), "rloo_steps": 2, "rloo_points": 1, "sampled": 2},
    }
    return overoptimisation.Sizes(**(sizes | more))


WORLD = {"written_share": 0.2, "compared_share": 0.1, "rare_mean": -1.0}


def test_best_of_n_is_the_mean_over_all_subsets(overoptimisation):
    scores, gold = [0.3, -1.0, 2.0, 0.9, 0.1, 1.5], [5.0, 1.0, -2.0, 4.0, 0.0, 3.0]
    order = sorted(range(6), key=lambda row: -scores[row])
    found = overoptimisation.rank_weights(6, (1, 3, 6)) @ [gold[row] for row in order]
    for n, value in zip((1, 3, 6), found, strict=True):
        subsets = list(itertools.combinations(range(6), n))
        best = [gold[max(subset, key=lambda row: scores[row])] for subset in subsets]
        assert value == pytest.approx(sum(best) / len(best))
    assert overoptimisation.best_of_n_kl(1) == 0
    assert overoptimisation.best_of_n_kl(4) == pytest.approx(1.386294 - 0.75, abs=1e-5)


def test_gold_is_the_sum_of_the_words_weights(overoptimisation):
    world = overoptimisation.World(small(overoptimisation), 0, **WORLD)
    weights = world.weights[2]
    by_hand = (2 * weights[1] + weights[6]) / 8**0.5
    assert world.gold(2, ["c1 r0 c1 elsewhere"])[0] == pytest.approx(by_hand)
    rows = world.rows([30, 0, 0, 0])
    assert set(rows["user_id"][:]) == {"user00"}
    better = world.gold(0, rows["chosen"][:]) - world.gold(0, rows["rejected"][:])
    assert (better > 0).sum() > (better < 0).sum()


def test_difference_and_worst_tenth_by_hand(overoptimisation):
    gold = {"plain": ([0.0, 1.0], [1.0, 3.0]), "ellipsoid": ([1.0, 1.5], [2.5, 2.5])}
    lines = [
        {"seed": seed, "set": name, "chosen_by": "calibrated" if name != "plain" else "", "user_id": user}
        | {"point": point, "gold": value if point == 4 else 9.0}
        for name, seeds in gold.items()
        for seed, values in enumerate(seeds)
        for user, value in enumerate(values)
        for point in (1, 4)
    ]
    found = overoptimisation.differences(pandas.DataFrame(lines), "ellipsoid", "calibrated")
    # seeds: .75 and .5; worst of two users: 1 - 0 and 2.5 - 1
    assert found["mean"] == pytest.approx(0.625) and found["worst"] == pytest.approx(1.25)
    assert found["mean_pm"] == pytest.approx(12.706 * 0.125, rel=1e-3)
    assert found["mean_low"] <= 0.625 <= found["mean_high"]


def test_over_optimisation_widths_and_kl_are_the_packages(overoptimisation, tmp_path):
    sizes = small(overoptimisation)
    study = overoptimisation.Study(tmp_path, 0, sizes, **WORLD)
    assert all(len(text.split()) == overoptimisation.LENGTH for pool in study.pools for text in pool)
    study.fit()
    texts, prompts = study.pools[0], ["t0 "] * sizes.pool
    found = study.widths("user03", prompts, texts)
    assert set(found) == {"plain", *overoptimisation.SETS}
    for name, reward in study.rewards.items():
        mean, width = found[name]
        rows = (prompts, texts, ["user03"] * len(texts))
        if reward.form == "worst":
            torch.testing.assert_close(
                torch.tensor(mean - width).float(), torch.tensor(reward(*rows[:2], user_id=rows[2]))
            )
        else:
            expected = reward.score(*rows)
            torch.testing.assert_close(torch.tensor(mean).float(), expected.mean)
            torch.testing.assert_close(torch.tensor(width).float(), expected.std, rtol=1e-4, atol=1e-6)
    study.best_of_n()
    study.rloo("plain", beta=0.01)
    lines = pandas.DataFrame(study.lines)
    first = lines[(lines["method"] == "best-of-n") & (lines["point"] == 1)]
    assert first["gold"].abs().max() < 1e-9  # the mean of the base policy's texts
    gold_itself = lines[lines["set"] == "gold itself"].groupby("point")["gold"].mean()
    assert gold_itself[16] > gold_itself[4] > gold_itself[1]
    kl = lines[lines["method"] == "RLOO"].groupby("point")["kl"].mean()
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[2] > 0


def test_over_optimisation_prints_table_and_verdict(overoptimisation, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overoptimisation, "QUICK", small(overoptimisation, sets=("ellipsoid, base",)))
    overoptimisation.main(["--quick", "--output", str(tmp_path / "picture.png")])
    printed = capsys.readouterr().out
    assert printed.count("over seeds") == 4 and printed.count("reached") + printed.count("missed") == 4
    assert printed.count("| RLOO |") == 2 and "| best-of-n | ellipsoid, base |" in printed
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "picture.json").read_text())
    assert len(content["verdicts"]) == 4 and len(content["proxies"]) == 2
    lines = pandas.read_csv(tmp_path / "picture.csv")
    assert set(lines["seed"]) == {100, 101} and set(lines["comparisons"]) == {4, 8}


def test_policy_steps_and_pessimistic_scoring(step_time, monkeypatch):
    import policy_step

    monkeypatch.setattr(policy_step, "policy", lambda whole=policy_step.policy: whole(1, 64))
    for method, rows in (("dpo", 2), ("rloo", 8), ("grpo", 8)):
        lines = policy_step.step(method, users=2, rows=rows, tokens=3, rounds=1)
        check(lines, 2)
        assert all(line["asked"] == 1.05 and method in line["case"] for line in lines)
    check(policy_step.score(rounds=1, users=5, comparisons=3, rows=4, tokens=3), 1)
    # texts are words, each a token: else both sides would be measured on next to nothing
    words = policy_step.words(5, torch.Generator().manual_seed(0))
    assert len(policy_step.tokenizer()(words)["input_ids"]) == 5


def test_new_users_prints_each_table_and_verdict(step_time, tmp_path, capsys, monkeypatch):
    import new_users

    small = new_users.replace(
        new_users.QUICK, users=10, comparisons=40, epochs=3, newcomers=2, test=8, answers=(2, 10), pool=12, full=(2,)
    )
    monkeypatch.setattr(new_users, "QUICK", small)
    monkeypatch.setattr(sys, "argv", ["new_users.py", "--quick", "--output_dir", str(tmp_path)])
    new_users.main()
    printed = capsys.readouterr().out
    assert printed.count("answers  gauss-newton") == 2 and printed.count("full ") == 1
    # shares at 10 answers of two readings, asking, three of the cost
    assert printed.count("reached)") + printed.count("MISSED)") == 6
    assert "after 0: 5 more" in printed and "after 5: 5 more" in printed and printed.count("10 answers: ") == 2
    kept = json.loads((tmp_path / "quick0" / "result.json").read_text())
    assert len(kept["asking"]["foreseen"]) == len(kept["asking"]["chosen"]) == 2
    assert all(0 <= accuracy <= 1 for _, by_n in kept["curve"].items() for _, accuracy in by_n)
    new_users.main()  # what is kept is used again
    again = capsys.readouterr().out
    assert again.split("cost of a fit")[0].split("accuracy, 1 seeds")[1] in printed


def test_answers_needed_by_hand(step_time):
    import new_users

    assert new_users.needed((5, 10), [0.6, 0.8], 0.7) == pytest.approx(7.5)
    assert new_users.needed((5, 10), [0.6, 0.8], 0.5) == 5 and new_users.needed((5, 10), [0.6, 0.8], 0.9) == float(
        "inf"
    )
    assert new_users.interval([0.1, 0.3]) == "0.200 ±1.271"  # 12.706 * 0.1414 / sqrt(2)
