#include "language_model.h"

#include <cmath>
#include <string>
#include <utility>

namespace decoder {
namespace {

constexpr double kNormEps = 1e-6;
constexpr float kRotaryBase = 10000.0F;
constexpr far::DType kFloat = far::DType::kFloat32;

far::Matrix host_matrix(std::vector<float>& values, int64_t rows) {
  const auto cols = static_cast<int64_t>(values.size()) / rows;
  return {values.data(), rows, cols, cols, kFloat};
}

/// The L + 1 sites: folded queries and norm weights.
Sites load_sites(const WeightsFile& file, Device& device) {
  const ModelConfig& config = file.config();
  const int64_t L = config.sublayers();
  const int64_t D = config.dim;
  Sites sites;
  sites.sublayers = L;
  sites.eps = kNormEps;
  std::vector<float> norms;
  const auto append = [&](const std::string& name) {
    const std::vector<float> weight = file.tensor(name, {D});
    norms.insert(norms.end(), weight.begin(), weight.end());
  };
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    append("layers." + std::to_string(layer) + ".attention_norm");
    append("layers." + std::to_string(layer) + ".mlp_norm");
  }
  append("final_norm");
  sites.norms = device.tensor(norms, L + 1, D, kFloat, kFloat);
  if (config.variant != "plain") {
    sites.block_size = std::min(config.block_size, L);
    std::vector<float> queries = file.tensor("residual.queries", {L + 1, D});
    std::vector<float> keys = file.tensor("residual.key_weight", {L + 1, D});
    std::vector<float> folded(queries.size());
    check(far::fold_queries(host_matrix(queries, L + 1), host_matrix(keys, L + 1),
                            host_matrix(folded, L + 1)));
    sites.queries = device.tensor(folded, L + 1, D, kFloat, kFloat);
  }
  return sites;
}

}  // namespace

LanguageModel::LanguageModel(const WeightsFile& file, Device& device)
    : config_(file.config()),
      device_(device),
      dtype_(config_.dtype == "bfloat16" ? far::DType::kBFloat16 : kFloat),
      hidden_(16 * ((config_.dim * 8 + 47) / 48)) {  // 16 ceil(8 D / 3 / 16)
  const int64_t D = config_.dim;
  const int64_t T = config_.seq_len;
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t cols) {
    return device.tensor(file.tensor(name, {rows, cols}), rows, cols, device.weight_dtype(dtype_),
                         dtype_);
  };
  embedding_ =
      device.tensor(file.tensor("embedding", {kVocabulary, D}), kVocabulary, D, dtype_, dtype_);
  head_ = matrix("head.weight", kVocabulary, D);
  for (int64_t i = 0; i < config_.layers; ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    Layer layer;
    layer.qkv = matrix(prefix + "attention.qkv.weight", 3 * D, D);
    layer.out = matrix(prefix + "attention.out.weight", D, D);
    layer.gate_up = matrix(prefix + "mlp.gate_up.weight", 2 * hidden_, D);
    layer.down = matrix(prefix + "mlp.down.weight", D, hidden_);
    layer.keys = device.tensor(T, D, dtype_);
    layer.values = device.tensor(T, D, dtype_);
    layers_.push_back(std::move(layer));
  }
  stream_ = std::make_unique<ResidualStream>(device, load_sites(file, device), T, dtype_);
  tokens_ = device.tensor(T, 1, kFloat);  // int32 has the size of float32
  angle_ = device.tensor(T, D / config_.heads, kFloat);
  qkv_ = device.tensor(T, 3 * D, dtype_);
  mixed_ = device.tensor(T, D, dtype_);
  scores_ = device.tensor(T * config_.heads, T, kFloat);
  gate_up_out_ = device.tensor(T, 2 * hidden_, dtype_);
  activated_ = device.tensor(T, hidden_, dtype_);
  output_ = device.tensor(T, D, dtype_);
  logits_ = device.tensor(T, kVocabulary, dtype_);
}

