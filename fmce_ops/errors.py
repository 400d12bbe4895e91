"""Errors that a user can cause: each message is one sentence that says what, where, what to do."""


class FmceError(Exception):
    """Base of every error that a user can cause; the command line prints it and exits 2."""


class ParamsError(FmceError):
    """A parameter is unknown or has a value that cannot be used."""


class DataError(FmceError):
    """A data set is missing, damaged or not what the parameters promise."""


class ShardError(FmceError):
    """A shard, or the manifest that vouches for it, cannot be trusted."""


class MarkerError(FmceError):
    """The loss curve does not yield the epoch markers that were asked for."""


class TrainingError(FmceError):
    """Training cannot go on, for example because the loss is not finite."""


class ModelError(FmceError):
    """A network, checkpoint or model folder is missing, damaged or does not fit."""


class ReverseError(FmceError):
    """A module cannot be reversed, or its input, target or labels do not fit it."""


class TrackingError(FmceError):
    """The tracking store does not hold what was asked of it, or cannot be reached."""


class DiskError(FmceError):
    """A file could not be written."""
