"""A page as a list of blocks, written as Markdown and as HTML.

Both come from the same blocks, so they say the same. The HTML is one file:
its style is inside, its pictures too, and it loads nothing.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    'NOTHING',
    'Card',
    'Cell',
    'Code',
    'Facts',
    'Heading',
    'Items',
    'Picture',
    'Table',
    'Text',
    'as_html',
    'as_markdown',
    'number',
    'present',
    'signed',
    'span',
]

#: What stands for a number that does not exist.
NOTHING = '–'


def present(value: Any) -> bool:
    """Whether a value is a finite number.

    Example:
        >>> [present(one) for one in (0, 1.5, None, float('nan'))]
        [True, True, False, False]
    """
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 1) -> str:
    """A number as it is printed.

    Example:
        >>> number(33.94), number(float('nan')), number(-0.04)
        ('33.9', '–', '0.0')
    """
    if not present(value):
        return NOTHING
    text = f'{value:.{digits}f}'
    if not float(text):
        text = text.lstrip('-')
    return text.replace('-', '−')


def signed(value: float | None, digits: int = 1) -> str:
    """A difference as it is printed.

    Example:
        >>> signed(3.14), signed(-3.14), signed(0.04), signed(None)
        ('+3.1', '−3.1', '0.0', '–')
    """
    text = number(value, digits)
    return f'+{text}' if text[0].isdigit() and float(text) else text


def span(low: float | None, high: float | None, digits: int = 1) -> str:
    """An interval of differences as it is printed.

    Example:
        >>> span(-0.5, 1.12), span(None, None)
        ('−0.5 to +1.1', '–')
    """
    if not (present(low) and present(high)):
        return NOTHING
    return f'{signed(low, digits)} to {signed(high, digits)}'


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Args:
        text: The value.
        detail: Said smaller, for instance the value's interval.
        tone: ``'good'``, ``'bad'``, ``'muted'``, or nothing.
    """

    text: str
    detail: str = ''
    tone: str = ''

    def markdown(self) -> str:
        text = _marked(self.text)
        if self.tone == 'bad' and not self.detail:
            text = f'*{text}*'
        return f'{text} ({_marked(self.detail)})' if self.detail else text

    def html(self) -> str:
        small = f'<small>{_escaped(self.detail)}</small>'
        return _escaped(self.text) + (small if self.detail else '')


@dataclass(frozen=True)
class Heading:
    """A heading; of level 1 a page has one."""

    text: str
    level: int = 2

    def markdown(self) -> str:
        return f'{"#" * self.level} {_marked(self.text)}'

    def html(self) -> str:
        return f'<h{self.level}>{_escaped(self.text)}</h{self.level}>'


@dataclass(frozen=True)
class Text:
    """A paragraph; ``tone`` is ``'lead'``, ``'muted'``, ``'bad'`` or none."""

    text: str
    tone: str = ''

    def markdown(self) -> str:
        text = _marked(self.text)
        return f'**{text}**' if self.tone in ('lead', 'bad') else text

    def html(self) -> str:
        return f'<p{_class(self.tone)}>{_escaped(self.text)}</p>'


@dataclass(frozen=True)
class Card:
    """A verdict: of what, a word, the number behind it, and a sentence."""

    title: str
    word: str
    figure: str
    text: str
    tone: str = ''

    def markdown(self) -> str:
        return (
            f'- **{_marked(self.title)}: {_marked(self.word)}.** '
            f'{_marked(self.figure)} {_marked(self.text)}'
        )

    def html(self) -> str:
        return (
            f'<article{_class("card " + self.tone)}>'
            f'<h3>{_escaped(self.title)}</h3>'
            f'<span class="badge">{_escaped(self.word)}</span>'
            f'<strong class="figure">{_escaped(self.figure)}</strong>'
            f'<p>{_escaped(self.text)}</p></article>'
        )


