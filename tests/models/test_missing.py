"""Where a part is looked for on the hub, with the hub's client replaced by tables of files."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError

from rdtf_ds.models import missing
from rdtf_ds.models.missing import EncoderNotFound, Part, load_part

PART = Part("autoencoder", "rdtf.encoders.autoencoder", "owner/example", ("", "vae"), ("config.json",))
RESPONSE = SimpleNamespace(headers={}, request=None)  # what the hub client's errors read of a response


def serve(monkeypatch: pytest.MonkeyPatch, *, cached: set[str] = frozenset(), remote: set[str] | None = None) -> list[str]:
    """Installs a hub with these files (remote None: cannot be reached); returns the list of files asked of the network."""
    asked: list[str] = []

    def download(source: str, file: str) -> str:
        asked.append(file)
        if remote is None:
            raise LocalEntryNotFoundError("offline")
        if file not in remote:
            raise RemoteEntryNotFoundError("no such file", response=RESPONSE)
        return file

    monkeypatch.setattr(missing, "try_to_load_from_cache", lambda source, file: file if file in cached else None)
    monkeypatch.setattr(missing, "hf_hub_download", download)
    return asked


def load(source: str, subfolder: str = "") -> tuple[str, str]:
    return source, subfolder


def test_cached_part_is_taken_without_the_network(monkeypatch):
    asked = serve(monkeypatch, cached={"vae/config.json"})
    assert load_part(load, "owner/name", PART) == ("owner/name", "vae")
    assert asked == []


@pytest.mark.parametrize(("remote", "place"), [({"config.json", "vae/config.json"}, ""), ({"vae/config.json"}, "vae")])
def test_remote_part_is_found_in_the_first_place_that_has_it(monkeypatch, remote: set[str], place: str):
    serve(monkeypatch, remote=remote)
    assert load_part(load, "owner/name", PART) == ("owner/name", place)


def test_unreachable_hub_is_asked_once_and_says_so(monkeypatch):
    asked = serve(monkeypatch, remote=None)
    with pytest.raises(EncoderNotFound, match="cannot be reached.*hf download owner/example"):
        load_part(load, "owner/name", PART)
    assert len(asked) == 1


def test_repository_without_the_part_and_no_repository_at_all(monkeypatch):
    serve(monkeypatch, remote=set())
    with pytest.raises(EncoderNotFound, match="has no config.json"):
        load_part(load, "owner/name", PART)

    def refuse(source: str, file: str) -> str:
        raise RepositoryNotFoundError("404 Client Error.\nRepository Not Found", response=RESPONSE)

    monkeypatch.setattr(missing, "hf_hub_download", refuse)
    with pytest.raises(EncoderNotFound, match="the hub answers: 404 Client Error") as caught:
        load_part(load, "owner/name", PART)
    assert "\n" not in str(caught.value)


def test_folder_wins_over_a_hub_id_of_the_same_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name" / "vae").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "vae" / "config.json").write_text("{}")
    asked = serve(monkeypatch, remote={"config.json"})
    assert load_part(load, "owner/name", PART) == ("owner/name", "vae")
    assert asked == []
