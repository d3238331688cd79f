"""Defaults and limits of the settings of vox2vec and its successor."""

from dataclasses import replace

import pytest
from test_pretraining_dense_contrast import FEW, KINDS, method_of
from tiny_dataset import plans_of

from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.dense_contrast import ContrastSettings
from nnssl_ext.plans import pretrain_plan
from nnssl_ext.trainers.pretraining.hierarchical_dense import HierarchicalDenseSettings
from nnssl_ext.trainers.pretraining.vox2vec import Vox2VecSettings


def test_defaults_are_the_papers_numbers():
    plan = replace(pretrain_plan(plans_of("ResEncTiny"), "3d_fullres", 1), preset="ResEncL")
    vox2vec, successor = Vox2VecSettings.for_plan(plan), HierarchicalDenseSettings.for_plan(plan)
    for settings in (vox2vec, successor):
        assert (settings.contrast.voxels, settings.contrast.temperature, settings.contrast.out_dim) == (1024, 0.1, 128)
        optim = settings.optim
        found = (optim.lr, optim.schedule, optim.warmup, optim.weight_decay, optim.clip)
        assert found == (3e-4, "constant", 0, 0, 1)
        assert settings.pairs == 4 and type(settings)().pairs == 10
        assert settings.epochs * settings.iterations == 50_000
    assert (vox2vec.contrast.levels, successor.contrast.levels, successor.width) == (None, 5, 32)
    assert successor.restoration == 10 and successor.balance == "trained" and successor.local
    assert vox2vec.scale.body_hu == -500 and successor.scale.body_hu == pytest.approx(-175 + 0.3 * 425)


def test_what_cannot_work_is_refused_by_name():
    with pytest.raises(NnsslError, match="restoration needs the decoder"):
        HierarchicalDenseSettings(contrast=ContrastSettings(decoder=False))
    with pytest.raises(NnsslError, match="out of range"):
        ContrastSettings(levels=0)


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_levels_that_would_not_be_trained_are_refused(kind):
    """They would be exported as pretrained, and data-parallel training would wait for their gradients."""
    few = replace(FEW, decoder=False, levels=2)
    changes = {"restoration": 0.0} if kind == "hierarchical" else {}
    with pytest.raises(NnsslError, match=r"--contrast\.levels 2: .* the encoder's 3") as refused:
        method_of(kind, "ResEncTiny", contrast=few, **changes)
    assert "--contrast.levels None" in refused.value.fix
    for enough in (3, 5, None):
        method_of(kind, "ResEncTiny", contrast=replace(few, levels=enough), **changes)
    method_of(kind, "ResEncTiny", contrast=replace(few, decoder=True), **changes)
