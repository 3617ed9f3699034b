"""Python and the packages: versions against what this package's metadata asks for."""

from __future__ import annotations

import importlib
import json
import platform
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import vptq
from vptq.doctor.finding import Finding
from vptq.extras import EXTRAS, install_command, installed_version


def python() -> Iterator[Finding]:
    """The interpreter, and how this package came to it."""
    try:
        asked = metadata.metadata("vptq")["Requires-Python"]
    except metadata.PackageNotFoundError:
        root = Path(vptq.__file__).parents[2]
        found = f"{vptq.__version__} from {root}, which is not installed; what it needs is not known"
        yield Finding("vptq", "problem", found, f"pip install --no-build-isolation -e {root}")
        return
    yield Finding("vptq", "ok", f"{vptq.__version__} in {Path(vptq.__file__).parent}")
    version = platform.python_version()
    if SpecifierSet(asked).contains(version, prereleases=True):
        yield Finding("python", "ok", version)
    else:
        yield Finding("python", "problem", f"{version}; vptq works with {asked}", "python3.12 -m venv .venv")


def required() -> Iterator[Finding]:
    """The packages nothing works without."""
    for requirement in _requirements():
        if not _is_extra(requirement):
            yield _finding(requirement)


def registered() -> Iterator[Finding]:
    """Whether transformers can be imported and loads quantized folders through this package."""
    try:
        auto = importlib.import_module("transformers.quantizers.auto")
    except Exception as error:  # a package that transformers imports where it is there may raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        found = f"transformers cannot be imported: {reason}"
        yield Finding("loading", "problem", found, f"pip install --force-reinstall '{_requirement('transformers')}'")
        return
    if auto.AUTO_QUANTIZER_MAPPING["vptq"].__module__.startswith("vptq."):
        yield Finding("loading", "ok", "transformers loads quantized folders on every device")
    else:
        found = "this transformers does not take part; quantized folders cannot be loaded"
        yield Finding("loading", "problem", found, f"pip install '{_requirement('transformers')}'")


def extras() -> Iterator[Finding]:
    """The optional extras; those for NVIDIA GPUs are looked at with the GPUs."""
    for extra, purpose in EXTRAS.items():
        if extra in ("cuda", "cuda12"):
            continue
        wanted = [item for item in _requirements() if _is_extra(item, extra)]
        if wanted:  # none where the metadata is missing, which `python` has said
            yield extra_finding(extra, purpose, wanted)


def extra_finding(extra: str, purpose: str, wanted: Iterable[Requirement]) -> Finding:
    """One extra: absent is optional, but a version that will not work is a problem."""
    part, missing, wrong = f"extra {extra}", [], []
    for requirement in wanted:
        version = installed_version(requirement.name)
        if version is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, and {requirement.specifier} is needed")
    if wrong:
        return Finding(part, "problem", f"{purpose}: {'; '.join(wrong)}", install_command(extra))
    if missing:
        return Finding(part, "optional", f"{purpose}: no {', '.join(missing)}", install_command(extra))
    return Finding(part, "ok", purpose)


def reinstall_command() -> str:
    """How this package is built again with its C++ kernels, from where it was installed."""
    source = "vptq"
    try:
        stated = json.loads(metadata.distribution("vptq").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return f"pip install --no-build-isolation -e {Path(vptq.__file__).parents[2]}"
    if url := stated.get("url"):
        source = url.removeprefix("file://")
    editable = "-e " if stated.get("dir_info", {}).get("editable") else ""
    return f"pip install --no-deps --no-build-isolation --force-reinstall {editable}{source}"


def _finding(requirement: Requirement) -> Finding:
    version = installed_version(requirement.name)
    if version is None:
        return Finding(requirement.name, "problem", "not installed", f"pip install '{requirement}'")
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, "ok", version)
    found = f"{version}; vptq works with {requirement.specifier}"
    return Finding(requirement.name, "problem", found, f"pip install '{requirement}'")


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in metadata.requires("vptq") or ()]
    except metadata.PackageNotFoundError:
        return []  # said by `python`


def _requirement(name: str) -> str:
    """What is asked for of one package, as pip takes it."""
    return next((str(item) for item in _requirements() if item.name == name), name)


def _is_extra(requirement: Requirement, extra: str = "") -> bool:
    """Whether a requirement belongs to an extra; to any without a name."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return False
    return not extra or requirement.marker.evaluate({"extra": extra})
