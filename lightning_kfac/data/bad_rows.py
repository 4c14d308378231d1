"""Rows that cannot be used: an error, or skipped and counted."""

from lightning_kfac.errors import InputError
from lightning_kfac.progress import say


class BadRows:
    """What to do with rows that cannot be used.

    Args:
        skip: Leave them out and count them; otherwise the first one is an error.

    Example:
        >>> bad = BadRows(skip=True)
        >>> bad.meet(InputError("rows.jsonl, line 2: the suffix is empty"))
        >>> bad.count
        1
    """

    def __init__(self, skip: bool = False):
        self.skip, self.count, self.first = skip, 0, None

    def meet(self, error: InputError) -> None:
        """One bad row. Raises the error where rows are not skipped."""
        if not self.skip:
            raise error
        self.count += 1
        self.first = self.first or error

    def tell(self, source: object) -> None:
        """Says how many rows were skipped, and why the first."""
        if self.count:
            say(f"{source}: {self.count:,} bad rows skipped; the first: {self.first}")
