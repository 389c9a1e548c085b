AOTITorchError aoti_torch_cpu_attention_hopper(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle* block_index,
    AtenTensorHandle* block_count, AtenTensorHandle* order, AtenTensorHandle longest, int64_t always, int64_t q_block,
    int64_t k_block, AtenTensorHandle* own_k, AtenTensorHandle* own_v, AtenTensorHandle* own, double scale,
    AtenTensorHandle* out);
}

// The operator `attention_hopper` on a CPU, in float32 and row by row, told to Inductor as that for Hopper is. It
// depends on each operand, so that one in another's place is seen.

#include <cmath>
#include <cstdint>
#include <iostream>
#include <vector>

namespace {

template <class T>
struct Tensor {
  explicit Tensor(AtenTensorHandle x) {
    void* data;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(x, &data));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x, &sizes));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x, &strides));
    first = static_cast<T*>(data);
  }

  template <class... At>
  T& operator()(At... at) const {
    int64_t offset = 0, i = 0;
    ((offset += at * strides[i++]), ...);
    return first[offset];
  }

  T* first;
  int64_t *sizes, *strides;
};

}  // namespace

extern "C" AOTITorchError aoti_torch_cpu_attention_hopper(
    AtenTensorHandle q_, AtenTensorHandle k_, AtenTensorHandle v_, AtenTensorHandle* block_index,
    AtenTensorHandle* block_count, AtenTensorHandle* order_, AtenTensorHandle longest_, int64_t always, int64_t q_block,
    int64_t k_block, AtenTensorHandle* own_k, AtenTensorHandle* own_v, AtenTensorHandle* own, double scale,
    AtenTensorHandle* out_) {
  const Tensor<float> q(q_), k(k_), v(v_), longest(longest_);
  const int64_t B = q.sizes[0], H = q.sizes[1], M = q.sizes[2], D = q.sizes[3], N = k.sizes[2];
  const int64_t strides[4] = {M * H * D, D, H * D, 1};
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      4, q.sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), -1, out_));
  const Tensor<float> out(*out_);
  for (int64_t i = 0; i < B * H * M * D; ++i) out.first[i] = NAN;
  const bool lists = block_index != nullptr;
  if (lists && (!block_count || !order_)) return AOTI_TORCH_FAILURE;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t at = 0; at < (M + q_block - 1) / q_block; ++at) {
        const int64_t block = lists ? Tensor<int32_t>(*order_)(b, h, at) : at;
        std::vector<int64_t> keys;
        for (int64_t j = 0; j < (lists ? always : N); ++j) keys.push_back(j);
        for (int64_t i = 0; lists && i < Tensor<int32_t>(*block_count)(b, h, block); ++i)
          for (int64_t j = 0; j < k_block; ++j) {
            const int64_t key = always + Tensor<int32_t>(*block_index)(b, h, block, i) * k_block + j;
            if (key < N) keys.push_back(key);
          }
        for (int64_t row = block * q_block; row < std::min(M, (block + 1) * q_block); ++row) {
          const bool mine = own && Tensor<bool>(*own)(row);
          std::vector<double> weighted(D);
          double total = 0;
          for (size_t j = 0; j < keys.size() + mine; ++j) {
            double logit = 0, length = 0;
            for (int64_t d = 0; d < D; ++d) {
              const float key = j < keys.size() ? k(b, h, keys[j], d) : Tensor<float>(*own_k)(b, h, row, d);
              logit += q(b, h, row, d) * key * scale;
              length += key * key;
            }
            if (j < keys.size() && length > longest(b, h) * 1.0001) {
              std::cerr << "attention_hopper on a CPU: a key is longer than the longest one" << std::endl;
              return AOTI_TORCH_FAILURE;
            }
            total += std::exp(logit);
            for (int64_t d = 0; d < D; ++d)
              weighted[d] += std::exp(logit) *
                             (j < keys.size() ? v(b, h, keys[j], d) : Tensor<float>(*own_v)(b, h, row, d));
          }
          for (int64_t d = 0; d < D; ++d) out(b, h, row, d) = total > 0 ? weighted[d] / total : 0;
        }
      }
  return AOTI_TORCH_SUCCESS;
}

extern "C" {
