"""`nnsslFinetuneTrainer` inside nnU-Net's own start-up, on a synthetic data set of a few small cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.errors import NnsslError

PRIMUS = {
    "network_class_name": "nnssl_ext.networks.primus.SegmentationPrimus",
    "arch_kwargs": {
        "embed_dim": 24, "eva_depth": 2, "eva_numheads": 2, "input_shape": [16, 16, 16],
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    },
    "_kw_requires_import": [],
}  # fmt: skip
RESENC = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "arch_kwargs": {
        "n_stages": 3, "features_per_stage": [4, 8, 8], "conv_op": "torch.nn.Conv3d", "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "n_blocks_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True, "norm_op": "torch.nn.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}  # fmt: skip
ARCHITECTURES = {"primus": PRIMUS, "resenc": RESENC}
QUICK = {"epochs": 4, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1, "save_every": 1}


class Bench:
    """One small preprocessed data set, and nnU-Net's own way to a trainer on it."""

    name = "Dataset901_Balls"

    def __init__(self, preprocessed: Path) -> None:
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

        self.folder = preprocessed / self.name
        cases = self.folder / "data"
        cases.mkdir(parents=True)
        rng = np.random.default_rng(0)
        grid = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"))
        for i in range(6):
            centre = rng.uniform(6, 14, 3)[:, None, None, None]
            seg = (((grid - centre) ** 2).sum(0) < 16).astype(np.int16)[None]
            image = (seg + 0.3 * rng.standard_normal(seg.shape)).astype(np.float32)
            properties = {"class_locations": {1: np.argwhere(seg == 1)}}
            nnUNetDatasetBlosc2.save_case(image, seg, properties, str(cases / f"ball_{i}"))
        names = [f"ball_{i}" for i in range(6)]
        self.write("splits_final.json", [{"train": names[:4], "val": names[4:]}])
        self.write("dataset_fingerprint.json", {})
        dataset = {"labels": {"background": 0, "ball": 1}, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
        self.write("dataset.json", {**dataset, "numTraining": 6})

    def write(self, name: str, content: object) -> None:
        (self.folder / name).write_text(json.dumps(content))

    def trainer(self, backbone: str, resume: bool = False, weights: Path | None = None, **settings: object):
        """A trainer as ``nnUNetv2_train [--c] [-pretrained_weights]`` makes it, before its training starts."""
        from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

        configuration = {
            "data_identifier": "data", "batch_size": 2, "patch_size": [16, 16, 16], "spacing": [1, 1, 1],
            "use_mask_for_norm": [False], "normalization_schemes": ["NoNormalization"], "batch_dice": False,
            "architecture": ARCHITECTURES[backbone],
        }  # fmt: skip
        plans = {"dataset_name": self.name, "plans_name": f"{backbone}Plans", "label_manager": "LabelManager"}
        plans["configurations"] = {"3d_fullres": configuration}
        plans["nnssl_finetuning"] = {**QUICK, **settings}
        self.write(f"{backbone}Plans.json", plans)
        trainer = get_trainer_from_args(
            self.name, "3d_fullres", 0, "nnsslFinetuneTrainer", f"{backbone}Plans", resume, torch.device("cpu")
        )
        trainer.plot_network_architecture = trainer._save_debug_information = lambda: None
        trainer.logger.plot_progress_png = lambda *_: None
        maybe_load_checkpoint(trainer, resume, False, str(weights) if weights else None)
        return trainer

    def checkpoint(self, backbone: str, path: Path) -> dict[str, torch.Tensor]:
        """Weights of another initialisation, written as a pretrained checkpoint."""
        other = self.trainer(backbone, seed=99)
        other.initialize()
        weights = {name: value.clone() for name, value in other.network.state_dict().items()}
        torch.save({"network_weights": weights}, path)
        return weights


@pytest.fixture
def bench(nnunet_env, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return Bench(nnunet_env.preprocessed)


def log_of(trainer) -> str:
    return Path(trainer.log_file).read_text()


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in left.items() if not torch.equal(value, right[name])}


def in_encoder(name: str) -> bool:
    return name.startswith(("encoder.", "decoder.encoder.", "down_projection.", "eva."))


@pytest.mark.parametrize("backbone", ARCHITECTURES)
@pytest.mark.parametrize("transfer", ["encoder", "decoder", "both"])
def test_transfer_keeps_the_chosen_half_and_restores_the_other_exactly(bench, tmp_path, backbone, transfer) -> None:
    pretrained = bench.checkpoint(backbone, tmp_path / "weights.pth")
    fresh = bench.trainer(backbone, transfer=transfer)
    fresh.initialize()
    trainer = bench.trainer(backbone, transfer=transfer, weights=tmp_path / "weights.pth")
    trainer.on_train_start()
    now, initial = trainer.network.state_dict(), fresh.network.state_dict()
    body = {name for name in now if ".seg_layers." not in name}
    from_file = {n for n in body if transfer == "both" or in_encoder(n) == (transfer == "encoder")}
    assert not differing(now, pretrained) & from_file
    assert not differing(now, initial) & (set(now) - from_file)
    assert differing(pretrained, initial) & from_file and differing(pretrained, initial) & body
    assert "pretrained weights arrived: " in log_of(trainer)
    assert json.loads((Path(trainer.output_folder) / "finetuning.json").read_text())["pretrained"] is True


@pytest.mark.parametrize("backbone", ARCHITECTURES)
def test_a_forgotten_checkpoint_is_said_aloud(bench, backbone) -> None:
    trainer = bench.trainer(backbone)
    trainer.on_train_start()
    assert "training from scratch: no tensor of encoder and decoder differs" in log_of(trainer)
    assert trainer.lr_scheduler.pretrained is False


def test_one_arrived_tensor_of_many_is_counted(bench, tmp_path) -> None:
    initial = bench.trainer("resenc")
    initial.initialize()
    weights = {name: value.clone() for name, value in initial.network.state_dict().items()}
    for name in weights:  # all aliases of one kernel
        if name.endswith(("stem.convs.0.conv.weight", "stem.convs.0.all_modules.0.weight")):
            weights[name] += 1
    torch.save({"network_weights": weights}, tmp_path / "weights.pth")
    trainer = bench.trainer("resenc", weights=tmp_path / "weights.pth")
    trainer.on_train_start()
    total = sum(in_encoder(name) for name, _ in trainer.network.named_parameters())
    assert f"pretrained weights arrived: 1 of {total} encoder and 0 of" in log_of(trainer)


@pytest.mark.parametrize("backbone", ARCHITECTURES)
def test_rates_change_with_every_iteration_and_the_count_is_exact(bench, tmp_path, backbone) -> None:
    bench.checkpoint(backbone, tmp_path / "weights.pth")
    peaks = {"lr_encoder": 4e-3, "lr_decoder": 8e-3, "warmup_share": 0.25}
    trainer = bench.trainer(backbone, weights=tmp_path / "weights.pth", **peaks)
    seen: list[tuple[float, ...]] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(tuple(sorted({g["lr"] for g in optimizer.param_groups})))
    )
    trainer.run_training()
    shares = [0.5, 1.0, 1.0, *((1 - i / 6) ** 0.9 for i in range(1, 6))]  # 8 iterations, 2 of warm-up
    assert np.allclose(seen, [(4e-3 * s, 8e-3 * s) for s in shares])


