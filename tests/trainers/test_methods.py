"""The paper's variants and baselines by name: what each trains, and that its stages are what the paper says."""

import pytest
import torch
from datasets import Dataset
from helpers import preference_rows, save_tiny
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl import RewardConfig, RewardTrainer

from trl_sharelora import (
    ShareLoraConfig,
    ShareLoraRewardConfig,
    ShareLoraRewardTrainer,
    UserReward,
    fit_confidence,
    use_users,
)
from trl_sharelora.errors import ConfigError, MethodError
from trl_sharelora.sharelora import ShareLoraLayer
from trl_sharelora.sharelora.head import Float32Linear, PersonalHead
from trl_sharelora.trainers.methods import METHODS, train_method


USERS = ["user0", "user1", "user2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("base"), num_hidden_layers=4)


def rows(n=24):
    return Dataset.from_list(preference_rows(3, n))


def arguments(folder, cls=ShareLoraRewardConfig, **changes):
    values = dict(
        output_dir=str(folder),
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        num_train_epochs=3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=7,
    )
    return cls(**(values | changes))


def adapter(**changes):
    return ShareLoraConfig(**(dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) | changes))


def head_state(model):
    return next(
        p.detach().clone() for n, p in model.state_dict().items() if n.endswith("modules_to_save.default.weight")
    )


def test_the_names_are_the_papers():
    assert set(METHODS) == {
        *("psharelora-si", "psharelora-g", "psharelora-wu", "lora-global", "lora-local"),
        *("share-rep", "share-a", "kernel", "svd"),
    }
    with pytest.raises(MethodError, match="method='psharelora-uw' is unknown .did you mean 'psharelora-wu'"):
        train_method("psharelora-uw", "x", None, None, None)


