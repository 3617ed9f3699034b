// Every kernel's body, for the instruction set of the including file.
#include "lanes.h"
#include "nearest_layout.h"
#include "nearest_body.h"
#include "pairs_body.h"
#include "stages_body.h"
#include "columns_body.h"
#include "floats_body.h"
#include "table_body.h"
#include "unpack_body.h"
#include "prepared_body.h"
#include "books_body.h"
#include "group_body.h"
#include "lookup_body.h"
#include "decode_body.h"
#include "tile_body.h"

namespace vptq {
namespace VPTQ_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    {codebook_floats, scratch_floats, prepare, run},
    {stages_prepared_floats, stages_scratch_floats, prepare_stages, search_stages},
    {columns_scratch_floats, run_columns},
    {lookup_fits, lookup_rows_per_tile, lookup_input_bytes, prepare_lookup_input, lookup_scratch_bytes, prepare_lookup,
     run_lookup},
    {widen, round_floats},
};

#undef VPTQ_INLINE

}  // namespace VPTQ_ISA
}  // namespace vptq
