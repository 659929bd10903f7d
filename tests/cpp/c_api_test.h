/* The checks of c_api_test.c, each compiled as C11. A check returns NULL when it passes, else what
 * went wrong. c_api_test.cpp runs them under GoogleTest. */

#ifndef FLASH_ATTN_RES_TESTS_C_API_TEST_H_
#define FLASH_ATTN_RES_TESTS_C_API_TEST_H_

#ifdef __cplusplus
extern "C" {
#endif

const char* c_api_version(void);
const char* c_api_defaults(void);
const char* c_api_attend(void);
const char* c_api_attend_backward(void);
const char* c_api_read(void);
const char* c_api_read_quantized(void);
const char* c_api_read_backward(void);
const char* c_api_fold(void);
const char* c_api_stochastic_add(void);
const char* c_api_quantize(void);
const char* c_api_attend_stored(void);
const char* c_api_read_stored(void);
const char* c_api_executor(void);
const char* c_api_bad_lists(void);
const char* c_api_bad_structs(void);
const char* c_api_struct_growth(void);
const char* c_api_library_errors(void);
const char* c_api_no_cuda(void);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ATTN_RES_TESTS_C_API_TEST_H_ */
