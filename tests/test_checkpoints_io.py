"""Files: plain types only, nothing of a foreign file is executed, damage is named."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_ext.checkpoints.io import load_checkpoint, save_checkpoint
from nnssl_ext.errors import NnsslError


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
def test_a_foreign_pickle_is_refused_and_not_executed(tmp_path, container):
    file, harm = tmp_path / "bomb.pth", tmp_path / "harm"
    content = {"network_weights": Bomb(harm)}
    if container == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=container == "zip")

    with pytest.raises(NnsslError, match=r"bomb\.pth.*nothing in it was executed"):
        load_checkpoint(file)

    assert not harm.exists()
    torch_would = {"zip": torch.load, "legacy": torch.load, "pickle": lambda f, **_: pickle.loads(Path(f).read_bytes())}
    torch_would[container](file, weights_only=False)
    assert harm.exists(), "the bomb must be able to explode, or this test shows nothing"


def test_a_whole_module_is_refused_by_its_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(NnsslError, match=r"torch\.nn\.modules\.linear\.Linear"):
        load_checkpoint(tmp_path / "module.pth")


@pytest.mark.parametrize("damage", ["half", "empty", "text", "noise"])
def test_damage_is_named(tmp_path, damage):
    file = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {"w": torch.zeros(1000)}}, file)
    whole = file.read_bytes()
    noise = np.random.default_rng(0).bytes(500)
    file.write_bytes(
        {"half": whole[: len(whole) // 2], "empty": b"", "text": b"hello, this is text", "noise": noise}[damage]
    )
    with pytest.raises(NnsslError, match=r"checkpoint_final\.pth"):
        load_checkpoint(file)


def test_flipped_bits_are_named(tmp_path):
    """torch.load does not compare the checksums that the file has."""
    file = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {"w": torch.zeros(100_000)}}, file)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(value ^ 255 for value in content[middle : middle + 200])
    file.write_bytes(content)
    assert torch.load(file, weights_only=True)["network_weights"]["w"].any()
    with pytest.raises(NnsslError, match="differs from its checksum"):
        load_checkpoint(file)


def test_a_missing_file_and_a_bare_tensor_are_named(tmp_path):
    with pytest.raises(NnsslError, match=r"no checkpoint at .*nowhere\.pth"):
        load_checkpoint(tmp_path / "nowhere.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(NnsslError, match=r"tensor\.pth holds a Tensor"):
        load_checkpoint(tmp_path / "tensor.pth")


def test_nnunets_numpy_scalars_are_read(tmp_path):
    torch.save(
        {"_best_ema": np.float32(0.5), "logging": {"dice": [np.float64(0.25), np.int64(3)]}}, tmp_path / "nnunet.pth"
    )
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "nnunet.pth", weights_only=True)
    content = load_checkpoint(tmp_path / "nnunet.pth")
    assert content["_best_ema"] == 0.5 and content["logging"]["dice"] == [0.25, 3]


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        ({"a": {"b": [1, np.float32(2)]}}, r"a\.b\[1\]"),
        ({"settings": {"path": Path("x")}}, r"settings\.path"),
        ({"settings": {("a", 1): 2}}, "settings"),
    ],
)
def test_other_types_are_refused_by_key_and_nothing_is_written(tmp_path, bad, key):
    with pytest.raises(TypeError, match=key):
        save_checkpoint(tmp_path / "checkpoint.pth", bad)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pth"
    save_checkpoint(file, {"epoch": 1})

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(NnsslError, match="No space left"):
        save_checkpoint(file, {"epoch": 2})
    assert load_checkpoint(file) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_aliases_are_stored_once_and_views_do_not_drag_their_storage(tmp_path):
    big = torch.zeros(1_000_000)
    weight = torch.arange(1000.0, requires_grad=True)
    save_checkpoint(tmp_path / "c.pth", {"w": {"conv": weight, "all_modules.0": weight.detach()}, "view": big[:10]})
    assert (tmp_path / "c.pth").stat().st_size < 10_000
    loaded = load_checkpoint(tmp_path / "c.pth")
    assert loaded["w"]["conv"].data_ptr() == loaded["w"]["all_modules.0"].data_ptr()
    assert torch.equal(loaded["w"]["conv"], weight.detach()) and not loaded["w"]["conv"].requires_grad
    assert loaded["view"].shape == (10,)


def test_tensors_of_a_device_arrive_on_the_cpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    save_checkpoint(tmp_path / "c.pth", {"network_weights": {"w": torch.ones(3, device="cuda")}})
    assert torch.load(tmp_path / "c.pth", weights_only=True)["network_weights"]["w"].device.type == "cpu"
