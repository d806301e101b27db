"""Finds measured numbers that somebody typed into prose, where a value should have produced them.

    python -m tools.check_prose

It reads book/**/*.md and, of notebooks/*.py, Markdown cells, alternative texts and the templates of `say`,
`claim`, `Markdown`, `print` and what figures say. Glue roles, {placeholders}, code, links and formulas are left
out (a formula that is only a number is not). The allow-list holds what is true by definition or comes from the
literature, with the reason. Blind to numbers in words ("twice"), bare ones in tables, strings built elsewhere.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml

ALLOWED = "tools/prose_allowed.yml"
TEMPLATES = frozenset({"say", "claim", "Markdown", "print", "set_title", "suptitle", "title", "text", "annotate"})
SHOWN = frozenset({"title", "label", "xlabel", "ylabel", "suptitle"})  # keywords of any call
HIDDEN = "\0"  # stands for what is no prose: neither a digit nor a space
UNIT = rf"""(?: % | ‰ | per\s?cent\b | percentage\ points?\b | points?\b(?!\s+(?:out|at|to|of)\b) | pp\b
    | (?:(?<=[\s;])[sh] | [mµμun]s | secs? | seconds? | mins? | minutes? | hours?)\b
    | (?:deci ?bels? | (?:milli|micro)seconds? | msecs? | (?:kilo|mega|giga)bytes? | nats? | pts)\b
    | (?:[kKMGT]i?B | dB | [fF][pP][sS] | [GT]FLOPS?)\b | times\b | fold\b
    | (?<=\d)[×x](?!\w|\s*\d) | [×x](?!\s*[\w${HIDDEN}(]) | [×x]\s+(?:as\b|more\b|less\b|worse\b|\w+er\b)
    | \w+\s?(?:/\s?s | per\s+second)\b )"""
GAP = r"(?:[\s*_-]|&\w+;|\\(?=%))*"
NUMBER = re.compile(rf"(?<![A-Za-z\d.{HIDDEN}])\d(?:[\d.,]*\d)?[kM]?{GAP}{UNIT}", re.VERBOSE)
FENCE = re.compile(r"\s*(?P<ticks>`{3,}|~{3,})(?P<info>.*)")
CODE_DIRECTIVE = re.compile(r"\{(code|sourcecode|literal|math|raw|eval-rst|toctree|bibliography|include)")
NOT_PROSE = [
    r"<!--.*?-->",
    r"\{[\w:.-]+\}`[^`]*`",
    r"(?<!`)(?P<tick>`{1,2})(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=tick)(?!`)",
    r"\$\$.*?\$\$",
    r"(?<![\\$])\$(?=\S)(?:\\.|[^$\n\\]|\n(?!\s*\n))+?\$(?!\d)",
    r"\]\([^)\n]*\)",
    r"<?https?://[^\s)>]+",
    r"\{[^{}\n]*\}",
    r"^\s*:(?!alt:)[\w-]+:.*?$",
    r"</?[A-Za-z][^>\n]*>",
]
MASK = re.compile("|".join(NOT_PROSE), re.DOTALL | re.MULTILINE)
FORMULA_NUMBER = re.compile(r"(?<![\\$\w])\$(\d[\d.,]*)\s*(?:(\\%)|(\\times))?\$(?!\d)")


@dataclass(frozen=True)
class Prose:
    """A stretch of text as people read it; its line i is line `first + i` of `file`."""

    file: str
    first: int
    text: str


def mask(text: str) -> str:
    """`text` with all that is no prose blotted out; length and line breaks stay."""
    shown = FORMULA_NUMBER.sub(_plain_number, _without_code(text))
    return MASK.sub(lambda match: _blot(match[0]), shown)


def _plain_number(match: re.Match[str]) -> str:
    return (match[1] + ("%" if match[2] else "×" if match[3] else "")).ljust(len(match[0]))


def _blot(text: str) -> str:
    return re.sub(r"[^\n]", HIDDEN, text)


def _without_code(text: str) -> str:
    """Blot out fenced code, but not directives such as notes, which hold prose."""
    kept, fences = [], []
    for line in text.split("\n"):
        fence = FENCE.fullmatch(line)
        if fence and fences and not fence["info"].strip() and fence["ticks"].startswith(fences[-1][0]):
            kept.append(_blot(line))
            fences.pop()
            continue
        if fence and not (fences and fences[-1][1]):
            info = fence["info"].strip()
            fences.append((fence["ticks"], not info.startswith("{") or bool(CODE_DIRECTIVE.match(info))))
        kept.append(_blot(line) if fences and fences[-1][1] else line)
    return "\n".join(kept)


def find_numbers(text: str) -> list[re.Match[str]]:
    """Matches of a digit followed by a unit of measurement in the prose of `text`."""
    return list(NUMBER.finditer(mask(text)))


def page_prose(file: str, source: str) -> Iterator[Prose]:
    """The text of a MyST page without its front matter."""
    header = re.match(r"---\n.*?\n---\n", source, re.DOTALL)
    start = header.end() if header else 0
    yield Prose(file, 1 + source.count("\n", 0, start), source[start:])


def notebook_prose(file: str, source: str) -> Iterator[Prose]:
    """Markdown cells, alternative texts (in cell headers) and sentence templates of a py:percent notebook."""
    lines = source.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("# %%")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        alternatives = re.findall(r'"alt":\s*"((?:[^"\\]|\\.)*)"', lines[start])
        yield from (Prose(file, start + 1, text) for text in alternatives)
        if "[markdown]" in lines[start]:
            text = [re.sub(r"^# ?", "", line) for line in lines[start + 1:end]]
            yield Prose(file, start + 2, "\n".join(text))
    yield from (Prose(file, line, text) for line, text in templates(ast.parse(source)))


def templates(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of strings passed to `say`, `claim`, `print` and figures; computed parts become {}."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            shown = [keyword.value for keyword in call.keywords if keyword.arg in SHOWN]
            shown += call.args if _called(call) in TEMPLATES else []
            texts = ((node.lineno, _text(node)) for node in shown)
            yield from ((line, text) for line, text in texts if text)


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) or "{}" for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (_text(left) or "{}") + (_text(right) or "{}")
        case ast.Call(func=ast.Attribute(value=inner)):  # "…".format(…)
            return _text(inner)
    return ""


def read_prose(root: Path) -> list[Prose]:
    """All prose of the book."""
    kinds = {"notebooks/*.py": notebook_prose, "book/**/*.md": page_prose}
    files = ((path, reader) for pattern, reader in kinds.items() for path in sorted(root.glob(pattern)))
    parts = (reader(p.relative_to(root).as_posix(), p.read_text(encoding="utf-8")) for p, reader in files)
    return [prose for part in parts for prose in part]


def entry_problem(root: Path, entry: dict[str, str]) -> str | None:
    """What an entry of the allow-list lacks; None for a sound one."""
    if not all(entry.get(key) for key in ("file", "text", "reason")):
        return "needs file, text and reason"
    if entry.get("class") == "definition":
        return None
    key, library = entry.get("citation"), root / "book/references.bib"
    if not key or not re.search(rf"@\w+\{{\s*{re.escape(key)}\s*,", library.read_text(encoding="utf-8")):
        return f"needs a citation that stands in book/references.bib (got {key!r}), or class: definition"
    page = root / entry["file"]
    if not page.is_file() or key not in page.read_text(encoding="utf-8"):
        return f"is not cited where it stands; put {{cite}}`{key}` into {entry['file']}"
    return None


def covers(entry: dict[str, str], prose: Prose, found: re.Match[str]) -> bool:
    """Whether the entry's text stands in `prose` around the number."""
    pattern = r"\s+".join(map(re.escape, entry["text"].split()))
    spans = [match.span() for match in re.finditer(pattern, prose.text)]
    inside = any(start <= found.start() and found.end() <= end for start, end in spans)
    return inside and fnmatch(prose.file, entry["file"])


def check(root: Path) -> list[str]:
    """Problems of the whole book and of its allow-list, a line each with the remedy."""
    entries = yaml.safe_load((root / ALLOWED).read_text(encoding="utf-8")) or []
    faults = [(entry, entry_problem(root, entry)) for entry in entries]
    problems = [f"{ALLOWED}: {entry.get('text')!r} {fault}" for entry, fault in faults if fault]
    sound = [entry for entry, fault in faults if not fault]
    found = [(prose, match) for prose in read_prose(root) for match in find_numbers(prose.text)]
    idle = [entry for entry in sound if not any(covers(entry, *place) for place in found)]
    typed = [place for place in found if not any(covers(entry, *place) for entry in sound)]
    problems += [f"{ALLOWED}: {e['text']!r} allows nothing in {e['file']}; remove the entry" for e in idle]
    return [_typed_line(*place) for place in typed] + problems


def _typed_line(prose: Prose, found: re.Match[str]) -> str:
    line = prose.first + prose.text.count("\n", 0, found.start())
    number = " ".join(prose.text[found.start():found.end()].split())
    remedy = "render it from a value (`say` in a notebook, glue on a page), or give it a reason in"
    return f"{prose.file}:{line}: {number!r} is typed by hand; {remedy} {ALLOWED}"


if __name__ == "__main__":
    found = check(Path.cwd())
    print(*found, sep="\n")
    sys.exit(bool(found))
