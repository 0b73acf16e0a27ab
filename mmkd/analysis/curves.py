"""AP over the training, one line a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['ap_history', 'curves']

#: Okabe and Ito's colours in an order in which neighbours differ in lightness
#: too; each comes with a dash of its own, for print.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#000000')
DASHES = ('-', '-', '-', (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))


def curves(
    runs: Mapping[str, Sequence[tuple[int, float]]],
    path: str | Path,
    xlabel: str = 'epoch',
    ylabel: str = 'AP',
    title: str = '',
) -> Path:
    """Draw runs into one diagram, each labelled at the end of its line.

    Args:
        runs: Epoch (or iteration) and AP of each evaluation, by the run's
            name. One evaluation alone is drawn as a level line: a finished
            teacher, a published number.
        path: The picture to write; its suffix gives the format.
        xlabel: Name of the horizontal axis.
        ylabel: Name of the vertical axis.
        title: Stands above the diagram.

    Returns:
        ``path``.

    Raises:
        ValueError: If there are no runs, or one has no evaluation.
    """
    runs = {name: sorted(points) for name, points in runs.items()}
    empty = [name for name, points in runs.items() if not points]
    if not runs or empty:
        raise ValueError(
            f'curves needs runs with at least one evaluation each, got '
            f'{"none in " + ", ".join(map(repr, empty)) if empty else runs}.'
        )
    # Not pyplot: it keeps every figure and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    first, last = _extent(runs)
    ends = []
    for index, (name, points) in enumerate(runs.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[index % len(DASHES)]
        if len(points) == 1:
            points = [(first, points[0][1]), (last, points[0][1])]
            dash = (0, (2, 2))
        x, y = zip(*points)
        marker = 'o' if 2 < len(points) <= 30 else None
        axis.plot(
            x,
            y,
            color=colour,
            ls=dash,
            lw=1.8,
            marker=marker,
            ms=3.5,
            clip_on=False,
        )
        ends.append((y[-1], x[-1], f'{name}  {y[-1]:.1f}', colour))
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.grid(axis='y', color='0.88', lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlim(first, last if last > first else first + 1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    _label(axis, ends)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _extent(runs: Mapping) -> tuple[int, int]:
    """First and last position; level lines take it from the others."""
    lines = [points for points in runs.values() if len(points) > 1]
    known = [x for points in lines or runs.values() for x, _ in points]
    return min(known), max(known)


def _label(axis: Axes, ends: Sequence[tuple]) -> None:
    """Write each run's name beside the end of its line, none over another."""
    low, high = axis.get_ylim()
    ends = sorted(ends)
    places = spread([end[0] for end in ends], 0.065 * (high - low))
    right = axis.get_xlim()[1]
    for place, (value, x, text, colour) in zip(places, ends):
        axis.annotate(
            text,
            xy=(x, value),
            xytext=(1.03, (place - low) / (high - low)),
            textcoords='axes fraction',
            color=colour,
            fontsize=10,
            fontweight='bold',
            va='center',
            arrowprops=dict(
                arrowstyle='-', color=colour, lw=0.8, shrinkA=0, shrinkB=2
            )
            if place != value or x != right
            else None,
        )


def spread(values: Sequence[float], distance: float) -> list[float]:
    """Move ascending values apart until neighbours keep a distance.

    Values that collide are centred on their mean, so that each stays as near
    to its own place as the others allow.

    Example:
        >>> spread([1.0, 1.0, 5.0], 0.5)
        [0.75, 1.25, 5.0]
    """
    groups: list[tuple[list[float], float]] = []  # values, lowest place
    for value in values:
        group, start = [value], value
        while groups and start < groups[-1][1] + distance * len(groups[-1][0]):
            group = groups.pop()[0] + group
            width = distance * (len(group) - 1)
            start = sum(group) / len(group) - width / 2
        groups.append((group, start))
    return [
        start + distance * index
        for group, start in groups
        for index in range(len(group))
    ]


def ap_history(
    work_dir: str | Path, metric: str = 'bbox_mAP'
) -> list[tuple[int, float]]:
    """Evaluations of a run, read from the log that MMEngine keeps.

    Args:
        work_dir: The run's folder. Runs that were resumed there count as one;
            of a position evaluated twice the later value counts.
        metric: End of the value's name in the log; ``'bbox_mAP_50'`` for
            AP50.

    Returns:
        Epoch (or iteration) and AP in percent, ascending. Empty if nothing
        was evaluated.
    """
    found: dict[int, float] = {}
    logs = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    iteration = 0
    for line in (line for log in logs for line in _lines(log)):
        iteration = line.get('iter', iteration)
        for key, value in line.items():
            if key.split('/')[-1] == metric and 'step' in line:
                # MMEngine counts epochs here by default; a training that is
                # counted in iterations is in epoch 0 throughout.
                found[int(line['step']) or iteration] = 100 * value
    return sorted(found.items())


def _lines(log: Path) -> list[dict]:
    entries = []
    for line in log.read_text(encoding='utf-8').splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:  # the run was cut off while writing
            continue
    return entries
