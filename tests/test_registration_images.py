"""Scans of any orientation on a common grid; bad input is named."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from scans import image, truncate, voxels, write

from nnssl_ext.errors import NnsslError
from nnssl_ext.registration.affine import initial_transform
from nnssl_ext.registration.images import Grid, common_grid, finest_cubes, grid_of, load_scan, place, view_field

NONE = sitk.Transform(3, sitk.sitkIdentity)
SHAPE = (10, 12, 14)


@pytest.fixture
def scan_file(tmp_path):
    return write(tmp_path / "scan.nii.gz", voxels())


def reoriented(path, orientation):
    """The same scan with flipped and swapped axes, as another file."""
    found = path.with_name(f"{orientation}.nii.gz")
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), orientation), str(found))
    return found


@pytest.mark.parametrize("orientation", ["LPS", "SAR", "PIL", "ARI"])
def test_flips_and_swaps_of_a_file_change_nothing(scan_file, orientation):
    expected, found = load_scan(scan_file), load_scan(reoriented(scan_file, orientation))
    assert (found.voxels == expected.voxels).all()
    assert found.grid.size == expected.grid.size
    assert np.allclose(found.grid.origin, expected.grid.origin, atol=1e-3)
    assert np.allclose(found.grid.direction, expected.grid.direction, atol=1e-5)
    assert found.file_grid != expected.file_grid


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha"])
def test_any_format(scan_file, ending):
    other = scan_file.with_name("other" + ending)
    sitk.WriteImage(sitk.ReadImage(str(scan_file)), str(other))
    assert (load_scan(other).voxels == load_scan(scan_file).voxels).all()


def test_world_vectors_point_where_the_header_says():
    """A step along an axis of voxels leads to the next voxel's world position."""
    made = image(voxels())
    grid = grid_of(made)
    for axis in range(3):
        step = np.zeros((3, *SHAPE))
        step[axis] = 2
        index = [0, 0, 0]
        index[2 - axis] = 2
        expected = np.subtract(made.TransformIndexToPhysicalPoint(index), made.GetOrigin())
        assert np.allclose(grid.to_world(step)[3, 4, 5], expected, atol=1e-9)


def test_the_common_grid_of_equal_cubes_is_that_of_the_scans(tmp_path):
    scan = load_scan(write(tmp_path / "a.nii.gz", voxels(), spacing=(1.0, 1.0, 1.0)))
    grid = common_grid(scan, scan, NONE, finest_cubes(scan), 16.0)
    assert grid.size == scan.grid.size and np.allclose(grid.origin, scan.grid.origin, atol=1e-4)
    assert np.allclose(place(scan.image, grid), scan.voxels, atol=1e-3)
    assert view_field(scan.image, grid).all()


def test_anisotropic_scans_are_compared_on_cubes_that_cover_them(scan_file):
    scan = load_scan(scan_file)  # 2.5 x 0.8 x 0.7 mm
    grid = common_grid(scan, scan, NONE, finest_cubes(scan), 16.0)
    assert np.allclose(grid.spacing, 0.7)
    length = np.array(scan.grid.size) * scan.grid.spacing
    assert (np.array(grid.size) * grid.spacing >= length - 1e-3).all()
    assert (np.array(grid.size) * grid.spacing < length + 0.7).all()
    first = scan.image.TransformContinuousIndexToPhysicalPoint((-0.5, -0.5, -0.5))
    corner = place(scan.image, grid)  # only to build the image
    made = grid.image(corner)
    assert np.allclose(made.TransformContinuousIndexToPhysicalPoint((-0.5, -0.5, -0.5)), first, atol=1e-3)


