// The operators in a program of their own, without torch, Python or threads: a call a line of words on standard input
//
//   NAME COUNT, then for each argument   f|h|n ROWS COLUMNS BITS...   i|b VALUE   d VALUE   l COUNT VALUES...
//
// (float32, bfloat16 or no tensor, with the bits of each number) and for each call all tensors' bits on standard output.

#include <iostream>
#include <vector>

#include "operator.h"
#include "threads.h"

int main() {
  bem::threads.is_inside = [] { return 1; };
  std::string name, kind;
  for (size_t count; std::cin >> name >> count;) {
    const auto at = bem::operators().find(name);
    if (at == bem::operators().end() || at->second.kinds.size() != count) return 2;
    std::vector<bem::Value> values(count);
    std::vector<std::vector<float>> floats(count);
    std::vector<std::vector<bem::bfloat16>> halves(count);
    std::vector<std::vector<int64_t>> lists(count);
    for (size_t i = 0; i < count; ++i) {
      bem::View& view = values[i].view;
      std::cin >> kind;
      if (kind == "f" || kind == "h") {
        std::cin >> view.rows >> view.columns;
        view.type = kind == "f" ? bem::Type::float32 : bem::Type::bfloat16;
        floats[i].resize(kind == "f" ? view.count() : 0);
        halves[i].resize(kind == "h" ? view.count() : 0);
        for (int64_t j = 0; j < view.count(); ++j) {
          uint32_t bits;
          std::cin >> bits;
          if (kind == "f") std::memcpy(&floats[i][j], &bits, sizeof bits);
          if (kind == "h") halves[i][j].bits = static_cast<uint16_t>(bits);
        }
        view.data = kind == "f" ? static_cast<void*>(floats[i].data()) : halves[i].data();
      } else if (kind == "d") {
        std::cin >> values[i].number;
      } else if (kind == "l") {
        size_t size;
        std::cin >> size;
        lists[i].resize(size);
        for (int64_t& value : lists[i]) std::cin >> value;
        values[i].list = bem::Whole{lists[i].data(), static_cast<int64_t>(size)};
      } else if (kind != "n") {
        std::cin >> values[i].whole;
      }
    }
    at->second.run(values.data());
    for (size_t i = 0; i < count; ++i) {
      for (float value : floats[i]) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        std::cout << bits << ' ';
      }
      for (bem::bfloat16 value : halves[i]) std::cout << value.bits << ' ';
      std::cout << '\n';
    }
  }
}
