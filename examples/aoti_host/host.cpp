// Runs a packed model that AOTInductor compiled, without Python: host OPERATOR_LIBRARY MODEL.pt2 EXPECTED.txt
//
// EXPECTED.txt has the token ids of a prompt and, on its second line, the most likely token after each. Exit status: 0
// when the model finds those, alone and in a batch of three.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

static std::vector<int64_t> numbers(std::istream& in) {
  std::string line;
  std::getline(in, line);
  std::istringstream words(line);
  std::vector<int64_t> found;
  for (int64_t value; words >> value;) found.push_back(value);
  return found;
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: host OPERATOR_LIBRARY MODEL.pt2 EXPECTED.txt\n");
    return 2;
  }
  // Its initializers tell torch of the operators.
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  std::ifstream file(argv[3]);
  const std::vector<int64_t> prompt = numbers(file), expected = numbers(file);
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const at::Tensor one = at::tensor(prompt, at::kLong).unsqueeze(0), wanted = at::tensor(expected, at::kLong);
  for (const int64_t batch : {1, 3}) {
    const at::Tensor ids = one.repeat({batch, 1});
    const at::Tensor found = model.run({ids, at::ones_like(ids)})[0].argmax(-1);
    if (!at::equal(found, wanted.expand_as(found))) {
      std::fprintf(stderr, "batch %d: other tokens than expected\n", static_cast<int>(batch));
      return 1;
    }
  }
  for (const int64_t token : expected) std::printf("%d ", static_cast<int>(token));
  std::printf("\n");
  return 0;
}
