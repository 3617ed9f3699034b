"""The errors this package raises on purpose.

A closed set, so that a caller can tell a wrong setting from a damaged file. Each message is one line that says which
option or tensor, what it was, what is allowed, and what to do; the command line prints it as it is. Anything else that
escapes is a bug in `vptq`.
"""


class VPTQError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(VPTQError, ValueError):
    """A setting is impossible: a spec, a layer's dimensions, a model or output path."""


class CheckpointError(VPTQError):
    """A stored checkpoint is missing, damaged, inconsistent with its config, or cannot be written."""


class BackendError(VPTQError):
    """A kernel backend was asked for by name and cannot be used here."""


class CalibrationError(VPTQError):
    """The calibration data or the Hessians made from it cannot be used."""
