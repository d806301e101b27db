"""What a teacher reads: grades.csv, and a page with a histogram and the hardest exercises."""

import csv
import html
import io
from collections import defaultdict
from pathlib import Path

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Grades: summary</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; color: #111; background: #fff }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem; border-bottom: 1px solid #ccc; text-align: left }}
rect {{ fill: #1f5f9f }}</style></head>
<body><h1>Grades: summary</h1>{body}</body></html>
"""

TEXT = 'text-anchor="middle" font-size="12"'


def write(graded: list[dict], strange: list[str], out: Path) -> None:
    """Both files, each whole or not at all. graded: records of `grade.grade_one`; strange: lines about other files."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("grades.csv", table(graded)), ("summary.html", summary(graded, strange))):
        part = out / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(out / name)


def table(graded: list[dict]) -> str:
    """CSV: a row for each student; a column for each exercise, a total for each notebook and over all, and notes."""
    exercises = sorted({(record["assignment"], name) for record in graded for name in record["scores"]})
    notebooks = sorted({assignment for assignment, _ in exercises})
    rows = defaultdict(dict)
    for record in graded:
        rows[record["student"]][record["assignment"]] = record
    text = io.StringIO()
    writer = csv.writer(text)
    columns = [f"{assignment[:2]}/{name}" for assignment, name in exercises]
    totals = [f"{assignment[:2]}/total" for assignment in notebooks]
    writer.writerow(["student", *columns, *totals, "total", "possible", "to grade by hand", "notes"])
    for student, records in sorted(rows.items()):
        cells = [records[a]["scores"].get(name, {}).get("score", "") if a in records else "" for a, name in exercises]
        sums = [
            sum(score["score"] for score in records[a]["scores"].values()) if a in records else "" for a in notebooks
        ]
        possible = sum(s["possible"] for record in records.values() for s in record["scores"].values())
        by_hand = [name for record in records.values() for name, s in record["scores"].items() if s["by_hand"]]
        notes = "; ".join(note for record in records.values() for note in record["notes"])
        formula = ("=", "+", "-", "@")  # what a spreadsheet would take for one
        safe = [f"'{value}" if value.startswith(formula) else value for value in (student, notes)]
        writer.writerow([safe[0], *cells, *sums, sum(s for s in sums if s != ""), possible, " ".join(by_hand), safe[1]])
    return text.getvalue()


def summary(graded: list[dict], strange: list[str]) -> str:
    """HTML: by notebook a histogram of what was graded by machine, and the hardest exercises; then the notes."""
    parts = []
    for assignment in sorted({record["assignment"] for record in graded}):
        records = [record for record in graded if record["assignment"] == assignment]
        parts.append(
            f"<h2>{html.escape(assignment)}: {len(records)} submissions</h2>{_histogram(records)}{_hardest(records)}"
        )
    notes = [f"{record['student']}, {record['assignment']}: {note}" for record in graded for note in record["notes"]]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in [*notes, *strange])
    return PAGE.format(body="".join(parts) + (f"<h2>To look at</h2><ul>{items}</ul>" if items else ""))


def _share(record: dict) -> float:
    automatic = [score for score in record["scores"].values() if not score["by_hand"]]
    return sum(s["score"] for s in automatic) / max(1, sum(s["possible"] for s in automatic))


def _histogram(records: list[dict]) -> str:
    counts = [0] * 10
    for record in records:
        counts[min(9, int(10 * _share(record)))] += 1
    tallest = max(counts)
    bars = "".join(
        f'<rect x="{60 * i + 4}" y="{120 - 100 * n / tallest:.0f}" width="52" height="{100 * n / tallest:.0f}"></rect>'
        f'<text x="{60 * i + 30}" y="{114 - 100 * n / tallest:.0f}" {TEXT}>{n or ""}</text>'
        f'<text x="{60 * i + 30}" y="136" {TEXT}>{10 * i}–{10 * i + 10} %</text>'
        for i, n in enumerate(counts)
    )
    said = ", ".join(f"{n} from {10 * i} to {10 * i + 10} %" for i, n in enumerate(counts) if n)
    return f'<svg role="img" aria-label="Points reached: {said}" viewBox="0 0 600 140" width="600">{bars}</svg>'


def _hardest(records: list[dict]) -> str:
    reached = defaultdict(list)
    for record in records:
        for name, score in record["scores"].items():
            if not score["by_hand"]:
                reached[name].append(score["score"] / score["possible"])
    order = sorted(reached, key=lambda name: sum(reached[name]) / len(reached[name]))
    rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{sum(reached[n]) / len(reached[n]):.0%}</td></tr>" for n in order)
    return f"<table><tr><th>hardest first</th><th>mean share of its points</th></tr>{rows}</table>"
