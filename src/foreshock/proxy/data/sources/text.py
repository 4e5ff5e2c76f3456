"""A text file, or a directory of text files."""

import codecs
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foreshock.core.config import Json
from foreshock.core.errors import DataError, require
from foreshock.proxy.data.source import TextSource, existing_file, file_stamps, unreadable


@dataclass(frozen=True, kw_only=True)
class Text(TextSource):
    """One text file, or every UTF-8 file below a directory, sorted by path; a document is a file.

    Hidden files are left out, and so are binary files in a directory.
    """

    path: str = ""
    """The file or directory."""

    def __post_init__(self) -> None:
        require(self.path != "", "text:path", "must name a file or directory: text:path=corpus.txt", self.path)

    def stamp(self, limit: int) -> Json:
        """Size and modification time of every file."""
        del limit
        return file_stamps(self._files())

    def documents(self, limit: int) -> Iterator[bytes]:
        """The files' bytes, the last one cut at the limit."""
        found = False
        for path in self._files():
            try:
                with path.open("rb") as file:
                    content = file.read(min(limit, path.stat().st_size))
            except OSError as error:
                raise unreadable(path, error) from error
            if _is_text(content):
                found = True
                limit -= len(content)
                yield content
            if limit <= 0:
                return
        if not found:
            raise DataError(f"data.source: {self.path!r} holds no UTF-8 text, only binary files; give text, or a .bin")

    def _files(self) -> list[Path]:
        root = Path(self.path)
        if not root.is_dir():
            return [existing_file(self.path)]
        files = sorted(_visible_files(root))
        if not files:
            raise DataError(f"data.source: the directory {self.path!r} is empty; give one that holds text files")
        return files


def _visible_files(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in files if path.is_file())


def _is_text(content: bytes) -> bool:
    """Whether the bytes begin a UTF-8 text; a last character cut short is no fault."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError:
        return False
    return content != b"" and b"\0" not in content
