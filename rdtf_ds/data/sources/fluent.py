"""What the file names of Microsoft's Fluent emoji say: a caption in plain English, and the emoji that its variants have in common.

A file is named after its code points in hex, such as ``1f44b-1f3fd.webp``. Skin tones, genders, hair and the side that is faced make
variants of one picture, which must not be parted by a split (code points: Unicode Technical Standard #51, "Emoji Modifiers" and
"Emoji ZWJ Sequences").
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from rdtf_ds.errors import UserError

_JOINER, _PICTURE_STYLE, _END_OF_TAGS = "\u200d", "\ufe0f", "\U000e007f"
_SKIN_TONES = "\U0001f3fb-\U0001f3ff"
_TAGS = "\U000e0020-\U000e007e"
_PERSON = "\U0001f9d1"
# What a joiner may be followed by that makes a variant: red, curly, no, white hair; female, male; facing right.
_VARIANT = re.compile(f"[{_SKIN_TONES}]|{_JOINER}[\U0001f9b0-\U0001f9b3\u2640\u2642\u27a1]")
# Pictures of two people, or two hands, have a code point of their own and a sequence that tells the two apart.
_PAIRS = {
    f"{_PERSON}{_JOINER}\U0001f91d{_JOINER}{_PERSON}": ("\U0001f46b", "\U0001f46c", "\U0001f46d"),  # holding hands
    f"{_PERSON}{_JOINER}\u2764{_JOINER}\U0001f48b{_JOINER}{_PERSON}": ("\U0001f48f",),  # kiss
    f"{_PERSON}{_JOINER}\u2764{_JOINER}{_PERSON}": ("\U0001f491",),  # couple with heart
    f"\U0001faf1{_JOINER}\U0001faf2": ("\U0001f91d",),  # handshake
}
_SAME = {single: sequence for sequence, singles in _PAIRS.items() for single in singles}
_COUPLE = re.compile(r"^(kiss|couple with heart) (man|woman|person) (man|woman|person)\b")
_TONE = re.compile(r" ((?:medium-)?(?:light|dark)|medium) skin tone(?= |$)")


@dataclass(frozen=True, slots=True)
class EmojiName:
    """What a file name says.

    Attributes:
        caption: Such as "waving hand, medium skin tone".
        group: The emoji without its variants, as code points in hex: ``1f44b``.
        known: Whether the caption is the emoji's own name; else it is put together from the code points, or from the file's name.
    """

    caption: str
    group: str
    known: bool


class EmojiNames:
    """Reads file names, with the English names of PyPI's package ``emoji``.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from emoji import EMOJI_DATA
        except ImportError:
            raise UserError(
                "The captions come from PyPI's package 'emoji', which is not installed. Type: pip install 'emoji>=2.16,<3'"
            ) from None
        self._names = {sequence.replace(_PICTURE_STYLE, ""): entry["en"] for sequence, entry in EMOJI_DATA.items()}

    def read(self, stem: str) -> EmojiName:
        """What a file name without its suffix says; a name that is no code points is its own caption and group."""
        try:
            sequence = "".join(chr(int(part, 16)) for part in re.split("[-_]", stem))
        except (ValueError, OverflowError):
            return EmojiName(" ".join(re.split(r"[\W_]+", stem)).strip() or stem, stem, known=False)
        sequence = sequence.replace(_PICTURE_STYLE, "")
        if re.search(f"[{_TAGS}]$", sequence):
            sequence += _END_OF_TAGS  # flags of regions are filed without it
        name = self._names.get(sequence)
        return EmojiName(_spelled(sequence) if name is None else plain(name), base_of(sequence), known=name is not None)


def plain(name: str) -> str:
    """``:waving_hand_medium_skin_tone:`` as a person would write it: "waving hand, medium skin tone"."""
    words = _COUPLE.sub(r"\1, \2, \3", name.strip(":").replace("_", " ").replace("’", "'"))
    return _TONE.sub(r", \1 skin tone,", words).rstrip(",").replace(",,", ",")


def base_of(sequence: str) -> str:
    """The emoji that variants have in common, as code points in hex, joined by "-"."""
    base = _VARIANT.sub("", sequence.replace(_PICTURE_STYLE, "")).replace("\U0001f468", _PERSON).replace("\U0001f469", _PERSON)
    return "-".join(f"{ord(point):x}" for point in _SAME.get(base, base))


def _spelled(sequence: str) -> str:
    """The names Unicode gives the single code points; what has no name, or shows nothing by itself, is left out."""
    shown = [unicodedata.name(point, "").lower() for point in re.sub(f"[{_JOINER}{_END_OF_TAGS}{_TAGS}]", "", sequence)]
    return ", ".join(filter(None, shown)) or "emoji"
