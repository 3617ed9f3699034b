// Operators of the `vptq` namespace for the CPU, and the Python module that carries them.
//
// All checks live here; the kernels trust what they are given. Schemas are declared in Python (src/vptq/ops), so a
// build without this file has the same operators. Threads come from torch's own pool: a second OpenMP runtime would
// fight it for the cores.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "isa.h"
#include "nearest.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

vptq::Isa isa_or_throw() {
  vptq::Isa isa;
  const char* forced = std::getenv("VPTQ_CPU_ISA");
  require(vptq::choose_isa(&isa), "VPTQ_CPU_ISA is '", forced ? forced : "",
          "'; allowed are generic and, where the CPU has them, avx2 and avx512");
  return isa;
}

void require_matrix(const Tensor& tensor, const char* name) {
  require(tensor.dim() == 2, "nearest: ", name, " must have 2 dimensions, got ", tensor.dim());
  require(tensor.scalar_type() == ScalarType::Float, "nearest: ", name, " must be float32; convert it with .float()");
  require(tensor.is_cpu(), "nearest: ", name, " must be on the CPU");
}

struct AlignedFree {
  void operator()(float* memory) const { std::free(memory); }
};

std::unique_ptr<float, AlignedFree> aligned_floats(int64_t count) {
  constexpr size_t kLine = 64;
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + kLine - 1) / kLine * kLine;
  return std::unique_ptr<float, AlignedFree>(static_cast<float*>(std::aligned_alloc(kLine, bytes)));
}

std::tuple<Tensor, Tensor> nearest(const Tensor& vectors_in, const Tensor& codebook_in, int64_t beam) {
  require_matrix(vectors_in, "vectors");
  require_matrix(codebook_in, "codebook");
  const int64_t count = vectors_in.size(0), dim = vectors_in.size(1), centroids = codebook_in.size(0);
  require(dim >= 1, "nearest: vectors must have at least one coordinate");
  require(codebook_in.size(1) == dim, "nearest: vectors have ", dim, " coordinates but centroids have ",
          codebook_in.size(1));
  require(centroids < INT32_MAX / 2, "nearest: at most 2^30 centroids, got ", centroids);
  require(beam >= 1 && beam <= centroids, "nearest: beam is ", beam, ", allowed is 1 to the number of centroids, ",
          centroids);

  const Tensor vectors = torch::stable::contiguous(vectors_in);
  const Tensor codebook = torch::stable::contiguous(codebook_in);
  Tensor indices = torch::stable::new_empty(vectors, {count, beam}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(vectors, {count, beam});
  if (count == 0) return {indices, distances};

  const vptq::NearestProblem problem{vectors.const_data_ptr<float>(),
                                     codebook.const_data_ptr<float>(),
                                     dim,
                                     centroids,
                                     beam,
                                     indices.mutable_data_ptr<int64_t>(),
                                     distances.mutable_data_ptr<float>()};
  const vptq::NearestKernel& kernel = vptq::nearest_kernel(isa_or_throw());
  const auto prepared = aligned_floats(kernel.codebook_floats(problem));
  require(prepared != nullptr, "nearest: out of memory for the codebook");
  kernel.prepare(problem, prepared.get());

  // A thread is worth waking for about a million multiply-adds.
  const int64_t grain = 1 + (int64_t{1} << 20) / (centroids * dim + 1);
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_floats(kernel.scratch_floats(problem));
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    kernel.run(problem, prepared.get(), scratch.get(), begin, end);
  });
  require(!out_of_memory, "nearest: out of memory for a thread's scratch space");
  return {indices, distances};
}

STABLE_TORCH_LIBRARY_IMPL(vptq, CPU, library) { library.impl("nearest", TORCH_BOX(&nearest)); }

PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(vptq::isa_name(isa_or_throw()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef kMethods[] = {
    {"isa", isa, METH_NOARGS, "Instruction set the CPU kernels use: 'avx512', 'avx2' or 'generic'."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "vptq._C", "CPU kernels; importing it registers them.", -1, kMethods,
    nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&kModule); }
