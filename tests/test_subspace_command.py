"""`trl-sharelora subspace`: its numbers against the layers' own updates, formed; its verdicts on users made to share or not."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scipy import linalg
from sharelora.reference import SHARES, TARGETS, R, randomise, share_config

from trl_sharelora import cli, forget_user
from trl_sharelora.errors import AdapterMismatchError, ConfigError, SubspaceError
from trl_sharelora.scripts.subspace import (
    Module,
    SavedAdapter,
    _Users,
    chance_in_all,
    draw_picture,
    examine,
    explained_in_all,
    subspace,
)
from trl_sharelora.sharelora import get_router
from trl_sharelora.subspace import spectrum


N_USERS = 6
Q = "model.layers.0.self_attn.q_proj"


def make(directory, share="none", users=N_USERS, arch="llama", **overrides):
    """A saved adapter with all its tensors random, and its model."""
    targets = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[arch]
    ids = [f"u{number}" for number in range(users)]
    config = share_config(arch, share, users=ids, **({"target_modules": targets} | overrides))
    model = randomise(get_peft_model(tiny_model(arch), config))
    if config.bank in ("ram", "mmap"):
        working_set = get_router(model).working_sets["default"]
        lease = working_set.acquire(torch.arange(users - 1))  # the last has no record
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            slots = working_set.slots_of(range(users - 1))
            for slot in slots:
                drawn = 0.15 * torch.randn(working_set.weight[slot].shape, generator=generator)
                working_set.weight[slot] = drawn.bfloat16()  # what a bfloat16 record keeps, too
        working_set.stepped(slots)
        working_set.release(lease)
    model.save_pretrained(directory)
    return model


def local(directory, spread, users=N_USERS, start=0.0, targets=("q_proj", "v_proj"), seed=1):
    """A saved LoRA for each user whose ups have a common part and one of their own, `spread` times as large."""
    model = get_peft_model(
        tiny_model("llama"),
        share_config("llama", "none", users=[f"u{n}" for n in range(users)], target_modules=list(targets)),
    )
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        for layer in model.modules():
            if not hasattr(layer, "get_delta_weight"):
                continue
            moves, width = layer.bank("default").weight, layer.in_features
            moves[:, :, :width] = 0.1 * normal(*moves[:, :, :width].shape)
            shared = normal(R, layer.out_features)
            for row in moves:
                own = normal(R, layer.out_features)
                row[:, width:] = normal(R, R) @ shared + spread * own if math.isfinite(spread) else own
            layer.sharelora_B["default"].weight.copy_(start * normal(layer.out_features, R))
    model.save_pretrained(directory)
    return model


def arguments(adapter, *more):
    return cli.make_parser().parse_args(["subspace", str(adapter), *map(str, more)])


def deltas(model, transposed=False):
    """`{module: (users, out, in)}` in float64, as the layers themselves form them."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            users = len(get_router(model).users)
            each = torch.stack([layer.get_delta_weight("default", user).double() for user in range(users)])
            found[name.removeprefix("base_model.model.")] = each.mT if transposed else each
    return found


def singular_values(updates):
    return torch.linalg.svdvals(torch.cat(list(updates), dim=1))


# -- the numbers


