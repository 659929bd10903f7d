/*
 * The operations of flash_attn_res for C and for every language that can call C.
 *
 * Each function here is the C++ function of the same name, argument for argument; attend.h, read.h
 * and fold.h say what it computes, with the formulas and the shape of every view. T, N, S, D, R and
 * K are the sizes of types.h. Nothing is allocated, printed or kept after a call returns.
 *
 *   - Arguments travel in a struct. Take it from flash_attn_res_default_..._args, which
 * sets struct_size and the defaults of the C++ struct, then fill in what is given. Members are only
 *     ever added at the end: struct_size tells the library which members its caller knows, so that
 *     a program built with an older header runs on a newer library. The views
 * (flash_attn_res_matrix and flash_attn_res_const_matrix), flash_attn_res_device and
 * flash_attn_res_executor never change.
 *   - A view whose dtype is FLASH_ATTN_RES_DTYPE_NONE (all zeros) is absent. A list is a pointer
 * and a count; {NULL, 0} is the empty list.
 *   - Functions return a status. When it is not FLASH_ATTN_RES_OK, flash_attn_res_last_error() says
 *     what was wrong: the operation, the argument, its shape and what was expected.
 *   - A context may be NULL: then the call runs on the CPU with no workspace.
 */

#ifndef FLASH_ATTN_RES_C_API_H_
#define FLASH_ATTN_RES_C_API_H_

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "flash_attn_res/version.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------------------- values and views */

/* Enumerations travel as int32_t: the size of a C enum is the compiler's own business. */

typedef int32_t flash_attn_res_status;
enum {
  FLASH_ATTN_RES_OK = 0,
  FLASH_ATTN_RES_INVALID_ARGUMENT = 1,
  FLASH_ATTN_RES_WORKSPACE_TOO_SMALL = 2,
  FLASH_ATTN_RES_UNSUPPORTED_DEVICE = 3,
  FLASH_ATTN_RES_CUDA_ERROR = 4,
  FLASH_ATTN_RES_OUT_OF_MEMORY = 5 /* the host had no memory left for an error message */
};

typedef int32_t flash_attn_res_dtype;
enum {
  FLASH_ATTN_RES_DTYPE_NONE = 0,
  FLASH_ATTN_RES_FLOAT32 = 1,
  FLASH_ATTN_RES_BFLOAT16 = 2,
  FLASH_ATTN_RES_FLOAT16 = 3,
  FLASH_ATTN_RES_FLOAT64 = 4,
  FLASH_ATTN_RES_FLOAT8_E4M3 = 5, /* quantised sources and the quantised x of read */
  FLASH_ATTN_RES_FLOAT8_E8M0 = 6  /* the scales of quantised sources */
};

typedef int32_t flash_attn_res_device_type;
enum { FLASH_ATTN_RES_CPU = 0, FLASH_ATTN_RES_CUDA = 1 };

typedef int32_t flash_attn_res_output_norm;
enum { FLASH_ATTN_RES_NORM_NONE = 0, FLASH_ATTN_RES_NORM_RMS = 1 };

typedef int32_t flash_attn_res_mix_rounding;
enum { FLASH_ATTN_RES_MIX_FLOAT32 = 0, FLASH_ATTN_RES_MIX_STORAGE = 1 };

typedef int32_t flash_attn_res_scale_rounding;
enum { FLASH_ATTN_RES_SCALE_NONE = 0, FLASH_ATTN_RES_SCALE_POWER_OF_TWO = 1 };

/* `rows` rows of `cols` consecutive elements; row r starts at element r * stride. Read only. */
typedef struct flash_attn_res_const_matrix {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;
  flash_attn_res_dtype dtype;
} flash_attn_res_const_matrix;

/* The same, for what an operation writes. */
typedef struct flash_attn_res_matrix {
  void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;
  flash_attn_res_dtype dtype;
} flash_attn_res_matrix;

typedef struct flash_attn_res_device {
  flash_attn_res_device_type type;
  int32_t index; /* CUDA device ordinal; ignored on the CPU */
} flash_attn_res_device;

/* Runs task(context, i) for every i in [0, count), in any order and on any threads, and returns
 * when all are done. */
typedef struct flash_attn_res_executor {
  void (*run)(void* pool, int64_t count, void (*task)(void* context, int64_t index), void* context);
  void* pool;
} flash_attn_res_executor;

