// Makes a packed TFLite file of edgecomp plain: every packed and every int4 weight becomes int8, in memory, for any
// TFLite interpreter. One header, C++17, nothing but the standard library; no exception leaves it.
//
//   std::vector<std::uint8_t> full;
//   if (const char* error = edgecomp::unpack(packed.data(), packed.size(), full)) { ... }
//
// The layout of packed weights stands in edgecomp/atrest.py, packing.py and words.py, and in the README under "Packed
// TFLite, byte by byte"; what happens to the file, in exporters/unpack_tflite.py. This header does the same and gives
// the same bytes. Files may hold anything: damage is an error, and memory stays within the tensors' own shapes.
//
// Copyright the edgecomp authors. SPDX-License-Identifier: Apache-2.0

#ifndef EDGECOMP_UNPACK_HPP
#define EDGECOMP_UNPACK_HPP

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace edgecomp {

/// What a flatbuffer can hold.
constexpr std::uint64_t kMostBytes = 0x7fffffff;

namespace detail {

using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr char kOperator[] = "edgecomp.Unpack.1";
constexpr char kAnyOperator[] = "edgecomp.Unpack.";
constexpr uint64_t kMostTables = 1 << 18, kMostRank = 64, kAlignment = 16, kLongestWord = 255;
constexpr int32_t kCustom = 32, kUint8 = 3, kInt8 = 9, kInt4 = 17;

/// Little-endian number of N bytes.
template <int N>
inline uint64_t number(const uint8_t* at) {
  uint64_t value = 0;
  for (int i = 0; i < N; ++i) value |= static_cast<uint64_t>(at[i]) << (8 * i);
  return value;
}

inline void put(uint8_t* at, uint64_t value) {
  for (int i = 0; i < 4; ++i) at[i] = static_cast<uint8_t>(value >> (8 * i));
}

inline uint32_t crc32(const uint8_t* data, size_t n) {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int k = 0; k < 8; ++k) c = (c >> 1) ^ ((c & 1) ? 0xedb88320u : 0u);
    table[i] = c;
  }
  uint32_t crc = 0xffffffffu;
  for (size_t i = 0; i < n; ++i) crc = table[(crc ^ data[i]) & 255] ^ (crc >> 8);
  return crc ^ 0xffffffffu;
}

// ---- packed codes ---------------------------------------------------------------------------------------------------

/// Bytes of n numbers of `bits` bits, in fields of 8, 4, 2 and 1 bits.
inline uint64_t field_bytes(uint64_t n, int bits) {
  uint64_t bytes = 0;
  for (int width = 8; width; width /= 2)
    if (bits & width) bytes += (n * static_cast<uint64_t>(width) + 7) / 8;
  return bytes;
}

/// Read n numbers of `bits` bits. A field of w bits of n numbers is m = ceil(n*w/8) bytes; number p*m + i stands in byte i
/// at bit p*w. The first field holds the lowest bits.
template <typename T>
inline void read_fields(const uint8_t* at, uint64_t n, int bits, T* values) {
  std::fill(values, values + n, static_cast<T>(0));
  int low = 0;
  for (int width = 8; width; width /= 2) {
    if (!(bits & width)) continue;
    const uint64_t m = (n * static_cast<uint64_t>(width) + 7) / 8;
    const unsigned mask = (1u << width) - 1;
    for (uint64_t plane = 0, first = 0; first < n; ++plane, first += m) {
      const unsigned shift = static_cast<unsigned>(plane) * static_cast<unsigned>(width);
      const uint64_t count = std::min(m, n - first);
      for (uint64_t i = 0; i < count; ++i)
        values[first + i] = static_cast<T>(values[first + i] | (((at[i] >> shift) & mask) << low));
    }
    at += m;
    low += width;
  }
}

/// Two tries of words, as edgecomp/words.py numbers them.
struct Trie {
  std::vector<uint32_t> parent, node_of;  // node_of: both chapters, by number; 0 where there is no word
  std::vector<uint8_t> rank;
  std::vector<uint32_t> depth;
  uint64_t boundary = 0;
};

