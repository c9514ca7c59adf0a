"""How a generation can end other than with its pictures."""


class Failed(Exception):
    """A reason that clients are told; `kind` is its stable name. `again`: another attempt may fare better."""

    kind = "error"
    again = False


class EngineBroke(Failed):
    """A step failed as a whole: nobody's request is to blame, and this process is not to be trusted any more."""

    again = True


class TimedOut(Failed):
    kind = "timeout"


class Stopped(Failed):
    """By an operator, with RQ's stop command."""

    kind = "stopped"


class Expired(Exception):
    """`expires_in` has passed."""


class ModelUnavailable(Failed):
    """The model cannot be loaded on this worker."""

    kind = "model-unavailable"


class NotStored(Failed):
    """The blob store did not take a picture, or did not give one back."""

    kind = "not-stored"
    again = True


class OutOfMemory(Failed):
    """It did not fit on the device even alone."""

    kind = "out-of-memory"


class NotFinite(Failed):
    """The net overflowed: another attempt would as well."""

    kind = "not-finite"
