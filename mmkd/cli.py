"""The console command ``mmkd``, and what ``tools/*.py`` run.

::

    mmkd train CONFIG [--work-dir DIR] [--resume [FILE]] [--amp] …
    mmkd train STUDENT --teacher CONFIG [--teacher-checkpoint FILE] …
    mmkd test CONFIG CHECKPOINT [--out FILE] [--show-dir DIR] [--tta] …
    mmkd check CONFIG [--images N] [--strict] [--json FILE] …

The arguments are those of mmdet's own ``tools/train.py`` and
``tools/test.py``; ``check`` takes those of ``train``. A config is a path,
``mmdet::folder/file.py`` or ``mmkd::folder/file.py``.
"""

from __future__ import annotations

import argparse
import copy
import dis
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import (
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stdout,
)
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import MMLogger

from mmkd.checks import suggest
from mmkd.compat.checkpoint import add_trust_option, trusting
from mmkd.configs import read_config
from mmkd.files import whole

#: Exit status of a process that a signal ended: this plus its number.
SIGNALLED = 128
#: Exit status of a check that found a failure.
UNSOUND = 2
#: Keys that a config may get on the command line though its file has none.
_RUNNER_KEYS = (
    'activation_checkpointing',
    'auto_scale_lr',
    'compile',
    'custom_hooks',
    'custom_imports',
    'default_hooks',
    'default_scope',
    'efficient_conv_bn_eval',
    'env_cfg',
    'experiment_name',
    'find_unused_parameters',
    'launcher',
    'load_from',
    'log_level',
    'log_processor',
    'model_wrapper_cfg',
    'optim_wrapper',
    'param_scheduler',
    'randomness',
    'resume',
    'runner_type',
    'sync_bn',
    'test_cfg',
    'test_dataloader',
    'test_evaluator',
    'train_cfg',
    'train_dataloader',
    'tta_model',
    'tta_pipeline',
    'val_cfg',
    'val_dataloader',
    'val_evaluator',
    'visualizer',
    'work_dir',
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Verb and its arguments; those of the process if None.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return _run(arguments, ['mmkd', *arguments])


def run_train() -> int:
    """What ``tools/train.py`` runs."""
    return _run(['train', *sys.argv[1:]], ['python', *sys.argv])


def run_test() -> int:
    """What ``tools/test.py`` runs."""
    return _run(['test', *sys.argv[1:]], ['python', *sys.argv])


def run_check() -> int:
    """What ``tools/check.py`` runs."""
    return _run(['check', *sys.argv[1:]], ['python', *sys.argv])


def _run(arguments: list[str], command: list[str]) -> int:
    options = _parser().parse_args(arguments)
    os.environ.setdefault('LOCAL_RANK', str(options.local_rank))
    # What the user typed, to say how to go on.
    options.command = shlex.join(command)
    with ExitStack() as stack:
        try:
            stack.enter_context(trusting(*options.trust_checkpoint))
        except (FileNotFoundError, ValueError) as error:
            return _refuse(options, error)
        return options.run(options)


# ------------------------------------------------------------------ arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='mmkd', description='Knowledge distillation for MMDetection'
    )
    verbs = parser.add_subparsers(metavar='VERB', required=True)
    _add_train(verbs)
    _add_test(verbs)
    _add_check(verbs)
    return parser


def _add_verb(
    verbs: Any, name: str, run: Callable, text: str
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument(
        'config', help="path, 'mmdet::folder/file.py' or 'mmkd::…'"
    )
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings to replace, by dotted name; lists as key="[a,b]" or '
        'key=a,b, without blanks',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    parser.add_argument(
        '--no-data-check',
        action='store_true',
        help='do not look into annotations and pictures first',
    )
    add_trust_option(parser)
    # torchrun and the older launcher spell it differently.
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help=argparse.SUPPRESS,
    )


def _add_train(verbs: Any) -> None:
    parser = _add_verb(verbs, 'train', _train, 'Train a detector')
    _add_training(parser)
    parser.add_argument(
        '--no-check',
        action='store_true',
        help='look neither at weights, data nor the first step of each term',
    )
    _add_teaching(parser)
    _add_shared(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints; work_dirs/CONFIG by default',
    )
    parser.add_argument(
        '--amp', action='store_true', help='train in mixed precision'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint; without a name from the latest in the '
        'work directory',
    )