@pytest.mark.parametrize(("schedule", "moves"), [("frozen", False), ("sawtooth", True)])
def test_frozen_encoders_stay_bit_for_bit_and_thaw_in_time(bench, tmp_path, schedule, moves) -> None:
    pretrained = bench.checkpoint("resenc", tmp_path / "weights.pth")
    settings = {"schedule": schedule, "freeze_share": 0.5, "optimizer": "adamw", "weight_decay": 0.1}
    trainer = bench.trainer("resenc", weights=tmp_path / "weights.pth", **settings)
    while_frozen = []
    end = trainer.on_epoch_end

    def on_epoch_end() -> None:
        end()
        while_frozen.append(differing(trainer.network.state_dict(), pretrained))

    trainer.on_epoch_end = on_epoch_end
    trainer.run_training()
    for changed in while_frozen[:2]:
        assert changed and not any(map(in_encoder, changed))
    assert any(map(in_encoder, while_frozen[-1])) is moves


@pytest.mark.parametrize(
    ("backbone", "schedule", "optimizer"),
    [("resenc", "sawtooth", "sgd"), ("primus", "warmup_poly", "adamw")],
)
def test_a_resumed_run_equals_an_uninterrupted_one(bench, tmp_path, backbone, schedule, optimizer) -> None:
    bench.checkpoint(backbone, tmp_path / "weights.pth")
    settings = {"schedule": schedule, "freeze_share": 0.4, "optimizer": optimizer, "lr_encoder": 1e-2}
    settings |= {"intensity_augmentation": False}  # nnU-Net's blur picks its algorithm by timing
    whole = bench.trainer(backbone, weights=tmp_path / "weights.pth", **settings)
    whole.run_training()
    expected = {name: value.clone() for name, value in whole.network.state_dict().items()}
    losses = whole.logger.get_value("train_losses", None)
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        (Path(whole.output_folder) / name).unlink()

    stopped = bench.trainer(backbone, weights=tmp_path / "weights.pth", **settings)
    start = stopped.on_epoch_start

    def killed_in_the_third_epoch() -> None:
        start()
        if stopped.current_epoch == 2:
            raise KeyboardInterrupt

    stopped.on_epoch_start = killed_in_the_third_epoch
    with pytest.raises(KeyboardInterrupt):
        stopped.run_training()
    (Path(stopped.output_folder) / "checkpoint_best.pth").unlink()

    resumed = bench.trainer(backbone, resume=True, **settings)
    resumed.run_training()
    assert len(losses) == 4 and np.allclose(losses, resumed.logger.get_value("train_losses", None), rtol=1e-5)
    found = resumed.network.state_dict()
    assert [n for n in expected if not torch.allclose(expected[n], found[n], rtol=1e-4, atol=1e-6)] == []
    assert any(not torch.equal(expected[n], value) for n, value in stopped.network.state_dict().items())


