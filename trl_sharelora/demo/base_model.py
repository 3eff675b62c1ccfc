"""A small language model and its tokenizer, made on the spot from the demo's own texts.

No real language model fits into a demo that needs no network, so this one is built: a word-level tokenizer and a Llama
of two layers that reads some thousand question-and-reply texts once or twice. It is written to disk and from then on
treated as any model a user would name by path.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows every word of `texts`."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # words and punctuation apart
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=[PAD, EOS, UNK]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 64, num_layers: int = 2) -> LlamaForCausalLM:
    """A Llama with random weights (about 130,000 of them at the default size)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def read_texts(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> list[float]:
    """Causal language modelling on `texts`, the plain loop.

    Args:
        texts (`list[str]`):
            One document each; an end-of-sequence token is added.
        steps (`int`):
            Optimiser steps; the learning rate goes down to zero on a half cosine.

    Returns:
        The loss of every step, nats per token.
    """
    tokens = tokenizer([text + EOS for text in texts], padding=True, return_tensors="pt")
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(texts), (batch_size,), generator=generator)
        width = int(tokens["attention_mask"][rows].sum(1).max())  # padding is on the right
        loss = model(
            input_ids=tokens["input_ids"][rows, :width],
            attention_mask=tokens["attention_mask"][rows, :width],
            labels=labels[rows, :width],
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def build_base_model(
    directory: Path, corpus: list[str], other_texts: list[str], steps: int, seed: int, **shape: int
) -> dict[str, float]:
    """Make tokenizer and model, let the model read `corpus`, and save both to `directory`.

    Args:
        other_texts (`list[str]`):
            Further texts whose words the tokenizer is to know.
        **shape (`int`):
            Of [`make_model`].

    Returns:
        `parameters`, `words`, `first_loss` and `last_loss` (nats per token; the mean of five steps each).
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer([*corpus, *other_texts])
    model = make_model(tokenizer, **shape)
    losses = read_texts(model, tokenizer, corpus, steps=steps, seed=seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {
        "parameters": model.num_parameters(),
        "words": len(tokenizer),
        "first_loss": sum(losses[:5]) / max(len(losses[:5]), 1),
        "last_loss": sum(losses[-5:]) / max(len(losses[-5:]), 1),
    }