def _add_check(verbs: Any) -> None:
    parser = _add_verb(
        verbs,
        'check',
        _check,
        'Look at a training before it begins. The exit status is 0 if nothing '
        'fails, 2 if something does, and with --strict 1 if there are '
        'warnings.',
    )
    _add_training(parser)
    parser.add_argument(
        '--images',
        type=int,
        default=32,
        help='images that teachers are evaluated on, 0 for none (default: '
        '%(default)s)',
    )
    parser.add_argument(
        '--device', help='where models run; a GPU if there is one'
    )
    parser.add_argument(
        '--strict', action='store_true', help='warnings count as well'
    )
    parser.add_argument(
        '--json', metavar='FILE', help='file to write the findings to'
    )
    _add_teaching(parser)
    _add_shared(parser)


def _add_teaching(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        'distillation by one argument',
        'CONFIG is then the plain config of the student. What is going to '
        'happen is shown before it does.',
    )
    group.add_argument(
        '--teacher', metavar='CONFIG', help='config of a detector that teaches'
    )
    group.add_argument(
        '--teacher-checkpoint',
        metavar='FILE',
        help="the teacher's weights; by default those that are published for "
        'its config',
    )
    group.add_argument(
        '--method', help='name of a recipe; the default one for this pair'
    )
    group.add_argument(
        '--share',
        type=float,
        help='weigh the method so that its gradient is this many times the '
        "detection loss's; by default it has its published weights",
    )
    group.add_argument(
        '--unlabelled',
        metavar='FOLDER',
        help='photographs without labels, on which the teacher teaches: half '
        'of each batch. By default the method is default_predicted then',
    )
    group.add_argument(
        '--print-config',
        nargs='?',
        const='-',
        metavar='FILE',
        help='write the training as a config file, and do not begin it',
    )


def _add_test(verbs: Any) -> None:
    parser = _add_verb(verbs, 'test', _test, 'Evaluate a checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--work-dir', help='folder for the log with the metrics'
    )
    parser.add_argument(
        '--out', metavar='FILE.pkl', help='file to write the predictions to'
    )
    parser.add_argument(
        '--show', action='store_true', help='show detections in a window'
    )
    parser.add_argument(
        '--show-dir',
        help='folder, inside of the log folder, for pictures of detections',
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds each picture is shown',
    )
    parser.add_argument(
        '--tta', action='store_true', help='average over flipped images'
    )
    _add_shared(parser)


# ---------------------------------------------------------------------- verbs


def _train(options: argparse.Namespace) -> int:
    try:
        with _aside(options):
            from mmkd.engine.interrupt import Interrupted
            from mmkd.engine.preflight import check_training

            planned = _planned(options)
        if planned is not None and options.print_config:
            return _write_config(planned, options)
        config = training_config(
            options.config if planned is None else planned.config,
            work_dir=options.work_dir,
            amp=options.amp,
            auto_scale_lr=options.auto_scale_lr,
            resume=options.resume,
            cfg_options=options.cfg_options,
            launcher=options.launcher,
        )
        report = check_training(config, data=_looks_at_data(options))
    except (FileNotFoundError, ValueError) as error:
        return _refuse(options, error)
    trainer = _built(options, config)
    if trainer is None:
        return 1
    for warning in report.warnings:
        trainer.logger.warning(warning)
    try:
        try:
            _check_classes(trainer, config, report)
        except ValueError as error:
            return _refuse(options, error)
        if not options.no_check:
            _watch_first_steps(trainer)
        trainer.train()
    except Interrupted as stopped:
        return _say_how_to_go_on(options, stopped)
    return 0


