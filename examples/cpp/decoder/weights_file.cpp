#include "weights_file.h"

#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

namespace decoder {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeader = uint64_t{100} << 20;  // as the reference implementation limits it

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

/// Bytes of float32s of a shape; throws when there are more than fit.
size_t bytes_of(const std::vector<int64_t>& shape) {
  size_t bytes = sizeof(float);
  for (const int64_t size : shape) {
    if (size < 0 ||
        (size > 0 && bytes > std::numeric_limits<size_t>::max() / static_cast<size_t>(size))) {
      throw Error("a tensor of shape " + text_of(shape));
    }
    bytes *= static_cast<size_t>(size);
  }
  return bytes;
}

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = file ? static_cast<std::streamoff>(file.tellg()) : -1;
  if (size < 0) {
    throw Error("cannot be read");
  }
  std::vector<char> bytes(static_cast<size_t>(size));
  file.seekg(0);
  if (!file.read(bytes.data(), size) && size > 0) {
    throw Error("cannot be read");
  }
  return bytes;
}

int64_t positive(const json& values, const char* name) {
  constexpr int64_t kMost = 1 << 24;
  const auto number = values.at(name).get<int64_t>();
  if (number < 1 || number > kMost) {
    throw Error("its configuration has " + std::string(name) + " " + std::to_string(number));
  }
  return number;
}

ModelConfig config_of(const json& values) {
  ModelConfig config;
  config.variant = values.at("variant").get<std::string>();
  config.layers = positive(values, "layers");
  config.dim = positive(values, "dim");
  config.heads = positive(values, "heads");
  config.block_size = positive(values, "block_size");
  config.seq_len = positive(values, "seq_len");
  config.dtype = values.at("dtype").get<std::string>();
  if (config.variant != "plain" && config.variant != "block" && config.variant != "full") {
    throw Error("its variant is " + config.variant + ", expected plain, block or full");
  }
  if (config.dtype != "float32" && config.dtype != "bfloat16") {
    throw Error("its dtype is " + config.dtype + ", expected float32 or bfloat16");
  }
  if (config.dim % config.heads != 0 || config.dim / config.heads % 2 != 0) {
    throw Error("its width " + std::to_string(config.dim) + " does not split into " +
                std::to_string(config.heads) + " heads of even width");
  }
  if (config.variant == "full") {
    config.block_size = 1;
  }
  return config;
}

}  // namespace

WeightsFile::WeightsFile(const std::string& path, const std::string& variant) : path_(path) {
  try {
    data_ = read_file(path);
    uint64_t length = 0;
    if (data_.size() < sizeof(length)) {
      throw Error("is too short to be a safetensors file");
    }
    std::memcpy(&length, data_.data(), sizeof(length));
    if (length > kMaxHeader || length > data_.size() - sizeof(length)) {
      throw Error("is truncated, or no safetensors file: its header would have " +
                  std::to_string(length) + " bytes");
    }
    const size_t start = sizeof(length) + static_cast<size_t>(length);  // of the tensors
    const json header = json::parse(data_.begin() + sizeof(length),
                                    data_.begin() + static_cast<std::ptrdiff_t>(start));

    const json& metadata = header.at("__metadata__");
    const auto kind = metadata.at("kind").get<std::string>();
    const json state = json::parse(metadata.at("state").get<std::string>());
    std::string prefix;
    if (kind == "flash-attn-res checkpoint 1") {
      const json& models = state.at("models");
      if (models.empty()) {
        throw Error("holds no model");
      }
      const std::string first = models.contains("block") ? "block" : models.items().begin().key();
      const std::string chosen = variant.empty() ? first : variant;
      if (!models.contains(chosen)) {
        throw Error("holds no variant " + chosen);
      }
      config_ = config_of(models.at(chosen));
      prefix = chosen + "/model/";
    } else if (kind == "flash-attn-res weights 1") {
      config_ = config_of(state.at("model"));
      if (!variant.empty() && variant != config_.variant) {
        throw Error("holds the variant " + config_.variant + ", not " + variant);
      }
    } else {
      throw Error("is a safetensors file, but not one that flash-attn-res train wrote");
    }

    for (const auto& [name, value] : header.items()) {
      if (name.compare(0, prefix.size(), prefix) != 0 || name == "__metadata__") {
        continue;
      }
      Entry entry;
      entry.shape = value.at("shape").get<std::vector<int64_t>>();
      const auto offsets = value.at("data_offsets").get<std::vector<uint64_t>>();
      const size_t available = data_.size() - start;
      if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > available) {
        throw Error("is truncated: " + name + " lies outside of it");
      }
      if (value.at("dtype").get<std::string>() != "F32" ||
          offsets[1] - offsets[0] != bytes_of(entry.shape)) {
        throw Error("is damaged: " + name + " is no float32 tensor of shape " +
                    text_of(entry.shape));
      }
      entry.begin = start + static_cast<size_t>(offsets[0]);
      entry.end = start + static_cast<size_t>(offsets[1]);
      entries_.emplace(name.substr(prefix.size()), std::move(entry));
    }
  } catch (const json::exception& error) {
    throw Error(path + ": damaged, or no file that flash-attn-res train wrote (" + error.what() +
                ")");
  } catch (const Error& error) {
    throw Error(path + ": " + error.what());
  }
}

std::vector<float> WeightsFile::tensor(const std::string& name,
                                       const std::vector<int64_t>& shape) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) {
    throw Error(path_ + ": has no tensor " + name);
  }
  const Entry& entry = found->second;
  if (entry.shape != shape) {
    throw Error(path_ + ": " + name + " has shape " + text_of(entry.shape) + ", expected " +
                text_of(shape));
  }
  std::vector<float> values((entry.end - entry.begin) / sizeof(float));
  std::memcpy(values.data(), data_.data() + entry.begin, entry.end - entry.begin);
  return values;
}

}  // namespace decoder
