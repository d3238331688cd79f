"""Physical truths of whole registrations, and files that ITK reads and applies identically."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from checkpoint_helpers import content_of, plans_of, primus
from scans import write
from scipy.ndimage import gaussian_filter, map_coordinates

from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.cli._settings import settings_from_flags
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json
from nnssl_ext.registration import outputs
from nnssl_ext.registration.extraction import ExtractionSettings
from nnssl_ext.registration.features import Mind, load_features
from nnssl_ext.registration.images import load_scan
from nnssl_ext.registration.outputs import displacement_image, measure, write_outputs
from nnssl_ext.registration.pipeline import (
    PairSettings,
    Registration,
    deform_pair,
    describe_pair,
    register_pair,
    solve_pair,
)
from nnssl_ext.registration.solver import SolverSettings

SHAPE = (26, 24, 28)
QUICK = PairSettings(init="none", solver=SolverSettings(regularisation=0.3, iterations=60))
HEADER = {"spacing": (1.0, 1.0, 1.0), "origin": (-11.5, 20.25, -300.0), "angle": 0.0}


def texture(shape=SHAPE, seed: int = 0, sigma: float = 1.5) -> np.ndarray:
    made = gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return (100 + 30 * made / made.std()).astype(np.float32)


def bend(z, y, x):
    """A smooth displacement in voxels, at most 1.5."""
    phases = (2 * np.pi * (y / 24 + 0.1), 2 * np.pi * (x / 28 + 0.3), 2 * np.pi * (z / 26 + 0.6))
    return np.stack([1.5 * np.sin(phase) for phase in phases])


def bent(volume: np.ndarray) -> np.ndarray:
    """``volume(x + bend(x))``"""
    places = np.stack(np.meshgrid(*(np.arange(n) for n in volume.shape), indexing="ij")).astype(float)
    return map_coordinates(volume, places + bend(*places), order=3, mode="nearest").astype(np.float32)


def registered(fixed: Path, moving: Path, settings: PairSettings = QUICK) -> Registration:
    return register_pair(load_scan(fixed), load_scan(moving), [Mind()], settings)


def displacements(result: Registration, points: np.ndarray) -> np.ndarray:
    """Displacement in mm, world order, at world points."""
    transform = sitk.DisplacementFieldTransform(sitk.Cast(displacement_image(result), sitk.sitkVectorFloat64))
    return np.array([np.subtract(transform.TransformPoint(p.tolist()), p) for p in points])


def world_points(path: Path, count: int = 40, margin: int = 4) -> np.ndarray:
    """Random world points inside a scan."""
    made = sitk.ReadImage(str(path))
    size = np.array(made.GetSize())
    places = np.random.default_rng(5).uniform(margin, size - 1 - margin, (count, 3))
    return np.array([made.TransformContinuousIndexToPhysicalPoint(p.tolist()) for p in places])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A scan, its bent copy (``fixed = moving(x + bend(x))``), and their registration."""
    folder = tmp_path_factory.mktemp("pair")
    fixed, moving = (
        write(folder / "f.nii.gz", bent(texture()), **HEADER),
        write(folder / "m.nii.gz", texture(), **HEADER),
    )
    return fixed, moving, registered(fixed, moving)


def test_a_scan_registered_to_itself_does_not_move(pair):
    fixed, _, _ = pair
    assert float(registered(fixed, fixed).field.displacement_voxels.abs().max()) < 0.05


def test_a_known_smooth_warp_comes_back(pair):
    fixed, _, result = pair
    made = sitk.ReadImage(str(fixed))
    points = world_points(fixed)
    index = np.array([made.TransformPhysicalPointToContinuousIndex(p.tolist()) for p in points])
    expected = bend(*index.T[::-1]).T[:, ::-1]  # 1 mm voxels along world axes
    apart = np.linalg.norm(displacements(result, points) - expected, axis=1)
    assert np.linalg.norm(expected, axis=1).mean() > 1.2
    assert np.median(apart) < 0.35 and apart.max() < 1.0  # voxels


