"""Known weaknesses of the packages that the locks name: ``make audit``.

pip-audit asks an advisory service about each package, and reports success
where the service does not know one, or cannot be reached. Here such a package
counts as not audited, and the exit status says so: 0 if all were asked about
and none has a known weakness, 1 if one has, 2 if some were not audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted((ROOT / 'requirements').glob('lock-*.txt'))


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit lock files; returns the exit status.

    Args:
        arguments: Lock files; all of ``requirements/`` if there are none.
    """
    given = sys.argv[1:] if arguments is None else arguments
    statuses = []
    for lock in map(Path, given or LOCKS):
        try:
            known, weak, skipped = count(audit(lock))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            statuses.append(2)
            continue
        print(f'{lock.name}: {known} audited, {len(skipped)} not audited')
        for one in weak:
            print(f'  known weakness: {one}')
        if skipped:
            print(f'  not audited: {", ".join(skipped)}')
        statuses.append(1 if weak else 2 if skipped or not known else 0)
    return min((one for one in statuses if one), default=0)


def audit(lock: Path) -> dict[str, Any]:
    """What pip-audit says of a lock file, packages one by one.

    Raises:
        RuntimeError: If it says nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, 'audit.json')
        command = ['pip-audit', '--requirement', str(lock), '--no-deps']
        command += ['--disable-pip', '--progress-spinner', 'off']
        command += ['--format', 'json', '--output', str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not out.is_file():
            last = done.stderr.strip().splitlines()[-3:]
            raise RuntimeError(
                f'pip-audit says nothing of {lock}, so that none of it is '
                f'audited. Its last words: {" ".join(last)}'
            )
        return json.loads(out.read_text(encoding='utf-8'))


def count(found: dict[str, Any]) -> tuple[int, list[str], list[str]]:
    """Packages that were asked about, weaknesses, and those skipped.

    Example:
        >>> weak = dict(name='a', version='1', vulns=[dict(id='CVE-1')])
        >>> skipped = dict(name='b', skip_reason='not found')
        >>> count(dict(dependencies=[weak, skipped]))
        (1, ['a 1: CVE-1'], ['b'])
    """
    packages = found['dependencies']
    skipped = [one['name'] for one in packages if 'skip_reason' in one]
    weak = [
        f'{one["name"]} {one["version"]}: {each["id"]}'
        for one in packages
        for each in one.get('vulns', ())
    ]
    return len(packages) - len(skipped), weak, skipped


if __name__ == '__main__':
    sys.exit(main())
