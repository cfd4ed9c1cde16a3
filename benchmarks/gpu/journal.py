"""What is finished, one line of JSON each, written the moment it is known: a process that is killed loses nothing."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Journal:
    """Names and outcomes of one commit in the file at ``path``. Entries of other commits stand, and do not count."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path, self.commit = path, commit

    def add(self, name: str, outcome: str, **more: Any) -> Entry:
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        entry = {"name": name, "outcome": outcome, **more, "commit": self.commit, "date": date}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # After a line that a kill has cut short, a new one begins.
        cut_short = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write("\n" * cut_short + json.dumps(entry) + "\n")
        return entry

    def entries(self) -> dict[str, Entry]:
        """The last entry of each name of this commit, in the order of the first."""
        return {entry["name"]: entry for entry in read(self.path) if entry["commit"] == self.commit}

    def begin(self, name: str, most: int = 2) -> bool:
        """Note that ``name`` begins, unless it has ``most`` times and never ended: it blocks or kills its process."""
        mine = [entry for entry in read(self.path) if entry["commit"] == self.commit and entry["name"] == name]
        begun = sum(entry["outcome"] == "begun" for entry in mine)
        may = begun < most
        self.add(name, "begun" if may else "failed", **({} if may else {"text": f"begun {begun} times, never ended"}))
        return may


def read(path: Path) -> Iterator[Entry]:
    """Every entry of the file. A last line that a kill has cut short is passed over."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield entry