def test_flipped_and_swapped_files_change_nothing_in_world_space(pair, tmp_path):
    fixed, moving, result = pair
    for path, orientation in ((fixed, "SPL"), (moving, "AIR")):
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), orientation), str(tmp_path / path.name))
    turned = registered(tmp_path / fixed.name, tmp_path / moving.name)
    points = world_points(fixed)
    assert np.abs(displacements(turned, points) - displacements(result, points)).max() < 1e-3


CASES = {"hippocampus 1": ("368", "372"), "hippocampus 2": ("389", "390")}
"""Pairs that differed by 2 mm when they were worked on in the order of axes that is nearest to the patient's."""


@pytest.mark.parametrize("degrees", [(17, -11, 23), (46, 0, 0), (138, -69, 40), (180, 0, 0), (90, 0, 90)])
@pytest.mark.parametrize(
    ("scans", "init"), [("texture", "none"), ("texture", "affine"), *((name, "centre") for name in CASES)]
)
def test_headers_rotated_together_rotate_the_field(scans, init, degrees, pair, request, tmp_path):
    """Beyond 45 degrees other axes and ends are nearest to the patient's."""
    fixed, moving, _ = pair
    if scans in CASES:
        images = request.getfixturevalue("test_data") / "Task04_Hippocampus" / "imagesTr"
        fixed, moving = (images / f"hippocampus_{case}.nii.gz" for case in CASES[scans])
    settings = replace(QUICK, init=init)
    result = registered(fixed, moving, settings)
    turn = sitk.Euler3DTransform((5.0, -3.0, 2.0), *np.radians(degrees))
    rotation = np.reshape(turn.GetMatrix(), (3, 3))
    for path in (fixed, moving):
        made = sitk.ReadImage(str(path))
        made.SetOrigin(turn.TransformPoint(made.GetOrigin()))
        made.SetDirection((rotation @ np.reshape(made.GetDirection(), (3, 3))).ravel().tolist())
        sitk.WriteImage(made, str(tmp_path / path.with_suffix("").with_suffix(".nrrd").name))
    files = (tmp_path / path.with_suffix("").with_suffix(".nrrd").name for path in (fixed, moving))
    turned = registered(*files, settings)
    points = world_points(fixed)
    moved = np.array([turn.TransformPoint(p.tolist()) for p in points])
    expected = displacements(result, points) @ rotation.T
    assert np.linalg.norm(expected, axis=1).mean() > 1.0
    assert np.abs(displacements(turned, moved) - expected).max() < 1e-5


def test_a_shifted_header_is_a_displacement_of_as_many_mm(tmp_path):
    """Anisotropic voxels; the moving file says that it lies 3 mm further along x."""
    array = texture((13, 24, 28))
    grid = {"spacing": (1.0, 1.0, 2.0), "angle": 0.0}
    fixed = write(tmp_path / "f.nrrd", array, origin=(0, 0, 0), **grid)
    moving = write(tmp_path / "m.nrrd", array, origin=(3, 0, 0), **grid)
    found = displacements(registered(fixed, moving), world_points(fixed))
    assert np.abs(np.median(found, axis=0) - (3, 0, 0)).max() < 0.05


def test_a_fixed_scan_that_is_moved_out_of_view_is_told(pair):
    fixed, moving, result = pair
    assert not result.notes
    described = describe_pair(load_scan(fixed), load_scan(moving), [Mind()], QUICK)
    found = solve_pair(described, QUICK.solver)
    away = replace(found, displacement_voxels=found.displacement_voxels + 20.0)
    assert "out of view" in " ".join(deform_pair(described, lambda: away).notes)


