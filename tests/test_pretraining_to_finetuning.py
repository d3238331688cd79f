"""A method that trains encoder and decoder hands either to the network that stock nnU-Net fine-tunes."""

import pytest
import torch
from tiny_dataset import BACKBONES, CONFIGURATION, DATASET, job_of, weights_of, write_for_fine_tuning

from nnssl_ext.cli.adapt import main as adapt_main
from nnssl_ext.engine import loop
from nnssl_ext.trainers.finetuning.groups import half_of

NOTHING_MOVES = ("--lr_encoder", "0", "--lr_decoder", "0", "--lr_scratch", "0")
SHORT = ("--epochs", "1", "--iterations_per_epoch", "1", "--val_iterations_per_epoch", "1")


@pytest.fixture
def dataset(nnunet_env, monkeypatch):
    """The tiny dataset with what stock fine-tuning wants beyond pretraining."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return write_for_fine_tuning(nnunet_env.preprocessed, train=2, val=1)


def started_and_trained(plans_name: str, weights: str | None) -> dict[str, torch.Tensor]:
    """Weights after an epoch of ``nnUNetv2_train -tr nnsslFinetuneTrainer [-pretrained_weights]``, as that command makes it."""
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    trainer = get_trainer_from_args(
        DATASET, CONFIGURATION, 0, "nnsslFinetuneTrainer", plans_name, False, torch.device("cpu")
    )
    trainer.plot_network_architecture = trainer._save_debug_information = lambda: None
    trainer.logger.plot_progress_png = lambda *_: None
    maybe_load_checkpoint(trainer, False, False, weights)
    trainer.run_training()
    return trainer.network.state_dict()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("transfer", ["encoder", "decoder"])
def test_the_chosen_half_arrives_and_the_other_is_fresh(dataset, monkeypatch, backbone, transfer):
    job = job_of("--epochs", "1", "--iterations", "1", method="DisruptiveAETrainer", backbone=backbone)
    assert loop.pretrain(job)
    pretrained = weights_of(job)
    checkpoint = job.output / "checkpoint_final.pth"
    command = ["nnssl_adapt", str(checkpoint), "-d", DATASET, "-p", f"nnssl{backbone}Plans", "--transfer", transfer]
    monkeypatch.setattr("sys.argv", [*command, *NOTHING_MOVES, *SHORT])
    with pytest.raises(SystemExit) as ended:
        adapt_main()
    assert not ended.value.code
    plans_name = f"nnssl{backbone}Plans_DisruptiveAE"
    adapted = next(job.output.parent.glob(f"adapted__{plans_name}__*/checkpoint_final.pth"))
    arrived = started_and_trained(plans_name, str(adapted))
    fresh = started_and_trained(plans_name, None)
    for name, value in arrived.items():
        half = half_of(name)
        wanted = pretrained if half == transfer else fresh
        assert torch.equal(value, wanted[name]), name
    for half in ("encoder", "decoder"):
        names = [name for name in pretrained if half_of(name) == half]
        assert any(not torch.equal(pretrained[name], fresh[name]) for name in names)
