"""The errors a user can meet, each with the exit code of the command line."""


class HfTscError(Exception):
    """Base of all errors of this package: one line that says what was given, what was expected and what to do."""

    exit_code = 1
    everywhere = False  # whether all processes of a training raise it


class UsageError(HfTscError):
    """The input is wrong: a missing folder, classes that do not fit, an option out of range."""

    exit_code = 2


class PurificationError(HfTscError):
    """The work itself failed: a loss that is not finite, a specification that does not verify."""

    exit_code = 1
    everywhere = True  # all processes see the same numbers


class OtherRequestError(UsageError):
    """A folder of checkpoints is of a run with other models, images or arguments."""


class AccuracyBudgetError(HfTscError):
    """No point of the last curve kept the clean accuracy within `max_accuracy_drop`."""

    exit_code = 4
    everywhere = True


class CheckpointError(HfTscError):
    """A checkpoint could not be written: a full disk."""

    exit_code = 1


class ProcessError(HfTscError):
    """Another process of the training failed."""

    exit_code = 1


class SomeFailedError(HfTscError):
    """Some of several models could not be purified; each error was told on its own."""

    exit_code = 3
