/* The C functions, called from C11. The expected numbers are worked out by hand.
 *
 * attend: one token, v_1 = (1, 1), v_2 = (1, -1), u = (0, a) with a = ln(3) / 2. Both keys have RMS
 * 1, so the logits are a and -a, p = (3/4, 1/4), out = (1, 1/2), lse = ln(4 / sqrt(3)). With
 * dout = (0, 1): dp = (1, -1), delta = 1/2, dlogit = (3/8, -3/8) and
 *
 *   dv_1 = (0, 3/4) + 3/8 (0, a) - 3/8 a 1/2 (1, 1)  = (-3a/16, 3/4 + 3a/16)
 *   dv_2 = (0, 1/4) - 3/8 (0, a) - 3/8 a 1/2 (1, -1) = (-3a/16, 1/4 - 3a/16)
 *   du   = 3/8 (1, 1) - 3/8 (1, -1)                  = (0, 3/4)
 *
 * read: phase 1 gives o = (2, 0) with lse = ln 3; partial (0, 1) + update (1, 0) = (1, 1) with the
 * query 0, hence logit 0 and p = (3/4, 1/4): h = (1.75, 0.25), whose RMS is 1.25. With the weight
 * (1, 5) x = (1.4, 1). Without the norm and with dx = (1, 0): dp = (2, 1), delta = 1.75,
 * dlogit = (0.1875, -0.1875), do = (0.75, 0), dpartial = (0.25, 0), du = -0.1875 (1, 1).
 *
 * quantize: (1, 0) + (0, 3) = (1, 3). 3 is 2^14 1.5 times 2^-13, and 384 times 2^-7 where 768 is
 * above 448. The sources of attend in float8 are +-256 times 2^-8: the same values, the same
 * results. */

#include "c_api_test.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "flash_attn_res/c_api.h"

#define CHECK(condition)                                                                      \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      snprintf(failure, sizeof(failure), "line %d: %s; last error: %s", __LINE__, #condition, \
               flash_attn_res_last_error());                                                  \
      return failure;                                                                         \
    }                                                                                         \
  } while (0)

static char failure[1024];
static const double kTolerance = 4e-6;           /* of float32, and of the eps in the key norm */
static const double kA = 0.54930614433405484570; /* ln(3) / 2 */

/* NaN is never near. */
static int near(double value, double expected) { return fabs(value - expected) <= kTolerance; }

static int last_error_has(const char* text) {
  return strstr(flash_attn_res_last_error(), text) != NULL;
}

static flash_attn_res_const_matrix input(const float* data, int64_t rows, int64_t cols) {
  const flash_attn_res_const_matrix view = {data, rows, cols, cols, FLASH_ATTN_RES_FLOAT32};
  return view;
}

static flash_attn_res_matrix output(float* data, int64_t rows, int64_t cols) {
  const flash_attn_res_matrix view = {data, rows, cols, cols, FLASH_ATTN_RES_FLOAT32};
  for (int64_t i = 0; i < rows * cols; ++i) {
    data[i] = NAN; /* poison: whatever is not written fails its check */
  }
  return view;
}

static flash_attn_res_device cpu(void) {
  const flash_attn_res_device device = {FLASH_ATTN_RES_CPU, 0};
  return device;
}

/* A context with `bytes` of workspace, aligned as the library asks. */
typedef struct scratch {
  void* memory;
  flash_attn_res_context context;
} scratch;

static scratch make_scratch(int64_t bytes) {
  scratch s;
  s.context = flash_attn_res_default_context();
  s.memory = aligned_alloc(64, (size_t)(bytes + 64 - bytes % 64));
  s.context.workspace = s.memory;
  s.context.workspace_bytes = bytes;
  return s;
}

/* The example of attend at the head of the file, with room for every result. */
typedef struct attend_example {
  float v1[2], v2[2], u[2];
  float out_data[2], lse_data[1], logits_data[2], inv_rms_data[2], probs_data[2];
  flash_attn_res_const_matrix sources[2];
  flash_attn_res_matrix out[1];
  flash_attn_res_attend_args args;
} attend_example;

