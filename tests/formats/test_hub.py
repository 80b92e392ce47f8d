"""Names of models: local folders, hub ids, and typos of paths that must not reach the hub."""

import errno
import socket
from types import SimpleNamespace

import pytest

from pruneofa.errors import InputError, NotNow
from pruneofa.formats import hub
from pruneofa.formats.hub import could_be_hub_id, local_folder


def raising(error):
    def fail(*_, **__):
        raise OSError("cannot load") from error

    return fail


def hub_error(status):
    error = OSError(f"status {status}")
    error.response = SimpleNamespace(status_code=status)
    return error


NO_ROUTE = type("ConnectError", (Exception,), {"__module__": "httpx2"})("no route")


@pytest.mark.parametrize("name", ["a/b/c", "./a", "/a", "~/a", "..", "runs/spase", "", "a//b"])
def test_a_name_that_looks_like_a_path_never_reaches_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert not could_be_hub_id(name)
    if name not in ("..", ""):  # these are folders
        with pytest.raises(InputError, match="no such folder; give a Hugging Face folder"):
            local_folder(name)


def test_a_hub_id_is_said_once_and_a_wrong_one_names_what_was_looked_for(tmp_path, monkeypatch, capsys):
    def nothing(*_, **__):
        raise OSError("404")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    hub.announce.cache_clear()
    for _ in range(2):
        with pytest.raises(InputError) as error:
            local_folder("some-org/model")
    assert str(error.value) == (
        f"some-org/model: no such folder in {tmp_path}, and the hub has no such model (404); check the path"
    )
    assert (
        capsys.readouterr().err == "some-org/model: not on this machine by that name; the Hugging Face hub is asked\n"
    )
    no_name, unreachable = socket.gaierror(socket.EAI_AGAIN, "no name"), OSError(errno.EHOSTUNREACH, "unreachable")
    for error in (NO_ROUTE, ConnectionResetError("reset"), no_name, unreachable, *map(hub_error, (408, 429, 503))):
        monkeypatch.setattr("huggingface_hub.snapshot_download", raising(error))
        with pytest.raises(NotNow, match="the hub could not be asked"):
            local_folder("some-org/model")
    monkeypatch.setattr("huggingface_hub.snapshot_download", raising(hub_error(404)))
    with pytest.raises(InputError, match="the hub has no such model") as error:
        local_folder("some-org/model")
    assert not isinstance(error.value, NotNow)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no such model in the cache of the hub, which is not asked"):
        local_folder("other-org/model")
    assert capsys.readouterr().err == ""


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The cache of a/b, whose snapshot has a config.json, as transformers' loaders leave it; nothing else is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, commit = tmp_path / "models--a--b", "0" * 40
    snapshot = model / "snapshots" / commit
    for folder in (snapshot, model / "refs", model / "trees", model / ".no_exist" / commit):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    return model


def test_a_model_that_the_cache_holds_a_part_of_is_not_another_model(cached, monkeypatch):
    with pytest.raises(InputError) as error:
        local_folder("a/b")
    assert str(error.value) == (
        "a/b: the hub's cache holds only a part of it, or does not say that it is all; load it once online"
    )
    assert not isinstance(error.value, NotNow)
    with monkeypatch.context() as patch, pytest.raises(NotNow, match="only a part"):
        patch.delenv("HF_HUB_OFFLINE")  # the hub does not answer
        local_folder("a/b")
    snapshot, absent = next((cached / "snapshots").iterdir()), next((cached / ".no_exist").iterdir())
    for name in ("config_sentence_transformers.json", "quantization.json"):
        (absent / name).touch()
    with pytest.raises(InputError, match="only a part"):
        local_folder("a/b")
    (absent / "modules.json").touch()
    assert local_folder("a/b") == snapshot  # all that decides is known
    (absent / "modules.json").unlink()
    (snapshot / "modules.json").write_text("[]")
    assert local_folder("a/b") == snapshot


def test_a_whole_snapshot_in_the_cache_is_used_without_the_hub(cached):
    from huggingface_hub._snapshot_download import TreeCacheEntry, write_tree_cache

    snapshot = next((cached / "snapshots").iterdir())
    entry = TreeCacheEntry(size=2, blob_id="0", lfs_sha256=None, lfs_size=None, xet_hash=None)
    write_tree_cache(str(cached), snapshot.name, {"config.json": entry, "README.md": entry})
    assert local_folder("a/b") == snapshot  # README.md is none of FILES
    write_tree_cache(str(cached), snapshot.name, {"config.json": entry, "modules.json": entry})
    with pytest.raises(InputError, match="a/b: the hub's cache holds only a part of it"):
        local_folder("a/b")


def test_a_whole_snapshot_of_an_earlier_version_is_used_without_the_hub(cached):
    snapshot = next((cached / "snapshots").iterdir())
    (snapshot / ".gitattributes").touch()
    assert local_folder("a/b") == snapshot
