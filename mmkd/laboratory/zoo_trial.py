"""One pair of the zoo, from its two configs to a student in plain mmdet.

::

    python -m mmkd.laboratory.zoo_trial FOLDER --out FILE

Everything is done in this process, step by step, and written down after each,
so that whoever started it can end it and still know how far it came.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.cnn import ConvAWS2d
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmkd.classes import head_classes
from mmkd.compat.checkpoint import TERM_PREFIX
from mmkd.files import whole
from mmkd.laboratory.digests import sources
from mmkd.laboratory.results import versions
from mmkd.laboratory.samples import annotated
from mmkd.laboratory.zoo_pairs import Choice, choose, said, weightless, zoo
from mmkd.plan import TEACHER, Plan, classes_of_data, fitting, plan
from mmkd.recipes import FAMILIES, recipe
from mmkd.registry import DETECTORS, MODELS

#: Sides of the square batches that are tried, pixels: the first on which
#: plain mmdet trains. The larger ones are for detectors that choose hundreds
#: of queries among the cells.
SIDES = (128, 256, 384, 512)
#: Images of a batch.
BATCH = 2
#: Regions of a picture that second stages are given, at most, and where their
#: number stands in ``train_cfg`` and ``test_cfg``.
REGIONS = 16
LIMITED = (
    ('sampler', 'num'),
    ('rpn_proposal', 'max_per_img'),
    ('rpn', 'max_per_img'),
)
#: Share of the config's learning rate, as at the start of mmdet's warm-up.
RATE = 0.001
#: A message is cut after so many characters.
WORDS = 400

#: The recipe that lets the teacher predict.
DETECTS = 'predicted'

#: Steps of a trial, in order: up to ``BASE`` plain mmdet is alone.
STEPS = (
    'choose',
    'build',
    'train',
    'predict',
    'teacher',
    'plan',
    'distil',
    'predict distilled',
    'export',
    'methods',
    'families',
)
BASE = 'teacher'


def main(arguments: Sequence[str] | None = None) -> int:
    """Try a folder of the zoo and write what happened.

    Args:
        arguments: Words of the command line; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        prog='python -m mmkd.laboratory.zoo_trial',
        description='Tries one folder of the zoo.',
    )
    parser.add_argument('folder')
    parser.add_argument('--out', type=Path, required=True)
    options = parser.parse_args(arguments)
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)  # which weights begin how
    torch.set_num_threads(1)
    out = options.out.resolve()
    with tempfile.TemporaryDirectory(prefix='zoo-') as folder:
        # Where configs name others by their path in mmdet's repository.
        Path(folder, 'configs').symlink_to(zoo())
        os.chdir(folder)
        try:
            Trial(options.folder, out, zoo()).run()
        finally:
            os.chdir(out.parent)
    return 0


