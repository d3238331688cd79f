"""Push to and load from a Hugging Face hub: the real client against a small hub on this computer, without network."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import content_of, nnssl_checkpoint, plans_of, primus, resenc
from hub_server import Hub, serve

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub (extra: hub)")

from nnssl_ext.checkpoints import hub as client
from nnssl_ext.checkpoints.adapt import read_pretrained
from nnssl_ext.checkpoints.export import FILES, export
from nnssl_ext.checkpoints.io import load_checkpoint, save_checkpoint
from nnssl_ext.checkpoints.source import checkpoint_file, with_local_files
from nnssl_ext.cli import probe
from nnssl_ext.cli.export import main as export_main
from nnssl_ext.errors import NnsslError
from nnssl_ext.networks.build import build_network
from nnssl_ext.registration.encoder import read_source

PATCH = [16] * 3
REPOSITORY = "someone/some-model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running hub, empty, that this process and its children talk to instead of huggingface.co; their cache is empty too."""
    from huggingface_hub import constants, file_download, hf_api

    found = Hub()
    server = serve(found)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, cache = f"http://127.0.0.1:{server.server_port}", str(tmp_path / "cache" / "hub")
    variables = {"HF_ENDPOINT": address, "HF_HUB_CACHE": cache, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name, value in {**variables, "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", address)  # read from the environment once, when the package was imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(hf_api.HfApi, "__init__", _with_endpoint(hf_api.HfApi.__init__, address))
    assert file_download.constants is constants
    client.download.cache_clear()
    yield found
    server.shutdown()
    client.download.cache_clear()


def _with_endpoint(original, address):
    def init(self, *args, **kwargs):
        original(self, *args, **{"endpoint": address, **kwargs})

    return init


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    save_checkpoint(path, content_of(plans_of(primus(PATCH), PATCH), seed=7))
    return path


def pushed(hub, tmp_path, checkpoint):
    folder = tmp_path / "out"
    export(checkpoint, folder, "apache-2.0", REPOSITORY)
    return client.push(folder, FILES, REPOSITORY, private=True)


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)) for name, value in one.items()
    )


def test_what_was_pushed_loads_bit_identically(hub, tmp_path, ours):
    name = pushed(hub, tmp_path, ours)
    (commit,) = hub.repositories[REPOSITORY]
    assert name == f"hf:{REPOSITORY}@{commit}" and f"create {REPOSITORY} private=True" in hub.seen
    assert set(hub.repositories[REPOSITORY][commit]) == set(FILES)
    given = load_checkpoint(ours)
    for source in (name, f"hf:{REPOSITORY}", f"hf:{REPOSITORY}@main"):
        loaded = load_checkpoint(source)
        assert same_bits(loaded.pop("network_weights"), given["network_weights"])
        assert loaded == {key: given[key] for key in loaded}
    assert checkpoint_file(name).name == "model.safetensors"
    assert read_pretrained(f"hf:{REPOSITORY}").origin == f"hf:{REPOSITORY}"
    assert read_source(Path(f"hf:{REPOSITORY}")).pretrained.origin == f"hf:{REPOSITORY}"
    assert probe._beside(Path(f"hf:{REPOSITORY}")) == Path() and probe._beside(tmp_path / "c.pth") == tmp_path
    assert with_local_files(f"hf:{REPOSITORY}@encoder0+mind") == f"{checkpoint_file(name)}@encoder0+mind"
    for text in ("@labels", "@labels+mind"):
        assert with_local_files(f"hf:{REPOSITORY}{text}") == f"{checkpoint_file(name)}{text}"
    assert with_local_files(f"random:{name}@decoder1") == f"random:{checkpoint_file(name)}@decoder1"


def test_an_older_commit_stays_reachable(hub, tmp_path, ours):
    first = pushed(hub, tmp_path, ours)
    save_checkpoint(ours, content_of(plans_of(primus(PATCH), PATCH), seed=8))
    second = pushed(hub, tmp_path, ours)
    weights = [
        load_checkpoint(name)["network_weights"]["eva.pos_embed"] for name in (first, second, f"hf:{REPOSITORY}")
    ]
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])


def test_openminds_layout_loads(hub, tmp_path):
    """Their repositories: the pickle, the plan and an empty-ish config, and no sums."""
    network = build_network(plans_of(resenc(), PATCH), "3d_fullres", 1, 1)
    content = nnssl_checkpoint("ResidualEncoderUNet", network, PATCH, resenc()["arch_kwargs"])
    torch.save(content, tmp_path / "checkpoint_final.pth")
    plan = json.dumps(content["nnssl_adaptation_plan"]).encode()
    files = {"checkpoint_final.pth": (tmp_path / "checkpoint_final.pth").read_bytes(), "adaptation_plan.json": plan}
    hub.commit("AnonRes/ResEncL-OpenMind-MAE", {**files, "config.json": b"{}", "README.md": b"# OpenMind"})
    source = read_pretrained("hf:AnonRes/ResEncL-OpenMind-MAE")
    assert (source.kind, source.method) == ("nnssl", "BaseMAETrainer_BS8")
    assert same_bits({k: v for k, v in source.weights.items()}, {k: v for k, v in content["network_weights"].items()})


