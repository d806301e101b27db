"""Reviews as prompts: what the tokenizer makes of them, and which tokens answer."""

import pytest

from qft_utils import gguf_files
from qft_utils.prompts import ANSWERS, answers, prompts
from tests.tiny_gguf import TOKENS, write


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return gguf_files.load(write(tmp_path_factory.mktemp("prompts") / "tiny.gguf"))[1]


class Words:
    """A tokenizer with a token for each answer, and for nothing else."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ANSWERS.index(text)]}


def test_a_prompt_ends_where_the_answer_belongs(tokenizer):
    (ids,) = prompts(["the moth"], tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "Review: the moth\nSentiment:"


def test_solved_examples_stand_before_with_their_answers(tokenizer):
    (ids,) = prompts(["the moth"], tokenizer, shots=[("good", 1), ("bad", 0)])
    solved = f"Review: good\nSentiment:{ANSWERS[1]}\n\nReview: bad\nSentiment:{ANSWERS[0]}\n\n"
    assert tokenizer.decode(ids[1:]) == solved + "Review: the moth\nSentiment:"


def test_a_blank_review_is_refused(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        prompts(["fine", "  "], tokenizer)


def test_each_label_has_its_token():
    assert answers(Words()) == [0, 1]


def test_answers_of_several_tokens_are_refused(tokenizer):
    assert len(TOKENS) < 300  # a vocabulary of bytes
    with pytest.raises(ValueError, match="first token alone"):
        answers(tokenizer)
