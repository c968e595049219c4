"""One table, four ways to show it: rich on a terminal, aligned lines elsewhere, Markdown, HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable


@dataclass
class Table:
    """rows hold text or numbers, already rounded; None shows as an empty cell. Numbers are aligned right."""

    title: str
    headers: list[str]
    rows: list[list[Any]] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [["" if value is None else str(value) for value in row] for row in self.rows]

    def is_numeric(self, column: int) -> bool:
        """Whether every filled cell of the column starts like a number."""
        values = [cells[column] for cells in self.cells() if cells[column]]
        return bool(values) and all(v[0].isdigit() or v[0] in "-+(" for v in values)

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=self.title or None, title_justify="left", header_style="bold")
        for i, header in enumerate(self.headers):
            table.add_column(header, justify="right" if self.is_numeric(i) else "left", no_wrap=i == 0)
        for cells in self.cells():
            table.add_row(*(c.replace("[", r"\[") for c in cells))
        return table

    def plain(self) -> str:
        """Aligned lines without marks."""
        rows = [self.headers, *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.headers))]
        right = [self.is_numeric(i) for i in range(len(self.headers))]
        lines = [self.title] if self.title else []
        for row in rows:
            padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)

    def markdown(self) -> str:
        """Without the title."""
        marks = ["---:" if self.is_numeric(i) else "---" for i in range(len(self.headers))]
        rows = [self.headers, marks, *([c.replace("|", r"\|") for c in cells] for cells in self.cells())]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def html(self) -> str:
        """With the title as a heading, in a box that scrolls sideways."""
        right = [' class="n"' if self.is_numeric(i) else "" for i in range(len(self.headers))]
        head = "".join(f"<th{r}>{escape(h)}</th>" for h, r in zip(self.headers, right, strict=True))
        body = "".join(
            "<tr>" + "".join(f"<td{r}>{escape(c)}</td>" for c, r in zip(cells, right, strict=True)) + "</tr>"
            for cells in self.cells()
        )
        caption = f"<h3>{escape(self.title)}</h3>" if self.title else ""
        return f'{caption}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def show(table: Table, console: Console | None = None) -> None:
    """Rich on a terminal, plain lines elsewhere."""
    console = console or Console()
    if console.is_terminal:
        console.print(table.rich())
    else:
        console.file.write(table.plain() + "\n")


def size(n: int | None) -> str | None:
    """Bytes as text: 512 B, 12.3 kB, 4.56 MB (powers of 1000)."""
    if n is None:
        return None
    if n < 1000:
        return f"{n} B"
    for unit in ("kB", "MB"):
        n /= 1000
        if n < 1000:
            return f"{n:.3g} {unit}"
    return f"{n / 1000:.3g} GB"


def ms(value: float | None) -> str | None:
    """Milliseconds as text: three digits after the point, one from 10 on."""
    return None if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def percent(share: float | None) -> str | None:
    """A share of 1 as text, in percent with two digits."""
    return None if share is None else f"{100 * share:.2f}"