/* How a call runs: device, stream, scratch memory and threads, all owned by the caller. */
typedef struct flash_attn_res_context {
  size_t struct_size;
  flash_attn_res_device device;
  void* stream;    /* cudaStream_t on CUDA; ignored on the CPU */
  void* workspace; /* 64-byte aligned, at least as large as the operation's workspace query says */
  int64_t workspace_bytes;
  const flash_attn_res_executor* executor; /* NULL: the library's own threads */
} flash_attn_res_context;
static inline flash_attn_res_context flash_attn_res_default_context(void) {
  flash_attn_res_context context;
  memset(&context, 0, sizeof(context));
  context.struct_size = sizeof(context);
  return context;
}

/* ---------------------------------------------------------------------------------- the library */

/* The version of the library that runs, as FLASH_ATTN_RES_VERSION (which is the header's), and as
 * text. */
int32_t flash_attn_res_version(void);
const char* flash_attn_res_version_string(void);

/* What the last call that failed on this thread had to say. Valid until the next call that fails
 * on this thread; empty when none has failed. */
const char* flash_attn_res_last_error(void);

/* --------------------------------------------------------------------------------------- attend */

/* S queries over N frozen sources: AttendArgs of attend.h. */
typedef struct flash_attn_res_attend_args {
  size_t struct_size;
  const flash_attn_res_const_matrix* sources; /* N x [T, D] */
  int64_t num_sources;
  flash_attn_res_const_matrix queries; /* [S, R] float */
  double scale;
  double eps;
  const flash_attn_res_matrix* out; /* S x [T, D] */
  int64_t num_out;
  flash_attn_res_matrix lse;                        /* [S, T] float */
  flash_attn_res_matrix logits;                     /* [T, S * N] float, optional */
  flash_attn_res_matrix inv_rms;                    /* [T, N] float, optional */
  flash_attn_res_matrix probs;                      /* [T, S * N] float, optional */
  const flash_attn_res_const_matrix* source_scales; /* N x [T, 1] or [T, groups] e8m0, or empty */
  int64_t num_source_scales;
} flash_attn_res_attend_args;
static inline flash_attn_res_attend_args flash_attn_res_default_attend_args(void) {
  flash_attn_res_attend_args args;
  memset(&args, 0, sizeof(args));
  args.struct_size = sizeof(args);
  args.scale = 1.0;
  args.eps = 1e-6;
  return args;
}

/* Scratch bytes that the operation needs; -1 when the arguments are no valid struct. */
int64_t flash_attn_res_attend_workspace_bytes(const flash_attn_res_attend_args* args,
                                              flash_attn_res_device device);
flash_attn_res_status flash_attn_res_attend(const flash_attn_res_attend_args* args,
                                            const flash_attn_res_context* context);

/* AttendBackwardArgs of attend.h. Results that are absent are not computed. */
typedef struct flash_attn_res_attend_backward_args {
  size_t struct_size;
  const flash_attn_res_const_matrix* sources; /* N x [T, D] */
  int64_t num_sources;
  flash_attn_res_const_matrix queries; /* [S, R] float */
  double scale;
  flash_attn_res_const_matrix lse;         /* [S, T] float, from the forward */
  flash_attn_res_const_matrix logits;      /* [T, S * N] float, from the forward */
  flash_attn_res_const_matrix inv_rms;     /* [T, N] float, from the forward */
  const flash_attn_res_const_matrix* dout; /* S x [T, D], or empty: zero */
  int64_t num_dout;
  flash_attn_res_const_matrix gate;      /* [S, T] float, optional */
  flash_attn_res_const_matrix dlse;      /* [S, T] float, optional */
  const flash_attn_res_matrix* dsources; /* N x [T, D], or empty */
  int64_t num_dsources;
  int32_t accumulate_dsources;                      /* 0 or 1 */
  int32_t accumulate_dqueries;                      /* 0 or 1 */
  flash_attn_res_matrix dqueries;                   /* [S, R] float, optional */
  const flash_attn_res_const_matrix* source_scales; /* N x [T, 1] or [T, groups] e8m0, or empty */
  int64_t num_source_scales;
} flash_attn_res_attend_backward_args;
static inline flash_attn_res_attend_backward_args flash_attn_res_default_attend_backward_args(
    void) {
  flash_attn_res_attend_backward_args args;
  memset(&args, 0, sizeof(args));
  args.struct_size = sizeof(args);
  args.scale = 1.0;
  return args;
}

