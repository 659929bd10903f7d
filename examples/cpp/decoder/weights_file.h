// The safetensors files that `flash-attn-res train` writes: weights of one model, or a checkpoint
// with every variant of a run.
//
// A safetensors file is eight bytes of length (little-endian), that many bytes of JSON which give
// each tensor's dtype, shape and place, and the tensors' bytes. Nothing in it is trusted: lengths,
// offsets and shapes are checked against the file before anything is read.

#ifndef DECODER_WEIGHTS_FILE_H_
#define DECODER_WEIGHTS_FILE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace decoder {

/// What is wrong with a file, an option or a call, in words for a person.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What `flash-attn-res train` says of a model.
struct ModelConfig {
  std::string variant;  // plain, block or full
  int64_t layers = 0;
  int64_t dim = 0;  // D
  int64_t heads = 0;
  int64_t block_size = 0;  // sublayers to a block
  int64_t seq_len = 0;
  std::string dtype;  // float32 or bfloat16: of activations

  int64_t sublayers() const { return 2 * layers; }
};

/// One model's tensors, float32.
class WeightsFile {
 public:
  /// Reads the model of a weights file, or one variant (empty: block, else the first) of a
  /// checkpoint. Throws Error, naming the file, when it is truncated, damaged or something else.
  WeightsFile(const std::string& path, const std::string& variant);

  const ModelConfig& config() const { return config_; }

  /// A tensor of this shape, row by row. Throws Error, naming it, when it is missing or has another
  /// shape.
  std::vector<float> tensor(const std::string& name, const std::vector<int64_t>& shape) const;

 private:
  struct Entry {
    std::vector<int64_t> shape;
    size_t begin = 0, end = 0;  // bytes in data_
  };

  std::string path_;
  ModelConfig config_;
  std::map<std::string, Entry> entries_;
  std::vector<char> data_;
};

}  // namespace decoder

#endif  // DECODER_WEIGHTS_FILE_H_
