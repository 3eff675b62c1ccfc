"""Tiny models, a tokenizer and preference rows, all built here: no download, CPU, fractions of a second."""

import os
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)


ARCHITECTURES = ("llama", "gptj", "qwen3", "gpt2", "bert")
WORDS = [f"w{number}" for number in range(90)]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>", "<tools>", "<end>"]
MAX_POSITIONS = 128
# One role token, the words, one end token per message. `tools` and `shout` are there so that tests can see whether tools and
# chat_template_kwargs arrive.
CHAT_TEMPLATE = (
    "{% if tools %}<tools>{% endif %}{% if shout is defined and shout %}w0 {% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 98 entries (`w0` ... `w89`, split at white space) with eos, another pad, and a chat template."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>", "<tools>", "<end>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        padding_side="right",
    )


def _config(arch: str, **overrides):
    common = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    # ten times the usual spread, so that different rows get clearly different rewards
    common["initializer_range"] = 0.2
    rotary = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
    }
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS}
    gpt |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if arch == "llama":
        return LlamaConfig(**(common | rotary | overrides))
    if arch == "qwen3":
        return Qwen3Config(**(common | rotary | {"head_dim": 8} | overrides))
    if arch == "gptj":
        return GPTJConfig(**(common | gpt | {"rotary_dim": 4} | overrides))
    if arch == "gpt2":
        return GPT2Config(**(common | gpt | {"summary_first_dropout": 0.0} | overrides))
    if arch == "bert":
        rotary.pop("num_key_value_heads")
        return BertConfig(
            **(common | rotary | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | overrides)
        )
    raise ValueError(f"unknown architecture {arch!r}; there are {ARCHITECTURES}")


def _seeded(auto_class, config, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto_class.from_config(config, dtype=torch.float32)


def tiny_model(arch: str = "llama", num_labels: int = 1, seed: int = 0, **overrides) -> PreTrainedModel:
    """A float32 sequence classifier of two layers, width 32, no dropout. `overrides` go to its config."""
    return _seeded(AutoModelForSequenceClassification, _config(arch, num_labels=num_labels, **overrides), seed)


def tiny_causal(arch: str = "llama", seed: int = 0, **overrides) -> PreTrainedModel:
    """A float32 causal language model of two layers, width 32, no dropout. `overrides` go to its config."""
    return _seeded(AutoModelForCausalLM, _config(arch, **overrides), seed)


def save_tiny(arch: str, directory: str | os.PathLike, causal: bool = False, seed: int = 0, **overrides) -> str:
    """Write a tiny model and its tokenizer, so that `directory` serves as a model path; returns it as text."""
    model = tiny_causal(arch, seed, **overrides) if causal else tiny_model(arch, seed=seed, **overrides)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(Path(directory))


def keep_unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """The same arithmetic on every CPU: bitsandbytes repacks 4-bit weights where there is AVX512-BF16."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def preference_rows(
    users: int | list[str] = 3,
    n: int = 24,
    seed: int = 0,
    conversational: bool = False,
    prompt: bool = True,
    margin: bool = False,
) -> list[dict]:
    """`n` preference rows in all, the users taking turns; texts are random words of different lengths.

    Args:
        users (`int` or `list[str]`): How many users (`user0`, `user1`, ...), or their ids.
        n (`int`): Number of rows.
        seed (`int`): Seed of the texts.
        conversational (`bool`): Lists of messages instead of text.
        prompt (`bool`): Whether the prompt is a column of its own (explicit) or part of both answers (implicit).
        margin (`bool`): Whether rows carry a margin in [0, 1).
    """
    user_ids = [f"user{number}" for number in range(users)] if isinstance(users, int) else list(users)
    draw = random.Random(seed)
    rows: list[dict] = []
    for number in range(n):
        question = " ".join(draw.choices(WORDS, k=draw.randint(2, 6))) + " "
        answers: list[str] = []
        while len(answers) < 2:
            answer = " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))
            if answer not in answers:
                answers.append(answer)
        row: dict = {"user_id": user_ids[number % len(user_ids)]}
        if conversational:
            ask = [{"role": "user", "content": question}]
            chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
        else:
            ask, (chosen, rejected) = question, answers
        row |= {"prompt": ask, "chosen": chosen, "rejected": rejected} if prompt else {}
        row |= {} if prompt else {"chosen": ask + chosen, "rejected": ask + rejected}
        row |= {"margin": draw.random()} if margin else {}
        rows.append(row)
    return rows