def test_seeds_decide_weights_and_batches(bench) -> None:
    runs = []
    for seed in (1, 1, 2):
        trainer = bench.trainer("resenc", seed=seed, epochs=1, intensity_augmentation=False)
        trainer.run_training()
        runs.append({name: value.clone() for name, value in trainer.network.state_dict().items()})
    assert not differing(runs[0], runs[1]) and differing(runs[0], runs[2])


def test_resuming_with_other_settings_is_refused_by_name(bench) -> None:
    bench.trainer("resenc").run_training()
    with pytest.raises(NnsslError, match=r"lr_decoder 0\.001 -> 0\.5"):
        bench.trainer("resenc", resume=True, lr_decoder=0.5).on_train_start()


def test_continuing_without_a_checkpoint_does_not_lose_pretrained_weights_silently(bench, tmp_path) -> None:
    bench.checkpoint("resenc", tmp_path / "weights.pth")
    bench.trainer("resenc", weights=tmp_path / "weights.pth").on_train_start()
    with pytest.raises(NnsslError, match="stopped before its first checkpoint"):
        bench.trainer("resenc", resume=True).on_train_start()


def test_subsets_come_from_the_training_cases_alone_and_are_recorded(bench) -> None:
    chosen = {}
    for count in (1, 3):
        trainer = bench.trainer("resenc", train_cases=count)
        trainer.on_train_start()
        train, validation = trainer.do_split()
        assert set(validation) == {"ball_4", "ball_5"} and not set(train) & set(validation)
        assert set(trainer.dataloader_train.data_loader.indices) == set(train) and len(train) == count
        record = json.loads((Path(trainer.output_folder) / "finetuning.json").read_text())
        assert record["train_cases"] == sorted(train)
        chosen[count] = set(train)
    assert chosen[1] < chosen[3]


def transforms_of(trainer) -> str:
    return str([type(getattr(t, "transform", t)).__name__ for t in _training_transforms(trainer)])


def _training_transforms(trainer) -> list:
    return trainer.dataloader_train.data_loader.transforms.transforms


@pytest.mark.parametrize(("spatial", "intensity"), [(True, True), (False, True), (True, False), (False, False)])
def test_augmentation_can_be_left_out_in_parts(bench, spatial, intensity) -> None:
    trainer = bench.trainer("resenc", spatial_augmentation=spatial, intensity_augmentation=intensity)
    trainer.on_train_start()
    names = transforms_of(trainer)
    assert ("SpatialTransform" in names) is spatial
    for name in ("Noise", "Blur", "Brightness", "Contrast", "LowResolution", "Gamma"):
        assert (name in names) is intensity, name
    for name in ("MirrorTransform", "RemoveLabelTransform", "DownsampleSegForDSTransform"):
        assert name in names
    batch = next(trainer.dataloader_train)
    assert batch["data"].shape == (2, 1, 16, 16, 16) and batch["target"][0].shape == (2, 1, 16, 16, 16)