@pytest.mark.parametrize("vectors", [False, True])
def test_beyond_the_border_thick_slices_go_on_as_what_lies_between_them(vectors):
    """Slices of 3 mm that rise along z: 5 mm beyond the border along x, the grid's slices of 1 mm rise as evenly."""
    slices = np.broadcast_to(3 * np.arange(4, dtype=np.float32)[:, None, None], (4, 5, 6))
    image = sitk.GetImageFromArray(np.stack([slices] * 3, -1) if vectors else slices, isVector=vectors)
    image.SetSpacing((1.0, 1.0, 3.0))
    grid = Grid((10, 5, 11), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), tuple(np.eye(3).flatten()))
    expected = np.broadcast_to(np.arange(10.0)[:, None, None], (10, 5, 11))
    placed = place(image, grid)
    assert np.allclose(placed, expected[..., None] if vectors else expected, atol=1e-4)


def test_the_common_grid_reaches_where_displacements_may_point(tmp_path):
    """The moving scan continues 3 voxels below and far above the fixed one along x; 5 mm may be searched."""
    whole = voxels(shape=(8, 8, 40))
    fixed = load_scan(write(tmp_path / "f.nrrd", whole[:, :, 3:13], spacing=(1, 1, 1), origin=(3, 0, 0), angle=0.0))
    moving = load_scan(write(tmp_path / "m.nrrd", whole, spacing=(1, 1, 1), origin=(0, 0, 0), angle=0.0))
    grid = common_grid(fixed, moving, NONE, finest_cubes(fixed), 5.0)
    assert grid.size == (8, 8, 3 + 10 + 5)
    assert (view_field(fixed.image, grid).sum(), view_field(moving.image, grid).all()) == (8 * 8 * 10, True)
    orientation = sitk.DICOMOrient(sitk.GetImageFromArray(whole), "RAS")
    expected = sitk.GetArrayFromImage(orientation)[:, :, 40 - 18 :]  # x runs the other way in RAS order
    assert np.allclose(place(moving.image, grid), expected, atol=1e-4)


def test_scans_that_do_not_meet_are_named_or_brought_together(tmp_path):
    fixed = load_scan(write(tmp_path / "fixed.nii.gz", voxels()))
    moving = load_scan(write(tmp_path / "moving.nii.gz", voxels(1), origin=(500.0, 20.0, 0.0)))
    with pytest.raises(NnsslError, match=r"moving\.nii\.gz.*fixed\.nii\.gz do not meet"):
        common_grid(fixed, moving, NONE, finest_cubes(fixed), 20.0)
    start, note = initial_transform(fixed, moving)
    assert "share 0%" in note
    grid = common_grid(fixed, moving, start, finest_cubes(fixed), 0.0)
    assert view_field(moving.image, grid, start).mean() > 0.8


def plain_scan(path, array, origin=(0, 0, 0)):
    """A scan of 1 mm cubes along the axes of the world."""
    return load_scan(write(path, array, spacing=(1, 1, 1), origin=origin, angle=0.0))


def test_the_part_that_is_shared_is_one_of_the_smaller_field_of_view(tmp_path):
    large = plain_scan(tmp_path / "large.nrrd", voxels(shape=(30, 30, 30)))
    within = plain_scan(tmp_path / "within.nrrd", voxels(shape=(10, 10, 10)), origin=(5, 5, 5))
    half = plain_scan(tmp_path / "half.nrrd", voxels(shape=(30, 30, 30)), origin=(15, 0, 0))
    for pair in ((within, large), (large, within), (large, half)):
        assert initial_transform(*pair)[1] == "the headers' positions were trusted"