@dataclass(frozen=True)
class Items:
    """A numbered list."""

    items: Sequence[str]

    def markdown(self) -> str:
        return '\n'.join(
            f'{index}. {_marked(item)}'
            for index, item in enumerate(self.items, 1)
        )

    def html(self) -> str:
        items = ''.join(f'<li>{_escaped(item)}</li>' for item in self.items)
        return f'<ol>{items}</ol>'


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first column names the row.

    Args:
        head: Names of the columns.
        rows: As many cells each.
        strong: Rows that are the subject, by index.
        apart: Rows above which a group begins, by index.
        words: Columns that hold words, by index; numbers stand to the right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    strong: Sequence[int] = ()
    apart: Sequence[int] = ()
    words: Sequence[int] = (0,)

    def markdown(self) -> str:
        rules = [
            ':--' if index in self.words else '--:'
            for index in range(len(self.head))
        ]
        lines = [[_marked(one) for one in self.head], rules]
        for index, row in enumerate(self.rows):
            first, *others = (_cell(one).markdown() for one in row)
            strong = index in self.strong
            lines.append([f'**{first}**' if strong else first, *others])
        return '\n'.join(f'| {" | ".join(line)} |' for line in lines)

    def html(self) -> str:
        head = ''.join(
            f'<th scope="col"{self._align(index)}>{_escaped(one)}</th>'
            for index, one in enumerate(self.head)
        )
        kind = 'pairs' if len(self.words) > 1 else ''
        body = ''.join(
            self._html_row(index, row) for index, row in enumerate(self.rows)
        )
        return (
            f'<div class="scroll" tabindex="0"><table{_class(kind)}>'
            f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
            f'</table></div>'
        )

    def _html_row(self, index: int, row: Sequence[str | Cell]) -> str:
        first, *others = map(_cell, row)
        kind = 'strong ' * (index in self.strong)
        kind += 'apart' * (index in self.apart)
        cells = ''.join(
            f'<td{self._align(column, cell.tone)}>{cell.html()}</td>'
            for column, cell in enumerate(others, 1)
        )
        return (
            f'<tr{_class(kind)}><th scope="row"'
            f'{_class(first.tone)}>{first.html()}</th>{cells}</tr>'
        )

    def _align(self, column: int, tone: str = '') -> str:
        words = 'words ' * (column in self.words)
        return _class(words + tone)


@dataclass(frozen=True)
class Picture:
    """A picture in a file beside the page.

    Args:
        path: The file.
        alt: What it shows, for those who do not see it.
        caption: Stands below it.
        narrow: The same for a narrow page; in the HTML only.
        diagram: Whether it is drawn on white and may be darkened.
    """

    path: Path
    alt: str
    caption: str = ''
    narrow: Path | None = None
    diagram: bool = True

    def markdown(self) -> str:
        picture = f'![{_marked(self.alt)}]({self.path.name})'
        return f'{picture}\n\n{_marked(self.caption)}'.rstrip()

    def html(self) -> str:
        narrow = ''
        if self.narrow is not None:
            narrow = (
                f'<source media="(max-width: 40rem)" '
                f'srcset="{_embedded(self.narrow)}">'
            )
        caption = f'<figcaption>{_escaped(self.caption)}</figcaption>'
        return (
            f'<figure{_class("diagram" if self.diagram else "photo")}>'
            f'<picture>{narrow}<img src="{_embedded(self.path)}" '
            f'width="{_width(self.path) // (2 if self.diagram else 1)}" '
            f'alt="{_escaped(self.alt)}"></picture>'
            f'{caption if self.caption else ""}</figure>'
        )


@dataclass(frozen=True)
class Facts:
    """Names and what they are; a value may be several lines."""

    facts: Mapping[str, str | Sequence[str]] = field(default_factory=dict)

    def markdown(self) -> str:
        return '\n'.join(
            f'- {_marked(name)}: {"; ".join(map(_marked, _lines(value)))}'
            for name, value in self.facts.items()
        )

    def html(self) -> str:
        facts = ''.join(
            f'<dt>{_escaped(name)}</dt>'
            f'<dd>{"<br>".join(map(_escaped, _lines(value)))}</dd>'
            for name, value in self.facts.items()
        )
        return f'<dl>{facts}</dl>'


@dataclass(frozen=True)
class Code:
    """A command, to be copied."""

    text: str

    def markdown(self) -> str:
        ticks = max(
            (len(one) for one in re.findall('`+', self.text)), default=0
        )
        fence = '`' * max(3, ticks + 1)
        return f'{fence}\n{self.text}\n{fence}'

    def html(self) -> str:
        return f'<pre><code>{_escaped(self.text)}</code></pre>'


def as_markdown(blocks: Sequence[Any]) -> str:
    """The blocks below each other."""
    text = ''
    for before, block in zip([None, *blocks], blocks):
        gap = (
            '\n'
            if isinstance(before, Card) and isinstance(block, Card)
            else '\n\n'
        )
        text += f'{gap if before else ""}{block.markdown()}'
    return f'{text}\n'


def as_html(title: str, blocks: Sequence[Any]) -> str:
    """The blocks as one page that needs nothing else."""
    body, cards = [], []
    for block in [*blocks, None]:
        if isinstance(block, Card):
            cards.append(block.html())
            continue
        if cards:
            body.append(f'<div class="cards">{"".join(cards)}</div>')
            cards = []
        if block is not None:
            body.append(block.html())
    return _PAGE.format(
        title=_escaped(title), style=_STYLE, body='\n'.join(body)
    )


def _cell(one: str | Cell) -> Cell:
    return one if isinstance(one, Cell) else Cell(one)


