import pytest
import torch
from torch import nn

from mmkd.losses.fgd import FGDLoss
from mmkd.losses.fgd_focal import FGDFocalLoss
from mmkd.losses.fgd_global import FGDGlobalLoss
from mmkd.structures import GroundTruth


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 8, 16, 16).unbind()


@pytest.fixture
def gt():
    return GroundTruth.from_boxes(
        [torch.tensor([[10.0, 20, 40, 36]]), torch.zeros(0, 4)],
        shape=(128, 128),
    )


def learnt(loss):
    torch.manual_seed(1)
    for parameter in loss.parameters():
        nn.init.normal_(parameter, std=0.5)
    return loss


def test_is_the_focal_and_the_global_part(maps, gt):
    loss = learnt(FGDLoss(8, 2, 3, 5, 7, temperature=0.8, loss_weight=11))
    alone = FGDGlobalLoss(8, loss_weight=77)
    alone.load_state_dict(loss.relation.state_dict())
    focal = FGDFocalLoss(2, 3, 5, temperature=0.8, loss_weight=11)
    torch.testing.assert_close(
        loss(*maps, gt),
        dict(**focal(*maps, gt), relation=alone(*maps)),
    )


def test_the_gradient_is_that_of_the_parts_alone(maps, gt):
    student, teacher = maps
    student.requires_grad_()
    loss = learnt(FGDLoss(8, 1, 1, 1, 1))
    together = sum(loss(student, teacher, gt).values())
    apart = sum(loss.focal(student, teacher, gt).values())
    apart = apart + loss.relation(student, teacher)
    wanted = [student, *loss.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(together, wanted),
        torch.autograd.grad(apart, wanted),
    )


def test_the_defaults_are_the_settings_published_for_one_stage(maps, gt):
    published = dict(
        foreground=1e-3, background=5e-4, attention=5e-4, relation=5e-6
    )
    unit = FGDLoss(8, 1, 1, 1, 1)(*maps, gt)
    for name, part in FGDLoss(8)(*maps, gt).items():
        torch.testing.assert_close(part, published[name] * unit[name])


def test_one_map_of_the_full_size_is_kept_beside_the_inputs(maps, gt):
    student, teacher = maps
    student.requires_grad_()
    inputs = {one.untyped_storage().data_ptr() for one in maps}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.numel() == student.numel():
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        FGDLoss(8)(student, teacher, gt)
    assert len(kept.keys() - inputs) == 1


def test_the_teachers_block_learns_from_a_constant_map(maps, gt):
    student, teacher = maps
    loss = learnt(FGDLoss(8))
    sum(loss(student, teacher, gt).values()).backward()
    assert teacher.grad is None
    for parameter in loss.relation.teacher_block.parameters():
        assert parameter.grad is not None


@pytest.mark.parametrize('channels', [4, 16])
def test_other_channels_are_refused_by_name(maps, gt, channels):
    with pytest.raises(ValueError, match=f'FGDLoss was built for {channels}'):
        FGDLoss(channels)(*maps, gt)


def test_missing_ground_truth_is_named(maps):
    with pytest.raises(ValueError, match=r'FGDLoss .* gt=None'):
        FGDLoss(8)(*maps)
