"""Typed-in numbers: what the check must find, what it must leave alone, and that the book has none."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tools import check_prose

ROOT = Path(__file__).resolve().parent.parent
UNITS = [
    "%", " %", "&nbsp;%", "\u202f%", " ms", " \u00b5s", " s", " seconds", " minutes", "kB", " MB", " GB",
    " MiB", "×", "x", " times", "-fold", " points", " percentage points", " dB", " a/s", " items per second",
]
NUMBERS = st.one_of(
    st.integers(0, 10**6).map(str),
    st.integers(1000, 10**7).map("{:,}".format),
    st.floats(0, 1000).map("{:.2f}".format),
)
WORDS = st.text("abcdefg ,;", max_size=20)
HIDING = [
    "`{}`", "``a ` {}``", "```\n{}\n```", "~~~python\n{}\n~~~", "```{{code-block}} text\n{}\n```",
    "<!-- {} -->", "<span title='{}'>", "$$\nq = {}\n$$", "$q = {}$", "[words](page.md#{})",
    "{{glue:text}}`a::{}`", "```{{figure}} a.png\n:width: {}\n```",
]


def typed(text: str) -> list[str]:
    return [" ".join(match[0].split()) for match in check_prose.find_numbers(text)]


@given(WORDS, NUMBERS, st.sampled_from(UNITS), st.sampled_from(["", ".", ", and so on", ")", "\n"]))
def test_a_number_with_a_unit_is_found(before, number, unit, after):
    assert len(typed(f"{before} {number}{unit}{after}")) == 1


@given(NUMBERS, st.sampled_from(UNITS), st.sampled_from(HIDING))
def test_no_number_is_found_in_what_is_no_prose(number, unit, hiding):
    text = "Words before\n\n" + hiding.format(f"{number}{unit}") + "\n\nwords after."
    assert typed(text) == []
    assert typed(text + " It takes 5 ms.") == ["5 ms"]


@given(st.text(max_size=200))
def test_mask_keeps_length_and_lines(text):
    masked = check_prose.mask(text)
    assert len(masked) == len(text)
    assert [i for i, c in enumerate(masked) if c == "\n"] == [i for i, c in enumerate(text) if c == "\n"]


@pytest.mark.parametrize("text", [
    "It is 3x faster.", "It is 3 x faster.", "1.5 × smaller", "**84.2** %", "_84.2 %_", "84.2\n% of them",
    "$84.2$ %", r"$84.2\%$", r"$1.5\times$ as fast", "5-10 ms", "a < 5 ms and b > 3", "about 90k tokens/s",
    "```{note}\nIt takes 5 ms.\n```", ":::{note}\nIt takes 5 ms.\n:::", "| int8 | 5 ms |",
    "```{note}\n```python\n1 ms\n```\n```\nIt takes 5 ms.", "- in 5 ms", "> 5 ms", "{x} and 5 ms",
    "5 ms, [a](b 5 ms)",
])  # fmt: skip
def test_found(text):
    assert len(typed(text)) == 1


@pytest.mark.parametrize("text", [
    "", "int8 times float32", "8 bits and 4 bytes", "a 3x3 kernel, 3 × 3, 64x64", "Table 2 points out a loss",
    "chapter 3", "in 2015 and the 1990s", "all 0s and 1s", "{accuracy/int8:.1%} and {x} ms", "$b$ times",
    "{glue:text}`../notebooks/01_a.ipynb::accuracy/int8:.1f` %", "<https://example.org/5%20ms>", "v1.5x%",
    "`a` 5 `b` ms", "$a$ 5 $b$ ms", "10 sentences", "3 modules, 5 messages, 2 steps",
    "````{note}\n```python\n5 ms\n```\n````",
])  # fmt: skip
def test_left_alone(text):
    assert typed(text) == []


NOTEBOOK = '''# ---
# jupyter: {}
# ---

# %% [markdown]
# # Title
#
# It takes 5 ms.

# %% mystnb={"image": {"alt": "Int8 is 2x faster"}}
x = 5  # 5 ms
plt.title(f"{x:.1f} ms, 7 % less")
print("9 ms")
axes.set(title="2.1x faster", ylabel="time (ms)")
axes.plot(x, label="40 decibels")

# %%
results.say("Saves {bytes/int8} MB, "
            "or 3 points")
claim("at least {} ms".format(x), x > 0)
'''


def test_notebook_lines_are_named():
    prose = check_prose.notebook_prose("a.py", NOTEBOOK)
    found = [(p.first + p.text.count("\n", 0, m.start()), m[0]) for p in prose
             for m in check_prose.find_numbers(p.text)]
    figures = [(13, "9 ms"), (14, "2.1x"), (15, "40 decibels")]
    assert found == [(8, "5 ms"), (10, "2x"), (12, "7 %"), *figures, (18, "3 points")]


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "tools").mkdir()
    (tmp_path / "book/references.bib").write_text("@article{hinton2015,\n title={Distilling}}\n")
    allow(tmp_path)
    return tmp_path


def allow(root, *entries):
    (root / "tools/prose_allowed.yml").write_text(yaml.safe_dump(list(entries)))


def write(root, text):
    (root / "book/page.md").write_text(text)


FACT = {"file": "book/page.md", "text": "reached 53.1 %", "reason": "Table 3", "citation": "hinton2015"}
LEVEL = {"file": "*", "text": "95 % interval", "reason": "a level that is chosen", "class": "definition"}


def test_page_line_is_named_with_the_remedy(book):
    write(book, "---\ntitle: 5 %\n---\n# Page\n\nIt takes\n5 ms.\n")
    [problem] = check_prose.check(book)
    assert problem.startswith("book/page.md:7: '5 ms' is typed by hand; render it from a value")


def test_facts_and_definitions_are_allowed(book):
    write(book, "It reached\n53.1 % {cite}`hinton2015`, 95 % interval.")
    assert len(check_prose.check(book)) == 2
    allow(book, FACT, LEVEL)
    assert check_prose.check(book) == []


@pytest.mark.parametrize(("change", "problem"), [
    ({"citation": "nobody"}, "needs a citation"), ({"citation": None}, "needs a citation"),
    ({"reason": ""}, "needs file, text and reason"), ({"text": "exceeded 53.1 %"}, "allows nothing"),
    ({"file": "book/other.md"}, "not cited where it stands"),
])  # fmt: skip
def test_faulty_entries_are_named_and_allow_nothing(book, change, problem):
    write(book, "It reached 53.1 % {cite}`hinton2015`.")
    allow(book, FACT | change)
    typed_line, entry_line = check_prose.check(book)
    assert "'53.1 %' is typed by hand" in typed_line
    assert problem in entry_line


def test_fact_must_be_cited_on_its_page(book):
    write(book, "It reached 53.1 %.")
    allow(book, FACT)
    assert any("put {cite}`hinton2015` into book/page.md" in line for line in check_prose.check(book))


def test_entry_covers_only_its_own_words(book):
    write(book, "It reached 53.1 % {cite}`hinton2015`, and later 53.1 %.")
    allow(book, FACT)
    assert len(check_prose.check(book)) == 1


def test_the_book_has_no_typed_numbers():
    assert check_prose.check(ROOT) == []
