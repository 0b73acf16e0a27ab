"""Inputs that are odd, of which a loss, an op or a neck must make something.

Hypothesis draws what a case is like; its numbers come from a seed of the case,
so that a case that fails can be told in one line.
"""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st

from mmkd.structures import GroundTruth

STRIDE, CHANNELS = 8, 8

#: Numbers of a map: of noise with a factor, or of something special.
VALUES = {
    'normal': lambda noise: noise,
    'zeros': torch.zeros_like,
    'constant': lambda noise: torch.full_like(noise, 3.0),
    'channels alike': lambda noise: noise[:, :1].expand_as(noise).clone(),
    'cells alike': lambda noise: noise[..., :1, :1].expand_as(noise).clone(),
    'one cell': lambda noise: (
        noise * (torch.arange(noise[0].numel()) == 0).view_as(noise[0])
    ),
    'negative': lambda noise: -1 - noise.abs(),
    'offset': lambda noise: 300 + 1e-2 * noise,
    'tiny': lambda noise: 1e-7 * noise,
    'vanishing': lambda noise: 1e-30 * noise,
    'large': lambda noise: 3e2 * noise,
    'huge': lambda noise: (3e4 * noise).clamp(-6e4, 6e4),
}


def _box(x1, y1, x2, y2):
    """Corners as a share of the batch's sides."""
    return lambda width, height: [
        [x1 * width, y1 * height, x2 * width, y2 * height]
    ]


#: Boxes of an image of some width and height.
BOXES = {
    'none': lambda width, height: [],
    'inside': _box(0.2, 0.3, 0.7, 0.8),
    'all of it': _box(0, 0, 1, 1),
    'point': _box(0.5, 0.5, 0.5, 0.5),
    'point at the end': _box(1, 1, 1, 1),
    'line': _box(0.1, 0.5, 0.9, 0.5),
    'sliver': lambda width, height: [[0.1, 0.0, 0.1 + 1e-4, height]],
    'turned': _box(0.8, 0.7, 0.2, 0.3),
    'touching': _box(0.5, 0.5, 1, 1),
    'crossing': _box(-0.5, -0.5, 0.4, 0.4),
    'crossing the end': _box(0.6, 0.6, 1.8, 1.8),
    'around': _box(-2, -2, 3, 3),
    'outside': _box(1.5, 1.5, 2, 2),
    'before': _box(-2, -2, -1, -1),
    'far away': lambda width, height: [[1e6, 1e6, 1e7, 1e7]],
    'endless': lambda width, height: [[-1e9, -1e9, 1e9, 1e9]],
    'twice': lambda width, height: 2 * [[0, 0, width / 2, height / 2]],
    'nested': lambda width, height: [
        [0, 0, width * share, height * share] for share in (1, 0.5, 0.25)
    ],
    'many': lambda width, height: [
        [
            index * 0.61803 % 0.9 * width,
            index * 0.41421 % 0.9 * height,
            (index * 0.61803 % 0.9 + 0.1) * width,
            (index * 0.41421 % 0.9 + 0.1) * height,
        ]
        for index in range(2000)
    ],
}


def strided(one):
    """Every second column of a map twice as wide."""
    return one.repeat_interleave(2, -1)[..., ::2]


def cut(one):
    """The middle of a larger map."""
    wide = one.new_full([size + 2 for size in one.shape], float('nan'))
    inner = wide[tuple(slice(1, -1) for _ in one.shape)]
    return inner.copy_(one)


LAYOUTS = {
    'contiguous': lambda one: one.contiguous(),
    'channels_last': lambda one: one.contiguous(
        memory_format=torch.channels_last
    ),
    'transposed': lambda one: one.mT.contiguous().mT,
    'strided': strided,
    'cut': cut,
}

DTYPES = {
    'float32': torch.float32,
    'float16': torch.float16,
    'bfloat16': torch.bfloat16,
    'float64': torch.float64,
}

SIDES = (1, 2, 3, 5, 16)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a batch is like."""

    boxes: tuple[str, ...] = ('inside',)
    ignored: str = 'none'
    cells: tuple[int, int] = (16, 16)
    narrow: bool = False
    student: str = 'normal'
    teacher: str = 'normal'
    equal: bool = False
    layout: str = 'contiguous'
    dtype: str = 'float32'
    seed: int = 0

    @property
    def shape(self):
        return tuple(STRIDE * one for one in self.cells)

    def ground_truth(self):
        """Boxes of the batch; if ``narrow``, its last image is smaller."""
        height, width = self.shape
        shapes = [self.shape for _ in self.boxes]
        if self.narrow:
            shapes[-1] = (max(1, height // 3), max(1, width // 2 - 3))
        of, noise = self._boxes, torch.Generator().manual_seed(self.seed)
        boxes = [of(one) for one in self.boxes]
        return GroundTruth.from_boxes(
            boxes,
            self.shape,
            [torch.randint(4, (len(one),), generator=noise) for one in boxes],
            shapes,
            [of(self.ignored) for _ in boxes],
        )

    def _boxes(self, name):
        height, width = self.shape
        return torch.tensor(
            BOXES[name](width, height), dtype=torch.float32
        ).reshape(-1, 4)

    def maps(self, levels=1, channels=CHANNELS):
        """Maps of the student and of the teacher, each level half as large."""
        noise = torch.Generator().manual_seed(self.seed)
        sides = []
        for values in (self.student, self.teacher):
            maps = []
            for level in range(levels):
                rows, columns = (-(-one // 2**level) for one in self.cells)
                one = torch.randn(
                    len(self.boxes), channels, rows, columns, generator=noise
                )
                # Rounded to what is asked, so that a copy in float32 is the
                # same numbers.
                maps.append(VALUES[values](one).to(DTYPES[self.dtype]))
            sides.append(tuple(LAYOUTS[self.layout](one) for one in maps))
        if self.equal:
            sides[1] = tuple(one.clone() for one in sides[0])
        return sides

    def few_cells(self, levels=2):
        """Whether one image has one cell at the coarsest of its levels."""
        last = [-(-one // 2 ** (levels - 1)) for one in self.cells]
        return len(self.boxes) == last[0] == last[1] == 1

    def but(self, **changes):
        return dataclasses.replace(self, **changes)


def cases(few=False, **fixed):
    """Cases, with some of their fields fixed.

    Args:
        few: Whether no image has thousands of boxes.
        **fixed: Fields and their values.
    """
    kinds = sorted(set(BOXES) - {'many'} if few else BOXES)
    drawn = dict(
        boxes=st.lists(st.sampled_from(kinds), min_size=1, max_size=3).map(
            tuple
        ),
        ignored=st.sampled_from(sorted(set(BOXES) - {'many'})),
        cells=st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES)),
        narrow=st.booleans(),
        student=st.sampled_from(sorted(VALUES)),
        teacher=st.sampled_from(sorted(VALUES)),
        equal=st.booleans(),
        layout=st.sampled_from(sorted(LAYOUTS)),
        dtype=st.sampled_from(sorted(DTYPES)),
        seed=st.integers(0, 3),
    )
    drawn.update((name, st.just(value)) for name, value in fixed.items())
    return st.builds(Case, **drawn)