def _check(options: argparse.Namespace) -> int:
    try:
        if options.print_config:
            raise ValueError(
                '--print-config writes the training and does not check it. '
                'Type it with: mmkd train'
            )
        with redirect_stdout(sys.stderr):
            planned = _planned(options)
        config = training_config(
            options.config if planned is None else planned.config,
            work_dir=options.work_dir,
            amp=options.amp,
            auto_scale_lr=options.auto_scale_lr,
            resume=options.resume,
            cfg_options=options.cfg_options,
            launcher=options.launcher,
            who='mmkd check',
        )
    except (FileNotFoundError, ValueError) as error:
        _refuse(options, error)
        return UNSOUND
    from mmkd.analysis.checking import check
    from mmkd.analysis.sheet import written

    sheet = check(
        config,
        options.config,
        options.images,
        options.device,
        data=not options.no_data_check,
    )
    print(sheet)
    if options.json:
        written(sheet, options.json)
    return sheet.status(options.strict)


#: Options that say something of ``--teacher``.
_OF_TEACHER = (
    'teacher_checkpoint',
    'method',
    'share',
    'unlabelled',
    'print_config',
)
#: What a plan adds to ``model``, so that it is set once it is there.
_PLANNED = ('model.teachers.', 'model.terms.')


def _planned(options: argparse.Namespace) -> Any:
    """The plan that ``--teacher`` asks for, told; None without it."""
    if options.teacher is None:
        for name in _OF_TEACHER:
            if getattr(options, name) is not None:
                raise ValueError(
                    f'--{name.replace("_", "-")} says how a teacher teaches, '
                    f'but there is none. Name its config: --teacher '
                    f'mmdet::folder/file.py'
                )
        return None
    from mmkd.plan import DEFAULT, DEFAULT_PREDICTED, plan

    usual = DEFAULT if options.unlabelled is None else DEFAULT_PREDICTED

    given = {
        key: value
        for key, value in (options.cfg_options or {}).items()
        if not key.startswith(_PLANNED)
    }
    student = read_config(options.config, 'mmkd train', given)
    planned = plan(
        student if given else options.config,
        options.teacher,
        options.teacher_checkpoint,
        options.method or usual,
        options.share,
        options.unlabelled,
    )
    config = planned.config
    if config.get('work_dir') is None:
        name = f'{Path(config.filename or "config").stem}_{planned.method}'
        config.work_dir = os.path.join('work_dirs', name)
    if options.print_config != '-' and _is_first_process():
        print(planned, flush=True)
    return planned


@contextmanager
def _aside(options: argparse.Namespace) -> Iterator[None]:
    """Send what is said on the way to stderr if a config is to be printed.

    The config may go to a file, in which logs have no place, nor what a
    library prints when it is imported.
    """
    if options.print_config != '-':
        yield
        return
    for handler in MMLogger.get_current_instance().handlers:
        if getattr(handler, 'stream', None) is sys.stdout:
            handler.setStream(sys.stderr)
    with redirect_stdout(sys.stderr):
        yield


