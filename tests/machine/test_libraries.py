"""Architectures read from libraries: from hand-made files, and from the ones that are installed."""

from __future__ import annotations

import importlib.util
import re
import struct
from pathlib import Path

import pytest
import torch

from rdtf_ds.machine.libraries import architectures

MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2


def entry(kind: int, architecture: int, code: bytes = b"code", header: int = 64) -> bytes:
    """One architecture's kernels."""
    head = struct.pack("<HHIQ", kind, 0x101, header, len(code)) + bytes(12) + struct.pack("<I", architecture)
    return head.ljust(header, b"\0") + code


def fat_binary(*entries: bytes, version: int = 1, header: int = 16) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", MAGIC, version, header, len(body)) + body


def library(folder: Path, data: bytes) -> Path:
    path = folder / "library.so"
    path.write_bytes(data)
    return path


def test_machine_code_comes_first_then_ptx_each_once_and_sorted(tmp_path: Path) -> None:
    first = fat_binary(entry(PTX, 120), entry(MACHINE_CODE, 120), entry(MACHINE_CODE, 70, b"x" * 1000))
    second = fat_binary(entry(MACHINE_CODE, 80), entry(MACHINE_CODE, 70))
    path = library(tmp_path, b"ELF and other things " * 9 + first + b"between" + second + b"after")
    assert architectures(path) == ("sm_70", "sm_80", "sm_120", "compute_120")


def test_an_entry_may_be_as_short_as_its_architecture(tmp_path: Path) -> None:
    assert architectures(library(tmp_path, fat_binary(entry(MACHINE_CODE, 70, b"", header=32)))) == ("sm_70",)


def test_a_library_without_kernels_has_none(tmp_path: Path) -> None:
    assert architectures(library(tmp_path, b"\x7fELF" * 100)) == ()
    assert architectures(library(tmp_path, b"")) == ()


NOT_QUITE = {
    "the number alone": struct.pack("<I", MAGIC),
    "another version": fat_binary(entry(MACHINE_CODE, 70), version=2),
    "another header": fat_binary(entry(MACHINE_CODE, 70), header=24),
    "no kind we know": fat_binary(entry(7, 70)),
    "an entry shorter than its header": fat_binary(entry(MACHINE_CODE, 70)[:31]),
    "an entry with an empty header": fat_binary(entry(MACHINE_CODE, 70).replace(struct.pack("<I", 64), bytes(4), 1)),
}


@pytest.mark.parametrize("data", NOT_QUITE.values(), ids=NOT_QUITE)
def test_what_only_begins_like_a_fat_binary_is_passed_over(tmp_path: Path, data: bytes) -> None:
    assert architectures(library(tmp_path, data)) == ()
    good = fat_binary(entry(MACHINE_CODE, 75))
    assert architectures(library(tmp_path, data + bytes(64) + good)) == ("sm_75",), "and does not hide what follows"


def test_a_library_that_was_cut_off_says_nothing_of_the_binary_that_was_cut(tmp_path: Path) -> None:
    whole = fat_binary(entry(MACHINE_CODE, 75))
    assert architectures(library(tmp_path, whole + fat_binary(entry(MACHINE_CODE, 70)))) == ("sm_70", "sm_75")
    assert architectures(library(tmp_path, whole + fat_binary(entry(MACHINE_CODE, 70))[:-1])) == ("sm_75",)


def test_an_entry_of_an_unknown_kind_ends_its_binary(tmp_path: Path) -> None:
    assert architectures(library(tmp_path, fat_binary(entry(MACHINE_CODE, 75), entry(9, 80), entry(MACHINE_CODE, 90)))) == ("sm_75",)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        architectures(tmp_path / "nothing.so")


def test_bitsandbytes_carries_v100_in_its_libraries_of_cuda_12_alone() -> None:
    """As its maintainers say: Volta was put back into the builds of 12.8 (pull request 1715), and CUDA 13 cannot compile for it."""
    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None and spec.origin is not None
    found = {path.stem.removeprefix("libbitsandbytes_cuda"): architectures(path) for path in Path(spec.origin).parent.glob("*_cuda*.so")}
    assert {version: "sm_70" in listed for version, listed in found.items() if version in ("126", "128", "130")} == {
        "126": True,
        "128": True,
        "130": False,
    }
    assert all("sm_75" in listed and re.fullmatch(r"compute_\d+", listed[-1]) for listed in found.values())


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no kernels")
def test_torch_carries_what_it_says(project_root: Path) -> None:
    said = torch._C._cuda_getArchFlags().split()
    assert set(said) <= set(architectures(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
