"""The distiller: a student's own detector, extended by teachers and terms."""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import cache
from typing import Any, Protocol

import torch
from mmdet.structures import DetDataSample, SampleList
from mmengine.dist import get_rank
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmkd.build import find
from mmkd.checks import check_name, suggest
from mmkd.classes import a_few, by_name, head_classes, training_classes
from mmkd.distillers.guard import Guard
from mmkd.distillers.unlabelled import labelled_first, partly_labelled
from mmkd.phases import Phase, Phases
from mmkd.pixels import Pixels, kept
from mmkd.randomness import preserved, stream_seed
from mmkd.registry import DETECTORS, MODELS
from mmkd.structures import Step
from mmkd.structures.step import Shower
from mmkd.taps import Record, counting, in_forward, recording, resolve
from mmkd.teachers import Teacher, Teachers, run_detector
from mmkd.terms.term import Term, build_term

#: Sides of the random image on which pairs are checked while the model is
#: built, pixels: multiples of the stride 128. The larger one is for detectors
#: that need it, such as those that choose hundreds of queries among the cells.
CHECK_SIZES = (128, 384)
#: How alike a key of the student's and a missing one of the distiller's must
#: be to be taken for it.
NEAR = 0.75
#: What a setting of a wrong type, size or range fails with, deep inside.
DEEP = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
)


@MODELS.register_module(name='Distiller')
def distil(
    student: str | Mapping | None = None,
    teachers: Mapping | None = None,
    terms: Mapping | None = None,
    phases: Sequence[Mapping] | None = None,
    **detector: Any,
) -> BaseModel:
    """The student's detector, extended to learn from its teachers.

    A config adds three keys to the student's own ``model``, which stays as it
    is, so that tools which look for ``model.backbone`` find it::

        model = dict(
            type='mmkd.Distiller',
            student=_base_.model.type,
            teachers=dict(...),
            terms=dict(...),
        )

    Args:
        student: Type of the student, whose arguments stand beside it; or its
            whole config.
        teachers: Arguments of :class:`mmkd.teachers.Teacher`, by name.
        terms: Configs of the summands; term ``pkd`` logs ``loss_kd_pkd``.
        phases: Arguments of :class:`mmkd.phases.Phase` of each part of the
            training: what is trained in it, and by which terms. Everything
            throughout if None.
        **detector: Arguments of the student where ``student`` is a type.

    Returns:
        An instance of the student's class, with the student's state.

    Raises:
        ValueError: If a key is missing or misspelt, or names, levels,
            channels or sizes do not fit.
        FileNotFoundError: If a teacher's config does not exist.
    """
    _check_own_keys(
        dict(student=student, teachers=teachers, terms=terms, phases=phases),
        detector,
    )
    if isinstance(student, Mapping):
        _refuse_extras(detector)
        config = copy.deepcopy(dict(student))
    else:
        config = dict(detector, type=student)
    model = DETECTORS.build(config)
    model.__class__ = distilling(type(model))
    model.attach(teachers, terms, phases)
    return model


def _check_own_keys(own: Mapping, detector: Mapping) -> None:
    """What makes a student learn must be there, and of its kind."""
    absent = [name for name, value in own.items() if value is None]
    for key in detector:
        near = [
            name
            for name in absent
            if SequenceMatcher(None, key, name).ratio() > NEAR
        ]
        if near:
            raise ValueError(
                f'Distiller has no setting {key!r}. {suggest(key, near)}'
            )
    missing = [name for name in absent if name != 'phases']
    if missing:
        raise ValueError(
            f'Distiller needs student, teachers and terms; '
            f'{", ".join(missing)} is not there. Write '
            f'student=_base_.model.type, teachers=dict(…), terms=dict(…); '
            f'teachers={{}} if there are none.'
        )
    student = own['student']
    if isinstance(student, str):
        find(dict(type=student), 'student')
    elif not isinstance(student, (Mapping, type)):
        raise ValueError(
            f'Distiller takes student as the type of a detector, whose '
            f'settings stand beside it, or as a whole config; got '
            f'student={student!r}. Write student=_base_.model.type.'
        )
    for key, one in (('teachers', 'teacher'), ('terms', 'term')):
        if not isinstance(own[key], Mapping):
            raise ValueError(
                f'Distiller takes {key} as a dict of dicts by name, got '
                f'{key}={own[key]!r}. Write {key}=dict(NAME=dict(…)).'
            )
        for name, config in own[key].items():
            if not isinstance(config, Mapping):
                raise ValueError(
                    f'Distiller takes a {one} as a dict, got {name}='
                    f'{config!r} among {key}. Write '
                    f'{key}=dict({name}=dict(…)).'
                )


