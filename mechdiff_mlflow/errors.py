"""The one error that users see."""


class MechdiffError(Exception):
    """A problem the user can mend: one sentence saying what is wrong, with values, then what to do."""
