// Reads the arrays of NumPy's compressed .npz files, which are zip archives of deflated .npy files.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace guard_ops::test {

// Decompresses RFC 1951's deflate. It reads bit by bit, as the files are small.
class Inflate {
 public:
  Inflate(const uint8_t* from, size_t size) : from_(from), bits_left_(size * 8) {}

  std::string run() {
    for (bool last = false; !last;) {
      last = bits(1);
      const int type = bits(2);
      if (type == 0) {
        stored();
      } else if (type == 1) {
        fixed();
      } else {
        dynamic();
      }
    }
    return out_;
  }

 private:
  // A canonical Huffman code: how many codes each length has, and the symbols in order.
  struct Code {
    int count[16] = {};
    std::vector<int> symbols;

    Code(const int* lengths, int n) {
      for (int s = 0; s < n; ++s) ++count[lengths[s]];
      count[0] = 0;
      for (int length = 1; length < 16; ++length) {
        for (int s = 0; s < n; ++s) {
          if (lengths[s] == length) symbols.push_back(s);
        }
      }
    }
  };

  int bits(int n) {
    int value = 0;
    for (int b = 0; b < n; ++b, ++at_) {
      if (at_ >= bits_left_) throw std::runtime_error("deflate: truncated");
      value |= (from_[at_ / 8] >> (at_ % 8) & 1) << b;
    }
    return value;
  }

  int symbol(const Code& code) {
    for (int length = 1, value = 0, first = 0, index = 0; length < 16; ++length) {
      value |= bits(1);
      const int count = code.count[length];
      if (value - first < count) return code.symbols[index + value - first];
      index += count;
      first = (first + count) << 1;
      value <<= 1;
    }
    throw std::runtime_error("deflate: no such code");
  }

  void stored() {
    at_ = (at_ + 7) / 8 * 8;
    const int size = bits(16);
    bits(16);  // its complement
    for (int n = 0; n < size; ++n) out_.push_back(char(bits(8)));
  }

  void fixed() {
    int lengths[288 + 30];
    for (int s = 0; s < 288; ++s) lengths[s] = s < 144 ? 8 : s < 256 ? 9 : s < 280 ? 7 : 8;
    for (int s = 0; s < 30; ++s) lengths[288 + s] = 5;
    block(Code(lengths, 288), Code(lengths + 288, 30));
  }

  void dynamic() {
    constexpr int order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    const int literals = bits(5) + 257, distances = bits(5) + 1, codes = bits(4) + 4;
    int lengths[288 + 32] = {};
    for (int n = 0; n < codes; ++n) lengths[order[n]] = bits(3);
    const Code code(lengths, 19);
    for (int n = 0; n < literals + distances;) {
      const int s = symbol(code);
      const int length = s == 16 ? lengths[n - 1] : s < 16 ? s : 0;
      for (int r = s < 16    ? 1
                   : s == 16 ? 3 + bits(2)
                   : s == 17 ? 3 + bits(3)
                             : 11 + bits(7);
           r > 0; --r) {
        lengths[n++] = length;
      }
    }
    block(Code(lengths, literals), Code(lengths + literals, distances));
  }

  void block(const Code& literal, const Code& distance) {
    for (int s = symbol(literal); s != 256; s = symbol(literal)) {
      if (s < 256) {
        out_.push_back(char(s));
        continue;
      }
      // Lengths 3 to 258 in steps that double every 4 codes, distances 1 to 32768 every 2.
      const int n = s - 257, length_bits = n < 8 || n == 28 ? 0 : n / 4 - 1;
      int length = n < 8 ? n + 3 : n == 28 ? 258 : ((4 + n % 4) << length_bits) + 3;
      length += bits(length_bits);
      const int d = symbol(distance), distance_bits = d < 4 ? 0 : d / 2 - 1;
      const int back = (d < 4 ? d + 1 : ((2 + d % 2) << distance_bits) + 1) + bits(distance_bits);
      for (; length > 0; --length) out_.push_back(out_.at(out_.size() - back));
    }
  }

  const uint8_t* from_;
  size_t bits_left_, at_ = 0;
  std::string out_;
};

struct Array {
  std::vector<int64_t> shape;
  std::vector<double> data;  // C order
};

class Npz {
 public:
  explicit Npz(const std::string& path) {
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (file == nullptr) throw std::runtime_error("cannot open " + path);
    char buffer[1 << 16];
    for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, file)) > 0;) bytes_.append(buffer, n);
    std::fclose(file);
    const size_t end = bytes_.rfind("PK\5\6");
    size_t at = number<uint32_t>(end + 16);
    for (int n = number<uint16_t>(end + 10); n > 0; --n) {  // the central directory
      const int name = number<uint16_t>(at + 28);
      entries_[bytes_.substr(at + 46, name)] = at;
      at += 46 + name + number<uint16_t>(at + 30) + number<uint16_t>(at + 32);
    }
  }

  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& [name, at] : entries_) out.push_back(name.substr(0, name.size() - 4));
    return out;
  }

  Array operator[](const std::string& key) const {
    const size_t at = entries_.at(key + ".npy"), local = number<uint32_t>(at + 42);
    const size_t begin = local + 30 + number<uint16_t>(local + 26) + number<uint16_t>(local + 28);
    const auto* from = reinterpret_cast<const uint8_t*>(bytes_.data()) + begin;
    const size_t size = number<uint32_t>(at + 20);
    const bool deflated = number<uint16_t>(at + 10) == 8;
    return parse(deflated ? Inflate(from, size).run() : bytes_.substr(begin, size));
  }

 private:
  template <class T>
  T number(size_t at) const {
    T x;
    std::memcpy(&x, bytes_.data() + at, sizeof x);
    return x;
  }

  static Array parse(const std::string& npy) {
    uint16_t header_size;
    std::memcpy(&header_size, npy.data() + 8, 2);
    const std::string header = npy.substr(10, header_size);
    if (header.find("'fortran_order': False") == std::string::npos) {
      throw std::runtime_error("npy: not in C order");
    }
    const bool real = header.find("'<f8'") != std::string::npos;
    if (!real && header.find("'<i8'") == std::string::npos) {
      throw std::runtime_error("npy: dtype of " + header);
    }
    Array out;
    for (size_t at = header.find("'shape': (") + 10; header[at] != ')';) {
      size_t digits = 0;
      out.shape.push_back(std::stoll(header.substr(at), &digits));
      at = header.find_first_not_of(", ", at + digits);
    }
    for (size_t at = 10 + header_size; at < npy.size(); at += 8) {
      double real_value;
      int64_t integer;
      std::memcpy(&real_value, npy.data() + at, 8);
      std::memcpy(&integer, npy.data() + at, 8);
      out.data.push_back(real ? real_value : double(integer));
    }
    return out;
  }

  std::string bytes_;
  std::map<std::string, size_t> entries_;
};

}  // namespace guard_ops::test
