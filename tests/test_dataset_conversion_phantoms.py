"""Phantoms: what is in them, and that the saved warp is the warp."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import label as connected_components
from scipy.ndimage import map_coordinates

from nnssl_ext.dataset_conversion.phantoms import (
    AIR,
    FAT,
    HARD,
    LABELS,
    LUMEN,
    SOFT,
    Phantom,
    PhantomSettings,
    generate_phantom,
    grid_points,
    labels_of,
    tissue_at,
)
from nnssl_ext.errors import NnsslError

STRUCTURES = [name for name in LABELS if name != "background"]


def jacobian_determinant(phantom: Phantom) -> np.ndarray:
    """det of the gradient of p -> p + u(p), by central differences in mm."""
    gradient = np.stack([np.stack(np.gradient(u, *phantom.spacing)) for u in phantom.displacement])
    return np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.sum(a & b) / (np.sum(a) + np.sum(b))


@pytest.mark.parametrize("modality", ["mr", "ct"])
@pytest.mark.parametrize("seed", range(4))
def test_every_subject_has_every_structure(modality, seed):
    phantom = generate_phantom(PhantomSettings(modality=modality), seed)
    assert phantom.image.shape == phantom.labels.shape == phantom.displacement.shape[1:]
    assert np.isfinite(phantom.image).all()
    volumes = np.bincount(phantom.labels.ravel()) * np.prod(phantom.spacing) / 1000  # ml
    assert len(volumes) == len(LABELS)
    assert volumes[1:].min() > 1 and volumes[1:].max() < 30


def test_structures_differ_in_shape():
    spacing = np.ones(3)
    tissues = tissue_at(grid_points(np.array([72, 84, 76]), spacing))
    assert set(np.unique(tissues)) == {*LABELS.values(), AIR, FAT, SOFT, LUMEN}

    def elongation(name):  # longest over shortest principal axis
        return np.sqrt(np.divide(*np.linalg.eigvalsh(np.cov(np.argwhere(tissues == LABELS[name]).T))[[2, 0]]))

    assert elongation("vessel") > 2.5 > elongation("nodules")
    assert elongation("bone") > 2.5 > elongation("organ")
    outside_shell = tissues != LABELS["shell"]
    assert connected_components(outside_shell)[1] == 2  # a closed shell parts its lumen from the rest
    assert np.all(connected_components(outside_shell)[0][tissues == LUMEN] == 2)


def test_ct_has_the_hounsfield_units_of_its_tissues():
    settings = PhantomSettings(modality="ct", noise=0.05)
    for seed in range(3):
        phantom = generate_phantom(settings, seed)
        assert phantom.image.min() >= -1024 and phantom.image.max() <= 3071
        assert np.all(phantom.image == np.round(phantom.image))
        assert -1005 < np.median(phantom.image[0, :3, :3]) < -995  # a corner is air outside the body
        assert 300 < np.median(phantom.image[phantom.labels == LABELS["bone"]]) < 900
        for name, expected in {"organ": 105, "vessel": 220, "shell": 70, "nodules": 15}.items():
            # four standard deviations between subjects (at most 30 HU), and partial volume
            assert abs(np.median(phantom.image[phantom.labels == LABELS[name]]) - expected) < 130


def test_mr_has_rician_air_and_arbitrary_scales():
    medians, scales = [], []
    for seed in range(8):
        image = generate_phantom(PhantomSettings(modality="mr"), seed).image
        air = image[:, :4, :4]
        assert image.min() >= 0
        # Rician noise without signal is Rayleigh: mean / std = sqrt(pi / (4 - pi)) = 1.913
        assert air.mean() / air.std() == pytest.approx(1.913, rel=0.1)
        scales.append(air.mean())
        medians.append(np.median(image))
    assert max(medians) / min(medians) > 5


def test_bias_field_brightens_one_side_of_the_same_tissue():
    spread = []
    for seed in range(5):
        phantom = generate_phantom(PhantomSettings(modality="mr", noise=0.0), seed)
        organ = phantom.labels == LABELS["organ"]
        y = np.argwhere(organ)[:, 1]
        values = phantom.image[organ]
        spread.append(abs(np.log(np.median(values[y < np.median(y)]) / np.median(values[y > np.median(y)]))))
    assert max(spread) > 0.03  # texture alone averages out over half an organ


@pytest.mark.parametrize("seed", range(6))
def test_strong_warps_do_not_fold(seed):
    phantom = generate_phantom(PhantomSettings(deformation=0.95), seed)
    determinant = jacobian_determinant(phantom)
    assert determinant.min() > 0
    assert determinant.min() < 0.9 and determinant.max() > 1.1  # and they do deform
    assert np.linalg.norm(phantom.displacement, axis=0).max() > 2  # mm


def test_no_deformation_is_the_template():
    phantom = generate_phantom(PhantomSettings(deformation=0.0, spacing_jitter=0.0), 5)
    assert not phantom.displacement.any()
    tissues = tissue_at(grid_points(np.array(phantom.labels.shape), np.array(phantom.spacing)))
    assert np.array_equal(phantom.labels[tissues <= 5], tissues[tissues <= 5])


@pytest.fixture(scope="module")
def template() -> Phantom:
    wide = PhantomSettings(
        field_of_view=(88.0, 100.0, 92.0), spacing=(1.0, 1.0, 1.0), spacing_jitter=0.0, deformation=0.0
    )
    return generate_phantom(wide, 0)


@pytest.mark.parametrize("seed", range(3))
def test_the_displacement_maps_template_labels_to_the_subject(template, seed):
    """Resample the template's label *volume* through the saved field, as a registration would."""
    subject = generate_phantom(PhantomSettings(), seed)
    subject_points = grid_points(np.array(subject.labels.shape), np.array(subject.spacing))
    centre = (np.array(template.labels.shape) - 1) / 2

    def warped(displacement):  # mm are voxels of this template
        voxels = subject_points + displacement + centre[:, None, None, None]
        return map_coordinates(template.labels, voxels, order=0)

    right, unmoved, reversed_ = (warped(sign * subject.displacement) for sign in (1, 0, -1))
    for name in STRUCTURES:
        value = LABELS[name]
        agreement = dice(right == value, subject.labels == value)
        assert agreement > 0.93, name
        assert agreement > dice(unmoved == value, subject.labels == value) + 0.05, name
        assert agreement > dice(reversed_ == value, subject.labels == value) + 0.1, name