CASES = [
    *({"share": share} for share in SHARES),
    {"share": "B", "bank": "mmap"},
    {"share": "A", "bank": "ram"},
    {"share": "none", "bank": "ram"},
    {"share": "diagonal", "bank": "mmap", "bank_dtype": "bfloat16"},
    {"share": "none", "arch": "gpt2", "use_rslora": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_spectra_are_those_of_the_layers_own_updates(case, tmp_path, capsys):
    model = make(tmp_path / "run", **case)
    report = subspace(arguments(tmp_path / "run", "--output_dir", tmp_path / "out"))
    assert report == json.loads((tmp_path / "out" / "spectrum.json").read_text())
    formed = deltas(model, transposed=case.get("arch") == "gpt2")
    assert list(report["modules"]) == list(formed)
    total = common_total = 0.0
    for name, updates in formed.items():
        found = report["modules"][name]
        values = singular_values(updates)
        # the layers multiply in float32
        rank = min(len(values), R if case["share"] in ("B", "AB", "diagonal") else N_USERS * R)
        assert found["rank"] == len(found["singular_values"]) == rank
        np.testing.assert_allclose(found["singular_values"], values[:rank], rtol=1e-4, atol=1e-5 * float(values[0]))
        squares = (values**2).sum()
        np.testing.assert_allclose(found["explained"], ((values**2).cumsum(0) / squares)[:rank], atol=1e-5)
        mean = updates.mean(0)
        assert found["common"] == pytest.approx(float(N_USERS * (mean**2).sum() / squares), abs=1e-5)
        own = singular_values(updates - mean)[: found["personal"]["rank"]]
        np.testing.assert_allclose(found["personal"]["singular_values"], own, rtol=1e-3, atol=1e-4 * float(own[0]))
        total += float(squares)
        common_total += found["common"] * float(squares)
    assert report["all"]["common"] == pytest.approx(common_total / total, abs=1e-5)
    k = min(report["k"], len(report["all"]["explained"]))
    in_all = sum(float((singular_values(updates)[:k] ** 2).sum()) for updates in formed.values()) / total
    assert report["all"]["explained"][k - 1] == pytest.approx(in_all, abs=1e-5)
    out = capsys.readouterr().out
    assert "explained" in out and f"{100 * report['all']['common']:.1f} %" in out


def test_the_factors_of_a_user_and_one_up_for_all(tmp_path):
    for share in SHARES:
        model = make(tmp_path / share, share=share)
        adapter = SavedAdapter(tmp_path / share)
        for module in adapter.shared:
            layer = model.get_submodule(module)
            for row in (0, 3):
                up, down = adapter.user_factors(module, row)
                torch.testing.assert_close(up @ down, layer.get_delta_weight("default", row))
        ups = [up for up, _ in _Users(adapter, module, [0, 1])]
        assert (ups[0] is ups[1]) == (share in ("B", "AB", "diagonal"))


def test_overlap_and_angles_are_scipys(tmp_path):
    model = local(tmp_path, spread=0.3, users=4)
    report = subspace(arguments(tmp_path))
    updates = deltas(model)[Q]
    frames = [torch.linalg.svd(update).U[:, :R].numpy() for update in updates]
    angles = [linalg.subspace_angles(frames[a], frames[b]) for a in range(4) for b in range(a)]
    found = report["modules"][Q]["overlap"]
    assert found["pairs"] == 6
    assert found["mean"] == pytest.approx(np.mean([np.mean(np.cos(each) ** 2) for each in angles]), abs=1e-4)
    assert found["by_chance"] == pytest.approx(R / updates.shape[1])
    lower_medians = sorted(np.degrees(np.sort(each)[(R - 1) // 2]) for each in angles)
    assert found["median_angle_degrees"] == pytest.approx(lower_medians[3], abs=0.01)


def test_in_float32_the_numbers_are_the_same_to_five_digits(tmp_path):
    make(tmp_path, share="B")
    wide, narrow = (subspace(arguments(tmp_path, "--dtype", dtype)) for dtype in ("float64", "float32"))
    for name, module in wide["modules"].items():
        np.testing.assert_allclose(narrow["modules"][name]["singular_values"], module["singular_values"], rtol=1e-4)
    assert narrow["dtype"] == "float32"


def test_all_modules_together_are_weighted_by_their_squared_norm():
    nothing = spectrum([torch.zeros(1, 1)])
    # squares 9 and 1 of 10 in two directions; 30 in one
    first = Module(spectrum([torch.diag(torch.tensor([3.0, 1.0]))]), nothing, 0.0, chance=torch.tensor([[0.5, 1.0]]))
    second = Module(spectrum([torch.tensor([[30.0**0.5]])]), nothing, 0.0, chance=torch.tensor([[0.9, 1.0]]))
    assert explained_in_all([first, second], 2) == pytest.approx([39 / 40, 1])
    assert chance_in_all([first, second]).tolist() == [pytest.approx([(10 * 0.5 + 30 * 0.9) / 40, 1])]


# -- the verdict


def answer(directory, *more):
    return subspace(arguments(directory, *more))["verdict"]


@pytest.mark.parametrize(("spread", "expected"), [(0.0, "yes"), (0.3, "yes"), (3.0, "not clear"), (math.inf, "no")])
def test_users_who_were_made_to_share_a_column_space_or_not(tmp_path, capsys, spread, expected):
    local(tmp_path, spread)
    found = answer(tmp_path)
    assert found["answer"] == expected, found
    out = capsys.readouterr().out
    assert f"Is sharing one B justified for this log? {expected.upper()}" in out
    assert "true updates are unknown" in out


def test_unrelated_users_are_rarely_taken_for_sharing_ones(tmp_path):
    """99 draws: one in a hundred would be above all of them in truth; here each module of 20 adapters is looked at."""
    above = modules = 0
    generator = torch.Generator().manual_seed(0)
    model = local(tmp_path, math.inf)
    for number in range(20):
        with torch.no_grad():
            for layer in model.modules():
                if hasattr(layer, "get_delta_weight"):
                    moves = layer.bank("default").weight
                    moves.copy_(torch.randn(moves.shape, generator=generator))
        model.save_pretrained(tmp_path)
        adapter = SavedAdapter(tmp_path)
        for module in examine(adapter, list(range(N_USERS)), R, torch.float64, seed=100 * number).values():
            above += module.whole.explained(R) > float(module.chance[:, R - 1].max())
            modules += 1
    assert modules == 80 and above <= 4  # binomial(80, .01): 4 or fewer with probability .998


@pytest.mark.parametrize("share", ["B", "AB", "diagonal"])
def test_a_shared_b_cannot_justify_itself(tmp_path, share):
    make(tmp_path, share=share)
    found = answer(tmp_path)
    assert found["answer"] == "cannot be told"
    assert "shared by construction" in found["why"] and "--method lora-local" in found["why"]
    assert any(f"Of the r={R} directions" in line for line in found["evidence"])


@pytest.mark.parametrize(("kept", "said"), [(1, "a smaller r"), (R, "r may be too small")])
def test_a_shared_b_tells_how_much_of_its_rank_is_used(tmp_path, kept, said):
    make(tmp_path, share="B")
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    for key, tensor in state.items():
        if "sharelora_B" in key:  # directions of equal length; the others almost unused
            lengths = torch.tensor([1.0 if j < kept else 0.01 for j in range(R)])
            state[key] = (torch.linalg.qr(tensor).Q * lengths).contiguous()
    save_file(state, path, metadata={"format": "pt"})
    evidence = " ".join(answer(tmp_path)["evidence"])
    assert said in evidence


def test_a_common_start_of_the_ups_is_no_evidence(tmp_path):
    model = local(tmp_path, spread=0.0, start=1.0)
    report = subspace(arguments(tmp_path))
    assert report["verdict"]["answer"] == "cannot be told" and "warm start" in report["verdict"]["why"]
    updates = deltas(model)[Q]
    frame = torch.linalg.qr(
        model.get_submodule(f"base_model.model.{Q}").sharelora_B["default"].weight.detach().double()
    ).Q
    rest = updates - frame @ (frame.mT @ updates)
    assert report["modules"][Q]["outside_start"] == pytest.approx(
        float((rest**2).sum() / (updates**2).sum()), abs=1e-5
    )


def test_more_directions_than_could_tell(tmp_path):
    local(tmp_path, spread=0.3, users=2)  # two users of rank 4 are 8 directions, whatever they are like
    found = answer(tmp_path, "--k", 8)
    assert found["answer"] == "not clear" and "smaller --k" in found["why"]


def test_a_shared_down_projection_is_said_to_be(tmp_path):
    model = make(tmp_path, share="A")
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "get_delta_weight"):
                layer.sharelora_common["default"].weight.zero_()
    model.save_pretrained(tmp_path)
    found = answer(tmp_path)
    assert found["answer"] == "no"  # random
    assert any("shared A" in line for line in found["evidence"])


def test_a_control_with_labels_at_random_can_take_a_yes_back(tmp_path):
    wanted = TARGETS["llama"]
    local(tmp_path / "run", spread=0.3, targets=wanted)
    local(tmp_path / "same", spread=0.3, targets=wanted, seed=2)
    local(tmp_path / "apart", spread=math.inf, targets=wanted)
    found = {name: answer(tmp_path / "run", "--control", tmp_path / name) for name in ("run", "same", "apart")}
    assert {name: each["answer"] for name, each in found.items()} == {
        "run": "not clear",  # no closer than itself
        "same": "not clear",
        "apart": "yes",
    }
    assert "labels drawn at random" in found["same"]["why"]
    assert "above that in 14 of 14 modules" in found["apart"]["evidence"][-1]
    assert "above that in 0 of 14 modules" in found["run"]["evidence"][-1]
    control = subspace(arguments(tmp_path / "apart"))
    level = control["all"]["explained"][control["k"] - 1]
    assert f"{100 * level:.1f} %" in found["apart"]["evidence"][-1]
    make(tmp_path / "B", share="B")
    with pytest.raises(ConfigError, match="--control has share='B'"):
        answer(tmp_path / "run", "--control", tmp_path / "B")


# -- ties, users, modules


def test_ties_are_printed_and_stored(tmp_path, capsys):
    model = make(tmp_path, share="B", users=2)
    with torch.no_grad():
        layer = model.get_submodule(f"base_model.model.{Q}")
        layer.sharelora_B["default"].weight.copy_(torch.eye(layer.out_features, R))
        layer.sharelora_common["default"].weight.copy_(torch.eye(R, layer.in_features))
        layer.bank("default").weight.zero_()
    model.save_pretrained(tmp_path)
    report = subspace(arguments(tmp_path, "--k", 2))
    assert [module["tied_at_k"] for module in report["modules"].values()] == [True, False, False, False]
    out = capsys.readouterr().out
    assert "50.0 % tie" in out and "directions k=2 and k+1 are equally strong in 1 module(s)" in out


def test_some_users_at_random_and_no_forgotten_one(tmp_path, capsys):
    make(tmp_path, share="B")
    forget_user(tmp_path, "u2")
    report = subspace(arguments(tmp_path))
    assert report["users"] == N_USERS - 1 and report["num_users"] == N_USERS
    first, same, other = (subspace(arguments(tmp_path, "--users", 3, "--seed", seed)) for seed in (0, 0, 1))
    assert first["users"] == 3 and first["modules"] == same["modules"] and first["modules"] != other["modules"]
    assert "Updates of 3 of 6 users" in capsys.readouterr().out
    # one of the three-user samples of the five who are left
    adapter = SavedAdapter(tmp_path)
    module = next(iter(adapter.shared))
    expected = first["modules"][Q]["singular_values"]
    left = [0, 1, 3, 4, 5]
    samples = [[a, b, c] for a in left for b in left if b > a for c in left if c > b]
    found = [
        rows
        for rows in samples
        if np.allclose(
            singular_values([up.double() @ down.double() for up, down in _Users(adapter, module, rows)])[:R],
            expected,
            rtol=1e-6,
        )
    ]
    assert len(found) == 1


def test_modules_without_an_update_are_counted_not_examined(tmp_path, capsys):
    model = make(tmp_path, share="B")
    with torch.no_grad():
        model.get_submodule(f"base_model.model.{Q}").sharelora_B["default"].weight.zero_()
    model.save_pretrained(tmp_path)
    report = subspace(arguments(tmp_path))
    assert Q not in report["modules"] and len(report["modules"]) == 3 and report["modules_without_update"] == 1
    assert "1 more modules have no update" in capsys.readouterr().out


def test_many_modules_do_not_fill_the_screen(tmp_path, capsys):
    make(tmp_path, share="B", target_modules=TARGETS["llama"])
    subspace(arguments(tmp_path))
    out = capsys.readouterr().out
    assert "... 2 more" in out and out.count("model.layers.") == 12


# -- what cannot be examined


@pytest.mark.parametrize(
    ("share", "users", "more", "error", "message"),
    [
        ("B", 1, [], SubspaceError, "has 1 user, who shares with nobody"),
        ("B", 3, ["--k", R + 1], SubspaceError, rf"--k {R + 1} came, but the updates of 3 users in {Q} have rank {R}"),
        ("none", 2, ["--k", 9], SubspaceError, "have rank 8. Choose k <= 8"),
        ("B", 3, ["--k", 0], ConfigError, "--k 0"),
        ("B", 3, ["--users", 1], ConfigError, "--users 1"),
    ],
)
def test_what_has_no_common_subspace(tmp_path, share, users, more, error, message):
    make(tmp_path, share=share, users=users)
    with pytest.raises(error, match=message):
        subspace(arguments(tmp_path, *more))


def test_an_untrained_adapter(tmp_path):
    get_peft_model(tiny_model(), share_config()).save_pretrained(tmp_path)
    with pytest.raises(SubspaceError, match="has not been trained"):
        subspace(arguments(tmp_path))


def test_one_line_and_status_2_at_the_command_line(tmp_path, capsys):
    assert cli.main(["subspace", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("trl-sharelora: ConfigError: There is no adapter_config.json")
    make(tmp_path / "one", users=1)
    assert cli.main(["subspace", str(tmp_path / "one")]) == 2
    assert capsys.readouterr().err.startswith("trl-sharelora: SubspaceError: ")
    make(tmp_path / "run", share="B")
    assert cli.main(["subspace", str(tmp_path / "run")]) == 0


def test_directories_that_are_torn_or_something_else(tmp_path):
    get_peft_model(tiny_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(
        tmp_path / "plain"
    )
    with pytest.raises(ConfigError, match="LoraConfig"):
        SavedAdapter(tmp_path / "plain")
    make(tmp_path / "run")
    path = tmp_path / "run" / "adapter_model.safetensors"
    state = load_file(path)
    common = next(key for key in state if "sharelora_common" in key)
    save_file({key: tensor for key, tensor in state.items() if key != common}, path, metadata={"format": "pt"})
    with pytest.raises(AdapterMismatchError, match="lacks common"):
        SavedAdapter(tmp_path / "run")
    bank = next(key for key in state if "sharelora_A" in key)
    save_file(state | {bank: state[bank][:2].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(AdapterMismatchError, match=f"2 rows for {N_USERS} users"):
        SavedAdapter(tmp_path / "run")
    save_file(
        {key: tensor for key, tensor in state.items() if "sharelora" not in key}, path, metadata={"format": "pt"}
    )
    with pytest.raises(AdapterMismatchError, match="no adapted module"):
        SavedAdapter(tmp_path / "run")
    path.unlink()
    with pytest.raises(AdapterMismatchError, match="No adapter_model.safetensors"):
        SavedAdapter(tmp_path / "run")


def test_a_diverged_training_is_named(tmp_path):
    model = make(tmp_path, share="B")
    with torch.no_grad():
        model.get_submodule(f"base_model.model.{Q}").bank("default").weight[3, 0, 0] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(SubspaceError, match="update of user 3 has NaN"):
        subspace(arguments(tmp_path))


# -- the picture


@pytest.mark.parametrize("share", ["B", "none"])
def test_the_picture_shows_the_numbers(tmp_path, share, monkeypatch):
    from matplotlib.figure import Figure

    make(tmp_path / "run", share=share)
    report = subspace(arguments(tmp_path / "run", "--output_dir", tmp_path / "out"))
    assert (tmp_path / "out" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    draw_picture(report, tmp_path / "unused.png")
    left, right = drawn[0].axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    np.testing.assert_allclose(lines["all users' updates"][1:], 100 * np.array(report["all"]["explained"]))
    np.testing.assert_allclose(lines["less their mean"][1:], 100 * np.array(report["all"]["explained_personal"]))
    assert ("unrelated users" in lines) == (share == "none")
    commons = [100 * module["common"] for module in report["modules"].values()]
    assert [bar.get_width() for bar in right.patches][: len(commons)] == pytest.approx(commons)
    assert [bar.get_width() for bar in right.patches][len(commons) :] == pytest.approx([100 - c for c in commons])


def test_without_matplotlib_there_are_numbers(tmp_path, monkeypatch, capsys):
    make(tmp_path / "run", share="B")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    subspace(arguments(tmp_path / "run", "--output_dir", tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["spectrum.json"]
    assert "trl-sharelora[report]" in capsys.readouterr().out


def test_a_control_that_cannot_tell(tmp_path):
    """Of two modules no sign test could: the answer stays, and says so. Of other modules nothing can be compared."""
    two = ["q_proj"]
    local(tmp_path / "run", spread=0.3, targets=two)
    local(tmp_path / "apart", spread=math.inf, targets=two)
    found = answer(tmp_path / "run", "--control", tmp_path / "apart")
    assert (
        found["answer"] == "yes"
        and "2 modules are too few to tell that from chance (5 are needed)" in found["evidence"][-1]
    )
    local(tmp_path / "other", spread=math.inf, targets=["v_proj"])
    with pytest.raises(ConfigError, match="do not have the same trained modules .4 are in one of them only"):
        answer(tmp_path / "run", "--control", tmp_path / "other")
