/* vnni_in_c.h - the tables for AVX-VNNI without AVX-VNNI, for tests. They need AVX2. */
#ifndef TEST_VNNI_IN_C_H
#define TEST_VNNI_IN_C_H

#include "qemb.h"

extern const qemb_ops in_c_avxvnni_int16_ops, in_c_avxvnni_int8_ops;

#endif
