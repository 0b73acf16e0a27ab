"""The page of a check: sections of findings, as text and as JSON."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmkd.engine.findings import Finding, worst
from mmkd.files import whole

#: Characters of a line.
LINE = 79


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        findings: What was found, each with its mark.
        table: Lines that stand below.
        facts: The same for scripts.
    """

    title: str
    findings: list[Finding] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def say(
        self, mark: str, text: str, remedy: str = '', about: str = ''
    ) -> None:
        """Add a finding; see :class:`mmkd.engine.findings.Finding`."""
        self.findings.append(Finding(mark, text, remedy, about))


@dataclass
class Sheet:
    """All that a check has found.

    Attributes:
        source: What was checked, as it was typed.
        sections: In the order of the page.
        seconds: What it took.
    """

    source: str
    sections: list[Section] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def findings(self) -> list[Finding]:
        return [one for part in self.sections for one in part.findings]

    def named(self, mark: str) -> list[Finding]:
        """Findings of one mark."""
        return [one for one in self.findings if one.mark == mark]

    def status(self, strict: bool = False) -> int:
        """Exit status: 0 sound, 1 warnings if ``strict``, 2 failures."""
        mark = worst(self.findings)
        return 2 if mark == 'fail' else int(strict and mark == 'warn')

    def __str__(self) -> str:
        lines = [f'Check of {self.source}']
        for part in self.sections:
            lines += ['', part.title]
            for one in part.findings:
                lines += _wrapped(f'{one.mark:<6}', one.text)
                if one.remedy:
                    lines += _wrapped('    -> ', one.remedy)
            lines += [f'      {one}'.rstrip() for one in part.table]
        counts = [
            f'{len(self.named(mark))} {word}'
            f'{"s" if len(self.named(mark)) != 1 else ""}'
            for mark, word in (('fail', 'failure'), ('warn', 'warning'))
        ]
        lines += ['', f'{", ".join(counts)} in {self.seconds:.0f} s.']
        return '\n'.join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(
            config=self.source,
            verdict=worst(self.findings),
            seconds=round(self.seconds, 1),
            sections=[asdict(part) for part in self.sections],
        )


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        LINE,
        initial_indent=head,
        subsequent_indent=' ' * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns begin below each other.

    Example:
        >>> columns([('a', 'long'), ('words', 'x')])
        ['a      long', 'words  x']
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        '  '.join(
            cell.ljust(width) for cell, width in zip(row, widths)
        ).rstrip()
        for row in rows
    ]


def written(sheet: Sheet, path: str | os.PathLike) -> None:
    """Write what was found as JSON, for scripts."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None  # JSON has neither NaN nor infinity
        return value

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        partial.write_text(json.dumps(plain(sheet.as_dict()), indent=1))
