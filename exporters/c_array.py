"""A file as a constant array in C++, to be compiled into a firmware: model.cc and model.h beside a TFLite Micro model."""

from __future__ import annotations

from collections.abc import Mapping

SOURCE, HEADER = "model.cc", "model.h"
_A_LINE = 16

_HEADER_TEXT = """\
// A TFLite Micro model, written by edgecomp; edit nothing here.
#ifndef EDGECOMP_MODEL_H_
#define EDGECOMP_MODEL_H_

#include <cstddef>

namespace edgecomp {{

constexpr std::size_t kModelSize = {n};
extern const unsigned char kModel[kModelSize];  // on a multiple of 16 bytes

}}  // namespace edgecomp

#endif  // EDGECOMP_MODEL_H_
"""
_SOURCE_TEXT = """\
// A TFLite Micro model, written by edgecomp; edit nothing here.
#include "{header}"

namespace edgecomp {{

alignas(16) const unsigned char kModel[kModelSize] = {{
{rows}
}};

}}  // namespace edgecomp
"""


def c_array(data: bytes) -> Mapping[str, bytes]:
    """Write a file's bytes as C++11 source and header; equal bytes give equal text.

    Args:
        data: at least one byte.

    Returns:
        file name -> contents.
    """
    numbers = [f"0x{byte:02x}" for byte in data]
    rows = "\n".join(f"    {', '.join(numbers[i : i + _A_LINE])}," for i in range(0, len(numbers), _A_LINE))
    return {
        SOURCE: _SOURCE_TEXT.format(header=HEADER, rows=rows).encode(),
        HEADER: _HEADER_TEXT.format(n=len(data)).encode(),
    }
