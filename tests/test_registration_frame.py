"""The frame of a pair: the same voxels and headers whichever way round files are and however headers are turned."""

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scans import write

from nnssl_ext.registration.frame import AS_LOADED, Turn, frame_of
from nnssl_ext.registration.images import Grid, load_scan
from nnssl_ext.registration.solver import Field

TURNS = [Turn(order, ends) for order in itertools.permutations(range(3)) for ends in ((), (0,), (1, 2), (0, 1, 2))]


def blobs(shape=(9, 12, 9), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 100.0, size=shape).astype(np.float32)


def turned(path, folder, angles, ending):
    """A scan with its header turned, as a file of another format."""
    turn = sitk.Euler3DTransform((50.0, -30.0, 20.0), *np.radians(angles))
    image = sitk.ReadImage(str(path))
    image.SetOrigin(turn.TransformPoint(image.GetOrigin()))
    image.SetDirection(
        (np.reshape(turn.GetMatrix(), (3, 3)) @ np.reshape(image.GetDirection(), (3, 3))).ravel().tolist()
    )
    made = folder / f"{path.name.split('.')[0]}_turned{ending}"
    sitk.WriteImage(image, str(made))
    return made


def seen(fixed, moving):
    """What the frame shows of a pair: voxels, and headers as they are."""
    scans = load_scan(fixed), load_scan(moving)
    frame = frame_of(scans[0])
    return [
        (sitk.GetArrayFromImage(image), image.GetOrigin(), image.GetSpacing(), image.GetDirection())
        for image in (frame.scan(scan).image for scan in scans)
    ]


@pytest.fixture
def files(tmp_path):
    """Two axes of the fixed scan are alike in length and spacing; the moving one is finer, and oblique."""
    fixed = write(tmp_path / "f.nrrd", blobs(), spacing=(1.0, 0.7, 1.0), origin=(300.0, -200.0, 40.0), angle=0.3)
    moving = write(
        tmp_path / "m.nrrd", blobs((7, 8, 11), 1), spacing=(0.9, 1.1, 0.8), origin=(301.25, -199.5, 40), angle=0.5
    )
    return fixed, moving


@pytest.mark.parametrize("ending", [".nrrd", ".nii.gz"])
@pytest.mark.parametrize("angles", [(10, 0, 0), (46, 0, 0), (138, -69, 40), (180, 0, 0), (90, 90, 0)])
def test_turned_headers_are_not_seen(files, tmp_path, angles, ending):
    """Not even by rounding: to the last bit, in float64 headers and in NIfTI's float32."""
    before = seen(*files)
    after = seen(*(turned(file, tmp_path, angles, ending) for file in files))
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one[0], other[0])
        assert one[1:] == other[1:]
    assert before[0][1] == (0, 0, 0) and before[0][3] == (1, 0, 0, 0, 1, 0, 0, 0, 1)


@pytest.mark.parametrize("orientation", ["LPS", "SAR", "IPL"])
def test_the_order_of_a_files_axes_is_not_seen(files, tmp_path, orientation):
    before = seen(*files)
    for file in files:
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), orientation), str(tmp_path / f"o_{file.name}"))
    after = seen(tmp_path / "o_f.nrrd", tmp_path / "o_m.nrrd")
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one[0], other[0]) and one[1:] == other[1:]


