"""The quick start behind ``make demo``: does a teacher help this student?

Prepares aerial photographs with tree crowns, trains a teacher, a compact
student alone and the same student distilled, and compares the three.

    python demo/demo.py [--seed 0] [--folder work_dirs/demo] [--source DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)  # configs name data and checkpoints from here
sys.path.insert(0, str(ROOT))

# mmengine 0.10.7 asks setuptools for it, which says so at each import.
os.environ.setdefault('PYTHONWARNINGS', 'ignore:pkg_resources')
# mmdet 3.3.0 warns of its own attributes at each detector.
warnings.simplefilter('ignore')

import torch  # noqa: E402

from mmkd.laboratory.runs import DONE, Run, carry_out  # noqa: E402

CONFIGS = ROOT / 'demo' / 'configs'
#: Seconds that evaluation, table and pictures take after the trainings.
AFTERWARDS = 60.0
PICTURES = 4
#: Detections below this score are not drawn.
SHOWN = 0.3


def main() -> None:
    args = parse()
    begin = time.time()
    print(
        'mmkd demo: a teacher, a compact student alone, and the same student '
        'distilled.\nCtrl-C stops it; make demo goes on where it stopped.\n'
    )
    prepare(args.source)
    runs = plan(args.folder, args.seed)
    cores = min(2, os.cpu_count() or 1)
    carry_out(runs, cores, AFTERWARDS, ended=refuse_failure)
    print('Counting, timing and drawing ...')
    with redirect_stdout(None):  # mmengine and pycocotools chat
        table, facts = compare(runs, args.seed)
        pictures(runs, args.folder)
    (args.folder / 'table.md').write_text(table)
    (args.folder / 'results.json').write_text(json.dumps(facts, indent=2))
    print(f'\n{table}')
    for name in ('table.md', 'results.json', 'detections.png', 'curves.png'):
        print(f'  {args.folder / name}')
    print(f'\n{(time.time() - begin) / 60:.1f} min in this call.')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--folder', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--source', help='a folder or wheel with the photographs'
    )
    args = parser.parse_args()
    if args.seed and args.folder == Path('work_dirs/demo'):
        args.folder = Path(f'work_dirs/demo-seed{args.seed}')
    return args


def prepare(source: str | None) -> None:
    command = [sys.executable, 'tools/prepare_data.py', 'trees']
    if source:
        command += ['--source', source]
    if subprocess.run(command).returncode:
        sys.exit('The photographs could not be prepared; see above.')


def plan(folder: Path, seed: int) -> tuple[Run, Run, Run]:
    """The three trainings. The teacher is the same for every seed."""
    teacher = Run(
        'teacher',
        CONFIGS / 'teacher.py',
        Path('work_dirs/demo/teacher'),
        guess=0.4,
        cores=2,
    )
    options = (f'randomness.seed={seed}',)
    alone = Run(
        'student alone',
        CONFIGS / 'student.py',
        folder / 'alone',
        options,
        guess=0.2,
    )
    file = f'model.teachers.lite.checkpoint={teacher.final}'
    distilled = Run(
        'student distilled',
        CONFIGS / 'distilled.py',
        folder / 'distilled',
        (*options, file),
        guess=0.35,
        needs=(teacher,),
    )
    return teacher, alone, distilled


def refuse_failure(run: Run) -> None:
    if run.status != DONE:
        raise RuntimeError(run.reason)


def compare(runs: tuple[Run, ...], seed: int) -> tuple[str, dict]:
    """The table of the README, as text and as numbers."""
    from mmkd.analysis.cost import gflops, parameters
    from mmkd.laboratory.latency import latency, noise

    detectors = {run.name: load(run) for run in runs}
    size = image_size(runs[0])
    torch.set_num_threads(1)
    times = latency(
        {name: (one, [noise(size)]) for name, one in detectors.items()}
    )
    rows = {}
    for run in runs:
        detector = detectors[run.name]
        rows[run.name] = dict(
            test_scores(run),
            parameters=parameters(detector),
            gflops=gflops(detector, size),
            milliseconds=statistics.median(times[run.name]),
        )
    facts = dict(
        seed=seed,
        size=size,
        rows=rows,
        gain=rows[runs[2].name]['AP'] - rows[runs[1].name]['AP'],
        python=platform.python_version(),
        torch=torch.__version__,
        machine=f'{platform.machine()}, {os.cpu_count()} cores',
    )
    return as_table(facts), facts


def as_table(facts: dict) -> str:
    lines = [
        '| | AP | AP50 | AP75 | parameters | GFLOPs | ms an image |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, row in facts['rows'].items():
        lines.append(
            f'| {name} | {row["AP"]:.1f} | {row["AP50"]:.1f} | '
            f'{row["AP75"]:.1f} | {row["parameters"] / 1e6:.2f} M | '
            f'{row["gflops"]:.2f} | {row["milliseconds"]:.0f} |'
        )
    height, width = facts['size']
    lines += [
        '',
        f'Gain {facts["gain"]:+.1f} AP. Seed {facts["seed"]}, images of '
        f'{width}×{height}, one thread, torch {facts["torch"]}, Python '
        f'{facts["python"]}, {facts["machine"]}.',
        '',
    ]
    return '\n'.join(lines)


def test_scores(run: Run) -> dict[str, float]:
    """AP, AP50 and AP75 of the last checkpoint on the test split."""
    folder = run.folder / 'test'
    newest = max(folder.glob('*/*.json'), key=lambda one: one.stat().st_mtime)
    metrics = json.loads(newest.read_text())
    names = {'AP': 'mAP', 'AP50': 'mAP_50', 'AP75': 'mAP_75'}
    return {
        name: 100 * metrics[f'coco/bbox_{key}'] for name, key in names.items()
    }


def load(run: Run) -> torch.nn.Module:
    from mmdet.apis import init_detector

    import mmkd  # noqa: F401 - mmcv's operators, before mmdet asks for them

    return init_detector(str(run.config), str(run.final), device='cpu')


def image_size(run: Run) -> tuple[int, int]:
    """Height and width of the largest test image."""
    from mmengine.config import Config

    file = Config.fromfile(run.config).test_evaluator.ann_file
    images = json.loads(Path(file).read_text())['images']
    return (
        max(image['height'] for image in images),
        max(image['width'] for image in images),
    )


def pictures(runs: tuple[Run, ...], folder: Path) -> None:
    from mmkd.analysis.curves import curves

    curves(
        {run.name: run.curve() for run in runs},
        folder / 'curves.png',
        xlabel='iteration',
        ylabel='AP on the validation split',
    )
    draw_detections(runs, folder / 'detections.png')


def draw_detections(runs: tuple[Run, ...], path: Path) -> None:
    """Ground truth and all three on photographs no training has seen."""
    from mmdet.apis import inference_detector
    from mmdet.registry import DATASETS
    from mmengine.config import Config

    from mmkd.analysis.pictures import grid, instances

    config = Config.fromfile(runs[0].config)
    dataset = DATASETS.build(config.test_dataloader.dataset)
    detectors = [load(run) for run in runs]
    rows = []
    for index in chosen(dataset, PICTURES):
        info = dataset.get_data_info(index)
        known = info['instances']
        cells = [
            (
                [one['bbox'] for one in known],
                None,
                [one['bbox_label'] for one in known],
            )
        ]
        for detector in detectors:
            found = inference_detector(detector, info['img_path'])
            cells.append(instances(found, score_thr=SHOWN))
        rows.append((info['img_path'], cells))
    titles = ['ground truth', *(run.name for run in runs)]
    grid(rows, titles, path, dataset.metainfo['classes'])


def chosen(dataset: object, count: int) -> list[int]:
    """Images spread evenly over the set, those with boxes only."""
    full = [
        index
        for index in range(len(dataset))
        if dataset.get_data_info(index)['instances']
    ]
    count = min(count, len(full))
    return [full[len(full) * turn // count] for turn in range(count)]


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\nStopped. make demo goes on from here.')
    except RuntimeError as error:
        sys.exit(f'\n{error}')