static void make_attend_example(attend_example* e) {
  e->v1[0] = 1, e->v1[1] = 1;
  e->v2[0] = 1, e->v2[1] = -1;
  e->u[0] = 0, e->u[1] = (float)kA;
  e->sources[0] = input(e->v1, 1, 2);
  e->sources[1] = input(e->v2, 1, 2);
  e->out[0] = output(e->out_data, 1, 2);
  e->args = flash_attn_res_default_attend_args();
  e->args.sources = e->sources;
  e->args.num_sources = 2;
  e->args.queries = input(e->u, 1, 2);
  e->args.out = e->out;
  e->args.num_out = 1;
  e->args.lse = output(e->lse_data, 1, 1);
  e->args.logits = output(e->logits_data, 1, 2);
  e->args.inv_rms = output(e->inv_rms_data, 1, 2);
  e->args.probs = output(e->probs_data, 1, 2);
}

static flash_attn_res_status run_attend(const flash_attn_res_attend_args* args) {
  const int64_t bytes = flash_attn_res_attend_workspace_bytes(args, cpu());
  scratch s = make_scratch(bytes < 0 ? 0 : bytes);
  const flash_attn_res_status status = flash_attn_res_attend(args, &s.context);
  free(s.memory);
  return status;
}

/* The example of read, without the norm. */
typedef struct read_example {
  float o[2], lse[1], partial[2], update[2], query[2], weight[2];
  float x_data[2], partial_out_data[2], mix_data[2], logits_data[2], inv_rms_data[2];
  float mix_inv_rms_data[1], probs_data[2];
  flash_attn_res_const_matrix updates[1];
  flash_attn_res_read_args args;
} read_example;

static void make_read_example(read_example* e) {
  e->o[0] = 2, e->o[1] = 0;
  e->lse[0] = (float)(2 * kA);
  e->partial[0] = 0, e->partial[1] = 1;
  e->update[0] = 1, e->update[1] = 0;
  e->query[0] = 0, e->query[1] = 0;
  e->weight[0] = 1, e->weight[1] = 5;
  e->updates[0] = input(e->update, 1, 2);
  e->args = flash_attn_res_default_read_args();
  e->args.phase1_out = input(e->o, 1, 2);
  e->args.phase1_lse = input(e->lse, 1, 1);
  e->args.partial = input(e->partial, 1, 2);
  e->args.updates = e->updates;
  e->args.num_updates = 1;
  e->args.query = input(e->query, 1, 2);
  e->args.x = output(e->x_data, 1, 2);
  e->args.partial_out = output(e->partial_out_data, 1, 2);
  e->args.mix = output(e->mix_data, 1, 2);
  e->args.logits = output(e->logits_data, 1, 2);
  e->args.inv_rms = output(e->inv_rms_data, 1, 2);
  e->args.probs = output(e->probs_data, 1, 2);
}

static flash_attn_res_status run_read(const flash_attn_res_read_args* args) {
  const int64_t bytes = flash_attn_res_read_workspace_bytes(args, cpu());
  scratch s = make_scratch(bytes < 0 ? 0 : bytes);
  const flash_attn_res_status status = flash_attn_res_read(args, &s.context);
  free(s.memory);
  return status;
}

const char* c_api_version(void) {
  CHECK(flash_attn_res_version() == FLASH_ATTN_RES_VERSION);
  CHECK(strcmp(flash_attn_res_version_string(), FLASH_ATTN_RES_VERSION_STRING) == 0);
  return NULL;
}

const char* c_api_defaults(void) {
  CHECK(flash_attn_res_default_context().struct_size == sizeof(flash_attn_res_context));
  CHECK(flash_attn_res_default_attend_args().scale == 1.0);
  CHECK(flash_attn_res_default_attend_args().eps == 1e-6);
  CHECK(flash_attn_res_default_attend_args().queries.dtype == FLASH_ATTN_RES_DTYPE_NONE);
  CHECK(flash_attn_res_default_attend_backward_args().scale == 1.0);
  CHECK(flash_attn_res_default_read_args().norm_eps == 1e-6);
  CHECK(flash_attn_res_default_read_args().norm == FLASH_ATTN_RES_NORM_NONE);
  CHECK(flash_attn_res_default_read_backward_args().scale == 1.0);
  return NULL;
}

