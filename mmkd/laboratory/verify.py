"""Verify: does changed code still train as it did, to the last bit?

A result counts for the code that made it. Where code has changed that should
change nothing (a message, a new option, another method's part), training all
over again would prove it at the price of hours. Trainings here are
deterministic, so a repeat of the first steps says as much of those: weights,
gradients and draws of every step enter the losses of the next. The last
checkpoint is tested again as well. What acts only in later steps (a schedule's
end) is not seen, so the number of steps repeated is published.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mmkd.checks import check_positive
from mmkd.files import whole
from mmkd.laboratory.runs import Run

#: Entries of a log that differ from run to run.
CLOCK = ('time', 'data_time', 'memory', 'eta')
#: File of a run that says which later code was found to train alike.
RECORD = 'verified.json'


def verify(runs: Sequence[Run], steps: int) -> str | None:
    """Accept the results of an arm if the present code begins them alike.

    The first run whose code alone has changed is repeated beside it for some
    steps; on success all such runs of the arm are stamped with the present
    code.

    Args:
        runs: The arm's, one a seed.
        steps: Training steps to repeat.

    Returns:
        What differs, in words; None if nothing does.

    Raises:
        ValueError: If no result is stale for its code alone, or ``steps`` is
            not positive.
    """
    check_positive('verify', steps=steps)
    changed = [run for run in runs if by_code_alone(run)]
    if not changed:
        stale = [run.why_stale() for run in runs if run.stale]
        why = stale[0] if stale else 'nothing has changed since'
        raise ValueError(
            f'{runs[0].name}: {why}. A repeat of the first steps tells '
            f'something of results that only their code makes stale; for '
            f'others, train anew.'
        )
    found = difference(changed[0], steps)
    if found is None:
        for run in changed:
            accept(run, steps)
    return found


def by_code_alone(run: Run) -> bool:
    """Whether a run has results, stale for nothing but their code."""
    return (
        run.final.is_file()
        and run.predictions.is_file()
        and run.changed() == ['code']
    )


def accept(run: Run, steps: int) -> None:
    """Let a run's results count for the present code."""
    path = run.folder / RECORD
    record = json.loads(path.read_text()) if path.is_file() else []
    entry = dict(
        before=run.made_with()['code'],
        after=run.keys['code'],
        steps=steps,
        of=run.iterations,
    )
    with whole(path) as part:
        part.write_text(json.dumps([*record, entry], indent=1))
    run.sign()


def difference(run: Run, steps: int) -> str | None:
    """What a repeat of a run's first steps and of its test gives otherwise."""
    again = replace(
        run, folder=run.folder.with_name(f'{run.folder.name}-again')
    )
    # Known already, so that no thread reads them beside another.
    again.settings, again.iterations = run.settings, run.iterations
    shutil.rmtree(again.folder, ignore_errors=True)
    try:
        return _steps_differ(run, again, steps) or _test_differs(run, again)
    finally:
        again.stop(patience=0)
        shutil.rmtree(again.folder, ignore_errors=True)


def _steps_differ(run: Run, again: Run, steps: int) -> str | None:
    steps = min(steps, run.iterations)
    again.start()
    while again.position()[0] < steps:
        if again.poll() is False and again.position()[0] < steps:
            return again.reason or 'the repeat ended early'
        time.sleep(0.2)
    again.stop(patience=0)
    kept, new = (
        {line['iter']: line for line in one.log()} for one in (run, again)
    )
    for step, line in sorted(new.items()):
        then = kept.get(step, {})
        for name in sorted({*then, *line} - set(CLOCK)):
            if then.get(name) != line.get(name):
                return (
                    f'{run.name}: at step {step}, {name} was '
                    f'{then.get(name)} and is {line.get(name)}'
                )
    return None


def _test_differs(run: Run, again: Run) -> str | None:
    again.weights = run.final
    again.start()
    while again.poll():
        time.sleep(0.2)
    if not again.predictions.is_file():
        return again.reason or 'the test of its checkpoint failed'
    if again.predictions.read_bytes() != run.predictions.read_bytes():
        return f'{run.name}: its checkpoint gives other detections'
    return None


def records(runs: Iterable[Run]) -> list[dict]:
    """What later code the results of an arm were accepted for."""
    found = []
    for run in runs:
        path = run.folder / RECORD
        for entry in json.loads(path.read_text()) if path.is_file() else []:
            if entry not in found:
                found.append(entry)
    return found