def as_cubes(path: Path) -> Path:
    """A scan of 1 x 1 x 2 mm voxels as 1 mm cubes of the same box, by SimpleITK."""
    made = sitk.ReadImage(str(path))
    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(made)
    resampler.SetSize((*made.GetSize()[:2], 2 * made.GetSize()[2]))
    resampler.SetOutputSpacing((1.0, 1.0, 1.0))
    resampler.SetOutputOrigin(made.TransformContinuousIndexToPhysicalPoint((0.0, 0.0, -0.25)))
    resampler.UseNearestNeighborExtrapolatorOn()
    cubes = path.with_name(f"cubes_{path.name}")
    sitk.WriteImage(resampler.Execute(made), str(cubes))
    return cubes


def test_anisotropic_scans_equal_their_isotropic_resampling(pair, tmp_path):
    thick = []
    for path in pair[:2]:
        thick.append(tmp_path / path.name)
        sitk.WriteImage(sitk.ReadImage(str(path))[:, :, ::2], str(thick[-1]))
    expected, found = registered(*map(as_cubes, thick)), registered(*thick)
    assert found.grid.size == expected.grid.size
    assert np.allclose(found.grid.origin, expected.grid.origin, atol=1e-4)
    torch.testing.assert_close(found.field.displacement_voxels, expected.field.displacement_voxels, atol=1e-4, rtol=0)
    points = world_points(thick[0])  # written on the files' grids, of which one is coarser
    assert np.abs(displacements(found, points) - displacements(expected, points)).max() < 0.06


def test_scans_far_from_a_network_s_spacing_are_told(pair, tmp_path):
    """A network for voxels of 4 mm, scans of 1 mm; the common grid follows the network."""
    path = tmp_path / "coarse.pth"
    plans = plans_of(primus([16, 16, 16]), [16, 16, 16])
    plans["configurations"]["3d_fullres"]["spacing"] = [4.0] * 3
    save_checkpoint(path, content_of(plans))
    settings = PairSettings(init="none", solver=SolverSettings(iterations=2))
    result = register_pair(*map(load_scan, pair[:2]), load_features(str(path), torch.device("cpu")), settings)
    assert result.grid.spacing == (4.0, 4.0, 4.0)
    told = [note for note in result.notes if "outside the range" in note]
    assert len(told) == 2 and "f.nii.gz has voxels of 1x1x1 mm" in told[0]


@pytest.fixture(scope="module")
def written(pair, tmp_path_factory):
    """A pair with an affine start, labels and masks, and its files."""
    folder = tmp_path_factory.mktemp("written")
    fixed, moving, _ = pair
    start = sitk.AffineTransform(3)
    start.Scale((1.05, 0.97, 1.0))
    start.SetCenter((0.0, 30.0, -290.0))
    start.SetTranslation((1.0, -0.5, 0.7))
    sitk.WriteTransform(start, str(folder / "start.tfm"))
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(fixed)), "PIR"), str(folder / "fixed.nii.gz"))
    made = sitk.ReadImage(str(moving))
    labels = sitk.Cast(made > 110, sitk.sitkUInt8)
    sitk.WriteImage(labels, str(folder / "labels.nii.gz"))
    fixed_labels = sitk.Cast(sitk.ReadImage(str(folder / "fixed.nii.gz")) > 110, sitk.sitkUInt8)
    sitk.WriteImage(fixed_labels, str(folder / "fixed_labels.nii.gz"))
    scans = (
        load_scan(folder / "fixed.nii.gz", labels=folder / "fixed_labels.nii.gz"),
        load_scan(moving, labels=folder / "labels.nii.gz"),
    )
    settings = PairSettings(init=str(folder / "start.tfm"), solver=QUICK.solver)
    result = register_pair(*scans, [Mind()], settings)
    measures = write_outputs(result, folder / "out", {"asked": 1}, inverse=True)
    return folder, moving, result, measures


