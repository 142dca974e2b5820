// csrc/unpack/unpack_token.h by the host's compiler, for tests/data/test_unpack.py.

#include "unpack/unpack_token.h"

extern "C" void unpack_host(Narrow in, Wide out) {
    for (int64_t i = 0; i < in.cu_seqlens[in.sequences]; ++i) unpack_token(in, out, i);
}