const char* c_api_attend(void) {
  attend_example e;
  make_attend_example(&e);
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_OK);
  CHECK(near(e.out_data[0], 1.0) && near(e.out_data[1], 0.5));
  CHECK(near(e.lse_data[0], log(4.0 / sqrt(3.0))));
  CHECK(near(e.logits_data[0], kA) && near(e.logits_data[1], -kA));
  CHECK(near(e.inv_rms_data[0], 1.0) && near(e.inv_rms_data[1], 1.0));
  CHECK(near(e.probs_data[0], 0.75) && near(e.probs_data[1], 0.25));
  return NULL;
}

const char* c_api_attend_backward(void) {
  attend_example e;
  make_attend_example(&e);
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_OK);

  const float dout_data[2] = {0, 1};
  float dv1[2], dv2[2], du[2];
  const flash_attn_res_const_matrix dout[1] = {input(dout_data, 1, 2)};
  flash_attn_res_matrix dsources[2] = {output(dv1, 1, 2), output(dv2, 1, 2)};
  flash_attn_res_attend_backward_args args = flash_attn_res_default_attend_backward_args();
  args.sources = e.sources;
  args.num_sources = 2;
  args.queries = e.args.queries;
  args.lse = input(e.lse_data, 1, 1);
  args.logits = input(e.logits_data, 1, 2);
  args.inv_rms = input(e.inv_rms_data, 1, 2);
  args.dout = dout;
  args.num_dout = 1;
  args.dsources = dsources;
  args.num_dsources = 2;
  args.dqueries = output(du, 1, 2);

  scratch s = make_scratch(flash_attn_res_attend_backward_workspace_bytes(&args, cpu()));
  flash_attn_res_status status = flash_attn_res_attend_backward(&args, &s.context);
  free(s.memory);
  CHECK(status == FLASH_ATTN_RES_OK);
  CHECK(near(dv1[0], -3 * kA / 16) && near(dv1[1], 0.75 + 3 * kA / 16));
  CHECK(near(dv2[0], -3 * kA / 16) && near(dv2[1], 0.25 - 3 * kA / 16));
  CHECK(near(du[0], 0.0) && near(du[1], 0.75));

  /* Once more, added to what is there: everything doubles. */
  args.accumulate_dsources = 1;
  args.accumulate_dqueries = 1;
  s = make_scratch(flash_attn_res_attend_backward_workspace_bytes(&args, cpu()));
  status = flash_attn_res_attend_backward(&args, &s.context);
  free(s.memory);
  CHECK(status == FLASH_ATTN_RES_OK);
  CHECK(near(dv1[0], -3 * kA / 8) && near(dv2[1], 0.5 - 3 * kA / 8));
  CHECK(near(du[1], 1.5));
  return NULL;
}

const char* c_api_read(void) {
  read_example e;
  make_read_example(&e);
  CHECK(run_read(&e.args) == FLASH_ATTN_RES_OK);
  CHECK(near(e.x_data[0], 1.75) && near(e.x_data[1], 0.25));
  CHECK(near(e.mix_data[0], 1.75) && near(e.mix_data[1], 0.25));
  CHECK(near(e.partial_out_data[0], 1.0) && near(e.partial_out_data[1], 1.0));
  CHECK(near(e.logits_data[0], 2 * kA) && near(e.logits_data[1], 0.0));
  CHECK(near(e.inv_rms_data[0], 0.0) && near(e.inv_rms_data[1], 1.0));
  CHECK(near(e.probs_data[0], 0.75) && near(e.probs_data[1], 0.25));

  make_read_example(&e);
  e.args.norm = FLASH_ATTN_RES_NORM_RMS;
  e.args.norm_weight = input(e.weight, 1, 2);
  e.args.mix_inv_rms = output(e.mix_inv_rms_data, 1, 1);
  CHECK(run_read(&e.args) == FLASH_ATTN_RES_OK);
  CHECK(near(e.x_data[0], 1.4) && near(e.x_data[1], 1.0));
  CHECK(near(e.mix_data[0], 1.75) && near(e.mix_data[1], 0.25));
  CHECK(near(e.mix_inv_rms_data[0], 0.8));
  return NULL;
}

