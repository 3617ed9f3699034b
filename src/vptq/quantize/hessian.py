"""Second moments of a linear layer's inputs: H = E[x x^T], the weight of every decision the solver makes.

The layer output error of E = W - W_hat is tr(E H E^T) (arXiv 2409.17066, eq. 2). Sums are kept undivided in float32, so
adding batches one by one equals adding them at once up to the rounding of a float32 sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vptq import ops
from vptq.errors import CalibrationError
from vptq.ops import products
from vptq.quantize import precision

COMMUNITY_TAGS = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv", "o_proj": "o",
    "gate_proj": "up", "up_proj": "up", "gate_up_proj": "up", "down_proj": "down",
}  # fmt: skip
"""Module name -> file tag of the QuIP#/VPTQ Hessian files; other modules are looked up under their own name."""

QUANTIZED_SHARE = 0.2
"""Weight of the quantized model's inputs in `PairedAccumulator` (docs/log.md has what other weights gave)."""

READ_BY_KERNELS = {torch.float32, torch.bfloat16}

DAMPING_STEPS = 8
"""How often damping is raised tenfold before a layer is given up: from 0.01 of the mean diagonal far past the
diagonal."""


@dataclass(frozen=True)
class Moments:
    """What the solver is told about a layer's inputs.

    Attributes:
        hessian: [n, n] float32, symmetric.
        shift: [n, n] float32, by which the weight is moved before it is quantized (see `PairedAccumulator`), or None.
    """

    hessian: Tensor
    shift: Tensor | None = None

    def target(self, weight: Tensor) -> Tensor:
        """[out, n] float32: what to quantize in place of `weight` [out, n]."""
        return weight.float() if self.shift is None else torch.addmm(weight.float(), weight.float(), self.shift)


class HessianAccumulator:
    """Collects E[x x^T] over batches of inputs.

    Attributes:
        features: width n of the inputs.
        device: where the sums are.
        quick: products may be rounded.
        tokens: how many input rows were added.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu", *, quick: bool = False) -> None:
        """Nothing so far.

        Args:
            features: width of the inputs.
            device: where the sums are.
            quick: products may be rounded (`precision.py`); sums stay float32.
        """
        self.features = features
        self.device = torch.device(device)
        self.quick = quick
        self.tokens = 0
        self._sum = torch.zeros(features, features, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Adds inputs [..., n] of any float dtype, each times its weight [...]."""
        rows = weighted(inputs.reshape(-1, self.features), weights)
        add_products(self._sum, rows, rows, quick=self.quick, upper=True)
        self.tokens += len(rows)

    def hessian(self) -> Tensor:
        """[n, n] float32, symmetric.

        Raises:
            CalibrationError: when nothing was added, or an input held NaN or infinity.
        """
        if self.tokens == 0:
            raise CalibrationError("no calibration input reached this layer: it is never called by the model's forward")
        if not bool(torch.isfinite(self._sum).all()):
            raise CalibrationError("the Hessian holds NaN or infinity: the model overflows on the calibration text")
        upper = (self._sum / self.tokens).triu_()
        return upper + upper.triu(1).T

    def moments(self, _damping: float) -> Moments:
        """The Hessian alone; see `hessian`."""
        return Moments(self.hessian())


def weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Rows [N, n] whose outer products count `weights` [N] times; as they are where the weights are not theirs."""
    if weights is None or weights.numel() != len(rows):
        return rows
    return rows.float() * weights.reshape(-1, 1).to(rows.device, torch.float32).sqrt()


def add_products(sums: Tensor, left: Tensor, right: Tensor, *, quick: bool, upper: bool = False) -> None:
    """sums += left^T right; in float32, unless `quick` and where the hardware multiplies bfloat16."""
    if quick and precision.multiplies_bfloat16(sums.device) and {left.dtype, right.dtype} <= READ_BY_KERNELS:
        ops.add_products(sums, left, right, upper=upper)
    else:
        products.add_products(sums, left, right, upper)


class PairedAccumulator:
    """Second moments of the same tokens' inputs x in the original model and y in the quantized one.

    A quantized layer should do what the original layer does: for the inputs of the original, |W x - Q x|^2, and for
    those it really gets, where |W x - Q y|^2 is what the original would have put out. With the second weighted by
    `share` g and the first by 1 - g, the sum is a quadratic in Q with Hessian H = (1 - g) E[x x^T] + g E[y y^T], least
    at W + W D for D = g E[(x - y) y^T] H^-1: so Q is chosen near that, under H, and undoes some of what the layers
    before it did wrong. (g = 1 is the objective of GPTAQ, arXiv 2504.02692; it moves the weights furthest and trusts
    the calibration text most.)

    E[x x^T] may come from more tokens than the two others: a run of the quantized model for every layer is what costs.
    """

    def __init__(self, original: HessianAccumulator, share: float = QUANTIZED_SHARE) -> None:
        """Starts with E[x x^T], collected or still to be."""
        self._original = original
        self._quantized = HessianAccumulator(original.features, original.device, quick=original.quick)
        self._cross = torch.zeros(original.features, original.features, dtype=torch.float32, device=original.device)
        self._share = share

    @property
    def tokens(self) -> int:
        """How many inputs of the original, or pairs, were added."""
        return max(self._original.tokens, self._quantized.tokens)

    def add(self, original: Tensor, quantized: Tensor, weights: Tensor | None = None) -> None:
        """Adds inputs [..., n] of the same tokens, any float dtype, each token times its weight [...]."""
        both = (inputs.reshape(-1, self._original.features) for inputs in (original, quantized))
        x, y = (weighted(inputs, weights) for inputs in both)
        self._quantized.add(y)
        add_products(self._cross, x.float() - y.float(), y, quick=self._original.quick)

    def moments(self, damping: float) -> Moments:
        """The Hessian, and the shift with `damping` times the mean diagonal added to the Hessian's diagonal.

        Raises:
            CalibrationError: when nothing was added, or an input held NaN or infinity.
        """
        pairs = self._quantized.tokens
        if not pairs or not self._original.tokens:  # an expert that only one of the models ever chose
            return (self._quantized if pairs else self._original).moments(damping)
        hessian = torch.lerp(self._original.hessian(), self._quantized.hessian(), self._share)
        factor, _ = inverse_factor(hessian, damping)
        return Moments(hessian, (self._cross * (self._share / pairs)) @ (factor.T @ factor))


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """U, upper triangular with U^T U = (H + damping * mean(diag H) * I)^-1.

    Args:
        hessian: [n, n] float32, symmetric.
        damping: share of the mean diagonal to add first; raised tenfold while the matrix is not positive definite.

    Returns:
        U [n, n] float32 and the damping that worked.

    Raises:
        CalibrationError: when no damping works, which takes NaN or a matrix that is no second moment.
    """
    mean = hessian.diagonal().mean().clamp(min=1e-12)
    for _ in range(DAMPING_STEPS):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0 and bool(torch.isfinite(factor).all()):
                return factor, damping
        damping = max(damping, 1e-4) * 10.0
    raise CalibrationError("the Hessian is not positive semidefinite, whatever the damping: calibrate again")


def find_hessian(folder: Path, block: int, module_names: Sequence[str]) -> Path:
    """The file that `load_hessian` would read.

    Raises:
        CalibrationError: there is none.
    """
    tags = list(dict.fromkeys(COMMUNITY_TAGS.get(name, name) for name in module_names))
    paths = [folder / f"{block}_{tag}.pt" for tag in tags]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise CalibrationError(f"--hessian-dir: none of {', '.join(str(p) for p in paths)} exists")
    return path


def load_hessian(folder: Path, block: int, module_names: Sequence[str], features: int) -> Tensor:
    """Reads a Hessian in the QuIP#/VPTQ community layout: `{block}_{tag}.pt` with flatH, mu, n.

    Args:
        folder: where the files are.
        block: number of the decoder block.
        module_names: last path components of the linears that share this input.
        features: their input width.

    Returns:
        [n, n] float32 E[x x^T] = covariance + mu mu^T. The community loader's scaling and its added 0.01 on the
        diagonal are left out: the solver is invariant to the one and damps by itself.

    Raises:
        CalibrationError: no such file, not a tensor file (pickled objects are refused), or the wrong width.
    """
    path = find_hessian(folder, block, module_names)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        flat, mean, width = stored["flatH"].float(), stored["mu"].float(), int(stored["n"])
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise CalibrationError(f"{path}: not a Hessian file with the tensors flatH, mu and n ({reason})") from error
    if width != features or flat.numel() != width * (width + 1) // 2 or mean.numel() != width:
        raise CalibrationError(f"{path}: Hessian of width {width}, but the layer has {features} inputs")
    rows, columns = torch.tril_indices(width, width)
    hessian = torch.zeros(width, width)
    hessian[rows, columns] = flat
    hessian[columns, rows] = flat
    hessian += torch.outer(mean, mean)
    if not bool(torch.isfinite(hessian).all()):
        raise CalibrationError(f"{path}: the Hessian holds NaN or infinity")
    return hessian
