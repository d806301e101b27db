"""Texts for a causal language model: documents of tokens, rows that hold several of them without a leak, perplexity.

    rows = pack(documents(texts, tokenizer, 128), 128, pad=tokenizer.pad_token_id)  # a datasets.Dataset, for Trainer
    value = perplexity(document_losses(model, documents(held_out, tokenizer, 128)))

A row's positions begin at 0 with each document. transformers makes of that an attention mask in blocks, so that no
token sees the document before its own, where no other mask is passed and no cache is in use. The first token of a
document is never a target: nothing in its own document comes before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from qft_utils.measure import Estimate

IGNORED = -100


def documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Token ids of each text between the tokenizer's beginning and end, in pieces of at most `length` tokens.

    A text that is longer than `length` becomes several documents, none of them with a single token.
    Raises ValueError for a text without a word, a length under 2, and a tokenizer without such tokens.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None or end is None:
        raise ValueError(f"{type(tokenizer).__name__} has no token for beginning or end: set bos_token and eos_token")
    if length < 2:
        raise ValueError(f"length {length} leaves nothing to predict: use 2 or more tokens")
    blank = [i for i, text in enumerate(texts) if not text.strip()]
    if blank:
        raise ValueError(f"text {blank[0]} of {len(texts)} is empty ({len(blank)} are): drop them first")
    found = []
    for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        whole = [begin, *ids, end]
        found += [whole[i : i + length] for i in range(0, len(whole), length) if len(whole) - i > 1]
    return found


def pack(
    parts: Sequence[Sequence[int]], length: int, pad: int, given: Sequence[int] | None = None
) -> datasets.Dataset:
    """Rows of `length` tokens, each filled with whole documents: columns input_ids, position_ids, labels.

    The longest document is placed first, each into the fullest row that has room for it (best fit). What stays empty
    is filled with `pad`, which no label asks for.
    given: how many tokens of each are a prompt, which no label asks for either; by default the first one.
    Raises ValueError for a document that is longer than a row, and for one in which nothing is predicted.
    """
    given = [1] * len(parts) if given is None else given
    longest = max(map(len, parts), default=0)
    if longest > length or not parts:
        raise ValueError(f"{len(parts)} documents, the longest of {longest} tokens, for rows of {length}")
    if not all(0 < prompt < len(part) for part, prompt in zip(parts, given, strict=True)):
        raise ValueError(f"{len(parts)} documents: each needs a token to begin with, and one to predict")
    rows: list[list[tuple[Sequence[int], int]]] = []
    room: list[list[int]] = [[] for _ in range(length + 1)]  # by free tokens: which rows
    for part, prompt in sorted(zip(parts, given, strict=True), key=lambda pair: len(pair[0]), reverse=True):
        free = next((f for f in range(len(part), length + 1) if room[f]), None)
        row = room[free].pop() if free is not None else len(rows)
        if free is None:
            rows.append([])
        rows[row].append((part, prompt))
        room[(length if free is None else free) - len(part)].append(row)
    return datasets.Dataset.from_list([_row(row, length, pad) for row in rows])


def _row(parts: Sequence[tuple[Sequence[int], int]], length: int, pad: int) -> dict[str, list[int]]:
    rest = length - sum(len(part) for part, _ in parts)
    return {
        "input_ids": [token for part, _ in parts for token in part] + [pad] * rest,
        "position_ids": [place for part, _ in parts for place in range(len(part))] + [0] * rest,
        "labels": [t for part, n in parts for t in ([IGNORED] * n + list(part[n:]))] + [IGNORED] * rest,
    }


@dataclass(frozen=True)
class Losses:
    """Of each document: the sum of its tokens' negative log-likelihoods, in nats, and how many were predicted."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]


