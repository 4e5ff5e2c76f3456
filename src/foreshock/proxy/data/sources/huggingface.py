"""A dataset of the Hugging Face hub, read through the `datasets` library."""

from collections.abc import Iterator
from dataclasses import dataclass

from foreshock.core.config import Json
from foreshock.core.errors import DataError, require
from foreshock.proxy.data.source import TextSource


@dataclass(frozen=True, kw_only=True)
class Huggingface(TextSource):
    """A text column of a dataset, streamed: only what is needed is fetched. A document is a row."""

    dataset: str = ""
    """Name on the hub, or a local folder that `datasets.load_dataset` takes."""
    subset: str | None = None
    """Name of the configuration, where the dataset has several."""
    split: str = "train"
    """Split to read."""
    text_field: str = "text"
    """Column of the text."""

    def __post_init__(self) -> None:
        require(self.dataset != "", "huggingface:dataset", "must name a dataset: hf:NAME", self.dataset)

    def stamp(self, limit: int) -> Json:
        """Only the options: tokens fetched once are kept, the hub is not asked again."""
        del limit

    def documents(self, limit: int) -> Iterator[bytes]:
        """The rows' texts, the last one cut at the limit."""
        for row in self._rows():
            if not isinstance(row.get(self.text_field), str):
                raise DataError(
                    f"data.source: {self.dataset!r} has no text column {self.text_field!r}, but"
                    f" {', '.join(row)}; set text_field"
                )
            document = row[self.text_field].encode(errors="replace")[:limit]
            limit -= len(document)
            yield document
            if limit <= 0:
                return

    def _rows(self) -> Iterator[dict[str, Json]]:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                "data.source: Hugging Face datasets need the library `datasets`; pip install foreshock[hf]"
            ) from error
        try:
            rows = datasets.load_dataset(self.dataset, self.subset, split=self.split, streaming=True)
            yield from rows
        # The library raises many kinds: a missing dataset, no network, a script it refuses.
        except Exception as error:
            raise DataError(f"data.source: cannot read the dataset {self.dataset!r}: {error}") from error
