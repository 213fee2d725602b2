"""What ends a run before its last step, one class for each thing that a launcher treats differently."""


class NotFinite(RuntimeError):
    """Too many updates in a row were skipped because loss or gradient was not finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step
        """The last of the steps whose update was skipped."""


class Diverged(RuntimeError):
    """Devices that hold the same part of the state hold different values."""


class Damaged(RuntimeError):
    """A saved state is not what was saved; `Checkpoints.restore_newest` raises it once no good one is left."""


class StorageError(RuntimeError):
    """The disk is full, gone or unreadable: what is saved stays as it is, nothing more can be saved or read."""