@torch.inference_mode()
def document_losses(
    model: nn.Module, parts: Sequence[Sequence[int]], given: Sequence[int] | None = None, batch_size: int = 16
) -> Losses:
    """What the model, in evaluation mode, makes of each document by itself, in their order.

    given: how many tokens of each are a prompt, whose own losses do not count; by default the first one.
    Sorted by length while it computes, and padded at the end, where no token of a causal model looks.
    Raises ValueError for a document in which nothing is predicted.
    """
    given = [1] * len(parts) if given is None else given
    if not parts or not all(0 < prompt < len(part) for part, prompt in zip(parts, given, strict=True)):
        raise ValueError(f"{len(parts)} documents: each needs a token to begin with, and one to predict")
    device, mode = next(model.parameters()).device, model.training
    model.eval()
    nats = np.zeros(len(parts))
    order = sorted(range(len(parts)), key=lambda i: len(parts[i]))
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            nats[chosen] = _batch_losses(model, [parts[i] for i in chosen], [given[i] for i in chosen], device)
    finally:
        model.train(mode)
    return Losses(tuple(nats.tolist()), tuple(len(part) - n for part, n in zip(parts, given, strict=True)))


def _batch_losses(model: nn.Module, parts: list, given: list[int], device: torch.device) -> list[float]:
    width = max(map(len, parts))
    rests = [width - len(part) for part in parts]
    ids = torch.tensor([[*part, *[0] * rest] for part, rest in zip(parts, rests, strict=True)], device=device)  # N, L
    mask = torch.tensor([[1] * len(part) + [0] * rest for part, rest in zip(parts, rests, strict=True)], device=device)
    asked = mask * (torch.arange(width, device=device) >= torch.tensor(given, device=device)[:, None])  # N, L
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()  # N, L-1, V
    loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (loss * asked[:, 1:]).sum(1).tolist()


def perplexity(losses: Losses) -> Estimate:
    """exp of the mean loss of a token, with a 95 % interval over documents.

    The mean is a ratio of two sums over documents, and its error that of a ratio (Cochran 1977, Sampling Techniques,
    equation 6.13, for an infinite population): documents are drawn, not tokens. Raises ValueError for one document.
    """
    mean = _ratio(np.array(losses.nats), np.array(losses.tokens))
    return Estimate(*(math.exp(v) for v in (mean.value, mean.low, mean.high)))


def perplexity_ratio(first: Losses, second: Losses) -> Estimate:
    """Perplexity of the second over that of the first, on the same documents: 1 is a tie, less is better.

    Raises ValueError where the two are not of the same documents.
    """
    if first.tokens != second.tokens:
        raise ValueError(f"{len(first.tokens)} and {len(second.tokens)} documents, of other lengths: use the same ones")
    change = _ratio(np.array(second.nats) - np.array(first.nats), np.array(first.tokens))
    return Estimate(*(math.exp(v) for v in (change.value, change.low, change.high)))


def _ratio(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    if len(counts) < 2:
        raise ValueError(f"{len(counts)} document has no spread: use two or more")
    value = sums.sum() / counts.sum()
    error = math.sqrt(((sums - value * counts) ** 2).sum() / (len(counts) - 1) / len(counts)) / counts.mean()
    half = stats.t.ppf(0.975, len(counts) - 1) * error
    return Estimate(float(value), float(value - half), float(value + half))


@torch.inference_mode()
def label_losses(
    model: nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[int], batch_size: int = 16
) -> Tensor:
    """Nats of each answer, a token, after each prompt, (prompts, answers): the least is what the model would say.

    The model is in evaluation mode, and takes `logits_to_keep` as transformers' causal models do: only the last
    place of each prompt goes through the head. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("an empty prompt has no next token: give at least one token of each")
    device, order = next(model.parameters()).device, sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = torch.empty(len(prompts), len(answers))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        last = torch.tensor([len(prompts[i]) - 1 for i in chosen])
        width = int(last.max()) + 1
        ids = torch.tensor([[*prompts[i], *[0] * (width - len(prompts[i]))] for i in chosen], device=device)
        places, which = last.unique(return_inverse=True)
        mask = (torch.arange(width) <= last[:, None]).to(device)
        logits = model(input_ids=ids, attention_mask=mask.long(), logits_to_keep=places.to(device)).logits
        said = logits[torch.arange(len(chosen)), which].float().log_softmax(-1)  # N, V
        found[chosen] = -said[:, list(answers)].cpu()
    return found
