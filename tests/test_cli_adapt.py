"""``nnssl_adapt`` and ``nnssl_inspect`` as users type them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from checkpoint_helpers import DATASET_JSON, content_of, nnssl_checkpoint, plans_of, primus, resenc, shake

from nnssl_ext.checkpoints.io import load_checkpoint, save_checkpoint
from nnssl_ext.cli.adapt import main as adapt_main
from nnssl_ext.cli.inspect import main as inspect_main
from nnssl_ext.files import read_json, write_json
from nnssl_ext.networks.build import build_backbone, build_network

NAME = "Dataset004_Hippocampus"


@pytest.fixture
def target(nnunet_env):
    """A raw and planned data set of three small scans: 24x24x32 voxels of 1 mm."""
    raw, planned = nnunet_env.raw / NAME, nnunet_env.preprocessed / NAME
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in range(3):
        scan = rng.normal(100, 20, (24, 24, 32)).astype(np.float32)
        label = np.zeros(scan.shape, np.uint8)
        label[8:16, 8:16, 8:14], label[8:16, 8:16, 16:24] = 1, 2
        sitk.WriteImage(sitk.GetImageFromArray(scan), str(raw / "imagesTr" / f"case{case}_0000.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(raw / "labelsTr" / f"case{case}.nii.gz"))
    write_json(raw / "dataset.json", DATASET_JSON)
    write_json(planned / "dataset.json", DATASET_JSON)
    statistics = {"mean": 100.0, "median": 100.0, "std": 20.0, "min": 0.0, "max": 200.0}
    fingerprint = {
        "spacings": [[1.0, 1.0, 1.0]] * 3,
        "shapes_after_crop": [[24, 24, 32]] * 3,
        "foreground_intensity_properties_per_channel": {
            "0": statistics | {"percentile_00_5": 50.0, "percentile_99_5": 150.0}
        },
        "median_relative_size_after_cropping": 1.0,
    }
    write_json(planned / "dataset_fingerprint.json", fingerprint)
    return nnunet_env


@pytest.fixture
def here(monkeypatch, capsys):
    """Run a command in this process (a fresh one spends seconds on importing torch): exit code, stdout, stderr."""

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return run


def features(plans, content, image, channels=1, classes=3):
    backbone = build_backbone(plans, "3d_fullres", channels, classes)
    backbone.network.load_state_dict(content["network_weights"])
    with torch.no_grad():
        return backbone.eval().forward_features(image).levels


def test_to_existing_plans_with_fine_tuning_settings(target, tmp_path):
    plans = plans_of(primus([16, 16, 24]), [16, 16, 24])
    content = content_of(plans)
    save_checkpoint(tmp_path / "checkpoint_final.pth", content)
    write_json(target.preprocessed / NAME / "nnsslTestPlans.json", plans)

    done = target.run(
        "nnssl_adapt",
        tmp_path / "checkpoint_final.pth",
        "-d",
        4,
        "-p",
        "nnsslTestPlans",
        "--epochs",
        7,
        "--schedule",
        "frozen",
    )

    written = read_json(target.preprocessed / NAME / "nnsslTestPlans_MAE.json")
    assert written["nnssl_finetuning"]["epochs"] == 7 and written["nnssl_finetuning"]["schedule"] == "frozen"
    assert written["nnssl_finetuning"]["optimizer"] == "adamw"  # Primus' default
    configuration = written["configurations"]["3d_fullres"]
    assert configuration["data_identifier"] == "nnsslTestPlans_3d_fullres"  # preprocessed data are shared
    output = target.pretraining / NAME / "adapted__nnsslTestPlans_MAE__3d_fullres"
    adapted = torch.load(output / "checkpoint_final.pth", weights_only=True)
    image = torch.randn(1, 1, 16, 16, 24)
    assert torch.equal(features(written, adapted, image)[0], features(plans, content, image, classes=2)[0])
    table = read_json(output / "transfer.json")
    assert table["plans"] == "nnsslTestPlans_MAE" and table["counts"]["new"] == 4
    assert "eva.pos_embed" in done.stdout and "loaded" in done.stdout
    assert (
        f"nnUNetv2_train 4 3d_fullres 0 -p nnsslTestPlans_MAE -tr nnsslFinetuneTrainer -pretrained_weights {output}"
        in done.stdout
    )
    assert "nnUNetv2_preprocess" not in done.stdout and "replaces" not in done.stdout

    again = target.run("nnssl_adapt", tmp_path / "checkpoint_final.pth", "-d", 4, "-p", "nnsslTestPlans")
    assert "replaces nnsslTestPlans_MAE.json and its checkpoint, adapted earlier from" in " ".join(again.stdout.split())


@pytest.mark.parametrize("kind", ["ours", "nnssl"])
def test_plans_derived_from_the_checkpoint(target, tmp_path, here, kind):
    """Without ``-p``: architecture, normalisation and patch of the checkpoint, the rest from the fingerprint."""
    architecture = resenc()
    plans = plans_of(architecture, [16, 24, 16])
    network = build_network(plans, "3d_fullres", 1, 2)
    shake(network)
    content = {
        "ours": content_of(plans),
        "nnssl": nnssl_checkpoint("ResidualEncoderUNet", network, [16, 24, 16], architecture["arch_kwargs"]),
    }[kind]
    save_checkpoint(tmp_path / "c.pth", content)

    dataset = {"ours": NAME, "nnssl": 4}[kind]  # stock commands take only the number
    code, out, _ = here(adapt_main, tmp_path / "c.pth", "-d", dataset, "--name", "x")
    assert code == 0 and "nnUNetv2_train 4 3d_fullres" in out

    written = read_json(target.preprocessed / NAME / "nnsslAdaptedPlans_x.json")
    configuration = written["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == [16, 24, 16] and configuration["spacing"] == [1, 1, 1]
    assert configuration["architecture"]["arch_kwargs"] == architecture["arch_kwargs"]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]
    assert configuration["median_image_size_in_voxels"] == [24, 24, 32]
    assert configuration["data_identifier"] == "nnsslAdaptedPlans_x_3d_fullres"
    assert "nnUNetv2_preprocess -d 4 -plans_name nnsslAdaptedPlans_x -c 3d_fullres" in out
    adapted = load_checkpoint(
        target.pretraining / NAME / "adapted__nnsslAdaptedPlans_x__3d_fullres" / "checkpoint_final.pth"
    )
    image = torch.randn(1, 1, 16, 24, 16)
    weights = {k: v for k, v in content["network_weights"].items() if "seg_layers" not in k}
    network.load_state_dict(weights, strict=False)
    with torch.no_grad():
        assert all(map(torch.equal, features(written, adapted, image), network.eval().encoder(image)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PrimusM", "ResEncL"])
def test_openminds_networks_in_full_size(target, tmp_path, name):
    """Must show: random PrimusM and ResEnc-L weights in nnssl's schema; the adapted encoder's features equal the original's."""
    from dynamic_network_architectures.architectures.primus import PrimusM
    from einops import rearrange

    from nnssl_ext.checkpoints.nnssl_format import RESENC_L, UNET_PATH

    patch, image = [32, 32, 32], torch.randn(1, 1, 32, 32, 32)
    if name == "PrimusM":
        network = PrimusM(1, 1, (8, 8, 8), tuple(patch)).eval()
    else:
        architecture = {"network_class_name": f"{UNET_PATH}ResidualEncoderUNet", "arch_kwargs": RESENC_L}
        imports = {"_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]}
        patch = [64, 32, 32]
        image = torch.randn(1, 1, *patch)
        network = build_network(plans_of(architecture | imports, patch), "3d_fullres", 1, 1).eval()
    shake(network)
    torch.save(nnssl_checkpoint(name, network, patch), tmp_path / "openmind.pth")

    target.run("nnssl_adapt", tmp_path / "openmind.pth", "-d", 4, "--name", name)

    written = read_json(target.preprocessed / NAME / f"nnsslAdaptedPlans_{name}.json")
    adapted = load_checkpoint(
        target.pretraining / NAME / f"adapted__nnsslAdaptedPlans_{name}__3d_fullres" / "checkpoint_final.pth"
    )
    with torch.no_grad():
        if name == "PrimusM":
            encoded, _ = network.eva(rearrange(network.down_projection(image), "b c z y x -> b (z y x) c"))
            wanted = [rearrange(encoded, "b (z y x) c -> b c z y x", z=4, y=4)]
        else:
            wanted = network.encoder(image)
    for ours, theirs in zip(features(written, adapted, image), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.slow
def test_stock_commands_take_it_from_there(target, tmp_path):
    """Derived plans, stock preprocessing, stock training from the adapted checkpoint, with our trainer."""
    plans = plans_of(primus([16, 16, 16]), [16, 16, 16])
    save_checkpoint(tmp_path / "c.pth", content_of(plans))
    small = ("--epochs", 1, "--iterations_per_epoch", 2, "--val_iterations_per_epoch", 1)
    target.run("nnssl_adapt", tmp_path / "c.pth", "-d", 4, "--patch_size", 24, 24, 16, *small)
    target.run("nnUNetv2_preprocess", "-d", 4, "-plans_name", "nnsslAdaptedPlans_MAE", "-c", "3d_fullres", "-np", 1)
    weights = target.pretraining / NAME / "adapted__nnsslAdaptedPlans_MAE__3d_fullres" / "checkpoint_final.pth"
    trained = target.run(
        *("nnUNetv2_train", 4, "3d_fullres", "all", "-p", "nnsslAdaptedPlans_MAE", "-tr", "nnsslFinetuneTrainer"),
        *("-pretrained_weights", weights, "-device", "cpu"),
    )
    assert "pretrained weights arrived" in trained.stdout


def test_mistakes_are_named(target, tmp_path, here):
    plans = plans_of(primus([16] * 3), [16] * 3)
    save_checkpoint(tmp_path / "c.pth", content_of(plans))
    folder = target.preprocessed / NAME
    write_json(folder / "nnUNetPlans.json", plans_of(resenc(), [16] * 3, "nnUNetPlans"))

    def refused(*flags):
        code, _, errors = here(adapt_main, tmp_path / "c.pth", *flags)
        assert code == 2
        return errors

    assert "c.pth holds a SegmentationPrimus, plans nnUNetPlans build a ResidualEncoderUNet" in refused(
        "-d", 4, "-p", "nnUNetPlans"
    )
    assert "did you mean 'nnUNetPlans'" in refused("-d", 4, "-p", "nnUNetPlan")
    assert "multiples of 4x4x4" in refused("-d", 4, "--patch_size", 16, 16, 18)
    assert "fine-tuning setting warmup_share is 2.0" in refused("-d", 4, "--warmup_share", 2)
    assert "only a Primus has blocks" in refused("-d", 4, "-p", "nnUNetPlans", "--layer_decay", 0.5)
    write_json(folder / "nnsslAdaptedPlans_MAE.json", {"plans_name": "mine"})
    assert "was not written by nnssl_adapt" in refused("-d", 4)
    (folder / "dataset_fingerprint.json").unlink()
    assert "nnUNetv2_extract_fingerprint -d 4" in refused("-d", 4)
    assert read_json(folder / "nnsslAdaptedPlans_MAE.json") == {"plans_name": "mine"}


def test_hounsfield_units_are_not_imposed_on_another_modality(target, tmp_path, here):
    """nnU-Net's CTNormalization takes its clip and scale from all cases together, which flattens scans of arbitrary units."""
    plans = plans_of(resenc(), [16] * 3)
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    save_checkpoint(tmp_path / "c.pth", content_of(plans))
    code, _, errors = here(adapt_main, tmp_path / "c.pth", "-d", 4)
    assert code == 2 and f"channel 0 of {NAME} is not called CT" in errors and "give these plans with -p" in errors
    write_json(target.raw / NAME / "dataset.json", {**DATASET_JSON, "channel_names": {"0": "CT"}})
    assert here(adapt_main, tmp_path / "c.pth", "-d", 4)[0] == 0


def test_a_patch_of_one_place_is_refused(target, tmp_path, here):
    save_checkpoint(tmp_path / "c.pth", content_of(plans_of(resenc(), [16] * 3)))
    divisor = np.prod(resenc()["arch_kwargs"]["strides"], axis=0).tolist()
    code, _, errors = here(adapt_main, tmp_path / "c.pth", "-d", 4, "--patch_size", *divisor)
    assert code == 2 and "single place of the deepest feature map" in errors


def test_inspect_says_what_is_in_each_kind_of_file(tmp_path, here):
    plans = plans_of(resenc(), [16] * 3)
    network = build_network(plans, "3d_fullres", 1, 2)
    files = {
        "nnssl-ext": content_of(plans),
        "nnssl (OpenMind)": nnssl_checkpoint("ResidualEncoderUNet", network, [16] * 3, resenc()["arch_kwargs"]),
        "nnU-Net": {
            "network_weights": network.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"plans": plans, "configuration": "3d_fullres", "dataset_json": DATASET_JSON},
            "_best_ema": np.float32(0.5),
            "current_epoch": 1000,
        },
    }
    methods = {"nnssl-ext": "MAETrainer", "nnssl (OpenMind)": "BaseMAETrainer_BS8", "nnU-Net": "nnUNetTrainer"}
    for writer, content in files.items():
        torch.save(content, tmp_path / "c.pth")
        told = json.loads(here(inspect_main, tmp_path / "c.pth", "--json", "--keys")[1])
        assert (told["written_by"], told["method"], told["patch_size"]) == (writer, methods[writer], [16] * 3)
        assert told["keys"]["encoder.stem.convs.0.conv.weight"] == "4x1x3x3x3 float32"
        shown = here(inspect_main, tmp_path / "c.pth")[1]
        assert methods[writer] in shown and "ResidualEncoderUNet" in shown and "encoder.stem" in shown
        if writer == "nnssl-ext":
            assert told["parameters"] == sum(p.numel() for p in network.parameters())
            assert (
                told["modules"]["decoder.seg_layers"]["not_pretrained"]
                == told["modules"]["decoder.seg_layers"]["parameters"]
            )
            assert "He, K., et al." in shown


def test_inspect_refuses_a_foreign_pickle(target, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "c.pth")
    done = target.run("nnssl_inspect", tmp_path / "c.pth", check=False)
    assert done.returncode == 2 and "nothing in it was executed" in done.stderr and "Traceback" not in done.stderr
