import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from scipy.ndimage import gaussian_filter
from test_monitors_probe import Levels
from tiny_dataset import job_of, log_of, write_dataset

from nnssl_ext.data.cases import list_cases
from nnssl_ext.engine import loop
from nnssl_ext.engine.method import build_method
from nnssl_ext.engine.probing import OnlineProbe
from nnssl_ext.errors import NnsslError
from nnssl_ext.monitors.registration import RegistrationProbe, _centred
from nnssl_ext.records import Case, Region

CPU = torch.device("cpu")


@pytest.fixture
def cases(tmp_path):
    return list_cases(write_dataset(tmp_path) / "tiny_3d_fullres", (1.0, 1.0, 1.0))


class AtStrideOne(Levels):
    channels, strides, decoder_channels, divisor, token_size = (2,), ((1, 1, 1),), (), (1, 1, 1), None


def test_features_that_show_the_image_bring_a_moved_copy_back_and_noise_does_not(tmp_path):
    image = gaussian_filter(np.random.default_rng(0).normal(size=(1, 16, 18, 16)), (0, 2, 2, 2)).astype(np.float32)
    image /= image.std()
    volumes = {"a": image, "b": np.roll(image, 3, 1)}
    for name, volume in volumes.items():
        labels = (volume > 0.5).astype(np.int8)
        nnUNetDatasetBlosc2.save_case(volume, labels, {"spacing": [1.0, 1.0, 1.0]}, str(tmp_path / name))
    here, there = (volume > 0.5 for volume in volumes.values())
    unmoved = 2 * (here & there).sum() / (here.sum() + there.sum())
    probe = RegistrationProbe(list_cases(tmp_path, (1.0, 1.0, 1.0)), 1, "encoder0", (16, 16, 16))
    knows, guesses = AtStrideOne(lambda x: x), AtStrideOne(torch.randn_like)
    torch.manual_seed(0)
    known, guessed = probe.say(knows, CPU), probe.say(guesses, CPU)
    assert known["registration_dice"] > unmoved + 0.1
    assert guessed["registration_dice"] == pytest.approx(unmoved, abs=0.05)
    assert known["registration_sdlogj"] > 0
    assert not any(knows.modes)


def test_features_that_are_not_finite_end_no_run(cases):
    told = RegistrationProbe(cases, 2, "encoder0", (16, 16, 16)).say(AtStrideOne(lambda x: x / 0), CPU)
    assert np.isnan(list(told.values())).all()


def test_the_ignored_label_is_no_structure(tmp_path):
    """Label 2 is in the fixed image alone: as a structure it would score 0 and halve the mean."""
    image = gaussian_filter(np.random.default_rng(0).normal(size=(1, 16, 18, 16)), (0, 2, 2, 2)).astype(np.float32)
    for name, volume in (("a", image), ("b", np.roll(image, 2, 1))):
        labels = (volume > 0.05).astype(np.int8)
        labels[:, :2] = 2 if name == "a" else 0
        nnUNetDatasetBlosc2.save_case(volume, labels, {"spacing": [1.0, 1.0, 1.0]}, str(tmp_path / name))
    cases = list_cases(tmp_path, (1.0, 1.0, 1.0))
    with_it, without = (RegistrationProbe(cases, 1, "encoder0", (16, 16, 16), ignore) for ignore in (None, 2))
    shows = AtStrideOne(lambda x: x)
    expected = without.say(shows, CPU)["registration_dice"] / 2
    assert with_it.say(shows, CPU)["registration_dice"] == pytest.approx(expected)


def test_pairs_are_neighbours_spread_over_the_cases(cases):
    names = [(a.identifier, b.identifier) for a, b in RegistrationProbe(cases[::-1], 3, "", (16, 16, 16)).pairs]
    assert names == [("case_00", "case_01"), ("case_02", "case_03"), ("case_04", "case_05")]
    assert len(RegistrationProbe(cases, 50, "", (16, 16, 16)).pairs) == 5
    with pytest.raises(NnsslError, match="two labelled cases"):
        RegistrationProbe(cases[:1], 3, "", (16, 16, 16))


def test_cases_are_centred_with_edges_repeated_and_no_labels_beyond(tmp_path):
    case = Case("a", tmp_path, 1, (2, 3, 2), (1.0, 1.0, 1.0))
    voxels = np.arange(12, dtype=np.float32).reshape(1, 2, 3, 2)
    image, inside, labels = _centred(Region(voxels, (0, 0, 0), case, np.ones((2, 3, 2), np.int16)), (5, 3, 2))
    assert np.array_equal(image[0, :, 0, 0], [0, 0, 6, 6, 6])
    assert np.array_equal(inside[:, 0, 0], [False, True, True, False, False])
    assert np.array_equal(labels[:, 0, 0], [0, 1, 1, 0, 0])


def test_a_run_reports_registration_beside_random_weights(nnunet_env, tmp_path):
    write_dataset(nnunet_env.preprocessed)
    names = tmp_path / "development.txt"
    names.write_text("case_00\ncase_03\n")
    flags = ("--epochs", "2", "--iterations", "1", "--registration_pairs", "1")
    job = job_of(*flags, "--registration_cases", str(names), "--probe_epochs", "5")
    assert job.run.registration_cases == ("case_00", "case_03")
    assert loop.pretrain(job)
    first, last = log_of(job)
    for row in (first, last):
        for name in ("registration_dice", "registration_dice_random"):
            assert 0 < float(row[name]) <= 1
    assert first["registration_dice_random"] == last["registration_dice_random"]
    with pytest.raises(NnsslError, match="probe_epochs 0"):
        loop.pretrain(job_of(*flags, "--probe_epochs", "0", "--name", "silent"))


def test_the_smoothness_that_is_compared_is_the_one_that_was_asked_for(tmp_path):
    """Cases of unlike shapes: beyond the smaller one, where edges are repeated, nothing is measured."""
    for name, shape in (("a", (1, 12, 14, 12)), ("b", (1, 24, 26, 24))):
        image = gaussian_filter(np.random.default_rng(len(shape)).normal(size=shape), (0, 2, 2, 2)).astype(np.float32)
        labels = (image > 0).astype(np.int8)
        nnUNetDatasetBlosc2.save_case(image / image.std(), labels, {"spacing": [1.0, 1.0, 1.0]}, str(tmp_path / name))
    probe = RegistrationProbe(list_cases(tmp_path, (1.0, 1.0, 1.0)), 1, "encoder0", (32, 32, 32))
    assert probe.say(AtStrideOne(lambda x: x), CPU)["registration_sdlogj"] == pytest.approx(0.24, rel=0.05)


class Remembers:
    """Asks for the weights."""

    def __init__(self):
        self.seen = []

    def say(self, backbone, device):
        self.seen.append(backbone.network.state_dict())
        return {}


@pytest.mark.parametrize("flags", [(), ("--labels", "1")])
def test_random_weights_are_those_that_the_run_began_with(nnunet_env, flags):
    write_dataset(nnunet_env.preprocessed)
    job = job_of(*flags, method="RegistrationTrainer")
    question = Remembers()
    OnlineProbe(job, CPU, [question]).figures(0, build_method(job))
    fresh, begun = question.seen
    assert fresh.keys() == begun.keys()
    assert all(torch.equal(fresh[name], begun[name]) for name in begun)