inline const char* make_trie(const std::vector<uint8_t>& below, uint64_t k, uint64_t room, Trie& trie) {
  const uint64_t n = below.size() + 2;
  trie.parent.assign(n, 0);
  trie.rank.assign(n, 0);
  trie.depth.assign(n, 0);
  std::vector<uint8_t> chapter(n, 0);
  trie.parent[1] = 1;
  chapter[1] = 1;
  uint64_t next = 2;
  for (uint64_t node = 0; node < n; ++node) {
    const uint64_t children = node < 2 ? k : below[node - 2];
    if (children > k || children > n - next || (node >= 2 && next <= node)) return "counts of children are no tree's";
    for (uint64_t r = 0; r < children; ++r, ++next) {
      trie.parent[next] = static_cast<uint32_t>(node);
      trie.rank[next] = static_cast<uint8_t>(r);
      trie.depth[next] = trie.depth[node] + 1;
      chapter[next] = chapter[node];
      if (trie.depth[next] > kLongestWord) return "a word is too long";
    }
  }
  if (next != n) return "counts of children are no tree's";
  trie.node_of.assign(2 * room, 0);
  uint64_t leaves[2] = {0, 0}, inner[2] = {0, 0};
  for (uint64_t node = 2; node < n; ++node) {
    const uint64_t children = below[node - 2], c = chapter[node];
    if (children == k) continue;  // a node with all children is no word
    if (leaves[c] + inner[c] == room) return "a table has more words than numbers";
    const uint64_t at = children ? room - 1 - inner[c]++ : leaves[c]++;
    trie.node_of[c * room + at] = static_cast<uint32_t>(node);
  }
  trie.boundary = std::max(leaves[0], leaves[1]);
  return nullptr;
}

inline const char* read_words(const uint8_t* data, uint64_t size, uint64_t n, std::vector<uint8_t>& out) {
  if (size < 24) return "packed words are cut off";
  const int bits = data[1], word_bits = data[2], width = data[22];
  const uint64_t group = data[3], n_counts = number<4>(data + 12), n_tokens = number<4>(data + 16);
  const uint64_t k = number<2>(data + 20);
  if (bits < 2 || bits > 8 || (word_bits != 6 && word_bits != 8 && word_bits != 10 && word_bits != 12))
    return "packed words have a width that is none";
  if ((group != 1 && group != 2 && group != 4) || n % group) return "packed words have groups that are none";
  const uint64_t room = uint64_t{1} << word_bits;
  if (!k || k > std::min<uint64_t>(255, room / 2) || width < 1 || width > 8 || data[23])
    return "packed words have a header that is none";
  if (n_counts < 2 * k || n_counts > 4 * room + 2 * kLongestWord || !n_tokens || n_tokens > n)
    return "packed words have more parts than codes";
  const uint64_t counts_at = 24 + k * group, tokens_at = counts_at + field_bytes(n_counts, width);
  if (size != tokens_at + field_bytes(n_tokens, word_bits)) return "packed words have another length than expected";
  std::vector<uint8_t> below(n_counts);
  read_fields(data + counts_at, n_counts, width, below.data());
  Trie trie;
  if (const char* error = make_trie(below, k, room, trie)) return error;
  std::vector<uint16_t> tokens(n_tokens);
  read_fields(data + tokens_at, n_tokens, word_bits, tokens.data());
  const uint64_t n_symbols = n / group;
  uint64_t total = 0, last = 0;
  bool second = false;
  for (const uint16_t token : tokens) {
    const uint32_t node = trie.node_of[(second ? room : 0) + token];
    if (!node) return "a number names no word";
    last = trie.depth[node];
    total += last;
    second = token >= trie.boundary;
  }
  if (total < n_symbols || total - last >= n_symbols) return "packed words are too few or too many";
  const size_t start = out.size();
  out.resize(start + n);
  uint8_t* codes = out.data() + start;
  const uint8_t* symbols = data + 24;
  uint64_t begin = 0;
  second = false;
  for (const uint16_t token : tokens) {
    uint32_t node = trie.node_of[(second ? room : 0) + token];
    const uint64_t length = trie.depth[node];
    // From the word's node up to the root: the last symbol comes first.
    for (uint64_t i = length; i-- > 0; node = trie.parent[node])
      if (begin + i < n_symbols)
        std::memcpy(codes + (begin + i) * group, symbols + trie.rank[node] * group, static_cast<size_t>(group));
    begin += length;
    second = token >= trie.boundary;
  }
  return nullptr;
}

