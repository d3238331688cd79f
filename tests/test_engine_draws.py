import pytest
from tiny_dataset import job_of, write_dataset

from nnssl_ext.engine import loop
from nnssl_ext.engine.method import build_method
from nnssl_ext.errors import NnsslError


def test_a_case_from_which_no_pair_can_be_drawn_is_named_before_training(nnunet_env):
    write_dataset(nnunet_env.preprocessed)
    # disjoint crops of 16 voxels need an edge of 32
    job = job_of("--epochs", "1", "--crop", "16", "16", "16", "--iou", "0", "0", method="SimSiamTrainer")
    with pytest.raises(NnsslError, match=r"case case_\d+ of .* has no two crops") as refused:
        loop.pretrain(job)
    assert "reaches" in refused.value.what and "smaller crops" in refused.value.fix
    assert not (job.output / "training_log.csv").exists()
    build_method(job_of("--iou", "0", "0", "--crop", "8", "4", "4", method="SimSiamTrainer"))