class TestFiles:
    def test_image_and_transform_are_one_field(self, written):
        """`displacement.nii.gz` and `transform.h5` through SimpleITK, at every voxel of the fixed file."""
        folder, *_ = written
        fixed = sitk.ReadImage(str(folder / "fixed.nii.gz"))
        field = sitk.ReadImage(str(folder / "out" / "displacement.nii.gz"))
        transform = sitk.ReadTransform(str(folder / "out" / "transform.h5"))
        assert field.GetSize() == fixed.GetSize() and np.allclose(field.GetOrigin(), fixed.GetOrigin(), atol=1e-4)
        size, origin, spacing = fixed.GetSize(), fixed.GetOrigin(), fixed.GetSpacing()
        sampled = sitk.TransformToDisplacementField(
            transform, sitk.sitkVectorFloat64, size, origin, spacing, fixed.GetDirection()
        )
        difference = sitk.GetArrayFromImage(sampled) - sitk.GetArrayFromImage(field)
        assert np.abs(difference).max() < 1e-3
        assert np.abs(sitk.GetArrayFromImage(field)).max() > 1

    def test_warped_files_are_what_itk_makes_of_the_field(self, written):
        folder, moving, *_ = written
        fixed, image = sitk.ReadImage(str(folder / "fixed.nii.gz")), sitk.ReadImage(str(moving))
        field = sitk.ReadImage(str(folder / "out" / "displacement.nii.gz"), sitk.sitkVectorFloat64)
        transform = sitk.DisplacementFieldTransform(field)
        lowest = float(sitk.GetArrayViewFromImage(image).min())
        expected = sitk.Resample(image, fixed, transform, sitk.sitkLinear, lowest)
        warped = sitk.ReadImage(str(folder / "out" / "warped.nii.gz"))
        assert np.abs(sitk.GetArrayFromImage(warped) - sitk.GetArrayFromImage(expected)).max() < 0.05
        labels = sitk.ReadImage(str(folder / "labels.nii.gz"))
        expected = sitk.Resample(labels, fixed, transform, sitk.sitkNearestNeighbor, 0)
        found = sitk.ReadImage(str(folder / "out" / "warped_labels.nii.gz"))
        assert (sitk.GetArrayFromImage(found) != sitk.GetArrayFromImage(expected)).mean() < 1e-3

    def test_ants_applies_the_transform_as_simpleitk_does(self, written):
        """The fixed file's axes are swapped and flipped, so a mix-up of axes or of signs shows."""
        ants = pytest.importorskip("ants", reason="needs ANTsPy (pip install 'nnssl-ext[ants]')")
        folder, moving, *_ = written
        there = sitk.ReadTransform(str(folder / "out" / "transform.h5"))
        points = world_points(folder / "fixed.nii.gz")
        expected = np.array([there.TransformPoint(p.tolist()) for p in points])
        theirs = ants.read_transform(str(folder / "out" / "transform.h5"))
        found = np.array([ants.apply_ants_transform_to_point(theirs, p) for p in points])
        assert np.abs(expected - points).max() > 1
        assert np.abs(found - expected).max() < 1e-3
        fixed, image = (ants.image_read(str(path)) for path in (folder / "fixed.nii.gz", moving))
        warped = ants.apply_transforms(fixed, image, [str(folder / "out" / "transform.h5")], defaultvalue=image.min())
        ours = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "out" / "warped.nii.gz")))
        assert np.abs(warped.numpy().T - ours).max() < 0.05  # of some 240 grey values

    def test_the_start_is_part_of_the_field_and_is_corrected(self, written):
        """The truth is the bend alone, so the deformation has to undo the wrong start."""
        *_, measures = written
        assert measures["labels_after"]["dice"]["mean"] > measures["labels_before"]["dice"]["mean"] + 0.1
        assert measures["labels_after"]["dice"]["mean"] > 0.8
        assert measures["smoothness_grid"]["fold_percent"] < 1

    def test_the_inverse_leads_back(self, written):
        folder, moving, *_ = written
        there = sitk.ReadTransform(str(folder / "out" / "transform.h5"))
        field = sitk.ReadImage(str(folder / "out" / "displacement_inverse.nii.gz"), sitk.sitkVectorFloat64)
        back = sitk.DisplacementFieldTransform(field)
        points = world_points(moving, margin=6)
        round_trip = np.array([there.TransformPoint(back.TransformPoint(p.tolist())) for p in points])
        assert np.abs(np.linalg.norm(round_trip - points, axis=1)).max() < 0.1

    def test_measures_tell_what_was_done(self, written):
        folder, _, _, measures = written
        found = read_json(folder / "out" / "measures.json")
        assert found == measures and found["request"] == {"asked": 1}
        assert {"start", "features", "solver"} <= set(found["seconds"]) and found["peak_memory_gib"]["solver"] > 0
        assert found["start"] == "read from start.tfm"

    def test_another_registration_leaves_nothing_of_the_one_before(self, written, tmp_path, monkeypatch):
        """The first has an inverse, labels and a picture; the second has none, and is interrupted before its measures."""
        _, _, result, _ = written
        write_outputs(result, tmp_path, {}, inverse=True, draw=lambda path: path.write_text("a picture"))
        first = {path.name for path in tmp_path.iterdir()}
        assert {"warped_labels.nii.gz", "displacement_inverse.nii.gz", "overview.png", "measures.json"} < first
        bare = replace(result, moving=replace(result.moving, labels=None))
        seen = []
        write_image = outputs._write_image
        monkeypatch.setattr(
            outputs, "_write_image", lambda *given: (seen.append(list(tmp_path.iterdir())), write_image(*given))
        )
        write_outputs(bare, tmp_path, {})
        assert tmp_path / "measures.json" not in seen[0]
        assert {path.name for path in tmp_path.iterdir()} == {
            "displacement.nii.gz",
            "transform.h5",
            "warped.nii.gz",
            "measures.json",
        }