class Trial:
    """A folder's pair, tried step by step.

    Args:
        folder: Name of the folder.
        out: File of the record.
        root: The zoo.
        sides: Sides of the images to try, pixels.
    """

    def __init__(
        self,
        folder: str,
        out: Path,
        root: Path,
        sides: Sequence[int] = SIDES,
    ) -> None:
        self.folder, self.out, self.root = folder, out, root
        self.sides = sides
        self.record: dict[str, Any] = dict(folder=folder, steps={})

    def run(self) -> dict[str, Any]:
        """Every step, until one fails.

        Returns:
            The record, which is written as well.
        """
        begin = time.time()
        with suppress(_StepError):
            self._run()
        self.record['seconds'] = round(time.time() - begin, 1)
        self.record['gigabytes'] = round(peak_memory(), 2)
        self.record['versions'] = versions()
        self.record['sources'] = sources_of(self.record.get('terms', {}))
        self.record['finished'] = True
        self._write()
        return self.record

    @contextmanager
    def _step(self, name: str) -> Iterator[dict[str, Any]]:
        """Note how long a step takes, and how it fails."""
        note: dict[str, Any] = dict(error=None, running=True)
        self.record['steps'][name] = note
        self._write()
        begin = time.time()
        try:
            yield note
        except Exception as error:  # a detector's own, of any kind
            note['error'] = said(error)[:WORDS]
            traceback.print_exc()
            raise _StepError from error
        finally:
            note['seconds'] = round(time.time() - begin, 1)
            del note['running']
            self._write()

    def _write(self) -> None:
        with whole(self.out, durable=False) as part:
            part.write_text(json.dumps(self.record, indent=1))

    def _run(self) -> None:
        init_default_scope('mmdet')
        with self._step('choose'):
            choice = choose(self.root, self.folder)
            self._note_choice(choice)
        if choice.student is None:
            return
        student, teacher = (
            plain(read(self.root / one.file))
            for one in (choice.student, choice.teacher)
        )
        shown, alone = self._plain_training(student, teacher)
        student = shrunk(student, shown.side)
        with self._step('teacher'):
            checkpoint = Path('teacher.pth')
            save_teacher(teacher, student, checkpoint)
        with self._step('plan') as note:
            source = choice.teacher.source
            if 'teacher_ckpt' in teacher.model:  # distils by itself
                source = 'teacher.py'
                teacher.dump(source)
            found = plan(student, source, checkpoint)
            note.update(rows=found.rows, notes=found.notes)
        model = self._distillation(student, found, shown)
        self._export(model, alone, shown)
        del alone
        teacher = found.config.model.teachers[TEACHER]
        with self._step('methods') as note:
            fits = fitting(student, teacher, found.pair)
            note['fits'] = fits
            self.record['terms'] = {
                name: recipe(name, found.pair)
                for name, why in fits.items()
                if why is None
            }
        self._families(model, found, shown)

    def _note_choice(self, choice: Choice) -> None:
        one, other = choice.student, choice.teacher
        self.record.update(
            others=dict(choice.others), broken=list(choice.broken)
        )
        if one is None:
            return
        self.record.update(
            student=one.file,
            teacher=other.file,
            weights=[one.weights, other.weights],
            kind=one.make[0],
            make=one.make,
        )

    # ------------------------------------------------------------ its steps

    def _plain_training(
        self, config: Config, teacher: Config
    ) -> tuple[Shown, nn.Module]:
        """Train and predict in plain mmdet.

        Args:
            config: Of the student.
            teacher: Config of its teacher, which may take one side alone.

        Returns:
            What it was shown, and the detector.
        """
        sides = list(fixed_side(config) or fixed_side(teacher) or self.sides)
        while sides:
            shown = Shown.to(config, sides.pop(0))
            try:
                model = self._train_with(config, shown)
            except _StepError as stopped:
                # What larger pictures cannot mend.
                final = (NotImplementedError, ArithmeticError)
                hopeless = isinstance(stopped.__cause__, final)
                built = self.record['steps']['build']['error'] is None
                if not sides or hopeless or not built:
                    raise
                continue
            enough = self._side_to_predict(model, shown, sides)
            if enough == shown.side:
                return shown, model
            sides = [enough]
        raise AssertionError('no side was tried')

    def _side_to_predict(
        self, model: nn.Module, shown: Shown, larger: Sequence[int]
    ) -> int:
        """Side of pictures in which plain mmdet finds something to say.

        What it can at no side it is asked nowhere, and the first one is kept.
        """
        with self._step('predict') as note:
            for side in (shown.side, *larger):
                try:
                    note['boxes'] = boxes(
                        predict(model, replace(shown, side=side))
                    )
                except Exception as error:  # a detector's own, of any kind
                    note.setdefault('cannot', said(error)[:WORDS])
                    continue
                note.pop('cannot', None)
                return side
        return shown.side

    def _train_with(self, config: Config, shown: Shown) -> nn.Module:
        config = shrunk(config, shown.side)
        with self._step('build'):
            # In full, as a structure alone may hide a missing file.
            model = _built(config)
        with self._step('train') as note:
            self.record['side'] = shown.side
            before = copies(learned(model.backbone))
            note['losses'] = _train(model, config, shown)
            # Random weights of a deep one can have gradients whose norm is
            # infinite, of which clipping leaves nothing.
            note['learns'] = moved(before, learned(model.backbone))
        return model

    @property
    def _predicts(self) -> bool:
        return 'cannot' not in self.record['steps']['predict']

    def _distillation(
        self, student: Config, found: Plan, shown: Shown
    ) -> nn.Module:
        with self._step('distil') as note:
            torch.manual_seed(0)
            model = MODELS.build(copy.deepcopy(found.config.model))
            model.init_weights()
            settle(model)
            learns = self.record['steps']['train']['learns']
            note.update(_distil(model, student, shown, learns=learns))
        with self._step('predict distilled') as note:
            if self._predicts:
                note['boxes'] = boxes(predict(model, shown))
        return model

    def _export(
        self, model: nn.Module, alone: nn.Module, shown: Shown
    ) -> None:
        """The student's weights in plain mmdet say the same.

        They are loaded into the detector that plain mmdet has trained, as
        some keep a part under a second name once they are.
        """
        with self._step('export') as note:
            state = {
                key: value
                for key, value in model.state_dict().items()
                if not key.startswith(TERM_PREFIX)
            }
            torch.save(dict(state_dict=state), 'student.pth')
            load_checkpoint(alone, 'student.pth', strict=True)
            Path('student.pth').unlink()
            note['tensors'] = len(state)
            if self._predicts:
                one, other = (predict(x, shown) for x in (model, alone))
                _same([_fields(x) for x in one], [_fields(x) for x in other])
            # Random weights often find nothing worth telling.
            note['outputs'] = _same_outputs(model, alone, shown)

    def _families(self, model: nn.Module, found: Plan, shown: Shown) -> None:
        """One step of a method of each family that fits."""
        with self._step('families') as note:
            fits = dict(self.record['steps']['methods']['fits'])
            if not self._predicts:
                # What mmdet itself cannot is asked of nobody.
                fits[DETECTS] = 'plain mmdet does not predict here'
            speakers = {
                family: next((x for x in names if fits[x] is None), None)
                for family, names in FAMILIES.items()
            }
            speakers = {
                family: name for family, name in speakers.items() if name
            }
            terms = {
                method: recipe(method, found.pair)
                for method in speakers.values()
            }
            try:
                told = _hear(model, terms, shown)
            except Exception:  # one of them; each alone says which
                traceback.print_exc()
                told = {}
                for method, config in terms.items():
                    try:
                        told |= _hear(model, {method: config}, shown)
                    except Exception as error:  # of whatever kind
                        traceback.print_exc()
                        told[method] = said(error)[:WORDS]
            note['learn'] = {
                family: [method, told[method]]
                for family, method in speakers.items()
            }