def test_centres_of_mass_are_aligned_along_their_own_axes(tmp_path):
    """A ball, and the same 6 mm up z and 3 mm along x."""
    scans = []
    for name, corner in (("f.nrrd", (4, 5, 6)), ("m.nrrd", (10, 5, 9))):
        array = np.zeros((30, 20, 24), np.float32)
        array[tuple(slice(start, start + 6) for start in corner)] = 100
        scans.append(plain_scan(tmp_path / name, array))
    start, _ = initial_transform(*scans, "centre")
    assert np.abs(np.subtract(start.TransformPoint((0.0, 0.0, 0.0)), (3, 0, 6))).max() < 0.5


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "2D", "4D", "NaN", "constant"])
def test_bad_scans_are_named(tmp_path, scan_file, kind):
    bad = tmp_path / "bad.nii.gz"
    if kind == "text":
        bad.write_text("no image")
    elif kind == "truncated":
        bad.write_bytes(scan_file.read_bytes())
        truncate(bad)
    elif kind == "2D":
        sitk.WriteImage(sitk.GetImageFromArray(voxels()[0]), str(bad))
    elif kind == "4D":
        sitk.WriteImage(sitk.JoinSeries([image(voxels()), image(voxels(1))]), str(bad))
    elif kind == "NaN":
        write(bad, np.where(voxels() > 120, np.nan, voxels()).astype(np.float32))
    elif kind == "constant":
        write(bad, np.full(SHAPE, 7, np.float32))
    with pytest.raises(NnsslError, match=r"bad\.nii\.gz"):
        load_scan(bad)


def test_bad_masks_are_named(tmp_path, scan_file):
    other_grid = write(tmp_path / "other.nii.gz", np.ones((10, 12, 13), np.uint8))
    shifted = write(tmp_path / "shifted.nii.gz", np.ones(SHAPE, np.uint8), origin=(0.0, 0.0, 0.0))
    empty = write(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.uint8))
    for mask, words in ((other_grid, "shape"), (shifted, "affine"), (empty, "is empty")):
        with pytest.raises(NnsslError, match=rf"{mask.name}.*{words}"):
            load_scan(scan_file, mask)
    with pytest.raises(NnsslError, match="labels are not integers"):
        load_scan(scan_file, labels=scan_file)
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:4, 3:5, 6:9] = 1
    assert load_scan(scan_file, write(tmp_path / "m.nii.gz", mask)).foreground().sum() == 12


def test_given_transforms_and_bad_ones(tmp_path, scan_file):
    scan = load_scan(scan_file)
    path = tmp_path / "shift.tfm"
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), str(path))
    found, _ = initial_transform(scan, scan, str(path))
    assert np.allclose(found.TransformPoint((0.0, 0.0, 0.0)), (1, 2, 3))
    flat = tmp_path / "flat.tfm"
    sitk.WriteTransform(sitk.TranslationTransform(2, (1.0, 2.0)), str(flat))
    text = tmp_path / "text.tfm"
    text.write_text("no transform")
    for name, words in (
        (flat, "2D"),
        (text, "no transform"),
        (tmp_path / "none.h5", "no such file"),
        ("afine", "affine"),
    ):
        with pytest.raises(NnsslError, match=words):
            initial_transform(scan, scan, str(name))


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_mutual_information_finds_a_known_rotation(tmp_path, kind):
    """The moving scan is the fixed one, turned by 8 degrees and shifted by 4 mm in its header, and inverted in contrast."""
    from scipy.ndimage import gaussian_filter

    array = gaussian_filter(np.random.default_rng(0).normal(size=(32, 32, 32)), 4).astype(np.float32)
    fixed = load_scan(write(tmp_path / "f.nrrd", array, spacing=(2, 2, 2), origin=(0, 0, 0), angle=0.0))
    made = fixed.image
    turn = sitk.Euler3DTransform(
        made.TransformContinuousIndexToPhysicalPoint((16, 16, 16)), 0, 0, np.deg2rad(8), (4, 0, 0)
    )
    moving = sitk.Resample(fixed.image, fixed.image, turn.GetInverse(), sitk.sitkLinear, float(array.mean()))
    sitk.WriteImage(moving * -3.0 + 100.0, str(tmp_path / "m.nrrd"))
    found, _ = initial_transform(fixed, load_scan(tmp_path / "m.nrrd"), kind)
    points = [
        made.TransformContinuousIndexToPhysicalPoint(p)
        for p in ((8.0, 8.0, 8.0), (24.0, 10.0, 16.0), (16.0, 24.0, 20.0))
    ]
    apart = [np.linalg.norm(np.subtract(found.TransformPoint(p), turn.TransformPoint(p))) for p in points]
    assert max(apart) < 1.0  # half a voxel