const char* c_api_read_quantized(void) {
  read_example e;
  make_read_example(&e);
  unsigned char codes[2] = {0xff, 0xff};
  float scale[1], snapshot[2];
  const flash_attn_res_matrix x = {codes, 1, 2, 2, FLASH_ATTN_RES_FLOAT8_E4M3};
  e.args.x = x;
  e.args.x_scale = output(scale, 1, 1);
  e.args.scale_rounding = FLASH_ATTN_RES_SCALE_POWER_OF_TWO;
  e.args.snapshot = output(snapshot, 1, 2);
  CHECK(run_read(&e.args) == FLASH_ATTN_RES_OK);
  /* x = (1.75, 0.25): 1.75 / 448 is 2^-8, and the values are 448 and 64 of it. */
  CHECK(scale[0] > 0.00390624f && scale[0] < 0.0078126f);
  const int doubled = scale[0] > 0.005f; /* the mixture may lie an ulp above 1.75 */
  CHECK(doubled ? codes[0] == 0x76 && codes[1] == 0x60 : codes[0] == 0x7e && codes[1] == 0x68);
  CHECK(near(snapshot[0], 1.0) && near(snapshot[1], 1.0));

  e.args.reserved = 1;
  CHECK(run_read(&e.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("reserved is 1, expected 0"));

  /* A program built before these members existed does not set them, whatever lies there. */
  make_read_example(&e);
  e.args.struct_size = offsetof(flash_attn_res_read_args, x_scale);
  memset((char*)&e.args + e.args.struct_size, 0x5a, sizeof(e.args) - e.args.struct_size);
  CHECK(run_read(&e.args) == FLASH_ATTN_RES_OK);
  CHECK(near(e.x_data[0], 1.75) && near(e.x_data[1], 0.25));
  return NULL;
}

const char* c_api_read_backward(void) {
  read_example e;
  make_read_example(&e);
  CHECK(run_read(&e.args) == FLASH_ATTN_RES_OK);

  const float dx[2] = {1, 0};
  float dphase1_out[2], dphase1_lse[1], dh[2], gate[1], dpartial[2], dquery[2];
  flash_attn_res_read_backward_args args = flash_attn_res_default_read_backward_args();
  args.phase1_out = e.args.phase1_out;
  args.partial = input(e.partial_out_data, 1, 2);
  args.query = e.args.query;
  args.logits = input(e.logits_data, 1, 2);
  args.inv_rms = input(e.inv_rms_data, 1, 2);
  args.dx = input(dx, 1, 2);
  args.dphase1_out = output(dphase1_out, 1, 2);
  args.dphase1_lse = output(dphase1_lse, 1, 1);
  args.dh = output(dh, 1, 2);
  args.gate = output(gate, 1, 1);
  args.dpartial = output(dpartial, 1, 2);
  args.dquery = output(dquery, 1, 2);

  scratch s = make_scratch(flash_attn_res_read_backward_workspace_bytes(&args, cpu()));
  const flash_attn_res_status status = flash_attn_res_read_backward(&args, &s.context);
  free(s.memory);
  CHECK(status == FLASH_ATTN_RES_OK);
  CHECK(near(dphase1_out[0], 0.75) && near(dphase1_out[1], 0.0));
  CHECK(near(dphase1_lse[0], 0.1875));
  CHECK(near(dh[0], 1.0) && near(dh[1], 0.0));
  CHECK(near(gate[0], 0.75));
  CHECK(near(dpartial[0], 0.25) && near(dpartial[1], 0.0));
  CHECK(near(dquery[0], -0.1875) && near(dquery[1], -0.1875));
  return NULL;
}

const char* c_api_fold(void) {
  const float queries_data[2] = {2, 3};
  const float weight_data[2] = {5, 7};
  const float dfolded_data[2] = {1, 2};
  float folded_data[2], dqueries_data[2], dweight_data[2];
  const flash_attn_res_const_matrix queries = input(queries_data, 1, 2);
  const flash_attn_res_const_matrix weight = input(weight_data, 1, 2);
  const flash_attn_res_const_matrix dfolded = input(dfolded_data, 1, 2);
  const flash_attn_res_matrix folded = output(folded_data, 1, 2);
  const flash_attn_res_matrix dqueries = output(dqueries_data, 1, 2);
  const flash_attn_res_matrix dweight = output(dweight_data, 1, 2);

  CHECK(flash_attn_res_fold_queries(&queries, &weight, &folded) == FLASH_ATTN_RES_OK);
  CHECK(near(folded_data[0], 10) && near(folded_data[1], 21));
  CHECK(flash_attn_res_fold_queries(&queries, NULL, &folded) == FLASH_ATTN_RES_OK);
  CHECK(near(folded_data[0], 2) && near(folded_data[1], 3));
  CHECK(flash_attn_res_fold_queries_backward(&queries, &weight, &dfolded, &dqueries, &dweight) ==
        FLASH_ATTN_RES_OK);
  CHECK(near(dqueries_data[0], 5) && near(dqueries_data[1], 14));
  CHECK(near(dweight_data[0], 2) && near(dweight_data[1], 6));
  CHECK(flash_attn_res_fold_queries(NULL, NULL, &folded) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  return NULL;
}

const char* c_api_stochastic_add(void) {
  const float one[3] = {1, -2, 0.5f};
  const float other[3] = {0.5f, 1, 1.00390625f}; /* the last sum has two neighbours */
  const int64_t seed[2] = {1, 2};
  uint16_t sum[3] = {0xffff, 0xffff, 0xffff}; /* NaN */
  const flash_attn_res_const_matrix terms[2] = {input(one, 1, 3), input(other, 1, 3)};
  flash_attn_res_stochastic_add_args args = flash_attn_res_default_stochastic_add_args();
  args.terms = terms;
  args.num_terms = 2;
  args.seed = seed;
  const flash_attn_res_matrix out = {sum, 1, 3, 3, FLASH_ATTN_RES_BFLOAT16};
  args.out = out;
  CHECK(flash_attn_res_stochastic_add(&args, NULL) == FLASH_ATTN_RES_OK);
  CHECK(sum[0] == 0x3fc0 && sum[1] == 0xbf80); /* 1.5, -1 */
  CHECK(sum[2] == 0x3fc0 || sum[2] == 0x3fc1); /* 1.50390625: 1.5 or 1.5078125 */
  args.num_terms = 5;
  CHECK(flash_attn_res_stochastic_add(&args, NULL) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("stochastic_add") && last_error_has("num_terms is 5"));
  args.num_terms = 2;
  args.seed = NULL;
  CHECK(flash_attn_res_stochastic_add(&args, NULL) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("seed"));
  return NULL;
}

const char* c_api_quantize(void) {
  const float one[2] = {1, 0};
  const float other[2] = {0, 3};
  const flash_attn_res_const_matrix terms[2] = {input(one, 1, 2), input(other, 1, 2)};
  flash_attn_res_quantize_args args = flash_attn_res_default_quantize_args();
  args.terms = terms;
  args.num_terms = 2;
  uint16_t halves[2] = {0xffff, 0xffff};
  uint8_t bytes[2] = {0xff, 0xff}, scale[1] = {0xff};
  const flash_attn_res_matrix as_half = {halves, 1, 2, 2, FLASH_ATTN_RES_FLOAT16};
  const flash_attn_res_matrix as_byte = {bytes, 1, 2, 2, FLASH_ATTN_RES_FLOAT8_E4M3};
  const flash_attn_res_matrix scales = {scale, 1, 1, 1, FLASH_ATTN_RES_FLOAT8_E8M0};
  args.out = as_half;
  args.scale = scales;
  CHECK(flash_attn_res_quantize(&args, NULL) == FLASH_ATTN_RES_OK);
  CHECK(scale[0] == 127 - 13);
  CHECK(halves[0] == 0x7000 && halves[1] == 0x7600); /* 2^13, 1.5 2^14 */
  args.out = as_byte;
  CHECK(flash_attn_res_quantize(&args, NULL) == FLASH_ATTN_RES_OK);
  CHECK(scale[0] == 127 - 7);
  CHECK(bytes[0] == 0x70 && bytes[1] == 0x7c); /* 128, 384 */

  args.num_terms = 5;
  CHECK(flash_attn_res_quantize(&args, NULL) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("quantize: num_terms is 5, expected at most 4"));
  args.num_terms = 2;
  args.scale.dtype = FLASH_ATTN_RES_FLOAT32;
  CHECK(flash_attn_res_quantize(&args, NULL) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("quantize: scale is float32, expected float8_e8m0"));
  args.scale = scales;
  args.out.dtype = FLASH_ATTN_RES_BFLOAT16;
  CHECK(flash_attn_res_quantize(&args, NULL) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("quantize: out is bfloat16, expected float16 or float8_e4m3"));
  CHECK(flash_attn_res_quantize(NULL, NULL) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("quantize: args is null"));
  return NULL;
}

/* The sources of attend_example in float8. */
typedef struct stored_sources {
  uint8_t v1[2], v2[2], scale1[1], scale2[1];
  flash_attn_res_const_matrix values[2], scales[2];
} stored_sources;

static void make_stored_sources(stored_sources* s) {
  s->v1[0] = 0x78, s->v1[1] = 0x78;
  s->v2[0] = 0x78, s->v2[1] = 0xf8;
  s->scale1[0] = s->scale2[0] = 127 - 8;
  const flash_attn_res_const_matrix values[2] = {{s->v1, 1, 2, 2, FLASH_ATTN_RES_FLOAT8_E4M3},
                                                 {s->v2, 1, 2, 2, FLASH_ATTN_RES_FLOAT8_E4M3}};
  const flash_attn_res_const_matrix scales[2] = {{s->scale1, 1, 1, 1, FLASH_ATTN_RES_FLOAT8_E8M0},
                                                 {s->scale2, 1, 1, 1, FLASH_ATTN_RES_FLOAT8_E8M0}};
  memcpy(s->values, values, sizeof(values));
  memcpy(s->scales, scales, sizeof(scales));
}

const char* c_api_attend_stored(void) {
  attend_example e;
  stored_sources s;
  make_attend_example(&e);
  make_stored_sources(&s);
  e.args.sources = s.values;
  e.args.source_scales = s.scales;
  e.args.num_source_scales = 2;
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_OK);
  CHECK(near(e.out_data[0], 1.0) && near(e.out_data[1], 0.5));
  CHECK(near(e.lse_data[0], log(4.0 / sqrt(3.0))));
  CHECK(near(e.probs_data[0], 0.75) && near(e.probs_data[1], 0.25));

  const float dout_data[2] = {0, 1};
  float dv1[2], dv2[2], du[2];
  const flash_attn_res_const_matrix dout[1] = {input(dout_data, 1, 2)};
  flash_attn_res_matrix dsources[2] = {output(dv1, 1, 2), output(dv2, 1, 2)};
  flash_attn_res_attend_backward_args args = flash_attn_res_default_attend_backward_args();
  args.sources = s.values;
  args.num_sources = 2;
  args.source_scales = s.scales;
  args.num_source_scales = 2;
  args.queries = e.args.queries;
  args.lse = input(e.lse_data, 1, 1);
  args.logits = input(e.logits_data, 1, 2);
  args.inv_rms = input(e.inv_rms_data, 1, 2);
  args.dout = dout;
  args.num_dout = 1;
  args.dsources = dsources;
  args.num_dsources = 2;
  args.dqueries = output(du, 1, 2);
  scratch memory = make_scratch(flash_attn_res_attend_backward_workspace_bytes(&args, cpu()));
  const flash_attn_res_status status = flash_attn_res_attend_backward(&args, &memory.context);
  free(memory.memory);
  CHECK(status == FLASH_ATTN_RES_OK);
  CHECK(near(dv1[0], -3 * kA / 16) && near(dv1[1], 0.75 + 3 * kA / 16));
  CHECK(near(dv2[0], -3 * kA / 16) && near(dv2[1], 0.25 - 3 * kA / 16));
  CHECK(near(du[0], 0.0) && near(du[1], 0.75));

  e.args.num_source_scales = 1;
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("attend: source_scales has 1 items, expected 2, one for each source"));
  e.args.source_scales = NULL;
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("source_scales is null, but num_source_scales is 1"));
  e.args.num_source_scales = 0;
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("sources[0] is float8_e4m3 but source_scales is empty"));

  /* A program built before these members existed does not set them, whatever lies there. */
  make_attend_example(&e);
  e.args.struct_size = offsetof(flash_attn_res_attend_args, source_scales);
  memset((char*)&e.args + e.args.struct_size, 0x5a, sizeof(e.args) - e.args.struct_size);
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_OK);
  CHECK(near(e.out_data[0], 1.0) && near(e.out_data[1], 0.5));
  return NULL;
}