@pytest.mark.parametrize("name", ["model.safetensors", "SHA256SUMS"])
def test_a_file_that_changed_on_its_way_is_named_and_refused(hub, tmp_path, ours, name):
    """The weights are compared by SHA-256, the small list of sums by git's name."""
    pushed(hub, tmp_path, ours)
    served = bytearray((tmp_path / "out" / name).read_bytes())
    served[-100] ^= 1
    hub.served_instead[name] = bytes(served)
    with pytest.raises(NnsslError, match=rf"the hash of .*{name} is not the one in hf:{REPOSITORY}, which lists it as"):
        load_checkpoint(f"hf:{REPOSITORY}")


def test_a_file_that_changed_in_the_cache_is_refused_with_and_without_network(hub, tmp_path, ours, monkeypatch):
    pushed(hub, tmp_path, ours)
    path = checkpoint_file(f"hf:{REPOSITORY}").resolve()
    tampered = bytearray(path.read_bytes())
    tampered[-100] ^= 1
    path.chmod(0o644)
    path.write_bytes(tampered)
    for offline in (False, True):
        client.download.cache_clear()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(NnsslError, match=r"the hash of .*model\.safetensors is not the one in"):
            load_checkpoint(f"hf:{REPOSITORY}")


def test_a_repository_changed_after_its_sums_were_written_is_refused(hub, tmp_path, ours):
    """The hub vouches for the new file; the author's sums do not."""
    pushed(hub, tmp_path, ours)
    save_checkpoint(ours, content_of(plans_of(primus(PATCH), PATCH), seed=8))
    export(ours, tmp_path / "other")
    hub.commit(REPOSITORY, {"model.safetensors": (tmp_path / "other" / "model.safetensors").read_bytes()})
    with pytest.raises(NnsslError, match=r"model\.safetensors is not the file that was shared"):
        load_checkpoint(f"hf:{REPOSITORY}")


def test_without_network_the_cache_serves(hub, tmp_path, ours, monkeypatch):
    pushed(hub, tmp_path, ours)
    given = load_checkpoint(f"hf:{REPOSITORY}")["network_weights"]
    client.download.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.seen)
    assert same_bits(load_checkpoint(f"hf:{REPOSITORY}")["network_weights"], given)
    assert len(hub.seen) == asked
    with pytest.raises(NnsslError, match=r"cannot reach the hub for hf:someone/else.*nothing of it is in the cache"):
        load_checkpoint("hf:someone/else")


def test_a_pickle_with_code_on_the_hub_is_refused(hub, tmp_path):
    torch.save({"network_weights": torch.nn.Linear(40, 40)}, tmp_path / "c.pth")
    hub.commit("some/body", {"checkpoint_final.pth": (tmp_path / "c.pth").read_bytes()})
    with pytest.raises(NnsslError, match="nothing in it was executed"):
        load_checkpoint("hf:some/body")


def test_what_is_not_there_is_named(hub, tmp_path, ours):
    with pytest.raises(NnsslError, match="cannot read hf:no/body"):
        load_checkpoint("hf:no/body")
    pushed(hub, tmp_path, ours)
    with pytest.raises(NnsslError, match=f"cannot read hf:{REPOSITORY}@v2"):
        load_checkpoint(f"hf:{REPOSITORY}@v2")
    hub.commit("no/weights", {"README.md": b"# soon"})
    with pytest.raises(NnsslError, match=r"hf:no/weights holds no checkpoint .*only README\.md"):
        load_checkpoint("hf:no/weights")


def test_the_commands_in_fresh_processes(hub, nnunet_env, ours):
    """Export and push, then inspect by the name that was printed; the client reads its address from the environment."""
    flags = ("-o", nnunet_env.raw / "out", "--license", "apache-2.0", "--push", REPOSITORY, "--private")
    done = nnunet_env.run("nnssl_export", ours, *flags)
    (commit,) = hub.repositories[REPOSITORY]
    name = f"hf:{REPOSITORY}@{commit}"
    assert f"pushed to {name}" in done.stdout
    told = json.loads(nnunet_env.run("nnssl_inspect", name, "--json").stdout)
    assert (told["file"], told["method"]) == (name, "MAETrainer")


def test_publishing_needs_a_licence(tmp_path, ours, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["nnssl_export", str(ours), "-o", str(tmp_path / "out"), "--push", REPOSITORY])
    with pytest.raises(SystemExit) as ended:
        export_main()
    assert ended.value.code == 2 and "--license" in capsys.readouterr().err and not (tmp_path / "out").exists()
