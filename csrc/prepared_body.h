// What a thread brings into its own form before it looks anything up: the codebooks, and how to read the indices.

namespace vptq {
namespace VPTQ_ISA {
namespace {

struct PreparedPart {
  Table main, residual;
  Unpacker unpacker;

  Shifts shifts() const { return {main.shift, residual.shift}; }
};

constexpr int64_t kPreparedBytes = (sizeof(PreparedPart) + 63) / 64 * 64;

// With the tables behind it.
VPTQ_INLINE int64_t prepared_bytes(const LookupPart& part) {
  return kPreparedBytes + table_bytes(part.dtype, part.centroids, part.vector_len) +
         table_bytes(part.dtype, part.residual_centroids, part.vector_len);
}

inline void prepare_lookup(const LookupPart& part, void* scratch) {
  uint8_t* memory = static_cast<uint8_t*>(scratch) + kPreparedBytes;
  PreparedPart& prepared = *static_cast<PreparedPart*>(scratch);
  prepared.main = make_table(part.codebook, part.dtype, part.centroids, part.vector_len, memory);
  prepared.residual = prepared.main;
  if (part.residual_codebook != nullptr) {
    memory += table_bytes(part.dtype, part.centroids, part.vector_len);
    prepared.residual =
        make_table(part.residual_codebook, part.dtype, part.residual_centroids, part.vector_len, memory);
  }
  prepared.unpacker = make_unpacker(part, prepared.shifts());
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
