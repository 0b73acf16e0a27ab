"""P2P: several students learn beside each other, and from each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from mmengine.dist import all_reduce
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmkd.checks import check_name, check_positive
from mmkd.configs import read_config, student_config
from mmkd.ops.numeric import full_precision
from mmkd.pixels import Pixels, translate
from mmkd.randomness import preserved, stream_seed
from mmkd.registry import DETECTORS, MODELS
from mmkd.structures import Outputs, Step
from mmkd.structures.ground_truth import labelled
from mmkd.taps import recording
from mmkd.teachers import run_detector
from mmkd.terms.balanced import detection_loss
from mmkd.terms.decoding import check_same_anchors
from mmkd.terms.queries import DECODER, HEAD, asks, check_asks
from mmkd.terms.query_matching import same_form
from mmkd.terms.query_pairs import pair_queries
from mmkd.terms.seen import Seen, dense_head, response_gaps, seen
from mmkd.terms.shared_queries import answer_distances, confidence
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

_WHO = 'PeersTerm'
#: What the student and the teacher are called among the peers.
STUDENT, TEACHER = 'student', 'teacher'
#: Share of a step in the running means of the losses.
MOMENTUM = 0.01
_SETTINGS = ('config', 'cfg_options')
#: How queries of two peers are paired.
PAIRINGS = ('questions', 'answers')


@MODELS.register_module()
class PeersTerm(Term):
    r"""Students that learn from a teacher and from each other, all at once.

    .. math::

        L_k = L_{det,k} + \alpha D(T \to S_k)
              + \frac{\beta}{K - 1} \sum_{j \ne k} D(S_j \to S_k)

    D is the divergence of the class probabilities at a temperature, times its
    square, plus ``box_weight`` times one minus the GIoU of the boxes, over
    the anchors of an image with the largest score of whoever teaches as
    weight. Of detectors of queries D is that of
    :func:`mmkd.terms.shared_queries.answer_distances`, boxes by DETR's two
    distances, over the queries of whoever teaches: the student's decoder is
    asked them as well, in a pass of its own for each who teaches; or over
    pairs of queries that are matched by their answers.

    Who teaches in a summand gets no gradient from it. The distilled detector
    is one of the K students; the others, called peers, and a teacher that
    learns at the same time, from its own detection loss alone, stand in this
    term: they are trained by the optimiser of the training and lie under
    ``terms.`` in a checkpoint.

    A checkpoint loads in the student's plain config as ever. Any of the
    students, the best among them, becomes a plain checkpoint by
    ``tools/export_peer.py``; all of them are one detector in
    :class:`mmkd.detectors.peer_ensemble.PeerEnsemble`.

    Args:
        peers: By name, ``dict(config=…)`` with a config file or a detector,
            and ``cfg_options`` as for a teacher. With none, the student
            learns from the teacher alone. Dense heads with the strides,
            anchors and classes of the student's, or detectors of queries as
            it is one, with its classes. Each begins with random weights of
            its own.
        teacher: A teacher of the distiller, which is frozen; none if None.
        online_teacher: Instead of it, a detector that learns beside the
            students, ``dict(config=…)``.
        alpha: Weight of what the teacher says.
        beta: Weight of what the peers say.
        temperature: Of the class probabilities.
        box_weight: Of the boxes.
        warmup_iters: Iterations at the beginning in which everybody learns
            from labels alone, as nobody has anything to say yet.
        head: Dense head of all.
        pairing: Of queries, ``'questions'``, for decoders of one form, or
            ``'answers'``.
        schedule: Factor over the training, of the other students' detection
            losses as well; constant 1 if None.

    Raises:
        ValueError: If a name is taken or unknown, both kinds of teacher are
            named, there is nobody to learn from, or heads do not pair, while
            the model is built.

    Reference:
        Niyaz and Bathula, "Augmenting Knowledge Distillation With
        Peer-To-Peer Mutual Learning For Model Compression", ISBI 2022,
        arXiv:2110.11023, for classifiers of medical images, from a
        description: the form of the losses is the paper's, the weights,
        boxes, the weight of an anchor and the warmup are ours.
    """

    #: No phase without the detection loss can have it.
    needs_detection: ClassVar[bool] = True
    #: An online teacher knows nothing at first, as its students.
    from_nothing: ClassVar[tuple[str, ...]] = ('*_teacher',)

    def __init__(
        self,
        peers: Mapping[str, Mapping] | None = None,
        teacher: str | None = None,
        online_teacher: Mapping | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 3.0,
        box_weight: float = 1.0,
        warmup_iters: int = 0,
        head: str = 'bbox_head',
        pairing: str = 'questions',
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_positive(_WHO, temperature=temperature)
        check_name(_WHO, 'pairing', pairing, PAIRINGS)
        peers = {} if peers is None else peers
        if not isinstance(peers, Mapping) or not all(
            isinstance(one, Mapping) for one in peers.values()
        ):
            raise ValueError(
                f'{_WHO} takes peers as a dict of dicts by name, got '
                f'peers={peers!r}. Write for instance '
                f"peers=dict(b=dict(config='FILE.py'))."
            )
        peers = dict(peers)
        _check_company(peers, teacher, online_teacher)
        self.teacher, self.head = teacher, head
        self.alpha, self.beta = alpha, beta
        self.temperature, self.box_weight = temperature, box_weight
        self.warmup_iters, self.pairing = warmup_iters, pairing
        self.paths: tuple[str, ...] = (head,)
        if online_teacher is not None:
            peers[TEACHER] = online_teacher
        self.online = online_teacher is not None
        self.peers = nn.ModuleDict(
            {
                name: _build(name, config, number)
                for number, (name, config) in enumerate(peers.items(), 1)
            }
        )
        #: Names of the students, the distilled one first.
        self.students = [
            STUDENT,
            *(name for name in self.peers if name != TEACHER),
        ]
        self.register_buffer('merit', torch.zeros(len(self.students)))
        self.register_buffer('steps', torch.zeros(()))

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        self.queries = asks(student)
        self.paths = (DECODER, HEAD) if self.queries else (self.head,)
        others = {f'peer {name!r}': one for name, one in self.peers.items()}
        if self.teacher is not None:
            check_name('The distiller', 'teacher', self.teacher, teachers)
            self.teacher_names = [self.teacher]
            others[f'teacher {self.teacher!r}'] = teachers[
                self.teacher
            ].detector
        if self.queries:
            own = getattr(student, HEAD)
            self._check_cache(teachers)
        else:
            own = dense_head(_WHO, student, self.head, STUDENT)
        for side, one in others.items():
            if self.queries:
                check_asks(_WHO, one, side)
                head = getattr(one, HEAD)
            else:
                head = dense_head(_WHO, one, self.head, side)
                check_same_anchors(_WHO, own, head)
            if head.num_classes != own.num_classes:
                raise ValueError(
                    f'{_WHO} compares classes, but the student has '
                    f'{own.num_classes} and {side} {head.num_classes}. Set '
                    f'num_classes={own.num_classes} in it, for instance with '
                    f'cfg_options.'
                )
        for path in self.paths:
            self.tap(student, path)
            if self.teacher is not None:
                teachers[self.teacher].tap(path)
        self._pixels = Pixels.of(student, 'The student')
        # Read once: their numbers are tensors of the device.
        self._eyes = {
            name: Pixels.of(peer, f'Peer {name!r}')
            for name, peer in self.peers.items()
        }

    def _check_cache(self, teachers: Mapping[str, Teacher]) -> None:
        if self.teacher and teachers[self.teacher].memory is not None:
            raise ValueError(
                f'{_WHO} asks what the decoder of teacher {self.teacher!r} '
                f'was asked, but its cache keeps outputs alone. Leave its '
                f'cache= out.'
            )

    def initialise(self) -> None:
        for number, peer in enumerate(self.peers.values(), 1):
            with preserved(_seed(number)):
                peer.init_weights()

    def compares_classes(self) -> bool:
        return self.teacher is not None

    def forward(self, step: Step) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        found = {STUDENT: self._seen(step.student, step)}
        losses = {STUDENT: _task(step)}
        for name, peer in self.peers.items():
            losses[name], found[name] = self._run(peer, name, step)
            if losses[name] is not None:
                parts[f'{name}_task'] = losses[name]
        taught = found.pop(TEACHER, None)
        if self.teacher is not None:
            with torch.no_grad():
                shown = step.teacher(self.teacher)
                taught = self._seen(shown, step)
        if step.dry or step.iteration >= self.warmup_iters:
            parts.update(self._lessons(found, taught))
        if self.training and not step.dry:
            self._judge([losses[name] for name in self.students])
        return parts

    def _lessons(
        self,
        found: Mapping[str, Seen | Outputs],
        taught: Seen | Outputs | None,
    ) -> dict[str, Tensor]:
        """What each student hears of the teacher and of its peers."""
        parts = {}
        for name, own in found.items():
            if taught is not None:
                parts[f'{name}_teacher'] = self.alpha * self.gap(own, taught)
            others = [one for key, one in found.items() if key != name]
            if others:
                gaps = [self.gap(own, one) for one in others]
                parts[f'{name}_peers'] = self.beta * sum(gaps) / len(others)
        return parts

    def _seen(self, outputs: Outputs, step: Step) -> Seen | Outputs:
        if self.queries:
            return outputs  # it may be asked more
        return seen(outputs, step.gt, self.head)

    def _check_questions(self, own: Outputs, other: Outputs) -> None:
        if self.pairing == 'questions' and not same_form(own, other):
            raise ValueError(
                f'{_WHO} asks everybody what the others are asked, but '
                f'decoders of {type(own.detector).__name__} and '
                f'{type(other.detector).__name__} take queries of other '
                f"forms. Set pairing='answers', or name peers of one kind."
            )

    def gap(self, own: Seen | Outputs, other: Seen | Outputs) -> Tensor:
        """What a student pays for not saying what another says."""
        if not isinstance(own, Seen):
            self._check_questions(own, other)
            pairs = pair_queries(self.pairing, own, other)
            cls, l1, giou = answer_distances(
                pairs.student,
                pairs.teacher,
                confidence(pairs.teacher),
                self.temperature,
            ).values()
            return cls + self.box_weight * (5 * l1 + 2 * giou)
        with full_precision(own.gt.boxes):
            scores, boxes = response_gaps(_WHO, own, other, self.temperature)
            return (scores + self.box_weight * boxes).mean()

    def _run(
        self, peer: BaseModel, name: str, step: Step
    ) -> tuple[Tensor | None, Seen | Outputs]:
        shapes = [
            tuple(one.metainfo.get('img_shape', step.gt.shape)[:2])
            for one in step.samples
        ]
        pixels = self._pixels, self._eyes[name]
        images = translate(step.images, shapes, *pixels)
        loss = None
        with recording(peer, self.paths) as record:
            record.size = tuple(images.shape[-2:])
            if step.dry:
                run_detector(peer, images, step.samples)
            else:
                loss = detection_loss(peer.loss(images, list(step.samples)))
        return loss, self._seen(record, step)

    @torch.no_grad()
    def _judge(self, losses: list[Tensor]) -> None:
        """Running means of the students' detection losses."""
        now = torch.stack([one.detach().float() for one in losses])
        all_reduce(now, 'mean')
        self.steps += 1
        rate = (1 / self.steps).clamp(min=MOMENTUM)
        mixed = self.merit + rate * (now - self.merit)
        self.merit.copy_(torch.where(now.isfinite(), mixed, self.merit))


