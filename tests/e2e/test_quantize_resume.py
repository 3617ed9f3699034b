"""Runs that are killed, refused or out of disk: what they leave, and how they go on."""

import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import vptq
from vptq.errors import CheckpointError, ConfigError
from vptq.progress import ProgressEvent

QUICK: dict[str, Any] = {"spec": "v4-k16", "sequences": 3, "seqlen": 16}

KILLED = """
import os, signal, sys, vptq
from vptq.quantize import precision

precision.multiplies_bfloat16 = lambda device: False  # as in the process that goes on: conftest.exact_products

def watch(event):
    if event.layer and ".1." in event.layer:  # the first layer of the second block is done
        os.kill(os.getpid(), signal.SIGKILL)

vptq.quantize(sys.argv[1], sys.argv[2], "v4-k16", sequences=3, seqlen=16, progress=watch)
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("report.json", "report.png", "report.html", "README.md")
    }


def interrupt_at(layer: str) -> Callable[[ProgressEvent], None]:
    def watch(event: ProgressEvent) -> None:
        if event.layer is not None and layer in event.layer:
            raise KeyboardInterrupt

    return watch


@pytest.fixture(scope="module")
def whole(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    vptq.quantize(tiny_model_folder, folder, **QUICK)
    return folder


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_model_folder: Path, tmp_path: Path, whole: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tiny_model_folder), str(out)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (work / "blocks" / "0000").is_dir()
    assert not (work / "blocks" / "0001").exists()

    before = tree(work)
    with pytest.raises(ConfigError, match=r"--resume.*--overwrite"):
        vptq.quantize(tiny_model_folder, out, **QUICK)
    with pytest.raises(ConfigError, match="seed was 0 and is now 1") as caught:
        vptq.quantize(tiny_model_folder, out, **QUICK, seed=1, resume=True)
    assert "spec" not in str(caught.value), "only what differs is shown"
    with pytest.raises(ConfigError, match="rotate was False and is now True"):
        vptq.quantize(tiny_model_folder, out, **QUICK, rotate=True, resume=True)
    with pytest.raises(ConfigError, match=r"spec was .*16.* and is now .*64"):
        vptq.quantize(tiny_model_folder, out, **(QUICK | {"spec": "v4-k64"}), resume=True)
    assert tree(work) == before, "a refused run leaves the interrupted one alone"

    solved: list[str | None] = []
    vptq.quantize(tiny_model_folder, out, **QUICK, resume=True, progress=lambda event: solved.append(event.layer))
    assert not any(name and ".0." in name for name in solved), "a finished block is not quantized again"
    assert any(name and ".1." in name for name in solved)
    assert tree(out) == tree(whole)
    assert not work.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"hessian_inputs": "original"},
        {"hessian_inputs": "both"},
        {"absorb_perm": False, "spec": "v4-k16-16-g2"},
        {"rotate": True},
    ],
)
def test_every_mode_goes_on_to_the_same_bytes(options: dict[str, Any], tiny_model_folder: Path, tmp_path: Path) -> None:
    options = QUICK | options
    vptq.quantize(tiny_model_folder, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        vptq.quantize(tiny_model_folder, tmp_path / "out", **options, progress=interrupt_at(".1.self_attn.o_proj"))
    vptq.quantize(tiny_model_folder, tmp_path / "out", **options, resume=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_overwrite_starts_an_interrupted_run_over(tiny_model_folder: Path, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        vptq.quantize(tiny_model_folder, tmp_path / "out", **QUICK, seed=5, progress=interrupt_at(".1."))
    vptq.quantize(tiny_model_folder, tmp_path / "out", **QUICK, overwrite=True)
    assert tree(tmp_path / "out") == tree(whole)


def test_resuming_what_was_never_begun_begins_it(tiny_model_folder: Path, tmp_path: Path, whole: Path) -> None:
    vptq.quantize(tiny_model_folder, tmp_path / "out", **QUICK, resume=True)
    assert tree(tmp_path / "out") == tree(whole)


@pytest.mark.parametrize(("file", "kept"), [(1, False), (2, False), (3, True), (4, True)])
def test_a_full_disk_is_one_line_and_no_output(
    file: int, kept: bool, tiny_model_folder: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files in their order: tokens, block 0, block 1, the checkpoint. Finished blocks are kept for --resume."""
    save_file = safetensors.torch.save_file
    written = 0

    def fill_up(tensors: Any, path: Any, metadata: Any = None) -> None:
        nonlocal written
        written += 1
        if written == file:
            Path(path).write_bytes(b"cut short")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr("vptq.shards.save_file", fill_up)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            vptq.quantize(tiny_model_folder, tmp_path / "out", **QUICK)
    assert "\n" not in str(caught.value)
    assert written == file
    assert [path.name for path in tmp_path.iterdir()] == (["out.work"] if kept else [])
    if kept:
        vptq.quantize(tiny_model_folder, tmp_path / "out", **QUICK, resume=True)
        assert tree(tmp_path / "out") == tree(whole)


def test_a_disk_full_while_the_small_files_are_written_is_the_same(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vptq.quantize.output.save_card", fill_up)
    with pytest.raises(CheckpointError, match="No space left on device"):
        vptq.quantize(tiny_model_folder, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_an_overwritten_folder_is_there_until_the_new_one_is(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(KeyboardInterrupt):
        vptq.quantize(tiny_model_folder, out, **QUICK, overwrite=True, progress=interrupt_at(".1."))
    assert (out / "precious").read_text() == "kept"
    vptq.quantize(tiny_model_folder, out, **QUICK, overwrite=True)
    assert not (out / "precious").exists()
    assert (out / "config.json").is_file()