def ball(path: Path, seed: int, radius: float) -> Path:
    """A textured ball in air; without the air, a third of the grid."""
    places = np.stack(np.mgrid[:24, :24, :24], axis=-1) - 11.5
    inside = (places**2).sum(-1) < radius**2
    noise = np.random.default_rng(seed + 9).normal(size=inside.shape)
    array = np.where(inside, 500 + 5 * texture(inside.shape, seed), 0) + 3 * noise
    return write(path, array.astype(np.float32), **HEADER)


def test_the_smoothness_asked_for_is_the_one_reported(tmp_path):
    """Of the foreground: over the whole field of view these fields are half as rough."""
    fixed, moving = ball(tmp_path / "f.nii.gz", 0, 8.0), ball(tmp_path / "m.nii.gz", 1, 8.5)
    result = registered(fixed, moving, PairSettings(init="none", solver=SolverSettings(sdlogj=0.15, iterations=20)))
    found = measure(result, sitk.Transform(3, sitk.sitkIdentity))
    assert found["smoothness_foreground"]["sdlogj"] == pytest.approx(0.15, rel=0.05)
    assert found["smoothness_grid"]["sdlogj"] < 0.13


@pytest.mark.parametrize("solver", [SolverSettings(coarse_mm=8.0), SolverSettings(search_mm=32.0), SolverSettings()])
def test_the_grid_reaches_as_far_as_the_solver_looks(tmp_path, solver):
    """Thick slices become cubes of 1 mm, and it is cells of those that count."""
    slices = texture((8, 24, 100))
    grid = {"spacing": (1.0, 1.0, 3.0), "angle": 0.0}
    moving = load_scan(write(tmp_path / "m.nrrd", slices, origin=(0, 0, 0), **grid))
    fixed = load_scan(write(tmp_path / "f.nrrd", slices[..., 40:60], origin=(40, 0, 0), **grid))
    described = describe_pair(fixed, moving, [Mind()], PairSettings(init="none", solver=solver))
    found = described.frame.grid_back(described.grid)
    reach = 16 if solver == SolverSettings() else 32
    assert found.spacing == (1.0, 1.0, 1.0) and found.size[2] == 20 + 2 * reach