@pytest.mark.parametrize("shear", [0.0, 9e-4])
def test_places_in_the_frame_are_those_of_the_world(files, tmp_path, shear):
    """Every voxel of both scans lies where it did, but for the rounding of headers, also where a header's axes are not quite at right
    angles; and a grid of the frame goes back there."""
    image = sitk.ReadImage(str(files[0]))
    slanted = np.reshape(image.GetDirection(), (3, 3)) @ [[1, shear, 0], [0, (1 - shear**2) ** 0.5, 0], [0, 0, 1]]
    image.SetDirection(slanted.ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / "slanted.mha"))
    scans = load_scan(tmp_path / "slanted.mha"), load_scan(files[1])
    assert np.allclose(np.sort(np.abs(scans[0].grid.direction)), np.sort(np.abs(slanted.ravel())))
    frame = frame_of(scans[0])
    for scan in scans:
        there = frame.scan(scan).image
        values = sitk.GetArrayViewFromImage(there)
        for z, y, x in itertools.product(*((0, 3, length - 1) for length in values.shape)):
            point = np.array(there.TransformIndexToPhysicalPoint((x, y, z)))
            world = frame.axes.T @ point + frame.origin
            index = scan.image.TransformPhysicalPointToContinuousIndex(world.tolist())
            assert np.abs(np.array(index) - np.round(index)).max() < 1e-3
            assert scan.image.GetPixel([round(i) for i in index]) == values[z, y, x]
    grid = Grid((4, 5, 6), (1.0, 1.5, 2.0), (3.0, -2.0, 7.0), frame.scan(scans[0]).grid.direction)
    voxels = torch.arange(120.0).view(4, 5, 6)
    inside = grid.image(voxels.numpy())
    back = frame.grid_back(grid).image(frame.turn.back(voxels).numpy())
    assert back.GetDirection() == pytest.approx(scans[0].image.GetDirection(), abs=1e-5)
    for index in itertools.product((0, 5), (0, 2), (1, 3)):
        world = frame.axes.T @ inside.TransformIndexToPhysicalPoint(index) + frame.origin
        assert back[back.TransformPhysicalPointToIndex(world.tolist())] == inside[index]


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_fields_turn_with_their_voxels(turn):
    """Warping turned voxels by the turned field is turning the warped voxels."""
    generator = torch.Generator().manual_seed(0)
    volume = torch.rand(5, 6, 7, generator=generator)
    assert torch.equal(turn.back(turn.there(volume)), volume)
    assert torch.equal(turn.there(turn.back(volume)), volume)
    lengths = turn.lengths_there((1.0, 2.0, 3.0))
    assert turn.lengths_back(lengths) == (1.0, 2.0, 3.0)
    assert tuple(turn.there(volume).shape) == tuple(int(n) for n in turn.lengths_there((5.0, 6.0, 7.0)))
    inner = turn.there(volume)
    displacement = torch.zeros(3, *inner.shape)
    for axis, step in enumerate((1, -2, 3)):
        displacement[axis] = step
    moved = inner.roll(
        (-1, 2, -3), (0, 1, 2)
    )  # what displacements by 1, -2 and 3 voxels fetch, but for what comes from beyond
    back = turn.field_back(displacement)
    steps = [int(back[axis].unique()) for axis in range(3)]
    assert torch.equal(turn.back(moved), volume.roll([-step for step in steps], (0, 1, 2)))


def test_a_velocity_turns_as_its_field(files):
    frame = frame_of(load_scan(files[0]))
    field = Field(torch.rand(3, 4, 5, 6), (1.0, 2.0, 3.0), torch.rand(3, 4, 5, 6))
    back = frame.field_back(field)
    assert torch.equal(back.displacement_voxels, frame.turn.field_back(field.displacement_voxels))
    assert torch.equal(back.velocity_voxels, frame.turn.field_back(field.velocity_voxels))
    assert back.spacing == frame.turn.lengths_back((1.0, 2.0, 3.0))


def starts() -> list[sitk.Transform]:
    affine = sitk.AffineTransform([1.1, 0.1, 0, -0.2, 0.9, 0, 0, 0.05, 1], (3.0, -4.0, 5.0), (300.0, -200.0, 40.0))
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(5, 5, 5, 3)), isVector=True)
    image.SetOrigin((295.0, -205.0, 35.0))
    image.SetSpacing((4.0, 4.0, 4.0))
    return [
        sitk.Transform(3, sitk.sitkIdentity),
        sitk.TranslationTransform(3, (3.0, 1.0, -2.0)),
        sitk.Euler3DTransform((300.0, -200.0, 40.0), 0.1, 0.2, 0.3, (1.0, 2.0, 3.0)),
        affine,
        sitk.DisplacementFieldTransform(image),
    ]


@pytest.mark.parametrize("start", starts(), ids=lambda transform: transform.GetName())
def test_starts_are_the_same_in_the_frame_and_in_the_world(files, start):
    frame = frame_of(load_scan(files[0]))
    inward = frame.inward(start)
    outward = frame.outward(inward)
    for point in np.random.default_rng(1).uniform(-3, 12, size=(20, 3)):
        world = frame.axes.T @ point + frame.origin
        expected = frame.axes @ (np.array(start.TransformPoint(world.tolist())) - frame.origin)
        assert inward.TransformPoint(point.tolist()) == pytest.approx(expected, abs=1e-9)
        assert outward.TransformPoint(world.tolist()) == pytest.approx(start.TransformPoint(world.tolist()), abs=1e-9)
    assert outward.IsLinear() == start.IsLinear()
    if start.GetName() in ("IdentityTransform", "TranslationTransform"):
        assert (inward.GetName(), outward.GetName()) == (start.GetName(), start.GetName())


def test_symmetric_scans_have_a_frame_too(tmp_path):
    scan = load_scan(
        write(tmp_path / "s.nrrd", np.pad(np.ones((2, 2, 2), np.float32), 3), spacing=(1, 1, 1), angle=0.0)
    )
    assert frame_of(scan).turn == AS_LOADED
