"""The CUDA kernels compile for cards that are not there, are kept, and leave what they cannot do to Triton."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_layers import A100, FORMS, H100, KIB, RTX_5090, T4, V100, decode
from triton_layers import layer_of

from vptq.config import LayerConfig
from vptq.ops import cuda_compile, cuda_launch
from vptq.ops.cuda_plan import TOKENS, Card, Kind, kind_of


def nvrtc() -> str:
    """Why NVRTC cannot compile here; empty where it can."""
    if why := cuda_compile.missing():
        return why
    from cuda.bindings import nvrtc as library

    try:
        library.nvrtcVersion()
    except RuntimeError as error:
        return f"no NVRTC: {error}"
    return ""


def known(architecture: str) -> bool:
    """Whether the NVRTC that is installed compiles for an architecture: 12 begins before 7.0, 13 at 7.5."""
    if nvrtc():
        return True  # shown as skipped
    from cuda.bindings import nvrtc as library

    _, numbers = library.nvrtcGetSupportedArchs()
    return int(architecture.removeprefix("sm_")) in numbers


NVRTC = pytest.mark.skipif(bool(nvrtc()), reason=nvrtc() or "-")
CARDS = {"sm_70": V100, "sm_75": T4, "sm_80": A100, "sm_90": H100, "sm_120": RTX_5090}
KNOWN = [architecture for architecture in CARDS if known(architecture)]
# Every form and number of tokens; most for the oldest card, which spills most, and the newest of the data centre.
TIMES = {"sm_70": (1, 2, 8), "sm_75": (2,), "sm_80": (4,), "sm_90": (1, 8), "sm_120": (1,)}
CASES = [(architecture, form, tokens) for architecture in KNOWN for form in FORMS for tokens in TIMES[architecture]]


@NVRTC
@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "form", "tokens"), CASES)
def test_every_form_compiles_for_every_card(architecture: str, form: str, tokens: int) -> None:
    kind = kind_of(torch.float16, *FORMS[form], CARDS[architecture])
    assert kind is not None
    check_code(kind, tokens, architecture)


@NVRTC
@pytest.mark.parametrize("architecture", KNOWN)
def test_bfloat16_compiles(architecture: str) -> None:
    """Also for cards that have no arithmetic for it."""
    kind = kind_of(torch.bfloat16, 8, 8, 8, CARDS[architecture])
    assert kind is not None
    check_code(kind, 1, architecture)


def check_code(kind: Kind, tokens: int, architecture: str) -> None:
    """There is machine code, about which the compiler has no more to say than that it keeps sums in registers."""
    log = io.StringIO()
    code = cuda_compile.compile_kernel(kind.parameters(tokens), architecture, log, ("-v",))
    assert code.code[:4] == b"\x7fELF"
    said = log.getvalue()[log.getvalue().index("'decode'") :]
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is not None
    most = 128 if architecture in ("sm_80", "sm_90", "sm_120") else 192
    assert int(spilled[1]) <= most, "sums belong into registers"
    assert "warning" not in re.sub("nvrtc: warning: Architectures prior to .* are deprecated", "", log.getvalue())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("form", FORMS)
def test_nvcc_compiles_every_form_without_a_warning(form: str, tmp_path: Path) -> None:
    """The tool's own compiler; every number of tokens occurs."""
    kind = kind_of(torch.float16, *FORMS[form], A100)
    assert kind is not None
    tokens = TOKENS[list(FORMS).index(form) % len(TOKENS)]
    defined = f"#define VPTQ_KERNEL {kind.parameters(tokens)}\n"  # nvcc would split a -D at its commas
    (tmp_path / "decode.cu").write_text(defined + cuda_compile.source())
    options = ["-std=c++17", "-arch=sm_80", "-Werror", "all-warnings"]
    command = ["nvcc", *options, "-cubin", "decode.cu", "-o", "decode.cubin"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@NVRTC
def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By source, parameters and architecture; nothing else lies in the folder afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuda_compile._programs.cache_clear()
    text = 'extern "C" __global__ void decode(int* out) { *out = VPTQ_KERNEL; }'
    monkeypatch.setattr(cuda_compile, "source", lambda: text)

    def kept() -> int:
        return sum(path.is_file() for path in cuda_compile.cache_folder().rglob("*"))

    first = cuda_compile.compile_kernel("1", "sm_90").code
    assert kept() == 1
    assert cuda_compile.compile_kernel("1", "sm_90").code == first
    assert kept() == 1
    cuda_compile.compile_kernel("2", "sm_90")
    cuda_compile.compile_kernel("1", "sm_80")
    text += "\n"
    cuda_compile.compile_kernel("1", "sm_90")
    assert kept() == 4
    cuda_compile._programs.cache_clear()


@NVRTC
def test_a_folder_that_cannot_be_written_keeps_nobody_from_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vptq").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuda_compile._programs.cache_clear()
    monkeypatch.setattr(cuda_compile, "source", lambda: 'extern "C" __global__ void decode() {}')
    assert cuda_compile.compile_kernel("1", "sm_90").code
    cuda_compile._programs.cache_clear()


LAYER = LayerConfig(40, 24, 8, 16)


def stand_in(kernels: Any) -> SimpleNamespace:
    return SimpleNamespace(card=lambda device: Card(4, 99 * KIB), kernels=kernels)


def decoded(config: LayerConfig) -> torch.Tensor | None:
    layer, _ = layer_of(config, torch.float16, "cpu")
    return decode(layer, torch.zeros(1, config.in_features).half())


def test_what_cannot_be_compiled_is_left_to_triton_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def broken(*arguments: object) -> None:
        tried.append(arguments)
        raise RuntimeError("no NVRTC")

    monkeypatch.setattr(cuda_launch, "_failed", set())
    monkeypatch.setattr(cuda_launch, "cuda_compile", stand_in(broken))
    assert decoded(LAYER) is None
    assert decoded(LAYER) is None
    assert len(tried) == 1
    assert caplog.messages == ["Triton runs in place of the CUDA decode kernel: no NVRTC"]


def test_a_capture_waits_for_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    kind = kind_of(torch.float16, 8, 4, 0, Card(4, 99 * KIB))
    assert kind is not None
    everything = dict.fromkeys(TOKENS, (None, "decode", "add_parts"))
    monkeypatch.setattr(cuda_compile, "_loaded", lambda *what: (loaded.append(what), everything)[1])
    monkeypatch.setattr(cuda_compile, "_runner", lambda kernel: kernel)
    monkeypatch.setattr(cuda_compile, "_ready", set())
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cuda", 0)
    assert cuda_compile.kernels(kind, 1, device) is None
    assert not loaded
    capturing = False
    assert cuda_compile.kernels(kind, 1, device) == ("decode", "add_parts")
    capturing = True
    assert cuda_compile.kernels(kind, 8, device) == ("decode", "add_parts"), "loaded with the others"


def test_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compile, "find_spec", lambda name: None if name.startswith("cuda") else find_spec(name))
    monkeypatch.delenv("VPTQ_BACKEND", raising=False)
    missing = cuda_compile.missing.__wrapped__
    assert missing() == "compiling them needs cuda-core, which is not installed: pip install 'vptq[cuda]'"
    monkeypatch.setattr(cuda_compile, "find_spec", lambda name: object())
    assert missing() == ""
    monkeypatch.setenv("VPTQ_BACKEND", "triton")
    assert missing() == "VPTQ_BACKEND=triton"