def test_lora_global_is_trls_trainer(base, tmp_path):
    torch.manual_seed(0)
    mine = train_method("lora-global", base, arguments(tmp_path / "a"), rows(), adapter())
    assert type(mine) is RewardTrainer
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    theirs = RewardTrainer(base, arguments(tmp_path / "b", RewardConfig), train_dataset=rows(), peft_config=lora)
    theirs.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (mine, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == 12


class _Notes(TrainerCallback):
    def __init__(self):
        self.stages, self.losses = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.stages.append({"lr": args.learning_rate, "max_steps": state.max_steps, "steps": 0})

    def on_step_end(self, args, state, control, **kwargs):
        self.stages[-1]["steps"] = state.global_step


@pytest.mark.parametrize(
    ("name", "first", "second", "rate"),
    [("psharelora-wu", 1, 11, 1e-2), ("psharelora-g", 8, 4, 1e-2 / 3), ("share-a", 1, 11, 1e-2)],
)
@pytest.mark.parametrize("budget", [dict(), dict(max_steps=12)], ids=str)
def test_the_stages_make_the_same_steps_in_all(base, tmp_path, name, first, second, rate, budget):
    """12 steps: 8 + 4 for (G), 1 + 11 for (WU); the first is the beginning of the LoRA-global run."""
    notes = _Notes()
    torch.manual_seed(0)
    trainer = train_method(name, base, arguments(tmp_path / "run", **budget), rows(), adapter(), callbacks=[notes])
    assert [stage["steps"] for stage in notes.stages] == [first, second]
    assert notes.stages[0]["max_steps"] == 12 and notes.stages[1]["max_steps"] == second
    assert notes.stages[0]["lr"] == 1e-2 and notes.stages[1]["lr"] == pytest.approx(rate)
    torch.manual_seed(0)
    whole = train_method("lora-global", base, arguments(tmp_path / "global"), rows(), adapter())
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert notes.losses[:first] == losses[:first] and notes.losses[first:] != losses[first:]
    state = load_file(tmp_path / "run" / "warm-up" / "adapter_model.safetensors")
    assert len(state) == 2 * 8 + 1 and len(losses) == 12
    layer = next(m for m in trainer.model.modules() if isinstance(m, ShareLoraLayer))
    assert layer.share["default"] == METHODS[name].share
    assert layer.bank("default").weight.detach().abs().amax(dim=(1, 2)).min() > 0  # every user has moved


def test_the_second_stage_starts_as_the_first_ended(base, tmp_path):
    """The exact copy: at step 0 of (WU) every user's rewards are those of the warm-up's LoRA."""
    seen = {}

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            if isinstance(next((m for m in model.modules() if isinstance(m, ShareLoraLayer)), None), ShareLoraLayer):
                with use_users(model, USERS), torch.no_grad():
                    mode = model.training
                    seen["rewards"] = model.eval()(torch.arange(10, 25).reshape(3, 5)).logits
                    model.train(mode)

    train_method("psharelora-wu", base, arguments(tmp_path), rows(), adapter(), callbacks=[Start()])
    plain = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), tmp_path / "warm-up"
    ).eval()
    with torch.no_grad():
        expected = plain(torch.arange(10, 25).reshape(3, 5)).logits
    torch.testing.assert_close(seen["rewards"], expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().min() > 0


def test_lora_local_shares_nothing(base, tmp_path):
    """Each user trained with the others is what he is alone: no parameter that trains is anybody else's."""
    together = train_method("lora-local", base, arguments(tmp_path / "all"), rows(), adapter())
    names = [n for n, p in together.model.named_parameters() if p.requires_grad]
    assert names and all("sharelora_A" in n or n.endswith("moves.weight") for n in names)
    head = next(m for m in together.model.modules() if isinstance(m, PersonalHead))
    assert head.moves.weight.detach().abs().sum(dim=(1, 2)).min() > 0
    # one step on a batch of two users: each one's gradient is that of his rows alone, up to the mean over the batch
    for user in range(3):
        alone = preference_rows(3, 24)[user::3]
        model = _stepped(base, tmp_path / f"u{user}", alone, 8, user)
        mixed = _stepped(base, tmp_path / f"m{user}", preference_rows(3, 24), 24, user)
        for key, tensor in model.items():
            # Adam's first step is lr * sign of the gradient, whatever the batch is divided by
            torch.testing.assert_close(tensor, mixed[key], rtol=1e-2, atol=2e-4)


def _stepped(base, folder, data, batch, user):
    torch.manual_seed(0)
    args = arguments(folder, per_device_train_batch_size=batch, max_steps=1, max_grad_norm=0.0)
    trainer = ShareLoraRewardTrainer(
        base,
        args,
        train_dataset=Dataset.from_list(data),
        peft_config=adapter(share="none", personal_head=True, users=USERS),
    )
    trainer.train()
    return {n: p.detach()[user].clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_share_rep_leaves_the_lower_layers_alone(base, tmp_path):
    """70 % of four layers: the uppermost two (2.8 rounded down) are personal."""
    trainer = train_method("share-rep", base, arguments(tmp_path, num_train_epochs=1), rows(), adapter())
    layers = {
        n.split("layers.")[1].split(".")[0] for n, m in trainer.model.named_modules() if isinstance(m, ShareLoraLayer)
    }
    assert layers == {"2", "3"}
    with pytest.raises(
        MethodError,
        match=r"layers_to_transform=\[1\] came with method='share-rep' .*adapts the uppermost 30% of the layers",
    ):
        train_method("share-rep", base, arguments(tmp_path), rows(), adapter(layers_to_transform=[1]))


@pytest.mark.parametrize(("name", "share"), [("psharelora-si", "B"), ("kernel", "AB"), ("svd", "diagonal")])
def test_one_stage_forms(base, tmp_path, name, share):
    trainer = train_method(
        name,
        base,
        arguments(tmp_path, num_train_epochs=1),
        rows(),
        adapter(init_users="independent") if share == "B" else adapter(),
    )
    assert trainer.model.peft_config["default"].share == share
    assert trainer.model.peft_config["default"].init_users == ("independent" if share == "B" else "common")
    assert not (tmp_path / "warm-up").exists()


def test_a_warm_start_of_ones_own_and_where_it_is_refused(base, tmp_path):
    train_method("lora-global", base, arguments(tmp_path / "g", num_train_epochs=1), rows(), adapter()).save_model()
    args = arguments(tmp_path / "own", warm_start=str(tmp_path / "g"), learning_rate=0.0, max_steps=1)
    trainer = train_method("psharelora-si", base, args, rows(), adapter())
    assert torch.equal(
        head_state(trainer.model),
        load_file(tmp_path / "g" / "adapter_model.safetensors")["base_model.model.score.weight"],
    )
    for name, why in (("psharelora-wu", "trains its warm-up itself"), ("lora-global", "is one LoRA for all")):
        with pytest.raises(MethodError, match=why):
            train_method(name, base, args, rows(), adapter())


def test_resuming_takes_the_warm_up_that_is_there(base, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=4)
    torch.manual_seed(0)
    straight = train_method("psharelora-wu", base, args, rows(), adapter())
    before = (tmp_path / "warm-up" / "adapter_model.safetensors").stat().st_mtime_ns
    torch.manual_seed(5)
    again = train_method(
        "psharelora-wu", base, args, rows(), adapter(), resume_from_checkpoint=str(tmp_path / "checkpoint-8")
    )
    assert (tmp_path / "warm-up" / "adapter_model.safetensors").stat().st_mtime_ns == before
    for (name, one), other in zip(straight.model.named_parameters(), again.model.parameters(), strict=True):
        if one.requires_grad:
            assert torch.equal(one, other), name


def test_the_norm_constraint_reaches_the_trainer(base, tmp_path):
    from trl_sharelora.sharelora.norms import UserNorms

    norms = {}
    for bound in (None, 0.02):
        args = arguments(tmp_path, user_norm_bound=bound, num_train_epochs=1)
        trainer = train_method("psharelora-si", base, args, rows(), adapter())
        norms[bound] = UserNorms(trainer.model).norms([0, 1, 2])
    # at the end all are within, also who was visited before the shared factor's last steps
    assert float(norms[None].min()) > 0.03 and float(norms[0.02].max()) <= 0.02 * (1 + 1e-4)


def test_small_budgets_are_the_same_budget(base, tmp_path):
    """One step per epoch: 3 in all, 1 + 2; rounding epochs would make 4."""
    notes = _Notes()
    train_method("psharelora-wu", base, arguments(tmp_path), rows(6), adapter(), callbacks=[notes])
    assert [stage["steps"] for stage in notes.stages] == [1, 2]
    with pytest.raises(MethodError, match="psharelora-wu has two stages, but all of the training is 1 optimiser step"):
        train_method("psharelora-wu", base, arguments(tmp_path / "one", max_steps=1), rows(), adapter())


def test_the_baselines_head_is_float32_too(base, tmp_path):
    """Under autocast and on a bf16 base, as in all other methods: in bf16 close rewards are ties."""
    args = arguments(tmp_path, max_steps=1, bf16=True, model_init_kwargs={"dtype": "bfloat16"})
    trainer = train_method("lora-global", base, args, rows(), adapter())
    head = next(m for n, m in trainer.model.named_modules() if n.endswith("score.modules_to_save.default"))
    assert isinstance(head, Float32Linear) and head.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = trainer.model(torch.arange(10, 40).reshape(6, 5)).logits
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_what_contradicts_a_method_is_refused(base, tmp_path):
    for name, config, what in (
        ("lora-local", adapter(share="none", bank="mmap"), "bank='mmap'.*needs a resident bank for its heads"),
        ("psharelora-wu", adapter(init_users="independent"), "init_users='independent'.*starts all users alike"),
    ):
        with pytest.raises(MethodError, match=what):
            train_method(name, base, arguments(tmp_path), rows(), config)
    assert not (tmp_path / "warm-up").exists()
    with pytest.raises(ConfigError, match="init_users='independent' came with a stream"):
        stream = rows().to_iterable_dataset()
        train_method(
            "psharelora-si", base, arguments(tmp_path, max_steps=2), stream, adapter(init_users="independent")
        )


def test_resuming_before_the_second_stages_first_checkpoint(base, tmp_path):
    """The warm-up is there, the second stage has nothing yet: it starts, and ends where a straight run does."""
    torch.manual_seed(0)
    straight = train_method("psharelora-wu", base, arguments(tmp_path), rows(), adapter())
    torch.manual_seed(0)
    again = train_method("psharelora-wu", base, arguments(tmp_path), rows(), adapter(), resume_from_checkpoint=True)
    assert again.state.global_step == straight.state.global_step == 11


def test_ellipsoids_of_users_with_heads_of_their_own(base, tmp_path):
    trainer = train_method("lora-local", base, arguments(tmp_path), rows(), adapter())
    trainer.save_model()
    sets = fit_confidence(trainer.model, rows(), trainer.processing_class, output_dir=tmp_path)
    assert sets.num_users == 3
    reward = UserReward(tmp_path, pessimism="ellipsoid", pessimism_coefficient=1.0, device="cpu")
    plain = UserReward(tmp_path, pessimism=None, device="cpu")
    prompts, completions = ["w1 w2 "] * 3, ["w3 w4"] * 3
    lower, mean = (one(prompts, completions, user_id=USERS) for one in (reward, plain))
    assert all(low < middle for low, middle in zip(lower, mean, strict=True)) and len(set(mean)) == 3
