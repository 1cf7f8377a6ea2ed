"""The exception tree of eopc: every mistake a user can make has one type and one sentence.

EopcError                 exit code 1 unless said otherwise
├── UsageError            the command line or an argument is malformed (exit 2 only where click says so)
├── BudgetError           a joule budget is malformed or cannot be met
├── DeviceError           unknown device, a profile that does not fit the request, or no power to read
│   ├── MeterLostError    a power meter stopped delivering while a window was open
│   ├── DeviceMemoryError no memory is left for what was asked, on a GPU or here
│   └── DeviceLostError   a GPU stopped answering; nothing works on it until the process ends
├── ModelError            a checkpoint that cannot be read or is not supported
├── BundleError           a bundle that is missing, damaged, or of another schema
│   ├── EngineMismatchError   a TensorRT plan that was built for another machine, version or graph
│   └── SignatureError    a bundle that is not signed by the key it should be, or was changed since
├── PromptError           a prompt that cannot be run (empty, longer than the context)
├── SequenceError         a running sequence failed; others go on
│   └── SequenceCancelledError   it was cancelled, or what it ran on was closed
├── RetryLaterError       possible, but not now; it says in how many seconds
│   ├── QueueFullError    too many sequences wait already
│   └── AllowanceError    the joules allowed over time are used up
├── DrainingError         no new sequences are taken, since this process is about to end
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
    """The device is unknown, its profile does not allow the request, or its power cannot be read."""


class MeterLostError(DeviceError):
    """A power meter stopped delivering in an open window; what it measured so far cannot be relied on."""


class DeviceMemoryError(DeviceError):
    """No memory is left, on a GPU or on this machine; the message says for what."""


class DeviceLostError(DeviceError):
    """A GPU stopped answering, or its context is corrupt: no call succeeds on it until the process ends."""


class ModelError(EopcError):
    """The checkpoint cannot be read, or its architecture is not supported."""


class BundleError(EopcError):
    """The bundle is missing, damaged, or written by another schema."""


class EngineMismatchError(BundleError):
    """A TensorRT plan does not fit this machine or bundle; the message names what differs and how to rebuild."""


class SignatureError(BundleError):
    """The bundle is not signed, or not by this key, or is not what was signed."""


class PromptError(EopcError):
    """The prompt cannot be run as given."""


class SequenceError(EopcError):
    """A running sequence failed; the message says with what, and other sequences go on."""


class SequenceCancelledError(SequenceError):
    """A sequence was cancelled before its end."""


class RetryLaterError(EopcError):
    """What was asked for can be had later; `retry_after_s` estimates in how many seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(RetryLaterError):
    """Too many sequences wait already."""


class AllowanceError(RetryLaterError):
    """Joules allowed over time are used up; they are there again after `retry_after_s`."""


class DrainingError(EopcError):
    """No new sequences are taken: those that run are finished, and then the process ends."""


class ParityError(EopcError):
    """An exported graph does not compute what the PyTorch model computes."""


class MissingExtraError(EopcError):
    """An optional dependency is not installed; the message gives the install line."""

    def __init__(self, what: str, package: str, extra: str, hint: str = "") -> None:
        super().__init__(
            f'{what} needs the {extra} extra ({package} is not installed). Run: pip install "eopc[{extra}]"{hint}'
        )
