"""The results of tests as JUnit XML, whole at any moment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.journal import Entry

# What XML 1.0 has no place for.
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
ELEMENTS = {"failed": "failure", "skipped": "skipped"}


def write_xml(path: Path, entries: Iterable[Entry]) -> None:
    """Replace the file at ``path`` in one step: who reads it never sees half of it."""
    found = list(entries)
    suite = ElementTree.Element("testsuite", name=path.stem, tests=str(len(found)))
    for outcome, attribute in (("failed", "failures"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(entry["outcome"] == outcome for entry in found)))
    for entry in found:
        classname, _, name = entry["name"].partition("::")
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name, time=str(entry["seconds"]))
        if entry["outcome"] in ELEMENTS:
            ElementTree.SubElement(case, ELEMENTS[entry["outcome"]]).text = FORBIDDEN.sub("?", entry.get("text", ""))
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(suite).write(part, encoding="unicode")
    os.replace(part, path)
