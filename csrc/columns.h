// Centroids for a block of weight columns, one column after another, each seeing the errors of those before it.
//
// Rows do not interact, so a range of vectors goes through all columns by itself: threads need not meet in between.
#pragma once

#include <cstdint>

#include "stages.h"

namespace vptq {

struct ColumnsProblem {
  const float* base;      // [columns, rows]
  const float* coupling;  // [columns, columns], read below the diagonal; null where columns stand alone
  const float* present;   // [columns, rows]: what the indices stand for now; null where they stand for nothing yet
  const float* scale;     // [columns]
  const float* shift;     // [columns]
  const float* row_weights;  // [rows]: what an error of a row counts; null where all count alike
  int64_t columns, rows;
  StagesProblem stages;
  int64_t* main;      // [columns, vectors]
  int64_t* residual;  // [columns, vectors], or null
  float* values;      // [columns, rows]
  float* errors;      // [columns, rows]

  int64_t vectors() const { return (rows + stages.dim - 1) / stages.dim; }
  int64_t tail() const { return rows % stages.dim; }  // rows of the last vector, where it is not whole
};

// Vectors that go through the columns together: their errors stay in L2.
constexpr int64_t kColumnTile = 48;

struct ColumnsKernel {
  int64_t (*scratch_floats)(const ColumnsProblem&, const StagesProblem& tail);
  // Vectors [begin, end). `tail` and `tail_prepared` describe the codebooks cut to the last vector's rows.
  void (*run)(const ColumnsProblem&, const StagesProblem& tail, const float* prepared, const float* tail_prepared,
              float* scratch, int64_t begin, int64_t end);
};

}  // namespace vptq
