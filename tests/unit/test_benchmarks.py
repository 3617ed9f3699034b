"""The benchmarks measure what they say: every second and every distance is counted once, and stored weights judge."""

from __future__ import annotations

import importlib.util
import json
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vptq
from vptq.config import LayerConfig
from vptq.quantize import kmeans, solver
from vptq.quantize.hessian import load_hessian
from vptq.quantize.report import load_report
from vptq.quantize.solver import quantize_weight

ROOT = Path(__file__).parents[2]
Script = Callable[..., None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """Runs `python benchmarks/NAME.py ARGUMENTS` in this process, which has torch loaded already."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")

    yield run
    for name in ("nearest", "stages", "calibrated"):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.fixture
def text(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    path = tmp_path / "words.txt"
    words = sorted(word for word in tiny_tokenizer.get_vocab() if word.isalpha())
    path.write_text(" ".join(random.Random(0).choices(words, k=600)))
    return path


def stages(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    result = json.loads(path.read_text())
    return result, {row["stage"]: row for row in result["rows"]}


def test_stages_add_up_and_every_distance_is_counted(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script("quantize", "--shape", "64x48", "--spec", "v4-k16", "--json", tmp_path / "out.json")
    printed = capsys.readouterr().out
    result, rows = stages(tmp_path / "out.json")
    assert json.loads(printed.splitlines()[-1]) == result
    assert sum(row["seconds"] for row in rows.values()) == pytest.approx(result["seconds"], rel=0.1, abs=0.01)
    vectors = 48 * (64 // 4)
    one_pass = 2.0 * vectors * 4 * 16
    assert rows["feedback pass"]["search_flops"] == one_pass
    assert rows["descent sweeps"]["search_flops"] == one_pass * rows["descent sweeps"]["calls"]
    assert rows["k-means"]["search_flops"] > one_pass
    assert rows["feedback pass"]["product_flops"] == 48 * 48 * 64
    assert rows["packing"]["calls"] == rows["Cholesky"]["calls"] == 1
    assert result["naive"]["vectors"] == vectors
    total = sum(row["search_flops"] for row in rows.values())
    assert result["naive"]["passes"] == pytest.approx(total / one_pass, abs=0.01)
    assert result["largest"]["stage"] == max(rows, key=lambda name: rows[name]["seconds"])
    assert "extrapolated" in printed
    assert "peak memory" in printed


def test_the_residual_refit_belongs_to_the_codebooks(script: Script, tmp_path: Path) -> None:
    script("quantize", "--shape", "32x24", "--spec", "v4-k8-8", "--json", tmp_path / "out.json")
    _, rows = stages(tmp_path / "out.json")
    codebooks = rows["joint residual codebooks"]
    rounds = solver.SolverConfig().residual_rounds
    assert codebooks["calls"] == 1 + rounds, "itself, and a refit each round"
    assert codebooks["product_flops"] == 0, "those refits take the diagonal alone"
    products = rows["refit codebooks"]["product_flops"] / (2 * 24 * 24 * 32)
    refits, steps = rows["refit codebooks"]["calls"], solver.SolverConfig().refit_steps
    assert products == int(products)
    assert refits < products <= refits * (1 + steps), "one for the gradient, one for each step until it stops"


def test_a_clock_changes_no_result_and_leaves_no_trace(script: Script) -> None:
    import stages as module  # on the path while `script` is in use

    before = dict(vars(solver)), kmeans.nearest, solver._Problem.record
    draw = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(16, 12, generator=draw), torch.randn(40, 12, generator=draw)
    arguments = weight, inputs.T @ inputs, LayerConfig(12, 16, 4, 8, enable_norm=True)
    plain = quantize_weight(*arguments, torch.Generator().manual_seed(0))
    clock = module.Clock()
    with module.timed(clock):
        watched = quantize_weight(*arguments, torch.Generator().manual_seed(0))
    assert watched.losses == plain.losses
    assert torch.equal(watched.weight.indices, plain.weight.indices)
    assert (dict(vars(solver)), kmeans.nearest, solver._Problem.record) == before
    assert clock.stages["report the loss"].calls >= 4


def test_a_block_of_a_model(script: Script, tmp_path: Path, text: Path, tiny_model_folder: Path) -> None:
    script(
        "quantize", "--model", tiny_model_folder, "--text", text, "--block", 1, "--sequences", 4, "--seqlen", 64,
        "--spec", "v2-k16", "--json", tmp_path / "out.json",
    )  # fmt: skip
    result, rows = stages(tmp_path / "out.json")
    assert len(result["layers"]) == 7
    assert rows["run the blocks, Hessians"]["calls"] == 1
    assert rows["Cholesky"]["calls"] == 7


@pytest.fixture
def quantized(
    script: Script, tmp_path: Path, text: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, Path]:
    """Collected Hessians, and a folder quantized with them."""
    hessians, folder = tmp_path / "hessians", tmp_path / "row"
    script(
        "accuracy", "--collect", hessians, "--original", tiny_model_folder, "--text", text, "--sequences", 4,
        "--seqlen", 64,
    )  # fmt: skip
    vptq.quantize(tiny_model_folder, folder, spec="v2-k16", hessian_dir=hessians, dtype=torch.float16, device="cpu")
    capsys.readouterr()
    return hessians, folder


def test_collected_hessians_are_the_original_models(
    quantized: tuple[Path, Path], tiny_model: Any, tiny_tokenizer: Any, text: Path
) -> None:
    hessians, _ = quantized
    seen = []
    layer = tiny_model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    ids = tiny_tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"][0, : 4 * 64]
    with torch.no_grad():
        tiny_model(ids.view(4, 64))
    inputs = seen[0].double()
    expected = (inputs.T @ inputs / len(inputs)).float()
    torch.testing.assert_close(load_hessian(hessians, 1, ["down_proj"], 48), expected, rtol=1e-4, atol=1e-6)
    assert len(list(hessians.iterdir())) == 2 * 4


def test_a_later_block_sees_what_the_blocks_before_it_make_of_the_text(
    script: Script, quantized: tuple[Path, Path], text: Path, tiny_model_folder: Path
) -> None:
    from calibrated import calibrated  # on the path while `script` is in use

    hessians, _ = quantized
    with calibrated(str(tiny_model_folder), text, 4, 64) as original:
        moments = original.moments(1)
    for group, moment in moments:
        tails = [name.rpartition(".")[2] for name in group.names]
        assert torch.equal(moment.hessian(), load_hessian(hessians, 1, tails, group.features))


def test_losses_come_from_what_is_stored(
    script: Script, quantized: tuple[Path, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    hessians, folder = quantized
    (tmp_path / "row.json").write_text(json.dumps({"perplexity": 12.5, "kl_divergence": 0.25}))
    results = tmp_path / "results.json"
    other = {"spec": "original", "bits_per_weight": 16.0, "command": "kept"}
    stale = {"spec": "v2-k16", "bits_per_weight": 9.0, "command": "vptq quantize MODEL -o DIR --spec v2-k16 "}
    stale["command"] += "--hessian-dir HESSIANS"
    results.write_text(json.dumps({"rows": [other, stale]}))
    script("accuracy", folder, "--original", tiny_model_folder, "--hessians", hessians, "--json", results)
    row, kept = json.loads(results.read_text())["rows"]
    report = load_report(folder)
    assert report is not None
    assert kept == other
    assert row["proxy_loss"] == pytest.approx(report.mean_loss, rel=0.01)
    assert row["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    assert (row["perplexity"], row["divergence"], row["hessian_inputs"]) == (12.5, 0.25, "original")


def test_a_checkpoint_of_zeros_loses_everything(
    script: Script, quantized: tuple[Path, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    hessians, folder = quantized
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    zeroed = ("centroids.weight", "weight_bias")
    save_file({name: t.zero_() if name.endswith(zeroed) else t for name, t in tensors.items()}, shard, {"format": "pt"})
    script("accuracy", folder, "--original", tiny_model_folder, "--hessians", hessians, "--json", tmp_path / "out.json")
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["proxy_loss"] == pytest.approx(1.0, abs=1e-6)
    assert row["perplexity"] is None


def test_the_table_shows_keys_that_rows_have(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    columns = runpy.run_path(str(ROOT / "docs" / "tables.py"))["TABLES"]["smollm2"]
    accuracy = runpy.run_path(str(ROOT / "benchmarks" / "accuracy.py"))
    published = set().union(*accuracy["PUBLISHED"].values())
    measured = {"spec", "bits_per_weight", "perplexity", "divergence", "proxy_loss", "seconds"}
    assert {column.key for column in columns} == measured | {"hessian_inputs", "finetune"} | published


def test_a_block_of_llama_cpp_is_repeated_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its type, bytes and bits: what llama.cpp quantized once stands in every block."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("beside_llama_cpp", ROOT / "benchmarks" / "llama_cpp.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "HIDDEN", 32)
    monkeypatch.setattr(benchmark, "LINEARS", {"attn_q": (32, 32), "ffn_up": (64, 32)})
    benchmark.write_one_block(tmp_path / "one.gguf")
    assert benchmark.repeat_block(tmp_path / "one.gguf", tmp_path / "four.gguf") == 16.0
    one = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "one.gguf").tensors}
    four = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "four.gguf").tensors}
    assert len(four) == 3 + 4 * (len(one) - 3)
    for block in range(4):
        assert (four[f"blk.{block}.ffn_up.weight"].data == one["blk.0.ffn_up.weight"].data).all()
        assert four[f"blk.{block}.ffn_up.weight"].tensor_type == one["blk.0.ffn_up.weight"].tensor_type
