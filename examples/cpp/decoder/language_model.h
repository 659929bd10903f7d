// The byte-level Transformer of `flash-attn-res train` (python/flash_attn_res/cli/model.py), for
// inference: sublayers here, the residual stream between them in residual_stream.h.

#ifndef DECODER_LANGUAGE_MODEL_H_
#define DECODER_LANGUAGE_MODEL_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "device.h"
#include "residual_stream.h"
#include "weights_file.h"

namespace decoder {

inline constexpr int64_t kVocabulary = 256;

class LanguageModel {
 public:
  LanguageModel(const WeightsFile& file, Device& device);

  /// Logits [T, 256] of the byte after each of these T, which follow those of earlier calls.
  /// The first call takes up to seq_len bytes, later ones a single byte.
  std::vector<float> forward(const std::vector<int32_t>& tokens);

  const ModelConfig& config() const { return config_; }

 private:
  struct Layer {
    Tensor qkv, out;       // [3D, D], [D, D]
    Tensor gate_up, down;  // [2 hidden, D], [D, hidden]
    Tensor keys, values;   // [window, D]: the cache
  };

  void attention(const Layer& layer, const far::Matrix& x, const far::Matrix& y);
  void mlp(const Layer& layer, const far::Matrix& x, const far::Matrix& y);
  void upload_angles(int64_t tokens);

  ModelConfig config_;
  Device& device_;
  far::DType dtype_;
  int64_t hidden_;
  Tensor embedding_;  // [256, D]
  Tensor head_;       // [256, D]
  std::vector<Layer> layers_;
  std::unique_ptr<ResidualStream> stream_;
  int64_t position_ = 0;

  // Work space for up to seq_len tokens.
  Tensor tokens_;                   // (T) int32
  Tensor angle_;                    // (2,T,E/2) float32
  Tensor qkv_, mixed_, scores_;     // [T, 3D], [T, D], (T,H,window) float32
  Tensor gate_up_out_, activated_;  // [T, 2 hidden], [T, hidden]
  Tensor output_, logits_;          // [T, D], [T, 256]
};

}  // namespace decoder

#endif  // DECODER_LANGUAGE_MODEL_H_
