"""Turns the site's roles in a chapter's Markdown into what any notebook viewer shows.

`{cite:t}` and `{cite}` become the authors and the year, linked to the paper; `{term}`, `{doc}` and `{ref}` keep
their text.
"""

import re
from functools import partial
from pathlib import Path

from pybtex.database import BibliographyData, parse_file

_CITE = re.compile(r"\{cite(:[a-z]+)?\}`([^`]+)`")
_TEXT = re.compile(r"\{(?:term|doc|ref)\}`([^`<]+?)\s*(?:<[^`]*>)?`")


def plain(markdown: str, bibliography: Path) -> str:
    """`markdown` without roles. Raises KeyError for a citation that `bibliography` (BibTeX) does not have."""
    if "{cite" in markdown:
        entries = parse_file(str(bibliography), "bibtex")
        markdown = _CITE.sub(partial(_citations, entries), markdown)
    return _TEXT.sub(r"\1", markdown)


def _citations(entries: BibliographyData, found: re.Match[str]) -> str:
    shown = "; ".join(_citation(entries, key.strip(), textual=found[1] == ":t") for key in found[2].split(","))
    return shown if found[1] == ":t" else f"({shown})"


def _citation(entries: BibliographyData, key: str, textual: bool) -> str:
    entry = entries.entries[key]
    names = [" ".join(person.last_names) for person in entry.persons["author"]]
    who = names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al."
    year = entry.fields["year"]
    return f"[{who} ({year})]({_address(entry.fields)})" if textual else f"[{who}, {year}]({_address(entry.fields)})"


def _address(fields: dict[str, str]) -> str:
    if "eprint" in fields:
        return f"https://arxiv.org/abs/{fields['eprint']}"
    return f"https://doi.org/{fields['doi']}" if "doi" in fields else fields["url"]