def _refuse_extras(detector: Mapping) -> None:
    # The runner hands a config's top-level preprocessor to every model.
    extras = [key for key in detector if key != 'data_preprocessor']
    if extras:
        raise ValueError(
            f'Distiller got a whole config as student and, beside it, '
            f'{", ".join(extras)}. Write student=_base_.model.type to keep '
            f"the student's arguments beside it, or move them inside."
        )


@cache
def distilling(plain: type[BaseModel]) -> type[BaseModel]:
    """The class of a detector, extended by :class:`Distilling`."""
    return type(
        f'Distilled{plain.__name__}',
        (Distilling, plain),
        {'__module__': __name__, 'student_class': plain},
    )


class Observer(Protocol):
    """What looks at a step without taking part in it."""

    paths: Sequence[str]

    def __call__(self, step: Step, losses: Mapping) -> None: ...


class Distilling:
    """What a detector gains: teachers, terms, and their share of the loss."""

    #: The detector's class without what is added here.
    student_class: type[BaseModel]
    teachers: Teachers
    terms: nn.ModuleDict
    phases: Phases
    #: Shown this step and its losses, see ``DiagnosticsHook``.
    observer: Observer | None = None

    def attach(
        self,
        teachers: Mapping,
        terms: Mapping,
        phases: Sequence[Mapping] | None = None,
    ) -> None:
        """Build teachers and terms, and check that they fit the student.

        The random state is left as it was, so that the student starts from
        the weights it would have had alone.
        """
        _check_names(teachers, terms)
        self._seed = torch.initial_seed()
        self._guard = Guard()
        self._checked_classes = False
        self._reached: set[str] = set()
        self.register_state_dict_pre_hook(_refuse_broken_weights)
        with preserved():
            self.teachers = Teachers(
                {
                    name: Teacher(**config, name=name)
                    for name, config in teachers.items()
                }
            )
            for teacher in self.teachers.values():
                teacher.check_heirlooms(self)
            self._pixels = Pixels.of(self, f'Student {type(self).__name__}')
            self.take(terms)
        self.phases = Phases(phases)
        self.phases.check(self)
        self.teachers.mention_missing_files()

    def take(
        self, terms: Mapping, seen: dict[tuple, Any] | None = None
    ) -> Step | None:
        """Build terms in place of those that were, and check them.

        Args:
            terms: Configs of the terms by name.
            seen: Where steps are kept for the next terms that tap the same.

        Returns:
            The step that they were checked on, see :meth:`check_pair`.

        Raises:
            ValueError: If one does not fit student or teachers.
        """
        self.terms = nn.ModuleDict()
        for teacher in self.teachers.values():
            teacher.paths.clear()
        for name, config in terms.items():
            with _naming(name):
                term = build_term(config, 'the term')
                term.name = name
                term.bind(self, self.teachers)
            self.terms[name] = term
            if term.compares_classes():
                for teacher in term.teacher_names:
                    _check_count(name, term, self, self.teachers[teacher])
        return self.check_pair(seen)

    def init_weights(self) -> None:
        """Initialise the student, load the teachers, inherit; terms begin."""
        # Out of reach of the student's own init_cfg, which would draw for
        # them too; they were initialised when they were built.
        terms = self._modules.pop('terms')
        try:
            super().init_weights()
        finally:
            self.terms = terms
        with preserved():
            self.teachers.load()
            for teacher in self.teachers.values():
                teacher.lend(self)
            for term in self.terms.values():
                term.initialise()

    def loss(
        self, batch_inputs: Tensor, batch_data_samples: SampleList
    ) -> dict[str, Tensor]:
        """The student's own losses and every term's share."""
        self._guard.check()
        self.teachers.load()
        self._check_classes()
        iteration, progress = position()
        phase = self._phase(progress)
        active = {
            name: factor
            for name, term in self.terms.items()
            if phase.counts(name)
            and not term.silent()
            and (factor := term.schedule(progress))
        }
        paths = self._student_paths(active)
        if self.observer is not None:
            paths = list(dict.fromkeys([*paths, *self.observer.paths]))
        images, samples, known = labelled_first(
            batch_inputs, batch_data_samples
        )
        with counting(self) as copies:
            if not phase.supervised:
                losses = {}
                with recording(self, paths, stop=True) as record:
                    run_detector(self, images, samples)
            elif known < len(samples):
                losses, record = partly_labelled(
                    self, super().loss, images, samples, known, paths
                )
            else:
                with recording(self, paths) as record:
                    losses = super().loss(images, samples)
        self._check_gradients(record)
        step = self._step(
            record,
            images,
            samples,
            copies,
            iteration=iteration,
            progress=progress,
            losses=dict(losses),
        )
        seed = stream_seed(self._seed, iteration, get_rank())
        with preserved(seed):
            for name, term in self.terms.items():
                if name in active:
                    share = _scale(term(step), active[name])
                else:
                    share = batch_inputs.new_zeros(()) + term.idle()
                losses.update(flatten(name, share))
        if self.observer is not None:
            with preserved():
                self.observer(step, losses)
        if self.phases.given:
            self.phases.check_reach(losses)
        self._guard.watch({**losses, **_by_level(self.terms)}, iteration)
        return losses

    def train(self, mode: bool = True) -> BaseModel:
        """As the student's; what the phase does not train keeps still."""
        super().train(mode)
        if mode and hasattr(self, 'phases'):
            self.phases.rest(self)
        return self

    def _phase(self, progress: float) -> Phase:
        """The phase at a progress; what it trains is set when it begins."""
        phases = self.phases
        if phases.enter(progress, self) and phases.given:
            self.train(self.training)
            print_log(
                f'Phase {phases.number} of {len(phases)} {phases.now}.',
                logger='current',
            )
        return phases.now

    def _student_paths(self, names: Mapping | list[str]) -> list[str]:
        paths = [
            path for name in names for path in self.terms[name].student_paths
        ]
        return list(dict.fromkeys(paths))

    def _step(
        self,
        record: Record,
        images: Tensor,
        samples: SampleList,
        copies: Sequence[int],
        **position: Any,
    ) -> Step:
        number = max(copies, default=1)
        if number > 1:
            images = images.repeat(number, 1, 1, 1)
            samples = list(samples) * number

        def shower(teacher: Teacher) -> Shower:
            return lambda images, grad=False, shown=samples: teacher.run(
                images, shown, self._pixels, grad=grad
            )

        return Step(
            student=record,
            images=images,
            samples=samples,
            clean=kept(images, samples, self._pixels),
            copies=number,
            **position,
            teachers={
                name: shower(teacher)
                for name, teacher in self.teachers.items()
            },
        )

    def check_pair(self, seen: dict[tuple, Any] | None = None) -> Step | None:
        """Show both sides one small image and let every term look at it.

        Args:
            seen: Steps by what was tapped in them, as long as neither side
                changes; the step is taken from there, or added.

        Returns:
            That step, whose student and teachers are recorded; None, after a
            warning, where a detector fails on such an image.

        Raises:
            ValueError: If levels, channels or sizes do not fit a term.
        """
        tapped = (
            *self._student_paths(list(self.terms)),
            *(tuple(one.paths) for one in self.teachers.values()),
        )
        seen = {} if seen is None else seen
        if tapped not in seen:
            seen[tapped] = self._small_step()
        step, broken = seen[tapped]
        if broken is not None:
            print_log(
                f'{type(self).__name__}: levels and channels could not be '
                f'checked while the model was built, because a forward pass '
                f'on a random image failed ({broken}). They are checked in '
                f'the first step.',
                logger='current',
                level=logging.WARNING,
            )
            return None
        for name, term in self.terms.items():
            with _naming(name), _modes_kept(term), torch.no_grad():
                term.eval()
                if term.checkable(step):
                    term(step)
        return step

    def _small_step(self) -> tuple[Step | None, Exception | None]:
        """On the first size that both detectors take."""
        for size in CHECK_SIZES:
            images = torch.rand(1, 3, size, size)
            step, broken = self.dry_step(images, [example_sample(size)])
            if broken is None:
                break
        return step, broken

    def dry_step(
        self, images: Tensor, samples: SampleList
    ) -> tuple[Step | None, Exception | None]:
        """A step of which nothing is learnt, as far as it can be recorded.

        Returns:
            The step, or None and what a detector failed with.
        """
        # What losses are computed by does not run here; SingleStageInstance-
        # Segmentor would call it, and with it the head a second time.
        paths = [
            path
            for path in self._student_paths(list(self.terms))
            if in_forward(self, path)
        ]
        try:
            with (
                _modes_kept(self),
                torch.no_grad(),
                counting(self) as copies,
                recording(self, paths, stop=True) as record,
            ):
                self.eval()
                run_detector(self, images, samples)
            step = self._step(record, images, samples, copies, dry=True)
            for name in self.teachers:
                step.teacher(name)
        except Exception as error:  # any detector's own trouble
            return None, error
        return step, None

    def _check_gradients(self, record: Record) -> None:
        """What a part that learns returned must hand its gradient back."""
        if not torch.is_grad_enabled():
            return
        for path in set(record.paths) - self._reached:
            part, method = resolve(self, path)
            learns = any(one.requires_grad for one in part.parameters())
            if not (learns and method == 'forward' and record.has(path)):
                continue
            if not record.learns(path):
                raise ValueError(
                    f'{type(self).__name__}: no gradient goes back through '
                    f'{path!r}, which learns, so that no term could teach it. '
                    f'It runs in a part that is checkpointed (with_cp, '
                    f'activation_checkpointing): train by tools/train.py, '
                    f'whose activation_checkpointing keeps it, or name parts '
                    f'beside the tap.'
                )
            self._reached.add(path)

    def _check_classes(self) -> None:
        if self._checked_classes:
            return
        self._checked_classes = True
        known = training_classes()
        for name, term in self.terms.items():
            if not term.compares_classes():
                continue
            for teacher in term.teacher_names:
                _check_names_of(name, known, self.teachers[teacher])


