"""The checkpoint formats, one file each: `detect` a checkpoint's, see where modules lie (`fusion`), read `Int4Weight`s."""

from twinweight.formats.common import Int4Kind
from twinweight.formats.registry import Format, detect

__all__ = ["Format", "Int4Kind", "detect"]
