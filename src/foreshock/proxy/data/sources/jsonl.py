"""JSON lines with a text field."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from foreshock.core.config import Json
from foreshock.core.errors import DataError, require
from foreshock.proxy.data.source import TextSource, existing_file, file_stamps, unreadable


@dataclass(frozen=True, kw_only=True)
class Jsonl(TextSource):
    """A file of JSON objects, one a line; a document is one line's text field. Blank lines are left out."""

    path: str = ""
    """The file."""
    text_field: str = "text"
    """Key of the text in each object."""

    def __post_init__(self) -> None:
        require(self.path != "", "jsonl:path", "must name a file: jsonl:path=corpus.jsonl", self.path)

    def stamp(self, limit: int) -> Json:
        """Size and modification time of the file."""
        del limit
        return file_stamps([existing_file(self.path)])

    def documents(self, limit: int) -> Iterator[bytes]:
        """The texts, the last one cut at the limit."""
        path = existing_file(self.path)
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        document = self._text(line, number)[:limit]
                        limit -= len(document)
                        yield document
                    if limit <= 0:
                        return
        except OSError as error:
            raise unreadable(path, error) from error

    def _text(self, line: bytes, number: int) -> bytes:
        where = f"data.source: line {number} of {self.path!r}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}); give one JSON object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get(self.text_field), str):
            texts = [key for key, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            fix = f"name the key of the text: --data jsonl:path={self.path},text_field={[*texts, 'KEY'][0]}"
            raise DataError(f"{where} has no text {self.text_field!r}, but {keys or 'nothing'}; {fix}")
        text: str = row[self.text_field]
        return text.encode(errors="replace")