def position() -> tuple[int, float]:
    """Iteration and progress of the training, (0, 0.0) outside of one."""
    hub = MessageHub.get_current_instance()
    iteration = hub.get_info('iter', 0)
    total = hub.get_info('max_iters', 0)
    progress = min(iteration / total, 1.0) if total else 0.0
    return int(iteration), progress


def flatten(
    term: str, share: Tensor | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A term's share under the names it is logged by.

    Example:
        >>> flatten('fgd', {'relation': 1, 'watch_peak': 2})
        {'loss_kd_fgd_relation': 1, 'kd_fgd_peak': 2}
    """
    if not isinstance(share, Mapping):
        return {f'loss_kd_{term}': share}
    return {
        f'kd_{term}_{part.removeprefix("watch_")}'
        if part.startswith('watch_')
        else f'loss_kd_{term}_{part}': value
        for part, value in share.items()
    }


def _scale(
    share: Tensor | Mapping[str, Tensor], factor: float
) -> Tensor | Mapping[str, Tensor]:
    if factor == 1:
        return share
    if not isinstance(share, Mapping):
        return factor * share
    return {
        part: value if part.startswith('watch_') else factor * value
        for part, value in share.items()
    }


def _by_level(terms: nn.ModuleDict) -> dict[str, Tensor]:
    """What each level of each term has come to, where terms say it."""
    found = {}
    for path, module in terms.named_modules():
        levels = getattr(module, 'by_level', None)
        if not levels:
            continue
        module.by_level = {}  # of this step alone
        name = '.'.join(one for one in path.split('.') if one != 'terms')
        for level, value in levels.items():
            found[f'term {name} at level {level}'] = value
    return found


def _refuse_broken_weights(
    module: Distilling, prefix: str, keep_vars: bool
) -> None:
    module._guard.check()


def _check_names(teachers: Mapping, terms: Mapping) -> None:
    if not terms:
        raise ValueError(
            'Distiller needs at least one term, got terms={}. Add one, or '
            "train the student's own config."
        )
    for kind, names in (('teacher', teachers), ('term', terms)):
        for name in names:
            if not str(name).isidentifier():
                raise ValueError(
                    f'Distiller cannot call a {kind} {name!r}: the name '
                    f'becomes part of log and checkpoint keys. Use letters, '
                    f'digits and underscores.'
                )
    loud = [name for name in terms if 'loss' in name]
    if loud:
        raise ValueError(
            f'Distiller cannot call a term {loud[0]!r}: MMEngine sums every '
            f"logged key that contains 'loss', also those that are only "
            f'watched. Use a name without it.'
        )
    known = [
        one for one in inspect.signature(Teacher).parameters if one != 'name'
    ]
    for name, teacher in teachers.items():
        for argument in teacher:
            check_name(f'Teacher {name!r}', 'argument', argument, known)
        if 'config' not in teacher:
            raise ValueError(
                f'Teacher {name!r} needs a config: '
                f"{name}=dict(config='mmdet::folder/file.py', checkpoint=…)."
            )
    for name, term in terms.items():
        if 'teacher' in term:
            check_name(
                f'Term {name!r}: the distiller',
                'teacher',
                term['teacher'],
                teachers,
            )


@contextmanager
def _naming(term: str) -> Iterator[None]:
    """Say in which term something went wrong."""
    try:
        yield
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(f'Term {term!r}: {error}') from error
    except (RuntimeError, *DEEP) as error:
        raise ValueError(f'Term {term!r}: {_deep(error)}') from error


def _deep(error: Exception) -> str:
    """What failed in a component, where, and where to read about it."""
    text = str(error) or 'no message'
    places = [
        (frame.f_globals.get('__name__', ''), line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    worded = type(error) is RuntimeError and places[-1][0].startswith('mmkd.')
    home, line = next(
        (
            one
            for one in reversed(places)
            if one[0].startswith('mmkd.') and one[0] != __name__
        ),
        ('', 0),
    )
    if worded or not home:
        return text
    return (
        f'a setting does not fit; {home}, line {line}, failed with '
        f'{type(error).__name__}: {text}. Compare the type, range and number '
        f'of each with what it documents: python -c "help(\'{home}\')"'
    )


@contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    modes = [(one, one.training) for one in module.modules()]
    try:
        yield
    finally:
        for one, training in modes:
            one.training = training


def example_sample(side: int) -> DetDataSample:
    """A sample of one box, for an image of so many pixels in both ways.

    The box is its only proposal, of a detector that is given them.
    """
    size = (side, side)
    sample = DetDataSample(
        metainfo=dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
            flip=False,
        )
    )
    side = side / 2
    box = torch.tensor([[side / 2, side / 2, 1.5 * side, 1.5 * side]])
    sample.gt_instances = InstanceData(
        bboxes=box, labels=torch.zeros(1, dtype=torch.long)
    )
    sample.proposals = InstanceData(bboxes=box, scores=torch.ones(1))
    return sample


def _check_count(
    name: str, term: Term, student: nn.Module, teacher: Teacher
) -> None:
    """Both must tell apart as many classes, where their heads say so."""
    own, theirs = (
        set(head_classes(one).values()) for one in (student, teacher.detector)
    )
    if teacher.names is not None:
        _check_some(name, term, own, teacher)
        theirs = {len(teacher.names)}
    if own and theirs and not own & theirs:
        raise ValueError(
            f'Term {name!r} compares classes, but the student has '
            f'{max(own)} and teacher {teacher.name!r} {max(theirs)}. '
            f'{_way_out(teacher.name)}'
        )


def _check_some(
    name: str, term: Term, own: set[int], teacher: Teacher
) -> None:
    """A teacher of fewer classes needs a term that leaves out the others."""
    if teacher.shared is None or term.takes_some_classes():
        return
    raise ValueError(
        f'Term {name!r} ({type(term).__name__}) compares all classes, but '
        f'teacher {teacher.name!r} has {len(teacher.shared)} of the '
        f"student's {len(teacher.names)}. Use class scores of dense heads "
        f"(type='mmkd.FeatureTerm', tap='bbox_head', output=0), a "
        f"mmkd.ProposalTerm of two-stage ones, or features (tap='neck')."
    )


def _way_out(teacher: str, names: str = '…') -> str:
    return (
        f'Set teachers=dict({teacher}=dict(classes={names})), what the '
        f"teacher calls each of the student's classes, None for one that it "
        f"lacks, or use a feature term (tap='neck')."
    )


def _check_names_of(
    term: str, own: tuple[str, ...] | None, teacher: Teacher
) -> None:
    """Classes that are compared must be one and the same."""
    theirs = teacher.classes
    if own is None or theirs is None:
        return
    if teacher.names is not None:
        _check_pairing(term, own, teacher)
        return
    if own == theirs:
        return
    position = next(
        (
            index
            for index, (one, other) in enumerate(zip(own, theirs))
            if one != other
        ),
        min(len(own), len(theirs)),
    )
    found = by_name(own, theirs)
    way = (
        _way_out(teacher.name, repr(found))
        if any(found)
        else "They share none: use a feature term (tap='neck')."
    )
    raise ValueError(
        f'Term {term!r} compares class scores, but teacher {teacher.name!r} '
        f'was trained on {len(theirs)} classes and the data set has '
        f'{len(own)}; they first differ at {position}: the teacher has '
        f'{_at(theirs, position)}, the data set {_at(own, position)}. {way}'
    )


def _check_pairing(term: str, own: tuple[str, ...], teacher: Teacher) -> None:
    """Classes that were paired in the config must be able to be the same.

    Names may differ, as of 'motorbike' and 'motorcycle', unless the teacher
    knows the student's name as one of another class.
    """
    names = teacher.names
    wrong = len(own) != len(names) or any(
        other is not None and one != other and one in teacher.classes
        for one, other in zip(own, names)
    )
    if wrong:
        raise ValueError(
            f'Term {term!r} compares class scores, and teacher '
            f'{teacher.name!r} has classes={a_few(names)} for the classes '
            f'{a_few(own)} of the data set. '
            f'{_way_out(teacher.name, repr(by_name(own, teacher.classes)))}'
        )
    called = [
        f'{other!r} for {one!r}'
        for one, other in zip(own, names)
        if other is not None and one != other
    ]
    if called:
        print_log(
            f'Teacher {teacher.name!r} says {", ".join(called)}, as its '
            f'config states.',
            logger='current',
        )


def _at(classes: tuple[str, ...], index: int) -> str:
    return repr(classes[index]) if index < len(classes) else 'nothing'
