// The operator `attention_hopper` where there is no Python: a part of the C++ that an artifact is compiled from.
//
// Law: it asks the driver for what `attention_hopper_kernel.launch` asks it for. hopper_launch.py puts the machine code
// before this text, and defines KERNELS_FOR_HOPPER, a list of `Kernel`.

#include <cuda.h>
#include <torch/csrc/inductor/aoti_runtime/utils.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {
namespace hopper {

using torch::aot_inductor::RAIIAtenTensorHandle;

// What machine code is for, the code itself, and what its launch has to know. The box is of tensor maps, innermost
// first: what one load brings.
struct Kernel {
  bool bfloat16;
  int64_t head_dim, q_block, k_block;
  bool lists, own;
  const char* image;
  const char* name;
  unsigned threads, shared;
  CUtensorMapSwizzle swizzle;
  cuuint32_t box[4];
};

const Kernel KERNELS[] = {KERNELS_FOR_HOPPER};

void must(AOTITorchError code, const char* what) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(what);
}

void must(CUresult code, const char* what) {
  if (code == CUDA_SUCCESS) return;
  const char* why = nullptr;
  cuGetErrorString(code, &why);
  throw std::runtime_error(std::string(what) + ": " + (why ? why : "unknown error of the driver"));
}

// What is read of a tensor.
struct View {
  explicit View(AtenTensorHandle x) {
    must(aoti_torch_get_data_ptr(x, &data), "a tensor has no address");
    must(aoti_torch_get_sizes(x, &sizes), "a tensor has no sizes");
    must(aoti_torch_get_strides(x, &strides), "a tensor has no strides");
  }

  void* data;
  int64_t *sizes, *strides;
};

// Arguments of a kernel, in their order; what is added must outlive the launch.
using Arguments = std::vector<void*>;

