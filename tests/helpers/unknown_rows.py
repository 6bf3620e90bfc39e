"""A dataset of which nothing is known before its rows are loaded."""

from typing import Any

from torch.utils.data import Dataset


class UnknownRows(Dataset[Any]):
    """Rows that are not known to be the same each time, so that nothing is cached; nor are their targets known."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]
