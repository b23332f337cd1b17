"""A table as data: what a terminal prints and what a page shows, cell by cell the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult

GIB = 1 << 30
_LEGIBLE = 12  # columns that the first column may fold to
_TERMINAL = 80  # columns; a table that would not fit has one space between its columns, not two


@dataclass(frozen=True)
class Table:
    """Cells as text. The first column names its row and may fold; `left` are the others that hold words.

    notes: lines that belong below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def aligned(self, i: int) -> Literal["left", "right"]:
        """Where the cells of column i stand: numbers to the right, so that digits stand under digits."""
        if i:
            return "left" if self.columns[i] in self.left else "right"
        return "right" if self.rows and all(row[0].replace(",", "").isdigit() for row in self.rows) else "left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield from [Text(self.title, style="italic")] if self.title else []
        yield from self._grid(options.max_width) or self._stacked()
        yield from map(Text, self.notes)

    def _grid(self, most: int) -> list[RenderableType]:
        """The cells side by side; nothing where they do not fit `most` columns."""
        from rich.table import Table as RichTable
        from rich.text import Text

        columns = zip(self.columns, *self.rows, strict=True)
        widths = [max(len(line) for cell in column for line in (cell or " ").split("\n")) for column in columns]
        gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= _TERMINAL else 1
        if min(widths[0], _LEGIBLE) + sum(widths[1:]) + gap * (len(widths) - 1) > most:
            return []
        table = RichTable(header_style="bold", box=None, padding=(0, gap, 0, 0), pad_edge=False)
        for i, column in enumerate(self.columns):
            table.add_column(Text(column), justify=self.aligned(i), no_wrap=i > 0, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return [table]

    def _stacked(self) -> list[RenderableType]:
        """The cells of a row below each other, for a terminal that is too narrow for them side by side."""
        from rich.text import Text

        lines: list[RenderableType] = []
        for name, *cells in self.rows:
            lines.append(Text(name, style="bold"))
            lines += [Text(f"  {column}: {cell}") for column, cell in zip(self.columns[1:], cells, strict=True) if cell]
        return lines


@dataclass(frozen=True)
class Report:
    """Tables, and the lines between them, in the order in which they are read."""

    parts: tuple[Table | str, ...]

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        out: list[Any] = []
        for i, part in enumerate(self.parts):
            if i and isinstance(part, Table):
                out.append(Text())
            out.append(part if isinstance(part, Table) else Text(part))
        return Group(*out)


def per_item(title: str, items: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]) -> Table:
    """A row an item: the name of each column with what makes its cell."""
    return Table(title, tuple(columns), tuple(tuple(cell(item) for cell in columns.values()) for item in items))


def gib(nbytes: int) -> str:
    """Bytes as GiB."""
    return f"{nbytes / GIB:.3f}"
