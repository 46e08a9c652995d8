"""What is remembered of each record of a file: on the disk, since memory would grow with it."""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Iterator
from typing import Any

from dcod_jax.errors import DcodError

_MEMORY = 16 << 10  # KiB that are held before anything goes to the disk


class Kept:
    """A mapping of names to numbers or texts, in a temporary file that ends with its process.

    The file is where SQLite has its own: in SQLITE_TMPDIR, TMPDIR or /var/tmp. Raises DcodError
    where it cannot be written.
    """

    def __init__(self) -> None:
        # The collector may end it, in any thread, and must not reach the connection first.
        self._file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        weakref.finalize(self, self._file.close)
        for command in (
            f"pragma cache_size=-{_MEMORY}",
            "pragma journal_mode=off",
            "create table kept (place integer primary key, name blob unique, value)",
            "begin",
        ):
            self._run(command)

    def _run(self, command: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return self._file.execute(command, values).fetchall()
        except sqlite3.Error as error:
            raise DcodError(
                f"the names of earlier records cannot be kept in a temporary file: {error}; free "
                "space, or set TMPDIR to a directory that has some"
            ) from error

    def get(self, name: str | bytes, default: Any = None) -> Any:
        """The value under a name, or the default."""
        found = self._run("select value from kept where name = ?", _as_bytes(name))
        return found[0][0] if found else default

    def __contains__(self, name: str | bytes) -> bool:
        return self.get(name) is not None

    def __setitem__(self, name: str | bytes, value: int | str) -> None:
        self._run(
            "insert into kept (name, value) values (?, ?) "
            "on conflict (name) do update set value = excluded.value",
            *(_as_bytes(name), value),
        )

    def add(self, name: str | bytes) -> bool:
        """Keep a name with the number 1; whether it is new."""
        before = self._file.total_changes
        self._run("insert or ignore into kept (name, value) values (?, 1)", _as_bytes(name))
        return self._file.total_changes > before

    def __iter__(self) -> Iterator[str]:
        """The names in the order in which they came."""
        place = 0
        command = "select place, name from kept where place > ? order by place limit 1000"
        while found := self._run(command, place):
            yield from (name.decode("utf-8", "surrogatepass") for _, name in found)
            place = found[-1][0]


def _as_bytes(name: str | bytes) -> bytes:
    return name if isinstance(name, bytes) else name.encode("utf-8", "surrogatepass")