def _write_config(planned: Any, options: argparse.Namespace) -> int:
    path = None if options.print_config == '-' else Path(options.print_config)
    text = planned.text(Path() if path is None else path.parent)
    if options.cfg_options:  # no file to inherit from says them
        config = planned.config
        config.merge_from_dict(options.cfg_options)
        text = config.pretty_text
    if path is None:
        print(text)
        return 0
    if path.exists():
        raise ValueError(
            f'--print-config would replace {path}, which is there already. '
            f'Name another file.'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        partial.write_text(text, encoding='utf-8')
    print(
        f'\nTrain it with:\n  python tools/train.py {shlex.quote(str(path))}'
    )
    return 0


def _test(options: argparse.Namespace) -> int:
    from mmkd.engine.preflight import check_testing

    try:
        config = evaluation_config(
            options.config,
            options.checkpoint,
            work_dir=options.work_dir,
            show=options.show,
            show_dir=options.show_dir,
            wait_time=options.wait_time,
            tta=options.tta,
            cfg_options=options.cfg_options,
            launcher=options.launcher,
        )
        if options.out and not options.out.endswith(('.pkl', '.pickle')):
            raise ValueError(
                f'--out expected a .pkl file, got {options.out!r}.'
            )
        report = check_testing(config, data=_looks_at_data(options))
    except (FileNotFoundError, ValueError) as error:
        return _refuse(options, error)
    trainer = _built(options, config)
    if trainer is None:
        return 1
    for warning in report.warnings:
        trainer.logger.warning(warning)
    if options.out:
        from mmdet.evaluation import DumpDetResults

        trainer.test_evaluator.metrics.append(
            DumpDetResults(out_file_path=options.out)
        )
    trainer.test()
    return 0


def _built(options: argparse.Namespace, config: Config) -> Any:
    """The trainer; None after a message on what to type."""
    try:
        return _build(config)
    except (FileNotFoundError, ValueError) as error:
        if not _is_worded_here(error):
            raise
        _refuse(options, error)
        return None


def _build(config: Config) -> Any:
    """The trainer, or the runner a config asks for."""
    from mmdet.utils import setup_cache_size_limit_of_dynamo

    setup_cache_size_limit_of_dynamo()
    if 'runner_type' in config:
        from mmengine.registry import RUNNERS

        return RUNNERS.build(config)
    from mmkd.engine.trainer import Trainer

    return Trainer.from_cfg(config)


def _check_classes(trainer: Any, config: Config, report: Any) -> None:
    from mmkd.engine.preflight import check_classes
    from mmkd.engine.resume import plain_model

    inside = isinstance(config.model.get('student'), dict)
    prefix = 'model.student' if inside else 'model'
    with getattr(trainer, 'undone_on_failure', nullcontext)():
        check_classes(plain_model(trainer), report.classes, prefix)


def _watch_first_steps(trainer: Any) -> None:
    from mmkd.engine.first_step import FirstStepHook

    trainer.register_hook(FirstStepHook())


def _looks_at_data(options: argparse.Namespace) -> bool:
    """Once for all processes of a distributed run."""
    unwanted = options.no_data_check or getattr(options, 'no_check', False)
    return not unwanted and (options.launcher == 'none' or _is_first_process())


def _is_first_process() -> bool:
    rank = os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0'))
    return rank == '0'


def _refuse(options: argparse.Namespace, error: Exception) -> int:
    print(f'{options.command}\n{error}', file=sys.stderr)
    return 1


def _is_worded_here(error: BaseException) -> bool:
    """Whether a ``raise`` of mmkd did it; a registry may have wrapped it.

    It says what to type then. What nobody foresaw keeps its traceback, such
    as an ``int('a')`` in mmkd itself.
    """
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    frame = last.tb_frame
    said = dis.opname[frame.f_code.co_code[last.tb_lasti]] == 'RAISE_VARARGS'
    return said and frame.f_globals.get('__name__', '').startswith('mmkd.')


def _say_how_to_go_on(options: argparse.Namespace, stopped: Any) -> int:
    status = SIGNALLED + stopped.number
    if options.launcher != 'none':
        if _is_first_process():
            print(
                f'\n{stopped}\nTo go on, start it again the same way with '
                f'--resume.',
                file=sys.stderr,
            )
        return status
    words = shlex.split(options.command)
    if '--resume' in words:
        at = words.index('--resume')
        del words[at : at + (1 if options.resume == 'auto' else 2)]
    words = [one for one in words if not one.startswith('--resume=')]
    print(
        f'\n{stopped}\nGo on with:\n  {shlex.join(words)} --resume',
        file=sys.stderr,
    )
    return status


# -------------------------------------------------------------------- configs


def training_config(
    config: str | Path | Config,
    work_dir: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    resume: str | bool | None = None,
    cfg_options: dict | None = None,
    launcher: str = 'none',
    who: str = 'mmkd train',
) -> Config:
    """A config as the command line changes it.

    Args:
        config: Path, ``'mmdet::…'``, ``'mmkd::…'`` or a config already read.
        work_dir: Folder for logs and checkpoints.
        amp: Train in mixed precision.
        auto_scale_lr: Scale the learning rate with the batch size.
        resume: A checkpoint, or ``'auto'`` or True for the latest.
        cfg_options: Settings to replace, by dotted name.
        launcher: What started the processes of a distributed run.
        who: Named in messages.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If an option does not fit it.
    """
    cfg = _config(config, who, cfg_options, work_dir, launcher)
    if amp:
        _set_mixed_precision(cfg)
    if auto_scale_lr:
        scaling = cfg.get('auto_scale_lr') or {}
        if not {'enable', 'base_batch_size'} <= set(scaling):
            raise ValueError(
                '--auto-scale-lr needs auto_scale_lr=dict(enable=False, '
                'base_batch_size=16) in the config, with the batch size its '
                f'learning rate is for; got {dict(scaling) or "none"}.'
            )
        cfg.auto_scale_lr.enable = True
    if resume in ('auto', True):
        cfg.resume, cfg.load_from = True, None
    elif resume:
        cfg.resume, cfg.load_from = True, str(resume)
    return cfg


def evaluation_config(
    config: str | Path | Config,
    checkpoint: str | Path,
    work_dir: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2,
    tta: bool = False,
    cfg_options: dict | None = None,
    launcher: str = 'none',
) -> Config:
    """A config as the command line changes it.

    Args:
        config: A distillation config or the plain student's.
        checkpoint: The student's weights.
        work_dir: Folder for the log.
        show: Show detections in a window.
        show_dir: Folder for pictures of detections.
        wait_time: Seconds each picture is shown.
        tta: Average over flipped images.
        cfg_options: Settings to replace, by dotted name.
        launcher: What started the processes of a distributed run.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If an option does not fit it.
    """
    cfg = _config(config, 'mmkd test', cfg_options, work_dir, launcher)
    cfg.load_from, cfg.resume = str(checkpoint), False
    if show or show_dir:
        from mmdet.engine.hooks.utils import trigger_visualization_hook

        if 'visualization' not in (cfg.get('default_hooks') or {}):
            raise ValueError(
                '--show and --show-dir need default_hooks=dict(visualization='
                "dict(type='DetVisualizationHook')) in the config."
            )
        drawing = argparse.Namespace(
            show=show, show_dir=show_dir, wait_time=wait_time
        )
        cfg = trigger_visualization_hook(cfg, drawing)
    if tta:
        _set_test_time_augmentation(cfg)
    return cfg


def _config(
    source: str | Path | Config,
    who: str,
    cfg_options: dict | None,
    work_dir: str | None,
    launcher: str,
) -> Config:
    cfg = read_config(source, who)
    for key in cfg_options or {}:
        _refuse_misspelt(key, cfg)
    if cfg_options:
        cfg.merge_from_dict(cfg_options)
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        name = Path(cfg.filename or 'config.py').stem
        cfg.work_dir = os.path.join('work_dirs', name)
    return cfg


def _refuse_misspelt(key: str, cfg: Config) -> None:
    """MMEngine would add a new setting that nothing reads."""
    first = key.split('.')[0]
    known = sorted({*cfg, *_RUNNER_KEYS})
    if first in known:
        return
    hint = suggest(first, known)
    if hint.startswith('Did you mean'):
        raise ValueError(
            f'--cfg-options {key}=…: the config has no {first!r}. {hint}'
        )


def _set_mixed_precision(cfg: Config) -> None:
    wrapper = cfg.get('optim_wrapper')
    if wrapper is None:
        raise ValueError('--amp needs an optim_wrapper in the config.')
    kind = wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise ValueError(
            f'--amp replaces an OptimWrapper, the config has {kind!r}. Set '
            f'its precision in the config.'
        )
    wrapper.type = 'AmpOptimWrapper'
    wrapper.loss_scale = 'dynamic'


def _set_test_time_augmentation(cfg: Config) -> None:
    if 'tta_model' not in cfg:
        cfg.tta_model = ConfigDict(
            type='DetTTAModel',
            tta_cfg=dict(
                nms=dict(type='nms', iou_threshold=0.5), max_per_img=100
            ),
        )
    if 'tta_pipeline' not in cfg:
        cfg.tta_pipeline = _flipping(cfg.test_dataloader.dataset)
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    dataset.pipeline = cfg.tta_pipeline


def _flipping(dataset: ConfigDict) -> list:
    """The test pipeline, with and without a flip before it is packed."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    pipeline = copy.deepcopy(dataset.pipeline)
    packing = dict(
        type='PackDetInputs',
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'flip',
            'flip_direction',
        ),
    )
    pipeline[-1] = dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='RandomFlip', prob=1.0),
                dict(type='RandomFlip', prob=0.0),
            ],
            [packing],
        ],
    )
    return pipeline


if __name__ == '__main__':
    sys.exit(main())
