"""Teachers: loaded strictly, frozen, normalised, run only as far as asked.

A teacher is not a submodule of the student. Optimiser, state dict, DDP and
EMA never see it, ``init_weights()`` cannot reach it, and ``train()`` leaves it
in eval mode.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from mmcv.ops import MaskedConv2d
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmkd.arguments import check_arguments
from mmkd.checks import check_name, check_names
from mmkd.classes import (
    check_class_names,
    head_classes,
    pick_classes,
    shared_classes,
    with_classes,
)
from mmkd.compat.checkpoint import (
    TERM_PREFIX,
    check_file,
    classes_of,
    read_checkpoint,
    state_dict_of,
)
from mmkd.configs import read_config, student_config
from mmkd.fast import Fast, speed_of
from mmkd.memory import Memory
from mmkd.pixels import Pixels, translate
from mmkd.randomness import preserved
from mmkd.registry import DETECTORS
from mmkd.store import Store, weights_digest
from mmkd.structures.nested import pick
from mmkd.taps import Record, recording, resolve

#: What a cache on disk is told.
CACHE_KEYS = ('folder', 'missing')


class Teacher:
    """A detector that gives targets and never changes.

    The structure is built and checked at once, the weights are read when
    training starts; inference with the student needs no file of the teacher.

    Args:
        config: Config of the detector: a path, ``'mmdet::…'``, ``'mmkd::…'``
            or a config already read. Of a distillation config, the student.
        checkpoint: Its weights: a path, or an ``https://`` address that is
            downloaded once. mmdet 3 and 2.x files and files with an EMA
            state are understood.
        cfg_options: Settings of the config to replace, by dotted name; for
            instance ``{'model.bbox_head.num_classes': 3}`` for a teacher
            trained on custom data.
        inherit: Which parts the student starts from: ``True`` for neck and
            heads, a sequence of names such as ``('neck', 'bbox_head')`` or
            ``('bbox_head.retina_cls',)`` for these alone, ``False`` for none.
            A parameter of the detector itself is a part, too.
        ema: Take the averaged weights where the file has them.
        sham: A control for experiments: show the teacher the next image of
            the batch instead, so that its targets are those of a teacher but
            of another image. What is gained from them is not knowledge.
        cache: Gibibytes of main memory in which to keep its outputs, so that
            an image it has seen is not shown to it again, see
            :class:`mmkd.memory.Memory`. For few images whose augmentation is
            resizing and flips; 0 keeps nothing. Or the folder to which
            ``tools/cache_teacher.py`` wrote them before the training;
            ``dict(folder=…, missing='show')`` shows it what is not there,
            which is an error otherwise.
        classes: Where its class list is not the student's: its name of each
            class of the student, in the student's order, None for one that
            it lacks. The teacher is cut to these when it is loaded, so that
            whatever it says is said of the student's classes. Of a softmax
            what is left are the probabilities given that an object is of
            none of the classes left out. As they are if None.
        fast: Run a copy that takes less time, by what is fastest on the
            device, or by settings of :class:`mmkd.fast.Speed`, for instance
            ``dict(precision='bf16')``. The first batch tells whether it says
            the same; else the next slower way is taken, with a warning. The
            copy takes the memory of the teacher's weights once more.
        device: Where it runs, such as ``'cuda:1'``: it is shown the images
            there, and what it says of them is brought to the student. With
            the student if None. Terms that run its layers themselves need it
            there.
        name: Name among the distiller's teachers, for messages.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If ``cache`` is negative, ``fast`` has a setting that is
            not known, ``device`` names none, or ``classes`` are no such list
            or of a detector whose heads cannot be cut; when the weights are
            looked for, if there is no such device.
    """

    def __init__(
        self,
        config: str | Path | Mapping | Config,
        checkpoint: str | Path | None = None,
        cfg_options: Mapping[str, Any] | None = None,
        inherit: bool | str | Sequence[str] = False,
        ema: bool = True,
        sham: bool = False,
        cache: float | str | Mapping[str, str] = 0.0,
        classes: Sequence[str | None] | None = None,
        fast: bool | Mapping[str, Any] = False,
        device: str | torch.device | None = None,
        name: str = 'teacher',
    ) -> None:
        check_arguments(
            f'Teacher {name!r}',
            Teacher,
            dict(
                config=config,
                checkpoint=checkpoint,
                cfg_options=cfg_options,
                inherit=inherit,
                ema=ema,
                sham=sham,
                cache=cache,
                fast=fast,
            ),
        )
        if not isinstance(inherit, bool):
            check_names(f'Teacher {name!r}', 'inherit', inherit)
        self.name, self.checkpoint, self.ema = name, checkpoint, ema
        self.inherit, self.sham = inherit, sham
        self.device = _device(f'Teacher {name!r}', device)
        self.source = config if isinstance(config, (str, Path)) else 'a dict'
        config = read_config(config, f'Teacher {name!r}', cfg_options)
        if not isinstance(config.get('model'), Mapping):
            raise ValueError(
                f'Teacher {name!r} needs the config of a detector, with a '
                f'model; {self.source} has none. Name another, for instance '
                f"config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'."
            )
        self._model = without_init(student_config(config.model))
        self.names: tuple[str | None, ...] | None = None
        self.shared: tuple[int, ...] | None = None
        self.detector: nn.Module = self._built(classes)
        self.detector.eval()  # of some detectors it returns nothing
        self.detector.requires_grad_(False)
        self.pixels = Pixels.of(self.detector, f'Teacher {name!r}')
        self.memory = self._memory(cache)
        speed_of(fast, torch.device('cpu'))  # raises for a wrong setting
        self._speed = fast
        self.fast: Fast | None = None
        self.paths: list[str] = []
        self.classes: tuple[str, ...] | None = None
        self.loaded = False

    def _memory(self, cache: float | str | Mapping[str, str]) -> Memory | None:
        who = f'Teacher {self.name!r}'
        if isinstance(cache, (int, float)):
            return Memory(self.detector, cache, who) if cache else None
        given = dict(cache) if isinstance(cache, Mapping) else {}
        for key in given:
            check_name(f'{who} with cache=…', 'key', key, CACHE_KEYS)
        if isinstance(cache, (str, Path)):
            given = dict(folder=cache)
        if 'folder' not in given:
            raise ValueError(
                f'{who} has cache={cache!r}. Write gibibytes of main memory, '
                f"the folder of tools/cache_teacher.py, or dict(folder='…', "
                f"missing='show')."
            )
        return Memory(self.detector, 0, who, Store(**given, who=who))

    @property
    def store(self) -> Store | None:
        """Where its outputs are on disk."""
        return None if self.memory is None else self.memory.store

    def about(self) -> dict[str, str]:
        """What must be the same for it to say the same of an image."""
        model = json.dumps(self._model, default=str, sort_keys=True)
        return dict(
            weights=weights_digest(self.detector),
            model=hashlib.sha256(model.encode()).hexdigest(),
        )

    def _built(self, classes: Sequence[str | None] | None) -> nn.Module:
        if classes is None:
            return _detector(self.name, self.source, self._model)
        who = f'Teacher {self.name!r}'
        self.names = check_class_names(who, classes)
        self.shared = shared_classes(self.names)
        count = len(self.names if self.shared is None else self.shared)
        detector = self._of_classes(count)
        found = set(head_classes(detector).values())
        if found != {count}:
            raise ValueError(
                f'{who} cannot be cut to {count} classes: the heads of '
                f'{self.source} tell apart {sorted(found) or "none"} '
                f'whatever num_classes is. Use a teacher with classes in the '
                f'order of the data set, or leave classes out and compare '
                f'features alone.'
            )
        return detector

    def _of_classes(self, count: int) -> nn.Module:
        # Detectors write into the config that they are built from.
        model = with_classes(copy.deepcopy(self._model), count)
        return _detector(self.name, self.source, model)

    def __deepcopy__(self, memo: dict) -> Teacher:
        return self  # copies of the student, such as an EMA, share it

    def __repr__(self) -> str:
        state = 'loaded' if self.loaded else 'not loaded yet'
        return (
            f'Teacher {self.name!r}: {type(self.detector).__name__} of '
            f'{self.source}, weights of {self.checkpoint} ({state})'
        )

    def tap(self, path: str) -> None:
        """Note an output that some term will ask for.

        Raises:
            ValueError: If the detector has no such part.
        """
        resolve(self.detector, path)
        if path not in self.paths:
            self.paths.append(path)

    def check_file(self) -> None:
        """Fail early if the weights cannot be there.

        Raises:
            FileNotFoundError: If no file is named, or it does not exist.
            CheckpointError: If it is empty, cut off, or no checkpoint.
            ValueError: If there is no such device as its own.
        """
        self._check_device()
        if self.checkpoint is None:
            raise FileNotFoundError(
                f'Teacher {self.name!r} ({self.source}) has no checkpoint: '
                f'an untrained teacher teaches nothing. Set '
                f"teachers=dict({self.name}=dict(checkpoint='FILE.pth'))."
            )
        if '://' in str(self.checkpoint):
            return
        try:
            check_file(self.checkpoint, f'Teacher {self.name!r}')
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f'{error} Put the weights there, or name another file: '
                f'--cfg-options model.teachers.{self.name}.checkpoint=FILE.pth'
            ) from error

    def _check_device(self) -> None:
        if self.device is None or self.device.type == 'cpu':
            return
        kind = self.device.type
        counter = getattr(getattr(torch, kind, None), 'device_count', None)
        count = counter() if counter is not None else 0
        if (self.device.index or 0) >= count:
            there = [f'{kind}:{number}' for number in range(count)] + ['cpu']
            raise ValueError(
                f"Teacher {self.name!r} has device='{self.device}', and this "
                f'machine has {", ".join(there)}'
                f'. Name one of them, or leave device out: it then runs where '
                f'the student does.'
            )

    def load(self) -> None:
        """Read the weights, every one of them, and freeze the detector.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file does not fit the detector exactly; the
                message counts and names what is missing, left over or of
                another shape.
        """
        if self.loaded:
            return
        self.check_file()
        checkpoint = read_checkpoint(self.checkpoint)
        state = state_dict_of(checkpoint, prefer_ema=self.ema)
        for key in [key for key in state if key.startswith(TERM_PREFIX)]:
            del state[key]
        for key in _second_names(state, self.detector.state_dict()):
            del state[key]
        self.classes = classes_of(checkpoint)
        if self.names is None:
            self._load_strictly(self.detector, state)
        else:
            self._load_cut(state)
        self.loaded = True
        print_log(
            f'Teacher {self.name!r}: all {len(state)} tensors of '
            f'{self.checkpoint} loaded into '
            f'{type(self.detector).__name__} of {self.source}; '
            f'{self._said_of_classes()}frozen, eval.',
            logger='current',
        )
        if self.store is not None and not self.store.writable:
            self.store.check(self.about(), self.paths)

    def _said_of_classes(self) -> str:
        if self.names is None:
            return ''
        count = len(self.names if self.shared is None else self.shared)
        return (
            f'of its {len(self.classes)} classes {count} that the student '
            f'has are kept, in the order of the student; '
        )

    def _load_cut(self, state: dict[str, Tensor]) -> None:
        """Load the whole, and keep the classes that the student has."""
        who = f'Teacher {self.name!r}'
        if self.classes is None:
            raise ValueError(
                f'{who} is to be cut to classes by name, but '
                f'{self.checkpoint} names none. Use a file that does, as '
                f'those that training writes, or leave classes out if both '
                f'lists are the same in the same order.'
            )
        told = [name for name in self.names if name is not None]
        for name in told:
            check_name(
                f'{who} with classes=…: {self.checkpoint}',
                'class',
                name,
                self.classes,
            )
        count = len(self.classes)
        with preserved():
            whole = DETECTORS.build(copy.deepcopy(self._model))
            self._load_strictly(whole, state)
            wider = self._of_classes(count + 1)
        heads = set(head_classes(whole).values())
        if heads != {count}:
            raise ValueError(
                f'{who}: {self.checkpoint} names {count} classes, the heads '
                f'of {self.source} tell apart {sorted(heads)}. Name the '
                f'config it was trained with.'
            )
        picked = pick_classes(
            who,
            whole.state_dict(),
            wider.state_dict(),
            count,
            [self.classes.index(name) for name in told],
        )
        self.detector.load_state_dict(picked)

    def _load_strictly(
        self, detector: nn.Module, state: dict[str, Tensor]
    ) -> None:
        own = detector.state_dict()
        if not _fits(state, own):
            # Loading may still rename the keys of an older file; a copy is
            # kept until it is known.
            own = {key: value.clone() for key, value in own.items()}
        try:
            detector.load_state_dict(state, strict=True)
        except RuntimeError as error:
            detector.load_state_dict(own)
            raise ValueError(self._misfit(state, own)) from error

    def _misfit(self, state: Mapping, own: Mapping) -> str:
        missing = [key for key in own if key not in state]
        extra = [key for key in state if key not in own]
        shapes = [
            f'{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}'
            for key in own
            if key in state and state[key].shape != own[key].shape
        ]
        head = [one for one in shapes if 'cls' in one or 'head' in one]
        hint = (
            'It is a checkpoint of another detector: name the config it was '
            'trained with.'
        )
        if shapes and head and not missing and not extra:
            hint = (
                'Only the head differs, as after training on other classes: '
                'set num_classes for this teacher, for instance '
                "cfg_options={'model.bbox_head.num_classes': 3}."
            )
        return (
            f'Teacher {self.name!r}: {self.checkpoint} does not fit '
            f'{type(self.detector).__name__} of {self.source}. Of '
            f'{len(own)} tensors {len(missing)} are missing'
            f'{_some(missing)}, {len(shapes)} have another shape'
            f'{_some(shapes)}; {len(extra)} are left over{_some(extra)}. '
            f'{hint}'
        )

    def to(self, device: torch.device) -> None:
        # Moved when it runs and not along with the student, whose copies
        # (an EMA kept on the CPU) share this one teacher.
        here = next(self.detector.parameters()).device
        if here != device and (
            device.index is not None or here.type != device.type
        ):
            self.detector.to(device)

    def run(
        self,
        images: Tensor,
        samples: list,
        pixels: Pixels,
        paths: Iterable[str] | None = None,
        grad: bool = False,
    ) -> Record:
        """Show a batch to the teacher and record its taps.

        Args:
            images: The batch as the student sees it, (N, 3, H, W).
            samples: mmdet's sample of each image.
            pixels: How the student's images were normalised.
            paths: Taps wanted; all that were noted if None.
            grad: Keep the graph from the images to the taps.
        """
        if self.store is None:
            self.to(self._place(images))
        if self.sham:
            images, samples = self._another(images, samples)
        shapes = [
            tuple(one.metainfo.get('img_shape', images.shape[-2:])[:2])
            for one in samples
        ]
        images = translate(images, shapes, pixels, self.pixels)
        paths = self.paths if paths is None else list(paths)

        def watch(images: Tensor, samples: list) -> Record:
            home, place = images.device, self._place(images)
            self.to(place)
            images = _sent(images, place)

            def run(detector: nn.Module, images: Tensor) -> Record:
                with (
                    torch.set_grad_enabled(grad),
                    recording(detector, paths, stop=True) as record,
                ):
                    record.size = tuple(images.shape[-2:])
                    run_detector(detector, images, samples)
                return record

            fast = None if grad else self._fast(images.device)
            if fast is None:
                record = run(self.detector, images)
            else:
                record = fast.watch(run, images, paths)
            if place != home:
                record.bring(lambda one: _sent(one, home))
            return record

        if self.memory is None or grad or not self.loaded:
            record = watch(images, samples)
        else:
            record = self.memory.recall(images, samples, paths, watch)
        if self.device is not None:
            record.keep_away(
                f"Teacher {self.name!r} has device='{self.device}', and this "
                f'term runs layers of the teacher, or reads its head, with '
                f'what is on the device of the student. Leave device out for '
                f'this teacher, or use a term that compares what both return, '
                f'such as FeatureTerm.'
            )
        return record

    def _place(self, images: Tensor) -> torch.device:
        """Where it runs; a pair is checked before there are weights."""
        own = self.device if self.loaded else None
        return images.device if own is None else own

    def _fast(self, device: torch.device) -> Fast | None:
        """The faster way to run it, once there are weights."""
        if self.fast is None and self.loaded:
            speed = speed_of(self._speed, device)
            if speed is not None:
                who = f'Teacher {self.name!r}'
                self.fast = Fast(self.detector, speed, who)
        return self.fast

    def _another(self, images: Tensor, samples: list) -> tuple[Tensor, list]:
        # One image is what a model is checked with while it is built.
        if len(images) == 1 and self.loaded:
            raise ValueError(
                f'Teacher {self.name!r} with sham=True is shown the next '
                f'image of the batch, but a batch has one image. Set '
                f'train_dataloader.batch_size to 2 or more.'
            )
        return images.roll(-1, 0), [*samples[1:], *samples[:1]]

    def check_heirlooms(self, student: nn.Module) -> None:
        """Whether the parts that ``inherit`` names fit, by shapes alone.

        Raises:
            ValueError: If a part is unknown or differs in shape.
        """
        if not self.inherit:
            return
        for part in self._heirlooms(student):
            differs = self._differs(student, part)
            if differs:
                fit = tuple(
                    one
                    for one in self._shared(student)
                    if one != 'backbone' and not self._differs(student, one)
                )
                advice = f'inherit={fit!r}, which fits, or ' if fit else ''
                raise ValueError(
                    f'Teacher {self.name!r}: the student cannot inherit '
                    f'{part!r}: {len(differs)} tensors differ'
                    f'{_some(differs)}. Set {advice}inherit=False.'
                )

    def lend(self, student: nn.Module) -> None:
        """Start the student from the parts that ``inherit`` names.

        Raises:
            ValueError: If a part is unknown or differs in shape.
        """
        if not self.inherit:
            return
        self.check_heirlooms(student)
        parts = self._heirlooms(student)
        taken = sum(
            _copy(_part(student, part), _part(self.detector, part))
            for part in parts
        )
        touched = {part.partition('.')[0] for part in parts}
        left = [
            name for name, _ in student.named_children() if name not in touched
        ]
        print_log(
            f'Teacher {self.name!r}: the student inherits {taken} tensors of '
            f'{", ".join(parts)}; {", ".join(left)} keep their own.',
            logger='current',
        )

    def _differs(self, student: nn.Module, part: str) -> list[str]:
        """Which tensors of a part the student keeps in another shape."""
        own = _part(student, part)
        state = _part(self.detector, part).state_dict()
        shapes = {key: one.to('meta') for key, one in state.items()}
        given, wanted = _given(own, shapes), own.state_dict()
        differs = [
            f'{key} {tuple(given[key].shape) if key in given else "missing"} '
            f'for {tuple(wanted[key].shape)}'
            for key in wanted
            if key not in given or given[key].shape != wanted[key].shape
        ]
        return differs + [
            f'{key} left over' for key in given if key not in wanted
        ]

    def _shared(self, student: nn.Module) -> list[str]:
        """Parts that both detectors have."""
        modules = [
            name
            for name, _ in student.named_children()
            if name not in ('data_preprocessor', 'terms')
            and isinstance(getattr(self.detector, name, None), nn.Module)
        ]
        return modules + [
            name
            for name in student._parameters
            if name in self.detector._parameters
        ]

    def _heirlooms(self, student: nn.Module) -> list[str]:
        shared = self._shared(student)
        if self.inherit is True:
            parts = [name for name in shared if name != 'backbone']
        else:
            one = isinstance(self.inherit, str)
            parts = [self.inherit] if one else list(self.inherit)
            theirs = dict(self.detector.named_modules())
            deeper = [
                name
                for name, _ in student.named_modules()
                if name.partition('.')[0] in shared
                and '.' in name
                and name in theirs
            ]
            for part in parts:
                who = f'Teacher {self.name!r} with inherit={self.inherit!r}'
                known = deeper if '.' in part else shared
                check_name(who, 'part', part, known)
        if not parts:
            raise ValueError(
                f'Teacher {self.name!r} with inherit=True shares no part with '
                f'{type(student).__name__} besides the backbone. Set '
                f'inherit=False.'
            )
        return parts


def _detector(name: str, source: str | Path, model: Mapping) -> nn.Module:
    """Build a teacher; what its detector says of its settings is told."""
    try:
        # Detectors write into the config that they are built from.
        return DETECTORS.build(copy.deepcopy(model))
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f'Teacher {name!r}: no detector can be built of {source} '
            f'({type(error).__name__}: {error}). Name the config it was '
            f'trained with, and look at cfg_options.'
        ) from error


def _second_names(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> list[str]:
    """Keys of a file under which a part stands for the second time.

    Some detectors, such as DDQ, hand a part of their head to another module
    while they are trained; their checkpoints have its weights twice.
    """
    parts: dict[str, list[str]] = {}
    for key in own:
        parts.setdefault(key.partition('.')[2], []).append(key)
    return [
        key
        for key, value in state.items()
        if key not in own
        and any(
            torch.equal(value, state[other])
            for other in parts.get(key.partition('.')[2], ())
            if other in state
        )
    ]


def _fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return state.keys() == own.keys() and all(
        state[key].shape == value.shape for key, value in own.items()
    )


def _part(detector: nn.Module, name: str) -> nn.Module:
    """A part of a detector; a parameter of its own as one that holds it."""
    own = detector._parameters.get(name)
    if own is None:
        return detector.get_submodule(name)
    return nn.ParameterDict({name: own})


def _copy(own: nn.Module, other: nn.Module) -> int:
    """Give a part the weights of another; how many tensors."""
    given = _given(own, other.state_dict())
    own.load_state_dict(given)
    return len(given)


def _given(own: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a part is given, in the form in which it keeps it."""
    for name, module in own.named_modules():
        if hasattr(module, 'adopt'):
            module.adopt(state, f'{name}.' if name else '')
    return state


