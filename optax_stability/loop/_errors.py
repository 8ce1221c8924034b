"""Why a run has ended before its last step, in one sentence."""


class FailedError(Exception):
    """The run has failed, and the message says why."""


class DivergedError(FailedError):
    """The loss diverged, and returning to older checkpoints did not help."""


class NotSavedError(FailedError):
    """The last checkpoint of the run could not be saved."""
