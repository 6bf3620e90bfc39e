"""Paths of images that are inside other files: in a tar file, or in a row of a dataset."""

import sys
from collections.abc import Callable
from io import BytesIO
from typing import Any

if sys.platform == "win32":
    from pathlib import WindowsPath as _Path
else:
    from pathlib import PosixPath as _Path


class PackedPath(_Path):
    """The path of an image inside another file, such as ``shard.tar/cat/1.jpg``, which is opened like that of a file.

    >>> path = PackedPath("shard.tar/cat/1.jpg").holding(b"GIF89a".upper)
    >>> path.name, path.open().read(), path.is_file()
    ('1.jpg', b'GIF89A', True)
    """

    read: Callable[[], bytes] | None = None

    def holding(self, read: Callable[[], bytes]) -> "PackedPath":
        """Return this path of contents that ``read``, which can be pickled, returns."""
        path = type(self)(str(self))
        path.read = read
        return path

    def open(self, *arguments: Any, **settings: Any) -> Any:
        """Open the contents for reading bytes; a folder above the image is that of the file system."""
        return super().open(*arguments, **settings) if self.read is None else BytesIO(self.read())

    def is_file(self, **settings: Any) -> bool:
        """Return True for contents."""
        return self.read is not None or super().is_file(**settings)

    def __reduce__(self) -> Any:
        """Keep the contents in a copy or in another process."""
        return type(self), (str(self),), vars(self)
