"""Checkpoints on the Hugging Face hub: up as a folder of `export`, down as a file that is the one the hub lists."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from nnssl_ext.checkpoints.source import SUMS, WEIGHTS
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import sha256_of


@cache
def download(repository: str, revision: str | None = None) -> Path:
    """The weights of a repository, in the hub's cache on this computer, beside their ``SHA256SUMS`` where the repository has them.

    Without network (or under ``HF_HUB_OFFLINE=1``) what the cache holds is taken.

    Args:
        repository: ``OWNER/NAME``, in the layout of `export` or of OpenMind.
        revision: branch, tag or commit; the main branch if None.

    Raises:
        NnsslError: no such repository or revision, no right to read it, no weights in it, no network and nothing in the cache,
            or a file that differs from the hash the hub lists for it.
    """
    hub = _library()
    name = f"hf:{repository}" + (f"@{revision}" if revision else "")
    try:
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
        listed = {file.rfilename: file for file in info.siblings or ()}
        wanted = [_weights_of(listed, name), *({SUMS} & listed.keys())]
        paths = [Path(hub.hf_hub_download(repository, file, revision=revision)) for file in wanted]
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError) as error:
        raise NnsslError(
            f"cannot read {name}: {error}",
            "check the name and revision; for a private or gated repository log in first: hf auth login",
        ) from error
    except (
        OSError,
        hub.errors.HTTPError,
    ) as error:  # of the HTTP library: requests, httpx or httpx2 by the hub's version
        return _from_cache(hub, repository, revision, f"cannot reach the hub for {name}: {error}")
    for path, file in zip(paths, wanted, strict=True):
        _check(path, listed[file], name)
    return paths[0]


def push(folder: Path, files: Iterable[str], repository: str, private: bool) -> str:
    """Put files of a folder into one commit of a repository, which is created where there is none, and check what arrived.

    Returns:
        ``hf:OWNER/NAME@COMMIT``.

    Raises:
        NnsslError: no right to write, no network, or a file that arrived with another hash.
    """
    hub = _library()
    api, files = hub.HfApi(), list(files)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        added = [hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=folder / file) for file in files]
        commit = api.create_commit(repository, added, commit_message="Add a checkpoint exported by nnssl_export").oid
        info = api.model_info(repository, revision=commit, files_metadata=True)
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        raise NnsslError(
            f"could not push {folder} to hf:{repository}: {error}",
            f"log in with a token that may write (hf auth login), then: hf upload {repository} {folder}",
        ) from error
    listed = {file.rfilename: file for file in info.siblings or ()}
    for file in files:
        if file not in listed:
            raise NnsslError(f"{file} did not arrive in hf:{repository}", f"hf upload {repository} {folder}")
        _check(folder / file, listed[file], f"hf:{repository}")
    return f"hf:{repository}@{commit}"


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise NnsslError(
            "the Hugging Face hub needs the package huggingface_hub", 'pip install "nnssl-ext[hub]"'
        ) from error
    return huggingface_hub


def _weights_of(files: Iterable[str], name: str) -> str:
    held = sorted(files)
    for wanted in WEIGHTS:
        if wanted in held:
            return wanted
    raise NnsslError(
        f"{name} holds no checkpoint ({' or '.join(WEIGHTS)}), only {', '.join(held) or 'nothing'}",
        "use a repository that nnssl_export pushed, or one of OpenMind",
    )


def _from_cache(hub: Any, repository: str, revision: str | None, why: str) -> Path:
    """The weights that an earlier download left. The cache names large files by their SHA-256, where the system has links."""
    for file in WEIGHTS:
        path = hub.try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(path, str):
            expected = Path(path).resolve().name
            if re.fullmatch("[0-9a-f]{64}", expected) and sha256_of(Path(path)) != expected:
                raise _changed(path, f"the hub's cache, which has it as {expected}")
            return Path(path)
    raise NnsslError(f"{why}; and nothing of it is in the cache", "connect, or copy the folder here and give its path")


def _check(path: Path, listed: Any, name: str) -> None:
    """Large files are listed with their SHA-256, small ones with git's name for them."""
    if listed.lfs is not None:
        found, expected = sha256_of(path), listed.lfs["sha256"]
    else:
        content = path.read_bytes()
        found, expected = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), listed.blob_id
    if found != expected:
        raise _changed(path, f"{name}, which lists it as {expected}")


def _changed(path: str | Path, where: str) -> NnsslError:
    return NnsslError(f"the hash of {path} is not the one in {where}", "delete it and fetch it again")