int64_t flash_attn_res_attend_backward_workspace_bytes(
    const flash_attn_res_attend_backward_args* args, flash_attn_res_device device);
flash_attn_res_status flash_attn_res_attend_backward(
    const flash_attn_res_attend_backward_args* args, const flash_attn_res_context* context);

/* ----------------------------------------------------------------------------------------- read */

/* One reading site: ReadArgs of read.h. */
typedef struct flash_attn_res_read_args {
  size_t struct_size;
  flash_attn_res_const_matrix phase1_out;     /* [T, D], optional */
  flash_attn_res_const_matrix phase1_lse;     /* [1, T] float, with phase1_out */
  const flash_attn_res_const_matrix* sources; /* N x [T, D], may be empty */
  int64_t num_sources;
  flash_attn_res_const_matrix partial;        /* [T, D], optional */
  const flash_attn_res_const_matrix* updates; /* 0..2 x [T, D] */
  int64_t num_updates;
  flash_attn_res_const_matrix query; /* [1, R] float; may be absent when K == 1 */
  double scale;
  double eps;
  flash_attn_res_output_norm norm;
  flash_attn_res_mix_rounding mix_rounding;
  flash_attn_res_const_matrix norm_weight; /* [1, D], optional */
  double norm_eps;
  flash_attn_res_matrix x;           /* [T, D] */
  flash_attn_res_matrix partial_out; /* [T, D]; needed with updates */
  flash_attn_res_matrix mix;         /* [T, D], optional */
  flash_attn_res_matrix logits;      /* [T, K] float, optional */
  flash_attn_res_matrix inv_rms;     /* [T, K] float, optional */
  flash_attn_res_matrix mix_inv_rms; /* [1, T] float, optional */
  flash_attn_res_matrix probs;       /* [T, K] float, optional */
  flash_attn_res_matrix x_scale;     /* [T, 1] or [T, groups] float32, with x in float8 */
  flash_attn_res_matrix snapshot;    /* [T, D], optional */
  flash_attn_res_scale_rounding scale_rounding;
  int32_t reserved;                                 /* 0 */
  const flash_attn_res_const_matrix* source_scales; /* N x [T, 1] or [T, groups] e8m0, or empty */
  int64_t num_source_scales;
} flash_attn_res_read_args;
static inline flash_attn_res_read_args flash_attn_res_default_read_args(void) {
  flash_attn_res_read_args args;
  memset(&args, 0, sizeof(args));
  args.struct_size = sizeof(args);
  args.scale = 1.0;
  args.eps = 1e-6;
  args.norm_eps = 1e-6;
  return args;
}

int64_t flash_attn_res_read_workspace_bytes(const flash_attn_res_read_args* args,
                                            flash_attn_res_device device);
flash_attn_res_status flash_attn_res_read(const flash_attn_res_read_args* args,
                                          const flash_attn_res_context* context);

/* ReadBackwardArgs of read.h. Results that are absent are not computed. */
typedef struct flash_attn_res_read_backward_args {
  size_t struct_size;
  flash_attn_res_const_matrix phase1_out;     /* [T, D], optional */
  const flash_attn_res_const_matrix* sources; /* N x [T, D] */
  int64_t num_sources;
  flash_attn_res_const_matrix partial; /* [T, D], optional: partial_out of the forward */
  flash_attn_res_const_matrix query;   /* [1, R] float */
  double scale;
  flash_attn_res_output_norm norm;
  flash_attn_res_mix_rounding mix_rounding;
  flash_attn_res_const_matrix norm_weight;  /* [1, D] */
  flash_attn_res_const_matrix logits;       /* [T, K] float, from the forward */
  flash_attn_res_const_matrix inv_rms;      /* [T, K] float, from the forward */
  flash_attn_res_const_matrix mix_inv_rms;  /* [1, T] float, from the forward, with the norm */
  flash_attn_res_const_matrix dx;           /* [T, D], optional */
  flash_attn_res_const_matrix dmix;         /* [T, D], optional */
  flash_attn_res_const_matrix dpartial_out; /* [T, D], optional */
  flash_attn_res_matrix dphase1_out;        /* [T, D], optional */
  flash_attn_res_matrix dphase1_lse;        /* [1, T] float, optional */
  flash_attn_res_matrix dh;                 /* [T, D], optional; may be the memory of phase1_out */
  flash_attn_res_matrix gate;               /* [1, T] float, optional */
  const flash_attn_res_matrix* dsources;    /* N x [T, D], or empty */
  int64_t num_dsources;
  flash_attn_res_matrix dpartial;                   /* [T, D], optional */
  flash_attn_res_matrix dquery;                     /* [1, R] float, optional */
  flash_attn_res_matrix dnorm_weight;               /* [1, D], optional */
  int32_t accumulate_dsources;                      /* 0 or 1 */
  int32_t accumulate_dquery;                        /* 0 or 1 */
  int32_t accumulate_dnorm_weight;                  /* 0 or 1 */
  int32_t reserved;                                 /* 0 */
  const flash_attn_res_const_matrix* source_scales; /* N x [T, 1] or [T, groups] e8m0, or empty */
  int64_t num_source_scales;
} flash_attn_res_read_backward_args;
static inline flash_attn_res_read_backward_args flash_attn_res_default_read_backward_args(void) {
  flash_attn_res_read_backward_args args;
  memset(&args, 0, sizeof(args));
  args.struct_size = sizeof(args);
  args.scale = 1.0;
  return args;
}

