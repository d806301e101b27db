"""Documents, packed rows and perplexity: against a model of one document at a time, and transformers' own loss."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import LlamaForCausalLM

from qft_utils.language import Losses, document_losses, documents, label_losses, pack, perplexity, perplexity_ratio
from tests.tiny_gguf import CONFIG, write

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(8)  # a fresh model hardly looks at anything: its answers would not tell a leak
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    path = write(tmp_path_factory.mktemp("tokenizer") / "tiny.gguf")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def parts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def test_documents_have_a_beginning_and_an_end(tokenizer):
    (ids,) = documents(["the moth"], tokenizer, 64)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids[1:-1]) == "the moth"


@PROPERTY
@given(size=st.integers(1, 200), length=st.integers(2, 40))
def test_a_long_document_is_cut_and_hardly_a_token_lost(tokenizer, size, length):
    """A last piece of one token predicts nothing, and is dropped."""
    cut, (whole,) = documents(["x" * size], tokenizer, length), documents(["x" * size], tokenizer, 10_000)
    joined = [token for piece in cut for token in piece]
    assert joined == whole[: len(joined)] and len(whole) - len(joined) <= 1
    assert all(2 <= len(piece) <= length for piece in cut)


@pytest.mark.parametrize(
    "texts, length, message",
    [(["a", " \n", ""], 8, r"text 1 of 3 is empty \(2 are\)"), (["a"], 1, "length 1 leaves nothing")],
)
def test_texts_that_cannot_be_learned_are_refused(tokenizer, texts, length, message):
    with pytest.raises(ValueError, match=message):
        documents(texts, tokenizer, length)


@PROPERTY
@given(st.lists(st.integers(2, 16), min_size=1, max_size=40))
def test_packing_keeps_every_document_whole_and_once(lengths):
    whole = [[i] * n for i, n in enumerate(lengths)]
    rows = pack(whole, 16, pad=-1)
    assert len(rows) < 2 * sum(lengths) / 16 + 1, "two rows that are half empty would have become one"
    found = {}
    for row in rows:
        assert len(row["input_ids"]) == len(row["position_ids"]) == len(row["labels"]) == 16
        for token, place, label in zip(row["input_ids"], row["position_ids"], row["labels"], strict=True):
            assert label == (-100 if token == -1 or place == 0 else token)
            if token != -1:
                assert place == len(found.setdefault(token, []))
                found[token].append(place)
    assert {i: len(places) for i, places in found.items()} == dict(enumerate(lengths))


@pytest.mark.parametrize("given_, length", [([[1] * 9], 8), ([], 8)])
def test_what_does_not_fit_is_refused(given_, length):
    with pytest.raises(ValueError, match="for rows of 8"):
        pack(given_, length, 0)


def row_logits(model, row, **options):
    ids, places = (torch.tensor([row[name]]) for name in ("input_ids", "position_ids"))
    with torch.no_grad():
        return model(input_ids=ids, position_ids=places, **options).logits[0]


def test_no_token_sees_another_document(model):
    """Exactly where no cache is in use, as in Trainer. With one, transformers does not look at the positions."""
    first, second = parts(9, 5)
    row = pack([first, second], 16, pad=0)[0]
    alone = model(torch.tensor([second])).logits[0]
    # Another order of the same sums, in float32; a leak is thousands of times larger.
    torch.testing.assert_close(row_logits(model, row, use_cache=False)[9:14], alone, rtol=1e-3, atol=1e-4)
    assert (row_logits(model, row, use_cache=True)[9:14] - alone).abs().max() > 0.1, "transformers mended this: say so"


def test_a_row_has_the_loss_of_its_documents(model):
    pair = parts(9, 5)
    row = {name: torch.tensor([value]) for name, value in pack(pair, 16, pad=0)[0].items()}
    with torch.no_grad():
        loss = model(**row, use_cache=False).loss.item()
    measured = document_losses(model, pair)
    assert loss == pytest.approx(sum(measured.nats) / sum(measured.tokens), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_losses_are_those_of_transformers_one_by_one(model, batch_size):
    several = parts(2, 30, 7, 7, 12)
    measured = document_losses(model, several, batch_size=batch_size)
    assert measured.tokens == (1, 29, 6, 6, 11)
    for part, nats, tokens in zip(several, measured.nats, measured.tokens, strict=True):
        ids = torch.tensor([part])
        with torch.no_grad():
            assert nats / tokens == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_the_model_stays_in_its_mode(model):
    for mode in (True, False):
        model.train(mode)
        document_losses(model, parts(4))
        assert model.training is mode


def test_labels_are_judged_after_their_prompt(model):
    prompts, answers = parts(1, 6, 6, 11, 3), [4, 7]
    have = label_losses(model, prompts, answers, batch_size=3)
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            want = -model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[answers]
        torch.testing.assert_close(have[i], want, rtol=1e-4, atol=1e-5)


def test_nothing_has_no_likelihood(model):
    with pytest.raises(ValueError, match="empty prompt"):
        label_losses(model, [[1], []], [1])


def test_a_prompt_in_a_row_asks_for_nothing():
    pair = parts(9, 5)
    rows = pack(pair, 16, pad=0, given=[7, 4])
    assert rows[0]["labels"] == [-100] * 7 + pair[0][7:] + [-100] * 4 + pair[1][4:] + [-100] * 2
    with pytest.raises(ValueError, match="one to predict"):
        pack(pair, 16, pad=0, given=[9, 1])


@pytest.mark.parametrize("several", [[], [[1]], [[1, 2], []]])
def test_documents_in_which_nothing_is_predicted_are_refused(model, several):
    with pytest.raises(ValueError, match="one to predict"):
        document_losses(model, several)


def test_perplexity_of_a_uniform_model():
    losses = Losses(tuple(n * math.log(50) for n in (3, 8, 5)), (3, 8, 5))
    value = perplexity(losses)
    assert value.value == pytest.approx(50) and value.low == pytest.approx(50) and value.high == pytest.approx(50)


def test_documents_of_one_length_have_students_interval():
    """The ratio is a mean then."""
    nats = (3.0, 5.0, 4.0, 4.5)
    value = perplexity(Losses(nats, (2,) * 4))
    low, high = stats.t.interval(0.95, 3, np.mean(nats) / 2, stats.sem(np.array(nats) / 2))
    assert (math.log(value.low), math.log(value.high)) == pytest.approx((low, high))


def test_the_interval_covers():
    """Of 400 samples of 60 documents, 95 % should hold the truth: by the binomial, 91 to 98 %."""
    generator, covered = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = generator.integers(5, 60, 60)
        topic = generator.normal(2.0, 0.3, 60)  # documents differ, whatever their length
        value = perplexity(Losses(tuple(topic * tokens), tuple(tokens.tolist())))
        covered += value.low <= math.exp(2.0) <= value.high
    assert 0.91 <= covered / 400 <= 0.98


def test_a_ratio_is_of_pairs():
    """Documents differ much, the models by a tenth of a nat: only the pairing shows it."""
    generator = np.random.default_rng(0)
    tokens, nats = (20,) * 40, generator.normal(60, 15, 40)
    first, second = Losses(tuple(nats), tokens), Losses(tuple(nats - 2 + generator.normal(0, 0.1, 40)), tokens)
    ratio = perplexity_ratio(first, second)
    assert ratio.low <= math.exp(-0.1) <= ratio.high < 1
    assert perplexity(second).high > perplexity(first).low
    assert ratio.value == pytest.approx(perplexity(second).value / perplexity(first).value)
    with pytest.raises(ValueError, match="use the same ones"):
        perplexity_ratio(first, Losses(first.nats[:-1], tokens[:-1]))
    with pytest.raises(ValueError, match="no spread"):
        perplexity(Losses((1.0,), (2,)))
