"""AP over the training, and how far apart the runs are at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mmkd.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['Interval', 'ap_history', 'bands', 'curves', 'intervals']

#: Okabe and Ito's colours in an order in which neighbours differ in lightness
#: too; each comes with a dash of its own, for print.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#000000')
DASHES = ('-', '-', '-', (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
#: Dots per inch of pictures that a page shows at half their size.
FINE = 240
#: A line that is level: a finished teacher, a published number.
LEVEL = (0, (2, 2))

#: Position and value of each evaluation of one run.
Points: TypeAlias = Sequence[tuple[int, float]]


class Interval(NamedTuple):
    """A mean, the interval around it if known, and the values behind it."""

    mean: float
    low: float | None = None
    high: float | None = None
    values: Sequence[float] = ()


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
    figure = _figure(7, 4)
    axis = figure.add_subplot()
    first, last = _extent(runs)
    ends = []
    for index, (name, points) in enumerate(runs.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[index % len(DASHES)]
        if len(points) == 1:
            points = [(first, points[0][1]), (last, points[0][1])]
            dash = LEVEL
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
    _plain(axis, first, last)
    _label(axis, ends)
    return _save(figure, path)


def bands(
    panels: Mapping[str, Mapping[str, Sequence[Points]]],
    path: str | Path,
    xlabel: str = 'iteration',
    ylabel: str = 'AP',
    names: Sequence[str] = (),
    columns: int | None = None,
    share: bool = True,
    form: str = '{:.1f}',
) -> Path:
    """Draw repeated runs: their mean as a line, their range as a band.

    The line goes through the positions at which every one of its runs was
    evaluated, so that it never jumps because a run is absent.

    Args:
        panels: By the diagram's title and the line's name, the runs that are
            its repetitions. A line whose runs were evaluated once is level.
        path: The picture to write; its suffix gives the format.
        xlabel: Name of the horizontal axes.
        ylabel: Name of the vertical axes.
        names: Lines in the order of their colours, the same in every panel;
            others follow as they come.
        columns: Panels beside each other; as many as look well by default.
            1 makes a picture for a narrow page.
        share: Whether all panels have one vertical scale.
        form: How the last value is written behind the line's name.

    Returns:
        ``path``.

    Raises:
        ValueError: If a panel has no line, or a line no position that its
            runs share.
    """
    drawn = {
        title: {name: _summary(runs) for name, runs in lines.items()}
        for title, lines in panels.items()
    }
    empty = [
        f'{title}/{name}'
        for title, lines in drawn.items()
        for name, line in (lines or {'no line': ()}).items()
        if not line
    ]
    if not drawn or empty:
        raise ValueError(
            f'bands needs panels of lines, each with a position at which all '
            f'its runs were evaluated, got {", ".join(empty) or "no panel"}.'
        )
    known = dict.fromkeys([*names, *(n for x in drawn.values() for n in x)])
    order = {name: index for index, name in enumerate(known)}
    narrow = columns == 1
    columns = columns or {1: 1, 2: 2, 4: 2}.get(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    width = 7 if columns == 1 else 4.4 if columns == 2 else 3.7
    width = 4.2 if narrow else width
    height = 4 if width == 7 else 2.9
    figure = _figure(width * columns, height * rows, FINE)
    axes = figure.subplots(rows, columns, sharey=share, squeeze=False).flat
    axes = list(axes)
    for axis, (title, lines) in zip(axes, drawn.items()):
        extent = _extent({n: line[0] for n, line in lines.items()})
        for name, line in lines.items():
            # Many bands above each other would hide the lines.
            alpha = 0.16 if len(lines) <= 5 else 0.08
            _draw_band(axis, line, extent, order[name], alpha)
        axis.set_title(title, loc='left', fontsize=11, fontweight='bold')
        axis.set_xlabel(xlabel)
        _plain(axis, *extent)
    for axis in axes[::columns]:
        axis.set_ylabel(ylabel)
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    # The vertical scale is known only now, if it is shared.
    size = 10 if width == 7 else 9
    for axis, lines in zip(axes, drawn.values()):
        axis.tick_params(labelleft=True)
        ends = [
            (
                mean[-1][1],
                mean[-1][0] if len(mean) > 1 else axis.get_xlim()[1],
                f'{name}  {form.format(mean[-1][1])}',
                _style(order[name])[0],
            )
            for name, (mean, _) in lines.items()
        ]
        _label(axis, ends, size, 0.0175 * size / (height - 0.8))
    return _save(figure, path)


def intervals(
    groups: Mapping[str, Mapping[str, Interval]],
    path: str | Path,
    xlabel: str = 'difference in AP',
    names: Sequence[str] = (),
    narrow: bool = False,
) -> Path:
    """Draw differences with their intervals, below each other.

    Args:
        groups: By the group's heading and the row's name, what was found. A
            name has one colour in all groups.
        path: The picture to write; its suffix gives the format.
        xlabel: Name of the axis.
        names: Rows in the order of their colours; others follow.
        narrow: For a narrow page.

    Returns:
        ``path``.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not any(groups.values()):
        raise ValueError(f'intervals needs a row at least, got {groups}.')
    found = [name for rows in groups.values() for name in rows]
    order = list(dict.fromkeys([*names, *found]))
    count = len(groups) + sum(map(len, groups.values()))
    figure = _figure(4.2 if narrow else 7, 0.24 * count + 0.7, FINE)
    axis = figure.add_subplot()
    beside = axis.get_yaxis_transform()
    ticks, place = {}, 0.0
    for heading, rows in groups.items():
        axis.text(
            -0.012,
            place,
            heading,
            transform=beside,
            fontsize=10,
            ha='right',
            va='center',
            fontweight='bold',
        )
        for name, row in rows.items():
            place -= 1
            ticks[place] = name
            _draw_interval(axis, place, row, _style(order.index(name))[0])
        place -= 1.25
    axis.axvline(0, color='0.35', lw=1.2, zorder=1)
    axis.set_ylim(place + 0.5, 0.6)
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.set_xlabel(xlabel)
    axis.tick_params(axis='y', length=0)
    axis.grid(axis='x', color='0.9', lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right', 'left']].set_visible(False)
    return _save(figure, path)


def _figure(width: float, height: float, dpi: int = 120) -> Figure:
    # Not pyplot: it keeps every figure and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        figure.savefig(part, format=path.suffix[1:] or 'png')
    return path


def _plain(axis: Axes, first: int, last: int) -> None:
    """No more frame than helps to read values."""
    axis.grid(axis='y', color='0.88', lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlim(first, last if last > first else first + 1)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _summary(runs: Sequence[Points]) -> tuple[list, list] | tuple[()]:
    """Mean, and lowest and highest value, where all runs have one."""
    values = [dict(run) for run in runs]
    if not values:
        return ()
    shared = sorted(set.intersection(*map(set, values)))
    at = [(x, [one[x] for one in values]) for x in shared]
    if not at:
        return ()
    return (
        [(x, sum(y) / len(y)) for x, y in at],
        [(min(y), max(y)) for _, y in at],
    )


def _style(index: int) -> tuple[str, object]:
    """Colour and dash; the colours' second round has other dashes."""
    again = index + index // len(COLOURS)
    return COLOURS[index % len(COLOURS)], DASHES[again % len(DASHES)]


def _draw_band(
    axis: Axes,
    line: tuple[list, list],
    extent: tuple[int, int],
    index: int,
    alpha: float,
) -> None:
    mean, span = line
    colour, dash = _style(index)
    if len(mean) == 1:
        mean, span, dash = [(x, mean[0][1]) for x in extent], span * 2, LEVEL
    x, y = zip(*mean)
    low, high = zip(*span)
    if low != high:
        axis.fill_between(x, low, high, color=colour, alpha=alpha, lw=0)
    axis.plot(x, y, color=colour, ls=dash, lw=1.8, clip_on=False)


def _draw_interval(
    axis: Axes, place: float, row: Interval, colour: str
) -> None:
    if row.low is not None and row.high is not None:
        axis.plot(
            [row.low, row.high],
            [place, place],
            color=colour,
            lw=2.6,
            solid_capstyle='butt',
        )
    axis.plot(
        row.values,
        [place] * len(row.values),
        '|',
        color=colour,
        ms=6,
        mew=0.8,
        alpha=0.6,
    )
    axis.plot(row.mean, place, 'o', color=colour, ms=6.5)
    axis.annotate(
        f'{row.mean:+.1f}'.replace('-', '−'),
        (1.02, place),
        xycoords=axis.get_yaxis_transform(),
        color=colour,
        fontsize=10,
        fontweight='bold',
        va='center',
    )


def _extent(runs: Mapping) -> tuple[int, int]:
    """First and last position; level lines take it from the others."""
    lines = [points for points in runs.values() if len(points) > 1]
    known = [x for points in lines or runs.values() for x, _ in points]
    return min(known), max(known)


def _label(
    axis: Axes,
    ends: Sequence[tuple],
    fontsize: float = 10,
    distance: float = 0.065,
) -> None:
    """Write each run's name beside the end of its line, none over another."""
    low, high = axis.get_ylim()
    ends = sorted(ends)
    places = spread([end[0] for end in ends], distance * (high - low))
    right = axis.get_xlim()[1]
    for place, (value, x, text, colour) in zip(places, ends):
        axis.annotate(
            text,
            xy=(x, value),
            xytext=(1.03, (place - low) / (high - low)),
            textcoords='axes fraction',
            color=colour,
            fontsize=fontsize,
            fontweight='bold',
            va='center',
            arrowprops=dict(
                arrowstyle='-',
                color=colour,
                lw=0.8,
                shrinkA=0,
                shrinkB=2,
                relpos=(0, 0.5),
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
