"""The exception tree of eopc: every mistake a user can make has one type and one sentence.

EopcError                 exit code 1 unless said otherwise
├── UsageError            the command line or an argument is malformed (exit 2 only where click says so)
├── BudgetError           a joule budget is malformed or cannot be met
├── DeviceError           unknown device, or a device profile that does not fit the request
│   └── MeterLostError    a power meter stopped answering while it was needed
├── ModelError            a checkpoint that cannot be read or is not supported
├── BundleError           a bundle that is missing, damaged, or of another schema
├── PromptError           a prompt that cannot be run (empty, longer than the context)
├── ParityError           an exported graph that does not compute what the model computes
└── MissingExtraError     an optional dependency is not installed; the message names the extra
"""

from __future__ import annotations


class EopcError(Exception):
    """Base of all errors a user can meet; the CLI prints it as one message and exits with 1."""


class UsageError(EopcError):
    """An argument is malformed; the message shows the expected form."""


class BudgetError(EopcError):
    """A joule budget is malformed, or no tier fits it; the message names the smallest that would do."""


class DeviceError(EopcError):
    """The device is unknown, or its profile does not allow the request."""


class MeterLostError(DeviceError):
    """A power meter that was answering stopped; the message says which and since when."""


class ModelError(EopcError):
    """The checkpoint cannot be read, or its architecture is not supported."""


class BundleError(EopcError):
    """The bundle is missing, damaged, or written by another schema."""


class PromptError(EopcError):
    """The prompt cannot be run as given."""


class ParityError(EopcError):
    """An exported graph does not compute what the PyTorch model computes."""


class MissingExtraError(EopcError):
    """An optional dependency is not installed; the message gives the install line."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(
            f'{what} needs the {extra} extra ({package} is not installed). Run: pip install "eopc[{extra}]"'
        )
