"""Put the tables of results/*.json into README.md here, each between its markers, and short ones into the project's.

    python -m benchmarks.render

A results file NAME.json with a key ``table`` ({"columns": [...], "rows": [[...]]}), or with several tables as text
in a key ``markdown``, goes between the lines ``<!-- NAME -->`` and ``<!-- /NAME -->``; without such a file they say so.
What it has in a key ``summary`` goes between such lines of the project's README.md, if they are there.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write a benchmark's results file; lists and objects that hold no others take one line."""
    innermost = re.compile(r"(?<=[\[{])\n\s*([^\[\]{}]*?)\n\s*(?=[\]}])")
    text = innermost.sub(lambda match: re.sub(r"\n\s*", " ", match[1]), json.dumps(results, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text + "\n")
    scratch.replace(path)


def choices(left_open: Mapping[str, str]) -> list[str]:
    """A table of what a paper leaves open and what was chosen instead, as lines of Markdown."""
    return as_table(["left open by the paper", "chosen here"], left_open.items()).splitlines()


def rendered(page: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """``page`` with the table between the markers of ``name``.

    Raises:
        ValueError: If the page lacks them.
    """
    return inserted(page, name, as_table(columns, rows))


def as_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, a line for each of the rows."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def inserted(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the markers of ``name``.

    Raises:
        ValueError: If the page lacks them.
    """
    between = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not between.search(page):
        raise ValueError(f"README.md has no lines <!-- {name} --> and <!-- /{name} -->")
    return between.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def with_results(page: str, short: str, results: Path) -> tuple[str, str]:
    """Both pages with the tables of every file in the folder ``results`` that has one, and "not run" where none is.

    Raises:
        ValueError: If ``page`` lacks the markers of a file.
    """
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            continue
        if "table" in found:
            page = rendered(page, path.stem, found["table"]["columns"], found["table"]["rows"])
        elif "markdown" in found:
            page = inserted(page, path.stem, found["markdown"].strip())
        if "summary" in found and f"<!-- {path.stem} -->" in short:
            short = inserted(short, path.stem, found["summary"])
    for name in re.findall(r"^<!-- (?!/)(.+) -->$", page, re.MULTILINE):
        if not (results / f"{name}.json").exists():
            page = inserted(page, name, f"{name}: not run")
    return page, short


def main() -> None:
    """Render every results file that has a table."""
    argparse.ArgumentParser(description="put the tables of results/*.json into both README.md").parse_args()
    page, short = HERE / "README.md", HERE.parent / "README.md"
    texts = with_results(page.read_text(), short.read_text(), HERE / "results")
    page.write_text(texts[0])
    short.write_text(texts[1])


if __name__ == "__main__":
    main()