class _StepError(Exception):
    """A step failed; there is nothing to be done after it."""


# ------------------------------------------------------------------- configs


def read(path: Path) -> Config:
    """A config, whose model normalises its images as its runner would."""
    config = Config.fromfile(path)
    if 'data_preprocessor' in config:
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    return config


def plain(config: Config) -> Config:
    """A copy of a config that fetches no weights."""
    config = config.copy()
    config.model = weightless(config.model)
    return config


def fixed_side(config: Config) -> tuple[int, ...]:
    """The only side of images that a detector takes; none if it takes any.

    An SSD's anchors are laid out for one.
    """
    head = config.model.get('bbox_head') or {}
    side = (head.get('anchor_generator') or {}).get('input_size')
    return () if side is None else (side,)


def shrunk(config: Config, side: int) -> Config:
    """A copy of a config with less to look at.

    Batches are padded to no more than a side, and second stages are given
    fewer regions.
    """
    config = config.copy()
    config.model = copy.deepcopy(config.model)
    preprocessor = config.model.get('data_preprocessor') or {}
    for augment in preprocessor.get('batch_augments') or []:
        if 'size' in augment:
            augment['size'] = (side, side)
    for when in ('train_cfg', 'test_cfg'):
        _fewer_regions(config.model.get(when))
    return config


def _fewer_regions(settings: Any) -> None:
    if isinstance(settings, Mapping):
        for part, key in LIMITED:
            limited = settings.get(part) or {}
            if key in limited:
                limited[key] = min(limited[key], REGIONS)
        settings = settings.values()
    elif not isinstance(settings, (list, tuple)):
        return
    for one in settings:
        _fewer_regions(one)


def _built(config: Config, seed: int = 0) -> nn.Module:
    """A detector in plain mmdet, with random weights."""
    torch.manual_seed(seed)
    detector = DETECTORS.build(copy.deepcopy(config.model))
    detector.init_weights()
    settle(detector)
    return detector