class Teachers(dict):
    """Teachers by name, out of sight of everything that walks modules."""

    def load(self) -> None:
        for teacher in self.values():
            teacher.load()

    def forget(self) -> None:
        """Empty what they keep of images they have seen."""
        for teacher in self.values():
            if teacher.memory is not None:
                teacher.memory.forget()

    def check_files(self) -> None:
        for teacher in self.values():
            teacher.check_file()

    def mention_missing_files(self) -> None:
        """Warn at build: inference does without, training will not."""
        for teacher in self.values():
            try:
                teacher.check_file()
            except (FileNotFoundError, ValueError) as error:
                print_log(
                    f'{error} (Inference with the student needs no teacher.)',
                    logger='current',
                    level=logging.WARNING,
                )


def _device(
    who: str, device: str | torch.device | None
) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"{who} runs on a device such as 'cuda:1' or 'cpu', got "
            f'device={device!r}.'
        ) from error


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; nothing waits but who reads it from the CPU."""
    if value.device == device:
        return value
    # Of what comes to the CPU without waiting nothing says when it is there.
    return value.to(device, non_blocking=device.type != 'cpu')


def run_detector(detector: nn.Module, images: Tensor, samples: list) -> None:
    """Run backbone, neck and heads without losses or post-processing.

    Query-based heads mask what lies beyond ``batch_input_shape``, so the
    detector is told the size of the batch that it is shown; the samples
    themselves go on describing the student's.
    """
    size = tuple(images.shape[-2:])
    samples = [_of_size(one, size) for one in samples]
    if not hasattr(detector, 'forward_transformer'):
        detector._forward(images, samples)
        return
    # In training it also says what losses take and its head does not.
    said = detector.forward_transformer(detector.extract_feat(images), samples)
    head = detector.bbox_head
    takes = signature(type(head).forward).parameters
    head.forward(**{key: one for key, one in said.items() if key in takes})


@contextmanager
def fed(detector: nn.Module, maps: tuple[Tensor, ...]) -> Iterator[None]:
    """Let a detector's heads go on from maps that are there.

    Args:
        detector: The detector; it may lack backbone and neck.
        maps: What it finds where it would extract features.
    """
    detector.__dict__['extract_feat'] = lambda *_: maps
    try:
        yield
    finally:
        del detector.__dict__['extract_feat']


def detections(
    detector: nn.Module,
    maps: tuple[Tensor, ...],
    samples: list,
    images: Tensor,
    size: tuple[int, int] | None = None,
) -> list[InstanceData]:
    """What a detector finds in a batch, from maps that are there.

    Args:
        detector: The detector, in evaluation.
        maps: What it finds where it would extract features.
        samples: mmdet's sample of each image; nothing is written into them.
        images: The batch, (N, 3, H, W).
        size: Height and width of the images it was shown; of ``images`` if
            None.

    Returns:
        Of each image what its own post-processing leaves, in pixels of the
        batch: ``bboxes`` (M, 4) in float32, ``scores``, whole ``labels``
        and, if it predicts them, ``masks``.
    """
    size = tuple(size or images.shape[-2:])
    shown = []
    for sample in samples:
        shape = tuple(sample.metainfo.get('img_shape', size)[:2])
        # As if nothing had been resized: masks are made in these sizes, and
        # CenterNet subtracts a border, of which only the corner counts.
        meta = dict(
            img_shape=shape,
            ori_shape=shape,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
            flip=False,
            border=(0, shape[0], 0, shape[1]),
        )
        shown.append(DetDataSample(metainfo={**sample.metainfo, **meta}))
    # A masked convolution, as of guided anchors, takes one image.
    alone = any(isinstance(one, MaskedConv2d) for one in detector.modules())
    found, most = [], 1 if alone else len(shown)
    for start in range(0, len(shown), most):
        part = slice(start, start + most)
        with torch.no_grad(), fed(detector, pick(maps, part)):
            found += detector.predict(images[part], shown[part], rescale=False)
    results = [one.pred_instances for one in found]
    for one in results:
        one.bboxes = get_box_tensor(one.bboxes).float()
        one.labels = one.labels.long()  # CrowdDet gives real numbers
    return results


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Let no batch normalisation remember what it sees."""
    layers = [
        one
        for one in module.modules()
        if getattr(one, 'running_mean', None) is not None
    ]
    kept = [(one, one.momentum, one.num_batches_tracked) for one in layers]
    for one in layers:
        one.momentum = 0.0
        one.num_batches_tracked = one.num_batches_tracked.clone()
    try:
        yield
    finally:
        for one, momentum, count in kept:
            one.momentum, one.num_batches_tracked = momentum, count


def _of_size(sample: Any, size: tuple[int, int]) -> Any:
    if tuple(sample.metainfo.get('batch_input_shape', ())) == size:
        return sample
    other = sample.new()
    other.set_metainfo(dict(batch_input_shape=size))
    return other


def without_init(model: Mapping) -> dict:
    """A config whose modules fetch no pretrained weights of their own."""
    if isinstance(model, Mapping):
        return type(model)(
            {
                key: None if key == 'init_cfg' else without_init(value)
                for key, value in model.items()
                if key != 'pretrained'
            }
        )
    if isinstance(model, (list, tuple)):
        return type(model)(without_init(one) for one in model)
    return model


def _some(names: Sequence[str], most: int = 3) -> str:
    if not names:
        return ''
    more = ', …' if len(names) > most else ''
    return f' ({", ".join(names[:most])}{more})'
