// vptq::assign_columns for the CPU.
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "operators.h"

namespace vptq {
namespace {

using torch::headeronly::ScalarType;

constexpr char kOp[] = "assign_columns";

void require_shape(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  require(tensor.size(0) == rows && tensor.size(1) == columns, kOp, ": ", name, " is ", tensor.size(0), " x ",
          tensor.size(1), ", must be ", rows, " x ", columns);
}

void require_matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  require_floats(tensor, 2, kOp, name);
  require_shape(tensor, rows, columns, name);
}

void require_per_column(const Tensor& tensor, int64_t columns, const char* name) {
  require_floats(tensor, 1, kOp, name);
  require(tensor.size(0) == columns, kOp, ": ", name, " has ", tensor.size(0), " entries for ", columns, " columns");
}

// Indices are written in place, so a contiguous copy would be lost; and read, so they must be valid.
void require_indices(const Tensor& tensor, int64_t columns, int64_t vectors, int64_t centroids, bool read,
                     const char* name) {
  require(tensor.dim() == 2 && tensor.scalar_type() == ScalarType::Long && tensor.is_cpu(), kOp, ": ", name,
          " must be an int64 matrix on the CPU");
  require_shape(tensor, columns, vectors, name);
  require(tensor.is_contiguous(), kOp, ": ", name, " must be contiguous: it is written in place");
  if (!read) return;
  const int64_t* values = tensor.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < columns * vectors; ++i) {
    require(values[i] >= 0 && values[i] < centroids, kOp, ": ", name, " holds ", values[i], " for ", centroids,
            " centroids");
  }
}

// The first `tail` coordinates of each centroid: what the rows of a last vector that is not whole are compared with.
std::vector<float> cut_book(const float* book, int64_t centroids, int64_t dim, int64_t tail) {
  std::vector<float> cut(static_cast<size_t>(book == nullptr ? 0 : centroids * tail));
  for (size_t i = 0; i < cut.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i);
    cut[i] = book[at / tail * dim + at % tail];
  }
  return cut;
}

AlignedFloats prepared_for(const StagesProblem& stages, const StagesKernel& kernel) {
  AlignedFloats prepared = aligned_floats(kernel.prepared_floats(stages));
  require(prepared != nullptr, kOp, ": out of memory for the codebooks");
  kernel.prepare(stages, prepared.get());
  return prepared;
}

void assign(const ColumnsProblem& problem) {
  const Kernels& kernels = kernels_for(isa_or_throw());
  const StagesProblem& stages = problem.stages;
  const AlignedFloats prepared = prepared_for(stages, kernels.stages);

  StagesProblem tail = stages;
  tail.dim = problem.tail();
  const auto main = cut_book(stages.main, stages.main_centroids, stages.dim, tail.dim);
  const auto residual = cut_book(stages.residual, stages.residual_centroids, stages.dim, tail.dim);
  tail.main = main.data();
  tail.residual = stages.residual == nullptr ? nullptr : residual.data();
  const AlignedFloats tail_prepared = tail.dim == 0 ? nullptr : prepared_for(tail, kernels.stages);

  // A thread is worth waking for about a million multiply-adds.
  const int64_t pairs = stages.residual == nullptr ? 0 : stages.beam * stages.residual_centroids;
  const int64_t work = problem.columns * stages.dim * (stages.main_centroids + pairs);
  const int64_t grain = 1 + (int64_t{1} << 20) / (work + 1);
  const auto scratch_of_thread = [&] { return aligned_floats(kernels.columns.scratch_floats(problem, tail)); };
  parallel_with_scratch(kOp, problem.vectors(), grain, scratch_of_thread, [&](float* scratch, int64_t begin, int64_t end) {
    kernels.columns.run(problem, tail, prepared.get(), tail_prepared.get(), scratch, begin, end);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> assign_columns(const Tensor& base_in, const std::optional<Tensor>& coupling_in,
                                          const std::optional<Tensor>& present_in, const Tensor& scale_in,
                                          const Tensor& shift_in, const Tensor& main_in,
                                          const std::optional<Tensor>& residual_in, const Tensor& indices,
                                          const std::optional<Tensor>& residual_indices, int64_t beam,
                                          const std::optional<Tensor>& row_weights_in) {
  require_floats(base_in, 2, kOp, "base");
  require_floats(main_in, 2, kOp, "main");
  const int64_t columns = base_in.size(0), rows = base_in.size(1);
  const int64_t centroids = main_in.size(0), dim = main_in.size(1);
  require(centroids >= 1 && dim >= 1, kOp, ": main must hold a centroid of at least one coordinate");
  require(centroids < INT32_MAX / 2, kOp, ": at most 2^30 centroids, got ", centroids);
  require(beam >= 1, kOp, ": beam is ", beam, ", must be at least 1");
  require_per_column(scale_in, columns, "scale");
  require_per_column(shift_in, columns, "shift");
  if (coupling_in) require_matrix(*coupling_in, columns, columns, "coupling");
  if (present_in) require_matrix(*present_in, columns, rows, "present");
  if (row_weights_in) {
    require_floats(*row_weights_in, 1, kOp, "row_weights");
    require(row_weights_in->size(0) == rows, kOp, ": row_weights has ", row_weights_in->size(0), " entries for ", rows,
            " rows");
  }
  const int64_t vectors = (rows + dim - 1) / dim;
  require_indices(indices, columns, vectors, centroids, present_in.has_value(), "indices");
  require(residual_in.has_value() == residual_indices.has_value(), kOp,
          ": residual and residual_indices come together or not at all");
  if (residual_in) {
    require_floats(*residual_in, 2, kOp, "residual");
    require(residual_in->size(0) >= 1 && residual_in->size(0) < INT32_MAX / 2 && residual_in->size(1) == dim, kOp,
            ": residual is ", residual_in->size(0), " x ", residual_in->size(1), ", its centroids need ", dim,
            " coordinates");
    require_indices(*residual_indices, columns, vectors, residual_in->size(0), present_in.has_value(),
                    "residual_indices");
  }

  const auto dense = [](const Tensor& tensor) { return torch::stable::contiguous(tensor); };
  const Tensor base = dense(base_in), scale = dense(scale_in), shift = dense(shift_in), main = dense(main_in);
  const Tensor coupling = coupling_in ? dense(*coupling_in) : base, present = present_in ? dense(*present_in) : base;
  const Tensor row_weights = row_weights_in ? dense(*row_weights_in) : scale;
  const Tensor residual = residual_in ? dense(*residual_in) : main;
  Tensor values = torch::stable::new_empty(base, {columns, rows});
  Tensor errors = torch::stable::new_empty(base, {columns, rows});
  if (columns == 0 || rows == 0) return {values, errors};

  assign({base.const_data_ptr<float>(),
          coupling_in ? coupling.const_data_ptr<float>() : nullptr,
          present_in ? present.const_data_ptr<float>() : nullptr,
          scale.const_data_ptr<float>(),
          shift.const_data_ptr<float>(),
          row_weights_in ? row_weights.const_data_ptr<float>() : nullptr,
          columns,
          rows,
          {main.const_data_ptr<float>(), residual_in ? residual.const_data_ptr<float>() : nullptr, dim, centroids,
           residual_in ? residual.size(0) : 0, beam < centroids ? beam : centroids, row_weights_in.has_value()},
          indices.mutable_data_ptr<int64_t>(),
          residual_indices ? residual_indices->mutable_data_ptr<int64_t>() : nullptr,
          values.mutable_data_ptr<float>(),
          errors.mutable_data_ptr<float>()});
  return {values, errors};
}

}  // namespace vptq