def _lines(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _class(names: str) -> str:
    names = names.strip()
    return f' class="{names}"' if names else ''


def _escaped(text: str) -> str:
    # A number and its sign of percent stay on one line.
    return html.escape(str(text), quote=True).replace(' %', '&nbsp;%')


def _marked(text: str) -> str:
    """Text in which Markdown finds no marks of its own."""
    text = ' '.join(str(text).split())
    text = re.sub(r'([\\`*\[\]|])', r'\\\1', text)
    # Inside of a word an underscore is none.
    text = re.sub(r'(?<!\w)_|_(?!\w)', r'\\_', text)
    text = re.sub(r'&(?=#?\w+;)', '&amp;', text)
    return re.sub(r'<(?=[\w/!?])', '&lt;', text)


def _width(path: Path) -> int:
    """Pixels of a PNG; a diagram shows two as one, for fine screens."""
    with path.open('rb') as file:
        return int.from_bytes(file.read(20)[16:], 'big')


def _embedded(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode('ascii')
    return f'data:image/png;base64,{data}'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --ground: #fff; --raised: #f6f7f9; --ink: #1a1f26; --muted: #616b78;
  --line: #e1e5ea; --subject: #0072b212; --good: #00724f; --bad: #b34700;
  --none: #616b78;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --raised: #1c2026; --ink: #e4e8ed; --muted: #98a3b0;
    --line: #2d333b; --subject: #56b4e91c; --good: #4cc9a0; --bad: #ff9a5c;
    --none: #98a3b0;
  }
  figure.diagram img {
    filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 {
  font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em;
  margin: 0 0 .4rem; overflow-wrap: anywhere;
}
h2 {
  font-size: 1.15rem; margin: 2.6rem 0 .5rem; padding-top: .9rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: .95rem; margin: 1.4rem 0 .3rem; }
p { margin: .5rem 0; max-width: 46rem; }
p.muted, figcaption { color: var(--muted); font-size: .9rem; }
p.lead {
  font-size: 1.25rem; line-height: 1.4; margin: 1.2rem 0 .6rem;
  max-width: none;
}
p.bad {
  color: var(--bad); font-weight: 600; max-width: none; padding: .55rem .9rem;
  background: var(--raised); border-left: 4px solid var(--bad);
  border-radius: 4px;
}
.cards {
  display: grid; gap: .8rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr));
}
.card {
  --tone: var(--none); background: var(--raised); border-radius: 8px;
  border-top: 4px solid var(--tone); padding: .8rem 1rem .9rem;
  display: grid; grid-template-columns: 1fr auto; align-content: start;
  align-items: baseline; column-gap: .8rem;
}
.card.good { --tone: var(--good); }
.card.bad { --tone: var(--bad); }
.card h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
.card .badge { color: var(--tone); font-weight: 700; font-size: .85rem; }
.card .figure {
  grid-column: 1 / -1; font-size: 1.9rem; line-height: 1.3; color: var(--tone);
  font-variant-numeric: tabular-nums; letter-spacing: -.02em;
}
.card p { grid-column: 1 / -1; margin: .2rem 0 0; font-size: .92rem; }
.scroll {
  overflow-x: auto; margin: .8rem 0; border: 1px solid var(--line);
  border-radius: 8px; width: fit-content; max-width: 100%;
}
table {
  border-collapse: separate; border-spacing: 0; font-size: .88rem;
  line-height: 1.35; font-variant-numeric: tabular-nums;
}
th, td {
  padding: .38rem .7rem; text-align: right; white-space: nowrap;
  vertical-align: top;
}
thead th {
  color: var(--muted); font-weight: 600; font-size: .8rem; white-space: normal;
  vertical-align: bottom; background: var(--raised);
  border-bottom: 1px solid var(--line);
}
tbody th { font-weight: 400; }
th:first-child, .words { text-align: left; }
th:first-child {
  position: sticky; left: 0; background: var(--ground); white-space: normal;
  min-width: 8.5rem; max-width: 17rem; z-index: 1;
}
table.pairs th:first-child { min-width: 0; }
thead th:first-child { background: var(--raised); }
tr.apart > * { border-top: 1px solid var(--line); }
tr.strong > * {
  background: linear-gradient(var(--subject), var(--subject)) var(--ground);
}
tr.strong > th { font-weight: 650; }
td small, th small {
  display: block; color: var(--muted); font-size: .85em; font-weight: 400;
}
td.good { color: var(--good); font-weight: 600; }
td.bad { color: var(--bad); font-weight: 600; }
td.muted, th.muted { color: var(--muted); }
figure { margin: 1rem 0; }
figure img {
  display: block; max-width: 100%; height: auto; border-radius: 8px;
}
figcaption { margin-top: .4rem; max-width: 46rem; }
ol { padding-left: 1.4rem; margin: .5rem 0; }
dl {
  display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem;
  font-size: .9rem; margin: .8rem 0;
}
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
pre {
  background: var(--raised); border-radius: 8px; padding: .7rem .9rem;
  overflow-x: auto; font-size: .85rem;
}
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 40rem) {
  main { padding: 1.4rem .9rem 3rem; }
  h1 { font-size: 1.5rem; }
  th, td { padding: .35rem .55rem; }
  th:first-child { min-width: 7rem; max-width: 8.5rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  figure.diagram img { width: 100%; }
  figure.photo picture { display: block; overflow-x: auto; }
  figure.photo img { max-width: none; width: 42rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; border: 0; }
  th:first-child { position: static; }
}
"""
