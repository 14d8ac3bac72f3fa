"""Where weights lie on this machine, told without loading them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError

from rdtf_ds.models import local_weights
from rdtf_ds.models.autoencoder import AUTOENCODER, HaarAutoencoder
from rdtf_ds.models.local_weights import KnownHashes, is_here, local_folder, made_on_the_spot, tokenizer_hash, weight_files, weights_hash
from rdtf_ds.models.missing import EncoderNotFound
from rdtf_ds.models.text_conditioning import CLIP, CLIP_TOKENIZER, T5, T5_TOKENIZER
from rdtf_ds.models.tiny_encoders import write_tiny_encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    write_tiny_encoders(folder, width=16)
    return folder


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}" if name.endswith(".json") else name)


@pytest.mark.parametrize("source", ["tiny", "tiny:32", "haar:2", "haar:4"])
def test_what_is_made_on_the_spot_is_here_and_told_by_its_name(source: str) -> None:
    assert made_on_the_spot(source) and is_here(source, AUTOENCODER) and weights_hash(source, AUTOENCODER) is None
    assert not made_on_the_spot("owner/tiny") and not made_on_the_spot("/tiny")


def test_parts_of_a_folder_are_found_and_hashed_apart(encoders: Path) -> None:
    assert local_folder(str(encoders), AUTOENCODER) == encoders / "vae"
    assert local_folder(str(encoders), CLIP_TOKENIZER) == encoders / "tokenizer"
    assert local_folder(str(encoders / "text_encoder"), CLIP) == encoders / "text_encoder"
    assert is_here(str(encoders), CLIP, CLIP_TOKENIZER) and is_here(str(encoders), T5, T5_TOKENIZER)
    hashes = [weights_hash(str(encoders), part) for part in (AUTOENCODER, CLIP, T5)]
    assert len(set(hashes)) == 3 and None not in hashes
    assert weights_hash(str(encoders / "vae"), AUTOENCODER) == hashes[0]


def test_what_is_incomplete_is_not_here(encoders: Path, tmp_path: Path) -> None:
    touch(tmp_path / "text_encoder", "config.json")
    assert not is_here(str(tmp_path), CLIP) and weights_hash(str(tmp_path), CLIP) is None
    touch(tmp_path / "text_encoder", "model.safetensors")
    assert is_here(str(tmp_path), CLIP) and not is_here(str(tmp_path), CLIP, CLIP_TOKENIZER)
    touch(tmp_path / "tokenizer", "vocab.json")
    assert is_here(str(tmp_path), CLIP, CLIP_TOKENIZER)
    assert not is_here(str(tmp_path), AUTOENCODER) and not is_here(str(tmp_path / "nowhere"), CLIP)


def test_the_hash_is_of_the_weights_and_of_the_latents_scale(tmp_path: Path) -> None:
    def saved(name: str, **settings: object) -> str | None:
        HaarAutoencoder(2, **settings).save_pretrained(tmp_path / name)  # type: ignore[arg-type]
        return weights_hash(str(tmp_path / name), AUTOENCODER)

    first = saved("first")
    assert first is not None and saved("second") == first, "the place does not matter"
    config = tmp_path / "second" / "config.json"
    config.write_text(config.read_text().replace('"_diffusers_version"', '"_other"'))
    assert weights_hash(str(tmp_path / "second"), AUTOENCODER) == first
    assert saved("scaled", latents_std=[2.0] * 12) != first
    weights = tmp_path / "first" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert weights_hash(str(tmp_path / "first"), AUTOENCODER) != first


def test_the_files_a_library_would_load(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    touch(tmp_path, "pytorch_model-00002-of-00002.bin", "pytorch_model-00001-of-00002.bin", "model.fp16.safetensors", "README.md")
    assert [path.name for path in weight_files(tmp_path)] == [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    touch(tmp_path, "pytorch_model.bin")
    assert [path.name for path in weight_files(tmp_path)] == ["pytorch_model.bin"]
    touch(tmp_path, "model.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]


def test_a_hub_id_is_looked_for_in_the_hubs_cache_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "1" / "vae"
    touch(snapshot, "config.json", "diffusion_pytorch_model.safetensors")
    monkeypatch.setattr(
        local_weights, "try_to_load_from_cache",
        lambda source, file: str(snapshot / "config.json") if (source, file) == ("owner/name", "vae/config.json") else None,
    )  # fmt: skip
    assert local_folder("owner/name", AUTOENCODER) == snapshot and is_here("owner/name", AUTOENCODER)
    assert weights_hash("owner/name", AUTOENCODER) is not None and not is_here("owner/other", AUTOENCODER)

    def invalid(source: str, file: str) -> None:
        raise HFValidationError("no id")

    monkeypatch.setattr(local_weights, "try_to_load_from_cache", invalid)
    assert local_folder("../no/where", AUTOENCODER) is None


def test_a_broken_config_is_a_users_error(tmp_path: Path) -> None:
    HaarAutoencoder(2).save_pretrained(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(EncoderNotFound, match=r"rdtf.encoders.autoencoder is .*config.json'"):
            weights_hash(str(tmp_path), AUTOENCODER)


def test_a_tokenizers_hash_is_of_what_it_does_not_of_where_it_came_from(encoders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(encoders / "tokenizer", folder)
    first = tokenizer_hash(str(encoders), CLIP_TOKENIZER)
    assert first is not None and tokenizer_hash(str(folder), CLIP_TOKENIZER) == first
    assert tokenizer_hash(str(encoders), T5_TOKENIZER) != first
    assert tokenizer_hash("tiny", CLIP_TOKENIZER) is None and tokenizer_hash(str(tmp_path / "no"), CLIP_TOKENIZER) is None
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"name_or_path": "elsewhere", "transformers_version": "9"}, indent=7))
    assert tokenizer_hash(str(folder), CLIP_TOKENIZER) == first
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": "changed"}))
    assert tokenizer_hash(str(folder), CLIP_TOKENIZER) != first
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_hash(str(folder), CLIP_TOKENIZER) == first
    (folder / "added_tokens.json").write_text("{}")
    assert tokenizer_hash(str(folder), CLIP_TOKENIZER) != first


def test_a_hash_is_remembered_while_the_file_looks_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kept = tmp_path / "weights", tmp_path / "kept"
    path.write_bytes(b"1")
    digest = hashlib.sha256(b"1").hexdigest()
    assert KnownHashes(kept, write=False).sha256(path) == digest and not kept.exists()
    assert KnownHashes(kept).sha256(path) == digest
    stored = kept / "weights.json"
    stored.write_text(stored.read_text().replace(digest, "remembered"))
    assert KnownHashes(kept).sha256(path) == "remembered"
    os.utime(path, ns=(1, 1))
    assert KnownHashes(kept).sha256(path) == digest
    assert set(json.loads(stored.read_text()).values()) == {"remembered", digest}
    path.write_bytes(b"22")
    assert KnownHashes(kept).sha256(path) == hashlib.sha256(b"22").hexdigest()
    for text in ("", "[]", "{"):
        stored.write_text(text)
        assert KnownHashes(kept).sha256(path) == hashlib.sha256(b"22").hexdigest()
    (tmp_path / "file").write_text("")
    assert KnownHashes(tmp_path / "file" / "folder").sha256(path) == hashlib.sha256(b"22").hexdigest(), "it saves time, no more"
