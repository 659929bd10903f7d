// Generates text from what `flash-attn-res train` has learned, the likeliest byte each time: the
// same text as `flash-attn-res sample --temperature 0`.
//
//   decoder FILE [--prompt TEXT] [--length N] [--variant V] [--device cpu|cuda] [--logits]
//
// FILE is a weights file or a checkpoint. With --logits it prints instead, for each byte of the
// prompt (behind the boundary that every text begins with), the 256 logits of the next one.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "language_model.h"
#include "weights_file.h"

namespace decoder {
namespace {

constexpr int32_t kBoundary = 0;  // the byte between two texts

struct Options {
  std::string file, prompt, variant, device = "cpu";
  int64_t length = 400;
  bool logits = false;
};

int64_t number(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 0) {
    throw Error(name + " must be a number of at least 0, not '" + text + "'");
  }
  return value;
}

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name == "--logits") {
      options.logits = true;
      continue;
    }
    if (name.compare(0, 2, "--") != 0) {
      if (!options.file.empty()) {
        throw Error("unexpected argument " + name);
      }
      options.file = name;
      continue;
    }
    if (i + 1 == arguments.size()) {
      throw Error(name + " needs a value");
    }
    const std::string& value = arguments[++i];
    if (name == "--prompt") {
      options.prompt = value;
    } else if (name == "--length") {
      options.length = number(name, value);
    } else if (name == "--variant") {
      options.variant = value;
    } else if (name == "--device") {
      options.device = value;
    } else {
      throw Error("unknown option " + name);
    }
  }
  if (options.file.empty()) {
    throw Error(
        "usage: decoder FILE [--prompt TEXT] [--length N] [--variant V] [--device cpu|cuda] "
        "[--logits]");
  }
  return options;
}

std::unique_ptr<Device> make_device(const std::string& name) {
  if (name != "cpu" && name != "cuda") {
    throw Error("--device must be cpu or cuda, not " + name);
  }
  std::unique_ptr<Device> device = name == "cpu" ? make_cpu_device() : make_cuda_device();
  if (device == nullptr) {
    throw Error("--device cuda: this program was built without CUDA");
  }
  return device;
}

void print(int32_t byte) {
  // A boundary between two texts shows as an empty line.
  std::fputs(byte == kBoundary ? "\n\n" : "", stdout);
  if (byte != kBoundary) {
    std::fputc(byte, stdout);
  }
}

void print_logits(const std::vector<float>& logits) {
  for (size_t i = 0; i < logits.size(); ++i) {
    std::printf("%.9g%c", static_cast<double>(logits[i]), (i + 1) % kVocabulary == 0 ? '\n' : ' ');
  }
}

void run(const Options& options) {
  const std::unique_ptr<Device> device = make_device(options.device);
  const WeightsFile file(options.file, options.variant);
  LanguageModel model(file, *device);

  std::vector<int32_t> tokens = {kBoundary};
  for (const char byte : options.prompt) {
    tokens.push_back(static_cast<unsigned char>(byte));
  }
  const auto window = static_cast<size_t>(model.config().seq_len);
  if (tokens.size() > window) {
    tokens.erase(tokens.begin(), tokens.end() - static_cast<std::ptrdiff_t>(window));
  }
  if (options.logits) {
    print_logits(model.forward(tokens));
    return;
  }
  std::fputs(options.prompt.c_str(), stdout);
  for (int64_t i = 0; i < options.length; ++i) {
    const std::vector<float> logits = model.forward(tokens);
    const auto last = logits.end() - kVocabulary;
    tokens = {static_cast<int32_t>(std::max_element(last, logits.end()) - last)};
    print(tokens[0]);
    std::fflush(stdout);
  }
  std::fputc('\n', stdout);
}

}  // namespace
}  // namespace decoder

int main(int argc, char** argv) {
  try {
    decoder::run(decoder::parse({argv + 1, argv + argc}));
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "decoder: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
