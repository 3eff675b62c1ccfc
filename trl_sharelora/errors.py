"""The errors this package raises: one small family, each a `ValueError`.

A message says what came, what was needed, the likely cause and the remedy. Catch [`ShareLoraError`] for all of them.
"""


class ShareLoraError(ValueError):
    """Base of every error raised by trl_sharelora."""


class ConfigError(ShareLoraError):
    """A configuration value is unknown, out of range or contradicts another."""


class UserIdError(ShareLoraError):
    """A user id is not usable: wrong type, blank, too long, or the same as another after normalisation."""


class UnknownUserError(ShareLoraError):
    """A user id or user index is not in the registry."""


class DataError(ShareLoraError):
    """A preference dataset cannot be trained on: missing columns, or rows that are empty, not text or not finite."""


class RoutingError(ShareLoraError):
    """The rows of a batch cannot be matched with their users: no ids, or another number of ids than rows."""


class AdapterMismatchError(ShareLoraError):
    """A saved adapter does not fit the model it is loaded onto."""


class NonFiniteError(ShareLoraError):
    """A reward or a gradient is NaN or infinite; nothing has been updated."""


class BankError(ShareLoraError):
    """The users' rows on disk are torn, of another adapter or of another version."""


class BankBusyError(BankError):
    """Another process writes into the same folder of users' rows."""


class BankFullError(BankError):
    """The disk is full; nothing has been overwritten and no row is lost."""


class CapacityError(ShareLoraError):
    """More users at once than the working set has slots, or a row beyond the users of the adapter."""


class PessimismError(ShareLoraError):
    """A pessimistic reward was asked for whose set was never fitted, or does not fit the model, the data or the reference."""


class SubspaceError(ShareLoraError):
    """A subspace or spectrum that does not exist or is not comparable: k above the rank, one user only, other shapes."""


class MethodError(ShareLoraError):
    """An unknown method, a warm start that does not fit, or a comparison that cannot be made or resumed."""


class UnsupportedError(ShareLoraError):
    """Something TRL, PEFT or torch can do that is meaningless or untested with personal parameters; refused by name."""


def some_rows(rows: list[int], limit: int = 10) -> str:
    """Row numbers for a message: the first `limit` of them and how many there are in all.

    ```python
    >>> some_rows([3, 7])
    'rows 3, 7'
    >>> some_rows(list(range(100)), limit=3)
    'rows 0, 1, 2, ... (100 in all)'
    ```
    """
    shown = ", ".join(str(row) for row in rows[:limit])
    word = "row" if len(rows) == 1 else "rows"
    return f"{word} {shown}" + (f", ... ({len(rows)} in all)" if len(rows) > limit else "")
