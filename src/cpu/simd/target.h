// What every file of src/cpu/targets/ agrees on before it includes a vector header.
//
// The kernels are one source, compiled once per instruction set. A target file defines
// FLASH_ATTN_RES_TARGET (its namespace), includes one of simd/{portable,avx2,avx512,neon}.h and
// then the kernels. Everything that the kernels call lives in that namespace: a function shared
// between two targets would be merged by the linker, which may keep the copy that the machine
// cannot run. For the same reason nothing here uses templates or inline functions of the standard
// library.
//
// A vector header defines, for vectors of kLanes floats, kRegisters of which the code can hold:
//
//   Vec, IntVec, Pair            kLanes floats, kLanes 32-bit integers, 2 * kLanes floats
//   broadcast, load_floats, store_floats, add, sub, mul, fma (a * b + c), clamp, reduce_add
//   bits, floats, int_*, half_of (arithmetic shift), to_exponent (shift into the exponent field)
//   load_{f32,bf16,f16,e4m3}     2 * kLanes elements from any address, widened exactly
//   store_{f32,bf16,f16}         rounded to nearest even; NaN stays NaN, overflow gives Inf
//   stream_{f32,bf16,f16}        the same past the caches; the address is a multiple of
//                                kStreamAlign
//   in_registers                 the same pair, loaded once: a compiler would rather make a load
//                                an operand of each instruction that uses it, and then loads bound
//                                tiles of products. No more than a return where operands are
//                                registers anyway
//   stream_fence                 orders streamed stores before what the thread publishes next
//   {load,store,stream}_bf16_split   the same in the split order of a pair
//   split, join                  a pair from natural to split order, and back
//
// The split order of a pair is whatever makes widening and narrowing of bf16 cheapest: on x86 the
// even elements in lo and the odd ones in hi, because a shift and a mask take them from the 32-bit
// lanes as they lie in memory, without the shuffles that the natural order needs.
//
// All of a header's loads and stores move pairs, because a pair of half-width vectors fills one
// full-width load or store.

#ifndef FLASH_ATTN_RES_CPU_SIMD_TARGET_H_
#define FLASH_ATTN_RES_CPU_SIMD_TARGET_H_

#ifndef FLASH_ATTN_RES_TARGET
#error "define FLASH_ATTN_RES_TARGET, the namespace of the instruction set, before this header"
#endif

#define FLASH_ATTN_RES_INLINE inline __attribute__((always_inline))

// For lambdas, which take the attribute after their parameters.
#define FLASH_ATTN_RES_ALWAYS __attribute__((always_inline))

#endif  // FLASH_ATTN_RES_CPU_SIMD_TARGET_H_
