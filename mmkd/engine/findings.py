"""What a check found, in the words of a person who can act on it."""

from __future__ import annotations

from dataclasses import dataclass

#: From the best to the worst. ``note``: to be known, nothing to be done.
MARKS = ('ok', 'note', 'warn', 'fail')


@dataclass(frozen=True)
class Finding:
    """One of them.

    Attributes:
        mark: One of :data:`MARKS`.
        text: What was found.
        remedy: What to type or to do; '' if there is nothing to be done.
        about: Name of the term, teacher or data set that it is about.

    Example:
        >>> print(Finding('warn', 'It is cold.', 'Type: heat --on'))
        It is cold. Type: heat --on
    """

    mark: str
    text: str
    remedy: str = ''
    about: str = ''

    def __str__(self) -> str:
        return f'{self.text} {self.remedy}'.rstrip()


def worst(findings: list[Finding]) -> str:
    """The worst mark of some findings; ``'ok'`` of none.

    Example:
        >>> worst([Finding('warn', 'a'), Finding('note', 'b')])
        'warn'
    """
    return max((one.mark for one in findings), key=MARKS.index, default='ok')
