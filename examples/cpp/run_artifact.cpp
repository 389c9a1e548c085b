// Runs an artifact in a program that knows libtorch and nothing else.
//
//   run_artifact model.pt2 images.pt outputs.pt [ENTRY]
//
// images.pt is a tensor [B, S, 3, H, W] as torch.save writes it, outputs.pt a list of the model's outputs in order.
// ENTRY is one of the other entries of the package (`inspect` lists them); it is given the weights of the first one.

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/serialize.h>

using Loader = torch::inductor::AOTIModelPackageLoader;

static torch::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::pickle_load(bytes).toTensor();
}

static void write_tensors(const std::string& path, const std::vector<torch::Tensor>& tensors) {
  const std::vector<char> bytes = torch::pickle_save(c10::IValue(tensors));
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// An entry beside the first one reads its weights where they are, so `first` must live as long as `other`.
static void share_weights(Loader& first, Loader& other) {
  auto weights = first.get_runner()->extract_constants_map(/*use_inactive=*/false);
  std::unordered_map<std::string, at::Tensor> wanted;
  for (const auto& name : other.get_constant_fqns()) {
    wanted.emplace(name, weights.at(name));
  }
  other.load_constants(wanted, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run_artifact model.pt2 images.pt outputs.pt [ENTRY]\n";
    return 2;
  }
  const c10::InferenceMode no_gradients;
  Loader first(argv[1]);
  for (const auto& [name, value] : first.get_metadata()) {
    std::cout << name << ": " << value << "\n";
  }
  const bool on_gpu = first.get_metadata().at("AOTI_DEVICE_KEY") == "cuda";
  const torch::Tensor images = read_tensor(argv[2]).to(on_gpu ? torch::kCUDA : torch::kCPU);

  std::vector<torch::Tensor> outputs;
  if (argc > 4) {
    Loader other(argv[1], argv[4]);
    share_weights(first, other);
    outputs = other.run({images});
  } else {
    outputs = first.run({images});
  }
  for (auto& output : outputs) {
    output = output.cpu();
    std::cout << output.dtype() << " " << output.sizes() << "\n";
  }
  write_tensors(argv[3], outputs);
}
