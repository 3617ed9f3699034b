"""Build the one optional extension module, `vptq._C`: CPU kernels behind LibTorch's stable ABI.

Optional, because every kernel has a PyTorch twin: without a compiler, or without torch at build time, the package
installs all the same, says so in one line, and `vptq doctor` repeats it;
VPTQ_REQUIRE_EXTENSION=1, as `make wheel` sets it, makes that an error. Built against the oldest torch that has the
stable ABI we use, and against Python's limited API, so that one binary serves every later torch and Python.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import setup

TORCH_2_10 = "0x020a000000000000"
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))


def skip(reason: str) -> dict:
    if os.environ.get("VPTQ_REQUIRE_EXTENSION") == "1":
        sys.exit(f"vptq: VPTQ_REQUIRE_EXTENSION=1, and the C++ kernels cannot be built ({reason})")
    print(f"vptq: installing without the C++ kernels ({reason}); PyTorch code runs in their place", file=sys.stderr)
    return {}


@contextmanager
def heard() -> Iterator[None]:
    """Print now and then: pip turns its wheel once for every line, and a file takes the compiler ten seconds."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(2):
            print("still compiling", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def extension() -> dict:
    if os.environ.get("VPTQ_SKIP_EXTENSION") == "1":
        return skip("VPTQ_SKIP_EXTENSION=1")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return skip("torch is not importable; install it first, then use pip install --no-build-isolation")

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            try:
                with heard():
                    super().run()
            except Exception as error:
                skip(f"the compiler failed: {str(error).splitlines()[0]}")

        def copy_extensions_to_source(self) -> None:
            # An editable install copies what was built; when nothing was, copying would fail the install.
            if all(Path(self.get_ext_fullpath(ext.name)).exists() for ext in self.extensions) or self.inplace:
                super().copy_extensions_to_source()

    module = CppExtension(
        "vptq._C",
        SOURCES,
        include_dirs=[str(Path("csrc").resolve())],
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_2_10)],
        extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuild.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
