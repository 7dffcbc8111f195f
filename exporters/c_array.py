"""A file as a constant array in C++, to be compiled into a firmware: what lies beside a TFLite Micro file."""

from __future__ import annotations

from edgecomp.artifact import FILES

_HEADER = FILES["tflm"][2]
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


def c_array(data: bytes) -> tuple[bytes, bytes]:
    """Write a file's bytes, at least one, as a source and its header in C++11; equal bytes give equal text."""
    numbers = [f"0x{byte:02x}" for byte in data]
    rows = "\n".join(f"    {', '.join(numbers[i : i + _A_LINE])}," for i in range(0, len(numbers), _A_LINE))
    source = _SOURCE_TEXT.format(header=_HEADER, rows=rows)
    return source.encode(), _HEADER_TEXT.format(n=len(data)).encode()
