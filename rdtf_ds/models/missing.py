"""Finds a part of a frozen encoder in a folder or on the hub; one clear line when it is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from rdtf_ds.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One loadable part: what it is, the config key that names its source, and where in a source it is looked for.

    ``subfolders`` are tried in order ("" is the source itself); having any file of ``markers`` makes one of them the place.
    """

    role: str
    key: str
    example: str  # a hub id that has it
    subfolders: tuple[str, ...]
    markers: tuple[str, ...] = ("config.json",)


class EncoderNotFound(UserError):
    """A frozen encoder is neither in the folder nor on the hub under the name given, or cannot be read."""

    def __init__(self, part: Part, source: str, reason: str) -> None:
        places = " or in ".join(["at its root", *(f"{sub}/" for sub in part.subfolders if sub)])
        super().__init__(
            f"{part.role} not found: {part.key} is {source!r}, but {reason.rstrip('.')}. Download it where there is a network with "
            f"`hf download {part.example} --local-dir FOLDER` (or another of its kind), put FOLDER on this machine and set {part.key} "
            f"to it (the files lie {places}); a copy in the hub's cache is used without a network under "
            "HF_HUB_OFFLINE=1."
        )


def load_part(load: Callable[..., T], source: str, part: Part) -> T:
    """Loads one pretrained part by ``load(source, subfolder=...)`` from a folder or a hub id (``owner/name``).

    Raises:
        EncoderNotFound: nothing there, or what is there cannot be read.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        found = [sub for sub in part.subfolders if any((folder / sub / marker).is_file() for marker in part.markers)]
        if not found:
            raise EncoderNotFound(part, source, f"this folder has no {' or '.join(part.markers)} of it")
        place, source = found[0], str(folder)
    elif folder.exists() or not _is_hub_id(source):
        raise EncoderNotFound(part, source, "that is neither a folder nor a hub id (owner/name)")
    else:
        place = _place_on_hub(source, part)
    try:
        return load(source, subfolder=place) if place else load(source)
    except Exception as error:  # the hub's, safetensors' and transformers' errors share no base class
        raise EncoderNotFound(part, source, f"loading it fails: {_first_line(error)}") from error


def _place_on_hub(source: str, part: Part) -> str:
    """The subfolder of a hub repository that holds the part; what is cached wins, so that nothing is asked of the network."""
    names = {sub: [f"{sub}/{marker}".lstrip("/") for marker in part.markers] for sub in part.subfolders}
    try:
        for sub, files in names.items():
            if any(isinstance(try_to_load_from_cache(source, file), str) for file in files):
                return sub
        for sub, files in names.items():
            for file in files:
                try:
                    hf_hub_download(source, file)
                    return sub
                except LocalEntryNotFoundError:
                    raise
                except EntryNotFoundError:
                    continue
    except LocalEntryNotFoundError as error:
        raise EncoderNotFound(part, source, "it is not in the hub's cache and the hub cannot be reached") from error
    except (OSError, HFValidationError) as error:
        raise EncoderNotFound(part, source, f"the hub answers: {_first_line(error)}") from error
    raise EncoderNotFound(part, source, f"this hub repository has no {' or '.join(part.markers)} of it")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)
