// What takes the place of the residual stream: depth attention over the outputs of earlier
// sublayers, by the library.
//
// Blocks of S sublayers; block b (from 0) begins at sublayer b S. Entering it, the running sum is
// stored in row b of a bank (row 0: the embedding) and a new sum begins:
//
//   site 0                       reads row 0, the embedding, alone
//   site b S                     reads rows 0..b-1 and the sum, which becomes row b
//   sites b S + 1 .. (b + 1) S   read rows 0..b and the sum of their block
//   the output site L            likewise, of the last block
//
// The rows are the same for all sites of a block: one `attend` serves them (phase 1), and each is
// then one `read` of its result and the sum, with the sublayer's pre-norm (phase 2). A plain
// residual stream is the case without a bank: one term, the sum.

#ifndef DECODER_RESIDUAL_STREAM_H_
#define DECODER_RESIDUAL_STREAM_H_

#include <cstdint>
#include <vector>

#include "device.h"
#include "flash_attn_res/flash_attn_res.h"

namespace decoder {

/// The weights of the L + 1 sites.
struct Sites {
  int64_t sublayers = 0;   // L
  int64_t block_size = 0;  // S; 0: a plain residual stream
  Tensor queries;          // [L + 1, D] float32, folded with the key weights; not with S = 0
  Tensor norms;            // [L + 1, D] float32
  double eps = 1e-6;
};

class ResidualStream {
 public:
  /// For up to `max_tokens` tokens whose values have this dtype.
  ResidualStream(Device& device, Sites sites, int64_t max_tokens, far::DType dtype);

  /// Begins a pass of T tokens: the embedding [T, D] is to be written here.
  far::Matrix start(int64_t tokens);

  /// The normalised input [T, D] of the next sublayer, or after the last one, of the head.
  far::Matrix read();

  /// The output [T, D] of the sublayer, to be left as it is until the next read.
  void write(const far::Matrix& output) { pending_ = {output}; }

 private:
  /// Row `index` of the bank.
  far::Matrix row(int64_t index) const { return bank_.slice(index * max_tokens_, tokens_); }
  std::vector<far::ConstMatrix> rows(int64_t count) const;
  void read_sources_later(int64_t block);
  far::Context context(int64_t workspace_bytes);

  Device& device_;
  Sites sites_;
  int64_t max_tokens_;
  Tensor bank_;       // N rows of [max T, D]
  Tensor sum_;        // [max T, D]
  Tensor x_;          // [max T, D]
  Tensor out_, lse_;  // S x [max T, D], [S, max T]: phase 1 of the current block
  Tensor workspace_;  // bytes
  int64_t tokens_ = 0;
  int64_t site_ = 0;
  std::vector<far::ConstMatrix> pending_;  // nothing, or the last output
};

/// Throws Error with the library's words when a call has failed.
void check(const far::Status& status);

}  // namespace decoder

#endif  // DECODER_RESIDUAL_STREAM_H_
