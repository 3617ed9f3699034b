"""`import vptq` costs next to nothing, and reaches transformers and peft whichever is imported first."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vptq

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_import_is_lean_and_quiet() -> None:
    heavy = {"torch", "transformers", "peft", "numpy", "accelerate", "safetensors", "importlib.metadata"}
    assert run(f"import sys, vptq; print(sorted({heavy} & sys.modules.keys()))") == "[]\n"


REGISTERED = """
import transformers.quantizers.auto as auto
assert auto.AUTO_QUANTIZER_MAPPING["vptq"].__module__ == "vptq.integrations.transformers"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["vptq"].__module__ == "vptq.integrations.transformers"
assert "transformers.quantizers.auto" not in [getattr(finder, "target", None) for finder in sys.meta_path]
# The hook leaves no trace in the module: whoever asks for its source or loader gets what they always did.
import importlib.machinery, inspect
assert type(auto.__spec__.loader) is importlib.machinery.SourceFileLoader
assert auto.__loader__ is auto.__spec__.loader
assert "AUTO_QUANTIZER_MAPPING" in inspect.getsource(auto)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import vptq",
        "import vptq, transformers; transformers.AutoModelForCausalLM",
        "import transformers, vptq; transformers.AutoModelForCausalLM",
        "import transformers; transformers.AutoModelForCausalLM; import vptq",
        "import transformers.quantizers.auto, vptq",
        "import vptq, importlib; importlib.reload(vptq)",
        "import vptq.integrations.transformers",
        "import vptq, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')",
    ],
)
def test_the_order_of_imports_does_not_matter(imports: str) -> None:
    run(f"import sys\n{imports}\n{REGISTERED}")


PEFT_REGISTERED = """
import peft
assert peft.PEFT_TYPE_TO_TUNER_MAPPING["LORA"].__module__ == "vptq.integrations.peft"
assert peft.LoraModel.__module__ == "peft.tuners.lora.model"
assert not any("vptq" in type(finder).__module__ for finder in sys.meta_path)
import importlib.machinery, inspect
assert type(peft.__spec__.loader) is importlib.machinery.SourceFileLoader
assert "PEFT_TYPE_TO_TUNER_MAPPING" in inspect.getsource(peft)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import vptq",
        "import peft, vptq",
        "import vptq, peft, transformers",
        "import vptq.integrations.peft",
        "import vptq, importlib.util; importlib.util.find_spec('peft')",
    ],
)
def test_peft_is_reached_too(imports: str) -> None:
    pytest.importorskip("peft")
    run(f"import sys\n{imports}\n{PEFT_REGISTERED}{REGISTERED}")


def test_an_unsupported_transformers_can_still_be_imported() -> None:
    """One that has lost a name we need gets a warning instead of an error."""
    code = """
import sys, warnings, vptq
sys.modules["vptq.integrations.matching"] = None  # importing it fails, as if it had asked for the lost name
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.quantizers.auto
print([str(warning.message) for warning in caught if "vptq" in str(warning.message)])
"""
    assert "vptq cannot register" in run(code)


def test_public_names_exist() -> None:
    for name in vptq.__all__:
        assert getattr(vptq, name) is not None
        assert name in dir(vptq)
    with pytest.raises(AttributeError, match="no_such_name"):
        vptq.no_such_name  # noqa: B018


def test_quantize_can_be_called_whatever_was_imported_before() -> None:
    assert callable(vptq.quantize)
    run("import vptq.quantize.hessian, vptq; assert callable(vptq.quantize)")


def test_version_is_what_transformers_asks_for() -> None:
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None
    assert vptq.__version__ == stated[1] == vptq._SOURCE_TREE_VERSION
    transformers = pytest.importorskip("transformers")
    assert transformers.utils.is_vptq_available()
