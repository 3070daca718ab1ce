"""A source of text and the setting that names it, for messages."""

from dataclasses import dataclass

from nitp_titan.data.mixtures import TextSource
from nitp_titan.data.text_files import TextError
from nitp_titan.errors import UserError


@dataclass(frozen=True)
class ConfiguredSource:
    """A source and the setting in a config that names it."""

    source: TextSource
    table: str
    key: str | None = None
    prefix: str = ""

    @property
    def name(self) -> str:
        return self.source.dataset_path or self.source.dataset

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"[{self.table}] {self.prefix}{key}{message}", table=self.table, key=self.key or key)

    def text_error(self, error: TextError) -> UserError:
        """The error of a local file, with the setting that names it or its field."""
        if error.is_field:
            return self.error("text_field", f" = {self.source.text_field!r}: {error}")
        return self.error("dataset_path", f": {error}")

    @property
    def fields(self) -> list[str]:
        """Names of the fields that hold the text."""
        fields = self.source.text_field
        return [fields] if isinstance(fields, str) else fields
