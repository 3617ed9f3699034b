"""How much each layer matters: the walk of the disturbed models is the whole model with one layer disturbed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import FAMILIES, job_for, tiny
from torch import nn
from torch.nn import functional

from vptq.quantize import measurements, sensitivity
from vptq.quantize.budget import Budget
from vptq.quantize.job import Job
from vptq.quantize.sensitivity import Sensitivity, alike_layers, every_passage_alike, measure, measuring_tokens


def ignore(_event: Any) -> None:
    """No one watches."""


def disturb(weight: torch.Tensor) -> torch.Tensor:
    """More than a factor, which a norm after the layer would undo."""
    return weight + 0.2 * weight.flip(0)


def divergence(model: Any, disturbed: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (functional.log_softmax(m(input_ids=tokens).logits, dim=-1) for m in (model, disturbed))
    return float(functional.kl_div(q, p, reduction="sum", log_target=True)) / tokens.numel()


@pytest.fixture
def plain_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "every_passage_alike", lambda found: [sum(each) / len(each) for each in found])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("plain_means")
def test_a_layer_is_judged_as_in_the_whole_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity._Walk, "_solve", lambda _walk, task: disturb(task[1]))
    model = tiny(family)
    job = job_for(model, tmp_path / "out")
    skeleton = job.open_skeleton()
    judged, _ = measuring_tokens(job, skeleton, ignore)
    measured = measure(job, skeleton, ignore)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {name for seen in measured for name in seen.layers} == set(names) - {"lm_head", "embed_out"}
    for seen in measured[:: len(measured) - 1]:  # the first and the last: the longest way and the shortest
        disturbed = tiny(family)
        (name,) = seen.layers
        linear = disturbed.get_submodule(name)
        linear.weight.data = disturb(linear.weight.data)
        assert seen.divergence == pytest.approx(divergence(model, disturbed, judged), rel=1e-2)
        assert seen.divergence > 1e-6


@pytest.mark.usefixtures("plain_means")
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_planned_head_is_judged_as_in_the_whole_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity._Walk, "_solve", lambda _walk, task: disturb(task[1]))
    job = job_for(tiny(family), tmp_path / "out", spec=None, budget=Budget(bits=3.0), lm_head="auto")
    skeleton = job.open_skeleton()
    judged, _ = measuring_tokens(job, skeleton, ignore)
    seen = measure(job, skeleton, ignore)[-1]
    disturbed = tiny(family)
    disturbed.lm_head.weight.data = disturb(disturbed.lm_head.weight.data)
    assert seen.layers == ("lm_head",)
    assert seen.divergence == pytest.approx(divergence(tiny(family), disturbed, judged), rel=1e-2)
    assert seen.divergence > 1e-3


tables = st.integers(1, 5).flatmap(
    lambda passages: st.lists(
        st.lists(st.floats(1e-6, 1e3), min_size=passages, max_size=passages), min_size=1, max_size=9
    )
)


@given(tables)
def test_passages_keep_the_sum_of_all_layers(found: list[list[float]]) -> None:
    expected = sum(sum(each) / len(each) for each in found)
    assert sum(every_passage_alike(found)) == pytest.approx(expected, rel=1e-9)


@given(tables, st.floats(0.01, 100), st.data())
def test_a_passage_that_hurts_everything_more_moves_no_layer_against_another(
    found: list[list[float]], factor: float, data: st.DataObject
) -> None:
    worse = data.draw(st.integers(0, len(found[0]) - 1))
    changed = [[each * factor if n == worse else each for n, each in enumerate(layer)] for layer in found]
    before, after = every_passage_alike(found), every_passage_alike(changed)
    for one, other in zip(before, after, strict=True):
        assert other * sum(before) == pytest.approx(one * sum(after), rel=1e-6)


def test_a_passage_that_nothing_hurts_counts_nothing() -> None:
    assert every_passage_alike([[0.0, 0.0], [0.0, 0.0]]) == [0.0, 0.0]
    assert every_passage_alike([[1.0], [3.0]]) == [1.0, 3.0]


def test_nothing_disturbed_is_no_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity._Walk, "_solve", lambda _walk, task: task[1].clone())
    job = job_for(tiny("llama"), tmp_path / "out")
    measured = measure(job, job.open_skeleton(), ignore)
    assert max(seen.divergence for seen in measured) < 1e-6


def test_the_same_job_gives_the_same_figures(tmp_path: Path) -> None:
    jobs = [job_for(tiny("llama"), tmp_path / name) for name in ("one", "two")]
    first, second = (measure(job, job.open_skeleton(), ignore) for job in jobs)
    assert first == second
    assert len({seen.divergence for seen in first}) == len(first), "every layer is measured on its own"


def test_experts_of_a_block_are_alike() -> None:
    block = nn.ModuleDict({"gate": nn.Linear(4, 3), "experts": nn.ModuleList(nn.Linear(4, 6) for _ in range(3))})
    (units,) = alike_layers([block], "layers")
    assert [list(unit) for unit in units] == [["layers.0.gate"], [f"layers.0.experts.{n}" for n in range(3)]]


def test_judged_tokens_make_no_hessian(tmp_path: Path) -> None:
    job = job_for(tiny("llama"), tmp_path / "out", sequences=4, seqlen=16)
    judged, rest = measuring_tokens(job, job.open_skeleton(), ignore)
    assert len(judged) + len(rest) == 4
    assert not any(torch.equal(one, other) for one in judged for other in rest)


@pytest.fixture
def job(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job with an empty cache, whose measurement takes no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[Job] = []

    def pretend(job: Job, *_: Any) -> list[Sensitivity]:
        calls.append(job)
        return [Sensitivity(("layer",), "v4-k16", float(len(calls)))]

    monkeypatch.setattr(measurements, "measure", pretend)
    return job_for(tiny_model_folder, tmp_path / "out")


def test_a_measurement_is_made_once(job: Job, tmp_path: Path) -> None:
    skeleton = job.open_skeleton()
    first = measurements.sensitivities(job, skeleton, ignore)
    assert measurements.sensitivities(job, skeleton, ignore) == first
    (kept,) = (tmp_path / "cache" / "vptq").iterdir()
    kept.write_text("damaged")
    assert measurements.sensitivities(job, skeleton, ignore) != first


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"sequences": 5}, {"seqlen": 17}, {"calibration": "wikitext2"}, {"rotate": True}],
)
def test_other_settings_are_another_measurement(
    change: dict[str, Any], job: Job, tiny_model_folder: Path, tmp_path: Path
) -> None:
    other = job_for(tiny_model_folder, tmp_path / "other", **change)
    assert measurements.cache_path(other) != measurements.cache_path(job)
    same = job_for(tiny_model_folder, tmp_path / "same", spec="v8-k256")
    assert measurements.cache_path(same) == measurements.cache_path(job)


def test_rotations_of_different_seeds_are_measured_apart(job: Job, tiny_model_folder: Path, tmp_path: Path) -> None:
    paths = {
        measurements.cache_path(job_for(tiny_model_folder, tmp_path / f"{seed}", rotate=True, seed=seed))
        for seed in range(3)
    }
    assert len(paths) == 3


def test_a_model_in_memory_is_always_measured(tmp_path: Path) -> None:
    assert measurements.cache_path(job_for(tiny("llama"), tmp_path / "out")) is None


def test_a_cache_that_cannot_be_written_is_told(job: Job, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    told: list[str] = []
    measurements.sensitivities(job, job.open_skeleton(), lambda event: told.append(event.message))
    assert "not kept" in told[-1]
