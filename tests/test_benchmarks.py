"""Each benchmark's smallest case runs and prints what it promises; no time is judged here."""

import json
import subprocess
import sys
from pathlib import Path

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