def test_without_mirroring_neither_training_nor_prediction_flips(bench) -> None:
    trainer = bench.trainer("resenc", mirroring=False, epochs=1)
    trainer.run_training()
    assert "MirrorTransform" not in transforms_of(trainer)
    saved = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert saved["inference_allowed_mirroring_axes"] is None
    assert saved["trainer_name"] == "nnsslFinetuneTrainer"


@pytest.mark.parametrize("backbone", ARCHITECTURES)
def test_without_deep_supervision_every_parameter_that_asks_for_a_gradient_gets_one(bench, backbone) -> None:
    trainer = bench.trainer(backbone, deep_supervision=False)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    asking = {name for name, p in trainer.network.named_parameters() if p.requires_grad}
    assert asking == {name for name, p in trainer.network.named_parameters() if p.grad is not None}
    assert "decoder.seg_layers.1.weight" in asking and "decoder.seg_layers.0.weight" not in asking


@pytest.mark.parametrize("clip", [1e-3, 12.0])
def test_gradients_are_clipped_to_the_setting(bench, clip) -> None:
    trainer = bench.trainer("resenc", gradient_clip=clip)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    gradients = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
    assert norm == pytest.approx(1e-3, rel=1e-3) if clip == 1e-3 else 1e-3 < norm <= 12.001


def test_threads_follow_the_variable_that_nnunet_ignores(bench, monkeypatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # as nnUNetv2_train -device cpu does
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        bench.trainer("resenc")
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "3,1")  # one number per level of nesting
        bench.trainer("resenc")
        assert torch.get_num_threads() == 3
        bench.trainer("resenc", threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_batch_size_and_oversampling_reach_the_loader(bench) -> None:
    trainer = bench.trainer("primus", batch_size=3, oversample_foreground=1.0)
    trainer.on_train_start()
    assert next(trainer.dataloader_train)["data"].shape[0] == 3
    assert all(trainer.dataloader_train.data_loader.get_do_oversample(i) for i in range(3))


def test_evaluations_on_the_way_are_kept_and_change_nothing(bench, monkeypatch) -> None:
    plain = bench.trainer("resenc")
    plain.run_training()
    trainer = bench.trainer("resenc", evaluations=3)
    assert trainer.settings.evaluated_epochs == [1, 2]  # of four; an eighth is no epoch

    def validate() -> None:
        """What nnU-Net's validation leaves behind: a folder, a network in another mode, used random numbers."""
        trainer.network.eval()
        trainer.set_deep_supervision_enabled(True)
        np.random.rand(trainer.current_epoch), torch.rand(3)
        folder = Path(trainer.output_folder) / "validation"
        folder.mkdir()  # fails if the one before is still there
        (folder / "summary.json").write_text(json.dumps({"metric_per_case": [trainer.current_epoch]}))

    monkeypatch.setattr(trainer, "perform_actual_validation", validate)
    trainer.run_training()
    assert not differing(trainer.network.state_dict(), plain.network.state_dict())
    output = Path(trainer.output_folder)
    found = {path.name: json.loads(path.read_text()) for path in output.glob("evaluation_epoch_*.json")}
    assert set(found) == {"evaluation_epoch_1.json", "evaluation_epoch_2.json"}
    assert [found[f"evaluation_epoch_{e}.json"]["summary"]["metric_per_case"] for e in (1, 2)] == [[1], [2]]
    assert [found[f"evaluation_epoch_{e}.json"]["iterations"] for e in (1, 2)] == [2, 4]
    record = json.loads((output / "finetuning.json").read_text())
    seconds = [found[f"evaluation_epoch_{e}.json"]["training_seconds"] for e in (1, 2)] + [record["training_seconds"]]
    assert 0 < seconds[0] < seconds[1] < seconds[2] and record["iterations"] == 8


def test_an_evaluation_that_was_interrupted_is_made_after_all(bench, monkeypatch) -> None:
    """nnU-Net saves the checkpoint of an epoch before the epoch's evaluation."""
    trainer = bench.trainer("resenc", evaluations=3)

    def dies() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "perform_actual_validation", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    resumed = bench.trainer("resenc", resume=True, evaluations=3)
    output = Path(resumed.output_folder)

    def validate() -> None:
        (output / "validation").mkdir()
        (output / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": [resumed.current_epoch]}))

    monkeypatch.setattr(resumed, "perform_actual_validation", validate)
    resumed.run_training()
    found = [json.loads((output / f"evaluation_epoch_{epoch}.json").read_text()) for epoch in (1, 2)]
    assert [one["summary"]["metric_per_case"] for one in found] == [[1], [2]]