def settle(detector: nn.Module) -> None:
    """Let random weights be what those of a trained detector are.

    Some convolutions standardise their weights, by a scale that they take
    from those that they load; by themselves they have none, and DetectoRS
    overflows. Others have no way to begin but a file: until then the weights
    of TridentNet's are what was in the memory.
    """
    for module in detector.modules():
        own = module._parameters.get('weight')
        begins = hasattr(module, 'reset_parameters')
        if own is not None and own.ndim == 4 and not begins:
            nn.init.kaiming_normal_(own)
        if isinstance(module, ConvAWS2d):
            own = dict(weight=module.weight, bias=module.bias)
            own = {key: one for key, one in own.items() if one is not None}
            module.load_state_dict(own, strict=False)


def save_teacher(config: Config, student: Config, path: Path) -> None:
    """Random weights of a teacher, as a file like a training's last.

    Args:
        config: The teacher's.
        student: The student's, whose classes the teacher knows as well.
        path: The file.
    """
    meta = {}
    classes = classes_of_data(student)
    if classes:
        meta = dict(dataset_meta=dict(classes=classes))
    state = _built(config, seed=1).state_dict()
    torch.save(dict(meta=meta, state_dict=state), path)


# ---------------------------------------------------------------------- data


@dataclass(frozen=True)
class Shown:
    """What pictures are like.

    Attributes:
        side: Of the batch, pixels.
        masks: Whether objects have masks; some detectors take boxes alone.
        square: Whether all are of one shape; else the second is narrower, so
            that it is padded.
    """

    side: int
    masks: bool = False
    square: bool = False

    @classmethod
    def to(cls, config: Config, side: int) -> Shown:
        """As the config's own pipeline annotates them."""
        pipeline = str(config.get('train_dataloader'))
        return cls(
            side,
            masks="'with_mask': True" in pipeline,
            square="'keep_ratio': False" in pipeline,
        )


