"""What a config has its teacher say before the training."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Lines of a command's output that a failure shows.
SHOWN = 12


@dataclass(frozen=True)
class Preparation:
    """A command whose file or folder a training reads.

    A config names such commands at its top level, relative to the folder
    that they are typed in, the repository's root:

    .. code-block:: python

        prepare = ['tools/make_hypotheses.py CONFIG CHECKPOINT --out FILE']

    The command itself decides whether what it wrote before is still true.

    Attributes:
        text: The command, without ``python``.
        config: Of the teacher that it asks.
        checkpoint: Its weights, a file or an address.
        out: What it writes, a file or a folder.
    """

    text: str
    config: str
    checkpoint: str
    out: Path

    @classmethod
    def of(cls, text: str, who: str) -> Preparation:
        """Read a command.

        Args:
            text: ``TOOL CONFIG CHECKPOINT … --out FILE …``.
            who: The config that names it, for the message.

        Raises:
            ValueError: If it is none of this form.

        Example:
            >>> one = Preparation.of('a.py b.py c.pth --out d', 'x.py')
            >>> one.checkpoint, one.out.name
            ('c.pth', 'd')
        """
        words = shlex.split(text)
        place = words.index('--out') + 1 if '--out' in words else len(words)
        if (
            place >= len(words)
            or place < 4
            or any(word.startswith('-') for word in words[:3])
        ):
            raise ValueError(
                f'{who} prepares with {text!r}, but the form of a command is '
                f"'TOOL CONFIG CHECKPOINT --out FILE'. Write prepare = "
                f"['tools/make_hypotheses.py CONFIG CHECKPOINT --out FILE "
                f"--overwrite-if-changed']."
            )
        return cls(text, words[1], words[2], Path(words[place]))

    def carry_out(self) -> None:
        """Run the command by this Python, where it is.

        Raises:
            RuntimeError: If it fails, or writes nothing.
        """
        print(f'python {self.text}', flush=True)
        done = subprocess.run(
            [sys.executable, *shlex.split(self.text)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            last = '\n'.join(done.stdout.splitlines()[-SHOWN:])
            raise RuntimeError(
                f'This failed: python {self.text}\nIts last words:\n{last}'
            )
        if not self.done:
            raise RuntimeError(
                f'There is no {self.out}, which this was to write: python '
                f'{self.text}'
            )

    @property
    def done(self) -> bool:
        """Whether there is what it writes."""
        return self.out.exists()

    def digest(self) -> str:
        """Of the file, or of every file in the folder and its name."""
        whole = hashlib.sha256()
        below = sorted(self.out.rglob('*')) if self.out.is_dir() else []
        for file in below or [self.out]:
            if file.is_file():
                whole.update(file.relative_to(self.out).as_posix().encode())
                whole.update(hashlib.sha256(file.read_bytes()).digest())
        return whole.hexdigest()[:16]


def preparations(config: Mapping, who: str) -> list[Preparation]:
    """What a config asks for under ``prepare``, each command once.

    Args:
        config: Any training config.
        who: Its name, for the message.

    Raises:
        ValueError: If ``prepare`` is no list of commands.
    """
    asked = config.get('prepare') or []
    if isinstance(asked, str) or not all(isinstance(x, str) for x in asked):
        raise ValueError(
            f'{who} needs prepare to be a list of commands, got {asked!r}. '
            f"Write prepare = ['TOOL CONFIG CHECKPOINT --out FILE']."
        )
    return [Preparation.of(text, who) for text in dict.fromkeys(asked)]
