"""Errors that a user can cure. Each message names what is wrong, what was found, and what to do.

::

    PipeError
    ├── ConfigError (ValueError)       a parameter is unknown, of the wrong type or out of range
    ├── DataError (ValueError)         metadata or media; names the file and the row
    ├── ModelError (ValueError)        weights, tokenizer or LoRA targets
    │   └── ModelFileMissing (FileNotFoundError)
    ├── CacheMismatch (ValueError)     a cache that is whole but was made for another model
    └── LaunchError (RuntimeError)     the training processes ended badly, or the engine is not what was asked for
        └── RunDirBusy                 another process trains into this run directory

``cache_store`` has a tree of its own under ``CacheError``. The command line turns both into one line and exit code 2.
"""

from cache_store.contract import CacheError


class PipeError(Exception):
    """Base of the errors that this package raises on purpose."""


class ConfigError(PipeError, ValueError):
    """A parameter is unknown, of the wrong type or out of range."""


class DataError(PipeError, ValueError):
    """Metadata or media cannot be used; the message names the file and the row."""


class ModelError(PipeError, ValueError):
    """Weights, tokenizer or LoRA targets cannot be used."""


class ModelFileMissing(ModelError, FileNotFoundError):
    """A model file is not on this machine and was not downloaded."""


class CacheMismatch(PipeError, ValueError):
    """The cache is whole, but another model made it."""


class LaunchError(PipeError, RuntimeError):
    """The training processes ended badly, or the engine is not what was asked for."""


class RunDirBusy(LaunchError):
    """Another process trains into this run directory."""


class TrainingStopped(Exception):
    """A signal asked for the end; what was trained is saved, and the same command goes on from there.

    Attributes:
        step: The last optimizer step.
        signal_number: What came; None if another rank got it.
    """

    def __init__(self, step: int, signal_number: int | None) -> None:
        super().__init__(f"stopped after step {step}; the same command goes on")
        self.step = step
        self.signal_number = signal_number


USER_ERRORS: tuple[type[Exception], ...] = (PipeError, CacheError)