def test_seeds():
    settings = PhantomSettings()
    once, again, other = (generate_phantom(settings, seed) for seed in (3, 3, 4))
    assert np.array_equal(once.image, again.image) and np.array_equal(once.displacement, again.displacement)
    assert once.spacing == again.spacing != other.spacing
    assert once.image.shape != other.image.shape or not np.array_equal(once.labels, other.labels)
    ct = generate_phantom(PhantomSettings(modality="ct"), 3)
    assert np.array_equal(ct.labels, once.labels)  # the same subject in another scanner: paired CT and MR


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"deformation": 1.0}, "1.0"),
        ({"spacing": (0.0, 1.0, 1.0)}, "0.0"),
        ({"spacing": (20.0, 1.0, 1.0)}, "20.0"),
    ],
)
def test_impossible_settings_are_named(wrong, named):
    settings = PhantomSettings(**wrong)
    with pytest.raises(NnsslError, match=named):
        generate_phantom(settings, 0)


@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_hard_phantoms_have_many_small_lesions_at_low_contrast(modality):
    settings = replace(HARD, modality=modality)
    hard, plain = generate_phantom(settings, 3), generate_phantom(PhantomSettings(modality=modality), 3)
    lesions = hard.labels == labels_of(settings)["lesions"]
    _, count = connected_components(lesions)
    assert count == settings.lesions  # none touches another, none is lost
    volume = lesions.sum() * np.prod(hard.spacing) / count
    assert 4 / 3 * np.pi * 3**3 * 0.5 < volume < 4 / 3 * np.pi * 6**3  # mm3; some are cut by neighbouring structures
    organ = hard.image[hard.labels == LABELS["organ"]]  # brighter than soft tissue, the lesions' other host
    assert hard.image[lesions].mean() > organ.mean() + 0.5 * organ.std()
    assert np.array_equal(hard.labels[~lesions], plain.labels[~lesions])
    assert set(np.unique(plain.labels[lesions])) <= {0, LABELS["organ"]}  # they replace organ and soft tissue
    assert np.array_equal(hard.displacement, plain.displacement)

    def separation(phantom):  # of organ and vessel, in standard deviations of the organ
        organ, vessel = (phantom.image[phantom.labels == LABELS[name]] for name in ("organ", "vessel"))
        return abs(organ.mean() - vessel.mean()) / organ.std()

    assert separation(hard) < 0.8 * separation(plain)


def test_lesions_lie_elsewhere_in_every_subject():
    places = [np.argwhere(generate_phantom(HARD, seed).labels == labels_of(HARD)["lesions"]) for seed in (0, 1)]
    assert {*map(tuple, places[0])} != {*map(tuple, places[1])}


@pytest.mark.parametrize("wrong", [{"lesions": 400}, {"lesions": -1}, {"contrast": 0.0}])
def test_impossible_lesions_are_refused(wrong):
    with pytest.raises(NnsslError, match="lesions"):
        generate_phantom(PhantomSettings(**wrong), 0)
