"""Pages whose tables are written by scripts, between marks."""

from __future__ import annotations

from pathlib import Path

from qk.files import replace_file


def fill(page: Path, mark: str, text: str) -> None:
    """Puts text between the comments `mark: begin` and `mark: end` of a page."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = page.read_text().partition(begin)
    after = rest.partition(end)[2]
    replace_file(page, f"{before}{begin}\n{text}\n{end}{after}".encode())
