"""The exception tree; every message is one line: what, got, wanted, what to do.

HotcoldError
├── FormatError            a file breaks its own format (names file, field, got, wanted)
├── UnsupportedError       a valid file that needs something hotcold does not have
├── ModelNotFoundError     a path, alias or hf: reference that leads nowhere
├── DownloadError          a model could not be fetched or failed verification
├── TemplateError          a chat template that raised, or tried to leave its sandbox
├── ContextLengthError     prompt and answer do not fit the context
├── BusyError              too many answers wait already (retry_after: seconds)
├── ParameterError         an argument out of range (also a ValueError)
├── StorageError           a folder or file that cannot be written
├── SectionError           a section that is not there, is damaged, or belongs to another model
├── TrainingError          a training whose losses are no numbers
├── GPUError               a GPU that cannot be used, is out of memory, or failed
└── ClosedError            a model used after close()
"""

from __future__ import annotations


class HotcoldError(Exception):
    """Root of every error that hotcold raises on purpose."""


class FormatError(HotcoldError):
    """A file breaks the format that it claims to have."""

    def __init__(self, file: object, field: str, got: object, wanted: object) -> None:
        self.file, self.field, self.got, self.wanted = str(file), field, got, wanted
        super().__init__(f"{file}: {field}: got {got}, wanted {wanted}")


class UnsupportedError(HotcoldError):
    """A valid file or setting that needs something hotcold does not have."""


class ModelNotFoundError(HotcoldError):
    """A model name that is no file, alias or hf: reference."""


class DownloadError(HotcoldError):
    """A model could not be fetched, or what came does not match its digest."""


class TemplateError(HotcoldError):
    """A chat template that is malformed, raised, or tried to leave its sandbox."""


class ContextLengthError(HotcoldError):
    """More tokens than the context holds."""


class BusyError(HotcoldError):
    """More answers wait than the queue takes."""

    retry_after = 1  # seconds after which asking again makes sense


class ParameterError(HotcoldError, ValueError):
    """An argument out of its range or of the wrong kind."""


class StorageError(HotcoldError):
    """A folder or file of hotcold's own that cannot be written."""


class SectionError(HotcoldError):
    """A section that is not there, is damaged, or belongs to another model."""


class TrainingError(HotcoldError):
    """A training whose losses are no numbers any more."""


class GPUError(HotcoldError):
    """A GPU that is missing or too old, whose memory is exhausted, or on which something failed."""


class ClosedError(HotcoldError):
    """A model or file used after close()."""