def _task(step: Step) -> Tensor | None:
    if step.dry:
        return None
    if not all(labelled(one) for one in step.samples):
        raise ValueError(
            f'{_WHO} trains every student by labels, but the batch has images '
            f'without. Leave unlabelled data out of train_dataloader.'
        )
    return detection_loss(step.losses)


def _check_company(
    peers: Mapping, teacher: str | None, online: Mapping | None
) -> None:
    if teacher is not None and online is not None:
        raise ValueError(
            f'{_WHO} has one teacher, got teacher={teacher!r} and '
            f'online_teacher. Name the one that is frozen, or the one that '
            f'learns.'
        )
    if not peers and teacher is None and online is None:
        raise ValueError(
            f'{_WHO} got nobody to learn from. Name peers, a teacher of the '
            f'distiller, or an online_teacher.'
        )
    for name in peers:
        if name in (STUDENT, TEACHER) or 'loss' in name:
            raise ValueError(
                f'{_WHO} cannot call a peer {name!r}: the name has a meaning '
                f'in the log. Use another.'
            )


def _build(name: str, config: Mapping, number: int) -> BaseModel:
    """A detector with random weights that nobody else has."""
    who = f'{_WHO}: peer {name!r}'
    for setting in config:
        check_name(who, 'setting', setting, _SETTINGS)
    if 'config' not in config:
        raise ValueError(
            f'{who} needs a config: '
            f"{name}=dict(config='mmdet::folder/file.py')."
        )
    found: Any = read_config(config['config'], who, config.get('cfg_options'))
    with preserved(_seed(number)):
        return DETECTORS.build(student_config(found.model))


def _seed(number: int) -> int:
    """One that no other peer and no step has."""
    return stream_seed(torch.initial_seed(), number, -1 % 2**32)
