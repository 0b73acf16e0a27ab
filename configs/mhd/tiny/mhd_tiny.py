"""MHD: a tiny GFL learns what one twice as wide has said ten times."""

_base_ = '../../_base_/tiny/gfl.py'

prepare = [
    f'tools/make_hypotheses.py {_base_.teacher.config} '
    f'{_base_.teacher.checkpoint} --out work_dirs/tiny/hypotheses_gfl.json '
    f'--generator sample --num-hypotheses 10 --overwrite-if-changed'
]

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmkd.HypothesisDataset',
        dataset=_base_.train_dataloader.dataset,
        cache_file='work_dirs/tiny/hypotheses_gfl.json',
    )
)