@pytest.mark.parametrize("solver", [SolverSettings(coarse_mm=1000.0), SolverSettings(search_mm=1e9)])
def test_the_grid_ends_where_both_scans_do_however_far_is_searched(tmp_path, pair, solver):
    fixed, moving = map(load_scan, pair[:2])
    same = describe_pair(fixed, moving, [Mind()], PairSettings(init="none", solver=solver))
    assert same.frame.grid_back(same.grid).size == SHAPE
    image = sitk.ReadImage(str(pair[1]))
    image.SetOrigin(np.add(image.GetOrigin(), (40.0, 0.0, -7.0)).tolist())
    sitk.WriteImage(image, str(tmp_path / "away.nii.gz"))
    settings = PairSettings(init="none", solver=solver)
    with pytest.raises(NnsslError, match="do not meet"):
        describe_pair(fixed, load_scan(tmp_path / "away.nii.gz"), [Mind()], settings)
    image.SetOrigin(np.add(image.GetOrigin(), (-30.0, 0.0, 0.0)).tolist())
    sitk.WriteImage(image, str(tmp_path / "away.nii.gz"))
    found = describe_pair(fixed, load_scan(tmp_path / "away.nii.gz"), [Mind()], settings)
    assert found.frame.grid_back(found.grid).size == (SHAPE[0] + 7, SHAPE[1], SHAPE[2] + 10)


def test_the_default_grid_fits_the_memory_and_another_is_told(pair):
    fixed, moving = map(load_scan, pair[:2])
    gib = 2 * 4 * 12 * np.prod(SHAPE) / 2**30
    settings = PairSettings(init="none", features=ExtractionSettings(memory_gib=gib / 4))
    found = describe_pair(fixed, moving, [Mind()], settings)
    assert 0.5 < np.prod(found.grid.size) / (np.prod(SHAPE) / 4) <= 1
    (note,) = found.notes
    assert "instead of 1x1x1 mm" in note and "raise --features.memory_gib" in note
    asked = describe_pair(fixed, moving, [Mind()], replace(settings, spacing=(1.0, 1.0, 1.0)))
    assert asked.frame.grid_back(asked.grid).size == SHAPE
    assert len(asked.notes) == 1 and "a coarser --spacing takes less" in asked.notes[0]
    room = replace(settings, features=ExtractionSettings(memory_gib=gib))
    assert describe_pair(fixed, moving, [Mind()], room).notes == ()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--solver.sdlogj", "0"], "--solver.sdlogj 0"),
        (["--solver.sdlogj", "-1"], "--solver.sdlogj -1"),
        (["--solver.sdlogj", "0.2", "--solver.regularisation", "0"], "--solver.regularisation 0 with"),
        (["--solver.regularisation", "-1"], "--solver.regularisation -1"),
        (["--solver.iterations", "-1"], "--solver.iterations -1"),
        (["--solver.search_mm", "-3"], "--solver.search_mm -3"),
        (["--solver.search_mm", "inf"], "--solver.search_mm inf"),
        (["--solver.learning_rate", "nan"], "--solver.learning_rate nan"),
        (["--solver.learning_rate", "-1"], "--solver.learning_rate -1"),
        (["--solver.sdlogj", "0.2", "--solver.iterations", "0"], "--solver.iterations 0 with"),
        (["--solver.coarse_mm", "0"], "--solver.coarse_mm 0"),
        (["--solver.fine_mm", "-2"], "--solver.fine_mm -2"),
        (["--spacing", "0", "1", "1"], "--spacing 0 1 1"),
        (["--features.memory_gib", "0"], "--features.memory_gib 0"),
    ],
)
def test_settings_that_make_no_sense_are_named_by_their_flag(flags, words):
    with pytest.raises(NnsslError, match=words):
        settings_from_flags(PairSettings(), flags, "nnssl_register")