std::vector<float> LanguageModel::forward(const std::vector<int32_t>& tokens) {
  const auto T = static_cast<int64_t>(tokens.size());
  if (T < 1 || T > (position_ == 0 ? config_.seq_len : 1)) {
    throw Error("forward: " + std::to_string(T) + " tokens at position " +
                std::to_string(position_) + ", expected " +
                (position_ == 0 ? "1 to " + std::to_string(config_.seq_len) : "1"));
  }
  device_.upload(tokens_.data.get(), tokens.data(), T * static_cast<int64_t>(sizeof(int32_t)));
  upload_angles(T);
  const far::Matrix embedding = stream_->start(T);
  device_.run(Embed{static_cast<const int32_t*>(tokens_.data.get()), embedding_.data.get(),
                    embedding.data, config_.dim},
              T * config_.dim, dtype_);
  for (const Layer& layer : layers_) {
    attention(layer, stream_->read(), output_.first(T));
    stream_->write(output_.first(T));
    mlp(layer, stream_->read(), output_.first(T));
    stream_->write(output_.first(T));
  }
  device_.linear(stream_->read(), head_, logits_.first(T));
  position_ += T;

  const auto count = static_cast<size_t>(T * kVocabulary);
  std::vector<float> logits(count);
  if (dtype_ == kFloat) {
    device_.download(logits.data(), logits_.data.get(), T * kVocabulary * far::size_of(dtype_));
    return logits;
  }
  std::vector<BFloat16> halves(count);
  device_.download(halves.data(), logits_.data.get(), T * kVocabulary * far::size_of(dtype_));
  for (size_t i = 0; i < count; ++i) {
    logits[i] = to_float(halves[i]);
  }
  return logits;
}

void LanguageModel::attention(const Layer& layer, const far::Matrix& x, const far::Matrix& y) {
  const int64_t T = x.rows;
  const int64_t D = config_.dim;
  const int64_t head_dim = D / config_.heads;
  device_.linear(x, layer.qkv, qkv_.first(T));
  device_.run(RotateAndFile{qkv_.data.get(), static_cast<const float*>(angle_.data.get()),
                            layer.keys.data.get(), layer.values.data.get(), T, D, head_dim,
                            position_, config_.seq_len},
              T * D / 2, dtype_);
  device_.run(CausalAttention{qkv_.data.get(), layer.keys.data.get(), layer.values.data.get(),
                              static_cast<float*>(scores_.data.get()), mixed_.data.get(), D,
                              head_dim, position_, config_.seq_len},
              T * config_.heads, dtype_);
  device_.linear(mixed_.first(T), layer.out, y);
}

void LanguageModel::mlp(const Layer& layer, const far::Matrix& x, const far::Matrix& y) {
  const int64_t T = x.rows;
  device_.linear(x, layer.gate_up, gate_up_out_.first(T));
  device_.run(SwiGlu{gate_up_out_.data.get(), activated_.data.get(), hidden_}, T * hidden_, dtype_);
  device_.linear(activated_.first(T), layer.down, y);
}

/// Cosines and sines of the angles position * base^(-2 i / E).
void LanguageModel::upload_angles(int64_t tokens) {
  const int64_t head_dim = config_.dim / config_.heads;
  const int64_t half = head_dim / 2;
  std::vector<float> angle(static_cast<size_t>(2 * tokens * half));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < half; ++i) {
      const float exponent = -static_cast<float>(2 * i) / static_cast<float>(head_dim);
      const float turn = static_cast<float>(position_ + t) * std::pow(kRotaryBase, exponent);
      angle[static_cast<size_t>(t * half + i)] = std::cos(turn);
      angle[static_cast<size_t>((tokens + t) * half + i)] = std::sin(turn);
    }
  }
  device_.upload(angle_.data.get(), angle.data(),
                 static_cast<int64_t>(angle.size() * sizeof(float)));
}

}  // namespace decoder
