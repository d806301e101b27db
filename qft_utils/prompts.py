"""Sentiment asked of a language model: a review as a prompt, and one token that answers."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

TEMPLATE = "Review: {text}\nSentiment:"
ANSWERS = (" negative", " positive")  # by label: rotten, fresh


def prompts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, shots: Sequence[tuple[str, int]] = ()
) -> list[list[int]]:
    """Token ids of each review as a prompt; shots: solved examples, review and label, that stand before each.

    Raises ValueError for a text without a word.
    """
    if not all(text.strip() for text in texts):
        raise ValueError("a review is empty: drop it first")
    solved = "".join(f"{TEMPLATE.format(text=text)}{ANSWERS[label]}\n\n" for text, label in shots)
    asked = [solved + TEMPLATE.format(text=text) for text in texts]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [[*begin, *ids] for ids in tokenizer(asked, add_special_tokens=False, verbose=False)["input_ids"]]


def answers(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token of each answer. Raises ValueError for a tokenizer that needs several tokens for one."""
    ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    if any(len(tokens) != 1 for tokens in ids):
        raise ValueError(f"the answers {ANSWERS} are {ids} here: the first token alone would not say which")
    return [tokens[0] for tokens in ids]