def batch(detector: nn.Module, shown: Shown, seed: int = 0) -> dict[str, list]:
    """Generated images with boxes, masks and all else a detector may ask.

    Args:
        detector: Its heads say how many classes there are.
        shown: What they are like.
        seed: Decides what is seen.

    Returns:
        ``inputs`` and ``data_samples`` as a data loader collates them.
    """
    numbers = np.random.RandomState(seed)
    found = head_classes(detector).values()
    classes = min(found, default=1)
    inputs, samples = [], []
    for index in range(BATCH):
        narrow = index % 2 == 1 and not shown.square
        width = shown.side * 7 // 8 if narrow else shown.side
        image, sample = picture(numbers, shown.side, width, classes)
        if getattr(detector, 'with_rpn', False):
            del sample.proposals  # they would stand for its own
        if not shown.masks:
            del sample.gt_instances.masks, sample.ignored_instances.masks
        sample.set_metainfo(dict(img_id=index, img_path=f'{index}.png'))
        inputs.append(image)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def picture(
    numbers: np.random.RandomState, height: int, width: int, classes: int
) -> tuple[Tensor, DetDataSample]:
    """Three ellipses on noise, (3, H, W) in uint8, and their annotation."""
    image = numbers.randint(0, 90, (3, height, width)).astype(np.uint8)
    rows, columns = np.mgrid[:height, :width]
    boxes, masks = [], []
    for share in (0.16, 0.3, 0.5):
        extent = np.array([height, width]) * share * numbers.uniform(0.8, 1, 2)
        top, left = numbers.uniform(1, [height, width] - extent - 1)
        (h, w), (y, x) = extent / 2, (top, left) + extent / 2
        mask = ((rows - y) / h) ** 2 + ((columns - x) / w) ** 2 <= 1
        image[:, mask] = numbers.randint(120, 255, (3, 1))
        boxes.append([left, top, left + extent[1], top + extent[0]])
        masks.append(mask.astype(np.uint8))
    labels = numbers.randint(0, classes, len(boxes))
    sample = annotated(boxes, labels, masks)
    boxes = sample.gt_instances.bboxes
    # What Fast R-CNN reads from a file.
    shifts = torch.tensor(numbers.uniform(-4, 4, (REGIONS // 3, 3, 4)))
    shifted = boxes + shifts.float()
    whole_image = torch.tensor([width, height, width, height])
    sample.proposals = InstanceData(
        bboxes=shifted.view(-1, 4).clamp(min=0).minimum(whole_image),
        scores=torch.linspace(1, 0.1, REGIONS // 3 * 3),
    )
    stuff = torch.from_numpy(masks[-1].astype(np.int64))[None]
    sample.gt_sem_seg = PixelData(sem_seg=stuff)
    return torch.from_numpy(image), sample


# --------------------------------------------------------------------- steps


def _optimiser(model: nn.Module, config: Config) -> Any:
    """The config's, in single precision, as its warm-up begins."""
    settings = copy.deepcopy(config.optim_wrapper)
    kind = settings.get('type', 'OptimWrapper')
    if 'Amp' in str(kind):
        settings = dict(settings, type='OptimWrapper')
        settings.pop('loss_scale', None)
        settings.pop('dtype', None)
    settings['optimizer'] = dict(settings['optimizer'])
    settings['optimizer']['lr'] *= RATE
    return build_optim_wrapper(model, settings)


def _train(
    model: nn.Module, config: Config, shown: Shown, steps: int = 2
) -> list[float]:
    """Losses of so many steps.

    Raises:
        ArithmeticError: If one is not finite.
    """
    model.train()
    wrapper = _optimiser(model, config)
    totals = []
    for step in range(steps):
        _begin_iteration(step)
        logged = model.train_step(batch(model, shown, step), wrapper)
        totals.append(_total(logged))
    return totals


def _begin_iteration(number: int) -> None:
    """What a runner tells detectors that change while they are trained."""
    hub = MessageHub.get_current_instance()
    for name, value in (('iter', number), ('epoch', 0), ('max_iters', 1000)):
        hub.update_info(name, value)


def _total(logged: Mapping[str, Tensor]) -> float:
    wrong = [
        key for key, one in logged.items() if not math.isfinite(float(one))
    ]
    if wrong:
        raise ArithmeticError(f'{", ".join(wrong)} is not finite')
    return round(float(logged['loss']), 4)


def _distil(
    model: nn.Module,
    config: Config,
    shown: Shown,
    steps: int = 2,
    learns: bool = True,
) -> dict[str, Any]:
    """Steps of a distilled student, whose terms are looked at on the way.

    Args:
        model: The student.
        config: Its config.
        shown: What the pictures are like.
        steps: How many.
        learns: Whether its backbone changes in such steps of plain mmdet.

    Raises:
        ArithmeticError: If a loss is not finite, no term says anything, or
            the student's backbone hears nothing of it, or does not learn.
    """
    model.train()
    wrapper = _optimiser(model, config)
    learning = [
        one for one in model.backbone.parameters() if one.requires_grad
    ]
    before = copies(learning)
    totals, terms, gradient = [], {}, 0.0
    for step in range(steps):
        _begin_iteration(step)
        data = model.data_preprocessor(batch(model, shown, step), True)
        losses = model(**data, mode='loss')
        total, logged = model.parse_losses(losses)
        totals.append(_total(logged))
        shares = {
            key: value
            for key, value in losses.items()
            if key.startswith('loss_kd_')
        }
        terms = {key: float(value) for key, value in shares.items()}
        if not any(terms.values()):
            raise ArithmeticError(f'no term says anything: {terms}')
        if step == 0:
            gradient = _gradient(model, learning, sum(shares.values()))
        wrapper.update_params(total)
    if learning and not gradient > 0:
        raise ArithmeticError(
            f'the terms {", ".join(terms)} give the backbone no gradient'
        )
    if learns and learning and not moved(before, learning):
        raise ArithmeticError('the backbone did not learn')
    return dict(losses=totals, terms=terms, gradient=gradient)


def _hear(
    model: nn.Module, methods: Mapping[str, Mapping], shown: Shown
) -> dict[str, str | None]:
    """What each of several methods says in one step of all of them.

    Args:
        model: A distilled student.
        methods: Terms by the method's name.
        shown: What the pictures are like.

    Returns:
        None, or what is wrong with its loss or gradient, by method.
    """
    model.take(
        {
            f'{method}_{name}': term
            for method, terms in methods.items()
            for name, term in terms.items()
        }
    )
    model.train()
    learning = [
        one for one in model.backbone.parameters() if one.requires_grad
    ]
    _begin_iteration(0)
    data = model.data_preprocessor(batch(model, shown), True)
    losses = model(**data, mode='loss')
    found = {}
    for method, terms in methods.items():
        names = [f'loss_kd_{method}_{name}' for name in terms]
        share = sum(
            value
            for key, value in losses.items()
            if any(f'{key}_'.startswith(f'{name}_') for name in names)
        )
        found[method] = None
        if not torch.is_tensor(share) or not math.isfinite(share):
            found[method] = f'its loss is {float(share)}'
        elif learning and not _gradient(model, learning, share) > 0:
            found[method] = 'it gives the backbone no gradient'
    return found


def learned(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that are not frozen."""
    return [one for one in module.parameters() if one.requires_grad]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers, kept."""
    return [one.detach().clone() for one in tensors]


def moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether any number has changed."""
    return not all(map(torch.equal, before, after))


def _gradient(
    model: nn.Module, learning: Sequence[Tensor], share: Tensor
) -> float:
    """The largest gradient that the terms alone give the backbone."""
    if not share.requires_grad:
        return 0.0
    model.zero_grad()
    # Not by autograd.grad, which backbones that save memory do not allow.
    share.backward(retain_graph=True)
    found = [
        float(one.grad.abs().max()) for one in learning if one.grad is not None
    ]
    model.zero_grad()
    return max(found, default=0.0)


@torch.no_grad()
def predict(model: nn.Module, shown: Shown) -> list[DetDataSample]:
    """Detections in one image."""
    model.eval()
    data = batch(model, shown)
    return model.test_step({key: value[:1] for key, value in data.items()})


def boxes(found: Sequence[DetDataSample]) -> int:
    """Detections in all samples."""
    return sum(len(one.pred_instances) for one in found)


def _fields(sample: DetDataSample) -> dict[str, Any]:
    found = sample.pred_instances
    return {key: found[key] for key in sorted(found.keys())}


@torch.no_grad()
def _same_outputs(one: nn.Module, other: nn.Module, shown: Shown) -> int:
    """Whether two detectors' heads say the same; tensors compared.

    None are where plain mmdet itself cannot say (some detectors lack this
    way of running).
    """
    for detector in (one, other):
        detector.eval()
    data = other.data_preprocessor(batch(other, shown))
    try:
        theirs = other(**copy.deepcopy(data), mode='tensor')
    except Exception:  # a detector's own trouble
        return 0
    return _same(one(**copy.deepcopy(data), mode='tensor'), theirs)


def _same(one: Any, other: Any) -> int:
    """The number of tensors, which must be equal to the last bit.

    Raises:
        ArithmeticError: If two differ.
    """
    one, other = (getattr(x, 'tensor', x) for x in (one, other))
    if isinstance(one, np.ndarray):
        one, other = torch.from_numpy(one), torch.from_numpy(other)
    if isinstance(one, Tensor):
        if not torch.equal(one, other):
            raise ArithmeticError(
                f'the deployed student says something else than the trained '
                f'one, in a tensor of {tuple(one.shape)}'
            )
        return 1
    if isinstance(one, Mapping):
        one, other = ([x[key] for key in one] for x in (one, other))
    if isinstance(one, (list, tuple)):
        return sum(_same(*pair) for pair in zip(one, other, strict=True))
    return 0


def sources_of(terms: Mapping[str, Mapping]) -> dict[str, str]:
    """Digests of the modules that a trial of some methods runs.

    Args:
        terms: Terms of the methods that fit, by the method.
    """
    model = dict(type='mmkd.Distiller', terms=terms)
    names = ('plan', 'recipes')
    names += ('laboratory.zoo_trial', 'laboratory.zoo_pairs')
    return sources(Config(dict(model=model)), names)


def peak_memory() -> float:
    """Gibibytes that this process has held at most."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == 'darwin' else 2**20)


if __name__ == '__main__':
    sys.exit(main())
