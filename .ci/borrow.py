"""Links to a package and all it needs, from this interpreter's environment: python borrow.py PACKAGE FOLDER.

A folder with nothing else in it can lend the package to another environment, which a whole site-packages cannot: there
pip would find everything installed already, and what a wheel forgets to ask for would go unnoticed.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def closure(package: str, seen: set[str]) -> set[str]:
    """The package and what it needs, as far as it is installed."""
    try:
        needs = distribution(package).requires or []
    except PackageNotFoundError:
        return seen
    seen.add(package)
    for requirement in map(Requirement, needs):
        if requirement.name not in seen and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            closure(requirement.name, seen)
    return seen


def lend(package: str, folder: Path) -> None:
    """Fill a new folder with links."""
    folder.mkdir()
    for name in closure(package, set()):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            target = folder / top
            if not target.exists():
                target.symlink_to(Path(str(distribution(name).locate_file(top))))


lend(sys.argv[1], Path(sys.argv[2]))
