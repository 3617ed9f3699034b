"""How often centroids are used: counted right, in the table and the picture."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vptq.checkpoint import Checkpoint
from vptq.cli import main
from vptq.evaluate.compare import compare
from vptq.evaluate.plot import draw_index_use
from vptq.index_use import CodebookUse, codebook_uses

# Codebooks with more entries than the small layers can use, so that some are dead.
KINDS: tuple[dict[str, Any], ...] = (
    {"vector_len": 8, "num_centroids": 512, "num_residual_centroids": 8},
    {"vector_len": 6, "num_centroids": 256, "num_groups": 2},
    {"vector_len": 8, "num_centroids": 64, "outlier_size": 4, "outlier_vector_len": 4, "outlier_num_centroids": 16},
)


@pytest.fixture(scope="module")
def stored(make_checkpoint: Callable[..., Any]) -> Any:
    return make_checkpoint(kinds=KINDS)


def test_every_codebook_of_every_layer_is_counted(stored: Any) -> None:
    uses = {(use.layer, use.codebook): use for use in codebook_uses(Checkpoint.open(stored.folder))}
    expected = 0
    for layer, weight in stored.weights.items():
        tensors = {"main": weight.indices, "residual": weight.residual_indices}
        tensors["outlier"] = None if weight.outlier_indices is None else weight.outlier_indices[None]
        for codebook, indices in tensors.items():
            if indices is None:
                assert (layer, codebook) not in uses
                continue
            expected += 1
            use = uses[layer, codebook]
            for group, counts in zip(indices, use.counts, strict=True):
                assert Counter({k: int(n) for k, n in enumerate(counts) if n}) == Counter(group.flatten().tolist())
    assert len(uses) == expected


def test_dead_entries_and_entropy_follow_from_the_counts() -> None:
    even = CodebookUse("layer", "main", torch.full((2, 8), 5))
    assert (even.dead, even.entropy, even.index_bits) == ([], pytest.approx(3), 3)
    half = CodebookUse("layer", "main", torch.tensor([[4, 4, 0, 0], [1, 1, 1, 1]]))
    assert half.dead == [(0, 2), (0, 3)]
    assert half.entropy == pytest.approx((1 + 2) / 2)


def test_the_table_names_the_dead_and_the_picture_is_drawn(
    stored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    picture = tmp_path / "use.png"
    with pytest.raises(SystemExit) as caught:
        main(["info", str(stored.folder), "--indices", "--picture", str(picture)])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    uses = list(codebook_uses(Checkpoint.open(stored.folder)))
    assert any(use.dead for use in uses), "this test could not tell"
    for use in uses:
        (row,) = (line for line in out.splitlines() if re.match(rf"{re.escape(use.layer)} +{use.codebook} ", line))
        assert f"{use.entropy:.2f}" in row
        if use.dead:
            group, centroid = use.dead[0]
            name = f"{group}:{centroid}" if use.counts.shape[0] > 1 else str(centroid)
            assert re.search(rf" {len(use.dead)} +{name}(,| *$)", row)
    assert f"{sum(len(use.dead) for use in uses):,} of " in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_many_layers_differs_from_one_without_dead_entries() -> None:
    counts = torch.arange(1, 33)[None].repeat(2, 1)
    layers = [f"layers.{index}.{kind}" for index in range(30) for kind in ("q", "down")]
    alive = [CodebookUse(layer, "main", counts) for layer in layers]
    dead = [*alive[:-1], CodebookUse(layers[-1], "main", counts * (counts > 8))]
    assert draw_index_use(alive, "title") != draw_index_use(dead, "title")


def test_a_folder_without_a_report_is_compared_by_its_tensors(stored: Any, tmp_path: Path) -> None:
    folder = stored.write(tmp_path / "model")
    (folder / "eval.json").write_text('{"perplexity": 30.0}')
    (found,) = compare([folder])
    weights = sum(weight.config.in_features * weight.config.out_features for weight in stored.weights.values())
    assert found.bits == pytest.approx(sum(weight.config.stored_bits for weight in stored.weights.values()) / weights)
    assert (found.spec, found.perplexity) == (None, 30.0)