int64_t flash_attn_res_read_backward_workspace_bytes(const flash_attn_res_read_backward_args* args,
                                                     flash_attn_res_device device);
flash_attn_res_status flash_attn_res_read_backward(const flash_attn_res_read_backward_args* args,
                                                   const flash_attn_res_context* context);

/* ------------------------------------------------------------------------------- stochastic_add */

/* A sum rounded to bfloat16 stochastically: StochasticAddArgs of stochastic.h. Needs no workspace.
 */
typedef struct flash_attn_res_stochastic_add_args {
  size_t struct_size;
  const flash_attn_res_const_matrix* terms; /* 1..4 x [T, D] */
  int64_t num_terms;
  const int64_t* seed; /* {seed, step}, in the memory of the call's device */
  int64_t site;
  flash_attn_res_matrix out; /* [T, D] bfloat16 */
} flash_attn_res_stochastic_add_args;
static inline flash_attn_res_stochastic_add_args flash_attn_res_default_stochastic_add_args(void) {
  flash_attn_res_stochastic_add_args args;
  memset(&args, 0, sizeof(args));
  args.struct_size = sizeof(args);
  return args;
}

flash_attn_res_status flash_attn_res_stochastic_add(const flash_attn_res_stochastic_add_args* args,
                                                    const flash_attn_res_context* context);

/* ------------------------------------------------------------------------------------- quantize */

/* float16 or float8 with powers of two as scales: QuantizeArgs of quantize.h. Needs no workspace.
 */
typedef struct flash_attn_res_quantize_args {
  size_t struct_size;
  const flash_attn_res_const_matrix* terms; /* 1..4 x [T, D] */
  int64_t num_terms;
  flash_attn_res_matrix out;   /* [T, D] float16 or float8_e4m3 */
  flash_attn_res_matrix scale; /* [T, 1] or [T, groups] float8_e8m0 */
} flash_attn_res_quantize_args;
static inline flash_attn_res_quantize_args flash_attn_res_default_quantize_args(void) {
  flash_attn_res_quantize_args args;
  memset(&args, 0, sizeof(args));
  args.struct_size = sizeof(args);
  return args;
}

flash_attn_res_status flash_attn_res_quantize(const flash_attn_res_quantize_args* args,
                                              const flash_attn_res_context* context);

/* ----------------------------------------------------------------------------------------- fold */

/* folded [S, R] = queries [S, R] * key_weight [S, R] or [1, R] (NULL or absent: ones). */
flash_attn_res_status flash_attn_res_fold_queries(const flash_attn_res_const_matrix* queries,
                                                  const flash_attn_res_const_matrix* key_weight,
                                                  const flash_attn_res_matrix* folded);

/* dqueries = dfolded * key_weight; dkey_weight = dfolded * queries. Either may be NULL or absent.
 */
flash_attn_res_status flash_attn_res_fold_queries_backward(
    const flash_attn_res_const_matrix* queries, const flash_attn_res_const_matrix* key_weight,
    const flash_attn_res_const_matrix* dfolded, const flash_attn_res_matrix* dqueries,
    const flash_attn_res_matrix* dkey_weight);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ATTN_RES_C_API_H_ */