const char* c_api_read_stored(void) {
  /* One-shot over the sources of attend: its result is that of attend. */
  attend_example e;
  stored_sources s;
  make_attend_example(&e);
  make_stored_sources(&s);
  float x[2], logits[2], inv_rms[2], dv1[2], dv2[2], du[2];
  flash_attn_res_read_args args = flash_attn_res_default_read_args();
  args.sources = s.values;
  args.num_sources = 2;
  args.source_scales = s.scales;
  args.num_source_scales = 2;
  args.query = e.args.queries;
  args.x = output(x, 1, 2);
  args.logits = output(logits, 1, 2);
  args.inv_rms = output(inv_rms, 1, 2);
  CHECK(run_read(&args) == FLASH_ATTN_RES_OK);
  CHECK(near(x[0], 1.0) && near(x[1], 0.5));
  CHECK(near(logits[0], kA) && near(logits[1], -kA));

  const float dx[2] = {0, 1};
  flash_attn_res_matrix dsources[2] = {output(dv1, 1, 2), output(dv2, 1, 2)};
  flash_attn_res_read_backward_args back = flash_attn_res_default_read_backward_args();
  back.sources = s.values;
  back.num_sources = 2;
  back.source_scales = s.scales;
  back.num_source_scales = 2;
  back.query = e.args.queries;
  back.logits = input(logits, 1, 2);
  back.inv_rms = input(inv_rms, 1, 2);
  back.dx = input(dx, 1, 2);
  back.dsources = dsources;
  back.num_dsources = 2;
  back.dquery = output(du, 1, 2);
  scratch memory = make_scratch(flash_attn_res_read_backward_workspace_bytes(&back, cpu()));
  const flash_attn_res_status status = flash_attn_res_read_backward(&back, &memory.context);
  free(memory.memory);
  CHECK(status == FLASH_ATTN_RES_OK);
  CHECK(near(dv1[0], -3 * kA / 16) && near(dv1[1], 0.75 + 3 * kA / 16));
  CHECK(near(dv2[0], -3 * kA / 16) && near(dv2[1], 0.25 - 3 * kA / 16));
  CHECK(near(du[0], 0.0) && near(du[1], 0.75));

  s.scales[1].dtype = FLASH_ATTN_RES_FLOAT8_E4M3;
  CHECK(run_read(&args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("read: source_scales[1] is float8_e4m3, expected float8_e8m0"));
  return NULL;
}

static void run_backwards(void* pool, int64_t count, void (*task)(void* context, int64_t index),
                          void* context) {
  ++*(int*)pool;
  for (int64_t i = count - 1; i >= 0; --i) {
    task(context, i);
  }
}

const char* c_api_executor(void) {
  enum { kTokens = 256, kWidth = 256 };
  float* source = malloc(sizeof(float) * kTokens * kWidth);
  float* mine = malloc(sizeof(float) * kTokens * kWidth);
  float* builtin = malloc(sizeof(float) * kTokens * kWidth);
  for (int i = 0; i < kTokens * kWidth; ++i) {
    source[i] = (float)((i * 37) % 101) - 50.0f;
  }
  float query[kWidth], lse[kTokens];
  for (int i = 0; i < kWidth; ++i) {
    query[i] = (float)(i % 7) / 7.0f;
  }
  const flash_attn_res_const_matrix both[2] = {input(source, kTokens - 1, kWidth),
                                               input(source + kWidth, kTokens - 1, kWidth)};
  flash_attn_res_matrix out = output(mine, kTokens - 1, kWidth);
  flash_attn_res_attend_args args = flash_attn_res_default_attend_args();
  args.sources = both;
  args.num_sources = 2;
  args.queries = input(query, 1, kWidth);
  args.out = &out;
  args.num_out = 1;
  args.lse = output(lse, 1, kTokens - 1);

  int calls = 0;
  const flash_attn_res_executor executor = {run_backwards, &calls};
  scratch s = make_scratch(flash_attn_res_attend_workspace_bytes(&args, cpu()));
  s.context.executor = &executor;
  const flash_attn_res_status first = flash_attn_res_attend(&args, &s.context);
  out = output(builtin, kTokens - 1, kWidth);
  s.context.executor = NULL;
  const flash_attn_res_status second = flash_attn_res_attend(&args, &s.context);
  const int same = memcmp(mine, builtin, sizeof(float) * (kTokens - 1) * kWidth) == 0;
  free(s.memory);
  free(source);
  free(mine);
  free(builtin);
  CHECK(first == FLASH_ATTN_RES_OK);
  CHECK(second == FLASH_ATTN_RES_OK);
  CHECK(calls > 0);
  CHECK(same); /* the order of the tasks does not matter, bit for bit */
  return NULL;
}

const char* c_api_bad_lists(void) {
  attend_example e;
  make_attend_example(&e);
  e.args.num_sources = -1;
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("attend: num_sources is -1"));
  CHECK(flash_attn_res_attend_workspace_bytes(&e.args, cpu()) == -1);

  make_attend_example(&e);
  e.args.num_sources = 513;
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("num_sources is 513, expected at most 512"));

  make_attend_example(&e);
  e.args.sources = NULL;
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("sources is null, but num_sources is 2"));

  read_example r;
  make_read_example(&r);
  r.args.num_updates = 3;
  CHECK(run_read(&r.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("read: num_updates is 3, expected at most 2"));
  return NULL;
}