// A tensor [B, H, T, D] for the tensor memory accelerator: loads of `box`, zeros beyond the end.
struct Descriptor {
  Descriptor(const View& x, const Kernel& kernel) {
    cuuint64_t extents[4], steps[3];  // innermost first; steps in bytes, from the second one on
    for (int i = 0; i < 4; ++i) {
      sizes[i] = static_cast<int32_t>(x.sizes[i]);
      strides[i] = x.strides[i];
      extents[3 - i] = static_cast<cuuint64_t>(x.sizes[i]);
      if (i < 3) steps[2 - i] = static_cast<cuuint64_t>(x.strides[i]) * 2;
    }
    const cuuint32_t every[4] = {1, 1, 1, 1};
    const auto type = kernel.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    must(
        cuTensorMapEncodeTiled(
            &map, type, 4, x.data, extents, steps, kernel.box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, kernel.swizzle,
            CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "queries, keys and values of attention are aligned to 16 bytes");
  }

  void add_to(Arguments& arguments) {
    arguments.push_back(&map);
    for (auto& size : sizes) arguments.push_back(&size);
    for (auto& stride : strides) arguments.push_back(&stride);
  }

  alignas(64) CUtensorMap map;
  int32_t sizes[4];
  int64_t strides[4];
};

const Kernel& found(const Kernel& wanted) {
  for (const auto& one : KERNELS) {
    if (one.bfloat16 == wanted.bfloat16 && one.head_dim == wanted.head_dim && one.q_block == wanted.q_block &&
        one.k_block == wanted.k_block && one.lists == wanted.lists && one.own == wanted.own)
      return one;
  }
  throw std::runtime_error("this artifact has no machine code for attention of this kind; please report it");
}

// The kernel on a device, loaded at its first call there. The device is the current one.
CUfunction loaded(const Kernel& kernel, int32_t device) {
  static std::mutex one_at_a_time;
  static std::map<std::pair<const Kernel*, int32_t>, CUfunction> known;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  const auto key = std::make_pair(&kernel, device);
  const auto before = known.find(key);
  if (before != known.end()) return before->second;
  CUmodule module;
  CUfunction function;
  must(cuModuleLoadData(&module, kernel.image), "the kernel for Hopper GPUs cannot be loaded");
  must(cuModuleGetFunction(&function, module, kernel.name), "the kernel for Hopper GPUs is not in its machine code");
  must(cuFuncSetCacheConfig(function, CU_FUNC_CACHE_PREFER_SHARED), "shared memory cannot be preferred");
  must(
      cuFuncSetAttribute(
          function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(kernel.shared)),
      "this device has too little shared memory");
  return known[key] = function;
}

// As `out` of `hopper.attention_hopper`: [B, H, M, D], which lies in memory token by token.
RAIIAtenTensorHandle token_by_token(AtenTensorHandle like, const View& q, int32_t dtype, int32_t device) {
  const int64_t heads = q.sizes[1], queries = q.sizes[2], head_dim = q.sizes[3];
  const int64_t strides[4] = {queries * heads * head_dim, head_dim, heads * head_dim, 1};
  int32_t kind;
  AtenTensorHandle out;
  must(aoti_torch_get_device_type(like, &kind), "queries are on no device");
  must(aoti_torch_empty_strided(4, q.sizes, strides, dtype, kind, device, &out), "no memory for attention");
  return RAIIAtenTensorHandle(out);
}

struct Operands {
  AtenTensorHandle q, k, v;
  AtenTensorHandle *index, *count, *order;
  AtenTensorHandle longest;
  int64_t always, q_block, k_block;
  AtenTensorHandle *own_k, *own_v, *own;
  double scale;
};

RAIIAtenTensorHandle attention(const Operands& x) {
  int32_t dtype, device;
  must(aoti_torch_get_dtype(x.q, &dtype), "queries have no dtype");
  must(aoti_torch_get_device_index(x.q, &device), "queries are on no device");
  const View q(x.q), k(x.k), v(x.v), longest(x.longest);
  const bool lists = x.index != nullptr, has_own = x.own != nullptr;
  Kernel wanted{};
  wanted.bfloat16 = dtype == aoti_torch_dtype_bfloat16();
  wanted.head_dim = q.sizes[3];
  wanted.q_block = lists ? x.q_block : 128;
  wanted.k_block = lists ? x.k_block : 64;
  wanted.lists = lists;
  wanted.own = has_own;
  const Kernel& kernel = found(wanted);

  RAIIAtenTensorHandle result = token_by_token(x.q, q, dtype, device);
  const View out(result.get());
  const int64_t batch = q.sizes[0];
  int32_t heads = static_cast<int32_t>(q.sizes[1]), queries = static_cast<int32_t>(q.sizes[2]);
  int32_t q_blocks = static_cast<int32_t>((queries + kernel.q_block - 1) / kernel.q_block);
  const int64_t programs = batch * heads * q_blocks * (kernel.q_block / 128);
  if (programs == 0) return result;

  // Where an operand is not given, the queries hold its place and are not read.
  const View index = lists ? View(*x.index) : q, count = lists ? View(*x.count) : q, order = lists ? View(*x.order) : q;
  const View own_k = has_own ? View(*x.own_k) : q, own_v = has_own ? View(*x.own_v) : q, own = has_own ? View(*x.own) : q;
  int32_t tokens = static_cast<int32_t>(k.sizes[2]), always = lists ? static_cast<int32_t>(x.always) : tokens;
  int32_t capacity = lists ? static_cast<int32_t>(index.sizes[3]) : 0;
  float scale = static_cast<float>(x.scale * 1.4426950408889634);  // exponents are of two

  Descriptor queries_at(q, kernel), keys_at(k, kernel), values_at(v, kernel);
  Arguments arguments;
  for (auto* one : {&queries_at, &keys_at, &values_at}) one->add_to(arguments);
  const void* places[] = {
      out.data, index.data, count.data, order.data, longest.data, own_k.data, own_v.data, own.data};
  for (auto& place : places) arguments.push_back(&place);
  for (auto* one : {&own_k, &own_v})
    for (int i = 0; i < 3; ++i) arguments.push_back(&one->strides[i]);
  for (auto* one : {&heads, &queries, &tokens, &always, &q_blocks, &capacity}) arguments.push_back(one);
  arguments.push_back(&scale);
  void* scratch = nullptr;  // memory that Triton offers to kernels; this one takes none
  arguments.insert(arguments.end(), 4, &scratch);

  void* stream;
  must(aoti_torch_get_current_cuda_stream(device, &stream), "there is no stream");
  must(
      cuLaunchKernel(
          loaded(kernel, device), static_cast<unsigned>(programs), 1, 1, kernel.threads, 1, 1, kernel.shared,
          static_cast<CUstream>(stream), arguments.data(), nullptr),
      "the kernel for Hopper GPUs cannot be launched");
  return result;
}

}  // namespace hopper
}  // namespace

extern "C" AOTITorchError aoti_torch_cuda_attention_hopper(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle* block_index,
    AtenTensorHandle* block_count, AtenTensorHandle* order, AtenTensorHandle longest, int64_t always, int64_t q_block,
    int64_t k_block, AtenTensorHandle* own_k, AtenTensorHandle* own_v, AtenTensorHandle* own, double scale,
    AtenTensorHandle* out) {
  try {
    *out = hopper::attention({q, k, v, block_index, block_count, order, longest, always, q_block, k_block, own_k, own_v,
                              own, scale})
               .release();
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    std::cerr << "vggt_compile::attention_hopper: " << error.what() << std::endl;
    return AOTI_TORCH_FAILURE;
  }
}
