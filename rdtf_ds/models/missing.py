"""One clear line when a frozen encoder is not where the config says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rdtf_ds.errors import UserError

T = TypeVar("T")


class EncoderNotFound(UserError):
    """A frozen encoder is neither in the folder nor on the hub under the name given."""

    def __init__(self, role: str, key: str, source: str, reason: str) -> None:
        super().__init__(
            f"{role} not found: {key} is {source!r}: {reason}. Give a folder in diffusers' or transformers' layout, or a hub id; "
            f"without a network, fetch it elsewhere with `hf download {_hub_id(source)} --local-dir FOLDER`, copy FOLDER here and set "
            f"{key} to it (HF_HUB_OFFLINE=1 stops all network attempts)."
        )


def load_part(load: Callable[..., T], source: str, subfolders: Sequence[str], marker: str, role: str, key: str) -> T:
    """Loads one pretrained part by ``load(source, subfolder=...)`` from the first of ``subfolders`` that has it.

    Args:
        load: a ``from_pretrained``.
        source: a folder, or a hub id (``owner/name``) where the subfolders are tried in order.
        subfolders: places inside the source; "" is the source itself.
        marker: the file a folder must have to be this part, for example ``config.json``.
        role: what the part is, for the message.
        key: the config key that named the source, for the message.

    Raises:
        EncoderNotFound: nothing there, or what is there cannot be read.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        subfolders = [sub for sub in subfolders if (folder / sub / marker).is_file()][:1]
        source = str(folder)
        if not subfolders:
            raise EncoderNotFound(role, key, source, f"the folder has no {marker} of it")
    elif folder.exists() or not _looks_like_hub_id(source):
        raise EncoderNotFound(role, key, source, "there is no such folder and it is no hub id (owner/name)")
    failure: Exception | None = None
    for sub in subfolders:
        try:
            return load(source, subfolder=sub) if sub else load(source)
        except Exception as error:  # the hub's, safetensors' and transformers' errors share no base class
            failure = failure or error
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0].rstrip(".")
    raise EncoderNotFound(role, key, source, reason) from failure


def _looks_like_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)


def _hub_id(source: str) -> str:
    return source if _looks_like_hub_id(source) else "OWNER/NAME"