/// Append the n codes that a packed tensor's bytes stand for.
inline const char* read_codes(const uint8_t* data, uint64_t size, uint64_t n, std::vector<uint8_t>& out) {
  if (size < 12) return "packed codes are cut off";
  if (number<4>(data + 4) != n) return "packed codes are more or fewer than the tensor's shape says";
  const size_t start = out.size();
  if (data[0] == 1) {
    const int bits = data[1];
    if (bits < 2 || bits > 7 || data[2] || data[3]) return "packed codes have a width that is none";
    if (size != 12 + field_bytes(n, bits)) return "packed codes have another length than expected";
    out.resize(start + n);
    uint8_t* codes = out.data() + start;
    read_fields(data + 12, n, bits, codes);
    const unsigned sign = 1u << (bits - 1);
    for (uint64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>((codes[i] ^ sign) - sign);
  } else if (data[0] == 2) {
    if (const char* error = read_words(data, size, n, out)) return error;
  } else {
    return "packing is of an unknown kind";
  }
  if (crc32(out.data() + start, static_cast<size_t>(n)) != number<4>(data + 8))
    return "checksum of unpacked codes differs; the file is damaged";
  return nullptr;
}

// ---- the flatbuffer -------------------------------------------------------------------------------------------------

/// A file read with every offset checked. After the first that leads nowhere, `bad` stays set and numbers are 0.
struct File {
  const uint8_t* data;
  uint64_t size;
  uint64_t tables_left = kMostTables;
  bool bad = false;

  uint64_t at(int64_t position, unsigned bytes) {
    if (bad || position < 0 || static_cast<uint64_t>(position) + bytes > size) {
      bad = true;
      return 0;
    }
    const uint8_t* p = data + position;
    return bytes == 1 ? p[0] : bytes == 2 ? number<2>(p) : bytes == 4 ? number<4>(p) : number<8>(p);
  }
};

/// Where the elements of a list start, and how many there are.
struct List {
  int64_t start = 0;
  uint64_t count = 0;
};

struct Table {
  int64_t position = 0;

  /// Where a field's value stands, 0 if the table lacks it.
  int64_t field(File& f, int field_number) const {
    const int64_t vtable = position - static_cast<int32_t>(static_cast<uint32_t>(f.at(position, 4)));
    const int64_t slot = 4 + 2 * field_number;
    if (slot >= static_cast<int64_t>(f.at(vtable, 2))) return 0;
    const int64_t offset = static_cast<int64_t>(f.at(vtable + slot, 2));
    return offset ? position + offset : 0;
  }

  uint64_t get(File& f, int field_number, unsigned bytes) const {
    const int64_t where = field(f, field_number);
    return where ? f.at(where, bytes) : 0;
  }

  List list(File& f, int field_number, unsigned width) const {
    int64_t where = field(f, field_number);
    if (!where) return {};
    where += static_cast<int64_t>(f.at(where, 4));
    List found{where + 4, f.at(where, 4)};
    if (f.bad || static_cast<uint64_t>(found.start) + found.count * width > f.size) {
      f.bad = true;
      return {};
    }
    return found;
  }

  std::vector<Table> tables(File& f, int field_number) const {
    const List found = list(f, field_number, 4);
    if (found.count > f.tables_left) f.bad = true;
    if (f.bad) return {};
    f.tables_left -= found.count;
    std::vector<Table> all(static_cast<size_t>(found.count));
    int64_t at = found.start;
    for (Table& table : all) {
      table.position = at + static_cast<int64_t>(f.at(at, 4));
      at += 4;
    }
    return all;
  }

  /// A Buffer's contents, in the flatbuffer or behind it.
  List payload(File& f) const {
    const uint64_t offset = get(f, 1, 8), count = get(f, 2, 8);
    if (offset <= 1) return list(f, 0, 1);
    if (f.bad || offset > f.size || count > f.size - offset) {
      f.bad = true;
      return {};
    }
    return {static_cast<int64_t>(offset), count};
  }
};

struct Widened {
  uint64_t n_codes;
  bool packed;
};

struct Patch {
  int64_t position;
  uint64_t value;
  unsigned bytes;
};

class Unpacking {
 public:
  Unpacking(const uint8_t* data, uint64_t size) : f_{data, size} {}

  const char* run(uint64_t most_bytes, std::vector<uint8_t>& out) {
    if (f_.size < 8 || std::memcmp(f_.data + 4, "TFL3", 4)) return "no TFLite file";
    if (f_.size > kMostBytes) return "larger than a TFLite file can be";
    model_.position = static_cast<int64_t>(f_.at(0, 4));
    const std::vector<Table> graphs = model_.tables(f_, 2);
    buffers_ = model_.tables(f_, 4);
    if (const char* error = find_codes()) return error;
    std::vector<std::vector<Table>> tensors;
    used_.assign(buffers_.size(), 0);
    for (const Table& graph : graphs) {
      tensors.push_back(graph.tables(f_, 0));
      for (const Table& tensor : tensors.back()) {
        const uint64_t buffer = tensor.get(f_, 2, 4);
        if (buffer < used_.size()) ++used_[static_cast<size_t>(buffer)];
      }
    }
    if (f_.bad) return kDamaged;
    widened_.assign(buffers_.size(), Widened{0, false});
    for (size_t g = 0; g < graphs.size(); ++g) {
      uint64_t n_packed = 0;
      if (const char* error = take_operators(graphs[g], tensors[g], n_packed)) return error;
      for (size_t i = 0; i + static_cast<size_t>(n_packed) < tensors[g].size(); ++i)
        if (const char* error = widen_int4(tensors[g][i])) return error;
    }
    if (has_codes_) {
      const uint64_t n = codes_.size();
      if (!codes_.back() || std::count(codes_.begin(), codes_.end(), true) != 1)
        return "the unpacking operator's code is not the last";
      patch(model_.list(f_, 1, 4).start - 4, n - 1);
    }
    for (size_t i = 0; i < widened_.size(); ++i)
      if (widened_[i].n_codes && used_[i]) return "a buffer of packed codes is used for something else, too";
    if (f_.bad) return kDamaged;
    if (patches_.empty()) {
      out.assign(f_.data, f_.data + f_.size);
      return nullptr;
    }
    return write(most_bytes, out);
  }

 private:
  static constexpr const char* kDamaged = "damaged or cut off";

  void patch(int64_t position, uint64_t value, unsigned bytes = 4) { patches_.push_back({position, value, bytes}); }

  void patch_offset(int64_t position, int64_t target) {
    if (target <= position) f_.bad = true;
    patch(position, static_cast<uint64_t>(target - position));
  }

  const char* find_codes() {
    for (const Table& code : model_.tables(f_, 1)) {
      const int32_t old = static_cast<std::int8_t>(static_cast<uint8_t>(code.get(f_, 0, 1)));
      const int32_t recent = static_cast<int32_t>(static_cast<uint32_t>(code.get(f_, 3, 4)));
      bool ours = false;
      if (std::max(old, recent) == kCustom) {
        const List text = code.list(f_, 1, 1);
        if (text.count > 1 << 16) f_.bad = true;
        if (f_.bad) return kDamaged;
        const char* start = reinterpret_cast<const char*>(f_.data) + text.start;
        ours = text.count == std::strlen(kOperator) && !std::memcmp(start, kOperator, std::strlen(kOperator));
        const size_t n = std::strlen(kAnyOperator);
        if (!ours && text.count >= n && !std::memcmp(start, kAnyOperator, n)) return "packed by a later edgecomp";
      }
      codes_.push_back(ours);
      has_codes_ = has_codes_ || ours;
    }
    return f_.bad ? kDamaged : nullptr;
  }

  bool is_ours(const Table& op) {
    const uint64_t code = op.get(f_, 0, 4);
    return code < codes_.size() && codes_[static_cast<size_t>(code)];
  }

  const char* take_operators(const Table& graph, const std::vector<Table>& tensors, uint64_t& n) {
    const std::vector<Table> operators = graph.tables(f_, 3);
    while (n < operators.size() && is_ours(operators[static_cast<size_t>(n)])) ++n;
    for (size_t i = static_cast<size_t>(n); i < operators.size(); ++i)
      if (is_ours(operators[i])) return "not all unpacking operators stand at the front";
    if (!n) return f_.bad ? kDamaged : nullptr;
    std::vector<bool> read(tensors.size(), false);
    for (size_t i = 0; i < n; ++i) {
      uint64_t ends[2];
      for (int side = 0; side < 2; ++side) {
        const List list = operators[i].list(f_, 1 + side, 4);
        if (f_.bad) return kDamaged;
        if (list.count != 1) return "an unpacking operator has not one input and one output";
        ends[side] = f_.at(list.start, 4);
        if (ends[side] >= tensors.size()) return kDamaged;
      }
      if (ends[0] + n < tensors.size() || read[static_cast<size_t>(ends[0])]) return "packed tensors are not the last";
      read[static_cast<size_t>(ends[0])] = true;
      if (const char* error = swap(tensors[static_cast<size_t>(ends[0])], tensors[static_cast<size_t>(ends[1])]))
        return error;
    }
    const List list = graph.list(f_, 3, 4);
    const int64_t shorter = list.start - 4 + 4 * static_cast<int64_t>(n);
    patch_offset(graph.field(f_, 3), shorter);
    patch(shorter, list.count - n);
    patch(graph.list(f_, 0, 4).start - 4, tensors.size() - n);
    return f_.bad ? kDamaged : nullptr;
  }

  const char* swap(const Table& source, const Table& weight) {
    const uint64_t full = source.get(f_, 2, 4), empty = weight.get(f_, 2, 4);
    if (source.get(f_, 1, 1) != kUint8 || weight.get(f_, 1, 1) != kInt8) return "packed tensors have another type";
    if (full >= buffers_.size() || empty >= buffers_.size()) return kDamaged;
    const size_t from = static_cast<size_t>(full), to = static_cast<size_t>(empty);
    if (from == to || used_[from] != 1 || used_[to] != 1 || !buffers_[from].field(f_, 0) ||
        buffers_[to].payload(f_).count)
      return "a packed tensor has no bytes of its own, or its weight has some already";
    const int64_t entries = model_.list(f_, 4, 4).start;
    patch_offset(entries + 4 * static_cast<int64_t>(full), buffers_[to].position);
    patch_offset(entries + 4 * static_cast<int64_t>(empty), buffers_[from].position);
    used_[from] = used_[to] = 0;
    widened_[from] = {n_codes(weight), true};
    return f_.bad ? kDamaged : nullptr;
  }

  const char* widen_int4(const Table& tensor) {
    const uint64_t number = tensor.get(f_, 2, 4);
    if (f_.bad) return kDamaged;
    if (tensor.get(f_, 1, 1) != kInt4 || !number) return nullptr;
    if (number >= buffers_.size()) return kDamaged;
    const size_t i = static_cast<size_t>(number);
    const List anywhere = buffers_[i].payload(f_);
    if (f_.bad) return kDamaged;
    if (!anywhere.start && !anywhere.count) return nullptr;
    const uint64_t n = n_codes(tensor);
    const List contents = buffers_[i].list(f_, 0, 1);
    if (f_.bad) return kDamaged;
    if (tensor.field(f_, 6) || !contents.start || contents.count != (n + 1) / 2)
      return "an int4 tensor has not two codes in each byte";
    if (widened_[i].n_codes && widened_[i].n_codes != n) return "a buffer belongs to tensors of different shape";
    if (!widened_[i].n_codes) widened_[i] = {n, false};
    patch(tensor.field(f_, 1), kInt8, 1);
    --used_[i];
    return f_.bad ? kDamaged : nullptr;
  }

  /// Multiply a tensor's shape.
  uint64_t n_codes(const Table& tensor) {
    const List name = tensor.list(f_, 3, 1), shape = tensor.list(f_, 0, 4);
    uint64_t n = 1;
    bool empty = false;
    if (name.count > 1 << 16 || shape.count > kMostRank) f_.bad = true;
    for (uint64_t i = 0; i < shape.count && !f_.bad; ++i) {
      const uint64_t extent = f_.at(shape.start + 4 * static_cast<int64_t>(i), 4);
      if (extent > 0x7fffffff) f_.bad = true;
      empty = empty || !extent;
      n = std::min(n * extent, kMostBytes + 1);  // both below 2^32
    }
    if (empty || n > kMostBytes) f_.bad = true;
    return n;
  }

  const char* write(uint64_t most_bytes, std::vector<uint8_t>& out) {
    struct Content {
      int64_t start, end;
      size_t buffer;
    };
    std::vector<Content> contents, in_file;
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (!buffers_[i].field(f_, 0)) continue;
      const List list = buffers_[i].list(f_, 0, 1);
      contents.push_back({list.start - 4, list.start + static_cast<int64_t>(list.count), i});
    }
    if (f_.bad) return kDamaged;
    in_file = contents;
    std::sort(in_file.begin(), in_file.end(), [](const Content& a, const Content& b) { return a.start < b.start; });
    for (size_t i = 1; i < in_file.size(); ++i)
      if (in_file[i - 1].end > in_file[i].start) return "contents of two buffers overlap";
    int64_t cut = static_cast<int64_t>(f_.size);
    for (size_t i = in_file.size(); i-- > 0; cut = in_file[i].start) {
      const uint8_t *from = f_.data + in_file[i].end, *to = f_.data + cut;
      if (to - from >= static_cast<std::ptrdiff_t>(kAlignment) || std::any_of(from, to, [](uint8_t b) { return b; }))
        break;
    }
    uint64_t most_new = static_cast<uint64_t>(cut);
    std::vector<Content> moved;
    for (const Content& content : contents) {
      const Widened& widened = widened_[content.buffer];
      if (content.start < cut && !widened.n_codes) continue;
      moved.push_back(content);
      most_new += 4 + kAlignment;
      most_new += widened.n_codes ? widened.n_codes : static_cast<uint64_t>(content.end - content.start);
    }
    if (most_new > most_bytes) return "larger than allowed when unpacked";
    out.assign(f_.data, f_.data + cut);
    for (const Content& content : moved) {
      while ((out.size() + 4) % kAlignment) out.push_back(0);
      patch_offset(buffers_[content.buffer].field(f_, 0), static_cast<int64_t>(out.size()));
      const size_t length_at = out.size();
      out.resize(length_at + 4);
      const uint8_t *old = f_.data + content.start + 4, *end = f_.data + content.end;
      const Widened& widened = widened_[content.buffer];
      if (!widened.n_codes) {
        out.insert(out.end(), old, end);
      } else if (widened.packed) {
        if (const char* error = read_codes(old, static_cast<uint64_t>(end - old), widened.n_codes, out)) return error;
      } else {
        for (uint64_t i = 0; i < widened.n_codes; ++i) {
          const unsigned nibble = (old[i / 2] >> (4 * (i % 2))) & 15u;
          out.push_back(static_cast<uint8_t>((nibble ^ 8u) - 8u));
        }
      }
      put(out.data() + length_at, out.size() - length_at - 4);
    }
    std::sort(patches_.begin(), patches_.end(), [](const Patch& a, const Patch& b) { return a.position < b.position; });
    int64_t free_from = 0;
    for (const Patch& p : patches_) {
      if (f_.bad || p.position < free_from || p.position + p.bytes > cut) return kDamaged;
      free_from = p.position + p.bytes;
      if (p.bytes == 1)
        out[static_cast<size_t>(p.position)] = static_cast<uint8_t>(p.value);
      else
        put(out.data() + p.position, p.value);
    }
    return nullptr;
  }

  File f_;
  Table model_;
  std::vector<Table> buffers_;
  std::vector<bool> codes_;
  bool has_codes_ = false;
  std::vector<int64_t> used_;
  std::vector<Widened> widened_;
  std::vector<Patch> patches_;
};

inline const char* unpack(const uint8_t* data, size_t size, std::vector<uint8_t>& out, uint64_t most_bytes) {
  std::vector<uint8_t> full;
  const char* error = Unpacking(data, size).run(most_bytes, full);
  if (!error) out = std::move(full);
  return error;
}

}  // namespace detail

/// Widen every packed and every int4 weight of a TFLite file to int8.
///
/// @param data        the file, packed or not.
/// @param size        its bytes.
/// @param out         gets the unpacked file; empty after an error.
/// @param most_bytes  that the unpacked file may have.
/// @return nullptr, or what is wrong: a constant string.
inline const char* unpack(const std::uint8_t* data, std::size_t size, std::vector<std::uint8_t>& out,
                          std::uint64_t most_bytes = kMostBytes) noexcept {
  out.clear();
#if defined(__cpp_exceptions)
  try {
    return detail::unpack(data, size, out, most_bytes);
  } catch (...) {
    return "out of memory";
  }
#else
  return detail::unpack(data, size, out, most_bytes);
#endif
}

}  // namespace edgecomp

#endif  // EDGECOMP_UNPACK_HPP