const char* c_api_bad_structs(void) {
  CHECK(flash_attn_res_attend(NULL, NULL) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("attend: args is null"));
  CHECK(flash_attn_res_read_workspace_bytes(NULL, cpu()) == -1);
  CHECK(last_error_has("read: args is null"));

  attend_example e;
  make_attend_example(&e);
  e.args.struct_size = 0;
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("struct_size is 0"));

  make_attend_example(&e);
  flash_attn_res_context context = flash_attn_res_default_context();
  context.struct_size = 8;
  CHECK(flash_attn_res_attend(&e.args, &context) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("context->struct_size is 8"));

  flash_attn_res_read_backward_args backward = flash_attn_res_default_read_backward_args();
  backward.reserved = 1;
  CHECK(flash_attn_res_read_backward(&backward, NULL) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("reserved is 1, expected 0"));
  return NULL;
}

/* A program built with a later header, whose struct has one member more. */
const char* c_api_struct_growth(void) {
  struct {
    flash_attn_res_attend_args args;
    int64_t new_member;
  } later;
  attend_example e;
  make_attend_example(&e);
  later.args = e.args;
  later.args.struct_size = sizeof(later);
  later.new_member = 0;
  CHECK(run_attend(&later.args) == FLASH_ATTN_RES_OK);
  CHECK(near(e.out_data[1], 0.5));
  later.new_member = 1;
  CHECK(run_attend(&later.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("does not have"));
  return NULL;
}

const char* c_api_library_errors(void) {
  attend_example e;
  make_attend_example(&e);
  e.args.eps = 0.0;
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("attend") && last_error_has("eps"));

  make_attend_example(&e);
  e.sources[1].cols = 1;
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_INVALID_ARGUMENT);
  CHECK(last_error_has("sources[1]") && last_error_has("[1, 1]") && last_error_has("[1, 2]"));

  /* A later success leaves the message of the last failure alone. */
  make_attend_example(&e);
  CHECK(run_attend(&e.args) == FLASH_ATTN_RES_OK);
  CHECK(last_error_has("sources[1]"));
  return NULL;
}

const char* c_api_no_cuda(void) {
  attend_example e;
  make_attend_example(&e);
  flash_attn_res_context context = flash_attn_res_default_context();
  context.device.type = FLASH_ATTN_RES_CUDA;
  if (!FLASH_ATTN_RES_TEST_CUDA) {
    CHECK(flash_attn_res_attend_workspace_bytes(&e.args, context.device) == 0);
    CHECK(flash_attn_res_attend(&e.args, &context) == FLASH_ATTN_RES_UNSUPPORTED_DEVICE);
    CHECK(last_error_has("attend: this build of flash_attn_res has no CUDA kernels"));
  }
  return NULL;
}
