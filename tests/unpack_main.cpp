// Unpacks every file named in its arguments; the result lies beside it under FILE.out, an error under FILE.error.

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "edgecomp_unpack.hpp"

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    std::ifstream in(name, std::ios::binary);
    // In a block of exactly this length, so that a sanitizer sees any read beyond it.
    const std::vector<char> whole{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    std::vector<std::uint8_t> data(whole.begin(), whole.end()), full;
    data.shrink_to_fit();
    const char* error = edgecomp::unpack(data.data(), data.size(), full);
    std::ofstream out(name + (error ? ".error" : ".out"), std::ios::binary);
    if (error)
      out << error;
    else
      out.write(reinterpret_cast<const char*>(full.data()), static_cast<std::streamsize>(full.size()));
    if (!out.flush()) return 1;
  }
  return 0;
}
