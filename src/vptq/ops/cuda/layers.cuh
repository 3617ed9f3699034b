// The layers of one launch, up to three that read the same input, and which of them a block works for.

struct Layer {
  const unsigned short *bias, *codebook;
  const unsigned* indices;
  const unsigned short *residual_codebook, *perm, *scale, *shift;
  int out_features, num_rows, blocks;  // `blocks` of the grid are the layer's own
};

// Layer N as parameters of a kernel, since cuda-core passes no structs; and as the struct again.
#define VPTQ_LAYER(N)                                                                                     \
  const unsigned short *__restrict__ bias##N, const unsigned short *__restrict__ codebook##N,             \
      const unsigned *__restrict__ indices##N, const unsigned short *__restrict__ residual_codebook##N,   \
      const unsigned short *__restrict__ perm##N, const unsigned short *__restrict__ scale##N,            \
      const unsigned short *__restrict__ shift##N, int out_features##N, int num_rows##N, int blocks##N
#define VPTQ_TAKE(N)                                                                                      \
  {bias##N,  codebook##N, indices##N,      residual_codebook##N, perm##N,                                 \
   scale##N, shift##N,    out_features##N, num_rows##N,          blocks##N}

// The layer that a block of the launch works for. `block` becomes its number among the layer's own; `before` grows by the
// outputs of the layers ahead of it.
VPTQ_DEVICE Layer own_layer(const Layer (&layers)[3], int tokens, int& block, long long& before) {
  Layer own = layers[0];
#pragma unroll
  for (int next = 1; next < 3; ++next) {
    if (block < own.blocks) break;
    block -= own.blocks;
    before += static_cast<long long>(tokens) * own.out_features;
    own = layers[next];
  }
  return own;
}
